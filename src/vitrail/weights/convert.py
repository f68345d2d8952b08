"""A network written as other libraries write theirs, so that their own readers open it.

    timm            config.json (architecture, model_args, pretrained_cfg): timm.create_model("local-dir:…")
    transformers    config.json, preprocessor_config.json: from_pretrained of the class that config.json names

Names go through the key maps, backwards; numbers are not touched, so that a round trip is exact. A family that a
library does not have cannot be written for it.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor

from vitrail.folder import CONFIG, WEIGHTS, FolderError, save_tensors, whole_folder
from vitrail.models.backbone import Backbone
from vitrail.models.registry import FAMILIES
from vitrail.names import check_choice
from vitrail.records import Preprocess
from vitrail.weights.sidecar import PROCESSOR, RESAMPLING
from vitrail.weights.sources import SOURCES
from vitrail.weights.transformers_configs import CONFIGS
from vitrail.weights.transformers_names import to_transformers

PILLOW = {name: int(number) for number, name in RESAMPLING.items()}
TIMM = {
    "vit": "vit_base_patch16_224",
    "deit": "deit_base_distilled_patch16_224",
    "swin": "swin_base_patch4_window7_224",
    "cait": "cait_s24_224",
    "pvt_v2": "pvt_v2_b2",
    "crossvit": "crossvit_15_240",
    "hybrid": "vit_base_r50_s16_224",
    "beit": "beit_base_patch16_224",
    "eva": "eva02_base_patch14_224",
}
"""by family, a row that timm has by the same name and config, to be told from with `model_args`"""
OF_TIMM = {source.row for source in SOURCES.values() if source.place.startswith("hub:timm/")}
"""rows that timm has"""
SHAPE = {"img_size", "in_chans", "num_heads", "mlp_ratio", "qkv_bias"}
ARGS = {
    "vit": SHAPE | {"patch_size", "embed_dim", "depth", "qk_norm", "init_values", "class_token", "reg_tokens",
                    "no_embed_class", "global_pool"},
    "deit": SHAPE | {"patch_size", "embed_dim", "depth"},
    "swin": SHAPE | {"patch_size", "embed_dim", "depths", "window_size"},
    "cait": SHAPE | {"patch_size", "embed_dim", "depth", "depth_token_only"},
    "pvt_v2": SHAPE - {"img_size", "mlp_ratio"} | {"embed_dims", "depths", "mlp_ratios", "sr_ratios", "linear"},
    "crossvit": {"img_size", "in_chans"},
    "hybrid": {"img_size", "in_chans"},
    "beit": {"img_size", "in_chans"},
    "eva": {"img_size", "in_chans"},
}  # fmt: skip
"""fields that timm's constructor of a family takes by the same name, in the same sense"""
SAME = {"attn", "num_classes", "dynamic_pad", "img_size", "drop_rate", "pos_drop_rate", "proj_drop_rate",
        "attn_drop_rate", "drop_path_rate"}  # fmt: skip
"""fields that change no answer of a trained network, or are written elsewhere"""


def convert(model: Backbone, folder: str | Path, layout: str) -> Path:
    """Writes `model` to a new folder in the layout of "timm", "transformers" or "vitrail"; returns the folder.

    Raises `ValueError` where that library has no such network or cannot say how its images are prepared, and where
    the config does not describe the network (`Backbone.check_savable`); `FolderError` where something stands at
    `folder`.
    """
    check_choice("layout", layout, LAYOUTS)
    path = Path(folder)
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise FolderError(f"{path} holds something already: name a new folder")
    model.check_savable()
    return LAYOUTS[layout](model, path)


def _ours(model: Backbone, path: Path) -> Path:
    return model.save_pretrained(path)


def _timm(model: Backbone, path: Path) -> Path:
    if model.family not in TIMM:
        raise ValueError(f"timm has no {model.family} of these names: write it as vitrail or transformers do")
    row = model.variant if model.variant in OF_TIMM else TIMM[model.family]
    own, usual = asdict(model.config), asdict(FAMILIES[model.family].variants[row])
    changed = {name: value for name, value in own.items() if value != usual[name]}
    if strange := sorted(changed.keys() - ARGS[model.family] - SAME):
        raise ValueError(
            f"timm's {row} takes no {strange[0]}={own[strange[0]]!r}: write it as vitrail or transformers do"
        )
    said = {
        "architecture": row,
        "num_classes": model.num_classes,
        "num_features": model.num_features,
        "pretrained_cfg": _pretrained_cfg(model),
        "model_args": {name: value for name, value in changed.items() if name in ARGS[model.family]},
    }
    return _write(model, path, {CONFIG: said}, dict)


def _pretrained_cfg(model: Backbone) -> dict[str, Any]:
    p = _known(model, "timm")
    said: dict[str, Any] = {
        "input_size": [p.in_chans, *p.img_size],
        "mean": list(p.mean),
        "std": list(p.std),
        "interpolation": p.interpolation,
        "crop_pct": p.crop_pct,
        "crop_mode": p.crop_mode,
        "num_classes": model.num_classes,
        "fixed_input_size": "img_size" in ARGS[model.family],
    }
    return said | ({"label_names": list(model.classes)} if model.classes else {})


def _transformers(model: Backbone, path: Path) -> Path:
    if model.family not in CONFIGS:
        raise ValueError(f"transformers has no {model.family} of these names: write it as timm or vitrail do")
    names = dict(enumerate(model.classes or [f"LABEL_{i}" for i in range(model.num_classes)]))
    said = CONFIGS[model.family](model.config) | {
        "num_labels": model.num_classes,
        "id2label": names,
        "label2id": {name: number for number, name in names.items()},
    }
    p = _known(model, "transformers")
    processor = {
        "image_processor_type": "ViTImageProcessor",
        "do_resize": True,
        **_crop(p),
        "resample": PILLOW[p.interpolation],
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": list(p.mean),
        "image_std": list(p.std),
    }
    return _write(model, path, {CONFIG: said, PROCESSOR: processor}, partial(to_transformers, said["model_type"]))


def _known(model: Backbone, library: str) -> Preprocess:
    if not model.preprocess.known:
        raise ValueError(
            f"{library} wants to be told how images are prepared, and of this network nobody has said it: set "
            "model.preprocess first, or write it as vitrail does"
        )
    return model.preprocess


def _crop(p: Preprocess) -> dict[str, Any]:
    """transformers' words for the size: a picture pressed into it, or one cut out of a picture of a whole short side.

    Raises `ValueError` where the words would not make the same pixels.
    """
    height, width = p.img_size
    size = {"height": height, "width": width}
    if p.crop_mode == "squash":
        if p.crop_pct != 1:
            raise ValueError(f"transformers knows no crop_pct={p.crop_pct} of a squashed picture: set crop_pct=1.0")
        return {"size": size, "do_center_crop": False}
    if height != width:
        raise ValueError(
            f"transformers cuts out of a short side, which is not how {height} x {width} is cut out here: set "
            "crop_mode='squash' of model.preprocess, or write it as timm or vitrail do"
        )
    edge = math.floor(height / p.crop_pct)  # as `Preprocess` resizes: the same pixels, whatever share they are
    return {"size": {"shortest_edge": edge}, "do_center_crop": True, "crop_size": size}


def _write(
    model: Backbone,
    path: Path,
    said: Mapping[str, dict[str, Any]],
    named: Callable[[dict[str, Tensor]], dict[str, Tensor]],
) -> Path:
    """`named` gives the tensors the names that the folder's reader knows."""
    tensors = named({name: value.detach().cpu().contiguous() for name, value in model.plain_state().items()})
    with whole_folder(path) as fresh:
        save_tensors(tensors, fresh / WEIGHTS)
        for name, values in said.items():
            (fresh / name).write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")
    return path


LAYOUTS: dict[str, Callable[[Backbone, Path], Path]] = {"vitrail": _ours, "timm": _timm, "transformers": _transformers}
