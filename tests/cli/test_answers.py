"""`vitrail eval`, `predict` and `explain`: figures, answers and pictures of a trained model."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from PIL import Image

from vitrail import commands
from vitrail.images import open_image
from vitrail.models.registry import build_model
from vitrail.predict import ViTClassifier

Said = Callable[..., tuple[str, str]]


@pytest.fixture
def strangers(photos: Path, tmp_path: Path) -> Path:
    """The pictures under other names: by all that is known, others."""
    for path in photos.glob("*/*.png"):
        (tmp_path / "strangers" / path.parent.name).mkdir(parents=True, exist_ok=True)
        shutil.copy(path, tmp_path / "strangers" / path.parent.name / f"other{path.name}")
    return tmp_path / "strangers"


# ---- eval


def test_eval_prints_the_figures_of_the_run(run: Path, photos: Path, said: Said):
    metrics = json.loads((run / "metrics.json").read_text())
    out, _ = said("eval", run, "--data", f"folder:{photos}", "--device", "cpu")
    lines = dict(line.split(maxsplit=1) for line in out.splitlines())
    assert (lines.pop("split"), lines.pop("images")) == ("test (drawn)", "2 of 12")
    assert set(lines) == {"accuracy", "balanced_accuracy", "ece", "loss"}
    assert all(float(value) == pytest.approx(metrics[name], abs=1e-4) for name, value in lines.items())
    out, _ = said("eval", run, "--data", f"folder:{photos}", "--json", "--device", "cpu")
    figures = json.loads(out)
    facts = {name: figures.pop(name) for name in ("split", "drawn", "images", "classes")}
    assert facts == {"split": "test", "drawn": True, "images": 2, "classes": ["bright", "dark"]}
    for name, value in figures.items():
        torch.testing.assert_close(torch.tensor(value), torch.tensor(metrics[name]))


def test_eval_measures_what_was_never_trained_on_whole(run: Path, strangers: Path, said: Said):
    def first(*words: str) -> list[str]:
        out, _ = said("eval", run, "--data", f"folder:{strangers}", "--device", "cpu", *words)
        return [" ".join(line.split()) for line in out.splitlines()[:2]]

    assert first() == ["split all", "images 12 of 12"]
    assert first("--split", "test") == ["split test (drawn)", "images 2 of 12"]


def test_eval_refuses_other_classes(run: Path, photos: Path, tmp_path: Path, said: Said):
    shutil.copytree(photos, tmp_path / "other")
    (tmp_path / "other" / "dark").rename(tmp_path / "other" / "dim")
    _, err = said("eval", run, "--data", f"folder:{tmp_path / 'other'}", code=2)
    assert "knows the classes bright, dark; " in err
    assert "has bright, dim: take data with the model's classes" in err


# ---- predict


def test_predict_answers_in_the_order_asked(run: Path, photos: Path, said: Said):
    paths = [photos / "dark" / "1.png", photos / "bright" / "0.png"]
    out, err = said("predict", *paths, "--model", run)
    assert [line.split()[:2] for line in out.splitlines()] == [[str(paths[0]), "dark"], [str(paths[1]), "bright"]]
    assert all(line.endswith("%)") for line in out.splitlines())
    assert err == ""
    out, _ = said("predict", *paths, "--model", run, "--top", 1)
    assert not any("(" in line for line in out.splitlines())


def test_predict_takes_folders(run: Path, photos: Path, said: Said):
    out, _ = said("predict", photos / "dark", photos / "bright" / "5.png", "--model", run)
    assert [Path(line.split()[0]).name for line in out.splitlines()] == [f"{n}.png" for n in range(6)] + ["5.png"]


@pytest.mark.parametrize("first", [True, False])
def test_predict_in_json(first: bool, run: Path, photos: Path, said: Said, shipped: None):
    image = photos / "dark" / "0.png"
    out, err = said("predict", *(["--json", image] if first else [image, "--json"]))
    (line,) = out.splitlines()
    answer = json.loads(line)
    assert answer["id"] == str(image)
    assert answer["label"] == "dark" == answer["top"][0][0]
    assert answer["confidence"] == answer["top"][0][1]
    assert err.startswith("model: bloodcells (vit_debug), for ")


def test_predict_says_which_model_answers(photos: Path, said: Said, shipped: None):
    out, err = said("predict", photos / "dark" / "0.png")
    first, second = out.splitlines()
    assert first.startswith("model: bloodcells (vit_debug), for ")
    assert second.startswith(str(photos))
    assert err == ""


def test_the_model_that_ships_answers(said: Said):
    image = Path(__file__).parents[2] / "examples" / "images" / "wbc_0.png"
    first, second = said("predict", image)[0].splitlines()
    assert first.startswith("model: bloodcells (vit_")
    assert second.split()[1] == "WBC"


@pytest.mark.fault(18, 19)
def test_unreadable_images_are_named_and_the_others_answered(
    run: Path, photos: Path, tmp_path: Path, said: Said, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(commands, "BATCH", 2)
    bad, gone = tmp_path / "bad.png", tmp_path / "empty.jpg"
    bad.write_text("no image")
    gone.touch()
    good = [photos / "dark" / f"{number}.png" for number in range(4)]
    out, err = said("predict", *good[:3], bad, gone, good[3], "--model", run, code=2)
    assert [line.split()[0] for line in out.splitlines()] == [str(path) for path in good]
    lines = err.splitlines()
    assert [line.split(": ")[:2] for line in lines[:2]] == [["no answer", str(bad)], ["no answer", str(gone)]]
    told = "2 of 6 images could not be read"
    mend = "mend or leave out what is named above, or take --on-bad-image skip"
    assert lines[2:] == [f"error: {told}: {mend}"]
    answers, err = said("predict", *good[:3], bad, gone, good[3], "--model", run, "--on-bad-image", "skip")
    assert answers == out
    assert err.splitlines() == [*lines[:2], told]


def test_of_a_folder_that_has_more_below_its_own_images_are_answered_and_it_says_so(
    run: Path, photos: Path, tmp_path: Path, said: Said
):
    for place in (tmp_path, tmp_path / "2024" / "may", tmp_path / ".thumbnails"):
        place.mkdir(parents=True, exist_ok=True)
        shutil.copy(photos / "dark" / "0.png", place)
    (tmp_path / "notes").mkdir()
    out, err = said("predict", tmp_path, "--model", run)
    assert out.startswith(f"{tmp_path / '0.png'}  dark ")
    below = f"sub-folders are not searched: name those that hold images, such as {tmp_path / '2024' / 'may'}"
    assert (len(out.splitlines()), err) == (1, f"{tmp_path}: the folder's own images are taken; {below}\n")
    shutil.rmtree(tmp_path / "2024")
    assert said("predict", tmp_path, "--model", run) == (out, "")


@pytest.mark.fault(18, 19)
def test_a_path_that_names_nothing_is_told_and_the_others_answered(run: Path, photos: Path, said: Said):
    good, gone = [photos / "dark/0.png", photos / "dark/1.png"], photos / "dark/O.png"
    words = ["predict", good[0], gone, good[1], "--model", run]
    out, err = said(*words, code=2)
    assert [line.split()[0] for line in out.splitlines()] == [str(path) for path in good]
    told, end = err.splitlines()
    assert told.startswith(f"no answer: there is no {gone}; the nearest is ")
    assert end.startswith("error: 1 of 3 images could not be read: mend or leave out what is named above")
    answers, err = said(*words, "--on-bad-image", "skip")
    assert answers == out
    assert err.splitlines() == [told, "1 of 3 images could not be read"]


def test_answers_are_printed_as_their_batch_is_done(
    run: Path, photos: Path, said: Said, monkeypatch: pytest.MonkeyPatch
):
    whole, calls = ViTClassifier.logits, []

    def logits(self: ViTClassifier, images: torch.Tensor) -> torch.Tensor:
        calls.append(images)
        if len(calls) > 1:
            raise KeyboardInterrupt
        return whole(self, images)

    monkeypatch.setattr(commands, "BATCH", 2)
    monkeypatch.setattr(ViTClassifier, "logits", logits)
    out, _ = said("predict", photos / "dark", "--model", run, code=130)
    assert len(out.splitlines()) == 2


# ---- explain


def drawn(out: str) -> list[Path]:
    paths = [Path(line) for line in out.splitlines()]
    for path in paths:
        with Image.open(path) as picture:
            assert picture.format == "PNG"
            assert min(picture.size) > 200
    return paths


def test_explain_by_rollout(run: Path, photos: Path, tmp_path: Path, said: Said):
    out, _ = said("explain", photos / "dark" / "0.png", "--model", run, "--out", tmp_path / "new" / "out")
    assert drawn(out) == [tmp_path / "new" / "out" / "0_rollout.png"]


@pytest.mark.parametrize(("heads", "names"), [
    ("mean", ["0_attention_layers_1_3.png"]),
    ("0", ["0_attention_layers_1_3_head_0.png"]),
    ("all", ["0_layer01_heads.png", "0_layer03_heads.png"]),
])  # fmt: skip
def test_explain_by_attention(heads: str, names: list[str], run: Path, photos: Path, tmp_path: Path, said: Said):
    words = ["--method", "attention", "--layers", 1, 3, "--heads", heads, "--out", tmp_path]
    out, _ = said("explain", photos / "dark" / "0.png", "--model", run, *words)
    assert drawn(out) == [tmp_path / name for name in names]


def test_pictures_of_like_names_are_kept_apart(run: Path, photos: Path, tmp_path: Path, said: Said):
    for path, source in (("a/cat.png", "dark/0.png"), ("a/cat.bmp", "dark/1.png"), ("a/dog.png", "dark/2.png")):
        (tmp_path / "in" / path).parent.mkdir(parents=True, exist_ok=True)
        open_image(photos / source).save(tmp_path / "in" / path)
    folders = [tmp_path / "in" / "a", photos / "bright" / "0.png", photos / "dark" / "0.png"]
    out, _ = said("explain", *folders[:1], "--model", run, "--out", tmp_path)
    assert [path.name for path in drawn(out)] == ["cat_bmp_rollout.png", "cat_png_rollout.png", "dog_rollout.png"]
    out, _ = said("explain", *folders[1:], "--model", run, "--out", tmp_path)
    assert [path.name for path in drawn(out)] == ["bright_0_png_rollout.png", "dark_0_png_rollout.png"]


# ---- networks without a head, and what inspect is given


@pytest.fixture
def encoder(tmp_path: Path) -> Path:
    return build_model("vit_debug", num_classes=0).save_pretrained(tmp_path / "encoder")


def test_an_encoder_is_looked_into_and_gives_no_answers(encoder: Path, photos: Path, tmp_path: Path, said: Said):
    image = next(photos.rglob("*.png"))
    out, _ = said("explain", image, "--model", encoder, "--out", tmp_path / "out", "--device", "cpu")
    assert Path(out.strip()).is_file()
    _, err = said("predict", image, "--model", encoder, "--device", "cpu", code=2)
    assert "got 0: call reset_classifier(num_classes) and train it; `vitrail explain` and AttentionVisualizer" in err


def test_inspect_takes_names_and_folders_of_checkpoints(run: Path, said: Said):
    out, _ = said("inspect", "bloodcells")
    assert "network: vit_nano_patch8_64" in out and "classes: 3" in out
    out, _ = said("inspect", run / "checkpoints")
    assert out.startswith(f"{run / 'checkpoints' / 'last.ckpt'}: torch")
