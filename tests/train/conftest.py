"""A run that takes a tenth of a second: sixty 8-pixel images, a transformer of two layers of width 16."""

from __future__ import annotations

import hashlib
import multiprocessing
import os
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
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

ALONE = "VITRAIL_TEST_ALONE"
"""set where a test already has an interpreter of its own"""
ROOT = Path(__file__).parents[2]
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

        def augment(batch, number):
            if hook:
                hook(number)
            return plain(batch, number)

        loaders = [
            make_loader(part, batch_size=config.batch_size, train=part is images[0], seed=config.seed, workers=workers)
            for part in images
        ]
        return fit(task, *loaders, config, augment=augment, out=out, resume=resume, override=override)

    return run


@pytest.hookimpl(tryfirst=True)
def pytest_pyfunc_call(pyfuncitem: pytest.Function) -> bool | None:
    """A test marked `forks` runs in an interpreter of its own where the forks of this one could not train.

    PyTorch refuses backward passes in a fork of a process whose autograd has started threads, as some tests make it do.
    """
    if not pyfuncitem.get_closest_marker("forks") or ALONE in os.environ or _forks_can_train():
        return None
    words = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-m", "", "--rootdir", str(ROOT)]
    done = subprocess.run(
        [*words, f"{ROOT / pyfuncitem.nodeid}"],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env={**os.environ, ALONE: "1"},
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return True


def _forks_can_train() -> bool:
    process = multiprocessing.get_context("fork").Process(target=_train_quietly)
    process.start()
    process.join()
    return process.exitcode == 0


def _train_quietly() -> None:
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
    torch.ones(1, requires_grad=True).sum().backward()


@pytest.fixture
def in_two_processes() -> Callable[[Callable[[int], None]], None]:
    """Runs `work(rank)` in two processes of one run, as torchrun starts them, until both have ended well."""

    def run(work: Callable[[int], None]) -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(probe.getsockname()[1])}

        def one(rank: int) -> None:
            own = {"RANK": str(rank), "LOCAL_RANK": str(rank), "TORCHELASTIC_RUN_ID": "a run", "WORLD_SIZE": "2"}
            os.environ.update(address | own)
            os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
            work(rank)

        both = [multiprocessing.get_context("fork").Process(target=one, args=(rank,)) for rank in (0, 1)]
        for process in both:
            process.start()
        for process in both:
            process.join(60)
            process.kill()
        assert [process.exitcode for process in both] == [0, 0]

    return run


@pytest.fixture
def fingerprint() -> Callable[[torch.nn.Module], str]:
    def hashed(module: torch.nn.Module) -> str:
        digest = hashlib.sha256()
        for name, tensor in module.state_dict().items():
            digest.update(name.encode() + tensor.contiguous().numpy().tobytes())
        return digest.hexdigest()

    return hashed
