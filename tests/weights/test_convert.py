"""What is written for other libraries, their own readers open; and it comes back as it was, bit for bit."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from vitrail.cli import main
from vitrail.folder import FolderError
from vitrail.models.backbone import Backbone
from vitrail.models.registry import build_model
from vitrail.records import Preprocess
from vitrail.research.peers import randomise
from vitrail.weights.convert import LAYOUTS, convert
from vitrail.weights.load import create_model
from vitrail.weights.published import CropMode
from vitrail.weights.timm_configs import from_timm

SEEN = Preprocess(img_size=(32, 32), mean=(0.1, 0.2, 0.3), std=(0.4, 0.5, 0.6), crop_mode="squash")


@pytest.fixture
def model() -> Backbone:
    model = build_model("vit_debug", num_classes=3).eval()
    randomise(model)
    model.preprocess, model.classes = SEEN, ("cat", "dog", "owl")
    return model


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_round_trip_is_exact(layout: str, model: Backbone, tmp_path: Path):
    convert(model, tmp_path / "out", layout)
    again = create_model(f"local-dir:{tmp_path / 'out'}", pretrained=True)
    assert all(torch.equal(value, again.state_dict()[name]) for name, value in model.state_dict().items())
    assert again.config == model.config
    assert again.classes == model.classes and again.preprocess == SEEN


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("mode", ["center", "squash"])
@pytest.mark.parametrize("crop_pct", [1.0, 32 / 36, 0.8])
def test_what_is_cut_out_of_a_picture_comes_back_too(
    crop_pct: float, mode: CropMode, layout: str, model: Backbone, tmp_path: Path
):
    model.preprocess = SEEN.replace(crop_mode=mode, crop_pct=crop_pct)
    convert(model, tmp_path / "out", layout)
    again = create_model(f"local-dir:{tmp_path / 'out'}", pretrained=True)
    assert again.preprocess == model.preprocess


@pytest.mark.parametrize("crop_pct", [0.9, 0.95, 0.97, 0.7])
def test_the_same_pixels_are_cut_out_whatever_share_they_are(crop_pct: float, model: Backbone, tmp_path: Path):
    """transformers has the short side itself, a whole number."""
    model.preprocess = SEEN.replace(crop_mode="center", crop_pct=crop_pct)
    convert(model, tmp_path / "out", "transformers")
    again = create_model(f"local-dir:{tmp_path / 'out'}", pretrained=True).preprocess
    assert math.floor(32 / again.crop_pct) == math.floor(32 / crop_pct)
    assert again.seen((500, 700)) == model.preprocess.seen((500, 700))


@pytest.mark.parametrize(("changes", "message"), [
    ({"crop_mode": "center", "img_size": (32, 48)}, "not how 32 x 48 is cut out here: set crop_mode='squash'"),
])  # fmt: skip
def test_a_cut_that_transformers_cannot_say_is_refused(changes, message: str, model: Backbone, tmp_path: Path):
    model.preprocess = SEEN.replace(**changes)
    with pytest.raises(ValueError, match=message):
        convert(model, tmp_path / "out", "transformers")
    assert not (tmp_path / "out").exists()


def test_a_network_of_which_nobody_said_how_images_are_prepared_is_refused(model: Backbone, tmp_path: Path):
    model.preprocess = SEEN.replace(known=False)
    for layout in ("timm", "transformers"):
        with pytest.raises(ValueError, match=f"{layout} wants to be told .*: set model.preprocess first"):
            convert(model, tmp_path / layout, layout)
    assert convert(model, tmp_path / "vitrail", "vitrail").is_dir()


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_head_put_in_by_hand_is_refused(layout: str, model: Backbone, tmp_path: Path):
    model.head = nn.Sequential(nn.Linear(model.num_features, 4), nn.Linear(4, 3))
    with pytest.raises(ValueError, match="got head.0.weight.* beside that: make heads with reset_classifier"):
        convert(model, tmp_path / "out", layout)
    assert not (tmp_path / "out").exists()


def test_a_compiled_part_is_written_by_its_own_names(model: Backbone, tmp_path: Path):
    before = model.state_dict()
    model.blocks[0] = torch.compile(model.blocks[0])
    convert(model, tmp_path / "out", "timm")
    again = create_model(f"local-dir:{tmp_path / 'out'}", pretrained=True).state_dict()
    assert set(again) == set(before)


def test_a_deit_without_distillation_is_no_deit_of_transformers(tmp_path: Path):
    with pytest.raises(ValueError, match=r"has a distillation token, and this network has none \(distilled=False\)"):
        convert(build_model("deit_debug", distilled=False), tmp_path / "out", "transformers")
    assert convert(build_model("deit_debug", distilled=True), tmp_path / "out", "transformers").is_dir()


@torch.no_grad()
def test_timm_opens_what_is_written_for_it(model: Backbone, tmp_path: Path):
    timm = pytest.importorskip("timm")
    theirs = timm.create_model(f"local-dir:{convert(model, tmp_path / 'out', 'timm')}", pretrained=True).eval()
    images = torch.randn(2, 3, 32, 32)
    assert torch.allclose(theirs(images), model(images), atol=1e-5)
    seen = timm.data.resolve_model_data_config(theirs)
    assert (seen["mean"], seen["std"], tuple(seen["input_size"])) == ([0.1, 0.2, 0.3], [0.4, 0.5, 0.6], (3, 32, 32))


def test_transformers_cuts_what_is_cut_here(model: Backbone, tmp_path: Path):
    transformers = pytest.importorskip("transformers")
    model.preprocess = SEEN.replace(crop_mode="center", crop_pct=0.8)
    processor = transformers.AutoImageProcessor.from_pretrained(convert(model, tmp_path / "out", "transformers"))
    picture = torch.randint(0, 256, (3, 40, 60), dtype=torch.uint8)  # of the short side that is asked for: 32 / 0.8
    prepared = processor(picture, return_tensors="pt")["pixel_values"][0]
    assert torch.allclose(prepared, SEEN.normalise(picture[:, 4:36, 14:46]), atol=1e-5)


@torch.no_grad()
def test_transformers_opens_what_is_written_for_it(model: Backbone, tmp_path: Path):
    transformers = pytest.importorskip("transformers")
    folder = convert(model, tmp_path / "out", "transformers")
    theirs = transformers.AutoModelForImageClassification.from_pretrained(folder).eval()
    images = torch.randn(2, 3, 32, 32)
    assert torch.allclose(theirs(images).logits, model(images), atol=1e-5)
    assert theirs.config.id2label == {0: "cat", 1: "dog", 2: "owl"}
    processor = transformers.AutoImageProcessor.from_pretrained(folder)
    picture = torch.randint(0, 256, (3, 32, 32), dtype=torch.uint8)
    prepared: Tensor = processor(picture, return_tensors="pt")["pixel_values"][0]
    assert torch.allclose(prepared, SEEN.normalise(picture), atol=1e-5)


FOR_TIMM: dict[str, tuple[str, dict[str, Any], str]] = {
    "eva": ("eva02_debug", {}, "eva02_tiny_patch14_224"),
    "eva, positions": ("eva02_tiny_patch4_32", {"depth": 2}, "eva02_tiny_patch14_224"),
    "dinov3": ("vit_small_patch16_dinov3", {"depth": 1, "img_size": 64, "reg_tokens": 2}, "vit_small_patch16_dinov3"),
    "resnet18": ("resnet18_224", {"img_size": 64, "in_chans": 4}, "resnet18"),
    "resnet50": ("resnet50_224", {"img_size": 64, "depths": (1, 1, 1, 1)}, "resnet50"),
    "convnext": ("convnext_tiny_224", {"img_size": 64, "embed_dim": 12, "depths": (1, 1, 2, 1)}, "convnext_tiny"),
    "beit": ("beit_tiny_patch4_32", {}, "beit_base_patch16_224"),
    "beit, no LayerScale": ("beit_debug", {"init_values": None, "global_pool": "token"}, "beit_base_patch16_224"),
    "cait": ("cait_xxs_patch4_32", {}, "cait_s24_224"),
    "cait, pooled": ("cait_debug", {"global_pool": "avg", "mlp_ratio_token_only": 2.0}, "cait_s24_224"),
    "crossvit": ("crossvit_tiny_patch4_32", {}, "crossvit_15_240"),
    "crossvit, cut": ("crossvit_debug", {"global_pool": "avg", "crop_scale": True}, "crossvit_15_240"),
    "hybrid": ("vit_tiny_r_s16_p8_224", {"depth": 2, "img_size": 64}, "vit_tiny_r_s16_p8_224"),
    "swin": ("swin_debug", {}, "swin_base_patch4_window7_224"),
    "activation": ("vit_debug", {"act": "relu"}, "vit_base_patch16_224"),
    "gated": ("vit_debug", {"mlp": "swiglu_packed", "act": "silu"}, "vit_giant_patch14_dinov2"),
    "no distillation": ("deit_debug", {"distilled": False}, "deit_tiny_patch16_224"),
}
"""a row, what is asked of it, and the network of timm's that it is told from"""
UNSEEN = {"resnet", "convnext"}
"""families whose weights do not tell the size of images"""


@pytest.mark.parametrize("case", FOR_TIMM)
@torch.no_grad()
def test_timm_answers_alike_and_what_it_is_told_comes_back(case: str, tmp_path: Path):
    timm = pytest.importorskip("timm")
    row, options, architecture = FOR_TIMM[case]
    model = build_model(row, **options).eval()
    randomise(model)
    folder = convert(model, tmp_path / "out", "timm")
    assert json.loads((folder / "config.json").read_text())["architecture"] == architecture
    images = torch.randn(2, model.preprocess.in_chans, *model.config.img_size)
    answer = model(images)
    theirs = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
    assert float((theirs(images) - answer).abs().max() / answer.abs().max()) <= 1e-5
    again = create_model(f"local-dir:{folder}", pretrained=True).eval()
    size = {"img_size": model.config.img_size} if model.family in UNSEEN else {}
    assert replace(again.config, **size) == model.config
    assert torch.equal(again(images), answer)


def test_layer_scale_of_nothing_at_first_is_layer_scale_at_timm_too(tmp_path: Path):
    timm = pytest.importorskip("timm")
    folder = convert(build_model("beit_debug", init_values=0.0), tmp_path / "out", "timm")
    assert "blocks.0.gamma_1" in timm.create_model(f"local-dir:{folder}", pretrained=True).state_dict()


@pytest.mark.parametrize(("layout", "row", "options", "message"), [
    ("timm", "vit_debug", {"norm": "rmsnorm"}, r"takes no norm='rmsnorm' \(norms are given there as code"),
    ("timm", "vit_debug", {"norm_eps": 1e-12},
     r"takes no norm_eps=1e-12 \(a norm's epsilon stands there in code.*\): write it with --to vitrail or --to trans"),
    ("timm", "vit_debug", {"pos_embed": "sincos"}, "takes no pos_embed='sincos': write it with --to vitrail$"),
    ("timm", "resnet18_32", {}, r"timm's resnet18 takes no stem='small' \(its ResNet begins with a convolution of 7 x"),
    ("timm", "resnet_debug", {}, r"takes no embed_dim=8 \(its ResNet begins with 64 channels\): .* --to vitrail$"),
    ("timm", "convnext_debug", {}, r"convnext_tiny takes no depths=\(1, 2, 1\) \(its ConvNeXt has four stages\)"),
    ("timm", "convnext_debug", {"depths": (1, 1, 1, 1)}, r"takes no patch_size=2 \(where patches have 2 pixels, its f"),
    ("timm", "pvt_v2_b0_32", {}, r"takes no patch_size=3 \(its first patches have 7 pixels a side, every 4 pixels\)"),
    ("timm", "hybrid_debug", {}, r"takes no stem_depths=\(1,\): write it with --to vitrail$"),
    ("timm", "pvt_debug", {}, "timm has no networks of the family pvt: write it with --to vitrail$"),
    ("timm", "pvt_debug", {"conv_norm_eps": 1e-6, "patch_size": 4}, "with --to vitrail or --to transformers$"),
    ("transformers", "resnet_debug", {}, "family resnet are not written for transformers: .* --to vitrail$"),
    ("transformers", "resnet18_224", {}, "are not written for transformers: write it with --to vitrail or --to timm$"),
    ("transformers", "vit_debug", {"reg_tokens": 2}, "ViT knows no reg_tokens=2: .* --to vitrail or --to timm$"),
    ("transformers", "pvt_debug", {"conv_norm_eps": 1e-6, "patch_size": 4, "img_size": (64, 96)},
     "PVT has a square img_size; got 64 x 96: write it with --to vitrail$"),
    ("transformers", "swin_debug", {"norm_eps": 1e-6},
     "has 1e-05 in some norms, whatever its layer_norm_eps; this network has norm_eps=1e-06 in all"),
    ("timm", "vit_debug", {"img_size": 30, "dynamic_pad": True},
     r"img_size 30 x 30 is padded to patches of 8 x 8 \(dynamic_pad\): write it with --to vitrail$"),
    ("transformers", "vit_debug", {"img_size": (32, 30), "dynamic_pad": True},
     r"img_size 32 x 30 is padded to patches of 8 x 8 \(dynamic_pad\): write it with --to vitrail$"),
    ("transformers", "pvt_v2_b0", {},
     r"norm_eps=1e-06 and conv_norm_eps=1e-05: make it by create_model\(…, conv_norm_eps=1e-06\).*, or write it with"),
])  # fmt: skip
def test_what_a_library_has_no_word_for_is_refused_and_only_what_works_is_advised(
    layout: str, row: str, options: dict[str, Any], message: str, tmp_path: Path
):
    with pytest.raises(ValueError, match=message):
        convert(build_model(row, **options), tmp_path / "out", layout)
    assert not (tmp_path / "out").exists()


def test_words_of_timm_that_are_strange_are_left_unknown():
    assert from_timm("crossvit_15_240", {"depth": 3, "embed_dim": (8, 16)}) == (
        "crossvit_15_240",
        {"embed_dim": (8, 16)},
    )
    assert from_timm("convnext_tiny", {"dims": ()}) == ("convnext_tiny_224", {})
    assert from_timm("nobody", {"dims": (8,)}) == ("nobody", {"dims": (8,)})


def test_a_folder_that_holds_something_is_left_alone(model: Backbone, tmp_path: Path):
    (tmp_path / "mine.txt").write_text("mine")
    with pytest.raises(FolderError, match="holds something already: name a new folder"):
        convert(model, tmp_path, "timm")
    assert [part.name for part in tmp_path.iterdir()] == ["mine.txt"]


def test_the_command_writes_a_shipped_model_for_timm(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    out = tmp_path / "cells"
    assert main(["convert", "bloodcells", str(out), "--to", "timm"]) == 0
    assert capsys.readouterr().out.strip() == str(out)
    said = json.loads((out / "config.json").read_text())
    assert said["architecture"] == "vit_base_patch16_224" and said["model_args"]["embed_dim"] == 128
    assert main(["convert", "bloodcells", str(out), "--to", "timmm"]) == 2
    assert (
        "error: --to must be one of vitrail, timm, transformers; got 'timmm': did you mean timm"
        in capsys.readouterr().err
    )
