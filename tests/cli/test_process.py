"""Commands as a process: help, notes, exit codes, pipes, and nothing left changed."""

from __future__ import annotations

import json
import logging
import re
import shutil
import signal
import subprocess
import sys
import tomllib
import warnings
from collections.abc import Callable
from dataclasses import fields
from importlib.metadata import version
from pathlib import Path

import pytest
import torch

from vitrail import commands, processes, trainer
from vitrail.cli import COMMANDS, main
from vitrail.train.config import TrainConfig

Said = Callable[..., tuple[str, str]]
ROOT = Path(__file__).parents[2]


def test_models_with_their_parameters(said: Said):
    out, _ = said("models", "vit_tiny*_32")
    rows = [line.split() for line in out.splitlines()]
    assert ["vit_tiny_patch4_32", "2,693,578", "32", "x", "32", "10"] in rows
    assert len(rows) == 3
    _, err = said("models", "vti_*", code=2)
    assert err.startswith("error: no model matches 'vti_*'; the nearest are ") and len(err.split(",")) == 3


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
    words = {
        "eval": {"model"},
        "inspect": {"file"},
        "convert": {"source", "out"},
        "transfer": {"weights", "data"},
        "ablate": {"config"},
    }
    return names - {"return", "images", "pattern"} - words.get(command, set())


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


def test_the_installed_script(script: str):
    done = subprocess.run([script, "--version"], capture_output=True, text=True, check=True)
    assert done.stdout == version("vitrail") + "\n"
    assert main(["--version"]) == 0


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
@pytest.mark.parametrize("variable", processes.NUMBERS)
def test_of_several_processes_the_first_speaks(variable: str, monkeypatch: pytest.MonkeyPatch, said: Said):
    def speak() -> None:
        warnings.warn("mind", UserWarning, stacklevel=1)
        logging.getLogger("vitrail").info("the step")
        commands.tell("done")

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


INTERRUPTED_WHILE = """
import builtins, os, signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell lets what it starts in the background ignore it
load = builtins.__import__
def interrupted(name, *rest, **named):
    if name == "torch":
        os.kill(os.getpid(), signal.SIGINT)
    return load(name, *rest, **named)
builtins.__import__ = interrupted
WAY_IN
sys.exit(way_in())
"""


def test_ctrl_c_while_the_program_is_loaded_is_one_line():
    way_in = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["scripts"]["vitrail"]
    module, _, name = way_in.partition(":")
    code = INTERRUPTED_WHILE.replace("WAY_IN", f"from {module} import {name} as way_in")
    done = subprocess.run([sys.executable, "-c", code, "models"], capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "stopped before anything was done\n")


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


@pytest.mark.parametrize("command", ["models", "predict {photos}/dark --model {run}"])
def test_a_reader_that_goes_away_is_no_error(command: str, script: str, run: Path, photos: Path):
    words = command.format(photos=photos, run=run).split()
    done = subprocess.Popen([script, *words], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert done.stdout is not None and done.stderr is not None
    done.stdout.close()  # before it says anything
    assert (done.stderr.read(), done.wait(timeout=120)) == ("", 141)
    done.stderr.close()


def test_a_file_of_the_system_that_refuses_is_named_with_a_mend(monkeypatch: pytest.MonkeyPatch, said: Said):
    def refuse() -> None:
        raise FileNotFoundError(2, "No such file or directory", "/proc/x")

    monkeypatch.setitem(COMMANDS, "models", refuse)
    _, err = said("models", code=2)
    assert err.startswith("error: /proc/x cannot be read or written: No such file or directory: name another")


def test_help_speaks_plainly(capsys: pytest.CaptureFixture[str]):
    """The choices stand beside the flag; no Python types, and `none` as it may be said."""
    for command in COMMANDS:
        with pytest.raises(SystemExit):
            main([command, "--help"])
        text = " ".join(capsys.readouterr().out.split())
        assert not re.search("type: |Literal|null|None", text)
        if command == "train":
            assert (
                "--pad-mode {zero,reflect} crop pad: what the padding holds, black or the image reflected (default"
                in text
            )
            assert "--in-memory {true,false,none} " in text and "(default: none)" in text


def test_nothing_of_the_process_is_changed(run: Path, photos: Path, said: Said):
    before = torch.get_num_threads(), torch.is_grad_enabled(), signal.getsignal(signal.SIGINT), Path.cwd()
    said("predict", photos / "dark" / "0.png", "--model", run)
    assert (torch.get_num_threads(), torch.is_grad_enabled(), signal.getsignal(signal.SIGINT), Path.cwd()) == before
