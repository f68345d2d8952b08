"""The loss of the running epoch and the figures of all epochs: what a run knows of itself."""

from __future__ import annotations

import csv
import io
import logging
import math
import time
from collections.abc import Callable, Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor

from vitrail.files import write_whole
from vitrail.records import History
from vitrail.tasks.base import Mode
from vitrail.train.finite import MEND, FiniteGuard, NonFiniteLoss, Place

LOG = logging.getLogger("vitrail")
Row = dict[str, float]


class Reading(NamedTuple):
    """The loss of one batch and its parts, still on their device, and where they were met."""

    losses: dict[str, Tensor]
    """`loss` and the task's other parts, each 0-dimensional"""
    weight: Tensor
    """0-dimensional: how many images the loss is the mean over"""
    images: int
    place: Place
    blame: Callable[[], str] | None = None
    """finds the layer that a loss that is not finite comes from, where that can still be found"""


class LossMeter:
    """The loss and its parts, summed over the running epoch's images. They are read in bunches of `every` batches.

    Each batch counts by the images that its loss is the mean over; `images` counts all that passed, for their pace.
    `skipping` leaves out batches whose loss is not finite, where otherwise `NonFiniteLoss` is raised.
    """

    def __init__(self, every: int = 1, skipping: bool = False) -> None:
        self.every, self.skipping = every, skipping
        self.reset()

    def reset(self) -> None:
        self.unread: list[Reading] = []
        self.totals: Row = {}
        self.weight, self.images, self.latest = 0.0, 0, math.nan

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
        numbers = (number for reading in unread for number in (*reading.losses.values(), reading.weight))
        values = iter(torch.stack([number.detach().float() for number in numbers]).tolist())
        for reading in unread:
            self._count(reading, {name: next(values) for name in reading.losses}, next(values))

    def _count(self, reading: Reading, losses: Row, weight: float) -> None:
        loss = losses["loss"]
        if not math.isfinite(loss):
            if self.skipping:
                self.totals = {name: self.totals.get(name, 0.0) for name in losses}  # the same names in every process
                return
            layer = reading.blame() if reading.blame else ""
            first = f", first after {layer}" if layer else ""
            raise NonFiniteLoss(
                f"the loss must stay finite; got {loss} in {reading.place}{first}: {MEND}, or leave such steps out "
                "with --on-nan skip:N"
            )
        for name, value in losses.items():
            self.totals[name] = self.totals.get(name, 0.0) + value * weight
        self.weight += weight
        self.images += reading.images
        self.latest = loss


class Waits:
    """How long a process waits for batches, in seconds of `time.perf_counter`: nothing else happens in it meanwhile.

    A GPU may still be at work then, on what it was given before, so that of its time this is the most that is lost.
    """

    def __init__(self) -> None:
        self.total = 0.0
        self.began = self.ended = 0.0
        """of the last wait"""

    def over(self, loader: Iterable[Any], start: int = 0) -> Iterator[Any]:
        """The batches from number `start` on; making workers and passing over batches are waiting too."""
        self.began, none = time.perf_counter(), object()
        batches = islice(loader, start, None)
        while True:
            batch = next(batches, none)
            self.ended = time.perf_counter()
            self.total += self.ended - self.began
            if batch is none:
                return
            yield batch
            self.began = time.perf_counter()


class HistoryLog(Callback):
    """One row of figures per epoch, kept in `history`, in checkpoints and in `history.csv`.

    `monitor` is a figure's name and `max` or `min`. A figure that is NaN never counts as the best; the loss of an epoch
    that learnt from no label is NaN.
    """

    def __init__(
        self, meter: LossMeter, guard: FiniteGuard, monitor: tuple[str, Mode], out: Path | None = None
    ) -> None:
        self.meter, self.guard, self.out = meter, guard, out
        self.monitor = f"val_{monitor[0]}"
        self.mode: Mode = monitor[1]
        self.history = History()
        self.figures: Row = {}
        """what validation found in the running epoch"""
        self.lr = math.nan
        """the schedule's learning rate of the last step, which each group has its own share of"""
        self.waits = Waits()
        """for the training images of the running epoch"""
        self._written = True
        self._seconds = self._training = 0.0
        self._started = time.perf_counter()

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._started = time.perf_counter() - self._seconds

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.meter.reset()
        self.figures, self._training, self.waits.total = {}, 0.0, 0.0
        self._started = time.perf_counter()

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._training = self.seconds

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.meter.flush()
        self.guard.flush()
        totals, weight, images = self._over_all_processes(trainer)
        seconds = self.seconds
        training = max(self._training or seconds, 1e-9)
        self.history.rows.append({
            "epoch": trainer.current_epoch + 1,
            "lr": self.lr,
            **{f"train_{name}": total / weight if weight else math.nan for name, total in totals.items()},
            **({"skipped_steps": self.guard.skipped} if self.guard.allowed else {}),
            **self.figures,
            "seconds": round(seconds, 3),
            "images_per_second": round(images / training, 1),
            "data_wait": round(self.waits.total / training, 4),
        })  # fmt: skip
        if self.out and trainer.is_global_zero:
            self._write(self.out / "history.csv")

    def _write(self, path: Path) -> None:
        """All rows, so that what could not be written comes with the next epoch; said once, until it can be again."""
        try:
            write_csv(path, self.history.rows)
        except OSError as error:
            if self._written:
                LOG.warning(
                    "%s cannot be written (%s): training goes on, and checkpoints hold its figures",
                    path, error.strerror or error,
                )  # fmt: skip
            self._written = False
        else:
            self._written = True

    def _over_all_processes(self, trainer: Trainer) -> tuple[Row, float, int]:
        """Totals, weight and images, as the meter has them."""
        names, meter = sorted(self.meter.totals, key="loss".__ne__), self.meter  # the loss first
        if trainer.world_size == 1:
            return {name: meter.totals[name] for name in names}, meter.weight, meter.images
        sums = torch.tensor(
            [*(meter.totals[name] for name in names), meter.weight, meter.images],
            dtype=torch.float64, device=trainer.strategy.root_device,
        )  # fmt: skip
        *totals, weight, images = trainer.strategy.reduce(sums, reduce_op="sum").tolist()
        return dict(zip(names, totals, strict=True)), weight, int(images)

    @property
    def seconds(self) -> float:
        """Since the epoch began, whatever lay between a stop and a resume left out."""
        return time.perf_counter() - self._started

    @property
    def best(self) -> Row | None:
        """`History.best` of the monitored figure; None where no row has a finite one."""
        known = any(math.isfinite(row.get(self.monitor, math.nan)) for row in self.history.rows)
        return self.history.best(self.monitor, self.mode) if known else None

    @property
    def improved(self) -> bool:
        """Whether the last epoch is the best. Without validation, every epoch is."""
        return self.best in (None, self.history.rows[-1])

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        self.meter.flush()
        self.guard.flush()
        totals, weight, images = self._over_all_processes(trainer)
        checkpoint["history"] = {
            "rows": self.history.rows, "totals": totals, "weight": weight, "images": images, "seconds": self.seconds,
            "skipped": self.guard.skipped, "waited": self.waits.total,
        }  # fmt: skip

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        saved = checkpoint["history"]
        self.history.rows[:], self._seconds, self.guard.skipped = saved["rows"], saved["seconds"], saved["skipped"]
        self.waits.total = saved.get("waited", 0.0)  # of a checkpoint that did not count it, the rest of the epoch's
        if trainer.is_global_zero:  # what all processes had seen, counted once
            self.meter.totals, self.meter.weight = dict(saved["totals"]), saved["weight"]
            self.meter.images = saved["images"]


def write_csv(path: Path, rows: list[Row]) -> None:
    """Writes rows under the columns of all of them, whole or not at all."""
    columns = list(dict.fromkeys(name for row in rows for name in row))
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    write_whole(path, text.getvalue())
