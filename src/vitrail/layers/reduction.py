"""Attention whose keys lie on a coarser grid than its queries: the spatial reduction of the Pyramid Vision Transformer.

    tokens (B, P + N, C) ── q ──────────────────────────────────> queries (B, H, P + N, D)      N = h·w
                         └─ map (B, C, h, w) ── reduce ── kv ──> keys, values (B, H, N', D)     N' = h'·w'

    softmax(q kᵀ / √D) v                              Wang et al. 2021 (PVT), section 3.3; N·N' scores in place of N²

Three ways to reduce, a class each: not at all, by a convolution of kernel and stride R (PVT), or by a mean over a fixed
number of cells (PVT v2, "linear SRA"), whose N' no longer grows with the image. Prefix tokens have no place on the map,
so they can attend only where nothing is reduced.

Padded cells are zeros to every convolution, and keys that stand for them are hidden.

Legend: `B` batch, `P` prefix tokens, `N` image tokens, `C` width, `H` heads, `D` head width, `h`, `w` grid, `'`
reduced.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vitrail.layers.attention import Kernel, Layout, attend, check_heads
from vitrail.layers.linear import Linear
from vitrail.layers.tokens import as_map, padding_bias

POOLED = 7
"""cells a side that linear reduction leaves (Wang et al. 2022, PVT v2, section 3.1)"""


class Reduced(NamedTuple):
    """What keys and values are made of."""

    x: Tensor
    """(B, P + N', C)"""
    grid: tuple[int, int]
    """h', w'"""
    padding: Tensor | None
    """(B, N') true for keys to hide; None where no pixel is padded"""


class ReducedAttention(nn.Module):
    """Self-attention with a projection for queries and one for keys and values: (B, P + N, C) -> (B, P + N, C).

    Nothing is reduced here; subclasses say what is. Raises `ValueError` if `dim` does not divide into `num_heads`.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        *,
        qkv_bias: bool = True,
        attn_drop: float = 0.0,
        proj_drop: float = 0.0,
        attn: Kernel = "auto",
    ) -> None:
        super().__init__()
        check_heads(dim, num_heads, attn)
        self.num_heads, self.attn, self.attn_drop = num_heads, attn, attn_drop
        self.q = Linear(dim, dim, bias=qkv_bias)
        self.kv = Linear(dim, 2 * dim, bias=qkv_bias)
        self.proj = Linear(dim, dim)
        self.proj_drop = nn.Dropout(proj_drop)

    def reduce(self, x: Tensor, grid: tuple[int, int], padding: Tensor | None) -> Reduced:
        """The tokens (B, P + N, C) that keys and values are made of."""
        return Reduced(x, grid, padding)

    def forward(
        self, x: Tensor, grid: tuple[int, int], padding: Tensor | None = None, rows: int | None = None
    ) -> Tensor:
        """Tokens of a map of h x w cells, `padding` (B, N) true where padded; only the first `rows` are answered."""
        prefix = x.shape[1] - grid[0] * grid[1]
        q = self.q(x).unflatten(2, (self.num_heads, -1)).transpose(1, 2)  # (B, H, P + N, D)
        keys = self.reduce(x, grid, padding)
        k, v = self.kv(keys.x).unflatten(2, (2, self.num_heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)  # (B, H, N', D)
        bias = None if keys.padding is None else padding_bias(keys.padding, prefix, x.dtype)
        layout = Layout(
            grid, prefix, query_index=_shown(padding), key_index=_shown(keys.padding), key_grid=keys.grid,
            readout=(0,) if prefix else (),
        )  # fmt: skip
        dropout = self.attn_drop if self.training else 0.0
        x = attend(q, k, v, bias=bias, dropout=dropout, layout=layout, kernel=self.attn, rows=rows)
        return self.proj_drop(self.proj(x.transpose(1, 2).flatten(2)))  # (B, P + N or rows, C)


class SpatialReductionAttention(ReducedAttention):
    """Keys and values of windows of `sr_ratio` x `sr_ratio` cells, each projected to one and normed (PVT, eq. 3).

    Cells beyond the last whole window are no keys, though the layout lays its h' x w' keys over the whole image: where
    a side does not divide by `sr_ratio`, a map of attention is stretched there by less than one window. Raises
    `ValueError` for a grid without a whole window.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        sr_ratio: int,
        *,
        norm_eps: float = 1e-5,
        qkv_bias: bool = True,
        attn_drop: float = 0.0,
        proj_drop: float = 0.0,
        attn: Kernel = "auto",
    ) -> None:
        super().__init__(dim, num_heads, qkv_bias=qkv_bias, attn_drop=attn_drop, proj_drop=proj_drop, attn=attn)
        self.sr_ratio = sr_ratio
        self.sr = nn.Conv2d(dim, dim, sr_ratio, sr_ratio)
        self.norm = nn.LayerNorm(dim, eps=norm_eps)

    def reduce(self, x: Tensor, grid: tuple[int, int], padding: Tensor | None) -> Reduced:
        """(B, N, C) -> (B, N', C). Windows that hold a padded cell are hidden, as they would not be in a lone image.

        Of an image without a whole window, those that hold most of it are left.
        """
        if min(grid) < self.sr_ratio:
            raise ValueError(
                f"sr_ratio {self.sr_ratio} needs at least {self.sr_ratio} x {self.sr_ratio} cells; got a grid of "
                f"{grid[0]} x {grid[1]}: use larger images, or smaller sr_ratios"
            )
        reduced = self.sr(as_map(x, grid, padding))  # (B, C, h', w')
        if padding is not None:
            share = F.avg_pool2d(_seen(padding, grid), self.sr_ratio).flatten(1)  # (B, N')
            padding = share < share.amax(1, keepdim=True)
        return Reduced(self.norm(_as_tokens(reduced)), (reduced.shape[2], reduced.shape[3]), padding)


class LinearReductionAttention(ReducedAttention):
    """Keys and values of means over 7 x 7 parts of the map, projected, normed, through a GELU (PVT v2, section 3.1)."""

    def __init__(
        self,
        dim: int,
        num_heads: int,
        *,
        norm_eps: float = 1e-5,
        qkv_bias: bool = True,
        attn_drop: float = 0.0,
        proj_drop: float = 0.0,
        attn: Kernel = "auto",
    ) -> None:
        super().__init__(dim, num_heads, qkv_bias=qkv_bias, attn_drop=attn_drop, proj_drop=proj_drop, attn=attn)
        self.sr = nn.Conv2d(dim, dim, 1)
        self.norm = nn.LayerNorm(dim, eps=norm_eps)
        self.act = nn.GELU()

    def reduce(self, x: Tensor, grid: tuple[int, int], padding: Tensor | None) -> Reduced:
        """(B, N, C) -> (B, 49, C). Means are over cells that are no padding; parts without such a cell are hidden."""
        pooled = F.adaptive_avg_pool2d(as_map(x, grid, padding), POOLED)  # (B, C, 7, 7)
        if padding is not None:
            share = F.adaptive_avg_pool2d(_seen(padding, grid), POOLED)  # (B, 1, 7, 7)
            pooled = pooled / share.clamp(min=1 / padding.shape[1]).to(pooled.dtype)
            padding = share.flatten(1) == 0
        keys = self.act(self.norm(_as_tokens(self.sr(pooled))))
        return Reduced(keys, (POOLED, POOLED), padding)


def _as_tokens(x: Tensor) -> Tensor:
    """(B, C, h, w) -> (B, N, C)."""
    return x.flatten(2).transpose(1, 2)


def _seen(padding: Tensor, grid: tuple[int, int]) -> Tensor:
    """(B, N) true where padded -> a map (B, 1, h, w), 1 where not."""
    return (~padding).float().unflatten(1, grid)[:, None]


def _shown(padding: Tensor | None) -> Tensor | None:
    """(B, N) the cell that each token shows, -1 for padding: a `Layout`'s index. None for all cells."""
    if padding is None:
        return None
    return torch.arange(padding.shape[1], device=padding.device).masked_fill(padding, -1)
