"""A PyTorch data set of (image, label), such as torchvision's, as images with a class each.

dataset[i] -> picture or uint8 tensor, label ──> Pairs ──> Sample
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor
from torch.utils.data import Dataset, Subset

from vitrail.data.imagesets import ImageSet
from vitrail.images import to_pixels


class Pairs(ImageSet):
    """The rows of somebody's data set; its `targets`, as torchvision calls them, are its labels.

    Without `targets` every row is read once for its label. `size` is not looked for: images get one by a transform.
    """

    def __init__(self, dataset: Dataset[Any], classes: Sequence[str], rows: Tensor | None = None) -> None:
        self.dataset = cast(Any, dataset)
        self.rows = torch.arange(len(self.dataset)) if rows is None else rows
        self.classes = tuple(classes)
        self.labels = torch.as_tensor(labels_of(dataset))[self.rows].long()
        self.ids = [str(row) for row in self.rows.tolist()]
        self.channels = len(self.image(0))

    def image(self, index: int) -> Tensor:
        return to_pixels(self.dataset[int(self.rows[index])][0])

    def subset(self, indices: Tensor) -> Pairs:
        return Pairs(self.dataset, self.classes, self.rows[indices])


def classes_of(dataset: Any) -> tuple[str, ...]:
    """The names of a data set's classes, through `Subset`; empty where it has none."""
    source = dataset.dataset if isinstance(dataset, Subset) else dataset
    return classes_of(source) if source is not dataset else tuple(map(str, getattr(dataset, "classes", ())))


def labels_of(dataset: Any) -> list[int]:
    """The label of every row."""
    if isinstance(dataset, Subset):
        whole = labels_of(dataset.dataset)
        return [whole[row] for row in dataset.indices]
    known = getattr(dataset, "targets", None)
    return [int(label) for label in (known if known is not None else (dataset[i][1] for i in range(len(dataset))))]
