"""What was held out stays so: parts of the data in a resumed run and in `evaluate_model`."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from torch.testing import assert_close
from torch.utils.data import DataLoader

from vitrail.data.datasets import load_splits
from vitrail.data.imagesets import ImageSet
from vitrail.data.loading import make_loader
from vitrail.evaluation import evaluate_model
from vitrail.models.registry import build_model
from vitrail.records import Batch
from vitrail.train.config import TrainConfig
from vitrail.trainer import (
    resume_training,
    run_training,
)
from vitrail.weights.load import load_model

# ---- parts of a run


@pytest.fixture
def own(photos: Path, config: TrainConfig, tmp_path: Path) -> TrainConfig:
    """A recipe of one epoch on a folder of its own, which a test may change."""
    shutil.copytree(photos, tmp_path / "photos")
    return replace(
        config, data=f"folder:{tmp_path / 'photos'}", out=str(tmp_path / "run"), epochs=1, ema=0, checkpoint_every=0
    )


def add_photos(config: TrainConfig, count: int = 12) -> None:
    folder = Path(config.data.removeprefix("folder:"))
    for number in range(count):
        shutil.copy(folder / "dark/0.png", folder / f"dark/new{number}.png")


def drawn(config: TrainConfig) -> dict[str, list[str]]:
    return json.loads((Path(config.out) / "splits.json").read_text())["drawn"]


@pytest.fixture
def trained_on(monkeypatch: pytest.MonkeyPatch) -> set[str]:
    """The ids of all images that a training loader is made of, as they come."""
    seen: set[str] = set()

    def watched(images: ImageSet, **settings: Any) -> DataLoader[Batch]:
        if settings["train"]:
            seen.update(images.ids)
        return make_loader(images, **settings)

    monkeypatch.setattr("vitrail.evaluation.make_loader", watched)
    return seen


def test_no_held_out_image_is_ever_trained_on(own: TrainConfig, trained_on: set[str], caplog: pytest.LogCaptureFixture):
    run_training(own)
    before, statistics = drawn(own), load_model(own.out).preprocess
    held_out = {*before["val"], *before["test"]}
    add_photos(own)
    fresh = load_splits(own)
    assert {*fresh.val.ids, *fresh.test.ids} != held_out, "a draw anew is another one"
    with pytest.raises(ValueError, match=r"images\.count was 4, got 16; .* --override images "):
        resume_training(own.out, replace(own, epochs=2))
    assert len([name for name in trained_on if "new" in name]) == 12
    resume_training(own.out, replace(own, epochs=2), override=["images"])
    assert not trained_on & held_out
    assert len([name for name in trained_on if "new" in name]) == 12
    assert f"{own.data} has +12 images since its parts were drawn; new ones are for training" in caplog.messages
    assert drawn(own) == before
    assert json.loads((Path(own.out) / "splits.json").read_text())["counts"]["train"] == {"bright": 2, "dark": 14}
    assert load_model(own.out).preprocess == statistics
    figures = evaluate_model(own.out, data=own.data, device="cpu")
    assert figures["confusion"].sum() == len(before["test"])


def test_evaluation_takes_the_parts_of_the_run(own: TrainConfig, tmp_path: Path):
    run_training(own)
    before = evaluate_model(own.out, data=own.data, device="cpu")["loss"]
    shutil.copytree(Path(own.out) / "model", tmp_path / "alone")
    assert evaluate_model(tmp_path / "alone", data=own.data, device="cpu")["loss"] == before
    add_photos(own)
    for name in (Path(own.out), Path(own.out) / "model"):
        assert evaluate_model(name, data=own.data, device="cpu")["loss"] == before
    with pytest.raises(
        ValueError, match=r"is not what it was when .*alone was trained on it, .* evaluate the run fold"
    ):
        evaluate_model(tmp_path / "alone", data=own.data, device="cpu")


def test_a_held_out_image_that_is_gone_is_named(own: TrainConfig):
    run_training(own)
    gone = drawn(own)["test"][0]
    (Path(own.data.removeprefix("folder:")) / gone).unlink()
    for again in (lambda: resume_training(own.out), lambda: evaluate_model(own.out, data=own.data, device="cpu")):
        with pytest.raises(ValueError, match=f"lacks 1 of the images that were set aside from it: {gone}: put them ba"):
            again()


@pytest.fixture
def strangers(photos: Path, tmp_path: Path) -> Path:
    """Images of other names: they were never trained on."""
    for name in ("bright", "dark"):
        (tmp_path / "strangers" / name).mkdir(parents=True)
        for number in range(6):
            shutil.copy(photos / name / f"{number}.png", tmp_path / "strangers" / name / f"other{number}.png")
    return tmp_path / "strangers"


def test_other_data_is_measured_whole(run: Path, strangers: Path):
    data = f"folder:{strangers}"
    for name in (run, run / "model"):
        whole = evaluate_model(name, data=data, device="cpu")
        assert whole["confusion"].sum() == whole.images == whole.total == 12
        assert (whole.split, whole.drawn, whole.classes) == ("all", False, ("bright", "dark"))
        part = evaluate_model(name, data=data, split="test", device="cpu")
        assert part["confusion"].sum() == part.images == 4
        assert (part.split, part.drawn, part.total) == ("test", True, 12)


def test_other_data_that_names_its_parts_is_measured_by_them(run: Path, strangers: Path):
    shutil.copytree(strangers, strangers / "train")
    (strangers / "bright").rename(strangers / "rest")
    shutil.rmtree(strangers / "dark")
    shutil.copytree(strangers / "train", strangers / "val", ignore=shutil.ignore_patterns("other0.png"))
    found = evaluate_model(run, data=f"folder:{strangers}", device="cpu")
    assert (found.split, found.drawn, found.images, found.total) == ("val", False, 10, 22)
    assert evaluate_model(run, data=f"folder:{strangers}", split="all", device="cpu").images == 22


def test_images_that_were_trained_on_are_known_by_their_names_elsewhere(run: Path, photos: Path, tmp_path: Path):
    shutil.copytree(photos, tmp_path / "moved")
    shutil.copytree(run / "model", tmp_path / "alone")
    for name in (run, tmp_path / "alone"):
        found = evaluate_model(name, data=f"folder:{tmp_path / 'moved'}", device="cpu")
        assert (found.split, found.drawn, found.images) == ("test", True, 4)


def test_other_classes_or_no_record_end_a_resume(own: TrainConfig):
    run_training(own)
    shutil.copytree(Path(own.data.removeprefix("folder:")) / "dark", Path(own.data.removeprefix("folder:")) / "grey")
    with pytest.raises(
        ValueError, match="had the classes bright, dark when training began; now it has bright, dark, g"
    ):
        resume_training(own.out)
    (Path(own.out) / "splits.json").unlink()
    with pytest.raises(
        ValueError, match=r"splits\.json must say which images were held out; .*: put it back, or train"
    ):
        resume_training(own.out)


# ---- figures of a trained model


def test_evaluation_draws_the_parts_as_training_did(run: Path, config: TrainConfig):
    """Neither seed nor share is told: with the defaults, training images would be among the test images."""
    metrics = json.loads((run / "metrics.json").read_text())
    for name in (run, run / "model"):
        figures = evaluate_model(name, data=config.data, device="cpu", batch_size=3)
        assert_close(figures["loss"].item(), metrics["loss"])
        assert figures["confusion"].tolist() == metrics["confusion"]
    assert load_splits(replace(config, seed=0, val_fraction=0.05)).test.ids != load_splits(config).test.ids


def test_evaluation_of_another_part(run: Path, config: TrainConfig):
    assert evaluate_model(run, data=config.data, split="train", device="cpu")["confusion"].sum() == 4
    assert evaluate_model(run, data=config.data, split="all", device="cpu")["confusion"].sum() == 12
    with pytest.raises(ValueError, match="--split must be one of train, val, test, all; got 'whole'"):
        evaluate_model(run, data=config.data, split="whole")


def test_evaluation_goes_by_names_where_there_are_names(photos: Path, config: TrainConfig, tmp_path: Path):
    nameless = build_model("vit_debug", num_classes=2)
    nameless.save_pretrained(tmp_path / "two")
    assert evaluate_model(tmp_path / "two", data=config.data, device="cpu")["confusion"].sum() == 12
    build_model("vit_debug", num_classes=4).save_pretrained(tmp_path / "four")
    with pytest.raises(ValueError, match="four knows the classes class 0, class 1, class 2, class 3; .* has bright, d"):
        evaluate_model(tmp_path / "four", data=config.data)
