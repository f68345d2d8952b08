"""Our hybrid against timm's: every tensor randomised, copied key by key, logits and every intermediate compared."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from torch import nn

from vitrail.models.hybrid import HybridViT

hybrid = pytest.importorskip("timm.models.vision_transformer_hybrid")

SMALL: dict[str, Any] = dict(img_size=64, embed_dim=48, depth=3, num_heads=3, num_classes=7)
STEMS: dict[str, dict[str, Any]] = {
    "root alone, patches of 8": dict(stem_depths=(), patch_size=8),
    "two stages": dict(stem_depths=(1, 2)),
    "three stages, patches of 2": dict(stem_depths=(1, 1, 1), patch_size=2),
    "five channels": dict(stem_depths=(1,), patch_size=2, in_chans=5),
}
SIZES = [(64, 64), (96, 32)]


def randomise(model: nn.Module) -> None:
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for tensor in model.state_dict().values():
            tensor.copy_(torch.randn(tensor.shape, generator=generator) * 0.3)


def twins(stem: dict[str, Any], **more: Any) -> tuple[HybridViT, nn.Module]:
    options = {**SMALL, **stem}
    depths, chans = options.pop("stem_depths"), options.get("in_chans", 3)
    embed = partial(hybrid.HybridEmbed, backbone=hybrid._resnetv2(depths, in_chans=chans))
    patch = options.pop("patch_size", 1)
    make = hybrid.VisionTransformer
    theirs = make(**options, patch_size=patch, embed_layer=embed, dynamic_img_size=True, **more).eval()
    randomise(theirs)
    ours = HybridViT(**SMALL | stem, dynamic_pad=bool(more)).eval()
    ours.load_state_dict(theirs.state_dict(), strict=True)
    return ours, theirs


def close(ours: torch.Tensor, theirs: torch.Tensor) -> None:
    """1e-5 of the largest value, in fp32."""
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5 * max(1.0, theirs.abs().max().item()))


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("stem", STEMS)
@torch.no_grad()
def test_logits_and_every_intermediate_equal_timm(stem: str, size: tuple[int, int]) -> None:
    ours, theirs = twins(STEMS[stem])
    x = torch.randn(2, STEMS[stem].get("in_chans", 3), *size)
    close(ours(x), theirs(x))
    close(ours.patch_embed.backbone(x), theirs.patch_embed.backbone(x))
    for norm in (False, True):
        pairs = theirs.forward_intermediates(x, norm=norm, intermediates_only=True, return_prefix_tokens=True)
        features = ours.features(x, norm=norm)
        assert len(features.maps) == len(pairs) == 3
        for ours_map, ours_prefix, (theirs_map, theirs_prefix) in zip(*features, pairs, strict=True):
            close(ours_map, theirs_map)
            close(ours_prefix, theirs_prefix)


@pytest.mark.parametrize("size", [(61, 50), (33, 95), (17, 23)])
@torch.no_grad()
def test_any_size_is_taken_where_a_token_is_a_cell_as_by_timm(size: tuple[int, int]) -> None:
    ours, theirs = twins(STEMS["two stages"])
    close(ours(x := torch.randn(2, 3, *size)), theirs(x))


@torch.no_grad()
def test_the_map_must_divide_not_the_image() -> None:
    """A map of 16 cells is that of 61 pixels, too; of 57 pixels it has 15, which timm's `dynamic_img_pad` fills up."""
    stem = STEMS["root alone, patches of 8"]
    ours, theirs = twins(stem)
    close(ours(x := torch.randn(2, 3, 61, 64)), theirs(x))
    with pytest.raises(ValueError, match="img_size 57 is not divisible by patch_size 32: use 32 or 64, or dynamic_pad"):
        ours(torch.randn(2, 3, 57, 64))
    ours, theirs = twins(stem, dynamic_img_pad=True)
    close(ours(x := torch.randn(2, 3, 57, 70)), theirs(x))


def test_gradients_equal_timm() -> None:
    ours, theirs = twins(STEMS["two stages"])
    x = torch.randn(2, 3, 64, 64)
    ours(x).square().sum().backward()
    theirs(x).square().sum().backward()
    mine = dict(ours.named_parameters())
    for name, parameter in theirs.named_parameters():
        scale = parameter.grad.abs().max().item()
        assert (mine[name].grad - parameter.grad).abs().max() <= 1e-4 * max(1.0, scale), name
