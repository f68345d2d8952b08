"""Swin's own mathematics: its counts, its stages, what is padded and what is masked, and the errors of its config."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from vitrail.explain.maps import attention_map
from vitrail.explain.record import record_attention
from vitrail.layers.blocks import DropPath
from vitrail.layers.embed import pair
from vitrail.models.swin import VARIANTS, PatchMerging, SwinConfig, SwinTransformer, stage_grids

# fmt: off
PUBLISHED = {
    #                                 parameters   million MACs
    "swin_debug":                     (    144_264,      5.489),
    "swin_tiny_patch4_window7_224":   ( 28_288_354,   4_490.6),
    "swin_small_patch4_window7_224":  ( 49_606_258,   8_740.9),
    "swin_base_patch4_window7_224":   ( 87_768_224,  15_430.9),
    "swin_base_patch4_window12_384":  ( 87_903_584,  47_083.1),
    "swin_large_patch4_window7_224":  (196_532_476,  34_475.8),
    "swin_large_patch4_window12_384": (196_735_516, 103_919.1),
    "swin_tiny_patch2_window4_32":    (  7_048_612,     240.947),
}
# fmt: on
"""timm 1.0.31's `SwinTransformer` of these sizes; half of torch's FlopCounter for one image, attention unfused"""
TINY: dict[str, Any] = dict(
    img_size=32, patch_size=2, embed_dim=8, depths=(2, 2), num_heads=(1, 2), window_size=4, num_classes=5
)


def formula(c: SwinConfig) -> int:
    """Parameters, term by term (Liu et al. 2021, section 3)."""
    (p, q), (h, w), total = pair(c.patch_size), pair(c.window_size), 0
    total += (c.in_chans * p * q + 1) * c.embed_dim + 2 * c.embed_dim  # patches and their norm
    for i, (depth, heads) in enumerate(zip(c.depths, c.num_heads, strict=True)):
        width = c.embed_dim * 2**i
        hidden = int(width * c.mlp_ratio)
        attention = (width + 1) * 3 * width + (width + 1) * width + (2 * h - 1) * (2 * w - 1) * heads
        total += depth * (attention + (width + 1) * hidden + (hidden + 1) * width + 4 * width)
        total += 0 if i == 0 else 2 * width * width + 4 * width  # merging: its matrix, and a norm of 4C / 2 = 2C
    return total + 2 * width + (width + 1) * c.num_classes


def test_every_row_has_its_count() -> None:
    assert list(PUBLISHED) == list(VARIANTS)


@pytest.mark.parametrize("row", PUBLISHED)
def test_a_row_has_the_published_parameters_and_macs(row: str) -> None:
    parameters, macs = PUBLISHED[row]
    config = replace(VARIANTS[row], attn="eager")
    with torch.device("meta"):
        model, images = SwinTransformer(config), torch.zeros(1, 3, *pair(config.img_size))
    assert sum(p.numel() for p in model.parameters()) == parameters == formula(config)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(images)
    assert counter.get_total_flops() / 2e6 == pytest.approx(macs, rel=1e-4)


# ---- config


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (dict(depths=(2, 2)), r"num_heads must name a number for each of the 2 stages of depths \(2, 2\); got \(3, 6"),
        (dict(depths=2), r"depths must be a tuple of whole numbers, one for each of 1 to 8 stages.*got 2"),
        (dict(depths=()), r"depths must be a tuple of whole numbers, one for each of 1 to 8 stages.*got \(\)"),
        (dict(num_heads=(3, 6, 12.0, 24)), "num_heads must be a tuple of whole numbers"),
        (dict(depths=(2, 0, 6, 2)), r"depths must be at least 1; got \(2, 0, 6, 2\)"),
        (dict(window_size=0), r"window_size must be at least 1; got \(0, 0\)"),
        (dict(window_size=(7, 7, 7)), "a size is one whole number"),
        (dict(mlp_ratio=0.001), "mlp_ratio must leave a hidden width"),
        (dict(drop_path_rate=1.0), r"drop_path_rate must lie in \[0, 1\)"),
        (dict(norm_eps=-1e-5), r"norm_eps must lie in \(0, 1\); got -1e-05"),
        (dict(embed_dim=95), "embed_dim 95 is not divisible by num_heads 3"),
    ],
)
def test_a_wrong_config_names_the_rule(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message), torch.device("meta"):
        SwinTransformer(**fields)


def test_a_config_of_lists_is_one_of_tuples() -> None:
    assert SwinConfig(depths=[2, 2], num_heads=[3, 6], window_size=[7, 7]) == SwinConfig(
        depths=(2, 2), num_heads=(3, 6)
    )


def test_stochastic_depth_grows_over_all_stages() -> None:
    model = SwinTransformer(**TINY, drop_path_rate=0.3)
    rates = [part.drop_prob for part in model.modules() if isinstance(part, DropPath)]
    assert rates == pytest.approx([0.1, 0.1, 0.2, 0.2, 0.3, 0.3])  # the first block's 0 leaves none


# ---- sizes


@pytest.mark.parametrize("size", [(32, 32), (96, 96), (40, 56), (30, 38), (6, 10), (2, 2)], ids=str)
@torch.no_grad()
def test_any_size_of_whole_patches_is_taken(size: tuple[int, int]) -> None:
    model = SwinTransformer(**TINY).eval()
    x = torch.randn(1, 3, *size)
    maps = model.features(x).maps
    h, w = size[0] // 2, size[1] // 2
    assert [tuple(found.shape[2:]) for found in maps] == [(h, w), (-(-h // 2), -(-w // 2))]
    assert model(x).isfinite().all()


@torch.no_grad()
def test_what_does_not_divide_into_patches_is_an_error_or_padded() -> None:
    with pytest.raises(ValueError, match="img_size 33 is not divisible by patch_size 2: use 32 or 34, or dynamic_pad"):
        SwinTransformer(**TINY)(torch.zeros(1, 3, 33, 32))
    padding = SwinTransformer(**TINY, dynamic_pad=True).eval()
    x = torch.randn(1, 3, 33, 31)
    assert torch.equal(padding(x), padding(torch.nn.functional.pad(x, (0, 1, 0, 1))))


@torch.no_grad()
def test_one_set_of_weights_serves_networks_of_every_size() -> None:
    """Windows keep their size, so that a network made for another size is the same function."""
    torch.manual_seed(0)
    one, other = SwinTransformer(**TINY).eval(), SwinTransformer(**{**TINY, "img_size": (44, 20)}).eval()
    other.load_state_dict(one.state_dict())
    for size in ((32, 32), (44, 20)):
        x = torch.randn(1, 3, *size)
        assert torch.equal(one(x), other(x))


@torch.no_grad()
def test_shifted_windows_let_neighbours_across_a_border_see_each_other() -> None:
    """With regular windows alone, what changes in a window of the first stage stays in it."""
    x = torch.randn(1, 3, 32, 32)
    changed = x.clone()
    changed[..., 6:8, 6:8] += 3  # the last cell of the first window
    for depth, beyond in ((1, False), (2, True)):
        model = SwinTransformer(**{**TINY, "depths": (depth, 2)}).eval()
        moved = (model.features(changed, [0]).maps[0] - model.features(x, [0]).maps[0]).abs().amax(1)[0]
        assert moved[:4, :4].all()
        assert bool(moved[4, 4] > 0) == bool(moved[4:].any()) == beyond


@torch.no_grad()
def test_merging_puts_four_cells_beside_each_other_down_and_then_right() -> None:
    merging = PatchMerging(3, 1e-5)
    merging.norm, merging.reduction = torch.nn.Identity(), torch.nn.Identity()
    x = torch.arange(6.0)[:, None].expand(-1, 3)[None]  # (1, 2·3, 3): cells 0 1 2 / 3 4 5
    made = merging(x, (2, 3))
    assert made.shape == (1, 2, 12)
    assert made[0, :, ::3].tolist() == [[0, 3, 1, 4], [2, 5, 0, 0]]  # zeros for the column that is missing


# ---- padded pixels


def padded_right(x: Tensor, width: int, value: float) -> tuple[Tensor, Tensor]:
    """Images with `width` more columns that hold `value`, and the mask (B, H, W) of these."""
    wide = torch.nn.functional.pad(x, (0, width), value=value)
    mask = torch.zeros(len(x), *wide.shape[2:], dtype=torch.bool)
    mask[..., x.shape[3] :] = True
    return wide, mask


@pytest.mark.parametrize("width", [6, 16])
@torch.no_grad()
def test_a_masked_image_is_the_image_alone(width: int) -> None:
    """Where none of its windows needs padding to be whole: such cells are seen, masked or not, as in torchvision."""
    torch.manual_seed(0)
    model = SwinTransformer(**TINY).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    x = torch.randn(2, 3, 32, 32)
    wide, mask = padded_right(x, width, 5.0)
    torch.testing.assert_close(model(wide, mask), model(x), atol=1e-4, rtol=1e-5)
    maps = zip(model.features(wide, mask=mask).maps, model.features(x).maps, strict=True)
    for masked, alone in maps:
        torch.testing.assert_close(masked[..., : alone.shape[3]], alone, atol=1e-4, rtol=1e-5)


@torch.no_grad()
def test_padded_pixels_of_a_patch_and_padded_cells_of_a_merger_are_zero() -> None:
    """Where padding begins amid a patch, or amid four cells that are merged, what it holds is not seen."""
    model = SwinTransformer(**TINY).eval()
    one, other = (torch.randn(1, 3, 32, 32) for _ in range(2))
    mask = torch.zeros(1, 32, 32, dtype=torch.bool)
    mask[..., 15:] = True
    other = torch.where(mask[:, None], other, one)
    assert torch.equal(model(one, mask), model(other, mask))
    tokens = model.embed(one, mask)  # 16 x 16 cells, whose columns from 8 on are padding
    odd = torch.zeros(16, 16, dtype=torch.bool)
    odd[:, 7:] = True
    tokens = tokens._replace(padding=odd.view(1, -1))
    changed = tokens._replace(x=tokens.x + 5 * odd.view(1, -1, 1))
    first, second = (model.layers[1](given).x.unflatten(1, (8, 8))[:, :, :4] for given in (tokens, changed))
    assert torch.equal(first, second)


def test_windows_of_padding_alone_have_gradients_and_no_weight_on_the_image() -> None:
    model = SwinTransformer(**TINY)
    wide, mask = padded_right(torch.randn(2, 3, 32, 32), 32, 1.0)
    model(wide, mask).square().sum().backward()
    assert all(parameter.grad is not None and parameter.grad.isfinite().all() for parameter in model.parameters())
    with record_attention() as record, torch.no_grad():
        model.eval()(wide, mask)
    for seen in record.maps:
        heat = attention_map(seen)
        assert not heat[..., heat.shape[2] // 2 :].any()
        assert torch.allclose(heat.sum((1, 2)), torch.ones(2), atol=1e-5)


def test_a_mask_of_another_shape_is_an_error() -> None:
    with pytest.raises(ValueError, match=r"mask must be \(B, H, W\) like the images, \(1, 32, 32\); got \(32, 32\)"):
        SwinTransformer(**TINY)(torch.zeros(1, 3, 32, 32), torch.zeros(32, 32, dtype=torch.bool))


# ---- care


def test_merging_belongs_to_the_first_block_of_its_stage() -> None:
    groups = SwinTransformer(**TINY).layer_groups()
    assert len(groups) == 6
    assert all(name.startswith("patch_embed.") for name in groups[0])
    assert {name.split(".")[2] for name in groups[3]} == {"downsample", "blocks"}
    assert {name[:18] for name in groups[4]} == {"layers.1.blocks.1."}
    assert {name.split(".")[0] for name in groups[5]} == {"norm", "head"}


def test_every_table_of_offsets_is_named_and_left_alone_by_weight_decay() -> None:
    model = SwinTransformer(**{**TINY, "window_size": (2, 4)})
    tables = model.position_tables()
    assert len(tables) == 4 and tables.keys() == model.no_weight_decay()
    assert all(table.relative and table.grid == (2, 4) for table in tables.values())


def test_a_headless_network_gives_its_mean() -> None:
    model = SwinTransformer(**{**TINY, "num_classes": 0}).eval()
    x = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        assert torch.allclose(model(x), model.features(x).maps[-1].mean((2, 3)), atol=1e-6)


def test_grids_of_stages_are_those_of_their_maps() -> None:
    model = SwinTransformer(img_size=(40, 72), patch_size=(2, 4), window_size=4, embed_dim=8, depths=(1, 1, 1),
                            num_heads=(1, 1, 1))  # fmt: skip
    maps = model.features(torch.randn(1, 3, 40, 72)).maps
    assert stage_grids(model.config) == [tuple(found.shape[2:]) for found in maps] == [(20, 18), (10, 9), (5, 5)]
