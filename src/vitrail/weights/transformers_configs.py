"""What `transformers` calls the fields of our configs: a function a family, from a config here to its config.json.

Tables of names are read in the other direction by `transformers_networks`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields
from typing import Any

from vitrail.layers.embed import pair
from vitrail.models.swin import SwinConfig, stage_grids
from vitrail.models.vit_config import ViTConfig

HIDDEN_ACTS = {
    "gelu": "gelu",
    "gelu_tanh": "gelu_pytorch_tanh",
    "relu": "relu",
    "quick_gelu": "quick_gelu",
    "silu": "silu",
}

PLAIN = {
    "hidden_size": "embed_dim",
    "num_hidden_layers": "depth",
    "num_attention_heads": "num_heads",
    "layer_norm_eps": "norm_eps",
    "image_size": "img_size",
    "patch_size": "patch_size",
    "num_channels": "in_chans",
}
"""what isotropic networks call our fields"""
SWIN = {
    **{name: name for name in ("embed_dim", "depths", "num_heads", "window_size", "mlp_ratio", "qkv_bias")},
    "layer_norm_eps": "norm_eps",
    "image_size": "img_size",
    "patch_size": "patch_size",
    "num_channels": "in_chans",
}
SWIN_EPS = 1e-5
"""of the norms of patches and of merging in transformers' Swin, whatever `layer_norm_eps` is; networks here have one"""
PYRAMID = {
    "hidden_sizes": "embed_dims",
    "depths": "depths",
    "num_attention_heads": "num_heads",
    "mlp_ratios": "mlp_ratios",
    "qkv_bias": "qkv_bias",
    "layer_norm_eps": "norm_eps",
    "image_size": "img_size",
    "num_channels": "in_chans",
}
"""what both PVTs call our fields"""
PVT = PYRAMID | {"sequence_reduction_ratios": "sr_ratios"}
PVT_V2 = PYRAMID | {"sr_ratios": "sr_ratios", "linear_attention": "linear"}
PAIRS = ("img_size", "patch_size", "window_size")


class Unsaid(ValueError):
    """What another library has no word for; `mend` is what would help, beside another layout."""

    def __init__(self, reason: str, mend: str = "") -> None:
        super().__init__(f"{reason}: {mend}" if mend else reason)
        self.mend = mend


SAID = {
    "img_size", "patch_size", "in_chans", "num_classes", "embed_dim", "depth", "num_heads", "mlp_ratio", "qkv_bias",
    "norm_eps", "act", "drop_rate", "pos_drop_rate", "proj_drop_rate", "attn_drop_rate", "drop_path_rate",
    "dynamic_pad", "attn",
}  # fmt: skip
"""fields of a ViT that its `config.json` says, or that change no answer of a trained network"""


def _isotropic(c: Any) -> dict[str, Any]:
    """A plain Vision Transformer, or the encoder of others that its config makes of it."""
    return next((write for is_it, write in ENCODERS if is_it(c)), _vit)(c)


def _vit(c: Any) -> dict[str, Any]:
    return _plain(c, "ViT") | {
        "architectures": ["ViTForImageClassification"],
        "model_type": "vit",
        "intermediate_size": _hidden(c),
        "qkv_bias": c.qkv_bias,
    }


def _plain(c: Any, whose: str, free: Sequence[str] = (), **must: Any) -> dict[str, Any]:
    """What all isotropic networks say alike; the fields that are not `SAID` or `free` must be a plain ViT's, or `must`.

    Raises `Unsaid` with the first that is not.
    """
    plain = ViTConfig()
    for name in (f.name for f in fields(plain) if f.name in must or f.name not in {*SAID, *free}):
        if getattr(c, name) != must.get(name, getattr(plain, name)):
            raise Unsaid(f"transformers' {whose} knows no {name}={getattr(c, name)!r}")
    return _named(c, PLAIN) | {"hidden_act": HIDDEN_ACTS[c.act]}


def _named(c: Any, names: Mapping[str, str]) -> dict[str, Any]:
    """Our fields by transformers' names, as JSON has them."""
    return {theirs: _json(ours, getattr(c, ours)) for theirs, ours in names.items()}


def _json(name: str, value: Any) -> Any:
    if name in PAIRS:
        return _square(value)
    return list(value) if isinstance(value, tuple) else value


def _hidden(c: Any) -> int:
    return int(c.embed_dim * c.mlp_ratio)


def _dinov2(c: Any) -> dict[str, Any]:
    """Its own head reads the class token beside the mean of patches: a head here leaves the second half zero."""
    gated, registers = c.mlp == "swiglu_packed", c.reg_tokens > 0
    _check_square(c, "DINOv2")
    said = _plain(
        c, "DINOv2", ("init_values", "reg_tokens"),
        no_embed_class=registers, mlp="swiglu_packed" if gated else "mlp",
    )  # fmt: skip
    kind = "Dinov2WithRegisters" if registers else "Dinov2"
    return said | {
        "architectures": [f"{kind}ForImageClassification" if c.num_classes else f"{kind}Model"],
        "model_type": "dinov2_with_registers" if registers else "dinov2",
        "mlp_ratio": _whole_ratio(c, gated),
        "use_swiglu_ffn": gated,
        "qkv_bias": c.qkv_bias,
        "layerscale_value": c.init_values,
        **({"num_register_tokens": c.reg_tokens} if registers else {"use_mask_token": False}),
    }


def _whole_ratio(c: Any, gated: bool) -> int:
    """DINOv2's `mlp_ratio`, a whole number; a gated layer has two thirds of that width, rounded up to eights."""
    width = _hidden(c) // 2 if gated else _hidden(c)
    ratio = round(width * (1.5 if gated else 1) / c.embed_dim)
    made = ratio * c.embed_dim
    if width != ((int(made * 2 / 3) + 7) // 8 * 8 if gated else made):
        raise Unsaid(
            f"transformers' DINOv2 has hidden layers by a whole mlp_ratio; this network's are {width} wide for "
            f"embed_dim {c.embed_dim}"
        )
    return ratio


def _clip(c: Any) -> dict[str, Any]:
    """A head is its projection, which has no bias."""
    _check_square(c, "CLIP")
    return _plain(c, "CLIP", pre_norm=True, qkv_bias=True) | {
        "architectures": ["CLIPVisionModelWithProjection" if c.num_classes else "CLIPVisionModel"],
        "model_type": "clip_vision_model",
        "intermediate_size": _hidden(c),
        "projection_dim": c.num_classes,
    }


def _siglip(c: Any) -> dict[str, Any]:
    _check_square(c, "SigLIP")
    _check_headless(c, "SigLIP")
    return _plain(c, "SigLIP", class_token=False, global_pool="map", qkv_bias=True) | {
        "architectures": ["SiglipVisionModel"],
        "model_type": "siglip_vision_model",
        "intermediate_size": _hidden(c),
    }


def _beit(c: Any) -> dict[str, Any]:
    _check_square(c, "BEiT")
    _check_scaled(c, "BEiT")
    said = _plain(c, "BEiT", ("init_values", "global_pool"), pos_embed="none", rel_pos_bias=True, qkv_bias=True)
    return said | {
        "architectures": ["BeitForImageClassification" if c.num_classes else "BeitModel"],
        "model_type": "beit",
        "intermediate_size": _hidden(c),
        "use_relative_position_bias": True,
        "use_mean_pooling": c.global_pool == "avg",
        "layer_scale_init_value": c.init_values or 1.0,  # 0 would leave LayerScale out
    }


def _dinov3(c: Any) -> dict[str, Any]:
    """What it pools, no file of its says: there it is the class token, in rows here the mean of patches."""
    if c.rope != "dinov3":
        raise Unsaid(f"transformers has no EVA-02 (rope={c.rope!r})")
    _check_headless(c, "DINOv3")
    _check_scaled(c, "DINOv3")
    if not c.reg_tokens:
        raise Unsaid("transformers' DINOv3 has register tokens, and this network none (reg_tokens=0)")
    gated = c.mlp == "swiglu"
    said = _plain(
        c, "DINOv3", ("init_values", "reg_tokens", "global_pool"),
        pos_embed="none", rope="dinov3", fc_norm=False, mlp="swiglu" if gated else "mlp",
    )  # fmt: skip
    return said | {
        "architectures": ["DINOv3ViTModel"],
        "model_type": "dinov3_vit",
        "intermediate_size": _hidden(c),
        "use_gated_mlp": gated,
        "query_bias": c.qkv_bias,
        "value_bias": c.qkv_bias,
        "num_register_tokens": c.reg_tokens,
        "layerscale_value": c.init_values,
    }


def _check_headless(c: Any, whose: str) -> None:
    if c.num_classes:
        raise Unsaid(
            f"transformers' {whose} has no head, and this network one of {c.num_classes} classes",
            "leave it out with reset_classifier(0)",
        )


def _check_scaled(c: Any, whose: str) -> None:
    if c.init_values is None:
        raise Unsaid(f"transformers' {whose} has LayerScale, and this network none (init_values=None)")


def _check_square(c: Any, whose: str) -> None:
    """Of networks whose tables of positions transformers takes for square."""
    for name in ("img_size", "patch_size"):
        height, width = pair(getattr(c, name))
        if height != width:
            raise Unsaid(f"transformers' {whose} has a square {name}; got {height} x {width}")


def _square(size: Any) -> int | list[int]:
    height, width = pair(size)
    return height if height == width else [height, width]


def _deit(c: Any) -> dict[str, Any]:
    if not c.distilled:
        raise Unsaid("transformers' DeiT has a distillation token, and this network has none (distilled=False)")
    return _vit(c) | {"architectures": ["DeiTForImageClassificationWithTeacher"], "model_type": "deit"}


def check_shifts(c: SwinConfig, mend: str = "") -> None:
    """transformers shifts windows along both sides of a stage or none, networks here along each that has several.

    Raises `Unsaid` where that differs.
    """
    window = max(pair(c.window_size))
    for grid, depth in zip(stage_grids(c), c.depths, strict=True):
        if depth > 1 and min(grid) <= window < max(grid):
            raise Unsaid(
                f"transformers' Swin with image_size {_square(c.img_size)} shifts no windows in its stage of {grid[0]} "
                f"x {grid[1]} cells, one side of which is a single window, and networks here shift along the other",
                mend,
            )


def _swin(c: Any) -> dict[str, Any]:
    if c.norm_eps != SWIN_EPS:
        raise Unsaid(
            f"transformers' Swin has {SWIN_EPS} in some norms, whatever its layer_norm_eps; this network has "
            f"norm_eps={c.norm_eps} in all"
        )
    rows, columns = pair(c.window_size)
    if rows != columns:
        raise Unsaid(f"transformers' Swin has a square window_size; got {rows} x {columns}")
    if small := [grid for grid in stage_grids(c) if min(grid) < rows]:
        raise Unsaid(
            f"transformers' Swin cannot have a stage of {small[0][0]} x {small[0][1]} cells with windows of {rows}, as "
            f"img_size {_square(c.img_size)} makes it"
        )
    check_shifts(c)
    return _named(c, SWIN) | {"architectures": ["SwinForImageClassification"], "model_type": "swin"}


def _pyramid(c: Any, names: Mapping[str, str]) -> dict[str, Any]:
    """What both PVTs share. They have one epsilon for all norms."""
    if c.norm_eps != c.conv_norm_eps:
        raise Unsaid(
            f"transformers' PVT has one epsilon; this network has norm_eps={c.norm_eps} and conv_norm_eps="
            f"{c.conv_norm_eps}",
            f"make it by create_model(…, conv_norm_eps={c.norm_eps}), which changes answers by a few millionths",
        )
    return _named(c, names)


def _pvt(c: Any) -> dict[str, Any]:
    if c.patch_size != 4:
        raise Unsaid(f"transformers' PVT has patches of 4 pixels; this network has {c.patch_size}")
    _check_square(c, "PVT")
    return _pyramid(c, PVT) | {
        "architectures": ["PvtForImageClassification"],
        "model_type": "pvt",
        "patch_sizes": [c.patch_size, 2, 2, 2],
        "strides": [c.patch_size, 2, 2, 2],
    }


def _pvt_v2(c: Any) -> dict[str, Any]:
    return _pyramid(c, PVT_V2) | {
        "architectures": ["PvtV2ForImageClassification"],
        "model_type": "pvt_v2",
        "patch_sizes": [c.patch_size, 3, 3, 3],
        "strides": [c.stride, 2, 2, 2],
    }


ENCODERS: tuple[tuple[Callable[[Any], bool], Callable[[Any], dict[str, Any]]], ...] = (
    (lambda c: c.global_pool == "map", _siglip),
    (lambda c: c.pre_norm, _clip),
    (lambda c: c.init_values is not None, _dinov2),
)
"""what tells an encoder from a plain Vision Transformer"""
CONFIGS: dict[str, Callable[[Any], dict[str, Any]]] = {
    "vit": _isotropic,
    "deit": _deit,
    "beit": _beit,
    "eva": _dinov3,
    "swin": _swin,
    "pvt": _pvt,
    "pvt_v2": _pvt_v2,
}
