"""A model and an image -> explanations, by the name of a method; the model is left as it was."""

from __future__ import annotations

import threading

import numpy as np
import pytest
import torch
from torch.testing import assert_close

from vitrail.explain.maps import (
    METHODS,
    Explained,
    attention_depth,
    attention_map,
    explain,
    explain_layers,
    rollout_map,
)
from vitrail.explain.record import AttentionMap, record_attention
from vitrail.records import Explanation


def test_explain_by_rollout(small_vit):
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


def test_explain_by_attention(small_vit):
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
def test_models_without_a_class_token_are_explained(pool, method, small_vit):
    heat = explain(small_vit(class_token=False, global_pool=pool), torch.randn(3, 32, 40), method).heat
    assert heat.shape == (4, 5)
    assert_close(heat.sum(), torch.tensor(1.0))


@pytest.mark.parametrize("pool", ["token", "avg", "map"])
def test_all_layers_in_one_pass(pool, small_vit):
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
    numbers = np.array([3, 1])
    again = explain_layers(model, image, "attention", layers=numbers, heads=numbers[1]).maps
    assert [(m.layer, m.heads) for m in again] == [(3, "1"), (1, "1")]
    assert [m.layer for m in explain_layers(model, image, "attention", layers=2).maps] == [2]
    ends = explain_layers(model, image, layers=[2, 1]).maps
    assert [m.layer for m in ends] == [2, 1]
    for end in ends:
        assert_close(end.heat, rollout_map(record.maps[: end.layer])[0])


@pytest.mark.parametrize(("pool", "rows"), [("token", 1), ("avg", 16)])
def test_no_more_is_recorded_than_is_shown(pool, rows, monkeypatch, small_vit):
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


def test_a_method_is_added_in_one_place(monkeypatch, small_vit):
    def by_colour(model, batch, asked):
        return Explained([Explanation(method="colour", heat=batch[0].mean(0))], model(batch))

    monkeypatch.setitem(METHODS, "colour", by_colour)
    image = torch.randn(3, 32, 32)
    assert_close(explain(small_vit(), image, "colour").heat, image.mean(0))
    with pytest.raises(ValueError, match="method must be one of rollout, attention, colour; got 'color'"):
        explain(small_vit(), image, "color")


def test_threads_that_share_a_model_in_training(small_vit):
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


def test_explain_leaves_the_model_as_it_was(small_vit):
    model = small_vit(drop_path_rate=0.5).train()
    model.blocks[1].eval()
    before = [module.training for module in model.modules()]
    first, second = (explain(model, torch.ones(3, 32, 32)).heat for _ in range(2))
    assert torch.equal(first, second)
    assert [module.training for module in model.modules()] == before
    with pytest.raises(ValueError, match=r"layers must lie in 1 … 3, the attention layers that ran; got \[4\]"):
        explain(model, torch.ones(3, 32, 32), layer=4)
    assert [module.training for module in model.modules()] == before


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"method": "rolout"}, "method must be one of rollout, attention; got 'rolout': did you mean rollout?"),
        ({"method": "rollout", "heads": 1}, "rollout fuses heads by mean, max or min; got 1"),
        ({"method": "attention", "discard": 0.5}, "discard belongs to rollout; got discard=0.5"),
        ({"layer": 0}, "layers must be numbers from 1"),
        ({"layer": "a"}, "layers must be numbers from 1, or None for all; got 'a'"),
        ({"layer": 2.0}, "layers must be numbers from 1, or None for all; got 2.0"),
        ({"layer": [True]}, r"layers must be numbers from 1, or None for all; got \[True\]"),
        ({"layer": [1, "2"]}, r"layers must be numbers from 1, or None for all; got \[1, '2'\]"),
        ({"layer": []}, r"layers must be numbers from 1, or None for all; got \[\]"),
        ({"method": "attention", "heads": True}, "all or a head's number from 0; got True"),
        ({"method": "attention", "heads": 1.5}, "all or a head's number from 0; got 1.5"),
        ({"method": "attention", "heads": [0, 1]}, r"all or a head's number from 0; got \[0, 1\]"),
        ({"heads": [0, 1]}, r"rollout fuses heads by mean, max or min; got \[0, 1\]"),
        ({"discard": "a"}, "discard is a fraction of the weights, in .0, 1.; got a"),
        ({"method": "attention", "heads": 7}, r"heads must lie in 0 … 2 at layer 1, which has 3 heads; got \[7\]"),
    ],
)
def test_explain_refuses(given, message, small_vit):
    with pytest.raises(ValueError, match=message):
        explain(small_vit(), torch.randn(3, 32, 32), **given)


@pytest.mark.parametrize(
    "image", [torch.zeros(2, 3, 32, 32), torch.zeros(32, 32), torch.zeros(3, 32, 32).byte(), "cat.jpg", None]
)
def test_explain_takes_one_prepared_image(image, small_vit):
    with pytest.raises(ValueError, match="image must be one prepared image"):
        explain(small_vit(), image)


@pytest.mark.parametrize("method", METHODS)
def test_of_layers_that_are_not_there_only_those_asked_for_are_named(method, small_vit):
    """Rollout needs every layer below, which nobody named."""
    with pytest.raises(ValueError, match=r"layers must lie in 1 … 3, the attention layers that ran; got \[99\]"):
        explain_layers(small_vit(), torch.randn(3, 32, 32), method, layers=[2, 99])
