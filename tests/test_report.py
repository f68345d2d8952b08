"""A run's figures on held-out images, the examples that are shown, and the page."""

from __future__ import annotations

import gc
import json
import math
import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close

from vitrail.data.badimages import BadImages
from vitrail.data.imagesets import TensorSet
from vitrail.data.loading import make_loader
from vitrail.draw.runs import Kept, RunReport
from vitrail.explain.choice import CannotExplainError
from vitrail.models.registry import build_model
from vitrail.records import UNLABELLED, Batch, Classification, History, Preprocess
from vitrail.report import RunFacts, Shown, _notes, as_json, choose_examples, machine, report_run
from vitrail.tasks.base import evaluate
from vitrail.tasks.classify import Classify

CLASSES = ("bright <b>", "dark", "grey & dull")
FACTS = RunFacts(
    title="vit_debug on noise", command="vitrail train --model vit_debug --data 'folder:my photos'",
    data="folder:my photos", split="test",
)  # fmt: skip
HISTORY = History([{"epoch": 1, "lr": 1e-3, "train_loss": 1.1, "val_loss": 1.0, "val_accuracy": 0.5, "seconds": 1.5}])


def images(count: int) -> TensorSet:
    pixels = torch.randint(256, (count, 3, 32, 32), dtype=torch.uint8)
    return TensorSet(pixels, torch.arange(count) % 3, CLASSES, [f"test/{n}.png" for n in range(count)])


def loader(part: TensorSet, size: int = 5) -> list[Batch]:
    return [part.gather(list(range(i, min(i + size, len(part))))) for i in range(0, len(part), size)]


def task_of(name: str = "vit_debug") -> Classify:
    model = build_model(name, num_classes=3).eval()
    model.classes = CLASSES
    return Classify(model)


def report(out: Path, task: Classify, facts: RunFacts = FACTS) -> tuple[dict[str, Tensor], dict[str, Any], str]:
    figures = report_run(out, task, loader(images(12)), HISTORY, facts, BadImages())
    return figures, json.loads((out / "metrics.json").read_text()), (out / "report.html").read_text()


def test_images_that_could_not_be_read_are_counted_on_the_page_and_in_the_figures(tmp_path: Path):
    bad, facts = BadImages(), replace(FACTS, counts={"test": [5, 4, 4]})
    bad.add({"test/7.png": "test/7.png: cut", "train/9.png": "train/9.png: empty"})
    part = images(12)
    part.bad_images = {7: "test/7.png: cut"}
    held_out = make_loader(part, batch_size=5, train=False, on_bad_image="skip")
    report_run(tmp_path, task_of(), held_out, HISTORY, facts, bad)
    metrics = json.loads((tmp_path / "metrics.json").read_text())
    assert (metrics["images"], metrics["bad_images"], metrics["bad_images_of_run"]) == (11, 1, 2)
    page = (tmp_path / "report.html").read_text()
    assert (
        "Of folder:my photos, 2 images could not be read at least once, and had no part in the run then. bad_" in page
    )
    assert (
        "bad_images.csv says which, and why. Of the test images, which the figures are of, 1 could not be read. "
        "The numbers of images in the parts of the data count them." in page
    )


def test_a_class_that_lost_all_its_training_images_is_named_on_the_page(tmp_path: Path):
    bad, part = BadImages(), images(12)
    bad.learnt = part
    bad.add(dict.fromkeys(part.ids[1::3], "cut"))
    report_run(tmp_path, task_of(), loader(part), HISTORY, FACTS, bad)
    assert "class dark: of its 4 images for training, none could be read" in (tmp_path / "report.html").read_text()


def test_where_all_could_be_read_the_page_says_nothing_of_it(tmp_path: Path):
    _, metrics, page = report(tmp_path, task_of())
    assert (metrics["images"], metrics["bad_images"], metrics["bad_images_of_run"]) == (12, 0, 0)
    assert "could not be read" not in page


def test_a_name_that_is_not_utf_8_stands_on_the_page_as_an_escape(tmp_path: Path):
    part = images(12)
    part.ids = [f"test/{n}\udcff.png" for n in range(12)]
    report_run(tmp_path, task_of(), loader(part), HISTORY, FACTS, BadImages())
    assert "\\udcff.png" in (tmp_path / "report.html").read_text(encoding="utf-8")


# ---- which examples are shown


class Told(nn.Module):
    """Answers what the id of an image says, such as `b 0.9`."""

    classes = ("a", "b", "c")

    def prepare(self, batch: Batch) -> Batch:
        return batch

    def predict(self, batch: Batch) -> list[Classification]:
        words = [name.split() for name in batch["id"]]
        return [Classification(id=" ".join(w), label=w[0], confidence=float(w[1])) for w in words]


def batch_of(truths: str, answers: str, confidences: list[float], start: int = 0) -> Batch:
    ids = [f"{answer} {confidence}" for answer, confidence in zip(answers, confidences, strict=True)]
    pixels = torch.arange(start, start + len(truths), dtype=torch.uint8).view(-1, 1, 1, 1).expand(-1, 3, 2, 2)
    return Batch(image=pixels.contiguous(), label=torch.tensor(["abc".index(t) for t in truths]), id=ids)


def test_wrong_answers_first_then_right_ones_of_every_class_in_turn():
    batches = [
        batch_of("caaab", "caabb", [0.9, 0.8, 0.7, 0.6, 0.5]),
        batch_of("bccab", "bccba", [0.5, 0.4, 0.3, 0.99, 0.8], start=5),
    ]
    shown = choose_examples(Told(), batches, each=5)
    wrong, right = shown[:3], shown[3:]
    assert [(s.truth, s.answer.label, s.answer.confidence) for s in wrong] == [
        (0, "b", 0.99), (1, "a", 0.8), (0, "b", 0.6),
    ]  # fmt: skip
    assert [(s.truth, s.answer.confidence) for s in right] == [(0, 0.8), (1, 0.5), (2, 0.9), (0, 0.7), (1, 0.5)]
    assert [int(s.image[0, 0, 0]) for s in shown] == [8, 9, 3, 1, 4, 0, 2, 5]
    assert [len(choose_examples(Told(), batches, each=n)) for n in (1, 2, 9)] == [2, 4, 3 + 7]


def test_what_stands_for_a_batch_that_could_not_be_read_is_no_example():
    batch = batch_of("ab", "ab", [0.9, 0.8])
    batch["label"][1] = UNLABELLED
    assert [shown.truth for shown in choose_examples(Told(), [batch])] == [0]


def test_no_more_is_held_than_is_shown():
    held = []

    def batches() -> Iterator[Batch]:
        for _ in range(30):
            yield batch_of("abcabc", "abcbca", [0.5] * 6)
        held.append(sum(type(thing) is Shown for thing in gc.get_objects()))

    shown = choose_examples(Told(), batches(), each=4)
    assert held[0] <= 4 + 4 + 1
    assert all(s.image.untyped_storage().nbytes() == s.image.numel() for s in shown)


# ---- figures


def test_figures_are_those_of_evaluate(tmp_path: Path):
    torch.manual_seed(3)
    task, pixels = task_of(), images(12)
    figures = report_run(tmp_path, task, loader(pixels), HISTORY, FACTS, BadImages())
    metrics = json.loads((tmp_path / "metrics.json").read_text())
    numbers = json.loads((tmp_path / "metrics.json").read_text().replace("null", "NaN"))
    for name, value in evaluate(task, loader(pixels, 12)).items():
        assert_close(figures[name], value, equal_nan=True)
        assert_close(torch.tensor(numbers[name], dtype=value.dtype), value, equal_nan=True)
    assert (metrics["split"], metrics["data"], metrics["classes"]) == ("test", "folder:my photos", list(CLASSES))
    assert (metrics["command"], metrics["seconds"]) == (FACTS.command, 1.5)


def test_json_has_no_nan():
    figures = {"loss": torch.tensor(math.nan), "ece": torch.tensor(0.5), "table": torch.tensor([[1.0, math.inf]])}
    assert as_json(figures) == {"loss": None, "ece": 0.5, "table": [[1.0, None]]}
    assert as_json({"confusion": torch.eye(2, dtype=torch.long)}) == {"confusion": [[1, 0], [0, 1]]}


def test_a_broken_model_still_gets_its_page(tmp_path: Path):
    task = task_of()
    nn.init.constant_(task.backbone.head.bias, math.nan)
    _, metrics, page = report(tmp_path, task)
    assert metrics["loss"] is None
    assert "NaN" not in (tmp_path / "metrics.json").read_text()
    assert page.endswith("</html>\n")


def test_the_machine_is_the_one_that_was_used():
    assert re.fullmatch(r"\d+ cores \w+, torch " + re.escape(torch.__version__), machine(torch.device("cpu")))


# ---- the page


def test_the_page_is_complete_and_alone(tmp_path: Path):
    _, metrics, page = report(tmp_path, task_of())
    assert {path.name for path in tmp_path.iterdir()} == {"metrics.json", "report.html"}
    assert re.findall(r'(?:src|href)="(?!data:|#)[^"]*"', page) == []
    assert "<script" not in page
    for title in ("Attention", "Confusion", "Calibration"):
        assert title.lower() in page.lower()
    for words in ("bright &lt;b&gt;", "grey &amp; dull", "vit_debug on noise", "12 images", f"{metrics['date']}"):
        assert words in page
    assert "<b>bright" not in page
    assert "attention rollout" in page
    assert "test images, which chose nothing" in page


def test_images_of_every_class_by_part_or_only_the_held_out_ones(tmp_path: Path):
    parts = {"train": [40, 41, 42], "test": [4, 4, 4]}
    _, _, page = report(tmp_path, task_of(), replace(FACTS, counts=parts))
    assert "was trained on 123 images of" in page
    _, _, page = report(tmp_path, task_of())
    assert "was trained on the training images of" in page
    assert "<td>4</td>" in page


def drawn(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, history: History = HISTORY, **facts: Any) -> RunReport:
    """What is handed to the page."""
    kept: list[RunReport] = []
    monkeypatch.setattr("vitrail.report.training_report", lambda report: kept.append(report) or "page")
    batches = facts.pop("batches", loader(images(12)))
    report_run(tmp_path, task_of(), batches, history, replace(FACTS, **facts), BadImages())
    return kept[0]


@pytest.mark.parametrize(("figures", "kept"), [
    ([0.5, 0.7, 0.7, 0.6], Kept(3, "accuracy", 0.7)),
    ([math.nan, 0.1, math.nan], Kept(2, "accuracy", 0.1)),
    ([math.nan, math.nan], Kept(2)),
    ([None, None, None], Kept(3)),
    ([], None),
])  # fmt: skip
def test_the_epoch_that_was_kept_is_the_best_or_the_last(
    figures: list[float | None], kept: Kept | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    rows = [
        {"epoch": n, "train_loss": 1.0} | ({} if v is None else {"val_accuracy": v}) for n, v in enumerate(figures, 1)
    ]
    assert drawn(tmp_path, monkeypatch, History(rows)).kept == kept


def test_the_page_says_which_epoch_was_kept(tmp_path: Path):
    page = report(tmp_path, task_of())[2]
    assert page.count("<b>epoch 1 of 1</b>, the best on the validation images (accuracy 50.0%;") == 2


def test_classes_without_held_out_images_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    pixels = images(12)
    some = [pixels.gather([n for n in range(12) if n % 3 != 1])]
    counts = {"train": [4, 4, 4], "val": [0, 1, 0], "test": [4, 0, 4]}
    notes = " ".join(drawn(tmp_path, monkeypatch, batches=some, counts=counts).notes)
    assert "nothing was held out, so nobody knows how well they are told: dark." in notes
    assert "no image had a say in which epoch was kept: bright <b>, grey & dull." in notes
    assert "only 8 held-out images: one image more or less moves the accuracy by 12.5%." in notes
    notes = " ".join(drawn(tmp_path, monkeypatch).notes)
    assert "held out, so" not in notes and "a say" not in notes


def test_of_many_classes_without_held_out_images_the_first_are_named():
    facts = replace(FACTS, counts={"val": [1] * 3 + [0] * 9})
    notes = _notes(facts, tuple("abcdefghijkl"), [0] * 7 + [100] * 5)
    assert notes[1:] == [
        "Of some classes nothing was held out, so nobody knows how well they are told: a, b, c, d, e and 2 more.",
        "Of some classes no image had a say in which epoch was kept: d, e, f, g, h and 4 more.",
    ]


@pytest.mark.parametrize(("count", "words"), [
    (1, "There is only 1 held-out image: one image more or less moves the accuracy by 100.0%."),
    (199, "There are only 199 held-out images: one image more or less moves the accuracy by 0.5%."),
    (200, None),
])  # fmt: skip
def test_of_few_images_one_counts(count: int, words: str | None):
    assert _notes(FACTS, ("a",), [count])[1:] == ([] if words is None else [words])


def ready(preprocess: Preprocess) -> tuple[TensorSet, list[Batch]]:
    """Held-out images, and the same normalised and with shares for labels, as a loader of one's own gives them."""
    raw = images(12)
    shares = torch.nn.functional.one_hot(raw.labels, 3).float()
    return raw, [Batch(image=preprocess.normalise(raw.images), label=shares)]


def test_ready_images_are_shown_as_they_were_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    told = Preprocess(img_size=(32, 32))
    raw, batches = ready(told)
    task, drawn = task_of(), []
    task.backbone.preprocess = told
    monkeypatch.setattr("vitrail.report.training_report", lambda report: drawn.append(report) or "page")
    report_run(tmp_path, task, batches, HISTORY, FACTS, BadImages())
    shown = {bytes((example.image * 255).round().byte().flatten().tolist()) for example in drawn[0].examples}
    assert shown <= {bytes(image.flatten().tolist()) for image in raw.images}
    assert len(shown) == len(drawn[0].examples) >= 6
    assert all(example.explanation is not None for example in drawn[0].examples)


def test_ready_images_of_unknown_making_are_shown_between_their_extremes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    _, batches = ready(Preprocess(img_size=(32, 32)))
    task, drawn = task_of(), []
    task.backbone.preprocess = task.backbone.preprocess.replace(known=False)
    monkeypatch.setattr("vitrail.report.training_report", lambda report: drawn.append(report) or "page")
    report_run(tmp_path, task, batches, HISTORY, FACTS, BadImages())
    assert {(float(s.image.min()), float(s.image.max())) for s in drawn[0].examples} == {(0.0, 1.0)}


def test_a_convolutional_network_has_a_page_without_rollout(tmp_path: Path):
    _, _, page = report(tmp_path, task_of("resnet_debug"))
    assert "rollout" not in page
    assert page.count('<figure class="example') == page.count('<div class="pair"><img') > 0


def test_a_network_whose_attention_cannot_be_rolled_out_has_its_page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def fail(*_: Any) -> None:
        raise error

    monkeypatch.setattr("vitrail.report.explain", fail)
    error = CannotExplainError("rollout needs maps of one size")
    _, metrics, page = report(tmp_path, task_of())
    assert "attention rollout" not in page
    assert metrics["split"] == "test"
    error = ValueError("a mistake of ours")
    with pytest.raises(ValueError, match="a mistake of ours"):
        report(tmp_path, task_of())


def test_figures_are_kept_before_examples_are_chosen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def fail(*_: Any) -> None:
        raise RuntimeError("out of memory")

    monkeypatch.setattr("vitrail.report.choose_examples", fail)
    with pytest.raises(RuntimeError, match="out of memory"):
        report(tmp_path, task_of())
    assert json.loads((tmp_path / "metrics.json").read_text())["split"] == "test"


def test_a_class_that_is_never_answered_has_no_precision(tmp_path: Path):
    task = task_of()
    nn.init.zeros_(task.backbone.head.weight)
    task.backbone.head.bias.data.copy_(torch.tensor([9.0, 0.0, 0.0]))
    _, metrics, _ = report(tmp_path, task)
    assert metrics["precision"][1:] == [None, None]
    assert metrics["recall"] == [1.0, 0.0, 0.0]


def test_figures_of_images_that_chose_the_epoch_are_called_so(tmp_path: Path):
    """A data set of two parts: what is reported is what validated."""
    _, metrics, page = report(tmp_path, task_of(), replace(FACTS, split="val"))
    assert metrics["split"] == "val"
    assert "which also chose the epoch that was kept" in page
    assert "test images, which chose nothing" not in page


def test_of_several_processes_the_first_writes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    task = task_of()
    monkeypatch.setattr("vitrail.report.dist.is_initialized", lambda: True)
    monkeypatch.setattr("vitrail.report.dist.get_rank", lambda: 1)
    monkeypatch.setattr("vitrail.report.evaluate", lambda *_: {"accuracy": torch.tensor(1.0)})
    shared: list[BadImages] = []
    monkeypatch.setattr(BadImages, "share", lambda bad: shared.append(bad))
    bad = BadImages()
    assert report_run(tmp_path, task, loader(images(12)), HISTORY, FACTS, bad) == {"accuracy": torch.tensor(1.0)}
    assert shared == [bad], "every process takes part, or the others would wait"
    assert list(tmp_path.iterdir()) == []
