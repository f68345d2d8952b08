"""A running average of the weights, which is validated and kept in their place.

    average ← d · average + (1 − d) · weights        d = min(decay, (1 + t) / (10 + t)) after t earlier updates

Polyak & Juditsky 1992, with the decay's warm-up of TensorFlow's `ExponentialMovingAverage`.
Lightning's own averaging swaps in its start values before the first update, and knows no sharded models.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor, nn
from torch.optim.swa_utils import get_ema_multi_avg_fn

from vitrail.train.strategies import shared_as, whole

if TYPE_CHECKING:
    from torch.optim import Optimizer

    from vitrail.tasks.base import Task


class WeightEma(Callback):
    """Averages the parameters of `task.averaged_modules()` after every optimiser step.

    Validation sees the averages, from the first update on; training always goes on with the weights themselves.
    Buffers are not averaged: the model's own stay in force. Checkpoints hold averages and weights.
    """

    def __init__(self, task: Task, decay: float) -> None:
        self.task, self.decay = task, decay
        self.updates = 0
        self.averages: dict[str, Tensor] = {}
        self.swapped = False
        self._step = 0

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        restored = self.averages
        self.averages = {name: p.detach().clone() for name, p in averaged(self.task)}
        copy_into(self.averages, {name: shared_as(value, self.averages[name]) for name, value in restored.items()})

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._step = trainer.global_step

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *batch: Any) -> None:
        if trainer.global_step > self._step:
            self._step = trainer.global_step
            self.update()

    @torch.no_grad()
    def update(self) -> None:
        """Takes the present weights into the averages."""
        decay = min(self.decay, (1 + self.updates) / (10 + self.updates))
        weights = [p.detach() for _, p in averaged(self.task)]
        get_ema_multi_avg_fn(decay)(list(self.averages.values()), weights, self.updates)
        self.updates += 1

    @torch.no_grad()
    def swap(self) -> None:
        """Exchanges weights and averages in place. Does nothing before the first update."""
        if not self.updates:
            return
        for name, parameter in averaged(self.task):
            weights = parameter.detach().clone()
            parameter.copy_(self.averages[name])
            self.averages[name].copy_(weights)
        self.swapped = not self.swapped

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.swap()

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.swap()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        if self.swapped:
            self.swap()

    def state_dict(self) -> dict[str, Any]:
        return {"updates": self.updates, "averages": {name: whole(value) for name, value in self.averages.items()}}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.updates, self.averages = state_dict["updates"], state_dict["averages"]


class FreeAverage(WeightEma):
    """The average that schedule-free AdamW makes of its steps, in the place of one over the weights.

        average = y + (1 − 1/β) (z − y)      gradients are taken at the weights y, steps from z

    Defazio et al. 2024, "The Road Less Scheduled", eq. 1–3, solved for x. It is made when it is asked for.
    """

    def __init__(self, task: Task) -> None:
        super().__init__(task, decay=0.0)
        self.optimizer: Optimizer | None = None

    @property
    def state_key(self) -> str:
        return WeightEma.__qualname__

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        super().on_train_start(trainer, pl_module)
        self.optimizer = trainer.optimizers[0]

    def update(self) -> None:
        self.updates += 1

    def swap(self) -> None:
        if not self.swapped:
            self._make()
        super().swap()

    def state_dict(self) -> dict[str, Any]:
        self._make()
        return super().state_dict()

    @torch.no_grad()
    def _make(self) -> None:
        """Fills in the averages; of weights that no step was taken of yet, and of frozen ones, they are those."""
        groups = self.optimizer.param_groups if self.optimizer else []
        betas = {p: group["betas"][0] for group in groups for p in group["params"]}
        for name, p in averaged(self.task):
            z = self.optimizer.state[p].get("z") if self.optimizer and p in betas else None
            self.averages[name].copy_(p if z is None else p.lerp(z, 1 - 1 / betas[p]))


def averaged(task: Task) -> Iterator[tuple[str, nn.Parameter]]:
    """The parameters that are averaged, each under a name that is unique over all averaged modules."""
    for number, module in enumerate(task.averaged_modules()):
        for name, parameter in module.named_parameters():
            yield f"{number}.{name}", parameter


@torch.no_grad()
def copy_into(target: Mapping[str, Tensor], source: Mapping[str, Tensor]) -> None:
    """Overwrites the tensors of `target` that `source` has, in place and on their own device."""
    for name, values in source.items():
        target[name].copy_(values)
