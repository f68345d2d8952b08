"""Attention that looks at less than everything: at the best keys alone, or at all of them without a map.

    attend           softmax(q kᵀ · scale + bias) v                      every query weighs every key
    attend_topk      the same, over the `top` keys of largest score      the others have no weight
    attend_linear    φ(q) (φ(k)ᵀ v) / φ(q) Σ φ(k),  φ(x) = elu(x) + 1    work grows with N, not with Q · N

Like `vitrail.layers.attention.attend` they take the place of, both announce themselves to `torch.overrides`, so that a
recorder sees q, k and v: of the first it shows the weights that are left, of the second the kernel matrix that is never
made, φ(q) φ(k)ᵀ with rows that sum to 1.

Legend: `B` batch, `H` heads, `Q` queries, `N` keys, `D` head width.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import handle_torch_function, has_torch_function

from vitrail.layers.attention import Layout, attention_scores


def attend_topk(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    top: int,
    bias: Tensor | None = None,
    scale: float | None = None,
    dropout: float = 0.0,
    layout: Layout | None = None,
) -> Tensor:
    """Attention of `q` (B, H, Q, D) over the `top` keys that suit each query best -> (B, H, Q, D).

    All keys where there are no more than `top`. Other arguments are those of `attend`; a gradient reaches the keys that
    are looked at. The map is made whole: this is for what it leaves out, not for speed. Source: Zhao et al. 2019,
    "Explicit Sparse Transformer", arXiv 1912.11637; for images Wang et al. 2022, "KVT", arXiv 2106.00515.

    Raises `ValueError` for a `top` below 1.
    """
    if has_torch_function((q, k, v)):
        return handle_torch_function(
            attend_topk, (q, k, v), q, k, v,
            top=top, bias=bias, scale=scale, dropout=dropout, layout=layout,
        )  # fmt: skip
    weights = topk_weights(q, k, top=top, bias=bias, scale=scale)
    weights = F.dropout(weights, dropout) if dropout else weights
    return weights.to(v.dtype) @ v


def topk_weights(q: Tensor, k: Tensor, *, top: int, bias: Tensor | None = None, scale: float | None = None) -> Tensor:
    """The matrix that weighs the values, (B, H, Q, N): rows sum to 1, all but `top` numbers of each are 0."""
    if top < 1:
        raise ValueError(f"top must be at least 1 key a query; got {top}")
    scores = attention_scores(q, k, scale)
    scores = scores if bias is None else scores + bias
    best = scores.topk(min(top, scores.shape[-1]), dim=-1)
    return torch.full_like(scores, float("-inf")).scatter(-1, best.indices, best.values).softmax(dim=-1)


def attend_linear(
    q: Tensor, k: Tensor, v: Tensor, *, bias: Tensor | None = None, layout: Layout | None = None
) -> Tensor:
    """Linear attention of `q` (B, H, Q, D) over `k`, `v` (B, H, N, D) -> (B, H, Q, D), in at least fp32 within.

    `bias` broadcasts to (B, H, 1, N) and multiplies a key's weight by its exponential: -inf hides it. There is no scale
    and no dropout of weights, which are never made. Source: Katharopoulos et al. 2020, "Transformers are RNNs",
    arXiv 2006.16236, section 3.2.

    Raises `ValueError` for a bias that tells queries apart.
    """
    if has_torch_function((q, k, v)):
        return handle_torch_function(attend_linear, (q, k, v), q, k, v, bias=bias, layout=layout)
    with torch.autocast(q.device.type, enabled=False):
        seen, keys = _features(q), _weighed_keys(k, bias)
        summed = keys.transpose(-2, -1) @ v.to(keys.dtype)  # (B, H, D, D)
        whole = seen @ keys.sum(dim=-2, keepdim=True).transpose(-2, -1)  # (B, H, Q, 1)
        return ((seen @ summed) / whole).to(v.dtype)


def linear_weights(q: Tensor, k: Tensor, *, bias: Tensor | None = None) -> Tensor:
    """The matrix that linear attention stands for, (B, H, Q, N): rows sum to 1."""
    kernel = _features(q) @ _weighed_keys(k, bias).transpose(-2, -1)
    return kernel / kernel.sum(dim=-1, keepdim=True)


def _features(x: Tensor) -> Tensor:
    """φ: positive, and with a slope where a ReLU has none."""
    return F.elu(x.to(torch.promote_types(x.dtype, torch.float32))) + 1


def _weighed_keys(k: Tensor, bias: Tensor | None) -> Tensor:
    """φ(k), each key times what its bias says: (B, H, N, D)."""
    if bias is None:
        return _features(k)
    if bias.ndim > 1 and bias.shape[-2] != 1:
        raise ValueError(
            f"linear attention sums keys once for all queries, so a bias must be (…, 1, N); got {tuple(bias.shape)}"
        )
    factor = bias.exp() if bias.ndim < 2 else bias.exp().squeeze(-2)
    return _features(k) * factor[..., None]
