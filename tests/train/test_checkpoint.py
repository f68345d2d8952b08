"""Checkpoint files: whole, or not there, and only those of a run."""

from __future__ import annotations

import os

import pytest
import torch

from vitrail.train import checkpoint
from vitrail.train.checkpoint import KEPT, WholeFiles, best_whole, damage, newest_whole

STATE = {name: dict.fromkeys(parts, 0) for name, parts in KEPT.items()} | {"state_dict": {"w": torch.ones(2)}}


@pytest.mark.fault(13)
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


# ---- damage


def spoil(path, at):
    """One byte changed, at a share of the file's length."""
    content = bytearray(path.read_bytes())
    content[int(len(content) * at)] ^= 0x40
    path.write_bytes(content)


@pytest.fixture
def kept(tmp_path):
    """Four checkpoints, the newest last."""
    for age, name in enumerate(("epoch_001", "best", "previous", "last")):
        path = tmp_path / f"{name}.ckpt"
        WholeFiles().save_checkpoint({"state_dict": {"w": torch.randn(1000)}, "history": {}, "told": {}}, path)
        os.utime(path, (age, age))
    return tmp_path


@pytest.mark.fault(5)
@pytest.mark.parametrize("share", [n / 16 for n in range(16)])
def test_a_truncated_checkpoint_is_found(share, kept):
    path = kept / "last.ckpt"
    assert damage(path) == ""
    path.write_bytes(path.read_bytes()[: int(path.stat().st_size * share)])
    assert damage(path)


def test_a_flipped_byte_is_found_or_harmless(kept):
    """The zip format has bytes that nobody reads; wherever a byte matters, its checksum tells."""
    path, found = kept / "last.ckpt", 0
    whole = path.read_bytes()
    expected = torch.load(path, weights_only=True)["state_dict"]["w"]
    for at in range(0, len(whole), 13):
        path.write_bytes(whole[:at] + bytes([whole[at] ^ 0x40]) + whole[at + 1 :])
        if damage(path):
            found += 1
        else:
            assert torch.equal(torch.load(path, weights_only=True)["state_dict"]["w"], expected)
    assert found > 4000 / 13  # the weights alone


@pytest.mark.fault(15)
@pytest.mark.parametrize(("bad", "good"), [
    ((), "last"), (("last",), "previous"), (("last", "previous"), "best"), (("last", "previous", "best"), "epoch_001"),
])  # fmt: skip
def test_the_newest_whole_one_is_gone_on_from_naming_both(bad, good, kept, caplog):
    for name in bad:
        spoil(kept / f"{name}.ckpt", 0.5)
    assert newest_whole(kept) == kept / f"{good}.ckpt"
    assert len(caplog.messages) == len(bad)
    for name, message in zip(bad, caplog.messages, strict=True):
        assert f"{name}.ckpt is damaged (the checksum of" in message
        assert f"going on from {good}.ckpt" in message


@pytest.mark.fault(15)
def test_no_whole_one_is_an_error_that_names_all(kept):
    for path in kept.iterdir():
        spoil(path, 0.5)
    with pytest.raises(ValueError, match=r"holds none \(last\.ckpt: the checksum of .*; previous\.ckpt: .*epoch_001"):
        newest_whole(kept)


def test_a_damaged_best_one_leaves_the_last(kept, caplog):
    assert best_whole(kept).name == "best.ckpt"
    spoil(kept / "best.ckpt", 0.5)
    assert best_whole(kept).name == "last.ckpt"
    assert "the model becomes that of the last epoch" in caplog.text


def test_where_there_are_no_links_the_previous_one_is_a_copy(kept, monkeypatch):
    def none(*_):
        raise OSError("not supported")

    monkeypatch.setattr(os, "link", none)
    checkpoint._keep_previous(kept)
    assert (kept / "previous.ckpt").read_bytes() == (kept / "last.ckpt").read_bytes()
    assert {path.name for path in kept.iterdir()} == {f"{n}.ckpt" for n in ("last", "previous", "best", "epoch_001")}


def test_to_keep_the_previous_one_twice_leaves_nothing_beside(kept):
    """Two names of one file cannot be renamed into each other."""
    for _ in range(2):
        checkpoint._keep_previous(kept)
    assert (kept / "previous.ckpt").samefile(kept / "last.ckpt")
    assert not list(kept.glob(".*"))
