"""Talking heads: heads that are mixed with one another before and after the softmax.

    scores_h = q_h k_hᵀ · scale                  (Q, N) each
    scores'  = L scores                          each head a weighted sum of all
    weights  = W softmax(scores') + w            what multiplies the values

Source: Shazeer et al. 2020, "Talking-Heads Attention", arXiv 2003.02436. `vitrail.layers.attention.attend` does this
where it is given a `Mix`. Over all queries and keys at once, a mix is one product (H, H) @ (H, Q·N).

Legend: `B` batch, `H` heads, `Q` queries, `N` keys, `D` head width.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from vitrail.layers.linear import is_traced

CACHED_SCORES = 2**18  # about as many as stay in a core's cache while five passes go over them


class Mix(NamedTuple):
    """What heads are mixed by.

    A bias before the softmax is left out: it adds one number to a whole row, which the softmax removes.
    """

    before: Tensor
    """L (H, H), rows are outputs"""
    after: Tensor
    """W (H, H)"""
    after_bias: Tensor | None = None
    """w (H,), on every key but those that the attention's own bias hides by -inf"""


def mix_heads(maps: Tensor, matrix: Tensor) -> Tensor:
    """(B, H, Q, N) -> (B, H, Q, N): every output head is a weighted sum of all heads, as one product an image.

    Not `matrix @ maps`, which first turns maps that want gradients so that heads are last: twice the time of a step.
    """
    return torch.bmm(matrix.expand(maps.shape[0], -1, -1), maps.flatten(2)).view_as(maps)  # (B, H, H) @ (B, H, Q·N)


def mix_weights(weights: Tensor, mix: Mix, bias: Tensor | None = None) -> Tensor:
    """The softmax (B, H, Q, N) with its heads mixed; keys that `bias` hides stay without weight."""
    mixed = mix_heads(weights, mix.after)
    if mix.after_bias is None:
        return mixed
    constant = mix.after_bias[:, None, None]
    return mixed + (constant if bias is None else constant.where(bias > float("-inf"), 0))


def may_overwrite(*tensors: Tensor | None) -> bool:
    """Whether results may lie in buffers used over and over: on a CPU, and nobody wants gradients or reads along."""
    if torch.is_grad_enabled() or torch.compiler.is_compiling() or torch._C._is_tracing():
        return False
    given = [tensor for tensor in tensors if tensor is not None]
    alike = {(tensor.device.type, tensor.dtype) for tensor in given} == {("cpu", given[0].dtype)}
    return alike and not torch.is_autocast_enabled("cpu") and not is_traced(*given)


def attend_in_parts(q: Tensor, k: Tensor, v: Tensor, mix: Mix, scale: float, bias: Tensor | None) -> Tensor:
    """Attention with talking heads, (B, H, Q, D), for so many images at a time that their maps stay in the cache.

    Whole batches of maps would go to memory and back five times. Every thread has a cache, and takes the same images
    in each of the passes where there are enough for all.
    """
    size = q.shape[1], q.shape[2], k.shape[2]  # (H, Q, N)
    count = CACHED_SCORES // max(1, math.prod(size)) * torch.get_num_threads() or 1
    buffers = q.new_empty(2, min(count, len(q)), *size)
    out = q.new_empty(len(q), q.shape[2], q.shape[1], v.shape[3]).transpose(1, 2)  # (B, H, Q, D)
    bias = None if bias is None else bias[(None,) * (4 - bias.ndim)].expand(len(q), -1, -1, -1)
    for start in range(0, len(q), count):
        part = slice(start, start + count)
        out[part] = _attend(q[part], k[part], v[part], mix, scale, None if bias is None else bias[part], buffers)
    return out


def _attend(q: Tensor, k: Tensor, v: Tensor, mix: Mix, scale: float, bias: Tensor | None, buffers: Tensor) -> Tensor:
    """A part of the images; `buffers` (2, B or more, H, Q, N) are written over."""
    one, other = buffers[:, : len(q)]
    pairs, flat = (q.flatten(0, 1), k.flatten(0, 1).transpose(1, 2)), one.flatten(0, 1)  # (B·H, Q, D), (B·H, D, N)
    torch.baddbmm(flat, *pairs, beta=0, alpha=scale, out=flat)
    torch.matmul(mix.before, one.flatten(2), out=other.flatten(2))
    other = other if bias is None else other.add_(bias)
    torch.softmax(other, dim=-1, out=one)
    torch.matmul(mix.after, one.flatten(2), out=other.flatten(2))
    return other @ v if mix.after_bias is None else other @ v + _constant(mix.after_bias, v, bias)


def _constant(after_bias: Tensor, v: Tensor, bias: Tensor | None) -> Tensor:
    """What the bias after the softmax gives: that number times the sum of the values that a query may see."""
    if bias is None:
        return after_bias[:, None, None] * v.sum(dim=2, keepdim=True)  # (B, H, 1, D)
    seen = (bias > float("-inf")).to(v.dtype)
    return after_bias[:, None, None] * (seen.expand(-1, v.shape[1], -1, -1) @ v)  # (B, H, 1 or Q, D)
