"""What stands beside somebody's weights: how images were prepared for them, what their classes are, which network.

    config.json               ours; timm's (`architecture`, `pretrained_cfg`); transformers' (`model_type`, `id2label`)
    preprocessor_config.json  transformers' (`image_mean`, `image_std`, `size`)

Files of others are read with care: whatever is missing or strange is left unknown, never guessed.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeGuard

from vitrail.folder import CONFIG, LIMITS, MANIFEST, MAX_JSON_BYTES, MAX_NAME, MAX_NUMBER, read_card
from vitrail.models.config import tuples
from vitrail.names import is_printable
from vitrail.records import ModelCard, Preprocess
from vitrail.weights.timm_configs import from_timm

PROCESSOR = "preprocessor_config.json"
LONGEST_LIST = 100
RESAMPLING = {"2": "bilinear", "3": "bicubic"}
"""Pillow's numbers, as transformers writes them"""
NULLABLE = ("init_values", "ref_feat_shape", "fc_norm")
"""timm's arguments that `null` says something of"""


@dataclass(frozen=True)
class Sidecar:
    """What is known of a file of weights beside the weights."""

    preprocess: Preprocess | None = None
    classes: tuple[str, ...] = ()
    architecture: str = ""
    """a row of the registry, or what somebody else calls his network"""
    fields: Mapping[str, Any] = field(default_factory=dict)
    """of a config here, as timm's `model_args` say them; what has no word here keeps timm's"""
    unread: tuple[str, ...] = ()
    """of timm's `model_args`, the names of those whose values no config can hold"""
    card: ModelCard | None = None
    """of a model folder of this package"""
    transformers: Mapping[str, Any] = field(default_factory=dict)
    """the whole of transformers' config, as it is: `transformers_networks` reads it"""


def read_sidecar(path: Path) -> Sidecar:
    """What lies beside a file of weights, or in their folder. What cannot be read counts as not there.

    Raises `FolderError` for a card of this package that is damaged.
    """
    folder = path if path.is_dir() else path.parent
    config = _json(folder / CONFIG)
    if {"family", "config"} <= config.keys() or isinstance(_json(folder / MANIFEST).get("files"), dict):
        card = read_card(folder)
        return Sidecar(card.preprocess, card.classes, card.name, card=card)
    if "architecture" in config:
        return _of_timm(config)
    return _of_transformers(config, _json(folder / PROCESSOR))


def _json(file: Path) -> dict[str, Any]:
    try:
        held = json.loads(file.read_text(encoding="utf-8")) if file.stat().st_size <= MAX_JSON_BYTES else {}
    except (OSError, ValueError, RecursionError):
        return {}
    return held if isinstance(held, dict) else {}


def _of_timm(config: Mapping[str, Any]) -> Sidecar:
    said = config.get("pretrained_cfg")
    said = said if isinstance(said, dict) else config
    size = said.get("input_size")
    given = {
        "img_size": tuple(size[1:]) if isinstance(size, list) and len(size) == 3 else None,
        "mean": said.get("mean"),
        "std": said.get("std"),
        "interpolation": said.get("interpolation"),
        "crop_pct": said.get("crop_pct"),
        "crop_mode": said.get("crop_mode"),
    }
    names = config.get("label_names", said.get("label_names"))
    args = config.get("model_args")
    args = args if isinstance(args, dict) else {}
    plain = {name: tuples(value) for name, value in args.items() if _is_plain(value)}
    absent = {name: None for name in NULLABLE if args.get(name, "") is None}
    row, fields = from_timm(_name(config["architecture"]), plain | absent)
    unread = tuple(name for name, value in args.items() if value is not None and name not in plain)
    return Sidecar(_preprocess(given), _classes(names), row, fields, unread)


def _is_plain(value: object) -> bool:
    """Whether it is a number, a switch, a word or a list of such, as a config may hold them."""
    if isinstance(value, list):
        return len(value) <= LONGEST_LIST and all(_is_plain(part) for part in value)
    return isinstance(value, bool | str) or (isinstance(value, int | float) and abs(value) <= MAX_NUMBER)


def _of_transformers(config: Mapping[str, Any], processor: Mapping[str, Any]) -> Sidecar:
    given = _sizes(processor) | {
        "mean": processor.get("image_mean"),
        "std": processor.get("image_std"),
        "interpolation": RESAMPLING.get(str(processor.get("resample"))),
    }
    names = config.get("id2label")
    ordered = [names.get(str(i)) for i in range(len(names))] if isinstance(names, dict) else None
    prepared = _preprocess(given) if _scales_as_here(processor) else None
    return Sidecar(prepared, _classes(ordered), _name(config.get("model_type")), transformers=config)


def _sizes(processor: Mapping[str, Any]) -> dict[str, Any]:
    """Without a crop, images are pressed into `size`; with one, their short side becomes that and a centre is cut."""
    size, crop = processor.get("size"), processor.get("crop_size")
    if not processor.get("do_center_crop"):
        return {"img_size": _pair(size), "crop_mode": "squash"}
    edge, cut = size.get("shortest_edge") if isinstance(size, dict) else None, _pair(crop)
    if not _is_number(edge) or cut is None:
        return {}
    share = min(cut) / edge
    share = share if math.floor(min(cut) / share) == edge else math.nextafter(share, 0)  # or rounding loses a pixel
    return {"img_size": cut, "crop_pct": share, "crop_mode": "center"}


def _pair(size: object) -> tuple[int, int] | None:
    height, width = [size.get("height"), size.get("width")] if isinstance(size, dict) else [size, size]
    return (height, width) if _is_number(height) and _is_number(width) else None


def _is_number(value: object) -> TypeGuard[int]:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


def _scales_as_here(processor: Mapping[str, Any]) -> bool:
    """Whether pixels are divided by 255 and normalised, as `Preprocess` does."""
    factor = processor.get("rescale_factor", 1 / 255)
    steps = all(processor.get(step, True) is True for step in ("do_resize", "do_rescale", "do_normalize"))
    return steps and isinstance(factor, float) and math.isclose(factor, 1 / 255, rel_tol=1e-4)


def _preprocess(given: Mapping[str, Any]) -> Preprocess | None:
    """None unless size, mean and deviation are known and make sense."""
    known = {name: value for name, value in given.items() if value is not None}
    if not {"img_size", "mean", "std"} <= known.keys():
        return None
    try:
        made = Preprocess(**known)
        numbers = (*made.mean, *made.std, made.crop_pct)
        right = all(isinstance(n, float | int) and math.isfinite(n) for n in numbers)
        return (
            made if right and all(_is_number(side) and side <= LIMITS["img_size"] for side in made.img_size) else None
        )
    except (TypeError, ValueError):
        return None


def _classes(names: object) -> tuple[str, ...]:
    """Names that all are text and say something: `LABEL_0` is what transformers writes for want of a name."""
    if not isinstance(names, list) or not all(map(_name, names)):
        return ()
    return () if all(name.startswith("LABEL_") for name in names) else tuple(names)


def _name(value: object) -> str:
    """Text that can be shown on one line; else nothing."""
    return value if isinstance(value, str) and len(value) <= MAX_NAME and is_printable(value) else ""
