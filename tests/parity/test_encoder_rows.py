"""Every row that bears a name of timm's is built of the same pieces: keys, shapes, norms, activations, pooling."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from torch import nn

from vitrail.models import beit, deit, encoders, eva
from vitrail.models.registry import build_model

timm = pytest.importorskip("timm")

ROWS = [row for table in (encoders.ENCODERS, beit.VARIANTS, eva.VARIANTS, deit.VARIANTS) for row in table]
DEEP = ("large", "huge", "giant", "so400m", "7b")
PUBLISHED = [
    pytest.param(row, marks=pytest.mark.full if any(size in row for size in DEEP) else ())
    for row in ROWS
    if not row.endswith(("_debug", "_32"))
]


def built(row: str) -> tuple[nn.Module, nn.Module]:
    with torch.device("meta"), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return build_model(row), timm.create_model(row)


def pieces(model: nn.Module) -> dict[str, Any]:
    """What no shape tells: the epsilon of each norm, the function of each MLP and of each pooling."""
    said: dict[str, Any] = {"pool": getattr(model, "global_pool", None) or model.config.global_pool}
    for name, part in model.named_modules():
        if isinstance(part, nn.LayerNorm):
            said[name] = part.eps
        elif name.endswith("mlp.act"):
            said[name] = [round(value, 5) for value in part(torch.linspace(-3, 3, 7)).tolist()]
    return said


@pytest.mark.parametrize("row", PUBLISHED)
def test_a_row_is_timms(row: str) -> None:
    ours, theirs = built(row)
    shapes = [{name: tuple(value.shape) for name, value in m.state_dict().items()} for m in (ours, theirs)]
    assert shapes[0] == shapes[1]
    assert sum(p.numel() for p in ours.parameters()) == sum(p.numel() for p in theirs.parameters())
    assert pieces(ours) == pieces(theirs)
    assert (ours.num_classes, ours.num_prefix_tokens) == (theirs.num_classes, theirs.num_prefix_tokens)
    assert ours.preprocess.img_size == tuple(theirs.pretrained_cfg["input_size"][1:])
