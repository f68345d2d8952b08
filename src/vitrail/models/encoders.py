"""Encoders that others trained, as rows of the plain Vision Transformer.

    DINOv2   Oquab et al. 2023, 2304.07193; with registers Darcet et al. 2023, 2309.16588. LayerScale, patches of 14
    SigLIP   Zhai et al. 2023, 2303.15343. No class token, attention pooling (Zhai et al. 2022, 2106.04560)
    CLIP     Radford et al. 2021, 2103.00020. A norm before the blocks; OpenAI's weights want `quick_gelu`

Notable choices: names and keys are timm's. Rows without a head (0 classes) are timm's too; CLIP's head projects into
the space that it shares with text, with a bias of 0. SigLIP's so400m/14 of "384" pixels sees 378 of them. MAE's encoder
(He et al. 2022) is `vit_base_patch16_224`.
"""

from __future__ import annotations

from typing import Any

from vitrail.models.vit_config import ViTConfig

Kind = dict[str, Any]
DINOV2: Kind = dict(img_size=518, patch_size=14, init_values=1e-5, num_classes=0)
REGISTERS: Kind = DINOV2 | dict(reg_tokens=4, no_embed_class=True)
GIANT: Kind = dict(mlp="swiglu_packed", act="silu", mlp_ratio=2.66667 * 2)
SIGLIP: Kind = dict(class_token=False, global_pool="map", num_classes=0)
SO400M: Kind = SIGLIP | dict(mlp_ratio=3.7362)
CLIP: Kind = dict(pre_norm=True, norm_eps=1e-5)
OPENAI: Kind = CLIP | dict(act="quick_gelu")
TANH: Kind = dict(act="gelu_tanh")


def _row(dim: int, depth: int, heads: int, kind: Kind, **fields: Any) -> ViTConfig:
    return ViTConfig(embed_dim=dim, depth=depth, num_heads=heads, **{**kind, **fields})


# fmt: off
ENCODERS: dict[str, ViTConfig] = {
    #                                         width depth heads
    "vit_small_patch14_dinov2":            _row( 384, 12,  6, DINOV2),
    "vit_base_patch14_dinov2":             _row( 768, 12, 12, DINOV2),
    "vit_large_patch14_dinov2":            _row(1024, 24, 16, DINOV2),
    "vit_giant_patch14_dinov2":            _row(1536, 40, 24, DINOV2 | GIANT),
    "vit_small_patch14_reg4_dinov2":       _row( 384, 12,  6, REGISTERS),
    "vit_base_patch14_reg4_dinov2":        _row( 768, 12, 12, REGISTERS),
    "vit_large_patch14_reg4_dinov2":       _row(1024, 24, 16, REGISTERS),
    "vit_giant_patch14_reg4_dinov2":       _row(1536, 40, 24, REGISTERS | GIANT),
    "vit_base_patch16_siglip_224":         _row( 768, 12, 12, SIGLIP, img_size=224),
    "vit_base_patch16_siglip_256":         _row( 768, 12, 12, SIGLIP, img_size=256),
    "vit_base_patch16_siglip_384":         _row( 768, 12, 12, SIGLIP, img_size=384),
    "vit_base_patch16_siglip_512":         _row( 768, 12, 12, SIGLIP, img_size=512),
    "vit_base_patch32_siglip_256":         _row( 768, 12, 12, SIGLIP | TANH, img_size=256, patch_size=32),
    "vit_large_patch16_siglip_256":        _row(1024, 24, 16, SIGLIP, img_size=256),
    "vit_large_patch16_siglip_384":        _row(1024, 24, 16, SIGLIP, img_size=384),
    "vit_large_patch16_siglip_512":        _row(1024, 24, 16, SIGLIP | TANH, img_size=512),
    "vit_so400m_patch14_siglip_224":       _row(1152, 27, 16, SO400M, img_size=224, patch_size=14),
    "vit_so400m_patch14_siglip_378":       _row(1152, 27, 16, SO400M, img_size=378, patch_size=14),
    "vit_so400m_patch16_siglip_256":       _row(1152, 27, 16, SO400M | TANH, img_size=256),
    "vit_so400m_patch16_siglip_384":       _row(1152, 27, 16, SO400M | TANH, img_size=384),
    "vit_so400m_patch16_siglip_512":       _row(1152, 27, 16, SO400M | TANH, img_size=512),
    "vit_base_patch32_clip_224":           _row( 768, 12, 12, CLIP, patch_size=32),
    "vit_base_patch16_clip_224":           _row( 768, 12, 12, CLIP),
    "vit_large_patch14_clip_224":          _row(1024, 24, 16, CLIP, patch_size=14),
    "vit_large_patch14_clip_336":          _row(1024, 24, 16, CLIP, patch_size=14, img_size=336),
    "vit_huge_patch14_clip_224":           _row(1280, 32, 16, CLIP, patch_size=14),
    "vit_base_patch32_clip_quickgelu_224": _row( 768, 12, 12, OPENAI, patch_size=32, num_classes=512),
    "vit_base_patch16_clip_quickgelu_224": _row( 768, 12, 12, OPENAI, num_classes=512),
    "vit_large_patch14_clip_quickgelu_224": _row(1024, 24, 16, OPENAI, patch_size=14, num_classes=768),
    "vit_large_patch14_clip_quickgelu_336": _row(1024, 24, 16, OPENAI, patch_size=14, img_size=336, num_classes=768),
}
# fmt: on
