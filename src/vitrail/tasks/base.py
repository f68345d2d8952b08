"""The contract of every task: a backbone, a loss, figures, and answers in words.

    batch ──> task(batch) ──> {"loss": …, parts …}        training, in any loop
          ├── task.update(metrics, batch)                 one forward; `evaluate` runs it over a loader
          └── task.predict(batch) ──> list of results     one an image

Nothing here knows a training engine. torchmetrics is imported by `metrics()` alone, since that takes seconds.

Legend: `B` batch, `C` channels, `H`, `W` pixels, `K` classes.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal, cast

import torch
from torch import Tensor, nn

from vitrail.layers.modes import evaluating
from vitrail.models.backbone import Backbone
from vitrail.records import Batch, Result

if TYPE_CHECKING:
    from torchmetrics import MetricCollection

Mode = Literal["max", "min"]
INPUTS = ("image", "views", "text")
"""what a batch may be about; at least one of them is there"""


class Task(nn.Module, ABC):
    """A question that a backbone learns to answer. `forward` is the loss, so that wrappers such as DDP see it."""

    monitor: ClassVar[tuple[str, Mode]]
    """the figure that says which epoch was best, and whether more or less of it is better"""
    backbone: Backbone

    @abstractmethod
    def forward(self, batch: Batch) -> dict[str, Tensor]:
        """`loss` to be minimised, and its parts for the log: each 0-dimensional, the same ones in every batch."""

    @abstractmethod
    def metrics(self) -> MetricCollection:
        """Fresh figures of this task, on its device. 0-dimensional ones are scores, all others are tables."""

    @abstractmethod
    def update(self, metrics: MetricCollection, batch: Batch) -> None:
        """Adds a batch to `metrics`, by one forward pass."""

    @abstractmethod
    def predict(self, batch: Batch) -> Sequence[Result]:
        """One result an image, in the order of the batch, which carries the geometry where a result needs it."""

    def check(self, batch: Batch) -> None:
        """Raises `ValueError`, naming samples, for targets that the task cannot take.

        A loop that calls it before the batch goes to a device spares that device a wait.
        """

    def weight(self, batch: Batch) -> Tensor:
        """How many images the loss of a batch is the mean over: what it counts for in an epoch's. By default all.

        0-dimensional, on the task's device.
        """
        return torch.full((), float(batch_count(batch)), device=self.device)

    def layer_groups(self) -> list[list[str]]:
        """Parameter names from input to output, every one once; the task's own come after the backbone's."""
        groups = [[f"backbone.{name}" for name in group] for group in self.backbone.layer_groups()]
        own = [name for name, _ in self.named_parameters() if not name.startswith("backbone.")]
        return [*groups, own] if own else groups

    def no_weight_decay(self) -> set[str]:
        """Names of parameters, beside biases and norms, that weight decay must leave alone."""
        return {f"backbone.{name}" for name in self.backbone.no_weight_decay()}

    def averaged_modules(self) -> list[nn.Module]:
        """Modules whose weights an exponential moving average follows; by default all there is."""
        return [self]

    def after_step(self, step: int, total: int) -> None:
        """Called after optimiser step `step` (from 1) of `total`; for teachers that follow their students."""

    def taught_by(self) -> str | None:
        """What tells a frozen teacher from another, for checkpoints to remember; None without one."""
        return None

    def save_pretrained(self, path: str | Path, **training: Any) -> Path:
        """Writes a model folder with all that answering needs, and returns it; by default the backbone's.

        A task with parts of its own beside the backbone overrides this, or they are lost.
        """
        return self.backbone.save_pretrained(path, **training)

    @property
    def device(self) -> torch.device:
        return next(self.parameters()).device

    def prepare(self, item: Batch | Sequence[Any]) -> Batch:
        """What a loader yields -> a checked batch on the task's device, its images normalised."""
        batch = as_batch(item)
        self.check(batch)
        return self.backbone.preprocess.prepare(to_device(batch, self.device))


def evaluate(task: Task, loader: Iterable[Batch | Sequence[Any]]) -> dict[str, Tensor]:
    """All figures of a task over a loader, on the CPU: 0-dimensional scores and tables, by their names.

    The task is in evaluation mode meanwhile, without gradients; its mode is restored, after an error too.
    Raises `ValueError` for a loader without batches, and where a figure is of nothing.
    """
    metrics, seen = task.metrics(), 0
    with evaluating(task):
        for item in loader:
            task.update(metrics, task.prepare(item))
            seen += 1
    if not seen:
        raise ValueError("evaluate needs at least one batch; the loader gave none: look at its data and drop_last")
    return {name: value.cpu() for name, value in metrics.compute().items()}


def as_batch(item: Batch | Sequence[Any]) -> Batch:
    """A mapping with images, views or texts as it is; `(images, labels)` of a plain PyTorch loader as a batch.

    Raises `ValueError` for the rest, naming what was got.
    """
    if isinstance(item, Mapping) and any(key in item for key in INPUTS):
        return item
    if isinstance(item, list | tuple) and len(item) == 2 and isinstance(item[0], Tensor):
        return Batch(image=item[0], label=torch.as_tensor(item[1]))
    got = f"the keys {sorted(item)}" if isinstance(item, Mapping) else f"a {type(item).__name__}"
    if isinstance(item, list | tuple):
        got += f" of {', '.join(type(part).__name__ for part in item)}"
    raise ValueError(
        f"a loader must yield (images, labels) or a dict with one of {', '.join(INPUTS)} (and `label`); got {got}"
    )


def batch_count(batch: Batch) -> int:
    """How many images, or texts, a batch holds: the length of the first of `image`, `views` and `text` it has."""
    views = batch.get("views")
    return len(batch["image"] if "image" in batch else views[0] if views else batch["text"])


def to_device(batch: Batch, device: torch.device) -> Batch:
    """The batch with every tensor on `device`, in lists and dicts too; pinned memory is copied asynchronously."""
    return cast(Batch, {key: _moved(value, device) for key, value in batch.items()})


def _moved(value: Any, device: torch.device) -> Any:
    if isinstance(value, Tensor):
        return value.to(device, non_blocking=True)
    if isinstance(value, list):
        return [_moved(part, device) for part in value]
    if isinstance(value, dict):
        return {key: _moved(part, device) for key, part in value.items()}
    return value


def pick_device(name: str = "auto") -> torch.device:
    """`auto` is CUDA, else MPS, else the CPU. Raises `ValueError` for a device that this machine lacks."""
    present = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if name == "auto":
        return torch.device(next(kind for kind, there in present.items() if there))
    kind, _, number = name.partition(":")
    count = {"cuda": torch.cuda.device_count(), "mps": 1, "cpu": 1}.get(kind, 0)
    if not present.get(kind, False) or (number and number not in map(str, range(count))):
        here = ", ".join(kind for kind, there in present.items() if there)
        raise ValueError(f"device must be auto or one that is here ({here}); got {name!r}")
    return torch.device(name)
