"""Which rows are held against which libraries, and what is said of those that are not."""

from __future__ import annotations

import logging
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from vitrail.layers.embed import pair
from vitrail.models.registry import FAMILIES, ROWS, build_model
from vitrail.research import parity
from vitrail.research.parity import compare, other_size, parity_table
from vitrail.research.peers import Peer, build_peer

GIANT = "vit_giant_patch14_dinov2"
Asked = list[tuple[str, str]]


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> Asked:
    """The pairs that peers are wanted for; nobody has any."""
    pairs: Asked = []

    def nobody(row: str, source: str) -> None:
        pairs.append((row, source))

    monkeypatch.setattr(parity, "build_peer", nobody)
    return pairs


@pytest.fixture
def without_timm(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parity, "find_spec", lambda name: None if name == "timm" else object())


def test_a_library_that_is_not_here_is_left_out_and_told(asked: Asked, without_timm: None, caplog):
    caplog.set_level(logging.INFO, "vitrail")
    list(parity_table("vit_debug"))
    assert asked == [("vit_debug", "torchvision"), ("vit_debug", "transformers")]
    assert caplog.messages == ["timm is not installed and left out: pip install 'vitrail[parity]' installs it"]


def test_a_library_that_is_named_must_be_here(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(ValueError, match=r"timm is not installed: pip install 'vitrail\[parity\]'"):
        list(parity_table("vit_debug", ("timm",)))


def test_a_library_that_nobody_knows_is_an_error_before_any_row(asked: Asked):
    with pytest.raises(ValueError, match="sources must be one of timm, torchvision, transformers; got 'tim'"):
        next(parity_table("vit_debug", ("torchvision", "tim")))
    assert asked == []


def test_a_giant_is_left_out_and_told_unless_it_is_the_only_one(asked: Asked, caplog):
    caplog.set_level(logging.INFO, "vitrail")
    list(parity_table("vit_[gd]*", ("timm",)))
    assert asked == [("vit_debug", "timm")]
    assert caplog.messages[0] == f"{GIANT} is left out for its 1,136,479,232 parameters: name it alone to have it"
    list(parity_table(GIANT, ("timm",)))
    assert asked[1:] == [(GIANT, "timm")]


def test_a_deit_without_distillation_is_not_held_against_transformers():
    assert build_peer("deit_tiny_patch16_224", "transformers") is None


class Twin(nn.Module):
    """Our own network as somebody else's, which fails for images of some heights."""

    def __init__(self, *broken: int) -> None:
        super().__init__()
        self.net, self.broken = build_model("vit_debug").eval(), broken

    def forward(self, images: Tensor) -> Tensor:
        if images.shape[-2] in self.broken:
            raise RuntimeError("it broke")
        logits: Tensor = self.net(images)
        return logits


def peer(*broken: int) -> Peer:
    def save(model: nn.Module, folder: Path) -> Path:
        torch.save(model.get_submodule("net").state_dict(), folder / "m.pth")
        return folder / "m.pth"

    return Peer("twin", Twin(*broken), r"net\.blocks\.\d+", save, lambda out: out)


def test_a_library_may_fail_at_another_size_and_not_at_the_rows_own():
    own, other = (pair(build_model("vit_debug").config.img_size), other_size(build_model("vit_debug")))
    assert [found.size for found in compare("vit_debug", peer())] == [own, other]
    assert [found.size for found in compare("vit_debug", peer(other[0]))] == [own]
    with pytest.raises(RuntimeError, match="it broke"):
        list(compare("vit_debug", peer(own[0])))


SMALL: dict[str, Any] = dict(depth=2, embed_dim=48, num_heads=3)
ENCODERS = {
    "vit_small_patch14_dinov2": dict(img_size=56),
    "vit_small_patch14_reg4_dinov2": dict(img_size=56),
    "vit_giant_patch14_dinov2": dict(img_size=56),
    "vit_small_patch16_dinov3": dict(img_size=64),
    "vit_small_plus_patch16_dinov3_qkvb": dict(img_size=64),
    "vit_base_patch32_clip_224": dict(img_size=64),
    "vit_base_patch32_clip_quickgelu_224": dict(img_size=64),
    "vit_base_patch16_siglip_224": dict(img_size=64),
    "beit_base_patch16_224": dict(img_size=64),
}


@pytest.mark.parametrize("row", ENCODERS)
def test_an_encoder_is_held_against_transformers(row: str, monkeypatch: pytest.MonkeyPatch):
    """The rows, made small."""
    pytest.importorskip("transformers")
    variants = FAMILIES[ROWS[row]].variants
    monkeypatch.setitem(variants, row, replace(variants[row], **SMALL | ENCODERS[row]))
    peer = build_peer(row, "transformers")
    assert peer is not None
    found = list(compare(row, peer))
    assert all(each.compared == 2 and each.logits < 1e-5 and each.features < 1e-5 for each in found)
    resized = "dinov3" in row or "reg4" in row  # the others by ways of transformers' own, or not
    assert len(found) == 1 + resized


def test_transformers_writes_without_bars_and_has_them_again(tmp_path: Path, capfd: pytest.CaptureFixture[str]):
    logging_of_theirs = pytest.importorskip("transformers.utils").logging
    logging_of_theirs.enable_progress_bar()
    peer = build_peer("pvt_tiny", "transformers")
    assert peer is not None
    peer.save(peer.model, tmp_path)
    assert "shards" not in capfd.readouterr().err
    assert logging_of_theirs.is_progress_bar_enabled()


def test_in_float64_there_is_no_rounding_to_speak_of():
    row = "vit_tiny_r_s16_p8_224"
    found = next(compare(row, build_peer(row, "timm"), torch.float64))
    assert max(found.logits, found.features) < 1e-12
