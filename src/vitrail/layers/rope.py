"""Rotary positions: queries and keys are turned by angles that grow with the place of their token.

    grid (h, w) ── angles (N, D/2): the first half for rows, the second for columns ──> cos, sin (1, 1, N, D)
    x (B, H, N, D) ── every pair of channels turned by its angle ──> (B, H, N, D)

q · k then depends on where the two stand to each other: turned by a and b, two pairs meet at the angle a - b.
Sources: Su et al. 2021, RoFormer, section 3.4; with two axes Fang et al. 2023, EVA-02, and Siméoni et al. 2025, DINOv3.
The two differ in what they count: EVA-02 cells of the grid it was pretrained with, DINOv3 shares of the image.

Legend: `B` batch, `H` heads, `P` prefix tokens, `N` image tokens, `D` head width, `h`, `w` token grid.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


class Rope(NamedTuple):
    """By how much the tokens of one grid are turned."""

    cos: Tensor
    """(1 or B, 1, N, D)"""
    sin: Tensor
    """(1 or B, 1, N, D), negative for the first channel of each pair"""
    half: bool
    """pairs are channels i and i + D/2; else neighbours 2i and 2i + 1"""

    def kept(self, keep: Tensor) -> Rope:
        """Only the image tokens named by `keep` (B, K)."""
        rows = keep[:, None, :, None].expand(-1, -1, -1, self.cos.shape[-1])  # (B, 1, K, D)
        cos, sin = (x.expand(len(keep), -1, -1, -1).gather(2, rows) for x in (self.cos, self.sin))
        return Rope(cos, sin, self.half)

    def behind(self, prefix: int) -> Rope:
        """With so many rows before the image tokens, which are turned by nothing."""
        rows = (0, 0, prefix, 0)
        return Rope(F.pad(self.cos, rows, value=1.0), F.pad(self.sin, rows), self.half)

    def turn(self, x: Tensor) -> Tensor:
        """(B, H, N, D) -> the same, turned; in the precision of cos and sin, given back in that of `x`."""
        return (x * self.cos + self._swapped(x) * self.sin).to(x.dtype)

    def _swapped(self, x: Tensor) -> Tensor:
        """The channels of every pair exchanged."""
        if self.half:
            return torch.cat(x.chunk(2, dim=-1)[::-1], dim=-1)
        return x.unflatten(-1, (-1, 2)).flip(-1).flatten(-2)


def axial_rope(grid: tuple[int, int], head_dim: int, device: torch.device, ref: tuple[int, int] | None) -> Rope:
    """EVA-02's: angles are cell numbers times 10000^(-4i / D), numbers as in a grid `ref` of the same extent."""
    rates = 10000.0 ** -(_count(head_dim // 4, device) / (head_dim // 4))
    rows, columns = (_count(n, device) * (r / n) for n, r in zip(grid, ref or grid, strict=True))
    return _rope(rows, columns, rates, half=False)


def dinov3_rope(grid: tuple[int, int], head_dim: int, device: torch.device, ref: tuple[int, int] | None) -> Rope:
    """DINOv3's: angles are places in -1 … 1, a cell's centre, times 2π · 100^(-4i / D). The grid is its own `ref`."""
    rates = 2 * math.pi * 100.0 ** -(_count(head_dim // 4, device) / (head_dim // 4))
    rows, columns = (2 * (_count(n, device) + 0.5) / n - 1 for n in grid)
    return _rope(rows, columns, rates, half=True)


ROPES: dict[str, Callable[[tuple[int, int], int, torch.device, tuple[int, int] | None], Rope]] = {
    "axial": axial_rope,
    "dinov3": dinov3_rope,
}
"""(grid, head width, device, grid of pretraining) -> Rope"""


def _count(n: int, device: torch.device) -> Tensor:
    return torch.arange(n, dtype=torch.float32, device=device)


def _rope(rows: Tensor, columns: Tensor, rates: Tensor, half: bool) -> Rope:
    """Places of rows (h,) and columns (w,), rates (D/4,) -> the rotation of every cell, in raster order."""
    places = torch.cartesian_prod(rows, columns)  # (N, 2)
    angles = (places[:, :, None] * rates).flatten(1)  # (N, D/2)
    cos, sin = angles.cos(), angles.sin()
    if half:
        cos, sin = torch.cat([cos, cos], dim=-1), torch.cat([-sin, sin], dim=-1)
    else:
        cos, sin = (torch.stack(pair, dim=-1).flatten(1) for pair in ((cos, cos), (-sin, sin)))
    return Rope(cos[None, None], sin[None, None], half)
