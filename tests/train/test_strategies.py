"""Two processes that share each step: whole networks or shards of one, they learn what one process learns."""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from lightning.fabric.plugins.environments import SLURMEnvironment
from torch import nn
from torch.distributed.device_mesh import init_device_mesh

from vitrail.data.loading import make_loader
from vitrail.models.registry import build_model
from vitrail.processes import is_first
from vitrail.records import Batch
from vitrail.tasks.base import Task
from vitrail.tasks.classify import Classify
from vitrail.train.changes import settings
from vitrail.train.config import TrainConfig
from vitrail.train.engine import fit
from vitrail.train.machine import make_trainer
from vitrail.train.optim import OPTIMIZERS, make_optimizer
from vitrail.train.strategies import gathered, is_sharded, layers, shard, whole

STRATEGIES = ["ddp", "fsdp"]
FAMILIES = [
    "vit", "deit", "beit", "eva02", "hybrid", "swin", "cait", "pvt", "pvt_v2", "crossvit", "convnext",
]  # fmt: skip
"""those without batch norm, whose means are of one process's images alone"""
Pair = Callable[[Callable[[int], None]], None]


class Mapped(Classify):
    """Learns from feature maps: its forward calls `features` and never the network's own."""

    def __init__(self, backbone: Any) -> None:
        super().__init__(backbone)
        self.own = nn.Linear(backbone.num_features, 3)
        nn.init.normal_(self.own.weight, std=0.1, generator=torch.Generator().manual_seed(1))

    def forward(self, batch: Batch) -> dict[str, torch.Tensor]:
        found = self.backbone.features(batch["image"], 1).maps[-1].mean((2, 3))
        return {"loss": nn.functional.cross_entropy(self.own(found), batch["label"])}

    def logits(self, batch: Batch) -> torch.Tensor:
        return self.own(self.backbone.features(batch["image"], 1).maps[-1].mean((2, 3)))


@pytest.fixture
def plain(images, make_task):
    """`plain(task, out, **config)` trains without augmentation, whose seeds are each process's own."""

    def run(task: Task | None = None, out: Path | None = None, resume: bool = False, override=(), **changes: Any):
        config = TrainConfig(**({"epochs": 2, "batch_size": 8, "lr": 1e-2, "device": "cpu"} | changes))
        loaders = [
            make_loader(part, batch_size=config.batch_size, train=part is images[0], seed=0) for part in images
        ]
        return fit(task or make_task(), *loaders, config, out=out, resume=resume, override=override)

    return run


def figures(rows: list[dict[str, float]]) -> list[float]:
    """Losses and scores; the entropy of attention is looked at on the first process's images."""
    return [value for row in rows for name, value in row.items() if name.startswith(("train_", "val_"))]


@pytest.fixture
def shared(plain, in_two_processes: Pair, tmp_path) -> Callable[..., list[dict[str, float]]]:
    """The history of two processes, of 4 images each where one has 8."""

    def run(make: Callable[[], Task | None] = lambda: None, out: str = "two", **options: Any):
        def work(rank: int) -> None:
            rows = plain(make(), tmp_path / out, devices=2, **{"batch_size": 4, **options}).rows
            if rank == 0:
                torch.save(rows, tmp_path / f"{out}.rows")

        in_two_processes(work)
        return torch.load(tmp_path / f"{out}.rows")

    return run


@pytest.mark.forks
@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("options", [{}, {"ema": 0.9, "clip_grad": 0.1, "accumulate": 2}], ids=["plain", "average"])
def test_two_processes_learn_what_one_learns(strategy, options, plain, shared, tmp_path):
    one = plain(out=tmp_path / "one", **options).rows
    assert figures(shared(strategy=strategy, **options)) == pytest.approx(figures(one), rel=1e-5)


@pytest.mark.forks
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_task_that_calls_features_shares_its_gradients(strategy, plain, shared, make_task, tmp_path):
    """The network's own head, which nobody reads, keeps nobody waiting."""
    one = plain(Mapped(make_task().backbone), tmp_path / "one").rows
    two = shared(lambda: Mapped(make_task().backbone), strategy=strategy)
    assert figures(two) == pytest.approx(figures(one), rel=1e-5)


@pytest.mark.forks
def test_a_weight_that_no_logit_depends_on_is_named(plain, in_two_processes, make_task):
    task = make_task()
    task.backbone.blocks[0].spare = nn.Parameter(torch.zeros(3))

    def work(rank: int) -> None:
        with pytest.raises(ValueError, match=r"^with several .* is trained; got backbone\.blocks\.0\.spare beside"):
            plain(task, devices=2)

    in_two_processes(work)


@pytest.mark.forks
def test_shards_need_a_folder(plain, in_two_processes):
    def work(rank: int) -> None:
        with pytest.raises(ValueError, match=r"--strategy fsdp needs a folder for its checkpoints, .*; got none: name one"):
            plain(devices=2, strategy="fsdp")

    in_two_processes(work)


# ---- layers


def sum_of_parts(rank: int, families: list[str], folder: Path) -> None:
    """How far the gradients of a network in shards are from those of a whole one, of each family."""
    dist.init_process_group("gloo")
    mesh = init_device_mesh("cpu", (2,))
    found = {}
    for name in families:
        torch.manual_seed(0)
        tasks = [Classify(build_model(f"{name}_debug", num_classes=3)) for _ in range(2)]
        tasks[1].load_state_dict(tasks[0].state_dict())
        shard(tasks[1], mesh)
        images = torch.randn(4, 3, *tasks[0].backbone.preprocess.img_size)
        batch = {"image": images, "label": torch.arange(4) % 3}
        tasks[0](batch)["loss"].backward()
        tasks[1]({key: value[2 * rank : 2 * rank + 2] for key, value in batch.items()})["loss"].backward()
        largest = max(p.grad.abs().max() for p in tasks[0].parameters())
        pairs = zip(tasks[0].named_parameters(), tasks[1].parameters(), strict=True)
        with gathered(tasks[1]), torch.no_grad():
            logits = tasks[1].backbone(images)
        apart = {n: (p.grad - whole(q.grad)).abs().max() / largest for (n, p), q in pairs}
        found[name] = apart | {"logits": (logits - tasks[0].backbone(images)).detach().abs().max()}
    torch.save(found, folder / f"{rank}.pt")


@pytest.mark.forks
def test_every_family_has_the_gradients_of_a_whole_network(in_two_processes, tmp_path):
    in_two_processes(lambda rank: sum_of_parts(rank, FAMILIES, tmp_path))
    for rank in (0, 1):
        for name, apart in torch.load(tmp_path / f"{rank}.pt").items():
            assert max(apart.values()) < 1e-5, (name, apart)


@pytest.mark.parametrize("name", FAMILIES)
def test_layers_are_most_of_a_network(name):
    task = Classify(build_model(f"{name}_debug"))
    found = {p for layer in layers(task) for p in layer.parameters()}
    blocks = {p for n, p in task.named_parameters() if "block" in n or "stages" in n}
    assert found
    assert sum(p.numel() for p in found) > 0.5 * sum(p.numel() for p in blocks)
