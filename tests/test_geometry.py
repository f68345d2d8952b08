"""Properties of geometry for any size: patches, grids, positions, kept tokens, padding."""

from __future__ import annotations

import re

import pytest
import torch
from hypothesis import given, settings, strategies as st

from vitrail.layers.embed import PatchEmbed, resize_positions, sincos_2d
from vitrail.layers.tokens import keep_tokens, mean_tokens
from vitrail.models.config import spelled
from vitrail.models.registry import list_models, resolve_name
from vitrail.models.vit import VisionTransformer
from vitrail.models.vit_config import ViTConfig
from vitrail.records import Explanation, Preprocess

quick = settings(max_examples=40, deadline=None, derandomize=True, database=None)
sides = st.integers(1, 40)
patches = st.integers(1, 9)
grids = st.tuples(st.integers(1, 7), st.integers(1, 7))


def embed(patch: tuple[int, int], **options: bool) -> PatchEmbed:
    return PatchEmbed(patch, patch, 1, 4, **options)


@quick
@given(sides, sides, patches, patches)
def test_a_size_either_divides_or_its_error_names_sizes_that_do(height: int, width: int, p: int, q: int) -> None:
    made = embed((p, q))
    if height % p == width % q == 0:
        assert made.grid(height, width) == (height // p, width // q)
        return
    with pytest.raises(ValueError, match="is not divisible by patch_size") as error:
        made.grid(height, width)
    size, patch, *others = map(int, re.findall(r"\d+", str(error.value)))
    assert (size, patch) == ((height, p) if height % p else (width, q))
    assert 1 <= len(others) <= 2
    for other in others:
        assert other > 0
        assert other % patch == 0
        assert abs(other - size) < patch


@quick
@given(sides, sides, patches, patches)
def test_dynamic_pad_takes_any_size_and_adds_less_than_a_patch(height: int, width: int, p: int, q: int) -> None:
    made = embed((p, q), dynamic_pad=True)
    rows, columns = made.grid(height, width)
    assert 0 <= rows * p - height < p
    assert 0 <= columns * q - width < q
    assert made(torch.zeros(1, 1, height, width)).shape == (1, rows * columns, 4)


@quick
@given(grids, patches, patches, st.data())
def test_a_patch_is_padding_if_and_only_if_none_of_its_pixels_is_seen(
    grid: tuple[int, int], p: int, q: int, data: st.DataObject
) -> None:
    height, width = grid[0] * p, grid[1] * q
    seen = data.draw(st.lists(st.tuples(st.integers(0, height - 1), st.integers(0, width - 1)), max_size=6))
    mask = torch.ones(1, height, width, dtype=torch.bool)
    for row, column in seen:
        mask[0, row, column] = False
    found = embed((p, q)).padding(mask)[0]
    cells = {row // p * grid[1] + column // q for row, column in seen}
    assert found.logical_not().nonzero().flatten().tolist() == sorted(cells)


@quick
@given(grids, grids, st.integers(0, 3))
def test_positions_fit_any_grid_and_their_prefix_stays(old: tuple[int, int], new: tuple[int, int], prefix: int) -> None:
    pos = torch.randn(1, prefix + old[0] * old[1], 4)
    found = resize_positions(pos, old, new, prefix)
    assert found.shape == (1, prefix + new[0] * new[1], 4)
    assert torch.equal(found[:, :prefix], pos[:, :prefix])
    assert (found is pos) == (old == new)
    flipped = pos.clone()
    flipped[:, prefix:] = pos[:, prefix:].unflatten(1, old).flip(2).flatten(1, 2)
    mirrored = resize_positions(flipped, old, new, prefix)[:, prefix:].unflatten(1, new).flip(2).flatten(1, 2)
    assert torch.allclose(mirrored, found[:, prefix:], atol=1e-5)  # no half-pixel shift


@quick
@given(grids, st.integers(1, 5))
def test_sincos_positions_are_unit_waves_that_tell_cells_apart(grid: tuple[int, int], quarters: int) -> None:
    found = sincos_2d(grid, 4 * quarters)[0]
    assert torch.allclose(found.square().sum(1), torch.full((len(found),), 2.0 * quarters), atol=1e-4)
    distance = torch.cdist(found, found) + 10 * torch.eye(len(found))
    assert distance.min() > 0.05
    larger = sincos_2d((grid[0] + 1, grid[1] + 2), 4 * quarters)[0].unflatten(0, (grid[0] + 1, grid[1] + 2))
    assert torch.equal(larger[: grid[0], : grid[1]].flatten(0, 1), found)  # a cell's position is its own


@quick
@given(st.integers(1, 12), st.integers(0, 3), st.data())
def test_kept_tokens_are_the_named_ones(tokens: int, prefix: int, data: st.DataObject) -> None:
    keep = torch.tensor([data.draw(st.permutations(range(tokens)))])[:, : data.draw(st.integers(1, tokens))]
    x = torch.arange(prefix + tokens)[None, :, None]
    found = keep_tokens(x, keep, prefix)[0, :, 0]
    assert found[:prefix].tolist() == list(range(prefix))
    assert torch.equal(found[prefix:] - prefix, keep[0])


@quick
@given(st.lists(st.booleans(), min_size=1, max_size=9))
def test_a_mean_over_seen_tokens_is_between_them(padding: list[bool]) -> None:
    x = torch.randn(1, len(padding), 3)
    found = mean_tokens(x, torch.tensor([padding]))[0]
    seen = x[0, [not hidden for hidden in padding]]
    assert torch.allclose(found, seen.mean(0) if len(seen) else torch.zeros(3), atol=1e-6)


MODEL = VisionTransformer(img_size=(12, 20), patch_size=(3, 5), embed_dim=8, depth=1, num_heads=2, num_classes=3).eval()


@torch.no_grad()
@quick
@given(grids, st.integers(1, 3))
def test_a_model_takes_any_grid_at_run_time(grid: tuple[int, int], batch: int) -> None:
    x = torch.randn(batch, 3, grid[0] * 3, grid[1] * 5)
    tokens = MODEL.embed(x)
    assert tokens.grid == grid
    assert tokens.x.shape == (batch, 1 + grid[0] * grid[1], 8)
    assert tokens.pos.shape == (1, 1 + grid[0] * grid[1], 8)
    assert MODEL(x).shape == (batch, 3)
    assert MODEL.features(x).maps[0].shape == (batch, 8, *grid)


@quick
@given(st.integers(1, 2048), st.integers(1, 8192))
def test_a_hidden_width_survives_its_way_through_mlp_ratio(width: int, hidden: int) -> None:
    ratio = spelled(ViTConfig, dict(dim=width, mlp_dim=hidden))["mlp_ratio"]
    assert int(width * ratio) == hidden


@quick
@given(st.integers(1, 4000))
def test_a_short_name_is_completed_with_the_nearest_size_by_ratio(size: int) -> None:
    for short in ("vit_tiny", "vit_base", "vit_large"):
        row = resolve_name(short, size)
        native = {int(r.rpartition("_")[2]) for r in list_models() if re.fullmatch(rf"{short}_patch\d+_\d+", r)}
        got = int(row.rpartition("_")[2])
        assert max(got, size) / min(got, size) == min(max(n, size) / min(n, size) for n in native)


@quick
@given(st.integers(1, 5), st.integers(1, 6), st.integers(1, 20), st.integers(1, 20))
def test_an_explanation_fits_any_picture(h: int, w: int, height: int, width: int) -> None:
    big = Explanation(method="m", heat=torch.randn(h, w)).resized((height, width))
    assert big.shape == (height, width)
    assert big.min() == 0
    assert big.max() in (0, 1)


@quick
@given(st.lists(st.floats(0.01, 1), min_size=1, max_size=5), st.integers(1, 4))
def test_normalising_has_an_inverse_for_any_statistics(std: list[float], side: int) -> None:
    preprocess = Preprocess(mean=tuple(reversed(std)), std=tuple(std))
    images = torch.rand(2, len(std), side, side)
    assert torch.allclose(preprocess.denormalise(preprocess.normalise(images)), images, atol=1e-5)
