"""`fit`: the one training loop of the house, run by Lightning.

    loader ─ check ─ to the device ─ seed(batch) ─ augment, normalise ─ task(batch)["loss"] ─ backward
             lr(step) ─ optimiser ─ task.after_step ─ average ─ … each epoch: validate, record, keep

Randomness is seeded anew for every batch from (seed, number of the batch over all epochs, process), and the order of
images is a pure function of (seed, epoch). On the CPU, a run resumed from `last.ckpt` therefore ends in the very same
weights; on a GPU only as far as its kernels repeat themselves, which `deterministic` asks of them. See `train.resume`.
"""

from __future__ import annotations

import copy
import logging
import math
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor
from torch.optim import Optimizer
from torch.utils.data._utils.signal_handling import _set_SIGCHLD_handler

from vitrail.data.loading import OrderedBatches, draw_seed
from vitrail.records import Batch, History
from vitrail.tasks.base import Task, as_batch, batch_count, to_device
from vitrail.train.callbacks import StopOnSignal, StopRequested, Watch, handlers_kept, run_callbacks
from vitrail.train.changes import Start, go_on, refuse_idle, told
from vitrail.train.checkpoint import Checkpoints, best_whole, has_checkpoints, newest_whole
from vitrail.train.claim import claimed
from vitrail.train.config import TrainConfig
from vitrail.train.ema import FreeAverage, WeightEma, averaged, copy_into
from vitrail.train.finetune import merge, say_trained, tuned
from vitrail.train.finite import FiniteGuard, Place, first_bad_layer, skips_allowed
from vitrail.train.history import HistoryLog, LossMeter, Reading, Waits
from vitrail.train.imagelist import write_list
from vitrail.train.loggers import run_logs
from vitrail.train.machine import in_company, machine, make_trainer, shares
from vitrail.train.optim import make_optimizer
from vitrail.train.progress import quiet
from vitrail.train.resume import (
    EpochLoader,
    Loader,
    begin_epoch_anew,
    refuse_empty,
    refuse_unshared,
    same_kernels,
    sharing_order,
)
from vitrail.train.schedules import rate
from vitrail.train.strategies import gathered, is_sharded, refuse_unused

LOG = logging.getLogger("vitrail")
READ_EVERY = 20
"""batches between two readings of the loss on an accelerator, since each one waits for the device"""
Augment = Callable[[Batch, int, int], Batch]
"""of a batch, its number over all epochs, from 0, and how many the run has"""


class Interrupted(KeyboardInterrupt):
    """Ctrl-C or SIGTERM ended the run. The message says how to go on; `exit_code` is 130 or 143, as shells expect."""

    def __init__(self, message: str, signal_number: int) -> None:
        super().__init__(message)
        self.exit_code = 128 + signal_number


class Job(NamedTuple):
    """A run against which nothing speaks any more."""

    task: Task
    train_loader: Loader
    val_loader: Loader | None
    config: TrainConfig
    device: str
    augment: Augment | None
    folder: Path | None
    start: Start
    notes: Mapping[str, Any]
    watch: Watch | None

    def write_config(self) -> None:
        """config.yaml, with a comment for each setting that was overridden, and the list of the images to train on."""
        if self.folder:
            write_list(self.folder, self.train_loader, self.start.told["images"])
            self.config.to_yaml(self.folder / "config.yaml", header="\n".join(self.start.told["overridden"]))


def fit(
    task: Task,
    train_loader: Loader,
    val_loader: Loader | None,
    config: TrainConfig,
    *,
    augment: Augment | None = None,
    out: str | Path | None = None,
    resume: bool = False,
    override: Collection[str] = (),
    notes: Mapping[str, Any] | None = None,
    watch: Watch | None = None,
) -> History:
    """Trains `task` in place and returns its figures by epoch. Loaders yield batches or (images, labels).

    `augment(batch, number, total)` makes raw training images ready, on the device; None only normalises them. With
    `out`, that folder gets config.yaml, images.jsonl, history.csv, checkpoints/ and model/ with the best weights, and
    the task ends with those; without, nothing is written and it ends with the last. Weights are the running average's
    where `config.ema` is on. `notes` join recipe and figures in the model's card.
    `watch` sees the history after every epoch that was kept, and may end the run by raising.
    A resumed run goes on where it stood: on the CPU, and on a GPU with `config.deterministic` as far as it has such
    kernels, bit for bit if the loader's batch sampler is an `OrderedBatches`. What then differs from before, other than
    by name in `override`, is an error: see `train.changes`.

    Raises `ValueError` for a device that is not here, an empty loader, several processes without a sampler that gives
    each its share of the training images, an `out` that already holds a run, nothing to resume, a checkpoint that is
    none of a run's, a run that was told something else, an `override` after which no epoch comes, an optimiser that
    cannot be made, or a folder in which another process trains; `OSError` where a checkpoint cannot be written;
    `NonFiniteLoss` when training diverges; `ProcessLost` where another process of the run does not answer;
    `Interrupted` on a signal.
    """
    folder = Path(out) if out is not None else None
    refuse_start(folder, resume, override)
    refuse_empty(train_loader, val_loader)
    refuse_unshared(train_loader, config)
    device = machine(config)
    if folder is None and shares(config):
        raise ValueError(
            "--strategy fsdp needs a folder for its checkpoints, of which the trained network is put together; got "
            "none: name one with out=…"
        )
    if folder:
        task.backbone.check_savable()  # before training, not after it
    with claimed(folder), tuned(task, config.freeze, config.seed):
        make_optimizer(task, config)  # what speaks against it is said before anything is written
        refuse_start(folder, resume)  # nobody else writes there any more
        now = told(config, task, train_loader) if folder else {}
        resumed = newest_whole(folder / "checkpoints") if folder and resume else None
        start = go_on(resumed, now, task, override, train_loader) if resumed else Start(now)
        if config.freeze != "none":
            say_trained(task, config.freeze, start.done)
        return _fit(Job(task, train_loader, val_loader, config, device, augment, folder, start, notes or {}, watch))


def _fit(job: Job) -> History:
    config, folder, own = job.config, job.folder, job.task
    if shares(config):
        job = job._replace(task=copy.deepcopy(own))  # shards cannot be made whole in place
    task = job.task
    guard = FiniteGuard(task, skips_allowed(config.on_nan), config.clip_grad)
    meter = LossMeter(1 if job.device == "cpu" else READ_EVERY, skipping=guard.allowed > 0)
    record = HistoryLog(meter, guard, task.monitor, folder)
    ema = _average(task, config)
    written = job.write_config if job.start.checkpoint else None  # a run that ends before is as it was
    kept = Checkpoints(record, folder / "checkpoints" if folder else None, config.checkpoint_every, written)
    stop = StopOnSignal(kept)
    logs = run_logs(config, folder, resumed=job.start.checkpoint is not None)
    callbacks = run_callbacks(task, config, job.device, folder, record, ema, stop, logs, job.watch)
    trainer = make_trainer(config, job.device, callbacks, folder)
    if folder and trainer.is_global_zero:
        _open_folder(folder, job.train_loader)
    with quiet(), handlers_kept(), same_kernels(config.deterministic), _own_randomness(job.device):
        try:
            with in_company(config, lambda: _farewell(folder, record, config.epochs)):
                _run(trainer, job, record)
                stop.heed(trainer)
        except StopRequested:
            raise Interrupted(_farewell(folder, record, config.epochs), stop.signal or 0) from None
    refuse_idle(job.start, len(record.history))
    if folder:
        _take_best(own, folder / "checkpoints")
        merge(own)
        if trainer.is_global_zero:
            own.save_pretrained(
                folder / "model", recipe=config.changes(), figures=record.best or record.history.rows[-1],
                **job.notes,
            )  # fmt: skip
        trainer.strategy.barrier()  # no process may look for a model that is still being written
    elif ema:
        ema.swap()
    return record.history


def _average(task: Task, config: TrainConfig) -> WeightEma | None:
    """What is validated and kept in place of the weights, if anything is."""
    if config.optimizer == "schedule_free":
        return FreeAverage(task)
    return WeightEma(task, config.ema) if config.ema else None


class TaskModule(LightningModule):
    """A task in Lightning's terms: what happens to a batch, in a step and in validation."""

    def __init__(self, job: Job, record: HistoryLog) -> None:
        super().__init__()
        self.task, self.config, self.augment, self.record = job.task, job.config, job.augment, record
        self.job = job

    def on_fit_start(self) -> None:
        if self.trainer.is_global_zero and not self.job.start.checkpoint:
            self.job.write_config()
        self.metrics = self.task.metrics()
        _train(self.task)

    def on_before_batch_transfer(self, batch: Any, dataloader_idx: int) -> Batch:
        batch = as_batch(batch)
        self.task.check(batch)  # on the CPU, where looking at labels waits for nothing
        return batch

    def transfer_batch_to_device(self, batch: Batch, device: torch.device, dataloader_idx: int) -> Batch:
        return to_device(batch, device)

    def on_after_batch_transfer(self, batch: Batch, dataloader_idx: int) -> Batch:
        """Makes images ready. From here on the batch's own seed rules: augmentation first, then dropout."""
        if not self.trainer.training:
            return self.task.backbone.preprocess.prepare(batch)
        number = self.trainer.current_epoch * self.batches_per_epoch + self.trainer.fit_loop.batch_idx + 1
        torch.manual_seed(draw_seed(self.config.seed, number, self.global_rank))
        if not self.augment:
            return self.task.backbone.preprocess.prepare(batch)
        return self.augment(batch, number, self.config.epochs * self.batches_per_epoch)

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        losses = self.task(batch)
        parts = {name: part.detach() for name, part in losses.items()}
        alone = self.record.meter.every == 1 and not is_sharded(self.task)  # shards need all processes to look
        blame = partial(first_bad_layer, self.task, batch) if alone else None
        place = self._place(batch, batch_idx)
        self.record.meter.add(Reading(parts, self.task.weight(batch), batch_count(batch), place, blame))
        return losses["loss"] * self._share(batch_idx)

    def _place(self, batch: Batch, batch_idx: int) -> Place:
        trainer, ids = self.trainer, tuple(batch.get("id", ()))
        step = self.step(batch_idx)
        self.last = Place(trainer.current_epoch, batch_idx, step, self.learning_rate(step), ids)
        return self.last

    def _share(self, batch_idx: int) -> float:
        """Lightning divides by `accumulate`; the batches left over at an epoch's end are fewer, and divide by less."""
        planned = self.config.accumulate
        first = batch_idx // planned * planned
        return planned / min(planned, self.batches_per_epoch - first)

    @property
    def batches_per_epoch(self) -> int:
        return int(self.trainer.num_training_batches)

    @property
    def steps_per_epoch(self) -> int:
        """Optimiser steps; the batches left over at an epoch's end make a step of their own."""
        return math.ceil(self.batches_per_epoch / self.config.accumulate)

    def step(self, batch_idx: int) -> int:
        """The optimiser step (from 0) of this batch in a run whose epochs all have as many steps as this one.

        Other than the steps that were taken, it knows where the schedule stands after their number was overridden.
        """
        return self.trainer.current_epoch * self.steps_per_epoch + batch_idx // self.config.accumulate

    def learning_rate(self, step: int) -> float:
        return rate(step, self.config.plan(self.steps_per_epoch))

    def configure_optimizers(self) -> Optimizer:
        fused = self.config.precision != "fp16"  # whose scaler must come first
        return make_optimizer(self.task, self.config, fused=fused)

    def optimizer_step(self, epoch: int, batch_idx: int, optimizer: Any, optimizer_closure: Any = None) -> None:
        step = self.step(batch_idx)
        self.record.lr = self.learning_rate(step)
        for group in optimizer.param_groups:
            group["lr"] = self.record.lr * group["lr_scale"]
        super().optimizer_step(epoch, batch_idx, optimizer, optimizer_closure)
        self.task.after_step(step + 1, self.config.epochs * self.steps_per_epoch)

    def on_after_backward(self) -> None:
        if self.trainer.world_size > 1 and not is_sharded(self.task):
            refuse_unused(self.task)

    def configure_gradient_clipping(self, optimizer: Optimizer, *_: Any, **__: Any) -> None:
        """Clips by the norm over all parameters; Lightning's own way refuses a fused AdamW in mixed precision."""
        if self.config.precision != "fp16":
            self.record.guard.clip_or_skip(optimizer, self.last)
        elif self.config.clip_grad:
            torch.nn.utils.clip_grad_norm_(self.task.parameters(), self.config.clip_grad)

    def on_validation_epoch_start(self) -> None:
        self.metrics.reset()

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        with gathered(self.task):
            self.task.update(self.metrics, batch)

    def on_validation_epoch_end(self) -> None:
        scores = {name: float(value) for name, value in self.metrics.compute().items() if value.ndim == 0}
        if self.task.monitor[0] not in scores:
            raise ValueError(
                f"a task's monitor must be one of its scores {', '.join(scores)}; got {self.task.monitor[0]!r}"
            )
        self.record.figures |= {f"val_{name}": score for name, score in scores.items()}

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["told"] = self.job.start.told

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        if self.job.start.anew:
            begin_epoch_anew(checkpoint)
        if self.job.start.forget:
            checkpoint["optimizer_states"] = []


def refuse_start(folder: Path | None, resume: bool, override: Collection[str] = ()) -> None:
    """Raises `ValueError` where there is no checkpoint to go on from, or one that would be overwritten.

    And where something would be overridden in a run that is new.
    """
    place = folder / "checkpoints" if folder else None
    found = place is not None and has_checkpoints(place)
    if override and not resume:
        raise ValueError(f"--override is for a run that is gone on with; got {' '.join(override)} without --resume")
    if resume and not found:
        raise ValueError(f"--resume needs a run that wrote {place or 'checkpoints'}; found none: start one with --out")
    if found and not resume:
        raise ValueError(
            f"--out must name a new run; {folder} holds one already: go on with --resume {folder}, or take another"
        )


def _train(task: Task) -> None:
    """Training mode, but for parts that were frozen and put in evaluation mode, such as norms that keep their means."""
    frozen = [
        part for part in task.modules()
        if not part.training and (own := list(part.parameters())) and not any(p.requires_grad for p in own)
    ]  # fmt: skip
    task.train()
    for part in frozen:
        part.eval()


@contextmanager
def _own_randomness(device: str) -> Iterator[None]:
    """What the seeds of batches do to the global generators is undone afterwards."""
    with torch.random.fork_rng([torch.cuda.current_device()] if device == "cuda" else []):
        yield


def _open_folder(folder: Path, loader: Loader) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    if not isinstance(sharing_order(loader), OrderedBatches):
        LOG.warning("this loader has an order of its own: a resumed run will not repeat it bit for bit")


def _run(trainer: Trainer, job: Job, record: HistoryLog) -> None:
    val = EpochLoader(job.val_loader, trainer, Waits()) if job.val_loader is not None else None
    train, checkpoint = EpochLoader(job.train_loader, trainer, record.waits), job.start.checkpoint
    # By it PyTorch hears of a worker that died. It is set once in a process, with the first workers; were those the
    # run's, Lightning would take it away with its own handlers, and later loaders would wait out their timeout.
    _set_SIGCHLD_handler()
    trainer.fit(TaskModule(job, record), train, val, ckpt_path=checkpoint, weights_only=True)


def _farewell(folder: Path | None, record: HistoryLog, epochs: int) -> str:
    done = len(record.history)
    where = f"stopped in epoch {done + 1}" if done < epochs else "stopped after the last epoch"
    if folder is None or not has_checkpoints(folder / "checkpoints"):
        return f"{where}; nothing was kept"
    return f"{where}; go on with: vitrail train --resume {folder}"


def _take_best(task: Task, folder: Path) -> None:
    """Gives the task the weights of the best epoch, or their average's."""
    state = torch.load(best_whole(folder), map_location="cpu", weights_only=True, mmap=True)
    own = {name.removeprefix("task."): value for name, value in state["state_dict"].items() if name.startswith("task.")}
    task.load_state_dict(own)
    average = state["callbacks"].get("WeightEma", {"updates": 0})
    if average["updates"]:
        copy_into(dict(averaged(task)), average["averages"])
