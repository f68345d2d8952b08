"""What `transformers` calls the fields of our configs: a function a family, from a config here to its config.json."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from vitrail.layers.embed import pair

ACTIVATIONS = {"gelu": "gelu", "gelu_tanh": "gelu_pytorch_tanh", "relu": "relu", "quick_gelu": "quick_gelu"}


def _vit(c: Any) -> dict[str, Any]:
    if not (c.class_token and c.global_pool == "token" and c.pos_embed == "learn" and c.norm == "layernorm"):
        raise ValueError(
            "transformers' ViT has a class token, learned positions and LayerNorm; this network has not all"
        )
    if c.reg_tokens or c.qk_norm or c.init_values is not None or c.no_embed_class:
        raise ValueError("transformers' ViT has no registers, LayerScale or normed queries; this network has")
    return {
        "architectures": ["ViTForImageClassification"],
        "model_type": "vit",
        "hidden_size": c.embed_dim,
        "num_hidden_layers": c.depth,
        "num_attention_heads": c.num_heads,
        "intermediate_size": int(c.embed_dim * c.mlp_ratio),
        "hidden_act": ACTIVATIONS[c.act],
        "layer_norm_eps": c.norm_eps,
        "image_size": _square(c.img_size),
        "patch_size": _square(c.patch_size),
        "num_channels": c.in_chans,
        "qkv_bias": c.qkv_bias,
    }


def _square(size: Any) -> int | list[int]:
    height, width = pair(size)
    return height if height == width else [height, width]


def _swin(c: Any) -> dict[str, Any]:
    return {
        "architectures": ["SwinForImageClassification"],
        "model_type": "swin",
        "embed_dim": c.embed_dim,
        "depths": list(c.depths),
        "num_heads": list(c.num_heads),
        "window_size": _square(c.window_size),
        "mlp_ratio": c.mlp_ratio,
        "qkv_bias": c.qkv_bias,
        "layer_norm_eps": c.norm_eps,
        "image_size": _square(c.img_size),
        "patch_size": _square(c.patch_size),
        "num_channels": c.in_chans,
    }


def _pyramid(c: Any) -> dict[str, Any]:
    """What both PVTs share. Their one epsilon stands for our two."""
    return {
        "hidden_sizes": list(c.embed_dims),
        "depths": list(c.depths),
        "num_attention_heads": list(c.num_heads),
        "mlp_ratios": list(c.mlp_ratios),
        "qkv_bias": c.qkv_bias,
        "layer_norm_eps": c.norm_eps,
        "image_size": _square(c.img_size),
        "num_channels": c.in_chans,
    }


def _pvt(c: Any) -> dict[str, Any]:
    return _pyramid(c) | {
        "architectures": ["PvtForImageClassification"],
        "model_type": "pvt",
        "sequence_reduction_ratios": list(c.sr_ratios),
        "patch_sizes": [c.patch_size, 2, 2, 2],
    }


def _pvt_v2(c: Any) -> dict[str, Any]:
    return _pyramid(c) | {
        "architectures": ["PvtV2ForImageClassification"],
        "model_type": "pvt_v2",
        "sr_ratios": list(c.sr_ratios),
        "patch_sizes": [c.patch_size, 3, 3, 3],
        "strides": [c.stride, 2, 2, 2],
        "linear_attention": c.linear,
    }


CONFIGS: dict[str, Callable[[Any], dict[str, Any]]] = {"vit": _vit, "swin": _swin, "pvt": _pvt, "pvt_v2": _pvt_v2}
