"""One small run for all commands, and what they are asked and say."""

from __future__ import annotations

import shutil
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from vitrail import commands, trainer
from vitrail.cli import main
from vitrail.records import History
from vitrail.train.config import TrainConfig
from vitrail.weights import load

Said = Callable[..., tuple[str, str]]


@pytest.fixture(scope="session")
def tiny() -> list[str]:
    """The flags of a run of seconds."""
    return ["--model", "vit_debug", "--epochs", "2", "--batch-size", "4", "--val-fraction", "0.2", "--device", "cpu"]


@pytest.fixture(scope="session")
def script() -> str:
    """The installed command."""
    return str(Path(sys.executable).with_name("vitrail"))


@pytest.fixture(scope="session")
def run(photos: Path, tiny: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("cli") / "run"
    assert main(["train", *tiny, "--data", f"folder:{photos}", "--out", str(out)]) == 0
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
    monkeypatch.setitem(load.SHIPPED, commands.SHIPPED, load.Shipped(run / "model", "noise"))
