"""Whose names a checkpoint's tensors have: every key map, and which of them knows a file."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

from torch import Tensor

from vitrail.weights.keymap import KeyMap
from vitrail.weights.keymaps import convnext, crossvit, deit, encoders, hybrid, pvt, pvt_v2, swin, vit

FAMILIES = (vit, deit, encoders, hybrid, swin, pvt, pvt_v2, crossvit, convnext)
KEYMAPS: tuple[KeyMap, ...] = tuple(keymap for family in FAMILIES for keymap in family.KEYMAPS)
OWN = "timm"
"""whose names this package's networks have, where timm has the family"""
FIRST_LAYER = re.compile(r"(patch_embed\d?\.(\d\.)?proj|patch_embed\.backbone\.(0|stem\.conv)|stem\.0)\.weight")
"""kernels over pixels of this package's networks"""
RESNET = {"conv1.weight", "layer1.0.conv1.weight"}
"""of a ResNet, whose blocks call their first kernels as it does"""


def is_network(names: Iterable[str]) -> bool:
    """Whether names of tensors are those of a network, of a known layout or our own, with nothing before them."""
    names = list(names)
    own = any(map(FIRST_LAYER.fullmatch, names)) or RESNET.issubset(names)
    return own or any(keymap.knows(names) for keymap in KEYMAPS)


def layout_of(tensors: Mapping[str, Tensor]) -> KeyMap | None:
    """The map that knows these names; None where they are ours already, or nobody's. The most telling marks win."""
    known = [keymap for keymap in KEYMAPS if keymap.knows(tensors)]
    return max(known, key=lambda keymap: len(keymap.marks), default=None)


def left_out(tensors: Mapping[str, Tensor]) -> dict[str, list[str]]:
    """Names for which this package has no use, by what they are, in words."""
    keymap = layout_of(tensors)
    return {} if keymap is None else keymap.left_out(tensors)


def favoured(tensors: Mapping[str, Tensor]) -> str:
    """Part of the name of the row that is meant where several have the shapes; empty where any is."""
    keymap = layout_of(tensors)
    return "" if keymap is None else keymap.favours


def shown(tensors: Mapping[str, Tensor]) -> Mapping[str, Any]:
    """Fields of a config that names alone tell of a network."""
    keymap = layout_of(tensors)
    return {} if keymap is None else keymap.shown


def ours(tensors: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], str]:
    """Tensors by our names, and whose names they had."""
    keymap = layout_of(tensors)
    return (dict(tensors), OWN) if keymap is None else (keymap.to_ours(tensors), keymap.source)
