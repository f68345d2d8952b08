"""Windows against the definition: pad, roll, cut, and who may see whom."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from vitrail.layers.embed import resize_relative_bias
from vitrail.layers.windows import GridWindows, WindowAttention, cut_windows, relative_index

CASES = [
    ((8, 8), (4, 4), (0, 0)),
    ((8, 8), (4, 4), (2, 2)),
    ((6, 9), (2, 3), (1, 1)),
    ((7, 10), (4, 4), (2, 2)),  # padded below and to the right
    ((5, 8), (4, 4), (0, 0)),
    ((3, 5), (4, 4), (2, 2)),  # one side smaller than a window: rolled along the other
    ((2, 3), (4, 4), (2, 2)),
    ((14, 7), (7, 7), (3, 3)),
]


def whole(grid: tuple[int, int], window: tuple[int, int]) -> tuple[int, int]:
    return math.ceil(grid[0] / window[0]) * window[0], math.ceil(grid[1] / window[1]) * window[1]


def used(grid: tuple[int, int], window: tuple[int, int], shift: tuple[int, int]) -> tuple[int, int]:
    """The shift, but 0 along a side that one window covers."""
    sides = whole(grid, window)
    return (shift[0] if sides[0] > window[0] else 0), (shift[1] if sides[1] > window[1] else 0)


def partition(x: Tensor, window: tuple[int, int]) -> Tensor:
    """(H, W, …) -> (W, N, …), windows and their places in raster order."""
    rows, columns = (x[i : i + window[0]] for i in range(0, x.shape[0], window[0])), range(0, x.shape[1], window[1])
    return torch.stack([row[:, j : j + window[1]].flatten(0, 1) for row in rows for j in columns])


@pytest.mark.parametrize(("grid", "window", "shift"), CASES)
def test_cells_are_those_of_a_map_that_is_padded_then_rolled_then_cut(grid, window, shift) -> None:
    h, w = whole(grid, window)
    numbers = torch.arange(grid[0] * grid[1]).view(grid)
    padded = F.pad(numbers, (0, w - grid[1], 0, h - grid[0]), value=-1)
    y, x = used(grid, window, shift)
    made = cut_windows(grid, window, shift)
    assert torch.equal(made.cells, partition(padded.roll((-y, -x), (0, 1)), window))
    assert torch.equal(made.cells.flatten()[made.places], numbers.flatten())
    assert (made.empty is None) == ((h, w) == grid)
    if made.empty is not None:
        assert torch.equal(made.empty[:, 0], made.cells.flatten() < 0)


@pytest.mark.parametrize(("grid", "window", "shift"), CASES)
def test_only_what_came_from_another_end_of_the_map_hides(grid, window, shift) -> None:
    """The nine regions of Liu et al. 2021, figure 4, numbered on the rolled map."""
    h, w = whole(grid, window)
    y, x = used(grid, window, shift)
    regions, number = torch.zeros(h, w), 0
    for rows in (slice(0, h - window[0]), slice(h - window[0], h - y), slice(h - y, h)):
        for columns in (slice(0, w - window[1]), slice(w - window[1], w - x), slice(w - x, w)):
            regions[rows, columns] = number
            number += 1
    cut = partition(regions, window)
    made = cut_windows(grid, window, shift)
    apart = cut[:, :, None] != cut[:, None]
    assert torch.equal(torch.zeros_like(apart) if made.hidden is None else made.hidden[0], apart)
    assert (made.hidden is None) == (not y and not x)


@pytest.mark.parametrize(("grid", "window", "shift"), CASES)
def test_one_gather_leads_from_order_to_order(grid, window, shift) -> None:
    x = torch.randn(2, grid[0] * grid[1], 5)
    regular, shifted = cut_windows(grid, window, (0, 0)), cut_windows(grid, window, shift)
    there = regular.enter(x)
    assert torch.equal(regular.leave(there), x)
    over = shifted.enter(there, regular)
    assert torch.equal(shifted.leave(over), x)
    assert torch.equal(shifted.cleared(over), shifted.cleared(shifted.enter(x)))
    if shifted.empty is not None:
        assert not shifted.cleared(over)[:, shifted.empty[:, 0]].any()
    assert shifted.enter(over, shifted) is over


@pytest.mark.parametrize("window", [(4, 4), (2, 3), (1, 5)])
def test_the_row_of_an_offset_says_how_far_below_and_right_the_query_is(window: tuple[int, int]) -> None:
    h, w = window
    index = relative_index(window)
    assert index.shape == (h * w, h * w)
    for q in range(h * w):
        for k in range(h * w):
            down, right = q // w - k // w, q % w - k % w
            assert index[q, k] == (down + h - 1) * (2 * w - 1) + right + w - 1


@pytest.mark.parametrize("grid", [(6, 9), (7, 8), (3, 2)])
@pytest.mark.parametrize("shift", [(0, 0), (1, 1)])
@torch.no_grad()
def test_window_attention_is_attention_over_the_map_with_most_pairs_hidden(grid, shift) -> None:
    """Over all cells of the padded map at once: a pair of another window or end of the map is hidden."""
    torch.manual_seed(0)
    window, heads = (2, 3), 2
    attention = WindowAttention(8, heads, window)
    torch.nn.init.normal_(attention.relative_position_bias_table)
    made = cut_windows(grid, window, shift)
    x = torch.randn(2, grid[0] * grid[1], 8)
    mine = made.leave(attention(made.cleared(made.enter(x)), made))
    (h, w), (y, z) = whole(grid, window), used(grid, window, shift)
    x = F.pad(x.unflatten(1, grid), (0, 0, 0, w - grid[1], 0, h - grid[0])).flatten(1, 2)
    q, k, v = attention.qkv(x).unflatten(-1, (3, heads, 4)).permute(2, 0, 3, 1, 4)
    scores = q @ k.mT / 2  # (B, H, h·w, h·w)
    for a in range(h * w):
        for b in range(h * w):
            (i, j), (m, n) = divmod(a, w), divmod(b, w)
            mates = (i - y) // 2 == (m - y) // 2 and (j - z) // 3 == (n - z) // 3  # not wrapped: ends stay apart
            row = (i - m + 1) * 5 + j - n + 2
            scores[..., a, b] += attention.relative_position_bias_table[row] if mates else float("-inf")
    dense = attention.proj((scores.softmax(-1) @ v).transpose(1, 2).flatten(2))
    dense = dense.unflatten(1, (h, w))[:, : grid[0], : grid[1]].flatten(1, 2)
    torch.testing.assert_close(mine, dense, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_padded_cells_are_seen_by_themselves_alone_and_lie_nowhere() -> None:
    made = cut_windows((4, 4), (2, 2), (1, 1))
    padding = torch.zeros(2, 16, dtype=torch.bool)
    padding[0, [5, 6, 9, 10]] = True  # one whole window of the first image
    unseen = made.unseen(padding)
    assert unseen.hidden is not None and unseen.padded is not None
    index = unseen.layout.key_index
    assert index is not None and index.shape == (2, 4, 4)
    assert torch.equal(index[1], made.cells) and set(index[0].flatten().tolist()) == set(range(16)) - {5, 6, 9, 10} | {
        -1
    }
    window = int((made.cells == 5).any(1).nonzero())
    assert torch.equal(~unseen.hidden[0, window], torch.eye(4, dtype=torch.bool))
    assert torch.equal(unseen.hidden[1], made.hidden[0])
    attention = WindowAttention(8, 2, (2, 2))
    torch.nn.init.zeros_(attention.relative_position_bias_table)
    assert attention(torch.randn(2, 16, 8), unseen).isfinite().all()


def test_kept_windows_are_those_of_their_grid_and_of_any_other() -> None:
    kept = GridWindows((8, 8), (4, 4), (2, 2))
    assert not kept.state_dict()
    for grid in ((8, 8), (7, 10)):
        made, fresh = kept(grid), cut_windows(grid, (4, 4), (2, 2))
        for name in ("cells", "places", "hidden", "empty"):
            mine, other = getattr(made, name), getattr(fresh, name)
            assert mine is other is None or torch.equal(mine, other)
    assert kept((8, 8)).cells is kept.cells


def test_a_table_of_the_same_window_is_itself() -> None:
    table = torch.randn(49, 3)
    assert resize_relative_bias(table, (4, 4), (4, 4)) is table


def test_a_table_of_another_window_keeps_rows_and_columns_apart() -> None:
    """What depends on the distance down alone does so afterwards; offset zero stays in the middle."""
    down = torch.linspace(-1, 1, 5)[:, None].expand(5, 7)  # window (3, 4)
    table = torch.stack([down.flatten(), down.abs().flatten()], dim=1)
    made = resize_relative_bias(table, (3, 4), (6, 5))
    assert made.shape == (11 * 9, 2)
    first, second = made.t().unflatten(1, (11, 9))
    assert torch.allclose(first, first[:, :1].expand(-1, 9), atol=1e-6)
    assert torch.allclose(first, -first.flip(0), atol=1e-6) and first[0, 0] < -0.9
    assert int(second[:, 0].argmin()) == 5
