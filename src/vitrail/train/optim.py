"""The optimiser and the learning rate of every step.

    lr · n / warmup                                             n = 1 … warmup
    min_lr + (lr − min_lr) (1 + cos(π (n − warmup) / (total − warmup))) / 2      n = warmup … total

AdamW: Loshchilov & Hutter 2019, "Decoupled Weight Decay Regularization". Cosine: the same authors, 2017, "SGDR", eq. 5.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch import nn
from torch.optim import AdamW, Optimizer

from vitrail.names import require
from vitrail.train.finite import skips_allowed

if TYPE_CHECKING:
    from vitrail.tasks.base import Task

LEAST_LR = 1e-6
FUSED_DEVICES = {"cpu", "cuda", "mps"}


@dataclass(frozen=True, kw_only=True)
class OptimConfig:
    """How weights are updated."""

    epochs: int = 100
    """passes over the training images"""
    lr: float = 3e-4
    """peak learning rate, for the whole batch as it is: it is not scaled by the batch size"""
    min_lr: float = LEAST_LR
    """learning rate of the last step; at its default no more than the peak"""
    weight_decay: float = 0.05
    """decay of weight matrices; biases, norms and what the model exempts are left alone"""
    warmup_epochs: float = 5
    """epochs of linear warm-up, never more than half the run"""
    clip_grad: float = 1.0
    """largest norm of the gradient; 0 turns clipping off"""
    accumulate: int = 1
    """batches whose gradients are averaged into one step"""
    on_nan: str = "stop"
    """what to do about losses and gradients that are infinite or NaN: stop, or skip:N to leave out up to N steps"""

    def __post_init__(self) -> None:
        require(self.epochs >= 1, "epochs", "be at least 1", self.epochs)
        require(0 < self.lr < math.inf, "lr", "be positive", self.lr)
        if self.min_lr == LEAST_LR:
            object.__setattr__(self, "min_lr", min(LEAST_LR, self.lr))
        require(0 <= self.min_lr <= self.lr, "min_lr", f"lie between 0 and --lr {self.lr}", self.min_lr)
        require(0 <= self.weight_decay < math.inf, "weight_decay", "be 0 or more", self.weight_decay)
        require(0 <= self.warmup_epochs < math.inf, "warmup_epochs", "be 0 or more", self.warmup_epochs)
        require(0 <= self.clip_grad < math.inf, "clip_grad", "be 0 (off) or more", self.clip_grad)
        require(self.accumulate >= 1, "accumulate", "be at least 1", self.accumulate)
        skips_allowed(self.on_nan)


def make_optimizer(task: Task, config: OptimConfig, *, fused: bool = True) -> Optimizer:
    """AdamW over all trainable parameters of the task: one group with weight decay and one without (`decayed`).

    `fused` runs the update as one kernel where the device has it. A group may hold `lr_scale`, a factor of the
    schedule's learning rate. A checkpoint that is loaded brings moments and learning rates; everything else of a group
    stays as it was made. Raises `ValueError` as `decayed` does.
    """
    parameters = dict(task.named_parameters())
    decays = decayed(task)
    groups = [
        {"params": [parameters[name] for name, on in decays.items() if on is wanted], "weight_decay": decay}
        for wanted, decay in ((True, config.weight_decay), (False, 0.0))
    ]
    fusible = fused and _all_fusible(parameters[name] for name in decays)
    optimizer = AdamW([group for group in groups if group["params"]], lr=config.lr, fused=fusible)
    optimizer.register_load_state_dict_pre_hook(_with_own_options)
    return optimizer


def decayed(task: Task) -> dict[str, bool]:
    """The names of all trainable parameters of the task, and which of them weight decay acts on.

    It leaves alone every parameter of fewer than two dimensions and those named by `task.no_weight_decay()`.
    Raises `ValueError` if nothing can be trained, or if an exempt name is no parameter's.
    """
    trainable = [(name, p) for name, p in task.named_parameters() if p.requires_grad]
    if not trainable:
        raise ValueError("a task to be trained needs a parameter that is not frozen; got none: unfreeze its head")
    exempt = task.no_weight_decay()
    if strange := exempt - {name for name, _ in task.named_parameters()}:
        raise ValueError(
            f"no_weight_decay must name parameters of the task; got {', '.join(sorted(strange)[:3])}: something wraps "
            "the backbone and renames them; wrap its blocks instead"
        )
    return {name: p.ndim >= 2 and name not in exempt for name, p in trainable}


def _with_own_options(optimizer: Optimizer, state: dict[str, Any]) -> dict[str, Any]:
    """A saved state whose groups step as the optimiser's own do: with its decay, and with the kernel of its precision.

    Before it is loaded, since torch then puts the count of steps where that kernel wants it.
    """
    pairs = zip(optimizer.param_groups, state["param_groups"], strict=True)
    return {**state, "param_groups": [{**own, "params": was["params"], "lr": was["lr"]} for own, was in pairs]}


def _all_fusible(parameters: Iterable[nn.Parameter]) -> bool:
    return all(p.device.type in FUSED_DEVICES and p.is_floating_point() for p in parameters)


def warmup_cosine(step: int, total: int, warmup: int, lr: float, min_lr: float) -> float:
    """Learning rate of optimiser step `step` (from 0) of `total`: the formula above with n = step + 1.

    Reaches `lr` in step `warmup - 1` and `min_lr` in step `total - 1`, and stays there.
    """
    n = step + 1
    if n <= warmup:
        return lr * n / warmup
    progress = min(1.0, (n - warmup) / max(1, total - warmup))
    return min_lr + (lr - min_lr) * (1 + math.cos(math.pi * progress)) / 2


def warmup_steps(config: OptimConfig, steps_per_epoch: int) -> int:
    """Optimiser steps of warm-up in a run of `config.epochs` epochs."""
    return round(min(config.warmup_epochs, config.epochs / 2) * steps_per_epoch)
