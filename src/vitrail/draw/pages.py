"""A training run as one HTML file: what was trained, how good it is, where it fails, what it looked at.

The file needs no network, no script and no other file: styles are inline, charts are inline SVG that follows the light
or dark theme, photographs are data URIs. Its content security policy forbids fetching anything. All words that come
from outside (names of classes, files, machines) are escaped where they enter.

    RunReport ── training_report ──> HTML text ── write_page ──> report.html

Legend: `K` classes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path

from PIL import Image

from vitrail.draw.canvas import encode
from vitrail.draw.markup import duration, epochs, figure, image, inline_svg, meter, percent, table, times, wide, word
from vitrail.draw.pictures import overlay, to_picture
from vitrail.draw.plots import (
    READABLE,
    confusion_matrix,
    learning_curves,
    most_confused,
    recorded,
    reliability_diagram,
)
from vitrail.draw.runs import Example, RunReport
from vitrail.draw.style import PANES, SHEET
from vitrail.files import write_whole

TABLE_CLASSES = 12
"""classes up to which the confusion matrix is a table; beyond it is a picture"""
POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
NAMES = {"accuracy": "accuracy", "balanced_accuracy": "balanced accuracy", "ece": "calibration error"}
METHODS = {"rollout": "attention rollout", "attention": "attention"}


def training_report(report: RunReport) -> str:
    """The page as one self-contained HTML text."""
    present = [section for section in SECTIONS if section.wanted(report)]
    links = "".join(f'<a href="#{section.key}">{section.title}</a>' for section in present)
    bodies = "".join(f'<section id="{s.key}"><h2>{s.title}</h2>{s.body(report)}</section>' for s in present)
    panes = "".join(f'<i style="background:{colour}"></i>' for colour in PANES)
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">'
        f"<title>{escape(report.title)}</title><style>{SHEET}</style></head><body>"
        f'<div class="panes" aria-hidden="true">{panes}</div>'
        f'<header><p class="kicker">Training report</p><h1>{escape(report.title)}</h1>'
        f'<p class="meta">{escape(report.date)} · {escape(report.machine)}</p><nav aria-label="Sections">{links}</nav>'
        f"</header><main>{bodies}</main><footer>Written by vitrail. This file is complete: it can be mailed, archived"
        " and opened without a network.</footer></body></html>\n"
    )


def write_page(path: str | Path, html: str) -> Path:
    """Write a page whole or not at all, in UTF-8; missing folders are made. Returns the path."""
    return write_whole(path, html)


def _summary(report: RunReport) -> str:
    notes = "".join(f"<li>{escape(note)}</li>" for note in report.notes)
    return (
        f'<p class="lead">{_trained(report)}</p><p class="lead">{_how_good(report)}</p>'
        f'<p class="lead">{_weakest(report)}</p>{_tiles(report)}'
        + (f'<aside class="notes" aria-label="To bear in mind"><ul>{notes}</ul></aside>' if notes else "")
    )


def _trained(report: RunReport) -> str:
    images = f"{sum(report.counts['train']):,} images" if "train" in report.counts else "the training images"
    return (
        f"The model <b>{escape(report.model)}</b> with {report.parameters:,} parameters was trained on"
        f" {images} of <b>{escape(report.data)}</b> to tell {len(report.classes)} classes apart:"
        f" {epochs(len(report.history))} in {duration(report.seconds)}.{_kept(report)}"
    )


def _kept(report: RunReport) -> str:
    """Which epoch's weights the figures are of, and why."""
    if report.kept is None:
        return ""
    epoch, figure, value = report.kept
    which = f" The weights are those of <b>epoch {epoch} of {len(report.history)}</b>"
    if figure is None or value is None:
        return f"{which}, the last one, for no validation chose another."
    return f"{which}, the best on the validation images ({_figure_words(figure, value)}; of equals, the last)."


def _how_good(report: RunReport) -> str:
    accuracy, balanced = report.figures["accuracy"], report.figures["balanced_accuracy"]
    name = escape(report.classes[report.commonest])
    verdict = "" if accuracy > report.baseline else " <b>The network is no better than that constant answer.</b>"
    return (
        f"On the {sum(report.support):,} images of the held-out split <b>{escape(report.split)}</b> its answer is right"
        f" for <b>{percent(accuracy)}</b>. Always answering “{name}”, the most frequent class, would be right"
        f" for {percent(report.baseline)}.{verdict} With every class counted alike, frequent or rare (balanced"
        f" accuracy), it reaches <b>{percent(balanced)}</b>; a constant answer reaches"
        f" {percent(report.balanced_baseline)}."
    )


def _weakest(report: RunReport) -> str:
    recall = report.recall.tolist()
    found = [i for i in range(len(recall)) if math.isfinite(recall[i]) and report.support[i]]
    if not found:
        return ""
    worst = min(found, key=recall.__getitem__)
    mistake = next(iter(most_confused(report.confusion, report.classes, 1)), None)
    text = (
        f"The hardest class is “{escape(report.classes[worst])}”: {percent(recall[worst])} of its"
        f" {report.support[worst]:,} images are found."
    )
    if mistake is None:
        return text
    return text + (
        f" The most frequent mistake is “{escape(mistake.truth)}” taken for “{escape(mistake.answer)}”"
        f" ({times(mistake.images)})."
    )


def _tiles(report: RunReport) -> str:
    figures = report.figures
    constant = "upright mark: a constant answer, {}"
    return (
        '<dl class="tiles">'
        + _tile("Accuracy", figures["accuracy"], constant.format(percent(report.baseline)), report.baseline)
        + _tile(
            "Balanced accuracy",
            figures["balanced_accuracy"],
            constant.format(percent(report.balanced_baseline)),
            report.balanced_baseline,
        )
        + _tile("Calibration error", figures["ece"], "mean gap between confidence and accuracy; 0 is best")
        + "</dl>"
    )


def _tile(name: str, value: float, hint: str, mark: float | None = None) -> str:
    return (
        f'<div class="tile"><dt>{name}</dt><dd><div class="value">{percent(value)}</div>{meter(value, mark)}'
        f'<div class="small">{hint}</div></dd></div>'
    )


def _curves(report: RunReport) -> str:
    kept = report.kept.epoch if report.kept else None
    mark = f"<p>The dotted upright line marks the epoch that was kept.{_kept(report)}</p>" if report.kept else ""
    told = f"; epoch {kept} was kept" if report.kept else ""
    charts = "".join(
        figure(inline_svg(learning_curves(report.history, [panel], kept=kept), alt + told, key=panel))
        for panel, alt in CHARTS.items()
        if recorded(report.history, panel)
    )
    return (
        "<p>One epoch shows the network every training image once. The loss is what training lowers. A validation loss"
        " that rises while the training loss still falls is overfitting: the network learns the images by heart.</p>"
        f'{mark}<div class="charts">{charts}</div>'
    )


def _classes(report: RunReport) -> str:
    words = (
        "<p><b>Precision</b>: of the images that were given this name, the share that deserve it. <b>Recall</b>: of the"
        " images of this class, the share that was found. <b>F1</b> is high only where both are. A dash stands where"
        " there is nothing to divide by.</p>"
    )
    everyone = range(len(report.classes))
    if len(everyone) <= READABLE:
        return words + _class_table(report, everyone, f"Held-out split {escape(report.split)}")
    f1 = report.f1.nan_to_num(0).tolist()
    weakest = sorted(everyone, key=f1.__getitem__)[:TABLE_CLASSES]
    return (
        f"{words}{_class_table(report, weakest, f'The {len(weakest)} classes with the lowest F1')}<details><summary>"
        f"All {len(everyone)} classes</summary>{_class_table(report, everyone, 'All classes')}</details>"
    )


def _class_table(report: RunReport, chosen: Iterable[int], caption: str) -> str:
    scores = list(zip(report.precision.tolist(), report.recall.tolist(), report.f1.tolist(), strict=True))
    rows = "".join(
        f'<tr><th scope="row">{word(report.classes[i])}</th><td>{report.support[i]:,}</td>'
        + "".join(f'<td class="bar">{percent(score)}{meter(score)}</td>' for score in scores[i])
        + "</tr>"
        for i in chosen
    )
    return table(caption, ("class", "images", "precision", "recall", "F1"), rows)


def _confusion(report: RunReport) -> str:
    words = "<p>Each row holds the images of one true class, each column one answer; the diagonal is right.</p>"
    if len(report.classes) <= TABLE_CLASSES:
        return f'{words}<div class="split">{_matrix(report)}{_mistakes(report)}</div>'
    picture = encode(confusion_matrix(report.confusion, report.classes), "png")
    alt = "Confusion matrix as a picture; the most frequent mistakes are listed below."
    return f"{words}{figure(image(picture, 'png', alt))}{_mistakes(report)}"


def _matrix(report: RunReport) -> str:
    head = "".join(f'<th scope="col">{word(name)}</th>' for name in report.classes)
    rows = "".join(
        f'<tr><th scope="row">{word(name)}</th>{"".join(_cell(count, total) for count in counts)}</tr>'
        for name, counts, total in zip(report.classes, report.confusion.tolist(), report.support, strict=True)
    )
    return wide(
        "Confusion matrix",
        '<table class="matrix"><caption>Images, and their share of the true class</caption>'
        f"<thead><tr><td>truth ↓ answer →</td>{head}</tr></thead><tbody>{rows}</tbody></table>",
    )


def _cell(count: float, total: int) -> str:
    share = count / max(total, 1)
    words = f"{count:,.0f}<small>{percent(share)}</small>" if count else "0"
    return f'<td style="--strength:{math.sqrt(share):.3f}">{words}</td>'


def _mistakes(report: RunReport) -> str:
    pairs = most_confused(report.confusion, report.classes, 8)
    if not pairs:
        return "<p>No held-out image was answered wrongly.</p>"
    rows = "".join(
        '<tr><th scope="row">' + word(f"{p.truth} → {p.answer}") + f"</th><td>{p.images:,}</td>"
        f"<td>{percent(p.share)}</td></tr>"
        for p in pairs
    )
    caption = "The most frequent mistakes"
    return table(caption, ("truth → answer", "images", "of the true class"), rows)


def _calibration(report: RunReport) -> str:
    count, confidence, accuracy = report.reliability.double().nan_to_num(0).T
    total = max(count.sum().item(), 1)
    mean, right = (count @ confidence).item() / total, (count @ accuracy).item() / total
    leans = ("more often right than it claims", "about as sure as it should be", "more sure than it should be")
    lean = leans[1 + (mean - right > 0.01) - (right - mean > 0.01)]
    alt = f"Accuracy over confidence; calibration error {percent(report.figures['ece'])}"
    chart = inline_svg(reliability_diagram(report.reliability), alt, key="reliability")
    return (
        '<div class="split"><div>'
        "<p>With every answer the model says how sure it is. Where it says 80%, it should be right for 8 images in 10:"
        " dots on the dashed line. Dots below the line mean too much confidence, dots above too little; a dot that"
        " stands for few images (small bars below) means little.</p>"
        f"<p>Its mean confidence is {percent(mean)} and {percent(right)} of its answers are right: on the whole it is"
        f" {lean}. The calibration error (ECE) of {percent(report.figures['ece'])} is the mean distance of the dots"
        f" from the line, weighted by their images.</p></div>{figure(chart)}</div>"
    )


def _examples(report: RunReport) -> str:
    wrong, right = [s for s in report.examples if not s.right], [s for s in report.examples if s.right]
    methods = {s.explanation.method for s in report.examples if s.explanation}
    names = " / ".join(escape(METHODS.get(method, method)) for method in sorted(methods))
    legend = (
        f'<p>Beside each image: its {names}, from little <span class="scale" aria-hidden="true"></span> to much,'
        " scaled for each image by itself. <b>It shows where the model looked, not why it answered as it did</b>: the"
        " same place can speak for one class or against it.</p>"
    )
    picked = "<p>These images are picked, to show both kinds of answer; how often each happens stands above.</p>"
    return (
        picked + (legend if methods else "") + _gallery("Answered wrongly", wrong) + _gallery("Answered rightly", right)
    )


def _gallery(title: str, examples: Sequence[Example]) -> str:
    if not examples:
        return ""
    return f'<h3>{title}</h3><div class="examples">{"".join(map(_example, examples))}</div>'


def _example(example: Example) -> str:
    answer, truth = escape(example.answer.label), escape(example.truth)
    verdict = f"Right: {answer}" if example.right else f"Wrong: answered “{answer}”, it is “{truth}”"
    top = example.answer.top[:3] or ((example.answer.label, example.answer.confidence),)
    rows = "".join(
        f"<li><span>{escape(name)}</span><span>{percent(share)}</span>{meter(share)}</li>" for name, share in top
    )
    name = f'<div class="small">{escape(example.answer.id)}</div>' if example.answer.id else ""
    return (
        f'<figure class="example{"" if example.right else " wrong"}"><div class="pair">{_pair(example)}</div>'
        f'<figcaption><span class="verdict">{verdict}</span><ol>{rows}</ol>{name}</figcaption></figure>'
    )


def _pair(example: Example) -> str:
    picture = Image.fromarray(to_picture(example.image))
    scale = min(max(160 / min(picture.size), 1), 320 / max(picture.size))
    picture = picture.resize((max(1, round(picture.width * scale)), max(1, round(picture.height * scale))))
    plain = image(encode(picture, "webp", quality=88), "webp", f"An image of class {example.truth}")
    if example.explanation is None:
        return plain
    heated = encode(overlay(picture, example.explanation.heat, alpha=0.6), "webp", quality=88)
    return plain + image(heated, "webp", "The same image with the places the model looked at lit up")


def _facts(report: RunReport) -> str:
    height, width = report.img_size
    facts = {
        "model": f"{escape(report.model)}, {report.parameters:,} parameters, images of {height} × {width} pixels",
        "data": escape(report.data),
        "command": f"<code>{_words(report.command)}</code>",
        "machine": escape(report.machine),
        "date": escape(report.date),
        "training time": f"{duration(report.seconds)}, {epochs(len(report.history))}",
        f"figures on {escape(report.split)}": ", ".join(_figure_words(n, v) for n, v in report.figures.items()),
    }
    if waits := [row["data_wait"] for row in report.history.rows if "data_wait" in row]:
        facts["waiting for images"] = f"{percent(sum(waits) / len(waits))} of the time of training"
    rows = "".join(f"<dt>{name}</dt><dd>{value}</dd>" for name, value in facts.items())
    return f'<dl class="facts">{rows}</dl>{_count_table(report)}'


def _words(command: str) -> str:
    """Broken between words only: a line that ends in `--` is no command any more."""
    return " ".join(f"<span>{escape(word)}</span>" for word in command.split(" "))


def _figure_words(name: str, value: float) -> str:
    return f"{NAMES[name]} {percent(value)}" if name in NAMES else f"{escape(name.replace('_', ' '))} {value:.4g}"


def _count_table(report: RunReport) -> str:
    def row(name: str, counts: Iterable[int]) -> str:
        return f'<tr><th scope="row">{word(name)}</th>{"".join(f"<td>{n:,}</td>" for n in counts)}</tr>'

    splits = list(report.counts.values())
    rows = "".join(row(name, (s[i] for s in splits)) for i, name in enumerate(report.classes))
    head = ("class", *map(escape, report.counts))
    counts = table("Images of every class", head, rows + row("all", (sum(s) for s in splits)))
    if len(report.classes) <= READABLE:
        return counts
    return f"<details><summary>Images of every class</summary>{counts}</details>"


@dataclass(frozen=True)
class _Section:
    key: str
    title: str
    body: Callable[[RunReport], str]
    wanted: Callable[[RunReport], bool] = lambda report: True


CHARTS = {
    "loss": "Training and validation loss over the epochs",
    "scores": "Accuracies over the epochs",
    "lr": "Learning rate over the epochs",
}
SECTIONS = (
    _Section("summary", "In short", _summary),
    _Section("curves", "How it learned", _curves, lambda r: any(recorded(r.history, panel) for panel in CHARTS)),
    _Section("classes", "Class by class", _classes),
    _Section("confusion", "What is taken for what", _confusion),
    _Section("calibration", "How far to believe its confidence", _calibration),
    _Section("examples", "Some of its answers", _examples, lambda r: bool(r.examples)),
    _Section("run", "The run", _facts),
)
