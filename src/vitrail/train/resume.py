"""What makes a run, stopped and gone on with, the run that was never stopped.

| what                | by                                                                                   |
|---------------------|--------------------------------------------------------------------------------------|
| the same images     | a sampler that is a pure function of (seed, epoch), told where to begin              |
| the same randomness | a seed for every batch, from (seed, number of the batch over all epochs, process)    |
| the same recipe     | `train.changes`: only where a run runs, how long, and what it shows may change       |
| the same kernels    | `same_kernels`: on a GPU as far as PyTorch has such                                  |
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from typing import Any, Protocol

import torch
from lightning.pytorch import Trainer
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.data import DataLoader, DistributedSampler

from vitrail.data.imagesets import ImageSet
from vitrail.data.loading import OrderedBatches
from vitrail.layers.linear import plain_linear
from vitrail.train.config import TrainConfig
from vitrail.train.history import Waits

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

    def __init__(self, loader: Loader, trainer: Trainer, waits: Waits) -> None:
        self.loader, self.trainer, self.waits = loader, trainer, waits

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
        yield from self.waits.over(self.loader, start)


def begin_epoch_anew(checkpoint: dict[str, Any]) -> None:
    """Makes a checkpoint say that the epoch that was running has not begun; at an epoch's end it says so already."""
    progress = checkpoint["loops"]["fit_loop"]["epoch_progress"]
    for counts in (progress["current"], progress["total"]):
        counts["ready"] = counts["started"] = counts["processed"]


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
    if config.world > 1 and sharing_order(loader) is None:
        raise ValueError(
            f"--devices {config.devices} and --num-nodes {config.num_nodes} need a training loader that gives each "
            f"process its own images; got {_described(loader)}: use vitrail.data.loading.make_loader, or a DataLoader "
            "with sampler=torch.utils.data.DistributedSampler(…)"
        )


def refuse_uneven(held_out: Iterable[ImageSet], config: TrainConfig) -> None:
    """Raises `ValueError` before training for what would end an evaluation after it: see `OrderedBatches`."""
    for images in held_out:
        len(OrderedBatches(len(images), config.batch_size, shuffle=False, rank=0, world=config.world))


def _described(loader: Loader) -> str:
    if isinstance(loader, DataLoader):
        return f"a DataLoader with {type(loader.sampler).__name__}"
    return type(loader).__name__


@contextmanager
def same_kernels(wanted: bool) -> Iterator[None]:
    """No kernel that a timing chooses; and, if `wanted`, on a GPU only such as repeat themselves bit for bit.

    PyTorch warns of those that do not. Attention keeps to its flash and plain kernels, since the backward pass of the
    others adds up in any order. cuBLAS is held too if the process has not multiplied matrices on the GPU before. All is
    restored afterwards.
    """
    with plain_linear(), _repeating() if wanted else nullcontext():
        yield


@contextmanager
def _repeating() -> Iterator[None]:
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
