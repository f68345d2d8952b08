"""Whole runs: what they write, what they say, how they end."""

from __future__ import annotations

import csv
import json
import logging
import re
import threading
import time
import warnings
from pathlib import Path

import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset

from vitrail.folder import read_card, read_weights
from vitrail.train import engine, machine
from vitrail.train.config import TrainConfig
from vitrail.train.engine import fit
from vitrail.train.finite import NonFiniteLoss

FIGURES = {"epoch", "lr", "train_loss", "val_loss", "val_accuracy", "val_balanced_accuracy", "val_ece"}


def test_a_run_learns_and_leaves_its_folder(train, make_task, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    task = make_task()
    history = train(task, out="runs/a", epochs=6, ema=0.5, checkpoint_every=2)
    files = {str(p.relative_to(tmp_path)) for p in tmp_path.rglob("*") if p.is_file()}
    kept = {
        f"runs/a/checkpoints/{name}.ckpt"
        for name in ("last", "previous", "best", "epoch_002", "epoch_004", "epoch_006")
    }
    model = {f"runs/a/model/{name}" for name in ("model.safetensors", "config.json", "manifest.json")}
    assert files == kept | model | {f"runs/a/{name}" for name in ("config.yaml", "images.jsonl", "history.csv")}
    assert set(history.rows[0]) == FIGURES | {"attention_entropy", "seconds", "images_per_second", "data_wait"}
    assert history["val_accuracy"][-1] > 0.9
    assert history["lr"][-1] == pytest.approx(1e-6)
    assert TrainConfig.from_yaml("runs/a/config.yaml").epochs == 6
    with Path("runs/a/history.csv").open(newline="", encoding="utf-8") as file:
        assert [float(row["train_loss"]) for row in csv.DictReader(file)] == history["train_loss"]


def test_the_model_folder_holds_the_best_weights(train, make_task, images, tmp_path):
    """Those that gave the best validation figure: the average's, of the best epoch, not of the last."""
    task = make_task()
    history = train(task, out=tmp_path, epochs=4, ema=0.5)
    best = max(reversed(history.rows), key=lambda row: row["val_accuracy"])
    logits = task.eval().logits(images[1].gather(range(30)))
    accuracy = (logits.argmax(-1) == images[1].labels).float().mean().item()
    assert accuracy == pytest.approx(best["val_accuracy"])
    loss = torch.nn.functional.cross_entropy(logits, images[1].labels).item()
    assert loss == pytest.approx(best["val_loss"], abs=1e-5)
    weights, card = read_weights(tmp_path / "model"), read_card(tmp_path / "model")
    assert card.training["figures"]["val_accuracy"] == best["val_accuracy"]
    assert card.training["recipe"]["lr"] == 1e-2
    torch.testing.assert_close(dict(weights), dict(task.backbone.state_dict()), rtol=0, atol=0)


def test_the_best_may_be_an_early_epoch(train, make_task, fingerprint, tmp_path, monkeypatch):
    scores = iter([0.9, 0.1, 0.2])
    monkeypatch.setattr(engine.TaskModule, "on_validation_epoch_end", _score(scores))
    states = {}
    task = make_task()
    train(task, out=tmp_path, hook=lambda n: states.setdefault(n // 8, fingerprint(task)))
    assert fingerprint(task) == states[1]  # as the second epoch found them


def _score(scores):
    def on_validation_epoch_end(self):
        self.record.figures = {"val_accuracy": next(scores)}

    return on_validation_epoch_end


def test_plain_lines_where_there_is_no_terminal(train, capsys):
    train(epochs=2)
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 2
    names = ("loss", "val_loss", "val_accuracy")
    figures = "  ".join(rf"{name} \d\.\d{{4}}" for name in names)
    assert re.fullmatch(rf"epoch 1/2  {figures}  lr \S+  \d+ images/s  \S+ s  left 0:00:\d\d", lines[0])


def test_a_bar_on_a_terminal(train, capsys, monkeypatch):
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("TTY_COMPATIBLE", "1")
    train(epochs=2)
    out = capsys.readouterr().out
    assert "images/s  left" in out
    assert "epoch 2/2" in out


def test_an_error_leaves_no_bar_behind(train, monkeypatch):
    monkeypatch.setenv("FORCE_COLOR", "1")
    seen = []
    with pytest.raises(RuntimeError, match="by accident"):
        train(hook=lambda number: _raise(number, seen))
    assert seen  # rich draws in a thread of its own, which is told to end but not waited for
    for thread in seen:
        thread.join(timeout=10)
    assert not any(thread.is_alive() for thread in seen)


def _drawing():
    return [thread for thread in threading.enumerate() if type(thread).__module__.startswith("rich.")]


def _raise(number, seen):
    seen += _drawing()
    raise RuntimeError("by accident")


def test_nothing_of_lightning_is_heard(train, capfd):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        train(epochs=1)
        train(epochs=1, ema=0.9, precision="bf16")
    assert "Trainer" not in "".join(capfd.readouterr())
    assert logging.getLogger("lightning.pytorch").level != logging.WARNING


@pytest.mark.fault(40)
@pytest.mark.parametrize("every", [1, 20])
def test_a_loss_that_is_not_finite_stops_the_run(every, train, make_task, tmp_path, monkeypatch):
    """On the CPU before the update; where losses are read in bunches, before anything is kept."""
    monkeypatch.setattr(engine, "LossMeter", lambda _, skipping: _METER(every, skipping))
    task = make_task()

    def poison(number):
        if number == 12:
            torch.nn.init.constant_(task.backbone.head.bias, float("nan"))

    with pytest.raises(NonFiniteLoss, match=r"in epoch 2, batch 5, step 13, at lr 0\.00\d+, with \d.* and 3 more"):
        train(task, out=tmp_path, hook=poison)
    kept = torch.load(tmp_path / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"]
    assert all(t.isfinite().all() for t in kept.values())


_METER = engine.LossMeter


@pytest.mark.fault(40)
def test_on_the_cpu_a_bad_loss_never_reaches_the_weights(make_task, fingerprint):
    task = make_task()
    before, loader = fingerprint(task), [(torch.full((2, 3, 8, 8), float("nan")), torch.tensor([0, 1]))]
    with pytest.raises(NonFiniteLoss, match="got nan in epoch 1, batch 1"):
        fit(task, loader, None, TrainConfig(device="cpu"))
    assert fingerprint(task) == before


@pytest.mark.fault(40)
def test_weights_that_are_not_finite_are_never_kept(train, make_task, tmp_path):
    task = make_task()

    def poison(step, total):
        if step == 8:  # after the last batch of an epoch, so that no loss shows it
            torch.nn.init.constant_(task.backbone.norm.weight, float("inf"))

    task.after_step = poison
    with pytest.raises(NonFiniteLoss, match="weights must stay finite"):
        train(task, out=tmp_path, clip_grad=0)
    assert not (tmp_path / "checkpoints" / "last.ckpt").exists()


def test_accumulation_equals_the_large_batch(images, make_task):
    """Four batches of 15 in steps of two are two batches of 30, without dropout."""
    config = {"epochs": 2, "lr": 1e-2, "device": "cpu", "warmup_epochs": 0, "clip_grad": 0}
    weights = []
    for size, accumulate in ((15, 2), (30, 1)):
        task = make_task()
        loader = DataLoader(TensorDataset(images[0].images, images[0].labels), batch_size=size)
        fit(task, loader, None, TrainConfig(accumulate=accumulate, **config))
        weights.append(task.backbone.head.weight.detach())
    torch.testing.assert_close(*weights, rtol=1e-3, atol=1e-5)


def test_the_loop_is_the_plain_loop(images, make_task):
    """A bare loop with the same optimiser and rates ends in the same weights."""
    from vitrail.train.optim import make_optimizer
    from vitrail.train.schedules import Plan, rate

    config = TrainConfig(epochs=2, lr=1e-2, device="cpu", warmup_epochs=1, clip_grad=0.1)
    ours, plain = make_task(), make_task()
    loader = DataLoader(TensorDataset(images[0].images, images[0].labels), batch_size=20)
    fit(ours, loader, None, config)
    optimizer, step = make_optimizer(plain, config), 0
    plan = Plan("cosine", total=6, warmup=3, lr=1e-2, min_lr=1e-6)
    for _ in range(2):
        for item in loader:
            optimizer.param_groups[0]["lr"] = optimizer.param_groups[1]["lr"] = rate(step, plan)
            optimizer.zero_grad()
            plain(plain.prepare(item))["loss"].backward()
            torch.nn.utils.clip_grad_norm_(plain.parameters(), 0.1)
            optimizer.step()
            step += 1
    torch.testing.assert_close(ours.state_dict(), plain.state_dict(), rtol=1e-5, atol=1e-7)


def test_a_plain_loader_is_taken_and_told_of(images, make_task, tmp_path, caplog):
    floats = (images[0].images.float() / 255 - 0.5) / 0.25
    loader = DataLoader(TensorDataset(floats, images[0].labels), batch_size=20, shuffle=True)
    history = fit(make_task(), loader, loader, TrainConfig(epochs=1, device="cpu"), out=tmp_path)
    assert len(history["val_accuracy"]) == 1
    assert "will not repeat it bit for bit" in caplog.text


def test_without_validation_the_last_epoch_is_kept(images, make_task, fingerprint, tmp_path):
    loader = DataLoader(TensorDataset(images[0].images, images[0].labels), batch_size=20)
    first, task = make_task(), make_task()
    fit(first, loader, None, TrainConfig(epochs=2, device="cpu"))
    history = fit(task, loader, None, TrainConfig(epochs=2, device="cpu"), out=tmp_path)
    assert "val_loss" not in history.rows[0]
    assert fingerprint(task) == fingerprint(first)


def test_without_a_folder_the_task_ends_with_the_average(train, make_task, fingerprint, tmp_path):
    kept, plain = make_task(), make_task()
    train(kept, ema=0.5, epochs=1, out=tmp_path)
    train(plain, ema=0.5, epochs=1)
    assert fingerprint(kept) == fingerprint(plain)


def test_steps_are_told_to_the_task(train, make_task):
    task, told = make_task(), []
    task.after_step = lambda step, total: told.append((step, total))
    train(task, epochs=2, accumulate=3)
    assert told == [(n, 6) for n in range(1, 7)]


def test_the_parts_of_a_loss_are_averaged_into_the_history(images, make_task, tmp_path):
    """Over images, as the loss itself is: the last batch is a small one."""
    task, seen = make_task(), []
    plain = task.forward

    def forward(batch):
        loss, half = plain(batch)["loss"], torch.tensor(float(len(batch["label"])))
        seen.append((len(batch["label"]), loss.item()))
        return {"half": half, "loss": loss}

    task.forward = forward
    loader = DataLoader(TensorDataset(images[0].images, images[0].labels), batch_size=16)
    history = fit(task, loader, None, TrainConfig(epochs=1, device="cpu"), out=tmp_path)
    assert history["train_half"] == [pytest.approx((3 * 16**2 + 12**2) / 60)]
    assert history["train_loss"] == [pytest.approx(sum(n * x for n, x in seen) / 60)]
    assert list(history.rows[0])[2:4] == ["train_loss", "train_half"]
    assert "train_half" in (tmp_path / "history.csv").read_text()


def test_a_batch_without_images_trains(make_task):
    """Views alone, as in self-supervision: counted, moved and made ready without an `image`."""
    task = make_task()
    task.check = lambda batch: None
    task.weight = lambda batch: torch.tensor(4.0)
    task.forward = lambda batch: {"loss": sum(task.backbone(view).square().mean() for view in batch["views"])}
    views = [torch.zeros(4, 3, 8, 8, dtype=torch.uint8), torch.zeros(4, 3, 4, 4)]
    history = fit(task, [{"views": views}] * 2, None, TrainConfig(epochs=2, device="cpu"))
    assert history["train_loss"][1] < history["train_loss"][0]


def test_debug_takes_a_few_batches(train):
    seen = []
    train(epochs=2, debug=True, hook=seen.append)
    assert seen == list(range(2 * machine.DEBUG_BATCHES))


def test_patience(train, monkeypatch):
    scores = iter([0.1, 0.5, 0.5, 0.4, 0.9])
    monkeypatch.setattr(engine.TaskModule, "on_validation_epoch_end", _score(scores))
    assert train(epochs=5, patience=2)["epoch"] == [1, 2, 3, 4]


def test_the_time_limit_ends_the_run_before_it_is_passed(train):
    assert train(epochs=5, max_minutes=1e-6)["epoch"] == [1]
    assert train(epochs=2, max_minutes=10)["epoch"] == [1, 2]


def test_the_share_of_an_epoch_that_waits_for_images(train, make_task, images):
    """A third of the time of training at the most, since learning takes twice as long; validation does not count."""

    class Slow(list):
        def __iter__(self):
            for item in super().__iter__():
                time.sleep(0.02)
                yield item

    batches = [(images[0].images[:8], images[0].labels[:8])] * 6
    task = make_task()

    def learn(batch, number, total):
        time.sleep(0.04)
        return task.backbone.preprocess.prepare(batch)

    config = TrainConfig(epochs=2, device="cpu", entropy_floor=0)
    history = fit(task, Slow(batches), Slow(batches * 3), config, augment=learn)
    assert all(0.15 < share < 0.34 for share in history["data_wait"]), history["data_wait"]


def test_a_device_that_is_not_here_is_refused(train, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ValueError, match=r"device must be auto or one that is here .*; got 'cuda'"):
        train(device="cuda")


def test_more_devices_than_there_are(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(ValueError, match="--devices must be at most 2, the number of cuda devices here; got 4"):
        machine.machine(TrainConfig(device="cuda", devices=4))
    assert machine.machine(TrainConfig(devices=2)) == "cuda"


def test_fp16_is_refused_where_auto_finds_a_cpu(train, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    with pytest.raises(ValueError, match="--precision must be fp32 or bf16 on the CPU; got fp16"):
        train(device="auto", precision="fp16")


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_on_a_gpu(precision, train, make_task, tmp_path):
    task = make_task()
    history = train(task, device="cuda", precision=precision, epochs=6, ema=0.5, mixup=0.2, accumulate=2, out=tmp_path)
    assert history["train_loss"][-1] < history["train_loss"][0]
    assert task.device.type == "cpu"


@pytest.mark.fault(30)
def test_a_bad_label_names_its_image(make_task):
    with pytest.raises(ValueError, match="image 1 of the batch has 7"):
        fit(make_task(), [(torch.zeros(2, 3, 8, 8), torch.tensor([0, 7]))], None, TrainConfig(device="cpu"))


def test_a_monitor_that_is_no_score(train, make_task):
    task = make_task()
    type(task).monitor, before = ("f1", "max"), type(task).monitor
    try:
        with pytest.raises(ValueError, match=r"must be one of its scores .*accuracy.*; got 'f1'"):
            train(task)
    finally:
        type(task).monitor = before


def test_what_a_killed_run_left_is_removed(train, tmp_path):
    stray = tmp_path / "checkpoints" / ".last.ckpt.0.part"
    stray.parent.mkdir()
    stray.touch()
    train(out=tmp_path, epochs=1)
    assert not stray.exists()


@pytest.mark.fault(13)
def test_a_full_disk_leaves_the_previous_checkpoint(train, make_task, tmp_path, monkeypatch):
    train(out=tmp_path, epochs=1)
    before = (tmp_path / "checkpoints" / "last.ckpt").read_bytes()

    def full(*args):
        raise OSError("no space left")

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(OSError, match="no space"):
        train(out=tmp_path, epochs=2, resume=True)
    assert (tmp_path / "checkpoints" / "last.ckpt").read_bytes() == before
    assert {p.suffix for p in Path(tmp_path / "checkpoints").iterdir()} == {".ckpt"}


def test_the_config_of_the_model_is_readable(train, tmp_path):
    train(out=tmp_path, epochs=1)
    card = json.loads((tmp_path / "model" / "config.json").read_text())
    assert card["classes"] == ["dark", "grey", "light"]
