"""What a run runs on: device, processes, and the trainer that drives them."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.plugins.environments.slurm import SLURMEnvironment
from lightning.fabric.plugins.environments.torchelastic import TorchElasticEnvironment
from lightning.pytorch import Callback, Trainer

from vitrail.names import require
from vitrail.processes import refuse_strangers
from vitrail.tasks.base import pick_device
from vitrail.train.checkpoint import WholeFiles
from vitrail.train.config import TrainConfig
from vitrail.train.progress import quiet
from vitrail.train.strategies import STRATEGIES

PRECISIONS: dict[str, Any] = {"fp32": "32-true", "bf16": "bf16-mixed", "fp16": "16-mixed"}
DEBUG_BATCHES = 4
LOST = r"Connection (reset|closed) by|Broken pipe|[Tt]imed out|remote process exited"
"""what gloo and NCCL say where another process does not answer"""


class ProcessLost(ValueError):
    """Another process of the run ended, or is out of reach: no step can be taken without it."""


def machine(config: TrainConfig) -> str:
    """`cpu`, `cuda` or `mps`. Raises `ValueError` where it is not here, or cannot do what was asked for."""
    device = pick_device(config.device).type
    require(device != "cpu" or config.precision != "fp16", "precision", "be fp32 or bf16 on the CPU", "fp16")
    refuse_strangers(config.world)
    here = {"cuda": torch.cuda.device_count(), "mps": 1}.get(device, config.devices)
    require(
        config.devices <= here, "devices", f"be at most {here}, the number of {device} devices here", config.devices
    )
    return device


@contextmanager
def in_company(config: TrainConfig, farewell: Callable[[], str]) -> Iterator[None]:
    """Within it, that another process was lost is a `ProcessLost` that ends with `farewell()`."""
    try:
        yield
    except RuntimeError as error:
        if config.world == 1 or not re.search(LOST, str(error)):
            raise
        what = str(error).splitlines()[0].partition(". ")[0]
        raise ProcessLost(
            f"all {config.world} processes of a run take each step together; one ended, or is out of reach ({what}): "
            f"see what it said; {farewell()}"
        ) from error


def shares(config: TrainConfig) -> bool:
    """Whether no process has the network whole."""
    return config.strategy == "fsdp" and config.world > 1


def make_trainer(config: TrainConfig, device: str, callbacks: list[Callback], folder: Path | None) -> Trainer:
    """Lightning's trainer for a run of this config."""
    limit = DEBUG_BATCHES if config.debug else None
    with quiet():
        return Trainer(
            accelerator=device, devices=config.devices, num_nodes=config.num_nodes, use_distributed_sampler=False,
            strategy=STRATEGIES[config.strategy]() if config.world > 1 else "auto",
            precision=PRECISIONS[config.precision], plugins=[WholeFiles(), *_clusters()], callbacks=callbacks,
            max_epochs=config.epochs, limit_train_batches=limit, limit_val_batches=limit, num_sanity_val_steps=0,
            accumulate_grad_batches=config.accumulate,
            logger=False, enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
            default_root_dir=folder,
        )  # fmt: skip


def _clusters() -> list[SLURMEnvironment]:
    """SLURM, where srun started the processes: without Lightning's answer to its signals, a checkpoint of its own."""
    alone = SLURMEnvironment.detect() and not TorchElasticEnvironment.detect()
    return [SLURMEnvironment(auto_requeue=False)] if alone else []
