"""Runs that a study is made of, none of them done twice, and figures of them with intervals.

    TrainConfig ── as it stands in its folder, gone on with, or done now ──> answers to the test images ── resampled

A run whose answers are there is not run again, and one that was stopped is gone on with. Intervals are the bootstrap's
(Efron & Tibshirani 1993, section 13.3): the test images are drawn again with replacement, class by class so that each
keeps its share, and the figure is the mean over the runs; the 2.5th and 97.5th percentile of `RESAMPLES` draws. They
say how far other test images would move a figure, not how far another seed would.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from dataclasses import asdict
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from vitrail.data.datasets import load_splits
from vitrail.draw.plots import Measure
from vitrail.evaluation import eval_loader
from vitrail.files import write_whole
from vitrail.tasks.base import pick_device
from vitrail.tasks.classify import Classify
from vitrail.train.checkpoint import has_checkpoints
from vitrail.train.config import TrainConfig
from vitrail.train.finetune import tuned
from vitrail.trainer import resume_training, run_training
from vitrail.weights.load import load_model

RESAMPLES = 2000
ANSWERS = "answers.json"
Figure = Callable[[Tensor, Tensor], Tensor]
"""labels (N,) and which answers are right (…, N) -> (…,)"""


class Tried(NamedTuple):
    """What one run came to."""

    name: str
    lr: float
    trained: int
    """parameters that were trained, at the most"""
    seconds: float
    labels: Tensor
    """(N,) of the test images"""
    answers: Tensor
    """(N,)"""


def tried(config: TrainConfig, name: str) -> Tried:
    """The run of this config: as it stands in its folder, gone on with, or done now."""
    folder = Path(config.out)
    if has_checkpoints(folder / "checkpoints"):
        was = TrainConfig.from_yaml(folder / "config.yaml")
        if was != config:
            raise ValueError(
                f"--out must name runs that were told the same; {folder} had {_differing(was, config)}: name another"
            )
    if not (folder / ANSWERS).is_file():
        begun = has_checkpoints(folder / "checkpoints")
        history = resume_training(folder) if begun else run_training(config)
        _answer(config, sum(history["seconds"]))
    found = json.loads((folder / ANSWERS).read_text(encoding="utf-8"))
    labels, answers = torch.tensor(found["labels"]), torch.tensor(found["answers"])
    return Tried(name, config.numbers().lr, found["trained"], found["seconds"], labels, answers)


def _differing(was: TrainConfig, now: TrainConfig) -> str:
    """What two runs were told otherwise, in words."""
    pairs = {name: (value, getattr(now, name)) for name, value in asdict(was).items() if value != getattr(now, name)}
    return ", ".join(f"--{name.replace('_', '-')} {old}, not {new}" for name, (old, new) in pairs.items())


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


def accuracy(labels: Tensor, right: Tensor) -> Tensor:
    """right (…, N) -> (…,) the share of images."""
    return right.double().mean(-1)


def balanced_accuracy(labels: Tensor, right: Tensor) -> Tensor:
    """labels (N,), right (…, N) -> (…,) the mean over classes of the share of their images."""
    return torch.stack([right[..., labels == k].double().mean(-1) for k in labels.unique()]).mean(0)


def interval(runs: Iterable[Tried], figure: Figure) -> Measure:
    """A figure's mean over runs, and its bootstrap interval over the test images of each."""
    return _measure(*_drawn(runs, figure))


def gain(runs: Iterable[Tried], before: Iterable[Tried], figure: Figure) -> Measure:
    """How much larger a figure's mean is over `runs` than over those of `before`, with its interval.

    Both answer the same test images, so what is drawn of them is drawn for both.
    """
    (value, draws), (former, others) = _drawn(runs, figure), _drawn(before, figure)
    return _measure(value - former, draws - others)


def _drawn(runs: Iterable[Tried], figure: Figure) -> tuple[float, Tensor]:
    """The mean of a figure over runs, and of each draw (`RESAMPLES`,); the same test images are drawn alike."""
    values, draws = [], []
    for run in runs:
        right = run.answers == run.labels
        values.append(float(figure(run.labels, right)))
        draws.append(figure(run.labels, right[resampled(run.labels)]))
    return sum(values) / len(values), torch.stack(draws).mean(0)


def _measure(value: float, draws: Tensor) -> Measure:
    low, high = draws.quantile(torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    return Measure(value, low, high)


def resampled(labels: Tensor) -> Tensor:
    """labels (N,) -> (`RESAMPLES`, N): each row draws images with replacement, for each one of its class."""
    generator, picks = torch.Generator().manual_seed(0), torch.empty(RESAMPLES, len(labels), dtype=torch.long)
    for k in labels.unique():
        own = (labels == k).nonzero().flatten()
        picks[:, own] = own[torch.randint(len(own), (RESAMPLES, len(own)), generator=generator)]
    return picks


def percent(measure: Measure) -> str:
    """`97.5 [96.4, 98.2]`."""
    value, low, high = (100 * number for number in measure)
    return f"{value:.1f} [{low:.1f}, {high:.1f}]"
