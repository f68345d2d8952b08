"""PVT v2 against timm's: every tensor randomised, copied key by key, logits and every intermediate compared."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from vitrail.models.pvt_v2 import PyramidVisionTransformerV2
from vitrail.weights.keymaps.pvt_v2 import AUTHORS
from vitrail.weights.layouts import layout_of

pvt_v2 = pytest.importorskip("timm.models.pvt_v2")

SMALL: dict[str, Any] = dict(embed_dims=(16, 32, 40, 64), depths=(1, 2, 1, 2), num_heads=(1, 2, 5, 8), num_classes=7)
CASES: dict[str, dict[str, Any]] = {
    "plain": {},
    "linear": dict(linear=True),
    "no qkv bias": dict(qkv_bias=False),
    "other ratios": dict(sr_ratios=(4, 2, 1, 1), mlp_ratios=(2, 3, 4, 1)),
    "three stages, two channels": dict(
        embed_dims=(16, 24, 32), depths=(1, 1, 2), num_heads=(2, 3, 4), sr_ratios=(4, 2, 1), mlp_ratios=(2, 2, 2),
        in_chans=2,
    ),
    "no head": dict(num_classes=0),
}  # fmt: skip
SIZES = [(64, 64), (96, 64), (57, 71), (37, 130)]
"""the last two divide into nothing: patches round up, windows round down"""


def randomise(model: nn.Module) -> None:
    """Default inits hide mistakes behind zeros and ones; this leaves none."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for tensor in model.state_dict().values():
            tensor.copy_(torch.randn(tensor.shape, generator=generator) * 0.3)


def twins(**options: Any) -> tuple[PyramidVisionTransformerV2, nn.Module]:
    options = {**SMALL, **options}
    theirs = pvt_v2.PyramidVisionTransformerV2(**options).eval()
    randomise(theirs)
    ours = PyramidVisionTransformerV2(**options, img_size=64).eval()
    ours.load_state_dict(theirs.state_dict(), strict=True)
    return ours, theirs


def close(ours: Tensor, theirs: Tensor) -> None:
    """1e-5 of the largest value, in fp32."""
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5 * max(1.0, theirs.abs().max().item()))


def block_outputs(model: nn.Module, x: Tensor) -> list[Tensor]:
    """What every block answers."""
    found: list[Tensor] = []
    for stage in model.stages:
        for block in stage.blocks:
            block.register_forward_hook(lambda _, args, out: found.append(out))
    model(x)
    return found


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("case", CASES)
@torch.no_grad()
def test_logits_and_every_intermediate_equal_timm(case: str, size: tuple[int, int]) -> None:
    ours, theirs = twins(**CASES[case])
    x = torch.randn(2, CASES[case].get("in_chans", 3), *size)
    close(ours(x), theirs(x))
    close(
        ours.forward_head(ours.forward_features(x), pre_logits=True),
        theirs.forward_head(theirs.forward_features(x), True),
    )
    maps = ours.features(x).maps
    others = theirs.forward_intermediates(x, intermediates_only=True)
    assert len(maps) == len(others) == len(ours.config.depths)
    for mine, other in zip(maps, others, strict=True):
        close(mine, other)
    mine, other = block_outputs(ours, x), block_outputs(theirs, x)
    assert len(mine) == sum(ours.config.depths)
    for a, b in zip(mine, other, strict=True):
        close(a, b)


@pytest.mark.parametrize("linear", [False, True])
def test_every_norm_has_the_epsilon_that_it_has_in_timm(linear: bool) -> None:
    """Too small a thing for logits of random weights to tell."""
    mine, other = (
        {name: part.eps for name, part in model.named_modules() if isinstance(part, nn.LayerNorm)}
        for model in twins(linear=linear)
    )
    assert mine == other and set(mine.values()) == {1e-5, 1e-6}


@pytest.mark.parametrize("linear", [False, True])
def test_gradients_equal_timm(linear: bool) -> None:
    ours, theirs = twins(linear=linear)
    x = torch.randn(2, 3, 64, 64)
    ours(x).square().sum().backward()
    theirs(x).square().sum().backward()
    mine = dict(ours.named_parameters())
    for name, parameter in theirs.named_parameters():
        scale = parameter.grad.abs().max().item()
        assert (mine[name].grad - parameter.grad).abs().max() <= 1e-4 * max(1.0, scale), name


def test_the_authors_names_become_ours_as_timm_reads_them() -> None:
    """timm's own filter is the judge of a file that has the authors' names."""
    ours, theirs = twins()
    file = AUTHORS.to_theirs(ours.state_dict())
    assert {"patch_embed1.proj.weight", "block2.1.mlp.dwconv.dwconv.bias", "norm4.weight", "head.bias"} <= file.keys()
    assert layout_of(file) is AUTHORS
    read, judged = AUTHORS.to_ours(file), pvt_v2.checkpoint_filter_fn(dict(file), theirs)
    assert read.keys() == judged.keys() == ours.state_dict().keys()
    assert all(torch.equal(read[name], judged[name]) for name in read)
