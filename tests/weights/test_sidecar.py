"""What lies beside weights: read where it is known, left unknown where it is missing or strange, never guessed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from vitrail.folder import FolderError
from vitrail.models.registry import build_model
from vitrail.weights.load import load_weights
from vitrail.weights.sidecar import Sidecar, read_sidecar

TIMM: dict[str, Any] = {
    "architecture": "vit_tiny_patch16_224",
    "num_classes": 2,
    "pretrained_cfg": {
        "input_size": [3, 224, 192], "mean": [0.1, 0.2, 0.3], "std": [0.4, 0.5, 0.6], "interpolation": "bicubic",
        "crop_pct": 0.9, "crop_mode": "center", "label_names": ["cat", "dog"],
    },
}  # fmt: skip
CONFIG: dict[str, Any] = {"model_type": "vit", "id2label": {"0": "cat", "1": "dog"}, "layer_norm_eps": 1e-12}
PROCESSOR: dict[str, Any] = {
    "do_resize": True, "do_normalize": True, "do_rescale": True, "rescale_factor": 0.00392156862745098,
    "size": {"height": 224, "width": 192}, "resample": 2, "image_mean": [0.1, 0.2, 0.3], "image_std": [0.4, 0.5, 0.6],
}  # fmt: skip


def beside(place: Path, config: Any, processor: Any = None) -> Sidecar:
    for name, held in (("config.json", config), ("preprocessor_config.json", processor)):
        if held is not None:
            (place / name).write_text(held if isinstance(held, str) else json.dumps(held))
    return read_sidecar(place / "model.safetensors")


def test_timms(tmp_path: Path):
    found = beside(tmp_path, TIMM)
    p = found.preprocess
    assert p is not None and p.img_size == (224, 192) and p.mean == (0.1, 0.2, 0.3) and p.std == (0.4, 0.5, 0.6)
    assert (p.interpolation, p.crop_pct, p.crop_mode) == ("bicubic", 0.9, "center")
    assert found.classes == ("cat", "dog") and found.architecture == "vit_tiny_patch16_224" and found.card is None
    flat = {"architecture": "x", **TIMM["pretrained_cfg"]}
    assert beside(tmp_path, flat).preprocess == p


def test_transformers(tmp_path: Path):
    found = beside(tmp_path, CONFIG, PROCESSOR)
    p = found.preprocess
    assert p is not None and p.img_size == (224, 192) and p.mean == (0.1, 0.2, 0.3) and p.std == (0.4, 0.5, 0.6)
    assert (p.interpolation, p.crop_pct, p.crop_mode) == ("bilinear", 1.0, "squash")
    assert found.classes == ("cat", "dog") and found.architecture == "vit" and found.transformers == CONFIG
    assert found.remarks == ()


def test_a_processor_that_is_damaged_is_not_one_that_is_not_there(tmp_path: Path):
    assert beside(tmp_path, CONFIG).remarks == ("nothing there says how images are prepared",)
    for text in ("", "{", "[1]", "3"):
        assert beside(tmp_path, CONFIG, text).remarks == ("preprocessor_config.json is damaged",)
    (tmp_path / "config.json").unlink()
    (tmp_path / "preprocessor_config.json").unlink()
    assert read_sidecar(tmp_path).remarks == ()  # a file of weights alone


STRANGE = [
    "", "[]", "3", "null", "{", "[" * 100_000, "\x00",
    '{"architecture": 3}',
    '{"architecture": {"a": 1}}',
    '{"architecture": "x", "pretrained_cfg": 3, "label_names": [1, 2]}',
    '{"model_type": ["vit"], "id2label": [1]}',
    '{"id2label": {"a": "b"}, "layer_norm_eps": NaN}',
    '{"family": "clip"}',
    '{"architecture": "x", "pretrained_cfg": {"input_size": [3, "a", 4], "mean": {}, "std": "abc"}}',
    '{"architecture": "x", "pretrained_cfg": {"input_size": [3, 1e999, 4], "mean": [NaN], "std": [NaN]}}',
    '{"architecture": "x", "pretrained_cfg": {"input_size": [99999, 4, 4], "mean": [[]], "std": [1]}}',
]  # fmt: skip


@pytest.mark.parametrize("text", STRANGE, ids=lambda text: text[:60])
def test_strange_files_are_as_none(text: str, tmp_path: Path):
    found = beside(tmp_path, text, text)
    assert found.preprocess is None and found.classes == () and found.card is None and dict(found.fields) == {}
    assert found.architecture in ("", "x")


def test_names_that_would_move_a_cursor_or_fill_a_screen_are_none(tmp_path: Path):
    for name in ("\x1b[2J", "a\nb", "x" * 10**6):
        assert beside(tmp_path, TIMM | {"architecture": name}).architecture == ""
        assert beside(tmp_path, CONFIG | {"id2label": {"0": name, "1": "b"}}).classes == ()
    assert beside(tmp_path, {"id2label": {"0": "LABEL_0", "1": "LABEL_1"}}).classes == ()
    (tmp_path / "config.json").write_text(json.dumps({"architecture": "x", "fill": "x" * 20_000_000}))
    assert read_sidecar(tmp_path).architecture == ""


# ---- our own


def test_our_own_card(tmp_path: Path):
    made = build_model("vit_debug", num_classes=2)
    made.classes = ("cat", "dog")
    folder = made.save_pretrained(tmp_path / "m")
    for path in (folder, folder / "model.safetensors"):
        found = read_sidecar(path)
        assert found.card is not None and found.classes == ("cat", "dog") and found.preprocess == made.preprocess


@pytest.mark.fault(6)
def test_a_damaged_card_is_an_error_not_a_folder_of_somebody_else(tmp_path: Path):
    folder = build_model("vit_debug").save_pretrained(tmp_path / "m")
    text = (folder / "config.json").read_text()
    for damage in ("", text[:-20], text.replace('"family"', '"famili"')):
        (folder / "config.json").write_text(damage)
        with pytest.raises(FolderError, match=r"config\.json: damaged"):
            read_sidecar(folder)


def test_a_card_of_more_layers_than_weights_builds_nothing(shop: Any):
    folder = shop.network().save_pretrained(shop.place / "m")
    (folder / "manifest.json").unlink()
    card = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(card | {"family": "resnet", "config": {"depths": [900] * 500}}))
    for path in (folder, folder / "model.safetensors"):
        with pytest.raises(FolderError, match="a config of 450,000 layers needs a tensor for each"):
            load_weights(shop.network(), path)
