"""The size of training images: small ones first, or another one for each batch.

    sides    grow_from, grow_from + cell, … for equal parts of the first `grow_until` of the run, then the full one
    scales   1 ± multi_scale, drawn for each batch

Sides are whole numbers of cells, in which the model sees images. Few tokens make the first epochs fast; the last ones
see what the model will be asked about. The batch stays as it is, so that the number of steps and the learning rate of
each know nothing of sizes.

Growing: Tan & Le 2021, "EfficientNetV2", section 4.2 (progressive learning; its augmentation, which grows too, is not
meant here). A size for each batch: Redmon & Farhadi 2017, "YOLO9000", section 2, multi-scale training.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby

import torch
import torch.nn.functional as F
from torch import Tensor

from vitrail.names import require

LOG = logging.getLogger("vitrail")


@dataclass(frozen=True, kw_only=True)
class SizeConfig:
    """How the size of training images changes."""

    grow_from: int | None = None
    """short side of the first images, which grow to the model's own size; none starts with that"""
    grow_until: float = 0.75
    """share of the run after which images have grown"""
    multi_scale: float = 0.0
    """each batch has a size drawn from 1 - this to 1 + this times the one it would have; 0 is off"""

    def __post_init__(self) -> None:
        getattr(super(), "__post_init__", lambda: None)()  # the next config where several are joined by inheritance
        require(self.grow_from is None or self.grow_from >= 1, "grow_from", "be at least 1, or none", self.grow_from)
        require(0 < self.grow_until <= 1, "grow_until", "lie in (0, 1]", self.grow_until)
        require(0 <= self.multi_scale < 1, "multi_scale", "lie in [0, 1)", self.multi_scale)

    @property
    def changes_sizes(self) -> bool:
        return self.grow_from is not None or self.multi_scale > 0


class Sizes:
    """`sizes(number, total) -> (height, width)` of the images of batch `number` (from 0) of `total`.

    A pure function of both but for `multi_scale`, which draws from torch's global CPU generator. Sides are multiples of
    `cell`, at least one cell. Raises `ValueError` where `full` is none, where nothing smaller would be, and where
    `multi_scale` leaves nothing to draw from.
    """

    def __init__(self, config: SizeConfig, full: tuple[int, int], cell: int) -> None:
        self.config, self.full, self.cell = config, full, cell
        first, least = config.grow_from, min(full)
        require(
            all(side % cell == 0 for side in full), "img_size",
            f"be a multiple of {cell}, the model's cell, where sizes change", f"{full[0]} x {full[1]}",
        )  # fmt: skip
        fits = first is None or (first % cell == 0 and first < least)
        require(fits, "grow_from", f"be a multiple of {cell}, the model's cell, below {least}, its size", first)
        drawn = config.multi_scale * least / cell
        require(
            not config.multi_scale or drawn >= 1, "multi_scale",
            f"be at least {cell / least:.3g}, one cell of {cell} pixels in {least}", config.multi_scale,
        )  # fmt: skip

    def __call__(self, number: int, total: int) -> tuple[int, int]:
        scale = self._grown(number / total)
        if self.config.multi_scale:
            scale *= 1 + self.config.multi_scale * (2 * float(torch.rand(())) - 1)
        height, width = (max(1, round(side * scale / self.cell)) * self.cell for side in self.full)
        return height, width

    def _grown(self, progress: float) -> float:
        """The size, as a share of the full one, when this share of the run lies behind: in steps of whole cells."""
        least = min(self.full)
        first = self.config.grow_from or least
        steps = (least - first) // self.cell
        grown = int(steps * progress / self.config.grow_until)
        return (first + min(steps, grown) * self.cell) / least

    def grows_up(self, total: int) -> bool:
        """Whether the last of so many batches has the full size."""
        return self._grown((total - 1) / total) == 1

    def plan(self, epochs: int, batches: int) -> str:
        """In words: which sizes come when, for those who wait, in epochs of so many batches. Empty where none does."""
        if self.config.grow_from is None:
            return ""
        shares = [(round(min(self.full) * self._grown(epoch / epochs)), epoch + 1) for epoch in range(epochs)]
        last = round(min(self.full) * self._grown(1 - 1 / (epochs * batches)))
        within = f", {last} pixels within epoch {epochs}" if last > shares[-1][0] else ""
        stages = [(side, next(group)[1]) for side, group in groupby(shares, lambda share: share[0])]
        return ", ".join(f"{side} pixels from epoch {epoch} on" for side, epoch in stages) + within


def changing_sizes(config: SizeConfig, full: tuple[int, int], cell: int, epochs: int, batches: int) -> Sizes | None:
    """How the size of training images changes in a run of so many epochs and batches of each; None where it does not.

    The logger `vitrail` is told what is to come. Raises `ValueError` as `Sizes` does.
    """
    if not config.changes_sizes:
        return None
    sizes, total = Sizes(config, full, cell), epochs * batches
    if plan := sizes.plan(epochs, batches):
        LOG.info("training images have a short side of %s", plan)
    if not sizes.grows_up(total):
        LOG.warning(
            "training images do not get to their full %d pixels in this run (batches: %d): give more --epochs, or a "
            "smaller --grow-until", min(full), total,
        )  # fmt: skip
    return sizes


def resized(images: Tensor, size: Sequence[int], interpolation: str) -> Tensor:
    """Images or frames (…, C, H, W) in [0, 1] -> (…, C, *size), antialiased; themselves where they have that size."""
    if images.shape[-2:] == tuple(size):
        return images
    flat = images.reshape(-1, *images.shape[-3:])
    done = F.interpolate(flat, size=tuple(size), mode=interpolation, antialias=True).clamp(0, 1)  # bicubic goes beyond
    return done.view(*images.shape[:-2], *size)
