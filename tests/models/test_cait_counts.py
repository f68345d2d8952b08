"""Parameters of every CaiT row, to the unit, and multiplications of one image."""

from __future__ import annotations

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from vitrail.layers.embed import pair
from vitrail.models.cait import VARIANTS, CaiT, CaiTConfig

# fmt: off
PUBLISHED = {
    #                      parameters     MACs, None where nobody published them
    "cait_debug":         (    124_186, None),
    "cait_xxs24_224":     ( 11_956_264, 2.523e9),
    "cait_xxs24_384":     ( 12_029_224, None),
    "cait_xxs36_224":     ( 17_299_720, 3.756e9),
    "cait_xxs36_384":     ( 17_372_680, None),
    "cait_xs24_384":      ( 26_670_088, 19.241e9),
    "cait_s24_224":       ( 46_916_200, 9.327e9),
    "cait_s24_384":       ( 47_062_120, 32.110e9),
    "cait_s36_384":       ( 68_366_632, 47.908e9),
    "cait_m36_384":       (271_221_352, 172.944e9),
    "cait_m48_448":       (356_460_520, 329.108e9),
    "cait_xxs_patch4_32": (  4_477_002, None),
}
# fmt: on


def formula(c: CaiTConfig) -> int:
    """Touvron et al. 2021, sections 2 and 3, term by term."""
    width, patch, size = c.embed_dim, pair(c.patch_size), pair(c.img_size)
    tokens = (size[0] // patch[0]) * (size[1] // patch[1])
    stem = (c.in_chans * patch[0] * patch[1] + 1) * width + (1 + tokens) * width  # patches, class, positions
    attention = 4 * (width + 1) * width
    talking = 2 * (c.num_heads + 1) * c.num_heads
    scales_and_norms = 2 * width + 4 * width

    def mlp(ratio: float) -> int:
        hidden = int(width * ratio)
        return (width + 1) * hidden + (hidden + 1) * width

    body = c.depth * (attention + talking + mlp(c.mlp_ratio) + scales_and_norms)
    end = c.depth_token_only * (attention + mlp(c.mlp_ratio_token_only) + scales_and_norms)
    return stem + body + end + 2 * width + (width + 1) * c.num_classes


def macs(model: CaiT) -> float:
    images = torch.zeros(1, 3, *pair(model.config.img_size), device="meta")
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(images)
    return counter.get_total_flops() / 2


def test_every_row_has_its_count() -> None:
    assert list(PUBLISHED) == list(VARIANTS)


@pytest.mark.parametrize("row", PUBLISHED)
def test_a_row_has_the_published_count(row: str) -> None:
    with torch.device("meta"):
        model = CaiT(VARIANTS[row])
    assert sum(p.numel() for p in model.parameters()) == formula(VARIANTS[row]) == PUBLISHED[row][0]


@pytest.mark.parametrize(
    "row",
    [
        pytest.param(row, marks=pytest.mark.full if VARIANTS[row].depth > 24 else ())
        for row, (_, work) in PUBLISHED.items()
        if work
    ],
)
def test_a_row_takes_the_published_work(row: str) -> None:
    with torch.device("meta"):
        model = CaiT(VARIANTS[row]).eval()
    assert macs(model) == pytest.approx(PUBLISHED[row][1], rel=0.01)
