"""The learning rate of every optimiser step, as a pure function of the step: a resumed run needs no state of it.

    n = step + 1        the steps up to this one and with it           t, at most 1: the share of the way that is gone

| schedule   | learning rate                                                                                    |
|------------|--------------------------------------------------------------------------------------------------|
| (warm-up)  | lr · n / warmup, for n up to warmup, before each of these                                        |
| cosine     | min_lr + (lr − min_lr) (1 + cos πt) / 2 with t = (n − warmup) / (total − warmup)                 |
| restarts   | the same, with t in each cycle from 0 to 1; a cycle is restart_factor times as long as the last   |
| linear     | min_lr + (lr − min_lr) (1 − t) with cosine's t                                                   |
| step       | lr · decay_rate ^ ⌊step / decay⌋, at least min_lr; counted from the run's first step             |
| constant   | lr                                                                                               |

Cosine and restarts: Loshchilov & Hutter 2017, "SGDR", eq. 5. A cycle's last step has min_lr, so that a run that ends
with a cycle ends there. Warm-up, and steps counted from the beginning: Goyal et al. 2017, "Accurate, Large Minibatch
SGD", §2.2.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, NamedTuple, get_args

from vitrail.names import check_choice, require

Schedule = Literal["auto", "cosine", "restarts", "linear", "step", "constant"]
USUAL_EPOCHS = {"warmup": 5.0, "decay": 30.0, "restart": 10.0}
"""lengths, where neither epochs nor steps are said"""


@dataclass(frozen=True, kw_only=True)
class ScheduleConfig:
    """How long a run is, and how its learning rate goes."""

    epochs: int = 100
    """passes over the training images"""
    schedule: Schedule = "auto"
    """how the learning rate falls after the warm-up; auto is cosine, but constant with --optimizer schedule_free"""
    warmup_epochs: float | None = None
    """epochs of linear warm-up, by default 5; never more than half the run"""
    warmup_steps: int | None = None
    """the same in optimiser steps"""
    decay_epochs: float | None = None
    """epochs between two falls of --schedule step, by default 30"""
    decay_steps: int | None = None
    """the same in optimiser steps"""
    decay_rate: float = 0.1
    """by what --schedule step multiplies the learning rate"""
    restart_epochs: float | None = None
    """epochs of the first cycle of --schedule restarts, by default 10"""
    restart_steps: int | None = None
    """the same in optimiser steps"""
    restart_factor: float = 1.0
    """how many times as long each cycle is as the one before"""

    def __post_init__(self) -> None:
        require(self.epochs >= 1, "epochs", "be at least 1", self.epochs)
        check_choice("--schedule", self.schedule, get_args(Schedule))
        for what in USUAL_EPOCHS:
            self._check_length(what)
        require(0 < self.decay_rate <= 1, "decay_rate", "lie in (0, 1]", self.decay_rate)
        require(1 <= self.restart_factor < math.inf, "restart_factor", "be at least 1", self.restart_factor)

    def _check_length(self, what: str) -> None:
        epochs, steps = getattr(self, f"{what}_epochs"), getattr(self, f"{what}_steps")
        if epochs is not None and steps is not None:
            raise ValueError(
                f"--{what}-epochs and --{what}-steps are one length in two units; got {epochs} and {steps}: "
                "drop one, or set it to none"
            )
        if what == "warmup":
            require(0 <= (epochs or 0) < math.inf, "warmup_epochs", "be 0 or more", epochs)
            require((steps or 0) >= 0, "warmup_steps", "be 0 or more", steps)
        else:
            require(epochs is None or 0 < epochs < math.inf, f"{what}_epochs", "be above 0", epochs)
            require(steps is None or steps >= 1, f"{what}_steps", "be at least 1", steps)

    def in_epochs(self, what: str) -> float | None:
        """The length of `warmup`, `decay` or `restart`; None where it is said in steps."""
        epochs: float | None = getattr(self, f"{what}_epochs")
        return USUAL_EPOCHS[what] if epochs is None and getattr(self, f"{what}_steps") is None else epochs

    def in_steps(self, what: str, steps_per_epoch: int) -> float:
        """The length of `warmup`, `decay` or `restart` in optimiser steps."""
        epochs = self.in_epochs(what)
        return float(getattr(self, f"{what}_steps")) if epochs is None else epochs * steps_per_epoch


class Plan(NamedTuple):
    """A run's schedule, its lengths in optimiser steps."""

    schedule: str
    total: int
    warmup: int
    lr: float
    min_lr: float
    decay: int = 1
    decay_rate: float = 1.0
    restart: int = 1
    restart_factor: float = 1.0


def plan(config: ScheduleConfig, steps_per_epoch: int, *, schedule: str, lr: float, min_lr: float) -> Plan:
    """The plan of a run of `config.epochs` epochs; `schedule` is none that is still to be chosen."""
    total = config.epochs * steps_per_epoch
    warmup = round(min(config.in_steps("warmup", steps_per_epoch), total / 2))
    decay, restart = (max(1, round(config.in_steps(what, steps_per_epoch))) for what in ("decay", "restart"))
    return Plan(schedule, total, warmup, lr, min_lr, decay, config.decay_rate, restart, config.restart_factor)


def rate(step: int, plan: Plan) -> float:
    """The learning rate of optimiser step `step`, from 0. Past the end, cosine and linear stay at `min_lr`."""
    if step < plan.warmup:
        return plan.lr * (step + 1) / plan.warmup
    return SCHEDULES[plan.schedule](step, plan)


def _cosine(step: int, plan: Plan) -> float:
    return _fallen(_share(step, plan), plan)


def _restarts(step: int, plan: Plan) -> float:
    passed, length = float(step + 1 - plan.warmup), float(plan.restart)
    if plan.restart_factor == 1:
        return _fallen(((passed - 1) % length + 1) / length, plan)
    while passed > length:
        passed, length = passed - length, length * plan.restart_factor
    return _fallen(passed / length, plan)


def _linear(step: int, plan: Plan) -> float:
    return plan.min_lr + (plan.lr - plan.min_lr) * (1 - _share(step, plan))


def _step(step: int, plan: Plan) -> float:
    return max(plan.min_lr, plan.lr * plan.decay_rate ** (step // plan.decay))


def _constant(step: int, plan: Plan) -> float:
    return plan.lr


def _share(step: int, plan: Plan) -> float:
    """How much of the way from the warm-up to the end is gone after this step."""
    return min(1.0, (step + 1 - plan.warmup) / max(1, plan.total - plan.warmup))


def _fallen(share: float, plan: Plan) -> float:
    """Half a cosine from `lr` to `min_lr`."""
    return plan.min_lr + (plan.lr - plan.min_lr) * (1 + math.cos(math.pi * share)) / 2


SCHEDULES: dict[str, Callable[[int, Plan], float]] = {
    "cosine": _cosine, "restarts": _restarts, "linear": _linear, "step": _step, "constant": _constant,
}  # fmt: skip
