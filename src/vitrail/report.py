"""A finished run -> its figures on held-out images and one page that explains them.

best weights + held-out images ── evaluate ──> metrics.json
                               └─ some right, some wrong, each with its rollout ──> report.html
"""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from vitrail.data.imagesets import Splits
from vitrail.draw.pages import RunReport, Sample, training_report, write_page
from vitrail.explain.maps import explain
from vitrail.explain.record import NoAttentionError
from vitrail.files import write_whole
from vitrail.records import Batch, Classification, History
from vitrail.tasks.base import as_batch, evaluate, evaluating
from vitrail.tasks.classify import Classify

SAMPLES = 6
"""right answers shown, and as many wrong ones"""
NOTES = (
    "The epoch that was kept is the best on the validation images; the figures are of test images that chose nothing.",
    "The wrong answers shown are the most confident ones, so they look worse than the typical mistake.",
)


@dataclass(frozen=True, kw_only=True)
class RunFacts:
    """What a page says of a run beside its figures."""

    title: str
    command: str


class Shown(NamedTuple):
    """A held-out image that the page may show."""

    picture: Tensor
    """(C, H, W) uint8, as the network saw it"""
    truth: int
    answer: Classification


def report_run(
    out: Path, task: Classify, loader: Iterable[Any], splits: Splits, history: History, facts: RunFacts
) -> dict[str, Tensor]:
    """Measures `task` on held-out images, writes `metrics.json` and `report.html` into `out`, returns the figures."""
    figures = evaluate(task, loader)
    scores = {name: float(value) for name, value in figures.items() if value.ndim == 0}
    samples = [_sample(task, shown) for shown in choose_samples(task, loader)]
    model = task.backbone
    report = RunReport(
        title=facts.title,
        model=model.variant or model.family,
        parameters=sum(p.numel() for p in model.parameters()),
        img_size=model.preprocess.img_size,
        data=splits.name,
        counts={part: list(getattr(splits, part).counts().values()) for part in ("train", "val", "test")},
        classes=splits.classes,
        command=facts.command,
        machine=machine(),
        date=date.today().isoformat(),
        seconds=sum(row.get("seconds", 0.0) for row in history.rows),
        history=history,
        split="test",
        figures=scores,
        precision=figures["precision"],
        recall=figures["recall"],
        f1=figures["f1"],
        confusion=figures["confusion"],
        reliability=figures["reliability"],
        samples=samples,
        notes=NOTES,
    )
    write_whole(out / "metrics.json", json.dumps(_metrics(report, figures), indent=1))
    write_page(out / "report.html", training_report(report))
    return figures


def _metrics(report: RunReport, figures: dict[str, Tensor]) -> dict[str, Any]:
    facts = {name: getattr(report, name) for name in ("data", "split", "command", "machine", "date", "seconds")}
    return {**facts, "classes": list(report.classes), **{name: value.tolist() for name, value in figures.items()}}


def choose_samples(task: Classify, loader: Iterable[Any], each: int = SAMPLES) -> list[Shown]:
    """Up to `each` wrong answers, the most confident first, and as many right ones, one class after the other.

    One pass over the loader; only what may be shown is held.
    """
    wrong: list[Shown] = []
    right: dict[int, list[Shown]] = {}
    with evaluating(task):
        for item in loader:
            for shown in _answers(task, as_batch(item)):
                if shown.answer.label == task.classes[shown.truth]:
                    kept = right.setdefault(shown.truth, [])
                    kept.append(shown) if len(kept) < each else None
                else:
                    wrong = sorted([*wrong, shown], key=lambda s: -s.answer.confidence)[:each]
    turns = [kept[i] for i in range(each) for _, kept in sorted(right.items()) if i < len(kept)]
    return wrong + turns[:each]


def _answers(task: Classify, raw: Batch) -> Iterable[Shown]:
    answers = task.predict(task.prepare(raw))
    for picture, label, answer in zip(raw["image"], raw["label"].tolist(), answers, strict=True):
        yield Shown(picture, label, answer)


def _sample(task: Classify, shown: Shown) -> Sample:
    ready = task.backbone.preprocess.normalise(shown.picture).to(task.device)
    try:
        explanation = explain(task.backbone, ready, "rollout")
    except NoAttentionError:  # a convolutional network has nothing to roll out
        explanation = None
    return Sample(image=shown.picture, truth=task.classes[shown.truth], answer=shown.answer, explanation=explanation)


def machine() -> str:
    """The hardware and the torch version, in one line."""
    chip = torch.cuda.get_device_name() if torch.cuda.is_available() else f"{os.cpu_count()} cores {platform.machine()}"
    return f"{chip}, torch {torch.__version__}"
