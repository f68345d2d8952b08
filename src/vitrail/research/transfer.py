"""Which way of fine-tuning is best for these weights and these images: every strategy in one table, with intervals.

    WEIGHTS, DATA ── a run for each strategy and seed ──> answers to the test images ── resampled ──> a row a strategy

Intervals are those of `research.runs`: how far other test images would move a figure. How far another seed does stands
beside them, as the seeds' range. Learning rates are one for each strategy (`RECIPES`): few parameters take larger
steps. They are a choice, not a search.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

from vitrail.draw.plots import Measure
from vitrail.models.backbone import Backbone
from vitrail.names import check_choice, require
from vitrail.research.runs import Tried, accuracy, balanced_accuracy, interval, percent, tried
from vitrail.tasks.classify import Classify
from vitrail.train.config import TrainConfig
from vitrail.train.finetune import freezing, prompted, tuned
from vitrail.weights.load import open_weights

LOG = logging.getLogger("vitrail")
SCRATCH = "scratch"
"""the same network from fresh weights, which every strategy should beat"""
RECIPES = {
    SCRATCH: 1e-3, "backbone": 1e-2, "bias": 3e-3, "lora:4": 3e-3, "prompts:8": 1e-2, "deep_prompts:8": 1e-2,
    "first": 5e-4, "gradual": 1e-3, "none": 3e-4,
}  # fmt: skip
"""strategy -> learning rate, in the order of the table; `first` keeps half the layers, `gradual` is done half-way"""


class Row(NamedTuple):
    """One strategy, over its seeds."""

    strategy: str
    lr: float
    trained: int
    accuracy: Measure
    balanced: Measure
    spread: tuple[float, float]
    """the least and the largest balanced accuracy of a seed"""
    seconds: float
    """of training, the mean"""


def transfer_table(config: TrainConfig, strategies: Sequence[str] = ("all",), seeds: int = 3) -> Iterator[Row]:
    """A row for each strategy, as soon as its runs are done: `config.out`/STRATEGY-SEED, otherwise as `config` says.

    Strategies are keys of `RECIPES` or words of `--freeze`. Of "all", those that the network cannot be fine-tuned by
    are left out, which the logger `vitrail` is told. Raises `ValueError`, before the first run, for other strategies
    and for one that is named and cannot be; for a run that is there and was told something else; and as `run_training`
    does.
    """
    require(seeds >= 1, "seeds", "be at least 1", seeds)
    network = open_weights(config.from_weights)
    for name, freeze in _fitting(network, strategies, config.epochs):
        lr = next(rate for known, rate in RECIPES.items() if known.partition(":")[0] == name.partition(":")[0])
        told = replace(config, freeze="none" if name == SCRATCH else freeze, lr=lr)
        if name == SCRATCH:
            told = replace(told, from_weights="", model=network.variant)
        yield row([tried(replace(told, seed=seed, out=_place(config, freeze, seed)), freeze) for seed in range(seeds)])


def _fitting(network: Backbone, strategies: Sequence[str], epochs: int) -> list[tuple[str, str]]:
    """The strategies that can be, each with its word of `--freeze`."""
    every, found = tuple(strategies) == ("all",), []
    for name in RECIPES if every else strategies:
        check_choice("--strategies", name.partition(":")[0], [known.partition(":")[0] for known in RECIPES])
        freeze = _freeze(name, len(network.layer_groups()) - 2, epochs)
        try:
            if freeze != SCRATCH:
                _try_once(network, freeze)
        except ValueError as error:
            if not every:
                raise
            LOG.info("%s is left out: %s", freeze, error)
        else:
            found.append((name, freeze))
    return found


def _try_once(network: Backbone, freeze: str) -> None:
    """Raises `ValueError` where a network cannot be fine-tuned so. It stays as it is."""
    network = copy.deepcopy(network)
    if not network.num_classes:
        network.reset_classifier(2)
    with tuned(Classify(prompted(network, freeze, 0)), freeze):
        pass


def _freeze(name: str, depth: int, epochs: int) -> str:
    """The word of `--freeze` that a strategy means for a network of so many layers."""
    usual = {"first": f"first:{depth // 2}", "gradual": f"gradual:{max(1, epochs // (2 * (depth + 1)))}"}
    word = usual.get(name, name)
    if word != SCRATCH:
        freezing(word)
    return word


def _place(config: TrainConfig, freeze: str, seed: int) -> str:
    return str(Path(config.out) / f"{freeze.replace(':', '_')}-{seed}")


def row(runs: Sequence[Tried]) -> Row:
    """The runs of one strategy, a seed each, as figures with intervals."""
    first = runs[0]
    spread = [float(balanced_accuracy(run.labels, run.answers == run.labels)) for run in runs]
    return Row(
        first.name, first.lr, first.trained, interval(runs, accuracy), interval(runs, balanced_accuracy),
        (min(spread), max(spread)), sum(run.seconds for run in runs) / len(runs),
    )  # fmt: skip


def markdown(rows: Sequence[Row]) -> str:
    """The table, accuracies in percent."""
    head = "| strategy | trained parameters | lr | accuracy % | balanced accuracy % | seeds | seconds |"
    lines = [head, "|---|---:|---:|---|---|---|---:|"]
    for r in rows:
        low, high = (f"{100 * side:.1f}" for side in r.spread)
        lines.append(
            f"| {r.strategy} | {r.trained:,} | {r.lr:g} | {percent(r.accuracy)} | {percent(r.balanced)} | "
            f"{low} – {high} | {r.seconds:.0f} |"
        )
    return "\n".join(lines)
