"""transformers' `config.json` -> a family here and the fields of its config: what `transformers_configs` writes, read.

    {"model_type": "vit", "hidden_size": 48, …} ── network_of ──> "vit", {"embed_dim": 48, …}

What a config leaves out has transformers' own default (5.23, `configuration_*.py`). What a network here cannot be is an
error that names the field, for no shape of a weight shows it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from vitrail.folder import LIMITS
from vitrail.models.config import tuples
from vitrail.models.swin import SwinConfig
from vitrail.names import shortened
from vitrail.weights.transformers_configs import HIDDEN_ACTS, PLAIN, PVT, PVT_V2, SWIN, SWIN_EPS, check_shifts

Config = Mapping[str, Any]
Fields = dict[str, Any]


class Kind(NamedTuple):
    """How a `model_type` is read."""

    family: str
    says: Mapping[str, str]
    """its fields that are one of ours, by another name"""
    usual: Config
    """what a field is where it is left out, of those that are no field of ours by the same default"""
    always: Config
    """our fields that all of this type have"""
    must: Config
    """fields in which no network here can be otherwise"""
    more: Callable[[Config], Fields] = lambda config: {}
    """our fields that take more than a name"""


def network_of(config: Config) -> tuple[str, Fields] | None:
    """The family here and its fields, under names that its config takes; None for a `model_type` that is not known.

    Raises `ValueError` for what no network here can be.
    """
    name, tower = config.get("model_type"), config.get("vision_config")
    if not isinstance(name, str):
        return None
    if name in TOWERS and isinstance(tower, dict):
        return network_of({**tower, "model_type": TOWERS[name]})
    if name not in KINDS:
        return None
    kind = KINDS[name]
    said = {**kind.usual, **{field: value for field, value in config.items() if value is not None}}
    for field, usual in kind.usual.items():
        _check_form(field, said[field], usual)
    for field, value in kind.must.items():
        if said.get(field, value) != value:
            raise ValueError(
                f"transformers' {name} with {field}={shortened(said[field])} is no network here, which has "
                f"{value!r}: open it with transformers"
            )
    fields = {ours: tuples(said[theirs]) for theirs, ours in kind.says.items() if theirs in said}
    made = {**kind.always, **fields, **kind.more(said)}
    sides = made.get("img_size", 1)
    if max(sides if isinstance(sides, tuple) else (sides,)) > LIMITS["img_size"]:
        raise ValueError(f"image_size must be at most {LIMITS['img_size']:,} pixels; got {shortened(sides)}: mend it")
    if name in SQUARE and isinstance(sides, tuple) and len(set(sides)) > 1:
        raise ValueError(
            f"image_size of transformers' {name} must be square to answer alike here; got {shortened(sides)}: open it "
            "with transformers"
        )
    return kind.family, made


def _check_form(field: str, value: Any, usual: Any) -> None:
    """Raises `ValueError` where a field is no number, switch, word or list, whichever it usually is."""
    what, fits = next((what, fits) for kinds, what, fits in FORMS if isinstance(usual, kinds))
    if not (fits(value) or (field in SIZES and _is_list(value))):
        raise ValueError(
            f"{field} must be {what}{' or two' if field in SIZES else ''}; got {shortened(value)}: mend it"
        )


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _is_list(value: Any) -> bool:
    return isinstance(value, list | tuple) and all(map(_is_number, value))


def _act(config: Config) -> Fields:
    said = config["hidden_act"]
    known = {theirs: ours for ours, theirs in HIDDEN_ACTS.items()} | {"swish": "silu"}
    if said not in known:
        raise ValueError(
            f"hidden_act must be one of {', '.join(known)}; got {shortened(said)}: open it with transformers"
        )
    return {"act": known[said]}


def _plain(config: Config) -> Fields:
    return _act(config) | {"intermediate_size": config["intermediate_size"]}


def _deit(config: Config) -> Fields:
    if config.get("architectures") == ["DeiTForImageClassification"]:
        raise ValueError(
            "architectures DeiTForImageClassification has a distillation token that no head reads, which no network "
            "here has: open it with transformers, or take DeiTForImageClassificationWithTeacher's weights"
        )
    return _plain(config)


def _beit(config: Config) -> Fields:
    if config["layer_scale_init_value"] <= 0:
        raise ValueError("layer_scale_init_value must be above 0, as LayerScale is part of BEiT here; got 0 or less")
    return _plain(config) | {
        "rel_pos_bias": config["use_relative_position_bias"],
        "pos_embed": "learn" if config["use_absolute_position_embeddings"] else "none",
        "global_pool": "avg" if config["use_mean_pooling"] else "token",
    }


def _dinov2(config: Config) -> Fields:
    """A gated layer has two thirds of the width, rounded up to eights; here gate and value count together."""
    hidden = config["hidden_size"] * config["mlp_ratio"]
    if config["use_swiglu_ffn"]:
        width = 2 * ((int(hidden * 2 / 3) + 7) // 8 * 8)
        return {"mlp": "swiglu_packed", "act": "silu", "intermediate_size": width}
    return _act(config) | {"intermediate_size": int(hidden)}


def _dinov3(config: Config) -> Fields:
    if config["query_bias"] != config["value_bias"]:
        raise ValueError(
            "query_bias and value_bias must be alike in networks here; got one of them: open it with transformers"
        )
    if config["use_gated_mlp"] and config["hidden_act"] not in ("silu", "swish"):
        raise ValueError(
            f"use_gated_mlp goes with hidden_act='silu' here; got {shortened(config['hidden_act'])}: open it with "
            "transformers"
        )
    if config["num_register_tokens"] == 0:
        raise ValueError("num_register_tokens must be at least 1 in networks here; got 0: open it with transformers")
    return _plain(config) | {
        "mlp": "swiglu" if config["use_gated_mlp"] else "mlp",
        "qkv_bias": config["query_bias"],
    }


def _swin(config: Config) -> Fields:
    made = SwinConfig(**{ours: tuples(config[theirs]) for theirs, ours in SWIN.items()})
    check_shifts(made, "open it with transformers")
    return {}


def _stages(config: Config) -> Fields:
    """Patches of stages after the first, which are the same in all networks here."""
    first, *patches = config["patch_sizes"]
    stride, *strides = config["strides"]
    v2 = config["model_type"] == "pvt_v2"
    usual = ([3 if v2 else 2] * len(patches), [2] * len(strides))
    if (patches, strides) != usual or not (v2 or first == stride):
        raise ValueError(
            f"patch_sizes {config['patch_sizes']} and strides {config['strides']} must be a first stage's and then "
            f"{usual[0]} and {usual[1]}{'' if v2 else ', the two alike'}: open it with transformers"
        )
    return {"patch_size": first, **({"stride": stride} if v2 else {}), "conv_norm_eps": config["layer_norm_eps"]}


SIZES = ("image_size", "patch_size")
FORMS: tuple[tuple[Any, str, Callable[[Any], bool]], ...] = (
    (bool, "true or false", lambda value: isinstance(value, bool)),
    ((int, float), "a number", _is_number),
    (str, "a word", lambda value: isinstance(value, str)),
    ((list, tuple), "a list of numbers", _is_list),
)
"""of a field that usually is one of these types: what it must be, in words, and whether it is"""
VIT: Config = {
    "hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12, "intermediate_size": 3072,
    "hidden_act": "gelu", "layer_norm_eps": 1e-12, "image_size": 224, "patch_size": 16, "num_channels": 3,
    "qkv_bias": True,
}  # fmt: skip
DINO: Config = {**VIT, "layer_norm_eps": 1e-6, "mlp_ratio": 4, "layerscale_value": 1.0, "use_swiglu_ffn": False}
BIASED = PLAIN | {"qkv_bias": "qkv_bias"}
SCALED = BIASED | {"layerscale_value": "init_values"}
PYRAMID: Config = {
    "image_size": 224, "num_channels": 3, "depths": (2, 2, 2, 2), "num_attention_heads": (1, 2, 5, 8),
    "mlp_ratios": (8, 8, 4, 4), "layer_norm_eps": 1e-6, "qkv_bias": True,
}  # fmt: skip
KINDS: dict[str, Kind] = {
    "vit": Kind("vit", BIASED, VIT, {}, {}, _plain),
    "vit_mae": Kind("vit", BIASED, VIT, {}, {}, _plain),
    "vit_msn": Kind("vit", BIASED, {**VIT, "layer_norm_eps": 1e-6}, {}, {}, _plain),
    "deit": Kind("deit", BIASED, VIT, {}, {}, _deit),
    "beit": Kind(
        "beit", PLAIN | {"layer_scale_init_value": "init_values"},
        {
            **VIT, "layer_scale_init_value": 0.1, "use_relative_position_bias": False,
            "use_absolute_position_embeddings": False, "use_mean_pooling": True,
        },
        {}, {"use_shared_relative_position_bias": False}, _beit,
    ),
    "dinov2": Kind("vit", SCALED, {**DINO, "patch_size": 14}, {}, {}, _dinov2),
    "dinov2_with_registers": Kind(
        "vit", SCALED | {"num_register_tokens": "reg_tokens"}, {**DINO, "num_register_tokens": 4},
        {"no_embed_class": True}, {}, _dinov2,
    ),
    "dinov3_vit": Kind(
        "eva", PLAIN | {"layerscale_value": "init_values", "num_register_tokens": "reg_tokens"},
        {
            **VIT, "hidden_size": 384, "intermediate_size": 1536, "num_attention_heads": 6, "layer_norm_eps": 1e-5,
            "layerscale_value": 1.0, "num_register_tokens": 0, "use_gated_mlp": False, "query_bias": True,
            "value_bias": True,
        },
        {"pos_embed": "none", "rope": "dinov3", "ref_feat_shape": None, "fc_norm": False, "global_pool": "avg"},
        {"rope_theta": 100.0, "key_bias": False, "proj_bias": True, "mlp_bias": True}, _dinov3,
    ),
    "clip_vision_model": Kind(
        "vit", PLAIN, {**VIT, "patch_size": 32, "hidden_act": "quick_gelu", "layer_norm_eps": 1e-5}, {"pre_norm": True},
        {}, _plain,
    ),
    "siglip_vision_model": Kind(
        "vit", PLAIN, {**VIT, "hidden_act": "gelu_pytorch_tanh", "layer_norm_eps": 1e-6},
        {"class_token": False, "global_pool": "map"}, {"vision_use_head": True}, _plain,
    ),
    "swin": Kind(
        "swin", SWIN,
        {
            "embed_dim": 96, "depths": (2, 2, 6, 2), "num_heads": (3, 6, 12, 24), "window_size": 7, "mlp_ratio": 4.0,
            "qkv_bias": True, "layer_norm_eps": 1e-5, "image_size": 224, "patch_size": 4, "num_channels": 3,
        },
        {}, {"use_absolute_embeddings": False, "hidden_act": "gelu", "layer_norm_eps": SWIN_EPS}, _swin,
    ),
    "pvt": Kind(
        "pvt", PVT,
        {
            **PYRAMID, "hidden_sizes": (64, 128, 320, 512), "sequence_reduction_ratios": (8, 4, 2, 1),
            "patch_sizes": [4, 2, 2, 2], "strides": [4, 2, 2, 2],
        },
        {}, {"hidden_act": "gelu"}, _stages,
    ),
    "pvt_v2": Kind(
        "pvt_v2", PVT_V2,
        {
            **PYRAMID, "hidden_sizes": (32, 64, 160, 256), "sr_ratios": (8, 4, 2, 1), "linear_attention": False,
            "patch_sizes": [7, 3, 3, 3], "strides": [4, 2, 2, 2],
        },
        {}, {"hidden_act": "gelu"}, _stages,
    ),
}  # fmt: skip
"""by transformers' `model_type`"""
SQUARE = {"beit", "dinov2", "dinov2_with_registers", "clip_vision_model", "siglip_vision_model", "pvt"}
"""of these, transformers lays positions out as if images were square"""
TOWERS = {"clip": "clip_vision_model", "siglip": "siglip_vision_model"}
"""of models of images and text: what reads the images"""
