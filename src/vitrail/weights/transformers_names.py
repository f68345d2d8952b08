"""Our tensors as transformers' networks have them on disk: a key map by `model_type`, and what names alone cannot say.

Mask tokens, which train DINO's and no finished network reads, are written as zeros where transformers wants one.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace

import torch
from torch import Tensor

from vitrail.weights.keymap import KeyMap, Row
from vitrail.weights.keymaps import deit, encoders, pvt, pvt_v2, swin, vit

Tensors = Mapping[str, Tensor]


def _under(keymap: KeyMap, roots: str, root: str, *more: Row) -> KeyMap:
    """With the one root that is meant, of those that files have."""
    rows = tuple(row._replace(theirs=row.theirs.replace(roots, root)) for row in keymap.rows)
    return replace(keymap, rows=(*rows, *more))


PLAIN_MLP = Row("layer.{i}.mlp.up_proj.{w}", "blocks.{i}.mlp.fc1.{w}")
"""DINOv3's first layer where there is no gate"""
NAMES: dict[str, KeyMap] = {
    "vit": vit.TRANSFORMERS,
    "deit": deit.TRANSFORMERS,
    "swin": swin.TRANSFORMERS,
    "pvt": pvt.TRANSFORMERS,
    "pvt_v2": pvt_v2.TRANSFORMERS,
    "beit": encoders.BEIT,
    "dinov2": _under(encoders.DINOV2, encoders.ROOT, "dinov2."),
    "dinov2_with_registers": _under(encoders.DINOV2, encoders.ROOT, "dinov2_with_registers."),
    "dinov3_vit": _under(encoders.DINOV3, "[model.]", "", PLAIN_MLP),
    "clip_vision_model": encoders.CLIP,
    "siglip_vision_model": encoders.SIGLIP,
}
"""by transformers' `model_type`"""


def to_transformers(kind: str, tensors: Tensors) -> dict[str, Tensor]:
    """Our tensors by the names of the `model_type` `kind`. Raises `ValueError` as `KeyMap.to_theirs` does."""
    return FINISH.get(kind, dict)(NAMES[kind].to_theirs(tensors))


def _dinov2(theirs: Tensors) -> dict[str, Tensor]:
    """A gated layer has a name of its own, which its shape tells: gate and value together are twice as wide."""
    inner = {name: value.shape for name, value in theirs.items() if ".mlp.fc" in name and value.ndim == 2}
    gated = any(shape[0] == 2 * inner[name.replace("fc1", "fc2")][1] for name, shape in inner.items() if "fc1" in name)
    if not gated:
        return dict(theirs)
    return {name.replace("mlp.fc1", "mlp.weights_in").replace("mlp.fc2", "mlp.weights_out"): value
            for name, value in theirs.items()}  # fmt: skip


def _dinov2_with_registers(theirs: Tensors) -> dict[str, Tensor]:
    """Here the class token's position is in the class token; there it stands beside it, and is nothing."""
    root = "dinov2_with_registers.embeddings."
    token, pos = theirs[f"{root}cls_token"], theirs[f"{root}position_embeddings"]
    return _dinov2(theirs) | {
        f"{root}position_embeddings": torch.cat([torch.zeros_like(token), pos], dim=1),
        f"{root}mask_token": torch.zeros_like(token[0]),
    }


def _dinov3(theirs: Tensors) -> dict[str, Tensor]:
    return dict(theirs) | {"embeddings.mask_token": torch.zeros_like(theirs["embeddings.cls_token"])}


FINISH: dict[str, Callable[[Tensors], dict[str, Tensor]]] = {
    "dinov2": _dinov2,
    "dinov2_with_registers": _dinov2_with_registers,
    "dinov3_vit": _dinov3,
}
