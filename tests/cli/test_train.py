"""`vitrail train`: flags, files, interruptions, and runs that are gone on with."""

from __future__ import annotations

import json
import os
import shlex
import signal
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from vitrail import trainer
from vitrail.train.config import TrainConfig

Said = Callable[..., tuple[str, str]]


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_train_writes_a_run(run: Path):
    assert {part.name for part in run.iterdir()} == {
        "config.yaml", "splits.json", "images.jsonl", "history.csv", "checkpoints", "model", "metrics.json",
        "report.html",
    }  # fmt: skip
    assert len((run / "history.csv").read_text().splitlines()) == 3


@pytest.mark.parametrize(("words", "fields"), [
    ("--lr 1e-3 --batch-size 8 --data cifar10 --mixup 0.2 --out x", dict(lr=1e-3, batch_size=8, mixup=0.2, out="x")),
    ("--learning-rate 1e-3 --batch_size 8 --dataset cifar10", dict(lr=1e-3, batch_size=8, data="cifar10")),
    ("--mixup-alpha 0.2 --autoaugment --output_dir x", dict(mixup=0.2, auto_augment="auto", out="x")),
    ("--debug --epochs 3", dict(debug=True, epochs=3)),
    ("--epochs 3 --debug", dict(debug=True, epochs=3)),
    ("--debug false --auto-augment", dict(debug=False, auto_augment="auto")),
    ("--auto-augment --debug", dict(debug=True, auto_augment="auto")),
    ("--auto-augment rand --download", dict(download=True, auto_augment="rand")),
    ("--auto_augment=trivial --drop_path=0.1 --n-epochs=4", dict(auto_augment="trivial", drop_path=0.1, epochs=4)),
    ("--img-size 64 --in-memory false", dict(img_size=64, in_memory=False)),
    ("--image-size 64 --num-workers 3", dict(img_size=64, workers=3)),
    ("--input-size=64 --drop-path-rate 0.2", dict(img_size=64, drop_path=0.2)),
    ("--lr 1e-7", dict(lr=1e-7, min_lr=None)),
    ("--opt muon --sched linear --lr-min 0", dict(optimizer="muon", schedule="linear", min_lr=0.0)),
    ("--warmup-epochs none --num-warmup-steps 7", dict(warmup_epochs=None, warmup_steps=7)),
    ("--img-size none --in-memory null", dict(img_size=None, in_memory=None)),
    ("--img-size=None --crop none --out none", dict(img_size=None, crop="none", out="none")),
])  # fmt: skip
def test_flags_in_any_spelling(words: str, fields: dict[str, object], told: Callable[..., TrainConfig]):
    config = told(*shlex.split(words))
    assert {name: getattr(config, name) for name in fields} == fields


def test_flags_win_over_the_file(tmp_path: Path, told: Callable[..., TrainConfig]):
    file = tmp_path / "recipe.yaml"
    file.write_text("learning-rate: 1e-2\nepochs: 7\nwarmup_epochs: 1\n")
    assert told("--config", file).changes() == {"lr": 1e-2, "epochs": 7, "warmup_epochs": 1.0}
    assert told(f"--config={file}", "--epochs", 3).epochs == 3
    assert told("--epochs", 100, "--config", file).epochs == 100  # the default, but said
    assert told("--config", file, "--debug").debug


def test_the_recorded_command_says_the_same(run: Path, told: Callable[..., TrainConfig]):
    program, train, *words = shlex.split(json.loads((run / "metrics.json").read_text())["command"])
    assert (program, train) == ("vitrail", "train")
    assert told(*words) == TrainConfig.from_yaml(run / "config.yaml")


def test_an_interrupted_run_is_resumed(
    run: Path, tiny: list[str], photos: Path, tmp_path: Path, said: Said, monkeypatch
):
    class Stopping(trainer.BatchAugment):
        def __call__(self, batch, number, total):
            if number == 2:  # the first of the second epoch
                os.kill(os.getpid(), signal.SIGTERM)
            return super().__call__(batch, number, total)

    out = tmp_path / "run"
    with monkeypatch.context() as patch:
        patch.setattr(trainer, "BatchAugment", Stopping)
        _, err = said("train", *tiny, "--data", f"folder:{photos}", "--out", out, code=143)
    assert err.endswith(f"stopped in epoch 2; go on with: vitrail train --resume {out}\n")
    assert not (out / "model").exists()
    _, err = said("train", "--resume", out)
    assert err.endswith(f"epochs done: 2 of 2; the report is {out / 'report.html'}\n")
    whole, resumed = (contents(folder / "model")["model.safetensors"] for folder in (run, out))
    assert resumed == whole


def test_a_finished_run_is_measured_again_and_no_more(copy: Path, said: Said):
    model = contents(copy / "model")["model.safetensors"]
    (copy / "report.html").unlink()
    _, err = said("train", "--resume", copy)
    assert err.endswith(f"epochs done: 2 of 2; the report is {copy / 'report.html'}\n")
    assert (copy / "report.html").is_file()
    assert contents(copy / "model")["model.safetensors"] == model


def test_a_finished_run_takes_more_epochs(copy: Path, said: Said):
    _, err = said("train", "--resume", copy, "--epochs", 3)
    assert "epochs done: 3 of 3" in err
    assert TrainConfig.from_yaml(copy / "config.yaml").epochs == 3


@pytest.mark.parametrize(("words", "message"), [
    (["--seed", "4"], "told before; --seed was 0, got 4: take the old values"),
    (["--val-fraction", "0.4", "--img-size", "64"], "img-size was None, got 64; --val-fraction was 0.2, got 0.4; net"),
    (["--img-size", "64"], "weights do not fit, which nothing can override: backbone.pos_embed was (1, "),
    (["--seed", "4", "--override", "lr"], "or go on all the same with --override seed (in Python, override=('seed',))"),
    (["--lr", "9", "--override", "learning"], "may not change otherwise; got 'learning': "),
    (["--devices", "2"], "--devices was 1, got 2: take the old values, or a new --out; or go on all the same with -"),
    (["--devices", "2", "--allow-world-change"], "--allow-world-change keeps the 4 images of a step; got 2 "),
    (["--out", "elsewhere"], "goes on in its own folder {run}; got --out elsewhere: leave it out"),
    (["--config", "a.yaml"], "goes on by its own config.yaml; got --config a.yaml as well: drop one"),
])  # fmt: skip
def test_a_resumed_run_is_told_the_same(words: list[str], message: str, copy: Path, said: Said):
    before = contents(copy)
    _, err = said("train", "--resume", copy, *words, code=2)
    assert message.format(run=copy) in err
    assert contents(copy) == before


@pytest.mark.fault(45)
def test_a_resumed_run_is_told_something_else_knowingly(copy: Path, said: Said):
    words = ["--epochs", 3, "--lr", "1e-4", "--batch-size", 6]
    _, err = said("train", "--resume", copy, *words, "--override", "lr", "batch-size")
    assert "--override changes this run from epoch 3 on, which begins anew: --lr 0.0003 -> 0.0001; --batch-size" in err
    assert (copy / "config.yaml").read_text().startswith("# overridden from epoch 3 on: --lr 0.0003 -> 0.0001\n")
    assert TrainConfig.from_yaml(copy / "config.yaml").lr == 1e-4
    assert "epochs done: 3 of 3" in said("train", "--resume", copy)[1]


def test_other_processes_are_for_a_run_that_is_gone_on_with(said: Said):
    _, err = said("train", "--allow-world-change", code=2)
    assert err == "error: --allow-world-change is for a run that is gone on with: name its folder with --resume\n"


def test_a_run_is_not_written_over(copy: Path, tiny: list[str], photos: Path, said: Said):
    before = contents(copy)
    _, err = said("train", *tiny, "--val-fraction", 0.4, "--data", f"folder:{photos}", "--out", copy, code=2)
    assert err == (
        f"error: --out must name a new run; {copy} holds one already: go on with --resume {copy}, or take another\n"
    )
    assert contents(copy) == before


@pytest.mark.full
def test_two_processes_make_one_run(run: Path, tiny: list[str], script: str, photos: Path, tmp_path: Path):
    command = ["train", *tiny, "--devices", "2", "--data", f"folder:{photos}", "--out", str(tmp_path / "run")]
    done = subprocess.run([script, *command], capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, done.stderr
    one, two = (json.loads((folder / "metrics.json").read_text()) for folder in (run, tmp_path / "run"))
    assert sum(map(sum, two["confusion"])) == sum(map(sum, one["confusion"])) == 2
