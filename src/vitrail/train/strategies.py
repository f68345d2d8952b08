"""How several processes share a network: whole in each of them, or in shards (FSDP2).

| `--strategy` | each process holds                 | gradients                    | source                         |
|--------------|------------------------------------|------------------------------|--------------------------------|
| `ddp`        | all weights, gradients and moments | averaged while backward runs | Li et al. 2020, PyTorch DDP    |
| `fsdp`       | its share of each of them          | averaged, to each its share  | Zhao et al. 2023, PyTorch FSDP |
| `auto`       | as `ddp`                           |                              |                                |

    layer ─ gather its weights ─ forward ─ let go ─ … ─ gather ─ backward ─ let go, average and share its gradients

What lies in no layer, such as the embedding, the head and the task's own parts, is gathered by the task's forward: from
there a task may call whatever it likes of its backbone, `features` or `embed` too. Anywhere else that is done within
`gathered`.

A checkpoint holds whole tensors in either case, so that a run may go on under another strategy.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch.distributed as dist
from lightning.pytorch.strategies import DDPStrategy
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.optim import Optimizer

from vitrail.tasks.base import Task
from vitrail.tasks.classify import Classify
from vitrail.tasks.distill import Distill

READS_ALL = (Classify, Distill)
"""tasks whose loss depends on all of the network; those made of them may leave something out"""
NAMED = 3
"""parameters that a message names"""


class Whole(DDPStrategy):
    """Each process holds the network whole. The lightning module has its task in `task`.

    DDP waits for the gradient of every weight. Of a task that is not one of `READS_ALL` it therefore asks in each step
    which of them the loss depends on, such as those that `features` leaves out.
    """

    def configure_ddp(self) -> None:
        assert self.lightning_module is not None
        self._ddp_kwargs["find_unused_parameters"] = not reads_all(self.lightning_module.task)  # type: ignore[arg-type]
        super().configure_ddp()


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
        own: dict[str, Any] = super().lightning_module_state_dict()
        return self._first({name: whole(value) for name, value in own.items()})

    def optimizer_state(self, optimizer: Optimizer) -> dict[str, Any]:
        saved: dict[str, Any] = super().optimizer_state(optimizer)
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


STRATEGIES: dict[str, type[DDPStrategy]] = {"auto": Whole, "ddp": Whole, "fsdp": Sharded}


def shard(task: Task, mesh: DeviceMesh) -> None:
    """Leaves each process of `mesh` its share of every parameter, of each layer by itself and of all the rest."""
    for layer in layers(task):
        fully_shard(layer, mesh=mesh)
    fully_shard(task, mesh=mesh)


def layers(task: Task) -> list[nn.Module]:
    """The members of the backbone's lists of modules between embedding and head, but for those that hold a list."""
    inner = {name for names in task.backbone.layer_groups()[1:-1] for name in names}
    found = []
    for prefix, parts in task.backbone.named_modules():
        for number, member in parts.named_children() if isinstance(parts, nn.ModuleList) else ():
            own = {f"{prefix}.{number}.{name}" for name, _ in member.named_parameters()}
            if own and own <= inner and not any(isinstance(part, nn.ModuleList) for part in member.modules()):
                found.append(member)
    return found


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


def reads_all(task: Task) -> bool:
    return type(task) in READS_ALL


def refuse_unused(task: Task) -> None:
    """Raises `ValueError` where a backward pass left out a weight that is trained, though the task reads them all.

    DDP would wait for its gradient in the next step.
    """
    unused = [name for name, p in task.named_parameters() if p.requires_grad and p.grad is None]
    if unused and reads_all(task):
        more = f" and {len(unused) - NAMED} more" if len(unused) > NAMED else ""
        raise ValueError(
            f"with several processes, {type(task).__name__} needs a network whose logits depend on every weight that "
            f"is trained; got {', '.join(unused[:NAMED])}{more} beside those: freeze them with requires_grad_(False)"
        )
