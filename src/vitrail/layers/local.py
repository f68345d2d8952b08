"""Local attention: each token looks at those of its own window (Li et al. 2022, ViTDet, section 3).

    tokens (B, h·w, C) of a grid ── cut into windows of s x s, the last ones padded ──> (B, W, s·s, …)
    attention inside every window, windows folded into heads ──> back into raster order (B, h·w, C)

A window as large as the grid is attention over all. Padding is hidden from everyone.

Legend: `B` batch, `H` heads, `W` windows, `s` side of a window, `N` = h·w tokens, `C` width, `D` head width.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from vitrail.layers.attention import Attention, Layout, attend
from vitrail.layers.rope import Rope


class LocalAttention(Attention):
    """Self-attention inside windows of `window` x `window` tokens, for image tokens of a whole grid: (B, N, C) -> same.

    Raises `ValueError` where tokens are not those of the grid that `layout` names: all of them, and no others.
    """

    def __init__(self, dim: int, num_heads: int, *, window: int, **rest: Any) -> None:
        super().__init__(dim, num_heads, **rest)
        self.window = window

    def forward(
        self,
        x: Tensor,
        *,
        bias: Tensor | None = None,
        layout: Layout | None = None,
        rows: int | None = None,
        rope: Rope | None = None,
    ) -> Tensor:
        if layout is None or layout.prefix or x.shape[1] != layout.grid[0] * layout.grid[1]:
            known = None if layout is None else f"prefix {layout.prefix}, grid {layout.grid}"
            raise ValueError(
                f"windows are cut from a whole grid of image tokens without a prefix; got {x.shape[1]} tokens, {known}:"
                " use a network with window_size=0"
            )
        windows = Windows.of((layout.grid[0], layout.grid[1]), self.window, x.device)
        q, k, v = (windows.fold(part) for part in self.split(x, rope))  # (B, W·H, s·s, D)
        told = windows.told(layout)
        hidden = windows.hidden(bias, self.num_heads, x.dtype)
        dropout = self.attn_drop if self.training else 0.0
        x = windows.unfold(attend(q, k, v, bias=hidden, dropout=dropout, layout=told, kernel=self.attn))
        return self.proj_drop(self.proj(x.transpose(1, 2).flatten(2)[:, :rows]))


class Windows(NamedTuple):
    """Where the cells of a grid go when it is cut into windows."""

    cells: Tensor
    """(W, s·s) which cell stands at each place of each window, -1 for padding"""
    places: Tensor
    """(N,) at which of the W·s·s places each cell stands"""
    padded: bool

    @classmethod
    def of(cls, grid: tuple[int, int], side: int, device: torch.device) -> Windows:
        """Windows from the upper left corner on; the grid is padded on the right and below."""
        height, width = grid
        numbers = torch.arange(height * width, device=device).view(grid)
        below, right = -height % side, -width % side
        whole = F.pad(numbers, (0, right, 0, below), value=-1).unflatten(1, (-1, side)).unflatten(0, (-1, side))
        cells = whole.permute(0, 2, 1, 3).reshape(-1, side * side)
        rows, columns = numbers // width, numbers % width
        window = rows // side * whole.shape[2] + columns // side
        places = (window * side + rows % side) * side + columns % side
        return cls(cells, places.flatten(), bool(below or right))

    def fold(self, x: Tensor) -> Tensor:
        """(B, H, N, D) -> (B, W·H, s·s, D)."""
        return x[:, :, self.cells.clamp(min=0)].transpose(1, 2).flatten(1, 2)

    def unfold(self, x: Tensor) -> Tensor:
        """(B, W·H, s·s, D) -> (B, H, N, D)."""
        return x.unflatten(1, (len(self.cells), -1)).transpose(1, 2).flatten(2, 3)[:, :, self.places]

    def told(self, layout: Layout) -> Layout:
        """The layout of the windows of a grid that has this one."""
        index = self.cells
        if layout.query_index is not None:  # (B, N), -1 where pixels are padding
            index = layout.query_index[..., index.clamp(min=0)].masked_fill(index < 0, -1)
        return replace(layout, windows=len(self.cells), query_index=index, key_index=index)

    def hidden(self, bias: Tensor | None, heads: int, dtype: torch.dtype) -> Tensor | None:
        """A bias (1 or B, 1, 1, N) of keys -> (1 or B, W·H, 1, s·s), with the padding of windows hidden too.

        Where nothing of a window is to be seen nothing is hidden: nobody reads it, and a softmax needs a number.
        """
        if bias is None and not self.padded:
            return None
        bias = torch.zeros(1, 1, 1, len(self.places), dtype=dtype, device=self.cells.device) if bias is None else bias
        keys = bias[:, 0, 0][:, self.cells.clamp(min=0)].masked_fill(self.cells < 0, float("-inf"))  # (B, W, s·s)
        keys = keys.masked_fill((keys == float("-inf")).all(-1, keepdim=True), 0.0)
        return keys.repeat_interleave(heads, dim=1)[:, :, None]
