"""Runs whose training images change their size: learning rates and steps go on, and a resumed run is the same."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from vitrail import trainer
from vitrail.train.config import TrainConfig
from vitrail.train.engine import Interrupted, TaskModule
from vitrail.trainer import resume_training, run_training
from vitrail.weights.load import create_model, load_model


@pytest.fixture
def growing(photos: Path, tmp_path: Path) -> TrainConfig:
    """Images of 16, 24 and 32 pixels, each batch a cell more or less, copies of an image, and mixup."""
    return TrainConfig(
        model="vit_debug", data=f"folder:{photos}", epochs=4, batch_size=2, val_fraction=0.34, seed=3, device="cpu",
        lr=1e-3, warmup_epochs=1, out=str(tmp_path / "whole"), repeats=2, mixup=0.4, grow_from=16, multi_scale=0.25,
        auto_augment="trivial",
    )  # fmt: skip


@pytest.fixture
def steps(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int]]:
    """(number, side) of every batch that was trained on, appended."""
    seen: list[tuple[int, int]] = []

    class Watched(trainer.BatchAugment):
        def __call__(self, batch, number, total):
            done = super().__call__(batch, number, total)
            assert total == 8
            seen.append((number, done["image"].shape[-1]))
            return done

    monkeypatch.setattr(trainer, "BatchAugment", Watched)
    return seen


@pytest.fixture
def rates(monkeypatch: pytest.MonkeyPatch) -> Callable[[], list[float]]:
    """The learning rate of every optimiser step."""
    seen: list[float] = []
    plain = TaskModule.learning_rate

    def watched(self, step):
        rate = plain(self, step)
        if len(seen) == step:
            seen.append(rate)
        return rate

    monkeypatch.setattr(TaskModule, "learning_rate", watched)
    return lambda: seen


def test_images_grow_while_steps_and_learning_rate_know_nothing_of_it(growing, steps, rates, tmp_path):
    run_training(growing)
    sides = [side for _, side in steps]
    assert [number for number, _ in steps] == list(range(8))
    assert max(sides[:2]) <= 24 and max(sides[-2:]) >= 32
    assert set(sides) <= {8, 16, 24, 32, 40} and len(set(sides)) >= 3
    sized = list(rates())
    rates().clear()
    run_training(replace(growing, out=str(tmp_path / "plain"), grow_from=None, multi_scale=0.0))
    assert sized == rates()


@pytest.mark.parametrize("row", ["crossvit_debug", "swin_debug", "pvt_v2_debug", "cait_debug", "resnet_debug"])
def test_every_family_sees_images_of_other_sizes(row: str, growing, tmp_path):
    model = create_model(row, num_classes=2)
    size = 2 * max(model.preprocess.img_size[0], model.cell)
    told = replace(growing, model=row, img_size=size, grow_from=size // 2, epochs=2, out=str(tmp_path / row))
    assert run_training(told).rows[-1]["train_loss"] > 0


def test_a_run_killed_between_two_sizes_ends_as_it_would_have(growing, steps, tmp_path, monkeypatch):
    run_training(growing)
    whole = list(steps)
    steps.clear()

    class Stopping(trainer.BatchAugment):
        def __call__(self, batch, number, total):
            if number == 5:
                os.kill(os.getpid(), signal.SIGTERM)
            return super().__call__(batch, number, total)

    out = tmp_path / "stopped"
    with monkeypatch.context() as patch, pytest.raises(Interrupted):
        patch.setattr(trainer, "BatchAugment", Stopping)
        run_training(replace(growing, out=str(out)))
    steps.clear()
    resume_training(out)
    assert steps == whole[6:]
    one, two = load_model(growing.out).state_dict(), load_model(out).state_dict()
    assert all(torch.equal(one[name], two[name]) for name in one)


def test_a_size_that_is_overridden_is_another_run(growing, tmp_path):
    run_training(growing)
    with pytest.raises(ValueError, match="--grow-from was 16, got 24"):
        resume_training(growing.out, replace(growing, grow_from=24, epochs=5))
