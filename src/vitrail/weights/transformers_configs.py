"""What `transformers` calls the fields of our configs: a function a family, from a config here to its config.json."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields
from typing import Any

from vitrail.layers.embed import pair
from vitrail.models.vit_config import ViTConfig

ACTIVATIONS = {"gelu": "gelu", "gelu_tanh": "gelu_pytorch_tanh", "relu": "relu", "quick_gelu": "quick_gelu"}

SAID = {
    "img_size", "patch_size", "in_chans", "num_classes", "embed_dim", "depth", "num_heads", "mlp_ratio", "qkv_bias",
    "norm_eps", "act", "drop_rate", "pos_drop_rate", "proj_drop_rate", "attn_drop_rate", "drop_path_rate",
    "dynamic_pad", "attn",
}  # fmt: skip
"""fields of a ViT that its `config.json` says, or that change no answer of a trained network"""


def _vit(c: Any) -> dict[str, Any]:
    plain = ViTConfig()
    for name in (f.name for f in fields(plain) if f.name not in SAID):
        if getattr(c, name) != getattr(plain, name):
            raise ValueError(
                f"transformers' ViT knows no {name}={getattr(c, name)!r}: write this network as timm or vitrail do"
            )
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


def _deit(c: Any) -> dict[str, Any]:
    if not c.distilled:
        raise ValueError(
            "transformers' DeiT has a distillation token, and this network has none (distilled=False): write it as "
            "timm or vitrail do"
        )
    return _vit(c) | {"architectures": ["DeiTForImageClassificationWithTeacher"], "model_type": "deit"}


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
    """What both PVTs share. They have one epsilon for all norms."""
    if c.norm_eps != c.conv_norm_eps:
        raise ValueError(
            f"transformers' PVT has one epsilon; this network has norm_eps={c.norm_eps} and conv_norm_eps="
            f"{c.conv_norm_eps}: make it with both alike, which changes answers by a few millionths"
        )
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
    if c.patch_size != 4:
        raise ValueError(f"transformers' PVT has patches of 4 pixels; this network has {c.patch_size}")
    return _pyramid(c) | {
        "architectures": ["PvtForImageClassification"],
        "model_type": "pvt",
        "sequence_reduction_ratios": list(c.sr_ratios),
        "patch_sizes": [c.patch_size, 2, 2, 2],
        "strides": [c.patch_size, 2, 2, 2],
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


CONFIGS: dict[str, Callable[[Any], dict[str, Any]]] = {
    "vit": _vit,
    "deit": _deit,
    "swin": _swin,
    "pvt": _pvt,
    "pvt_v2": _pvt_v2,
}
