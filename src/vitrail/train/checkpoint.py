"""Checkpoints of a run: `last.ckpt`, `best.ckpt`, `epoch_010.ckpt`, each there whole or not at all."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.plugins.io.torch_io import TorchCheckpointIO
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import nn

from vitrail.files import whole_file
from vitrail.train.finite import NonFiniteLoss
from vitrail.train.history import HistoryLog

KEPT = {"state_dict", "history", "told"}
"""what a checkpoint of a run holds beside Lightning's own"""


class WholeFiles(TorchCheckpointIO):
    """Lightning's checkpoint files, through `vitrail.files`. Raises `ValueError` for one that no run here wrote."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None) -> None:
        with whole_file(path) as file:
            torch.save(checkpoint, file)

    def load_checkpoint(self, path: str | Path, *args: Any, **kwargs: Any) -> dict[str, Any]:
        checkpoint = super().load_checkpoint(path, *args, **kwargs)
        if missing := sorted(KEPT - set(checkpoint)):
            raise ValueError(
                f"a run is gone on with from a checkpoint that it wrote itself; {path} lacks {', '.join(missing)}: "
                "take the run's own last.ckpt, or start a new run"
            )
        return checkpoint


class Checkpoints(Callback):
    """Keeps the state after the last epoch, after the best, and after every `every`-th, in `folder`.

    `last.ckpt`, `best.ckpt`, `epoch_010.ckpt`: a folder of None keeps nothing.
    """

    def __init__(self, record: HistoryLog, folder: Path | None, every: int = 0) -> None:
        self.record, self.folder, self.every = record, folder, every

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self.folder and trainer.is_global_zero:
            for part in self.folder.glob(".*.part"):  # what a killed run was writing
                part.unlink()

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        epoch = len(self.record.history)
        names = ["best.ckpt"] if self.record.improved else []
        names += [f"epoch_{epoch:03}.ckpt"] if self.every and epoch % self.every == 0 else []
        self.save(trainer, *names)

    def save(self, trainer: Trainer, *names: str) -> None:
        """Writes the present state under `names` and, after those, `last.ckpt`.

        So a run killed in between repeats the epoch. Raises `NonFiniteLoss`, and writes nothing, if a weight or a loss
        that was not read yet is not finite.
        """
        refuse_non_finite(trainer.lightning_module)
        if self.folder is None:
            return
        first, *rest = [self.folder / name for name in (*names, "last.ckpt")]
        trainer.save_checkpoint(first)
        for path in rest if trainer.is_global_zero else ():
            with first.open("rb") as source, whole_file(path) as copy:
                shutil.copyfileobj(source, copy)


def refuse_non_finite(module: nn.Module) -> None:
    """Raises `NonFiniteLoss` if any parameter holds an infinity or a NaN."""
    norms = torch.stack([p.detach().norm() for p in module.parameters()])
    if not norms.isfinite().all():
        raise NonFiniteLoss(
            "the weights must stay finite; an update made some infinite or NaN: lower --lr or set --clip-grad"
        )
