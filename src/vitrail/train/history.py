"""The loss of the running epoch and the figures of all epochs: what a run knows of itself."""

from __future__ import annotations

import csv
import io
import math
import time
from pathlib import Path
from typing import Any, NamedTuple

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor

from vitrail.files import write_whole
from vitrail.records import History

Row = dict[str, float]


class NonFiniteLoss(ValueError):
    """The loss or a weight became infinite or NaN. Checkpoints hold the last sound weights."""


class Reading(NamedTuple):
    """The loss of one batch, still on its device, and where it was met."""

    loss: Tensor
    images: int
    epoch: int
    batch: int
    lr: float


class LossMeter:
    """The mean loss of the running epoch. Losses are read from the device in bunches of `every`."""

    def __init__(self, every: int = 1) -> None:
        self.every = every
        self.reset()

    def reset(self) -> None:
        self.unread: list[Reading] = []
        self.total, self.images, self.latest = 0.0, 0, math.nan

    def add(self, reading: Reading) -> None:
        """Takes note of a batch. Raises `NonFiniteLoss` when a loss that is read is not finite."""
        self.unread.append(reading)
        if len(self.unread) >= self.every:
            self.flush()

    def flush(self) -> None:
        """Reads what has not been read."""
        unread, self.unread = self.unread, []
        if not unread:
            return
        for reading, loss in zip(unread, torch.stack([r.loss for r in unread]).tolist(), strict=True):
            if not math.isfinite(loss):
                raise NonFiniteLoss(
                    f"the loss must stay finite; got {loss} in epoch {reading.epoch + 1}, batch {reading.batch + 1}, "
                    f"at lr {reading.lr:.3g}: lower --lr, lengthen --warmup-epochs or set --clip-grad"
                )
            self.total += loss * reading.images
            self.images += reading.images
            self.latest = loss

    @property
    def mean(self) -> float:
        return self.total / self.images if self.images else math.nan


class HistoryLog(Callback):
    """One row of figures per epoch, kept in `history`, in checkpoints and in `history.csv`.

    `monitor` is a figure's name and `max` or `min`. A figure that is NaN never counts as the best.
    """

    def __init__(self, meter: LossMeter, monitor: tuple[str, str], out: Path | None = None) -> None:
        self.meter, self.out = meter, out
        self.monitor, self.mode = f"val_{monitor[0]}", monitor[1]
        self.history = History()
        self.figures: Row = {}
        """what validation found in the running epoch"""
        self._seconds = self._training = 0.0
        self._started = time.perf_counter()

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._started = time.perf_counter() - self._seconds

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.meter.reset()
        self.figures, self._training = {}, 0.0
        self._started = time.perf_counter()

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._training = self.seconds

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.meter.flush()
        total, images = self._over_all_processes(trainer)
        seconds = self.seconds
        self.history.rows.append({
            "epoch": trainer.current_epoch + 1,
            "lr": trainer.optimizers[0].param_groups[0]["lr"],
            "train_loss": total / images,
            **self.figures,
            "seconds": round(seconds, 3),
            "images_per_second": round(images / max(self._training or seconds, 1e-9), 1),
        })  # fmt: skip
        if self.out and trainer.is_global_zero:
            write_csv(self.out / "history.csv", self.history.rows)

    def _over_all_processes(self, trainer: Trainer) -> tuple[float, int]:
        if trainer.world_size == 1:
            return self.meter.total, self.meter.images
        sums = torch.tensor(
            [self.meter.total, self.meter.images], dtype=torch.float64, device=trainer.strategy.root_device
        )
        total, images = trainer.strategy.reduce(sums, reduce_op="sum").tolist()
        return total, int(images)

    @property
    def seconds(self) -> float:
        """Since the epoch began, whatever lay between a stop and a resume left out."""
        return time.perf_counter() - self._started

    @property
    def best(self) -> Row | None:
        """The row with the best monitored figure, the earliest of equals; None where no row has one."""
        rows = [row for row in self.history.rows if math.isfinite(row.get(self.monitor, math.nan))]
        pick = max if self.mode == "max" else min
        return pick(rows, key=lambda row: row[self.monitor]) if rows else None

    @property
    def improved(self) -> bool:
        """Whether the last epoch is the best. Without validation, every epoch is."""
        return self.best in (None, self.history.rows[-1])

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        self.meter.flush()
        total, images = self._over_all_processes(trainer)
        checkpoint["history"] = {
            "rows": self.history.rows, "total": total, "images": images, "seconds": self.seconds
        }  # fmt: skip

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        saved = checkpoint["history"]
        self.history.rows[:], self._seconds = saved["rows"], saved["seconds"]
        if trainer.is_global_zero:  # what all processes had seen, counted once
            self.meter.total, self.meter.images = saved["total"], saved["images"]


def write_csv(path: Path, rows: list[Row]) -> None:
    """Writes rows under the columns of all of them, whole or not at all."""
    columns = list(dict.fromkeys(name for row in rows for name in row))
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    write_whole(path, text.getvalue())
