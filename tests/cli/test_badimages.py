"""`--on-bad-image skip` from the command to the page: a run, its resumption, an evaluation."""

from __future__ import annotations

import csv
import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

Said = Callable[..., tuple[str, str]]


@pytest.fixture
def damaged(photos: Path, tmp_path: Path) -> Path:
    """The pictures of `photos`, three of them no more: cut short, empty, and text."""
    folder = shutil.copytree(photos, tmp_path / "damaged")
    cut, empty, text = (folder / name for name in ("bright/0.png", "bright/3.png", "dark/2.png"))
    cut.write_bytes(cut.read_bytes()[:300])
    empty.write_bytes(b"")
    text.write_text("no picture")
    return folder


def skipped(out: Path) -> dict[str, str]:
    with (out / "bad_images.csv").open(encoding="utf-8", newline="") as file:
        return {row["id"]: row["reason"] for row in csv.DictReader(file)}


@pytest.mark.fault(18, 19)
@pytest.mark.parametrize("how", ["", "--in-memory no", "--in-memory no --workers 1"])
def test_a_run_with_broken_images_ends_and_says_which(
    how: str, damaged: Path, tiny: list[str], tmp_path: Path, said: Said
):
    out = tmp_path / "run"
    words = ["train", *tiny, "--data", f"folder:{damaged}", "--out", out, *how.split()]
    _, err = said(*words, code=2)
    assert re.search(r"error: .*\d\.png: ", err)
    shutil.rmtree(out, ignore_errors=True)
    _, err = said(*words, "--on-bad-image", "skip")
    names = ["bright/0.png", "bright/3.png", "dark/2.png"]
    assert sorted(skipped(out)) == names
    assert all(reason.startswith(f"{damaged / name}: ") for name, reason in skipped(out).items())
    lines = err.splitlines()
    assert sorted(line.split(": ")[1] for line in lines if line.startswith("left out: ")) == [
        str(damaged / name) for name in names
    ]
    assert (
        f"3 images could not be read at least once, and took no part then: {out / 'bad_images.csv'} names them" in lines
    )
    page = re.sub(r"<[^>]+>", "", (out / "report.html").read_text())
    assert f"Of folder:{damaged}, 3 images could not be read at least once, and had no part in the run then" in page
    metrics = json.loads((out / "metrics.json").read_text())
    held_out = json.loads((out / "splits.json").read_text())["drawn"]["test"]
    assert metrics["images"] == len(set(held_out) - set(names)) == sum(map(sum, metrics["confusion"]))
    assert (metrics["bad_images"], metrics["bad_images_of_run"]) == (len(set(held_out) & set(names)), 3)


@pytest.mark.fault(18, 19)
@pytest.mark.parametrize("how", ["yes", "no"])
def test_a_class_that_was_not_learnt_is_named_once_and_in_the_report(
    how: str, photos: Path, tiny: list[str], tmp_path: Path, said: Said
):
    data, out = tmp_path / "parts", tmp_path / "run"
    for part in ("train", "val"):
        shutil.copytree(photos, data / part)
    for path in data.glob("train/dark/*.png"):
        path.write_bytes(b"")
    words = ["train", *tiny, "--data", f"folder:{data}", "--out", out, "--in-memory", how, "--on-bad-image", "skip"]
    lost = "class dark: of its 6 images for training, none could be read at all times, so it was not learnt, or hardly"
    assert said(*words)[1].splitlines().count(lost) == 1
    assert lost in (out / "report.html").read_text()


@pytest.mark.fault(18, 19)
def test_a_run_that_met_one_goes_on_when_told_to_skip(
    photos: Path, tiny: list[str], tmp_path: Path, said: Said, monkeypatch: pytest.MonkeyPatch
):
    data, out = shutil.copytree(photos, tmp_path / "photos"), tmp_path / "run"
    said("train", *tiny, "--data", f"folder:{data}", "--in-memory", "no", "--out", out)
    drawn = json.loads((out / "splits.json").read_text())["drawn"]
    bad = next(path for path in sorted(data.glob("*/*.png")) if not _held_out(path, drawn))
    bad.write_bytes(b"")
    more = ["train", "--resume", out, "--epochs"]
    _, err = said(*more, "3", code=2)
    assert f"error: {bad}: " in err
    said(*more, "3", "--on-bad-image", "skip")
    assert list(skipped(out)) == [f"{bad.parent.name}/{bad.name}"]
    _, err = said(*more, "4")
    assert "left out: " not in err, "it was told of before"
    assert "1 image could not be read" in err


def _held_out(path: Path, drawn: dict[str, list[str]]) -> bool:
    return any(f"{path.parent.name}/{path.name}" in names for names in drawn.values())


@pytest.mark.fault(18, 19)
def test_eval_says_of_how_many_images_its_figures_are(run: Path, damaged: Path, said: Said):
    words = ["eval", run, "--data", f"folder:{damaged}", "--split", "all", "--device", "cpu"]
    _, err = said(*words, code=2)
    assert re.search(r"error: .*\d\.png: ", err)
    out, err = said(*words, "--on-bad-image", "skip")
    assert "images 9 of 12, 3 could not be read" in [" ".join(line.split()) for line in out.splitlines()]
    assert len([line for line in err.splitlines() if line.startswith("left out: ")]) == 3
    figures = json.loads(said(*words, "--on-bad-image", "skip", "--json")[0])
    assert (figures["images"], figures["bad_images"]) == (9, 3)
    assert sum(map(sum, figures["confusion"])) == 9


def test_eval_in_json_always_says_how_many_could_not_be_read(run: Path, photos: Path, said: Said):
    words = ["eval", run, "--data", f"folder:{photos}", "--device", "cpu", "--json"]
    assert json.loads(said(*words)[0])["bad_images"] == 0


@pytest.mark.fault(18, 19)
def test_a_part_that_cannot_be_read_at_all_takes_no_figures_from_the_others(
    run: Path, photos: Path, tmp_path: Path, said: Said
):
    data = tmp_path / "parts"
    for part in ("train", "val"):
        shutil.copytree(photos, data / part)
    for path in data.glob("val/*/*.png"):
        path.write_bytes(b"")
    words = ["eval", run, "--data", f"folder:{data}", "--device", "cpu", "--on-bad-image", "skip", "--json", "--split"]
    figures = json.loads(said(*words, "all")[0])
    assert (figures["images"], figures["bad_images"]) == (12, 12)
    _, err = said(*words, "val", code=2)
    assert "error: figures need an image that can be read and has a label; got none" in err
    assert "12 images could not be read at least once, and took no part then\n" in err


@pytest.mark.fault(18, 19)
def test_a_rehearsal_that_validates_on_nothing_ends_too(photos: Path, tiny: list[str], tmp_path: Path, said: Said):
    """`--debug` takes four batches of each part, here of one image."""
    data = tmp_path / "parts"
    for part in ("train", "val"):
        shutil.copytree(photos, data / part)
    for path in sorted(data.glob("val/*/*.png"))[:-1]:
        path.write_bytes(b"")
    words = ["train", *tiny, "--data", f"folder:{data}", "--out", tmp_path / "run", "--in-memory", "no", "--debug"]
    _, err = said(*words, "--batch-size", "1", "--on-bad-image", "skip", code=2)
    assert "error: figures need an image that can be read and has a label; got none" in err


@pytest.fixture
def parts(photos: Path, tmp_path: Path) -> Path:
    """The pictures of `photos` three times: to train, to validate, to test."""
    for part in ("train", "val", "test"):
        shutil.copytree(photos, tmp_path / "parts" / part)
    return tmp_path / "parts"


@pytest.mark.fault(18, 19)
def test_what_was_met_before_the_image_that_ends_a_run_is_counted(
    parts: Path, tiny: list[str], tmp_path: Path, said: Said
):
    for path in parts.glob("train/*/*.png"):
        path.write_bytes(b"")
    words = ["train", *tiny, "--data", f"folder:{parts}", "--out", tmp_path / "run", "--in-memory", "no"]
    *others, error = said(*words, "--on-bad-image", "skip", code=2)[1].splitlines()
    met = len([line for line in others if line.startswith("left out: ")])
    names = f"{tmp_path / 'run' / 'bad_images.csv'} names them"
    assert f"{met} images could not be read at least once, and took no part then: {names}" in others
    assert error.startswith("error: --on-bad-image skip met ")


@pytest.mark.fault(18, 19)
@pytest.mark.parametrize(("how", "message"), [
    ("skip", "error: figures need an image that can be read and has a label; got none"),
    ("raise", "error: {parts}/test/bright/0.png: not a readable image"),
])  # fmt: skip
def test_where_no_image_to_test_with_can_be_read_the_error_says_where_the_model_is(
    how: str, message: str, parts: Path, tiny: list[str], tmp_path: Path, said: Said
):
    for path in parts.glob("test/*/*.png"):
        path.write_bytes(b"")
    out = tmp_path / "run"
    words = ["train", *tiny, "--data", f"folder:{parts}", "--out", out, "--in-memory", "no", "--on-bad-image", how]
    error = said(*words, code=2)[1].splitlines()[-1]
    assert error.startswith(message.format(parts=parts))
    saved = f"; training is done, and its model is saved in {out / 'model'}; only what comes after it failed"
    assert error.endswith(saved)
    said("predict", parts / "val" / "dark", "--model", out)


def test_a_report_that_cannot_be_written_is_named_and_so_is_the_model(
    photos: Path, tiny: list[str], tmp_path: Path, said: Said
):
    out = tmp_path / "run"
    (out / "report.html").mkdir(parents=True)
    error = said("train", *tiny, "--data", f"folder:{photos}", "--out", out, code=2)[1].splitlines()[-1]
    assert error.startswith(f"error: {out / 'report.html'} cannot be read or written: ")
    assert f"; training is done, and its model is saved in {out / 'model'}; " in error
