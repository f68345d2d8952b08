"""Local attention: each token looks at those of its own window (Li et al. 2022, ViTDet, section 3).

    tokens (B, h·w, C) of a grid ── cut into windows of s x s, the last ones padded ──> (B, W, s·s, …)
    attention inside every window, windows folded into heads ──> back into raster order (B, h·w, C)

A window as large as the grid is attention over all. Padding is hidden from everyone.

Legend: `B` batch, `H` heads, `W` windows, `s` side of a window, `N` = h·w tokens, `C` width, `D` head width.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from vitrail.layers.attention import Attention, Layout, attend
from vitrail.layers.rope import Rope
from vitrail.layers.windows import Windows, cut_windows


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
        windows = cut_windows((layout.grid[0], layout.grid[1]), (self.window, self.window), (0, 0), x.device)
        told: dict[str, Any] = dict(bias=_hidden(bias, windows, self.num_heads, x.dtype), layout=_told(layout, windows))
        dropout = self.attn_drop if self.training else 0.0
        parts = (_fold(part, windows) for part in self.split(x, rope))  # (B, W·H, s·s, D)
        x = _unfold(attend(*parts, dropout=dropout, kernel=self.attn, **told), windows)
        return self.proj_drop(self.proj(x.transpose(1, 2).flatten(2)[:, :rows]))


def _fold(x: Tensor, windows: Windows) -> Tensor:
    """(B, H, N, D) -> (B, W·H, s·s, D)."""
    return x[:, :, windows.cells.clamp(min=0)].transpose(1, 2).flatten(1, 2)


def _unfold(x: Tensor, windows: Windows) -> Tensor:
    """(B, W·H, s·s, D) -> (B, H, N, D)."""
    return x.unflatten(1, (len(windows.cells), -1)).transpose(1, 2).flatten(2, 3)[:, :, windows.places]


def _told(layout: Layout, windows: Windows) -> Layout:
    """The layout of the windows of a grid that has this one."""
    index = windows.cells
    if layout.query_index is not None:  # (B, N), -1 where pixels are padding
        index = layout.query_index[..., index.clamp(min=0)].masked_fill(index < 0, -1)
    return replace(layout, windows=len(windows.cells), query_index=index, key_index=index)


def _hidden(bias: Tensor | None, windows: Windows, heads: int, dtype: torch.dtype) -> Tensor | None:
    """A bias (1 or B, 1, 1, N) of keys -> (1 or B, W·H, 1, s·s), with the padding of windows hidden too.

    Where nothing of a window is to be seen nothing is hidden: nobody reads it, and a softmax needs a number.
    """
    cells = windows.cells
    if bias is None and windows.empty is None:
        return None
    bias = torch.zeros(1, 1, 1, len(windows.places), dtype=dtype, device=cells.device) if bias is None else bias
    keys = bias[:, 0, 0][:, cells.clamp(min=0)].masked_fill(cells < 0, float("-inf"))  # (B, W, s·s)
    keys = keys.masked_fill((keys == float("-inf")).all(-1, keepdim=True), 0.0)
    return keys.repeat_interleave(heads, dim=1)[:, :, None]
