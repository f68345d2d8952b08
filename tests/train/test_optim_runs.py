"""Whole runs with every optimiser: the loss falls, and a stopped run ends as the one that nobody stopped."""

from __future__ import annotations

import os
import signal
import sys

import pytest
import torch

from vitrail.train import optim
from vitrail.train.changes import go_on
from vitrail.train.checkpoint import read
from vitrail.train.config import TrainConfig
from vitrail.train.engine import Interrupted, fit
from vitrail.train.finite import NonFiniteLoss
from vitrail.weights.load import load_model

LR = {"adamw": 1e-2, "sgd": 0.1, "muon": 1e-2, "lamb": 2e-2, "lion": 1e-3, "schedule_free": 2e-2}
SCHEDULE = {
    "adamw": {"schedule": "step", "decay_epochs": 1.0, "decay_rate": 0.5},
    "sgd": {"schedule": "linear", "warmup_steps": 3},
    "muon": {"schedule": "restarts", "restart_steps": 5, "restart_factor": 2.0},
    "lamb": {"schedule": "constant"},
    "lion": {"schedule": "cosine"},
    "schedule_free": {"warmup_epochs": 1.0},
}
NAMES = sorted(LR)


def recipe(name):
    return {"optimizer": name, "lr": LR[name], "layer_decay": 0.8, "mixup": 0.2, **SCHEDULE[name]}


def stop_at(batch):
    def hook(number):
        if number == batch:
            os.kill(os.getpid(), signal.SIGINT)

    return hook


@pytest.mark.parametrize("name", NAMES)
def test_the_loss_falls(name, train):
    assert set(LR) == set(SCHEDULE) == set(optim.OPTIMIZERS)
    history = train(epochs=6, **recipe(name) | {"mixup": 0.0})
    assert history["val_loss"][-1] < 0.8 * history["val_loss"][0]
    assert history["val_accuracy"][-1] > 0.6


@pytest.mark.fault(42)
@pytest.mark.parametrize(("name", "stop"), [*((name, 5) for name in NAMES), ("muon", 8), ("schedule_free", 8)])
def test_a_resumed_run_is_bit_identical(name, stop, train, make_task, fingerprint, tmp_path):
    """Within an epoch and where the next begins: with momentum, counts and averages as they were."""
    whole, again = make_task(), make_task(seed=1)
    history = train(whole, out=tmp_path / "whole", **recipe(name))
    with pytest.raises(Interrupted):
        train(out=tmp_path / "run", hook=stop_at(stop), **recipe(name))
    resumed = train(again, out=tmp_path / "run", resume=True, **recipe(name))
    assert fingerprint(again) == fingerprint(whole)
    assert (resumed["lr"], resumed["val_loss"]) == (history["lr"], history["val_loss"])
    last = tmp_path / "run" / "checkpoints" / "last.ckpt"
    assert torch.load(last, weights_only=True)["optimizer_states"][0]["state"]


@pytest.mark.parametrize("name", NAMES)
def test_mixed_precision(name, train):
    history = train(epochs=2, precision="bf16", **recipe(name))
    assert history["train_loss"][1] < history["train_loss"][0]


@pytest.mark.parametrize("name", NAMES)
def test_a_step_that_is_left_out(name, train, make_task):
    """A gradient that is infinite moves nothing."""
    history = train(_overflows(make_task()), epochs=2, on_nan="skip:1", **recipe(name))
    assert history["skipped_steps"] == [1, 1]
    with pytest.raises(NonFiniteLoss, match="gradients must stay finite"):
        train(_overflows(make_task()), epochs=1, **recipe(name))


def _overflows(task):
    """The gradient of the third batch is infinite."""
    batches, plain = [], task.forward
    task.forward = lambda batch: (batches.append(1), plain(batch))[1]
    task.backbone.head.weight.register_hook(lambda grad: grad * (float("inf") if len(batches) == 3 else 1.0))
    return task


@pytest.mark.parametrize("name", NAMES)
def test_every_depth_is_trained_at_its_own_rate(name, train, monkeypatch):
    made, plain = [], optim.make_optimizer
    monkeypatch.setattr("vitrail.train.engine.make_optimizer", lambda *a, **o: made.append(plain(*a, **o)) or made[-1])
    history = train(epochs=1, **recipe(name))
    (rate,) = history["lr"]
    assert {g["lr_scale"]: g["lr"] for g in made[-1].param_groups} == pytest.approx(
        {scale: rate * scale for scale in (0.8**3, 0.8**2, 0.8, 1.0)}
    )


# ---- schedule-free: what answers is the average


def test_what_answers_is_the_average_that_its_authors_make(train, make_task, tmp_path):
    """Validated, kept and given to the task: the weights that the library's own `eval()` would put in."""
    seen, task = [], make_task()
    update = task.update
    task.update = lambda metrics, batch: (
        seen.append(task.backbone.head.weight.detach().clone()),
        update(metrics, batch),
    )
    train(task, out=tmp_path, epochs=1, **recipe("schedule_free"))
    state = torch.load(tmp_path / "checkpoints" / "last.ckpt", weights_only=True)
    weights, own = make_task(seed=1), {n.removeprefix("task."): v for n, v in state["state_dict"].items()}
    weights.load_state_dict(own)
    optimizer = optim.make_optimizer(weights, TrainConfig(**recipe("schedule_free")))
    optimizer.load_state_dict(state["optimizer_states"][0])
    optimizer.parts[0].eval()
    for name, p in weights.named_parameters():
        torch.testing.assert_close(dict(task.named_parameters())[name], p)
        assert not torch.equal(p, own[name])
    assert torch.equal(seen[-1], task.backbone.head.weight)
    assert torch.equal(load_model(tmp_path / "model").head.weight, task.backbone.head.weight)


def test_without_a_folder_the_task_ends_with_the_average(train, make_task, fingerprint, tmp_path):
    tasks = make_task(), make_task()
    train(tasks[0], epochs=1, **recipe("schedule_free"))
    train(tasks[1], out=tmp_path, epochs=1, **recipe("schedule_free"))
    assert fingerprint(tasks[0]) == fingerprint(tasks[1])


def test_without_validation_the_average_is_that_of_the_end(make_task, fingerprint, tmp_path):
    images = torch.randn(8, 3, 8, 8, generator=torch.Generator().manual_seed(1))
    loader = [(images, torch.arange(8) % 3)] * 3
    config = TrainConfig(epochs=2, device="cpu", **recipe("schedule_free"))
    tasks = make_task(), make_task()
    fit(tasks[0], loader, None, config)
    fit(tasks[1], loader, None, config, out=tmp_path)
    assert fingerprint(tasks[0]) == fingerprint(tasks[1])


def test_frozen_weights_are_their_own_average(train, make_task):
    task = make_task()
    task.backbone.blocks.requires_grad_(False)
    before = task.backbone.blocks[0].mlp.fc1.weight.clone()
    train(task, epochs=1, **recipe("schedule_free"))
    assert torch.equal(task.backbone.blocks[0].mlp.fc1.weight, before)


def test_two_averages_are_one_too_many():
    with pytest.raises(ValueError, match="--ema must be 0 with --optimizer schedule_free, which averages; got 0.9"):
        TrainConfig(optimizer="schedule_free", ema=0.9)


# ---- what cannot be made, and what changes in the course of a run


@pytest.mark.parametrize("resume", [False, True])
def test_what_cannot_be_made_leaves_no_trace(resume, train, tmp_path, monkeypatch):
    if resume:
        with pytest.raises(Interrupted):
            train(out=tmp_path / "run", hook=stop_at(5), **recipe("lion"))
    before = sorted(tmp_path.rglob("*"))
    monkeypatch.setitem(sys.modules, "timm.optim.lion", None)
    with pytest.raises(ValueError, match="--optimizer lion needs the timm package"):
        train(out=tmp_path / "run", resume=resume, **recipe("lion"))
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.fault(45)
@pytest.mark.parametrize(
    ("was", "found"), [("adamw", "muon"), ("muon", "sgd"), ("schedule_free", "adamw"), ("adamw", "schedule_free")]
)
def test_another_optimizer_begins_its_moments_anew(was, found, train, make_task, tmp_path, caplog):
    """If it is overridden; whatever else is another's by default is told of with it."""
    told = [{"optimizer": name, "lr": 1e-2, "weight_decay": 0.05, "schedule": "constant"} for name in (was, found)]
    with pytest.raises(Interrupted):
        train(out=tmp_path, hook=stop_at(11), **told[0])
    with pytest.raises(ValueError, match=f"told before; --optimizer was {was}, got {found}.*--override optimizer"):
        train(out=tmp_path, resume=True, **told[1])
    names = ["optimizer", "momentum"] if "muon" in (was, found) else ["optimizer"]
    history = train(make_task(seed=1), out=tmp_path, resume=True, override=names, **told[1])
    assert history["epoch"] == [1, 2, 3]
    assert f"the moments of {was} are left behind: those of {found} begin anew" in caplog.text


@pytest.mark.fault(45)
def test_layer_decay_can_be_overridden_and_keeps_the_moments(train, make_task, tmp_path):
    with pytest.raises(Interrupted):
        train(out=tmp_path, hook=stop_at(11))
    with pytest.raises(ValueError, match=r"told before; --layer-decay was 1\.0, got 0\.5: "):
        train(out=tmp_path, resume=True, layer_decay=0.5)
    moments = read(tmp_path / "checkpoints" / "last.ckpt")["optimizer_states"][0]["state"]
    assert len(train(make_task(), out=tmp_path, resume=True, override=["layer_decay"], layer_decay=0.5, epochs=3)) == 3
    after = read(tmp_path / "checkpoints" / "last.ckpt")["optimizer_states"][0]["state"]
    assert {float(s["step"]) for s in after.values()} == {max(float(s["step"]) for s in moments.values()) + 12}


@pytest.mark.fault(45)
def test_what_a_checkpoint_does_not_know_of_was_as_it_is_by_default(train, make_task, tmp_path):
    """A run that began before there was a setting; and saying a default aloud is no other setting."""
    train(out=tmp_path, epochs=1, lr=3e-4)
    last = tmp_path / "checkpoints" / "last.ckpt"
    state = torch.load(last, weights_only=True)
    now = dict(state["told"])
    for name in ("optimizer", "layer_decay", "schedule", "momentum", "warmup_steps"):
        del state["told"][name]
    torch.save(state, last)
    assert not go_on(last, now, make_task()).changed
    with pytest.raises(ValueError, match="told before; --optimizer was adamw, got lion: "):
        go_on(last, now | {"optimizer": "lion"}, make_task())
    said = {"lr": 3e-4, "min_lr": 1e-6, "momentum": 0.9, "schedule": "cosine", "warmup_epochs": 5.0}
    assert len(train(out=tmp_path, resume=True, **said | {"epochs": 2})) == 2
