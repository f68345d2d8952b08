"""A run that takes a tenth of a second: sixty 8-pixel images, a transformer of two layers of width 16."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from typing import Any

import pytest
import torch

from vitrail.data.augment import BatchAugment
from vitrail.data.imagesets import TensorSet
from vitrail.data.loading import make_loader
from vitrail.models.registry import build_model
from vitrail.records import Preprocess
from vitrail.tasks.classify import Classify
from vitrail.train.config import TrainConfig
from vitrail.train.engine import fit

CLASSES = ("dark", "grey", "light")
RECIPE = {"epochs": 3, "batch_size": 8, "lr": 1e-2, "device": "cpu"}


def _images(count: int) -> TensorSet:
    labels = torch.arange(count) % 3
    noise = torch.rand(count, 3, 8, 8, generator=torch.Generator().manual_seed(count)) * 90
    pixels = (noise + labels.view(-1, 1, 1, 1) * 80).to(torch.uint8)
    return TensorSet(pixels, labels, CLASSES, [str(n) for n in range(count)])


@pytest.fixture(scope="session")
def images() -> tuple[TensorSet, TensorSet]:
    return _images(60), _images(30)


@pytest.fixture
def make_task() -> Callable[..., Classify]:
    def make(seed: int = 0, **options: Any) -> Classify:
        torch.manual_seed(seed)
        shape = {"img_size": 8, "patch_size": 4, "embed_dim": 16, "depth": 2, "num_heads": 2, "num_classes": 3}
        model = build_model("vit_tiny", **shape, **options)
        model.preprocess, model.classes = Preprocess(img_size=(8, 8), mean=(0.5,) * 3, std=(0.25,) * 3), CLASSES
        return Classify(model)

    return make


@pytest.fixture
def train(images, make_task) -> Callable[..., Any]:
    """`train(task, out=…, resume=…, override=…, workers=…, hook=…, images=…, **config)`.

    `hook(number)` is called before every batch.
    """

    def run(
        task=None, *, out=None, resume=False, override=(), workers=0, hook=None, images=images, **changes
    ):  # fmt: skip
        config = TrainConfig(**(RECIPE | changes))
        task = make_task() if task is None else task
        plain = BatchAugment(config, task.backbone.preprocess, 3)

        def augment(batch, number, total):
            if hook:
                hook(number)
            return plain(batch, number, total)

        loaders = [
            make_loader(part, batch_size=config.batch_size, train=part is images[0], seed=config.seed, workers=workers)
            for part in images
        ]
        return fit(task, *loaders, config, augment=augment, out=out, resume=resume, override=override)

    return run


@pytest.fixture
def fingerprint() -> Callable[[torch.nn.Module], str]:
    def hashed(module: torch.nn.Module) -> str:
        digest = hashlib.sha256()
        for name, tensor in module.state_dict().items():
            digest.update(name.encode() + tensor.contiguous().numpy().tobytes())
        return digest.hexdigest()

    return hashed
