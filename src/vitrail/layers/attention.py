"""Scaled dot-product attention: one function that every model calls, and the module around it.

    softmax(q kᵀ · scale + bias) v                   Vaswani et al. 2017, "Attention Is All You Need", eq. 1

`attend` is the one place that chooses a kernel, and the one place that can be watched: it announces itself to
`torch.overrides`, so that a recorder sees q, k and v without a hook in any model. `Layout` tells the watcher
which image cell each query and key stands for.

Legend: `B` batch, `H` heads, `Q` queries, `N` keys, `D` head width, `C` model width; windows are folded into heads.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import handle_torch_function, has_torch_function

from vitrail.layers.linear import Linear
from vitrail.layers.rope import Rope
from vitrail.layers.talking import Mix, attend_in_parts, may_overwrite, mix_heads, mix_weights

Kernel = Literal["auto", "fused", "eager"]
EAGER_TOKENS = 1024  # in bf16 on a CPU, matmul + softmax beats SDPA up to about this many keys,
EAGER_SCORES = 2**14  # and from about this many scores on: below, one call is less work than five
SDPA_QUERIES = 16  # fewer queries than this cost SDPA as much there, for it reads all keys alike


@dataclass(frozen=True, eq=False)
class Layout:
    """Which image cell each row (query) and column (key) of an attention matrix stands for.

    Rows are `prefix` tokens that are no image cell (class token, registers), then image tokens; columns likewise.
    An index maps each image token to a cell of its grid in raster order, -1 for padding. Its shape is (N,), (B, N),
    (B, windows, N), or, where `windows` > 1, (windows, N). None means the cells in raster order.
    """

    grid: tuple[int, ...]
    """(h, w), or (t, h, w) for frames"""
    prefix: int = 0
    windows: int = 1
    """heads are folded as (windows * heads)"""
    query_index: Tensor | None = None
    key_index: Tensor | None = None
    key_prefix: int | None = None
    """None: as many as rows have"""
    key_grid: tuple[int, ...] | None = None
    """the coarser grid that keys lie on where they were reduced; None: `grid`"""
    readout: tuple[int, ...] | None = None
    """the rows that the head reads: (0,) the class token, () the mean of the image tokens; None: not known"""
    branch: int | None = None
    """which branch of the network the keys' grid belongs to, from 0; None where there is one"""


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    bias: Tensor | None = None,
    scale: float | None = None,
    dropout: float = 0.0,
    causal: bool = False,
    mix: Mix | None = None,
    layout: Layout | None = None,
    kernel: Kernel = "auto",
    rows: int | None = None,
) -> Tensor:
    """Attention of `q` (B, H, Q, D) over `k`, `v` (B, H, N, D) -> (B, H, Q, D), or (B, H, rows, D).

    `bias` is added to the scores and broadcasts to (B, H, Q, N): -inf hides a key. `scale` defaults to D^-0.5;
    `dropout` is the probability of dropping a weight, to be given as 0 outside training; `causal` hides keys after
    the query. Only the first `rows` queries are answered; all are given, for whoever records, as is `layout`, which
    changes nothing here. Overridable through `torch.overrides`.
    """
    if has_torch_function((q, k, v)):
        return handle_torch_function(
            attend, (q, k, v), q, k, v,
            bias=bias, scale=scale, dropout=dropout, causal=causal, mix=mix, layout=layout, kernel=kernel, rows=rows,
        )  # fmt: skip
    if bias is not None and not bias.is_floating_point():
        raise ValueError(f"bias is added to the scores and must be floating, -inf at hidden keys; got {bias.dtype}")
    if rows is not None:
        q = q[:, :, :rows]
        bias = bias if bias is None or bias.ndim < 2 or bias.shape[-2] == 1 else bias[..., :rows, :]
    if bias is not None or mix is not None:  # SDPA takes a bias or `causal`
        bias, causal = with_causal(bias, causal, q, k), False
    if mix is None and _fused(kernel, q, k, bias):
        return F.scaled_dot_product_attention(q, k, v, bias, dropout, causal, scale=scale)
    if mix is not None and not dropout and may_overwrite(q, k, v, *mix):
        return attend_in_parts(q, k, v, mix, q.shape[-1] ** -0.5 if scale is None else scale, bias)
    weights = attention_weights(q, k, bias=bias, scale=scale, causal=causal, mix=mix)
    weights = F.dropout(weights, dropout) if dropout else weights
    return weights.to(v.dtype) @ v


def attention_weights(
    q: Tensor,
    k: Tensor,
    *,
    bias: Tensor | None = None,
    scale: float | None = None,
    causal: bool = False,
    mix: Mix | None = None,
) -> Tensor:
    """The matrix that weighs the values, (B, H, Q, N). Rows sum to 1 unless `mix` is given."""
    scores = attention_scores(q, k, scale)
    scores = scores if mix is None else mix_heads(scores, mix.before)
    bias = with_causal(bias, causal, q, k)
    weights = (scores if bias is None else scores + bias).softmax(dim=-1)
    return weights if mix is None else mix_weights(weights, mix, bias)


def attention_scores(q: Tensor, k: Tensor, scale: float | None = None) -> Tensor:
    """q kᵀ · scale (B, H, Q, N); the scale is D^-0.5 where none is given."""
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    pairs = q.flatten(0, 1), k.flatten(0, 1).transpose(1, 2)  # (B·H, Q, D), (B·H, D, N)
    scores = torch.baddbmm(q.new_zeros(()), *pairs, beta=0, alpha=scale)
    return scores.view(q.shape[0], q.shape[1], q.shape[2], k.shape[2])


def with_causal(bias: Tensor | None, causal: bool, q: Tensor, k: Tensor) -> Tensor | None:
    """The bias of the scores; where `causal`, with -inf on every key that stands after the query: (1, 1, Q, N)."""
    if not causal:
        return bias
    later = q.new_full((1, 1, q.shape[-2], k.shape[-2]), float("-inf")).triu(1)
    return later if bias is None else bias + later


def _fused(kernel: Kernel, q: Tensor, k: Tensor, bias: Tensor | None) -> bool:
    if kernel != "auto":
        return kernel == "fused"
    if k.device.type != "cpu" or torch.compiler.is_compiling():
        return True
    if bias is not None and bias.requires_grad:  # SDPA's kernel gives it no gradient: it would fall back, and copy more
        return False
    if k.dtype != torch.bfloat16:
        return True
    scores = q.shape[0] * q.shape[1] * max(q.shape[2], SDPA_QUERIES) * k.shape[2]
    return k.shape[2] > EAGER_TOKENS or scores < EAGER_SCORES


class Attention(nn.Module):
    """Multi-head self-attention (Vaswani et al. 2017, section 3.2.2): (B, N, C) -> (B, N, C).

    Where only the first `rows` tokens are wanted, only they look at all: (B, N, C) -> (B, rows, C). `rope` turns
    queries and keys by their places.
    `qk_norm` makes a norm layer of a width, for queries and for keys (Dehghani et al. 2023, "Scaling ViT to 22 billion
    parameters", section 2). Raises `ValueError` if `dim` does not divide into `num_heads`.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int = 8,
        *,
        qkv_bias: bool = True,
        qk_norm: Callable[[int], nn.Module] | None = None,
        attn_drop: float = 0.0,
        proj_drop: float = 0.0,
        attn: Kernel = "auto",
    ) -> None:
        super().__init__()
        check_heads(dim, num_heads, attn)
        self.num_heads, self.attn, self.attn_drop = num_heads, attn, attn_drop
        head_dim = dim // num_heads
        self.qkv = Linear(dim, 3 * dim, bias=qkv_bias)
        self.q_norm = qk_norm(head_dim) if qk_norm else nn.Identity()
        self.k_norm = qk_norm(head_dim) if qk_norm else nn.Identity()
        self.proj = Linear(dim, dim)
        self.proj_drop = nn.Dropout(proj_drop)

    def forward(
        self,
        x: Tensor,
        *,
        bias: Tensor | None = None,
        layout: Layout | None = None,
        rows: int | None = None,
        rope: Rope | None = None,
    ) -> Tensor:
        told: dict[str, Any] = dict(bias=bias, mix=self.mix(), layout=layout, kernel=self.attn, rows=rows)
        dropout = self.attn_drop if self.training else 0.0
        x = attend(*self.split(x, rope), dropout=dropout, **told)  # q, k and v, held by nobody, are gone after it
        return self.proj_drop(self.proj(x.transpose(1, 2).flatten(2)))  # (B, N or rows, C)

    def mix(self) -> Mix | None:
        """How heads talk, for layers whose heads do."""
        return None

    def split(self, x: Tensor, rope: Rope | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """(B, N, C) -> queries, keys, values, each (B, H, N, D); queries and keys normed and turned."""
        heads = (3, self.num_heads, x.shape[2] // self.num_heads)
        qkv = self.project(x).reshape(x.shape[0], x.shape[1], *heads)  # (B, N, 3, H, D)
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
        q, k = self.q_norm(q).to(v.dtype), self.k_norm(k).to(v.dtype)
        return (q, k, v) if rope is None else (rope.turn(q), rope.turn(k), v)

    def project(self, x: Tensor) -> Tensor:
        """(B, N, C) -> (B, N, 3C)."""
        return self.qkv(x)


def check_heads(dim: int, num_heads: int, attn: str) -> None:
    """Raises `ValueError` if `dim` does not divide into `num_heads`, or there is no such kernel."""
    if dim % num_heads:
        width = num_heads * max(1, round(dim / num_heads))
        raise ValueError(
            f"embed_dim {dim} is not divisible by num_heads {num_heads}: "
            f"use {_nearest_divisor(dim, num_heads)} heads or a width of {width}"
        )
    if attn not in ("auto", "fused", "eager"):
        raise ValueError(f"attn must be auto, fused or eager; got {attn!r}")


def _nearest_divisor(dim: int, heads: int) -> int:
    return min((n for n in range(1, dim + 1) if dim % n == 0), key=lambda n: abs(n - heads))
