"""What TensorBoard, W&B and MLflow are told of a run: real ones, W&B without its server and MLflow in a data base."""

from __future__ import annotations

import json
import os
import struct
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from vitrail.cli import main
from vitrail.train import loggers
from vitrail.train.config import TrainConfig
from vitrail.train.loggers import LOGS, MlflowLog, TensorBoardLog, WandbLog, conclude_logs, run_logs


@pytest.fixture(autouse=True)
def nobody_else_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither the user's own settings nor the makers' counting of use."""
    for name in [name for name in os.environ if name.startswith(("WANDB_", "MLFLOW_"))]:
        monkeypatch.delenv(name)
    for name, value in (
        ("WANDB_MODE", "offline"), ("WANDB_SILENT", "true"), ("WANDB_ERROR_REPORTING", "false"),
        ("MLFLOW_DISABLE_TELEMETRY", "true"), ("DO_NOT_TRACK", "true"),
    ):  # fmt: skip
        monkeypatch.setenv(name, value)


@pytest.fixture
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """The user's own store, of files, since a data base takes its time to be made: a client of it."""
    from mlflow import MlflowClient

    uri = (tmp_path / "own").as_uri()
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    monkeypatch.chdir(tmp_path)
    with warnings.catch_warnings(action="ignore"):
        yield MlflowClient(uri)


def wandb_history(folder: Path) -> list[dict[str, Any]]:
    """What W&B's own files of all parts of a run hold, step by step."""
    from wandb.proto.wandb_internal_pb2 import Record

    rows = []
    for path in sorted(folder.glob("wandb/offline-run-*/*.wandb")):
        for found in map(Record.FromString, pieces(path.read_bytes())):
            if found.WhichOneof("record_type") == "history":
                items = {
                    ".".join([i.key] if i.key else i.nested_key): json.loads(i.value_json) for i in found.history.item
                }
                rows.append(items | {"step": found.history.step.num})
    return rows


def pieces(data: bytes) -> Iterator[bytes]:
    """The records of a LevelDB log, which has blocks of 32 KiB; W&B's begins with seven bytes of its own."""
    place, whole = 7, b""
    while place + 7 <= len(data):
        if place % 32768 > 32768 - 7:
            place += -place % 32768
            continue
        _, length, kind = struct.unpack_from("<IHB", data, place)
        whole += data[place + 7 : place + 7 + length]
        place += 7 + length
        if kind in (1, 4):  # whole, or the last part
            yield whole
            whole = b""


def events(folder: Path) -> Any:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    return EventAccumulator(str(folder / "tensorboard")).Reload()


def test_all_of_them_are_told_every_epoch(train, tmp_path: Path, store: Any):
    out = tmp_path / "a run"
    history = train(epochs=3, log=("tensorboard", "wandb", "mlflow"), out=out)
    board = events(out)
    assert len(list((out / "tensorboard").iterdir())) == 1
    assert [e.step for e in board.Scalars("val_accuracy")] == [1, 2, 3]
    assert [e.value for e in board.Scalars("train_loss")] == pytest.approx(history["train_loss"])
    rows = wandb_history(out)
    assert [row["step"] for row in rows] == [1, 2, 3]
    assert [row["train_loss"] for row in rows] == history["train_loss"]
    (run,) = store.search_runs([store.get_experiment_by_name("vitrail").experiment_id])
    told = store.get_metric_history(run.info.run_id, "train_loss")
    assert [(m.step, m.value) for m in told] == list(zip((1, 2, 3), history["train_loss"], strict=True))
    assert (run.info.run_name, run.info.status) == ("a run", "FINISHED")
    assert (run.data.params["batch_size"], run.data.params["optimizer"], run.data.params["epochs"]) == (
        "8",
        "adamw",
        "3",
    )
    assert set(json.loads((out / "loggers.json").read_text())) == {"wandb", "mlflow"}
    assert (out / "history.csv").is_file()


def test_a_run_that_is_gone_on_with_goes_on_there_too(train, tmp_path: Path, store: Any):
    def stops(number: int) -> None:
        if number == 18:
            raise OSError("stopped")

    with pytest.raises(OSError, match="stopped"):
        train(epochs=4, log=("wandb", "mlflow"), out=tmp_path, hook=stops)
    before = json.loads((tmp_path / "loggers.json").read_text())
    assert store.get_run(before["mlflow"]).info.status == "FAILED"
    history = train(epochs=4, log=("wandb", "mlflow"), out=tmp_path, resume=True)
    assert json.loads((tmp_path / "loggers.json").read_text()) == before
    rows = wandb_history(tmp_path)
    assert [row["step"] for row in rows] == [1, 2, 3, 4]
    assert [row["val_loss"] for row in rows] == history["val_loss"]
    parts = list(tmp_path.glob("wandb/offline-run-*"))  # two of one second get a number more
    assert len(parts) == 2 and all(f"-{before['wandb']}" in path.name for path in parts)
    told = store.get_metric_history(before["mlflow"], "val_loss")
    assert [m.step for m in told] == [1, 2, 3, 4]
    assert store.get_run(before["mlflow"]).info.status == "FINISHED"


def test_a_new_run_in_a_folder_where_one_died_early_is_a_new_one(train, tmp_path: Path, store: Any):
    (tmp_path / "loggers.json").write_text('{"mlflow": "somebody else\'s"}')
    train(epochs=1, log="mlflow", out=tmp_path)
    assert store.get_run(json.loads((tmp_path / "loggers.json").read_text())["mlflow"]).info.status == "FINISHED"


def test_without_an_address_mlflow_writes_into_the_run_folder(tmp_path: Path):
    from mlflow import MlflowClient

    log = MlflowLog(TrainConfig(), tmp_path, resumed=False)
    (tmp_path / "report.html").write_text("a report")
    for step, words in (
        (log.open, (0,)), (log.write, ({"epoch": 1, "loss": 2.0},)),
        (log.conclude, ({"test_accuracy": 0.5}, tmp_path / "report.html", 1)), (log.close, ()),
    ):  # fmt: skip
        log.attempt(step, *words)
    assert not log.failed
    client = MlflowClient(f"sqlite:///{tmp_path / 'mlflow' / 'mlflow.db'}")
    run = client.get_run(log.name)
    assert (run.data.metrics["loss"], run.data.metrics["test_accuracy"]) == (2.0, 0.5)
    assert next((tmp_path / "mlflow" / "artifacts").rglob("report.html")).read_text() == "a report"


def test_the_command_tells_the_report_at_the_end(photos: Path, tmp_path: Path, store: Any, capsys):
    out = tmp_path / "out"
    words = ["--model", "vit_debug", "--data", f"folder:{photos}", "--epochs", "1", "--batch-size", "4"]
    words += ["--device", "cpu", "--out", str(out), "--log", "tensorboard", "wandb", "mlflow", "--val-fraction", "0.34"]
    assert main(["train", *words]) == 0
    metrics = json.loads((out / "metrics.json").read_text())
    run = store.get_run(json.loads((out / "loggers.json").read_text())["mlflow"])
    assert run.data.metrics["test_accuracy"] == pytest.approx(metrics["accuracy"])
    assert [file.path for file in store.list_artifacts(run.info.run_id)] == ["report.html"]
    assert events(out).Scalars("test_accuracy")[0].value == pytest.approx(metrics["accuracy"])
    assert [row.get("report._type") for row in wandb_history(out)] == [None, "html-file"]
    assert TrainConfig.from_yaml(out / "config.yaml").log == ("tensorboard", "wandb", "mlflow")
    assert "--log tensorboard wandb mlflow" in metrics["command"]


def test_figures_of_validation_images_are_called_otherwise(tmp_path: Path, monkeypatch):
    told: list[Any] = []
    log = SimpleNamespace(
        open=lambda done: None, close=lambda: None, conclude=lambda *words: told.append(words),
        attempt=lambda step, *words: step(*words),
    )  # fmt: skip
    monkeypatch.setattr(loggers, "run_logs", lambda *_: [log])
    figures = {"accuracy": torch.tensor(0.5), "confusion": torch.zeros(2, 2)}
    for split in ("val", "test"):
        conclude_logs(TrainConfig(), tmp_path, split, figures, 3)
    assert [figures for figures, *_ in told] == [{"best_val_accuracy": 0.5}, {"test_accuracy": 0.5}]
    monkeypatch.setenv("RANK", "1")
    conclude_logs(TrainConfig(), tmp_path, "test", figures, 3)
    assert len(told) == 2


def test_tensorboard_takes_back_what_was_written_after_the_checkpoint(tmp_path: Path):
    """A run that was stopped in epoch 3 and resumed after epoch 2 writes epoch 3 again."""
    log, opened = TensorBoardLog(TrainConfig(), tmp_path, resumed=True), []
    writer = lambda folder, purge_step: opened.append((folder, purge_step))  # noqa: E731
    log.library = SimpleNamespace(SummaryWriter=writer)
    log.open(2)
    assert opened == [(str(tmp_path / "tensorboard"), 3)]


@pytest.mark.parametrize("word", LOGS)
def test_each_is_asked_for_by_its_pip_line_before_anything_is_written(word, photos, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, LOGS[word].module, None)
    words = ["--model", "vit_debug", "--data", f"folder:{photos}", "--log", word, "--out", str(tmp_path / "out")]
    assert main(["train", *words]) == 2
    said = capsys.readouterr().err
    assert f"--log {word} needs the {word} package; it is not installed: pip install 'vitrail[logging]'" in said
    assert not (tmp_path / "out").exists()


@pytest.mark.fault(47)
@pytest.mark.parametrize(("log", "at"), [(WandbLog, "W&B's figures in "), (MlflowLog, "MLflow's figures at sqlite")])
@pytest.mark.parametrize("method", ["open", "write", "close"])
def test_one_that_fails_is_told_of_once_and_ends_no_training(log, at, method, train, tmp_path, monkeypatch, caplog):
    """As where a server is away: whatever the library raises."""

    def fails(self: Any, *words: Any) -> None:
        raise RuntimeError("the server is away")

    for name in ("open", "write", "close"):
        monkeypatch.setattr(log, name, fails if name == method else lambda self, *words: None)
    assert len(train(epochs=3, log=log.word, out=tmp_path)) == 3
    (message,) = caplog.messages
    assert message.startswith(at)
    assert message.endswith(
        "cannot be written (the server is away): training goes on without them, and history.csv and checkpoints hold "
        "its figures"
    )


@pytest.mark.fault(47)
def test_a_server_that_is_away(train, tmp_path: Path, monkeypatch, caplog):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    assert len(train(epochs=2, log="mlflow", out=tmp_path)) == 2
    assert [m.partition(" (")[0] for m in caplog.messages] == [
        "MLflow's figures at http://127.0.0.1:9 cannot be written"
    ]


def test_only_the_first_process_writes(train, tmp_path: Path):
    called: list[str] = []
    log = SimpleNamespace(
        open=None, write=None, close=None, attempt=lambda step, *words: called.append("something")
    )  # fmt: skip
    logged = loggers.Logged(SimpleNamespace(history=SimpleNamespace(rows=[{}], __len__=lambda: 1)), log)
    other = SimpleNamespace(is_global_zero=False)
    logged.on_train_start(other, None)
    logged.on_train_epoch_end(other, None)
    logged.on_train_end(other, None)
    logged.on_exception(other, None, OSError())
    assert called == []


def test_without_a_folder_nobody_is_told(train):
    assert run_logs(TrainConfig(log=("wandb", "mlflow")), None) == []
