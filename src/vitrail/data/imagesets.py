"""Labelled images, all in memory or read when asked for, behind one small interface.

Legend: `N` images, `B` a batch of them, `C`, `H`, `W` channels, height and width.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypedDict

import torch
from torch import Tensor
from torch.utils.data import Dataset

from vitrail.images import read_image
from vitrail.records import IMAGENET_MEAN, IMAGENET_STD, Batch, Preprocess

DECODED_SIZE = 224
DECODED_CROP = 0.875


class Sample(TypedDict):
    """One labelled image."""

    image: Tensor
    """uint8 (C, H, W)"""
    label: int
    id: str


class ImageSet(Dataset[Sample], ABC):
    """Images with a class each."""

    classes: tuple[str, ...]
    """names in the order of the labels"""
    labels: Tensor
    """(N,) int64"""
    ids: Sequence[str]
    """one name per image: a path below the data set's folder, or a number"""
    size: tuple[int, int] | None = None
    """height and width that all images share, or None"""

    def __len__(self) -> int:
        return len(self.labels)

    @abstractmethod
    def image(self, index: int) -> Tensor:
        """uint8 (C, H, W). Raises `ImageError` where it cannot be read."""

    @abstractmethod
    def subset(self, indices: Tensor) -> ImageSet:
        """The images that `indices` (n,) name, in that order."""

    def __getitem__(self, index: int) -> Sample:
        return Sample(image=self.image(index), label=int(self.labels[index]), id=self.ids[index])

    def gather(self, indices: Sequence[int]) -> Batch:
        """The images that `indices` name as one batch. They must share a size."""
        return collate([self[index] for index in indices])

    def statistics(self) -> tuple[tuple[float, ...], tuple[float, ...]]:
        """Mean and standard deviation of each channel in [0, 1]; ImageNet's where the images are not in memory."""
        return IMAGENET_MEAN, IMAGENET_STD

    def counts(self) -> dict[str, int]:
        """How many images each class has."""
        numbers = torch.bincount(self.labels, minlength=len(self.classes)).tolist()
        return dict(zip(self.classes, numbers, strict=True))


def collate(samples: Sequence[Sample]) -> Batch:
    """Samples of one size -> a batch: image (B, C, H, W), label (B,), id."""
    return Batch(
        image=torch.stack([sample["image"] for sample in samples]),
        label=torch.tensor([sample["label"] for sample in samples]),
        id=[sample["id"] for sample in samples],
    )


class TensorSet(ImageSet):
    """Small images of one size, held as one uint8 tensor (N, C, H, W)."""

    def __init__(self, images: Tensor, labels: Tensor, classes: Sequence[str], ids: Sequence[str]) -> None:
        self.images, self.labels, self.classes, self.ids = images, labels, tuple(classes), ids
        self.size = (images.shape[-2], images.shape[-1])

    def image(self, index: int) -> Tensor:
        return self.images[index]

    def subset(self, indices: Tensor) -> TensorSet:
        ids = [self.ids[index] for index in indices.tolist()]
        return TensorSet(self.images[indices], self.labels[indices], self.classes, ids)

    def gather(self, indices: Sequence[int]) -> Batch:
        rows = torch.as_tensor(indices)
        return Batch(image=self.images[rows], label=self.labels[rows], id=[self.ids[index] for index in indices])

    def statistics(self) -> tuple[tuple[float, ...], tuple[float, ...]]:
        values = torch.arange(256, dtype=torch.float64) / 255
        means, stds = [], []
        for channel in self.images.unbind(1):
            weights = torch.bincount(channel.flatten(), minlength=256).double() / channel.numel()
            mean = float(weights @ values)
            means.append(round(mean, 6))
            stds.append(round(max(math.sqrt(float(weights @ (values - mean) ** 2)), 1 / 255), 6))
        return tuple(means), tuple(stds)


class FileSet(ImageSet):
    """Image files, decoded when they are asked for."""

    def __init__(self, paths: Sequence[Path], labels: Tensor, classes: Sequence[str], ids: Sequence[str]) -> None:
        self.paths, self.labels, self.classes, self.ids = paths, labels, tuple(classes), ids

    def image(self, index: int) -> Tensor:
        return read_image(self.paths[index])

    def subset(self, indices: Tensor) -> FileSet:
        rows = indices.tolist()
        return FileSet([self.paths[i] for i in rows], self.labels[indices], self.classes, [self.ids[i] for i in rows])


@dataclass(frozen=True, kw_only=True)
class Splits:
    """What is trained on, what chooses the best epoch, and what is reported."""

    name: str
    """the `--data` it came from"""
    train: ImageSet
    val: ImageSet
    test: ImageSet
    """the same images as `val` where the data has no third part"""
    drawn: tuple[str, ...] = ()
    """the parts that were set aside from the training images here, because the data does not name them"""
    seed: int = 0
    val_fraction: float = 0.0

    @property
    def classes(self) -> tuple[str, ...]:
        return self.train.classes

    def record(self) -> dict[str, Any]:
        """What to keep beside a run: sizes, and the ids of every part that was drawn from the seed."""
        parts = {"train": self.train, "val": self.val, "test": self.test}
        return {
            "data": self.name,
            "classes": list(self.classes),
            "counts": {part: images.counts() for part, images in parts.items()},
            "seed": self.seed,
            "val_fraction": self.val_fraction,
            "drawn": {part: list(parts[part].ids) for part in self.drawn},
        }

    def preprocess(self, img_size: int | None = None) -> Preprocess:
        """How a model trained on these images from nothing should take them.

        Without `img_size`: the images' own size, or 224 where they have many.
        """
        own = self.train.size or (DECODED_SIZE, DECODED_SIZE)
        mean, std = self.train.statistics()
        return Preprocess(
            img_size=(img_size, img_size) if img_size else own, mean=mean, std=std,
            crop_pct=1.0 if self.train.size else DECODED_CROP,
        )  # fmt: skip


def draw_stratified(labels: Tensor, fraction: float, parts: int, seed: int) -> list[Tensor]:
    """Row numbers (n,), sorted: the rest first, then `parts` parts with `fraction` of every class each.

    A pure function of its arguments. Each part gets at least one image of a class that has more than `parts` of them.
    """
    generator = torch.Generator().manual_seed(seed)
    chosen: list[list[Tensor]] = [[] for _ in range(parts + 1)]
    for label in labels.unique().tolist():
        members = (labels == label).nonzero().flatten()
        members = members[torch.randperm(len(members), generator=generator)]
        each = min(max(1, round(fraction * len(members))), (len(members) - 1) // parts)
        for place, rows in zip(chosen, members.split([len(members) - parts * each] + parts * [each]), strict=True):
            place.append(rows)
    return [torch.cat(rows).sort().values for rows in chosen]
