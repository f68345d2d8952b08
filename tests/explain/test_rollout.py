"""Rollout against float64 numpy, through every way in which a network ends; what cannot be multiplied is refused."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.testing import assert_close

from vitrail.explain.choice import CannotExplainError
from vitrail.explain.maps import fuse_heads, rollout, rollout_map
from vitrail.explain.record import AttentionMap, record_attention
from vitrail.layers.attention import Layout

READOUTS = [((0,), [0]), ((0, 1), [0, 1]), ((), [3, 4, 5, 6, 7, 8])]


def numpy_rollout(maps: list[AttentionMap], fusion: str, discard: float) -> np.ndarray:
    whole = None
    for seen in maps:
        fused = getattr(np, fusion)(seen.weights.double().numpy(), axis=1)
        for matrix in fused:
            for row in matrix:
                order = [j for j in np.argsort(row) if j != 0]  # the class token's column stays
                row[order[: int(discard * len(order))]] = 0
        step = 0.5 * fused + 0.5 * np.eye(fused.shape[-1])
        step /= step.sum(-1, keepdims=True)
        whole = step if whole is None else step @ whole
    return whole


@pytest.mark.parametrize("fusion", ["mean", "max", "min"])
@pytest.mark.parametrize("discard", [0.0, 0.5, 0.9])
def test_rollout_equals_numpy_and_its_rows_sum_to_1(fusion, discard, chain):
    maps = chain(4)
    whole = rollout(maps, fusion, discard)
    assert_close(whole.sum(-1), torch.ones(2, 7))
    assert_close(whole.double(), torch.from_numpy(numpy_rollout(maps, fusion, discard)), atol=1e-6, rtol=0)
    assert_close(rollout_map(maps, fusion, discard), whole[:, 0, 1:].view(2, 2, 3))


def test_identity_attention_moves_nothing():
    seen = AttentionMap(torch.eye(7).expand(1, 2, 7, 7), Layout((2, 3), 1), 1)
    assert_close(rollout([seen]), torch.eye(7)[None])


def test_discard_never_takes_the_class_column():
    weights = torch.full((1, 1, 5, 5), 0.2475)
    weights[..., 0] = 0.01
    seen = AttentionMap(weights, Layout((2, 2), 1), 1)
    assert (rollout([seen], discard=0.99)[0, 1:, 0] > 0).all()
    assert (rollout([seen], discard=0.75)[0] > 0).sum(-1).max() == 3  # class, the largest, itself
    assert (rollout([AttentionMap(weights, Layout((1, 5)), 1)], discard=0.2)[0, 1:, 0] == 0).all()


def test_without_a_class_token_the_mean_counts(chain):
    maps = chain(2, prefix=0)
    assert_close(rollout_map(maps), rollout(maps).mean(1).view(2, 2, 3))


@pytest.mark.parametrize(("readout", "rows"), READOUTS)
def test_rollout_starts_from_what_the_head_reads(readout, rows, chain):
    maps = chain(2, prefix=3, readout=readout)
    whole = rollout(maps)
    assert_close(rollout_map(maps), whole[:, rows].mean(1)[:, 3:].view(2, 2, 3))


@pytest.mark.parametrize(("readout", "kept"), [((0,), [0]), ((0, 1), [0, 1]), ((), []), (None, [])])
def test_discard_leaves_the_columns_of_class_tokens_alone(readout, kept):
    weights = torch.arange(1.0, 7.0).expand(1, 1, 6, 6) / 21
    whole = rollout([AttentionMap(weights, Layout((2, 2), 2, readout=readout), 1)], discard=0.99)
    assert (whole[0] > 0).nonzero().unique(dim=0).tolist() == [
        [row, column] for row in range(6) for column in range(6) if column in (*kept, 5, row)
    ]


@pytest.mark.parametrize("registers", [0, 2])
def test_attention_pooling_reads_the_rollout(registers, random_weights, chain):
    maps = chain(2, prefix=registers)
    count = maps[0].weights.shape[-1]
    pooling = AttentionMap(random_weights(2, 2, 1, 6), None, 3)
    start = torch.cat([torch.zeros(2, 1, registers), pooling.weights.mean(1)], dim=-1)
    wanted = (start @ rollout(maps))[:, 0, count - 6 :].view(2, 2, 3)
    assert_close(rollout_map([*maps, pooling]), wanted)


def class_attention(depth: int, own: int = 1, tokens: int = 6, first: int = 3) -> list[AttentionMap]:
    """Layers of `own` class tokens that attend to themselves and to the tokens of the layers before, as in CaiT."""
    layout = Layout((2, 3), own, query_index=torch.zeros(0, dtype=torch.long), readout=tuple(range(own)))
    weights = torch.randn(depth, 2, 2, own, own + tokens).mul(2).softmax(-1)
    return [AttentionMap(w, layout, first + n) for n, w in enumerate(weights)]


@pytest.mark.parametrize("fusion", ["mean", "max", "min"])
@pytest.mark.parametrize("discard", [0.0, 0.5])
@pytest.mark.parametrize("depth", [1, 2, 3])
def test_class_attention_equals_numpy(depth, discard, fusion, chain):
    """The class token's share s of itself and row r over the tokens, layer by layer, in float64."""
    body, tail = chain(2, prefix=0), class_attention(depth)
    below = rollout(body, fusion, discard).double().numpy()
    wanted = np.zeros((2, 6))
    for image in range(2):
        s, r = 1.0, np.zeros(6)
        for seen in tail:
            row = getattr(np, fusion)(seen.weights[image].double().numpy(), axis=0)[0]
            row[1 + np.argsort(row[1:])[: int(discard * 6)]] = 0
            a, alpha = row[0], row[1:]
            total = 0.5 * row.sum() + 0.5
            s, r = (0.5 * a * s + 0.5 * s) / total, (0.5 * a * r + 0.5 * r + 0.5 * alpha) / total
        wanted[image] = r @ below[image]
        np.testing.assert_allclose(wanted[image].sum() + s, 1, atol=1e-6)
    found = rollout_map([*body, *tail], fusion, discard)
    assert_close(found.double(), torch.from_numpy(wanted).view(2, 2, 3), atol=1e-6, rtol=0)


def test_class_attention_is_a_rollout_whose_first_layers_leave_the_class_token_alone(chain):
    """Both parts as square maps: the identity where a token does not take part."""
    body, tail, layout = chain(2, prefix=0), class_attention(2), Layout((2, 3), 1)
    square = [AttentionMap(torch.eye(7).repeat(2, 2, 1, 1), layout, seen.layer) for seen in (*body, *tail)]
    for whole, seen in zip(square, (*body, *tail), strict=True):
        rows = slice(1, None) if seen.weights.shape[-1] == 6 else slice(0, 1)
        whole.weights[:, :, rows, 7 - seen.weights.shape[-1] :] = seen.weights
    assert_close(rollout_map([*body, *tail]), rollout_map(square))


def test_class_attention_of_two_tokens_that_the_head_reads(chain):
    """Each alone by its own readout, and together their mean."""
    body, tail = chain(2, prefix=0), class_attention(2, own=2)

    def read(*rows: int) -> Tensor:
        return rollout_map([*body, *(replace(m, layout=replace(m.layout, readout=rows)) for m in tail)])

    assert_close(read(0, 1), (read(0) + read(1)) / 2)
    assert (read(0) - read(1)).abs().max() > 0.01


def test_class_attention_of_a_foreign_network():
    """Seen as it is by `record_attention`, which knows nothing of class attention."""

    class Network(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed = nn.Conv2d(3, 8, 8, 8)
            self.q, self.k = nn.Linear(8, 8), nn.Linear(8, 8)
            self.token = nn.Parameter(torch.randn(1, 1, 8))

        def forward(self, images: Tensor) -> Tensor:
            x, c = self.embed(images).flatten(2).mT, self.token
            for _ in range(2):
                x = x + F.scaled_dot_product_attention(self.q(x), self.k(x), x)
            for _ in range(2):
                u = torch.cat([c, x], 1)
                c = c + F.scaled_dot_product_attention(self.q(c), self.k(u), u)
            return c[:, 0]

    with record_attention() as record:
        Network()(torch.randn(1, 3, 24, 24))
    assert [seen.weights.shape[-2:] for seen in record.maps] == [(9, 9), (9, 9), (1, 10), (1, 10)]
    heat = rollout_map(record.maps)
    own = ((1 + record.maps[2].weights[0, 0, 0, 0]) / 2) * ((1 + record.maps[3].weights[0, 0, 0, 0]) / 2)
    assert_close(heat.sum(), 1 - own)


@pytest.mark.parametrize(
    ("rows", "columns", "message"),
    [
        ([1], [9], "layer 3 has 1 queries and 9 keys where layer 2 left 7 tokens"),
        ([1, 1], [7, 7], "layer 3 has 1 queries and 7 keys where layer 2 left 7 tokens"),
        ([1, 2], [8, 9], "layer 4 has 2 queries and 9 keys where layer 2 left 7 tokens"),
        ([1, 7], [8, 7], "layer 4 has 7 queries and 7 keys where layer 2 left 7 tokens"),
    ],
)
def test_last_layers_that_are_neither_pooling_nor_class_attention(rows, columns, message, chain, random_weights):
    shapes = zip(rows, columns, strict=True)
    tail = [AttentionMap(random_weights(2, 2, q, k), None, 3 + n) for n, (q, k) in enumerate(shapes)]
    with pytest.raises(CannotExplainError, match=rf"{message}.*: use method='attention' \(--method attention\)"):
        rollout_map([*chain(2), *tail])


def test_last_layers_whose_layout_tells_of_other_tokens(chain):
    body, (seen, *_) = chain(2, prefix=0), class_attention(1)
    for layout, message in [
        (Layout((2, 3), 1, key_prefix=0), "layer 3 has 0 of 7 keys before the image tokens where layer 2 left 0 of 6"),
        (Layout((2, 3), 1, key_index=torch.arange(6)), "layer 3 has its tokens stand for other image cells"),
        (Layout((2, 3), 1, windows=2), "layer 3 attends within 2 windows"),
    ]:
        with pytest.raises(CannotExplainError, match=message):
            rollout_map([*body, replace(seen, layout=layout)])
    with pytest.raises(ValueError, match="layer 4 follows layer 2: record the layers between too"):
        rollout_map([*body, replace(seen, layer=4)])


def test_the_head_reads_no_one_row_of_several_unless_it_is_told(chain):
    with pytest.raises(CannotExplainError, match="does not say which of them the head reads"):
        rollout_map(chain(2, prefix=3))


def test_a_fraction_is_rounded_down_but_not_by_floating_point():
    """0.29 of 100 keys are 29, though 0.29 * 100 is a little less."""
    weights = torch.arange(1.0, 101.0).expand(1, 1, 100, 100) / 5050
    whole = rollout([AttentionMap(weights, Layout((10, 10)), 1)], discard=0.29)
    assert (whole[0, 99] > 0).sum() == 71


def odd_layer(kind: str, random_weights: Callable[..., Tensor]) -> AttentionMap:
    """A second layer that cannot follow `chain(1)`."""
    layouts = {
        "windows": Layout((2, 3), 1, windows=2, query_index=torch.zeros(2, 6), key_index=torch.zeros(2, 6)),
        "indices": Layout((2, 3), 1, query_index=torch.arange(6)),
        "other cells": Layout((2, 3), 1, query_index=torch.arange(6), key_index=torch.arange(6)),
    }
    shape = {"windows": (2, 4, 7, 7), "reduced": (2, 2, 7, 3), "pruned": (2, 2, 5, 5)}.get(kind, (2, 2, 7, 7))
    rows = (0,) if kind == "rows" else None
    heads = "mean" if kind == "mean" else None
    layout = layouts.get(kind)
    return AttentionMap(random_weights(*shape), layout, 3 if kind == "gap" else 2, heads=heads, queries=rows)


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("windows", "layer 2 attends within 2 windows, so its map holds no flow between them"),
        ("reduced", "layer 2 has 7 queries and 3 keys, so its keys are other tokens than its queries"),
        ("pruned", "layer 2 has 5 tokens where layer 1 left 7"),
        ("indices", "layer 2 has queries that stand for other image cells than its keys"),
        ("other cells", "layer 2 has its tokens stand for other image cells than layer 1"),
        ("rows", r"layer 2 was recorded with rows \[0\] only; record with queries=None"),
        ("gap", "layer 3 follows layer 1: record the layers between too"),
        ("mean", "layer 2 was recorded with heads='mean'; got 'max': record with heads=None"),
    ],
)
def test_rollout_refuses_what_cannot_be_multiplied(kind, message, chain, random_weights):
    """A recording that left something out is another error than a network that cannot be rolled out."""
    with pytest.raises(ValueError, match=message) as error:
        rollout([*chain(1), odd_layer(kind, random_weights)], fusion="max")
    assert isinstance(error.value, CannotExplainError) == (kind not in ("rows", "gap", "mean"))
    assert ("use method='attention' (--method attention)" in str(error.value)) == isinstance(
        error.value, CannotExplainError
    )


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"discard": 1.0}, r"discard is a fraction of the weights, in \[0, 1\); got 1.0"),
        ({"discard": -0.1}, "discard is a fraction"),
        ({"fusion": "men"}, r"fusion must be mean, max, min; got 'men': mean\?"),
    ],
)
def test_rollout_settings(given, message, chain):
    with pytest.raises(ValueError, match=message):
        rollout(chain(1), **given)


def test_rollout_of_nothing():
    for function in (rollout, rollout_map):
        with pytest.raises(ValueError, match="rollout needs at least one attention map; got none"):
            function([])


@pytest.mark.parametrize("fusion", ["mean", "max", "min"])
def test_rollout_follows_what_acts_and_never_a_negative_weight(fusion, chain):
    maps = [replace(seen, effective=torch.randn(2, 2, 7, 7)) for seen in chain(2)]
    fused = [fuse_heads(seen.effective, fusion).clamp(min=0) for seen in maps]
    wanted = rollout([AttentionMap(f, seen.layout, seen.layer) for f, seen in zip(fused, maps, strict=True)], "mean")
    assert_close(rollout(maps, fusion), wanted)
    assert (rollout(maps, fusion) >= 0).all()
    assert_close(rollout(maps, fusion).sum(-1), torch.ones(2, 7))
