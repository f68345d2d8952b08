"""What travels between rooms: preprocessing, model cards, batches, results, explanations, histories.

Nothing here knows a network, a file format or a training loop. Every other room may import this one.

Legend: `B` batch, `C` channels, `H`, `W` image height and width, `K` classes, `h`, `w` rows and columns of a
token grid.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from typing import TYPE_CHECKING, Any, Literal, TypedDict

import torch
from torch import Tensor

if TYPE_CHECKING:
    from PIL.Image import Image

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)

UNLABELLED = -100
"""the class index of an image without a label, as losses know it: `ignore_index` of PyTorch's cross-entropy"""


class Batch(TypedDict, total=False):
    """What a loader yields and a task takes. A task reads the keys it needs; all others travel along untouched.

    `image` in uint8 is raw (0 … 255) and is augmented and normalised by the engine;
    in a floating type it is taken as ready for the network.
    """

    image: Tensor
    """(B, C, H, W), or frames (B, T, C, H, W)"""
    label: Tensor
    """(B,) int64, `UNLABELLED` where there is none, or (B, K) float for soft and multiple labels"""
    boxes: list[Tensor]
    """one (n_i, 4) per image: x0, y0, x1, y1 in pixels of `image`"""
    classes: list[Tensor]
    """one (n_i,) per image, parallel to `boxes`"""
    mask: Tensor
    """(B, H, W) class index of every pixel"""
    text: list[str]
    target: dict[str, Tensor]
    side: dict[str, Tensor]
    views: list[Tensor]
    """multi-crop views, each (B, C, H_v, W_v)"""
    pad_mask: Tensor
    """(B, H, W), true where a pixel is padding"""
    meta: list[dict[str, Any]]
    """per image: original size and geometry"""
    id: list[str]


@dataclass(frozen=True, kw_only=True)
class Preprocess:
    """How a picture becomes the tensor that a model was trained on. Travels with the weights.

    The picture's short side is resized to `img_size / crop_pct` ("center"), or the whole picture is, aspect ratio given
    up ("squash"); then the centre is cut out.
    Values are scaled to [0, 1], then `(x - mean) / std` per channel.
    """

    img_size: tuple[int, int] = (224, 224)
    """height and width in pixels"""
    mean: tuple[float, ...] = IMAGENET_MEAN
    std: tuple[float, ...] = IMAGENET_STD
    interpolation: Literal["bilinear", "bicubic"] = "bicubic"
    crop_pct: float = 1.0
    crop_mode: Literal["center", "squash"] = "center"
    known: bool = True
    """false for a network trained on images that came ready: nobody said how, so it normalises no pictures"""

    def __post_init__(self) -> None:
        for name in ("img_size", "mean", "std"):
            value = getattr(self, name)
            object.__setattr__(self, name, tuple(value) if isinstance(value, list) else value)
        if not isinstance(self.img_size, tuple) or len(self.img_size) != 2 or min(self.img_size) < 1:
            raise ValueError(f"img_size must be (height, width), both at least 1; got {self.img_size}")
        if len(self.mean) != len(self.std) or not self.mean:
            raise ValueError(
                f"mean and std need one value a channel each; got {len(self.mean)} and {len(self.std)} values"
            )
        if min(self.std) <= 0:
            raise ValueError(f"std must be positive in every channel; got {self.std}")
        if not 0 < self.crop_pct <= 1:
            raise ValueError(f"crop_pct must lie in (0, 1]; got {self.crop_pct}")
        for name, rule in (("interpolation", ("bilinear", "bicubic")), ("crop_mode", ("center", "squash"))):
            if getattr(self, name) not in rule:
                raise ValueError(f"{name} must be one of {', '.join(rule)}; got {getattr(self, name)!r}")

    @property
    def in_chans(self) -> int:
        return len(self.mean)

    @property
    def resized(self) -> tuple[int, int]:
        """Height and width in pixels of the resized picture, before the cut; if "center", that its sides reach."""
        height, width = self.img_size
        return math.floor(height / self.crop_pct), math.floor(width / self.crop_pct)

    def seen(self, size: tuple[int, int]) -> tuple[int, int]:
        """Height and width, in pixels of a picture of `size`, of the part that is cut out of its centre."""
        scales = [large / own for own, large in zip(size, self.resized, strict=True)]
        scales = scales if self.crop_mode == "squash" else [max(scales)] * 2
        sides = zip(size, self.img_size, scales, strict=True)
        height, width = (min(own, max(1, round(side / scale))) for own, side, scale in sides)
        return height, width

    def _stats(self, like: Tensor) -> tuple[Tensor, Tensor]:
        shape = (-1, 1, 1)
        return like.new_tensor(self.mean).view(shape), like.new_tensor(self.std).view(shape)

    def normalise(self, images: Tensor) -> Tensor:
        """(…, C, H, W) uint8, or float in [0, 1] -> float, normalised per channel."""
        if not self.known:
            raise ValueError(
                "a network trained on ready images does not know how they were normalised; got images that are not: "
                "give preprocess=Preprocess(img_size=…, mean=…, std=…) to the trainer or the predictor"
            )
        if images.shape[-3] != self.in_chans:
            raise ValueError(f"the model takes {self.in_chans} channels; got images with {images.shape[-3]}")
        images = images.float().div_(255) if images.dtype == torch.uint8 else images
        if not images.is_floating_point():
            raise ValueError(
                f"images must be uint8, or floating in [0, 1]; got {images.dtype}: if they hold 0 … 255, "
                "convert them with images.to(torch.uint8)"
            )
        mean, std = self._stats(images)
        return (images - mean).div_(std)

    def denormalise(self, images: Tensor) -> Tensor:
        """(…, C, H, W) normalised -> float in [0, 1], for looking at."""
        mean, std = self._stats(images)
        return (images * std + mean).clamp(0, 1)

    def prepare(self, batch: Batch) -> Batch:
        """The batch with raw (uint8) images and views normalised; float ones are ready and stay as they are.

        Raises `ValueError` for images of any other type.
        """
        made = Batch()
        if "image" in batch and not batch["image"].is_floating_point():
            made["image"] = self.normalise(batch["image"])
        if not all(view.is_floating_point() for view in batch.get("views", [])):
            made["views"] = [self._ready(view) for view in batch["views"]]
        return Batch(**{**batch, **made}) if made else batch

    def _ready(self, images: Tensor) -> Tensor:
        return images if images.is_floating_point() else self.normalise(images)

    def replace(self, **changes: Any) -> Preprocess:
        return replace(self, **changes)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Preprocess:
        """The inverse of `dataclasses.asdict`. An unknown key is an error that names it."""
        return cls(**_known(cls, values, "preprocess"))


@dataclass(frozen=True, kw_only=True)
class ModelCard:
    """What a model folder says of its weights: enough to rebuild, feed and describe the model."""

    family: str
    """the family's name in the registry, such as `vit`"""
    config: dict[str, Any]
    """every field of the family's config"""
    name: str = ""
    """the registry row it was built from, or empty"""
    classes: tuple[str, ...] = ()
    """class names in the order of the logits"""
    preprocess: Preprocess = field(default_factory=Preprocess)
    images: str = ""
    """one line: what images the model is for"""
    training: dict[str, Any] = field(default_factory=dict)
    """recipe and figures of the run that made it"""
    version: str = ""
    """the vitrail version that wrote it"""

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> ModelCard:
        known = _known(cls, values, "model card")
        known["preprocess"] = Preprocess.from_dict(known.get("preprocess", {}))
        known["classes"] = tuple(known.get("classes", ()))
        return cls(**known)


def _known(cls: type, values: Mapping[str, Any], what: str) -> dict[str, Any]:
    names = {f.name for f in fields(cls)}
    unknown = sorted(set(values) - names)
    if unknown:
        raise ValueError(f"a {what} holds {', '.join(sorted(names))}; got also {', '.join(map(repr, unknown))}")
    return dict(values)


@dataclass(frozen=True, kw_only=True)
class Result:
    """The answer to one image. Each task has its own kind."""

    id: str = ""
    """where the image came from: a path, or empty"""

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True, kw_only=True)
class Classification(Result):
    """The class of one image. `result["class"]` and `result["confidence"]` work as well as the attributes."""

    label: str
    confidence: float
    """softmax probability of `label`, 0 … 1; see a model's ECE for how far to believe it"""
    top: tuple[tuple[str, float], ...] = ()
    """the best classes with their probabilities, best first"""

    def __getitem__(self, key: str) -> Any:
        name = "label" if key == "class" else key
        if name not in {f.name for f in fields(self)}:
            raise KeyError(f"a Classification has class, confidence, top, id; got {key!r}")
        return getattr(self, name)

    def __str__(self) -> str:
        return f"{self.label} {self.confidence:.1%}"

    def draw(self, image: Image) -> Image:
        """A copy of the picture with the answer written below it."""
        from PIL import Image as pil, ImageDraw

        line = 16
        canvas = pil.new("RGB", (max(image.width, 8 * len(str(self))), image.height + line), "white")
        canvas.paste(image.convert("RGB"))
        ImageDraw.Draw(canvas).text((2, image.height + 2), str(self), fill="black")
        return canvas


@dataclass(frozen=True, kw_only=True)
class Explanation:
    """A map of what mattered, for one image and one model."""

    method: str
    heat: Tensor
    """(h, w) on the token grid, larger means more"""
    layer: int | None = None
    """counted from 1; None where a method uses all layers"""
    heads: str = "mean"
    """`mean`, `max`, `min`, or a head's number counted from 0"""
    target: str | None = None
    """the class that was explained; None for methods that explain no class"""

    def resized(self, size: tuple[int, int]) -> Tensor:
        """(H, W) smooth enlargement of `heat`, scaled to [0, 1] (all zero if it is constant).

        The centre of a cell has the cell's value, and between the centres of four cells lies a mean of their values
        whose weights follow 3t² - 2t³ in the distance t. So a peak is round, where bilinear weights draw a cross, and
        no place is lighter or darker than the cells beside it, where bicubic ones draw a ring.
        """
        heat = self.heat.float()
        rows, columns = (_enlarging(own, side).to(heat) for own, side in zip(heat.shape, size, strict=True))
        big = rows @ heat @ columns.T
        span = big.max() - big.min()
        return (big - big.min()) / span if span > 0 else torch.zeros_like(big)


def _enlarging(cells: int, pixels: int) -> Tensor:
    """(pixels, cells): the share of every cell in every pixel along one axis, rows summing to 1."""
    place = ((torch.arange(pixels) + 0.5) * cells / pixels - 0.5).clamp(0, cells - 1)
    distance = (place[:, None] - torch.arange(cells)).abs().clamp(max=1)
    return 1 - distance**2 * (3 - 2 * distance)


@dataclass
class History:
    """One row of figures per epoch: `epoch`, `lr`, `train_loss`, `val_…`, `seconds`."""

    rows: list[dict[str, float]] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, name: str) -> list[float]:
        """One figure over the epochs that have it."""
        return [row[name] for row in self._having(name)]

    def best(self, name: str, mode: Literal["max", "min"] = "max") -> dict[str, float]:
        """The row with the best `name`, of equals the last, which has learnt longest; NaN is never before a number.

        Raises `KeyError` where no row has it.
        """
        sign = 1 if mode == "max" else -1
        return max(reversed(self._having(name)), key=lambda row: (not math.isnan(row[name]), sign * row[name]))

    def _having(self, name: str) -> list[dict[str, float]]:
        rows = [row for row in self.rows if name in row]
        if not rows:
            raise KeyError(f"the history holds {sorted({k for r in self.rows for k in r})}; got {name!r}")
        return rows
