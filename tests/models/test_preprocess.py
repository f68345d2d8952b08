"""How images are prepared goes with the weights; who says otherwise is told, naming both."""

from __future__ import annotations

import logging

import pytest

from vitrail.models.backbone import Backbone
from vitrail.models.registry import build_model
from vitrail.predict import Predictor
from vitrail.records import Preprocess
from vitrail.trainer import ViTTrainer

OTHER = Preprocess(img_size=(32, 32), mean=(0.1, 0.2, 0.3), std=(0.5, 0.5, 0.5))


@pytest.fixture
def model() -> Backbone:
    model = build_model("vit_debug")
    model.weights = "somebody's.pth"
    return model


@pytest.mark.parametrize("use", [Predictor, ViTTrainer])
def test_another_mean_than_that_of_the_weights_is_told_once_with_both(use: type, model, caplog):
    with caplog.at_level(logging.WARNING, "vitrail"):
        use(model, preprocess=OTHER)
    assert [record.getMessage() for record in caplog.records] == [
        "images are prepared otherwise than for the weights of somebody's.pth: "
        "mean (0.1, 0.2, 0.3), not (0.5, 0.5, 0.5)"
    ]


@pytest.mark.parametrize("use", [Predictor, ViTTrainer])
def test_the_same_and_nothing_are_not_told(use: type, model, caplog):
    for given in (None, model.preprocess):
        use(model, preprocess=given)
    model.weights = ""  # fresh weights want nothing
    use(model, preprocess=OTHER)
    assert not caplog.records
