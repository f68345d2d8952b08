"""Checkpoint files: whole, or not there, and only those of a run."""

from __future__ import annotations

import pytest
import torch

from vitrail.train.checkpoint import WholeFiles

STATE = {"state_dict": {"w": torch.ones(2)}, "history": {}, "told": {}}


def test_a_checkpoint_is_written_whole(tmp_path, monkeypatch):
    path, files = tmp_path / "last.ckpt", WholeFiles()
    files.save_checkpoint(STATE, path)
    before = path.read_bytes()

    def half(checkpoint, file):
        file.write(b"half")
        raise OSError("no space left")

    monkeypatch.setattr(torch, "save", half)
    with pytest.raises(OSError, match="no space"):
        files.save_checkpoint(STATE, path)
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


def test_what_was_written_is_read(tmp_path):
    WholeFiles().save_checkpoint(STATE, tmp_path / "last.ckpt")
    assert torch.equal(WholeFiles().load_checkpoint(tmp_path / "last.ckpt")["state_dict"]["w"], torch.ones(2))


def test_a_checkpoint_of_something_else_is_refused(tmp_path):
    torch.save({"state_dict": {}, "epoch": 3}, tmp_path / "theirs.ckpt")
    with pytest.raises(
        ValueError, match=r"that it wrote itself; .*theirs\.ckpt lacks history, told: take the run's own"
    ):
        WholeFiles().load_checkpoint(tmp_path / "theirs.ckpt")
