"""Every command from its words to its files, its answers on stdout and its errors on stderr."""

from __future__ import annotations

import json
import logging
import os
import shlex
import shutil
import signal
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator
from dataclasses import fields
from importlib.metadata import version
from pathlib import Path

import pytest
import torch
from PIL import Image

from vitrail import cli, trainer
from vitrail.cli import COMMANDS, main
from vitrail.images import open_image
from vitrail.records import History
from vitrail.train.config import TrainConfig
from vitrail.weights import load

TINY = ["--model", "vit_debug", "--epochs", "2", "--batch-size", "4", "--val-fraction", "0.2", "--device", "cpu"]
Said = Callable[..., tuple[str, str]]


@pytest.fixture(scope="module")
def run(photos: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("cli") / "run"
    assert main(["train", *TINY, "--data", f"folder:{photos}", "--out", str(out)]) == 0
    return out


@pytest.fixture
def copy(run: Path, tmp_path: Path) -> Path:
    """The run as its own to change."""
    return Path(shutil.copytree(run, tmp_path / "copy"))


@pytest.fixture
def said(capsys: pytest.CaptureFixture[str]) -> Said:
    """said(*words, code=0) runs a command, checks its exit code and returns stdout and stderr."""

    def run_command(*words: object, code: int = 0) -> tuple[str, str]:
        capsys.readouterr()
        assert main([str(word) for word in words]) == code
        return capsys.readouterr()

    return run_command


@pytest.fixture
def told(monkeypatch: pytest.MonkeyPatch) -> Callable[..., TrainConfig]:
    """told(*words) is the config that `vitrail train` hands on."""
    found: list[TrainConfig] = []

    def taken(config: TrainConfig, **_: object) -> History:
        found.append(config)
        return History()

    def config_of(*words: object) -> TrainConfig:
        assert main(["train", *map(str, words)]) == 0
        return found.pop()

    monkeypatch.setattr(trainer, "run_training", taken)
    return config_of


@pytest.fixture
def loud() -> Iterator[None]:
    """Warnings as users have them, where the other tests make errors of them."""
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        yield


@pytest.fixture
def shipped(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The run stands for the model that ships."""
    monkeypatch.setitem(load.SHIPPED, cli.SHIPPED, load.Shipped(run / "model", "noise"))


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


# ---- train


def test_train_writes_a_run(run: Path):
    assert {part.name for part in run.iterdir()} == {
        "config.yaml", "splits.json", "history.csv", "checkpoints", "model", "metrics.json", "report.html",
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
    ("--lr 1e-7", dict(lr=1e-7, min_lr=1e-7)),
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


def test_an_interrupted_run_is_resumed(run: Path, photos: Path, tmp_path: Path, said: Said, monkeypatch):
    class Stopping(trainer.BatchAugment):
        def __call__(self, batch, number):
            if number == 2:  # the first of the second epoch
                os.kill(os.getpid(), signal.SIGTERM)
            return super().__call__(batch, number)

    out = tmp_path / "run"
    with monkeypatch.context() as patch:
        patch.setattr(trainer, "BatchAugment", Stopping)
        _, err = said("train", *TINY, "--data", f"folder:{photos}", "--out", out, code=143)
    assert err.endswith(f"stopped in epoch 2; go on with: vitrail train --resume {out}\n")
    assert not (out / "model").exists()
    _, err = said("train", "--resume", out)
    assert err.endswith(f"2 of 2 epochs are done; the report is {out / 'report.html'}\n")
    whole, resumed = (contents(folder / "model")["model.safetensors"] for folder in (run, out))
    assert resumed == whole


def test_a_finished_run_is_measured_again_and_no_more(copy: Path, said: Said):
    model = contents(copy / "model")["model.safetensors"]
    (copy / "report.html").unlink()
    _, err = said("train", "--resume", copy)
    assert err.endswith(f"2 of 2 epochs are done; the report is {copy / 'report.html'}\n")
    assert (copy / "report.html").is_file()
    assert contents(copy / "model")["model.safetensors"] == model


def test_a_finished_run_takes_more_epochs(copy: Path, said: Said):
    _, err = said("train", "--resume", copy, "--epochs", 3)
    assert "3 of 3 epochs are done" in err
    assert TrainConfig.from_yaml(copy / "config.yaml").epochs == 3


@pytest.mark.parametrize(("words", "message"), [
    (["--seed", "4"], "told before; --seed was 0, got 4: take the old values"),
    (["--val-fraction", "0.4", "--img-size", "64"], "--img-size was None, got 64; --val-fraction was 0.2, got 0.4: "),
    (["--out", "elsewhere"], "goes on in its own folder {run}; got --out elsewhere: leave it out"),
    (["--config", "a.yaml"], "goes on by its own config.yaml; got --config a.yaml as well: drop one"),
])  # fmt: skip
def test_a_resumed_run_is_told_the_same(words: list[str], message: str, copy: Path, said: Said):
    before = contents(copy)
    _, err = said("train", "--resume", copy, *words, code=2)
    assert message.format(run=copy) in err
    assert contents(copy) == before


def test_a_run_is_not_written_over(copy: Path, photos: Path, said: Said):
    before = contents(copy)
    _, err = said("train", *TINY, "--val-fraction", 0.4, "--data", f"folder:{photos}", "--out", copy, code=2)
    assert err == (
        f"error: --out must name a new run; {copy} holds one already: go on with --resume {copy}, or take another\n"
    )
    assert contents(copy) == before


@pytest.mark.full
def test_two_processes_make_one_run(run: Path, photos: Path, tmp_path: Path):
    command = ["train", *TINY, "--devices", "2", "--data", f"folder:{photos}", "--out", str(tmp_path / "run")]
    done = subprocess.run([script(), *command], capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, done.stderr
    one, two = (json.loads((folder / "metrics.json").read_text()) for folder in (run, tmp_path / "run"))
    assert sum(map(sum, two["confusion"])) == sum(map(sum, one["confusion"])) == 2


# ---- eval


def test_eval_prints_the_figures_of_the_run(run: Path, photos: Path, said: Said):
    metrics = json.loads((run / "metrics.json").read_text())
    out, _ = said("eval", run, "--data", f"folder:{photos}", "--device", "cpu")
    lines = dict(line.split() for line in out.splitlines())
    assert set(lines) == {"accuracy", "balanced_accuracy", "ece", "loss"}
    assert all(float(value) == pytest.approx(metrics[name], abs=1e-4) for name, value in lines.items())
    out, _ = said("eval", run, "--data", f"folder:{photos}", "--json", "--device", "cpu")
    figures = json.loads(out)
    for name, value in figures.items():
        torch.testing.assert_close(torch.tensor(value), torch.tensor(metrics[name]))


def test_eval_refuses_other_classes(run: Path, photos: Path, tmp_path: Path, said: Said):
    shutil.copytree(photos, tmp_path / "other")
    (tmp_path / "other" / "dark").rename(tmp_path / "other" / "dim")
    _, err = said("eval", run, "--data", f"folder:{tmp_path / 'other'}", code=2)
    assert "knows the classes bright, dark; " in err
    assert "has bright, dim: take data with the model's classes" in err


# ---- predict


def test_predict_answers_in_the_order_asked(run: Path, photos: Path, said: Said):
    paths = [photos / "dark" / "1.png", photos / "bright" / "0.png"]
    out, err = said("predict", *paths, "--model", run)
    assert [line.split()[:2] for line in out.splitlines()] == [[str(paths[0]), "dark"], [str(paths[1]), "bright"]]
    assert all(line.endswith("%)") for line in out.splitlines())
    assert err == ""
    out, _ = said("predict", *paths, "--model", run, "--top", 1)
    assert not any("(" in line for line in out.splitlines())


def test_predict_takes_folders(run: Path, photos: Path, said: Said):
    out, _ = said("predict", photos / "dark", photos / "bright" / "5.png", "--model", run)
    assert [Path(line.split()[0]).name for line in out.splitlines()] == [f"{n}.png" for n in range(6)] + ["5.png"]


@pytest.mark.parametrize("first", [True, False])
def test_predict_in_json(first: bool, run: Path, photos: Path, said: Said, shipped: None):
    image = photos / "dark" / "0.png"
    out, err = said("predict", *(["--json", image] if first else [image, "--json"]))
    (line,) = out.splitlines()
    answer = json.loads(line)
    assert answer["id"] == str(image)
    assert answer["label"] == "dark" == answer["top"][0][0]
    assert answer["confidence"] == answer["top"][0][1]
    assert err.startswith("model: bloodcells (vit_debug), for ")


def test_predict_says_which_model_answers(photos: Path, said: Said, shipped: None):
    out, err = said("predict", photos / "dark" / "0.png")
    first, second = out.splitlines()
    assert first.startswith("model: bloodcells (vit_debug), for ")
    assert second.startswith(str(photos))
    assert err == ""


def test_the_model_that_ships_answers(said: Said):
    image = Path(__file__).parents[1] / "examples" / "images" / "wbc_0.png"
    first, second = said("predict", image)[0].splitlines()
    assert first.startswith("model: bloodcells (vit_")
    assert second.split()[1] == "WBC"


def test_an_unreadable_image_is_named(run: Path, photos: Path, tmp_path: Path, said: Said):
    bad = tmp_path / "bad.png"
    bad.write_text("no image")
    out, err = said("predict", photos / "dark" / "0.png", bad, "--model", run, code=2)
    assert err.startswith(f"error: {bad}: not a readable image")
    assert (out, err.count("\n")) == ("", 1)


# ---- explain


def drawn(out: str) -> list[Path]:
    paths = [Path(line) for line in out.splitlines()]
    for path in paths:
        with Image.open(path) as picture:
            assert picture.format == "PNG"
            assert min(picture.size) > 200
    return paths


def test_explain_by_rollout(run: Path, photos: Path, tmp_path: Path, said: Said):
    out, _ = said("explain", photos / "dark" / "0.png", "--model", run, "--out", tmp_path / "new" / "out")
    assert drawn(out) == [tmp_path / "new" / "out" / "0_rollout.png"]


@pytest.mark.parametrize(("heads", "names"), [
    ("mean", ["0_attention.png"]),
    ("0", ["0_attention.png"]),
    ("all", ["0_layer01_heads.png", "0_layer03_heads.png"]),
])  # fmt: skip
def test_explain_by_attention(heads: str, names: list[str], run: Path, photos: Path, tmp_path: Path, said: Said):
    words = ["--method", "attention", "--layers", 1, 3, "--heads", heads, "--out", tmp_path]
    out, _ = said("explain", photos / "dark" / "0.png", "--model", run, *words)
    assert drawn(out) == [tmp_path / name for name in names]


def test_pictures_of_like_names_are_kept_apart(run: Path, photos: Path, tmp_path: Path, said: Said):
    for path, source in (("a/cat.png", "dark/0.png"), ("a/cat.bmp", "dark/1.png"), ("a/dog.png", "dark/2.png")):
        (tmp_path / "in" / path).parent.mkdir(parents=True, exist_ok=True)
        open_image(photos / source).save(tmp_path / "in" / path)
    folders = [tmp_path / "in" / "a", photos / "bright" / "0.png", photos / "dark" / "0.png"]
    out, _ = said("explain", *folders[:1], "--model", run, "--out", tmp_path)
    assert [path.name for path in drawn(out)] == ["cat_bmp_rollout.png", "cat_png_rollout.png", "dog_rollout.png"]
    out, _ = said("explain", *folders[1:], "--model", run, "--out", tmp_path)
    assert [path.name for path in drawn(out)] == ["bright_0_png_rollout.png", "dark_0_png_rollout.png"]


# ---- models, demo, help


def test_models_with_their_parameters(said: Said):
    out, _ = said("models", "vit_tiny*_32")
    rows = [line.split() for line in out.splitlines()]
    assert ["vit_tiny_patch4_32", "2,693,578", "32", "x", "32", "10"] in rows
    assert len(rows) == 3
    _, err = said("models", "vti_*", code=2)
    assert err.startswith("error: no model matches 'vti_*'; the nearest are vit_")


def test_demo_is_the_shipped_recipe(told: Callable[..., TrainConfig], monkeypatch: pytest.MonkeyPatch, said: Said):
    configs: list[TrainConfig] = []
    monkeypatch.setattr(trainer, "run_training", configs.append)
    _, err = said("demo", "--out", "here")
    assert (configs[0].data, configs[0].out) == ("bloodcells", "here")
    assert err == f"open {Path('here') / 'report.html'} in a browser\n"


def flags_of(command: str) -> set[str]:
    if command == "train":
        return {field.name for field in fields(TrainConfig)} | {"config", "resume"}
    names = {"json" if name == "as_json" else name for name in COMMANDS[command].__annotations__}
    return names - {"return", "images", "pattern"} - ({"model"} if command == "eval" else set())


@pytest.mark.parametrize("command", COMMANDS)
def test_help_names_every_flag_with_dashes(command: str, capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit) as end:
        main([command, "--help"])
    assert end.value.code == 0
    text = capsys.readouterr().out
    shown = {word.strip("[]") for word in text.split() if word.strip("[]").startswith("--")}
    assert {f"--{name.replace('_', '-')}" for name in flags_of(command)} <= shown
    assert not any("_" in flag for flag in shown)


def test_help_of_all_commands(said: Said):
    for words in ([], ["-h"], ["--help"]):
        out, _ = said(*words)
        assert all(f"\n  {name} " in out for name in COMMANDS)


def script() -> str:
    return str(Path(sys.executable).with_name("vitrail"))


def test_the_installed_script():
    done = subprocess.run([script(), "--version"], capture_output=True, text=True, check=True)
    assert done.stdout == version("vitrail") + "\n"
    assert main(["--version"]) == 0


# ---- mistakes


@pytest.mark.parametrize(("words", "message"), [
    ("trian --epochs 3", "got 'trian': did you mean train?"),
    ("train --epoch 3", "vitrail train has no flag --epoch: did you mean --epochs?"),
    ("train --label_smothing 0.1", "did you mean --label-smoothing?"),
    ("train --lr 1e-3 --learning-rate 1e-4", "one spelling of --lr; got --lr and --learning-rate: drop one"),
    ("train --opt sgd", "vitrail train has no flag --opt: see vitrail train --help"),
    ("train --n-classes 3", "vitrail train takes no --n-classes: the data says it"),
    ("train --hidden_size 192", "takes no --hidden-size: the row that `model` names says it (`vitrail models`)"),
    ("zzz", "models, demo; got 'zzz'\n"),
    ("train --model vit_tinny", "'vit_tinny'; the nearest are vit_tiny,"),
    ("train --epochs three", "--epochs takes a whole number; got three"),
    ("train --epochs -1", "--epochs must be at least 1; got -1"),
    ("train --epochs", "--epochs: expected one argument"),
    ("train --flip x", "--flip takes a number; got x"),
    ("train --img-size x", "--img-size takes a whole number or null; got x"),
    ("train --debug=maybe", "--debug takes true or false; got maybe"),
    ("train --precision fp61", "--precision must be one of fp32, bf16, fp16; got fp61: did you mean fp16?"),
    ("train --auto-augment random", "imagenet, rand, trivial; got random: did you mean rand?"),
    ("train stray", "unrecognized arguments: stray"),
    ("train --data cifar11", "got 'cifar11': did you mean cifar10?"),
    ("train --data {photos}", "say folder:{photos}"),
    ("train --data folder:{photos}s", "there is no folder {photos}s; the nearest is {photos}"),
    ("train --config {photos}/recipe.yaml", "there is no {photos}/recipe.yaml; the nearest is {photos}/bright"),
    ("train --resume {photos}", "holds config.yaml; there is none in {photos}: name a folder made by `train`"),
    ("train --model vit_tinny --data folder:{photos} --out {tmp}", "'vit_tinny'; the nearest are vit_tiny,"),
    ("train --model resnet_debug --drop-path 0.1 --data folder:{photos} --out {tmp}", "takes no --drop-path; got 0.1"),
    ("eval {run}", "vitrail eval needs --data; see vitrail eval --help"),
    ("eval {run} --data folder:{photos} --split tset", "--split must be one of train, val, test; got 'tset': did you"),
    ("train --seed 1000000000000000000000000000000", "--seed must lie in 0 to 2**63 - 1; got 1000"),
    ("train --mixup 1e-300", "--mixup must be 0 (off) or lie in [0.001, 1000]; got 1e-300"),
    ("predict", "vitrail predict needs images"),
    ("predict {photos}", "{photos}: the folder holds no image file (.bmp, "),
    ("predict {photos}/dark/O.png --model {run}", "there is no {photos}/dark/O.png; the nearest is {photos}/dark/"),
    ("predict {photos}/dark --model {run}s", "{run}s does not exist: the nearest beside it is {run}"),
    ("predict {photos}/dark --model vit_debug", "vit_debug is an architecture without weights"),
    ("predict {photos}/dark --model {run} --top 0", "top must be at least 1; got 0"),
    ("predict {photos}/dark --model {run} --device tpu", "device must be auto or one that is here"),
    ("explain {photos}/dark --model {run} --method rolout", "got 'rolout': did you mean rollout?"),
    ("explain {photos}/dark --model {run} --heads all", "rollout fuses heads by mean, max or min; got 'all'"),
    ("explain {photos}/dark --model {run} --method attention --layers 2 9", "must lie in 1 … 3, the attention layers"),
    ("explain {photos}/dark --model {run} --method attention --layers x", "--layers takes a whole number; got x"),
    ("explain {photos}/dark --model {run} --method attention --heads 7", "heads must lie in 0 … 2"),
    ("explain {photos}/dark --model {run} --method attention --heads meen", "or head numbers from 0; got 'meen'"),
    ("explain {photos}/dark --model {run} --out {run}/config.yaml", "{run}/config.yaml: File exists"),
])  # fmt: skip
def test_a_mistake_is_one_line_and_exit_code_2(words: str, message: str, run: Path, photos, tmp_path, said: Said):
    places = {"run": run, "photos": photos, "tmp": tmp_path / "out"}
    out, err = said(*shlex.split(words.format(**places)), code=2)
    assert message.format(**places) in err
    assert err.startswith("error: ")
    assert (out, err.count("\n")) == ("", 1)


def test_a_wrong_model_is_found_before_the_data_is_read(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, said: Said):
    monkeypatch.setattr(trainer, "load_splits", lambda _: pytest.fail("the data was read"))
    _, err = said("train", "--model", "vit_tinny", "--out", tmp_path / "run", code=2)
    assert "there is no model 'vit_tinny'" in err


@pytest.mark.usefixtures("loud")
def test_dropout_is_told_as_a_note(told: Callable[..., TrainConfig], capsys: pytest.CaptureFixture[str]):
    assert told("--dropout", 0.1).drop_rate == 0.1
    assert "note: vitrail train: dropout is taken for drop_rate\n" in capsys.readouterr().err


def test_what_the_package_logs_is_shown_and_nothing_stays(monkeypatch: pytest.MonkeyPatch, said: Said):
    log = logging.getLogger("vitrail")
    before = log.level, list(log.handlers)
    monkeypatch.setitem(COMMANDS, "models", lambda: log.info("vit_tiny is %s", "a\x1b[2Jrow"))
    assert said("models") == ("", "vit_tiny is a\\x1b[2Jrow\n")
    assert (log.level, list(log.handlers)) == before


@pytest.mark.usefixtures("loud")
@pytest.mark.parametrize("variable", cli.PROCESS_NUMBERS)
def test_of_several_processes_the_first_speaks(variable: str, monkeypatch: pytest.MonkeyPatch, said: Said):
    def speak() -> None:
        warnings.warn("mind", UserWarning, stacklevel=1)
        logging.getLogger("vitrail").info("the step")
        cli._tell("done")

    monkeypatch.setitem(COMMANDS, "models", speak)
    monkeypatch.setenv(variable, "0")
    assert said("models")[1].splitlines() == ["note: mind", "the step", "done"]
    monkeypatch.setenv(variable, "1")
    assert said("models") == ("", "")
    _, err = said("models", "--wrong", code=2)  # a mistake that only this process sees must be seen
    assert err.startswith("error: ")


def test_names_that_a_terminal_would_obey_are_escaped(run: Path, photos: Path, tmp_path: Path, said: Said):
    image = Path(shutil.copy(photos / "dark" / "0.png", tmp_path / "a\x1b[2J.png"))
    out, _ = said("predict", image, "--model", run)
    assert out.startswith(f"{tmp_path}/a\\x1b[2J.png  dark ")
    out, _ = said("predict", image, "--model", run, "--json")
    assert json.loads(out)["id"] == str(image)
    _, err = said("predict", f"{image}\nerror: fine", "--model", run, code=2)
    assert "\x1b" not in err
    assert err.count("\n") == 1


def test_answers_are_printed_as_their_batch_is_done(run: Path, photos: Path, tmp_path: Path, said: Said):
    for number in range(32):
        shutil.copy(photos / "dark" / "0.png", tmp_path / f"{number:02d}.png")
    (tmp_path / "z.png").write_text("no image")
    out, err = said("predict", tmp_path, "--model", run, code=2)
    assert (len(out.splitlines()), err.count("\n")) == (32, 1)


@pytest.mark.parametrize("error", [
    RuntimeError("[enforce fail at alloc_cpu.cpp:127]\nDefaultCPUAllocator: can't allocate memory: you tried to"),
    RuntimeError("DefaultCPUAllocator: not enough memory: you tried to allocate 9 bytes."),
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 30.00 GiB."), MemoryError(),
])  # fmt: skip
def test_too_little_memory_is_one_line(error: Exception, monkeypatch: pytest.MonkeyPatch, said: Said):
    def greedy() -> None:
        raise error

    monkeypatch.setitem(COMMANDS, "models", greedy)
    out, err = said("models", code=2)
    assert err.startswith("error: there is too little memory: a smaller --batch-size, --img-size or model needs less (")
    assert (out, err.count("\n")) == ("", 1)


def test_a_fault_of_the_program_keeps_its_traceback(monkeypatch: pytest.MonkeyPatch):
    def broken() -> None:
        raise RuntimeError("mat1 and mat2 shapes cannot be multiplied")

    monkeypatch.setitem(COMMANDS, "models", broken)
    with pytest.raises(RuntimeError, match="mat1 and mat2"):
        main(["models"])


def test_ctrl_c_is_130(monkeypatch: pytest.MonkeyPatch, said: Said):
    def stop() -> None:
        raise KeyboardInterrupt

    monkeypatch.setitem(COMMANDS, "models", stop)
    assert said("models", code=130) == ("", "")


@pytest.mark.usefixtures("loud")
def test_warnings_become_notes(monkeypatch: pytest.MonkeyPatch, said: Said):
    def warn() -> None:
        warnings.warn("mind the step", UserWarning, stacklevel=1)

    monkeypatch.setitem(COMMANDS, "models", warn)
    shown = warnings.showwarning
    assert said("models") == ("", "note: mind the step\n")
    assert warnings.showwarning is shown


def test_nothing_of_the_process_is_changed(run: Path, photos: Path, said: Said):
    before = torch.get_num_threads(), torch.is_grad_enabled(), signal.getsignal(signal.SIGINT), Path.cwd()
    said("predict", photos / "dark" / "0.png", "--model", run)
    assert (torch.get_num_threads(), torch.is_grad_enabled(), signal.getsignal(signal.SIGINT), Path.cwd()) == before
