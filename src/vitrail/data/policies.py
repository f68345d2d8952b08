"""Which operations an image gets, and how strongly: AutoAugment, RandAugment, TrivialAugment, drawn for a whole batch.

A policy draws `Drawn(op, level)`; `apply_operations` applies it slot by slot: colours at once, on the images that drew
the same operation; shapes composed into one matrix an image and resampled once, at the end.

Legend: `B` images, `S` slots (operations an image gets), `C` channels, `H`, `W` pixels.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from vitrail.data.operations import COLOURS, NAMES, SHAPES, SIGNED, warp

BINS = 30
"""magnitudes of RandAugment and TrivialAugment are 0 … 30"""

# Cubuk et al. 2019, "AutoAugment: Learning augmentation policies from data", tables 7 and 9:
# two of (operation, probability in tenths, magnitude 0 … 9) a row
CIFAR10 = """
invert 1 0, contrast 2 6        | rotate 7 2, translate_x 3 9   | sharpness 8 1, sharpness 9 3
shear_y 5 8, translate_y 7 9    | autocontrast 5 0, equalize 9 0 | shear_y 2 7, posterize 3 7
colour 4 3, brightness 6 7      | sharpness 3 9, brightness 7 9 | equalize 6 0, equalize 5 0
contrast 6 7, sharpness 6 5     | colour 7 7, translate_x 5 8   | equalize 3 0, autocontrast 4 0
translate_y 4 3, sharpness 2 6  | brightness 9 6, colour 2 8    | solarize 5 2, invert 0 0
equalize 2 0, autocontrast 6 0  | equalize 2 0, equalize 6 0    | colour 9 9, equalize 6 0
autocontrast 8 0, solarize 2 8  | brightness 1 3, colour 7 0    | solarize 4 5, autocontrast 9 0
translate_y 9 9, translate_y 7 9 | autocontrast 9 0, solarize 8 3 | equalize 8 0, invert 1 0
translate_y 7 9, autocontrast 9 0
"""
IMAGENET = """
posterize 4 8, rotate 6 9       | solarize 6 5, autocontrast 6 0 | equalize 8 0, equalize 6 0
posterize 6 7, posterize 6 6    | equalize 4 0, solarize 2 4    | equalize 4 0, rotate 8 8
solarize 6 3, equalize 6 0      | posterize 8 5, equalize 10 0  | rotate 2 3, solarize 6 8
equalize 6 0, posterize 4 6     | rotate 8 8, colour 4 0        | rotate 4 9, equalize 6 0
equalize 0 0, equalize 8 0      | invert 6 0, equalize 10 0     | colour 6 4, contrast 10 8
rotate 8 8, colour 10 2         | colour 8 8, solarize 8 7      | sharpness 4 7, invert 6 0
shear_x 6 5, equalize 10 0      | colour 4 0, equalize 6 0      | equalize 4 0, solarize 2 4
solarize 6 5, autocontrast 6 0  | invert 6 0, equalize 10 0     | colour 6 4, contrast 10 8
equalize 8 0, equalize 6 0
"""


class Drawn(NamedTuple):
    """What each image gets, one column a slot."""

    op: Tensor
    """(B, S) int64, indices into `NAMES`"""
    level: Tensor
    """(B, S) float, in the operation's own unit"""


class Policy(NamedTuple):
    """AutoAugment's table: rows of two operations."""

    op: Tensor
    """(rows, 2) indices into `NAMES`"""
    chance: Tensor
    """(rows, 2) probability of applying it"""
    magnitude: Tensor
    """(rows, 2) in [0, 1]"""


def parse_policy(text: str) -> Policy:
    rows = [row for line in text.split("\n") if line for row in line.split("|")]
    cells = [[step.split() for step in row.split(",")] for row in rows]
    return Policy(
        torch.tensor([[NAMES.index(name) for name, _, _ in row] for row in cells]),
        torch.tensor([[int(chance) / 10 for _, chance, _ in row] for row in cells]),
        torch.tensor([[int(magnitude) / 9 for _, _, magnitude in row] for row in cells]),
    )


def level_ranges(height: int, width: int, *, wide: bool = False) -> dict[str, tuple[float, float]]:
    """Levels at magnitude 0 and 1. `wide` is TrivialAugment's; its translation is 32 pixels whatever the image."""
    far, strong, angle, shear = (32.0, 0.99, 135.0, 0.99) if wide else (0.0, 0.9, 30.0, 0.3)
    return {
        **dict.fromkeys(("shear_x", "shear_y"), (0.0, shear)),
        "translate_x": (0.0, far or width * 150 / 331),
        "translate_y": (0.0, far or height * 150 / 331),
        "rotate": (0.0, angle),
        **dict.fromkeys(("brightness", "colour", "contrast", "sharpness"), (0.0, strong)),
        "posterize": (8.0, 2.0 if wide else 4.0),
        "solarize": (1.0, 0.0),
    }


def draw_auto(table: str, count: int, height: int, width: int) -> Drawn:
    """AutoAugment: a row of the table an image, each of its two operations with its probability."""
    policy = parse_policy(table)
    rows = torch.randint(len(policy.op), (count,))
    keep = torch.rand(count, 2) < policy.chance[rows]
    op = torch.where(keep, policy.op[rows], NAMES.index("identity"))
    return _levelled(op, policy.magnitude[rows], level_ranges(height, width))


def draw_rand(
    count: int, height: int, width: int, *, ops: int = 2, magnitude: int = 9, std: float = 0.0, chance: float = 1.0
) -> Drawn:
    """RandAugment (Cubuk et al. 2020): `ops` operations an image, all of one magnitude (0 … 30).

    With `std` each operation has its own, normal around that; with `chance` it is done with that probability. Both are
    timm's, with which DeiT and Swin are trained.
    """
    op = torch.randint(len(NAMES) - 1, (count, ops))  # all but the last, invert
    if chance < 1:
        op = torch.where(torch.rand(op.shape) < chance, op, NAMES.index("identity"))
    strength = torch.full(op.shape, float(magnitude))
    if std:
        strength = torch.normal(strength, std).clamp(0, BINS)
    return _levelled(op, strength / BINS, level_ranges(height, width))


def draw_trivial(count: int, height: int, width: int) -> Drawn:
    """TrivialAugment (Müller and Hutter 2021), wide: one operation an image, of any magnitude."""
    op = torch.randint(len(NAMES) - 1, (count, 1))
    return _levelled(op, torch.randint(BINS + 1, op.shape) / BINS, level_ranges(height, width, wide=True))


def _levelled(op: Tensor, magnitude: Tensor, ranges: Mapping[str, tuple[float, float]]) -> Drawn:
    low, high = torch.tensor([ranges.get(name, (0.0, 0.0)) for name in NAMES]).unbind(1)
    signed = torch.tensor([name in SIGNED for name in NAMES])
    level = low[op] + magnitude * (high - low)[op]
    flipped = signed[op] & (torch.rand(op.shape) < 0.5)
    return Drawn(op, torch.where(flipped, -level, level))


POLICIES: dict[str, Callable[[int, int, int], Drawn]] = {
    "cifar10": lambda count, height, width: draw_auto(CIFAR10, count, height, width),
    "imagenet": lambda count, height, width: draw_auto(IMAGENET, count, height, width),
    "trivial": draw_trivial,
}


def apply_operations(images: Tensor, drawn: Drawn, fill: Tensor) -> Tensor:
    """(B, C, H, W) float in [0, 1] -> the same, changed; `fill` (C,) stands where a shape pulls in the outside.

    `drawn` stays on the CPU: who gets what is known without waiting for the device.
    """
    images = images.clone()
    height, width = images.shape[-2:]
    matrices = torch.eye(3).repeat(len(images), 1, 1)
    for op, level in zip(drawn.op.unbind(1), drawn.level.unbind(1), strict=True):
        for number in op.unique().tolist():
            rows, name = (op == number).nonzero().flatten(), NAMES[number]
            if name in SHAPES:
                matrices[rows] @= SHAPES[name](level[rows], height, width)
            elif name in COLOURS:
                there = rows.to(images.device)
                images[there] = COLOURS[name](images[there], level[rows].to(images))
    moved = (matrices != torch.eye(3)).flatten(1).any(1).nonzero().flatten()
    if len(moved):
        there = moved.to(images.device)
        images[there] = warp(images[there], matrices[moved].to(images.device), fill.to(images))
    return images
