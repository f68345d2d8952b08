"""Files that are there whole or not at all, after a power cut too."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from vitrail.files import whole_file, write_whole


def test_bytes_and_text_in_new_folders(tmp_path: Path):
    path = tmp_path / "a" / "b.txt"
    assert write_whole(path, "é") == path
    assert path.read_bytes() == "é".encode()
    write_whole(str(path), b"\x00")
    assert path.read_bytes() == b"\x00"
    assert list(path.parent.iterdir()) == [path]


def test_an_error_leaves_the_old_file_alone(tmp_path: Path):
    path = write_whole(tmp_path / "a", "old")
    with pytest.raises(OSError, match="no space"), whole_file(path) as file:
        file.write(b"half of the n")
        file.flush()
        raise OSError("no space")
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_an_error_of_the_system_names_the_file_that_was_to_be_written(tmp_path: Path):
    folder = tmp_path / "report.html"
    folder.mkdir()
    with pytest.raises(IsADirectoryError) as error:
        write_whole(folder, "page")
    assert (error.value.filename, error.value.filename2) == (str(folder), None)
    assert list(tmp_path.iterdir()) == [folder]


@pytest.mark.skipif(os.name != "posix", reason="where folders can be opened")
def test_content_reaches_the_disk_before_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """First the bytes, then the rename, then the folder, which is what knows of the rename."""
    path, steps = write_whole(tmp_path / "a", "old"), []

    def sync(descriptor: int) -> None:
        steps.append(("folder" if os.path.sameopenfile(descriptor, folder) else "file", path.read_text()))

    folder = os.open(tmp_path, os.O_RDONLY)
    monkeypatch.setattr(os, "fsync", sync)
    write_whole(path, "new")
    os.close(folder)
    assert steps == [("file", "old"), ("folder", "new")]
