"""A page is whole, harmless, and says what it was given."""

import re
from collections.abc import Sequence
from dataclasses import replace
from html.parser import HTMLParser

import pytest
import torch
from PIL import Image

from vitrail.draw.pages import training_report, write_page
from vitrail.draw.runs import Example, Kept, RunReport
from vitrail.draw.style import SHEET
from vitrail.records import Classification, Explanation, History

EVIL = "<script>alert('x')</script> & \"co\""
CLASSES = ("red", EVIL, "platelet")
VOID = {"meta", "img", "br"}
CONFUSION = torch.tensor([[812, 11, 5], [13, 59, 2], [6, 0, 66]])


def example(truth: str, answer: str, **changes) -> Example:
    top = ((answer, 0.813), ("platelet", 0.154))
    given = {
        "image": Image.new("RGB", (24, 32), "tomato"),
        "truth": truth,
        "answer": Classification(id=f"{EVIL}.jpg", label=answer, confidence=0.813, top=top),
        "explanation": Explanation(method="rollout", heat=torch.rand(3, 3)),
    }
    return Example(**{**given, **changes})


def report(**changes) -> RunReport:
    recall, precision = CONFUSION.diag() / CONFUSION.sum(1), CONFUSION.diag() / CONFUSION.sum(0)
    given = {
        "title": f"run {EVIL}",
        "model": "vit_debug",
        "parameters": 1_234_567,
        "img_size": (32, 48),
        "data": "cells",
        "counts": {"train": (3000, 301, 299), "test": (828, 74, 72)},
        "classes": CLASSES,
        "command": "vitrail train --data 'a b' && true",
        "machine": "2 cores",
        "date": "2026-11-21",
        "seconds": 161.4,
        "history": History([{"epoch": 1.0, "lr": 1e-3, "train_loss": 1.0, "val_loss": 0.9, "val_accuracy": 0.9}]),
        "split": "test",
        "figures": {"accuracy": 0.9617, "balanced_accuracy": 0.8983, "ece": 0.0321, "loss": 0.21342},
        "precision": precision,
        "recall": recall,
        "f1": 2 * precision * recall / (precision + recall),
        "confusion": CONFUSION,
        "reliability": torch.tensor([[0, 0, 0], [974, 0.93, 0.9617]]),
        "examples": [example(EVIL, EVIL), example("platelet", EVIL)],
        "notes": [f"mind {EVIL}"],
    }
    return RunReport(**{**given, **changes})


class Page(HTMLParser):
    """Every tag closed in its order; what a reader sees, and every attribute."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.words: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.feed(html)
        self.close()
        self.text = re.sub(r"\s+", " ", " ".join(self.words))

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if "style" not in self.open:
            self.words.append(data)

    def all(self, name: str) -> list[dict[str, str | None]]:
        return [attributes for tag, attributes in self.tags if tag == name]


@pytest.fixture(scope="module")
def page() -> Page:
    return Page(training_report(report()))


def test_the_page_is_well_formed(page):
    assert page.open == []
    assert [tag for tag, _ in page.tags].count("h1") == 1
    assert page.all("html") == [{"lang": "en"}]


def test_nothing_is_fetched_and_nothing_runs(page):
    html = training_report(report())
    assert "http" not in html.replace("http-equiv", "")
    assert not page.all("script")
    assert not page.all("link")
    assert all(image["src"].startswith("data:image/") for image in page.all("img"))
    assert {"default-src 'none'; img-src data:; style-src 'unsafe-inline'"} == {
        meta["content"] for meta in page.all("meta") if meta.get("http-equiv")
    }
    references = [value for _, attributes in page.tags for name, value in attributes.items() if name.endswith("href")]
    assert references
    assert all(value.startswith("#") for value in references)


def test_every_link_and_reference_has_its_one_target(page):
    ids = [attributes["id"] for _, attributes in page.tags if "id" in attributes]
    assert len(ids) == len(set(ids))
    targets = [value[1:] for _, attributes in page.tags for name, value in attributes.items() if name.endswith("href")]
    assert set(targets) <= set(ids)


def test_words_from_outside_are_shown_and_not_obeyed(page):
    assert page.text.count(EVIL) >= 8  # title, class tables, mistakes, notes, verdict, name of the file
    assert "<script" not in training_report(report())


def test_every_image_and_chart_has_words_for_those_who_do_not_see_it(page):
    assert len(page.all("img")) == 4
    assert all(image["alt"] for image in page.all("img"))
    assert page.all("img")[2]["alt"] == f"An image of class {EVIL}"
    assert all(chart["aria-label"] and chart["role"] == "img" for chart in page.all("svg"))
    assert len(page.all("svg")) == 4


def test_the_figures_on_the_page_are_the_figures_given(page):
    for words in ("96.2%", "89.8%", "3.2%", "loss 0.2134", "1,234,567 parameters", "32 × 48 pixels", "2 min 41 s"):
        assert words in page.text
    assert "vitrail train --data 'a b' && true" in page.text
    assert "3,600 images of cells" in page.text
    for count, total in ((812, 828), (11, 828), (13, 74), (59, 74), (66, 72)):
        assert f"{count} {count / total:.1%}" in page.text
    for score in (*report().precision.tolist(), *report().recall.tolist(), *report().f1.tolist()):
        assert f"{score:.1%}" in page.text


def test_the_accuracy_stands_beside_the_constant_answer(page):
    assert f"the most frequent class, would be right for {828 / 974:.1%}" in page.text
    assert "a constant answer reaches 33.3%" in page.text
    assert "no better than that constant answer" not in page.text
    poor = replace(report(), figures={"accuracy": 0.85, "balanced_accuracy": 0.33, "ece": 0.1})
    assert "no better than that constant answer" in training_report(poor)


def test_the_hardest_class_and_the_commonest_mistake_are_named(page):
    assert f"The hardest class is “{EVIL}”: {59 / 74:.1%} of its 74 images are found." in page.text
    assert f"is “{EVIL}” taken for “red” (13 times)" in page.text


def test_calibration_is_said_in_words(page):
    assert "Its mean confidence is 93.0% and 96.2% of its answers are right" in page.text
    assert "more often right than it claims" in page.text
    sure = training_report(report(reliability=torch.tensor([[9, 0.99, 0.5]])))
    assert "more sure than it should be" in sure


def test_examples_right_and_wrong_stand_apart(page):
    wrong, right = page.text.split("Answered wrongly")[1].split("Answered rightly")
    assert f"Wrong: answered “{EVIL}”, it is “platelet”" in wrong
    assert f"Right: {EVIL}" in right
    assert "These images are picked" in page.text
    assert "It shows where the model looked, not why it answered as it did" in page.text


def test_an_example_without_heat_shows_its_image_alone():
    bare = Page(training_report(report(examples=[example("red", "red", explanation=None)])))
    assert len(bare.all("img")) == 1
    assert "where the model looked" not in bare.text


def test_a_run_without_history_or_examples_has_no_such_section():
    bare = Page(training_report(report(history=History(), examples=())))
    assert bare.open == []
    assert "How it learned" not in bare.text
    assert "Some of its answers" not in bare.text


def test_the_time_that_waits_for_images_is_told_where_it_is_known(page):
    rows = [{"epoch": 1.0, "train_loss": 1.0, "data_wait": share} for share in (0.5, 0.1)]
    assert (
        "waiting for images 30.0% of the time of training" in Page(training_report(report(history=History(rows)))).text
    )
    assert "waiting for images" not in page.text


def test_a_class_without_images_or_answers_has_a_dash():
    scores = torch.tensor([1.0, float("nan"), float("nan")])
    confusion = torch.tensor([[5, 0, 0], [0, 0, 0], [0, 0, 0]])
    html = training_report(report(confusion=confusion, precision=scores, recall=scores, f1=scores))
    assert "nan" not in Page(html).text
    assert "–" in Page(html).text
    assert "No held-out image was answered wrongly." in html


def test_a_network_without_heat_is_not_said_to_have_looked():
    assert "looked" not in Page(training_report(report(examples=[example("red", "red", explanation=None)]))).text


def sections(page: Page) -> tuple[str, str]:
    """The words of the summary and of the curves."""
    summary, rest = page.text.split("In short")[-1].split("How it learned")[-2:]
    return summary, rest.split("Class by class")[0]


@pytest.mark.parametrize(("kept", "words"), [
    (Kept(2, "accuracy", 0.8769), "2 of 3 , the best on the validation images (accuracy 87.7%; of equals, the last)."),
    (Kept(2, "loss", 0.8765), "2 of 3 , the best on the validation images (loss 0.8765; of equals, the last)."),
    (Kept(3), "3 of 3 , the last one, for no validation chose another."),
])  # fmt: skip
def test_the_epoch_that_was_kept_is_told_twice_and_marked(kept, words):
    history = History([{"epoch": n, "lr": 1e-3, "train_loss": 1.0, "val_accuracy": 0.8} for n in (1, 2, 3)])
    page = Page(training_report(report(history=history, kept=kept)))
    for section in sections(page):
        assert f"The weights are those of epoch {words}" in section
    charts = [chart["aria-label"] for chart in page.all("svg")[:3]]
    assert all(label.endswith(f"; epoch {kept.epoch} was kept") for label in charts)
    assert "The dotted upright line marks the epoch that was kept." in page.text
    unmarked = Page(training_report(report(history=history)))
    assert len(page.all("path")) > len(unmarked.all("path"))


def test_of_a_run_without_epochs_none_was_kept(page):
    assert "kept" not in page.text


def test_one_epoch_is_one(page):
    assert page.text.count("1 epoch ") == 2
    assert "1 epochs" not in page.text


def test_tables_wider_than_the_page_are_reached_with_the_keyboard(page):
    wide = [attributes for tag, attributes in page.tags if attributes.get("class") == "wide"]
    assert len(wide) == len(page.all("table")) == 4
    assert all(box["tabindex"] == "0" and box["role"] == "region" and box["aria-label"] for box in wide)


def luminance(colour: Sequence[float]) -> float:
    """WCAG 2.2, relative luminance of red, green and blue in 0 … 255."""
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in (value / 255 for value in colour)]
    return sum(weight * value for weight, value in zip((0.2126, 0.7152, 0.0722), linear, strict=True))


@pytest.mark.parametrize("theme", [0, 1, 2], ids=["light", "dark", "print"])
@pytest.mark.parametrize("strength", [0.0, 0.5, 1.0])
def test_a_cell_of_the_matrix_can_be_read_however_full_it_is(theme, strength):
    """4.5 : 1, as WCAG 2.2 asks for text, in each theme of the style sheet."""

    def told(name: str) -> str:
        return re.findall(rf"--{name}: ([^;]+);", SHEET)[theme]

    def colour(text: str) -> list[int]:
        digits = text[1:] if len(text) == 7 else "".join(2 * digit for digit in text[1:])
        return [int(digits[i : i + 2], 16) for i in (0, 2, 4)]

    share = strength * float(told("most"))
    shade = [int(value) for value in told("shade").split(",")]
    cell = [share * s + (1 - share) * p for s, p in zip(shade, colour(told("paper")), strict=True)]
    low, high = sorted([luminance(cell), luminance(colour(told("ink")))])
    assert (high + 0.05) / (low + 0.05) >= 4.5


def test_a_cell_is_as_strong_as_the_root_of_its_share():
    html = training_report(report())
    for count, total in ((812, 828), (13, 74), (0, 78)):
        assert f'<td style="--strength:{(count / total) ** 0.5:.3f}">{count}<' in html


@pytest.mark.parametrize("shape", [(1, 20, 60), (2, 60, 20), (3, 9, 9), (5, 8, 300)])
def test_images_of_any_channels_and_shape_are_shown(shape):
    shown = example(
        "red", "red", image=torch.rand(shape), explanation=Explanation(method="rollout", heat=torch.rand(2, 3))
    )
    assert len(Page(training_report(report(examples=[shown]))).all("img")) == 2


def test_forty_classes_are_all_there():
    names = tuple(f"class-{i}-" for i in range(40))
    even = torch.full((40,), 0.5)
    many = report(
        classes=names,
        counts={"test": [1] * 40},
        confusion=torch.eye(40),
        **dict.fromkeys(("precision", "recall", "f1"), even),
    )
    page = Page(training_report(many))
    assert all(name in page.text for name in names)
    assert any(image["src"].startswith("data:image/png") for image in page.all("img"))


def test_a_page_is_written_whole(tmp_path):
    path = write_page(tmp_path / "runs" / "report.html", "<p>é</p>")
    assert path.read_bytes() == "<p>é</p>".encode()


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"figures": {"accuracy": 0.5}}, "got none for balanced_accuracy, ece"),
        ({"recall": torch.zeros(2)}, r"recall must be \(3,\) for 3 classes; got \(2,\)"),
        ({"counts": {"train": (1, 2)}}, "one number a class, 3 of them; got 2 for 'train'"),
    ],
)
def test_a_report_that_does_not_fit_together_is_named(changes, words):
    with pytest.raises(ValueError, match=words):
        report(**changes)
