"""transformers' folders of sizes that no row has: the network is made as their config says, and answers as theirs."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from vitrail.models.registry import FAMILIES, ROWS, build_model
from vitrail.research.peers import randomise
from vitrail.weights.load import create_model, load_weights
from vitrail.weights.read import CheckpointError
from vitrail.weights.transformers_configs import CONFIGS, SWIN_EPS
from vitrail.weights.transformers_networks import KINDS, TOWERS, network_of

transformers = pytest.importorskip("transformers")
PLAIN: dict[str, Any] = dict(hidden_size=40, num_hidden_layers=2, num_attention_heads=5, image_size=32, patch_size=8)
VIT = PLAIN | dict(intermediate_size=100)
STAGES: dict[str, Any] = dict(
    image_size=64, depths=[1, 2, 1, 1], hidden_sizes=[8, 16, 24, 40], num_attention_heads=[1, 2, 3, 5],
    mlp_ratios=[3, 2, 2, 2],
)  # fmt: skip
SWIN: dict[str, Any] = dict(image_size=32, patch_size=2, embed_dim=12, depths=[1, 2], num_heads=[2, 3], window_size=4)
BEIT = VIT | dict(use_relative_position_bias=True)
DINOV3 = VIT | dict(num_register_tokens=2)
CASES: dict[str, tuple[str, str, dict[str, Any], str]] = {
    "ViT": ("ViTForImageClassification", "vit", VIT, "logits"),
    "ViT, no biases, ReLU": (
        "ViTForImageClassification", "vit", VIT | dict(qkv_bias=False, hidden_act="relu", layer_norm_eps=1e-3), "logits"
    ),
    "ViT, oblong": (
        "ViTForImageClassification", "vit",
        VIT | dict(image_size=[32, 64], patch_size=[8, 16], num_channels=4), "logits",
    ),
    "DeiT": ("DeiTForImageClassificationWithTeacher", "deit", VIT, "logits"),
    "Swin": ("SwinForImageClassification", "swin", SWIN | dict(mlp_ratio=3.0, qkv_bias=False), "logits"),
    "PVT": (
        "PvtForImageClassification", "pvt",
        STAGES | dict(sequence_reduction_ratios=[4, 2, 2, 1], layer_norm_eps=1e-4), "logits",
    ),
    "PVT v2": ("PvtV2ForImageClassification", "pvt_v2", STAGES | dict(sr_ratios=[4, 2, 2, 1]), "logits"),
    "PVT v2, linear": (
        "PvtV2ForImageClassification", "pvt_v2",
        STAGES | dict(linear_attention=True, qkv_bias=False, patch_sizes=[5, 3, 3, 3], strides=[2, 2, 2, 2]), "logits",
    ),
    "BEiT": ("BeitForImageClassification", "beit", BEIT, "logits"),
    "BEiT, class token and positions": (
        "BeitForImageClassification", "beit",
        BEIT | dict(use_mean_pooling=False, use_absolute_position_embeddings=True, use_relative_position_bias=False),
        "logits",
    ),
    "DINOv2": ("Dinov2Model", "dinov2", PLAIN | dict(mlp_ratio=3), "pooler_output"),
    "DINOv2, gated, no biases": (
        "Dinov2Model", "dinov2", PLAIN | dict(use_swiglu_ffn=True, qkv_bias=False), "pooler_output"
    ),
    "registers": (
        "Dinov2WithRegistersModel", "dinov2_with_registers", PLAIN | dict(num_register_tokens=3), "pooler_output"
    ),
    "DINOv3": ("DINOv3ViTModel", "dinov3_vit", DINOV3, "mean"),
    "DINOv3, gated, no biases": (
        "DINOv3ViTModel", "dinov3_vit",
        DINOV3 | dict(use_gated_mlp=True, hidden_act="silu", query_bias=False, value_bias=False), "mean",
    ),
    "CLIP": ("CLIPVisionModelWithProjection", "clip_vision_model", VIT | dict(projection_dim=7), "image_embeds"),
    "CLIP, GELU": ("CLIPVisionModel", "clip_vision_model", VIT | dict(hidden_act="gelu"), "pooler_output"),
    "SigLIP": ("SiglipVisionModel", "siglip_vision_model", VIT, "pooler_output"),
}  # fmt: skip


def theirs_of(name: str, kind: str, said: dict[str, Any], folder: Path) -> nn.Module:
    labels = {"num_labels": 6} if "Classification" in name else {}
    torch.manual_seed(0)
    model = getattr(transformers, name)(transformers.AutoConfig.for_model(kind, **said, **labels)).eval()
    randomise(model)
    model.save_pretrained(folder)
    return model


def answer(model: nn.Module, images: Tensor, word: str, said: dict[str, Any]) -> Tensor:
    out = model(images)
    return out.last_hidden_state[:, 1 + said["num_register_tokens"] :].mean(1) if word == "mean" else out[word]


@torch.no_grad()
@pytest.mark.parametrize("case", CASES)
def test_a_folder_makes_the_network_that_its_config_says(case: str, tmp_path: Path):
    name, kind, said, word = CASES[case]
    theirs = theirs_of(name, kind, said, tmp_path)
    ours = create_model(f"local-dir:{tmp_path}", pretrained=True).eval()
    assert ours.variant == ""
    sides = said["image_size"] if isinstance(said["image_size"], list) else [said["image_size"]] * 2
    images = torch.randn(2, said.get("num_channels", 3), *sides)
    assert torch.allclose(ours(images), answer(theirs, images, word, said), atol=1e-5)


@torch.no_grad()
def test_dinov3_with_the_class_token_answers_as_transformers_pools(tmp_path: Path):
    theirs = theirs_of("DINOv3ViTModel", "dinov3_vit", DINOV3, tmp_path)
    ours = create_model(f"local-dir:{tmp_path}", pretrained=True, global_pool="token").eval()
    images = torch.randn(2, 3, 32, 32)
    assert torch.allclose(ours(images), theirs(images).pooler_output, atol=1e-5)


@torch.no_grad()
def test_the_eye_of_a_clip_folder_is_made_and_its_activation_is_known(tmp_path: Path):
    text = dict(hidden_size=8, intermediate_size=16, num_hidden_layers=1, num_attention_heads=1, vocab_size=10,
                bos_token_id=0, eos_token_id=1, pad_token_id=1)  # fmt: skip
    config = transformers.CLIPConfig(vision_config=VIT | dict(projection_dim=7), text_config=text, projection_dim=7)
    theirs = transformers.CLIPModel(config).eval()
    randomise(theirs)
    theirs.save_pretrained(tmp_path)
    ours = create_model(f"local-dir:{tmp_path}", pretrained=True).eval()
    images = torch.randn(2, 3, 32, 32)
    expected = theirs.visual_projection(theirs.vision_model(images).pooler_output)
    assert ours.config.act == "quick_gelu" and torch.allclose(ours(images), expected, atol=1e-5)


@pytest.mark.parametrize("row", [row for row, family in ROWS.items() if family in CONFIGS])
def test_what_is_written_of_a_row_is_read_as_that_row(row: str):
    config = FAMILIES[ROWS[row]].variants[row]
    try:
        said = CONFIGS[ROWS[row]](config)
    except ValueError:  # transformers has not got it
        return
    family, fields = network_of(json.loads(json.dumps(said))) or ("", {})
    read = asdict(FAMILIES[family].config(**fields))
    own = asdict(config) | {"num_classes": read["num_classes"]}
    own |= {"global_pool": "avg"} if family == "eva" else {}
    if "embed_dim" in own and "mlp_ratio" in own:  # the ratio itself may differ in its last digit
        assert int(read.pop("mlp_ratio") * own["embed_dim"]) == int(own.pop("mlp_ratio") * own["embed_dim"])
    assert read == own


@pytest.mark.parametrize("kind", KINDS)
def test_what_a_config_leaves_out_is_as_transformers_has_it(kind: str):
    registers = {"num_register_tokens": 4}  # DINOv3's default is none
    usual = transformers.AutoConfig.for_model(kind).to_dict()
    said, whole = (network_of(config | registers) for config in ({"model_type": kind}, json.loads(json.dumps(usual))))
    assert said and whole and said[0] == whole[0]
    assert FAMILIES[said[0]].config(**said[1]) == FAMILIES[said[0]].config(**whole[1])


WRONG: dict[str, tuple[str, dict[str, Any], str]] = {
    "an activation": ("vit", dict(hidden_act="mish"), "hidden_act must be one of gelu, .*; got 'mish'"),
    "positions": ("swin", dict(use_absolute_embeddings=True), "use_absolute_embeddings=True is no network here"),
    "an epsilon": ("swin", dict(layer_norm_eps=1e-3), "layer_norm_eps=0.001 is no network here, which has 1e-05"),
    "turns": ("dinov3_vit", dict(rope_theta=10.0, num_register_tokens=4), "with rope_theta=10.0 is no network here"),
    "no registers": ("dinov3_vit", dict(num_register_tokens=0), "num_register_tokens must be at least 1"),
    "biases": (
        "dinov3_vit", dict(query_bias=False, num_register_tokens=4), "query_bias and value_bias must be alike"
    ),
    "a gate": (
        "dinov3_vit", dict(use_gated_mlp=True, num_register_tokens=4), "use_gated_mlp goes with hidden_act='silu' here"
    ),
    "one table": ("beit", dict(use_shared_relative_position_bias=True), "use_shared_relative_position_bias=True is no"),
    "no scale": ("beit", dict(layer_scale_init_value=0.0), "layer_scale_init_value must be above 0"),
    "no head": ("siglip_vision_model", dict(vision_use_head=False), "vision_use_head=False is no network here"),
    "one head": (
        "deit", dict(architectures=["DeiTForImageClassification"]), "architectures DeiTForImageClassification has a "
    ),
    "patches": ("pvt", dict(strides=[2, 2, 2, 2]), r"patch_sizes .* must be a first stage's and then \[2, 2, 2\]"),
    "an oblong image": (
        "beit", dict(image_size=[32, 64]), r"image_size of transformers' beit must be square .*\(32, 64\): open it"
    ),
    "a huge image": ("vit", dict(image_size=10**6), "image_size must be at most 16,384 pixels; got 1000000"),
}  # fmt: skip


@pytest.mark.parametrize("case", WRONG)
def test_what_no_network_here_can_be_is_named(case: str):
    kind, said, message = WRONG[case]
    with pytest.raises(ValueError, match=message):
        network_of({"model_type": kind} | said)


@pytest.mark.parametrize("said", [{}, {"model_type": "bert"}, {"model_type": ["vit"]}, {"model_type": "clip"}])
def test_other_configs_say_nothing(said: dict[str, Any]):
    assert network_of(said) is None


@pytest.mark.parametrize(
    "said", [{"hidden_size": "wide"}, {"num_attention_heads": [3]}, {"hidden_size": 41}, {"hidden_act": ["gelu"]}]
)
def test_a_damaged_config_is_an_error_that_names_it(said: dict[str, Any], tmp_path: Path):
    theirs_of("ViTForImageClassification", "vit", VIT, tmp_path)
    config = json.loads((tmp_path / "config.json").read_text()) | said
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=r"config\.json beside it says no network of this package: "):
        create_model(f"local-dir:{tmp_path}", pretrained=True)


HEADS = [
    ("Dinov2ForImageClassification", "dinov2"),
    ("Dinov2WithRegistersForImageClassification", "dinov2_with_registers"),
]


@torch.no_grad()
@pytest.mark.parametrize(("name", "kind"), HEADS)
def test_a_head_that_reads_the_mean_too_is_refused_and_can_be_left_out(name: str, kind: str, tmp_path: Path):
    theirs = theirs_of(name, kind, PLAIN, tmp_path)
    with pytest.raises(CheckpointError, match=r"head\.weight: it reads the mean of the patches too\): load_weights\("):
        create_model(f"local-dir:{tmp_path}", pretrained=True)
    bare = create_model(f"local-dir:{tmp_path}", pretrained=True, num_classes=0).eval()
    images = torch.randn(2, 3, 32, 32)
    assert torch.allclose(bare(images), theirs.base_model(images).pooler_output, atol=1e-5)
    fresh = create_model(f"local-dir:{tmp_path}", pretrained=True, num_classes=3)
    assert fresh.num_classes == 3


def of_swin(folder: Path, **said: Any) -> nn.Module:
    return theirs_of("SwinForImageClassification", "swin", SWIN | said, folder)


def test_a_swin_with_two_epsilons_is_refused_whichever_way_it_comes(tmp_path: Path):
    """transformers keeps 1e-5 in the norms of patches and merging, so that no one epsilon gives its answers."""
    of_swin(tmp_path, layer_norm_eps=1e-3)
    message = f"layer_norm_eps=0.001 is no network here, which has {SWIN_EPS}"
    with pytest.raises(CheckpointError, match=message):
        create_model(f"local-dir:{tmp_path}", pretrained=True)
    model = build_model("swin_debug", embed_dim=12, depths=(1, 2), num_heads=(2, 3), num_classes=6, norm_eps=1e-3)
    with pytest.raises(CheckpointError, match=message):
        load_weights(model, tmp_path)
    with pytest.raises(ValueError, match=r"has 1e-05 in some norms, whatever its layer_norm_eps; this network has"):
        CONFIGS["swin"](model.config)


def test_every_tower_is_of_a_known_kind():
    assert set(TOWERS.values()) <= KINDS.keys()
