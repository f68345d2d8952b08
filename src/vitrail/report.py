"""A finished run -> its figures on held-out images and one page that explains them.

best weights + held-out images ── evaluate ──> metrics.json
                               └─ some right, some wrong, each with its rollout ──> report.html
"""

from __future__ import annotations

import json
import math
import os
import platform
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from datetime import date
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from vitrail.data.imagesets import Splits
from vitrail.draw.pages import RunReport, Sample, training_report, write_page
from vitrail.explain.maps import explain
from vitrail.files import write_whole
from vitrail.layers.modes import evaluating
from vitrail.records import Batch, Classification, History
from vitrail.tasks.base import as_batch, evaluate
from vitrail.tasks.classify import Classify

SAMPLES = 6
"""right answers shown, and as many wrong ones"""
TEST_NOTE = (
    "The epoch that was kept is the best on the validation images; the figures are of test images that chose nothing."
)
VAL_NOTE = (
    "The figures are of the validation images, which also chose the epoch that was kept: the data has no others. "
    "Expect a little less of new images."
)
SAMPLES_NOTE = "The wrong answers shown are the most confident ones, so they look worse than the typical mistake."


@dataclass(frozen=True, kw_only=True)
class RunFacts:
    """What a page says of a run beside its figures."""

    title: str
    command: str


class Shown(NamedTuple):
    """A held-out image that the page may show."""

    picture: Tensor
    """(C, H, W) uint8, as the network saw it, in memory of its own"""
    truth: int
    answer: Classification


def report_run(
    out: Path, task: Classify, loader: Iterable[Any], splits: Splits, history: History, facts: RunFacts
) -> dict[str, Tensor]:
    """Measures `task` on held-out images, writes `metrics.json` and `report.html` into `out`, returns the figures.

    Of several processes that share the images each measures its own, and the first one writes.
    """
    figures = evaluate(task, loader)
    if dist.is_initialized() and dist.get_rank() > 0:
        return figures
    report = _report(task, figures, splits, history, facts)
    write_whole(out / "metrics.json", json.dumps(_metrics(report, figures), indent=1, allow_nan=False))
    samples = [_sample(task, shown) for shown in choose_samples(task, loader)]
    write_page(out / "report.html", training_report(replace(report, samples=samples)))
    return figures


def _report(task: Classify, figures: dict[str, Tensor], splits: Splits, history: History, facts: RunFacts) -> RunReport:
    """Everything on the page but its samples."""
    model, own = task.backbone, splits.test is not splits.val
    return RunReport(
        title=facts.title,
        model=model.variant or model.family,
        parameters=sum(p.numel() for p in model.parameters()),
        img_size=model.preprocess.img_size,
        data=splits.name,
        counts={part: list(getattr(splits, part).counts().values()) for part in ("train", "val", "test")},
        classes=splits.classes,
        command=facts.command,
        machine=machine(task.device),
        date=date.today().isoformat(),
        seconds=sum(row.get("seconds", 0.0) for row in history.rows),
        history=history,
        split="test" if own else "val",
        figures={name: float(value) for name, value in figures.items() if value.ndim == 0},
        precision=figures["precision"],
        recall=figures["recall"],
        f1=figures["f1"],
        confusion=figures["confusion"],
        reliability=figures["reliability"],
        notes=(TEST_NOTE if own else VAL_NOTE, SAMPLES_NOTE),
    )


def as_json(figures: Mapping[str, Tensor]) -> dict[str, Any]:
    """Figures as numbers and lists. JSON has no NaN and no infinity: they become null."""
    return {name: _finite(value.tolist()) for name, value in figures.items()}


def _finite(value: Any) -> Any:
    if isinstance(value, list):
        return [_finite(part) for part in value]
    return value if math.isfinite(value) else None


def _metrics(report: RunReport, figures: dict[str, Tensor]) -> dict[str, Any]:
    facts = {name: getattr(report, name) for name in ("data", "split", "command", "machine", "date", "seconds")}
    return {**facts, "classes": list(report.classes), **as_json(figures)}


def choose_samples(task: Classify, loader: Iterable[Any], each: int = SAMPLES) -> list[Shown]:
    """Up to `each` wrong answers, the most confident first, and as many right ones, one class after the other.

    One pass over the loader; only what may be shown is held.
    """
    wrong: list[Shown] = []
    right: list[tuple[int, Shown]] = []
    turns: Counter[int] = Counter()  # right answers met, by class
    with evaluating(task):
        for item in loader:
            for shown in _answers(task, as_batch(item)):
                if shown.answer.label != task.classes[shown.truth]:
                    wrong = sorted([*wrong, shown], key=lambda s: -s.answer.confidence)[:each]
                    continue
                right = sorted([*right, (turns[shown.truth], shown)], key=lambda r: (r[0], r[1].truth))[:each]
                turns[shown.truth] += 1
    return wrong + [shown for _, shown in right]


def _answers(task: Classify, raw: Batch) -> Iterable[Shown]:
    answers = task.predict(task.prepare(raw))
    for picture, label, answer in zip(raw["image"], raw["label"].tolist(), answers, strict=True):
        yield Shown(picture.clone(), label, answer)  # a view would keep its whole batch


def _sample(task: Classify, shown: Shown) -> Sample:
    ready = task.backbone.preprocess.normalise(shown.picture).to(task.device)
    try:
        explanation = explain(task.backbone, ready, "rollout")
    except ValueError:  # a network whose attention cannot be rolled out, or that has none
        explanation = None
    return Sample(image=shown.picture, truth=task.classes[shown.truth], answer=shown.answer, explanation=explanation)


def machine(device: torch.device) -> str:
    """The hardware that was used and the torch version, in one line."""
    cores = f"{os.cpu_count()} cores {platform.machine()}"
    chip = torch.cuda.get_device_name(device) if device.type == "cuda" else cores
    return f"{chip}, torch {torch.__version__}"
