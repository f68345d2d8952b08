"""CaiT: Touvron et al. 2021, "Going deeper with Image Transformers", arXiv 2103.17239.

    image (B, C_in, H, W)
      patches, each projected, + positions    (B, N, C)
      depth × Block                           (B, N, C)         talking heads, among image tokens alone
      class token                             (B, 1, C)
      depth_token_only × ClassBlock           (B, 1, C)         the class token looks at itself and all image tokens
      [class, patches] normed, class, head    (B, K)

Self-attention need not serve two ends at once: the first layers relate patches, the last ones only gather for the class
token what they found, and leave the patches as they are (section 3). Every residual branch begins next to nothing,
multiplied channel by channel with a learned γ (LayerScale, section 2), so that deep networks can be trained.

Notable choices: names and keys are timm's; stochastic depth has one rate for all blocks, and neither it nor dropout is
in the class blocks, as in the authors' code; any image size is taken at run time, positions resized from the learned
grid.

Legend: `B` batch, `C_in` channels, `H`, `W` pixels, `P` rows that somebody put before the image tokens, `N` image
tokens, `C` width, `K` classes, `A` heads, `D` head width, `h`, `w` token grid.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn

from vitrail.layers.attention import Attention, Kernel, Layout, attend, check_heads
from vitrail.layers.blocks import NORMS, DropPath, Mlp, run_block
from vitrail.layers.embed import PatchEmbed, Size, check_mask, pair, resize_positions
from vitrail.layers.init import init_leaf, trunc_normal
from vitrail.layers.linear import Linear, is_hooked
from vitrail.layers.talking import Mix
from vitrail.layers.tokens import mean_tokens, padding_bias
from vitrail.models.backbone import (
    Backbone,
    FeatureInfo,
    Features,
    PositionTable,
    Tokens,
    drawn_once,
    usual_preprocess,
)
from vitrail.models.config import check_hidden, check_least, check_rates, choose, family_config
from vitrail.names import check_choice

PAIRS = ("img_size", "patch_size")
POSITIVE = (*PAIRS, "embed_dim", "depth", "depth_token_only", "num_heads", "in_chans")
LEAST = {**dict.fromkeys(POSITIVE, 1), "num_classes": 0}


@family_config
class CaiTConfig:
    """Every knob of a CaiT. Defaults are CaiT-XXS24 at 224 pixels."""

    img_size: Size = 224
    """pixels, or (height, width); other sizes work at run time"""
    patch_size: Size = 16
    """pixels, or (height, width)"""
    in_chans: int = 3
    num_classes: int = 1000
    """0 leaves the head out"""
    embed_dim: int = 192
    depth: int = 24
    """blocks of self-attention among image tokens"""
    depth_token_only: int = 2
    """blocks of class attention"""
    num_heads: int = 4
    mlp_ratio: float = 4.0
    mlp_ratio_token_only: float = 4.0
    """in blocks of class attention"""
    qkv_bias: bool = True
    init_values: float = 1e-5
    """LayerScale's first value: the paper takes 0.1 up to 18 blocks, 1e-5 for 24, 1e-6 for more"""
    global_pool: Literal["token", "avg"] = "token"
    """class token, or mean of image tokens, which class attention leaves as they are"""
    drop_rate: float = 0.0
    """dropout before the head"""
    pos_drop_rate: float = 0.0
    """dropout after positions are added"""
    proj_drop_rate: float = 0.0
    """dropout after every projection in a self-attention block"""
    attn_drop_rate: float = 0.0
    """dropout of self-attention weights, after heads are mixed"""
    drop_path_rate: float = 0.0
    """stochastic depth, the same in every self-attention block"""
    dynamic_pad: bool = False
    """pad images that do not divide into patches"""
    attn: Kernel = "auto"
    """kernel of class attention: auto, fused (SDPA), eager (matmul and softmax); none but eager knows talking heads"""

    def __post_init__(self) -> None:
        for name in PAIRS:
            object.__setattr__(self, name, pair(getattr(self, name)))
        check_choice("global_pool", self.global_pool, ("token", "avg"))
        check_least(self, LEAST)
        check_rates(self)
        for name in ("mlp_ratio", "mlp_ratio_token_only"):
            check_hidden(self, "embed_dim", name)


def _row(
    size: int, dim: int, depth: int, heads: int, gamma: float, *, patch: int = 16, classes: int = 1000
) -> CaiTConfig:
    return CaiTConfig(
        img_size=size, patch_size=patch, embed_dim=dim, depth=depth, num_heads=heads, init_values=gamma,
        num_classes=classes,
    )  # fmt: skip


# fmt: off
VARIANTS: dict[str, CaiTConfig] = {
    #                           img  width depth heads γ at first
    "cait_debug":          _row( 32,   48,    2,    3, 0.1, patch=8, classes=10),
    "cait_xxs24_224":      _row(224,  192,   24,    4, 1e-5),
    "cait_xxs24_384":      _row(384,  192,   24,    4, 1e-5),
    "cait_xxs36_224":      _row(224,  192,   36,    4, 1e-5),
    "cait_xxs36_384":      _row(384,  192,   36,    4, 1e-5),
    "cait_xs24_384":       _row(384,  288,   24,    6, 1e-5),
    "cait_s24_224":        _row(224,  384,   24,    8, 1e-5),
    "cait_s24_384":        _row(384,  384,   24,    8, 1e-5),
    "cait_s36_384":        _row(384,  384,   36,    8, 1e-6),
    "cait_m36_384":        _row(384,  768,   36,   16, 1e-6),
    "cait_m48_448":        _row(448,  768,   48,   16, 1e-6),
    # small images
    "cait_xxs_patch4_32":  _row( 32,  192,    8,    4, 0.1, patch=4, classes=10),
}
# fmt: on


class TalkingHeads(Attention):
    """Self-attention whose heads are mixed before and after the softmax: (B, N, C) -> (B, N, C).

    `proj_l` and `proj_w` are (A, A): Shazeer et al. 2020, "Talking-Heads Attention".
    """

    def __init__(self, dim: int, num_heads: int, **options: Any) -> None:
        super().__init__(dim, num_heads, **options)
        self.proj_l = Linear(num_heads, num_heads)
        self.proj_w = Linear(num_heads, num_heads)

    def mix(self) -> Mix:
        """The softmax removes what the bias of `proj_l` adds; a gradient of zero spares others the question."""
        before = self.proj_l.weight + 0 * self.proj_l.bias[:, None]
        return Mix(before, self.proj_w.weight, self.proj_w.bias)


class Block(nn.Module):
    """One layer of self-attention with LayerScale (eq. 4): (B, N, C) -> (B, N, C)."""

    def __init__(self, c: CaiTConfig) -> None:
        super().__init__()
        self.norm1 = NORMS["layernorm"](c.embed_dim)
        self.attn = TalkingHeads(
            c.embed_dim, c.num_heads, qkv_bias=c.qkv_bias, attn_drop=c.attn_drop_rate, proj_drop=c.proj_drop_rate,
            attn=c.attn,
        )  # fmt: skip
        self.drop_path = DropPath(c.drop_path_rate)
        self.norm2 = NORMS["layernorm"](c.embed_dim)
        self.mlp = Mlp(c.embed_dim, int(c.embed_dim * c.mlp_ratio), drop=c.proj_drop_rate)
        self.gamma_1 = nn.Parameter(torch.empty(c.embed_dim))
        self.gamma_2 = nn.Parameter(torch.empty(c.embed_dim))

    def forward(self, x: Tensor, *, bias: Tensor | None = None, layout: Layout | None = None) -> Tensor:
        x = torch.addcmul(x, self.gamma_1, self.drop_path(self.attn(self.norm1(x), bias=bias, layout=layout)))
        return torch.addcmul(x, self.gamma_2, self.drop_path(self.mlp(self.norm2(x))))


class ClassAttention(nn.Module):
    """The first token looks at all, itself among them (eq. 5 to 7): (B, 1 + N, C) -> (B, 1, C)."""

    def __init__(self, dim: int, num_heads: int, *, qkv_bias: bool = True, attn: Kernel = "auto") -> None:
        super().__init__()
        check_heads(dim, num_heads, attn)
        self.num_heads, self.attn = num_heads, attn
        self.q = Linear(dim, dim, bias=qkv_bias)
        self.k = Linear(dim, dim, bias=qkv_bias)
        self.v = Linear(dim, dim, bias=qkv_bias)
        self.proj = Linear(dim, dim)

    def forward(self, x: Tensor, *, bias: Tensor | None = None, layout: Layout | None = None) -> Tensor:
        q, k, v = (
            part.unflatten(2, (self.num_heads, -1)).transpose(1, 2)  # (B, A, 1 or 1 + N, D)
            for part in (self.q(x[:, :1]), self.k(x), self.v(x))
        )
        x = attend(q, k, v, bias=bias, layout=layout, kernel=self.attn)
        return self.proj(x.transpose(1, 2).flatten(2))  # (B, 1, C)


class ClassBlock(nn.Module):
    """One layer of class attention with LayerScale: the class token (B, 1, C) -> (B, 1, C), from `tokens` (B, N, C)."""

    def __init__(self, c: CaiTConfig) -> None:
        super().__init__()
        self.norm1 = NORMS["layernorm"](c.embed_dim)
        self.attn = ClassAttention(c.embed_dim, c.num_heads, qkv_bias=c.qkv_bias, attn=c.attn)
        self.norm2 = NORMS["layernorm"](c.embed_dim)
        self.mlp = Mlp(c.embed_dim, int(c.embed_dim * c.mlp_ratio_token_only))
        self.gamma_1 = nn.Parameter(torch.empty(c.embed_dim))
        self.gamma_2 = nn.Parameter(torch.empty(c.embed_dim))

    def forward(self, x: Tensor, *, tokens: Tensor, bias: Tensor | None = None, layout: Layout | None = None) -> Tensor:
        seen = self.norm1(torch.cat([x, tokens], dim=1))  # (B, 1 + N, C)
        x = torch.addcmul(x, self.gamma_1, self.attn(seen, bias=bias, layout=layout))
        return torch.addcmul(x, self.gamma_2, self.mlp(self.norm2(x)))


class CaiT(Backbone):
    """Class-attention in image transformers; see the module's docstring for its shapes.

    Takes a `CaiTConfig` or its fields. Raises `ValueError` where sizes do not divide, `TypeError` for unknown fields.
    """

    family = "cait"

    def __init__(self, config: CaiTConfig | None = None, **fields: Any) -> None:
        super().__init__()
        self.config = c = choose(CaiTConfig, config, fields)
        self.num_features, self.grad_checkpointing = c.embed_dim, False
        self.preprocess = usual_preprocess(c.img_size, c.in_chans)
        with drawn_once(self):
            self.patch_embed = PatchEmbed(c.img_size, c.patch_size, c.in_chans, c.embed_dim, dynamic_pad=c.dynamic_pad)
            self.cls_token = nn.Parameter(torch.empty(1, 1, c.embed_dim))
            self.pos_embed = nn.Parameter(torch.empty(1, self.patch_embed.num_patches, c.embed_dim))
            self.pos_drop = nn.Dropout(c.pos_drop_rate)
            self.blocks = nn.ModuleList(Block(c) for _ in range(c.depth))
            self.blocks_token_only = nn.ModuleList(ClassBlock(c) for _ in range(c.depth_token_only))
            self.norm = NORMS["layernorm"](c.embed_dim)
            self.head_drop = nn.Dropout(c.drop_rate)
            self.head = Linear(c.embed_dim, c.num_classes) if c.num_classes else nn.Identity()
        rows, columns = pair(c.patch_size)
        self.feature_info = [FeatureInfo(c.embed_dim, rows, f"blocks.{i}", columns) for i in range(c.depth)]

    # ---- image -> tokens -> features -> logits

    def embed(self, images: Tensor, mask: Tensor | None = None) -> Tokens:
        """images (B, C_in, H, W) -> Tokens without a prefix.

        `mask` (B, H, W) is true where a pixel is padding, and counts as zero.
        """
        check_mask(mask, images)
        patches = self.patch_embed(images if mask is None else images.masked_fill(mask[:, None], 0))
        grid = self.patch_embed.grid(images.shape[-2], images.shape[-1])
        padding = None if mask is None else self.patch_embed.padding(mask)
        return Tokens(patches, resize_positions(self.pos_embed, self.patch_embed.grid_size, grid), grid, 0, padding)

    def encode(
        self, tokens: Tokens, keep: Tensor | None = None, *, blocks: slice = slice(None), norm: bool = True
    ) -> Tokens:
        """Positions and self-attention for the image tokens named by `keep` (B, K); with `norm`, class attention too.

        `norm=False` leaves the end out, so that `encode(encode(t, blocks=slice(k), norm=False), blocks=slice(k, None))`
        is `encode(t)`. The end puts the class token first and counts it in `prefix`.
        """
        tokens = self._through(tokens, keep, blocks)[0]
        return self._with_class(tokens) if norm else tokens

    def _through(
        self, tokens: Tokens, keep: Tensor | None = None, blocks: slice = slice(None), taps: Sequence[int] = ()
    ) -> tuple[Tokens, dict[int, Tensor]]:
        """The tokens after the last of the self-attention `blocks`, and their x after each of them in `taps`."""
        tokens = tokens.placed(self.pos_drop)
        tokens = tokens if keep is None else tokens.kept(keep)
        seen: dict[int, Tensor] = {}
        shown = tokens.shown
        bias = None if tokens.padding is None else padding_bias(tokens.padding, tokens.prefix, tokens.x.dtype)
        layout = Layout(tokens.grid, tokens.prefix, query_index=shown, key_index=shown, readout=())
        run = partial(run_block, checkpointing=self.grad_checkpointing, bias=bias, layout=layout)
        for index in range(len(self.blocks))[blocks]:
            tokens = tokens._replace(x=run(self.blocks[index], tokens.x))
            if index in taps:
                seen[index] = tokens.x
        return tokens, seen

    def _with_class(self, tokens: Tokens) -> Tokens:
        """The class token made by class attention, then all tokens that it was made of, normed: (B, 1 + P + N, C)."""
        prefix = 1 + tokens.prefix
        bias = None if tokens.padding is None else padding_bias(tokens.padding, prefix, tokens.x.dtype)
        layout = Layout(tokens.grid, prefix=1, key_prefix=prefix, key_index=tokens.shown, readout=(0,))
        x = self.cls_token.repeat(tokens.x.shape[0], 1, 1)  # FlopCounterMode takes no view of a parameter
        for block in self.blocks_token_only:
            look = partial(block, tokens=tokens.x)
            x = run_block(look, x, checkpointing=self.grad_checkpointing, bias=bias, layout=layout)
        return tokens._replace(x=self.norm(torch.cat([x, tokens.x], dim=1)), prefix=prefix)

    def forward_features(self, images: Tensor, mask: Tensor | None = None) -> Tokens:
        """images (B, C_in, H, W) -> Tokens whose x (B, 1 + N, C) is normed, the class token first."""
        return self.encode(self.embed(images, mask))

    def _read(self, images: Tensor, mask: Tensor | None = None) -> Tokens:
        """No class attention where the head reads image tokens alone and no hook looks at it; subclasses run whole."""
        spared = type(self) is CaiT and self.config.global_pool == "avg"
        if not spared or is_hooked(self.blocks_token_only, self.norm):
            return self.forward_features(images, mask)
        tokens = self.encode(self.embed(images, mask), norm=False)
        return tokens._replace(x=self.norm(tokens.x))

    def forward_head(self, x: Tokens, pre_logits: bool = False) -> Tensor:
        """Tokens of `forward_features` or `encode` -> logits (B, K), or (B, C) with `pre_logits`."""
        token = self.config.global_pool == "token"
        pooled = self.head_drop(x.x[:, 0] if token else mean_tokens(x.x[:, x.prefix :], x.padding))
        return pooled if pre_logits else self.head(pooled)

    def forward_heads(self, x: Tokens) -> tuple[Tensor, ...]:
        """A CaiT has one head: the logits (B, K) of what `forward_features` returned."""
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
        """Image tokens after the self-attention blocks named by `indices`, as maps (B, C, h, w); no prefix tokens.

        No block is run beyond the last that is named.
        """
        wanted = self.feature_indices(indices)
        tokens = self.embed(images, mask)
        seen = self._through(tokens, blocks=slice(max(wanted, default=-1) + 1), taps=wanted)[1]
        states = [self.norm(seen[i]) if norm else seen[i] for i in wanted]
        maps = [x.transpose(1, 2).unflatten(2, tokens.grid) for x in states]
        return Features(maps, [x[:, :0] for x in states])

    # ---- care

    def reset_classifier(self, num_classes: int) -> None:
        """A new head for `num_classes` classes (0: none), initialised by its law; `classes` is emptied."""
        like = self.patch_embed.proj.weight
        self.config, self.classes = replace(self.config, num_classes=num_classes), ()
        self.head = Linear(self.num_features, num_classes).to(like) if num_classes else nn.Identity()
        init_leaf(self.head)

    @torch.no_grad()
    def init_weights(self) -> None:
        """Fills every parameter by these laws.

        | what                       | law                                    | source                                |
        |----------------------------|----------------------------------------|---------------------------------------|
        | patch projection           | truncated normal, std 1 / sqrt(fan in) | LeCun 1998; ViT's JAX code            |
        | every other linear weight  | truncated normal, std 0.02             | DeiT (Touvron et al. 2021), as CaiT's |
        | positions, class token     | truncated normal, std 0.02             | the authors' code                     |
        | γ of every residual branch | `init_values`                          | section 2 of the paper                |
        | norms, biases              | 1 and 0, 0                             |                                       |
        """
        for module in self.modules():
            init_leaf(module)
            if isinstance(module, Block | ClassBlock):
                for gamma in (module.gamma_1, module.gamma_2):
                    nn.init.constant_(gamma, self.config.init_values)
        projection = self.patch_embed.proj
        trunc_normal(projection.weight, projection.weight[0].numel() ** -0.5)
        if projection.bias is not None:
            nn.init.zeros_(projection.bias)
        for table in (self.pos_embed, self.cls_token):
            trunc_normal(table, 0.02)

    def position_tables(self) -> dict[str, PositionTable]:
        return {"pos_embed": PositionTable(self.patch_embed.grid_size)}

    def pixel_weights(self) -> list[str]:
        return ["patch_embed.proj.weight"]

    def no_weight_decay(self) -> set[str]:
        return {"pos_embed", "cls_token"}

    def layer_groups(self) -> list[list[str]]:
        """Embedding, each block, each class block (the class token enters with the first), then norm and head."""
        first = 1 + len(self.blocks)
        starts = {"patch_embed": 0, "pos_embed": 0, "blocks": 1, "cls_token": first, "blocks_token_only": first}
        groups: list[list[str]] = [[] for _ in range(first + len(self.blocks_token_only) + 1)]
        for name, _ in self.named_parameters():
            part, _, rest = name.partition(".")
            number = rest.partition(".")[0]
            groups[starts.get(part, -1) + (int(number) if part.startswith("blocks") else 0)].append(name)
        return groups

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        self.grad_checkpointing = enable
