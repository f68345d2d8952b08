"""Which way of fine-tuning is best for these weights and these images: every strategy in one table, with intervals.

    WEIGHTS, DATA ── a run for each strategy and seed ──> answers to the test images ── resampled ──> a row a strategy

A run whose answers are there is not run again, and one that was stopped is gone on with. Intervals are the bootstrap's
(Efron & Tibshirani 1993, section 13.3): the test images are drawn again with replacement, class by class so that each
keeps its share, and the figure is the mean over the seeds; the 2.5th and 97.5th percentile of `RESAMPLES` draws. They
say how far other test images would move a figure; how far another seed does stands beside it, as the seeds' range.
Learning rates are one for each strategy (`RECIPES`): few parameters take larger steps. They are a choice, not a search.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from vitrail.data.datasets import load_splits
from vitrail.draw.plots import Measure
from vitrail.files import write_whole
from vitrail.names import check_choice, require
from vitrail.tasks.base import pick_device
from vitrail.tasks.classify import Classify
from vitrail.train.checkpoint import has_checkpoints
from vitrail.train.config import TrainConfig
from vitrail.train.finetune import freezing, tuned
from vitrail.trainer import eval_loader, resume_training, run_training
from vitrail.weights.load import load_model, open_weights

SCRATCH = "scratch"
"""the same network from fresh weights, which every strategy should beat"""
RECIPES = {
    SCRATCH: 1e-3, "backbone": 1e-2, "bias": 3e-3, "lora:4": 3e-3, "prompts:8": 1e-2, "deep_prompts:8": 1e-2,
    "first": 5e-4, "gradual": 1e-3, "none": 3e-4,
}  # fmt: skip
"""strategy -> learning rate, in the order of the table; `first` keeps half the layers, `gradual` is done half-way"""
RESAMPLES = 2000
ANSWERS = "answers.json"


class Tried(NamedTuple):
    """What one run came to."""

    strategy: str
    lr: float
    trained: int
    """parameters that were trained, at the most"""
    seconds: float
    labels: Tensor
    """(N,) of the test images"""
    answers: Tensor
    """(N,)"""


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

    Strategies are keys of `RECIPES` or words of `--freeze`. Raises `ValueError` for others, for a run that is there and
    was told something else, and as `run_training` does.
    """
    require(seeds >= 1, "seeds", "be at least 1", seeds)
    network = open_weights(config.from_weights)
    depth = len(network.layer_groups()) - 2
    for name in RECIPES if tuple(strategies) == ("all",) else strategies:
        check_choice("--strategies", name.partition(":")[0], {known.partition(":")[0] for known in RECIPES})
        freeze = _freeze(name, depth, config.epochs)
        lr = next(rate for known, rate in RECIPES.items() if known.partition(":")[0] == name.partition(":")[0])
        told = replace(config, freeze="none" if name == SCRATCH else freeze, lr=lr)
        if name == SCRATCH:
            told = replace(told, from_weights="", model=network.variant)
        yield row([_tried(replace(told, seed=seed, out=_place(config, freeze, seed)), freeze) for seed in range(seeds)])


def _freeze(name: str, depth: int, epochs: int) -> str:
    """The word of `--freeze` that a strategy means for a network of so many layers."""
    usual = {"first": f"first:{depth // 2}", "gradual": f"gradual:{max(1, epochs // (2 * (depth + 1)))}"}
    word = usual.get(name, name)
    if word != SCRATCH:
        freezing(word)
    return word


def _place(config: TrainConfig, freeze: str, seed: int) -> str:
    return str(Path(config.out) / f"{freeze.replace(':', '_')}-{seed}")


def _tried(config: TrainConfig, strategy: str) -> Tried:
    """The run of this config: as it stands in its folder, gone on with, or done now."""
    folder = Path(config.out)
    if has_checkpoints(folder / "checkpoints"):
        was = TrainConfig.from_yaml(folder / "config.yaml")
        if was != config:
            raise ValueError(f"--out must name runs that were told the same; {folder} was told otherwise: name another")
    if not (folder / ANSWERS).is_file():
        begun = has_checkpoints(folder / "checkpoints")
        history = resume_training(folder) if begun else run_training(config)
        _answer(config, sum(history["seconds"]))
    found = json.loads((folder / ANSWERS).read_text(encoding="utf-8"))
    labels, answers = torch.tensor(found["labels"]), torch.tensor(found["answers"])
    return Tried(strategy, config.numbers().lr, found["trained"], found["seconds"], labels, answers)


@torch.no_grad()
def _answer(config: TrainConfig, seconds: float) -> None:
    """Writes what the run's model says of each test image."""
    model = load_model(config.out).to(pick_device(config.device))
    task, labels, answers = Classify(model), [], []
    for item in eval_loader(load_splits(config).test, model, config):
        batch = task.prepare(item)
        labels += batch["label"].tolist()
        answers += task.logits(batch).argmax(1).tolist()
    found = {"trained": _trained(task, config.freeze), "seconds": seconds, "labels": labels, "answers": answers}
    write_whole(Path(config.out) / ANSWERS, json.dumps(found))


def _trained(task: Classify, freeze: str) -> int:
    with torch.enable_grad(), tuned(task, freeze):
        return sum(p.numel() for p in task.parameters() if p.requires_grad)


def row(tried: Sequence[Tried]) -> Row:
    """The runs of one strategy, a seed each, as figures with intervals."""
    first = tried[0]
    spread = [float(balanced_accuracy(run.labels, run.answers == run.labels)) for run in tried]
    return Row(
        first.strategy, first.lr, first.trained, interval(tried, accuracy), interval(tried, balanced_accuracy),
        (min(spread), max(spread)), sum(run.seconds for run in tried) / len(tried),
    )  # fmt: skip


def accuracy(labels: Tensor, right: Tensor) -> Tensor:
    """right (…, N) -> (…,) the share of images."""
    return right.double().mean(-1)


def balanced_accuracy(labels: Tensor, right: Tensor) -> Tensor:
    """labels (N,), right (…, N) -> (…,) the mean over classes of the share of their images."""
    return torch.stack([right[..., labels == k].double().mean(-1) for k in labels.unique()]).mean(0)


def interval(tried: Iterable[Tried], figure: Callable[[Tensor, Tensor], Tensor]) -> Measure:
    """A figure's mean over seeds, and its bootstrap interval over the test images of each.

    Seeds that have the same test images have them drawn alike.
    """
    values, draws = [], []
    for run in tried:
        right = run.answers == run.labels
        values.append(float(figure(run.labels, right)))
        draws.append(figure(run.labels, right[resampled(run.labels)]))
    low, high = torch.stack(draws).mean(0).quantile(torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    return Measure(sum(values) / len(values), low, high)


def resampled(labels: Tensor) -> Tensor:
    """labels (N,) -> (`RESAMPLES`, N): each row draws images with replacement, for each one of its class."""
    generator, picks = torch.Generator().manual_seed(0), torch.empty(RESAMPLES, len(labels), dtype=torch.long)
    for k in labels.unique():
        own = (labels == k).nonzero().flatten()
        picks[:, own] = own[torch.randint(len(own), (RESAMPLES, len(own)), generator=generator)]
    return picks


def markdown(rows: Sequence[Row]) -> str:
    """The table, accuracies in percent."""
    head = "| strategy | trained parameters | lr | accuracy % | balanced accuracy % | seeds | seconds |"
    lines = [head, "|---|---:|---:|---|---|---|---:|"]
    for r in rows:
        low, high = (f"{100 * side:.1f}" for side in r.spread)
        lines.append(
            f"| {r.strategy} | {r.trained:,} | {r.lr:g} | {_percent(r.accuracy)} | {_percent(r.balanced)} | "
            f"{low} – {high} | {r.seconds:.0f} |"
        )
    return "\n".join(lines)


def _percent(measure: Measure) -> str:
    value, low, high = (100 * number for number in measure)
    return f"{value:.1f} [{low:.1f}, {high:.1f}]"
