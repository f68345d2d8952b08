"""EVA-02 (Fang et al. 2023, 2303.11331) and DINOv3 (Siméoni et al. 2025, 2508.10104): rotary positions.

    image (B, C_in, H, W)
      patches, each projected                                   (B, N, C)
      [class, registers, patches]                               (B, P + N, C)
      depth × Block: queries and keys of patches are turned     (B, P + N, C)
      by where these stand (rotary positions)
      pool, norm, head                                          (B, K)

Notable choices: names and keys are timm's, which has both under EVA: blocks are BEiT's, without its bias tables. EVA-02
adds learned positions too and counts cells of the grid that it was pretrained with; DINOv3 adds none, and takes places
in -1 … 1, so that nothing is interpolated at another size. DINOv3 masks the bias of its keys: rows named `qkvb` have
biases of queries and values, the others (where all of them became 0) none. EVA-02's base and large rows have a
projection each for queries, keys and values, and norm within the gated layer.

Legend: `B` batch, `C_in` channels, `H`, `W` pixels, `P` prefix tokens, `N` image tokens, `C` width, `K` classes.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

from torch import nn

from vitrail.layers.embed import Size
from vitrail.layers.relative import SplitAttention
from vitrail.models.backbone import usual_preprocess
from vitrail.models.beit import Beit, BeitConfig
from vitrail.models.config import family_config
from vitrail.models.vit import VisionTransformer


@family_config
class EvaConfig(BeitConfig):
    """A Vision Transformer's fields, with EVA-02's defaults: EVA-02-S/14 at 224 pixels."""

    patch_size: Size = 14
    """pixels, or (height, width)"""
    num_classes: int = 0
    """0 leaves the head out"""
    embed_dim: int = 384
    num_heads: int = 6
    mlp_ratio: float = 16 / 3
    init_values: float | None = None
    """LayerScale's first value; None leaves LayerScale out"""
    pos_embed: Literal["learn", "sincos", "none"] = "learn"
    """positions added to the tokens"""
    rel_pos_bias: bool = False
    """a learned bias for each offset between two tokens"""
    rope: Literal["none", "axial", "dinov3"] = "axial"
    """rotary positions, EVA-02's or DINOv3's"""
    ref_feat_shape: Size | None = (16, 16)
    """the grid whose cells axial rotary positions count at any size; None: the grid at hand"""
    mlp: Literal["mlp", "swiglu_packed", "swiglu", "swiglu_normed"] = "swiglu_packed"
    """hidden layer, or a gated one, whose hidden width counts gate and value together (packed) or each; one normed"""
    act: Literal["gelu", "gelu_tanh", "quick_gelu", "relu", "silu"] = "silu"
    qkv_fused: bool = True
    """one projection for queries, keys and values; else one each"""

    def __post_init__(self) -> None:
        BeitConfig.__post_init__(self)
        beside = [name for name in ("rel_pos_bias", "window_size") if getattr(self, name)]
        if beside and not self.qkv_fused:
            raise ValueError(
                f"qkv_fused=False is for attention over the whole image by rotary positions; got also {beside[0]}="
                f"{getattr(self, beside[0])!r}: use qkv_fused=True"
            )


def _large(dim: int, depth: int, heads: int, **fields: Any) -> EvaConfig:
    kind: dict[str, Any] = dict(mlp="swiglu_normed", mlp_ratio=8 / 3, qkv_fused=False)
    return EvaConfig(embed_dim=dim, depth=depth, num_heads=heads, **kind, **fields)


def _dinov3(dim: int, depth: int, heads: int, **fields: Any) -> EvaConfig:
    kind: dict[str, Any] = dict(
        img_size=256, patch_size=16, reg_tokens=4, pos_embed="none", rope="dinov3", ref_feat_shape=None,
        init_values=1e-5, norm_eps=1e-5, fc_norm=False, mlp="mlp", act="gelu", mlp_ratio=4.0, qkv_bias=False,
    )  # fmt: skip
    return EvaConfig(embed_dim=dim, depth=depth, num_heads=heads, **{**kind, **fields})


GATED: dict[str, Any] = dict(mlp="swiglu", act="silu")
BIAS: dict[str, Any] = dict(qkv_bias=True)
# fmt: off
VARIANTS: dict[str, EvaConfig] = {
    "eva02_debug": EvaConfig(img_size=32, patch_size=8, embed_dim=48, depth=3, num_heads=3, num_classes=10),
    "eva02_tiny_patch14_224":  EvaConfig(embed_dim=192, num_heads=3),
    "eva02_tiny_patch14_336":  EvaConfig(embed_dim=192, num_heads=3, img_size=336, num_classes=1000),
    "eva02_small_patch14_224": EvaConfig(),
    "eva02_small_patch14_336": EvaConfig(img_size=336, num_classes=1000),
    "eva02_base_patch14_224":  _large( 768, 12, 12),
    "eva02_base_patch14_448":  _large( 768, 12, 12, img_size=448, num_classes=1000),
    "eva02_large_patch14_224": _large(1024, 24, 16),
    "eva02_large_patch14_448": _large(1024, 24, 16, img_size=448, num_classes=1000),
    #                                            width depth heads
    "vit_tiny_patch16_dinov3_qkvb":       _dinov3( 192, 12,  3, **BIAS),
    "vit_small_patch16_dinov3":           _dinov3( 384, 12,  6),
    "vit_small_patch16_dinov3_qkvb":      _dinov3( 384, 12,  6, **BIAS),
    "vit_small_plus_patch16_dinov3":      _dinov3( 384, 12,  6, **GATED),
    "vit_small_plus_patch16_dinov3_qkvb": _dinov3( 384, 12,  6, **GATED, **BIAS),
    "vit_base_patch16_dinov3":            _dinov3( 768, 12, 12),
    "vit_base_patch16_dinov3_qkvb":       _dinov3( 768, 12, 12, **BIAS),
    "vit_large_patch16_dinov3":           _dinov3(1024, 24, 16),
    "vit_large_patch16_dinov3_qkvb":      _dinov3(1024, 24, 16, **BIAS),
    "vit_huge_plus_patch16_dinov3":       _dinov3(1280, 32, 20, **GATED),
    "vit_huge_plus_patch16_dinov3_qkvb":  _dinov3(1280, 32, 20, **GATED, **BIAS),
    "vit_7b_patch16_dinov3":              _dinov3(4096, 40, 32, **GATED, mlp_ratio=2.0),
    # small images
    "eva02_tiny_patch4_32": EvaConfig(
        img_size=32, patch_size=4, embed_dim=192, depth=6, num_heads=3, num_classes=10, ref_feat_shape=None),
}
# fmt: on


class Eva(Beit):
    """A Vision Transformer that knows where tokens stand by turning their queries and keys.

    Takes an `EvaConfig` or its fields. Raises `ValueError` where sizes do not divide, `TypeError` for unknown fields.
    """

    family = "eva"
    config_class = EvaConfig
    _rows_read = VisionTransformer._rows_read

    def __init__(self, config: EvaConfig | None = None, **fields: Any) -> None:
        super().__init__(config, **fields)
        self.preprocess = usual_preprocess(self.config.img_size, self.config.in_chans)

    def _attention(self, index: int) -> Callable[..., nn.Module]:
        return super()._attention(index) if self.config.qkv_fused else SplitAttention
