"""What timm calls our rows and the fields of our configs, both ways: a table of words a family."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from typing import Any, NamedTuple

from vitrail.layers.blocks import ACTIVATIONS
from vitrail.layers.embed import pair
from vitrail.models.registry import ROWS
from vitrail.models.swin import SwinConfig, stage_grids

NAMES = {"resnet18_224": "resnet18", "resnet50_224": "resnet50", "convnext_tiny_224": "convnext_tiny"}
"""row -> timm's name, where that is another"""


def _itself(value: Any) -> Any:
    return value


def _activation(name: Any) -> Any:
    if name not in ACTIVATIONS:
        raise LookupError(f"no activation {name}")
    return name


class Word(NamedTuple):
    """timm's word for a field, and its value there and back."""

    theirs: str
    there: Callable[[Any], Any] = _itself
    back: Callable[[Any], Any] = _itself


ACT = Word("act_layer", back=_activation)
WORDS: dict[str, dict[str, Word]] = {
    "vit": {"act": ACT},
    "deit": {"act": ACT},
    "hybrid": {"act": ACT},
    "eva": {"reg_tokens": Word("num_reg_tokens")},
    "crossvit": {
        # a third number a stage: blocks after the cross-attention, whose hidden width is the third ratio
        "depth": Word("depth", lambda stages: [[*stage, 0] for stage in stages],
                      lambda stages: tuple(stage[:2] for stage in stages)),
        "mlp_ratio": Word("mlp_ratio", lambda ratios: [*ratios, ratios[1]], lambda ratios: ratios[:2]),
    },
    "resnet": {"depths": Word("layers")},
    "convnext": {
        "embed_dim": Word("dims", lambda dim: [dim * 2**i for i in range(4)], lambda dims: dims[0]),
        "init_values": Word("ls_init_value"),
    },
}  # fmt: skip
"""by family and field, where timm has another word or another form"""
SHAPE = {"img_size", "patch_size", "in_chans", "embed_dim", "num_heads", "mlp_ratio", "qkv_bias"}
VIT = SHAPE | {"depth", "qk_norm", "init_values", "class_token", "reg_tokens", "no_embed_class", "global_pool",
               "pre_norm", "fc_norm", "act"}  # fmt: skip
ARGS = {
    "vit": VIT,
    "deit": SHAPE | {"depth", "init_values", "act"},
    "swin": SHAPE | {"depths", "window_size"},
    "cait": SHAPE | {"depth", "depth_token_only", "mlp_ratio_token_only", "init_values", "global_pool"},
    "pvt_v2": {"in_chans", "embed_dims", "depths", "num_heads", "mlp_ratios", "sr_ratios", "qkv_bias", "linear"},
    "crossvit": SHAPE | {"img_scale", "depth", "multi_conv", "crop_scale", "global_pool"},
    "hybrid": VIT,
    "beit": SHAPE | {"depth", "init_values", "global_pool"},
    "eva": SHAPE - {"mlp_ratio", "qkv_bias"} | {"depth", "init_values", "reg_tokens", "ref_feat_shape"},
    "resnet": {"in_chans", "depths"},
    "convnext": {"in_chans", "embed_dim", "depths", "init_values"},
}
"""by family, the fields that timm's constructors take"""
SAME = {"attn", "num_classes", "dynamic_pad", "img_size", "drop_rate", "pos_drop_rate", "proj_drop_rate",
        "attn_drop_rate", "drop_path_rate", "dynamic_img_size"}  # fmt: skip
"""fields that change no answer of a trained network at its own size, or are written elsewhere"""


HARMLESS = {
    "drop_rate", "pos_drop_rate", "proj_drop_rate", "attn_drop_rate", "drop_path_rate", "patch_drop_rate",
    "drop_block_rate", "weight_init", "fix_init", "head_init_scale", "zero_init_last", "init_values", "ls_init_value",
    "img_size", "strict_img_size", "dynamic_img_size", "dynamic_img_pad", "device", "dtype",
}  # fmt: skip
"""timm's arguments that change no answer of a trained network at its own size, or that shapes show"""
USUAL = {"global_pool": "avg", "output_stride": 32, "pool_include_prefix": False, "final_norm": True,
         "proj_bias": True, "always_partition": False, "scale_mlp": False}  # fmt: skip
"""those that change none as long as they are so, in families that have no such field here"""


def strange_args(args: Mapping[str, Any], known: Collection[str]) -> list[str]:
    """Of timm's arguments, in our words, those that may change answers and are none of the fields `known`."""
    usual = {name for name, value in USUAL.items() if args.get(name) == value}
    return [name for name in args if name not in {*known, *HARMLESS, *usual}]


def to_timm(family: str, fields: Mapping[str, Any]) -> dict[str, Any]:
    """Fields that timm's constructor takes, in its words."""
    words = WORDS.get(family, {})
    taken = {name: words.get(name, Word(name)).there(value) for name, value in _scaled(fields).items()
             if name in ARGS[family]}  # fmt: skip
    return {words[name].theirs if name in words else name: value for name, value in taken.items()}


def _scaled(fields: Mapping[str, Any]) -> dict[str, Any]:
    """A LayerScale that begins with 0, which trained weights replace, would be none at timm."""
    return {name: 1.0 if name == "init_values" and value == 0 else value for name, value in fields.items()}


def uneven_stage(c: SwinConfig) -> str:
    """The first stage of a Swin that does not divide into windows, in words; empty where all do.

    timm pads those after it has rolled them, and makes windows smaller where a stage is.
    """
    window = pair(c.window_size)
    odd = (grid for grid in stage_grids(c) if any(side % size for side, size in zip(grid, window, strict=True)))
    return next((f"a stage of {h} x {w} cells does not divide into windows of {window[0]} x {window[1]}"
                 for h, w in odd), "")  # fmt: skip


def from_timm(architecture: str, args: Mapping[str, Any]) -> tuple[str, dict[str, Any]]:
    """The row that timm's `architecture` is, or that name itself, and `args` in our words.

    What is not in the form of its word counts as not there; what has no word here keeps timm's.
    """
    row = next((ours for ours, theirs in NAMES.items() if theirs == architecture), architecture)
    words = WORDS.get(ROWS.get(row, ""), {})
    ours = {word.theirs: (name, word.back) for name, word in words.items()}
    found = {}
    for name, value in args.items():
        field, back = ours.get(name, (name, _itself))
        try:
            found[field] = back(value)
        except (TypeError, IndexError):
            continue
        except LookupError:
            found[name] = value
    return row, found
