"""One call from a picture of any kind to an answer, batched or not."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from vitrail.images import ImageError
from vitrail.models.backbone import Backbone
from vitrail.models.registry import build_model
from vitrail.predict import Predictor, ViTClassifier
from vitrail.records import Classification, Preprocess
from vitrail.tasks.classify import Classify


@pytest.fixture(scope="module")
def model() -> Backbone:
    torch.manual_seed(0)
    model = build_model("vit_debug", depth=1)
    model.classes = tuple("abcdefghij")
    return model


def pixels(height: int = 40, width: int = 50, seed: int = 0) -> np.ndarray[Any, Any]:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


@pytest.fixture
def photo(tmp_path: Path) -> Path:
    path = tmp_path / "photo.png"
    Image.fromarray(pixels()).save(path)
    return path


def test_from_folder_to_class(model: Backbone, photo: Path, tmp_path: Path):
    model.save_pretrained(tmp_path / "model")
    answer = ViTClassifier.from_pretrained(tmp_path / "model").predict(str(photo))
    assert isinstance(answer, Classification)
    assert answer["class"] == answer.label in model.classes and 0.1 <= answer["confidence"] <= 1
    assert answer.id == str(photo) and len(answer.top) == 5
    assert Predictor.from_pretrained(tmp_path, device="cpu").predict(photo) == answer


def test_the_answer_is_the_networks(model: Backbone, photo: Path):
    answer = Predictor(model).predict(photo, top=10)
    picture = torch.from_numpy(pixels()).permute(2, 0, 1)
    cut, ready = Predictor(model).look(picture)
    assert cut.dtype == torch.uint8 and cut.shape == (3, 32, 32)
    assert torch.equal(ready, model.preprocess.normalise(cut)[None])
    shares = model.eval()(ready).softmax(-1)[0].tolist()
    model.train()
    assert dict(answer.top) == pytest.approx(dict(zip(model.classes, shares, strict=True)), abs=1e-6)


def test_every_kind_of_image_is_the_same_image(model: Backbone, photo: Path):
    tensor = torch.from_numpy(pixels()).permute(2, 0, 1)
    kinds = [photo, str(photo), Image.open(photo), tensor, pixels(), tensor / 255, pixels() / 255]
    answers = Predictor(model).predict(kinds)
    assert len({answer.top for answer in answers}) == 1
    assert [answer.id for answer in answers] == [str(photo), str(photo), *[""] * 5]
    grey = Image.fromarray(pixels()).convert("L")
    assert Predictor(model).predict(np.asarray(grey)) == Predictor(model).predict(grey)


def test_answers_come_as_their_batch_is_done(model: Backbone, tmp_path: Path):
    stream = Predictor(model).stream([pixels(), pixels(seed=1), tmp_path / "none.png"], batch_size=2)
    assert [next(stream).label, next(stream).label] == [
        a.label for a in Predictor(model).predict([pixels(), pixels(seed=1)])
    ]
    with pytest.raises(ImageError, match="none.png"):
        next(stream)


@pytest.mark.parametrize("names", [["a"], list("abcdefghijk")])
def test_names_that_are_not_one_a_logit_are_refused(model: Backbone, names: list[str]):
    message = rf"one a logit; got {len(names)} names for 10 logits: name them all, or reset_classifier"
    with pytest.raises(ValueError, match=message):
        Predictor(model, classes=names)
    foreign = nn.Sequential(nn.Flatten(), nn.LazyLinear(10))
    with pytest.raises(ValueError, match=message):
        Predictor(foreign, preprocess=Preprocess(img_size=(8, 8)), classes=names).predict(pixels())
    other = build_model("vit_debug", depth=1)
    other.classes = tuple(names)
    with pytest.raises(ValueError, match=message):
        Classify(other)


def test_a_head_put_in_by_hand_counts():
    model = build_model("vit_debug", depth=1)
    model.head, model.classes = nn.Linear(48, 3), ("a", "b", "c")
    for kind in (Predictor, ViTClassifier):
        assert kind(model).predict(pixels()).label in "abc"
    bare = build_model("vit_debug", depth=1, num_classes=0)
    bare.head = nn.Linear(48, 2)
    assert len(ViTClassifier(bare).predict(pixels()).top) == 2


def test_features_are_not_taken_for_logits():
    bare, taken = build_model("vit_debug", depth=1, num_classes=0), build_model("vit_debug", depth=1)
    taken.head = nn.Identity()
    for model in (bare, taken):
        for answer in (lambda: ViTClassifier(model), lambda: Predictor(model).predict(pixels())):  # noqa: B023
            with pytest.raises(ValueError, match="num_classes of at least 1; got 0: call reset_classifier"):
                answer()
        assert Predictor(model).look(pixels())[1].shape == (1, 3, 32, 32)


def test_batched_equals_single(model: Backbone):
    predictor = Predictor(model)
    images = [pixels(30 + i, 60 - i, seed=i) for i in range(7)]
    together, apart = predictor.predict(images, top=10, batch_size=3), [predictor.predict(i, top=10) for i in images]
    for one, two in zip(together, apart, strict=True):
        assert dict(one.top) == pytest.approx(dict(two.top), abs=1e-5)
    assert predictor.predict(tuple(images), batch_size=1)[6].label == apart[6].label
    assert predictor.predict([]) == []


def test_the_model_is_left_as_it_was(model: Backbone):
    for mode in (True, False):
        model.train(mode)
        before = [part.training for part in model.modules()]
        answer = Predictor(model).predict(pixels())
        assert [part.training for part in model.modules()] == before
        assert answer == Predictor(model).predict(pixels())
    assert not Predictor(model).logits(torch.zeros(1, 3, 32, 32)).requires_grad


def test_any_network_with_its_preprocessing():
    network = nn.Sequential(nn.Flatten(), nn.LazyLinear(3))
    predictor = Predictor(network, preprocess=Preprocess(img_size=(8, 8)), classes=["x", "y", "z"])
    assert predictor.predict(pixels()).label in "xyz"
    predictor.classes = ()
    assert predictor.predict(pixels()).label.startswith("class ")
    with pytest.raises(ValueError, match=r"needs its preprocess; got Sequential alone: add preprocess=Preprocess\("):
        Predictor(network)


@pytest.mark.fault(27, 28)
@pytest.mark.parametrize(("image", "message"), [
    (7, "a path, a Pillow picture, a tensor or an array; got int"),
    (torch.randn(3, 8, 8) * 9, r"a float image must lie in \[0, 1\]; got -.*preprocess\.denormalise"),
    (torch.full((3, 8, 8), 200.0), r"must lie in \[0, 1\]; got 200 … 200: divide by 255"),
    (torch.zeros(3, 8, 8).long(), r"must be uint8 or float; got torch\.int64: scale it"),
    (torch.zeros(2, 3, 8, 8, dtype=torch.uint8), r"is \(C, H, W\); got shape \(2, 3, 8, 8\): give list\(batch\)"),
    (torch.zeros(3, 0, 8, dtype=torch.uint8), r"\(3, 0, 8\)"),
    (torch.zeros(5, 8, 8, dtype=torch.uint8), r"takes 3 channels; got an image of shape \(5, 8, 8\)"),
    (torch.full((3, 8, 8), torch.nan), r"must lie in \[0, 1\]; got nan"),
    (np.full((8, 8, 3), np.inf), r"must lie in \[0, 1\]; got inf"),
    (torch.zeros(1, 8, 8), r"takes 3 channels; got an image of shape \(1, 8, 8\)"),
    (torch.zeros(2, 8, 8), r"takes 3 channels; got an image of shape \(2, 8, 8\)"),
    (torch.zeros(13, 8, 8), r"takes 3 channels; got an image of shape \(13, 8, 8\)"),
    (np.zeros((8, 8, 4), np.uint8), r"takes 3 channels; got an image of shape \(4, 8, 8\)"),
    (np.full((8, 8, 3), 2.0), r"must lie in \[0, 1\]; got 2 … 2"),
    (np.zeros((8, 8, 3), np.int32), "must be uint8 or float; got int32: scale it"),
    (np.zeros((2, 8, 8, 3), np.uint8), r"\(H, W, C\) or \(H, W\); got shape \(2, 8, 8, 3\): give list\(batch\)"),
    (np.zeros((3, 8, 9), np.uint8), r"takes 3 channels; got an image of shape \(9, 3, 8\)"),
])  # fmt: skip
def test_what_is_no_image_is_refused(model: Backbone, image: Any, message: str):
    for given in (image, [image]):
        with pytest.raises(ValueError, match=message):
            Predictor(model).predict(given)


@pytest.mark.fault(19)
def test_an_unreadable_image_is_named(model: Backbone, photo: Path):
    photo.with_name("bad.jpg").write_text("no image")
    for path in (photo.with_name("bad.jpg"), photo.with_name("missing.jpg"), photo.parent):
        with pytest.raises(ImageError, match=rf"^{path}"):
            Predictor(model).predict([photo, path])


@pytest.mark.fault(18, 19)
def test_skipped_images_have_no_answer_and_the_ids_tell(
    model: Backbone, photo: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    cut, text = tmp_path / "cut.png", tmp_path / "text.jpg"
    cut.write_bytes(photo.read_bytes()[:100])
    text.write_text("no image")
    paths = [cut, text, photo, text, photo.parent, photo]
    answers = Predictor(model).predict(paths, batch_size=2, on_bad_image="skip")
    assert [answer.id for answer in answers] == [str(photo)] * 2
    assert answers[0].top == Predictor(model).predict(photo).top
    assert [line.split(": ")[:2] for line in caplog.messages] == [
        ["no answer", str(path)] for path in (cut, text, text, photo.parent)
    ]


def test_what_cannot_be_left_out_unseen_still_raises(model: Backbone, photo: Path):
    photo.write_bytes(photo.read_bytes()[:100])
    for given in (photo, str(photo)):
        with pytest.raises(ImageError, match=f"^{photo}"):
            Predictor(model).predict(given, on_bad_image="skip")
    with Image.open(photo) as picture, pytest.raises(ImageError, match="^the given picture"):
        Predictor(model).predict([pixels(), picture], on_bad_image="skip")
    for given in (pixels(), [pixels()]):
        with pytest.raises(ValueError, match="on_bad_image must be one of raise, skip; got 'leave'"):
            Predictor(model).predict(given, on_bad_image="leave")  # type: ignore[call-overload]


@pytest.mark.fault(26)
@pytest.mark.parametrize("crop_mode", ["center", "squash"])
def test_odd_sizes_have_answers(model: Backbone, tmp_path: Path, crop_mode: str):
    cut = model.preprocess.replace(crop_mode=crop_mode)
    for number, (width, height) in enumerate([(1, 1), (1, 5000), (3000, 1), (33, 31), (2, 3)]):
        Image.fromarray(pixels(height, width)).save(path := tmp_path / f"{number}.png")
        picture, _ = (predictor := Predictor(model, preprocess=cut)).look(path)
        assert picture.shape == (3, 32, 32)
        assert predictor.predict(path).label in model.classes


@pytest.mark.fault(34)
def test_odd_names_are_the_ids_of_answers(model: Backbone, tmp_path: Path):
    paths = [tmp_path / name for name in ("Käse 猫.png", " a  b.png", "two\nlines.png")]
    for path in paths:
        Image.fromarray(pixels()).save(path)
    assert [answer.id for answer in Predictor(model).predict(paths)] == [str(path) for path in paths]


def test_wrong_arguments_are_refused(model: Backbone):
    with pytest.raises(ValueError, match="batch_size must be at least 1; got 0"):
        Predictor(model).predict([pixels()], batch_size=0)
    with pytest.raises(ValueError, match="top must be at least 1; got 0"):
        Predictor(model).predict(pixels(), top=0)
    for wrong in ("5", None, 2.0, True):
        with pytest.raises(TypeError, match=f"top takes a whole number; got {wrong!r}"):
            Predictor(model).predict(pixels(), top=wrong)
        with pytest.raises(TypeError, match=f"batch_size takes a whole number; got {wrong!r}"):
            Predictor(model).predict([pixels()], batch_size=wrong)
    assert len(Predictor(model).predict(pixels(), top=np.int64(2)).top) == 2
    for wrong in (None, 3):
        with pytest.raises(TypeError, match=f"by a name or a folder's path; got {wrong}: give one"):
            Predictor.from_pretrained(wrong)
    with pytest.raises(ValueError, match="device must be auto or one that is here"):
        Predictor(model, device="tpu")


@pytest.mark.fault(22)
@pytest.mark.parametrize("orientation", range(2, 9))
def test_a_turned_photograph_has_one_answer(model: Backbone, tmp_path: Path, orientation: int):
    """Read from its file or opened before; and it is not what was stored, by far more than rounding."""
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.fromarray(pixels()).save(tmp_path / "turned.png", exif=exif)
    seen, _ = Predictor(model).look(tmp_path / "turned.png")
    assert (seen.int() - Predictor(model).look(pixels())[0].int()).abs().max() > 50
    by_path, by_picture = Predictor(model).predict([tmp_path / "turned.png", Image.open(tmp_path / "turned.png")])
    assert by_path.top == by_picture.top
    top, plain = (dict(Predictor(model).predict(image).top) for image in (tmp_path / "turned.png", pixels()))
    assert top != pytest.approx(plain, abs=1e-5)
