"""Runs on a folder of photographs that are gone on with under another size of images, another share, or in vain."""

from __future__ import annotations

import json
import multiprocessing
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from vitrail.data.datasets import load_splits
from vitrail.data.imagesets import TensorSet
from vitrail.data.loading import make_loader
from vitrail.models.vit_config import ViTConfig
from vitrail.records import Preprocess
from vitrail.train import engine
from vitrail.train.claim import FolderInUse, claimed
from vitrail.train.config import TrainConfig
from vitrail.trainer import ViTTrainer, run_training
from vitrail.weights.load import load_model


@pytest.fixture
def cnn(photos: Path, tmp_path: Path) -> TrainConfig:
    """A run of one epoch of a network whose weights fit any size of images, to be gone on with for another."""
    config = TrainConfig(
        model="resnet_debug", data=f"folder:{photos}", batch_size=4, val_fraction=0.34, device="cpu", epochs=1,
        img_size=32, out=str(tmp_path / "run"),
    )  # fmt: skip
    run_training(config)
    return replace(config, epochs=2)


@pytest.fixture
def sizes(monkeypatch: pytest.MonkeyPatch) -> set[tuple[int, ...]]:
    """Height and width of the images that are trained and validated on."""
    seen, plain = set(), engine.as_batch

    def watched(batch: Any) -> Any:
        seen.add(tuple(batch["image"].shape[-2:]))
        return plain(batch)

    monkeypatch.setattr(engine, "as_batch", watched)
    return seen


def files(out: str) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in Path(out).rglob("*") if path.is_file()}


@pytest.mark.fault(45)
def test_another_size_of_images_is_refused_or_taken_for_all(cnn: TrainConfig, sizes: set[tuple[int, ...]]):
    """For training, validation, and in all that is written."""
    larger, before = replace(cnn, img_size=48), files(cnn.out)
    sizes.clear()
    for some in ([], ["img_size", "network"]):
        with pytest.raises(ValueError, match=r"preprocess\.img_size was \(32, 32\), got \(48, 48\): .*--override img_"):
            run_training(larger, resume=True, override=some)
    assert files(cnn.out) == before
    run_training(larger, resume=True, override=["img_size", "network", "preprocess"])
    model, record = load_model(cnn.out), json.loads((Path(cnn.out) / "splits.json").read_text())
    assert sizes == {(48, 48)}
    assert model.preprocess.img_size == model.config.img_size == (48, 48)
    assert model.preprocess == load_splits(larger).preprocess(48) == Preprocess.from_dict(record["preprocess"])


@pytest.mark.fault(45)
def test_where_images_are_held_does_not_change_how_they_are_prepared(cnn: TrainConfig):
    """Mean, deviation and cut are those of the images that training began with, unless they are overridden."""
    before, elsewhere = load_model(cnn.out).preprocess, replace(cnn, in_memory=False)
    run_training(elsewhere, resume=True)
    assert load_model(cnn.out).preprocess == before
    run_training(replace(elsewhere, epochs=3), resume=True, override=["preprocess"])
    assert load_model(cnn.out).preprocess == load_splits(elsewhere).preprocess(32) != before


@pytest.mark.fault(45)
def test_what_was_held_out_stays_so(cnn: TrainConfig):
    before = files(cnn.out)
    refusals = [([], r"0\.34, got 0\.2; .* nothing can override"), (["val_fraction"], "cannot change val_fraction")]
    for names, message in refusals:
        with pytest.raises(ValueError, match=message):
            run_training(replace(cnn, val_fraction=0.2), resume=True, override=names)
    assert files(cnn.out) == before


@pytest.mark.fault(45)
def test_a_run_that_is_over_is_not_rewritten(cnn: TrainConfig):
    """Neither its config nor its model's recipe says what no epoch was trained with."""
    before = files(cnn.out)
    with pytest.raises(ValueError, match="this run has none left after its 1: give more --epochs"):
        run_training(replace(cnn, epochs=1, lr=1e-2), resume=True, override=["lr"])
    assert files(cnn.out) == before


# ---- loaders of one's own


def some_loader() -> Any:
    images = TensorSet(torch.zeros(4, 3, 8, 8, dtype=torch.uint8), torch.tensor([0, 1, 0, 1]), "ab", list("wxyz"))
    return make_loader(images, batch_size=2, train=True, on_bad_image="skip")


def some_trainer(out: Path) -> ViTTrainer:
    model = ViTConfig(img_size=8, patch_size=4, embed_dim=16, depth=1, num_heads=2, num_classes=2)
    return ViTTrainer(model, device="cpu", out=out)


def _hold(folder: Path, holds: Any, done: Any) -> None:
    with claimed(folder):
        holds.set()
        done.wait()


def test_a_refused_trainer_leaves_the_record_of_the_run_that_is_there(tmp_path: Path):
    fork = multiprocessing.get_context("fork")
    holds, done = fork.Event(), fork.Event()
    other = fork.Process(target=_hold, args=(tmp_path, holds, done), daemon=True)
    other.start()
    assert holds.wait(30)
    (tmp_path / "bad_images.csv").write_text("id,reason\na.png,empty\n")
    with pytest.raises(FolderInUse):
        some_trainer(tmp_path).train(some_loader(), epochs=1)
    assert (tmp_path / "bad_images.csv").exists()
    done.set()
    other.join()


@pytest.mark.parametrize("label", [1, 7])
def test_a_loader_is_afterwards_as_it_was(label: int, tmp_path: Path):
    """What it meets later is no business of the run's, however that ended."""
    loader = some_loader()
    own, loader.dataset.images.labels[0] = loader.bad, label
    with nullcontext() if label < 2 else pytest.raises(ValueError, match="label"):
        some_trainer(tmp_path).train(loader, epochs=1)
    assert loader.bad is own
