"""Files that cannot be written: figures may be missing for a while and training goes on; a checkpoint may not."""

from __future__ import annotations

import csv
import errno
import os
from pathlib import Path

import pytest
from torch.utils import tensorboard

from vitrail.train import history as history_module

LOST = "training goes on"


def logged(caplog):
    return [message for message in caplog.messages if LOST in message]


def table(folder):
    with (folder / "history.csv").open(newline="", encoding="utf-8") as file:
        return [int(row["epoch"]) for row in csv.DictReader(file)]


def refusing(plain, number, wanted):
    """A way of opening files that fails for those of this name, as the system would say it."""

    def opened(path, *args, **kwargs):
        if wanted in str(path):
            raise OSError(number, os.strerror(number), str(path))
        return plain(path, *args, **kwargs)

    return opened


# ---- figures


@pytest.mark.fault(47)
def test_a_table_that_cannot_be_written_is_said_once_and_written_whole_when_it_can_be(train, tmp_path, caplog):
    """A folder is in its place until the third of four epochs."""
    (tmp_path / "history.csv").mkdir()

    def hook(number):
        if number == 2 * 8:
            (tmp_path / "history.csv").rmdir()

    train(out=tmp_path, epochs=4, hook=hook)
    (message,) = logged(caplog)
    assert f"{tmp_path / 'history.csv'} cannot be written (Is a directory)" in message
    assert table(tmp_path) == [1, 2, 3, 4]


@pytest.mark.fault(47)
@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EROFS, errno.EACCES])
def test_the_run_ends_as_it_would_have(number, train, make_task, fingerprint, tmp_path, monkeypatch, caplog):
    """Without a table, and with its figures in the checkpoints."""
    plain, task = make_task(), make_task()
    whole = train(plain, out=tmp_path / "whole", epochs=2)

    def fails(path, rows):
        raise OSError(number, os.strerror(number), str(path))

    with monkeypatch.context() as patch:
        patch.setattr(history_module, "write_csv", fails)
        found = train(task, out=tmp_path / "run", epochs=2)
    assert fingerprint(task) == fingerprint(plain)
    assert found["train_loss"] == whole["train_loss"]
    assert len(logged(caplog)) == 1 and os.strerror(number) in logged(caplog)[0]
    assert not (tmp_path / "run" / "history.csv").exists()
    assert (
        train(make_task(seed=1), out=tmp_path / "run", resume=True, epochs=3)["train_loss"][:2] == found["train_loss"]
    )
    assert table(tmp_path / "run") == [1, 2, 3]


@pytest.mark.fault(47)
def test_another_outage_is_said_again(train, tmp_path, caplog):
    place = tmp_path / "history.csv"

    def hook(number):
        if number in (0, 16):
            place.unlink(missing_ok=True)
            place.mkdir()
        elif number in (8, 24):
            place.rmdir()

    train(out=tmp_path, epochs=4, hook=hook)
    assert len(logged(caplog)) == 2


@pytest.mark.fault(47)
def test_events_that_cannot_be_written_at_all(train, tmp_path, caplog):
    (tmp_path / "tensorboard").touch()
    history = train(out=tmp_path, epochs=2, log="tensorboard")
    (message,) = logged(caplog)
    assert f"TensorBoard's events in {tmp_path / 'tensorboard'} cannot be written (File exists)" in message
    assert table(tmp_path) == history["epoch"] == [1, 2]


@pytest.mark.fault(47)
@pytest.mark.parametrize("method", ["add_scalar", "flush", "close"])
def test_a_writer_that_fails_in_the_middle(method, train, tmp_path, monkeypatch, caplog):
    class Failing(tensorboard.SummaryWriter):
        pass

    def fails(self, *args, **kwargs):
        calls.append(args)
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    calls = []
    setattr(Failing, method, fails)
    monkeypatch.setattr(tensorboard, "SummaryWriter", Failing)
    assert len(train(out=tmp_path, epochs=3, log="tensorboard")) == 3
    assert len(calls) == 1  # it is not tried again
    (message,) = logged(caplog)
    assert "(No space left on device): training goes on without them" in message
    assert table(tmp_path) == [1, 2, 3]


@pytest.mark.fault(47)
@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_a_disk_that_fills_under_the_writers_thread(train, tmp_path, monkeypatch, caplog):
    """It writes in a thread of its own, whose errors come later."""
    from tensorboard.compat.tensorflow_stub.io import gfile

    monkeypatch.setattr(gfile.LocalFileSystem, "append", _to_full)
    monkeypatch.setattr("threading.excepthook", lambda *args: None)
    assert len(train(out=tmp_path, epochs=4, log="tensorboard")) == 4
    (message,) = logged(caplog)
    assert "(No space left on device)" in message


def _to_full(self, filename, file_content, binary_mode=False):
    with Path("/dev/full").open("ab") as file:
        file.write(file_content)


# ---- checkpoints


@pytest.mark.fault(13)
@pytest.mark.parametrize("number", [errno.EROFS, errno.EACCES])
def test_a_folder_that_cannot_be_written_to_ends_a_run_before_it_trains(number, train, tmp_path, monkeypatch):
    begun = []
    with monkeypatch.context() as patch:
        patch.setattr(os, "open", refusing(os.open, number, str(tmp_path)))
        with pytest.raises(OSError, match=os.strerror(number)) as refused:
            train(out=tmp_path / "run", hook=begun.append)
    assert str(tmp_path / "run") in str(refused.value.filename)
    assert not begun
    assert train(out=tmp_path / "run", epochs=1)["epoch"] == [1]  # nothing stands in its way afterwards


@pytest.mark.fault(13)
def test_a_file_in_the_place_of_the_folder_ends_a_run_before_it_trains(train, tmp_path):
    begun = []
    (tmp_path / "runs").touch()
    with pytest.raises(OSError, match="runs"):
        train(out=tmp_path / "runs" / "a", hook=begun.append)
    assert not begun


@pytest.mark.fault(13)
def test_a_disk_that_becomes_read_only_ends_the_run_at_its_next_checkpoint(
    train, make_task, fingerprint, tmp_path, monkeypatch
):
    """The second epoch's: the run is gone on with from the first's, and loses nothing but time."""
    whole, again = make_task(), make_task(seed=1)
    train(whole, out=tmp_path / "whole", epochs=2)

    def hook(number):
        if number == 12:
            patch.setattr(Path, "open", refusing(Path.open, errno.EROFS, ".part"))

    with monkeypatch.context() as patch, pytest.raises(OSError, match=r"Read-only file system: .*checkpoints"):
        train(out=tmp_path / "run", epochs=2, hook=hook)
    assert {path.suffix for path in (tmp_path / "run" / "checkpoints").iterdir()} == {".ckpt"}
    train(again, out=tmp_path / "run", epochs=2, resume=True)
    assert fingerprint(again) == fingerprint(whole)
