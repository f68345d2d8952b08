"""Vision Transformer: Dosovitskiy et al. 2021, "An Image is Worth 16x16 Words", arXiv 2010.11929.

    image (B, C_in, H, W)
      patches, each projected                 (B, N, C)         eq. 1
      [class, registers, patches] + positions (B, P + N, C)
      depth × Block                           (B, P + N, C)     eq. 2, 3
      norm, pool, head                        (B, K)            eq. 4

Notable choices: names and keys are timm's; positions are added in `encode`, after `keep` could choose among them;
mean pooling leaves the prefix out and norms after pooling (`fc_norm`), as timm does; any image size is taken at run
time, its positions resized from the learned grid.

Legend: `B` batch, `C_in` channels, `H`, `W` pixels, `P` prefix tokens (class, registers), `N` image tokens, `C` width,
`K` classes, `h`, `w` token grid.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn

from vitrail.layers.attention import Attention, Kernel, Layout
from vitrail.layers.blocks import ACTIVATIONS, NORMS, Block, drop_path_rates, is_hooked, run_block
from vitrail.layers.embed import PROJECTIONS, PatchEmbed, Size, check_mask, pair, resize_positions, sincos_2d
from vitrail.layers.init import init_leaf, trunc_normal
from vitrail.layers.linear import Linear
from vitrail.layers.tokens import AttentionPool, mean_tokens, padding_bias
from vitrail.models.backbone import Backbone, FeatureInfo, Features, PositionTable, Tokens, drawn_once
from vitrail.models.config import check_least, check_rates, choose, family_config
from vitrail.names import check_choice
from vitrail.records import Preprocess

PAIRS = ("img_size", "patch_size")
LEAST = {**dict.fromkeys((*PAIRS, "embed_dim", "depth", "num_heads", "in_chans"), 1), "num_classes": 0, "reg_tokens": 0}


@family_config
class ViTConfig:
    """Every knob of a Vision Transformer. Defaults are ViT-B/16 at 224 pixels."""

    img_size: Size = 224
    """pixels, or (height, width); other sizes work at run time"""
    patch_size: Size = 16
    """pixels, or (height, width)"""
    in_chans: int = 3
    num_classes: int = 1000
    """0 leaves the head out"""
    embed_dim: int = 768
    depth: int = 12
    num_heads: int = 12
    mlp_ratio: float = 4.0
    qkv_bias: bool = True
    qk_norm: bool = False
    """norm queries and keys per head"""
    init_values: float | None = None
    """LayerScale's first value; None leaves LayerScale out"""
    class_token: bool = True
    reg_tokens: int = 0
    """registers (Darcet et al. 2024)"""
    no_embed_class: bool = False
    """class and register tokens get no position"""
    pos_embed: Literal["learn", "sincos", "none"] = "learn"
    embed: Literal["conv", "linear"] = "conv"
    """how patches are projected"""
    global_pool: Literal["token", "avg", "map"] = "token"
    """class token, mean of image tokens, or attention pooling"""
    fc_norm: bool | None = None
    """norm after pooling, not before; None: only for mean pooling"""
    norm: Literal["layernorm", "rmsnorm"] = "layernorm"
    norm_eps: float = 1e-6
    """CLIP has 1e-5, transformers' ViT 1e-12"""
    act: Literal["gelu", "gelu_tanh", "relu"] = "gelu"
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
    """pad images that do not divide into patches"""
    attn: Kernel = "auto"
    """attention kernel: auto, fused (SDPA), eager (matmul and softmax)"""

    def __post_init__(self) -> None:
        for name in PAIRS:
            object.__setattr__(self, name, pair(getattr(self, name)))
        words = {"pos_embed": ("learn", "sincos", "none"), "global_pool": ("token", "avg", "map")}
        tables = {"embed": tuple(PROJECTIONS), "norm": tuple(NORMS), "act": tuple(ACTIVATIONS)}
        for name, allowed in (words | tables).items():
            check_choice(name, getattr(self, name), allowed)
        check_least(self, LEAST)
        check_rates(self)
        if int(self.embed_dim * self.mlp_ratio) < 1:
            raise ValueError(f"mlp_ratio must leave a hidden width of at least 1; got {self.mlp_ratio}: the usual is 4")
        if self.global_pool == "token" and not self.class_token:
            raise ValueError("global_pool 'token' needs class_token=True; got False: use global_pool='avg' or 'map'")


def _row(size: int, patch: int, dim: int, depth: int, heads: int, ratio: float = 4.0, classes: int = 1000) -> ViTConfig:
    return ViTConfig(
        img_size=size, patch_size=patch, embed_dim=dim, depth=depth, num_heads=heads, mlp_ratio=ratio,
        num_classes=classes,
    )  # fmt: skip


# fmt: off
VARIANTS: dict[str, ViTConfig] = {
    #                                    img  patch  width depth heads
    "vit_debug":                    _row( 32,     8,   48,    3,    3, classes=10),
    "vit_tiny_patch16_224":         _row(224,    16,  192,   12,    3),
    "vit_tiny_patch16_384":         _row(384,    16,  192,   12,    3),
    "vit_small_patch16_224":        _row(224,    16,  384,   12,    6),
    "vit_small_patch32_224":        _row(224,    32,  384,   12,    6),
    "vit_small_patch16_384":        _row(384,    16,  384,   12,    6),
    "vit_small_patch32_384":        _row(384,    32,  384,   12,    6),
    "vit_small_depth6_patch16_224": _row(224,    16,  384,    6,    6),
    "vit_base_patch16_224":         _row(224,    16,  768,   12,   12),
    "vit_base_patch32_224":         _row(224,    32,  768,   12,   12),
    "vit_base_patch16_384":         _row(384,    16,  768,   12,   12),
    "vit_base_patch32_384":         _row(384,    32,  768,   12,   12),
    "vit_large_patch16_224":        _row(224,    16, 1024,   24,   16),
    "vit_large_patch32_224":        _row(224,    32, 1024,   24,   16),
    "vit_large_patch16_384":        _row(384,    16, 1024,   24,   16),
    "vit_large_patch32_384":        _row(384,    32, 1024,   24,   16),
    "vit_huge_patch14_224":         _row(224,    14, 1280,   32,   16),
    # small images
    "vit_tiny_patch4_32":           _row( 32,     4,  192,    6,    3, classes=10),
    "vit_tiny_mlp1_patch4_32":      _row( 32,     4,  192,    6,    3, ratio=1.0, classes=10),
    "vit_small_patch4_32":          _row( 32,     4,  256,    7,    4, classes=10),
    "vit_base_patch4_32":           _row( 32,     4,  512,    8,    8, classes=10),
    "vit_nano_patch8_64":           _row( 64,     8,  128,    6,    4, classes=10),
}
# fmt: on


class VisionTransformer(Backbone):
    """A plain, isotropic Vision Transformer; see the module's docstring for its shapes.

    Takes a `ViTConfig` or its fields. Raises `ValueError` where sizes do not divide, `TypeError` for unknown fields.
    """

    family = "vit"

    def __init__(self, config: ViTConfig | None = None, **fields: Any) -> None:
        super().__init__()
        self.config = c = choose(ViTConfig, config, fields)
        self.num_features, self.num_prefix_tokens = c.embed_dim, int(c.class_token) + c.reg_tokens
        self.preprocess = Preprocess(img_size=pair(c.img_size), mean=(0.5,) * c.in_chans, std=(0.5,) * c.in_chans)
        with drawn_once(self):
            self.patch_embed = self._make_patch_embed()
            self.cls_token = nn.Parameter(torch.empty(1, 1, c.embed_dim)) if c.class_token else None
            self.reg_token = nn.Parameter(torch.empty(1, c.reg_tokens, c.embed_dim)) if c.reg_tokens else None
            self._make_positions()
            self.pos_drop = nn.Dropout(c.pos_drop_rate)
            self.blocks = nn.ModuleList(_block(c, rate) for rate in drop_path_rates(c.drop_path_rate, c.depth))
            self._make_head()
        self.grad_checkpointing = False
        rows, columns = self.patch_embed.patch_size
        self.feature_info = [FeatureInfo(c.embed_dim, rows, f"blocks.{i}", columns) for i in range(c.depth)]

    def _make_patch_embed(self) -> PatchEmbed:
        c = self.config
        return PatchEmbed(c.img_size, c.patch_size, c.in_chans, c.embed_dim, kind=c.embed, dynamic_pad=c.dynamic_pad)

    def _make_positions(self) -> None:
        c = self.config
        rows = self.patch_embed.num_patches + (0 if c.no_embed_class else self.num_prefix_tokens)
        table = torch.empty(1, rows, c.embed_dim)
        self.pos_embed: Tensor | None
        if c.pos_embed == "sincos":
            self.register_buffer("pos_embed", table, persistent=False)
        else:
            self.pos_embed = nn.Parameter(table) if c.pos_embed == "learn" else None

    def _make_head(self) -> None:
        c = self.config
        make_norm = partial(NORMS[c.norm], eps=c.norm_eps)
        late = c.global_pool == "avg" if c.fc_norm is None else c.fc_norm
        self.norm = nn.Identity() if late else make_norm(c.embed_dim)
        pool = partial(AttentionPool, c.embed_dim, c.num_heads, mlp_ratio=c.mlp_ratio, act=c.act, attn=c.attn)
        self.attn_pool = pool(norm=c.norm, norm_eps=c.norm_eps) if c.global_pool == "map" else None
        self.fc_norm = make_norm(c.embed_dim) if late else nn.Identity()
        self.head_drop = nn.Dropout(c.drop_rate)
        self.head = Linear(c.embed_dim, c.num_classes) if c.num_classes else nn.Identity()

    # ---- image -> tokens -> features -> logits

    def embed(self, images: Tensor, mask: Tensor | None = None) -> Tokens:
        """images (B, C_in, H, W) -> Tokens; `mask` (B, H, W) is true where a pixel is padding, and counts as zero."""
        check_mask(mask, images)
        patches = self.patch_embed(images if mask is None else images.masked_fill(mask[:, None].bool(), 0))
        grid = self.patch_embed.grid(images.shape[-2], images.shape[-1])
        prefix = [t.expand(images.shape[0], -1, -1) for t in (self.cls_token, self.reg_token) if t is not None]
        padding = None if mask is None else self.patch_embed.padding(mask)
        return Tokens(torch.cat([*prefix, patches], dim=1), self.positions(grid), grid, self.num_prefix_tokens, padding)

    def positions(self, grid: tuple[int, int]) -> Tensor | None:
        """(1, P + N, C) for this grid, zero where a token has no position; None for a model without positions."""
        if self.pos_embed is None:
            return None
        bare = self.config.no_embed_class
        pos = resize_positions(self.pos_embed, self.patch_embed.grid_size, grid, 0 if bare else self.num_prefix_tokens)
        return nn.functional.pad(pos, (0, 0, self.num_prefix_tokens, 0)) if bare else pos

    def encode(
        self, tokens: Tokens, keep: Tensor | None = None, *, blocks: slice = slice(None), norm: bool = True
    ) -> Tokens:
        """Positions, blocks and norm: tokens -> tokens, for the image tokens named by `keep` (B, K) alone.

        `keep` counts the image tokens that are there, from 0. A part of the blocks may be run, so that
        `encode(encode(t, blocks=slice(k), norm=False), blocks=slice(k, None))` is `encode(t)`.
        """
        tokens = self._through(tokens, keep, blocks)[0]
        return tokens._replace(x=self.norm(tokens.x)) if norm else tokens

    def _through(
        self,
        tokens: Tokens,
        keep: Tensor | None = None,
        blocks: slice = slice(None),
        taps: Sequence[int] = (),
        rows: int | None = None,
    ) -> tuple[Tokens, dict[int, Tensor]]:
        """The tokens after the last of `blocks`, the first `rows` of them, and their x after each block in `taps`."""
        tokens = tokens.placed(self.pos_drop)
        tokens = tokens if keep is None else tokens.kept(keep)
        x, seen = tokens.x, {}
        bias = None if tokens.padding is None else padding_bias(tokens.padding, tokens.prefix, x.dtype)
        readout = (0,) if self.config.global_pool == "token" else ()
        shown = tokens.shown
        layout = Layout(tokens.grid, tokens.prefix, query_index=shown, key_index=shown, readout=readout)
        run = partial(run_block, checkpointing=self.grad_checkpointing, bias=bias, layout=layout)
        stack = list(self.blocks)
        for index in range(len(stack))[blocks]:
            x = run(stack[index], x, rows=rows if index == len(stack) - 1 else None)
            if index in taps:
                seen[index] = x
        return tokens._replace(x=x), seen

    def forward_features(self, images: Tensor, mask: Tensor | None = None) -> Tokens:
        """images (B, C_in, H, W) -> Tokens whose x (B, P + N, C) is normed unless the norm comes after pooling."""
        return self.encode(self.embed(images, mask))

    def _read(self, images: Tensor, mask: Tensor | None = None) -> Tokens:
        """The last block makes only the class token, where that is all the head reads and no hook looks at the rest.

        Not where dropout would draw otherwise in training, nor in families that may read more: they say it themselves.
        """
        c = self.config
        dropping = self.training and (c.proj_drop_rate or c.attn_drop_rate)
        last = self.blocks[-1] if type(self) is VisionTransformer and len(self.blocks) else self
        known = type(last) is Block and type(last.attn) is Attention
        if c.global_pool != "token" or dropping or not known or is_hooked(last, self.norm):
            return self.forward_features(images, mask)
        tokens = self._through(self.embed(images, mask), rows=1)[0]
        return tokens._replace(x=self.norm(tokens.x))

    def forward_head(self, x: Tokens, pre_logits: bool = False) -> Tensor:
        """Tokens of `forward_features` or `encode` -> logits (B, K), or (B, C) with `pre_logits`."""
        pooled = self.head_drop(self.fc_norm(self._pool(x)))
        return pooled if pre_logits else self.head(pooled)

    def _pool(self, tokens: Tokens) -> Tensor:
        if self.config.global_pool == "token":
            return tokens.x[:, 0]
        x, padding = tokens.x[:, tokens.prefix :], tokens.padding
        if self.attn_pool is None:
            return mean_tokens(x, padding)
        bias = None if padding is None else padding_bias(padding, 0, x.dtype)
        layout = Layout(tokens.grid, prefix=1, key_prefix=0, key_index=tokens.shown, readout=(0,))
        return self.attn_pool(x, bias=bias, layout=layout)

    def forward_heads(self, x: Tokens) -> tuple[Tensor, ...]:
        """A plain ViT has one head: the logits (B, K) of what `forward_features` returned."""
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
        """Tokens after the blocks named by `indices`, as maps (B, C, h, w) and prefix tokens (B, P, C).

        No block is run beyond the last that is named.
        """
        wanted = self.feature_indices(indices)
        tokens = self.embed(images, mask)
        seen = self._through(tokens, blocks=slice(max(wanted, default=-1) + 1), taps=wanted)[1]
        states = [self.norm(seen[i]) if norm else seen[i] for i in wanted]
        maps = [x[:, tokens.prefix :].transpose(1, 2).unflatten(2, tokens.grid) for x in states]
        return Features(maps, [x[:, : tokens.prefix] for x in states])

    # ---- care

    def reset_classifier(self, num_classes: int) -> None:
        """A new head for `num_classes` classes (0: none), initialised by its law; `classes` is emptied."""
        like = self.patch_embed.proj.weight
        self.config, self.classes = replace(self.config, num_classes=num_classes), ()
        self.head = Linear(self.num_features, num_classes).to(like) if num_classes else nn.Identity()
        init_leaf(self.head)

    @torch.no_grad()
    def init_weights(self) -> None:
        """Fills every parameter and derived buffer by these laws.

        | what                      | law                                    | source                     |
        |---------------------------|----------------------------------------|----------------------------|
        | patch projection          | truncated normal, std 1 / sqrt(fan in) | LeCun 1998; ViT's JAX code |
        | every other linear weight | truncated normal, std 0.02             | DeiT (Touvron et al. 2021) |
        | attention pooling's query | truncated normal, std 1 / sqrt(C)      | timm                       |
        | learned positions         | truncated normal, std 0.02             | ViT, appendix D.4          |
        | class and register tokens | normal, std 1e-6                       | timm                       |
        | sin-cos positions         | the formula; zero for prefix rows      | MAE                        |
        | norms, LayerScale, biases | 1 and 0, `init_values`, 0              |                            |
        """
        for module in self.modules():
            init_leaf(module)
        projection = self.patch_embed.proj
        trunc_normal(projection.weight, projection.weight[0].numel() ** -0.5)
        if projection.bias is not None:
            nn.init.zeros_(projection.bias)
        if self.attn_pool is not None:
            trunc_normal(self.attn_pool.latent, self.num_features**-0.5)
        for token in (self.cls_token, self.reg_token):
            if token is not None:
                nn.init.normal_(token, std=1e-6)
        self._init_positions()

    def _init_positions(self) -> None:
        if self.pos_embed is None:
            return
        if self.config.pos_embed == "learn":
            trunc_normal(self.pos_embed, 0.02)
        else:
            waves = sincos_2d(self.patch_embed.grid_size, self.num_features)
            prefix = self.pos_embed.shape[1] - waves.shape[1]
            self.pos_embed.copy_(nn.functional.pad(waves, (0, 0, prefix, 0)))

    def position_tables(self) -> dict[str, PositionTable]:
        if self.config.pos_embed != "learn":
            return {}
        prefix = 0 if self.config.no_embed_class else self.num_prefix_tokens
        return {"pos_embed": PositionTable(self.patch_embed.grid_size, prefix)}

    def pixel_weights(self) -> list[str]:
        return ["patch_embed.proj.weight"]

    def no_weight_decay(self) -> set[str]:
        names = ("pos_embed", "cls_token", "reg_token", "attn_pool.latent")
        return {name for name, _ in self.named_parameters() if name in names}

    def layer_groups(self) -> list[list[str]]:
        """Embedding, then each block, then norm, pooling and head."""
        groups: list[list[str]] = [[] for _ in range(len(self.blocks) + 2)]
        stem = ("patch_embed", "cls_token", "reg_token", "pos_embed")
        for name, _ in self.named_parameters():
            part, _, rest = name.partition(".")
            depth = int(rest.partition(".")[0]) + 1 if part == "blocks" else 0 if part in stem else -1
            groups[depth].append(name)
        return groups

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        self.grad_checkpointing = enable


def _block(c: ViTConfig, drop_path: float) -> Block:
    return Block(
        c.embed_dim, c.num_heads, mlp_ratio=c.mlp_ratio, qkv_bias=c.qkv_bias, qk_norm=c.qk_norm,
        init_values=c.init_values, proj_drop=c.proj_drop_rate, attn_drop=c.attn_drop_rate, drop_path=drop_path,
        norm=c.norm, norm_eps=c.norm_eps, act=c.act, attn=c.attn,
    )  # fmt: skip
