"""From recorded attention to maps on the image: fusion, layouts, rollout against float64 numpy, explain."""

from __future__ import annotations

import threading
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from vitrail.explain.maps import (
    METHODS,
    Explained,
    attention_depth,
    attention_map,
    explain,
    explain_layers,
    fuse_heads,
    rollout,
    rollout_map,
)
from vitrail.explain.record import AttentionMap, record_attention
from vitrail.layers.attention import Layout
from vitrail.models.vit import VisionTransformer
from vitrail.records import Explanation


def small_vit(**fields: object) -> VisionTransformer:
    shape = {"img_size": 32, "patch_size": 8, "embed_dim": 24, "depth": 3, "num_heads": 3, "num_classes": 5}
    model = VisionTransformer(**(shape | fields)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.3)
    return model


def random_weights(*shape: int) -> Tensor:
    return torch.randn(*shape).mul(2).softmax(-1)


def chain(
    depth: int = 3,
    prefix: int = 1,
    grid: tuple[int, int] = (2, 3),
    heads: int = 2,
    readout: tuple[int, ...] | None = None,
) -> list[AttentionMap]:
    count = prefix + grid[0] * grid[1]
    layout = Layout(grid, prefix, readout=readout)
    return [AttentionMap(random_weights(2, heads, count, count), layout, n + 1) for n in range(depth)]


def test_heads_are_fused():
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
def test_heads_that_are_not_there(heads, message):
    with pytest.raises(ValueError, match=message):
        fuse_heads(random_weights(1, 3, 2, 2), heads)


# ---- on the image


def test_plain_rows_lie_in_raster_order():
    (seen,) = chain(1)
    weights = seen.weights.mean(1)
    assert_close(attention_map(seen), weights[:, 0, 1:].view(2, 2, 3))
    assert_close(attention_map(seen, query=4), weights[:, 5, 1:].view(2, 2, 3))
    assert_close(attention_map(seen, query=(1, 1)), weights[:, 5, 1:].view(2, 2, 3))
    assert_close(attention_map(seen, query="mean"), weights.mean(1)[:, 1:].view(2, 2, 3))
    assert_close(attention_map(seen, heads=1), seen.weights[:, 1, 0, 1:].view(2, 2, 3))
    assert_close(attention_map(seen, heads=[0, 1]), attention_map(seen))


def test_registers_are_neither_class_nor_cells():
    (seen,) = chain(1, prefix=3)
    assert_close(attention_map(seen), seen.weights.mean(1)[:, 0, 3:].view(2, 2, 3))


def shifted_windows() -> tuple[AttentionMap, Tensor]:
    """A 3 x 4 grid in two 2 x 4 windows, padded by a row and rolled by one; also its index (2, 8)."""
    padded = torch.full((4, 4), -1)
    padded[:3] = torch.arange(12).view(3, 4)
    index = padded.roll(-1, 0).reshape(2, 8)
    layout = Layout((3, 4), windows=2, query_index=index, key_index=index)
    return AttentionMap(random_weights(2, 2 * 3, 8, 8), layout, 1), index


@pytest.mark.parametrize("cell", range(12))
def test_a_query_in_a_window_sees_only_its_window(cell):
    seen, index = shifted_windows()
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


def test_rows_of_padding_may_hold_anything():
    seen, index = shifted_windows()
    seen.weights[:, :3][:, :, index[0] < 0] = float("nan")
    seen.weights[:, 3:][:, :, index[1] < 0] = float("nan")
    assert attention_map(seen, query=0).isfinite().all()
    assert attention_map(seen, query="mean").isfinite().all()


def test_kept_tokens_differ_from_image_to_image():
    keep = torch.tensor([[5, 0, 2], [1, 2, 4]])
    seen = AttentionMap(random_weights(2, 2, 4, 4), Layout((2, 3), 1, query_index=keep, key_index=keep), 1)
    heat = attention_map(seen).flatten(1)
    assert_close(heat.gather(1, keep), seen.weights.mean(1)[:, 0, 1:])
    assert heat[0, [1, 3, 4]].sum() == 0
    assert_close(attention_map(seen, query=2).flatten(1)[1, 1], seen.weights.mean(1)[1, 2, 1])
    with pytest.raises(ValueError, match="layer 1 has no row for query 5"):
        attention_map(seen, query=5)  # the second image does not keep it


def test_reduced_keys_stand_for_their_cells():
    seen = AttentionMap(random_weights(1, 2, 16, 4), Layout((4, 4), key_index=torch.tensor([0, 2, 8, 10])), 1)
    heat = attention_map(seen, query=(3, 3))
    assert_close(heat[0, ::2, ::2].flatten(), seen.weights.mean(1)[0, 15])
    assert_close(heat.sum(), torch.tensor(1.0))


def test_class_attention_has_one_row():
    """A class token that attends to everything, and no other query."""
    layout = Layout((2, 3), 1, query_index=torch.zeros(0, dtype=torch.long))
    seen = AttentionMap(random_weights(2, 2, 1, 7), layout, 1)
    assert_close(attention_map(seen), seen.weights.mean(1)[:, 0, 1:].view(2, 2, 3))


def test_rows_and_heads_recorded_in_part():
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
def test_queries_that_are_not_there(query, message):
    with pytest.raises(ValueError, match=message):
        attention_map(chain(1)[0], query=query)


READOUTS = [((0,), [0]), ((0, 1), [0, 1]), ((), [3, 4, 5, 6, 7, 8]), (None, [0])]


@pytest.mark.parametrize(("readout", "rows"), READOUTS)
def test_the_class_query_is_what_the_head_reads(readout, rows):
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


def test_without_a_class_token_the_class_query_is_the_mean():
    (seen,) = chain(1, prefix=0)
    assert_close(attention_map(seen), seen.weights.mean((1, 2)).view(2, 2, 3))
    layout = Layout((2, 3), query_index=torch.tensor([0, -1, 2, 3, 4, 5]))  # the second is padding
    wanted = seen.weights.mean(1)[:, [0, 2, 3, 4, 5]].mean(1).view(2, 2, 3)
    assert_close(attention_map(replace(seen, layout=layout)), wanted)


def test_keys_may_have_a_prefix_and_a_grid_of_their_own():
    weights = random_weights(2, 3, 7, 4)
    layout = Layout((2, 3), 1, key_prefix=0, key_grid=(2, 2))
    assert_close(attention_map(AttentionMap(weights, layout, 1)), weights.mean(1)[:, 0].view(2, 2, 2))
    weights = random_weights(2, 3, 1, 6)  # attention pooling
    pooling = AttentionMap(weights, Layout((2, 3), 1, key_prefix=0, readout=(0,)), 1)
    assert_close(attention_map(pooling), weights.mean(1)[:, 0].view(2, 2, 3))
    with pytest.raises(ValueError, match="no row for query 2"):
        attention_map(pooling, query=2)


def test_frames_are_laid_on_their_grid():
    weights = random_weights(2, 3, 13, 13)
    seen = AttentionMap(weights, Layout((2, 2, 3), 1), 1)
    assert_close(attention_map(seen), weights.mean(1)[:, 0, 1:].view(2, 2, 2, 3))
    assert_close(attention_map(seen, query=(1, 0, 2)), attention_map(seen, query=8))
    with pytest.raises(ValueError, match="query must be a cell of the 2 x 2 x 3 grid"):
        attention_map(seen, query=(1, 2))


def mixed_chain() -> list[AttentionMap]:
    return [replace(seen, effective=torch.randn(2, 2, 7, 7)) for seen in chain(2)]


def test_maps_show_what_acts_on_the_values():
    seen = mixed_chain()[0]
    assert_close(attention_map(seen), seen.effective.mean(1)[:, 0, 1:].view(2, 2, 3))
    assert_close(attention_map(seen, heads=1), seen.effective[:, 1, 0, 1:].view(2, 2, 3))


@pytest.mark.parametrize("fusion", ["mean", "max", "min"])
def test_rollout_follows_what_acts_and_never_a_negative_weight(fusion):
    maps = mixed_chain()
    fused = [fuse_heads(seen.effective, fusion).clamp(min=0) for seen in maps]
    wanted = rollout([AttentionMap(f, seen.layout, seen.layer) for f, seen in zip(fused, maps, strict=True)], "mean")
    assert_close(rollout(maps, fusion), wanted)
    assert (rollout(maps, fusion) >= 0).all()
    assert_close(rollout(maps, fusion).sum(-1), torch.ones(2, 7))


def test_maps_without_a_place_on_the_image():
    with pytest.raises(ValueError, match=r"layer 4 \(2 queries, 3 keys\) is not known .* give record_attention\(grid="):
        attention_map(AttentionMap(random_weights(1, 1, 2, 3), None, 4))
    with pytest.raises(ValueError, match="the layout of layer 4 describes 7 columns, its map has 3"):
        attention_map(AttentionMap(random_weights(1, 1, 7, 3), Layout((2, 3), 1), 4))
    with pytest.raises(ValueError, match="the layout of layer 4 describes 7 rows, its map has 2"):
        attention_map(AttentionMap(random_weights(1, 1, 2, 7), Layout((2, 3), 1), 4))


# ---- rollout


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
def test_rollout_equals_numpy_and_its_rows_sum_to_1(fusion, discard):
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


def test_without_a_class_token_the_mean_counts():
    maps = chain(2, prefix=0)
    assert_close(rollout_map(maps), rollout(maps).mean(1).view(2, 2, 3))


@pytest.mark.parametrize(("readout", "rows"), READOUTS)
def test_rollout_starts_from_what_the_head_reads(readout, rows):
    maps = chain(2, prefix=3, readout=readout)
    whole = rollout(maps)
    assert_close(rollout_map(maps), whole[:, rows].mean(1)[:, 3:].view(2, 2, 3))


@pytest.mark.parametrize(("readout", "kept"), [((0,), [0]), ((0, 1), [0, 1]), ((), []), (None, [0])])
def test_discard_leaves_the_columns_of_class_tokens_alone(readout, kept):
    weights = torch.arange(1.0, 7.0).expand(1, 1, 6, 6) / 21
    whole = rollout([AttentionMap(weights, Layout((2, 2), 2, readout=readout), 1)], discard=0.99)
    assert (whole[0] > 0).nonzero().unique(dim=0).tolist() == [
        [row, column] for row in range(6) for column in range(6) if column in (*kept, 5, row)
    ]


@pytest.mark.parametrize("registers", [0, 2])
def test_attention_pooling_reads_the_rollout(registers):
    maps = chain(2, prefix=registers)
    count = maps[0].weights.shape[-1]
    pooling = AttentionMap(random_weights(2, 2, 1, 6), None, 3)
    start = torch.cat([torch.zeros(2, 1, registers), pooling.weights.mean(1)], dim=-1)
    wanted = (start @ rollout(maps))[:, 0, count - 6 :].view(2, 2, 3)
    assert_close(rollout_map([*maps, pooling]), wanted)


def test_pooling_of_more_tokens_than_there_were():
    with pytest.raises(ValueError, match="layer 3 pools 9 tokens where only 7 came before it"):
        rollout_map([*chain(2), AttentionMap(random_weights(2, 2, 1, 9), None, 3)])


def odd_layer(kind: str) -> AttentionMap:
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
        ("gap", "layer 3 follows layer 1; the layers between are missing"),
        ("mean", "layer 2 was recorded with heads='mean'; got 'max': record with heads=None"),
    ],
)
def test_rollout_refuses_what_cannot_be_multiplied(kind, message):
    with pytest.raises(ValueError, match=message):
        rollout([*chain(1), odd_layer(kind)], fusion="max")


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"discard": 1.0}, r"discard is a fraction of the weights, in \[0, 1\); got 1.0"),
        ({"discard": -0.1}, "discard is a fraction"),
        ({"fusion": "men"}, r"fusion must be mean, max, min; got 'men': mean\?"),
    ],
)
def test_rollout_settings(given, message):
    with pytest.raises(ValueError, match=message):
        rollout(chain(1), **given)


def test_rollout_of_nothing():
    for function in (rollout, rollout_map):
        with pytest.raises(ValueError, match="rollout needs at least one attention map; got none"):
            function([])


# ---- explain


def test_explain_by_rollout():
    model, image = small_vit(), torch.randn(3, 32, 32)
    with record_attention() as record:
        model(image[None])
    explained = explain(model, image)
    assert (explained.method, explained.layer, explained.heads, explained.target) == ("rollout", None, "mean", None)
    assert_close(explained.heat, rollout_map(record.maps)[0].detach())
    assert_close(explain(model, image, layer=2).heat, rollout_map(record.maps[:2])[0].detach())
    shown = explain(model, image[None], heads="max", discard=0.5)
    assert_close(shown.heat, rollout_map(record.maps, "max", 0.5)[0].detach())
    assert shown.heads == "max"


def test_explain_by_attention():
    model, image = small_vit(), torch.randn(3, 32, 32)
    with record_attention() as record:
        model(image[None])
    last = explain(model, image, "attention")
    assert last.layer == 3
    assert_close(last.heat, attention_map(record.maps[2])[0])
    one = explain(model, image, "attention", layer=2, heads=1)
    assert (one.layer, one.heads) == (2, "1")
    assert_close(one.heat, attention_map(record.maps[1], 1)[0])
    assert_close(explain(model, image, "attention", heads="min").heat, attention_map(record.maps[2], "min")[0])


@pytest.mark.parametrize("pool", ["avg", "map"])
@pytest.mark.parametrize("method", ["rollout", "attention"])
def test_models_without_a_class_token_are_explained(pool, method):
    heat = explain(small_vit(class_token=False, global_pool=pool), torch.randn(3, 32, 40), method).heat
    assert heat.shape == (4, 5)
    assert_close(heat.sum(), torch.tensor(1.0))


@pytest.mark.parametrize("pool", ["token", "avg", "map"])
def test_all_layers_in_one_pass(pool):
    model, image = small_vit(class_token=pool == "token", reg_tokens=2, global_pool=pool), torch.randn(3, 32, 32)
    with record_attention() as record, torch.no_grad():
        output = model(image[None])
    found = explain_layers(model, image, "attention")
    assert_close(found.output, output)
    assert [m.layer for m in found.maps] == [seen.layer for seen in record.maps] == [1, 2, 3, 4][: len(record.maps)]
    for shown, seen in zip(found.maps, record.maps, strict=True):
        assert_close(shown.heat, attention_map(seen)[0])
    chosen = explain_layers(model, image, "attention", layers=[3, 1], heads="all").maps
    assert [(m.layer, m.heads) for m in chosen] == [(layer, str(head)) for layer in (3, 1) for head in range(3)]
    ends = explain_layers(model, image, layers=[2, 1]).maps
    assert [m.layer for m in ends] == [2, 1]
    for end in ends:
        assert_close(end.heat, rollout_map(record.maps[: end.layer])[0])


@pytest.mark.parametrize(("pool", "rows"), [("token", 1), ("avg", 16)])
def test_no_more_is_recorded_than_is_shown(pool, rows, monkeypatch):
    sizes: list[tuple[int, ...]] = []
    monkeypatch.setattr(
        "vitrail.explain.record.AttentionMap", lambda w, *rest: sizes.append(w.shape) or AttentionMap(w, *rest)
    )
    model, image = small_vit(global_pool=pool), torch.randn(3, 32, 32)
    explain_layers(model, image, "attention", layers=[2])
    explain_layers(model, image, "attention", layers=[2], heads="all")
    assert sizes == [(1, 1, rows, 17), (1, 3, rows, 17)]
    sizes.clear()
    assert attention_depth(model, image) == 3
    assert sizes == [(1, 1, 1, 17)]


def test_a_method_is_added_in_one_place(monkeypatch):
    def by_colour(model, batch, asked):
        return Explained([Explanation(method="colour", heat=batch[0].mean(0))], model(batch))

    monkeypatch.setitem(METHODS, "colour", by_colour)
    image = torch.randn(3, 32, 32)
    assert_close(explain(small_vit(), image, "colour").heat, image.mean(0))
    with pytest.raises(ValueError, match="method must be one of rollout, attention, colour; got 'color'"):
        explain(small_vit(), image, "color")


def test_threads_that_share_a_model_in_training():
    """All see it in evaluation mode, and it is in training mode again after the last."""
    model = small_vit(drop_path_rate=0.5, proj_drop_rate=0.5, attn_drop_rate=0.5)
    image = torch.randn(3, 32, 32)
    wanted = [explain(model, image, method).heat for method in ("rollout", "attention")]
    model.train()
    model.blocks[1].eval()
    before = [part.training for part in model.modules()]
    barrier, found = threading.Barrier(8), []

    def work() -> None:
        barrier.wait()
        found.extend([explain(model, image, name).heat for name in ("rollout", "attention")] for _ in range(5))

    threads = [threading.Thread(target=work) for _ in range(8)]
    [thread.start() for thread in threads]
    [thread.join() for thread in threads]
    assert len(found) == 40
    for heats in found:
        assert_close(heats, wanted)
    assert [part.training for part in model.modules()] == before


def test_explain_leaves_the_model_as_it_was():
    model = small_vit(drop_path_rate=0.5).train()
    model.blocks[1].eval()
    before = [module.training for module in model.modules()]
    first, second = (explain(model, torch.ones(3, 32, 32)).heat for _ in range(2))
    assert torch.equal(first, second)
    assert [module.training for module in model.modules()] == before
    with pytest.raises(ValueError, match="layers must lie in 1 … 3"):
        explain(model, torch.ones(3, 32, 32), layer=4)
    assert [module.training for module in model.modules()] == before


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"method": "rolout"}, "method must be one of rollout, attention; got 'rolout': did you mean rollout?"),
        ({"method": "rollout", "heads": 1}, "rollout fuses heads by mean, max or min; got 1"),
        ({"method": "attention", "discard": 0.5}, "discard belongs to rollout; got discard=0.5"),
        ({"layer": 0}, "layers must be numbers from 1"),
        ({"method": "attention", "heads": 7}, r"heads must lie in 0 … 2 at layer 1, which has 3 heads; got \[7\]"),
    ],
)
def test_explain_refuses(given, message):
    with pytest.raises(ValueError, match=message):
        explain(small_vit(), torch.randn(3, 32, 32), **given)


@pytest.mark.parametrize("image", [torch.zeros(2, 3, 32, 32), torch.zeros(32, 32), torch.zeros(3, 32, 32).byte()])
def test_explain_takes_one_prepared_image(image):
    with pytest.raises(ValueError, match="image must be one prepared image"):
        explain(small_vit(), image)
