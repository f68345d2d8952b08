"""The ways in which a model asks for attention, each translated into one: `Call`.

    attend · F.scaled_dot_product_attention · F.multi_head_attention_forward  ──>  q, k, v, bias, scale, dropout, mix
    attend_topk · attend_linear                                              ──>  the same, and another way to weigh

Legend: `B` batch, `H` heads, `Q` queries, `K` keys, `D` head width, `C` model width.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from vitrail.layers.attention import Layout, attend, attention_weights, with_causal
from vitrail.layers.sparse import attend_linear, attend_topk, linear_weights, topk_weights
from vitrail.layers.talking import Mix, mix_weights


@dataclass(frozen=True, eq=False)
class Call:
    """One attention, whoever asked for it."""

    q: Tensor
    """(B, H, Q, D)"""
    k: Tensor
    """(B, H, K, D)"""
    v: Tensor
    """(B, H, K, D)"""
    finish: Callable[[Tensor, Tensor], Any]
    """(out (B, H, Q, D), weights (B, H, Q, K)) -> what the caller expects"""
    bias: Tensor | None = None
    """(1 or B, 1 or H, 1 or Q, K), causal masks included"""
    scale: float | None = None
    dropout: float = 0.0
    mix: Mix | None = None
    layout: Layout | None = None
    weigh: Callable[..., Tensor] = attention_weights
    """(q, k, bias=…, scale=…, and mix=… where heads talk) -> the matrix (B, H, Q, K), rows summing to 1"""

    def softmax(self, heads: Sequence[int] | None = None, rows: Sequence[int] | None = None) -> Tensor:
        """(B, H', Q', K) in at least fp32, autocast off. All heads where they are mixed before the softmax."""
        heads = None if self.mix else heads
        wide = torch.promote_types(self.q.dtype, torch.float32)
        bias = None if self.bias is None else pick(self.bias, heads, rows).to(wide)
        mix = self.mix and Mix(self.mix.before.to(wide), torch.eye(self.q.shape[1], dtype=wide, device=self.q.device))
        with torch.autocast(self.q.device.type, enabled=False):
            q, k = pick(self.q, heads, rows).to(wide), pick(self.k, heads, None).to(wide)
            return self.weigh(q, k, bias=bias, scale=self.scale, **({"mix": mix} if mix else {}))

    def mixed(self, weights: Tensor, rows: Sequence[int] | None = None) -> Tensor | None:
        """What multiplies the values where heads are mixed after the softmax (here that of `rows`), else None."""
        if self.mix is None:
            return None
        before, after, constant = self.mix
        wide = Mix(before, after.to(weights.dtype), None if constant is None else constant.to(weights.dtype))
        bias = None if self.bias is None else pick(self.bias, None, rows)
        with torch.autocast(weights.device.type, enabled=False):
            return mix_weights(weights, wide, bias)

    def apply(self, weights: Tensor, mixed: Tensor | None) -> Any:
        """What the caller gets if the values are weighed by these very tensors."""
        dropped = F.dropout(weights if mixed is None else mixed, self.dropout, training=self.dropout > 0)
        return self.finish(dropped.to(self.v.dtype) @ self.v, weights)


def pick(x: Tensor, heads: Sequence[int] | None, rows: Sequence[int] | None) -> Tensor:
    """(B, H, Q, …) -> (B, H', Q', …); a dimension of size 1 that broadcasts stays."""
    x = x if heads is None or x.shape[1] == 1 else x[:, list(heads)]
    return x if rows is None or x.shape[2] == 1 else x[:, :, list(rows)]


def fold(x: Tensor, batch: int | None) -> Tensor:
    """(…, Q, D) -> (B, H, Q, D): more dimensions become heads; of three, the first is B·H if `batch` divides it."""
    if x.ndim == 2:
        return x[None, None]
    if x.ndim == 3:
        return x.unflatten(0, (batch, -1)) if batch and x.shape[0] % batch == 0 else x[:, None]
    return x.flatten(1, -3)


def _of_attend(
    batch: int | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    bias: Tensor | None = None,
    causal: bool = False,
    rows: int | None = None,
    **rest: Any,
) -> Call:
    del rest["kernel"]
    bias = with_causal(_four(bias), causal, q, k)
    return Call(q, k, v, lambda out, weights: out[:, :, :rows], bias, **rest)


def _four(bias: Tensor | None) -> Tensor | None:
    """A bias with all four dimensions."""
    return None if bias is None else bias[(None,) * (4 - bias.ndim)]


def _of_topk(batch: int | None, q: Tensor, k: Tensor, v: Tensor, *, top: int, bias: Tensor | None, **rest: Any) -> Call:
    weigh = partial(topk_weights, top=top)
    return Call(q, k, v, lambda out, weights: out, _four(bias), weigh=weigh, **rest)


def _of_linear(batch: int | None, q: Tensor, k: Tensor, v: Tensor, *, bias: Tensor | None, **rest: Any) -> Call:
    def weigh(q: Tensor, k: Tensor, *, bias: Tensor | None, scale: float | None) -> Tensor:
        return linear_weights(q, k, bias=bias)

    return Call(q, k, v, lambda out, weights: out, _four(bias), weigh=weigh, **rest)


def _of_sdpa(
    batch: int | None,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Call:
    groups = query.shape[-3] // key.shape[-3] if enable_gqa else 1
    q, k, v = (fold(x, batch) for x in (query, _repeat(key, groups), _repeat(value, groups)))
    bias = None
    if attn_mask is not None:
        mask = additive(attn_mask, query.dtype)
        bias = fold(mask.expand(*query.shape[:-2], *mask.shape[-2:]), batch)
    bias = with_causal(bias, is_causal, q, k)
    shape = (*query.shape[:-1], value.shape[-1])
    return Call(q, k, v, lambda out, weights: out.reshape(shape), bias, scale, dropout_p)


def _repeat(x: Tensor, groups: int) -> Tensor:
    return x if groups == 1 else x.repeat_interleave(groups, dim=-3)


def additive(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """A mask that is true where a key takes part -> a bias; a bias stays."""
    if mask.dtype != torch.bool:
        return mask
    return torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill(~mask, float("-inf"))


def _of_mha(
    batch: int | None,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    embed_dim_to_check: int,
    num_heads: int,
    in_proj_weight: Tensor | None,
    in_proj_bias: Tensor | None,
    bias_k: Tensor | None,
    bias_v: Tensor | None,
    add_zero_attn: bool,
    dropout_p: float,
    out_proj_weight: Tensor,
    out_proj_bias: Tensor | None,
    *,
    training: bool = True,
    key_padding_mask: Tensor | None = None,
    need_weights: bool = True,
    attn_mask: Tensor | None = None,
    average_attn_weights: bool = True,
    **rest: Any,
) -> Call:
    """`F.multi_head_attention_forward`: (L, B, C) each, or (L, C) without a batch."""
    single = query.ndim == 2
    q, k, v = (x[:, None] if single else x for x in (query, key, value))
    q, k, v = _project(q, k, v, in_proj_weight, in_proj_bias, rest)
    k, v = _with_extra_keys(k, bias_k, add_zero_attn), _with_extra_keys(v, bias_v, add_zero_attn)
    bias = _mha_bias(attn_mask, key_padding_mask, q, k, num_heads)
    q, k, v = (x.unflatten(-1, (num_heads, -1)).permute(1, 2, 0, 3) for x in (q, k, v))  # (B, H, L, D)

    def finish(out: Tensor, weights: Tensor) -> tuple[Tensor, Tensor | None]:
        out = F.linear(out.permute(2, 0, 1, 3).flatten(2), out_proj_weight, out_proj_bias)  # (L, B, C)
        shown = weights.mean(1) if average_attn_weights else weights
        return out.squeeze(1) if single else out, (shown.squeeze(0) if single else shown) if need_weights else None

    return Call(q, k, v, finish, bias, None, dropout_p if training else 0.0)


def _project(
    q: Tensor, k: Tensor, v: Tensor, weight: Tensor | None, bias: Tensor | None, rest: dict[str, Any]
) -> tuple[Tensor, ...]:
    """(L, B, C) each -> queries, keys and values, (L, B, C) each."""
    if rest.get("static_k") is not None or rest.get("static_v") is not None:
        raise ValueError("record_attention does not know static_k and static_v of multi_head_attention_forward")
    weights = [rest[f"{name}_proj_weight"] for name in "qkv"] if weight is None else list(weight.chunk(3))
    biases = [None] * 3 if bias is None else list(bias.chunk(3))
    return tuple(F.linear(x, w, b) for x, w, b in zip((q, k, v), weights, biases, strict=True))


def _with_extra_keys(x: Tensor, learned: Tensor | None, zero: bool) -> Tensor:
    """(L, B, C) -> (L + 0 … 2, B, C): `add_bias_kv` and `add_zero_attn` each add a row."""
    rows = [] if learned is None else [learned.expand(1, *x.shape[1:])]
    rows += [torch.zeros_like(x[:1])] if zero else []
    return torch.cat([x, *rows]) if rows else x


def _mha_bias(attn: Tensor | None, padding: Tensor | None, q: Tensor, k: Tensor, heads: int) -> Tensor | None:
    """The masks of `nn.MultiheadAttention`, true where a key is hidden, as one bias (1 or B, 1 or H, 1 or Q, K)."""
    biases = []
    if attn is not None:
        mask = _shown(attn, q.dtype)
        biases.append(mask.unflatten(0, (-1, heads)) if mask.ndim == 3 and mask.shape[0] > 1 else fold(mask, None))
    if padding is not None:
        mask = _shown(padding, q.dtype)
        biases.append(mask.reshape(-1, 1, 1, mask.shape[-1]))
    extra = k.shape[0] - biases[0].shape[-1] if biases else 0
    return F.pad(sum(biases[1:], biases[0]), (0, extra)) if biases else None


def _shown(mask: Tensor, dtype: torch.dtype) -> Tensor:
    return additive(~mask, dtype) if mask.dtype == torch.bool else mask


CALLS: dict[Callable[..., Any], Callable[..., Call]] = {
    attend: _of_attend,
    attend_topk: _of_topk,
    attend_linear: _of_linear,
    F.scaled_dot_product_attention: _of_sdpa,
    F.multi_head_attention_forward: _of_mha,
}
