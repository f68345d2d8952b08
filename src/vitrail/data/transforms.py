"""One picture -> uint8 (C, H, W) at the size a model takes: the same cut every time, or a random one for training.

Both work on tensors; `eval_transform`'s also on a batch. Whatever else varies a training image does so a batch at a
time, on the device: `augment.py`. Resizing is torch's own, antialiased, equal to torchvision's to the bit.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Protocol

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from vitrail.data.augment import AugmentConfig, crop_kind
from vitrail.images import Part, to_tensor
from vitrail.records import Preprocess

ASPECT = (3 / 4, 4 / 3)
STRIP = 16
"""pictures whose longer side is enlarged to more than so many times the cut are strips"""
REACH = 4
"""pixels beyond the cut, on each side, that a resized one may depend on"""
TRIES = 10


class Transform(Protocol):
    """What loaders take."""

    @property
    def random(self) -> bool:
        """It draws from torch's global generator, and takes one image at a time."""

    def __call__(self, image: Image.Image | Tensor) -> Tensor: ...


@dataclass(frozen=True)
class Fit:
    """The cut of `Preprocess`: short side resized or the whole picture squashed, and the centre cut out.

    A Pillow picture, or uint8 (…, C, H, W), to uint8 (…, C, h, w) with h, w = `preprocess.img_size`.
    """

    preprocess: Preprocess
    random = False

    def __call__(self, image: Image.Image | Tensor) -> Tensor:
        pixels = to_tensor(image) if isinstance(image, Image.Image) else image
        target, size = self.preprocess.img_size, self.preprocess.resized
        if pixels.shape[-2:] == target == size:
            return pixels
        if self.preprocess.crop_mode == "center":
            pixels = _without_ends(pixels, target, size)
            size = _covering(pixels, size)
        large = resize(pixels, size, self.preprocess.interpolation)
        # the offset is torchvision's: a half is rounded to even
        top, left = (round((large.shape[dim] - side) / 2) for dim, side in zip((-2, -1), target, strict=True))
        return large[..., top : top + target[0], left : left + target[1]]


def _without_ends(pixels: Tensor, target: tuple[int, int], least: tuple[int, int]) -> Tensor:
    """The middle of a strip, of which the cut takes little: enlarged whole, one pixel by thousands fills the memory."""
    large = _covering(pixels, least)
    for dim, side, size in zip((-2, -1), target, large, strict=True):
        length = pixels.shape[dim]
        part = math.ceil(side * length / size) + 2 * math.ceil(REACH * max(1, length / size))
        if size > STRIP * side and part < length:
            pixels = pixels.narrow(dim, (length - part) // 2, part)
    return pixels


def _covering(pixels: Tensor, least: tuple[int, int]) -> tuple[int, int]:
    """The size, aspect ratio kept, at which the picture just covers `least`."""
    height, width = pixels.shape[-2:]
    scale = max(side / own for side, own in zip(least, (height, width), strict=True))
    return max(least[0], int(height * scale + 1e-6)), max(least[1], int(width * scale + 1e-6))


@dataclass(frozen=True)
class RandomResizedCrop:
    """A random part of the picture, resized to `preprocess.img_size` (Szegedy et al. 2015, section 6).

    Its area is uniform in [`scale`, 1] of the picture's, its aspect ratio log-uniform in [3/4, 4/3]; where none fits
    in ten tries it is the largest central part with an allowed aspect ratio.
    """

    preprocess: Preprocess
    scale: float = 0.08
    random = True

    def __call__(self, image: Image.Image | Tensor) -> Tensor:
        pixels = to_tensor(image) if isinstance(image, Image.Image) else image
        top, left, height, width = self.box(pixels.shape[-2], pixels.shape[-1])
        return self.sized(pixels[..., top : top + height, left : left + width])

    def sized(self, part: Tensor) -> Tensor:
        """The part (…, C, h, w) that `box` named, as the model takes it."""
        return resize(part, self.preprocess.img_size, self.preprocess.interpolation)

    def box(self, height: int, width: int) -> Part:
        """top, left, height, width of a random part."""
        for _ in range(TRIES):
            area = height * width * _uniform(self.scale, 1)
            aspect = math.exp(_uniform(math.log(ASPECT[0]), math.log(ASPECT[1])))
            h, w = round(math.sqrt(area / aspect)), round(math.sqrt(area * aspect))
            if 0 < h <= height and 0 < w <= width:
                top, left = (int(torch.randint(room + 1, ())) for room in (height - h, width - w))
                return top, left, h, w
        h, w = min(height, round(width / ASPECT[0])), min(width, round(height * ASPECT[1]))
        return (height - h) // 2, (width - w) // 2, h, w


def _uniform(low: float, high: float) -> float:
    return low + float(torch.rand(())) * (high - low)


def resize(pixels: Tensor, size: tuple[int, int], interpolation: str = "bicubic") -> Tensor:
    """uint8 (…, C, H, W) -> uint8 (…, C, *size), antialiased."""
    if pixels.shape[-2:] == size:
        return pixels
    batch = pixels.reshape(-1, *pixels.shape[-3:])
    if size[1] > 1:
        done = F.interpolate(batch, size=size, mode=interpolation, antialias=True)
    else:  # torch's kernel for uint8 gives rubbish there
        done = F.interpolate(batch.float(), size=size, mode=interpolation, antialias=True)
        done = done.round().clamp(0, 255).to(torch.uint8)
    return done.view(*pixels.shape[:-2], *size)


def eval_transform(preprocess: Preprocess) -> Transform:
    """What every image passes when a model is used or judged."""
    return Fit(preprocess)


def train_transform(preprocess: Preprocess, config: AugmentConfig) -> Transform:
    """What a training image passes before it joins a batch: a random part where `crop` says so, else the whole."""
    if crop_kind(config, preprocess) == "resized":
        return RandomResizedCrop(preprocess, config.crop_scale)
    return Fit(preprocess)
