"""The optimiser: one object, whatever it is made of, whose groups follow the schedule.

| optimizer       | weights move by                                                 | source                         |
|-----------------|-----------------------------------------------------------------|--------------------------------|
| `adamw`         | the mean gradient over the root of the mean square gradient     | Loshchilov & Hutter 2019       |
| `sgd`           | Nesterov's momentum, weight decay being part of the gradient    | Sutskever et al. 2013          |
| `muon`          | in matrices of blocks, momentum made orthogonal; else `adamw`   | Jordan 2024; Liu et al. 2025   |
| `lamb`          | `adamw`'s step, scaled to the norm of each weight               | You et al. 2020                |
| `lion`          | the sign of a momentum                                          | Chen et al. 2023               |
| `schedule_free` | `adamw`'s steps, whose average is the model                     | Defazio et al. 2024            |

Layer-wise decay gives each depth of the backbone its own share of the learning rate, the head all of it and every
depth below `layer_decay` times that of the one above: Clark et al. 2020, "ELECTRA", and Bao et al. 2022, "BEiT".
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, get_args

import torch
from torch import nn
from torch.optim import SGD, AdamW, Muon, Optimizer

from vitrail.names import check_choice, require
from vitrail.train.finite import skips_allowed
from vitrail.train.schedules import USUAL_EPOCHS, Plan, ScheduleConfig, plan

if TYPE_CHECKING:
    from vitrail.tasks.base import Task

OptimizerName = Literal["adamw", "sgd", "muon", "lamb", "lion", "schedule_free"]
LEAST_LR = 1e-6
FUSED_DEVICES = {"cpu", "cuda", "mps"}
PROGRESS = frozenset({"lr", "step", "k", "weight_sum", "lr_max", "scheduled_lr", "train_mode"})
"""what an optimiser counts in its groups: that much of a saved group is where it stood, all else how it stepped"""


class Numbers(NamedTuple):
    """What `OptimConfig` may leave open, as it is taken."""

    lr: float
    min_lr: float
    weight_decay: float
    momentum: float
    beta2: float
    schedule: str


@dataclass(frozen=True, kw_only=True)
class OptimConfig(ScheduleConfig):
    """How weights are updated."""

    optimizer: OptimizerName = "adamw"
    """lamb and lion need vitrail[timm], schedule_free needs vitrail[schedulefree]; docs/training.md compares them"""
    lr: float | None = None
    """peak learning rate, for the whole batch as it is: it is not scaled by the batch size; by default 3e-4, and with
    other optimizers sgd 0.1, lamb 2e-3, lion 3e-5, schedule_free 1e-3"""
    min_lr: float | None = None
    """learning rate of the last step; by default 1e-6, and no more than the peak"""
    weight_decay: float | None = None
    """decay of weight matrices; biases, norms and what the model exempts are left alone; by default 0.05, and with
    other optimizers sgd 5e-4, lion 0.5"""
    momentum: float | None = None
    """momentum of sgd and muon, first beta of the others; by default 0.9, and of muon 0.95"""
    beta2: float | None = None
    """second beta of all but sgd; by default 0.999, and of lion 0.99"""
    layer_decay: float = 1.0
    """each layer's learning rate as a share of that of the layer above it; 0.65 to 0.9 for fine-tuning, 1 is off"""
    clip_grad: float = 1.0
    """largest norm of the gradient; 0 turns clipping off"""
    accumulate: int = 1
    """batches whose gradients are averaged into one step"""
    on_nan: str = "stop"
    """what to do about losses and gradients that are infinite or NaN: stop, or skip:N to leave out up to N steps"""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice("--optimizer", self.optimizer, get_args(OptimizerName))
        self._check_numbers(self.numbers())
        require(0 < self.layer_decay <= 1, "layer_decay", "lie in (0, 1]", self.layer_decay)
        require(0 <= self.clip_grad < math.inf, "clip_grad", "be 0 (off) or more", self.clip_grad)
        require(self.accumulate >= 1, "accumulate", "be at least 1", self.accumulate)
        skips_allowed(self.on_nan)

    def _check_numbers(self, taken: Numbers) -> None:
        require(0 < taken.lr < math.inf, "lr", "be positive", taken.lr)
        require(0 <= taken.min_lr <= taken.lr, "min_lr", f"lie between 0 and --lr {taken.lr}", taken.min_lr)
        require(0 <= taken.weight_decay < math.inf, "weight_decay", "be 0 or more", taken.weight_decay)
        for name in ("momentum", "beta2"):
            require(0 <= getattr(taken, name) < 1, name, "lie in [0, 1)", getattr(taken, name))
        if self.optimizer == "schedule_free":
            also = "with --optimizer schedule_free"
            require(taken.schedule == "constant", "schedule", f"be constant {also}", taken.schedule)
            require(taken.momentum > 0, "momentum", f"be above 0 {also}", taken.momentum)

    def numbers(self) -> Numbers:
        """The numbers to train with: those that are said, and the optimiser's own where nothing is."""
        own = OPTIMIZERS[self.optimizer]
        lr = own.lr if self.lr is None else self.lr
        schedule = "constant" if self.optimizer == "schedule_free" else "cosine"
        return Numbers(
            lr=lr,
            min_lr=min(LEAST_LR, lr) if self.min_lr is None else self.min_lr,
            weight_decay=own.weight_decay if self.weight_decay is None else self.weight_decay,
            momentum=own.momentum if self.momentum is None else self.momentum,
            beta2=own.beta2 if self.beta2 is None else self.beta2,
            schedule=schedule if self.schedule == "auto" else self.schedule,
        )

    def settled(self) -> dict[str, Any]:
        """Every field that may be left open, as it is taken: to say what is taken anyway is no other setting."""
        return {**self.numbers()._asdict(), **{f"{what}_epochs": self.in_epochs(what) for what in USUAL_EPOCHS}}

    def plan(self, steps_per_epoch: int) -> Plan:
        """The learning rate's schedule over the run's optimiser steps."""
        taken = self.numbers()
        return plan(self, steps_per_epoch, schedule=taken.schedule, lr=taken.lr, min_lr=taken.min_lr)


def make_optimizer(task: Task, config: OptimConfig, *, fused: bool = True) -> Optimizer:
    """`config.optimizer` over all trainable parameters of the task, in groups as `parameter_groups` makes them.

    `fused` runs AdamW's update as one kernel where the device has it. A checkpoint that is loaded brings moments,
    counts and learning rates; everything else of a group stays as it was made. Raises `ValueError` as `decayed` does,
    for a package that is missing, and for what the optimiser is not for.
    """
    optimizer = OPTIMIZERS[config.optimizer].make(task, config, fused)
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


def layer_scales(task: Task, decay: float) -> dict[str, float]:
    """Every parameter's share of the learning rate: `decay` to the power of the layers between it and the head.

    The backbone's head has 1, as have the task's own parameters, which come after it.
    """
    head = len(task.backbone.layer_groups()) - 1
    groups = enumerate(task.layer_groups())
    return {name: decay ** max(0, head - depth) for depth, names in groups for name in names}


def parameter_groups(task: Task, config: OptimConfig, only: Collection[str] | None = None) -> list[dict[str, Any]]:
    """The trainable parameters, or `only` these of them, with their names: those that decay first.

    A group holds `weight_decay` and `lr_scale`, the factor of the schedule's learning rate.
    """
    parameters, scales = dict(task.named_parameters()), layer_scales(task, config.layer_decay)
    decays, decay = decayed(task), config.numbers().weight_decay
    groups: dict[tuple[bool, float], list[tuple[str, nn.Parameter]]] = {}
    for name in sorted(decays, key=lambda name: not decays[name]):
        if only is None or name in only:
            groups.setdefault((decays[name], scales[name]), []).append((name, parameters[name]))
    return [
        {"params": named, "weight_decay": decay if on else 0.0, "lr_scale": scale}
        for (on, scale), named in groups.items()
    ]


def hidden_matrices(task: Task) -> set[str]:
    """The trainable matrices between the backbone's embedding and its head, tables of positions left out."""
    inside = {f"backbone.{name}" for group in task.backbone.layer_groups()[1:-1] for name in group}
    shapes = {name: p.ndim for name, p in task.named_parameters()}
    return {name for name, on in decayed(task).items() if on and name in inside and shapes[name] == 2}


class Joined(Optimizer):
    """Several optimisers as one: their groups and state are its own, and a step is a step of each.

    A part none of whose parameters has a gradient takes no step, and counts none.
    """

    def __init__(self, parts: Sequence[Optimizer]) -> None:
        self.parts = parts
        super().__init__([group for part in parts for group in part.param_groups], {})
        self._share()

    def _share(self) -> None:
        """Gives the parts the groups and the state that are here."""
        groups = iter(self.param_groups)
        for part in self.parts:
            part.param_groups = [next(groups) for _ in part.param_groups]
            part.state = self.state

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        loss = torch.enable_grad()(closure)() if closure else None
        for part in self.parts:
            if any(p.grad is not None for group in part.param_groups for p in group["params"]):
                part.step()
        return loss

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict(state_dict)
        self._share()


def _adamw(task: Task, config: OptimConfig, fused: bool) -> Optimizer:
    return _adamw_over(parameter_groups(task, config), config, fused)


def _adamw_over(groups: list[dict[str, Any]], config: OptimConfig, fused: bool, beta1: float | None = None) -> AdamW:
    taken = config.numbers()
    fusible = fused and _all_fusible(p for group in groups for _, p in group["params"])
    betas = (taken.momentum if beta1 is None else beta1, taken.beta2)
    return AdamW(groups, lr=taken.lr, betas=betas, fused=fusible)


def _sgd(task: Task, config: OptimConfig, fused: bool) -> Optimizer:
    """Never fused: torch's kernel leaves momentum undefined where the first step of all is left out."""
    taken = config.numbers()
    return SGD(parameter_groups(task, config), lr=taken.lr, momentum=taken.momentum, nesterov=taken.momentum > 0)


def _muon(task: Task, config: OptimConfig, fused: bool) -> Optimizer:
    """Muon's update is scaled to the root mean square of AdamW's, so that one learning rate suits both (Liu et al.
    2025, "Muon is Scalable for LLM Training", §2.2).
    """
    taken, hidden = config.numbers(), hidden_matrices(task)
    if not hidden:
        raise ValueError(
            "--optimizer muon needs matrices of blocks to train; this network has none that are not frozen: "
            "take --optimizer adamw"
        )
    muon = Muon(
        parameter_groups(task, config, hidden), lr=taken.lr, momentum=taken.momentum, adjust_lr_fn="match_rms_adamw"
    )
    rest = parameter_groups(task, config, set(decayed(task)) - hidden)
    beta1 = OPTIMIZERS["adamw"].momentum
    return Joined([muon, _adamw_over(rest, config, fused, beta1)] if rest else [muon])


def _lamb(task: Task, config: OptimConfig, fused: bool) -> Optimizer:
    with _extra("lamb", "timm"):
        from timm.optim.lamb import Lamb
    taken = config.numbers()
    betas = (taken.momentum, taken.beta2)
    return Joined([Lamb(parameter_groups(task, config), lr=taken.lr, betas=betas, max_grad_norm=None)])


def _lion(task: Task, config: OptimConfig, fused: bool) -> Optimizer:
    with _extra("lion", "timm"):
        from timm.optim.lion import Lion
    taken = config.numbers()
    return Joined([Lion(parameter_groups(task, config), lr=taken.lr, betas=(taken.momentum, taken.beta2))])


def _schedule_free(task: Task, config: OptimConfig, fused: bool) -> Optimizer:
    """Always in its training mode: `train.ema.FreeAverage` puts the average in, and takes it out to the bit."""
    with _extra("schedule_free", "schedulefree"):
        from schedulefree import AdamWScheduleFree
    taken = config.numbers()
    betas = (taken.momentum, taken.beta2)
    optimizer = AdamWScheduleFree(parameter_groups(task, config), lr=taken.lr, betas=betas)
    optimizer.train()
    return Joined([optimizer])


class Own(NamedTuple):
    """How an optimiser is made, and what it takes where nothing is said."""

    make: Callable[[Task, OptimConfig, bool], Optimizer]
    lr: float
    weight_decay: float
    momentum: float = 0.9
    beta2: float = 0.999


OPTIMIZERS: dict[str, Own] = {
    "adamw": Own(_adamw, lr=3e-4, weight_decay=0.05),
    "sgd": Own(_sgd, lr=0.1, weight_decay=5e-4),
    "muon": Own(_muon, lr=3e-4, weight_decay=0.05, momentum=0.95),
    "lamb": Own(_lamb, lr=2e-3, weight_decay=0.05),
    "lion": Own(_lion, lr=3e-5, weight_decay=0.5, beta2=0.99),
    "schedule_free": Own(_schedule_free, lr=1e-3, weight_decay=0.05),
}


@contextmanager
def _extra(optimizer: str, extra: str) -> Iterator[None]:
    """For the import of a package that an extra of the same name brings."""
    try:
        yield
    except ModuleNotFoundError as error:
        raise ValueError(
            f"--optimizer {optimizer} needs the {extra} package; it is not installed: pip install 'vitrail[{extra}]'"
        ) from error


def _with_own_options(optimizer: Optimizer, state: dict[str, Any]) -> dict[str, Any]:
    """A saved state whose groups are the optimiser's own: its parameters, found by name, its decay, its kernel.

    Before it is loaded, since torch then puts the count of steps where that kernel wants it. A state without names is
    taken group by group.
    """
    own, saved = optimizer.param_groups, state["param_groups"]
    if "param_names" not in saved[0]:
        saved = [{**was, "param_names": group["param_names"]} for was, group in zip(saved, own, strict=True)]
    numbers = {n: number for was in saved for n, number in zip(was["param_names"], was["params"], strict=True)}
    holders = {n: was for was in saved for n in was["param_names"]}
    return {**state, "param_groups": [_stood(group, holders, numbers) for group in own]}


def _stood(group: dict[str, Any], holders: dict[str, dict[str, Any]], numbers: dict[str, int]) -> dict[str, Any]:
    """A group of the optimiser's own, where the saved group that held its first parameter stood."""
    names = group["param_names"]
    progress = {key: value for key, value in holders[names[0]].items() if key in PROGRESS}
    return {**group, **progress, "params": [numbers[name] for name in names]}


def _all_fusible(parameters: Iterable[nn.Parameter]) -> bool:
    return all(p.device.type in FUSED_DEVICES and p.is_floating_point() for p in parameters)
