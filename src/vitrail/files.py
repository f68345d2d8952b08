"""Files that are there whole or not at all."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO
from uuid import uuid4


@contextmanager
def whole_file(path: str | Path) -> Iterator[IO[bytes]]:
    """A file to be written beside `path`, synced and renamed at the end: a reader sees the old file or the new one.

    So does one after a power cut. After an error nothing is left behind and `path` is as it was; one of the system's
    names `path`. Missing folders are made.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f".{path.name}.{uuid4().hex}.part")
    try:
        with beside.open("xb") as file:
            yield file
        flush(beside)
        beside.replace(path)
        flush(path.parent)  # the new name
    except OSError as error:
        if str(error.filename) == str(beside):  # a name that nobody gave
            error.filename, error.filename2 = str(path), None
        raise
    finally:
        beside.unlink(missing_ok=True)


def sweep(folder: Path) -> None:
    """Removes what killed processes were writing in a folder and in those in it; to be called where nobody writes."""
    for part in (*folder.glob(".*.part"), *folder.glob("*/.*.part")):
        part.unlink(missing_ok=True)
    for fresh in folder.glob(".*.new"):
        shutil.rmtree(fresh, ignore_errors=True)


def flush(path: Path) -> None:
    """A file, or the names in a folder, onto the disk. Windows opens no folders, and needs it less."""
    if os.name != "posix" and path.is_dir():
        return
    descriptor = os.open(path, os.O_RDONLY if os.name == "posix" else os.O_RDWR)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_whole(path: str | Path, data: bytes | str) -> Path:
    """Writes `data` (text as UTF-8) by `whole_file`; returns the path."""
    with whole_file(path) as file:
        file.write(data.encode() if isinstance(data, str) else data)
    return Path(path)
