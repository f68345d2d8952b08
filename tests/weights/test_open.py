"""What no shape shows (heads, activations, epsilons) comes from what stands beside the weights, or is asked for."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from vitrail.models.backbone import Backbone
from vitrail.models.registry import build_model
from vitrail.research.peers import randomise
from vitrail.weights.convert import convert
from vitrail.weights.load import create_model, load_weights, open_weights
from vitrail.weights.read import CheckpointError

BANDS = ("nir", "red", "green", "blue")


@pytest.fixture
def images() -> Tensor:
    return torch.randn(2, 3, 32, 32)


def trained(**options: Any) -> Backbone:
    model = build_model("vit_debug", **options).eval()
    randomise(model)
    return model


@torch.no_grad()
@pytest.mark.parametrize("layout", ["vitrail", "timm", "transformers"])
def test_heads_that_no_shape_shows_come_back(layout: str, tmp_path: Path, images: Tensor):
    model = trained(num_heads=4)
    convert(model, tmp_path / "out", layout)
    again = create_model(f"local-dir:{tmp_path / 'out'}", pretrained=True).eval()
    assert again.config == model.config
    assert torch.equal(again(images), model(images))


@torch.no_grad()
def test_an_activation_of_transformers_comes_back(tmp_path: Path, images: Tensor):
    model = trained(act="relu")
    again = create_model(f"local-dir:{convert(model, tmp_path / 'out', 'transformers')}", pretrained=True).eval()
    assert again.config.act == "relu" and torch.equal(again(images), model(images))


@pytest.mark.parametrize("options", [{"depth": 2}, {"in_chans": 1}, {"embed_dim": 24}, {"patch_size": 4}])
def test_our_own_folder_is_what_its_card_says(options: dict[str, Any], tmp_path: Path):
    model = trained(**options)
    model.save_pretrained(tmp_path / "run" / "model")
    for place in (tmp_path / "run", tmp_path / "run" / "model", tmp_path / "run" / "model" / "model.safetensors"):
        again = create_model(f"local-dir:{place}", pretrained=True)
        assert again.config == model.config
        assert open_weights(str(place)).config == model.config


def test_a_file_beside_a_strange_config_is_read_by_its_shapes(tmp_path: Path):
    torch.save(build_model("resnet_debug").state_dict(), tmp_path / "r.pth")
    (tmp_path / "config.json").write_text(json.dumps({"layer_norm_eps": 1e-12, "model_type": "vit", "num_heads": 7}))
    assert open_weights(str(tmp_path / "r.pth")).variant == "resnet_debug"


def test_a_config_of_a_larger_network_than_its_weights_is_refused(tmp_path: Path):
    torch.save(trained().state_dict(), tmp_path / "pytorch_model.bin")
    for args in ({"depth": 900_000}, {"embed_dim": 900_000}, {"num_heads": 900_000}):
        said = {"architecture": "vit_tiny_patch16_224", "model_args": args}
        (tmp_path / "config.json").write_text(json.dumps(said))
        with pytest.raises(CheckpointError, match="describes a larger network than its weights are of"):
            create_model(f"local-dir:{tmp_path}", pretrained=True)


def test_weights_of_other_heads_are_refused_where_that_is_known(tmp_path: Path):
    trained(num_heads=4).save_pretrained(tmp_path / "model")
    with pytest.raises(CheckpointError, match="this one has num_heads=3, not 4: build it so, or use create_model"):
        load_weights(build_model("vit_debug"), tmp_path / "model")


@pytest.mark.parametrize(("eps", "fits"), [(1e-12, True), (1e-2, False)])
def test_another_epsilon_is_told_or_refused(eps: float, fits: bool, tmp_path: Path, caplog):
    folder = convert(trained(norm_eps=eps), tmp_path / "out", "transformers")
    with caplog.at_level(logging.INFO, "vitrail"):
        if fits:
            load_weights(build_model("vit_debug"), folder)
            assert "made with norm_eps=1e-12, the network has 1e-06" in caplog.text
        else:
            with pytest.raises(CheckpointError, match=r"norm_eps=1e-06, not 0\.01"):
                load_weights(build_model("vit_debug"), folder)


def test_another_patch_size_keeps_the_image_size(tmp_path: Path):
    torch.save(trained().state_dict(), tmp_path / "m.pth")
    model = create_model(f"local-dir:{tmp_path / 'm.pth'}", pretrained=True, patch_size=4)
    assert model.config.img_size == (32, 32) and model.pos_embed.shape[1] == 65


def test_a_file_of_four_channels_says_so_itself(tmp_path: Path):
    torch.save(trained(in_chans=4).state_dict(), tmp_path / "m.pth")
    assert open_weights(str(tmp_path / "m.pth")).config.in_chans == 4


def test_names_of_former_classes_do_not_stay_on_another_head(tmp_path: Path):
    torch.save(trained().state_dict(), tmp_path / "m.pth")
    model = build_model("vit_debug")
    model.classes, model.images = tuple("abcdefghij"), "letters"
    load_weights(model, tmp_path / "m.pth", new_head=True)
    assert model.classes == tuple("abcdefghij")
    load_weights(model, tmp_path / "m.pth")
    assert model.classes == () and model.images == ""


def test_bands_reach_a_shipped_model():
    model = create_model("bloodcells", pretrained=True, in_chans=4, bands=BANDS)
    assert model.preprocess.in_chans == 4
    rgb = create_model("bloodcells", pretrained=True)
    assert torch.equal(model.patch_embed.proj.weight[:, 1:], rgb.patch_embed.proj.weight)
    assert model.preprocess.mean[1:] == rgb.preprocess.mean


def test_names_that_mean_weights_are_for_pretrained_alone():
    with pytest.raises(ValueError, match=r"use create_model\('hf-hub:org/x', pretrained=True\)"):
        create_model("hf-hub:org/x")
    with pytest.raises(ValueError, match="bands say where trained kernels go"):
        create_model("vit_debug", in_chans=4, bands=BANDS)
    with pytest.raises(CheckpointError, match="hf-hub: must be followed by what it names"):
        create_model("hf-hub:", pretrained=True)


def test_a_shipped_model_lends_its_weights_by_name():
    model = build_model("vit_nano_patch8_64", num_classes=3)
    load_weights(model, "bloodcells")
    assert model.classes == ("Platelets", "RBC", "WBC")
