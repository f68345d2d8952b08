"""Somebody else's file -> a network here: the same answers, at any size, or an error and nothing changed."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from vitrail.models.backbone import Backbone
from vitrail.models.registry import build_model
from vitrail.research.peers import randomise
from vitrail.weights.doctor import inspect
from vitrail.weights.load import create_model, load_model, load_weights
from vitrail.weights.read import CheckpointError

BANDS = ("nir", "red", "green", "blue")


@pytest.fixture
def images() -> Tensor:
    return torch.randn(2, 3, 32, 32)


@pytest.fixture
def trained() -> Backbone:
    """A ViT of which every weight says something."""
    model = build_model("vit_debug").eval()
    randomise(model)
    return model


@pytest.fixture
def file(trained: Backbone, tmp_path: Path) -> Path:
    torch.save({"model": trained.state_dict(), "epoch": 3}, tmp_path / "weights.pth")
    return tmp_path / "weights.pth"


def transformers_vit(folder: Path) -> nn.Module:
    transformers = pytest.importorskip("transformers")
    config = transformers.ViTConfig(
        hidden_size=48, num_hidden_layers=3, num_attention_heads=3, intermediate_size=192, image_size=32, patch_size=8,
        num_labels=10, id2label={i: f"kind {i}" for i in range(10)},
    )  # fmt: skip
    model = transformers.ViTForImageClassification(config).eval()
    randomise(model)
    model.save_pretrained(folder)
    processor = {"size": {"height": 32, "width": 32}, "image_mean": [0.1, 0.2, 0.3], "image_std": [0.4, 0.5, 0.6]}
    (folder / "preprocessor_config.json").write_text(json.dumps({**processor, "resample": 2}))
    return model


@torch.no_grad()
def test_a_folder_of_transformers_makes_its_network_with_classes_and_preprocessing(tmp_path: Path, images: Tensor):
    theirs = transformers_vit(tmp_path)
    ours = create_model(f"local-dir:{tmp_path}", pretrained=True).eval()
    assert torch.allclose(ours(images), theirs(images).logits, atol=1e-5)
    assert ours.variant == "vit_debug" and ours.config.norm_eps == 1e-12
    assert ours.classes[:2] == ("kind 0", "kind 1")
    assert ours.preprocess.mean == (0.1, 0.2, 0.3) and ours.preprocess.interpolation == "bilinear"


@torch.no_grad()
def test_a_file_of_torchvision_goes_into_a_network_that_is_there(tmp_path: Path, images: Tensor):
    torchvision = pytest.importorskip("torchvision")
    theirs = torchvision.models.VisionTransformer(32, 8, 3, 3, 48, 192, num_classes=10).eval()
    randomise(theirs)
    torch.save(theirs.state_dict(), tmp_path / "vit.pth")
    ours = build_model("vit_debug").eval()
    report = load_weights(ours, tmp_path / "vit.pth")
    assert torch.allclose(ours(images), theirs(images), atol=1e-5)
    assert (report.source, report.renamed, report.taken) == ("torchvision", 44, 44)


def google_npz(model: Backbone, path: Path, prefix: str = "") -> None:
    """A ViT's weights as Google's JAX code writes them."""
    import numpy as np

    heads, width = model.config.num_heads, model.config.embed_dim
    s = {name: value.detach() for name, value in model.state_dict().items()}
    made: dict[str, Tensor] = {
        "cls": s["cls_token"],
        "embedding/kernel": s["patch_embed.proj.weight"].permute(2, 3, 1, 0),
        "embedding/bias": s["patch_embed.proj.bias"],
        "Transformer/posembed_input/pos_embedding": s["pos_embed"],
        "Transformer/encoder_norm/scale": s["norm.weight"],
        "Transformer/encoder_norm/bias": s["norm.bias"],
        "pre_logits/kernel": torch.zeros(width, width),
        "head/kernel": s["head.weight"].T,
        "head/bias": s["head.bias"],
    }
    for i in range(model.config.depth):
        theirs, ours = f"Transformer/encoderblock_{i}", f"blocks.{i}"
        for number, norm in ((0, "norm1"), (2, "norm2")):
            made[f"{theirs}/LayerNorm_{number}/scale"] = s[f"{ours}.{norm}.weight"]
            made[f"{theirs}/LayerNorm_{number}/bias"] = s[f"{ours}.{norm}.bias"]
        attention = f"{theirs}/MultiHeadDotProductAttention_1"
        weights, biases = s[f"{ours}.attn.qkv.weight"].chunk(3), s[f"{ours}.attn.qkv.bias"].chunk(3)
        for name, weight, bias in zip(("query", "key", "value"), weights, biases, strict=True):
            made[f"{attention}/{name}/kernel"] = weight.T.reshape(width, heads, -1)
            made[f"{attention}/{name}/bias"] = bias.reshape(heads, -1)
        made[f"{attention}/out/kernel"] = s[f"{ours}.attn.proj.weight"].T.reshape(heads, -1, width)
        made[f"{attention}/out/bias"] = s[f"{ours}.attn.proj.bias"]
        for number, layer in ((0, "fc1"), (1, "fc2")):
            made[f"{theirs}/MlpBlock_3/Dense_{number}/kernel"] = s[f"{ours}.mlp.{layer}.weight"].T
            made[f"{theirs}/MlpBlock_3/Dense_{number}/bias"] = s[f"{ours}.mlp.{layer}.bias"]
    np.savez(path, **{prefix + name: value.numpy() for name, value in made.items()})


@pytest.mark.parametrize("prefix", ["", "opt/target/"])
def test_a_file_of_google_holds_the_same_numbers(prefix: str, trained: Backbone, tmp_path: Path):
    timm = pytest.importorskip("timm")
    google_npz(trained, tmp_path / "vit.npz", prefix)
    theirs = timm.models.vision_transformer.VisionTransformer(
        img_size=32, patch_size=8, embed_dim=48, depth=3, num_heads=3, num_classes=10
    )
    theirs.load_pretrained(str(tmp_path / "vit.npz"))  # timm's reader agrees about what the file says
    ours = build_model("vit_debug")
    load_weights(ours, tmp_path / "vit.npz")
    for name, value in trained.state_dict().items():
        assert torch.equal(ours.state_dict()[name], value), name
        assert torch.equal(theirs.state_dict()[name], value), name


def test_our_own_folder_goes_into_a_network_of_another_size(trained: Backbone, tmp_path: Path, caplog):
    trained.save_pretrained(tmp_path / "model")
    larger = build_model("vit_debug", img_size=(48, 64))
    with caplog.at_level(logging.INFO, "vitrail"):
        report = load_weights(larger, tmp_path / "model")
    assert report.resized == ["pos_embed (1, 17, 48) -> (1, 49, 48)"]
    assert "44 tensors; resized pos_embed (1, 17, 48) -> (1, 49, 48)" in caplog.text
    again = build_model("vit_debug")
    load_weights(again, tmp_path / "model")
    assert all(torch.equal(a, b) for a, b in zip(again.parameters(), trained.parameters(), strict=True))


def test_positions_of_a_grid_that_is_not_square_are_known_from_our_own_folder(tmp_path: Path):
    wide = build_model("vit_debug", img_size=(16, 64))  # 2 x 8 cells, which as a square would be 4 x 4
    wide.save_pretrained(tmp_path / "model")
    narrow = build_model("vit_debug", img_size=(64, 16))
    report = load_weights(narrow, tmp_path / "model")
    assert report.resized == ["pos_embed (1, 17, 48) -> (1, 17, 48)"]


def test_a_head_of_other_classes_is_an_error_unless_it_is_asked_for(file: Path, trained: Backbone):
    other = build_model("vit_debug", num_classes=3)
    before = copied(other)
    with pytest.raises(CheckpointError, match=r"head\.weight \(10, 48\) for \(3, 48\).*new_head=True"):
        load_weights(other, file)
    assert same(other, before)
    report = load_weights(other, file, new_head=True)
    assert report.left == ["head.weight", "head.bias"]
    assert torch.equal(other.head.weight, before["head.weight"]) and torch.equal(other.norm.bias, trained.norm.bias)


def test_a_network_without_a_head_takes_the_rest(file: Path, trained: Backbone):
    bare = build_model("vit_debug", num_classes=0)
    assert sorted(load_weights(bare, file).unused) == ["head.bias", "head.weight"]
    assert torch.equal(bare.norm.bias, trained.norm.bias)


@pytest.mark.parametrize(
    "options", [{"depth": 2}, {"depth": 4}, {"embed_dim": 24}, {"reg_tokens": 2}, {"init_values": 0.1}]
)
def test_what_does_not_fit_is_named_and_changes_nothing(options: dict[str, Any], file: Path):
    other = build_model("vit_debug", **options)
    before = copied(other)
    with pytest.raises(
        CheckpointError, match=r"weights\.pth: weights must fit the network exactly; .*(missing|extra|wrong shape): "
    ):
        load_weights(other, file)
    assert same(other, before)


def copied(model: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


def same(model: nn.Module, state: dict[str, Tensor]) -> bool:
    return all(torch.equal(value, state[name]) for name, value in model.state_dict().items())


def test_kernels_go_to_the_bands_of_their_names(file: Path, trained: Backbone, images: Tensor):
    rgb, wide = trained.patch_embed.proj.weight, build_model("vit_debug", in_chans=4)
    for rest, expected in (("mean", rgb.mean(1)), ("zero", torch.zeros_like(rgb[:, 0]))):
        load_weights(wide, file, bands=BANDS, rest=rest)
        assert torch.equal(wide.patch_embed.proj.weight[:, 1:], rgb) and torch.allclose(
            wide.patch_embed.proj.weight[:, 0], expected
        )
    with torch.no_grad():  # a band of zero kernels says nothing
        assert torch.allclose(
            wide.eval()(torch.cat([torch.randn(2, 1, 32, 32), images], 1)), trained(images), atol=1e-5
        )
    turned = build_model("vit_debug", in_chans=3)
    load_weights(turned, file, bands=("blue", "green", "red"))
    assert torch.equal(turned.patch_embed.proj.weight, rgb.flip(1))


def test_a_random_band_is_as_large_as_the_others(file: Path, trained: Backbone):
    wide = build_model("vit_debug", in_chans=4)
    load_weights(wide, file, bands=BANDS, rest="random")
    drawn, rgb = wide.patch_embed.proj.weight[:, 0], trained.patch_embed.proj.weight
    assert 0.8 < drawn.std() / rgb.std() < 1.2 and not torch.equal(drawn, rgb.mean(1))


def test_bands_that_are_not_named_are_asked_for(file: Path):
    with pytest.raises(CheckpointError, match="for 3 channels and the network takes 4: say which they are, bands="):
        load_weights(build_model("vit_debug", in_chans=4), file)
    with pytest.raises(CheckpointError, match="bands must name each of the 4 channels once; got red, red, blue, nir"):
        load_weights(build_model("vit_debug", in_chans=4), file, bands=("red", "red", "blue", "nir"))


def test_means_of_bands_go_with_their_kernels(trained: Backbone, tmp_path: Path):
    trained.preprocess = trained.preprocess.replace(mean=(0.1, 0.2, 0.6), std=(0.3, 0.4, 0.5))
    trained.save_pretrained(tmp_path / "model")
    model = create_model(f"local-dir:{tmp_path / 'model'}", pretrained=True, in_chans=4, bands=BANDS)
    assert model.preprocess.mean == pytest.approx((0.3, 0.1, 0.2, 0.6))
    assert model.preprocess.std == pytest.approx((0.4, 0.3, 0.4, 0.5))


@torch.no_grad()
def test_grey_images_answer_as_their_three_equal_channels(file: Path, trained: Backbone):
    grey = build_model("vit_debug", in_chans=1).eval()
    load_weights(grey, file)
    image = torch.randn(2, 1, 32, 32)
    assert torch.allclose(grey(image), trained(image.expand(-1, 3, -1, -1)), atol=1e-5)


@torch.no_grad()
def test_other_patches_make_the_same_tokens_of_a_resized_image(file: Path, trained: Backbone):
    """Beyer et al. 2023, section 3.4: exactly so where patches grow."""
    larger = build_model("vit_debug", img_size=64, patch_size=16).eval()
    report = load_weights(larger, file)
    assert report.resized == ["patch_embed.proj.weight (48, 3, 8, 8) -> (48, 3, 16, 16)"]
    patch = torch.randn(1, 3, 8, 8)
    grown = nn.functional.interpolate(patch, size=(16, 16), mode="bicubic", antialias=True)
    assert torch.allclose(larger.patch_embed(grown), trained.patch_embed(patch), atol=1e-4)


def test_weights_of_a_part_are_asked_for_by_name(trained: Backbone, tmp_path: Path):
    averaged = {name: value + 1 for name, value in trained.state_dict().items()}
    torch.save({"model": trained.state_dict(), "model_ema": averaged}, tmp_path / "both.pth")
    model = build_model("vit_debug")
    for part, expected in (("model", trained.state_dict()), ("model_ema", averaged)):
        load_weights(model, tmp_path / "both.pth", part=part)
        assert torch.equal(model.norm.bias, expected["norm.bias"])
    with pytest.raises(CheckpointError, match="no part 'best'"):
        load_weights(model, tmp_path / "both.pth", part="best")


def test_a_file_finds_its_network_and_the_size_it_was_made_for(tmp_path: Path):
    torch.save(build_model("vit_debug", img_size=64, num_classes=3).state_dict(), tmp_path / "m.pth")
    model = create_model(f"local-dir:{tmp_path / 'm.pth'}", pretrained=True)
    assert (model.variant, model.config.img_size, model.num_classes) == ("vit_debug", (64, 64), 3)


def test_a_file_of_no_network_here_says_so(tmp_path: Path):
    torch.save(nn.Linear(3, 3).state_dict(), tmp_path / "m.pth")
    with pytest.raises(CheckpointError, match=r"m\.pth: no network here has these shapes; `vitrail inspect`"):
        create_model(f"local-dir:{tmp_path / 'm.pth'}", pretrained=True)


def test_a_name_of_nothing_is_offered_its_likes():
    with pytest.raises(CheckpointError, match="vit_debugg: neither a file nor published weights; published are .*vit_"):
        load_weights(build_model("vit_debug"), "vit_debugg")


def test_loaded_weights_are_what_a_model_folder_then_holds(file: Path, trained: Backbone, tmp_path: Path):
    model = build_model("vit_debug")
    load_weights(model, file)
    model.save_pretrained(tmp_path / "kept")
    kept = load_model(tmp_path / "kept")
    assert same(kept, trained.state_dict())


def test_tensors_in_memory_are_no_source(trained: Backbone):
    with pytest.raises(
        TypeError, match=r"takes a file, a folder or a name; got OrderedDict: save the .*load_state_dict"
    ):
        load_weights(build_model("vit_debug"), trained.state_dict())  # type: ignore[arg-type]


def test_a_fresh_head_is_warned_of_and_what_else_became_of_a_file_is_told(file: Path, tmp_path: Path, caplog):
    with caplog.at_level(logging.INFO, "vitrail"):
        create_model(f"local-dir:{file}", pretrained=True, num_classes=4, img_size=64)
        create_model(f"local-dir:{file}", pretrained=True, img_size=64)
        create_model(f"local-dir:{file}", pretrained=True, num_classes=0)
    fresh, resized, bare = caplog.records
    for said in ("fresh: head.weight, head.bias", "resized pos_embed", "taken out of model"):
        assert said in fresh.message
    assert "fresh: " not in resized.message and "resized pos_embed" in resized.message
    assert "not used: head.weight, head.bias" in bare.message
    assert [record.levelname for record in caplog.records] == ["WARNING", "INFO", "INFO"]


def test_a_fresh_head_of_our_own_folder_is_warned_of_too(trained: Backbone, tmp_path: Path, caplog):
    trained.save_pretrained(tmp_path / "model")
    create_model(f"local-dir:{tmp_path / 'model'}", pretrained=True, num_classes=4)
    (record,) = caplog.records
    assert "42 tensors; fresh: head.bias, head.weight" in record.message and record.levelname == "WARNING"
    caplog.clear()
    create_model(f"local-dir:{tmp_path / 'model'}", pretrained=True, num_classes=0)
    assert not caplog.records


@pytest.mark.parametrize("worst", [float("nan"), float("inf"), -float("inf")])
def test_numbers_that_are_none_are_warned_of_and_loaded(worst: float, trained: Backbone, tmp_path: Path, caplog):
    state = copied(trained)
    state["blocks.1.mlp.fc1.weight"][3, 4] = state["norm.bias"][0] = worst
    state["norm.weight"].fill_(3e38)  # large, but a number: its sum alone is infinite
    torch.save(state, tmp_path / "bad.pth")
    said = "NaN or infinite numbers in 2 of 44 tensors, first in blocks.1.mlp.fc1.weight and 1 more"
    model = build_model("vit_debug")
    assert load_weights(model, tmp_path / "bad.pth").lines()[-1] == said
    assert said in inspect(tmp_path / "bad.pth") and not model.norm.bias.isfinite().all()
    assert said in caplog.text and caplog.records[-1].levelname == "WARNING"


def test_another_epsilon_is_in_the_report(tmp_path: Path):
    transformers_vit(tmp_path)
    report = load_weights(build_model("vit_debug"), tmp_path)
    assert report.lines()[-1] == "made with norm_eps=1e-12, the network has 1e-06: answers differ by little"
    assert report.lines()[0] == "44 tensors, translated from the names of transformers"


@torch.no_grad()
@pytest.mark.parametrize("act", ["relu", "gelu"])
def test_a_folder_of_timm_is_made_as_its_model_args_say(act: str, tmp_path: Path, images: Tensor):
    models = pytest.importorskip("timm.models")
    args = dict(img_size=32, patch_size=8, embed_dim=40, depth=2, num_heads=5, qk_norm=True, act_layer=act)
    theirs = models.create_model("vit_tiny_patch16_224", num_classes=4, **args).eval()
    randomise(theirs)
    models.save_for_hf(theirs, str(tmp_path), model_args=args)
    ours = create_model(f"local-dir:{tmp_path}", pretrained=True).eval()
    assert torch.allclose(ours(images), theirs(images), atol=1e-5)


@pytest.mark.parametrize("said", [{"act_layer": "hard_mish"}, {"norm_layer": "rmsnorm"}, {"block_fn": "Own"}])
def test_layers_of_timm_that_no_network_here_has_by_that_name_are_refused(said, trained: Backbone, tmp_path: Path):
    torch.save(trained.state_dict(), tmp_path / "m.pth")
    config = {"architecture": "vit_debug", "model_args": {"img_size": 32} | said}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=rf"model_args beside it has {next(iter(said))}='\w+', which no network"):
        create_model(f"local-dir:{tmp_path / 'm.pth'}", pretrained=True)
