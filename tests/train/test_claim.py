"""One run folder, one process: others are refused, and what a killed one left is no claim."""

from __future__ import annotations

import multiprocessing
import os
import signal
import time
from pathlib import Path

import pytest

from vitrail.train.claim import FolderInUse, claimed
from vitrail.train.config import TrainConfig
from vitrail.train.engine import fit

FORK = multiprocessing.get_context("fork")


def _hold(folder, seconds):
    with claimed(folder):
        (folder / "held").touch()
        time.sleep(seconds)


@pytest.fixture
def holder(tmp_path):
    """Another process that holds the folder `run` until it is killed."""
    process = FORK.Process(target=_hold, args=(tmp_path / "run", 60))
    process.start()
    _until((tmp_path / "run" / "held").exists)
    yield process
    process.kill()
    process.join()


def _until(true, seconds=10.0):
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end
        time.sleep(0.01)


@pytest.mark.fault(46)
def test_a_second_process_is_refused_and_told_whose_it_is(holder, tmp_path):
    words = rf"run is in use by process {holder.pid} on \S+: wait for it, stop it, or"
    with pytest.raises(FolderInUse, match=words), claimed(tmp_path / "run"):
        raise AssertionError("both are in")


@pytest.mark.fault(46)
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_the_claim_of_a_process_that_died_is_none(number, holder, tmp_path):
    os.kill(holder.pid, number)
    holder.join()
    assert (tmp_path / "run" / ".lock.holder").exists()
    with claimed(tmp_path / "run"):
        assert str(os.getpid()) in (tmp_path / "run" / ".lock.holder").read_text()


def test_nothing_is_left_behind_and_the_same_process_may_claim_twice(tmp_path):
    with claimed(tmp_path / "run"), claimed(tmp_path / "run"):
        names = {path.name for path in (tmp_path / "run").iterdir()}
    assert names == {".lock", ".lock.holder"}
    assert list(tmp_path.iterdir()) == []  # a folder that was made for nothing is gone too
    (tmp_path / "run").mkdir()
    with pytest.raises(RuntimeError), claimed(tmp_path / "run"):
        raise RuntimeError
    assert list((tmp_path / "run").iterdir()) == []


def test_the_outer_claim_outlives_the_inner_one(tmp_path):
    with claimed(tmp_path):
        with claimed(tmp_path):
            pass
        tried = FORK.Process(target=_hold, args=(tmp_path, 0))
        tried.start()
        tried.join()
        assert tried.exitcode == 1


def test_only_the_first_of_several_processes_claims(holder, tmp_path, monkeypatch):
    monkeypatch.setenv("LOCAL_RANK", "1")
    with claimed(tmp_path / "run"):
        pass


@pytest.mark.fault(46)
def test_fit_refuses_a_folder_that_is_in_use(holder, make_task, images, tmp_path):
    begun = []
    with pytest.raises(FolderInUse, match="is in use by process"):
        fit(make_task(), [images[0].gather([0, 1])], None, TrainConfig(epochs=1, device="cpu"), out=tmp_path / "run",
            augment=lambda batch, number, total: begun.append(number))  # fmt: skip
    assert not begun
    assert not Path(tmp_path / "run" / "config.yaml").exists()


def test_without_a_folder_nothing_is_claimed(tmp_path):
    with claimed(None):
        pass


@pytest.mark.fault(14)
def test_what_a_killed_process_was_writing_is_removed(tmp_path):
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / ".model.1a2b.new").mkdir()
    for name in (".history.csv.1a.part", "checkpoints/.last.ckpt.1a.part", ".model.1a2b.new/model.safetensors", "kept"):
        (tmp_path / name).touch()
    with claimed(tmp_path):
        (tmp_path / ".mine.part").touch()
        with claimed(tmp_path):
            assert (tmp_path / ".mine.part").exists()
    assert {path.name for path in tmp_path.iterdir()} == {"checkpoints", "kept", ".mine.part"}
    assert not any((tmp_path / "checkpoints").iterdir())
