"""Two processes that share each step: whole networks or shards of one, they learn what one process learns."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from lightning.fabric.plugins.environments import SLURMEnvironment
from safetensors.torch import load_file
from torch import nn
from torch.distributed.device_mesh import init_device_mesh

from vitrail.data.loading import make_loader
from vitrail.models.registry import build_model
from vitrail.records import Batch
from vitrail.tasks.base import Task
from vitrail.tasks.classify import Classify
from vitrail.tasks.distill import Distill
from vitrail.train.config import TrainConfig
from vitrail.train.engine import fit
from vitrail.train.finite import NonFiniteLoss
from vitrail.train.machine import make_trainer
from vitrail.train.optim import OPTIMIZERS, make_optimizer
from vitrail.train.strategies import gathered, layers, shard, whole

STRATEGIES = ["ddp", "fsdp"]
FAMILIES = ["deit", "beit", "hybrid", "swin", "cait", "pvt", "pvt_v2", "crossvit", "convnext"]
"""one of each skeleton without batch norm, whose means are of one process's images alone"""
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


class Steep(Classify):
    """In pass number `at` its loss has a gradient that is no number, of a weight that the first process has."""

    def __init__(self, backbone: Any, at: int) -> None:
        super().__init__(backbone)
        self.passes, self.at = 0, at

    def forward(self, batch: Batch) -> dict[str, torch.Tensor]:
        self.passes += 1
        loss = super().forward(batch)["loss"]
        return {"loss": loss + (self.backbone.head.weight[0].sum() * 0).sqrt() if self.passes == self.at else loss}


@pytest.fixture
def plain(images, make_task):
    """`plain(task, out, **config)` trains without augmentation, whose seeds are each process's own."""

    def run(task: Task | None = None, out: Path | None = None, resume: bool = False, override=(), **changes: Any):
        config = TrainConfig(**({"epochs": 2, "batch_size": 8, "lr": 1e-2, "device": "cpu"} | changes))
        loaders = [make_loader(part, batch_size=config.batch_size, train=part is images[0], seed=0) for part in images]
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
def test_two_processes_learn_what_one_learns(strategy, plain, shared, tmp_path):
    options = {"ema": 0.9, "clip_grad": 0.1, "accumulate": 2}
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
def test_shards_learn_from_a_teacher_and_by_adapters(plain, shared, make_task, tmp_path):
    def make() -> Task:
        return Distill(make_task().backbone, make_task(seed=5).backbone)

    options = {"freeze": "lora:2", "optimizer": "schedule_free", "teacher": "another"}
    two = shared(make, strategy="fsdp", **options)
    assert figures(two) == pytest.approx(figures(plain(make(), tmp_path / "one", **options).rows), rel=1e-5)
    one, both = (load_file(tmp_path / run / "model" / "model.safetensors") for run in ("one", "two"))
    assert one.keys() == both.keys()
    for name, value in one.items():
        torch.testing.assert_close(both[name], value, rtol=1e-3, atol=1e-4)


@pytest.mark.forks
def test_a_run_goes_on_under_another_strategy(plain, in_two_processes, tmp_path):
    """At an epoch's end, with a constant learning rate, which knows nothing of how many are to come."""
    steady = {"ema": 0.9, "schedule": "constant", "warmup_epochs": 0}
    one = plain(out=tmp_path / "one", epochs=3, **steady).rows

    def work(rank: int) -> None:
        for epochs, strategy in enumerate(("fsdp", "ddp", "fsdp"), start=1):
            own = {"devices": 2, "batch_size": 4, "epochs": epochs, "strategy": strategy, **steady}
            rows = plain(out=tmp_path / "two", resume=epochs > 1, **own).rows
        if rank == 0:
            torch.save(rows, tmp_path / "rows")

    in_two_processes(work)
    assert figures(torch.load(tmp_path / "rows")) == pytest.approx(figures(one), rel=1e-5)


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
        with pytest.raises(
            ValueError, match=r"--strategy fsdp needs a folder for its checkpoints, .*; got none: name one"
        ):
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
    found = sum(p.numel() for layer in layers(task) for p in layer.parameters())
    inner = {name for names in task.backbone.layer_groups()[1:-1] for name in names}
    assert found > 0.7 * sum(p.numel() for name, p in task.backbone.named_parameters() if name in inner)


# ---- optimisers and guards


def stepped(rank: int, make_task: Callable[..., Classify], folder: Path) -> None:
    """How far weights are from those of one process, of each optimiser."""
    dist.init_process_group("gloo")
    mesh, found = init_device_mesh("cpu", (2,)), {}
    for name in OPTIMIZERS:
        config = TrainConfig(optimizer=name, lr=1e-3)
        tasks = [make_task(), make_task()]
        shard(tasks[1], mesh)
        one, two = (make_optimizer(task, config) for task in tasks)
        for step in range(2):
            images = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(step))
            batch = {"image": images, "label": torch.arange(4) % 3}
            for task, optimizer, own in zip(
                tasks, (one, two), (slice(None), slice(2 * rank, 2 * rank + 2)), strict=True
            ):
                optimizer.zero_grad()
                task({key: value[own] for key, value in batch.items()})["loss"].backward()
                optimizer.step()
        pairs = zip(tasks[0].parameters(), tasks[1].parameters(), strict=True)
        found[name] = max((p - whole(q)).detach().abs().median() for p, q in pairs)
    torch.save(found, folder / f"{rank}.pt")


@pytest.mark.full
@pytest.mark.forks
def test_every_optimizer_takes_the_steps_of_one_process(make_task, in_two_processes, tmp_path):
    """On the median: where a gradient is nought but rounding, Adam's step and Lion's have any sign. Muon's matrices are
    made orthogonal in bf16.
    """
    for name in OPTIMIZERS:
        make_optimizer(make_task(), TrainConfig(optimizer=name))  # imports what both would import
    in_two_processes(lambda rank: stepped(rank, make_task, tmp_path))
    apart = torch.load(tmp_path / "0.pt")
    assert apart.keys() == OPTIMIZERS.keys()
    assert apart.pop("muon") < 1e-4
    assert max(apart.values()) < 1e-8


@pytest.mark.forks
def test_a_gradient_that_one_process_finds_bad_is_a_step_that_none_takes(plain, in_two_processes, make_task, tmp_path):
    def work(rank: int) -> None:
        task = Steep(make_task().backbone, at=3 if rank else 0)
        history = plain(task, tmp_path / "run", devices=2, batch_size=4, strategy="fsdp", on_nan="skip:3")
        assert history["skipped_steps"] == [1, 1]
        with pytest.raises(NonFiniteLoss, match=r"got one of backbone\.head\.weight that is not, in epoch 1, batch 3"):
            plain(Steep(make_task().backbone, at=3 if rank else 0), tmp_path / "other", devices=2, strategy="fsdp")

    in_two_processes(work)


def test_sharding_and_a_scaler_exclude_each_other():
    with pytest.raises(ValueError, match="--precision must be fp32 or bf16 with --strategy fsdp; got fp16"):
        TrainConfig(strategy="fsdp", precision="fp16")


def test_slurm_has_no_checkpoints_of_its_own(monkeypatch, tmp_path):
    for name, value in {"NTASKS": 2, "NTASKS_PER_NODE": 2, "PROCID": 0, "LOCALID": 0, "NODEID": 0}.items():
        monkeypatch.setenv(f"SLURM_{name}", str(value))
    trainer = make_trainer(TrainConfig(devices=2, device="cpu"), "cpu", [], tmp_path)
    cluster = trainer.strategy.cluster_environment
    assert isinstance(cluster, SLURMEnvironment) and not cluster.auto_requeue
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "under srun")
    for name in ("RANK", "LOCAL_RANK"):
        monkeypatch.setenv(name, "0")
    assert not isinstance(
        make_trainer(TrainConfig(devices=2, device="cpu"), "cpu", [], tmp_path).strategy.cluster_environment,
        SLURMEnvironment,
    )
