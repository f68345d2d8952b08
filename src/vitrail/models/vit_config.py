"""What a Vision Transformer can be: its config, and the published plain ones as rows of a table.

    ViTConfig(...) ── VisionTransformer ──> a network       every field says what it builds; ranges are checked here

Rows are timm's, Dosovitskiy et al. 2021 (table 1) and Touvron et al. 2021 (Ti, S); the encoders that others trained
with other aims stand in `encoders`.
"""

from __future__ import annotations

from typing import Literal

from vitrail.layers.attention import Kernel
from vitrail.layers.blocks import ACTIVATIONS, BLOCKS, MLPS, NORMS
from vitrail.layers.embed import PROJECTIONS, Size, pair
from vitrail.layers.rope import ROPES
from vitrail.models.config import check_epsilons, check_hidden, check_least, check_numbers, check_rates, family_config
from vitrail.names import check_choice

PAIRS = ("img_size", "patch_size")
LEAST = {
    **dict.fromkeys((*PAIRS, "embed_dim", "depth", "num_heads", "in_chans"), 1),
    **dict.fromkeys(("num_classes", "reg_tokens", "deep_prompts", "window_size"), 0),
}
BESIDE_WINDOWS = ("class_token", "reg_tokens", "rel_pos_bias", "shared_blocks")
"""what a network with windows cannot have"""
WORDS: dict[str, tuple[str, ...]] = {
    "pos_embed": ("learn", "sincos", "none"),
    "rope": ("none", *ROPES),
    "embed": tuple(PROJECTIONS),
    "global_pool": ("token", "avg", "map"),
    "block": tuple(BLOCKS),
    "mlp": tuple(MLPS),
    "norm": tuple(NORMS),
    "act": tuple(ACTIVATIONS),
}
"""what each field of words may be"""


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
    deep_prompts: int = 0
    """how many of the registers, the last ones, every block but the first has of its own (Jia et al. 2022, VPT-deep)"""
    no_embed_class: bool = False
    """class and register tokens get no position"""
    pos_embed: Literal["learn", "sincos", "none"] = "learn"
    """positions added to the tokens"""
    rope: Literal["none", "axial", "dinov3"] = "none"
    """rotary positions, EVA-02's or DINOv3's"""
    ref_feat_shape: Size | None = None
    """the grid whose cells axial rotary positions count at any size; None: the grid at hand"""
    rel_pos_bias: bool = False
    """a learned bias for each offset between two tokens (BEiT)"""
    embed: Literal["conv", "linear", "overlap", "stem"] = "conv"
    """how patches are projected"""
    global_pool: Literal["token", "avg", "map"] = "token"
    """class token, mean of image tokens, or attention pooling"""
    fc_norm: bool | None = None
    """norm after pooling, not before; None: only for mean pooling"""
    pre_norm: bool = False
    """norm before the first block, and no bias of the patch projection (CLIP)"""
    block: Literal["prenorm", "postnorm", "respostnorm"] = "prenorm"
    """where a block norms: before each branch, after each sum, after each branch"""
    norm: Literal["layernorm", "rmsnorm", "batchnorm"] = "layernorm"
    norm_eps: float = 1e-6
    """CLIP has 1e-5, transformers' ViT 1e-12"""
    mlp: Literal["mlp", "swiglu_packed", "swiglu", "swiglu_normed"] = "mlp"
    """hidden layer, or a gated one, whose hidden width counts gate and value together (packed) or each; one normed"""
    act: Literal["gelu", "gelu_tanh", "quick_gelu", "relu", "silu"] = "gelu"
    shared_blocks: bool = False
    """one block, run `depth` times (Lan et al. 2020, ALBERT)"""
    window_size: int = 0
    """side of the windows that blocks look into, in tokens (ViTDet); 0: every block looks at the whole image"""
    global_blocks: tuple[int, ...] = ()
    """numbers, from 0, of the blocks that look at the whole image nevertheless"""
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
        if self.ref_feat_shape is not None:
            object.__setattr__(self, "ref_feat_shape", pair(self.ref_feat_shape))
        check_numbers(self, "global_blocks", "blocks by their numbers, such as (2, 5, 8, 11), or () for none")
        for name, allowed in WORDS.items():
            check_choice(name, getattr(self, name), allowed)
        check_least(self, LEAST)
        check_rates(self)
        check_epsilons(self)
        check_hidden(self, "embed_dim", "mlp_ratio")
        if self.global_pool == "token" and not self.class_token:
            raise ValueError("global_pool 'token' needs class_token=True; got False: use global_pool='avg' or 'map'")
        self._check_leaves()
        self._check_prompts()
        self._check_windows()

    def _check_leaves(self) -> None:
        head_dim = self.embed_dim // self.num_heads
        if self.rope != "none" and head_dim % 4:
            raise ValueError(
                "rope turns pairs of channels by rows and columns: embed_dim / num_heads must be divisible by 4; got "
                f"{self.embed_dim} / {self.num_heads} = {head_dim}"
            )
        if self.mlp != "mlp" and self.act != "silu":
            raise ValueError(f"mlp {self.mlp!r} is gated by act='silu'; got act={self.act!r}: give both, or mlp='mlp'")
        if self.shared_blocks and self.drop_path_rate:
            raise ValueError(
                "drop_path_rate grows from block to block, and shared_blocks=True has but one; got "
                f"{self.drop_path_rate}: use 0"
            )

    def _check_prompts(self) -> None:
        if self.deep_prompts > self.reg_tokens:
            raise ValueError(
                f"deep_prompts must be at most reg_tokens, whose rows they take; got {self.deep_prompts} of "
                f"{self.reg_tokens}"
            )
        if self.deep_prompts and (self.block != "prenorm" or self.shared_blocks):
            raise ValueError(
                "deep_prompts are for blocks that norm before each branch, each its own; got "
                f"block={self.block!r}, shared_blocks={self.shared_blocks}: use reg_tokens alone"
            )

    def _check_windows(self) -> None:
        outside = [i for i in self.global_blocks if not 0 <= i < self.depth]
        if outside or (self.global_blocks and not self.window_size):
            raise ValueError(
                f"global_blocks must name blocks, 0 … {self.depth - 1}, of a network with window_size > 0; got "
                f"{self.global_blocks} with window_size {self.window_size}"
            )
        beside = [name for name in BESIDE_WINDOWS if getattr(self, name)]
        if self.window_size and beside:
            raise ValueError(
                f"window_size > 0 is for image tokens alone, in blocks of their own; got also {', '.join(beside)}: use "
                "class_token=False, global_pool='avg' and the like"
            )


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
