"""What stands beside somebody's weights: how images were prepared for them, what their classes are, which network.

    config.json               ours; timm's (`architecture`, `pretrained_cfg`); transformers' (`model_type`, `id2label`)
    preprocessor_config.json  transformers' (`preprocessing` reads it)
    splits.json               a run's of this package, around its checkpoints; once it is done, model/config.json first

Files of others are read with care: whatever is missing or strange is left unknown, never guessed.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from vitrail.folder import CONFIG, MANIFEST, MAX_JSON_BYTES, MAX_NAME, MAX_NUMBER, read_card
from vitrail.models.config import tuples
from vitrail.names import is_printable
from vitrail.records import ModelCard, Preprocess
from vitrail.weights.preprocessing import PROCESSOR, of_timm, of_transformers
from vitrail.weights.timm_configs import from_timm

LONGEST_LIST = 100
RECORD, CHECKPOINTS, MODEL, CHECKPOINT = "splits.json", "checkpoints", "model", ".ckpt"
"""what a run folder holds that says something of its checkpoints, and their ending"""
ALONE = "no run folder is around it, which would say what its classes are and how images were prepared"
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
    remarks: tuple[str, ...] = ()
    """how images are prepared otherwise than the files say, or why nothing is known of it"""


def read_sidecar(path: Path) -> Sidecar:
    """What lies beside a file of weights, or in their folder. What cannot be read counts as not there.

    Of a run's checkpoint it is what its run says. Raises `FolderError` for a card of this package that is damaged.
    """
    folder, run = path if path.is_dir() else path.parent, _run_around(path)
    if run and not path.is_dir() and (run / MODEL / CONFIG).is_file():
        folder = run / MODEL
    config = _json(folder / CONFIG)
    if {"family", "config"} <= config.keys() or isinstance(_json(folder / MANIFEST).get("files"), dict):
        card = read_card(folder)
        return Sidecar(card.preprocess, card.classes, card.name, card=card)
    if "architecture" in config:
        return _of_timm(config)
    if run and not config:
        return _of_run(_json(run / RECORD))
    processor = _json(folder / PROCESSOR)
    if path.suffix == CHECKPOINT and not config and not processor:
        return Sidecar(remarks=(ALONE,))
    return _of_transformers(config, None if not processor and (folder / PROCESSOR).exists() else processor)


def _run_around(path: Path) -> Path | None:
    """The run folder that a path is, or lies in."""
    places = (path, path.parent, path.parent.parent)
    return next((place for place in places if (place / CHECKPOINTS).is_dir() and (place / RECORD).is_file()), None)


def _of_run(record: Mapping[str, Any]) -> Sidecar:
    """What a run remembers of its images, before it is done."""
    try:
        prepared = Preprocess.from_dict(record["preprocess"])
    except (LookupError, TypeError, ValueError):
        prepared = None
    remarks = () if prepared else (f"{RECORD} of the run is damaged",)
    return Sidecar(prepared, _classes(record.get("classes")), remarks=remarks)


def _json(file: Path) -> dict[str, Any]:
    try:
        held = json.loads(file.read_text(encoding="utf-8")) if file.stat().st_size <= MAX_JSON_BYTES else {}
    except (OSError, ValueError, RecursionError):
        return {}
    return held if isinstance(held, dict) else {}


def _of_timm(config: Mapping[str, Any]) -> Sidecar:
    said = config.get("pretrained_cfg")
    said = said if isinstance(said, dict) else config
    prepared = of_timm(said)
    names = config.get("label_names", said.get("label_names"))
    args = config.get("model_args")
    args = args if isinstance(args, dict) else {}
    plain = {name: tuples(value) for name, value in args.items() if _is_plain(value)}
    absent = {name: None for name in NULLABLE if args.get(name, "") is None}
    row, fields = from_timm(_name(config["architecture"]), plain | absent)
    unread = tuple(name for name, value in args.items() if value is not None and name not in plain)
    return Sidecar(prepared.preprocess, _classes(names), row, fields, unread, remarks=prepared.remarks)


def _is_plain(value: object) -> bool:
    """Whether it is a number, a switch, a word or a list of such, as a config may hold them."""
    if isinstance(value, list):
        return len(value) <= LONGEST_LIST and all(_is_plain(part) for part in value)
    return isinstance(value, bool | str) or (isinstance(value, int | float) and abs(value) <= MAX_NUMBER)


def _of_transformers(config: Mapping[str, Any], processor: Mapping[str, Any] | None) -> Sidecar:
    names, tower = config.get("id2label"), config.get("vision_config")
    ordered = [names.get(str(i)) for i in range(len(names))] if isinstance(names, dict) else None
    kind, network = _name(config.get("model_type")), tower if isinstance(tower, dict) else config
    prepared = of_transformers(processor, kind, network.get("image_size"))
    remarks = prepared.remarks if kind or processor != {} else ()  # a file alone says nothing, and need not
    return Sidecar(prepared.preprocess, _classes(ordered), kind, transformers=config, remarks=remarks)


def _classes(names: object) -> tuple[str, ...]:
    """Names that all are text and say something: `LABEL_0` is what transformers writes for want of a name."""
    if not isinstance(names, list) or not all(map(_name, names)):
        return ()
    return () if all(name.startswith("LABEL_") for name in names) else tuple(names)


def _name(value: object) -> str:
    """Text that can be shown on one line; else nothing."""
    return value if isinstance(value, str) and len(value) <= MAX_NAME and is_printable(value) else ""
