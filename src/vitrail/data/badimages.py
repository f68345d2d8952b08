"""Images that cannot be read: what a run does about them (`--on-bad-image`), which they were, and why.

raise    the first one ends the run, named
skip     training draws another image in its place; evaluation leaves it out; `BadImages` names and counts it
"""

from __future__ import annotations

import csv
import io
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Literal

import torch.distributed as dist

from vitrail.files import write_whole
from vitrail.processes import is_first

OnBadImage = Literal["raise", "skip"]
NAME = "bad_images.csv"
"""what the file of a run is called; its columns are `COLUMNS`"""
COLUMNS = ("id", "reason")
LOG = logging.getLogger("vitrail")


class BadImages:
    """The images that a run met and could not read, each once, by id, and why. Each is told to the logger `vitrail`.

    With a `folder` they stand in its `bad_images.csv`, written whole whenever there are more; `resume` goes on with
    those that stand there, and without it a file of another run is removed. Of several processes the first one writes;
    it learns of the others' by `share`. Raises `ValueError` for a file that is none of these.
    """

    def __init__(self, folder: Path | None = None, *, resume: bool = False) -> None:
        self.reasons: dict[str, str] = {}
        self.path = folder / NAME if folder and is_first() else None
        if self.path and resume and self.path.exists():
            self.reasons = _read(self.path)
        elif self.path:
            self.path.unlink(missing_ok=True)

    def __len__(self) -> int:
        return len(self.reasons)

    def add(self, met: Mapping[str, str]) -> None:
        """Takes up those of `met` (id -> reason) that are new."""
        new = {name: reason for name, reason in met.items() if name not in self.reasons}
        if not new:
            return
        self.reasons |= new
        for reason in new.values():
            LOG.warning("left out: %s", reason)
        if self.path:
            write_whole(self.path, _as_csv(self.reasons))

    def share(self) -> None:
        """Joins what all processes met; all of them must call it."""
        if dist.is_available() and dist.is_initialized():
            everyone: list[dict[str, str]] = [{}] * dist.get_world_size()
            dist.all_gather_object(everyone, self.reasons)
            for met in everyone:
                self.add(met)

    def say(self) -> None:
        """One line, at the end of a run that met some."""
        if self.reasons:
            where = f": {self.path} names them" if self.path else ""
            LOG.warning("%s could not be read and took no part%s", counted(len(self)), where)


def counted(images: int) -> str:
    """`1 image`, `2 images`."""
    return f"{images:,} image{'s' * (images != 1)}"


def _as_csv(reasons: Mapping[str, str]) -> str:
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows([COLUMNS, *reasons.items()])
    return text.getvalue()


def _read(path: Path) -> dict[str, str]:
    try:
        head, *rows = csv.reader(io.StringIO(path.read_text(encoding="utf-8")))
        if tuple(head) != COLUMNS:
            raise ValueError(f"its columns are {', '.join(head)}")
        return dict(rows)
    except (ValueError, csv.Error) as error:
        raise ValueError(
            f"{path} must hold the columns {', '.join(COLUMNS)}; it does not ({error}): put it back, or remove it"
        ) from None
