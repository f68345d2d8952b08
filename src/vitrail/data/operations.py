"""The picture operations of automatic augmentation, on whole batches with a strength per image.

Colours: `f(images, level) -> images`, images (n, C, H, W) float in [0, 1], level (n,). Shapes: `f(level, H, W)` gives
(n, 3, 3) matrices in pixels from places in the result to places in the source, so that several make one resampling:
`warp`. What a level means is Cubuk et al. 2019, "AutoAugment", table 6, in torchvision's reading.

Legend: `n` images, `C` channels, `H`, `W` pixels.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

GREY = (0.2989, 0.587, 0.114)
SMOOTH = ((1, 1, 1), (1, 5, 1), (1, 1, 1))


def _column(level: Tensor) -> Tensor:
    return level.view(-1, 1, 1, 1)


def blend(images: Tensor, other: Tensor, level: Tensor) -> Tensor:
    """`other` at level -1, the image itself at 0, away from `other` above."""
    return (images + _column(level) * (images - other)).clamp(0, 1)


def grey(images: Tensor) -> Tensor:
    """(n, C, H, W) -> (n, 1, H, W): luminance of three channels (ITU-R 601), the mean of any other number."""
    if images.shape[1] != 3:
        return images.mean(1, keepdim=True)
    return (images * images.new_tensor(GREY).view(1, 3, 1, 1)).sum(1, keepdim=True)


def brightness(images: Tensor, level: Tensor) -> Tensor:
    """Black at -1."""
    return blend(images, torch.zeros_like(images), level)


def contrast(images: Tensor, level: Tensor) -> Tensor:
    """The image's mean grey at -1."""
    return blend(images, grey(images).mean((1, 2, 3), keepdim=True), level)


def colour(images: Tensor, level: Tensor) -> Tensor:
    """Grey at -1."""
    return blend(images, grey(images), level)


def sharpness(images: Tensor, level: Tensor) -> Tensor:
    """Smoothed at -1; the outermost pixels stay, so that images under 3 pixels stay whole."""
    if min(images.shape[-2:]) < 3:
        return images
    kernel = images.new_tensor(SMOOTH).div(13).expand(images.shape[1], 1, 3, 3)
    smooth = images.clone()
    smooth[..., 1:-1, 1:-1] = F.conv2d(images, kernel, groups=images.shape[1])
    return blend(images, smooth, level)


def posterize(images: Tensor, level: Tensor) -> Tensor:
    """Keeps the `level` highest of 8 bits."""
    step = _column(2 ** (8 - level.round()))
    return ((images * 255).round() / step).floor() * step / 255


def solarize(images: Tensor, level: Tensor) -> Tensor:
    """Inverts what is at least `level`."""
    return torch.where(images >= _column(level), 1 - images, images)


def invert(images: Tensor, level: Tensor) -> Tensor:
    return 1 - images


def autocontrast(images: Tensor, level: Tensor) -> Tensor:
    """Stretches every channel to [0, 1]; a constant one stays."""
    low, high = images.amin((2, 3), keepdim=True), images.amax((2, 3), keepdim=True)
    return torch.where(high > low, (images - low) / (high - low).clamp(min=1e-6), images)


def equalize(images: Tensor, level: Tensor) -> Tensor:
    """Makes the histogram of every channel as flat as a table of 256 values can, as Pillow does."""
    values = (images * 255).round().long().flatten(2).flatten(0, 1)  # (n·C, H·W)
    counts = torch.zeros(len(values), 256, dtype=torch.long, device=images.device)
    counts.scatter_add_(1, values, torch.ones_like(values))
    brightest = counts.gather(1, values.amax(1, keepdim=True))
    step = (counts.sum(1, keepdim=True) - brightest) // 255
    table = (counts.cumsum(1) - counts + step // 2) // step.clamp(min=1)
    table = torch.where(step > 0, table.clamp(0, 255), torch.arange(256, device=images.device))
    return table.gather(1, values).view_as(images).to(images.dtype) / 255


def _matrix(level: Tensor, *rows: tuple[Tensor | float, Tensor | float, Tensor | float]) -> Tensor:
    full = [torch.stack([torch.as_tensor(x, dtype=level.dtype).expand_as(level) for x in row], -1) for row in rows]
    return torch.stack([*full, torch.tensor([0.0, 0.0, 1.0]).expand(len(level), 3)], -2)  # (n, 3, 3)


def shear_x(level: Tensor, height: int, width: int) -> Tensor:
    """Rows move left by `level` pixels a row, the top one not at all."""
    return _matrix(level, (1, level, 0), (0, 1, 0))


def shear_y(level: Tensor, height: int, width: int) -> Tensor:
    return _matrix(level, (1, 0, 0), (level, 1, 0))


def translate_x(level: Tensor, height: int, width: int) -> Tensor:
    """To the right by `level`, cut to whole pixels."""
    return _matrix(level, (1, 0, -level.trunc()), (0, 1, 0))


def translate_y(level: Tensor, height: int, width: int) -> Tensor:
    return _matrix(level, (1, 0, 0), (0, 1, -level.trunc()))


def rotate(level: Tensor, height: int, width: int) -> Tensor:
    """Counter-clockwise by `level` degrees about the centre."""
    angle = torch.deg2rad(level)
    cos, sin, x, y = angle.cos(), angle.sin(), width / 2, height / 2
    return _matrix(level, (cos, -sin, x - cos * x + sin * y), (sin, cos, y - sin * x - cos * y))


def warp(images: Tensor, matrices: Tensor, fill: Tensor) -> Tensor:
    """Resamples (n, C, H, W) bilinearly by (n, 3, 3) matrices in pixels; outside stands `fill` (C,)."""
    height, width = images.shape[-2:]
    to_pixels = matrices.new_tensor([[width / 2, 0, width / 2], [0, height / 2, height / 2], [0, 0, 1]])
    theta = (torch.linalg.inv(to_pixels) @ matrices @ to_pixels)[:, :2].to(images)  # grid_sample's [-1, 1]
    grid = F.affine_grid(theta, list(images.shape), align_corners=False)
    fill = fill.view(1, -1, 1, 1)
    return F.grid_sample(images - fill, grid, align_corners=False) + fill


COLOURS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "brightness": brightness,
    "colour": colour,
    "contrast": contrast,
    "sharpness": sharpness,
    "posterize": posterize,
    "solarize": solarize,
    "autocontrast": autocontrast,
    "equalize": equalize,
    "invert": invert,
}
SHAPES: dict[str, Callable[[Tensor, int, int], Tensor]] = {
    "shear_x": shear_x,
    "shear_y": shear_y,
    "translate_x": translate_x,
    "translate_y": translate_y,
    "rotate": rotate,
}
NAMES = ("identity", *SHAPES, *COLOURS)
SIGNED = frozenset({*SHAPES, "brightness", "colour", "contrast", "sharpness"})
"""operations whose level has a direction, drawn per image"""
