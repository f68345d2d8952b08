"""Others' folders where a model of ours is expected: `load_model`, `ViTClassifier`, `vitrail predict`."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import Tensor

from vitrail.cli import main
from vitrail.folder import FolderError
from vitrail.models.backbone import Backbone
from vitrail.models.registry import build_model
from vitrail.predict import ViTClassifier
from vitrail.records import Preprocess
from vitrail.research.peers import randomise
from vitrail.weights.convert import convert
from vitrail.weights.load import create_model, load_model, load_weights
from vitrail.weights.read import CheckpointError

NAMES = ("cat", "dog", "owl")
SEEN = Preprocess(img_size=(32, 32), mean=(0.1, 0.2, 0.3), std=(0.4, 0.5, 0.6), crop_mode="squash")
PICTURE = Path(__file__).parents[2] / "examples" / "images" / "wbc_0.png"


@pytest.fixture
def model() -> Backbone:
    model = build_model("vit_debug", num_classes=3).eval()
    randomise(model)
    model.preprocess, model.classes = SEEN, NAMES
    return model


@pytest.fixture
def images() -> Tensor:
    return torch.randn(2, 3, 32, 32)


@pytest.mark.parametrize("layout", ["timm", "transformers"])
@torch.no_grad()
def test_a_folder_of_another_library_answers(layout: str, model: Backbone, images: Tensor, tmp_path: Path):
    folder = convert(model, tmp_path / "out", layout)
    again = load_model(folder)
    assert not again.training and again.classes == NAMES and again.preprocess == SEEN
    assert torch.equal(again(images), model(images))
    assert ViTClassifier.from_pretrained(folder).predict(PICTURE).label in NAMES


@torch.no_grad()
def test_a_folder_that_transformers_wrote_answers_as_transformers_does(images: Tensor, tmp_path: Path):
    transformers = pytest.importorskip("transformers")
    config = transformers.ViTConfig(
        hidden_size=48, num_hidden_layers=3, num_attention_heads=3, intermediate_size=192, image_size=32, patch_size=8,
        id2label=dict(enumerate(NAMES)), label2id={name: i for i, name in enumerate(NAMES)},
    )  # fmt: skip
    theirs = transformers.ViTForImageClassification(config).eval()
    theirs.save_pretrained(tmp_path)
    transformers.ViTImageProcessor(size={"height": 32, "width": 32}).save_pretrained(tmp_path)
    again = load_model(tmp_path)
    assert torch.allclose(again(images), theirs(images).logits, atol=1e-5)
    assert again.classes == NAMES and again.preprocess.mean == (0.5, 0.5, 0.5)


def test_the_command_answers_from_a_folder_of_transformers(model: Backbone, tmp_path: Path, capsys):
    folder = convert(model, tmp_path / "out", "transformers")
    assert main(["predict", str(PICTURE), "--model", str(folder), "--device", "cpu", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["top"][0][0] in NAMES


def test_a_head_of_another_kind_is_refused_and_both_ways_out_work(tmp_path: Path):
    """transformers' DINOv2 classifies by the class token and the mean of the others, twice as wide as a head here."""
    transformers = pytest.importorskip("transformers")
    config = transformers.Dinov2Config(
        hidden_size=48, num_hidden_layers=2, num_attention_heads=4, image_size=56, patch_size=14, num_labels=5
    )
    transformers.Dinov2ForImageClassification(config).save_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match=r"load_weights\(.*, new_head=True\) leaves .* num_classes=0\) makes one"):
        load_model(tmp_path)
    bare = create_model(f"local-dir:{tmp_path}", pretrained=True, num_classes=0)
    assert bare.num_classes == 0
    bare.reset_classifier(5)
    assert load_weights(bare, tmp_path, new_head=True).left == ["head.weight", "head.bias"]


def test_what_is_taken_for_want_of_a_word_about_images_is_told(model: Backbone, tmp_path: Path, caplog):
    folder = convert(model, tmp_path / "out", "transformers")
    load_model(folder)
    assert "how images are prepared" not in caplog.text
    (folder / "preprocessor_config.json").unlink()
    load_model(folder)
    assert f"{folder}: nothing there says how images are prepared; taken are img_size (32, 32), mean" in caplog.text


def test_a_file_of_weights_is_no_model_and_the_way_in_is_told(model: Backbone, tmp_path: Path):
    file = tmp_path / "m.pth"
    torch.save(model.state_dict(), file)
    with pytest.raises(FolderError, match="got the file .*: name a folder, or open a file of weights by create_model"):
        load_model(file)
    assert create_model(f"local-dir:{file}", pretrained=True).num_classes == 3  # as the message says
    saved = model.save_pretrained(tmp_path / "own")
    with pytest.raises(FolderError, match=f"got the file {saved}/model.safetensors: name {saved}$"):
        load_model(saved / "model.safetensors")


@pytest.mark.parametrize("given", ["weights.pth", Path("weights.pth"), 1, None])
def test_a_path_is_no_pretrained(given: object):
    with pytest.raises(TypeError, match=r"pretrained is True.* got .*load_weights\(model, path\).*'local-dir:path'"):
        create_model("vit_debug", pretrained=given)  # type: ignore[arg-type]


def test_weights_that_are_called_so_elsewhere_say_what_they_are_here():
    with pytest.raises(
        ValueError, match=r"no such model: a repository of the hub is opened by create_model\('hf-hub:a/b"
    ):
        create_model("a/b", pretrained=True)
