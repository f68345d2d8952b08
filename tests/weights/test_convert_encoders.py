"""Encoders written for transformers: its own readers open them, answer alike, and nothing is missing or left over."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from vitrail.models.backbone import Backbone
from vitrail.models.beit import Beit
from vitrail.models.eva import Eva
from vitrail.models.registry import build_model
from vitrail.models.vit import VisionTransformer
from vitrail.research.peers import randomise
from vitrail.weights.convert import convert
from vitrail.weights.load import create_model, load_weights

SMALL: dict[str, Any] = dict(img_size=32, patch_size=8, embed_dim=48, depth=2, num_heads=3, num_classes=0)
DINOV2: dict[str, Any] = dict(init_values=1.0)
REGISTERS: dict[str, Any] = DINOV2 | dict(reg_tokens=4, no_embed_class=True)
GATED: dict[str, Any] = dict(mlp="swiglu_packed", act="silu", mlp_ratio=2.66667 * 2)
CLIP: dict[str, Any] = dict(pre_norm=True, norm_eps=1e-5, act="quick_gelu")
SIGLIP: dict[str, Any] = dict(class_token=False, global_pool="map")
DINOV3: dict[str, Any] = dict(
    reg_tokens=4, pos_embed="none", rope="dinov3", ref_feat_shape=None, init_values=1.0, norm_eps=1e-5, fc_norm=False,
    mlp="mlp", act="gelu", mlp_ratio=4.0, qkv_bias=False,
)  # fmt: skip
CASES: dict[str, tuple[type[VisionTransformer], dict[str, Any], str, str]] = {
    "DINOv2": (VisionTransformer, DINOV2, "Dinov2Model", "pooler_output"),
    "DINOv2, gated": (VisionTransformer, DINOV2 | GATED, "Dinov2Model", "pooler_output"),
    "DINOv2, a head": (VisionTransformer, DINOV2 | dict(num_classes=5), "Dinov2ForImageClassification", "logits"),
    "registers": (VisionTransformer, REGISTERS, "Dinov2WithRegistersModel", "pooler_output"),
    "registers, gated": (VisionTransformer, REGISTERS | GATED, "Dinov2WithRegistersModel", "pooler_output"),
    "registers, a head": (
        VisionTransformer, REGISTERS | dict(num_classes=5), "Dinov2WithRegistersForImageClassification", "logits"
    ),
    "CLIP": (VisionTransformer, CLIP, "CLIPVisionModel", "pooler_output"),
    "CLIP, projected": (VisionTransformer, CLIP | dict(num_classes=5), "CLIPVisionModelWithProjection", "image_embeds"),
    "SigLIP": (VisionTransformer, SIGLIP, "SiglipVisionModel", "pooler_output"),
    "SigLIP, tanh": (VisionTransformer, SIGLIP | dict(act="gelu_tanh"), "SiglipVisionModel", "pooler_output"),
    "BEiT": (Beit, dict(num_classes=5), "BeitForImageClassification", "logits"),
    "BEiT, no head": (Beit, {}, "BeitModel", "pooler_output"),
    "BEiT, class token": (
        Beit, dict(num_classes=5, global_pool="token", init_values=0.0), "BeitForImageClassification", "logits"
    ),
    "DINOv3": (Eva, DINOV3 | dict(global_pool="token"), "DINOv3ViTModel", "pooler_output"),
    "DINOv3, biases": (
        Eva, DINOV3 | dict(global_pool="token", qkv_bias=True), "DINOv3ViTModel", "pooler_output"
    ),
    "DINOv3, gated": (
        Eva, DINOV3 | dict(global_pool="token", mlp="swiglu", act="silu"), "DINOv3ViTModel", "pooler_output"
    ),
}  # fmt: skip
"""our network, transformers' class, and what it calls our logits"""
READERS = {"ForImageClassification": "AutoModelForImageClassification", "Model": "AutoModel"}
"""who opens classes whose names end so; the others are opened by name"""


def drawn(case: str) -> Backbone:
    family, options, _, _ = CASES[case]
    model = family(**SMALL | options).eval()
    randomise(model)
    if case.startswith("CLIP") and model.num_classes:
        torch.nn.init.zeros_(model.head.bias)
    return model


def opened(folder: Path, kind: str) -> Any:
    """transformers' network of a folder, once nothing was missing, left over or of another shape."""
    transformers = pytest.importorskip("transformers")
    auto = next((name for end, name in READERS.items() if kind.endswith(end)), kind)
    model, told = getattr(transformers, auto).from_pretrained(folder, output_loading_info=True)
    assert type(model).__name__ == kind and not any(told.values()), told
    return model.eval()


def near(ours: Tensor, theirs: Tensor) -> None:
    assert float((ours - theirs).abs().max() / ours.abs().max()) <= 1e-5


@pytest.mark.parametrize("case", CASES)
@torch.no_grad()
def test_transformers_opens_an_encoder_and_answers_alike(case: str, tmp_path: Path):
    model, (_, _, kind, word) = drawn(case), CASES[case]
    theirs = opened(convert(model, tmp_path / "out", "transformers"), kind)
    images = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    answer = theirs(images, output_hidden_states=True)
    near(model(images), answer[word])
    states = model.features(images, norm=False)
    for found, prefix, state in zip(states.maps, states.prefix, answer.hidden_states[1:], strict=True):
        near(torch.cat([prefix, found.flatten(2).transpose(1, 2)], 1), state)


@pytest.mark.parametrize("case", CASES)
def test_a_round_trip_of_an_encoder_is_exact(case: str, tmp_path: Path):
    model = drawn(case)
    again = CASES[case][0](model.config)
    load_weights(again, convert(model, tmp_path / "out", "transformers"))
    assert all(torch.equal(value, again.state_dict()[name]) for name, value in model.state_dict().items())
    assert again.preprocess == model.preprocess


@pytest.mark.parametrize(
    ("row", "size"),
    [
        ("vit_small_patch14_dinov2", 56),
        ("vit_small_patch14_reg4_dinov2", 56),
        ("vit_tiny_patch16_dinov3_qkvb", 64),
        ("beit_debug", 32),
        pytest.param("vit_base_patch32_clip_224", 64, marks=pytest.mark.full),
        pytest.param("vit_base_patch16_siglip_224", 32, marks=pytest.mark.full),
    ],
)
def test_a_folder_of_a_row_becomes_that_row_again(row: str, size: int, tmp_path: Path):
    model = build_model(row, img_size=size)
    folder = convert(model, tmp_path / "out", "transformers")
    again = create_model(f"local-dir:{folder}", pretrained=True)
    if row.startswith("vit_tiny_patch16_dinov3"):  # turns by places in the image: no tensor tells its size
        again = create_model(f"local-dir:{folder}", pretrained=True, img_size=size)
    assert again.variant == row and again.config == model.config
    assert all(torch.equal(value, again.state_dict()[name]) for name, value in model.state_dict().items())


def test_a_head_of_dinov2_that_reads_the_patches_too_is_not_taken_for_one_of_the_class_token(tmp_path: Path):
    folder = convert(drawn("DINOv2, a head"), tmp_path / "out", "transformers")
    tensors = load_file(folder / "model.safetensors")
    assert tensors["classifier.weight"].shape == (5, 96)
    tensors["classifier.weight"][0, 95] = 1e-3
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(ValueError, match=r"extra: classifier.weight \(no piece of head.weight: it reads the mean"):
        load_weights(drawn("DINOv2, a head"), folder)


def test_gated_layers_of_dinov2_are_gated_by_silu_whatever_their_config_calls_its_activation(tmp_path: Path):
    """Published configs of the giant say "gelu"."""
    folder = convert(drawn("DINOv2, gated"), tmp_path / "out", "transformers")
    said = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(said | {"hidden_act": "gelu"}))
    assert load_weights(drawn("DINOv2, gated"), folder).source == "transformers' DINOv2"


@pytest.mark.parametrize(("case", "changes", "message"), [
    ("DINOv2", {"qk_norm": True}, "DINOv2 knows no qk_norm=True: write it with --to vitrail or --to timm$"),
    ("DINOv2", {"reg_tokens": 2}, "transformers' DINOv2 knows no no_embed_class=False"),
    ("DINOv2", {"mlp_ratio": 2.5}, "has hidden layers by a whole mlp_ratio; this network's are 120 wide for embed_dim"),
    ("DINOv2, gated", {"mlp_ratio": 5.0}, "has hidden layers by a whole mlp_ratio; this network's are 120 wide"),
    ("DINOv2", {"img_size": (32, 48)}, "transformers' DINOv2 has a square img_size; got 32 x 48: write it with --to"),
    ("DINOv2", {"patch_size": (8, 16)}, "transformers' DINOv2 has a square patch_size; got 8 x 16"),
    ("CLIP", {"qkv_bias": False}, "transformers' CLIP knows no qkv_bias=False"),
    ("CLIP", {"img_size": (32, 48)}, "transformers' CLIP has a square img_size"),
    ("SigLIP", {"num_classes": 3}, r"SigLIP has no head, and .* 3 classes: .* reset_classifier\(0\), or write"),
    ("SigLIP", {"class_token": True}, "transformers' SigLIP knows no class_token=True"),
    ("SigLIP", {"img_size": (32, 48)}, "transformers' SigLIP has a square img_size"),
    ("BEiT", {"init_values": None}, r"LayerScale, and this network none \(init_values=None\): write it with --to"),
    ("BEiT", {"rel_pos_bias": False}, "transformers' BEiT knows no rel_pos_bias=False"),
    ("BEiT", {"pos_embed": "learn"}, "transformers' BEiT knows no pos_embed='learn'"),
    ("BEiT", {"img_size": (32, 48)}, "transformers' BEiT has a square img_size"),
    ("DINOv3", {"num_classes": 3}, "transformers' DINOv3 has no head, and this network one of 3 classes: leave it"),
    ("DINOv3", {"init_values": None}, "transformers' DINOv3 has LayerScale, and this network none"),
    ("DINOv3", {"reg_tokens": 0}, r"DINOv3 has register tokens, and this network none \(reg_tokens=0\): write"),
    ("DINOv3", {"rope": "axial"}, r"transformers has no EVA-02 \(rope='axial'\): write it with --to vitrail$"),
    ("DINOv3", {"mlp": "swiglu_packed", "act": "silu"}, "transformers' DINOv3 knows no mlp='swiglu_packed'"),
])  # fmt: skip
def test_what_an_encoder_of_transformers_cannot_be_is_refused(
    case: str, changes: dict[str, Any], message: str, tmp_path: Path
):
    family, options, _, _ = CASES[case]
    with pytest.raises(ValueError, match=message):
        convert(family(**{**SMALL, **options, **changes}), tmp_path / "out", "transformers")
    assert not (tmp_path / "out").exists()


def test_a_projection_of_clip_with_a_bias_is_refused(tmp_path: Path):
    model = drawn("CLIP, projected")
    torch.nn.init.constant_(model.head.bias, 1e-3)
    with pytest.raises(
        ValueError, match="CLIP has no head.bias, and here it is not zero: make it zero, leave the head"
    ):
        convert(model, tmp_path / "out", "transformers")
    assert not (tmp_path / "out").exists()
