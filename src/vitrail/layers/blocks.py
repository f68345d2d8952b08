"""The pre-norm transformer block and its leaves; beside it blocks that norm elsewhere.

    x = x + drop_path(ls1(attention(norm1(x))))
    x = x + drop_path(ls2(mlp(norm2(x))))                 Dosovitskiy et al. 2021, eq. 2 and 3

Legend: `B` batch, `N` tokens, `C` width, `F` hidden width.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from vitrail.layers.attention import Attention, Kernel, Layout
from vitrail.layers.linear import Linear, activated
from vitrail.layers.parts import by_parts
from vitrail.layers.rope import Rope
from vitrail.names import check_choice

Norm = Callable[..., nn.Module]


class TokenBatchNorm(nn.BatchNorm1d):
    """Batch norm of every channel over all tokens of all images, and whatever else comes first: (…, C) -> (…, C)."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.flatten(0, -2)).view_as(x)


class QuickGELU(nn.Module):
    """x · sigmoid(1.702 x), the approximation of GELU that OpenAI's CLIP was trained with."""

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.sigmoid(1.702 * x)


NORMS: dict[str, Norm] = {
    "layernorm": partial(nn.LayerNorm, eps=1e-6),
    "rmsnorm": partial(nn.RMSNorm, eps=1e-6),
    "batchnorm": partial(TokenBatchNorm, eps=1e-6),
}
ACTIVATIONS: dict[str, Callable[[], nn.Module]] = {
    "gelu": nn.GELU,
    "gelu_tanh": partial(nn.GELU, approximate="tanh"),
    "quick_gelu": QuickGELU,
    "relu": nn.ReLU,
    "silu": nn.SiLU,
}


class WideMlp(nn.Module, ABC):
    """What MLPs share: where nobody wants gradients they take some images at a time, by `by_parts`."""

    def __init__(self, wide: int) -> None:
        super().__init__()
        self.wide = wide

    def forward(self, x: Tensor) -> Tensor:
        return by_parts(self, self.all_at_once, x, wide=self.wide)

    @abstractmethod
    def all_at_once(self, x: Tensor) -> Tensor:
        """(…, C) -> (…, C)."""


class Mlp(WideMlp):
    """Two linear layers with an activation between, applied to every token: (…, C) -> (…, C)."""

    def __init__(
        self, in_features: int, hidden_features: int | None = None, *, act: str = "gelu", drop: float = 0.0
    ) -> None:
        check_choice("act", act, ACTIVATIONS)
        hidden = in_features if hidden_features is None else hidden_features
        super().__init__(hidden)
        self.fc1 = Linear(in_features, hidden)
        self.act = ACTIVATIONS[act]()
        self.drop = nn.Dropout(drop)
        self.fc2 = Linear(hidden, in_features)

    def all_at_once(self, x: Tensor) -> Tensor:
        return self.drop(self.fc2(self.drop(activated(self.fc1, self.act, x))))


class SwiGLUPacked(WideMlp):
    """Two linear layers with a gate between, silu(g) · x of one product: (…, C) -> (…, C), F/2 wide between.

    Source: Shazeer 2020, "GLU variants improve transformer", eq. 6. The hidden width counts gate and value together.
    """

    def __init__(self, in_features: int, hidden_features: int, *, act: str = "silu", drop: float = 0.0) -> None:
        super().__init__(hidden_features)
        self.fc1 = Linear(in_features, hidden_features)
        self.act = ACTIVATIONS[act]()
        self.drop = nn.Dropout(drop)
        self.fc2 = Linear(hidden_features // 2, in_features)

    def all_at_once(self, x: Tensor) -> Tensor:
        gate, x = self.fc1(x).chunk(2, dim=-1)  # 2 x (…, F/2)
        return self.drop(self.fc2(self.drop(self.act(gate) * x)))


class SwiGLU(WideMlp):
    """The same with gate and value as two products, of the hidden width each: DINOv3's larger rows."""

    def __init__(self, in_features: int, hidden_features: int, *, act: str = "silu", drop: float = 0.0) -> None:
        super().__init__(2 * hidden_features)
        self.fc1_g = Linear(in_features, hidden_features)
        self.fc1_x = Linear(in_features, hidden_features)
        self.act = ACTIVATIONS[act]()
        self.drop = nn.Dropout(drop)
        self.fc2 = Linear(hidden_features, in_features)

    def all_at_once(self, x: Tensor) -> Tensor:
        return self.drop(self.fc2(self.drop(self.act(self.fc1_g(x)) * self.fc1_x(x))))


class NormedSwiGLU(SwiGLU):
    """The same with a norm before the last product, "sub-LN" (Wang et al. 2022, 2210.06423): EVA-02's larger rows."""

    def __init__(
        self, in_features: int, hidden_features: int, *, norm: Norm = nn.LayerNorm, act: str = "silu", drop: float = 0.0
    ) -> None:
        super().__init__(in_features, hidden_features, act=act, drop=drop)
        self.norm = norm(hidden_features)

    def all_at_once(self, x: Tensor) -> Tensor:
        x = self.norm(self.drop(self.act(self.fc1_g(x)) * self.fc1_x(x)))
        return self.drop(self.fc2(x))


MLPS: dict[str, Callable[..., nn.Module]] = {
    "mlp": Mlp,
    "swiglu_packed": SwiGLUPacked,
    "swiglu": SwiGLU,
    "swiglu_normed": NormedSwiGLU,
}
NORMED = ("swiglu_normed",)
"""those that want to be told of the block's norm"""


class DropPath(nn.Module):
    """Stochastic depth (Huang et al. 2016): in training, a sample's branch is left out with probability `drop_prob`.

    The branches kept are divided by 1 - drop_prob, so that the expectation stays. Any shape (B, …).
    """

    def __init__(self, drop_prob: float = 0.0) -> None:
        super().__init__()
        if not 0 <= drop_prob < 1:
            raise ValueError(f"drop_path_rate must lie in [0, 1); got {drop_prob}")
        self.drop_prob = drop_prob

    def forward(self, x: Tensor) -> Tensor:
        if not self.training or self.drop_prob == 0:
            return x
        kept = 1 - self.drop_prob
        shape = (x.shape[0],) + (1,) * (x.ndim - 1)
        return x * torch.empty(shape, dtype=x.dtype, device=x.device).bernoulli_(kept).div_(kept)

    def extra_repr(self) -> str:
        return f"drop_prob={self.drop_prob:.3g}"


def drop_path_rates(last: float, depth: int) -> list[float]:
    """The rate of each of `depth` blocks: linear from 0 to `last` (Huang et al. 2016, section 3)."""
    return [last * i / max(1, depth - 1) for i in range(depth)]


class LayerScale(nn.Module):
    """A learned factor per channel on a residual branch (Touvron et al. 2021, CaiT, eq. 4)."""

    def __init__(self, dim: int, init_values: float = 1e-5) -> None:
        super().__init__()
        self.init_values = init_values
        self.gamma = nn.Parameter(torch.full((dim,), init_values))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.gamma


class Block(nn.Module):
    """One pre-norm transformer layer: (B, N, C) -> (B, N, C). `init_values` turns LayerScale on.

    `attention` makes its attention, `mlp` names one of `MLPS`.
    Where only the first `rows` tokens are wanted, the others are keys and values alone: (B, N, C) -> (B, rows, C).
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        *,
        mlp_ratio: float = 4.0,
        qkv_bias: bool = True,
        qk_norm: bool = False,
        init_values: float | None = None,
        proj_drop: float = 0.0,
        attn_drop: float = 0.0,
        drop_path: float = 0.0,
        norm: str = "layernorm",
        norm_eps: float = 1e-6,
        act: str = "gelu",
        attn: Kernel = "auto",
        mlp: str = "mlp",
        attention: Callable[..., nn.Module] = Attention,
    ) -> None:
        super().__init__()
        check_choice("norm", norm, NORMS)
        check_choice("mlp", mlp, MLPS)
        make_norm = partial(NORMS[norm], eps=norm_eps)
        self.norm1 = make_norm(dim)
        self.attn = attention(
            dim, num_heads, qkv_bias=qkv_bias, qk_norm=make_norm if qk_norm else None,
            attn_drop=attn_drop, proj_drop=proj_drop, attn=attn,
        )  # fmt: skip
        self.ls1 = LayerScale(dim, init_values) if init_values is not None else nn.Identity()
        self.drop_path1 = DropPath(drop_path) if drop_path else nn.Identity()
        self.norm2 = make_norm(dim)
        told = {"norm": make_norm} if mlp in NORMED else {}
        self.mlp = MLPS[mlp](dim, int(dim * mlp_ratio), act=act, drop=proj_drop, **told)
        self.ls2 = LayerScale(dim, init_values) if init_values is not None else nn.Identity()
        self.drop_path2 = DropPath(drop_path) if drop_path else nn.Identity()

    def forward(self, x: Tensor, *, rows: int | None = None, **told: Any) -> Tensor:
        """`told` is the attention's: `bias`, `layout`, `rope`."""
        x = x[:, :rows] + self.drop_path1(self.ls1(self._attend(self.norm1(x), rows, told)))
        return x + self.drop_path2(self.ls2(self.mlp(self.norm2(x))))

    def _attend(self, x: Tensor, rows: int | None, told: dict[str, Any]) -> Tensor:
        return self.attn(x, **told, **_asked(rows=rows))


class PostNormBlock(Block):
    """Norm after every sum, as in the first transformer (Vaswani et al. 2017, section 3.1): norm(x + f(x))."""

    def forward(self, x: Tensor, *, rows: int | None = None, **told: Any) -> Tensor:
        x = self.norm1(x[:, :rows] + self.drop_path1(self.ls1(self._attend(x, rows, told))))
        return self.norm2(x + self.drop_path2(self.ls2(self.mlp(x))))


class ResPostNormBlock(Block):
    """Norm at the end of every branch (Liu et al. 2022, Swin v2, section 3.2): x + norm(f(x))."""

    def forward(self, x: Tensor, *, rows: int | None = None, **told: Any) -> Tensor:
        x = x[:, :rows] + self.drop_path1(self.ls1(self.norm1(self._attend(x, rows, told))))
        return x + self.drop_path2(self.ls2(self.norm2(self.mlp(x))))


class GammaBlock(Block):
    """A pre-norm block whose LayerScale has BEiT's names, `gamma_1` and `gamma_2`."""

    def __init__(self, dim: int, num_heads: int, *, init_values: float, **rest: Any) -> None:
        super().__init__(dim, num_heads, **rest)
        self.init_values = init_values
        self.gamma_1 = nn.Parameter(torch.full((dim,), init_values))
        self.gamma_2 = nn.Parameter(torch.full((dim,), init_values))

    def forward(self, x: Tensor, *, rows: int | None = None, **told: Any) -> Tensor:
        x = torch.addcmul(x[:, :rows], self.gamma_1, self.drop_path1(self._attend(self.norm1(x), rows, told)))
        return torch.addcmul(x, self.gamma_2, self.drop_path2(self.mlp(self.norm2(x))))


BLOCKS: dict[str, type[Block]] = {"prenorm": Block, "postnorm": PostNormBlock, "respostnorm": ResPostNormBlock}


def run_block(
    block: Callable[..., Tensor],
    x: Tensor,
    *,
    checkpointing: bool,
    bias: Tensor | None = None,
    layout: Layout | None = None,
    rows: int | None = None,
    rope: Rope | None = None,
) -> Tensor:
    """Runs a block, as `run_layer` does."""
    return run_layer(
        partial(block, bias=bias, layout=layout, **_asked(rows=rows, rope=rope)), x, checkpointing=checkpointing
    )


def run_layer(layer: Callable[..., Tensor], *args: Any, checkpointing: bool) -> Tensor:
    """Runs a layer; with `checkpointing`, activations are computed again in the backward pass (Chen et al. 2016)."""
    if checkpointing and torch.is_grad_enabled():
        return checkpoint(layer, *args, use_reentrant=False)
    return layer(*args)


def _asked(**words: Any) -> dict[str, Any]:
    """Who is not asked for `rows` or told of `rope` need not know of it: blocks and attention of somebody else."""
    return {word: value for word, value in words.items() if value is not None}
