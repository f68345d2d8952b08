"""What is done to a sequence of tokens: choosing some, and making one vector of many.

Legend: `B` batch, `P` prefix tokens, `N` image tokens, `K` kept tokens, `C` width, `H` heads, `D` head width.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from vitrail.layers.attention import Kernel, Layout, attend, check_heads
from vitrail.layers.blocks import NORMS, Mlp
from vitrail.layers.linear import Linear


def keep_tokens(x: Tensor, keep: Tensor, prefix: int) -> Tensor:
    """The prefix and the image tokens named by `keep` (B, K): (B or 1, P + N, …) -> (B, P + K, …).

    `keep` counts image tokens from 0, without the prefix; its order is kept. On the CPU, where looking costs nothing,
    raises `ValueError` for a number that is no image token's.
    """
    last = x.shape[1] - prefix - 1
    if keep.device.type == "cpu" and not torch.compiler.is_compiling() and not ((keep >= 0) & (keep <= last)).all():
        raise ValueError(f"keep must count image tokens, 0 … {last}; got {keep.min()} … {keep.max()}")
    x = x.expand(keep.shape[0], *x.shape[1:])
    rows = torch.arange(keep.shape[0], device=x.device)[:, None]
    return torch.cat([x[:, :prefix], x[rows, keep + prefix]], dim=1)


def mean_tokens(x: Tensor, padding: Tensor | None = None) -> Tensor:
    """The mean over tokens, (B, N, C) -> (B, C); tokens marked in `padding` (B, N) do not count."""
    if padding is None:
        return x.mean(dim=1)
    seen = (~padding)[..., None].to(x.dtype)
    return (x * seen).sum(dim=1) / seen.sum(dim=1).clamp(min=1)


def padding_bias(padding: Tensor, prefix: int, dtype: torch.dtype) -> Tensor:
    """(B, N) true where padded -> a bias (B, 1, 1, P + N) that hides those keys from everyone.

    An image of nothing but padding hides none where no prefix is left to look at: a row of the softmax without any key
    would be no number.
    """
    padding = padding if prefix else padding & ~padding.all(dim=1, keepdim=True)
    hidden = torch.zeros(padding.shape[0], prefix + padding.shape[1], dtype=dtype, device=padding.device)
    hidden[:, prefix:].masked_fill_(padding, float("-inf"))
    return hidden[:, None, None]


def as_map(x: Tensor, grid: tuple[int, int], padding: Tensor | None = None) -> Tensor:
    """Image tokens (B, N, C) -> a map (B, C, h, w), a view of them; zero where `padding` (B, N) is true.

    Cut into rows first and then turned, it has the strides of `channels_last` for one image too, which the fast
    kernels of convolutions ask for: turned first, a batch of one would get others, and is many times as slow.
    """
    x = x if padding is None else x.masked_fill(padding[..., None], 0)
    return x.unflatten(1, grid).permute(0, 3, 1, 2)


class AttentionPool(nn.Module):
    """One learned query attends over all tokens, then a residual MLP: (B, N, C) -> (B, C).

    Source: Zhai et al. 2022, "Scaling Vision Transformers", section 2.2 (the MAP head); keys as in timm.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        *,
        mlp_ratio: float = 4.0,
        norm: str = "layernorm",
        norm_eps: float = 1e-6,
        act: str = "gelu",
        attn: Kernel = "auto",
    ) -> None:
        super().__init__()
        check_heads(dim, num_heads, attn)
        self.num_heads, self.attn = num_heads, attn
        self.latent = nn.Parameter(torch.zeros(1, 1, dim))
        self.q = Linear(dim, dim)
        self.kv = Linear(dim, 2 * dim)
        self.proj = Linear(dim, dim)
        self.norm = NORMS[norm](dim, eps=norm_eps)
        self.mlp = Mlp(dim, int(dim * mlp_ratio), act=act)

    def forward(self, x: Tensor, *, bias: Tensor | None = None, layout: Layout | None = None) -> Tensor:
        q = self.q(self.latent.expand(x.shape[0], -1, -1)).unflatten(-1, (self.num_heads, -1)).transpose(1, 2)
        k, v = self.kv(x).unflatten(-1, (2, self.num_heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)  # (B, H, N, D)
        x = attend(q, k, v, bias=bias, layout=layout, kernel=self.attn)
        x = self.proj(x.transpose(1, 2).flatten(2))  # (B, 1, C)
        return (x + self.mlp(self.norm(x)))[:, 0]
