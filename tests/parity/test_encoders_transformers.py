"""Published encoders as transformers writes them to disk: every tensor randomised, every layer's tokens compared."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from vitrail.models.backbone import Backbone
from vitrail.models.beit import Beit
from vitrail.models.deit import DeiT
from vitrail.models.eva import Eva
from vitrail.models.vit import VisionTransformer
from vitrail.weights.keymaps import deit, encoders
from vitrail.weights.layouts import layout_of

transformers = pytest.importorskip("transformers")

SMALL: dict[str, Any] = dict(img_size=32, patch_size=8, embed_dim=48, depth=2, num_heads=3)
THEIRS: dict[str, Any] = dict(
    image_size=32, patch_size=8, hidden_size=48, num_hidden_layers=2, num_attention_heads=3, intermediate_size=96
)
V3 = dict(pos_embed="none", rope="dinov3", ref_feat_shape=None, init_values=1.0, norm_eps=1e-5, fc_norm=False)
CASES: dict[str, tuple[str, dict[str, Any], Any, dict[str, Any]]] = {
    "DINOv2": (
        "Dinov2Model",
        dict(mlp_ratio=2),
        VisionTransformer,
        dict(init_values=1.0, num_classes=0, mlp_ratio=2.0),
    ),
    "DINOv2, gated": (
        "Dinov2Model",
        dict(use_swiglu_ffn=True),  # 2/3 of four times the width, up to a multiple of 8
        VisionTransformer,
        dict(init_values=1.0, num_classes=0, mlp="swiglu_packed", act="silu", mlp_ratio=256 / 48),
    ),
    "DINOv2 with registers": (
        "Dinov2WithRegistersModel",
        dict(mlp_ratio=2),
        VisionTransformer,
        dict(init_values=1.0, num_classes=0, reg_tokens=4, no_embed_class=True, mlp_ratio=2.0),
    ),
    "DINOv3": (
        "DINOv3ViTModel",
        dict(num_register_tokens=4, query_bias=True, value_bias=True),
        Eva,
        dict(**V3, reg_tokens=4, mlp="mlp", act="gelu", mlp_ratio=2.0),
    ),
    "DINOv3, gated": (
        "DINOv3ViTModel",
        dict(num_register_tokens=2, query_bias=True, value_bias=True, use_gated_mlp=True, hidden_act="silu"),
        Eva,
        dict(**V3, reg_tokens=2, mlp="swiglu", mlp_ratio=2.0),
    ),
    "SigLIP": (
        "SiglipVisionModel",
        {},
        VisionTransformer,
        dict(class_token=False, global_pool="map", num_classes=0, act="gelu_tanh", mlp_ratio=2.0),
    ),
    "CLIP": (
        "CLIPVisionModelWithProjection",
        dict(projection_dim=7),
        VisionTransformer,
        dict(pre_norm=True, norm_eps=1e-5, act="quick_gelu", num_classes=7, mlp_ratio=2.0),
    ),
    "BEiT": (
        "BeitForImageClassification",
        dict(use_relative_position_bias=True, layer_scale_init_value=1.0, use_mean_pooling=True, num_labels=7),
        Beit,
        dict(norm_eps=1e-12, init_values=1.0, num_classes=7, mlp_ratio=2.0),
    ),
    "DeiT": (
        "DeiTForImageClassificationWithTeacher",
        dict(num_labels=7),
        DeiT,
        dict(norm_eps=1e-12, num_classes=7, mlp_ratio=2.0),
    ),
}
"""their class and options, ours"""
LOGITS = {"CLIP": "image_embeds", "BEiT": "logits", "DeiT": "logits", "SigLIP": "pooler_output"}


def twins(case: str, folder: Path) -> tuple[Backbone, nn.Module]:
    name, said, family, options = CASES[case]
    kind = getattr(transformers, name)
    theirs = kind(kind.config_class(**{**THEIRS, **said})).eval()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)
    theirs.save_pretrained(folder)
    tensors = load_file(folder / "model.safetensors")
    keymap = layout_of(tensors)
    assert keymap in (*encoders.KEYMAPS, *deit.KEYMAPS) and keymap.family == family.family
    ours = family(**{**SMALL, **options}).eval()
    ours.load_state_dict(keymap.to_ours(tensors), strict=True)
    return ours, theirs


def close(ours: Tensor, theirs: Tensor) -> None:
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5 * max(1.0, theirs.abs().max().item()))


@pytest.mark.parametrize("case", CASES)
@torch.no_grad()
def test_an_encoder_equals_transformers(case: str, tmp_path: Path) -> None:
    ours, theirs = twins(case, tmp_path)
    x = torch.randn(2, 3, 32, 32)
    answer = theirs(x, output_hidden_states=True)
    features = ours.features(x, norm=False)
    for found, prefix, state in zip(features.maps, features.prefix, answer.hidden_states[1:], strict=True):
        close(torch.cat([prefix, found.flatten(2).transpose(1, 2)], 1), state)
    if case in LOGITS:
        close(ours(x), getattr(answer, LOGITS[case]))
    else:
        close(ours.forward_features(x).x, answer.last_hidden_state)


@torch.no_grad()
def test_dinov3_equals_transformers_at_another_size(tmp_path: Path) -> None:
    ours, theirs = twins("DINOv3", tmp_path)
    x = torch.randn(2, 3, 40, 64)
    close(ours.forward_features(x).x, theirs(x).last_hidden_state)


@torch.no_grad()
def test_both_heads_of_deit_equal_transformers(tmp_path: Path) -> None:
    ours, theirs = twins("DeiT", tmp_path)
    x = torch.randn(2, 3, 32, 32)
    answer = theirs(x)
    for mine, other in zip(ours.logits_by_head(x), (answer.cls_logits, answer.distillation_logits), strict=True):
        close(mine, other)
