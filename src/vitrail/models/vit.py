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

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from vitrail.layers.attention import Attention, Layout
from vitrail.layers.blocks import BLOCKS, NORMS, GammaBlock, drop_path_rates, run_block
from vitrail.layers.embed import PatchEmbed, PatchLinear, check_mask, pair, resize_positions, sincos_2d
from vitrail.layers.init import init_leaf, trunc_normal
from vitrail.layers.linear import Linear, is_hooked
from vitrail.layers.local import LocalAttention
from vitrail.layers.prompts import PromptedBlock, init_prompts
from vitrail.layers.relative import PREFIX_ROWS, QVAttention, RelativeAttention
from vitrail.layers.rope import ROPES, Rope
from vitrail.layers.tokens import AttentionPool, mean_tokens, padding_bias
from vitrail.models.backbone import Backbone, FeatureInfo, Features, PositionTable, Tokens, drawn_once
from vitrail.models.config import choose
from vitrail.models.vit_config import ViTConfig
from vitrail.records import Preprocess

KNOWN_BLOCKS = {*BLOCKS.values(), GammaBlock, PromptedBlock}
KNOWN_ATTENTIONS = {Attention, QVAttention, RelativeAttention}
"""of these it is known that they make the first tokens alone, and those as if they had made all"""


class VisionTransformer(Backbone):
    """A plain, isotropic Vision Transformer; see the module's docstring for its shapes.

    Takes a `ViTConfig` or its fields. Raises `ValueError` where sizes do not divide, `TypeError` for unknown fields.
    """

    family = "vit"
    config_class: ClassVar[type[ViTConfig]] = ViTConfig
    prefix_names: ClassVar[tuple[str, ...]] = ("cls_token", "reg_token")
    """learned tokens before those of the image, in their order; each (1, n, C) or None"""

    def __init__(self, config: ViTConfig | None = None, **fields: Any) -> None:
        super().__init__()
        self.config = c = choose(self.config_class, config, fields)
        self.num_features = c.embed_dim
        self.preprocess = Preprocess(img_size=pair(c.img_size), mean=(0.5,) * c.in_chans, std=(0.5,) * c.in_chans)
        with drawn_once(self):
            self.patch_embed = self._make_patch_embed()
            self._make_prefix()
            self._make_positions()
            self.pos_drop = nn.Dropout(c.pos_drop_rate)
            self.norm_pre = NORMS[c.norm](c.embed_dim, eps=c.norm_eps) if c.pre_norm else nn.Identity()
            rates = drop_path_rates(c.drop_path_rate, 1 if c.shared_blocks else c.depth)
            self.blocks = nn.ModuleList(self._make_block(index, rate) for index, rate in enumerate(rates))
            self._make_head()
        self.grad_checkpointing = False
        rows, columns = self.patch_embed.patch_size
        names = ["blocks.0" if c.shared_blocks else f"blocks.{i}" for i in range(c.depth)]
        self.feature_info = [FeatureInfo(c.embed_dim, rows, name, columns) for name in names]

    @property
    def num_prefix_tokens(self) -> int:
        """P: class token, registers and the like."""
        return sum(token.shape[1] for token in self._prefix().values())

    def _prefix(self) -> dict[str, Tensor]:
        named = {name: getattr(self, name) for name in self.prefix_names}
        return {name: token for name, token in named.items() if token is not None}

    def _make_prefix(self) -> None:
        c = self.config
        self.cls_token = nn.Parameter(torch.empty(1, 1, c.embed_dim)) if c.class_token else None
        self.reg_token = nn.Parameter(torch.empty(1, c.reg_tokens, c.embed_dim)) if c.reg_tokens else None

    def _make_block(self, index: int, drop_path: float) -> nn.Module:
        c, parts = self.config, self._block_parts(index, drop_path)
        if c.deep_prompts and index:
            first = self.num_prefix_tokens - c.deep_prompts
            return PromptedBlock(**parts, init_values=c.init_values, prompts=c.deep_prompts, first=first)
        return BLOCKS[c.block](**parts, init_values=c.init_values)

    def _block_parts(self, index: int, drop_path: float) -> dict[str, Any]:
        """What blocks of every kind are made of."""
        c = self.config
        return dict(
            dim=c.embed_dim, num_heads=c.num_heads, mlp_ratio=c.mlp_ratio, qkv_bias=c.qkv_bias, qk_norm=c.qk_norm,
            proj_drop=c.proj_drop_rate, attn_drop=c.attn_drop_rate, drop_path=drop_path, norm=c.norm,
            norm_eps=c.norm_eps, act=c.act, attn=c.attn, mlp=c.mlp, attention=self._attention(index),
        )  # fmt: skip

    def _attention(self, index: int) -> Callable[..., nn.Module]:
        c = self.config
        if c.rel_pos_bias:
            return partial(RelativeAttention, grid=self.patch_embed.grid_size)
        if c.window_size and index not in c.global_blocks:
            return partial(LocalAttention, window=c.window_size)
        return Attention

    def _make_patch_embed(self) -> PatchEmbed:
        c = self.config
        return PatchEmbed(
            c.img_size, c.patch_size, c.in_chans, c.embed_dim,
            kind=c.embed, bias=not c.pre_norm, dynamic_pad=c.dynamic_pad,
        )  # fmt: skip

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
        patches = self.patch_embed(images if mask is None else images.masked_fill(mask[:, None], 0))
        grid = self.patch_embed.grid(images.shape[-2], images.shape[-1])
        prefix = [token.expand(images.shape[0], -1, -1) for token in self._prefix().values()]
        padding = None if mask is None else self.patch_embed.padding(mask)
        x = torch.cat([*prefix, patches], dim=1)
        return Tokens(
            x, self.positions(grid), grid, self.num_prefix_tokens, padding, rope=self.rotation(grid, x.device)
        )

    def rotation(self, grid: tuple[int, int], device: torch.device) -> Rope | None:
        """The rotary positions of a grid's image tokens; None for a model without."""
        c = self.config
        make = ROPES.get(c.rope)
        ref = None if c.ref_feat_shape is None else pair(c.ref_feat_shape)
        return None if make is None else make(grid, c.embed_dim // c.num_heads, device, ref)

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
        self._check_whole(tokens)
        seen: dict[int, Tensor] = {}
        bias = None if tokens.padding is None else padding_bias(tokens.padding, tokens.prefix, tokens.x.dtype)
        rope = None if tokens.rope is None else tokens.rope.behind(tokens.prefix)
        shown = tokens.shown
        layout = Layout(tokens.grid, tokens.prefix, query_index=shown, key_index=shown, readout=self._readout())
        run = partial(run_block, checkpointing=self.grad_checkpointing, bias=bias, layout=layout, rope=rope)
        stack = list(self.blocks) * (self.config.depth if self.config.shared_blocks else 1)
        for index in range(len(stack))[blocks]:
            x = self.norm_pre(tokens.x) if index == 0 else tokens.x
            tokens = tokens._replace(x=run(stack[index], x, rows=rows if index == len(stack) - 1 else None))
            if index in taps:
                seen[index] = tokens.x
        return tokens, seen

    def _check_whole(self, tokens: Tokens) -> None:
        if self.config.window_size and tokens.cells is not None:
            raise ValueError(
                f"windows are cut from a whole grid; got a choice of {tokens.cells.shape[1]} tokens: keep all, or "
                "take a network with window_size=0"
            )

    def _readout(self) -> tuple[int, ...]:
        """The rows that the head reads, () for the mean of the image tokens."""
        return (0,) if self.config.global_pool == "token" else ()

    def forward_features(self, images: Tensor, mask: Tensor | None = None) -> Tokens:
        """images (B, C_in, H, W) -> Tokens whose x (B, P + N, C) is normed unless the norm comes after pooling."""
        return self.encode(self.embed(images, mask))

    def _read(self, images: Tensor, mask: Tensor | None = None) -> Tokens:
        """The last block makes only the tokens that the head reads, where nothing and nobody looks at the rest.

        Not where dropout would draw otherwise in training or batch norm would take the mean of others.
        """
        rows = self._rows_read() if "_rows_read" in vars(type(self)) else None
        last = self.blocks[-1] if len(self.blocks) else self
        c, known = self.config, type(last) in KNOWN_BLOCKS and type(last.attn) in KNOWN_ATTENTIONS
        drawing = self.training and (c.proj_drop_rate or c.attn_drop_rate or c.norm == "batchnorm")
        if rows is None or drawing or not known or is_hooked(last, self.norm):
            return self.forward_features(images, mask)
        tokens = self._through(self.embed(images, mask), rows=rows)[0]
        return tokens._replace(x=self.norm(tokens.x))

    def _rows_read(self) -> int | None:
        """How many of the first rows are all that the head reads; None for more.

        It holds for the class that says it, not for those made of it: they may read more.
        """
        return 1 if self.config.global_pool == "token" else None

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
        like = next(self.patch_embed.parameters())
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
        | prompts of a block        | uniform, as `init_prompts` says        | VPT's code                 |
        | sin-cos positions         | the formula; zero for prefix rows      | MAE                        |
        | norms, LayerScale, biases | 1 and 0, `init_values`, 0              |                            |
        """
        for module in self.modules():
            init_leaf(module)
        for module in self.patch_embed.proj.modules():
            if isinstance(module, nn.Conv2d | PatchLinear):
                trunc_normal(module.weight, module.weight[0].numel() ** -0.5)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        if self.attn_pool is not None:
            trunc_normal(self.attn_pool.latent, self.num_features**-0.5)
        for token in self._prefix().values():
            nn.init.normal_(token, std=1e-6)
        for block in self.blocks:
            if isinstance(block, PromptedBlock):
                init_prompts(block.prompt, self.patch_embed.patch_size)
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
        grid, c = self.patch_embed.grid_size, self.config
        offsets = PositionTable(grid, PREFIX_ROWS, relative=True)
        tables = {name: offsets for name, _ in self.named_parameters() if name.endswith("relative_position_bias_table")}
        added = PositionTable(grid, 0 if c.no_embed_class else self.num_prefix_tokens)
        return ({"pos_embed": added} if c.pos_embed == "learn" else {}) | tables

    def pixel_weights(self) -> list[str]:
        return [f"patch_embed.{self.patch_embed.pixel_weight}"]

    def no_weight_decay(self) -> set[str]:
        names = {"pos_embed", "attn_pool.latent", *self.prefix_names, *self.position_tables()}
        return {name for name, _ in self.named_parameters() if name in names or name.endswith(".prompt")}

    def layer_groups(self) -> list[list[str]]:
        """Embedding, then each block, then norm, pooling and head."""
        groups: list[list[str]] = [[] for _ in range(len(self.blocks) + 2)]
        stem = ("patch_embed", "pos_embed", "norm_pre", *self.prefix_names)
        for name, _ in self.named_parameters():
            part, _, rest = name.partition(".")
            depth = int(rest.partition(".")[0]) + 1 if part == "blocks" else 0 if part in stem else -1
            groups[depth].append(name)
        return groups

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        self.grad_checkpointing = enable
