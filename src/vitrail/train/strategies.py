"""How several processes share a network: whole in each of them, or in shards (FSDP2).

| `--strategy` | each process holds                     | gradients are                                  | source        |
|--------------|----------------------------------------|------------------------------------------------|---------------|
| `ddp`        | all weights, gradients and moments     | averaged while backward runs                   | Li et al. 2020, "PyTorch Distributed" |
| `fsdp`       | its share of each of them              | averaged, each process getting its share       | Zhao et al. 2023, "PyTorch FSDP"      |
| `auto`       | as `ddp`                               |                                                |               |

    layer ─ gather its weights ─ forward ─ let go ─ … ─ gather ─ backward ─ let go, average and share its gradients

A layer is the largest module of each of `layer_groups()` between embedding and head; what is left, such as the
embedding, the head and the task's own, is one share more, whose forward is the task's: a task may call whatever it
likes of its backbone from there, `features` or `embed` too. Anywhere else those are called within `gathered`.

A checkpoint holds whole tensors in either case, so that a run may go on under another strategy.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from lightning.pytorch.strategies import DDPStrategy
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.optim import Optimizer

from vitrail.tasks.base import Task

NAMED = 3
"""parameters that a message names"""


class Sharded(DDPStrategy):
    """Each process holds a share of every weight, gradient and moment; the rest is as with DDP.

    The lightning module has its task in `task`, which is put on the device share by share.
    """

    def model_to_device(self) -> None:
        """Not before it is sharded: it may be larger than the device."""

    def configure_ddp(self) -> None:
        assert self.lightning_module is not None
        mesh = init_device_mesh(self.root_device.type, (self.world_size,))
        shard(self.lightning_module.task, mesh)  # type: ignore[arg-type]
        super().model_to_device()

    def setup_optimizers(self, trainer: Any) -> None:
        super().setup_optimizers(trainer)
        for optimizer in self.optimizers:
            optimizer.register_load_state_dict_pre_hook(_in_shards)

    def training_step(self, *args: Any, **kwargs: Any) -> Any:
        """What is counted and not learnt, such as the means of batch norm, is the first process's, as with DDP."""
        assert self.lightning_module is not None
        kept = self.lightning_module.state_dict(keep_vars=True)
        for value in kept.values():
            if not isinstance(value, nn.Parameter):
                dist.broadcast(value, 0)
        return super().training_step(*args, **kwargs)

    def lightning_module_state_dict(self) -> dict[str, Any]:
        return self._first({name: whole(value) for name, value in super().lightning_module_state_dict().items()})

    def optimizer_state(self, optimizer: Optimizer) -> dict[str, Any]:
        saved = super().optimizer_state(optimizer)
        state = {n: {key: whole(value) for key, value in own.items()} for n, own in saved["state"].items()}
        return self._first({**saved, "state": state})

    def _first(self, found: dict[str, Any]) -> dict[str, Any]:
        """All processes put a tensor together; only the one that writes it keeps it."""
        return found if self.is_global_zero else {}

    def teardown(self) -> None:
        """Without taking the shards to the CPU, where no process could put them together."""
        assert self.cluster_environment is not None
        assert self.accelerator is not None
        self.cluster_environment.teardown()
        self.precision_plugin.teardown()
        self.accelerator.teardown()
        self.checkpoint_io.teardown()


STRATEGIES: dict[str, type[DDPStrategy]] = {"auto": DDPStrategy, "ddp": DDPStrategy, "fsdp": Sharded}


def shard(task: Task, mesh: DeviceMesh) -> None:
    """Leaves each process of `mesh` its share of every parameter, of each layer by itself and of all the rest."""
    for layer in layers(task):
        fully_shard(layer, mesh=mesh)
    fully_shard(task, mesh=mesh)


def layers(task: Task) -> list[nn.Module]:
    """The largest module of each layer between embedding and head, inner ones first."""
    found = [_largest(task.backbone, set(names)) for names in task.backbone.layer_groups()[1:-1]]
    order = {id(module): depth for depth, module in enumerate(task.modules())}
    return sorted((module for module in found if module), key=lambda module: -order[id(module)])


def _largest(backbone: nn.Module, names: set[str]) -> nn.Module | None:
    """The module with most weights of which all are among `names`; the outermost of equal ones."""
    sizes: dict[nn.Module, int] = {}
    for prefix, module in backbone.named_modules():
        own = {f"{prefix}.{name}": parameter.numel() for name, parameter in module.named_parameters()}
        if own and own.keys() <= names:
            sizes[module] = sum(own.values())
    return max(sizes, key=sizes.__getitem__, default=None)


def is_sharded(task: Task) -> bool:
    return isinstance(task, FSDPModule)


@contextmanager
def gathered(task: Task) -> Iterator[None]:
    """Within it, parts of a task other than its forward may be called, by all processes together."""
    if not isinstance(task, FSDPModule):
        yield
        return
    task.unshard()
    try:
        yield
    finally:
        task.reshard()


def whole(value: Any) -> Any:
    """A tensor of which each process has a share, put together by all of them, on the CPU; anything else as it is."""
    return value.full_tensor().cpu() if isinstance(value, DTensor) else value


def shared_as(value: Any, like: Tensor) -> Any:
    """This process's share of a whole tensor, where that of `like` is; anything of another shape as it is."""
    if not isinstance(like, DTensor) or not isinstance(value, Tensor) or value.shape != like.shape:
        return value
    return distribute_tensor(value.to(like.device), like.device_mesh, like.placements, src_data_rank=None)


def _in_shards(optimizer: Optimizer, saved: dict[str, Any]) -> dict[str, Any]:
    """A saved state, in the groups of the optimiser, with this process's share of every moment."""
    groups = zip(optimizer.param_groups, saved["param_groups"], strict=True)
    own = {n: p for group, was in groups for n, p in zip(was["params"], group["params"], strict=True)}
    state = {n: {key: shared_as(v, own[n]) for key, v in values.items()} for n, values in saved["state"].items()}
    return {**saved, "state": state}


def refuse_unused(task: Task) -> None:
    """Raises `ValueError`, after a backward pass, for parameters that the loss does not depend on: DDP waits for them."""
    unused = [name for name, p in task.named_parameters() if p.requires_grad and p.grad is None]
    if unused:
        more = f" and {len(unused) - NAMED} more" if len(unused) > NAMED else ""
        raise ValueError(
            f"--strategy ddp needs a loss that depends on every weight that is trained; that of "
            f"{type(task).__name__} leaves out {', '.join(unused[:NAMED])}{more}: freeze them with requires_grad_(False), "
            "take away a head that nobody reads with reset_classifier(0), or take --strategy fsdp"
        )
