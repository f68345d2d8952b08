"""`vitrail ablate`: a recipe is built up part by part, each rung a run, none of them done twice."""

from __future__ import annotations

import csv
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from PIL import Image

from vitrail.cli import main
from vitrail.research import runs
from vitrail.research.ablate import FIRST, PLAIN, ablation, curves, ladder, markdown, stays
from vitrail.research.runs import Tried, accuracy, gain, interval
from vitrail.train.config import TrainConfig

RECIPE = TrainConfig(
    optimizer="adamw", lr=1e-3, warmup_epochs=1, label_smoothing=0.1, mixup=0.2, cutmix=1.0, drop_path=0.1, epochs=3,
)  # fmt: skip


def test_the_last_rung_is_the_recipe_and_the_first_has_nothing_of_it():
    names, configs = zip(*ladder(RECIPE), strict=True)
    assert names == (
        FIRST, "+ adamw", "+ warm-up, cosine", "+ label smoothing 0.1", "+ mixup 0.2, cutmix 1", "+ DropPath 0.1", PLAIN
    )  # fmt: skip
    assert configs[-2] == RECIPE
    bare = configs[0]
    assert (bare.optimizer, bare.numbers().lr, bare.numbers().schedule) == ("sgd", 0.1, "constant")
    assert (bare.warmup_epochs, bare.label_smoothing, bare.mixup, bare.cutmix, bare.drop_path) == (0, 0, 0, 0, 0)
    assert (bare.epochs, bare.flip, bare.crop) == (3, RECIPE.flip, RECIPE.crop), "what no rung names is the recipe's"


def test_each_rung_keeps_what_those_before_it_have():
    parts = [
        {"optimizer", "lr"}, {"schedule", "warmup_epochs"}, {"label_smoothing"}, {"mixup", "cutmix"}, {"drop_path"},
    ]  # fmt: skip
    configs = [config for _, config in ladder(RECIPE)][:-1]
    for (before, after), changed in zip(pairwise(configs), parts, strict=True):
        differ = {name for name, value in vars(after).items() if value != getattr(before, name)}
        assert differ == changed


def test_a_part_that_the_recipe_has_not_makes_no_rung():
    names = [name for name, _ in ladder(replace(RECIPE, mixup=0.0, cutmix=0.0, drop_path=0.0))]
    assert names == [FIRST, "+ adamw", "+ warm-up, cosine", "+ label smoothing 0.1", PLAIN]
    still = replace(RECIPE, mixup=0.0, cutmix=0.0, flip=0.0, crop="none")
    assert PLAIN not in dict(ladder(still)), "it varies no image as it is"


def test_without_augmentation_all_else_is_the_recipe_s():
    plain = dict(ladder(RECIPE))[PLAIN]
    differ = {name for name, value in vars(plain).items() if value != getattr(RECIPE, name)}
    assert differ == {"flip", "crop", "mixup", "cutmix"}


def run(answers: list[int], labels: list[int]) -> Tried:
    return Tried("", 1e-3, 1, 1.0, torch.tensor(labels), torch.tensor(answers))


def test_a_gain_draws_the_same_images_for_both():
    """Two runs that differ in nothing differ in no draw; and one that is right once more is never drawn worse."""
    labels = [0, 1] * 20
    one, same = run([0] * 40, labels), run([0] * 40, labels)
    assert gain([one], [same], accuracy) == (0, 0, 0)
    better = run([0, 1] + [0] * 38, labels)
    more = gain([better], [one], accuracy)
    assert more.value == pytest.approx(1 / 40)
    assert 0 <= more.low <= more.value < more.high < 0.1
    wide = interval([better], accuracy)
    assert wide.high - wide.low > 1e-6 or wide.value == pytest.approx(21 / 40)


@pytest.fixture
def recipe(photos: Path, tmp_path: Path) -> Path:
    path = tmp_path / "recipe.yaml"
    path.write_text(
        f"model: vit_debug\ndata: folder:{photos}\nbatch_size: 4\nval_fraction: 0.34\nlr: 0.001\n"
        "warmup_epochs: 1\nlabel_smoothing: 0.1\nmixup: 0.2\n"
    )
    return path


def test_the_command_makes_table_and_pictures_and_does_nothing_twice(recipe: Path, tmp_path: Path, capsys, monkeypatch):
    out = tmp_path / "out"
    words = ["ablate", str(recipe), "--epochs", "2", "--device", "cpu", "--out", str(out)]
    assert main(words) == 0
    table = (out / "ablation.md").read_text()
    assert capsys.readouterr().out.endswith(table)
    lines = table.splitlines()[2:]
    assert [line.split(" | ")[0] for line in lines] == [
        f"| {FIRST}", "| + adamw", "| + warm-up, cosine", "| + label smoothing 0.1", "| + mixup 0.2", f"| {PLAIN}",
    ]  # fmt: skip
    assert all(0 <= float(line.split(" | ")[1].split()[0]) <= 100 for line in lines)
    for name in ("ablation.png", "augmentation.png"):
        with Image.open(out / name) as picture:
            assert min(picture.size) > 200
    assert (out / "0-0" / "report.html").is_file()
    for name in ("run_training", "resume_training"):
        monkeypatch.setattr(runs, name, lambda *_: pytest.fail("a run was done twice"))
    assert main(words) == 0
    assert (out / "ablation.md").read_text() == table


def test_curves_are_of_the_recipe_and_of_it_without_augmentation(recipe: Path, tmp_path: Path):
    told = replace(TrainConfig.from_yaml(recipe), epochs=1, device="cpu", out=str(tmp_path / "out"), mixup=0.0)
    rungs = list(ablation(told))
    found = curves(rungs)
    assert list(found) == ["the recipe", PLAIN]
    with (rungs[-1].folders[0] / "history.csv").open() as file:
        assert found[PLAIN].rows[0]["train_loss"] == float(next(csv.DictReader(file))["train_loss"])
    assert curves(rungs[:-1]) == {}
    assert "| + adamw |" in markdown(rungs)


def test_what_no_rung_takes_out_is_said_below_the_table():
    recipe = replace(RECIPE, ema=0.999, loss="bce", teacher="runs/cnn", workers=2, model="vit_debug", seed=3)
    said = "In every rung, the first too: --loss bce, --teacher runs/cnn, --ema 0.999."
    assert sorted(stays(recipe)) == sorted(said) and stays(recipe).startswith("In every rung, the first too: --")
    assert stays(RECIPE) == ""
    assert markdown([], said).splitlines()[-2:] == ["", said]
