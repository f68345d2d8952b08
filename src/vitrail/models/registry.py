"""Every model by its name. A family is one line here and one table of rows in its own file."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import fields, replace
from fnmatch import fnmatch
from typing import Any, NamedTuple

import torch

from vitrail.layers.embed import pair
from vitrail.models import (
    beit,
    cait,
    cnn,
    convnext,
    crossvit,
    deit,
    encoders,
    eva,
    hybrid,
    hybrid_cnn,
    pvt,
    pvt_v2,
    swin,
    vit,
    vit_config,
)  # fmt: skip
from vitrail.models.backbone import Backbone
from vitrail.models.config import spelled
from vitrail.names import MODEL_SPELLINGS, nearest


class Family(NamedTuple):
    """A network class, its config class, and its published rows; the first row is the family's debug model."""

    model: type[Backbone]
    config: type
    variants: Mapping[str, Any]
    aliases: Mapping[str, str] = {}
    """other people's name -> row"""


FAMILIES: dict[str, Family] = {
    "vit": Family(vit.VisionTransformer, vit_config.ViTConfig, vit_config.VARIANTS | encoders.ENCODERS),
    "deit": Family(deit.DeiT, deit.DeiTConfig, deit.VARIANTS),
    "beit": Family(beit.Beit, beit.BeitConfig, beit.VARIANTS),
    "eva": Family(eva.Eva, eva.EvaConfig, eva.VARIANTS),
    "hybrid": Family(hybrid.HybridViT, hybrid.HybridConfig, hybrid.VARIANTS),
    "hybrid_cnn": Family(hybrid_cnn.HybridCNNViT, hybrid_cnn.HybridCNNConfig, hybrid_cnn.VARIANTS),
    "swin": Family(swin.SwinTransformer, swin.SwinConfig, swin.VARIANTS),
    "cait": Family(cait.CaiT, cait.CaiTConfig, cait.VARIANTS),
    "pvt": Family(pvt.PyramidVisionTransformer, pvt.PVTConfig, pvt.VARIANTS),
    "pvt_v2": Family(pvt_v2.PyramidVisionTransformerV2, pvt_v2.PVTV2Config, pvt_v2.VARIANTS),
    "crossvit": Family(crossvit.CrossViT, crossvit.CrossViTConfig, crossvit.VARIANTS, crossvit.ALIASES),
    "resnet": Family(cnn.ResNet, cnn.ResNetConfig, cnn.VARIANTS),
    "convnext": Family(convnext.ConvNeXt, convnext.ConvNeXtConfig, convnext.VARIANTS),
}
ROWS: dict[str, str] = {row: name for name, family in FAMILIES.items() for row in family.variants}
"""row -> family"""
TORCHVISION = {
    "vit_base_patch16_224": "vit_b_16",
    "vit_base_patch32_224": "vit_b_32",
    "vit_large_patch16_224": "vit_l_16",
    "vit_large_patch32_224": "vit_l_32",
    "vit_huge_patch14_224": "vit_h_14",
    "swin_tiny_patch4_window7_224": "swin_t",
    "swin_small_patch4_window7_224": "swin_s",
    "swin_base_patch4_window7_224": "swin_b",
    "resnet18_224": "resnet18",
    "resnet50_224": "resnet50",
    "convnext_tiny_224": "convnext_tiny",
}
"""row -> torchvision's name"""


def list_models(pattern: str = "*") -> list[str]:
    """Names of all rows that match a shell pattern such as `vit_*_384`, in the order of their tables."""
    return [row for row in ROWS if fnmatch(row, pattern)]


def build_model(name: str, **overrides: Any) -> Backbone:
    """A freshly initialised model: a row's name or its short name, with config fields overridden.

    Other libraries' spellings of the fields are taken. Raises `ValueError` for an unknown name, `TypeError` for an
    unknown field, each naming the nearest.
    """
    sizes = [value for word, value in overrides.items() if MODEL_SPELLINGS.get(word, word) == "img_size"]
    row = resolve_name(name, min(pair(sizes[0])) if sizes else 224)
    family = FAMILIES[ROWS[row]]
    base = family.variants[row]
    model = family.model(replace(base, **spelled(family.config, overrides, base)))
    model.variant = row
    return model


def build_from_config(family: str, config: Mapping[str, Any], variant: str = "") -> Backbone:
    """The network that a model folder's card describes, freshly initialised."""
    if family not in FAMILIES:
        raise ValueError(f"family must be one of {', '.join(FAMILIES)}; got {family!r}")
    kind = FAMILIES[family]
    known = {f.name for f in fields(kind.config)}
    unknown = sorted(set(config) - known)
    if unknown:
        raise ValueError(f"the config of {family!r} has no field {', '.join(map(repr, unknown))}")
    model = kind.model(kind.config(**config))
    model.variant = variant
    return model


def resolve_name(name: str, img_size: int = 224) -> str:
    """The row that `name` means for images of this many pixels: `vit_base` is `vit_base_patch4_32` at 32 pixels.

    A full name is itself, at any size: others publish weights for `pvt_v2_b0`, which `pvt_v2_b0_32` could not hold. A
    short name takes the row whose native size is nearest by ratio, the first of equals.
    """
    name = next((f.aliases[name] for f in FAMILIES.values() if name in f.aliases), name)
    if name in ROWS:
        return name
    short = {row: re.sub(r"(_patch\d+)?(_window\d+)?_\d+$", "", row) for row in ROWS}
    rows = [row for row in ROWS if short[row] == name]
    if not rows:
        near = ", ".join(nearest(name, {*short.values(), *ROWS}))
        raise ValueError(f"there is no model {name!r}; {elsewhere(name) or f'the nearest are {near}'}")
    return min(rows, key=lambda row: abs(math.log(native_size(row) / img_size)))


def elsewhere(name: str) -> str:
    """What is called `name` elsewhere, in our words; empty where nothing is known to be."""
    if "/" in name:
        return f"a repository of the hub is opened by create_model('hf-hub:{name}', pretrained=True)"
    return next((f"torchvision's {name} is {row} here" for row, theirs in TORCHVISION.items() if theirs == name), "")


def native_size(row: str) -> int:
    """Pixels a side, the shorter one, of the images that a row is made for."""
    return min(pair(FAMILIES[ROWS[row]].variants[row].img_size))


class ModelRow(NamedTuple):
    """One line of a table of models."""

    name: str
    parameters: int
    img_size: tuple[int, int]
    num_classes: int


def model_table(pattern: str = "*") -> list[ModelRow]:
    """The matching rows with their exact parameter counts, built without memory for weights."""
    table = []
    for name in list_models(pattern):
        with torch.device("meta"):
            model = build_model(name)
        count = sum(p.numel() for p in model.parameters())
        table.append(ModelRow(name, count, model.preprocess.img_size, model.config.num_classes))
    return table
