"""Attention over reduced keys: its formula, which cells make a key, and what padding hides."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from vitrail.explain.record import AttentionMap, record_attention
from vitrail.layers.reduction import LinearReductionAttention, ReducedAttention, SpatialReductionAttention
from vitrail.layers.tokens import as_map

DIM, HEADS = 12, 3


def build(kind: type[ReducedAttention], *args: Any, **options: Any) -> Any:
    """Every parameter random."""
    model = kind(DIM, HEADS, *args, **options).eval()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.5)
    return model


def by_hand(model: ReducedAttention, x: Tensor, keys: Tensor) -> Tensor:
    """Head by head: the softmax of scaled products, times the values."""
    width = DIM // HEADS
    q, (k, v) = model.q(x), model.kv(keys).split(DIM, dim=-1)
    parts = []
    for head in range(HEADS):
        own = slice(head * width, (head + 1) * width)
        scores = q[..., own] @ k[..., own].transpose(1, 2) / width**0.5
        parts.append(scores.softmax(-1) @ v[..., own])
    return model.proj(torch.cat(parts, -1))


def recorded(model: ReducedAttention, *args: Any) -> AttentionMap:
    with record_attention() as record:
        model(*args)
    return record.maps[0]


def close(ours: Tensor, theirs: Tensor) -> None:
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5 * max(1.0, theirs.abs().max().item()))


@torch.no_grad()
def test_without_reduction_all_tokens_are_keys() -> None:
    model, x = build(ReducedAttention), torch.randn(2, 13, DIM)
    close(model(x, (3, 4)), by_hand(model, x, x))
    close(model(x, (3, 4), rows=1), by_hand(model, x, x)[:, :1])


@torch.no_grad()
def test_a_key_is_a_window_times_a_matrix_normed() -> None:
    model, x = build(SpatialReductionAttention, 2), torch.randn(2, 24, DIM)
    windows = x.view(2, 2, 2, 3, 2, DIM).permute(0, 1, 3, 5, 2, 4).reshape(2, 6, DIM * 4)  # 4 x 6 cells in 2 x 2
    keys = model.norm(windows @ model.sr.weight.flatten(1).T + model.sr.bias)
    close(model(x, (4, 6)), by_hand(model, x, keys))


@torch.no_grad()
def test_a_key_of_linear_reduction_is_a_mean_times_a_matrix_normed_and_activated() -> None:
    model, x = build(LinearReductionAttention), torch.randn(2, 14 * 21, DIM)
    means = x.view(2, 7, 2, 7, 3, DIM).mean((2, 4)).flatten(1, 2)
    keys = torch.nn.functional.gelu(model.norm(means @ model.sr.weight.flatten(1).T + model.sr.bias))
    close(model(x, (14, 21)), by_hand(model, x, keys))


@torch.no_grad()
def test_cells_beyond_the_last_whole_window_are_queries_alone() -> None:
    model, x = build(SpatialReductionAttention, 2), torch.randn(1, 25, DIM)
    changed = x.clone()
    changed[:, [4, 9, 20, 24]] += 1  # in the last row or column of 5 x 5
    moved = (model(changed, (5, 5)) - model(x, (5, 5))).abs().amax((0, 2)) > 1e-6
    assert moved.nonzero().flatten().tolist() == [4, 9, 20, 24]


@pytest.mark.parametrize(("size", "keys"), [((4, 4), 49), ((7, 9), 49), ((30, 21), 49)])
@torch.no_grad()
def test_linear_reduction_leaves_as_many_keys_whatever_the_size(size: tuple[int, int], keys: int) -> None:
    seen = recorded(build(LinearReductionAttention), torch.randn(1, size[0] * size[1], DIM), size)
    assert seen.weights.shape[-1] == keys and seen.layout.key_grid == (7, 7) and seen.layout.grid == size


# ---- padding


def padding(*columns: int) -> Tensor:
    """(B, 16) of a grid of 4 x 4: the first so many columns of each image are no padding."""
    return torch.stack([(torch.arange(4) >= seen).expand(4, 4).flatten() for seen in columns])


@torch.no_grad()
def test_windows_with_a_padded_cell_are_hidden() -> None:
    hidden = padding(4, 3, 2)
    seen = recorded(build(SpatialReductionAttention, 2), torch.randn(3, 16, DIM), (4, 4), hidden)
    columns = (seen.weights.amax((1, 2)) > 0).view(3, 2, 2)
    assert columns[0].all() and (columns[1:] == torch.tensor([True, False])).all()
    assert seen.layout.key_index.tolist() == [[0, 1, 2, 3], [0, -1, 2, -1], [0, -1, 2, -1]]
    assert torch.equal(seen.layout.query_index == -1, hidden)


@torch.no_grad()
def test_of_an_image_without_a_whole_window_the_fullest_are_seen() -> None:
    hidden = padding(1, 0)
    seen = recorded(build(SpatialReductionAttention, 2), torch.randn(2, 16, DIM), (4, 4), hidden)
    columns = (seen.weights.amax((1, 2)) > 0).tolist()
    assert columns == [[True, False, True, False], [True] * 4]  # nothing but padding hides nothing: no row is nan


@torch.no_grad()
def test_means_of_linear_reduction_are_over_what_is_seen() -> None:
    """Two of three cells of a part are padding: the mean is the third."""
    model, x = build(LinearReductionAttention), torch.randn(1, 7 * 21, DIM)
    hidden = torch.ones(7, 7, 3, dtype=torch.bool)
    hidden[..., 0] = False
    alone = x.view(1, 7, 7, 3, DIM)[..., 0, :].flatten(1, 2)
    keys = torch.nn.functional.gelu(model.norm(alone @ model.sr.weight.flatten(1).T + model.sr.bias))
    close(model(x, (7, 21), hidden.view(1, -1)), by_hand(model, x, keys))


@torch.no_grad()
def test_parts_of_linear_reduction_without_a_cell_are_hidden() -> None:
    hidden = torch.zeros(2, 14, 14, dtype=torch.bool)
    hidden[0, :, 6:] = True
    hidden[1] = True
    seen = recorded(build(LinearReductionAttention), torch.randn(2, 196, DIM), (14, 14), hidden.flatten(1))
    columns = (seen.weights.amax((1, 2)) > 0).view(2, 7, 7)
    assert columns[0, :, :3].all() and not columns[0, :, 3:].any() and columns[1].all()


@pytest.mark.parametrize("kind", [(ReducedAttention,), (SpatialReductionAttention, 2), (LinearReductionAttention,)])
@torch.no_grad()
def test_padded_cells_are_seen_by_none(kind: tuple[Any, ...]) -> None:
    model, x, hidden = build(*kind), torch.randn(2, 16, DIM), padding(2, 3)
    other = x.masked_fill(hidden[..., None], 9.0)
    kept = ~hidden
    close(model(other, (4, 4), hidden)[kept], model(x, (4, 4), hidden)[kept])
    assert not torch.allclose(model(other, (4, 4))[kept], model(x, (4, 4))[kept], atol=1e-2)


# ---- maps and errors


def test_a_map_is_a_view_with_the_strides_of_channels_last_for_one_image_too() -> None:
    for batch in (1, 2):
        x = torch.randn(batch, 15, 8)
        found = as_map(x, (3, 5))
        assert found.stride() == found.contiguous(memory_format=torch.channels_last).stride() == (120, 1, 40, 8)
        assert found.data_ptr() == x.data_ptr() and torch.equal(found[:, :, 1, 2], x[:, 7])
    hidden = torch.zeros(2, 15, dtype=torch.bool)
    hidden[:, 7] = True
    cut = as_map(x, (3, 5), hidden)
    assert not cut[:, :, 1, 2].any() and torch.equal(cut[:, :, 1, 3], x[:, 8])


def test_a_grid_without_a_window_names_both() -> None:
    message = "sr_ratio 4 needs at least 4 x 4 cells; got a grid of 3 x 8: use larger images, or smaller sr_ratios"
    with pytest.raises(ValueError, match=message):
        build(SpatialReductionAttention, 4)(torch.randn(1, 24, DIM), (3, 8))


@pytest.mark.parametrize("kind", [(ReducedAttention,), (SpatialReductionAttention, 2), (LinearReductionAttention,)])
def test_heads_that_do_not_divide_are_named(kind: tuple[Any, ...]) -> None:
    with pytest.raises(ValueError, match="embed_dim 12 is not divisible by num_heads 5: use 4 heads or a width of 10"):
        kind[0](12, 5, *kind[1:])
