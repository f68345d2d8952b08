"""Files that are there whole or not at all."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO
from uuid import uuid4


@contextmanager
def whole_file(path: str | Path) -> Iterator[IO[bytes]]:
    """A file to be written beside `path`, synced and renamed at the end: a reader sees the old file or the new one.

    So does one after a power cut. After an error nothing is left behind and `path` is as it was. Missing folders are
    made.
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
    finally:
        beside.unlink(missing_ok=True)


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
