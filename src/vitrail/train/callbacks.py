"""What acts on a run while it runs: unfreezing, stopping rules, signals, who looks on; and in which order."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer

from vitrail.records import History
from vitrail.tasks.base import Task
from vitrail.train.checkpoint import Checkpoints
from vitrail.train.config import TrainConfig
from vitrail.train.ema import WeightEma
from vitrail.train.entropy import EntropyGuard
from vitrail.train.finetune import freezing, settle, unfrozen
from vitrail.train.history import HistoryLog
from vitrail.train.loggers import Logged, RunLog
from vitrail.train.profile import Profile
from vitrail.train.progress import ProgressBar

Watch = Callable[[History], None]
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


class LookOn(Callback):
    """Shows the first process's history, after every epoch that was kept, to one who may end the run by raising."""

    def __init__(self, record: HistoryLog, watch: Watch) -> None:
        self.record, self.watch = record, watch

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.is_global_zero:
            self.watch(self.record.history)


def run_callbacks(
    task: Task, config: TrainConfig, device: str, folder: Path | None, record: HistoryLog, ema: WeightEma | None,
    stop: StopOnSignal, logs: Iterable[RunLog], watch: Watch | None,
) -> list[Callback]:  # fmt: skip
    """All of a run's, in the order in which they act: averaging before anything is kept, and keeping before a stop."""
    kind, every = freezing(config.freeze)
    return [
        *([Profile(record.waits, config, device, folder)] if config.profile else []),
        *([Unfreeze(task, every)] if kind == "gradual" else []),
        *([ema] if ema else []),
        *([EntropyGuard(record, config.entropy_floor)] if config.entropy_floor else []),
        record,
        EarlyStop(record, config.patience, config.max_minutes),
        *(Logged(record, log) for log in logs),
        ProgressBar(record),
        stop.checkpoints,
        stop,
        *([LookOn(record, watch)] if watch else []),
    ]


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
