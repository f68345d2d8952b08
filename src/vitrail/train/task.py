"""What a run asks of its network: a loss by the labels, weights of classes, and a teacher where one is named.

--teacher runs/resnet                      a run or model folder of ours, or a folder of timm's or transformers'
--teacher weights.pth                      a file: its shapes say which of our networks it is for
--teacher resnet50_224                     published weights, fetched once; `vitrail models --pretrained` lists them
--teacher resnet18_32 --teacher-path FILE  one of our rows, and a file of weights for it
--teacher timm:regnety_160                 timm's or torchvision's own network, with its published weights …
--teacher timm:regnety_160 --teacher-path FILE      … or with those of a file
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path

from torch import Tensor

from vitrail.models.backbone import Backbone
from vitrail.models.foreign import Foreign, foreign_model, library_of
from vitrail.models.registry import resolve_name
from vitrail.tasks.classify import Classify, class_names
from vitrail.tasks.distill import Distill, DistillConfig, Teacher
from vitrail.tasks.losses import class_weights
from vitrail.train.config import TrainConfig
from vitrail.weights.fetch import fetch_from_hub, fetch_url
from vitrail.weights.load import open_weights
from vitrail.weights.read import CheckpointError, read_checkpoint

LOG = logging.getLogger("vitrail")


def make_task(model: Backbone, config: TrainConfig, counts: Sequence[int] | None = None) -> Classify:
    """The task that `config` describes; `counts` are the training images of each class, where they are known.

    Raises `ValueError` as `class_weights`, `load_teacher` and `Distill` do.
    """
    weights = class_weights(config, class_names(model.classes, model.num_classes), counts)
    if not config.teacher:
        return Classify(model, config, weights)
    return Distill(model, load_teacher(config, model.num_classes), config, config, weights)


def load_teacher(config: DistillConfig, num_classes: int) -> Teacher:
    """The network that `--teacher` and `--teacher-path` name; the logger `vitrail` is told how it sees images.

    A network of timm's or torchvision's with weights from a file has `num_classes`. Raises `ValueError`, naming the
    flag, for what is no trained network, and what reading and fetching weights raises.
    """
    try:
        teacher = _foreign(config, num_classes) if library_of(config.teacher) else Teacher(_own(config))
    except ValueError as error:
        raise ValueError(f"--teacher {config.teacher}: {error}") from error
    seen = teacher.preprocess
    LOG.info(
        "the teacher is %s; it sees the same images at %d x %d pixels, mean %s, std %s",
        teacher.name, *seen.img_size, seen.mean, seen.std,
    )  # fmt: skip
    return teacher


def _own(config: DistillConfig) -> Backbone:
    if config.teacher_path:
        return open_weights(config.teacher_path, row=resolve_name(config.teacher))
    return open_weights(config.teacher)


def _foreign(config: DistillConfig, num_classes: int) -> Teacher:
    found = foreign_model(config.teacher, num_classes if config.teacher_path else None)
    file = Path(config.teacher_path) if config.teacher_path else _fetched(found)
    tensors = read_checkpoint(file).tensors
    shapes = {name: tuple(value.shape) for name, value in found.model.state_dict().items()}
    wrong = [name for name in shapes | tensors if shapes.get(name) != _shape(tensors, name)]
    if wrong:
        pairs = ", ".join(f"{name} is {_shape(tensors, name)}, not {shapes.get(name)}" for name in wrong[:3])
        raise CheckpointError(
            f"{file}: weights must be those of the network, with {found.model.__class__.__name__}'s own names and "
            f"{num_classes} classes; {len(wrong)} differ: {pairs}"
        )
    found.model.load_state_dict(tensors)
    return Teacher(found.model, preprocess=found.preprocess, name=config.teacher)


def _shape(tensors: Mapping[str, Tensor], name: str) -> tuple[int, ...] | None:
    return tuple(tensors[name].shape) if name in tensors else None


def _fetched(found: Foreign) -> Path:
    """The published weights, on this disk. Raises `ValueError` where there are none, or where they cannot be had."""
    if not found.place:
        raise ValueError("its library has published no weights for it: name a file with --teacher-path")
    if found.place.startswith("hub:"):
        return fetch_from_hub(found.place.removeprefix("hub:"), found.file, beside=())
    return fetch_url(found.place)
