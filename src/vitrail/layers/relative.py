"""Relative positions: a learned number a head for every offset between two tokens, added to the scores.

    table (offsets + 3, H) ── index (P + N, P + N) of offsets ──> bias (1 or B, H, P + N, P + N)

The last three rows of the table are for pairs with a prefix token: from it to an image token, to it, and between two.
Source: Bao et al. 2022, BEiT; names are its code's. At another grid than the table's own, offsets lie where BEiT's
fine-tuning code puts them: dense near 0, wider apart the farther off, in a geometric progression.

Legend: `B` batch, `H` heads, `P` prefix tokens, `N` image tokens, `C` width, `h`, `w` token grid.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from vitrail.layers.attention import Attention, Layout
from vitrail.layers.linear import Linear, linear

PREFIX_ROWS = 3
"""from a prefix token, to one, between two"""


def relative_bias(table: Tensor, own: tuple[int, int], layout: Layout) -> Tensor:
    """The bias (1 or B, H, P + N, P + N) of the tokens that `layout` describes; `own` is the grid of the table."""
    grid = (layout.grid[0], layout.grid[1])
    table = resize_relative(table, own, grid)
    if layout.query_index is None:
        cells = torch.arange(grid[0] * grid[1], device=table.device)[None]
    else:
        cells = layout.query_index.reshape(-1, layout.query_index.shape[-1]).clamp(min=0)  # padding: hidden anyway
    index = offset_rows(cells, grid, layout.prefix)
    return table[index].permute(0, 3, 1, 2)


def offset_rows(cells: Tensor, grid: tuple[int, int], prefix: int) -> Tensor:
    """Cells (B, N) -> (B, P + N, P + N): which row of the table a pair of query and key has."""
    height, width = grid
    rows, columns = cells // width, cells % width
    down = rows[:, :, None] - rows[:, None, :] + height - 1
    right = columns[:, :, None] - columns[:, None, :] + width - 1
    index = down * (2 * width - 1) + right  # (B, N, N)
    offsets = (2 * height - 1) * (2 * width - 1)
    whole = index.new_full((len(cells), prefix + index.shape[1], prefix + index.shape[1]), offsets + 2)
    whole[:, :prefix, prefix:], whole[:, prefix:, :prefix] = offsets, offsets + 1
    whole[:, prefix:, prefix:] = index
    return whole


def resize_relative(table: Tensor, old: tuple[int, int], new: tuple[int, int]) -> Tensor:
    """A table (offsets of `old` + 3, H) for the grid `new`, between its rows where need be; the same grid: itself."""
    if old == new:
        return table
    sizes = [2 * n - 1 for n in old]
    offsets = table[:-PREFIX_ROWS].float().unflatten(0, sizes)  # (2h - 1, 2w - 1, H)
    down, right = (_between(a, b).to(table.device) for a, b in zip(old, new, strict=True))
    moved = torch.einsum("yh,xw,hwc->yxc", down, right, offsets).flatten(0, 1)
    return torch.cat([moved.to(table.dtype), table[-PREFIX_ROWS:]])


def _between(old: int, new: int) -> Tensor:
    """(2 new - 1, 2 old - 1) by how much each old offset counts for each new one: linear between its two neighbours."""
    half = torch.tensor(_places(old - 1, new - 1), dtype=torch.float64)
    places = torch.cat([-half.flip(0)[:-1], half])
    wanted = torch.arange(1 - new, new, dtype=torch.float64).clamp(places[0], places[-1])
    right = torch.searchsorted(places, wanted).clamp(1 if len(places) > 1 else 0)
    left = (right - 1).clamp(0)
    gap = (places[right] - places[left]).clamp(min=1e-12)
    share = ((wanted - places[left]) / gap)[:, None]
    eye = torch.eye(len(places), dtype=torch.float64)
    return ((1 - share) * eye[left] + share * eye[right]).float()


@cache
def _places(old: int, new: int) -> list[float]:
    """Where offsets 0 … `old` lie among 0 … `new`: 0, 1, 1 + q, 1 + q + q², …, q such that the last is at `new`.

    q is at least 1.01, and found by halving to 1e-6: so do BEiT and timm.
    """
    low, high = 1.01, 1.5
    ratio = low
    while high - low > 1e-6:
        ratio = (low + high) / 2
        too_far = (1 - ratio**old) / (1 - ratio) > new
        low, high = (low, ratio) if too_far else (ratio, high)
    places = [0.0]
    for step in range(old):
        places.append(places[-1] + ratio**step)
    return places


class QVAttention(Attention):
    """Attention whose keys have no bias, under BEiT's names: `q_bias` and `v_bias` beside `qkv.weight`.

    A bias of keys adds one number to a whole row of scores, which the softmax removes.
    """

    def __init__(self, dim: int, num_heads: int, *, qkv_bias: bool = True, **rest: Any) -> None:
        super().__init__(dim, num_heads, qkv_bias=False, **rest)
        self.q_bias = nn.Parameter(torch.zeros(dim)) if qkv_bias else None
        self.v_bias = nn.Parameter(torch.zeros(dim)) if qkv_bias else None

    def biases(self) -> list[Tensor]:
        """What begins at 0."""
        return [bias for bias in (self.q_bias, self.v_bias) if bias is not None]

    def project(self, x: Tensor) -> Tensor:
        if self.q_bias is None or self.v_bias is None:
            return self.qkv(x)
        return linear(x, self.qkv.weight, torch.cat([self.q_bias, torch.zeros_like(self.q_bias), self.v_bias]))


class SplitAttention(Attention):
    """Keys have no bias here either; queries, keys and values have a projection each: EVA-02's larger rows."""

    def __init__(self, dim: int, num_heads: int, *, qkv_bias: bool = True, **rest: Any) -> None:
        super().__init__(dim, num_heads, qkv_bias=False, **rest)
        del self.qkv
        self.q_proj = Linear(dim, dim, bias=qkv_bias)
        self.k_proj = Linear(dim, dim, bias=False)
        self.v_proj = Linear(dim, dim, bias=qkv_bias)

    def project(self, x: Tensor) -> Tensor:
        return torch.cat([self.q_proj(x), self.k_proj(x), self.v_proj(x)], dim=-1)


class RelativeAttention(QVAttention):
    """BEiT's attention: with a table of relative positions for a `grid` (h, w).

    Needs a `Layout` to know where tokens are; raises `ValueError` without one.
    """

    def __init__(self, dim: int, num_heads: int, *, grid: tuple[int, int], **rest: Any) -> None:
        super().__init__(dim, num_heads, **rest)
        self.grid = grid
        offsets = (2 * grid[0] - 1) * (2 * grid[1] - 1)
        self.relative_position_bias_table = nn.Parameter(torch.zeros(offsets + PREFIX_ROWS, num_heads))

    def biases(self) -> list[Tensor]:
        return [*super().biases(), self.relative_position_bias_table]

    def forward(self, x: Tensor, *, bias: Tensor | None = None, layout: Layout | None = None, **rest: Any) -> Tensor:
        if layout is None:
            raise ValueError(
                "relative positions need layout=Layout(grid, prefix), which says where tokens stand; got None"
            )
        own = relative_bias(self.relative_position_bias_table, self.grid, layout).to(x.dtype)
        return super().forward(x, bias=own if bias is None else own + bias, layout=layout, **rest)
