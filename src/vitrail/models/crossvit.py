"""CrossViT: Chen, Fan, Panda 2021, "CrossViT: Cross-Attention Multi-Scale Vision Transformer", arXiv 2103.14899.

                   small branch, b = 0                  large branch, b = 1                  section 3.2, fig. 2
    image          as it is, patches of 12 pixels       resized by 14/15, patches of 16 pixels
    tokens         (B, 1 + N_0, C_0)                    (B, 1 + N_1, C_1)
    S × stage      few narrow Blocks                    many wide Blocks
      class token  (B, 1, C_0) -> (B, 1, C_1)           (B, 1, C_1) -> (B, 1, C_0)           section 3.3, fig. 4
      it attends   to itself and the N_1 large patches  to itself and the N_0 small patches
      and returns  (B, 1, C_1) -> (B, 1, C_0)           (B, 1, C_0) -> (B, 1, C_1)
    norm, head     of the class token, (B, K)           of the class token, (B, K)
    logits                               the mean of both

Patches of one branch never meet those of the other: only class tokens travel, which costs N and not N² products.

Notable choices: keys are timm's. A branch at scale 1 sees the image itself, which must divide into its patches; any
other branch sees it resized to the whole number of its patches nearest to `img_scale` times the image, which is timm's
size wherever timm has one. Other image sizes are met as in a ViT, by resizing positions; timm and the authors shrink
every image to the one size instead, which `dynamic_img_size=False` does. Attention layers count, stage by stage, the
small branch's Blocks, the large one's, the small class token's cross-attention, the large one's.

Legend: `B` batch, `C_in` channels, `H`, `W` pixels, `b` branch, `N` patches of a branch, `C` its width, `h`, `w` its
grid, `S` stages, `K` classes.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any, Literal, NamedTuple, cast

import torch
from torch import Tensor, nn

from vitrail.layers.attention import Kernel, Layout
from vitrail.layers.blocks import NORMS, Block, drop_path_rates, run_block
from vitrail.layers.cross import CrossAttentionBlock
from vitrail.layers.embed import Size, check_mask, pair, resize_positions
from vitrail.layers.init import init_leaf, trunc_normal
from vitrail.layers.linear import Linear
from vitrail.layers.tokens import mean_tokens, padding_bias
from vitrail.layers.views import ScaledPatchEmbed
from vitrail.models.backbone import Backbone, FeatureInfo, Features, PositionTable, Tokens, drawn_once, usual_preprocess
from vitrail.models.config import check_hidden, check_least, check_rates, choose, family_config
from vitrail.names import check_choice, shortened

BRANCHES = range(2)
WHOLE = ("patch_size", "embed_dim", "num_heads")


@family_config
class CrossViTConfig:
    """Every knob of a CrossViT; a field of two numbers has the small branch's first. Defaults are CrossViT-Ti."""

    img_size: Size = 240
    """pixels, or (height, width); other sizes work at run time"""
    img_scale: tuple[float, ...] = (1.0, 224 / 240)
    """how large each branch sees the image"""
    patch_size: tuple[int, ...] = (12, 16)
    """pixels of a branch's own view; patches are square"""
    in_chans: int = 3
    num_classes: int = 1000
    """0 leaves the heads out"""
    embed_dim: tuple[int, ...] = (96, 192)
    depth: tuple[tuple[int, ...], ...] = ((1, 4), (1, 4), (1, 4))
    """Blocks of each branch, stage by stage; every stage ends with one cross-attention each way"""
    num_heads: tuple[int, ...] = (3, 3)
    mlp_ratio: tuple[float, ...] = (4.0, 4.0)
    qkv_bias: bool = True
    multi_conv: bool = False
    """cut patches by three convolutions, not by one: the paper's † models"""
    crop_scale: bool = False
    """cut a smaller view out of the centre, not resize; its maps then lie on that centre, not on the whole image"""
    dynamic_img_size: bool = True
    """False resizes images of every size to those of `img_size`, as timm and the authors do"""
    global_pool: Literal["token", "avg"] = "token"
    """class tokens, or means of patches, which no longer learn from the last cross-attention"""
    drop_rate: float = 0.0
    """dropout before the heads"""
    pos_drop_rate: float = 0.0
    """dropout after positions are added"""
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
        object.__setattr__(self, "img_size", pair(self.img_size))
        for name in (*WHOLE, "img_scale", "mlp_ratio"):
            object.__setattr__(self, name, _both(name, getattr(self, name), whole=name in WHOLE))
        if not isinstance(self.depth, tuple | list) or not self.depth:
            raise ValueError(f"depth must be stages, such as ((1, 4), (1, 4), (1, 4)); got {shortened(self.depth)}")
        stages = tuple(_both("a stage of depth", stage, whole=True) for stage in self.depth)
        object.__setattr__(self, "depth", stages)
        check_choice("global_pool", self.global_pool, ("token", "avg"))
        check_least(self, {**dict.fromkeys(("img_size", *WHOLE, "depth", "in_chans"), 1), "num_classes": 0})
        check_rates(self)
        if min(self.img_scale) <= 0:
            raise ValueError(f"img_scale must be above 0; got {self.img_scale}: the published is (1.0, 14 / 15)")
        check_hidden(self, "embed_dim", "mlp_ratio")


def _both(name: str, value: Any, *, whole: bool) -> tuple[Any, ...]:
    numbers = tuple(value) if isinstance(value, tuple | list) else ()
    kinds = (int,) if whole else (int, float)
    if len(numbers) != 2 or not all(type(number) in kinds and math.isfinite(number) for number in numbers):
        wanted = f"two {'whole ' if whole else ''}numbers, the small branch's and the large one's"
        raise ValueError(f"{name} must be {wanted}; got {shortened(value)}")
    return numbers


def _row(size: int, dim: int, heads: int, depth: int, ratio: float, multi_conv: bool = False) -> CrossViTConfig:
    large = 224 / 240 if size == 240 else 384 / 408
    return CrossViTConfig(
        img_size=size, img_scale=(1.0, large), embed_dim=(dim, 2 * dim), num_heads=(heads, heads),
        depth=((1, depth),) * 3, mlp_ratio=(ratio, ratio), multi_conv=multi_conv,
    )  # fmt: skip


SMALL_IMAGES = CrossViTConfig(img_size=32, img_scale=(1.0, 30 / 32), patch_size=(4, 5), num_classes=10)
# fmt: off
VARIANTS: dict[str, CrossViTConfig] = {
    "crossvit_debug": replace(
        SMALL_IMAGES, embed_dim=(16, 32), depth=((1, 1), (1, 2)), num_heads=(2, 4), mlp_ratio=(2.0, 2.0)
    ),
    #                               img widths heads depth ratio
    "crossvit_tiny_240":       _row(240,   96,   3,   4,   4.0),
    "crossvit_small_240":      _row(240,  192,   6,   4,   4.0),
    "crossvit_base_240":       _row(240,  384,  12,   4,   4.0),
    "crossvit_9_240":          _row(240,  128,   4,   3,   3.0),
    "crossvit_15_240":         _row(240,  192,   6,   5,   3.0),
    "crossvit_18_240":         _row(240,  224,   7,   6,   3.0),
    "crossvit_9_dagger_240":   _row(240,  128,   4,   3,   3.0, multi_conv=True),
    "crossvit_15_dagger_240":  _row(240,  192,   6,   5,   3.0, multi_conv=True),
    "crossvit_18_dagger_240":  _row(240,  224,   7,   6,   3.0, multi_conv=True),
    "crossvit_15_dagger_408":  _row(408,  192,   6,   5,   3.0, multi_conv=True),
    "crossvit_18_dagger_408":  _row(408,  224,   7,   6,   3.0, multi_conv=True),
    # small images
    "crossvit_tiny_patch4_32": replace(SMALL_IMAGES, depth=((1, 2), (1, 2), (1, 2))),
}
# fmt: on
ALIASES = {
    row.replace("_240", "_224").replace("_408", "_384"): row for row in VARIANTS if row.endswith(("_240", "_408"))
}
"""the authors name the size that the large branch sees"""


class Sight(NamedTuple):
    """What attention must know about the tokens of a branch."""

    bias: Tensor | None
    """(B, 1, 1, 1 + N) -inf at patches that are padding; None where nothing is"""
    layout: Layout
    """where all tokens of the branch look at all of them"""
    asked: Layout
    """where the other branch's class token looks at itself and the patches"""


class MultiScaleBlock(nn.Module):
    """A stage: Blocks of each branch, then each class token asks the patches of the other: (B, 1 + N_b, C_b) twice."""

    def __init__(self, c: CrossViTConfig, depth: Sequence[int], rates: Sequence[float]) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.ModuleList(_block(c, b, rate) for rate in rates[: depth[b]]) for b in BRANCHES)
        self.projs = nn.ModuleList(_change(c.embed_dim[b], c.embed_dim[1 - b]) for b in BRANCHES)
        self.fusion = nn.ModuleList(_cross(c, 1 - b, rates[-1]) for b in BRANCHES)
        self.revert_projs = nn.ModuleList(_change(c.embed_dim[1 - b], c.embed_dim[b]) for b in BRANCHES)

    def forward(self, xs: Sequence[Tensor], sights: Sequence[Sight], checkpointing: bool = False) -> list[Tensor]:
        xs = [self._deepen(b, xs[b], sights[b], checkpointing) for b in BRANCHES]
        return [self._fuse(b, xs[b], xs[1 - b], sights[1 - b]) for b in BRANCHES]

    def _deepen(self, branch: int, x: Tensor, sight: Sight, checkpointing: bool) -> Tensor:
        for block in cast(nn.ModuleList, self.blocks[branch]):
            x = run_block(block, x, checkpointing=checkpointing, bias=sight.bias, layout=sight.layout)
        return x

    def _fuse(self, branch: int, x: Tensor, other: Tensor, sight: Sight) -> Tensor:
        """x (B, 1 + N, C) of `branch`, with a class token that has seen the patches of `other`."""
        asking = self.projs[branch](x[:, :1])  # (B, 1, the other's C)
        tokens = torch.cat([asking, other[:, 1:]], dim=1)
        told = self.fusion[branch](tokens, bias=sight.bias, layout=sight.asked)
        return torch.cat([self.revert_projs[branch](told), x[:, 1:]], dim=1)


def _patches(c: CrossViTConfig, branch: int) -> ScaledPatchEmbed:
    return ScaledPatchEmbed(
        c.img_size, c.patch_size[branch], c.in_chans, c.embed_dim[branch], scale=c.img_scale[branch],
        crop=c.crop_scale, fixed=not c.dynamic_img_size, stem=c.multi_conv, dynamic_pad=c.dynamic_pad,
    )  # fmt: skip


def _block(c: CrossViTConfig, branch: int, drop_path: float) -> Block:
    return Block(
        c.embed_dim[branch], c.num_heads[branch], mlp_ratio=c.mlp_ratio[branch], qkv_bias=c.qkv_bias,
        proj_drop=c.proj_drop_rate, attn_drop=c.attn_drop_rate, drop_path=drop_path, attn=c.attn,
    )  # fmt: skip


def _cross(c: CrossViTConfig, branch: int, drop_path: float) -> CrossAttentionBlock:
    return CrossAttentionBlock(
        c.embed_dim[branch], c.num_heads[branch], drop_path=drop_path, qkv_bias=c.qkv_bias,
        attn_drop=c.attn_drop_rate, proj_drop=c.proj_drop_rate, attn=c.attn,
    )  # fmt: skip


def _change(old: int, new: int) -> nn.Sequential:
    """From one width to another: f and g of section 3.3."""
    return nn.Sequential(NORMS["layernorm"](old), nn.GELU(), Linear(old, new))


# ---- the network


class CrossViT(Backbone):
    """Two Vision Transformers that exchange class tokens; see the module's docstring. Takes a config or its fields.

    Entry 2·s + b of `features` is branch b after stage s (timm lists all of branch 0 first), its class token the
    prefix. Raises `ValueError` where sizes do not divide, `TypeError` for unknown fields.
    """

    family = "crossvit"

    def __init__(self, config: CrossViTConfig | None = None, **fields: Any) -> None:
        super().__init__()
        self.config = c = choose(CrossViTConfig, config, fields)
        self.num_features, self.grad_checkpointing = sum(c.embed_dim), False
        self.preprocess = usual_preprocess(c.img_size, c.in_chans)
        with drawn_once(self):
            self.patch_embed = nn.ModuleList(_patches(c, b) for b in BRANCHES)
            for b, (embed, width) in enumerate(zip(self._embeds(), c.embed_dim, strict=True)):
                self.register_parameter(f"cls_token_{b}", nn.Parameter(torch.empty(1, 1, width)))
                self.register_parameter(f"pos_embed_{b}", nn.Parameter(torch.empty(1, 1 + embed.num_patches, width)))
            self.pos_drop = nn.Dropout(c.pos_drop_rate)
            self.blocks = nn.ModuleList(_make_stages(c))
            self.norm = nn.ModuleList(NORMS["layernorm"](width) for width in c.embed_dim)
            self.head_drop = nn.Dropout(c.drop_rate)
            self.head = _make_heads(c)
        (height, width), grids = pair(c.img_size), [embed.grid_size for embed in self._embeds()]
        self.feature_info = [
            FeatureInfo(c.embed_dim[b], height / grids[b][0], f"blocks.{stage}", width / grids[b][1])
            for stage in range(len(c.depth))
            for b in BRANCHES
        ]

    def _embeds(self) -> list[ScaledPatchEmbed]:
        return [cast(ScaledPatchEmbed, embed) for embed in self.patch_embed]

    # ---- image -> tokens -> features -> logits

    def _embed(self, images: Tensor, mask: Tensor | None) -> list[Tokens]:
        """images (B, C_in, H, W) -> the tokens of each branch, their positions added; padded pixels count as zeros."""
        check_mask(mask, images)
        images = images if mask is None else images.masked_fill(mask[:, None], 0)
        return [self._embed_branch(b, images, mask) for b in BRANCHES]

    def _embed_branch(self, branch: int, images: Tensor, mask: Tensor | None) -> Tokens:
        embed = self._embeds()[branch]
        patches = embed(images)
        grid = embed.grid(*embed.size(images))
        token, table = self.get_parameter(f"cls_token_{branch}"), self.get_parameter(f"pos_embed_{branch}")
        x = torch.cat([token.expand(images.shape[0], -1, -1), patches], dim=1)  # (B, 1 + N, C)
        positions = resize_positions(table, embed.grid_size, grid, prefix=1)
        padding = None if mask is None else embed.padding(mask)
        return Tokens(x, positions, grid, 1, padding).placed(self.pos_drop)

    def _through(
        self, branches: Sequence[Tokens], stages: int | None = None, taps: Sequence[int] = ()
    ) -> tuple[list[Tensor], dict[int, Tensor]]:
        """Each branch's x after so many stages, or all; and what entries `taps` of `features` are made of."""
        xs = [tokens.x for tokens in branches]
        seen: dict[int, Tensor] = {}
        sights = [self._sight(b, tokens) for b, tokens in enumerate(branches)]
        for index, stage in enumerate(list(self.blocks)[:stages]):
            xs = stage(xs, sights, self.grad_checkpointing)
            seen |= {2 * index + b: xs[b] for b in BRANCHES if 2 * index + b in taps}
        return xs, seen

    def _sight(self, branch: int, tokens: Tokens) -> Sight:
        shown, readout = tokens.shown, (0,) if self.config.global_pool == "token" else ()
        place = partial(Layout, tokens.grid, 1, key_index=shown, branch=branch)
        bias = None if tokens.padding is None else padding_bias(tokens.padding, 1, tokens.x.dtype)
        return Sight(bias, place(query_index=shown, readout=readout), place(readout=(0,)))

    def forward_features(self, images: Tensor, mask: Tensor | None = None) -> tuple[Tokens, ...]:
        """images (B, C_in, H, W) -> the normed tokens of each branch, x (B, 1 + N, C)."""
        branches = self._embed(images, mask)
        xs, _ = self._through(branches)
        return tuple(tokens._replace(x=self.norm[b](xs[b])) for b, tokens in enumerate(branches))

    def forward_heads(self, x: Sequence[Tokens]) -> tuple[Tensor, ...]:
        """What `forward_features` returned -> the small branch's logits (B, K) and the large one's."""
        return tuple(head(pooled) for head, pooled in zip(self.head, self._pool(x), strict=True))

    def forward_head(self, x: Sequence[Tokens], pre_logits: bool = False) -> Tensor:
        """The mean of both heads' logits (B, K); with `pre_logits`, or without heads, what they take (B, C_0 + C_1)."""
        if pre_logits or isinstance(self.get_classifier(), nn.Identity):
            return torch.cat(self._pool(x), dim=1)
        return torch.stack(self.forward_heads(x)).mean(0)

    def _pool(self, branches: Sequence[Tokens]) -> list[Tensor]:
        if self.config.global_pool == "token":
            return [self.head_drop(tokens.x[:, 0]) for tokens in branches]
        return [self.head_drop(mean_tokens(tokens.x[:, 1:], tokens.padding)) for tokens in branches]

    def get_classifier(self) -> nn.Module:
        return self.head[0]

    def features(
        self,
        images: Tensor,
        indices: Sequence[int] | int | None = None,
        norm: bool = True,
        mask: Tensor | None = None,
    ) -> Features:
        """The patches of both branches after each stage, as maps (B, C, h, w), their class tokens (B, 1, C) as prefix.

        No stage is run beyond the last that is named.
        """
        wanted = self.feature_indices(indices)
        branches = self._embed(images, mask)
        _, seen = self._through(branches, max(wanted, default=-1) // 2 + 1, wanted)
        states = [self.norm[i % 2](seen[i]) if norm else seen[i] for i in wanted]
        grids = [branches[i % 2].grid for i in wanted]
        maps = [x[:, 1:].transpose(1, 2).unflatten(2, grid) for x, grid in zip(states, grids, strict=True)]
        return Features(maps, [x[:, :1] for x in states])

    # ---- care

    def reset_classifier(self, num_classes: int) -> None:
        """New heads for `num_classes` classes (0: none), initialised by their law; `classes` is emptied."""
        self.config, self.classes = replace(self.config, num_classes=num_classes), ()
        self.head = _make_heads(self.config).to(self.get_parameter("cls_token_0"))
        for head in self.head:
            init_leaf(head)

    @torch.no_grad()
    def init_weights(self) -> None:
        """Fills every parameter by these laws, all of them the authors'.

        | what                        | law                                                    |
        |-----------------------------|--------------------------------------------------------|
        | linear weights              | truncated normal, std 0.02                             |
        | class tokens and positions  | truncated normal, std 0.02                             |
        | convolutions, their biases  | uniform within 1 / sqrt(fan in), PyTorch's own         |
        | norms, other biases         | 1 and 0, 0                                             |
        """
        for module in self.modules():
            init_leaf(module)
            if isinstance(module, nn.Conv2d):
                module.reset_parameters()
        for b in BRANCHES:
            trunc_normal(self.get_parameter(f"cls_token_{b}"), 0.02)
            trunc_normal(self.get_parameter(f"pos_embed_{b}"), 0.02)

    def position_tables(self) -> dict[str, PositionTable]:
        return {f"pos_embed_{b}": PositionTable(embed.grid_size, 1) for b, embed in enumerate(self._embeds())}

    def pixel_weights(self) -> list[str]:
        first = "proj.0.weight" if self.config.multi_conv else "proj.weight"
        return [f"patch_embed.{b}.{first}" for b in BRANCHES]

    @property
    def cell(self) -> int:
        return self.config.patch_size[0]  # what the other branch sees is resized to whole patches of its own

    def no_weight_decay(self) -> set[str]:
        return {f"{name}_{b}" for name in ("cls_token", "pos_embed") for b in BRANCHES}

    def layer_groups(self) -> list[list[str]]:
        """Embeddings, then each stage, then norms and heads."""
        groups: list[list[str]] = [[] for _ in range(len(self.blocks) + 2)]
        for name, _ in self.named_parameters():
            part, _, rest = name.partition(".")
            stem = part.startswith(("patch_embed", "cls_token", "pos_embed"))
            groups[int(rest.partition(".")[0]) + 1 if part == "blocks" else 0 if stem else -1].append(name)
        return groups

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        self.grad_checkpointing = enable


def _make_stages(c: CrossViTConfig) -> list[MultiScaleBlock]:
    """Stages whose drop-path rates grow with the Blocks of the deeper branch; cross-attention has its stage's last."""
    counts = [max(stage) for stage in c.depth]
    rates = drop_path_rates(c.drop_path_rate, sum(counts))
    starts = [sum(counts[:i]) for i in range(len(counts))]
    return [MultiScaleBlock(c, c.depth[i], rates[start : start + counts[i]]) for i, start in enumerate(starts)]


def _make_heads(c: CrossViTConfig) -> nn.ModuleList:
    return nn.ModuleList(Linear(width, c.num_classes) if c.num_classes else nn.Identity() for width in c.embed_dim)
