"""What a checkpoint remembers of its run, and what may differ when the run is gone on with.

| what differs                                   | then                                                            |
|------------------------------------------------|-----------------------------------------------------------------|
| nothing                                        | bit for bit the run that was never stopped                      |
| a setting of `FREE`                            | it goes on; another number of epochs is told of                 |
| another setting, `network`, `preprocess`, or `images` | refused, all in one error, unless `override` names it    |
| the names or shapes of the weights             | refused: what was learnt does not fit                           |

Where what is overridden decides which images make a batch or a step (`ANEW`), a place within an epoch means nothing any
more: the epoch that was running begins anew, with the weights it has, so that some of its images are learnt from twice.
The learning rate follows the epochs, not the steps that were taken.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Collection, Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

from vitrail.data.imagesets import ImageSet
from vitrail.data.loading import Drawing
from vitrail.names import closest
from vitrail.tasks.base import Task
from vitrail.train.checkpoint import read
from vitrail.train.config import TrainConfig
from vitrail.train.resume import Loader

LOG = logging.getLogger("vitrail")
FREE = frozenset({
    "out", "data_dir", "download", "in_memory", "workers", "worker_timeout", "device", "deterministic",
    "log", "checkpoint_every", "patience", "max_minutes", "epochs", "on_nan", "on_bad_image",
})  # fmt: skip
"""what a resumed run may be told anew: it decides neither what is learnt from nor how"""
ANEW = frozenset({"images", "batch_size", "accumulate", "devices", "num_nodes", "seed", "debug"})
NAMED = 3
"""weights that a message names"""


class Start(NamedTuple):
    """Where a run begins, and what its checkpoints are to remember."""

    told: dict[str, Any]
    checkpoint: Path | None = None
    """None begins a new run"""
    anew: bool = False
    """whether the epoch that was running begins anew"""


class Change(NamedTuple):
    """One thing that is not what it was."""

    name: str
    """what `override` calls it"""
    what: str
    """a flag, or a part of the network, the preprocessing or the images"""
    was: Any
    found: Any


def told(config: TrainConfig, task: Task, loader: Loader) -> dict[str, Any]:
    """What a checkpoint remembers of a run: its settings, network, preprocessing and training images.

    Of an image set, their number and a sha256 of ids and labels in order, not of pixels; of another loader, the number
    of its batches. `overridden` is what was changed in the course of the run.
    """
    card = task.backbone.card()
    preprocess = {name: value for name, value in asdict(card.preprocess).items() if name != "known"}
    network = {"family": card.family, **card.config}
    return {
        **asdict(config), "network": network, "preprocess": preprocess, "images": _images(loader), "overridden": [],
    }  # fmt: skip


def _images(loader: Loader) -> dict[str, Any]:
    dataset = getattr(loader, "dataset", None)
    images = dataset.images if isinstance(dataset, Drawing) else dataset
    if not isinstance(images, ImageSet):
        return {"batches": len(loader)}
    digest = hashlib.sha256("\n".join(images.ids).encode())
    digest.update(images.labels.numpy().tobytes())
    return {"count": len(images), "sha256": digest.hexdigest()[:16]}


def go_on(checkpoint: Path, now: dict[str, Any], task: Task, override: Collection[str] = ()) -> Start:
    """How the run of this checkpoint is gone on with; the logger `vitrail` is told of what changes.

    Raises `ValueError` for a checkpoint that is no run's, for a name in `override` that nothing has, and, in one
    message, for everything that differs and neither is free nor overridden.
    """
    names = [name.replace("-", "_") for name in override]
    _check_names(names, set(now) - FREE - {"overridden"})
    state = read(checkpoint)
    before, epoch = state["told"], len(state["history"]["rows"]) + 1
    fixed = [change for change in changes(before, now) if change.name not in FREE]
    _refuse(fixed, list(_unfit(state["state_dict"], task)), names)
    _tell_of_epochs(before["epochs"], now["epochs"])
    anew = any(change.name in ANEW for change in fixed)
    lines = [f"{change.what} {change.was} -> {change.found}" for change in fixed]
    if lines:
        how = ", which begins anew" if anew else ""
        LOG.warning("--override changes this run from epoch %d on%s: %s", epoch, how, "; ".join(lines))
    past = [*before.get("overridden", ()), *(f"overridden from epoch {epoch} on: {line}" for line in lines)]
    return Start({**now, "overridden": past}, checkpoint, anew)


def changes(before: Mapping[str, Any], now: Mapping[str, Any]) -> Iterator[Change]:
    """What differs between two of `told`, in the order of the first."""
    for name, was in before.items():
        found = now.get(name, was)
        if name == "overridden" or was == found:
            continue
        if not isinstance(was, dict):
            yield Change(name, f"--{name.replace('_', '-')}", was, found)
            continue
        for part in was | found:
            if was.get(part) != found.get(part):
                yield Change(name, f"{name}.{part}", was.get(part), found.get(part))


def _unfit(state: Mapping[str, Any], task: Task) -> Iterator[str]:
    """The weights that a checkpoint has in other shapes than the task, or that only one of them has."""
    was = {name.removeprefix("task."): tuple(value.shape) for name, value in state.items() if name.startswith("task.")}
    found = {name: tuple(value.shape) for name, value in task.state_dict().items()}
    for name in was | found:
        if was.get(name) != found.get(name):
            yield f"{name} was {was.get(name, 'not there')}, got {found.get(name, 'none')}"


def _check_names(override: list[str], known: set[str]) -> None:
    for name in override:
        if name not in known:
            close = closest(name, known)
            mend = f"did you mean {close}?" if close else "leave it out"
            raise ValueError(f"--override names what a resumed run may not change otherwise; got {name!r}: {mend}")


def _refuse(fixed: list[Change], unfit: list[str], override: list[str]) -> None:
    """Raises `ValueError` with all that differs, unless every change is overridden and the weights fit."""
    needed = list(dict.fromkeys(change.name for change in fixed))
    if not unfit and set(needed) <= set(override):
        return
    said = [f"{change.what} was {change.was}, got {change.found}" for change in fixed]
    more = f" and {len(unfit) - NAMED} more" if len(unfit) > NAMED else ""
    said += [f"weights do not fit, which nothing can override: {', '.join(unfit[:NAMED])}{more}"] if unfit else []
    words = " ".join(needed)
    mend = "" if unfit else f"; or go on all the same with --override {words} (in Python, override={tuple(needed)})"
    raise ValueError(
        f"a resumed run must be told what it was told before; {'; '.join(said)}: take the old values, or a new --out"
        + mend
    )


def _tell_of_epochs(was: int, found: int) -> None:
    """A run can be made longer. The learning rate of every step depends on it, so it is another run from there on."""
    if was != found:
        LOG.warning(
            "--epochs was %d and is %d: from here on the learning rate follows the schedule of %d", was, found, found
        )
