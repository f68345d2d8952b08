"""Checkpoints of a run, each there whole or not at all, and which of them a run goes on from.

    last.ckpt        where the run stands                       previous.ckpt    where it stood before
    best.ckpt        the epoch with the best figure             epoch_010.ckpt   every so many epochs

A checkpoint is a zip archive, whose parts carry checksums: a byte that changed on the disk is found before it is used.
"""

from __future__ import annotations

import logging
import os
import pickle
import shutil
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.plugins.io.torch_io import TorchCheckpointIO
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import nn

from vitrail.files import whole_file
from vitrail.train.finite import NonFiniteLoss
from vitrail.train.history import HistoryLog
from vitrail.train.strategies import whole

LOG = logging.getLogger("vitrail")
LAST, PREVIOUS, BEST = "last.ckpt", "previous.ckpt", "best.ckpt"
UNREADABLE = (
    OSError, ValueError, RuntimeError, EOFError, LookupError, zipfile.BadZipFile, zlib.error, pickle.UnpicklingError,
)  # fmt: skip
"""what Python and torch raise for archives that are damaged"""
KEPT = {
    "state_dict": (), "told": ("trained",), "history": ("rows", "totals", "weight", "images", "seconds", "skipped"),
}  # fmt: skip
"""what a checkpoint of a run holds beside Lightning's own, and what some of it holds"""


class WholeFiles(TorchCheckpointIO):
    """Lightning's checkpoint files, through `vitrail.files`. Raises `ValueError` for one that no run here wrote."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None) -> None:
        with whole_file(path) as file:
            torch.save(checkpoint, file)

    def load_checkpoint(self, path: str | Path, *args: Any, **kwargs: Any) -> dict[str, Any]:
        return _of_a_run(super().load_checkpoint(path, *args, **kwargs), path)


def read(path: Path) -> dict[str, Any]:
    """A checkpoint with its tensors left on the disk. Raises `ValueError` for one that no run here wrote."""
    return _of_a_run(torch.load(path, map_location="cpu", weights_only=True, mmap=True), path)


def _of_a_run(checkpoint: dict[str, Any], path: str | Path) -> dict[str, Any]:
    missing = [name for name in KEPT if name not in checkpoint]
    inner = ((name, part) for name, parts in KEPT.items() for part in parts if name in checkpoint)
    missing += [f"{name}.{part}" for name, part in inner if part not in checkpoint[name]]
    if missing:
        raise ValueError(
            f"a run is gone on with from a checkpoint that it wrote itself; {path} lacks {', '.join(sorted(missing))}: "
            "take the run's own last.ckpt, or start a new run"
        )
    return checkpoint


class Checkpoints(Callback):
    """Keeps the state after the last epoch, after the best, and after every `every`-th, in `folder`.

    A folder of None keeps nothing. The first process calls `written` whenever `last.ckpt` is there.
    """

    def __init__(
        self, record: HistoryLog, folder: Path | None, every: int = 0, written: Callable[[], None] | None = None
    ) -> None:
        self.record, self.folder, self.every, self.written = record, folder, every, written

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        epoch = len(self.record.history)
        names = [BEST] if self.record.improved else []
        names += [f"epoch_{epoch:03}.ckpt"] if self.every and epoch % self.every == 0 else []
        self.save(trainer, *names)

    def save(self, trainer: Trainer, *names: str) -> None:
        """Writes the present state under `names` and, after those, `last.ckpt`, whose former self is `previous.ckpt`.

        So a run killed in between repeats the epoch. Raises `NonFiniteLoss`, and writes nothing, if a weight or a loss
        that was not read yet is not finite.
        """
        refuse_non_finite(trainer.lightning_module)
        if self.folder is None:
            return
        first, *rest = [self.folder / name for name in (*names, LAST)]
        if trainer.is_global_zero:
            _keep_previous(self.folder)
        trainer.save_checkpoint(first)
        for path in rest if trainer.is_global_zero else ():
            with first.open("rb") as source, whole_file(path) as copy:
                shutil.copyfileobj(source, copy)
        if self.written and trainer.is_global_zero:
            self.written()


def _keep_previous(folder: Path) -> None:
    """`last.ckpt` under a second name too: no byte is copied where the file system knows links."""
    last, previous, beside = folder / LAST, folder / PREVIOUS, folder / f".{PREVIOUS}.part"
    if not last.is_file() or (previous.is_file() and previous.samefile(last)):  # a kill came between the two
        return
    beside.unlink(missing_ok=True)
    try:
        os.link(last, beside)
    except OSError:
        shutil.copyfile(last, beside)
    beside.replace(previous)


def has_checkpoints(folder: Path) -> bool:
    """Whether a run has got as far as its first checkpoint."""
    return any(folder.glob("*.ckpt"))


def newest_whole(folder: Path) -> Path:
    """The newest checkpoint that is whole; the logger `vitrail` is told of those that are not.

    Raises `ValueError` where none is.
    """
    others = sorted(folder.glob("*.ckpt"), key=lambda path: path.stat().st_mtime, reverse=True)
    order = [path for path in (folder / LAST, folder / PREVIOUS) if path in others]
    order += [path for path in others if path not in order]
    harm: dict[Path, str] = {}
    for path in order:
        found = damage(path)
        if not found:
            for bad, how in harm.items():
                LOG.warning("%s is damaged (%s): going on from %s, which came before it", bad, how, path.name)
            return path
        harm[path] = found
    said = "; ".join(f"{path.name}: {how}" for path, how in harm.items())
    raise ValueError(f"a run goes on from a whole checkpoint; {folder} holds none ({said}): start a new run")


def best_whole(folder: Path) -> Path:
    """The checkpoint of the best epoch; the newest one where there is none, or, which is said, a damaged one."""
    best = folder / BEST
    harm = damage(best) if best.is_file() else ""
    if harm:
        LOG.warning("%s is damaged (%s): the model becomes that of the last epoch", best, harm)
    return best if best.is_file() and not harm else newest_whole(folder)


def damage(path: Path) -> str:
    """What is wrong with a checkpoint file, by the checksums in it; empty where it is whole."""
    try:
        with zipfile.ZipFile(path) as archive:
            part = archive.testzip()
        if not part:
            torch.load(path, map_location="cpu", weights_only=True, mmap=True)  # reads headers, no tensors
    except UNREADABLE as error:
        return (str(error) or type(error).__name__).splitlines()[0]
    return f"the checksum of {part} does not fit" if part else ""


def refuse_non_finite(module: nn.Module) -> None:
    """Raises `NonFiniteLoss` if any parameter holds an infinity or a NaN."""
    norms = torch.stack([whole(p.detach().norm()) for p in module.parameters()])
    if not norms.isfinite().all():
        raise NonFiniteLoss(
            "the weights must stay finite; an update made some infinite or NaN: lower --lr or set --clip-grad"
        )
