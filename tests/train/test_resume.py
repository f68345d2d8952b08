"""A stopped and resumed run ends in the very same weights as one that was left alone."""

from __future__ import annotations

import os
import shutil
import signal

import pytest
import torch

from vitrail.train import engine
from vitrail.train.callbacks import StopRequested
from vitrail.train.engine import Interrupted

RECIPE = {"ema": 0.9, "mixup": 0.2, "accumulate": 2, "crop": "pad"}
TIMES = {"seconds", "images_per_second"}


def signal_at(stop, number=signal.SIGINT):
    def hook(batch):
        if batch == stop:
            os.kill(os.getpid(), number)

    return hook


def figures(history):
    return [{name: value for name, value in row.items() if name not in TIMES} for row in history.rows]


@pytest.fixture(scope="module")
def undisturbed_cache():
    return {}


@pytest.fixture
def undisturbed(undisturbed_cache, train, make_task, fingerprint, tmp_path):
    """Fingerprint and figures of the run that nobody stopped."""
    if not undisturbed_cache:
        task = make_task(drop_path_rate=0.2, drop_rate=0.1)
        history = train(task, out=tmp_path / "whole", **RECIPE)
        undisturbed_cache["found"] = fingerprint(task), figures(history)
    return undisturbed_cache["found"]


# eight batches an epoch, two a step
@pytest.mark.parametrize(("stop", "workers"), [(0, 0), (5, 0), (6, 0), (7, 0), (8, 0), (13, 0), (5, 2)])
def test_a_resumed_run_is_bit_identical(stop, workers, undisturbed, train, make_task, fingerprint, tmp_path):
    with pytest.raises(Interrupted, match=r"go on with: vitrail train --resume .*run"):
        train(
            make_task(drop_path_rate=0.2, drop_rate=0.1),
            out=tmp_path / "run",
            workers=workers,
            hook=signal_at(stop),
            **RECIPE,
        )
    task = make_task(seed=1, drop_path_rate=0.2, drop_rate=0.1)  # whose own weights must not matter
    history = train(task, out=tmp_path / "run", workers=workers, resume=True, **RECIPE)
    assert (fingerprint(task), figures(history)) == undisturbed


def test_two_stops_in_one_epoch(undisturbed, train, make_task, fingerprint, tmp_path):
    for resume, stop in ((False, 9), (True, 12)):
        with pytest.raises(Interrupted):
            train(
                make_task(drop_path_rate=0.2, drop_rate=0.1),
                out=tmp_path,
                resume=resume,
                hook=signal_at(stop),
                **RECIPE,
            )
    task = make_task(seed=1, drop_path_rate=0.2, drop_rate=0.1)
    history = train(task, out=tmp_path, resume=True, **RECIPE)
    assert (fingerprint(task), figures(history)) == undisturbed


def test_a_kill_between_two_files_costs_an_epoch_but_no_bit(train, make_task, fingerprint, tmp_path, monkeypatch):
    """`best.ckpt` of the second epoch is there, its `last.ckpt` not: the epoch is repeated and stays the best."""

    def second_is_best(self):
        self.record.figures = {"val_accuracy": [0.1, 0.9, 0.5][self.trainer.current_epoch]}

    def killed(*files):
        calls.append(files)
        if len(calls) == 2:
            raise StopRequested
        copy(*files)

    monkeypatch.setattr(engine.TaskModule, "on_validation_epoch_end", second_is_best)
    whole, again, copy, calls = make_task(), make_task(seed=1), shutil.copyfileobj, []
    train(whole, out=tmp_path / "whole", **RECIPE)
    with monkeypatch.context() as patch, pytest.raises(Interrupted, match="stopped in epoch 3"):
        patch.setattr(shutil, "copyfileobj", killed)
        train(out=tmp_path / "run", **RECIPE)
    train(again, out=tmp_path / "run", resume=True, **RECIPE)
    assert fingerprint(again) == fingerprint(whole)


def test_every_batch_has_a_seed_of_its_own(train):
    """Batches that share an optimiser step too."""
    assert len({*_seeds_of(train, seed=0), *_seeds_of(train, seed=1)}) == 2 * 16


def _seeds_of(train, **config):
    seeds = []
    train(epochs=2, accumulate=2, hook=lambda number: seeds.append(torch.initial_seed()), **config)
    return seeds


def test_another_seed_is_another_run(undisturbed, train, make_task, fingerprint, tmp_path):
    task = make_task(drop_path_rate=0.2, drop_rate=0.1)
    train(task, out=tmp_path, seed=1, **RECIPE)
    assert fingerprint(task) != undisturbed[0]


def test_a_finished_run_is_left_as_it_is(train, make_task, fingerprint, tmp_path):
    first, again = make_task(), make_task(seed=1)
    history = train(first, out=tmp_path, ema=0.9)
    assert train(again, out=tmp_path, resume=True, ema=0.9).rows == history.rows
    assert fingerprint(again) == fingerprint(first)


def test_a_run_that_stopped_early_stays_stopped(train, make_task, tmp_path):
    history = train(out=tmp_path, epochs=9, patience=1, lr=1e-9, min_lr=0)
    assert len(history) < 9
    assert (
        train(make_task(seed=1), out=tmp_path, resume=True, epochs=9, patience=1, lr=1e-9, min_lr=0).rows
        == history.rows
    )


def test_a_run_can_be_made_longer(train, tmp_path):
    train(out=tmp_path, epochs=1)
    assert train(out=tmp_path, resume=True, epochs=2)["epoch"] == [1, 2]


def test_sigterm_has_its_exit_code(train, tmp_path):
    before = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)
    with pytest.raises(Interrupted) as stopped:
        train(out=tmp_path, hook=signal_at(3, signal.SIGTERM))
    assert stopped.value.exit_code == 143
    assert (signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)) == before


def test_a_second_signal_ends_it_at_once(train, tmp_path):
    def twice(batch):
        for _ in range(2):
            os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(Interrupted, match="epoch 1; nothing was kept"):
        train(out=tmp_path, hook=twice)
    assert not (tmp_path / "checkpoints").exists()


def test_without_a_folder_nothing_is_kept(train):
    with pytest.raises(Interrupted, match="nothing was kept"):
        train(hook=signal_at(3))


def test_what_decides_the_order_must_stay(train, make_task, tmp_path):
    train(out=tmp_path, epochs=1)
    with pytest.raises(ValueError, match="--seed was 0, got 1; --accumulate was 1, got 2: take the old values"):
        train(out=tmp_path, epochs=2, resume=True, seed=1, accumulate=2)


def test_nothing_to_resume(train, tmp_path):
    with pytest.raises(ValueError, match=r"--resume needs a run that wrote .*last.ckpt; found none"):
        train(out=tmp_path, resume=True)
    with pytest.raises(ValueError, match="found none"):
        train(resume=True)


def test_a_run_is_not_overwritten(train, tmp_path):
    train(out=tmp_path, epochs=1)
    with pytest.raises(ValueError, match="holds one already: go on with --resume"):
        train(out=tmp_path, epochs=1)
