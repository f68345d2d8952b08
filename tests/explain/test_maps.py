"""From recorded attention to maps on the image: heads fused, rows chosen, columns laid on their cells."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from vitrail.explain.choice import CannotExplainError
from vitrail.explain.maps import (
    attention_map,
    fuse_heads,
)
from vitrail.explain.record import AttentionMap, record_attention
from vitrail.layers.attention import Layout


def test_heads_are_fused(random_weights):
    weights = random_weights(2, 3, 4, 5)
    assert_close(fuse_heads(weights), weights.mean(1, keepdim=True))
    assert_close(fuse_heads(weights, "max"), weights.max(1, keepdim=True).values)
    assert_close(fuse_heads(weights, "min"), weights.min(1, keepdim=True).values)
    assert torch.equal(fuse_heads(weights, 2), weights[:, 2:])
    assert torch.equal(fuse_heads(weights, [2, 0]), weights[:, [2, 0]])


@pytest.mark.parametrize(
    ("heads", "message"),
    [
        ("median", "heads must be mean, max, min or head numbers from 0; got 'median'"),
        (3, r"heads must lie in 0 … 2, there are 3 heads; got \[3\]"),
        ([], r"heads must lie in 0 … 2, .*; got \[\]"),
        (-1, r"heads must lie in 0 … 2, .*; got \[-1\]"),
    ],
)
def test_heads_that_are_not_there(heads, message, random_weights):
    with pytest.raises(ValueError, match=message):
        fuse_heads(random_weights(1, 3, 2, 2), heads)


# ---- on the image


def test_plain_rows_lie_in_raster_order(chain):
    (seen,) = chain(1)
    weights = seen.weights.mean(1)
    assert_close(attention_map(seen), weights[:, 0, 1:].view(2, 2, 3))
    assert_close(attention_map(seen, query=4), weights[:, 5, 1:].view(2, 2, 3))
    assert_close(attention_map(seen, query=(1, 1)), weights[:, 5, 1:].view(2, 2, 3))
    assert_close(attention_map(seen, query="mean"), weights.mean(1)[:, 1:].view(2, 2, 3))
    assert_close(attention_map(seen, heads=1), seen.weights[:, 1, 0, 1:].view(2, 2, 3))
    assert_close(attention_map(seen, heads=[0, 1]), attention_map(seen))


def test_registers_are_neither_class_nor_cells(chain):
    (seen,) = chain(1, prefix=3, readout=(0,))
    assert_close(attention_map(seen), seen.weights.mean(1)[:, 0, 3:].view(2, 2, 3))


def shifted_windows(random_weights: Callable[..., Tensor]) -> tuple[AttentionMap, Tensor]:
    """A 3 x 4 grid in two 2 x 4 windows, padded by a row and rolled by one; also its index (2, 8)."""
    padded = torch.full((4, 4), -1)
    padded[:3] = torch.arange(12).view(3, 4)
    index = padded.roll(-1, 0).reshape(2, 8)
    layout = Layout((3, 4), windows=2, query_index=index, key_index=index)
    return AttentionMap(random_weights(2, 2 * 3, 8, 8), layout, 1), index


@pytest.mark.parametrize("cell", range(12))
def test_a_query_in_a_window_sees_only_its_window(cell, random_weights):
    seen, index = shifted_windows(random_weights)
    window, row = (index == cell).nonzero()[0].tolist()
    wanted = torch.zeros(2, 12)
    for column in range(8):
        place = int(index[window, column])
        if place >= 0:
            wanted[:, place] = seen.weights[:, 3 * window : 3 * window + 3, row, column].mean(1)
    assert_close(attention_map(seen, query=cell), wanted.view(2, 3, 4))
    assert_close(
        attention_map(seen, heads=1, query=cell).flatten(1).sum(1),
        (seen.weights[:, 3 * window + 1, row] * (index[window] >= 0)).sum(1),
    )


def test_rows_of_padding_may_hold_anything(random_weights):
    seen, index = shifted_windows(random_weights)
    seen.weights[:, :3][:, :, index[0] < 0] = float("nan")
    seen.weights[:, 3:][:, :, index[1] < 0] = float("nan")
    assert attention_map(seen, query=0).isfinite().all()
    assert attention_map(seen, query="mean").isfinite().all()


def test_kept_tokens_differ_from_image_to_image(random_weights):
    keep = torch.tensor([[5, 0, 2], [1, 2, 4]])
    seen = AttentionMap(random_weights(2, 2, 4, 4), Layout((2, 3), 1, query_index=keep, key_index=keep), 1)
    heat = attention_map(seen).flatten(1)
    assert_close(heat.gather(1, keep), seen.weights.mean(1)[:, 0, 1:])
    assert heat[0, [1, 3, 4]].sum() == 0
    assert_close(attention_map(seen, query=2).flatten(1)[1, 1], seen.weights.mean(1)[1, 2, 1])
    with pytest.raises(ValueError, match="layer 1 has no row for query 5"):
        attention_map(seen, query=5)  # the second image does not keep it


def test_reduced_keys_stand_for_their_cells(random_weights):
    seen = AttentionMap(random_weights(1, 2, 16, 4), Layout((4, 4), key_index=torch.tensor([0, 2, 8, 10])), 1)
    heat = attention_map(seen, query=(3, 3))
    assert_close(heat[0, ::2, ::2].flatten(), seen.weights.mean(1)[0, 15])
    assert_close(heat.sum(), torch.tensor(1.0))


def test_class_attention_has_one_row(random_weights):
    """A class token that attends to everything, and no other query."""
    layout = Layout((2, 3), 1, query_index=torch.zeros(0, dtype=torch.long))
    seen = AttentionMap(random_weights(2, 2, 1, 7), layout, 1)
    assert_close(attention_map(seen), seen.weights.mean(1)[:, 0, 1:].view(2, 2, 3))


def test_rows_and_heads_recorded_in_part(small_vit):
    model, images = small_vit(), torch.randn(2, 3, 32, 32)
    with record_attention() as record:
        model(images)
    whole = record.maps[1]
    with record_attention([2], heads=[2, 1], queries=[7, 0]) as record:
        model(images)
    (part,) = record.maps
    assert_close(attention_map(part, heads=1), attention_map(whole, heads=1))
    assert_close(attention_map(part, heads=2, query=6), attention_map(whole, heads=2, query=6))
    with pytest.raises(ValueError, match=r"was recorded with heads \[2, 1\]; got \[0\]"):
        attention_map(part, heads=0)
    with pytest.raises(ValueError, match=r"no row for query 3, .*\(prefix rows 1, recorded rows \[7, 0\]\)"):
        attention_map(part, query=3)


@pytest.mark.parametrize(
    ("query", "message"),
    [
        (6, "query must be a cell of the 2 x 3 grid, counted from 0; got 6"),
        ((0, 3), r"query must be a cell of the 2 x 3 grid, counted from 0; got \(0, 3\)"),
        ("cls", r"query must be class, mean, a cell's number or \(row, column\); got 'cls'"),
    ],
)
def test_queries_that_are_not_there(query, message, chain):
    with pytest.raises(ValueError, match=message):
        attention_map(chain(1)[0], query=query)


READOUTS = [((0,), [0]), ((0, 1), [0, 1]), ((2,), [2]), ((), [3, 4, 5, 6, 7, 8])]


@pytest.mark.parametrize(("readout", "rows"), READOUTS)
def test_the_class_query_is_what_the_head_reads(readout, rows, chain):
    """With a prefix of three, of which the first may or may not be a class token."""
    (seen,) = chain(1, prefix=3, readout=readout)
    weights = seen.weights.mean(1)
    assert_close(attention_map(seen), weights[:, rows].mean(1)[:, 3:].view(2, 2, 3))
    part = replace(seen, weights=seen.weights[:, :, rows], queries=tuple(rows))
    assert_close(attention_map(part), attention_map(seen))
    if len(rows) > 1:
        part = replace(seen, weights=seen.weights[:, :, rows[1:]], queries=tuple(rows[1:]))
        with pytest.raises(ValueError, match="no row for query 'class', or not all of them"):
            attention_map(part)


def test_a_row_that_is_no_cell_is_asked_for_by_its_number(chain):
    """An object query, or a register: rows count from 0, prefix and image tokens alike, recorded or not."""
    (seen,) = chain(1, prefix=3)
    weights = seen.weights.mean(1)
    for row in range(9):
        assert_close(attention_map(seen, row=row), weights[:, row, 3:].view(2, 2, 3))
    assert_close(attention_map(seen, heads=1, row=4), attention_map(seen, heads=1, query=1))
    part = replace(seen, weights=seen.weights[:, :, [5, 1]], queries=(5, 1))
    assert_close(attention_map(part, row=1), attention_map(seen, row=1))
    with pytest.raises(ValueError, match=r"no row for row=2, .*\(prefix rows 3, recorded rows \[5, 1\]\)"):
        attention_map(part, row=2)


def test_object_queries_over_an_image(random_weights):
    """Rows that are all prefix, over keys that are all image."""
    layout = Layout((2, 3), prefix=4, key_prefix=0, query_index=torch.zeros(0, dtype=torch.long))
    seen = AttentionMap(random_weights(2, 2, 4, 6), layout, 1)
    assert_close(attention_map(seen, row=3), seen.weights.mean(1)[:, 3].view(2, 2, 3))
    with pytest.raises(CannotExplainError, match="layer 1 has 4 rows that are no image cell"):
        attention_map(seen)


def test_a_row_of_every_window_but_never_padding(random_weights):
    seen, index = shifted_windows(random_weights)
    both = (index >= 0).all(0).nonzero()[0].item()
    wanted = attention_map(seen, query=int(index[0, both])) + attention_map(seen, query=int(index[1, both]))
    assert_close(attention_map(seen, row=both), wanted / 2)
    one = ((index >= 0).sum(0) == 1).nonzero()[0].item()
    assert_close(attention_map(seen, row=one), attention_map(seen, query=int(index[:, one].max())))


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"row": 7}, "row must lie in 0 … 6 at layer 1, which has 7 rows; got 7"),
        ({"row": -1}, "row must lie in 0 … 6"),
        ({"row": 0, "query": 0}, "query and row both say which rows are meant: give one; got query=0, row=0"),
        ({"row": 0, "query": "class"}, "give one; got query='class', row=0"),
    ],
)
def test_rows_that_are_not_there(given, message, chain):
    with pytest.raises(ValueError, match=message):
        attention_map(chain(1)[0], **given)


def test_of_several_prefix_rows_none_is_taken_for_the_class_token(chain):
    """They may be object queries; a single one can only be what is read."""
    with pytest.raises(CannotExplainError, match=r"layer 1 has 2 rows .* does not say which of them the head reads"):
        attention_map(chain(1, prefix=2)[0])
    assert attention_map(chain(1)[0]).shape == (2, 2, 3)


def test_without_a_class_token_the_class_query_is_the_mean(chain):
    (seen,) = chain(1, prefix=0)
    assert_close(attention_map(seen), seen.weights.mean((1, 2)).view(2, 2, 3))
    layout = Layout((2, 3), query_index=torch.tensor([0, -1, 2, 3, 4, 5]))  # the second is padding
    wanted = seen.weights.mean(1)[:, [0, 2, 3, 4, 5]].mean(1).view(2, 2, 3)
    assert_close(attention_map(replace(seen, layout=layout)), wanted)


def test_keys_may_have_a_prefix_and_a_grid_of_their_own(random_weights):
    weights = random_weights(2, 3, 7, 4)
    layout = Layout((2, 3), 1, key_prefix=0, key_grid=(2, 2))
    assert_close(attention_map(AttentionMap(weights, layout, 1)), weights.mean(1)[:, 0].view(2, 2, 2))
    weights = random_weights(2, 3, 1, 6)  # attention pooling
    pooling = AttentionMap(weights, Layout((2, 3), 1, key_prefix=0, readout=(0,)), 1)
    assert_close(attention_map(pooling), weights.mean(1)[:, 0].view(2, 2, 3))
    with pytest.raises(ValueError, match="no row for query 2"):
        attention_map(pooling, query=2)


def test_frames_are_laid_on_their_grid(random_weights):
    weights = random_weights(2, 3, 13, 13)
    seen = AttentionMap(weights, Layout((2, 2, 3), 1), 1)
    assert_close(attention_map(seen), weights.mean(1)[:, 0, 1:].view(2, 2, 2, 3))
    assert_close(attention_map(seen, query=(1, 0, 2)), attention_map(seen, query=8))
    with pytest.raises(ValueError, match="query must be a cell of the 2 x 2 x 3 grid"):
        attention_map(seen, query=(1, 2))


def test_maps_without_a_place_on_the_image(random_weights):
    with pytest.raises(ValueError, match=r"layer 4 \(2 queries, 3 keys\) is not known .* give record_attention\(grid="):
        attention_map(AttentionMap(random_weights(1, 1, 2, 3), None, 4))
    with pytest.raises(ValueError, match="the layout of layer 4 describes 7 columns, its map has 3"):
        attention_map(AttentionMap(random_weights(1, 1, 7, 3), Layout((2, 3), 1), 4))
    with pytest.raises(ValueError, match="the layout of layer 4 describes 7 rows, its map has 2"):
        attention_map(AttentionMap(random_weights(1, 1, 2, 7), Layout((2, 3), 1), 4))


def test_maps_show_what_acts_on_the_values(chain):
    seen = replace(chain(1)[0], effective=torch.randn(2, 2, 7, 7))
    assert_close(attention_map(seen), seen.effective.mean(1)[:, 0, 1:].view(2, 2, 3))
    assert_close(attention_map(seen, heads=1), seen.effective[:, 1, 0, 1:].view(2, 2, 3))
