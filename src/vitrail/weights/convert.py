"""A network written as other libraries write theirs, so that their own readers open it.

    timm            config.json (architecture, model_args, pretrained_cfg): timm.create_model("local-dir:…")
    transformers    config.json, preprocessor_config.json: from_pretrained of the class that config.json names

Names go through the key maps, backwards; numbers are not touched, so that a round trip is exact. A family that a
library does not have cannot be written for it.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from torch import Tensor

from vitrail.folder import CONFIG, WEIGHTS, FolderError, save_tensors, whole_folder
from vitrail.layers.embed import pair
from vitrail.models.backbone import Backbone
from vitrail.models.registry import FAMILIES
from vitrail.models.swin import SwinConfig
from vitrail.models.vit import VisionTransformer
from vitrail.names import check_choice
from vitrail.records import Preprocess
from vitrail.weights.preprocessing import PROCESSOR, RESAMPLING
from vitrail.weights.sources import SOURCES
from vitrail.weights.timm_configs import ARGS, NAMES, SAME, to_timm, uneven_stage
from vitrail.weights.transformers_configs import CONFIGS, Unsaid
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
    "resnet": "resnet50_224",
    "convnext": "convnext_tiny_224",
}
"""by family, the row of timm's that a network of no row is told from first, with `model_args`"""
OF_TIMM = {source.row for source in SOURCES.values() if source.place.startswith("hub:timm/")} | set(NAMES)
"""rows that timm has"""
EPS = "a norm's epsilon stands there in code, and no config.json can say another"
WHY = {
    **{(family, "norm_eps"): EPS for family in TIMM},
    ("vit", "norm"): "norms are given there as code, and no config.json can name them",
    ("pvt_v2", "patch_size"): "its first patches have 7 pixels a side, every 4 pixels",
    ("resnet", "stem"): "its ResNet begins with a convolution of 7 x 7 at every second pixel, and pooling",
    ("resnet", "embed_dim"): "its ResNet begins with 64 channels",
    ("convnext", "depths"): "its ConvNeXt has four stages",
    ("convnext", "patch_size"): "where patches have 2 pixels, its first stage halves the map too",
}
"""by family and field, why timm cannot be told, where that is not plain"""
FILES = Mapping[str, dict[str, Any]]


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
    if layout == "vitrail":
        return model.save_pretrained(path)
    try:
        _check_whole(model)
        said, tensors = OTHERS[layout](model)
    except Unsaid as error:
        ways = " or ".join(f"--to {other}" for other in LAYOUTS if other != layout and _can_be(other, model))
        raise ValueError(f"{error}{', or' if error.mend else ':'} write it with {ways}") from None
    with whole_folder(path) as fresh:
        save_tensors(tensors, fresh / WEIGHTS)
        for name, values in said.items():
            (fresh / name).write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")
    return path


def _check_whole(model: Backbone) -> None:
    """Raises `Unsaid` where padding makes cells that the positions of other libraries' networks have no place for."""
    if not isinstance(model, VisionTransformer):
        return
    size, patch = pair(model.config.img_size), pair(model.config.patch_size)
    if any(side % cell for side, cell in zip(size, patch, strict=True)):
        raise Unsaid(
            f"others' positions are of whole patches, and img_size {size[0]} x {size[1]} is padded to patches of "
            f"{patch[0]} x {patch[1]} (dynamic_pad)"
        )


def _can_be(layout: str, model: Backbone) -> bool:
    """Whether the network can be written so: what is advised must work."""
    if layout == "vitrail":
        return True
    try:
        _check_whole(model)
        OTHERS[layout](model)
    except ValueError:
        return False
    return True


def _timm(model: Backbone) -> tuple[FILES, dict[str, Tensor]]:
    if model.family not in TIMM:
        raise Unsaid(f"timm has no networks of the family {model.family}")
    row, changed = _nearest_of_timm(model)
    if strange := _strange(model, changed):
        why = WHY.get((model.family, strange[0]), "")
        raise Unsaid(f"timm's {NAMES.get(row, row)} takes no {strange[0]}={changed[strange[0]]!r}{why and f' ({why})'}")
    if isinstance(model.config, SwinConfig) and (odd := uneven_stage(model.config)):
        raise Unsaid(f"timm's Swin answers otherwise where {odd}, as img_size {model.config.img_size} makes it")
    said = {
        "architecture": NAMES.get(row, row),
        "num_classes": model.num_classes,
        "num_features": model.num_features,
        "pretrained_cfg": _pretrained_cfg(model),
        "model_args": to_timm(model.family, changed),
    }
    return {CONFIG: said}, _tensors(model)


def _nearest_of_timm(model: Backbone) -> tuple[str, dict[str, Any]]:
    """The row of timm's from which the fewest fields differ that cannot be told, and all that differ from it."""
    rows = [model.variant, TIMM[model.family], *FAMILIES[model.family].variants]
    own, others = asdict(model.config), {}
    for row in (row for row in rows if row in OF_TIMM):
        usual = asdict(FAMILIES[model.family].variants[row])
        others[row] = {name: value for name, value in own.items() if value != usual[name]}
    return min(others.items(), key=lambda item: len(_strange(model, item[1])))


def _strange(model: Backbone, changed: Mapping[str, Any]) -> list[str]:
    """Fields that timm cannot be told. Its ConvNeXt has four stages."""
    strange = changed.keys() - ARGS[model.family] - SAME
    if model.family == "convnext" and len(model.config.depths) != 4:
        strange |= {"depths"}
    return sorted(strange)


def _tensors(model: Backbone) -> dict[str, Tensor]:
    return {name: value.detach().cpu().contiguous() for name, value in model.plain_state().items()}


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


def _transformers(model: Backbone) -> tuple[FILES, dict[str, Tensor]]:
    if model.family not in CONFIGS:
        raise Unsaid(f"networks of the family {model.family} are not written for transformers")
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
    return {CONFIG: said, PROCESSOR: processor}, to_transformers(said["model_type"], _tensors(model))


def _known(model: Backbone, library: str) -> Preprocess:
    if not model.preprocess.known:
        raise ValueError(
            f"{library} wants to be told how images are prepared, and of this network nobody has said it: set "
            "model.preprocess first, or write it as vitrail does"
        )
    return model.preprocess


def _crop(p: Preprocess) -> dict[str, Any]:
    """transformers' words for the size: a picture pressed into it, or its short side resized; and what is cut out.

    Raises `Unsaid` where the words would not make the same pixels.
    """
    height, width = p.img_size
    middle = {"height": height, "width": width}
    if p.crop_mode == "squash":
        size = dict(zip(middle, p.resized, strict=True))
        return {"size": size} | ({"do_center_crop": True, "crop_size": middle} if size != middle else {})
    if height != width:
        raise Unsaid(
            f"transformers cuts out of a short side, which is not how {height} x {width} is cut out here",
            "set crop_mode='squash' of model.preprocess",
        )
    return {"size": {"shortest_edge": p.resized[0]}, "do_center_crop": True, "crop_size": middle}


OTHERS: dict[str, Callable[[Backbone], tuple[FILES, dict[str, Tensor]]]] = {
    "timm": _timm,
    "transformers": _transformers,
}
"""by layout, what its small files say and its weights, by its own names; each raises `Unsaid`"""
LAYOUTS = ("vitrail", *OTHERS)
