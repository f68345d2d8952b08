"""What a checkpoint remembers of its run, and what may differ when the run is gone on with.

| what differs                                   | then                                                            |
|------------------------------------------------|-----------------------------------------------------------------|
| nothing                                        | bit for bit the run that was never stopped                      |
| a setting of `FREE`                            | it goes on; another number of epochs is told of                 |
| another setting, `network`, `preprocess`, or `images` | refused, all in one error, unless `override` names it    |
| names or shapes of weights, or which are frozen | refused: what was learnt, or its moments, do not fit           |
| a setting of `SETTLED`                         | refused: it would do nothing                                    |
| what is overridden, where no epoch is left     | refused: nothing would be trained under it                      |

Where what is overridden decides which images make a batch or a step (`ANEW`), a place within an epoch means nothing any
more: the epoch that was running begins anew, with the weights it has, so that some of its images are learnt from twice.
The learning rate follows the epochs, not the steps that were taken. Another `optimizer` begins its moments anew;
another `layer_decay` keeps them. What a checkpoint does not know of was as it is by default.
"""

from __future__ import annotations

import logging
from collections.abc import Collection, Iterator, Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, NamedTuple

from vitrail.names import closest, require
from vitrail.tasks.base import Task
from vitrail.train.checkpoint import read
from vitrail.train.config import AUTO, DEFAULT, TrainConfig
from vitrail.train.imagelist import difference, remembered
from vitrail.train.optim import decayed
from vitrail.train.resume import Loader

LOG = logging.getLogger("vitrail")
FREE = frozenset({
    "out", "data_dir", "download", "in_memory", "workers", "worker_timeout", "device", "deterministic",
    "teacher_path", "log", "checkpoint_every", "patience", "max_minutes", "epochs", "on_nan", "on_bad_image",
    "entropy_floor", "profile", "strategy",
})  # fmt: skip
"""what a resumed run may be told anew: it decides neither what is learnt from nor how"""
ANEW = frozenset({"images", "batch_size", "repeats", "accumulate", "devices", "num_nodes", "seed", "debug"})
WORLD = ("devices", "num_nodes")
"""how many processes a run has: `--allow-world-change` overrides it"""
SETTLED = {
    "val_fraction": "images that were held out stay so; another share is for a new --out",
    "from_weights": "begin with other weights in a new --out",
    "freeze": "to train others of these weights, begin a new run with them: --from the run's folder, --freeze, --out",
}
"""what had its say when the run began, and what to do instead of changing it"""
BESIDE = frozenset({"overridden", "trained"})
"""what is remembered and is no setting"""
NAMED = 3
"""weights that a message names"""


class Start(NamedTuple):
    """Where a run begins, and what its checkpoints are to remember."""

    told: dict[str, Any]
    checkpoint: Path | None = None
    """None begins a new run"""
    anew: bool = False
    """whether the epoch that was running begins anew"""
    changed: bool = False
    """whether something is overridden from here on"""
    done: int = 0
    """epochs that lie behind"""
    forget: bool = False
    """whether the optimiser is another, which moments of the former mean nothing to"""


class Change(NamedTuple):
    """One thing that is not what it was."""

    name: str
    """what `override` calls it"""
    what: str
    """a flag, or a part of the network, the preprocessing or the images"""
    was: Any
    found: Any
    which: str = ""
    """in words, where the two values alone say little"""


def told(config: TrainConfig, task: Task, loader: Loader) -> dict[str, Any]:
    """What a checkpoint remembers of a run: its settings, network, preprocessing, training images and trained weights.

    Of a teacher it is not where it lies, but which it is. `overridden` is what was changed in the course of the run;
    `trained` are the weights that are not frozen, as the optimiser has them.
    """
    card = task.backbone.card()
    preprocess = {name: value for name, value in asdict(card.preprocess).items() if name != "known"}
    network = {"family": card.family, **card.config}
    return {
        **settings(config), "network": network, "preprocess": preprocess, "images": remembered(loader),
        "overridden": [], "trained": decayed(task), "teacher": task.taught_by(),
    }  # fmt: skip


def settings(config: TrainConfig) -> dict[str, Any]:
    """All settings of a run by their names; those that were left open as they are taken."""
    return asdict(config) | config.settled()


def go_on(
    checkpoint: Path, now: dict[str, Any], task: Task, override: Collection[str] = (), loader: Loader | None = None
) -> Start:
    """How the run of this checkpoint is gone on with; the logger `vitrail` is told of what changes.

    `loader` gives the images to train on, so that it can be said which of them differ.

    Raises `ValueError` for a checkpoint that is no run's, for a name in `override` that nothing has, and, in one
    message, for everything that differs and neither is free nor overridden; then for fewer epochs than are done.
    """
    names = [name.replace("-", "_") for name in override]
    _check_names(names, set(now) - FREE - BESIDE)
    state = read(checkpoint)
    before, done = settings(TrainConfig()) | {"teacher": None} | state["told"], len(state["history"]["rows"])
    compared = now | {"model": before["model"]} if _same_default(before, now) else now
    fixed = [_named(change, checkpoint, loader) for change in changes(before, compared) if change.name not in FREE]
    _refuse(fixed, list(_stuck(state, fixed, task)), names)
    require(now["epochs"] >= done, "epochs", f"be at least {done}, which are done", now["epochs"])
    _tell_of_epochs(before["epochs"], now["epochs"])
    anew = any(change.name in ANEW for change in fixed)
    lines = [f"{change.what} {change.was} -> {change.found}" for change in fixed]
    if lines:
        how = ", which begins anew" if anew else ""
        LOG.warning("--override changes this run from epoch %d on%s: %s", done + 1, how, "; ".join(lines))
    forget = any(change.name == "optimizer" for change in fixed)
    if forget:
        LOG.warning("the moments of %s are left behind: those of %s begin anew", before["optimizer"], now["optimizer"])
    past = [*before["overridden"], *(f"overridden from epoch {done + 1} on: {line}" for line in lines)]
    return Start({**now, "overridden": past}, checkpoint, anew, bool(lines), done, forget)


def _same_default(before: Mapping[str, Any], now: Mapping[str, Any]) -> bool:
    """Whether neither names a model but as the default is called, which was a row's name once."""
    fresh = not (before["from_weights"] or now["from_weights"])
    return fresh and {before["model"], now["model"]} == {AUTO, DEFAULT}


def refuse_idle(start: Start, epochs: int) -> None:
    """Raises `ValueError` where something was overridden and no epoch came after it: nothing was trained so."""
    if start.changed and epochs == start.done:
        raise ValueError(
            f"--override changes epochs that are still to come; this run has none left after its {epochs}: give more "
            "--epochs, or, where --patience or --max-minutes ended it, more of that"
        )


def changes(before: Mapping[str, Any], now: Mapping[str, Any]) -> Iterator[Change]:
    """What differs between two of `told`, in the order of the first."""
    for name, was in before.items():
        found = now.get(name, was)
        if name in BESIDE or was == found:
            continue
        if not isinstance(was, dict):
            yield Change(name, f"--{name.replace('_', '-')}", was, found)
            continue
        for part in was | found:
            if was.get(part) != found.get(part):
                yield Change(name, f"{name}.{part}", was.get(part), found.get(part))


def _named(change: Change, checkpoint: Path, loader: Loader | None) -> Change:
    """A sum that differs with the images that do, by the list in the run's folder."""
    if loader is None or change.what != "images.sha256" or None in (change.was, change.found):
        return change
    return change._replace(which=f" ({difference(checkpoint.parents[1], change.was, loader)})")


def _stuck(state: Mapping[str, Any], fixed: list[Change], task: Task) -> Iterator[str]:
    """What nothing can override, in words."""
    never = "which nothing can override"
    if unfit := list(_unfit(state["state_dict"], task)):
        yield f"weights do not fit, {never}: {_few(unfit)}"
    elif refrozen := list(_refrozen(state["told"]["trained"], decayed(task))):
        yield f"other weights are trained, {never}: {_few(refrozen)}"
    for change in fixed:
        if change.name in SETTLED:
            yield f"{change.what} had its say when the run began, {never}: {SETTLED[change.name]}"


def _few(lines: list[str]) -> str:
    more = len(lines) - NAMED
    return ", ".join(lines[:NAMED]) + (f" and {more} more" if more > 0 else "")


def _unfit(state: Mapping[str, Any], task: Task) -> Iterator[str]:
    """The weights that a checkpoint has in other shapes than the task, or that only one of them has."""
    was = {name.removeprefix("task."): tuple(value.shape) for name, value in state.items() if name.startswith("task.")}
    found = {name: tuple(value.shape) for name, value in task.state_dict().items()}
    for name in was | found:
        if was.get(name) != found.get(name):
            yield f"{name} was {was.get(name, 'not there')}, got {found.get(name, 'none')}"


def _refrozen(was: Mapping[str, bool], found: Mapping[str, bool]) -> Iterator[str]:
    """The weights that the optimiser had in another group than it has now, or that only one of the two has."""
    kinds = {None: "frozen", True: "trained with weight decay", False: "trained without weight decay"}
    for name in {**was, **found}:
        if was.get(name) != found.get(name):
            yield f"{name} was {kinds[was.get(name)]}, got {kinds[found.get(name)]}"


def _check_names(override: list[str], known: set[str]) -> None:
    for name in override:
        if name in SETTLED:
            raise ValueError(f"--override cannot change {name}, which had its say when the run began: {SETTLED[name]}")
        if name not in known:
            close = closest(name, known)
            mend = f"did you mean {close}?" if close else "leave it out"
            raise ValueError(f"--override names what a resumed run may not change otherwise; got {name!r}: {mend}")


def _refuse(fixed: list[Change], stuck: list[str], override: list[str]) -> None:
    """Raises `ValueError` with all that differs, unless every change is overridden and nothing is `stuck`."""
    needed = list(dict.fromkeys(change.name for change in fixed))
    if not stuck and set(needed) <= set(override):
        return
    said = [*(f"{change.what} was {change.was}, got {change.found}{change.which}" for change in fixed), *stuck]
    mend = "" if stuck else f"; or go on all the same with {_flags(needed)} (in Python, override={tuple(needed)})"
    raise ValueError(
        f"a resumed run must be told what it was told before; {'; '.join(said)}: take the old values, or a new --out"
        + mend
    )


def _flags(needed: list[str]) -> str:
    """What the command line calls an `override` of these."""
    named = [name for name in needed if name not in WORLD]
    words = [f"--override {' '.join(named)}"] if named else []
    return " ".join([*words, *(["--allow-world-change"] if len(named) < len(needed) else [])])


def same_step(former: TrainConfig, config: TrainConfig) -> TrainConfig:
    """`config` with an `accumulate` by which other processes than before make each step of as many images as before.

    The logger `vitrail` is told where that changes. Raises `ValueError` where no number does it.
    """
    was, images = former.batch_size * former.world * former.accumulate, config.batch_size * config.world
    if was == images * config.accumulate:
        return config
    if was % images:
        raise ValueError(
            f"--allow-world-change keeps the {was} images of a step; got {config.world} processes of --batch-size "
            f"{config.batch_size}, which cannot share them: give both so that their product divides {was} (--override "
            "batch_size), or --override accumulate for other steps"
        )
    LOG.warning("each step has its %d images still: --accumulate is %d from here on", was, was // images)
    return replace(config, accumulate=was // images)


def _tell_of_epochs(was: int, found: int) -> None:
    """A run can be made longer. The learning rate of every step depends on it, so it is another run from there on."""
    if was != found:
        LOG.warning(
            "--epochs was %d and is %d: from here on the learning rate follows the schedule of %d", was, found, found
        )
