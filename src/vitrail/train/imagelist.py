"""The images that a run learns from, by name and label: what a checkpoint remembers of them, and what a folder lists.

    images.jsonl     {"count": 2, "sha256": "…"}        as the checkpoint has it: of ids and labels in order
                     ["cat/1.png", 0]                   then an image a line
                     ["dog/7.png", 1]

The checkpoint's own sum says that images are others than they were; the list says which.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from itertools import zip_longest
from pathlib import Path
from typing import Any

from vitrail.data.imagesets import ImageSet
from vitrail.data.loading import Drawing
from vitrail.files import write_whole
from vitrail.names import printable
from vitrail.train.resume import Loader

NAME = "images.jsonl"
Row = tuple[str, int]
"""id and label of an image"""


def remembered(loader: Loader) -> dict[str, Any]:
    """Of an image set, number and a sha256 of ids and labels in order, not of pixels; else the number of batches."""
    images = _images(loader)
    if images is None:
        return {"batches": len(loader)}
    digest = hashlib.sha256("\n".join(images.ids).encode(errors="surrogateescape"))  # names of files are any bytes
    digest.update(images.labels.numpy().tobytes())
    return {"count": len(images), "sha256": digest.hexdigest()[:16]}


def write_list(folder: Path, loader: Loader, of: dict[str, Any]) -> None:
    """The list of the loader's images, which are `of` what `remembered` says; nothing where it stands there already."""
    images = _images(loader)
    if images is None or _head(folder / NAME) == of:
        return
    lines = [json.dumps(of), *(json.dumps(row) for row in _rows(images))]
    write_whole(folder / NAME, "\n".join(lines) + "\n")


def difference(folder: Path, was: str, loader: Loader) -> str:
    """Which images differ from those that the folder lists under the sum `was`, in words."""
    images, before = _images(loader), _listed(folder / NAME, was)
    if images is None or before is None:
        return f"a sum of ids and labels in order; {folder} holds no {NAME} of those that were, to say which differ"
    return _compared(before, _rows(images))


def _images(loader: Loader) -> ImageSet | None:
    dataset = getattr(loader, "dataset", None)
    images = dataset.images if isinstance(dataset, Drawing) else dataset
    return images if isinstance(images, ImageSet) else None


def _rows(images: ImageSet) -> list[Row]:
    return list(zip(images.ids, images.labels.tolist(), strict=True))


def _head(path: Path) -> dict[str, Any]:
    """What a list is of; nothing where there is none that can be read."""
    try:
        with path.open(encoding="utf-8") as file:
            head = json.loads(file.readline())
    except (OSError, ValueError):
        return {}
    return head if isinstance(head, dict) else {}


def _listed(path: Path, was: str) -> list[Row] | None:
    """The images of a list; None where there is none of this sum that can be read."""
    if _head(path).get("sha256") != was:
        return None
    try:
        _, *lines = path.read_text(encoding="utf-8").splitlines()
        return [(str(name), label) for name, label in map(json.loads, lines)]
    except (OSError, ValueError, TypeError):
        return None


def _compared(before: list[Row], now: list[Row]) -> str:
    """How many images are new, gone or labelled otherwise, and the first of each; else where the order differs."""
    was, found = dict(before), dict(now)
    said = [
        *_counted("new", [name for name in found if name not in was]),
        *_counted("gone", [name for name in was if name not in found]),
        *_counted("labelled otherwise", [name for name in found if name in was and was[name] != found[name]]),
    ]
    if said:
        return ", ".join(said)
    place, row = next((n, row) for n, (old, row) in enumerate(zip_longest(before, now)) if old != row)
    at = f"row {place + 1} is {printable(row[0])}" if row else f"they end before row {place + 1}"
    return f"the same names in another order: {at}"


def _counted(what: str, names: Sequence[str]) -> Iterator[str]:
    if names:
        yield f"{len(names)} {what}" + (": " if len(names) == 1 else ", the first: ") + printable(names[0])
