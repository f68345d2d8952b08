"""Labelled images, all in memory or read when asked for, behind one small interface.

Legend: `N` images, `B` a batch of them, `C`, `H`, `W` channels, height and width.
"""

from __future__ import annotations

import hashlib
import json
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Required, TypedDict, cast

import torch
from torch import Tensor
from torch.utils.data import Dataset

from vitrail.data.boxes import check_boxes
from vitrail.images import ImageError, Part, read_image, read_part
from vitrail.records import IMAGENET_MEAN, IMAGENET_STD, Batch, Preprocess

DECODED_SIZE = 224
DECODED_CROP = 0.875


STACKED = ("image", "label", "mask", "pad_mask")
LISTED = ("boxes", "classes", "text", "meta", "id")
NESTED = ("target", "side")
"""keys of a sample by what `collate` makes of them: one tensor, a list, a dict of tensors"""


class Sample(TypedDict, total=False):
    """One image and what is known of it: a `Batch` without its axis. Every key but `image` may be missing."""

    image: Required[Tensor]
    """uint8 (C, H, W), or frames (T, C, H, W)"""
    label: int | Tensor
    """class index, or float (K,)"""
    boxes: Tensor
    """(n, 4): x0, y0, x1, y1 in pixels of `image`"""
    classes: Tensor
    """(n,), parallel to `boxes`"""
    mask: Tensor
    """(H, W) class index of every pixel"""
    pad_mask: Tensor
    """(H, W), true where a pixel is padding"""
    text: str
    target: dict[str, Tensor]
    side: dict[str, Tensor]
    views: list[Tensor]
    """each (C, H_v, W_v)"""
    meta: dict[str, Any]
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
    channels: int = 3
    """of every image"""

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

    def part(self, index: int, choose: Callable[[int, int], Part], least: tuple[int, int]) -> Sample:
        """A sample of which the image is cut to what `choose(height, width)` names, and then to be resized to `least`.

        Of a file no more need be decoded than that takes: its part may have fewer pixels than was named.
        """
        sample = self[index]
        top, left, height, width = choose(*sample["image"].shape[-2:])
        return Sample(**{**sample, "image": sample["image"][..., top : top + height, left : left + width]})

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
    """Samples with the same keys and sizes -> a batch.

    Tensors and labels are stacked, those of `target`, `side` and `views` one by one; boxes, classes, texts, meta and
    ids become lists. Raises `ValueError` where keys or sizes differ, naming the key and the sample, and for boxes that
    `check_boxes` refuses.
    """
    rows = cast(Sequence[dict[str, Any]], samples)
    for number, row in enumerate(rows):
        name = row.get("id", f"sample {number}")
        if "boxes" in row:
            check_boxes(row["boxes"], row.get("classes"), tuple(row["image"].shape[-2:]), name)
        if odd := sorted(set(row) ^ set(rows[0])):
            raise ValueError(f"samples of a batch must have the same keys; {name} and the first differ in {odd[0]}")
    batch = {key: _joined(key, [row[key] for row in rows]) for key in rows[0]}
    return cast(Batch, batch)


def _joined(key: str, values: list[Any]) -> Any:
    if key in LISTED:
        return values
    if key in STACKED:
        return _stacked(key, values)
    if key in NESTED:
        return {name: _stacked(f"{key}.{name}", [value[name] for value in values]) for name in values[0]}
    if key == "views":
        return [_stacked(key, list(views)) for views in zip(*values, strict=True)]
    raise ValueError(f"a sample holds {', '.join(sorted(Sample.__annotations__))}; got also {key!r}")


def _stacked(key: str, values: list[Any]) -> Tensor:
    tensors = [torch.as_tensor(value) for value in values]
    if len(shapes := {tuple(tensor.shape) for tensor in tensors}) > 1:
        raise ValueError(f"{key} must have one shape in a batch; got {sorted(shapes)}: give a transform to one size")
    return torch.stack(tensors)


class TensorSet(ImageSet):
    """Small images of one size, held as one uint8 tensor (N, C, H, W).

    `bad_images` says, by row, why images could not be read: they are black, have no part in the statistics, and to ask
    for one raises `ImageError`.
    """

    def __init__(
        self,
        images: Tensor,
        labels: Tensor,
        classes: Sequence[str],
        ids: Sequence[str],
        bad_images: Mapping[int, str] | None = None,
    ) -> None:
        self.images, self.labels, self.classes, self.ids = images, labels, tuple(classes), ids
        self.size, self.channels = (images.shape[-2], images.shape[-1]), images.shape[1]
        self.bad_images = dict(bad_images or {})

    def image(self, index: int) -> Tensor:
        if index in self.bad_images:
            raise ImageError(self.bad_images[index])
        return self.images[index]

    def subset(self, indices: Tensor) -> TensorSet:
        rows = indices.tolist()
        bad = {place: self.bad_images[row] for place, row in enumerate(rows) if row in self.bad_images}
        return TensorSet(self.images[indices], self.labels[indices], self.classes, [self.ids[row] for row in rows], bad)

    def gather(self, indices: Sequence[int]) -> Batch:
        if bad := self.bad_images.keys() & set(indices):
            raise ImageError(self.bad_images[min(bad)])
        rows = torch.as_tensor(indices)
        return Batch(image=self.images[rows], label=self.labels[rows], id=[self.ids[index] for index in indices])

    def statistics(self) -> tuple[tuple[float, ...], tuple[float, ...]]:
        if len(self.bad_images) == len(self):
            return super().statistics()
        values = torch.arange(256, dtype=torch.float64) / 255
        means, stds = [], []
        bad = self.images[list(self.bad_images)]  # taken away again: the others alone would be a copy of the set
        for channel, black in zip(self.images.unbind(1), bad.unbind(1), strict=True):
            counts = _histogram(channel) - _histogram(black)
            weights = counts.double() / counts.sum()
            mean = float(weights @ values)
            means.append(round(mean, 6))
            stds.append(round(max(math.sqrt(float(weights @ (values - mean) ** 2)), 1 / 255), 6))
        return tuple(means), tuple(stds)


def _histogram(pixels: Tensor) -> Tensor:
    return torch.bincount(pixels.flatten(), minlength=256)


class FileSet(ImageSet):
    """Image files, decoded when they are asked for."""

    def __init__(self, paths: Sequence[Path], labels: Tensor, classes: Sequence[str], ids: Sequence[str]) -> None:
        self.paths, self.labels, self.classes, self.ids = paths, labels, tuple(classes), ids

    def image(self, index: int) -> Tensor:
        return read_image(self.paths[index])

    def part(self, index: int, choose: Callable[[int, int], Part], least: tuple[int, int]) -> Sample:
        image = read_part(self.paths[index], choose, least)
        return Sample(image=image, label=int(self.labels[index]), id=self.ids[index])

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

    def part(self, name: str) -> list[ImageSet]:
        """The images of `train`, `val` or `test`, or, for `all`, those of every part once."""
        if name != "all":
            return [getattr(self, name)]
        return [self.train, self.val, *([] if self.test is self.val else [self.test])]

    def digests(self) -> dict[str, str]:
        """sha256 of the sorted ids of every part that was drawn: tells whether a draw is the same again."""
        return {
            part: hashlib.sha256(_bytes("\n".join(sorted(getattr(self, part).ids)))).hexdigest() for part in self.drawn
        }

    def preprocess(self, img_size: int | None = None) -> Preprocess:
        """How a model trained on these images from nothing should take them.

        Without `img_size`: the images' own size, or 224 where they have many; a run gives its model's instead.
        """
        own = self.train.size or (DECODED_SIZE, DECODED_SIZE)
        mean, std = self.train.statistics()
        return Preprocess(
            img_size=(img_size, img_size) if img_size else own, mean=mean, std=std,
            crop_pct=1.0 if self.train.size else DECODED_CROP,
        )  # fmt: skip


def read_record(path: Path) -> dict[str, Any]:
    """What `Splits.record` gave, from its JSON. Raises `ValueError` where it is missing or damaged."""
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        return {"drawn": dict(record["drawn"]), "classes": record["classes"], "counts": record["counts"], **record}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"{path} must say which images were held out; it cannot be read ({error!r}): put it back, or train anew"
        ) from None


def draw_stratified(labels: Tensor, ids: Sequence[str], fraction: float, parts: int, seed: int) -> list[Tensor]:
    """Row numbers (n,), sorted: the rest first, then one or two parts with `fraction` of every class each.

    A pure function of its arguments. The images of a class stand in the order of a hash of seed and id: the first part
    is taken from the front, the second from the back. So an image that is added moves at most one other into or out of
    a part, and none from part to part. Each gets at least one image of a class that has more than `parts` of them.
    """
    chosen: list[list[int]] = [[] for _ in range(parts + 1)]
    for label in labels.unique().tolist():
        members = sorted((labels == label).nonzero().flatten().tolist(), key=lambda row: _rank(seed, ids[row]))
        each = min(max(1, round(fraction * len(members))), (len(members) - 1) // parts)
        back = len(members) - each * (parts - 1)
        for place, rows in zip(chosen, (members[each:back], members[:each], members[back:]), strict=False):
            place += rows
    return [torch.tensor(sorted(rows), dtype=torch.long) for rows in chosen]


def _rank(seed: int, identity: str) -> bytes:
    return hashlib.blake2b(_bytes(f"{seed} {identity}"), digest_size=16).digest()


def _bytes(names: str) -> bytes:
    """As the file system has them: a name need not be UTF-8."""
    return names.encode(errors="surrogateescape")
