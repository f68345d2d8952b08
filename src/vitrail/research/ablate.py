"""What each part of a recipe brings: the recipe built up part by part, a run for each, and one without augmentation.

    SGD, a constant rate ── + optimiser ── + warm-up and schedule ── + label smoothing ── + mixup ── + DropPath = recipe
                                                                                    recipe without augmentation

A rung has what the rungs before it have, and one part more; a part that the recipe has not makes none. What no rung
names, such as cropping and the number of epochs, is the recipe's from the first on. A gain is of a rung over the one
before: another order of rungs would give other gains. Its interval is the bootstrap's over the test images, the same
ones drawn for both (`research.runs`).
"""

from __future__ import annotations

import csv
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

from vitrail.draw.plots import Measure
from vitrail.names import require
from vitrail.records import History
from vitrail.research.runs import Tried, accuracy, gain, interval, percent, tried
from vitrail.train.changes import FREE
from vitrail.train.config import TrainConfig


class Part(NamedTuple):
    """A part of a recipe."""

    without: Mapping[str, Any]
    """the settings that it is made of, as they are where it is not there"""
    said: Callable[[TrainConfig], str]
    """what it is in a recipe"""


FIRST = "SGD, constant"
PLAIN = "no augmentation"
PARTS = (
    Part(
        dict(optimizer="sgd", lr=None, weight_decay=None, momentum=None, beta2=None, layer_decay=1.0),
        lambda recipe: recipe.optimizer,
    ),
    Part(
        dict(schedule="constant", warmup_epochs=0.0, warmup_steps=None, min_lr=None, decay_epochs=None,
             decay_steps=None, restart_epochs=None, restart_steps=None),
        lambda recipe: f"warm-up, {recipe.numbers().schedule}",
    ),
    Part(dict(label_smoothing=0.0), lambda recipe: f"label smoothing {recipe.label_smoothing:g}"),
    Part(
        dict(mixup=0.0, cutmix=0.0),
        lambda recipe: ", ".join(f"{name} {on:g}" for name in ("mixup", "cutmix") if (on := getattr(recipe, name))),
    ),
    Part(dict(drop_path=0.0), lambda recipe: f"DropPath {recipe.drop_path:g}"),
)  # fmt: skip
"""in the order in which they are added"""
STILL = dict(
    flip=0.0, flip_vertical=0.0, crop="none", color_jitter=0.0, auto_augment="none", mixup=0.0, cutmix=0.0, erase=0.0
)
"""settings of a recipe that varies no image"""


SETUP = frozenset({
    "data", "val_fraction", "img_size", "batch_size", "seed", "model", "precision", "devices", "num_nodes", "debug",
})  # fmt: skip
"""settings that are no part of a recipe: which images and network, and on what machine"""


class Rung(NamedTuple):
    """One rung, over its seeds."""

    name: str
    accuracy: Measure
    gain: Measure | None
    """over the rung before; of the run without augmentation, over the whole recipe"""
    seconds: float
    """of training, the mean"""
    folders: tuple[Path, ...]


def ladder(recipe: TrainConfig) -> list[tuple[str, TrainConfig]]:
    """The rungs from bare to the recipe, and what the recipe is without augmentation: each with its name."""
    bare = {name: value for part in PARTS for name, value in part.without.items()}
    rungs = [(FIRST, replace(recipe, **bare))]
    for part in PARTS:
        for name in part.without:
            del bare[name]
        config = replace(recipe, **bare)
        if config != rungs[-1][1]:
            rungs.append((f"+ {part.said(recipe)}", config))
    still = replace(recipe, **STILL)  # type: ignore[arg-type]
    return [*rungs, *([(PLAIN, still)] if still != recipe else [])]


def ablation(recipe: TrainConfig, seeds: int = 1) -> Iterator[Rung]:
    """A rung as soon as its runs are done: `recipe.out`/NUMBER-SEED. Raises `ValueError` as `run_training` does."""
    require(seeds >= 1, "seeds", "be at least 1", seeds)
    before: list[Tried] = []
    for number, (name, config) in enumerate(ladder(recipe)):
        folders = [Path(recipe.out) / f"{number}-{seed}" for seed in range(seeds)]
        runs = [tried(replace(config, seed=seed, out=str(folder)), name) for seed, folder in enumerate(folders)]
        over = gain(runs, before, accuracy) if before else None
        seconds = sum(run.seconds for run in runs) / len(runs)
        yield Rung(name, interval(runs, accuracy), over, seconds, tuple(folders))
        before = runs


def curves(rungs: Sequence[Rung]) -> dict[str, History]:
    """The first run of the recipe and of that without augmentation, epoch by epoch; empty where there is none."""
    if rungs[-1].name != PLAIN:
        return {}
    return {"the recipe": history_of(rungs[-2].folders[0]), PLAIN: history_of(rungs[-1].folders[0])}


def history_of(run: Path) -> History:
    """The figures of a run folder, by epoch."""
    with (run / "history.csv").open(newline="", encoding="utf-8") as file:
        rows = [{name: float(value) for name, value in row.items() if value} for row in csv.DictReader(file)]
    return History(rows)


def stays(recipe: TrainConfig) -> str:
    """What of a recipe is in every rung, since no rung takes it out, in words; empty where nothing is."""
    taken = {name for part in PARTS for name in part.without} | SETUP | FREE
    kept = {name: value for name, value in recipe.changes().items() if name not in taken}
    said = ", ".join(f"--{name.replace('_', '-')} {value}" for name, value in kept.items())
    return f"In every rung, the first too: {said}." if said else ""


def markdown(rungs: Sequence[Rung], kept: str = "") -> str:
    """The table, accuracies in percent and gains in points; below it what `stays` says."""
    lines = ["| recipe | test accuracy % | gain | seconds |", "|---|---|---|---:|"]
    lines += [
        f"| {rung.name} | {percent(rung.accuracy)} | {_points(rung.gain)} | {rung.seconds:.0f} |" for rung in rungs
    ]
    return "\n".join([*lines, *(["", kept] if kept else [])])


def _points(measure: Measure | None) -> str:
    if measure is None:
        return ""
    value, low, high = (100 * number for number in measure)
    return f"{value:+.1f} [{low:+.1f}, {high:+.1f}]"
