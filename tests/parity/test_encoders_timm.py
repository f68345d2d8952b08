"""EVA-02, DINOv3, BEiT and DeiT against timm's: every tensor randomised, logits and every intermediate compared."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from vitrail.models.backbone import Backbone
from vitrail.models.beit import Beit
from vitrail.models.deit import DeiT
from vitrail.models.eva import Eva

pytest.importorskip("timm")
from timm.models.beit import Beit as TimmBeit
from timm.models.deit import VisionTransformerDistilled
from timm.models.eva import Eva as TimmEva

SMALL: dict[str, Any] = dict(img_size=32, patch_size=8, embed_dim=48, depth=3, num_heads=3, num_classes=7)
LARGE: tuple[dict[str, Any], dict[str, Any]] = (
    dict(ref_feat_shape=(6, 6), mlp="swiglu_normed", mlp_ratio=8 / 3, qkv_fused=False),
    dict(swiglu_mlp=True, scale_mlp=True, qkv_fused=False, use_rot_pos_emb=True, ref_feat_shape=(6, 6)),
)
EVA: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "EVA-02": (dict(ref_feat_shape=(6, 6)), dict(swiglu_mlp=True, use_rot_pos_emb=True, ref_feat_shape=(6, 6))),
    "EVA-02 that counts its own cells": (dict(ref_feat_shape=None), dict(swiglu_mlp=True, use_rot_pos_emb=True)),
    "EVA-02 that reads its class token": (
        dict(ref_feat_shape=(6, 6), global_pool="token"),
        dict(swiglu_mlp=True, use_rot_pos_emb=True, ref_feat_shape=(6, 6), global_pool="token"),
    ),
    "EVA-02, base": LARGE,
    "EVA-02, base, without biases": (LARGE[0] | dict(qkv_bias=False), LARGE[1] | dict(qkv_bias=False)),
    "DINOv3": (dict(qkv_bias=False, mlp="mlp", act="gelu"), dict(qkv_bias=False)),
    "DINOv3 with biases": (dict(mlp="mlp", act="gelu"), dict(qkv_bias=True)),
    "DINOv3 with a gate": (
        dict(qkv_bias=False, mlp="swiglu"),
        dict(qkv_bias=False, swiglu_mlp=True, swiglu_align_to=8),
    ),
}
"""fields of ours, arguments of timm's"""
DINOV3_OURS: dict[str, Any] = dict(
    reg_tokens=4, pos_embed="none", rope="dinov3", ref_feat_shape=None, init_values=0.1, norm_eps=1e-5, fc_norm=False
)
DINOV3_TIMM: dict[str, Any] = dict(
    num_reg_tokens=4, use_abs_pos_emb=False, use_rot_pos_emb=True, rope_type="dinov3", rope_temperature=100,
    rope_rotate_half=True, init_values=0.1, use_fc_norm=False, norm_layer=partial(nn.LayerNorm, eps=1e-5),
)  # fmt: skip


def randomised(model: nn.Module) -> nn.Module:
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for tensor in model.state_dict().values():
            tensor.copy_(torch.randn(tensor.shape, generator=generator) * 0.3)
    return model.eval()


def eva(case: str) -> tuple[Backbone, nn.Module]:
    ours, theirs = EVA[case]
    if "DINOv3" in case:
        ours, theirs = DINOV3_OURS | dict(mlp_ratio=4.0) | ours, DINOV3_TIMM | dict(mlp_ratio=4.0) | theirs
    else:  # timm counts the packed gate's half
        ours, theirs = dict(mlp_ratio=16 / 3) | ours, dict(mlp_ratio=8 / 3, norm_layer=LAYER_NORM) | theirs
    return twins(Eva(**SMALL | ours), TimmEva(**SMALL, dynamic_img_size=True, **theirs))


LAYER_NORM = partial(nn.LayerNorm, eps=1e-6)


def twins(ours: Backbone, theirs: nn.Module) -> tuple[Backbone, nn.Module]:
    ours.load_state_dict(randomised(theirs).state_dict(), strict=True)
    return ours.eval(), theirs


def close(ours: Tensor, theirs: Tensor) -> None:
    """1e-5 of the largest value, in fp32."""
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5 * max(1.0, theirs.abs().max().item()))


def check(ours: Backbone, theirs: nn.Module, x: Tensor) -> None:
    close(ours(x), theirs(x))
    close(ours.forward_features(x).x, theirs.forward_features(x))
    for norm in (False, True):
        features = ours.features(x, norm=norm)
        pairs = theirs.forward_intermediates(x, norm=norm, intermediates_only=True, return_prefix_tokens=True)
        assert len(features.maps) == len(pairs) == 3
        for found, prefix, (their_map, their_prefix) in zip(features.maps, features.prefix, pairs, strict=True):
            close(found, their_map)
            close(prefix, their_prefix)


@pytest.mark.parametrize("size", [(32, 32), (48, 48), (40, 64)], ids=["native size", "another size", "a rectangle"])
@pytest.mark.parametrize("case", EVA)
@torch.no_grad()
def test_eva_and_dinov3_equal_timms(case: str, size: tuple[int, int]) -> None:
    check(*eva(case), torch.randn(2, 3, *size))


@pytest.mark.filterwarnings("ignore:Using a non-tuple sequence", "ignore:.*searchsorted")  # timm's way to resize
@pytest.mark.parametrize("size", [(32, 32), (48, 48), (24, 24), (40, 64)])
@pytest.mark.parametrize("pool", ["avg", "token"])
@pytest.mark.parametrize("bias", [True, False])
@torch.no_grad()
def test_beit_equals_timms(pool: str, bias: bool, size: tuple[int, int]) -> None:
    """At another size timm makes new tables from the old ones; ours stay as they are."""
    theirs = TimmBeit(
        **SMALL, use_abs_pos_emb=False, use_rel_pos_bias=True, init_values=0.1, global_pool=pool, qkv_bias=bias,
        norm_layer=LAYER_NORM,
    )  # fmt: skip
    ours, theirs = twins(Beit(**SMALL, global_pool=pool, qkv_bias=bias), theirs)
    theirs.set_input_size(size)
    check(ours, theirs, torch.randn(2, 3, *size))


@pytest.mark.parametrize("size", [(32, 32), (48, 48), (40, 64)])
@torch.no_grad()
def test_deit_equals_timms(size: tuple[int, int]) -> None:
    ours, theirs = twins(DeiT(**SMALL), VisionTransformerDistilled(**SMALL, dynamic_img_size=True))
    x = torch.randn(2, 3, *size)
    check(ours, theirs, x)
    theirs.set_distilled_training(True)
    for mine, other in zip(ours.logits_by_head(x), theirs.train()(x), strict=True):
        close(mine, other)


def gradients_equal(ours: Backbone, theirs: nn.Module) -> None:
    x = torch.randn(2, 3, 32, 32)
    for model in (ours, theirs):
        model(x).square().sum().backward()
    mine = dict(ours.named_parameters())
    for name, parameter in theirs.named_parameters():
        scale = parameter.grad.abs().max().item()
        assert (mine[name].grad - parameter.grad).abs().max() <= 1e-4 * max(1.0, scale), name


def test_gradients_equal_timms() -> None:
    gradients_equal(*eva("DINOv3 with biases"))
    gradients_equal(*eva("EVA-02, base"))
    beit = TimmBeit(**SMALL, use_abs_pos_emb=False, use_rel_pos_bias=True, init_values=0.1, norm_layer=LAYER_NORM)
    gradients_equal(*twins(Beit(**SMALL), beit))
    gradients_equal(*twins(DeiT(**SMALL), VisionTransformerDistilled(**SMALL)))
