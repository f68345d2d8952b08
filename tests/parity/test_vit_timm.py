"""Our ViT against timm's: every tensor randomised, copied key by key, logits and every intermediate compared."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from torch import nn

from vitrail.models.vit import VisionTransformer

vision_transformer = pytest.importorskip("timm.models.vision_transformer")
timm_layers = pytest.importorskip("timm.layers")

SMALL = dict(img_size=32, patch_size=8, embed_dim=48, depth=3, num_heads=3, num_classes=7)
CASES: dict[str, dict[str, Any]] = {
    "plain": {},
    "registers": dict(reg_tokens=4),
    "registers without positions": dict(reg_tokens=3, no_embed_class=True),
    "mean pooling": dict(global_pool="avg"),
    "mean pooling, no class token": dict(global_pool="avg", class_token=False),
    "mean pooling, norm before it": dict(global_pool="avg", fc_norm=False),
    "attention pooling": dict(global_pool="map", class_token=False),
    "attention pooling beside a class token": dict(global_pool="map"),
    "tanh GELU, in the pool too": dict(global_pool="map", act="gelu_tanh"),
    "ReLU, in the pool too": dict(global_pool="map", act="relu"),
    "query and key norm": dict(qk_norm=True),
    "LayerScale": dict(init_values=0.1),
    "five channels": dict(in_chans=5),
    "no qkv bias": dict(qkv_bias=False),
    "rectangle": dict(img_size=(32, 48), patch_size=(8, 4)),
    "no positions": dict(pos_embed="none"),
    "mlp_ratio 1": dict(mlp_ratio=1.0),
    "no head": dict(num_classes=0),
    "another norm epsilon": dict(norm_eps=1e-2, qk_norm=True),
    "CLIP": dict(pre_norm=True, norm_eps=1e-5),
    "CLIP with OpenAI's activation": dict(pre_norm=True, norm_eps=1e-5, act="quick_gelu"),
    "DINOv2": dict(init_values=0.1, num_classes=0),
    "DINOv2's giant, with registers": dict(
        init_values=0.1, reg_tokens=4, no_embed_class=True, mlp="swiglu_packed", act="silu", mlp_ratio=5.0
    ),
    "two products for gate and value": dict(mlp="swiglu", act="silu"),
    "SigLIP": dict(class_token=False, global_pool="map", num_classes=0, mlp_ratio=3.7),
    "norm after each branch": dict(block="respostnorm"),
}
ACTS = {
    "gelu": nn.GELU,
    "gelu_tanh": partial(nn.GELU, approximate="tanh"),
    "quick_gelu": timm_layers.QuickGELU,
    "relu": nn.ReLU,
    "silu": nn.SiLU,
}
MLPS = {"mlp": timm_layers.Mlp, "swiglu_packed": timm_layers.SwiGLUPacked, "swiglu": timm_layers.SwiGLU}
BLOCKS = {"prenorm": vision_transformer.Block, "respostnorm": vision_transformer.ResPostBlock}


def randomise(model: nn.Module) -> None:
    """Default inits hide mistakes behind zeros and ones; this leaves none."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for tensor in model.state_dict().values():
            tensor.copy_(torch.randn(tensor.shape, generator=generator) * 0.3)


def twins(**options: Any) -> tuple[VisionTransformer, nn.Module]:
    options = {**SMALL, **options}
    norm = partial(nn.LayerNorm, eps=options.get("norm_eps", 1e-6))
    known = {name: value for name, value in options.items() if name not in ("norm_eps", "act", "mlp", "block")}
    layers = dict(
        act_layer=ACTS[options.get("act", "gelu")],
        mlp_layer=MLPS[options.get("mlp", "mlp")],
        block_fn=BLOCKS[options.get("block", "prenorm")],
    )
    theirs = vision_transformer.VisionTransformer(**known, dynamic_img_size=True, norm_layer=norm, **layers).eval()
    randomise(theirs)
    ours = VisionTransformer(**options).eval()
    ours.load_state_dict(theirs.state_dict(), strict=True)
    return ours, theirs


def images(options: dict[str, Any], factor: float = 1.0) -> torch.Tensor:
    height, width = ours_size(options)
    return torch.randn(2, options.get("in_chans", 3), int(height * factor), int(width * factor))


def ours_size(options: dict[str, Any]) -> tuple[int, int]:
    size = options.get("img_size", SMALL["img_size"])
    return (size, size) if isinstance(size, int) else size


def close(ours: torch.Tensor, theirs: torch.Tensor) -> None:
    """1e-5 of the largest value, in fp32."""
    largest = theirs.abs().max().item() if theirs.numel() else 0.0
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5 * max(1.0, largest))


@pytest.mark.parametrize("factor", [1.0, 1.5], ids=["native size", "another size"])
@pytest.mark.parametrize("case", CASES)
@torch.no_grad()
def test_logits_and_every_intermediate_equal_timm(case: str, factor: float) -> None:
    ours, theirs = twins(**CASES[case])
    x = images(CASES[case], factor)
    close(ours(x), theirs(x))
    close(ours.forward_features(x).x, theirs.forward_features(x))
    close(*(model.forward_head(model.forward_features(x), pre_logits=True) for model in (ours, theirs)))
    for norm in (False, True):
        pairs = theirs.forward_intermediates(x, norm=norm, intermediates_only=True, return_prefix_tokens=True)
        features = ours.features(x, norm=norm)
        assert len(features.maps) == len(pairs) == 3
        for ours_map, ours_prefix, pair in zip(features.maps, features.prefix, pairs, strict=True):
            theirs_map, theirs_prefix = pair if isinstance(pair, tuple) else (pair, x.new_zeros(2, 0, 48))
            close(ours_map, theirs_map)
            close(ours_prefix, theirs_prefix)


@torch.no_grad()
def test_dynamic_pad_equals_timm() -> None:
    theirs = vision_transformer.VisionTransformer(**SMALL, dynamic_img_size=True, dynamic_img_pad=True).eval()
    randomise(theirs)
    ours = VisionTransformer(**SMALL, dynamic_pad=True).eval()
    ours.load_state_dict(theirs.state_dict())
    close(ours(x := torch.randn(2, 3, 37, 50)), theirs(x))


def test_gradients_equal_timm() -> None:
    ours, theirs = twins(init_values=0.1)
    x = torch.randn(2, 3, 32, 32)
    ours(x).square().sum().backward()
    theirs(x).square().sum().backward()
    mine = dict(ours.named_parameters())
    for name, parameter in theirs.named_parameters():
        scale = parameter.grad.abs().max().item()
        assert (mine[name].grad - parameter.grad).abs().max() <= 1e-4 * max(1.0, scale), name
