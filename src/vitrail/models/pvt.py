"""Pyramid Vision Transformer: Wang et al. 2021, "Pyramid Vision Transformer: A Versatile Backbone for Dense Prediction
without Convolutions", arXiv 2102.12122.

    image (B, C_in, H, W)
      stage 1   patches of 4 x 4, + positions     (B, h·w, C1)       h = H / 4      section 3.1
                depths[0] × Block                 (B, h·w, C1)       keys on h/R x w/R cells: section 3.3
                as a map                          (B, C1, h, w)
      stage 2, 3, 4 likewise, patches of 2 x 2 of the map before: strides 8, 16, 32
                in the last, [class, patches]     (B, 1 + N, C4)
      norm, class token, head                     (B, K)

Notable choices: keys are the authors', numbered from 1 (`patch_embed1 … pos_embed4`), as no timm model has this family;
positions are resized as the authors do, bilinearly. Their code has two epsilons: 1e-5 in norms that follow a
convolution, 1e-6 in all others; transformers' port has 1e-6 everywhere. Both load exactly, through the config. Where
the authors cut off the pixels that do not divide into patches, that is an error here, or `dynamic_pad` adds
zeros, which count as padding.

Legend: `B` batch, `C_in` channels, `H`, `W` pixels, `h`, `w` grid of a stage, `N` = h·w, `P` class token (0 or 1),
`C` width of a stage, `R` its reduction ratio, `K` classes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vitrail.layers.attention import Kernel
from vitrail.layers.blocks import DropPath, Mlp, drop_path_rates, run_layer
from vitrail.layers.embed import PatchEmbed, Size, check_channels, check_divides, check_mask, pair, resize_positions
from vitrail.layers.init import init_leaf, trunc_normal
from vitrail.layers.linear import Linear, is_hooked
from vitrail.layers.reduction import ReducedAttention, SpatialReductionAttention
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


@family_config
class PVTConfig:
    """Every knob of a Pyramid Vision Transformer. Defaults are PVT-Tiny at 224 pixels."""

    img_size: Size = 224
    """pixels, or (height, width); other sizes work at run time"""
    patch_size: int = 4
    """pixels a side of the first stage's patches; each further stage takes 2 x 2 cells of the one before"""
    in_chans: int = 3
    num_classes: int = 1000
    """0 leaves the head out"""
    embed_dims: tuple[int, ...] = (64, 128, 320, 512)
    """width of each stage"""
    depths: tuple[int, ...] = (2, 2, 2, 2)
    """blocks of each stage"""
    num_heads: tuple[int, ...] = (1, 2, 5, 8)
    """heads of each stage"""
    mlp_ratios: tuple[float, ...] = (8, 8, 4, 4)
    """hidden width of the MLPs of each stage, in widths"""
    sr_ratios: tuple[int, ...] = (8, 4, 2, 1)
    """cells a side that make one key, of each stage; 1 in the last, where the class token has no cell"""
    qkv_bias: bool = True
    norm_eps: float = 1e-6
    """of the norms of blocks and the last one"""
    conv_norm_eps: float = 1e-5
    """of the norms after patches and spatial reduction; transformers' checkpoints have 1e-6"""
    drop_rate: float = 0.0
    """dropout before the head"""
    pos_drop_rate: float = 0.0
    """dropout after positions are added"""
    proj_drop_rate: float = 0.0
    """dropout after every projection in a block"""
    attn_drop_rate: float = 0.0
    """dropout of attention weights"""
    drop_path_rate: float = 0.0
    """stochastic depth of the last block; grows linearly from 0"""
    dynamic_pad: bool = False
    """pad images that do not divide into the cells of the last stage"""
    attn: Kernel = "auto"
    """attention kernel: auto, fused (SDPA), eager (matmul and softmax)"""

    def __post_init__(self) -> None:
        object.__setattr__(self, "img_size", pair(self.img_size))
        check_stages(self, "embed_dims", "num_heads", "mlp_ratios", "sr_ratios")
        positive = ("patch_size", "in_chans", "embed_dims", "depths", "num_heads", "sr_ratios")
        check_least(self, {**dict.fromkeys(positive, 1), "img_size": self.least, "num_classes": 0})
        check_rates(self)
        check_epsilons(self)
        check_hidden(self, "embed_dims", "mlp_ratios")
        if self.sr_ratios[-1] != 1:
            raise ValueError(f"sr_ratios must end in 1, where the class token has no cell; got {self.sr_ratios}")

    @property
    def strides(self) -> tuple[int, ...]:
        """Pixels a side of a cell of each stage."""
        return tuple(self.patch_size * 2**i for i in range(len(self.depths)))

    @property
    def least(self) -> int:
        """Pixels a side that leave each stage a window to reduce."""
        return max(stride * ratio for stride, ratio in zip(self.strides, self.sr_ratios, strict=True))


# fmt: off
VARIANTS: dict[str, PVTConfig] = {
    "pvt_debug": PVTConfig(img_size=32, patch_size=2, num_classes=10, embed_dims=(8, 16, 24, 64), depths=(1, 1, 1, 2),
                           num_heads=(1, 2, 3, 4), mlp_ratios=(4, 4, 2, 2), sr_ratios=(4, 2, 2, 1)),
    "pvt_tiny":    PVTConfig(depths=(2, 2,  2, 2)),
    "pvt_small":   PVTConfig(depths=(3, 4,  6, 3)),
    "pvt_medium":  PVTConfig(depths=(3, 4, 18, 3)),
    "pvt_large":   PVTConfig(depths=(3, 8, 27, 3)),
    # small images: patches of 2 x 2 leave the last stage 2 x 2 cells, not one; the ratios leave 4 x 4 keys before it
    "pvt_tiny_32": PVTConfig(img_size=32, patch_size=2, sr_ratios=(4, 2, 1, 1), num_classes=10),
}
# fmt: on


class Block(nn.Module):
    """One pre-norm layer with reduced keys: tokens (B, P + N, C) of a grid -> (B, P + N, C), or the first `rows`."""

    def __init__(self, config: PVTConfig, stage: int, drop_path: float) -> None:
        super().__init__()
        c, dim = config, config.embed_dims[stage]
        self.norm1 = nn.LayerNorm(dim, eps=c.norm_eps)
        self.attn = _attention(c, stage)
        self.drop_path1 = DropPath(drop_path) if drop_path else nn.Identity()
        self.norm2 = nn.LayerNorm(dim, eps=c.norm_eps)
        self.mlp = Mlp(dim, int(dim * c.mlp_ratios[stage]), drop=c.proj_drop_rate)
        self.drop_path2 = DropPath(drop_path) if drop_path else nn.Identity()

    def forward(
        self, x: Tensor, grid: tuple[int, int], padding: Tensor | None = None, rows: int | None = None
    ) -> Tensor:
        x = x[:, :rows] + self.drop_path1(self.attn(self.norm1(x), grid, padding, rows))
        return x + self.drop_path2(self.mlp(self.norm2(x)))


def _attention(c: PVTConfig, stage: int) -> ReducedAttention:
    dim, heads, ratio = c.embed_dims[stage], c.num_heads[stage], c.sr_ratios[stage]
    options: dict[str, Any] = dict(
        qkv_bias=c.qkv_bias, attn_drop=c.attn_drop_rate, proj_drop=c.proj_drop_rate, attn=c.attn
    )
    if ratio == 1:
        return ReducedAttention(dim, heads, **options)
    return SpatialReductionAttention(dim, heads, ratio, norm_eps=c.conv_norm_eps, **options)


class PyramidVisionTransformer(Backbone):
    """A pyramid of transformer stages; see the module's docstring for its shapes. Takes a `PVTConfig` or its fields.

    Raises `ValueError` where sizes do not divide, `TypeError` for unknown fields.
    """

    family = "pvt"

    def __init__(self, config: PVTConfig | None = None, **fields: Any) -> None:
        super().__init__()
        self.config = c = choose(PVTConfig, config, fields)
        self.preprocess = usual_preprocess(c.img_size, c.in_chans)
        self.num_features, self.grad_checkpointing = c.embed_dims[-1], False
        self.feature_info = [
            FeatureInfo(dim, stride, f"block{i + 1}")
            for i, (dim, stride) in enumerate(zip(c.embed_dims, c.strides, strict=True))
        ]
        rates = iter(drop_path_rates(c.drop_path_rate, sum(c.depths)))
        with drawn_once(self):
            for stage, depth in enumerate(c.depths):
                self._make_stage(stage, [next(rates) for _ in range(depth)])
            self.cls_token = nn.Parameter(torch.empty(1, 1, self.num_features))
            self.pos_drop = nn.Dropout(c.pos_drop_rate)
            self.norm = nn.LayerNorm(self.num_features, eps=c.norm_eps)
            self.head_drop = nn.Dropout(c.drop_rate)
            self.head = Linear(self.num_features, c.num_classes) if c.num_classes else nn.Identity()

    def _make_stage(self, stage: int, rates: Sequence[float]) -> None:
        c, dim = self.config, self.config.embed_dims[stage]
        height, width = self._whole(*pair(c.img_size))
        finer = c.strides[stage - 1] if stage else 1
        patch, chans = (2, c.embed_dims[stage - 1]) if stage else (c.patch_size, c.in_chans)
        norm = partial(nn.LayerNorm, eps=c.conv_norm_eps)
        patches = PatchEmbed((height // finer, width // finer), patch, chans, dim, norm=norm)
        positions = torch.empty(1, self._prefix(stage) + patches.num_patches, dim)
        self.add_module(f"patch_embed{stage + 1}", patches)
        self.register_parameter(f"pos_embed{stage + 1}", nn.Parameter(positions))
        self.add_module(f"block{stage + 1}", nn.ModuleList(Block(c, stage, rate) for rate in rates))

    # ---- image -> stages -> features -> logits

    def _whole(self, height: int, width: int) -> tuple[int, int]:
        """The size that divides into the cells of the last stage. Raises `ValueError` where it has to be padded."""
        cell = self.config.strides[-1]
        if not self.config.dynamic_pad:
            check_divides((height, width), (cell, cell), "the last stage's stride")
        return -(-height // cell) * cell, -(-width // cell) * cell

    def _prefix(self, stage: int) -> int:
        """The class token stands in the last stage alone."""
        return int(stage == len(self.config.depths) - 1)

    def _through(self, images: Tensor, mask: Tensor | None, stages: int, rows: int | None = None) -> list[Tokens]:
        """images (B, C_in, H, W) -> the tokens after each of the first `stages` stages, of the last of all `rows`."""
        x, mask = self._prepared(images, mask)
        found: list[Tokens] = []
        for stage in range(stages):
            if found:
                x, mask = found[-1].on_grid()
            found.append(self._stage(stage, x, mask, rows if self._prefix(stage) else None))
        return found

    def _prepared(self, images: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Images and mask of a size that divides, zero where padded; what is added counts as padding too."""
        check_channels(images, self.config.in_chans)
        check_mask(mask, images)
        height, width = self._whole(images.shape[-2], images.shape[-1])
        images = images if mask is None else images.masked_fill(mask[:, None], 0)
        edges = (0, width - images.shape[-1], 0, height - images.shape[-2])
        if any(edges):
            seen = torch.zeros_like(images[:, 0], dtype=torch.bool) if mask is None else mask
            images, mask = F.pad(images, edges), F.pad(seen, edges, value=True)
        return images, mask

    def _stage(self, stage: int, x: Tensor, mask: Tensor | None, rows: int | None) -> Tokens:
        """A map (B, C_in, H, W), `mask` (B, H, W) true where padded -> the tokens after this stage's blocks."""
        patches = cast(PatchEmbed, self.get_submodule(f"patch_embed{stage + 1}"))
        grid, prefix = patches.grid(x.shape[-2], x.shape[-1]), self._prefix(stage)
        padding = None if mask is None else patches.padding(mask)
        x = patches(x)
        if prefix:
            x = torch.cat([self.cls_token.expand(x.shape[0], -1, -1), x], dim=1)
        x = self.pos_drop(x + self.positions(stage, grid))
        stack = self._blocks(stage)
        for block in stack:
            asked = (rows,) if rows and block is stack[-1] else ()
            x = run_layer(block, x, grid, padding, *asked, checkpointing=self.grad_checkpointing)
        return Tokens(x, None, grid, prefix, padding)

    def _blocks(self, stage: int) -> list[nn.Module]:
        return list(cast(nn.ModuleList, self.get_submodule(f"block{stage + 1}")))

    def positions(self, stage: int, grid: tuple[int, int]) -> Tensor:
        """(1, P + N, C) of a stage, from 0, for this grid."""
        name = f"pos_embed{stage + 1}"
        table = self.position_tables()[name]
        return resize_positions(self.get_parameter(name), table.grid, grid, table.prefix, filter=table.filter)

    def forward_features(self, images: Tensor, mask: Tensor | None = None) -> Tokens:
        """images (B, C_in, H, W) -> the last stage's Tokens, x (B, 1 + N, C) normed."""
        tokens = self._through(images, mask, len(self.config.depths))[-1]
        return tokens._replace(x=self.norm(tokens.x))

    def _read(self, images: Tensor, mask: Tensor | None = None) -> Tokens:
        """The last block makes the class token alone, all that the head reads, where no hook looks at the rest.

        Not where dropout would draw otherwise in training, nor in classes made of this one, which say it themselves.
        """
        c, stages = self.config, len(self.config.depths)
        last = self._blocks(stages - 1)[-1]
        dropping = self.training and (c.proj_drop_rate or c.attn_drop_rate)
        known = type(self) is PyramidVisionTransformer and type(last) is Block and type(last.attn) is ReducedAttention
        if dropping or not known or is_hooked(last, self.norm):
            return self.forward_features(images, mask)
        tokens = self._through(images, mask, stages, rows=1)[-1]
        return tokens._replace(x=self.norm(tokens.x))

    def forward_head(self, x: Tokens, pre_logits: bool = False) -> Tensor:
        """Tokens of `forward_features` -> logits (B, K) of the class token, or (B, C) with `pre_logits`."""
        pooled = self.head_drop(x.x[:, 0])
        return pooled if pre_logits else self.head(pooled)

    def forward_heads(self, x: Tokens) -> tuple[Tensor, ...]:
        """A PVT has one head."""
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
        """Maps (B, C, h, w) after the stages named by `indices`, the last normed; its class token is its prefix.

        No stage is run beyond the last that is named.
        """
        wanted = self.feature_indices(indices)
        found = self._through(images, mask, max(wanted, default=-1) + 1)
        states = [found[i]._replace(x=self.norm(found[i].x)) if norm and self._prefix(i) else found[i] for i in wanted]
        return Features([state.on_grid()[0] for state in states], [state.x[:, : state.prefix] for state in states])

    # ---- care

    def reset_classifier(self, num_classes: int) -> None:
        """A new head for `num_classes` classes (0: none), initialised by its law; `classes` is emptied."""
        self.config, self.classes = replace(self.config, num_classes=num_classes), ()
        self.head = Linear(self.num_features, num_classes).to(self.cls_token) if num_classes else nn.Identity()
        init_leaf(self.head)

    @torch.no_grad()
    def init_weights(self) -> None:
        """Linear layers, positions, class token: `trunc_normal` of std 0.02; convolutions: PyTorch's own; norms: 1, 0.

        As the authors' code has it.
        """
        for module in self.modules():
            init_leaf(module)
            if isinstance(module, nn.Conv2d):
                module.reset_parameters()
        for name in (*self.position_tables(), "cls_token"):
            trunc_normal(self.get_parameter(name), 0.02)

    def position_tables(self) -> dict[str, PositionTable]:
        sizes = (self.get_submodule(f"patch_embed{stage + 1}") for stage in range(len(self.config.depths)))
        return {
            f"pos_embed{i + 1}": PositionTable(cast(PatchEmbed, patches).grid_size, self._prefix(i), filter="bilinear")
            for i, patches in enumerate(sizes)
        }

    def pixel_weights(self) -> list[str]:
        return ["patch_embed1.proj.weight"]

    def no_weight_decay(self) -> set[str]:
        return {*self.position_tables(), "cls_token"}

    def layer_groups(self) -> list[list[str]]:
        """The first patches, each block (the first of a stage with its patches and positions), then norm and head."""
        starts = [1 + sum(self.config.depths[:stage]) for stage in range(len(self.config.depths))]
        groups: list[list[str]] = [[] for _ in range(sum(self.config.depths) + 2)]
        for name, _ in self.named_parameters():
            groups[self._depth(name, starts)].append(name)
        return groups

    def _depth(self, name: str, starts: Sequence[int]) -> int:
        """Where a parameter stands in `layer_groups`; `starts` are the depths of the stages' first blocks."""
        part, _, rest = name.partition(".")
        word, stage = part.rstrip("0123456789"), int(part[-1]) - 1 if part[-1].isdigit() else -1
        if word == "block":
            return starts[stage] + int(rest.partition(".")[0])
        if word in ("patch_embed", "pos_embed"):
            return starts[stage] if stage else 0
        return starts[-1] if word == "cls_token" else -1

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        self.grad_checkpointing = enable
