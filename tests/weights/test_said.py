"""What somebody's config says wins over what shapes could be of: the answers of his own library, or an error."""

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
from vitrail.weights.convert import convert
from vitrail.weights.foreign import File, base_by
from vitrail.weights.load import create_model, load_weights, open_weights
from vitrail.weights.read import CheckpointError
from vitrail.weights.said import said_network
from vitrail.weights.sidecar import Sidecar

PVT_V2: dict[str, Any] = dict(
    image_size=64, depths=[1, 1, 1, 2], hidden_sizes=[8, 16, 24, 32], num_attention_heads=[1, 2, 3, 4],
    mlp_ratios=[4, 4, 2, 2], sr_ratios=[4, 2, 2, 1], patch_sizes=[3, 3, 3, 3],
)  # fmt: skip
SWIN: dict[str, Any] = dict(image_size=32, patch_size=2, embed_dim=16, depths=[2, 2, 2], num_heads=[1, 2, 4])
VIT: dict[str, Any] = dict(
    hidden_size=48, num_hidden_layers=3, num_attention_heads=3, intermediate_size=192, image_size=32, patch_size=8
)
LIKE_ROWS: dict[str, tuple[str, str, dict[str, Any], str]] = {
    "PVT v2, as its row": (
        "PvtV2ForImageClassification", "pvt_v2", PVT_V2 | dict(strides=[2, 2, 2, 2]), "pvt_v2_debug"
    ),
    "PVT v2, other strides": ("PvtV2ForImageClassification", "pvt_v2", PVT_V2 | dict(strides=[1, 2, 2, 2]), ""),
    "PVT v2, another epsilon": (
        "PvtV2ForImageClassification", "pvt_v2", PVT_V2 | dict(strides=[2, 2, 2, 2], layer_norm_eps=1e-2),
        "pvt_v2_debug",
    ),
    "Swin, other windows": ("SwinForImageClassification", "swin", SWIN | dict(window_size=8, image_size=64), ""),
    "BEiT of another size": (
        "BeitForImageClassification", "beit", VIT | dict(use_relative_position_bias=True, image_size=64), "beit_debug"
    ),
    "ViT, oblong": ("ViTForImageClassification", "vit", VIT | dict(image_size=[32, 64]), "vit_debug"),
    "ViT, other heads": ("ViTForImageClassification", "vit", VIT | dict(num_attention_heads=4), ""),
    "ViT, ReLU": ("ViTForImageClassification", "vit", VIT | dict(hidden_act="relu"), ""),
    "MSN": ("ViTMSNForImageClassification", "vit_msn", VIT, "vit_debug"),
}  # fmt: skip
"""networks whose shapes are a row's: what their config says, and the row that they are"""


def saved(name: str, kind: str, said: dict[str, Any], folder: Path) -> nn.Module:
    """transformers' network, in a folder."""
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    labels = {"num_labels": 10} if "Classification" in name else {}
    model = getattr(transformers, name)(transformers.AutoConfig.for_model(kind, **said, **labels)).eval()
    stir(model)
    model.save_pretrained(folder)
    return model


@torch.no_grad()
def stir(model: nn.Module) -> None:
    """Adds something to every weight, so that each has a say."""
    torch.manual_seed(1)
    for weight in model.parameters():
        weight.add_(torch.randn_like(weight), alpha=0.1)


def near(ours: Tensor, theirs: Tensor) -> None:
    assert float((ours - theirs).abs().max() / theirs.abs().max()) <= 1e-5


@torch.no_grad()
@pytest.mark.parametrize("case", LIKE_ROWS)
def test_a_network_with_the_shapes_of_a_row_is_as_its_config_says(case: str, tmp_path: Path):
    name, kind, said, row = LIKE_ROWS[case]
    theirs = saved(name, kind, said, tmp_path)
    ours = create_model(f"local-dir:{tmp_path}", pretrained=True).eval()
    assert ours.variant == row
    size = said["image_size"] if isinstance(said["image_size"], list) else [said["image_size"]] * 2
    assert list(ours.config.img_size) == size
    images = torch.randn(2, 3, *size)
    near(ours(images), theirs(images).logits)


def test_a_network_that_is_there_must_be_what_a_config_says(tmp_path: Path):
    saved("PvtV2ForImageClassification", "pvt_v2", PVT_V2 | dict(strides=[1, 2, 2, 2]), tmp_path)
    with pytest.raises(CheckpointError, match=r"of a network of the same config; this one has stride=2, not 1: build"):
        load_weights(build_model("pvt_v2_debug"), tmp_path)
    with pytest.raises(CheckpointError, match="this one has stride=2, not 1"):
        open_weights(str(tmp_path), "pvt_v2_debug")
    load_weights(build_model("pvt_v2_debug", stride=1), tmp_path)


def test_a_row_that_is_named_takes_the_epsilon_of_its_weights(tmp_path: Path):
    saved("ViTForImageClassification", "vit", VIT, tmp_path)
    model = open_weights(str(tmp_path), "vit_debug")
    assert model.variant == "vit_debug" and model.config.norm_eps == 1e-12


def test_how_a_new_head_pools_is_its_own_matter(tmp_path: Path):
    saved("DINOv3ViTModel", "dinov3_vit", VIT | dict(num_register_tokens=2), tmp_path)
    own = create_model(f"local-dir:{tmp_path}", pretrained=True).config
    for pool in ("avg", "token"):
        model = type(create_model("eva02_debug"))(
            **{name: getattr(own, name) for name in own.__dataclass_fields__} | dict(global_pool=pool, num_classes=4)
        )
        assert load_weights(model, tmp_path, new_head=True).left == ["head.weight", "head.bias"]


@pytest.mark.parametrize(("act", "row"), [
    ("quick_gelu", "vit_base_patch32_clip_quickgelu_224"), ("gelu", "vit_base_patch32_clip_224")
])  # fmt: skip
def test_of_rows_with_the_same_shapes_a_config_names_the_one(act: str, row: str):
    with torch.device("meta"):
        tensors = build_model(row).state_dict()
    said = said_network("", {"model_type": "clip_vision_model", "hidden_act": act}, tensors)
    assert base_by(File("", tensors, "transformers' CLIP", 0, Sidecar(), said, {})).row == row


@torch.no_grad()
def test_an_encoder_of_mae_answers_as_it_does_of_all_patches(tmp_path: Path):
    theirs = saved("ViTMAEModel", "vit_mae", VIT | dict(mask_ratio=0.0), tmp_path)
    ours = create_model(f"local-dir:{tmp_path}", pretrained=True).eval()
    images = torch.randn(2, 3, 32, 32)
    near(ours(images), theirs(images).last_hidden_state[:, 0])
    assert ours.config.norm_eps == 1e-12


def test_the_decoder_of_mae_is_left_out_and_told(tmp_path: Path):
    decoder = dict(
        decoder_hidden_size=16, decoder_num_hidden_layers=1, decoder_num_attention_heads=2, decoder_intermediate_size=16
    )
    theirs = saved("ViTMAEForPreTraining", "vit_mae", VIT | decoder, tmp_path)
    ours = build_model("vit_debug", num_classes=0)
    told = load_weights(ours, tmp_path).lines()
    assert any(line.startswith("not used: ") and "the decoder (" in line for line in told)
    assert torch.equal(ours.norm.weight, theirs.vit.layernorm.weight)


@torch.no_grad()
def test_registers_of_which_there_are_none(tmp_path: Path):
    said = dict(hidden_size=48, num_hidden_layers=2, num_attention_heads=3, image_size=32, patch_size=8)
    theirs = saved("Dinov2WithRegistersModel", "dinov2_with_registers", said | dict(num_register_tokens=0), tmp_path)
    ours = create_model(f"local-dir:{tmp_path}", pretrained=True).eval()
    images = torch.randn(2, 3, 32, 32)
    near(ours(images), theirs(images).pooler_output)


def test_a_config_of_a_kind_that_is_not_read_is_no_rows(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    """What it says, such as an activation, no shape shows."""
    saved("ViTForImageClassification", "vit", VIT | dict(hidden_act="relu"), tmp_path)
    config = json.loads((tmp_path / "config.json").read_text()) | {"model_type": "vit_of_mine"}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(
        CheckpointError, match="configs of transformers' vit_of_mine are not read here, .*: build it yourself and use"
    ):
        create_model(f"local-dir:{tmp_path}", pretrained=True)
    with caplog.at_level(logging.WARNING, "vitrail"):
        load_weights(build_model("vit_debug", act="relu"), tmp_path)
    assert "configs of transformers' vit_of_mine are not read here" in caplog.text


@pytest.mark.parametrize(("said", "message"), [
    ({"image_size": "32"}, "image_size must be a number or two; got '32': mend it"),
    ({"image_size": None, "patch_size": {"height": 8}}, "patch_size must be a number or two; got {'height': 8}: mend"),
    ({"hidden_size": [48]}, r"hidden_size must be a number; got \[48\]: mend it"),
    ({"hidden_act": 3}, "hidden_act must be a word; got 3: mend it"),
    ({"qkv_bias": 1}, "qkv_bias must be true or false; got 1: mend it"),
    ({"num_hidden_layers": True}, "num_hidden_layers must be a number; got True: mend it"),
    ({"model_type": "swin", "depths": 3}, "depths must be a list of numbers; got 3: mend it"),
    ({"layer_norm_eps": -1.0}, r"norm_eps must lie in \(0, 1\); got -1.0"),
])  # fmt: skip
def test_a_field_of_another_form_is_named(said: dict[str, Any], message: str):
    with pytest.raises(
        CheckpointError, match=f"here: config.json beside it says no network of this package: {message}"
    ):
        said_network("here", {"model_type": "vit"} | said, dict.fromkeys("abcdefghijkl", torch.zeros(10_000)))


# ---- timm's arguments

TIMMS: dict[str, tuple[str, dict[str, Any], int]] = {
    "output_stride=8": ("resnet18", dict(output_stride=8), 64),
    "global_pool='max'": ("resnet18", dict(global_pool="max"), 64),
    "output_stride=16": ("convnext_tiny", dict(depths=[1, 1, 1, 1], dims=[8, 16, 32, 64], output_stride=16), 64),
    "pool_include_prefix=True": (
        "vit_tiny_patch16_224", dict(img_size=32, depth=1, global_pool="avg", pool_include_prefix=True), 32
    ),
    "always_partition=True": (
        "swin_tiny_patch4_window7_224",
        dict(img_size=56, embed_dim=8, depths=[2, 2], num_heads=[1, 2], always_partition=True), 56,
    ),
}  # fmt: skip
"""what changes timm's answers and no network here can be: the argument, the network, its size"""


def of_timm(row: str, args: dict[str, Any], folder: Path) -> nn.Module:
    models = pytest.importorskip("timm.models")
    model = models.create_model(row, num_classes=10, **args).eval()
    stir(model)
    models.save_for_hf(model, str(folder), model_args=args)
    return model


@torch.no_grad()
@pytest.mark.parametrize("said", TIMMS)
def test_arguments_of_timm_that_change_answers_unseen_are_refused(said: str, tmp_path: Path, caplog: Any):
    row, args, size = TIMMS[said]
    theirs = of_timm(row, args, tmp_path)
    message = f"model_args beside it has {said}, which no network here takes by that name: open it with timm, or, where"
    with pytest.raises(CheckpointError, match=message):
        create_model(f"local-dir:{tmp_path}", pretrained=True)
    harmless = {name: value for name, value in args.items() if not said.startswith(name)}
    convnext = {"embed_dim": harmless.pop("dims")[0]} if "dims" in harmless else {}
    ours = create_model(
        row if row.startswith(("vit", "swin")) else f"{row}_224", num_classes=10, **harmless, **convnext
    )
    load_weights(ours.eval(), tmp_path)
    assert f"model_args beside it has {said}" in caplog.text and caplog.records[-1].levelname == "WARNING"
    images = torch.randn(1, 3, size, size)
    assert float((ours(images) - theirs(images)).abs().max() / theirs(images).abs().max()) > 1e-3  # it does change them


@torch.no_grad()
@pytest.mark.parametrize(("row", "args"), [
    ("resnet18", dict(output_stride=32, global_pool="avg", zero_init_last=False, drop_block_rate=0.1)),
    ("vit_tiny_patch16_224", dict(img_size=224, depth=1, dynamic_img_size=True, weight_init="jax", fix_init=True)),
    ("swin_tiny_patch4_window7_224",
     dict(embed_dim=8, depths=[2, 2], num_heads=[1, 2], strict_img_size=False, always_partition=False)),
])  # fmt: skip
def test_arguments_of_timm_that_change_no_answer_are_taken(row: str, args: dict[str, Any], tmp_path: Path, caplog: Any):
    theirs = of_timm(row, args, tmp_path)
    ours = create_model(f"local-dir:{tmp_path}", pretrained=True).eval()
    images = torch.randn(1, 3, 224, 224)
    near(ours(images), theirs(images))
    assert not caplog.records


def test_arguments_of_timm_that_no_config_can_hold_are_refused(tmp_path: Path):
    torch.save(build_model("vit_debug").state_dict(), tmp_path / "m.pth")
    config = {"architecture": "vit_debug", "model_args": {"rope": {"theta": 3}}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match="model_args beside it has rope, which no network here takes"):
        create_model(f"local-dir:{tmp_path / 'm.pth'}", pretrained=True)


# ---- Swin where windows do not divide


def swin(**options: Any) -> Backbone:
    model = build_model("swin_debug", **options).eval()
    stir(model)
    model.preprocess = model.preprocess.replace(crop_mode="squash", crop_pct=1.0)
    return model


@torch.no_grad()
@pytest.mark.parametrize("size", [(32, 32), (64, 64), (64, 48), (36, 52), (40, 40), (48, 80)])
def test_a_swin_that_is_written_answers_in_transformers_as_here(size: tuple[int, int], tmp_path: Path):
    transformers = pytest.importorskip("transformers")
    model = swin(img_size=size)
    theirs = transformers.AutoModelForImageClassification.from_pretrained(
        convert(model, tmp_path / "out", "transformers")
    ).eval()
    images = torch.randn(2, 3, *size)
    near(model(images), theirs(images).logits)
    again = create_model(f"local-dir:{tmp_path / 'out'}", pretrained=True).eval()
    assert again.config == model.config and torch.equal(again(images), model(images))


@pytest.mark.parametrize(("options", "message"), [
    (dict(img_size=(32, 64)), r"Swin with image_size \[32, 64\] shifts no windows in its stage of 4 x 8 cells, one"),
    (dict(img_size=24), "cannot have a stage of 3 x 3 cells with windows of 4, as img_size 24 makes it"),
    (dict(img_size=64, window_size=(4, 8)), "transformers' Swin has a square window_size; got 4 x 8"),
])  # fmt: skip
def test_a_swin_that_transformers_cannot_run_alike_is_not_written(options: Any, message: str, tmp_path: Path):
    with pytest.raises(ValueError, match=message):
        convert(swin(**options), tmp_path / "out", "transformers")
    assert not (tmp_path / "out").exists()


def test_a_swin_that_transformers_shifts_otherwise_is_not_read(tmp_path: Path):
    saved("SwinForImageClassification", "swin", SWIN | dict(window_size=4, image_size=[32, 64]), tmp_path)
    message = r"image_size \[32, 64\] shifts no windows in its stage of 4 x 8 cells, .*: open it with transformers"
    with pytest.raises(CheckpointError, match=message):
        create_model(f"local-dir:{tmp_path}", pretrained=True)
    with pytest.raises(CheckpointError, match=message):
        load_weights(swin(img_size=(32, 64)), tmp_path)


@torch.no_grad()
def test_a_swin_of_one_block_a_stage_has_nothing_to_shift(tmp_path: Path):
    said = SWIN | dict(window_size=4, image_size=[32, 64], depths=[2, 2, 1])
    theirs = saved("SwinForImageClassification", "swin", said, tmp_path)
    ours = create_model(f"local-dir:{tmp_path}", pretrained=True).eval()
    images = torch.randn(2, 3, 32, 64)
    near(ours(images), theirs(images).logits)


@torch.no_grad()
def test_an_oblong_swin_whose_windows_divide_answers_in_timm_as_here(tmp_path: Path):
    timm = pytest.importorskip("timm")
    model = swin(img_size=(32, 64))
    theirs = timm.create_model(f"local-dir:{convert(model, tmp_path / 'out', 'timm')}", pretrained=True).eval()
    images = torch.randn(2, 3, 32, 64)
    near(model(images), theirs(images))


@pytest.mark.parametrize(("size", "cells"), [(24, "12 x 12|6 x 6"), (40, "20 x 20|10 x 10"), ((32, 40), "10")])
def test_a_swin_that_timm_pads_otherwise_is_not_written(size: Any, cells: str, tmp_path: Path):
    with pytest.raises(
        ValueError, match=rf"timm's Swin answers otherwise where a stage of .*({cells}) cells does not "
    ):
        convert(swin(img_size=size), tmp_path / "out", "timm")
    assert not (tmp_path / "out").exists()


@torch.no_grad()
def test_a_swin_that_timm_pads_otherwise_is_warned_of(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    args = dict(img_size=64, embed_dim=8, depths=[2, 2], num_heads=[1, 2])
    theirs = of_timm("swin_tiny_patch4_window7_224", args, tmp_path)
    ours = create_model(f"local-dir:{tmp_path}", pretrained=True).eval()
    said = (
        "timm's network of img_size (64, 64) answers otherwise: a stage of 16 x 16 cells does not divide into windows"
    )
    assert said in caplog.text and caplog.records[-1].levelname == "WARNING"
    images = torch.randn(1, 3, 64, 64)
    assert float((ours(images) - theirs(images)).abs().max() / theirs(images).abs().max()) > 1e-3
