"""What a run tells TensorBoard, Weights & Biases and MLflow, beside its own history.csv.

    settings ── when it begins ──┐
    figures ─── every epoch ─────┼──> TensorBoard's events │ a run of W&B │ a run of MLflow
    report ──── at the end ──────┘

| `--log`     | where it goes                                                                                       |
|-------------|-----------------------------------------------------------------------------------------------------|
| tensorboard | event files in the run folder's `tensorboard`: figures alone                                        |
| wandb       | as W&B's own variables say (WANDB_MODE, WANDB_PROJECT, …); project `vitrail`, its files in the folder |
| mlflow      | where MLflow was told (MLFLOW_TRACKING_URI, …); otherwise a data base in the run folder's `mlflow`    |

A run that is gone on with goes on in the same run there, whose name `loggers.json` keeps. The first process writes.
None of it ends a training: what cannot be written is said once, and the run goes on without it.
"""

from __future__ import annotations

import json
import logging
import os
import time
import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from importlib import import_module
from pathlib import Path
from typing import Any, ClassVar
from uuid import uuid4

from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor

from vitrail.files import write_whole
from vitrail.processes import is_first
from vitrail.train.changes import settings
from vitrail.train.config import TrainConfig
from vitrail.train.history import HistoryLog, Row

LOG = logging.getLogger("vitrail")
PROJECT = "vitrail"
"""what a run belongs to where the user's own variables say nothing"""
NAMES = "loggers.json"
"""file of the run folder with the names that the run has elsewhere"""
AT_ONCE = 100
"""settings that MLflow takes in one call"""
PATIENCE = 60
"""seconds in which W&B may hand on what it has, when the run ends; afterwards `wandb sync` does"""


class RunLog(ABC):
    """A run as one of these knows it. Raises `ValueError` if its package is missing."""

    word: ClassVar[str]
    module: ClassVar[str]

    def __init__(self, config: TrainConfig, folder: Path, resumed: bool) -> None:
        try:
            self.library: Any = import_module(self.module)
        except ModuleNotFoundError as error:
            raise ValueError(
                f"--log {self.word} needs the {self.word} package; it is not installed: pip install 'vitrail[logging]'"
            ) from error
        self.config, self.folder, self.resumed, self.failed = config, folder, resumed, False

    @property
    @abstractmethod
    def what(self) -> str:
        """What a warning calls it."""

    @abstractmethod
    def open(self, done: int) -> None:
        """Begins, or goes on, after so many epochs."""

    @abstractmethod
    def write(self, row: Row) -> None:
        """An epoch's figures."""

    @abstractmethod
    def conclude(self, figures: Row, page: Path, epoch: int) -> None:
        """What came of it: figures of held-out images, and the report."""

    @abstractmethod
    def close(self, failed: bool = False) -> None:
        """Ends it for now."""

    def attempt(self, step: Callable[..., None], *words: Any) -> None:
        """Takes a step; one that fails is the last, and is told of. What the library warns of is for its makers."""
        if self.failed:
            return
        try:
            with warnings.catch_warnings(action="ignore"):
                step(*words)
        except Exception as error:  # whatever somebody else's library raises
            self.failed = True  # not closed: that could wait for what has failed
            LOG.warning(
                "%s cannot be written (%s): training goes on without them, and history.csv and checkpoints hold its "
                "figures", self.what, getattr(error, "strerror", None) or error,
            )  # fmt: skip

    def known_as(self) -> str | None:
        """The name that this run has there already."""
        return self._names().get(self.word) if self.resumed else None

    def keep_name(self, name: str) -> None:
        write_whole(self.folder / NAMES, json.dumps(self._names() | {self.word: name}, indent=1))

    def _names(self) -> dict[str, str]:
        path = self.folder / NAMES
        return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}


class TensorBoardLog(RunLog):
    """Figures as events; those of an epoch that is done once more take the place of what was written of it."""

    word, module = "tensorboard", "torch.utils.tensorboard"

    @property
    def what(self) -> str:
        return f"TensorBoard's events in {self.folder / self.word}"

    def open(self, done: int) -> None:
        self.writer = self.library.SummaryWriter(str(self.folder / self.word), purge_step=done + 1)

    def write(self, row: Row) -> None:
        for name, value in row.items():
            self.writer.add_scalar(name, value, int(row["epoch"]))
        self.writer.flush()

    def conclude(self, figures: Row, page: Path, epoch: int) -> None:
        self.write({"epoch": epoch, **figures})

    def close(self, failed: bool = False) -> None:
        self.writer.close()


class WandbLog(RunLog):
    """A run of W&B. Of an epoch that is done once more W&B keeps what came first, which on the CPU is the same."""

    word = module = "wandb"

    @property
    def what(self) -> str:
        return f"W&B's figures in {self.folder / self.word}"

    def open(self, done: int) -> None:
        name = self.known_as() or uuid4().hex[:8]
        self.keep_name(name)
        self.run = self.library.init(
            project=os.environ.get("WANDB_PROJECT", PROJECT), name=os.environ.get("WANDB_NAME", self.folder.name),
            id=name, resume="allow", dir=str(self.folder), config=settings(self.config), allow_val_change=True,
            settings=self.library.Settings(reinit="create_new", finish_timeout=PATIENCE),
        )  # fmt: skip

    def write(self, row: Row) -> None:
        self.run.log(row, step=int(row["epoch"]))

    def conclude(self, figures: Row, page: Path, epoch: int) -> None:
        self.run.log({"report": self.library.Html(str(page))}, step=epoch + 1)
        self.run.summary.update(figures)

    def close(self, failed: bool = False) -> None:
        self.run.finish(exit_code=int(failed))


class MlflowLog(RunLog):
    """A run of MLflow, by a client of its own: a run that is active in this process stays what it is."""

    word = module = "mlflow"

    @property
    def what(self) -> str:
        return f"MLflow's figures at {self._place()}"

    def _place(self) -> str:
        told = self.library.is_tracking_uri_set()
        return self.library.get_tracking_uri() if told else f"sqlite:///{self._own()}/mlflow.db"

    def _own(self) -> Path:
        return (self.folder / self.word).resolve()

    def open(self, done: int) -> None:
        if not self.library.is_tracking_uri_set():
            self._own().mkdir(exist_ok=True)
        self.client = self.library.MlflowClient(self._place())
        if name := self.known_as():
            self.name = name
            self.client.update_run(name, status="RUNNING")
            return
        self.name = self.client.create_run(self._experiment(), run_name=self.folder.name).info.run_id
        self.keep_name(self.name)
        told = [self.library.entities.Param(key, str(value)) for key, value in settings(self.config).items()]
        for first in range(0, len(told), AT_ONCE):
            self.client.log_batch(self.name, params=told[first : first + AT_ONCE])

    def _experiment(self) -> str:
        name = os.environ.get("MLFLOW_EXPERIMENT_NAME", PROJECT)
        if found := self.client.get_experiment_by_name(name):
            return found.experiment_id
        told = self.library.is_tracking_uri_set()
        return self.client.create_experiment(name, None if told else (self._own() / "artifacts").as_uri())

    def write(self, row: Row) -> None:
        now, epoch = int(1000 * time.time()), int(row["epoch"])
        metric = self.library.entities.Metric
        self.client.log_batch(self.name, [metric(name, value, now, epoch) for name, value in row.items()])

    def conclude(self, figures: Row, page: Path, epoch: int) -> None:
        self.write({"epoch": epoch, **figures})
        self.client.log_artifact(self.name, str(page))

    def close(self, failed: bool = False) -> None:
        self.client.set_terminated(self.name, "FAILED" if failed else "FINISHED")


LOGS: Mapping[str, type[RunLog]] = {log.word: log for log in (TensorBoardLog, WandbLog, MlflowLog)}


class Logged(Callback):
    """Has the first process write a run's course into one log."""

    def __init__(self, record: HistoryLog, log: RunLog) -> None:
        self.record, self.sink = record, log

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.is_global_zero:
            self.sink.attempt(self.sink.open, len(self.record.history))

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.is_global_zero:
            self.sink.attempt(self.sink.write, self.record.history.rows[-1])

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.is_global_zero:
            self.sink.attempt(self.sink.close)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        if trainer.is_global_zero:
            self.sink.attempt(self.sink.close, True)


def run_logs(config: TrainConfig, folder: Path | None, resumed: bool = True) -> list[RunLog]:
    """Those that `--log` names. Raises `ValueError` for one whose package is missing."""
    return [LOGS[word](config, folder, resumed) for word in config.log if word in LOGS] if folder else []


def conclude_logs(
    config: TrainConfig, folder: Path, split: str, figures: Mapping[str, Tensor], epoch: int
) -> None:  # fmt: skip
    """Adds a finished run's figures of held-out images, each under the name of their part, and its report.html.

    Those of validation images are called `best_val_…`, since each epoch has a `val_…`. The first process does it.
    """
    said = {"test": "test_", "val": "best_val_"}[split]
    numbers = {said + name: float(value) for name, value in figures.items() if value.ndim == 0}
    for log in run_logs(config, folder) if is_first() else ():
        log.attempt(log.open, epoch)
        log.attempt(log.conclude, numbers, folder / "report.html", epoch)
        log.attempt(log.close)
