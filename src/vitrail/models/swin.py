"""Swin Transformer: Liu et al. 2021, "Hierarchical Vision Transformer using Shifted Windows", arXiv 2103.14030.

    image (B, C_in, H, W)
      patches, each projected, norm           (B, h·w, C)               h = H / patch
      stage 1: blocks                         (B, h·w, C)
      stage i: merge 2 x 2 cells, blocks      (B, h·w / 4^(i-1), C·2^(i-1))
      norm, mean over cells, head             (B, K)

    inside a stage: tokens enter the order of regular windows, block, gather, block in shifted windows, gather, …, leave

Notable choices: names and keys are timm's, where a stage begins with its merging (in the authors' files it ends with
that of the next one). A map that does not divide into windows is padded and then rolled, the order of the authors,
torchvision and transformers; timm rolls first, and differs there. A map smaller than a window is padded too, as in
torchvision, so that one set of weights serves every size. Between stages tokens stand in raster order, inside one in
that of its windows, padded cells among them; these are zero before attention, as if they had been padded there.

Legend: `B` batch, `C_in` channels, `H`, `W` pixels, `h`, `w` cells of a stage, `C` width, `K` classes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vitrail.layers.attention import Kernel
from vitrail.layers.blocks import DropPath, Mlp, drop_path_rates, run_layer
from vitrail.layers.embed import PatchEmbed, Size, check_mask, pair
from vitrail.layers.init import init_leaf, trunc_normal
from vitrail.layers.linear import Linear
from vitrail.layers.tokens import mean_tokens
from vitrail.layers.windows import GridWindows, Pair, WindowAttention, Windows, relative_index
from vitrail.models.backbone import (
    Backbone,
    FeatureInfo,
    Features,
    PositionTable,
    Tokens,
    drawn_once,
    usual_preprocess,
)
from vitrail.models.config import (
    check_epsilons,
    check_hidden,
    check_least,
    check_rates,
    check_stages,
    choose,
    family_config,
)

PAIRS = ("img_size", "patch_size", "window_size")
LEAST = {**dict.fromkeys((*PAIRS, "embed_dim", "depths", "num_heads", "in_chans"), 1), "num_classes": 0}


@family_config
class SwinConfig:
    """Every knob of a Swin Transformer. Defaults are Swin-T at 224 pixels."""

    img_size: Size = 224
    """pixels, or (height, width); other sizes work at run time"""
    patch_size: Size = 4
    """pixels, or (height, width)"""
    in_chans: int = 3
    num_classes: int = 1000
    """0 leaves the head out"""
    embed_dim: int = 96
    """width of the first stage; each further stage is twice as wide"""
    depths: tuple[int, ...] = (2, 2, 6, 2)
    """blocks of each stage; every second one has shifted windows"""
    num_heads: tuple[int, ...] = (3, 6, 12, 24)
    """heads of each stage"""
    window_size: Size = 7
    """cells along a side of a window, or (rows, columns)"""
    mlp_ratio: float = 4.0
    qkv_bias: bool = True
    norm_eps: float = 1e-5
    drop_rate: float = 0.0
    """dropout before the head"""
    proj_drop_rate: float = 0.0
    """dropout after every projection in a block"""
    attn_drop_rate: float = 0.0
    """dropout of attention weights"""
    drop_path_rate: float = 0.0
    """stochastic depth of the last block; grows linearly from 0"""
    dynamic_pad: bool = False
    """pad images that do not divide into patches"""
    attn: Kernel = "auto"
    """attention kernel: auto, fused (SDPA), eager (matmul and softmax)"""

    def __post_init__(self) -> None:
        for name in PAIRS:
            object.__setattr__(self, name, pair(getattr(self, name)))
        check_stages(self, "num_heads")
        check_least(self, LEAST)
        check_rates(self)
        check_epsilons(self)
        check_hidden(self, "embed_dim", "mlp_ratio")


def stage_grids(c: SwinConfig) -> list[Pair]:
    """Rows and columns of cells of each stage at the own image size; of an odd side, the last cell is a half."""
    (height, width), (rows, columns) = pair(c.img_size), pair(c.patch_size)
    sides = [(rows * 2**i, columns * 2**i) for i in range(len(c.depths))]
    return [(-(-height // down), -(-width // across)) for down, across in sides]


def _row(
    size: int,
    patch: int,
    window: int,
    dim: int,
    depths: tuple[int, ...],
    heads: int,
    ratio: float = 4.0,
    classes: int = 1000,
) -> SwinConfig:
    return SwinConfig(
        img_size=size, patch_size=patch, window_size=window, embed_dim=dim, depths=depths,
        num_heads=tuple(heads * 2**i for i in range(len(depths))), mlp_ratio=ratio, num_classes=classes,
    )  # fmt: skip


# fmt: off
VARIANTS: dict[str, SwinConfig] = {
    #                                      img  patch  window width depths          heads of the first stage
    "swin_debug":                     _row( 32,     2,      4,   16, (2, 2, 2),      1, classes=10),
    "swin_tiny_patch4_window7_224":   _row(224,     4,      7,   96, (2, 2,  6, 2),  3),
    "swin_small_patch4_window7_224":  _row(224,     4,      7,   96, (2, 2, 18, 2),  3),
    "swin_base_patch4_window7_224":   _row(224,     4,      7,  128, (2, 2, 18, 2),  4),
    "swin_base_patch4_window12_384":  _row(384,     4,     12,  128, (2, 2, 18, 2),  4),
    "swin_large_patch4_window7_224":  _row(224,     4,      7,  192, (2, 2, 18, 2),  6),
    "swin_large_patch4_window12_384": _row(384,     4,     12,  192, (2, 2, 18, 2),  6),
    # small images: three stages, 16, 8 and 4 cells a side, so that the last is one whole window
    "swin_tiny_patch2_window4_32":    _row( 32,     2,      4,   96, (2, 6, 4),      3, ratio=2.0, classes=10),
}
# fmt: on


class SwinBlock(nn.Module):
    """One transformer layer in windows (Liu et al. 2021, eq. 3): (B, W·N, C) -> the same, in their order."""

    def __init__(self, dim: int, num_heads: int, drop_path: float, c: SwinConfig) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=c.norm_eps)
        self.attn = WindowAttention(
            dim, num_heads, pair(c.window_size), qkv_bias=c.qkv_bias,
            attn_drop=c.attn_drop_rate, proj_drop=c.proj_drop_rate, attn=c.attn,
        )  # fmt: skip
        self.drop_path1 = DropPath(drop_path) if drop_path else nn.Identity()
        self.norm2 = nn.LayerNorm(dim, eps=c.norm_eps)
        self.mlp = Mlp(dim, int(dim * c.mlp_ratio), drop=c.proj_drop_rate)
        self.drop_path2 = DropPath(drop_path) if drop_path else nn.Identity()

    def forward(self, x: Tensor, windows: Windows) -> Tensor:
        x = x + self.drop_path1(self.attn(windows.cleared(self.norm1(x)), windows))
        return x + self.drop_path2(self.mlp(self.norm2(x)))


class PatchMerging(nn.Module):
    """Four neighbouring cells become one of twice the width (Liu et al. 2021, section 3.1).

    (B, h·w, C) -> (B, ⌈h/2⌉·⌈w/2⌉, 2C); where a side is odd, zeros stand for the missing cells.
    """

    def __init__(self, dim: int, eps: float) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(4 * dim, eps=eps)
        self.reduction = Linear(4 * dim, 2 * dim, bias=False)

    def forward(self, x: Tensor, grid: Pair) -> Tensor:
        x = x.unflatten(1, grid)
        if grid[0] % 2 or grid[1] % 2:
            x = F.pad(x, (0, 0, 0, grid[1] % 2, 0, grid[0] % 2))
        x = x.unflatten(2, (-1, 2)).unflatten(1, (-1, 2))  # (B, h/2, 2, w/2, 2, C)
        x = x.permute(0, 1, 3, 4, 2, 5).flatten(3).flatten(1, 2)  # down, then right: (B, h·w/4, 4C)
        return self.reduction(self.norm(x))


class SwinStage(nn.Module):
    """Merging, but for the first stage, and blocks whose windows are regular and shifted in turns, in raster order."""

    def __init__(self, c: SwinConfig, number: int, grid: Pair, rates: Sequence[float]) -> None:
        super().__init__()
        dim, window = c.embed_dim * 2**number, pair(c.window_size)
        self.downsample = PatchMerging(dim // 2, c.norm_eps) if number else nn.Identity()
        self.blocks = nn.ModuleList(SwinBlock(dim, c.num_heads[number], rate, c) for rate in rates)
        self.regular = GridWindows(grid, window, (0, 0))
        self.shifted = GridWindows(grid, window, (window[0] // 2, window[1] // 2))

    def forward(self, tokens: Tokens, checkpointing: bool = False) -> Tokens:
        tokens = self._merged(tokens)
        turns, before = self._windows(tokens), None
        for i, block in enumerate(self.blocks):
            windows = turns[i % 2]
            tokens, before = tokens._replace(x=windows.enter(tokens.x, before)), windows
            tokens = tokens._replace(x=run_layer(block, tokens.x, windows, checkpointing=checkpointing))
        return tokens if before is None else tokens._replace(x=before.leave(tokens.x))

    def _merged(self, tokens: Tokens) -> Tokens:
        """A padded cell is zero to its neighbours, as one that is missing; four padded cells are a padded one."""
        if isinstance(self.downsample, nn.Identity):
            return tokens
        x, padding, (h, w) = tokens.x, tokens.padding, tokens.grid
        if padding is not None:
            x = x.masked_fill(padding[..., None], 0)
            seen = (~padding).float().unflatten(1, (1, h, w))
            padding = F.max_pool2d(seen, 2, ceil_mode=True).flatten(1) == 0
        return tokens._replace(x=self.downsample(x, (h, w)), grid=(-(-h // 2), -(-w // 2)), padding=padding)

    def _windows(self, tokens: Tokens) -> tuple[Windows, Windows]:
        """Regular and shifted ones, which for a single window are the same."""
        regular, shifted = self.regular(tokens.grid), self.shifted(tokens.grid)
        if tokens.padding is not None:
            regular, shifted = regular.unseen(tokens.padding), shifted.unseen(tokens.padding)
        return regular, shifted if len(shifted.cells) > 1 else regular


class Head(nn.Module):
    """Dropout and the layer that makes logits: (B, C) -> (B, K)."""

    def __init__(self, dim: int, num_classes: int, drop: float) -> None:
        super().__init__()
        self.drop = nn.Dropout(drop)
        self.fc = Linear(dim, num_classes) if num_classes else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.drop(x))


class SwinTransformer(Backbone):
    """A hierarchy of windowed transformer stages; see the module's docstring for its shapes.

    Takes a `SwinConfig` or its fields. Raises `ValueError` where sizes do not divide, `TypeError` for unknown fields.
    """

    family = "swin"

    def __init__(self, config: SwinConfig | None = None, **fields: Any) -> None:
        super().__init__()
        self.config = c = choose(SwinConfig, config, fields)
        self.preprocess = usual_preprocess(c.img_size, c.in_chans)
        rates = drop_path_rates(c.drop_path_rate, sum(c.depths))
        with drawn_once(self):
            self.patch_embed = PatchEmbed(
                c.img_size, c.patch_size, c.in_chans, c.embed_dim,
                dynamic_pad=c.dynamic_pad, norm=partial(nn.LayerNorm, eps=c.norm_eps),
            )  # fmt: skip
            self.layers = nn.ModuleList()
            for i, (depth, grid) in enumerate(zip(c.depths, stage_grids(c), strict=True)):
                first = sum(c.depths[:i])
                self.layers.append(SwinStage(c, i, grid, rates[first : first + depth]))
            self.num_features = c.embed_dim * 2 ** (len(c.depths) - 1)
            self.norm = nn.LayerNorm(self.num_features, eps=c.norm_eps)
            self.head = Head(self.num_features, c.num_classes, c.drop_rate)
        self.grad_checkpointing = False
        rows, columns = pair(c.patch_size)
        self.feature_info = [
            FeatureInfo(c.embed_dim * 2**i, rows * 2**i, f"layers.{i}", columns * 2**i) for i in range(len(c.depths))
        ]

    # ---- image -> features -> logits

    def embed(self, images: Tensor, mask: Tensor | None = None) -> Tokens:
        """images (B, C_in, H, W) -> tokens (B, h·w, C) in raster order; pixels marked in `mask` (B, H, W) are zero."""
        padding = None
        check_mask(mask, images)
        if mask is not None:
            images, padding = images.masked_fill(mask[:, None], 0), self.patch_embed.padding(mask)
        grid = self.patch_embed.grid(images.shape[-2], images.shape[-1])
        return Tokens(self.patch_embed(images), None, grid, 0, padding)

    def forward_features(self, images: Tensor, mask: Tensor | None = None) -> Tokens:
        """images (B, C_in, H, W) -> the last stage's tokens (B, h·w, num_features), normed, in raster order."""
        tokens = self.embed(images, mask)
        for stage in self.layers:
            tokens = stage(tokens, self.grad_checkpointing)
        return tokens._replace(x=self.norm(tokens.x))

    def forward_head(self, x: Tokens, pre_logits: bool = False) -> Tensor:
        """The last tokens -> logits (B, K), or with `pre_logits` their mean over cells with pixels, (B, C)."""
        pooled = mean_tokens(x.x, x.padding)
        return self.head.drop(pooled) if pre_logits else self.head(pooled)

    def forward_heads(self, x: Tokens) -> tuple[Tensor, ...]:
        """A Swin Transformer has one head."""
        return (self.forward_head(x),)

    def get_classifier(self) -> nn.Module:
        return self.head.fc

    def features(
        self,
        images: Tensor,
        indices: Sequence[int] | int | None = None,
        norm: bool = True,
        mask: Tensor | None = None,
    ) -> Features:
        """The maps (B, C_i, h_i, w_i) after the stages named by `indices`; `norm` is for the last stage alone.

        No stage is run beyond the last that is named. There are no prefix tokens.
        """
        wanted = self.feature_indices(indices)
        tokens, maps = self.embed(images, mask), {}
        for i in range(max(wanted, default=-1) + 1):
            tokens = self.layers[i](tokens, self.grad_checkpointing)
            x = self.norm(tokens.x) if norm and i == len(self.layers) - 1 else tokens.x
            maps[i] = x.transpose(1, 2).unflatten(2, tokens.grid)
        return Features(
            [maps[i] for i in wanted], [maps[i].new_zeros(len(images), 0, maps[i].shape[1]) for i in wanted]
        )

    # ---- care

    def reset_classifier(self, num_classes: int) -> None:
        """A new head for `num_classes` classes (0: none), initialised by its law; `classes` is emptied."""
        self.config, self.classes = replace(self.config, num_classes=num_classes), ()
        self.head.fc = Linear(self.num_features, num_classes).to(self.norm.weight) if num_classes else nn.Identity()
        init_leaf(self.head.fc)

    @torch.no_grad()
    def init_weights(self) -> None:
        """Fills every parameter and derived buffer by these laws.

        | what                      | law                                    | source                     |
        |---------------------------|----------------------------------------|----------------------------|
        | patch projection          | truncated normal, std 1 / sqrt(fan in) | LeCun 1998, as in our ViT  |
        | linear weights            | truncated normal, std 0.02             | the authors' code          |
        | bias of each offset       | truncated normal, std 0.02             | the authors' code          |
        | norms, biases             | 1 and 0, 0                             |                            |
        | windows, index of offsets | the formulas of `layers/windows.py`    |                            |
        """
        for module in self.modules():
            init_leaf(module)
            if isinstance(module, GridWindows):
                module.init_weights()
            elif isinstance(module, WindowAttention):
                trunc_normal(module.relative_position_bias_table, 0.02)
                module.relative_position_index.copy_(relative_index(module.window))
        projection = self.patch_embed.proj
        trunc_normal(projection.weight, projection.weight[0].numel() ** -0.5)
        if projection.bias is not None:
            nn.init.zeros_(projection.bias)

    def position_tables(self) -> dict[str, PositionTable]:
        names = [name for name, _ in self.named_parameters() if name.endswith("relative_position_bias_table")]
        return dict.fromkeys(names, PositionTable(pair(self.config.window_size), relative=True))

    def pixel_weights(self) -> list[str]:
        return ["patch_embed.proj.weight"]

    def no_weight_decay(self) -> set[str]:
        return set(self.position_tables())

    def layer_groups(self) -> list[list[str]]:
        """Embedding, then each block, the first of a stage with the merging before it, then norm and head."""
        firsts = [1 + sum(self.config.depths[:i]) for i in range(len(self.config.depths))]
        groups: list[list[str]] = [[] for _ in range(sum(self.config.depths) + 2)]
        for name, _ in self.named_parameters():
            part, *rest = name.split(".")
            block = int(rest[2]) if part == "layers" and rest[1] == "blocks" else 0
            depth = firsts[int(rest[0])] + block if part == "layers" else 0 if part == "patch_embed" else -1
            groups[depth].append(name)
        return groups

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        self.grad_checkpointing = enable
