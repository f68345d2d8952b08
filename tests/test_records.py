"""What travels between rooms keeps its promises on the way."""

from __future__ import annotations

import pickle
from dataclasses import asdict
from typing import Any

import pytest
import torch
from PIL import Image

from vitrail.records import (
    IMAGENET_MEAN,
    IMAGENET_STD,
    Batch,
    Classification,
    Explanation,
    History,
    ModelCard,
    Preprocess,
)

# ---- Preprocess


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (dict(img_size=(224,)), r"img_size must be \(height, width\), both at least 1; got \(224,\)"),
        (dict(img_size=(224, 0)), r"img_size must be \(height, width\), both at least 1; got \(224, 0\)"),
        (dict(img_size=224), r"img_size must be \(height, width\), both at least 1; got 224"),
        (dict(mean=(0.5,)), "mean and std need one value a channel each; got 1 and 3 values"),
        (dict(mean=(), std=()), "mean and std need one value a channel each; got 0 and 0 values"),
        (dict(std=(0.2, 0.0, 0.2)), r"std must be positive in every channel; got \(0.2, 0.0, 0.2\)"),
        (dict(crop_pct=0), r"crop_pct must lie in \(0, 1\]; got 0"),
        (dict(crop_pct=1.1), r"crop_pct must lie in \(0, 1\]; got 1.1"),
        (dict(interpolation="nearest"), "interpolation must be one of bilinear, bicubic; got 'nearest'"),
        (dict(crop_mode="border"), "crop_mode must be one of center, squash; got 'border'"),
    ],
)
def test_wrong_preprocessing_says_the_rule(wrong: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Preprocess(**wrong)


@pytest.mark.parametrize("shape", [(3, 4, 5), (2, 3, 4, 5), (2, 6, 3, 4, 5)])
def test_normalising_is_per_channel_and_has_an_inverse(shape: tuple[int, ...]) -> None:
    preprocess = Preprocess()
    raw = torch.randint(0, 256, shape, dtype=torch.uint8)
    ready = preprocess.normalise(raw)
    assert ready.dtype == torch.float32
    for channel, (mean, std) in enumerate(zip(IMAGENET_MEAN, IMAGENET_STD, strict=True)):
        truth = (raw.select(-3, channel).float() / 255 - mean) / std
        assert torch.allclose(ready.select(-3, channel), truth, atol=1e-6)
    assert torch.allclose(preprocess.denormalise(ready), raw / 255, atol=1e-6)
    assert torch.allclose(preprocess.normalise(raw / 255), ready, atol=1e-6)


def test_denormalised_values_stay_in_range() -> None:
    values = Preprocess().denormalise(torch.randn(3, 8, 8) * 10)
    assert values.min() == 0
    assert values.max() == 1


@pytest.mark.parametrize("dtype", [torch.int64, torch.int16, torch.bool])
def test_integers_of_unknown_range_are_not_normalised(dtype: torch.dtype) -> None:
    with pytest.raises(ValueError, match=f"images must be uint8, or floating in .*; got {dtype}"):
        Preprocess().normalise(torch.ones(3, 2, 2, dtype=dtype))


def test_other_channels_are_refused() -> None:
    assert Preprocess(mean=(0.5,), std=(0.5,)).in_chans == 1
    with pytest.raises(ValueError, match="the model takes 3 channels; got images with 1"):
        Preprocess().normalise(torch.zeros(2, 1, 4, 4))


def test_prepare_normalises_raw_batches_and_leaves_the_rest() -> None:
    preprocess = Preprocess()
    raw = Batch(image=torch.randint(0, 256, (2, 3, 4, 4), dtype=torch.uint8), id=["a", "b"])
    ready = preprocess.prepare(raw)
    assert torch.equal(ready["image"], preprocess.normalise(raw["image"]))
    assert ready["id"] == ["a", "b"]
    assert raw["image"].dtype == torch.uint8  # the batch given is not changed
    assert preprocess.prepare(ready) is ready


@pytest.mark.parametrize("dtype", [torch.int64, torch.int8, torch.bool])
def test_prepare_refuses_what_is_neither_raw_nor_ready(dtype: torch.dtype) -> None:
    batch = Batch(image=torch.ones(2, 3, 4, 4, dtype=dtype))
    with pytest.raises(ValueError, match=rf"must be uint8, or floating in \[0, 1\]; got {dtype}: .*images\.to\(torch"):
        Preprocess().prepare(batch)


def test_preprocess_survives_a_dict_json_lists_and_pickle() -> None:
    preprocess = Preprocess(img_size=(32, 48), crop_pct=0.9, crop_mode="squash", interpolation="bilinear")
    values = asdict(preprocess)
    lists = {name: list(v) if isinstance(v, tuple) else v for name, v in values.items()}
    for again in (Preprocess.from_dict(values), Preprocess.from_dict(lists), pickle.loads(pickle.dumps(preprocess))):
        assert again == preprocess
        assert hash(again) == hash(preprocess)
    assert preprocess.replace(crop_pct=1.0) == Preprocess.from_dict({**values, "crop_pct": 1.0})
    assert preprocess.crop_pct == 0.9


def test_an_unknown_key_is_named() -> None:
    with pytest.raises(ValueError, match=r"a preprocess holds crop_mode, crop_pct, .*; got also 'center', 'size'"):
        Preprocess.from_dict(dict(size=3, center=1, crop_pct=1.0))


# ---- ModelCard


def test_a_model_card_survives_a_dict() -> None:
    card = ModelCard(
        family="vit", config=dict(depth=3), name="vit_debug", classes=("a", "b"), preprocess=Preprocess(crop_pct=0.5),
        images="cells", training=dict(epochs=3), version="1",
    )  # fmt: skip
    assert ModelCard.from_dict(card.to_dict()) == card
    assert ModelCard.from_dict({**card.to_dict(), "classes": ["a", "b"]}) == card
    bare = ModelCard.from_dict(dict(family="vit", config={}))
    assert (bare.classes, bare.preprocess) == ((), Preprocess())


def test_a_model_card_with_an_unknown_key_is_refused() -> None:
    with pytest.raises(ValueError, match="a model card holds classes, .*version; got also 'weights'"):
        ModelCard.from_dict(dict(family="vit", config={}, weights="x"))
    with pytest.raises(ValueError, match="a preprocess holds .*; got also 'size'"):
        ModelCard.from_dict(dict(family="vit", config={}, preprocess=dict(size=3)))


# ---- results


def test_a_classification_answers_by_key_and_by_attribute() -> None:
    result = Classification(label="cat", confidence=0.875, top=(("cat", 0.875), ("dog", 0.125)), id="a.jpg")
    assert result["class"] == result["label"] == result.label == "cat"
    assert result["confidence"] == 0.875
    assert result["top"][1] == ("dog", 0.125)
    assert result["id"] == "a.jpg"
    assert str(result) == "cat 87.5%"
    assert result.to_dict() == dict(id="a.jpg", label="cat", confidence=0.875, top=(("cat", 0.875), ("dog", 0.125)))


@pytest.mark.parametrize("key", ["klass", "draw", "to_dict", "__class__"])
def test_a_classification_has_no_other_keys(key: str) -> None:
    with pytest.raises(KeyError, match=f"a Classification has class, confidence, top, id; got '{key}'"):
        Classification(label="cat", confidence=1.0)[key]


def test_drawing_leaves_the_picture_and_writes_below_it() -> None:
    picture = Image.new("L", (60, 20), 128)
    drawn = Classification(label="neutrophil", confidence=0.5).draw(picture)
    assert drawn.mode == "RGB"
    assert drawn.size == (8 * len("neutrophil 50.0%"), 36)
    assert drawn.crop((0, 0, 60, 20)).getcolors() == [(1200, (128, 128, 128))]
    assert drawn.crop((0, 20, *drawn.size)).getextrema()[0][0] < 128  # ink
    assert picture.size == (60, 20)


@pytest.mark.parametrize(("fields", "size", "seen"), [
    (dict(), (224, 224), (224, 224)),
    (dict(), (5, 3000), (5, 5)),
    (dict(), (3000, 5), (5, 5)),
    (dict(), (480, 640), (480, 480)),
    (dict(img_size=(32, 64)), (480, 640), (320, 640)),
    (dict(crop_pct=0.875), (256, 512), (224, 224)),
    (dict(crop_mode="squash"), (5, 3000), (5, 3000)),
    (dict(crop_mode="squash", crop_pct=0.875), (512, 64), (448, 56)),
])  # fmt: skip
def test_what_the_cut_leaves_of_a_picture(fields: dict[str, Any], size: tuple[int, int], seen: tuple[int, int]) -> None:
    assert Preprocess(**fields).seen(size) == seen


# ---- explanations


def test_a_map_is_stretched_to_the_picture_and_to_zero_and_one() -> None:
    heat = torch.tensor([[1.0, 2.0], [3.0, 5.0]])
    big = Explanation(method="rollout", heat=heat).resized((8, 12))
    assert big.shape == (8, 12)
    assert (big.min(), big.max()) == (0, 1)
    assert big[0, 0] == 0
    assert big[-1, -1] == 1
    assert (big.diff(dim=0) >= 0).all()
    assert (big.diff(dim=1) >= 0).all()


def test_a_peak_is_round_and_without_a_ring() -> None:
    """Bilinear weights draw a cross, bicubic ones a dark ring."""
    heat = torch.zeros(5, 5)
    heat[2, 2] = 1
    big = Explanation(method="rollout", heat=heat).resized((505, 505))
    assert big[252, 252] == 1
    straight, diagonal = big[252, 252 + 28], big[252 + 20, 252 + 20]  # at the same distance of the middle
    assert abs(straight - diagonal) < 0.01
    assert (big[:, :152] == 0).all()  # beyond the cells beside it
    assert (big[252, 252:].diff() <= 0).all()


def test_between_cells_lies_no_value_beyond_theirs() -> None:
    torch.manual_seed(0)
    heat = torch.rand(4, 6)
    big = Explanation(method="rollout", heat=heat).resized((84, 126))  # 21 pixels a cell
    torch.testing.assert_close(big[10::21, 10::21], (heat - heat.min()) / (heat.max() - heat.min()))
    for row, column in ((0, 0), (1, 3), (2, 4)):
        cells = big[10::21, 10::21][row : row + 2, column : column + 2]
        between = big[10 + 21 * row : 32 + 21 * row, 10 + 21 * column : 32 + 21 * column]
        assert cells.min() - 1e-6 <= between.min() <= between.max() <= cells.max() + 1e-6


@pytest.mark.parametrize("value", [0.0, 0.3, -4.0])
def test_a_constant_map_is_all_zero(value: float) -> None:
    big = Explanation(method="rollout", heat=torch.full((3, 4), value)).resized((6, 8))
    assert torch.equal(big, torch.zeros(6, 8))


# ---- history


def history() -> History:
    rows = [dict(epoch=1, loss=3.0), dict(epoch=2, loss=1.0, acc=0.5), dict(epoch=3, loss=2.0, acc=0.7)]
    return History([*rows, dict(epoch=4, loss=1.0, acc=0.7)])


def test_history_gives_one_figure_over_the_epochs_that_have_it() -> None:
    assert len(history()) == 4
    assert history()["loss"] == [3, 1, 2, 1]
    assert history()["acc"] == [0.5, 0.7, 0.7]


def test_the_best_row_is_the_last_of_equals() -> None:
    assert history().best("acc")["epoch"] == 4
    assert history().best("loss", "min")["epoch"] == 4
    assert history().best("loss")["epoch"] == 1


def test_an_epoch_without_a_figure_that_is_a_number_is_never_the_best() -> None:
    nan = float("nan")
    spoilt = History([dict(epoch=1, acc=nan), dict(epoch=2, acc=0.2), dict(epoch=3, acc=nan), dict(epoch=4, acc=0.1)])
    assert spoilt.best("acc")["epoch"] == 2
    assert spoilt.best("acc", "min")["epoch"] == 4


def test_an_unknown_figure_names_the_known() -> None:
    for ask in (history().__getitem__, history().best):
        with pytest.raises(KeyError, match=r"the history holds \['acc', 'epoch', 'loss'\]; got 'accuracy'"):
            ask("accuracy")
    with pytest.raises(KeyError, match=r"the history holds \[\]; got 'loss'"):
        History().best("loss")
