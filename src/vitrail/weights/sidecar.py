"""What stands beside somebody's weights: how images were prepared for them, what their classes are, which network.

    config.json               ours; timm's (`architecture`, `pretrained_cfg`); transformers' (`model_type`, `id2label`)
    preprocessor_config.json  transformers' (`image_mean`, `image_std`, `size`)

Files of others are read with care: whatever is missing or strange is left unknown, never guessed.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from vitrail.folder import CONFIG, MAX_JSON_BYTES, read_card
from vitrail.models.backbone import PositionTable
from vitrail.models.registry import build_from_config
from vitrail.records import Preprocess

PROCESSOR = "preprocessor_config.json"
RESAMPLING = {2: "bilinear", 3: "bicubic"}
"""Pillow's numbers, as transformers writes them"""

EPSILONS = dict.fromkeys(("pvt", "pvt_v2"), ("norm_eps", "conv_norm_eps"))
"""which fields have transformers' one epsilon, of networks that have several here"""


@dataclass(frozen=True)
class Sidecar:
    """What is known of a file of weights beside the weights."""

    preprocess: Preprocess | None = None
    classes: tuple[str, ...] = ()
    architecture: str = ""
    """a row of the registry, or what somebody else calls his network"""
    fields: Mapping[str, Any] = field(default_factory=dict)
    """of a config here, where they cannot be seen in the weights"""
    tables: Mapping[str, PositionTable] = field(default_factory=dict)
    """what tables of positions were made for, where that is known"""
    own: bool = False
    """whether it is a model folder of this package"""


def read_sidecar(path: Path) -> Sidecar:
    """What lies beside a file of weights, or in their folder. What cannot be read counts as not there."""
    folder = path if path.is_dir() else path.parent
    config = _json(folder / CONFIG)
    if isinstance(config.get("family"), str):
        card = read_card(folder)
        with torch.device("meta"):
            tables = build_from_config(card.family, card.config).position_tables()
        return Sidecar(card.preprocess, card.classes, card.name, tables=tables, own=True)
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
    return Sidecar(_preprocess(given), _classes(names), str(config["architecture"]))


def _of_transformers(config: Mapping[str, Any], processor: Mapping[str, Any]) -> Sidecar:
    size = processor.get("size")
    size = size if isinstance(size, dict) else {"height": size, "width": size}
    given = {
        "img_size": (size["height"], size["width"]) if {"height", "width"} <= size.keys() else None,
        "mean": processor.get("image_mean"),
        "std": processor.get("image_std"),
        "interpolation": RESAMPLING.get(processor.get("resample", 0)),
        "crop_mode": "squash",
    }
    names = config.get("id2label")
    ordered = [names.get(str(i)) for i in range(len(names))] if isinstance(names, dict) else None
    eps = config.get("layer_norm_eps")
    named = EPSILONS.get(config.get("model_type", ""), ("norm_eps",))
    fields = dict.fromkeys(named, eps) if isinstance(eps, float) and 0 < eps < 1 else {}
    return Sidecar(
        _preprocess(given) if processor else None, _classes(ordered), str(config.get("model_type", "")), fields
    )


def _preprocess(given: Mapping[str, Any]) -> Preprocess | None:
    """None unless size, mean and deviation are known and make sense."""
    known = {name: value for name, value in given.items() if value is not None}
    if not {"img_size", "mean", "std"} <= known.keys():
        return None
    try:
        return Preprocess(**known)
    except (TypeError, ValueError):
        return None


def _classes(names: object) -> tuple[str, ...]:
    """Names that all are text and say something: `LABEL_0` is what transformers writes for want of a name."""
    if not isinstance(names, list) or not all(isinstance(name, str) and name for name in names):
        return ()
    return () if all(name.startswith("LABEL_") for name in names) else tuple(names)
