"""What is done about losses and gradients that are infinite or NaN: no step is taken from them.

    loss ── finite? ── backward ── norm of the gradient ── finite? ── step
              no                                             no: the step is left out
              └───────────── --on-nan: the run ends (stop), or goes on until N steps were left out (skip:N)

A step is left out before the optimiser sees it, so that weights and moments stay as they were. In fp16 the gradient
scaler looks for gradients that overflow and lowers its scale: those are expected, and none of ours.
"""

from __future__ import annotations

import re
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.utils import clip_grads_with_norm_, get_total_norm
from torch.optim import Optimizer

from vitrail.records import Batch
from vitrail.tasks.base import Task
from vitrail.train.strategies import whole

NAMED = 5
"""samples of a batch that a message names"""
MEND = "lower --lr, lengthen --warmup-epochs or set --clip-grad"


class NonFiniteLoss(ValueError):
    """The loss, a gradient or a weight became infinite or NaN. Weights and checkpoints hold the last sound ones."""


class Place(NamedTuple):
    """Where in a run something was met."""

    epoch: int
    """from 0, as `batch` and `step`"""
    batch: int
    step: int
    lr: float
    ids: tuple[str, ...] = ()
    """the samples, where they have names"""

    def __str__(self) -> str:
        named = ", ".join(self.ids[:NAMED]) + (f" and {len(self.ids) - NAMED} more" if len(self.ids) > NAMED else "")
        at = f"epoch {self.epoch + 1}, batch {self.batch + 1}, step {self.step + 1}, at lr {self.lr:.3g}"
        return f"{at}, with {named}" if named else at


def skips_allowed(on_nan: str) -> int:
    """How many steps `--on-nan` lets a run leave out: 0 for `stop`. Raises `ValueError` for anything else."""
    if on_nan == "stop":
        return 0
    found = re.fullmatch(r"skip:([1-9]\d{0,8})", on_nan)
    if not found:
        raise ValueError(f"--on-nan must be stop, or skip:N to leave out at most N steps of a run; got {on_nan!r}")
    return int(found[1])


class FiniteGuard:
    """Clips gradients, leaves out steps whose gradient is not finite, and ends the run when there are too many.

    On an accelerator nothing is waited for: the fused optimiser is told by a tensor, and the count is read by `flush`.
    """

    def __init__(self, task: Task, allowed: int, clip: float) -> None:
        self.task, self.allowed, self.clip = task, allowed, clip
        self.skipped = 0
        """steps left out so far, before a resume too"""
        self._unread: list[tuple[Tensor, Place]] = []

    def clip_or_skip(self, optimizer: Optimizer, place: Place) -> None:
        """To be called between backward and step. Raises `NonFiniteLoss` where one step too many would be left out."""
        parameters = [p for p in self.task.parameters() if p.grad is not None]
        norm = get_total_norm([p.grad for p in parameters if p.grad is not None])
        bad = ~whole(norm).isfinite()
        self._unread.append((bad, place))
        if bad.device.type != "cpu" and all(group.get("fused") for group in optimizer.param_groups):
            optimizer.found_inf = bad.float()  # type: ignore[attr-defined]
        elif bad.item():
            self.flush(f" of {self._last_bad_gradient()}")
            optimizer.zero_grad(set_to_none=True)  # parameters without a gradient are left alone
            return
        if self.clip:
            clip_grads_with_norm_(parameters, self.clip, norm)

    def flush(self, which: str = "") -> None:
        """Reads what was met since the last time."""
        unread, self._unread = self._unread, []
        flags = torch.stack([bad for bad, _ in unread]).tolist() if unread else []
        for bad, (_, place) in zip(flags, unread, strict=True):
            self.skipped += bad
            if bad and self.skipped > self.allowed:
                after = f" after {self.allowed} steps were left out" if self.allowed else ""
                other = "" if self.allowed else ", or leave such steps out with --on-nan skip:N"
                raise NonFiniteLoss(
                    f"gradients must stay finite; got one{which} that is not, in {place}{after}: {MEND}{other}"
                )

    def _last_bad_gradient(self) -> str:
        """The parameter nearest to the loss: backward goes from there to the input."""
        bad = [
            name
            for name, p in self.task.named_parameters()
            if p.grad is not None and not whole(p.grad).isfinite().all()
        ]
        return bad[-1] if bad else "all together"


def first_bad_layer(task: Task, batch: Batch) -> str:
    """The first part of the task whose output, from finite inputs, is not; found by running the batch once more."""
    found: list[str] = []
    parts = [(name, part) for name, part in task.named_modules() if name]
    hooks = [part.register_forward_hook(partial(_look, name, found)) for name, part in parts]
    try:
        with torch.no_grad():
            task(batch)
    finally:
        for hook in hooks:
            hook.remove()
    return found[0] if found else ""


def _look(name: str, found: list[str], part: nn.Module, inputs: Any, output: Any) -> None:
    if isinstance(output, Tensor) and not output.isfinite().all():
        found.append(name)
