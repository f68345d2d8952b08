"""Attention within windows of a grid, regular or shifted, with a learned bias for every offset between two cells.

    grid (h, w) ── pad to whole windows ── roll by the shift ── cut ──> W windows of N places    Liu et al. 2021, §3.2

    windows of 2, regular      rolled by 1: the last row and column hold cells of both ends of the grid,
     0  1 | 2  3                which hide from one another
     4  5 | 6  7                5  6 | 7 . 4
    ------+------               9 10 |11 . 8
     8  9 |10 11     ──>       ------+------
    12 13 |14 15               13 14 |15 .12
                                . . .| . . .
                                1  2 | 3 . 0

`Windows` says which cell each place holds. One gather brings tokens from the order of one into the order of another, so
that between two blocks nothing is rolled, cut, put together and rolled back. A grid that is smaller than a window is
padded like any other and not shifted, as in torchvision.

Legend: `B` batch, `h`, `w` grid, `W` windows, `N` places in a window, `H` heads, `D` head width, `C` width.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from vitrail.layers.attention import Attention, Kernel, Layout, attend

Pair = tuple[int, int]


@dataclass(frozen=True, eq=False)
class Windows:
    """A grid cut into windows. Tokens are (B, h·w, C) in raster order and (B, W·N, C) in the order of the windows."""

    grid: Pair
    cells: Tensor
    """(W, N) the cell at each place, in raster order; -1 where there is none"""
    places: Tensor
    """(h·w,) the place of each cell, 0 … W·N - 1"""
    hidden: Tensor | None = None
    """(1, W, N, N), or (B, W, N, N): true where a place must not see another; None where all see all"""
    empty: Tensor | None = None
    """(W·N, 1) true where a place holds no cell; None where all do"""
    padded: Tensor | None = None
    """(B, W, N) true where a cell stands for nothing but padded pixels"""

    @property
    def layout(self) -> Layout:
        """Where the attention of these windows lies; the mean of all cells is what is read of it."""
        shown = self.cells if self.padded is None else self.cells.masked_fill(self.padded, -1)
        return Layout(self.grid, windows=len(self.cells), query_index=shown, key_index=shown, readout=())

    def enter(self, x: Tensor, before: Windows | None = None) -> Tensor:
        """Tokens in raster order, or in the order of `before`, in this one; places without a cell hold anything."""
        if before is self:
            return x
        cells = self.cells.flatten().clamp(min=0)
        return x.index_select(1, cells if before is None else before.places[cells])

    def leave(self, x: Tensor) -> Tensor:
        """Tokens in this order, (B, W·N, C), in raster order (B, h·w, C)."""
        return x.index_select(1, self.places)

    def cleared(self, x: Tensor) -> Tensor:
        """Tokens in this order with zeros at the places without a cell."""
        return x if self.empty is None else x.masked_fill(self.empty, 0)

    def unseen(self, padding: Tensor) -> Windows:
        """With the cells marked in `padding` (B, h·w) seen by none but themselves and standing nowhere on the image.

        By themselves, since a row with no key at all would have a softmax of no numbers.
        """
        padded = self.enter(padding).unflatten(1, self.cells.shape) & (self.cells >= 0)  # (B, W, N)
        others = ~torch.eye(padded.shape[2], dtype=torch.bool, device=padded.device)
        hidden = padded[:, :, None] & others
        return replace(self, hidden=hidden if self.hidden is None else hidden | self.hidden, padded=padded)


def cut_windows(grid: Pair, window: Pair, shift: Pair, device: torch.device | None = None) -> Windows:
    """The windows of a grid that is padded below and to the right, then rolled by `shift` up and to the left.

    It is not rolled along a side that is a single window (Liu et al. 2021, section 3.2, efficient batch computation).
    """
    whole = [-(-side // size) * size for side, size in zip(grid, window, strict=True)]
    rolled = [0 if side == size else by for side, size, by in zip(whole, window, shift, strict=True)]
    lines = [(torch.arange(side, device=device) + by) % side for side, by in zip(whole, rolled, strict=True)]
    rows, columns = lines[0].view(-1, 1, window[0], 1), lines[1].view(1, -1, 1, window[1])
    inside = (rows < grid[0]) & (columns < grid[1])
    cells = torch.where(inside, rows * grid[1] + columns, -1).flatten(2).flatten(0, 1)  # (W, N)
    flat = cells.flatten()
    missing = flat.numel() - grid[0] * grid[1]
    corner = (2 * (rows < rolled[0]) + (columns < rolled[1])).flatten(2).flatten(0, 1)  # what came from the other end
    return Windows(
        grid,
        cells,
        places=flat.argsort()[missing:],  # padding, -1, is sorted to the front
        hidden=(corner[:, :, None] != corner[:, None])[None] if any(rolled) else None,
        empty=(flat < 0)[:, None] if missing else None,
    )


class GridWindows(nn.Module):
    """The windows of a network's own grid, kept in memory; those of any other grid are made when they are asked for."""

    cells: Tensor
    places: Tensor
    hidden: Tensor | None
    empty: Tensor | None

    def __init__(self, grid: Pair, window: Pair, shift: Pair) -> None:
        super().__init__()
        self.grid, self.window, self.shift = grid, window, shift
        for name, value in self._made(grid).items():
            self.register_buffer(name, value, persistent=False)

    def _made(self, grid: Pair, device: torch.device | None = None) -> dict[str, Tensor | None]:
        made = cut_windows(grid, self.window, self.shift, device)
        return {"cells": made.cells, "places": made.places, "hidden": made.hidden, "empty": made.empty}

    def init_weights(self) -> None:
        """Fills the derived buffers."""
        for name, value in self._made(self.grid, self.places.device).items():
            if value is not None:
                self.get_buffer(name).copy_(value)

    def forward(self, grid: Pair) -> Windows:
        """The windows of this grid."""
        if grid == self.grid:
            return Windows(grid, self.cells, self.places, self.hidden, self.empty)
        return cut_windows(grid, self.window, self.shift, self.places.device)


def relative_index(window: Pair, device: torch.device | None = None) -> Tensor:
    """(N, N): which row of a table of offsets belongs to each pair of places in a window.

    Row (dy + h - 1)(2w - 1) + (dx + w - 1) for a query that lies dy below and dx to the right of its key.
    """
    rows, columns = (torch.arange(size, device=device) for size in window)
    dy = rows[:, None] - rows + window[0] - 1  # (h, h)
    dx = columns[:, None] - columns + window[1] - 1  # (w, w)
    offsets = dy[:, None, :, None] * (2 * window[1] - 1) + dx[None, :, None, :]  # (h, w, h, w)
    return offsets.flatten(2).flatten(0, 1)


class WindowAttention(Attention):
    """Self-attention within windows, with a bias for every offset (Liu et al. 2021, eq. 4): (B, W·N, C) -> the same.

    Takes tokens in the order of the windows.
    """

    relative_position_index: Tensor

    def __init__(
        self,
        dim: int,
        num_heads: int,
        window: Pair,
        *,
        qkv_bias: bool = True,
        attn_drop: float = 0.0,
        proj_drop: float = 0.0,
        attn: Kernel = "auto",
    ) -> None:
        super().__init__(dim, num_heads, qkv_bias=qkv_bias, attn_drop=attn_drop, proj_drop=proj_drop, attn=attn)
        self.window = window
        offsets = (2 * window[0] - 1) * (2 * window[1] - 1)
        self.relative_position_bias_table = nn.Parameter(torch.empty(offsets, num_heads))
        self.register_buffer("relative_position_index", relative_index(window), persistent=False)

    def forward(self, x: Tensor, windows: Windows) -> Tensor:  # type: ignore[override]
        told: dict[str, Any] = dict(bias=self.bias(windows), layout=windows.layout, kernel=self.attn)
        x = attend(*self.cut(x, windows), dropout=self.attn_drop if self.training else 0.0, **told)
        x = x.unflatten(1, (-1, self.num_heads)).transpose(2, 3).flatten(3).flatten(1, 2)  # (B, W·N, C)
        return self.proj_drop(self.proj(x))

    def cut(self, x: Tensor, windows: Windows) -> list[Tensor]:
        """(B, W·N, C) -> queries, keys, values, each (B, W·H, N, D)."""
        heads = (3, self.num_heads, x.shape[2] // self.num_heads)
        qkv = self.qkv(x).view(x.shape[0], *windows.cells.shape, *heads)
        return [part.flatten(1, 2) for part in qkv.permute(3, 0, 1, 4, 2, 5).unbind(0)]

    def bias(self, windows: Windows) -> Tensor:
        """(1 or B, W·H, N, N): the bias of each offset, -inf where a place must not see another."""
        count, places = windows.cells.shape
        table = self.relative_position_bias_table.t()  # (H, offsets)
        bias = table.index_select(1, self.relative_position_index.flatten()).view(1, 1, -1, places, places)
        if windows.hidden is not None:
            bias = bias.masked_fill(windows.hidden[:, :, None], float("-inf"))  # (1 or B, W, H, N, N)
        return bias.expand(-1, count, -1, -1, -1).flatten(1, 2)
