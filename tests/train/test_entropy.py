"""Attention that looks at one token alone is seen, named once, and stands in the history."""

from __future__ import annotations

import csv
import math

import pytest
import torch

from vitrail.models.registry import build_model
from vitrail.tasks.classify import Classify
from vitrail.train.entropy import entropy, layer_entropies, said


def sharpen(task: Classify, block: int) -> None:
    """Makes every query of a block look at the key that is most like it in one direction."""
    with torch.no_grad():
        task.backbone.blocks[block].attn.qkv.weight.mul_(1e3)


def test_the_formula():
    weights = torch.tensor([[0.5, 0.5, 0.0, 0.0], [0.25, 0.25, 0.25, 0.25]])
    assert entropy(weights[:1]) == pytest.approx(math.log(2) / math.log(4))
    assert entropy(weights) == pytest.approx(0.75)
    assert entropy(torch.eye(5)) == 0


def test_a_layer_that_looks_at_one_key_is_the_low_one(make_task):
    task = make_task()
    sharpen(task, 1)
    found = layer_entropies(task, torch.randn(2, 3, 8, 8))
    assert set(found) == {1, 2}
    assert found[2] < 0.02 < 0.9 < found[1]


def test_looking_changes_neither_modes_nor_random_numbers_nor_gradients(make_task):
    task = make_task().train()
    before = torch.get_rng_state()
    layer_entropies(task, torch.zeros(2, 3, 8, 8))
    assert torch.equal(torch.get_rng_state(), before)
    assert all(module.training for module in task.modules())
    assert all(p.grad is None for p in task.parameters())


def test_what_has_no_attention_is_passed_by():
    task = Classify(build_model("resnet_debug", num_classes=3))
    assert layer_entropies(task, torch.randn(2, 3, *task.backbone.preprocess.img_size)) == {}


def test_it_is_named_once_and_stands_in_the_history(train, make_task, tmp_path, caplog):
    task = make_task()
    sharpen(task, 1)
    history = train(task, out=tmp_path, epochs=3, lr=1e-8)
    told = [message for message in caplog.messages if "attention looks at single tokens" in message]
    assert len(told) == 1
    assert told[0].startswith("epoch 1: attention looks at single tokens in layer 2 (under 0.001), with less than 0.02")
    assert "--entropy-floor 0" in told[0] and "qk_norm" in told[0]
    assert all(0 <= value < 0.02 for value in history["attention_entropy"])
    with (tmp_path / "history.csv").open() as file:
        row = next(csv.DictReader(file))
    assert float(row["attention_entropy"]) == history["attention_entropy"][0]
    assert "val_accuracy" in row, "validation's figures stand beside it"


def test_what_is_below_a_floor_is_not_said_to_be_at_it():
    assert [said(value) for value in (0.0199999, 0.5, 0.001, 0.00099, 0.0)] == [
        "0.019", "0.500", "0.001", "under 0.001", "under 0.001",
    ]  # fmt: skip


def test_it_is_named_again_once_it_had_recovered(train, make_task, caplog):
    task = make_task()
    sharpen(task, 1)
    ended = []

    def hook(number):
        if number in (8, 16):
            with torch.no_grad():
                task.backbone.blocks[1].attn.qkv.weight.mul_(1e-3 if number == 8 else 1e3)
        ended.append(number)

    train(task, epochs=3, lr=1e-8, hook=hook)
    assert len(ended) == 24
    told = [message for message in caplog.messages if "attention looks at single tokens" in message]
    assert [message.partition(":")[0] for message in told] == ["epoch 1", "epoch 3"]


def test_it_can_be_switched_off(train, make_task, caplog):
    task = make_task()
    sharpen(task, 1)
    history = train(task, epochs=1, lr=1e-8, entropy_floor=0.0)
    assert "attention_entropy" not in history.rows[0]
    assert not any("attention looks" in message for message in caplog.messages)
