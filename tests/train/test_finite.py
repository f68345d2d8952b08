"""Losses and gradients that are not finite: no step is taken from them, and the run ends or goes on as it was told."""

from __future__ import annotations

import csv
import math
from itertools import pairwise

import pytest
import torch

from vitrail.train import engine
from vitrail.train.config import TrainConfig
from vitrail.train.engine import fit
from vitrail.train.finite import NAMED, FiniteGuard, NonFiniteLoss, Place, first_bad_layer, skips_allowed
from vitrail.train.optim import OptimConfig, make_optimizer

PLACE = Place(0, 2, 2, 0.1)


@pytest.mark.parametrize("on_nan", ["", "skip", "skip:0", "skip:-1", "skip:1.5", "halt", "skip:9999999999"])
def test_a_policy_is_stop_or_a_number_of_steps(on_nan):
    assert (skips_allowed("stop"), skips_allowed("skip:7")) == (0, 7)
    with pytest.raises(ValueError, match=rf"--on-nan must be stop, or skip:N .*; got '{on_nan}'"):
        TrainConfig(on_nan=on_nan)


@pytest.mark.parametrize("fused", [True, False])
def test_a_fused_optimiser_off_the_cpu_is_told_without_waiting(fused):
    """Whether it is fused its groups say, which a checkpoint may have brought; nothing on `meta` can be waited for."""
    weight = torch.nn.Parameter(torch.ones(2, device="meta"))
    weight.grad = torch.ones(2, device="meta")
    optimizer = torch.optim.AdamW([weight], fused=None if fused else True)
    optimizer.param_groups[0]["fused"] = fused
    guard = FiniteGuard(torch.nn.ParameterList([weight]), 0, 0.0)
    if fused:
        guard.clip_or_skip(optimizer, PLACE)
    else:
        with pytest.raises(RuntimeError, match="meta"):
            guard.clip_or_skip(optimizer, PLACE)
    assert hasattr(optimizer, "found_inf") is fused


def test_a_place_names_some_of_its_samples():
    assert str(PLACE) == "epoch 1, batch 3, step 3, at lr 0.1"
    ids = tuple(f"{n}.png" for n in range(NAMED + 2))
    assert str(PLACE._replace(ids=ids)).endswith("at lr 0.1, with 0.png, 1.png, 2.png, 3.png, 4.png and 2 more")


def batches(bad, value, count=6, size=4):
    """Batches of ready images, the one numbered `bad` holding `value` in one pixel."""
    generator = torch.Generator().manual_seed(1)
    made = [torch.randn(size, 3, 8, 8, generator=generator) for _ in range(count)]
    if bad is not None:
        made[bad][2, 0, 0, 0] = value
    ids = [[f"{n}/{row}.png" for row in range(size)] for n in range(count)]
    return [{"image": x, "label": torch.arange(size) % 3, "id": names} for x, names in zip(made, ids, strict=True)]


def recipe(**changes):
    return TrainConfig(**({"epochs": 1, "lr": 1e-2, "device": "cpu"} | changes))


@pytest.mark.fault(40)
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_to_stop_names_step_rate_samples_and_layer(value, make_task, fingerprint):
    task, seen = make_task(), []

    def augment(batch, number, total):
        seen.append(fingerprint(task))
        return batch

    words = r"got nan in epoch 1, batch 4, step 4, at lr 0\.0\d+, with 3/0\.png, 3/1\.png, .*3/3\.png, first after "
    with pytest.raises(NonFiniteLoss, match=words + r"backbone\.patch_embed\.proj: lower --lr"):
        fit(task, batches(3, value), None, recipe(), augment=augment)
    assert fingerprint(task) == seen[3]


@pytest.mark.fault(40)
def test_a_skipped_step_is_as_if_it_had_not_been(make_task, tmp_path):
    """Weights and moments stay; what counts is that later steps go on from there, and the history says so."""
    task, states = make_task(), []

    def augment(batch, number, total):
        states.append({name: p.detach().clone() for name, p in task.named_parameters()})
        return batch

    history = fit(task, batches(3, math.nan), None, recipe(on_nan="skip:1"), augment=augment, out=tmp_path)
    same = [all(torch.equal(a[name], b[name]) for name in a) for a, b in pairwise(states)]
    assert same == [False, False, False, True, False]
    assert history["skipped_steps"] == [1]
    assert math.isfinite(history["train_loss"][0])
    assert all(p.isfinite().all() for p in task.parameters())
    with (tmp_path / "history.csv").open() as file:
        assert next(csv.DictReader(file))["skipped_steps"] == "1"


@pytest.mark.fault(40)
def test_one_step_too_many_ends_the_run(make_task):
    loader = [batches(0, math.nan)[0]] * 3
    with pytest.raises(NonFiniteLoss, match=r"got one of backbone\.head\.bias that is not, .*, batch 3.* after 2 st"):
        fit(make_task(), loader, None, recipe(on_nan="skip:2"))
    history = fit(make_task(), loader, None, recipe(on_nan="skip:3"))
    assert history["skipped_steps"] == [3]
    assert math.isnan(*history["train_loss"]), "no loss was counted"


@pytest.mark.fault(41)
@pytest.mark.parametrize("clip", [0, 1.0])
def test_a_gradient_alone_may_be_the_bad_one(clip, make_task, fingerprint):
    """The loss is finite, the gradient is not: clipping would spread it to every weight."""
    task, before = make_task(), []

    def augment(batch, number, total):
        before.append(fingerprint(task))
        if number == 2:
            task.backbone.blocks[0].mlp.fc1.weight.register_hook(lambda grad: grad * math.inf)
        return batch

    with pytest.raises(NonFiniteLoss, match=r"got one of backbone\.blocks\.0\.mlp\.fc1\.weight that is not"):
        fit(task, batches(None, 0), None, recipe(clip_grad=clip), augment=augment)
    assert fingerprint(task) == before[2]


@pytest.mark.fault(40)
def test_the_count_goes_on_after_a_resume(train, make_task, tmp_path):
    def poison(number):
        if number in (3, 11):
            torch.nn.init.constant_(task.backbone.head.bias, 0)
            hook = task.backbone.head.weight.register_hook(lambda grad: hook.remove() or grad * math.nan)

    task = make_task()
    train(task, out=tmp_path, epochs=1, on_nan="skip:2", hook=poison)
    task = make_task()
    history = train(task, out=tmp_path, epochs=2, on_nan="skip:2", hook=poison, resume=True)
    assert history["skipped_steps"] == [1, 2]


def test_an_accelerator_is_told_by_a_tensor(make_task, fingerprint, monkeypatch):
    """As a fused optimiser on a GPU is: nothing waits, the step is left out by the kernel, and counted when read."""
    task = make_task()
    guard, optimizer = FiniteGuard(task, 1, 1.0), make_optimizer(task, OptimConfig(lr=0.1))
    assert optimizer.defaults["fused"]
    for p in task.parameters():
        p.grad = torch.full_like(p, math.inf)
    before = fingerprint(task)
    optimizer.found_inf = torch.ones(())  # what `clip_or_skip` sets there
    optimizer.step()
    assert fingerprint(task) == before
    guard._unread = [(torch.tensor(bad), PLACE._replace(batch=n)) for n, bad in enumerate((True, False, True))]
    with pytest.raises(NonFiniteLoss, match="got one that is not, in epoch 1, batch 3, .* after 1 steps were left out"):
        guard.flush()
    assert guard.skipped == 2


def test_looking_for_a_layer_leaves_no_hook(make_task):
    task = make_task()
    torch.nn.init.constant_(task.backbone.blocks[1].norm1.weight, math.inf)
    assert first_bad_layer(task, batches(None, 0)[0]) == "backbone.blocks.1.norm1"
    assert not any(part._forward_hooks for part in task.modules())
    assert first_bad_layer(make_task(), batches(None, 0)[0]) == ""


def test_losses_read_in_bunches_come_after_their_gradients(make_task, monkeypatch):
    plain = engine.LossMeter
    monkeypatch.setattr(engine, "LossMeter", lambda _, skipping: plain(3, skipping))
    with pytest.raises(NonFiniteLoss, match="gradients must stay finite; got one of backbone"):
        fit(make_task(), batches(3, math.nan), None, recipe())
