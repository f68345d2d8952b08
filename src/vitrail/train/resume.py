"""What makes a run, stopped and gone on with, the run that was never stopped.

| what                | by                                                                                   |
|---------------------|--------------------------------------------------------------------------------------|
| the same images     | a sampler that is a pure function of (seed, epoch), told where to begin              |
| the same randomness | a seed for every batch, from (seed, number of the batch over all epochs, process)    |
| the same recipe     | `refuse_changes`: only where a run runs, how long, and what it shows may change      |
| the same kernels    | always on the CPU; on a GPU `same_kernels`, as far as PyTorch has such kernels       |
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import asdict
from itertools import islice
from typing import Any, Protocol

import torch
from lightning.pytorch import Trainer
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.data import DataLoader, DistributedSampler

from vitrail.data.loading import OrderedBatches
from vitrail.train.config import TrainConfig

LOG = logging.getLogger("vitrail")
FREE = frozenset({
    "out", "data_dir", "download", "in_memory", "workers", "worker_timeout", "device", "deterministic",
    "log", "checkpoint_every", "patience", "max_minutes", "epochs", "on_nan",
})  # fmt: skip
"""fields that a resumed run may be told anew: they decide neither what is learnt from nor how"""
WORKSPACE = "CUBLAS_WORKSPACE_CONFIG"
"""without which cuBLAS need not repeat itself; it is read when the first matrices are multiplied"""


class Loader(Protocol):
    """What may be trained and validated on."""

    def __iter__(self) -> Iterator[Any]: ...

    def __len__(self) -> int: ...


class EpochLoader:
    """A loader as Lightning sees it: something with a length to iterate, whose sampler it leaves alone.

    A pass begins in the epoch and at the batch where the trainer stands when the first batch is asked for; what a
    loader with an order of its own gives before that batch is passed over.
    """

    def __init__(self, loader: Loader, trainer: Trainer) -> None:
        self.loader, self.trainer = loader, trainer

    def __len__(self) -> int:
        return len(self.loader)

    def __iter__(self) -> Iterator[Any]:
        order, epoch = sharing_order(self.loader), self.trainer.current_epoch
        start = self.trainer.fit_loop.batch_idx + 1 if self.trainer.training else 0
        if self.trainer.training and isinstance(order, OrderedBatches):
            order.set_epoch(epoch, start)
            start = 0
        elif self.trainer.training and order is not None:
            order.set_epoch(epoch)
        yield from islice(self.loader, start, None)


def sharing_order(loader: Loader) -> OrderedBatches | DistributedSampler[Any] | None:
    """What gives each process images of its own; None where a loader has no such thing."""
    if not isinstance(loader, DataLoader):
        return None
    batches = loader.batch_sampler
    for order in (batches, loader.sampler, getattr(batches, "sampler", None)):
        if isinstance(order, OrderedBatches | DistributedSampler):
            return order
    return None


def refuse_empty(train_loader: Loader, val_loader: Loader | None) -> None:
    """Raises `ValueError` for a loader without batches, or without a length."""
    for what, loader in (("training", train_loader), ("validation", val_loader)):
        if loader is None:
            continue
        try:
            count = len(loader)
        except TypeError:
            raise ValueError(
                f"{what} needs a loader that knows its number of batches; got {_described(loader)} without a length: "
                "give its data set a __len__"
            ) from None
        if not count:
            raise ValueError(f"{what} needs at least one batch; the loader has none: add images")


def refuse_unshared(loader: Loader, config: TrainConfig) -> None:
    """Raises `ValueError` where several processes would all train on the same images."""
    if config.devices * config.num_nodes > 1 and sharing_order(loader) is None:
        raise ValueError(
            f"--devices {config.devices} and --num-nodes {config.num_nodes} need a training loader that gives each "
            f"process its own images; got {_described(loader)}: use vitrail.data.loading.make_loader, or a DataLoader "
            "with sampler=torch.utils.data.DistributedSampler(…)"
        )


def _described(loader: Loader) -> str:
    if isinstance(loader, DataLoader):
        return f"a DataLoader with {type(loader.sampler).__name__}"
    return type(loader).__name__


def told(config: TrainConfig) -> dict[str, Any]:
    """What a checkpoint remembers of the run's config."""
    return asdict(config)


def refuse_changes(before: Mapping[str, Any], config: TrainConfig) -> None:
    """Raises `ValueError` for any field outside `FREE` that differs from what the run was told `before`.

    `epochs` may change, so that a run can be made longer, and is told of: the learning rate of every step depends on
    it, so such a run is not the one that was told so from the start.
    """
    now = told(config)
    changed = {name: said for name, said in before.items() if name in now and said != now[name]}
    if other := [name for name in changed if name not in FREE]:
        said = "; ".join(f"--{name.replace('_', '-')} was {before[name]}, got {now[name]}" for name in other)
        raise ValueError(
            f"a resumed run must be told what it was told before; {said}: take the old values, or a new --out"
        )
    if "epochs" in changed:
        LOG.warning(
            "--epochs was %d and is %d: from here on the learning rate follows the schedule of %d",
            before["epochs"], config.epochs, config.epochs,
        )  # fmt: skip


@contextmanager
def same_kernels(wanted: bool) -> Iterator[None]:
    """PyTorch held to kernels that repeat themselves bit for bit; it warns of those that do not. Restored afterwards.

    Attention keeps to its flash and plain kernels, since the backward pass of the others adds up in any order. cuBLAS
    is held too if the process has not multiplied matrices on the GPU before.
    """
    if not wanted:
        yield
        return
    modes = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    workspace, timed = os.environ.get(WORKSPACE), torch.backends.cudnn.benchmark
    with ExitStack() as back:
        back.callback(torch.use_deterministic_algorithms, modes[0], warn_only=modes[1])
        back.callback(setattr, torch.backends.cudnn, "benchmark", timed)
        if workspace is None:
            back.callback(os.environ.pop, WORKSPACE, None)
        os.environ.setdefault(WORKSPACE, ":4096:8")
        torch.use_deterministic_algorithms(True, warn_only=True)
        torch.backends.cudnn.benchmark = False
        back.enter_context(sdpa_kernel([SDPBackend.FLASH_ATTENTION, SDPBackend.MATH]))
        yield
