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

    After an error nothing is left behind and `path` is as it was. Missing folders are made.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f".{path.name}.{uuid4().hex}.part")
    try:
        with beside.open("xb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        beside.replace(path)
    finally:
        beside.unlink(missing_ok=True)


def write_whole(path: str | Path, data: bytes | str) -> Path:
    """Writes `data` (text as UTF-8) by `whole_file`; returns the path."""
    with whole_file(path) as file:
        file.write(data.encode() if isinstance(data, str) else data)
    return Path(path)
