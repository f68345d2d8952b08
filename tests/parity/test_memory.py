"""A pass of each family takes no more memory than the same network of any other library."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import pytest
import torch

from vitrail.layers.embed import pair
from vitrail.models.registry import build_model
from vitrail.research.peers import SOURCES, build_peer

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
ROWS = (
    "vit_tiny_patch16_224", "deit_tiny_distilled_patch16_224", "swin_tiny_patch4_window7_224", "pvt_tiny", "pvt_v2_b0",
    "pvt_v2_b2_li", "cait_xxs24_224", "crossvit_9_240", "vit_tiny_r_s16_p8_224", "beit_tiny_patch4_32",
    "eva02_tiny_patch14_224", "vit_tiny_patch16_dinov3_qkvb", "resnet18_224", "convnext_tiny_224",
)  # fmt: skip
BATCH = 8


@pytest.mark.parametrize("row", ROWS)
@torch.inference_mode()
def test_peak_memory_is_no_higher(row: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    from memory import peak_megabytes

    ours = build_model(row).eval()
    images = torch.randn(BATCH, 3, *pair(ours.config.img_size))
    peers = {source: peer.model.eval() for source in SOURCES if (peer := build_peer(row, source))}
    found = {name: peak_megabytes(partial(model, images)) for name, model in ({"ours": ours} | peers).items()}
    assert found["ours"] <= min(found[name] for name in peers), found


@torch.inference_mode()
def test_the_peak_is_what_is_held_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    from memory import peak_megabytes

    def call() -> None:
        one, other = torch.empty(2**20), torch.empty(2**19)  # 4 MB and 2 MB of fp32
        del one, other
        torch.empty(2**20)

    assert peak_megabytes(call) == 6
