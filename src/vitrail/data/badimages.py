"""Images that cannot be read: what a run does about them (`--on-bad-image`), which they were, and why.

raise    the first one ends the run, named
skip     training draws another image in its place; evaluation leaves it out; `BadImages` names and counts it
"""

from __future__ import annotations

import csv
import io
import logging
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Literal

import torch.distributed as dist

from vitrail.data.imagesets import ImageSet
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
    those that stand there, and without it a file of another run is removed. Where it cannot be written, which is said
    once, it is tried again with the next image and at the run's end. Of several processes the first one speaks and
    writes; it learns of the others' by `share`. Bytes of a name that are not UTF-8 stand as escapes. Raises
    `ValueError` for a file that is none of these.
    """

    def __init__(self, folder: Path | None = None, *, resume: bool = False) -> None:
        self.reasons: dict[str, str] = {}
        self.learnt: ImageSet | None = None
        """the images to train on, where a loader has told; they say which classes have lost all"""
        self._said: set[str] = set()
        self._written = True
        self.path = folder / NAME if folder and is_first() else None
        if self.path and resume and self.path.exists():
            self.reasons = _read(self.path)
        elif self.path:
            self.path.unlink(missing_ok=True)

    def __len__(self) -> int:
        return len(self.reasons)

    def add(self, met: Mapping[str, str]) -> None:
        """Takes up those of `met` (id -> reason) that are new."""
        told = {_writable(name): _writable(reason) for name, reason in met.items()}
        new = {name: reason for name, reason in told.items() if name not in self.reasons}
        if not new:
            return
        self.reasons |= new
        if is_first():
            for reason in new.values():
                LOG.warning("left out: %s", reason)
            self._write()

    def among(self, ids: Iterable[str]) -> int:
        """How many of the images that `ids` name are among them."""
        return sum(_writable(name) in self.reasons for name in ids)

    def unlearnt(self) -> list[str]:
        """A sentence on each class that lost all its images to train on."""
        if self.learnt is None or not self.reasons:
            return []
        images = self.learnt
        labels = zip(images.ids, images.labels.tolist(), strict=True)
        lost = Counter(images.classes[label] for name, label in labels if _writable(name) in self.reasons)
        counts = images.counts()
        # a file that failed once may have been read at another time
        return [
            f"class {name}: of its {counted(counts[name])} for training, none could be read at all times, so it was "
            "not learnt, or hardly"
            for name in images.classes
            if 0 < lost[name] == counts[name]
        ]

    def say_unlearnt(self) -> None:
        """Tells the logger what `unlearnt` has not told yet."""
        new = [line for line in self.unlearnt() if line not in self._said]
        self._said.update(new)
        for line in new if is_first() else ():
            LOG.warning("%s", line)

    def share(self) -> None:
        """Joins what all processes met; all of them must call it."""
        if dist.is_available() and dist.is_initialized():
            everyone: list[dict[str, str]] = [{}] * dist.get_world_size()
            dist.all_gather_object(everyone, self.reasons)
            for met in everyone:
                self.add(met)

    def say(self) -> None:
        """One line, at the end of a run that met some, and one on each class that lost all, if not yet said."""
        if not self.reasons or not is_first():
            return
        if not self._written:
            self._write()
        where = f": {self.path} names them" if self.path and self._written else ""
        LOG.warning("%s could not be read at least once, and took no part then%s", counted(len(self)), where)
        self.say_unlearnt()

    def _write(self) -> None:
        """All of them, so that what could not be written comes with the next; said once, until it can be again."""
        if not self.path:
            return
        try:
            write_whole(self.path, _as_csv(self.reasons))
        except OSError as error:
            if self._written:
                LOG.warning("%s cannot be written (%s): the run goes on", self.path, error.strerror or error)
            self._written = False
        else:
            self._written = True


def counted(images: int) -> str:
    """`1 image`, `2 images`."""
    return f"{images:,} image{'s' * (images != 1)}"


def _writable(text: str) -> str:
    """The bytes of a file name that are not UTF-8, which Python holds as surrogates, as escapes."""
    return text.encode(errors="backslashreplace").decode()


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
