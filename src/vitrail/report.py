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
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import date
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from vitrail.data.badimages import NAME, BadImages, counted
from vitrail.data.watch import WatchedLoader
from vitrail.draw.pages import training_report, write_page
from vitrail.draw.runs import Example, Kept, RunReport
from vitrail.explain.choice import CannotExplainError
from vitrail.explain.maps import explain
from vitrail.files import write_whole
from vitrail.layers.modes import evaluating
from vitrail.names import printable
from vitrail.records import Batch, Classification, History, Preprocess
from vitrail.tasks.base import as_batch, evaluate
from vitrail.tasks.classify import Classify, hard_labels
from vitrail.tasks.losses import labelled

EXAMPLES = 6
"""right answers shown, and as many wrong ones"""
FEW = 200
"""held-out images below which one of them moves the accuracy by more than half a percent"""
NAMED = 5
"""classes that a note names; it counts the others"""
TEST_NOTE = "The figures are of test images, which chose nothing."
VAL_NOTE = (
    "The figures are of the validation images, which also chose the epoch that was kept: the data has no others. "
    "Expect a little less of new images."
)
EXAMPLES_NOTE = "The wrong answers shown are the most confident ones, so they look worse than the typical mistake."


@dataclass(frozen=True, kw_only=True)
class RunFacts:
    """What a page says of a run beside its figures."""

    title: str
    command: str
    data: str
    split: Literal["test", "val"]
    """the part of the data that the figures are of; `val` also chose the epoch that was kept"""
    counts: Mapping[str, Sequence[int]] = field(default_factory=dict)
    """images of every class by part of the data; empty where only the held-out ones were counted"""


class Unread(NamedTuple):
    """How many images could not be read at least once."""

    held_out: int
    """of the part that the figures are of, which leave them out"""
    run: int
    """of the whole run"""
    unlearnt: list[str]
    """a sentence on each class that lost all its images to train on"""


class Shown(NamedTuple):
    """A held-out image that the page may show."""

    image: Tensor
    """(C, H, W) uint8, or float and ready for the network, in memory of its own"""
    truth: int
    answer: Classification


def report_run(
    out: Path, task: Classify, loader: Iterable[Any], history: History, facts: RunFacts, bad: BadImages
) -> dict[str, Tensor]:
    """Measures `task` on held-out images, writes `metrics.json` and `report.html` into `out`, returns the figures.

    `bad` are the images that the run could not read, those of `loader` among them, which are counted where it is one of
    vitrail's. Of several processes that share the
    images each measures its own, and the first one writes.
    """
    figures = evaluate(task, loader)
    bad.share()
    if dist.is_initialized() and dist.get_rank() > 0:
        return figures
    unread = Unread(bad.among(loader.names) if isinstance(loader, WatchedLoader) else 0, len(bad), bad.unlearnt())
    report = _report(task, figures, history, facts, unread)
    write_whole(out / "metrics.json", json.dumps(_metrics(report, figures, unread), indent=1, allow_nan=False))
    examples = [_example(task, shown) for shown in choose_examples(task, loader)]
    write_page(out / "report.html", training_report(replace(report, examples=examples)))
    return figures


def _report(task: Classify, figures: dict[str, Tensor], history: History, facts: RunFacts, unread: Unread) -> RunReport:
    """Everything on the page but its examples."""
    model, held_out = task.backbone, figures["confusion"].sum(1).tolist()
    return RunReport(
        title=facts.title,
        model=model.variant or model.family,
        parameters=sum(p.numel() for p in model.parameters()),
        img_size=model.preprocess.img_size,
        data=facts.data,
        counts=facts.counts or {facts.split: held_out},
        classes=task.classes,
        command=facts.command,
        machine=machine(task.device),
        date=date.today().isoformat(),
        seconds=sum(row.get("seconds", 0.0) for row in history.rows),
        history=history,
        kept=_kept(history, task),
        split=facts.split,
        figures={name: float(value) for name, value in figures.items() if value.ndim == 0},
        precision=figures["precision"],
        recall=figures["recall"],
        f1=figures["f1"],
        confusion=figures["confusion"],
        reliability=figures["reliability"],
        notes=[*_notes(facts, task.classes, held_out), *_unread(unread, facts), EXAMPLES_NOTE],
    )


def _kept(history: History, task: Classify) -> Kept | None:
    """The best epoch by the task's figure, of equals the last, or the last one where that was never a number."""
    name, mode = task.monitor
    if any(math.isfinite(row.get(f"val_{name}", math.nan)) for row in history.rows):
        row = history.best(f"val_{name}", mode)
        return Kept(int(row["epoch"]), name, row[f"val_{name}"])
    return Kept(int(history.rows[-1]["epoch"])) if history.rows else None


def _notes(facts: RunFacts, classes: Sequence[str], held_out: Sequence[int]) -> list[str]:
    """What to mind of the images that the figures are of."""
    notes = [TEST_NOTE if facts.split == "test" else VAL_NOTE]
    total = sum(held_out)
    if total < FEW:
        images = "There is only 1 held-out image" if total == 1 else f"There are only {total} held-out images"
        notes.append(f"{images}: one image more or less moves the accuracy by {1 / max(total, 1):.1%}.")
    if missing := _without(classes, held_out):
        notes.append(f"Of some classes nothing was held out, so nobody knows how well they are told: {missing}.")
    if facts.split == "test" and (missing := _without(classes, facts.counts.get("val", ()))):
        notes.append(f"Of some classes no image had a say in which epoch was kept: {missing}.")
    return notes


def _unread(unread: Unread, facts: RunFacts) -> list[str]:
    """How many images of the data had no part at some time, where their names stand, and what that cost."""
    if not unread.run:
        return []
    counting = " The numbers of images in the parts of the data count them." if facts.counts else ""
    return [
        f"Of {facts.data}, {counted(unread.run)} could not be read at least once, and had no part in the run then. "
        f"{NAME} says which, and why. Of the {facts.split} images, which the figures are of, {unread.held_out} could "
        f"not be read.{counting}",
        *unread.unlearnt,
    ]


def _without(classes: Sequence[str], counts: Sequence[int]) -> str:
    """The names of the classes that have no image; the first few, and how many more."""
    missing = [name for name, count in zip(classes, counts, strict=False) if not count]
    more = len(missing) - NAMED
    return ", ".join(missing[:NAMED]) + (f" and {more} more" if more > 0 else "")


def as_json(figures: Mapping[str, Tensor]) -> dict[str, Any]:
    """Figures as numbers and lists. JSON has no NaN and no infinity: they become null."""
    return {name: _finite(value.tolist()) for name, value in figures.items()}


def _finite(value: Any) -> Any:
    if isinstance(value, list):
        return [_finite(part) for part in value]
    return value if math.isfinite(value) else None


def _metrics(report: RunReport, figures: dict[str, Tensor], unread: Unread) -> dict[str, Any]:
    facts = {name: getattr(report, name) for name in ("data", "split", "command", "machine", "date", "seconds")}
    images = int(figures["confusion"].sum())  # `bad_images` as `vitrail eval --json` has it: of the same part
    counts = {"images": images, "bad_images": unread.held_out, "bad_images_of_run": unread.run}
    return {**facts, **counts, "classes": list(report.classes), **as_json(figures)}


def choose_examples(task: Classify, loader: Iterable[Any], each: int = EXAMPLES) -> list[Shown]:
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
    answers, known = task.predict(task.prepare(raw)), labelled(raw["label"]) > 0
    for row, (label, answer) in enumerate(zip(hard_labels(raw["label"]).tolist(), answers, strict=True)):
        if known[row]:
            yield Shown(raw["image"][row].clone(), label, answer)  # a view would keep its whole batch


def _example(task: Classify, shown: Shown) -> Example:
    ready = task.backbone.preprocess.prepare(Batch(image=shown.image))["image"].to(task.device)
    try:
        explanation = explain(task.backbone, ready, "rollout")
    except CannotExplainError:  # a network whose attention cannot be rolled out, or that has none
        explanation = None
    picture = _viewable(shown.image, task.backbone.preprocess)
    answer = replace(shown.answer, id=printable(shown.answer.id))  # a file's name need not be UTF-8, a page must
    return Example(image=picture, truth=task.classes[shown.truth], answer=answer, explanation=explanation)


def _viewable(image: Tensor, preprocess: Preprocess) -> Tensor:
    """(C, H, W) as it was before it was made ready; where nobody said how it was, between its extremes."""
    if not image.is_floating_point():
        return image
    if preprocess.known:
        return preprocess.denormalise(image)
    low, high = image.min(), image.max()
    return (image - low) / (high - low).clamp(min=1e-12)


def machine(device: torch.device) -> str:
    """The hardware that was used and the torch version, in one line."""
    cores = f"{os.cpu_count()} cores {platform.machine()}"
    chip = torch.cuda.get_device_name(device) if device.type == "cuda" else cores
    return f"{chip}, torch {torch.__version__}"
