"""How images are prepared for others' weights: their own processors say; what cannot be done as they do is told."""

from __future__ import annotations

import json
import logging
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from vitrail.data.transforms import eval_transform
from vitrail.models.registry import build_model
from vitrail.records import IMAGENET_MEAN, IMAGENET_STD
from vitrail.weights import published
from vitrail.weights.convert import convert
from vitrail.weights.load import create_model, load_model, load_weights, open_weights
from vitrail.weights.preprocessing import ALL, KINDS, PROCESSORS, PUBLISHED, Prepared, of_timm, of_transformers
from vitrail.weights.sources import SOURCES

SIDES = {"height": 64, "width": 64}
SHORT = {"shortest_edge": 64}
MIDDLE = {"do_center_crop": True, "crop_size": SIDES}
STATS = {"image_mean": [0.1, 0.2, 0.3], "image_std": [0.4, 0.5, 0.6]}
VIT: dict[str, Any] = {"image_processor_type": "ViTImageProcessor", "size": SIDES, **STATS}
TIMM = {"input_size": [3, 32, 32], "mean": [0.1, 0.2, 0.3], "std": [0.4, 0.5, 0.6], "interpolation": "bicubic"}


@pytest.fixture(scope="module")
def picture() -> Image.Image:
    """Smooth, with a grain; longer than high by what leaves an even number beside every cut here."""
    noise = np.random.default_rng(0).integers(0, 256, (12, 16, 3), dtype=np.uint8)
    return Image.fromarray(noise).resize((160, 120), Image.Resampling.BICUBIC)


def steps(found: Prepared, picture: Image.Image, theirs: torch.Tensor) -> float:
    """The largest difference from somebody's prepared picture (C, H, W), in steps of a pixel's 255."""
    assert found.preprocess is not None
    p = found.preprocess
    ours = p.normalise(eval_transform(p)(picture)[None])[0]
    assert ours.shape == theirs.shape
    return float(((ours - theirs).abs() * torch.tensor(p.std).view(-1, 1, 1)).max() * 255)


# ---- transformers

SAID: dict[str, dict[str, Any]] = {
    "vit": VIT,
    "vit, one number": VIT | {"size": 64, "resample": 3},
    "vit, a list": VIT | {"size": [64, 48]},
    "what nobody says is usual": {"image_processor_type": "ViTImageProcessor", "size": SIDES},
    "null is as not said": VIT | {"crop_size": None, "do_center_crop": None},
    "no factor": VIT | {"do_rescale": False},
    "no mean": VIT | {"do_normalize": False},
    "another factor": VIT | {"rescale_factor": 1 / 127.5},
    "one mean for all channels": VIT | {"image_mean": 0.3, "image_std": 0.4},
    "beit": VIT | {"image_processor_type": "BeitImageProcessor", "do_center_crop": False, "crop_size": SIDES},
    "pvt": VIT | {"image_processor_type": "PvtImageProcessor"},
    "siglip": VIT | {"image_processor_type": "SiglipImageProcessor", "resample": 3},
    "deit": VIT | {"image_processor_type": "DeiTImageProcessor", "size": {"height": 73, "width": 73}, **MIDDLE},
    "deit, longer than wide": {
        "image_processor_type": "DeiTImageProcessor", "size": {"height": 80, "width": 60}, "do_center_crop": True,
        "crop_size": {"height": 64, "width": 48}, **STATS,
    },
    "deit of old": {
        "feature_extractor_type": "DeiTFeatureExtractor", "size": 73, "crop_size": 64, "do_center_crop": True,
        "do_resize": True, "do_normalize": True, "resample": 3, **STATS,
    },
    "clip": VIT | {"image_processor_type": "CLIPImageProcessor", "size": SHORT, **MIDDLE},
    "clip of old": {
        "feature_extractor_type": "CLIPFeatureExtractor", "size": 72, "crop_size": 64, "do_center_crop": True, **STATS,
    },
    "dinov2": VIT | {"image_processor_type": "BitImageProcessorFast", "size": {"shortest_edge": 93}, **MIDDLE},
    "convnext": {"image_processor_type": "ConvNextImageProcessor", "size": SHORT, "crop_pct": 0.8, **STATS},
    "convnext of old": {"feature_extractor_type": "ConvNextFeatureExtractor", "size": 64, **STATS},
    "convnext, large": {"image_processor_type": "ConvNextImageProcessor", "size": {"shortest_edge": 384}, **STATS},
}  # fmt: skip


@pytest.mark.parametrize("name", SAID)
def test_pictures_are_prepared_as_transformers_does(name: str, picture: Image.Image, tmp_path: Path):
    transformers = pytest.importorskip("transformers")
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(SAID[name]))
    theirs = transformers.AutoImageProcessor.from_pretrained(tmp_path)(picture, return_tensors="pt")["pixel_values"]
    found = of_transformers(SAID[name], "")
    assert found.remarks == ()
    assert steps(found, picture, theirs[0]) < 1e-2


def test_a_processor_without_a_name_is_that_of_the_network(picture: Image.Image):
    """`size` alone may be a square's side, or what the short side becomes."""
    said = {"size": 72, "crop_size": 64, "do_center_crop": True, "resample": 3, **STATS}
    square, short = (of_transformers(said, kind).preprocess for kind in ("deit", "clip"))
    assert square is not None and short is not None
    assert (square.crop_mode, short.crop_mode) == ("squash", "center") and square.resized == short.resized == (72, 72)


def test_usual_values_are_those_of_transformers():
    transformers = pytest.importorskip("transformers")
    from transformers.models.auto.image_processing_auto import IMAGE_PROCESSOR_MAPPING_NAMES as names

    for first, usual in PROCESSORS.items():
        theirs = getattr(transformers, f"{first}ImageProcessor")
        said = json.loads(theirs().to_json_string()) | {"square": theirs.default_to_square}
        assert {name: value for name, value in (ALL | usual).items() if said[name] != value} == {}
    for kind, first in KINDS.items():
        of = names.get(kind, names.get(kind.removesuffix("_vision_model").removesuffix("_with_registers")))
        assert of is not None and of["torchvision"] == f"{first}ImageProcessor"


REMARKS: dict[str, tuple[dict[str, Any], str]] = {
    "no resizing": ({"do_resize": False}, "do_resize=False: here the short side is resized and the centre cut out"),
    "nearest": ({"resample": 0}, "resample='nearest': here pictures are resized by bicubic"),
    "lanczos": ({"resample": 1}, "resample='lanczos': here pictures are resized by bicubic"),
    "no filter": ({"resample": [2]}, r"resample=\[2\]: here pictures are resized by bicubic"),
    "no cut": ({"size": SHORT}, "size={'shortest_edge': 64} without a cut: here the centre is cut out"),
    "two edges": ({"size": {"shortest_edge": 64, "longest_edge": 99}}, "size={.*}: here the short side is resized"),
    "text": ({"size": "big"}, "size='big': here the short side is resized and the centre cut out"),
    "nothing": ({"size": {"height": 0, "width": 4}}, "size={'height': 0, 'width': 4}: here the short side is resized"),
    "huge": ({"size": 99_999}, "size=99999: here the short side is resized"),
    "a larger cut": (MIDDLE | {"size": {"shortest_edge": 48}},
                     "size={'shortest_edge': 48}, crop_size={.*}: here 64 x 64 is cut out by crop_pct=1"),
    "a long cut": ({"do_center_crop": True, "size": {"shortest_edge": 80}, "crop_size": {"height": 64, "width": 32}},
                   "here 64 x 32 is cut out by crop_pct=0.4"),
    "no share": ({"size": SHORT, "crop_pct": 1.5}, "crop_pct=1.5: here it is 1.0"),
    "a strange factor": ({"rescale_factor": "1/255"}, "rescale_factor='1/255': here pixels are divided by 255"),
    "a tiny factor": ({"rescale_factor": 1e-320}, "here pixels are divided by 255"),
}  # fmt: skip


@pytest.mark.parametrize("name", REMARKS)
def test_what_cannot_be_done_is_named_and_the_rest_kept(name: str):
    said, remark = REMARKS[name]
    found = of_transformers(VIT | said, "vit", 48)
    assert found.preprocess is not None and len(found.remarks) == 1
    assert (found.preprocess.mean, found.preprocess.std) == ((0.1, 0.2, 0.3), (0.4, 0.5, 0.6))
    with pytest.raises(AssertionError, match=remark):
        raise AssertionError(found.remarks[0])


@pytest.mark.parametrize("change", [
    {"image_mean": ["a", "b", "c"]}, {"image_mean": [0.5, 0.5]}, {"image_mean": {}}, {"image_std": [0, 0, 0]},
    {"image_std": [1.0, -1.0, 1.0]}, {"image_std": [math.nan] * 3}, {"image_std": []}, {"image_std": [True] * 3},
])  # fmt: skip
def test_no_mean_and_deviation_is_named(change: dict[str, Any]):
    found = of_transformers(VIT | change, "vit")
    assert found.preprocess is None and len(found.remarks) == 1
    assert "are no mean and deviation: here the network's own are taken" in found.remarks[0]


@pytest.mark.parametrize(("kind", "rows"), [
    ("clip", "_clip_quickgelu_"), ("clip_vision_model", "_clip_quickgelu_"), ("dinov2", "_dinov2"),
    ("dinov2_with_registers", "_reg4_dinov2"), ("dinov3_vit", "_dinov3"), ("siglip", "_siglip_"),
    ("siglip_vision_model", "_siglip_"), ("beit", "beit_"),
])  # fmt: skip
def test_where_no_file_says_anything_published_weights_do(kind: str, rows: str):
    found = of_transformers({}, kind, 48)
    stats = {(p.mean, p.std) for source in SOURCES.values() if rows in source.row for p in [source.preprocess]}
    assert found.preprocess is not None and {(found.preprocess.mean, found.preprocess.std)} == stats - {
        published.SATELLITE
    }
    assert found.preprocess.img_size == (48, 48)
    assert found.remarks[1] == f"mean and std are those of {PUBLISHED[kind][0]}'s published weights"


def test_of_other_kinds_nothing_is_known():
    assert set(PUBLISHED) <= set(KINDS)
    assert of_transformers({}, "vit") == Prepared(None, ("nothing there says how images are prepared",))


# ---- timm


@pytest.mark.parametrize("said", [
    {}, {"crop_pct": 0.9}, {"crop_pct": 0.9, "crop_mode": "squash"}, {"crop_pct": 1.0, "crop_mode": "squash"},
    {"interpolation": "bilinear"}, {"input_size": [3, 32, 24], "crop_mode": "squash"}, {"mean": None, "std": None},
    {"mean": [0.5], "std": [0.25]},
])  # fmt: skip
def test_pictures_are_prepared_as_timm_does(said: dict[str, Any], picture: Image.Image):
    timm = pytest.importorskip("timm")
    config = timm.data.resolve_data_config(pretrained_cfg=TIMM | said)
    found = of_timm(TIMM | said)
    assert found.remarks == ()
    assert steps(found, picture, timm.data.create_transform(**config)(picture)) < 1.01  # Pillow's rounding


def test_what_timm_is_not_told_is_usual():
    found = of_timm({"input_size": [3, 32, 32]}).preprocess
    assert found is not None and (found.mean, found.std, found.crop_pct) == (IMAGENET_MEAN, IMAGENET_STD, 0.875)
    assert of_timm({"num_classes": 3}) == Prepared(None, ("nothing there says how images are prepared",))


@pytest.mark.parametrize(("said", "remark"), [
    ({"crop_mode": "border"}, "crop_mode='border': here the short side is resized and the centre cut out"),
    ({"crop_mode": ["center"]}, "crop_mode=['center']: here the short side is resized and the centre cut out"),
    ({"interpolation": "nearest"}, "interpolation='nearest': here pictures are resized by bicubic"),
    ({"interpolation": "random"}, "interpolation='random': here pictures are resized by bicubic"),
    ({"crop_pct": 1.1}, "crop_pct=1.1: here it is 1.0"), ({"crop_pct": 1e-9}, "crop_pct=1e-09: here it is 1.0"),
    ({"crop_pct": "0.9"}, "crop_pct='0.9': here it is 1.0"),
    ({"input_size": [3, 99_999, 4]}, "input_size=[3, 99999, 4] is no size: here the network's own is taken"),
])  # fmt: skip
def test_what_of_timm_cannot_be_done_is_named(said: dict[str, Any], remark: str):
    found = of_timm(TIMM | said)
    assert found.remarks == (remark,)
    assert found.preprocess is not None and found.preprocess.mean == (0.1, 0.2, 0.3)


# ---- what is told


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return convert(build_model("vit_debug", num_classes=3), tmp_path / "m", "transformers")


def rewritten(folder: Path, **changes: Any) -> None:
    file = folder / "preprocessor_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def test_one_warning_names_what_is_done_otherwise(folder: Path, caplog: pytest.LogCaptureFixture):
    rewritten(folder, resample=0, image_mean=[0.1, 0.2, 0.3])
    for way in (load_model, lambda path: create_model(f"local-dir:{path}", pretrained=True), open_weights,
                lambda path: load_weights(build_model("vit_debug", num_classes=3), path),
                lambda path: open_weights(str(path), "vit_debug")):  # fmt: skip
        caplog.clear()
        with caplog.at_level(logging.WARNING, "vitrail"):
            way(str(folder))
        assert [record.getMessage() for record in caplog.records] == [
            f"{folder}: resample='nearest': here pictures are resized by bicubic; taken are img_size (32, 32), mean "
            "(0.1, 0.2, 0.3), std (0.5, 0.5, 0.5), crop_mode center, crop_pct 1, bicubic: set model.preprocess if they "
            "were others"
        ]


def test_what_is_known_is_not_warned_of(folder: Path, caplog: pytest.LogCaptureFixture):
    with caplog.at_level(logging.WARNING, "vitrail"):
        assert load_model(folder).preprocess == build_model("vit_debug").preprocess
    assert not caplog.records
