"""One run folder, one run: a lock that the operating system lets go of when its process ends, however it ends."""

from __future__ import annotations

import os
import platform
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

from vitrail.files import sweep
from vitrail.processes import is_first

LOCK, HOLDER = CLAIM = (".lock", ".lock.holder")
"""what a claim holds while it stands"""


class FolderInUse(ValueError):
    """Another process trains in this run folder."""


@contextmanager
def claimed(folder: Path | None) -> Iterator[None]:
    """Keeps other processes out of a run folder; the same process may claim it again within. None claims nothing.

    Of several processes of one run the first one claims it. What a killed process left behind is no claim, and files
    that it was writing are removed. Raises `FolderInUse`, saying whose it is.
    """
    if folder is None or not is_first():
        yield
        return
    made = not folder.exists()
    folder.mkdir(parents=True, exist_ok=True)
    lock, holder = FileLock(folder / LOCK, timeout=0, is_singleton=True), folder / HOLDER
    try:
        lock.acquire()
    except Timeout:
        raise FolderInUse(
            f"one process at a time trains in a folder; {folder} is in use by {_read(holder)}: wait for it, stop it, "
            "or name another with --out"
        ) from None
    try:
        if lock.lock_counter == 1:
            sweep(folder)
        holder.write_text(f"process {os.getpid()} on {platform.node()}", encoding="utf-8")
        yield
    finally:
        if lock.lock_counter == 1:  # not claimed further out
            holder.unlink(missing_ok=True)
            (folder / LOCK).unlink(missing_ok=True)
        lock.release()
        if made and not any(folder.iterdir()):  # refused before anything was written
            folder.rmdir()


def _read(holder: Path) -> str:
    try:
        return holder.read_text(encoding="utf-8") or "another process"
    except OSError:
        return "another process"
