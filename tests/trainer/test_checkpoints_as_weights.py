"""A run's checkpoint as weights to begin with, or to be taught by: what it does not say, its run does."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from vitrail.models.registry import build_from_config
from vitrail.records import Preprocess
from vitrail.tasks.classify import Classify
from vitrail.tasks.distill import DistillConfig
from vitrail.train.task import load_teacher
from vitrail.weights.load import load_model, open_weights


@pytest.mark.parametrize("name", ["last.ckpt", "best.ckpt", "epoch_001.ckpt"])
def test_a_checkpoint_has_the_classes_and_the_preprocessing_of_its_run(name: str, run: Path, tmp_path: Path):
    copy, wanted = shutil.copytree(run, tmp_path / "run"), load_model(run)
    assert wanted.classes == ("bright", "dark") and wanted.preprocess.mean != Preprocess().mean
    for lost in ((), ("model",)):  # as of a run that is not done
        for part in lost:
            shutil.rmtree(copy / part)
        found = open_weights(str(copy / "checkpoints" / name))
        assert (found.classes, found.preprocess) == (wanted.classes, wanted.preprocess)
    taught = load_teacher(DistillConfig(teacher="vit_debug", teacher_path=str(copy / "checkpoints" / name)), 2)
    assert (taught.classes, taught.preprocess) == (wanted.classes, wanted.preprocess)


def test_a_checkpoint_of_a_network_that_no_row_is(run: Path, tmp_path: Path):
    """The card says what shapes do not show, such as the number of heads."""
    copy = shutil.copytree(run, tmp_path / "run")
    card = json.loads((copy / "model/config.json").read_text())
    assert card["config"]["num_heads"] == 3
    card["config"]["num_heads"], card["name"] = 4, ""
    Classify(build_from_config("vit", card["config"])).save_pretrained(tmp_path / "other")
    shutil.rmtree(copy / "model")
    shutil.copytree(tmp_path / "other", copy / "model")
    found = open_weights(str(copy / "checkpoints/last.ckpt"))
    assert (found.config.num_heads, found.variant) == (4, "")


def test_a_checkpoint_alone_says_that_it_is(run: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture):
    shutil.copy(run / "checkpoints/last.ckpt", tmp_path / "mine.ckpt")
    assert open_weights(str(tmp_path / "mine.ckpt")).classes == ()
    (said,) = [message for message in caplog.messages if "run folder" in message]
    assert said.startswith(
        f"{tmp_path}: no run folder is around it, which would say what its classes are and how images were prepared; "
        "taken are img_size (32, 32), mean "
    )


def test_a_run_whose_record_is_damaged_says_so(run: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture):
    copy = shutil.copytree(run, tmp_path / "run")
    shutil.rmtree(copy / "model")
    (copy / "splits.json").write_text("{}")
    assert open_weights(str(copy / "checkpoints/last.ckpt")).classes == ()
    assert any("splits.json of the run is damaged; taken are " in message for message in caplog.messages)
