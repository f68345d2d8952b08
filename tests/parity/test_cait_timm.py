"""Our CaiT against timm's: every tensor randomised, copied key by key, logits, states and attention compared."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from vitrail.explain.maps import rollout_map
from vitrail.explain.record import record_attention
from vitrail.models.cait import VARIANTS, CaiT
from vitrail.weights.load import load_weights
from vitrail.weights.sources import find_source

timm = pytest.importorskip("timm")

SMALL: dict[str, Any] = dict(
    img_size=32, patch_size=8, embed_dim=48, depth=3, num_heads=4, num_classes=7, depth_token_only=2
)
CASES: dict[str, dict[str, Any]] = {
    "plain": {},
    "mean pooling": dict(global_pool="avg"),
    "five channels": dict(in_chans=5),
    "no qkv bias": dict(qkv_bias=False),
    "rectangle": dict(img_size=(32, 48), patch_size=(8, 4)),
    "other hidden widths": dict(mlp_ratio=1.0, mlp_ratio_token_only=2.0),
    "three class blocks": dict(depth_token_only=3),
    "no head": dict(num_classes=0),
}


def randomise(model: nn.Module) -> None:
    """Default inits hide mistakes behind zeros and ones, and LayerScale hides the whole network; this leaves none."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for tensor in model.state_dict().values():
            tensor.copy_(torch.randn(tensor.shape, generator=generator) * 0.3)


def twins(**options: Any) -> tuple[CaiT, nn.Module]:
    options = {**SMALL, **options}
    theirs = timm.models.cait.Cait(**options).eval()
    randomise(theirs)
    ours = CaiT(**options).eval()
    ours.load_state_dict(theirs.state_dict(), strict=True)
    return ours, theirs


def at_another_size(theirs: nn.Module, options: dict[str, Any], size: tuple[int, int]) -> nn.Module:
    """timm's takes one size: one built for `size`, with positions that timm resized."""
    other = timm.models.cait.Cait(**{**SMALL, **options, "img_size": size}).eval()
    pos = timm.layers.resample_abs_pos_embed(
        theirs.pos_embed, other.patch_embed.grid_size, theirs.patch_embed.grid_size, num_prefix_tokens=0
    )
    other.load_state_dict({**theirs.state_dict(), "pos_embed": pos})
    return other


def close(ours: Tensor, theirs: Tensor) -> None:
    """1e-5 of the largest value, in fp32."""
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5 * max(1.0, theirs.abs().max().item()))


def class_tokens(model: nn.Module, images: Tensor) -> list[Tensor]:
    """What each class block gives."""
    seen: list[Tensor] = []
    hooks = [b.register_forward_hook(lambda *args: seen.append(args[-1])) for b in model.blocks_token_only]
    model(images)
    for hook in hooks:
        hook.remove()
    return seen


@pytest.mark.parametrize("size", [None, (40, 56)], ids=["native size", "another size"])
@pytest.mark.parametrize("case", CASES)
@torch.no_grad()
def test_logits_and_every_intermediate_equal_timm(case: str, size: tuple[int, int] | None) -> None:
    ours, theirs = twins(**CASES[case])
    theirs = theirs if size is None else at_another_size(theirs, CASES[case], size)
    x = torch.randn(2, ours.config.in_chans, *(size or ours.preprocess.img_size))
    close(ours(x), theirs(x))
    close(ours.forward_features(x).x, theirs.forward_features(x))
    close(*(model.forward_head(model.forward_features(x), pre_logits=True) for model in (ours, theirs)))
    for mine, other in zip(class_tokens(ours, x), class_tokens(theirs, x), strict=True):
        close(mine, other)
    for norm in (False, True):
        maps = theirs.forward_intermediates(x, norm=norm, intermediates_only=True)
        for mine, other in zip(ours.features(x, norm=norm).maps, maps, strict=True):
            close(mine, other)


def test_gradients_equal_timm() -> None:
    """In float64, where what rounding leaves of a gradient that is zero (before a softmax) is not taken for one."""
    ours, theirs = (model.double().train() for model in twins())
    x = torch.randn(2, 3, 32, 32).double()
    for model in (ours, theirs):
        model(x).square().sum().backward()
    mine = dict(ours.named_parameters())
    largest = max(parameter.grad.abs().max().item() for parameter in theirs.parameters())
    for name, parameter in theirs.named_parameters():
        scale = parameter.grad.abs().max().item()
        assert (mine[name].grad - parameter.grad).abs().max() <= 1e-10 * scale + 1e-14 * largest, name


@torch.no_grad()
def test_recorded_maps_and_rollout_equal_those_of_timm() -> None:
    ours, theirs = (model.double() for model in twins())
    x = torch.randn(2, 3, 32, 32).double()
    with record_attention() as mine:
        ours(x)
    with record_attention() as others:
        theirs(x)
    assert len(mine.maps) == len(others.maps) == 5
    for seen, other in zip(mine.maps, others.maps, strict=True):
        torch.testing.assert_close(seen.weights, other.weights, atol=1e-12, rtol=0)
        torch.testing.assert_close(seen.acting, other.acting, atol=1e-12, rtol=0)
        assert (seen.layout.grid, seen.layout.prefix) == (other.layout.grid, other.layout.prefix)
    heat = rollout_map(mine.maps)
    assert heat.std() > 2e-3
    torch.testing.assert_close(heat, rollout_map(others.maps), atol=1e-12, rtol=0)


PUBLISHED = timm.list_models("cait*")


@pytest.mark.parametrize("row", PUBLISHED)
def test_a_row_is_timms_row(row: str) -> None:
    """Every key and shape, heads, the first γ, and how images are prepared."""
    with torch.device("meta"):
        ours, theirs = CaiT(VARIANTS[row]), timm.create_model(row)
    mine, others = ({name: value.shape for name, value in m.state_dict().items()} for m in (ours, theirs))
    assert mine == others
    assert ours.blocks[0].attn.num_heads == theirs.blocks[0].attn.num_heads
    told = theirs.pretrained_cfg
    assert ours.preprocess.img_size == told["input_size"][1:]
    assert (ours.preprocess.mean, ours.preprocess.std) == (told["mean"], told["std"])
    assert (ours.preprocess.crop_pct, ours.preprocess.interpolation) == (told["crop_pct"], told["interpolation"])
    small = timm.create_model(row, depth=1, embed_dim=16, num_heads=1, num_classes=1)
    assert small.blocks[0].gamma_1[0].item() == pytest.approx(VARIANTS[row].init_values)
    assert small.norm.eps == ours.norm.eps


def test_every_published_row_is_there() -> None:
    assert len(PUBLISHED) == 10 and set(PUBLISHED) <= set(VARIANTS)


@pytest.mark.parametrize("row", PUBLISHED)
def test_the_published_sources_are_those_that_timm_names(row: str) -> None:
    told = timm.models.get_pretrained_cfg(f"{row}.fb_dist_in1k")
    for name, place in (
        (f"{row}.fb_dist_in1k", f"hub:timm/{row}.fb_dist_in1k"),
        (f"{row}.authors_dist_in1k", told.url),
    ):
        source = find_source(name)
        assert (source.place, source.licence, source.classes) == (place, told.license, told.num_classes)
        assert source.preprocess == CaiT(VARIANTS["cait_debug"]).preprocess.replace(img_size=told.input_size[1:])
    assert find_source(row).name == f"{row}.fb_dist_in1k"


@torch.no_grad()
def test_a_file_of_the_authors_is_read(tmp_path: Path) -> None:
    """Their weights stand under "model", each behind `module.`; the names behind that are timm's."""
    _, theirs = twins()
    held = {f"module.{name}": value for name, value in theirs.state_dict().items()}
    torch.save({"model": held}, file := tmp_path / "XXS24_224.pth")
    ours = CaiT(**SMALL).eval()
    load_weights(ours, file)
    close(ours(x := torch.randn(2, 3, 32, 32)), theirs(x))


@torch.no_grad()
def test_weights_of_one_size_are_put_into_a_network_of_another(tmp_path: Path) -> None:
    ours, theirs = twins()
    torch.save(theirs.state_dict(), file := tmp_path / "cait.pth")
    larger = CaiT(**{**SMALL, "img_size": (40, 56)}).eval()
    load_weights(larger, file)
    x = torch.randn(2, 3, 40, 56)
    close(larger(x), ours(x))
    close(larger(x), at_another_size(theirs, {}, (40, 56))(x))
