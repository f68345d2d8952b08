"""What acts on a run while it runs: unfreezing, stopping rules, signals, TensorBoard."""

from __future__ import annotations

import logging
import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any

from lightning.pytorch import Callback, LightningModule, Trainer

from vitrail.tasks.base import Task
from vitrail.train.checkpoint import Checkpoints
from vitrail.train.finetune import settle, unfrozen
from vitrail.train.history import HistoryLog

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter

LOG = logging.getLogger("vitrail")
SIGNALS = (signal.SIGINT, signal.SIGTERM)
AGREE_EVERY = 20
"""optimiser steps between two agreements of all processes on whether one of them got a signal"""


class Unfreeze(Callback):
    """Trains one layer more, from the last on, after every `every` epochs; what was frozen by hand stays so.

    Parameters without a gradient are passed over by the optimiser: neither moment nor weight decay touches them.
    """

    def __init__(self, task: Task, every: int) -> None:
        self.task, self.every = task, every
        self.free = {name for name, parameter in task.named_parameters() if parameter.requires_grad}

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._settle(trainer)  # a run that is gone on with within an epoch does not start it

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._settle(trainer)

    def _settle(self, trainer: Trainer) -> None:
        settle(self.task, unfrozen(self.task, self.every, trainer.current_epoch) & self.free)


class EarlyStop(Callback):
    """Ends a run that no longer gets better, or whose time is up. 0 turns either rule off.

    `patience` counts epochs since the best figure was first reached. `max_minutes` is kept as long as no epoch takes
    longer than the one before.
    """

    def __init__(self, record: HistoryLog, patience: int, max_minutes: float) -> None:
        self.record, self.patience, self.max_minutes = record, patience, max_minutes

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._decide(trainer)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._decide(trainer)

    def _decide(self, trainer: Trainer) -> None:
        stop = bool(self.record.history.rows) and (self._stale() or self._late())
        trainer.should_stop = trainer.strategy.broadcast(stop)

    def _stale(self) -> bool:
        best, rows, name = self.record.best, self.record.history.rows, self.record.monitor
        if not self.patience or best is None:
            return False
        reached = next(row["epoch"] for row in rows if row.get(name) == best[name])
        return rows[-1]["epoch"] - reached >= self.patience

    def _late(self) -> bool:
        seconds = self.record.history["seconds"]
        return bool(self.max_minutes) and sum(seconds) + seconds[-1] > 60 * self.max_minutes


class StopRequested(Exception):
    """Ends the run from within; `fit` turns it into `Interrupted`."""


class StopOnSignal(Callback):
    """Ctrl-C and SIGTERM end the run after the running optimiser step or validation, once `last.ckpt` is written.

    A second signal ends it at once, with the previous `last.ckpt`. Only the main thread can listen, and only to signals
    whose handler Python knows. Whoever runs the trainer does so within `handlers_kept` and calls `heed` afterwards, for
    what came after the last epoch.
    """

    def __init__(self, checkpoints: Checkpoints) -> None:
        self.checkpoints = checkpoints
        self.signal: int | None = None

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        for number in _handlers():
            signal.signal(number, self._heard)

    def _heard(self, number: int, frame: FrameType | None) -> None:
        if self.signal is not None:
            raise StopRequested
        self.signal = number
        os.write(2, b"stopping after this step; once more to stop at once\n")  # print may not be entered twice

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        steps, rest = divmod(batch_idx + 1, trainer.accumulate_grad_batches)
        last = batch_idx + 1 == trainer.num_training_batches  # validation and the epoch's own checkpoint follow
        if not rest and not last and self._agreed(trainer, steps):
            self.checkpoints.save(trainer)
            raise StopRequested

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.heed(trainer)

    def heed(self, trainer: Trainer) -> None:
        """Raises `StopRequested` if any process got a signal by now."""
        if self._agreed(trainer, 0):
            raise StopRequested

    def _agreed(self, trainer: Trainer, steps: int) -> bool:
        heard = self.signal is not None
        if trainer.world_size == 1:
            return heard
        return steps % AGREE_EVERY == 0 and trainer.strategy.reduce_boolean_decision(heard, all=False)


@contextmanager
def handlers_kept() -> Iterator[None]:
    """The handlers of Ctrl-C and SIGTERM are afterwards what they were: ours go, and those that Lightning leaves."""
    before = _handlers()
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _handlers() -> dict[int, Any]:
    """Those that may be replaced: in the main thread, and where Python knows what to put back."""
    if threading.current_thread() is not threading.main_thread():
        return {}
    known = {number: signal.getsignal(number) for number in SIGNALS}
    return {number: handler for number, handler in known.items() if handler is not None}


class TensorBoardLog(Callback):
    """Each epoch's figures as TensorBoard events in `folder`. Raises `ValueError` if the package is missing.

    Where the events cannot be written, which is said once, the run goes on without them.
    """

    def __init__(self, record: HistoryLog, folder: Path) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ModuleNotFoundError as error:
            raise ValueError(
                "--log tensorboard needs the tensorboard package; it is not installed: pip install 'vitrail[logging]'"
            ) from error
        self.record, self.folder = record, folder
        self._open = SummaryWriter
        self._writer: SummaryWriter | None = None

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.is_global_zero:
            with self._or_without():
                self._writer = self._open(str(self.folder), purge_step=len(self.record.history) + 1)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        row = self.record.history.rows[-1]
        with self._or_without():
            if self._writer:
                for name, value in row.items():
                    self._writer.add_scalar(name, value, int(row["epoch"]))
                self._writer.flush()

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._close()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self._close()

    def _close(self) -> None:
        writer, self._writer = self._writer, None
        with self._or_without():
            if writer:
                writer.close()

    @contextmanager
    def _or_without(self) -> Iterator[None]:
        """An error of the writer ends the events, not the run."""
        try:
            yield
        except Exception as error:  # whatever a writer of somebody else's raises
            self._writer = None  # not closed: that would wait for the thread that failed
            LOG.warning(
                "TensorBoard's events in %s cannot be written (%s): training goes on without them, and history.csv "
                "and checkpoints hold its figures", self.folder, getattr(error, "strerror", None) or error,
            )  # fmt: skip
