"""Ranges, spellings and YAML of a run's config."""

from __future__ import annotations

import ast
import inspect
import itertools
import os
from dataclasses import fields

import numpy as np
import pytest
import yaml

from vitrail.train import config as module
from vitrail.train.config import NEEDS, TrainConfig, say_idle


def test_defaults_are_sound():
    config = TrainConfig()
    assert (config.model, config.epochs, config.batch_size, config.mixup, config.ema) == (
        "auto",
        100,
        128,
        0.0,
        0.0,
    )
    assert config.changes() == {}


def test_every_field_of_the_run_says_what_it_is():
    (cls,) = (n for n in ast.parse(inspect.getsource(module)).body if isinstance(n, ast.ClassDef))
    body = cls.body[1:]  # after its docstring
    pairs = itertools.pairwise(body)
    named = [n.target.id for n, after in pairs if isinstance(n, ast.AnnAssign) and isinstance(after, ast.Expr)]
    assert named == [n.target.id for n in body if isinstance(n, ast.AnnAssign)]


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("label_smoothing", 1.0, r"--label-smoothing must lie in \[0, 1\); got 1.0"),
        ("ema", -0.1, r"--ema must lie in \[0, 1\); got -0.1"),
        ("devices", 0, "--devices must be at least 1; got 0"),
        ("patience", -1, r"--patience must be 0 \(off\) or more; got -1"),
        ("max_minutes", float("nan"), r"--max-minutes must be 0 \(off\) or more; got nan"),
        ("model", "", "--model must name a model; see `vitrail models`; got nothing"),
        ("out", "", "--out must name a folder; got nothing"),
        ("precision", "bf61", "--precision must be one of fp32, bf16, fp16; got 'bf61': did you mean bf16"),
        ("device", "gpu", "--device must be one of auto, cpu, cuda, mps; got 'gpu'"),
        ("global_pool", "mean_max", "--global-pool must be one of auto, token, avg, map; got 'mean_max'"),
        ("log", "csb", "--log must be one of csv, tensorboard, wandb, mlflow; got 'csb'"),
        ("batch_size", 0, "--batch-size must be at least 1; got 0"),
        ("mixup", -1, r"--mixup must be 0 \(off\) or lie in \[0.001, 1000\]; got -1"),
        ("seed", 10**30, r"--seed must lie in 0 to 2\*\*63 - 1; got 1000000"),
        ("seed", -1, "--seed must lie in 0"),
        ("lr", -1, "--lr must be positive; got -1"),
    ],
)
def test_ranges_of_all_parts(field, value, message):
    with pytest.raises(ValueError, match=message):
        TrainConfig(**{field: value})


def test_fp16_is_not_for_the_cpu():
    with pytest.raises(ValueError, match="--precision must be fp32 or bf16 with --device cpu; got fp16"):
        TrainConfig(precision="fp16", device="cpu")


def test_other_spellings_are_taken():
    config = TrainConfig.from_dict({"learning_rate": 1e-3, "num_epochs": 7, "mixup_alpha": 0.2, "output_dir": "x"})
    assert (config.lr, config.epochs, config.mixup, config.out) == (1e-3, 7, 0.2, "x")
    assert (
        TrainConfig.from_dict({"pool": "gap"}) == TrainConfig.from_dict({"gp": "avg"}) == TrainConfig(global_pool="avg")
    )
    with pytest.raises(TypeError, match="got both lr and learning_rate"):
        TrainConfig.from_dict({"lr": 1.0, "learning_rate": 1.0})
    with pytest.raises(TypeError, match="no argument 'epoch'; the nearest is epochs"):
        TrainConfig.from_dict({"epoch": 1})


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("lr", "fast", "--lr takes a number or none; got 'fast'"),
        ("lr", True, "--lr takes a number or none; got True"),
        ("epochs", 2.5, "--epochs takes a whole number; got 2.5"),
        ("debug", 1, "--debug takes true or false; got 1"),
        ("img_size", "big", "--img-size takes a whole number or none; got 'big'"),
        ("out", 3, "--out takes a text; got 3"),
    ],
)
def test_wrong_types_are_named(name, value, message):
    for make in (TrainConfig, lambda **given: TrainConfig.from_dict(given)):
        with pytest.raises(TypeError, match=message):
            make(**{name: value})


def test_numbers_of_other_libraries_are_numbers(tmp_path):
    config = TrainConfig(lr=np.float64(1e-3), epochs=np.int64(3), warmup_epochs=np.int32(1), mixup=np.float32(0.5))
    assert config == TrainConfig(lr=1e-3, epochs=3, warmup_epochs=1.0, mixup=0.5)
    assert {type(value) for value in config.changes().values()} == {int, float}
    config.to_yaml(tmp_path / "a.yaml")
    assert TrainConfig.from_yaml(tmp_path / "a.yaml") == config
    assert TrainConfig(clip_grad="1e0", warmup_epochs=1).changes() == {"warmup_epochs": 1.0}
    with pytest.raises(TypeError, match="--epochs takes a whole number; got 2.5"):
        TrainConfig(epochs=np.float64(2.5))


# ---- settings that do nothing


@pytest.mark.parametrize(
    ("settings", "needs"),
    [
        ({"crop": "resized", "crop_pad": 0.2}, "--crop-pad needs --crop pad"),
        ({"crop": "none", "pad_mode": "reflect"}, "--pad-mode needs --crop pad"),
        ({"crop": "pad", "crop_scale": 0.5}, "--crop-scale needs --crop resized"),
        ({"rand_ops": 3}, "--rand-ops needs --auto-augment rand"),
        ({"auto_augment": "auto", "rand_magnitude": 3}, "--rand-magnitude needs --auto-augment rand"),
        ({"rand_std": 1.5}, "--rand-std needs --auto-augment rand"),
        ({"auto_augment": "trivial", "rand_chance": 0.5}, "--rand-chance needs --auto-augment rand"),
        ({"schedule": "constant", "min_lr": 0.0}, "--min-lr needs a --schedule that falls"),
        (
            {"decay_steps": 3, "decay_rate": 0.5},
            "--decay-steps needs --schedule step; --decay-rate needs --schedule step",
        ),
        ({"decay_epochs": 3.0}, "--decay-epochs needs --schedule step"),
        ({"schedule": "step", "restart_epochs": 3.0}, "--restart-epochs needs --schedule restarts"),
        (
            {"restart_steps": 3, "restart_factor": 2.0},
            "--restart-steps needs --schedule restarts; --restart-factor needs --schedule restarts",
        ),
        ({"optimizer": "sgd", "beta2": 0.9}, "--beta2 needs an --optimizer other than sgd"),
        ({"data": "folder:photos", "download": True}, "--download needs --data cifar10 or cifar100"),
        ({"log": "tensorboard"}, "--log needs a folder to write to (out)"),
        ({"checkpoint_every": 1}, "--checkpoint-every needs a folder to write to (out)"),
        ({"strategy": "fsdp"}, "--strategy needs several processes (--devices, --num-nodes)"),
        ({"strategy": "fsdp", "devices": 2, "patience": 1}, "--patience needs validation images"),
        ({"patience": 1}, "--patience needs validation images"),
        ({"patience": 1, "rand_ops": 3}, "--rand-ops needs --auto-augment rand; --patience needs validation images"),
    ],
)
def test_settings_that_do_nothing_are_told_in_one_line(settings, needs, caplog):
    say_idle(TrainConfig(**settings), kept=False, validated=False)
    assert caplog.messages == [f"these settings do nothing here: {needs}"]


def test_settings_that_do_something_are_not_mentioned(caplog):
    say_idle(TrainConfig(), kept=False, validated=False)
    for crop in ({"crop": "pad", "crop_pad": 0.2, "pad_mode": "reflect"}, {"crop": "resized", "crop_scale": 0.5}):
        rest = {"auto_augment": "rand", "rand_ops": 3, "rand_magnitude": 3, "data": "cifar10", "download": True}
        say_idle(TrainConfig(**crop, **rest, log="tensorboard", checkpoint_every=1, patience=1))
    for schedule in (
        {"schedule": "step", "decay_steps": 3, "decay_rate": 0.5},
        {"schedule": "restarts", "restart_epochs": 3.0},
    ):
        say_idle(TrainConfig(**schedule, min_lr=0.0, beta2=0.9))
    assert caplog.messages == []


def test_every_setting_with_a_need_is_a_setting():
    assert set(NEEDS) <= {f.name for f in fields(TrainConfig)}


def test_yaml_holds_what_differs_and_comes_back(tmp_path):
    config = TrainConfig(lr=1e-3, min_lr=1e-7, img_size=32, in_memory=True, auto_augment="rand", out="runs/é")
    config.to_yaml(tmp_path / "a.yaml", header="vitrail train …\n2 minutes on 2 cores")
    text = (tmp_path / "a.yaml").read_text(encoding="utf-8")
    assert text.startswith("# vitrail train …\n# 2 minutes on 2 cores\n")
    assert "epochs" not in text
    assert TrainConfig.from_yaml(tmp_path / "a.yaml") == config


def test_yaml_is_written_whole(tmp_path, monkeypatch):
    path = tmp_path / "new" / "a.yaml"
    TrainConfig(lr=1e-3).to_yaml(path)
    before = path.read_bytes()

    def full(*args):
        raise OSError("no space left")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="no space"):
        TrainConfig(lr=1e-2).to_yaml(path)
    assert path.read_bytes() == before and list(path.parent.iterdir()) == [path]


def test_yaml_without_changes_is_the_defaults(tmp_path):
    TrainConfig().to_yaml(tmp_path / "a.yaml")
    assert TrainConfig.from_yaml(tmp_path / "a.yaml") == TrainConfig()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("epoch: 3", "a.yaml: TrainConfig has no argument 'epoch'; the nearest is epochs"),
        ("lr: -1", "a.yaml: --lr must be positive; got -1"),
        ("- 3", "a.yaml: a config holds lines such as `epochs: 100`; got list"),
        ("lr: [", "a.yaml: while parsing"),
    ],
)
def test_a_bad_yaml_names_the_file(text, message, tmp_path):
    (tmp_path / "a.yaml").write_text(text)
    with pytest.raises(ValueError, match=message):
        TrainConfig.from_yaml(tmp_path / "a.yaml")


def test_a_yaml_stands_on_those_it_includes(tmp_path):
    """In any spelling, later ones over earlier ones, its own words over all; beside it, wherever it is read from."""
    (tmp_path / "parts").mkdir()
    (tmp_path / "parts" / "long.yaml").write_text("epochs: 300\nmixup: 0.8\ncutmix: 1.0\n")
    (tmp_path / "training.yaml").write_text("include: parts/long.yaml\nlr: 0.003\ncutmix-alpha: 0.5\n")
    (tmp_path / "small.yaml").write_text("batch_size: 4\n")
    (tmp_path / "a.yaml").write_text("include: [training.yaml, small.yaml]\nmixup-alpha: 0.2\n")
    changes = {"epochs": 300, "mixup": 0.2, "cutmix": 0.5, "lr": 0.003, "batch_size": 4}
    assert TrainConfig.from_yaml(tmp_path / "a.yaml").changes() == changes


def test_two_files_may_include_a_third(tmp_path):
    for name, text in (("c", "lr: 0.1"), ("b", "include: c.yaml"), ("a", "include: [b.yaml, c.yaml]")):
        (tmp_path / f"{name}.yaml").write_text(text)
    assert TrainConfig.from_yaml(tmp_path / "a.yaml").lr == 0.1


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "include: b.yaml",
            r"a.yaml: .*b.yaml: include must not come round to a file that it began with; got .*a.yaml",
        ),
        ("include: a.yaml", r"a.yaml: include must not come round to a file that it began with; got .*a.yaml: take"),
        ("include: {c: 1}", r"a.yaml: include takes the name of a file beside this one, or a list of them; got \{'c"),
        ("include: ['']", r"a.yaml: include takes the name of a file beside this one, or a list of them; got \[''\]"),
        ("include: no.yaml", r"a.yaml: .*no.yaml \(No such file or directory\): name another"),
        ("include: wrong.yaml", r"a.yaml: .*wrong.yaml: TrainConfig has no argument 'epoch'; the nearest is epochs"),
    ],
)
def test_an_include_that_cannot_be_is_named(text, message, tmp_path):
    (tmp_path / "a.yaml").write_text(text)
    (tmp_path / "b.yaml").write_text("include: a.yaml")
    (tmp_path / "wrong.yaml").write_text("epoch: 3")
    with pytest.raises(ValueError, match=message):
        TrainConfig.from_yaml(tmp_path / "a.yaml")


def test_what_is_no_file_is_no_config(tmp_path):
    with pytest.raises(ValueError, match=r"a YAML file that can be read; got .* \(Is a directory\): name another"):
        TrainConfig.from_yaml(tmp_path)


@pytest.mark.parametrize("word", ["none", "None", "null", "~"])
def test_a_yaml_may_say_none_as_the_flags_do(word, tmp_path):
    (tmp_path / "a.yaml").write_text(f"img_size: {word}\nin_memory: {word}\nout: none\n")
    assert TrainConfig.from_yaml(tmp_path / "a.yaml").changes() == {"out": "none"}


@pytest.mark.parametrize("field", ["lr", "precision", "crop", "out", "in_memory"])
def test_a_yaml_bomb_gives_a_short_message(field, tmp_path):
    names = "abcdefghijklmnop"
    lines = [f"{b}: &{b} [{', '.join([f'*{a}'] * 9)}]" for a, b in itertools.pairwise(names)]
    (tmp_path / "a.yaml").write_text(f"a: &a [lol]\n{chr(10).join(lines)}\n".replace("a: &a", "x: &a", 1))
    values = yaml.safe_load((tmp_path / "a.yaml").read_text())
    with pytest.raises(TypeError) as caught:
        TrainConfig.from_dict({field: values["p"]})
    assert len(str(caught.value)) < 150


def test_yaml_reads_what_people_write(tmp_path):
    (tmp_path / "a.yaml").write_text("lr: 1e-3\nbatch-size: 64\nwarmup_epochs: 1\n")
    config = TrainConfig.from_yaml(tmp_path / "a.yaml")
    assert (config.lr, config.batch_size, config.warmup_epochs) == (1e-3, 64, 1.0)
    assert isinstance(config.warmup_epochs, float)


def test_no_field_is_defined_twice():
    own = [n for cls in TrainConfig.__mro__ for n in vars(cls).get("__annotations__", {})]
    assert sorted(own) == sorted({f.name for f in fields(TrainConfig)})
