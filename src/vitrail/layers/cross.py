"""Cross-attention of one token: it asks many, and they are not changed.

    q = wq(x[0])     k, v = wk(x), wv(x)     x[0] + proj(attend(q, k, v))

Source: Chen et al. 2021, "CrossViT", section 3.3 and fig. 4. One query makes this linear in the number of tokens. Keys
are timm's.

Legend: `B` batch, `N` tokens beside the asking one, `C` width, `H` heads, `D` head width.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from vitrail.layers.attention import Kernel, Layout, attend, check_heads
from vitrail.layers.blocks import NORMS, DropPath
from vitrail.layers.linear import Linear


class CrossAttention(nn.Module):
    """The first token asks all of them, itself included: (B, 1 + N, C) -> (B, 1, C)."""

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
        self.wq = Linear(dim, dim, bias=qkv_bias)
        self.wk = Linear(dim, dim, bias=qkv_bias)
        self.wv = Linear(dim, dim, bias=qkv_bias)
        self.proj = Linear(dim, dim)
        self.proj_drop = nn.Dropout(proj_drop)

    def forward(self, x: Tensor, *, bias: Tensor | None = None, layout: Layout | None = None) -> Tensor:
        q, k, v = (self._by_head(y) for y in (self.wq(x[:, :1]), self.wk(x), self.wv(x)))  # (B, H, 1 or 1 + N, D)
        dropout = self.attn_drop if self.training else 0.0
        x = attend(q, k, v, bias=bias, dropout=dropout, layout=layout, kernel=self.attn)  # (B, H, 1, D)
        return self.proj_drop(self.proj(x.transpose(1, 2).flatten(2)))

    def _by_head(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)


class CrossAttentionBlock(nn.Module):
    """Cross-attention on a residual branch, without an MLP: (B, 1 + N, C) -> (B, 1, C). Takes what that takes."""

    def __init__(self, dim: int, num_heads: int, *, drop_path: float = 0.0, **attention: Any) -> None:
        super().__init__()
        self.norm1 = NORMS["layernorm"](dim)
        self.attn = CrossAttention(dim, num_heads, **attention)
        self.drop_path = DropPath(drop_path) if drop_path else nn.Identity()

    def forward(self, x: Tensor, *, bias: Tensor | None = None, layout: Layout | None = None) -> Tensor:
        return x[:, :1] + self.drop_path(self.attn(self.norm1(x), bias=bias, layout=layout))
