"""`vitrail tune`: what is searched, what is chosen and by what, and that a search which was stopped goes on."""

from __future__ import annotations

import math
import shutil
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from vitrail.cli import main
from vitrail.draw.plots import search_chart
from vitrail.records import History
from vitrail.research import tune as module
from vitrail.research.tune import Choice, Found, Row, Span, markdown, search_space, tune, usual_space
from vitrail.train.config import TrainConfig
from vitrail.train.finite import NonFiniteLoss
from vitrail.train.history import write_csv

SEARCH = ("lr=1e-4..1e-1:log", "optimizer=adamw,sgd", "batch_size=8..64")


@pytest.fixture
def config(tmp_path: Path) -> TrainConfig:
    return TrainConfig(model="vit_debug", data="bloodcells", epochs=4, device="cpu", out=str(tmp_path / "search"))


def figures(config: TrainConfig) -> list[float]:
    """Best at a learning rate of 0.01, whatever else; better from epoch to epoch."""
    best = 0.9 - 0.1 * abs(math.log10(config.numbers().lr / 1e-2))
    return [best * epoch / config.epochs for epoch in range(1, config.epochs + 1)]


@pytest.fixture
def made_up(monkeypatch: pytest.MonkeyPatch) -> list[TrainConfig]:
    """Runs that take no time: the list of those that were begun."""
    begun: list[TrainConfig] = []

    def run(config: TrainConfig, watch: Callable[[History], None]) -> History:
        begun.append(config)
        Path(config.out).mkdir(exist_ok=True)
        history = History()
        for epoch, value in enumerate(figures(config), start=1):
            history.rows.append({"epoch": epoch, "val_accuracy": value, "seconds": 60.0})
            write_csv(Path(config.out) / "history.csv", history.rows)
            watch(history)
        return history

    monkeypatch.setattr(module, "run_training", run)
    return begun


def last(found: Iterator[Found]) -> Found:
    return list(found)[-1]


def test_a_space_in_words(config: TrainConfig):
    words = ("learning-rate=1e-4..1e-2:log", "drop_path=0..0.3", "optimizer=adamw,muon", "batch_size=16..64",
             "layer_decay=0.65,0.75,1", "grow_from=none,16", "accumulate=1,2")  # fmt: skip
    assert search_space(words, config) == {
        "lr": Span(1e-4, 1e-2, True), "drop_path": Span(0.0, 0.3), "optimizer": Choice(("adamw", "muon")),
        "batch_size": Span(16, 64), "layer_decay": Choice((0.65, 0.75, 1.0)), "grow_from": Choice((None, 16)),
        "accumulate": Choice((1, 2)),
    }  # fmt: skip
    space = search_space(words, config)
    assert isinstance(space["batch_size"].low, int) and isinstance(space["drop_path"].low, float)


@pytest.mark.parametrize(
    ("word", "said"),
    [
        ("lr", "--search takes words such as lr=1e-4..1e-2:log, .*; got lr$"),
        ("lr=", "--search takes words such as .*; got lr=$"),
        ("lrr=1..2", "--search names settings of a run; got 'lrr': did you mean lr"),
        (
            "seed=1,2",
            "--search takes settings that a recipe is made of; got seed, which all trials share: leave it out",
        ),
        ("val_fraction=0.1,0.2", "got val_fraction, which all trials share"),
        ("epochs=1..9", "got epochs, which all trials share"),
        ("lr=1e-2..1e-4", r"--search must have two numbers, the lesser first \(above 0 with :log\); got lr=1e-2..1e-4"),
        ("weight_decay=0..1:log", r"\(above 0 with :log\); got weight_decay=0..1:log"),
        ("weight_decay=0..1:lin", r"\(above 0 with :log\); got weight_decay=0..1:lin"),
        ("optimizer=a..b", "--optimizer must be one of"),
        ("optimizer=adamw,adamm", "--optimizer must be one of .*; got 'adamm'"),
        ("drop_path=0..2", r"--drop-path must lie in \[0, 1\); got 2"),
        ("batch_size=big,1", "--search batch_size: --batch-size takes a whole number; got 'big'"),
    ],
)
def test_words_that_say_no_space(config: TrainConfig, word: str, said: str):
    with pytest.raises(ValueError, match=said):
        search_space([word], config)


def test_a_setting_has_one_space(config: TrainConfig):
    with pytest.raises(ValueError, match="--search must name lr once; got learning_rate=1..2"):
        search_space(["lr=1e-3..1e-2", "learning_rate=1..2"], config)


def test_without_words_the_space_is_about_the_recipe(config: TrainConfig):
    usual = ["lr=3e-05..0.003:log", "weight_decay=0.005..0.5:log", "drop_path=0..0.3", "label_smoothing=0..0.2"]
    assert usual_space(config) == usual
    assert usual_space(replace(config, lr=1e-2, weight_decay=0.0, loss="bce", freeze="backbone")) == [
        "lr=0.001..0.1:log"
    ]
    assert list(search_space(usual, config)) == ["lr", "weight_decay", "drop_path", "label_smoothing"]


def test_the_best_trial_is_chosen_and_written(config: TrainConfig, made_up: list[TrainConfig]):
    found = last(tune(config, SEARCH, trials=20, pruner="none"))
    assert len(made_up) == len(found.rows) == 20
    assert {row.state for row in found.rows} == {"complete"}
    values = [figures(told)[-1] for told in made_up]
    best = made_up[values.index(max(values))]
    assert found.best == replace(best, out=TrainConfig.out)
    assert max(values) > 0.87
    assert max(found.importance, key=found.importance.get) == "lr" and found.importance["lr"] > 0.6
    path = Path(config.out) / "best.yaml"
    assert TrainConfig.from_yaml(path) == found.best
    header = path.read_text().splitlines()[:2]
    assert header[0].startswith(f"# trial {values.index(max(values))} of ") and "no test image had a say" in header[0]
    assert header[1] == "# vitrail train --config best.yaml --out runs/best"


def test_all_else_is_the_same_in_every_trial(config: TrainConfig, made_up: list[TrainConfig]):
    list(tune(config, SEARCH, trials=6, pruner="none"))
    for number, told in enumerate(made_up):
        differ = {name for name, value in vars(told).items() if value != getattr(config, name)}
        assert differ <= {"lr", "optimizer", "batch_size", "out"}
        assert told.out == f"{config.out}/{number:03}"
    assert len({told.lr for told in made_up}) == 6, "each trial is drawn by a seed of its own"


def test_a_search_that_was_stopped_proposes_what_it_would_have(config: TrainConfig, made_up, tmp_path: Path):
    list(tune(config, SEARCH, trials=12, pruner="none"))
    whole = [(told.lr, told.optimizer, told.batch_size) for told in made_up]
    made_up.clear()
    again = replace(config, out=str(tmp_path / "again"))
    for trials in (3, 11, 12):
        found = last(tune(again, SEARCH, trials=trials, pruner="none"))
    assert [(told.lr, told.optimizer, told.batch_size) for told in made_up] == whole
    assert len(found.rows) == 12
    assert len(list(tune(again, SEARCH, trials=12, pruner="none"))) == 1, (
        "where it stands is told though nothing is left"
    )


def test_trials_that_fall_behind_end_early(config: TrainConfig, made_up: list[TrainConfig]):
    found = last(tune(config, SEARCH, trials=12))
    states = [row.state for row in found.rows]
    assert states[: module.FEW] == ["complete"] * module.FEW
    ended = [told for told, state in zip(made_up, states, strict=True) if state == "pruned"]
    whole = [told for told, state in zip(made_up, states, strict=True) if state == "complete"]
    assert ended
    assert min(map(figures, whole[module.FEW :])) > max(map(figures, ended))
    with pytest.raises(ValueError, match="--pruner must be one of median, hyperband, none; got 'media'"):
        list(tune(config, SEARCH, pruner="media"))


@pytest.mark.parametrize("error", [NonFiniteLoss("the loss must stay finite"), torch.OutOfMemoryError("no memory")])
def test_a_trial_that_fails_is_counted_and_the_search_goes_on(config, made_up, monkeypatch, error, caplog):
    run = module.run_training

    def fails(config: TrainConfig, watch: Any) -> History:
        if config.out.endswith("001"):
            raise error
        return run(config, watch)

    monkeypatch.setattr(module, "run_training", fails)
    found = last(tune(config, SEARCH, trials=4))
    assert [row.state for row in found.rows] == ["complete", "failed", "complete", "complete"]
    assert caplog.messages == [f"trial 1 failed: {error}"]
    assert "| 1 |  | " in markdown(found)


def test_the_time_of_a_search_ends_it_within_a_trial(config: TrainConfig, made_up, monkeypatch, caplog):
    """Epochs of a minute by their own word: of a search of three seconds, none that comes after the first."""
    caplog.set_level("INFO", "vitrail")
    config = replace(config, max_minutes=0.05)
    found = last(tune(config, SEARCH, trials=9))
    assert found.rows == ()
    assert caplog.messages == ["the time is up within trial 0, which the same search goes on with"]
    found = last(tune(replace(config, max_minutes=0.0), SEARCH, trials=2, pruner="median"))
    assert [row.number for row in found.rows] == [0, 1]
    assert made_up[0].lr == made_up[1].lr and {told.max_minutes for told in made_up} == {0.0}


def test_a_line_that_a_crash_left_unfinished_is_taken_off(config: TrainConfig, made_up):
    list(tune(config, SEARCH, trials=2))
    journal = Path(config.out) / "study.log"
    journal.write_bytes(journal.read_bytes() + b'{"op_code": 5, "worker')
    assert [row.number for row in last(tune(config, SEARCH, trials=3)).rows] == [0, 1, 2]
    assert journal.read_bytes().endswith(b"}\n")


def test_a_search_that_was_told_otherwise_is_refused(config: TrainConfig, made_up):
    list(tune(config, SEARCH, trials=1))
    other = replace(config, label_smoothing=0.1)
    for told, search, pruner, what in (
        (other, SEARCH, "median", "settings"), (config, SEARCH[:2], "median", "space"),
        (config, SEARCH, "none", "pruner"),
        (replace(config, epochs=9), SEARCH, "median", "epochs"),
    ):  # fmt: skip
        with pytest.raises(
            ValueError, match=f"--out must name a search that was told the same; .* another {what}: name"
        ):
            list(tune(told, search, trials=1, pruner=pruner))
    list(tune(replace(config, workers=1, max_minutes=5), SEARCH, trials=1))  # what teaches nothing may differ


def test_searches_that_cannot_be(config: TrainConfig, monkeypatch):
    with pytest.raises(ValueError, match="--trials must be at least 1; got 0"):
        list(tune(config, SEARCH, trials=0))
    with pytest.raises(
        ValueError, match="--devices must be 1 for a search, whose trials are runs of one process; got 2"
    ):
        list(tune(replace(config, devices=2), SEARCH))
    assert not Path(config.out).exists()
    monkeypatch.setitem(sys.modules, "optuna", None)
    with pytest.raises(ValueError, match=r"vitrail tune needs the optuna package; .*: pip install 'vitrail\[tune\]'"):
        list(tune(config, SEARCH))


@pytest.fixture
def parts(tmp_path: Path) -> Callable[[bool], str]:
    """A folder of pictures whose test images are called what they are, or the other way round."""

    def make(swapped: bool) -> str:
        for number in range(24):
            part, bright = ("train", "val", "test")[number % 3], number % 2
            name = ("dark", "light")[bright != (swapped and part == "test")]
            place = tmp_path / str(swapped) / part / name / f"{number}.png"
            place.parent.mkdir(parents=True, exist_ok=True)
            generator = torch.Generator().manual_seed(number)
            noise = torch.randint(0, 200, (16, 16, 3), dtype=torch.uint8, generator=generator)
            Image.fromarray((noise + 30 * bright).numpy()).save(place)
        return f"folder:{tmp_path / str(swapped)}"

    return make


def small(data: str, out: Path) -> TrainConfig:
    return TrainConfig(
        model="vit_debug", data=data, epochs=3, batch_size=4, img_size=16, device="cpu", out=str(out),
        entropy_floor=0, warmup_epochs=0,
    )  # fmt: skip


def untimed(found: Found) -> list[Row]:
    return [row._replace(seconds=0) for row in found.rows]


def test_test_images_have_no_say(parts, tmp_path: Path):
    """What is called the other way round among them changes nothing; and no trial has figures of them."""
    search = ("lr=1e-4..1e-2:log",)
    found = [last(tune(small(parts(on), tmp_path / f"out{on}"), search, trials=2)) for on in (False, True)]
    assert untimed(found[0]) == untimed(found[1])
    inside = {path.name for path in (tmp_path / "outTrue").rglob("*")}
    assert "history.csv" in inside and not inside & {"metrics.json", "report.html"}


def test_a_trial_that_was_killed_is_gone_on_with(parts, tmp_path: Path, monkeypatch):
    search, data = ("lr=1e-4..1e-2:log", "drop_path=0,0.1"), parts(False)
    whole = last(tune(small(data, tmp_path / "whole"), search, trials=2))

    def stops(history: History) -> None:
        if len(history) == 2:
            raise RuntimeError("killed")

    config, run = small(data, tmp_path / "out"), module.run_training
    with monkeypatch.context() as patch:
        patch.setattr(module, "run_training", lambda config, watch: run(config, watch=stops))
        with pytest.raises(RuntimeError, match="killed"):
            list(tune(config, search, trials=2))
    stands = next(iter(tune(config, search, trials=2)))
    assert [(row.state, row.epochs) for row in stands.rows] == [("running", 2)]
    begun: list[str] = []
    monkeypatch.setattr(module, "run_training", lambda told, watch: begun.append(told.out) or run(told, watch=watch))
    found = last(tune(config, search, trials=2))
    assert begun == [f"{config.out}/001"], "the first is gone on with, not begun anew"
    assert untimed(found) == untimed(whole)
    shutil.rmtree(tmp_path / "out" / "000" / "checkpoints")  # nothing is left of it but what it came to
    assert last(tune(config, search, trials=2)).rows == found.rows


def test_the_command(made_up, tmp_path: Path, capsys):
    out = tmp_path / "search"
    words = [
        "tune",
        "--model",
        "vit_debug",
        "--data",
        "bloodcells",
        "--epochs",
        "4",
        "--device",
        "cpu",
        "--out",
        str(out),
    ]
    assert main([*words, "--search", *SEARCH, "--trials", "6"]) == 0
    shown = capsys.readouterr()
    table = (out / "tune.md").read_text()
    assert shown.out == table
    assert f"train with what was found: vitrail train --config {out / 'best.yaml'}" in shown.err
    assert (
        table.splitlines()[0] == "| trial | val accuracy % | lr | optimizer | batch_size | state | epochs | seconds |"
    )
    assert "Chosen by validation images; no test image had a say." in table
    assert "What complete trials differ by (PED-ANOVA): " in table
    with Image.open(out / "tune.png") as picture:
        assert min(picture.size) > 200
    assert main([*words, "--search", "lrr=1..2"]) == 2
    assert "did you mean lr?" in capsys.readouterr().err


def test_the_table_has_the_best_first():
    rows = (
        Row(0, "complete", 0.5, 4, 8.4, {"lr": 0.001}), Row(1, "failed", None, 0, 0.0, {"lr": 1.0}),
        Row(2, "pruned", 0.9, 1, 2.0, {"lr": 0.01}), Row(3, "complete", 0.75, 4, 8.0, {"lr": 0.0123456, "model": "x"}),
    )  # fmt: skip
    lines = markdown(Found(rows, {"lr": 0.75}, None)).splitlines()
    assert [line.split(" | ")[0] for line in lines[2:6]] == ["| 3", "| 0", "| 2", "| 1"]
    assert lines[2] == "| 3 | 75.00 | 0.0123 | x | complete | 4 | 8 |"
    assert "(PED-ANOVA): lr 75%." in lines[7]


def test_the_picture():
    drawing = search_chart({0: (0.5, True), 1: (0.9, False), 2: (0.7, True)}, {"lr": 0.8, "model": 0.2})
    left, right = drawing.axes
    found = {line.get_label(): list(line.get_ydata()) for line in left.lines}
    assert found == {"complete": [0.5, 0.7], "ended early": [0.9], "best so far": [0.5, 0.5, 0.7]}
    assert [bar.get_width() for bar in right.patches] == [0.8, 0.2]
    assert len(search_chart({0: (0.5, True)}, {}).axes) == 1
    assert len(search_chart({}, {}).axes) == 1
