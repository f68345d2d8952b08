"""What a run shows: one line an epoch, below it, on a terminal, a live bar, and nothing of Lightning's own."""

from __future__ import annotations

import logging
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TaskProgressColumn, TextColumn, TimeRemainingColumn

from vitrail.tasks.base import batch_count
from vitrail.train.history import HistoryLog, Row

SHOWN = {"train_loss": ("loss", ".4f"), "val_loss": ("val_loss", ".4f"), "val_accuracy": ("val_accuracy", ".4f")}
"""figures of an epoch's line: their names there and their formats; the monitored one is always shown"""
EXPECTED_WARNINGS = (
    r"`isinstance\(treespec, LeafSpec\)` is deprecated",  # Lightning asks torch's pytree the old way
    r"You're resuming from a checkpoint that ended before the epoch ended",  # `EpochLoader` goes on where it ended
    r"GPU available but not used",  # --device cpu was asked for
    r"You defined a `validation_step` but have no `val_dataloader`",
    r"The `srun` command is available on your system but is not used",
    r"Found \d+ module\(s\) in eval mode at the start of training",  # frozen parts
    r"find_unused_parameters=True was specified in DDP constructor",  # asked since nobody knows the task
    r"Be aware that when using `ckpt_path`, callbacks used to create the checkpoint",  # an average was overridden
)


class ProgressBar(Callback):
    """Prints a line after every epoch. On a terminal, a bar shows the loss, images per second and the time left."""

    def __init__(self, record: HistoryLog) -> None:
        self.record = record
        self.console = Console()
        self._bar: Progress | None = None
        self._task = TaskID(0)
        self._since, self._images = 0.0, 0

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.is_global_zero and self.console.is_terminal:
            self._bar = Progress(
                TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(),
                TextColumn("loss {task.fields[loss]:.4f}  {task.fields[speed]:.0f} images/s  left"),
                TimeRemainingColumn(compact=True), console=self.console, transient=True,
            )  # fmt: skip
            batches = int(trainer.num_training_batches)
            done = trainer.current_epoch * batches + trainer.fit_loop.batch_idx + 1
            total = (trainer.max_epochs or 0) * batches
            self._task = self._bar.add_task("", total=total, completed=done, loss=float("nan"), speed=0.0)
            self._bar.start()

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._since, self._images = time.perf_counter(), 0
        if self._bar:
            self._bar.update(self._task, description=f"epoch {trainer.current_epoch + 1}/{trainer.max_epochs}")

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if self._bar:
            self._images += batch_count(batch) * trainer.world_size
            speed = self._images / (time.perf_counter() - self._since)
            self._bar.update(self._task, advance=1, loss=self.record.meter.latest, speed=speed)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.is_global_zero:
            left = self._left(trainer)
            line = epoch_line(self.record.history.rows[-1], trainer.max_epochs or 0, self.record.monitor, left)
            self.console.print(line, highlight=False, soft_wrap=True)

    def _left(self, trainer: Trainer) -> float:
        rows = self.record.history.rows[-3:]
        return sum(row["seconds"] for row in rows) / len(rows) * ((trainer.max_epochs or 0) - trainer.current_epoch - 1)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._stop()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self._stop()

    def _stop(self) -> None:
        if self._bar:
            self._bar.stop()
        self._bar = None


def epoch_line(row: Row, epochs: int, monitor: str, left: float) -> str:
    """One line for one epoch; `left` is in seconds."""
    shown = SHOWN if monitor in SHOWN else {**SHOWN, monitor: (monitor, ".4f")}
    figures = [f"{label} {row[name]:{form}}" for name, (label, form) in shown.items() if name in row]
    head = f"epoch {row['epoch']:>{len(str(epochs))}}/{epochs}"
    pace = f"lr {row['lr']:.2e}  {row['images_per_second']:.0f} images/s  {row['seconds']:.1f} s"
    return "  ".join([head, *figures, pace, f"left {timedelta(seconds=round(left))}"])


@contextmanager
def quiet() -> Iterator[None]:
    """Lightning without its small talk; warnings that are not expected still show."""
    loggers = [logging.getLogger(f"lightning.{part}") for part in ("pytorch", "fabric")]
    levels = [logger.level for logger in loggers]
    with warnings.catch_warnings():
        for message in EXPECTED_WARNINGS:
            warnings.filterwarnings("ignore", message=message)
        for logger in loggers:
            logger.setLevel(logging.WARNING)
        try:
            yield
        finally:
            for logger, level in zip(loggers, levels, strict=True):
                logger.setLevel(level)
