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


CONFIGS: dict[str, Callable[[Any], dict[str, Any]]] = {"vit": _vit}
