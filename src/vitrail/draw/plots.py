"""Charts of figures: learning curves, confusion, calibration. Tensors and a `History` in, figures out.

Colours are told apart with any kind of colour vision, and no chart rests on colour alone.

Legend: `K` classes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from itertools import cycle
from typing import NamedTuple

import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.colors import PowerNorm
from matplotlib.ticker import FuncFormatter, MaxNLocator, PercentFormatter
from torch import Tensor

from vitrail.draw.canvas import BLUE, GREEN, INK, MUTED, ORANGE, SMALL, Canvas, dress
from vitrail.records import History

READABLE = 30
"""classes up to which a chart can name and number each of them"""
NAMED = 120
"""classes up to which a confusion matrix names its rows in small print"""
PERCENT = PercentFormatter(1, decimals=0)
FILL = (BLUE, 0.25)
SHADES = colormaps["Blues"]
FAINT = PowerNorm(0.5, vmin=0, vmax=1)
"""the square root of a share: a mistake of 1 % is still seen"""


class Confused(NamedTuple):
    """One kind of mistake: images of class `truth` that were answered `answer`."""

    truth: str
    answer: str
    images: int
    share: float
    """of all images of class `truth`, 0 … 1"""


def learning_curves(
    history: History, panels: Sequence[str] = ("loss", "scores", "lr"), *, kept: float | None = None
) -> Canvas:
    """Panels side by side over the epochs: `loss` (train and validation), `scores` (accuracies), `lr` (learning rate).

    An upright line marks the epoch whose weights were `kept`. A panel for which the history holds nothing is left out.
    Raises `ValueError` if none is left.
    """
    unknown = [panel for panel in panels if panel not in PANELS]
    if unknown:
        raise ValueError(f"panels are {', '.join(PANELS)}; got {unknown[0]!r}")
    present = [panel for panel in panels if recorded(history, panel)]
    if not present:
        raise ValueError(f"the history must hold figures for {', '.join(panels)}; got {len(history)} epochs without")
    drawing = Canvas(3.7 * len(present), 2.8)
    for axes, name in zip(drawing.subplots(1, len(present), squeeze=False).flat, present, strict=True):
        PANELS[name].draw(axes, history, kept)
    return drawing


def recorded(history: History, panel: str) -> bool:
    """Whether the history holds a figure that `panel` (`loss`, `scores`, `lr`) shows."""
    return any(name in row for row in history.rows for name in PANELS[panel].lines)


def confusion_matrix(confusion: Tensor, classes: Sequence[str]) -> Canvas:
    """`confusion` (K, K) counts, rows are the truth. Colour is the share of a row; up to 30 classes every cell is
    numbered (count and share), beyond that `most_confused` lists what matters."""
    counts = _counts(confusion, classes)
    shares = _shares(counts)
    size = min(3.2 + 0.55 * len(classes), 13.0)
    drawing = Canvas(size + (1.6 if len(classes) > READABLE else 0), size, "compressed")
    axes = drawing.subplots()
    dress(axes, x="answer", y="truth")
    axes.grid(visible=False)
    shown = axes.imshow(shares, cmap=SHADES, norm=FAINT, interpolation="nearest")
    _name_cells(axes, classes)
    if len(classes) <= READABLE:
        _number_cells(axes, counts, shares)
    else:
        bar = drawing.colorbar(shown, ax=axes, shrink=0.6, format=PERCENT)
        bar.ax.tick_params(labelsize=SMALL, colors=INK)
        bar.set_label("share of the row", fontsize=SMALL, color=INK)
    return drawing


def most_confused(confusion: Tensor, classes: Sequence[str], n: int = 10) -> list[Confused]:
    """The `n` most frequent mistakes, by images and then by share of the true class. `confusion` as above."""
    counts = _counts(confusion, classes)
    shares = _shares(counts)
    pairs = [
        Confused(classes[i], classes[j], int(counts[i, j]), float(shares[i, j]))
        for i, j in zip(*np.nonzero(counts), strict=True)
        if i != j
    ]
    return sorted(pairs, key=lambda pair: (-pair.images, -pair.share))[:n]


def calibration_error(reliability: Tensor) -> float:
    """Expected calibration error of a (bins, 3) table of count, mean confidence, accuracy: the mean distance between
    the last two, weighted by count (Guo et al. 2017, "On Calibration of Modern Neural Networks", eq. 3). 0 if empty."""
    count, confidence, accuracy = _bins(reliability)
    return float((count * np.abs(confidence - accuracy)).sum() / max(count.sum(), 1))


def reliability_diagram(reliability: Tensor) -> Canvas:
    """Accuracy over confidence, with the number of images at each confidence below.

    `reliability` is (bins, 3): count, mean confidence, accuracy, in equal bins over [0, 1].
    """
    count, confidence, accuracy = _bins(reliability)
    drawing = Canvas(4.4, 4.4)
    upper, lower = drawing.subplots(2, 1, sharex=True, height_ratios=(3, 1))
    dress(upper, f"calibration error {calibration_error(reliability):.1%}", y="accuracy")
    dress(lower, x="confidence", y="images")
    left = np.arange(len(count)) / len(count)
    filled = count > 0
    box = {"width": 1 / len(count), "align": "edge", "edgecolor": BLUE, "linewidth": 0.8}
    upper.bar(left[filled], accuracy[filled], color=FILL, **box)
    upper.plot([0, 1], [0, 1], color=MUTED, linestyle="--", linewidth=1, label="confidence = accuracy")
    upper.plot(confidence[filled], accuracy[filled], "o", color=ORANGE, markersize=4.5, label="images at a confidence")
    upper.legend(fontsize=SMALL, frameon=False, labelcolor=INK, loc="upper left")
    upper.set(xlim=(0, 1), ylim=(0, 1.02))
    lower.bar(left, count, color=FILL, **box)
    for axis in (upper.xaxis, upper.yaxis, lower.xaxis):
        axis.set_major_formatter(PERCENT)
    lower.yaxis.set_major_locator(MaxNLocator(3, integer=True))
    return drawing


class Measure(NamedTuple):
    """A figure and its interval."""

    value: float
    low: float
    high: float


def interval_bars(named: Mapping[str, Measure], title: str) -> Canvas:
    """A bar for each share in `named`, from the top down, its interval as a line and its value in words."""
    drawing = Canvas(6.2, 0.9 + 0.34 * len(named))
    axes = drawing.subplots()
    dress(axes, title)
    places = np.arange(len(named))
    values, lows, highs = np.array(list(named.values())).T
    axes.barh(places, values, color=FILL, edgecolor=BLUE, linewidth=0.8, height=0.7)
    axes.errorbar(values, places, xerr=np.abs([values - lows, highs - values]), fmt="none", ecolor=ORANGE, capsize=3)
    for place, measure in enumerate(named.values()):
        axes.text(0.01, place, f"{measure.value:.1%}", va="center", fontsize=SMALL, color=INK)
    axes.set_yticks(places, list(named), fontsize=SMALL, parse_math=False)
    axes.invert_yaxis()
    axes.set_xlim(0, 1)
    axes.xaxis.set_major_formatter(PERCENT)
    return drawing


def compared_curves(histories: Mapping[str, History]) -> Canvas:
    """Training loss and validation accuracy of several runs, each named in `histories`, side by side."""
    drawing = Canvas(8.4, 3.0)
    for axes, (figure, title, finish) in zip(drawing.subplots(1, 2).flat, COMPARED, strict=True):
        dress(axes, title, "epoch")
        for (name, history), (colour, style) in zip(histories.items(), cycle(TOLD_APART)):
            axes.plot(*_series(history, figure), style, color=colour, label=name, linewidth=1.6)
        axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
        axes.legend(fontsize=SMALL, frameon=False, labelcolor=INK)
        finish(axes)
    return drawing


def search_chart(tried: Mapping[int, tuple[float, bool]], importance: Mapping[str, float]) -> Canvas:
    """What each trial of a search came to, by its number, and which settings mattered, where that is known.

    `tried` has a trial's figure in 0 … 1 and whether it was completed: those that were not are hollow.
    """
    drawing = Canvas(8.4 if importance else 4.4, 3.0)
    left, *right = drawing.subplots(1, 2 if importance else 1, squeeze=False).flat
    dress(left, "validation figure of each trial", "trial")
    for whole, face in ((True, BLUE), (False, "none")):
        found = {number: value for number, (value, complete) in tried.items() if complete == whole}
        label = "complete" if whole else "ended early"
        left.plot(list(found), list(found.values()), "o", color=BLUE, markerfacecolor=face, markersize=4, label=label)
    numbers, values = list(tried), [value if complete else -np.inf for value, complete in tried.values()]
    best = np.maximum.accumulate(np.array(values or [-np.inf]))
    known = np.isfinite(best)
    left.step(np.array(numbers or [0])[known], best[known], where="post", color=ORANGE, label="best so far")
    left.xaxis.set_major_locator(MaxNLocator(6, integer=True))
    left.yaxis.set_major_formatter(PERCENT)
    left.legend(fontsize=SMALL, frameon=False, labelcolor=INK)
    for axes in right:
        dress(axes, "share in what trials differ by")
        places = np.arange(len(importance))
        axes.barh(places, list(importance.values()), color=FILL, edgecolor=BLUE, linewidth=0.8, height=0.7)
        axes.set_yticks(places, list(importance), fontsize=SMALL, parse_math=False)
        axes.invert_yaxis()
        axes.xaxis.set_major_formatter(PERCENT)
    return drawing


class _Line(NamedTuple):
    label: str
    colour: str
    style: str


def _series(history: History, name: str) -> tuple[list[float], list[float]]:
    rows = [(row.get("epoch", float(i)), row[name]) for i, row in enumerate(history.rows, 1) if name in row]
    return [epoch for epoch, _ in rows], [value for _, value in rows]


class _Panel(NamedTuple):
    title: str
    lines: dict[str, _Line]
    finish: Callable[[Axes], None]

    def draw(self, axes: Axes, history: History, kept: float | None) -> None:
        dress(axes, self.title, "epoch")
        shown = [name for name in self.lines if any(name in row for row in history.rows)]
        for name in shown:
            label, colour, style = self.lines[name]
            epochs, values = _series(history, name)
            marker = "o" if len(values) < 25 else ""
            axes.plot(epochs, values, style + marker, color=colour, label=label, linewidth=1.6, markersize=3)
        axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
        self.finish(axes)
        if kept is not None:
            axes.axvline(kept, color=INK, linestyle=":", linewidth=1, label=f"epoch {kept:.0f}, kept")
        if len(shown) > 1 or kept is not None:
            axes.legend(fontsize=SMALL, frameon=False, labelcolor=INK)


def _percents(axes: Axes) -> None:
    axes.yaxis.set_major_formatter(PERCENT)


def _from_zero(axes: Axes) -> None:
    axes.set_ylim(bottom=min(0.0, axes.get_ylim()[0]))


def _powers(axes: Axes) -> None:
    _from_zero(axes)
    axes.yaxis.set_major_formatter(
        FuncFormatter(lambda value, _: f"{value:.1e}".replace("e-0", "e-") if value else "0")
    )


PANELS = {
    "loss": _Panel(
        "Loss",
        {"train_loss": _Line("training", BLUE, "-"), "val_loss": _Line("validation", ORANGE, "--")},
        _from_zero,
    ),
    "scores": _Panel(
        "Accuracy",
        {
            "train_accuracy": _Line("training", BLUE, "-"),
            "val_accuracy": _Line("validation", ORANGE, "--"),
            "val_balanced_accuracy": _Line("validation, balanced", GREEN, "-."),
        },
        _percents,
    ),
    "lr": _Panel("Learning rate", {"lr": _Line("learning rate", BLUE, "-")}, _powers),
}


COMPARED = (("train_loss", "Training loss", _from_zero), ("val_accuracy", "Validation accuracy", _percents))
TOLD_APART = ((BLUE, "-"), (ORANGE, "--"), (GREEN, "-."), (MUTED, ":"))


def _counts(confusion: Tensor, classes: Sequence[str]) -> np.ndarray:
    if confusion.shape != (len(classes), len(classes)) or not len(classes):
        raise ValueError(f"confusion must be (K, K) for the {len(classes)} classes; got shape {tuple(confusion.shape)}")
    return confusion.detach().cpu().double().numpy()


def _shares(counts: np.ndarray) -> np.ndarray:
    """Each row divided by its sum; a class without images has zeros."""
    return np.asarray(counts / np.maximum(counts.sum(1, keepdims=True), 1))


def _bins(reliability: Tensor) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    if reliability.ndim != 2 or reliability.shape[1] != 3 or not len(reliability):
        raise ValueError(
            f"reliability must be (bins, 3): count, mean confidence, accuracy; got {tuple(reliability.shape)}"
        )
    count, confidence, accuracy = reliability.detach().cpu().double().nan_to_num(0).T.numpy()
    return count, confidence, accuracy


def _short(name: str, most: int = 24) -> str:
    return name if len(name) <= most else f"{name[: most - 1]}…"


def _name_cells(axes: Axes, classes: Sequence[str]) -> None:
    """All names where there is room, small ones up to 120 classes, then every n-th class by number."""
    if len(classes) > NAMED:
        ticks = range(0, len(classes), -(-len(classes) // 20))
        names, points = [str(i) for i in ticks], SMALL
    else:
        ticks = range(len(classes))
        names, points = [_short(name) for name in classes], min(SMALL, 420 / len(classes))
    axes.set_xticks(ticks, names, rotation=90 if len(classes) > 4 else 0, fontsize=points, parse_math=False)
    axes.set_yticks(ticks, names, fontsize=points, parse_math=False)


def _number_cells(axes: Axes, counts: np.ndarray, shares: np.ndarray) -> None:
    points = min(9.0, 170 / len(counts))
    for (i, j), count in np.ndenumerate(counts):
        if count:
            dark = sum(SHADES(float(FAINT(shares[i, j])))[:3]) < 1.5  # where ink and white are equally well read
            words = f"{count:,.0f}\n{shares[i, j]:.0%}"
            axes.text(j, i, words, ha="center", va="center", fontsize=points, color="white" if dark else INK)
