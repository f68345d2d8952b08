"""PVT v2: Wang et al. 2022, "PVT v2: Improved Baselines with Pyramid Vision Transformer", arXiv 2106.13797.

    image (B, C_in, H, W)
      stage 1   patches of 7 x 7 every 4 pixels   (B, h·w, C1)       h = ⌈H / 4⌉    section 3.2
                depths[0] × Block                 (B, h·w, C1)       keys reduced: section 3.1; conv in MLP: section 3.3
                norm, as a map                    (B, C1, h, w)
      stage 2, 3, 4 likewise, patches of 3 x 3 every 2 cells: strides 8, 16, 32, each rounded up
      mean over cells, head                       (B, K)

Notable choices: names and keys are timm's; there are neither positions (zeros around every convolution tell where the
border is) nor a class token, so that any size works. `linear` takes means over 7 x 7 parts for keys in place of
windows, and puts a ReLU before the convolution of the MLP. As in PVT, norms that follow a convolution have an epsilon
of their own, which transformers' checkpoints do not. Padded pixels are zeros to every convolution, as if the image
ended there.

Legend: `B` batch, `C_in` channels, `H`, `W` pixels, `h`, `w` grid of a stage, `N` = h·w, `C` width of a stage, `K`
classes.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn

from vitrail.layers.attention import Kernel
from vitrail.layers.blocks import DropPath, drop_path_rates, run_layer
from vitrail.layers.embed import OverlapPatchEmbed, Size, check_mask, pair
from vitrail.layers.init import init_leaf
from vitrail.layers.linear import Linear
from vitrail.layers.parts import by_parts
from vitrail.layers.reduction import LinearReductionAttention, ReducedAttention, SpatialReductionAttention
from vitrail.layers.tokens import as_map, mean_tokens
from vitrail.models.backbone import Backbone, FeatureInfo, Features, Tokens, drawn_once, usual_preprocess
from vitrail.models.config import (
    check_epsilons,
    check_hidden,
    check_least,
    check_rates,
    check_stages,
    choose,
    family_config,
)


@family_config
class PVTV2Config:
    """Every knob of a PVT v2. Defaults are B0 at 224 pixels."""

    img_size: Size = 224
    """pixels, or (height, width); other sizes work at run time"""
    patch_size: int = 7
    """pixels a side of the first stage's patches; in further stages 3 cells"""
    stride: int = 4
    """pixels from one of the first stage's patches to the next; in further stages 2 cells"""
    in_chans: int = 3
    num_classes: int = 1000
    """0 leaves the head out"""
    embed_dims: tuple[int, ...] = (32, 64, 160, 256)
    """width of each stage"""
    depths: tuple[int, ...] = (2, 2, 2, 2)
    """blocks of each stage"""
    num_heads: tuple[int, ...] = (1, 2, 5, 8)
    """heads of each stage"""
    mlp_ratios: tuple[float, ...] = (8, 8, 4, 4)
    """hidden width of the MLPs of each stage, in widths"""
    sr_ratios: tuple[int, ...] = (8, 4, 2, 1)
    """cells a side that make one key, of each stage; `linear` leaves them unread"""
    linear: bool = False
    """keys are means over 7 x 7 parts of the map, however large it is: linear SRA"""
    qkv_bias: bool = True
    norm_eps: float = 1e-6
    """of the norms of blocks and stages"""
    conv_norm_eps: float = 1e-5
    """of the norms after patches and spatial reduction; transformers' checkpoints have 1e-6"""
    drop_rate: float = 0.0
    """dropout before the head"""
    proj_drop_rate: float = 0.0
    """dropout after every projection in a block"""
    attn_drop_rate: float = 0.0
    """dropout of attention weights"""
    drop_path_rate: float = 0.0
    """stochastic depth of the last block; grows linearly from 0"""
    dynamic_pad: bool = False
    """changes nothing: any size works as it is. Taken so that what is written for one family works for all"""
    attn: Kernel = "auto"
    """attention kernel: auto, fused (SDPA), eager (matmul and softmax)"""

    def __post_init__(self) -> None:
        object.__setattr__(self, "img_size", pair(self.img_size))
        check_stages(self, "embed_dims", "num_heads", "mlp_ratios", "sr_ratios")
        positive = ("patch_size", "stride", "in_chans", "embed_dims", "depths", "num_heads", "sr_ratios")
        check_least(self, {**dict.fromkeys(positive, 1), "img_size": self.least, "num_classes": 0})
        check_rates(self)
        check_epsilons(self)
        check_hidden(self, "embed_dims", "mlp_ratios")

    @property
    def strides(self) -> tuple[int, ...]:
        """Pixels from one cell to the next, of each stage."""
        return tuple(self.stride * 2**i for i in range(len(self.depths)))

    @property
    def least(self) -> int:
        """Pixels a side that leave each stage a window to reduce; grids are rounded up."""
        pixels = (stride * (ratio - 1) + 1 for stride, ratio in zip(self.strides, self.sr_ratios, strict=True))
        return 1 if self.linear else max(pixels)


WIDE = (64, 128, 320, 512)
# fmt: off
VARIANTS: dict[str, PVTV2Config] = {
    "pvt_v2_debug": PVTV2Config(img_size=32, patch_size=3, stride=2, num_classes=10, embed_dims=(8, 16, 24, 32),
                                depths=(1, 1, 1, 2), num_heads=(1, 2, 3, 4), mlp_ratios=(4, 4, 2, 2),
                                sr_ratios=(4, 2, 2, 1)),
    "pvt_v2_b0":    PVTV2Config(),
    "pvt_v2_b1":    PVTV2Config(embed_dims=WIDE),
    "pvt_v2_b2":    PVTV2Config(embed_dims=WIDE, depths=(3, 4,  6, 3)),
    "pvt_v2_b2_li": PVTV2Config(embed_dims=WIDE, depths=(3, 4,  6, 3), linear=True),
    "pvt_v2_b3":    PVTV2Config(embed_dims=WIDE, depths=(3, 4, 18, 3)),
    "pvt_v2_b4":    PVTV2Config(embed_dims=WIDE, depths=(3, 8, 27, 3)),
    "pvt_v2_b5":    PVTV2Config(embed_dims=WIDE, depths=(3, 6, 40, 3), mlp_ratios=(4, 4, 4, 4)),
    # small images: a cell for each pixel leaves the last stage 4 x 4 cells and every stage 4 x 4 keys
    "pvt_v2_b0_32": PVTV2Config(img_size=32, patch_size=3, stride=1, num_classes=10),
}
# fmt: on


class ConvMlp(nn.Module):
    """Two linear layers, between them a depthwise 3 x 3 convolution of the map and a GELU: (B, N, C) -> (B, N, C).

    Source: section 3.3; `relu` before the convolution belongs to the linear variant alone.
    """

    def __init__(self, dim: int, hidden: int, *, relu: bool = False, drop: float = 0.0) -> None:
        super().__init__()
        self.hidden = hidden
        self.fc1 = Linear(dim, hidden)
        self.relu = nn.ReLU(inplace=True) if relu else nn.Identity()
        self.dwconv = nn.Conv2d(hidden, hidden, 3, padding=1, groups=hidden)
        self.act = nn.GELU()
        self.drop = nn.Dropout(drop)
        self.fc2 = Linear(hidden, dim)

    def forward(self, x: Tensor, grid: tuple[int, int], padding: Tensor | None = None) -> Tensor:
        return by_parts(self, partial(self._forward, grid), x, padding, wide=self.hidden)

    def _forward(self, grid: tuple[int, int], x: Tensor, padding: Tensor | None) -> Tensor:
        x = self.relu(self.fc1(x))  # (B, N, hidden): the largest tensors, so each is given up for the next
        x = as_map(x, grid, padding)  # (B, hidden, h, w)
        x = self.dwconv(x)
        x = self.act(x.flatten(2).transpose(1, 2))  # (B, N, hidden)
        return self.drop(self.fc2(self.drop(x)))


class Block(nn.Module):
    """One pre-norm layer with reduced keys: tokens (B, N, C) of a grid -> (B, N, C)."""

    def __init__(self, config: PVTV2Config, stage: int, drop_path: float) -> None:
        super().__init__()
        c, dim = config, config.embed_dims[stage]
        self.norm1 = nn.LayerNorm(dim, eps=c.norm_eps)
        self.attn = _attention(c, stage)
        self.drop_path1 = DropPath(drop_path) if drop_path else nn.Identity()
        self.norm2 = nn.LayerNorm(dim, eps=c.norm_eps)
        self.mlp = ConvMlp(dim, int(dim * c.mlp_ratios[stage]), relu=c.linear, drop=c.proj_drop_rate)
        self.drop_path2 = DropPath(drop_path) if drop_path else nn.Identity()

    def forward(self, x: Tensor, grid: tuple[int, int], padding: Tensor | None = None) -> Tensor:
        x = x + self.drop_path1(self.attn(self.norm1(x), grid, padding))
        return x + self.drop_path2(self.mlp(self.norm2(x), grid, padding))


def _attention(c: PVTV2Config, stage: int) -> ReducedAttention:
    dim, heads, ratio = c.embed_dims[stage], c.num_heads[stage], c.sr_ratios[stage]
    options: dict[str, Any] = dict(
        qkv_bias=c.qkv_bias, attn_drop=c.attn_drop_rate, proj_drop=c.proj_drop_rate, attn=c.attn
    )
    if c.linear:
        return LinearReductionAttention(dim, heads, norm_eps=c.conv_norm_eps, **options)
    if ratio == 1:
        return ReducedAttention(dim, heads, **options)
    return SpatialReductionAttention(dim, heads, ratio, norm_eps=c.conv_norm_eps, **options)


class Stage(nn.Module):
    """Patches of the map before, blocks, and the norm of what they leave. The first stage's patches are the model's."""

    def __init__(self, config: PVTV2Config, stage: int, rates: Sequence[float]) -> None:
        super().__init__()
        c, dim = config, config.embed_dims[stage]
        self.downsample = (
            OverlapPatchEmbed(3, 2, c.embed_dims[stage - 1], dim, norm_eps=c.conv_norm_eps) if stage else None
        )
        self.blocks = nn.ModuleList(Block(c, stage, rate) for rate in rates)
        self.norm = nn.LayerNorm(dim, eps=c.norm_eps)
        self.grad_checkpointing = False

    def forward(self, x: Tensor, grid: tuple[int, int], padding: Tensor | None = None) -> Tensor:
        """Patches (B, N, C) -> tokens (B, N, C) after the blocks, not normed."""
        for block in self.blocks:
            x = run_layer(block, x, grid, padding, checkpointing=self.grad_checkpointing)
        return x


class PyramidVisionTransformerV2(Backbone):
    """A pyramid of transformer stages; see the module's docstring for its shapes. Takes a `PVTV2Config` or its fields.

    Raises `ValueError` for images too small to reduce, `TypeError` for unknown fields.
    """

    family = "pvt_v2"

    def __init__(self, config: PVTV2Config | None = None, **fields: Any) -> None:
        super().__init__()
        self.config = c = choose(PVTV2Config, config, fields)
        self.preprocess = usual_preprocess(c.img_size, c.in_chans)
        self.num_features = c.embed_dims[-1]
        self.feature_info = [
            FeatureInfo(dim, stride, f"stages.{i}")
            for i, (dim, stride) in enumerate(zip(c.embed_dims, c.strides, strict=True))
        ]
        rates = iter(drop_path_rates(c.drop_path_rate, sum(c.depths)))
        with drawn_once(self):
            self.patch_embed = OverlapPatchEmbed(
                c.patch_size, c.stride, c.in_chans, c.embed_dims[0], norm_eps=c.conv_norm_eps
            )
            self.stages = nn.ModuleList(
                Stage(c, stage, [next(rates) for _ in range(depth)]) for stage, depth in enumerate(c.depths)
            )
            self.head_drop = nn.Dropout(c.drop_rate)
            self.head = Linear(self.num_features, c.num_classes) if c.num_classes else nn.Identity()

    # ---- image -> stages -> features -> logits

    def _through(self, images: Tensor, mask: Tensor | None, stages: int) -> list[Tokens]:
        """images (B, C_in, H, W) -> the tokens after each of the first `stages` stages, not normed."""
        check_mask(mask, images)
        x = images if mask is None else images.masked_fill(mask[:, None], 0)
        found: list[Tokens] = []
        for number in range(stages):
            stage = cast(Stage, self.stages[number])
            if found:
                x, mask = self._normed(number - 1, found[-1]).on_grid()
            patches = self.patch_embed if stage.downsample is None else stage.downsample
            grid, padding = patches.grid(*x.shape[-2:]), None if mask is None else patches.padding(mask)
            found.append(Tokens(stage(patches(x), grid, padding), None, grid, 0, padding))
        return found

    def _normed(self, stage: int, tokens: Tokens) -> Tokens:
        return tokens._replace(x=cast(Stage, self.stages[stage]).norm(tokens.x))

    def forward_features(self, images: Tensor, mask: Tensor | None = None) -> Tokens:
        """images (B, C_in, H, W) -> the last stage's Tokens, x (B, N, C) normed."""
        last = len(self.stages) - 1
        return self._normed(last, self._through(images, mask, last + 1)[last])

    def forward_head(self, x: Tokens, pre_logits: bool = False) -> Tensor:
        """Tokens of `forward_features` -> logits (B, K) of their mean, or (B, C) with `pre_logits`."""
        pooled = self.head_drop(mean_tokens(x.x, x.padding))
        return pooled if pre_logits else self.head(pooled)

    def forward_heads(self, x: Tokens) -> tuple[Tensor, ...]:
        """A PVT v2 has one head."""
        return (self.forward_head(x),)

    def get_classifier(self) -> nn.Module:
        return self.head

    def features(
        self,
        images: Tensor,
        indices: Sequence[int] | int | None = None,
        norm: bool = True,
        mask: Tensor | None = None,
    ) -> Features:
        """Maps (B, C, h, w) after the stages named by `indices`, each by its stage's own norm with `norm`; no prefix.

        No stage is run beyond the last that is named.
        """
        wanted = self.feature_indices(indices)
        found = self._through(images, mask, max(wanted, default=-1) + 1)
        states = [self._normed(i, found[i]) if norm else found[i] for i in wanted]
        return Features([state.on_grid()[0] for state in states], [state.x[:, :0] for state in states])

    # ---- care

    def reset_classifier(self, num_classes: int) -> None:
        """A new head for `num_classes` classes (0: none), initialised by its law; `classes` is emptied."""
        self.config, self.classes = replace(self.config, num_classes=num_classes), ()
        like = self.patch_embed.proj.weight
        self.head = Linear(self.num_features, num_classes).to(like) if num_classes else nn.Identity()
        init_leaf(self.head)

    @torch.no_grad()
    def init_weights(self) -> None:
        """Linear layers: `trunc_normal` of std 0.02; convolutions: normal, std sqrt(2 / fan out); norms: 1; biases: 0.

        As the authors' code has it. The fan out of a depthwise convolution is its kernel's 9 weights.
        """
        for module in self.modules():
            init_leaf(module)
            if isinstance(module, nn.Conv2d):
                fan_out = math.prod(module.kernel_size) * module.out_channels // module.groups
                nn.init.normal_(module.weight, std=math.sqrt(2 / fan_out))
                nn.init.zeros_(cast(Tensor, module.bias))

    def pixel_weights(self) -> list[str]:
        return ["patch_embed.proj.weight"]

    def no_weight_decay(self) -> set[str]:
        return set()

    def layer_groups(self) -> list[list[str]]:
        """The first patches, each block (the first of a stage with its patches, the last with its norm), then the head.

        The norm of the last stage stands with the head.
        """
        ends = [sum(self.config.depths[: stage + 1]) for stage in range(len(self.config.depths))]
        groups: list[list[str]] = [[] for _ in range(ends[-1] + 2)]
        for name, _ in self.named_parameters():
            groups[_depth(name, self.config.depths, ends)].append(name)
        return groups

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        for stage in self.stages:
            cast(Stage, stage).grad_checkpointing = enable


def _depth(name: str, depths: Sequence[int], ends: Sequence[int]) -> int:
    """Where a parameter stands in `layer_groups`; `ends` are the depths of the stages' last blocks."""
    if not name.startswith("stages."):
        return 0 if name.startswith("patch_embed.") else -1
    _, number, part, block, *_ = name.split(".")
    stage = int(number)
    if part == "norm":
        return ends[stage] if stage < len(ends) - 1 else -1
    return ends[stage] - depths[stage] + 1 + (int(block) if part == "blocks" else 0)
