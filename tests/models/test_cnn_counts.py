"""Parameters and multiplications of every row with a convolutional network in it."""

from __future__ import annotations

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from vitrail.models import cnn, convnext, hybrid, hybrid_cnn
from vitrail.models.registry import build_model

TV = "torchvision 0.29, `num_params` and `_ops` of the weights"
TIMM = "timm 1.0.31, its model of this name with 1000 classes"
OWN = "counted here"
# fmt: off
PUBLISHED: dict[str, tuple[int, float | None, str]] = {
    #                                         10^9 multiplications
    "hybrid_debug":              (    118_602,   None, OWN),
    "vit_tiny_r_s16_p8_224":     (  6_337_704,   None, TIMM),
    "vit_tiny_r_s16_p8_384":     (  6_355_944,   None, TIMM),
    "vit_small_r26_s32_224":     ( 36_431_912,   None, TIMM),
    "vit_small_r26_s32_384":     ( 36_468_392,   None, TIMM),
    "vit_base_r26_s32_224":      (101_383_976,   None, TIMM),
    "vit_base_r50_s16_224":      ( 98_659_112,   None, TIMM),
    "vit_base_r50_s16_384":      ( 98_950_952,   None, TIMM),
    "vit_large_r50_s32_224":     (328_994_856,   None, TIMM),
    "vit_large_r50_s32_384":     (329_092_136,   None, TIMM),
    "hybrid_cnn_debug":          (    111_202,   None, OWN),
    "hybrid_tiny_224":           (  4_451_592,   None, OWN),
    "hybrid_small_224":          ( 12_128_536,   None, OWN),
    "hybrid_small_resnet18_224": ( 13_989_288,   None, OWN),
    "hybrid_tiny_32":            (  3_831_050,   None, OWN),
    "hybrid_small_32":           ( 10_907_914,   None, OWN),
    "resnet_debug":              (    176_402,   None, OWN),
    "resnet18_224":              ( 11_689_512,  1.814, TV),
    "resnet50_224":              ( 25_557_032,  4.089, TV),
    "resnet18_32":               ( 11_173_962,   None, OWN),
    "resnet50_32":               ( 23_520_842,   None, OWN),
    "convnext_debug":            (     41_734,   None, OWN),
    "convnext_tiny_224":         ( 28_589_128,  4.456, TV),
    "convnext_tiny_32":          ( 27_824_362,   None, OWN),
}
# fmt: on
ROWS = [row for family in (hybrid, hybrid_cnn, cnn, convnext) for row in family.VARIANTS]


def multiplications(model: torch.nn.Module, *size: int) -> int:
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(torch.zeros(1, 3, *size, device="meta"))
    return counter.get_total_flops() // 2


def test_every_row_has_its_count() -> None:
    assert list(PUBLISHED) == ROWS


@pytest.mark.parametrize("row", PUBLISHED)
def test_a_row_has_the_published_count(row: str) -> None:
    parameters, billions, source = PUBLISHED[row]
    with torch.device("meta"):
        model = build_model(row)
    assert sum(p.numel() for p in model.parameters()) == parameters, source
    if billions is not None:
        found = multiplications(model.eval(), *model.preprocess.img_size) / 1e9
        assert found == pytest.approx(billions, rel=1e-3), source


@pytest.mark.parametrize("row", [row for row, (_, _, source) in PUBLISHED.items() if source == TIMM])
def test_a_hybrid_multiplies_as_often_as_timms(row: str) -> None:
    timm = pytest.importorskip("timm")
    with torch.device("meta"):
        ours, theirs = build_model(row, attn="fused"), timm.create_model(row, num_classes=1000, device="meta")
    size = ours.preprocess.img_size
    assert theirs.state_dict().keys() == ours.state_dict().keys()
    assert multiplications(ours.eval(), *size) == pytest.approx(multiplications(theirs.eval(), *size), rel=1e-3)
