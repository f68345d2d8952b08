"""Patches and positions: two ways to cut that are one function, and grids that stretch."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from vitrail.layers.embed import OverlapPatchEmbed, PatchEmbed, PatchLinear, pair, resize_positions, sincos_2d


def test_pair() -> None:
    assert pair(7) == (7, 7)
    assert pair((3, 5)) == (3, 5)
    assert pair([3, 5]) == (3, 5)  # as YAML and JSON give it


def embed(height: int = 12, width: int = 20, **options: Any) -> PatchEmbed:
    return PatchEmbed((height, width), (4, 5), options.pop("in_chans", 3), embed_dim=8, **options)


@torch.no_grad()
def test_linear_patches_are_the_convolution() -> None:
    conv, linear = embed(), embed(kind="linear")
    linear.proj.weight.copy_(conv.proj.weight.flatten(1))
    linear.proj.bias.copy_(conv.proj.bias)
    assert isinstance(linear.proj, PatchLinear)
    assert sum(p.numel() for p in conv.parameters()) == sum(p.numel() for p in linear.parameters())
    x = torch.randn(2, 3, 12, 20)
    assert torch.allclose(conv(x), linear(x), atol=1e-5)
    assert conv(x).shape == (2, 12, 8)


@torch.no_grad()
@pytest.mark.parametrize("kind", ["conv", "linear"])
def test_each_token_is_its_own_patch_in_raster_order(kind: str) -> None:
    made = embed(kind=kind)
    x = torch.randn(1, 3, 12, 20)
    tokens = made(x)
    for row in range(3):
        for column in range(4):
            patch = x[0, :, row * 4 : row * 4 + 4, column * 5 : column * 5 + 5].flatten()
            truth = made.proj.weight.flatten(1) @ patch + made.proj.bias
            assert torch.allclose(tokens[0, row * 4 + column], truth, atol=1e-5)


@pytest.mark.parametrize(
    ("height", "width", "message"),
    [
        (225, 20, "img_size 225 is not divisible by patch_size 4: use 224 or 228, or dynamic_pad=True"),
        (12, 21, "img_size 21 is not divisible by patch_size 5: use 20 or 25, or dynamic_pad=True"),
        (12, 3, "img_size 3 is not divisible by patch_size 5: use 5, or dynamic_pad=True"),
    ],
)
def test_a_size_that_does_not_divide_names_the_next_ones(height: int, width: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        embed(height, width)
    with pytest.raises(ValueError, match=message):
        embed()(torch.zeros(1, 3, height, width))


@pytest.mark.parametrize("shape", [(1, 4, 12, 20), (3, 12, 20), (1, 1, 3, 12, 20)])
def test_images_of_another_shape_are_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"images must be \(B, 3, H, W\); got shape") as error:
        embed()(torch.zeros(shape))
    assert str(shape) in str(error.value)


def test_an_unknown_kind_names_the_nearest() -> None:
    with pytest.raises(ValueError, match="must be one of conv, linear, overlap, stem; got 'lin': did you mean linear"):
        embed(kind="lin")


@torch.no_grad()
def test_dynamic_pad_is_zeros_below_and_right() -> None:
    made = embed(dynamic_pad=True)
    x = torch.randn(2, 3, 10, 17)
    padded = torch.zeros(2, 3, 12, 20)
    padded[:, :, :10, :17] = x
    assert made.grid(10, 17) == (3, 4)
    assert torch.equal(made(x), made(padded))


def test_num_patches_is_the_grid_of_the_configured_size() -> None:
    made = embed()
    assert made.grid_size == (3, 4)
    assert made.num_patches == 12


def test_padding_marks_patches_that_hold_nothing_else() -> None:
    mask = torch.ones(2, 12, 20, dtype=torch.bool)
    mask[0, :4, :11] = False  # two columns of patches, and one pixel column of the third
    mask[1, 11, 19] = False
    found = embed().padding(mask).view(2, 3, 4)
    assert found[0].tolist() == [[False, False, False, True], [True] * 4, [True] * 4]
    assert found[1].sum() == 11
    assert not found[1, 2, 3]


def test_padding_counts_what_dynamic_pad_adds() -> None:
    mask = torch.zeros(1, 10, 17, dtype=torch.bool)
    made = embed(dynamic_pad=True)
    assert not made.padding(mask).any()
    mask[:, :, 15:] = True
    assert made.padding(mask).view(3, 4).tolist() == [[False, False, False, True]] * 3


# ---- positions


def mae_axis(positions: list[int], dim: int) -> list[list[float]]:
    """One axis of He et al. 2022: sin then cos of position / 10000^(2i/dim)."""
    rates = [1 / 10000 ** (2 * i / dim) for i in range(dim // 2)]
    return [[math.sin(p * r) for r in rates] + [math.cos(p * r) for r in rates] for p in positions]


@pytest.mark.parametrize(("grid", "dim"), [((3, 5), 16), ((4, 4), 12), ((1, 7), 4)])
def test_sincos_is_columns_then_rows_as_in_mae(grid: tuple[int, int], dim: int) -> None:
    cells = [(row, column) for row in range(grid[0]) for column in range(grid[1])]
    columns = torch.tensor(mae_axis([c for _, c in cells], dim // 2))
    rows = torch.tensor(mae_axis([r for r, _ in cells], dim // 2))
    found = sincos_2d(grid, dim)
    assert found.shape == (1, grid[0] * grid[1], dim)
    assert found.dtype == torch.float32
    assert torch.allclose(found[0, :, : dim // 2], columns, atol=1e-6)
    assert torch.allclose(found[0, :, dim // 2 :], rows, atol=1e-6)


def test_sincos_rows_differ_only_in_the_row_half() -> None:
    first, second = sincos_2d((2, 3), 16).view(2, 3, 16)
    assert torch.equal(first[:, :8], second[:, :8])
    assert not torch.allclose(first[:, 8:], second[:, 8:])


@pytest.mark.parametrize(("dim", "use"), [(6, 8), (47, 48), (1, 4)])
def test_sincos_needs_four_channels_a_rate(dim: int, use: int) -> None:
    with pytest.raises(ValueError, match=f"need embed_dim divisible by 4; got {dim}: use {use}"):
        sincos_2d((2, 2), dim)


def test_the_same_grid_returns_the_very_tensor() -> None:
    pos = torch.randn(1, 13, 8)
    assert resize_positions(pos, (3, 4), (3, 4), prefix=1) is pos


@pytest.mark.parametrize("new", [(6, 8), (2, 3), (3, 5), (1, 1)])
def test_a_constant_field_stays_constant_and_the_prefix_unchanged(new: tuple[int, int]) -> None:
    field = torch.randn(1, 1, 8)
    pos = torch.cat([torch.randn(1, 2, 8), field.expand(1, 12, 8)], dim=1)
    found = resize_positions(pos, (3, 4), new, prefix=2)
    assert found.shape == (1, 2 + new[0] * new[1], 8)
    assert torch.equal(found[:, :2], pos[:, :2])
    assert torch.allclose(found[:, 2:], field.expand(1, new[0] * new[1], 8), atol=1e-5)


@pytest.mark.fault(11)
def test_rows_and_columns_keep_their_places() -> None:
    """A field that grows along the columns only still does, at a grid of another shape."""
    pos = torch.arange(5.0).expand(3, 5).reshape(1, 15, 1)
    found = resize_positions(pos, (3, 5), (6, 10)).view(6, 10)
    assert torch.allclose(found, found[:1].expand(6, 10), atol=1e-5)
    assert (found.diff(dim=1) > 0).all()


def test_resizing_keeps_the_dtype_and_passes_gradients() -> None:
    pos = torch.randn(1, 13, 8, dtype=torch.bfloat16, requires_grad=True)
    found = resize_positions(pos, (3, 4), (5, 6), prefix=1)
    assert found.dtype == torch.bfloat16
    found.sum().backward()
    assert pos.grad.norm() > 0


# ---- patches that overlap


@pytest.mark.parametrize("size", [(32, 32), (29, 35), (3, 1)])
@torch.no_grad()
def test_overlapping_patches_are_the_normed_convolution_and_round_up(size: tuple[int, int]) -> None:
    embed, x = OverlapPatchEmbed(7, 4, 3, 8), torch.randn(2, 3, *size)
    tokens = embed(x)
    assert tokens.shape == (2, -(-size[0] // 4) * -(-size[1] // 4), 8)
    assert embed.grid(*size) == (-(-size[0] // 4), -(-size[1] // 4))
    middle = embed.norm(embed.proj.weight.flatten(1) @ F.pad(x, (3, 3, 3, 3))[0, :, :7, :7].flatten() + embed.proj.bias)
    torch.testing.assert_close(tokens[0, 0], middle, rtol=0, atol=1e-5)


def test_an_overlapping_patch_is_padded_where_its_own_cell_is() -> None:
    """A cell is the stride's pixels, not the kernel's: the last of 10 columns at stride 4 has two."""
    mask = torch.zeros(3, 10, 10, dtype=torch.bool)
    mask[0, :, 8:] = mask[1, :, 9:] = mask[2, 4:] = True
    found = OverlapPatchEmbed(7, 4, 3, 8).padding(mask).view(3, 3, 3)
    assert found.any(1).tolist() == [[False, False, True], [False] * 3, [True] * 3]
    assert found.all(1).tolist() == [[False, False, True], [False] * 3, [False] * 3]


@pytest.mark.parametrize(("patch", "stride", "least"), [(4, 2, 3), (3, 3, 5), (3, 4, 5)])
def test_overlapping_patches_are_odd_and_wider_than_their_stride(patch: int, stride: int, least: int) -> None:
    message = f"patch_size must be odd and larger than stride {stride}; got {patch}: use {least} or more"
    with pytest.raises(ValueError, match=message):
        OverlapPatchEmbed(patch, stride)


def test_overlapping_patches_refuse_other_channels() -> None:
    with pytest.raises(ValueError, match=r"images must be \(B, 3, H, W\); got shape \(1, 4, 8, 8\)"):
        OverlapPatchEmbed(3, 2)(torch.zeros(1, 4, 8, 8))


@torch.no_grad()
def test_bilinear_positions_are_those_of_interpolate_without_antialiasing() -> None:
    pos = torch.randn(1, 2 + 16, 3)
    image = F.interpolate(pos[:, 2:].transpose(1, 2).unflatten(2, (4, 4)), size=(2, 6), mode="bilinear")
    found = resize_positions(pos, (4, 4), (2, 6), 2, filter="bilinear")
    assert torch.equal(found[:, 2:], image.flatten(2).transpose(1, 2)) and torch.equal(found[:, :2], pos[:, :2])
    assert not torch.allclose(found, resize_positions(pos, (4, 4), (2, 6), 2), atol=1e-2)
