"""The network that a run trains: a row of `vitrail models` for the images at hand.

TrainConfig, Splits ── make_model ──> a model of the images' size, channels and classes, its weights drawn from the seed
"""

from __future__ import annotations

import logging
from dataclasses import fields
from typing import Any

import torch

from vitrail.data.datasets import describe
from vitrail.data.imagesets import Splits
from vitrail.models.backbone import Backbone
from vitrail.models.registry import FAMILIES, ROWS, native_size, resolve_name
from vitrail.train.config import TrainConfig
from vitrail.weights.load import create_model, say_row

LOG = logging.getLogger("vitrail")


def make_model(config: TrainConfig, splits: Splits) -> Backbone:
    """A model for these images, its weights drawn from the seed. Says what a short name became, and the size of images.

    Without `--img-size` it is the images' own, or, where they have many, that which the row is made for. Raises
    `ValueError` for an unknown name, and for a dropout that the model does not have.
    """
    native = None if splits.train.size else native_size(resolve_name(config.model))
    preprocess = splits.preprocess(config.img_size or native)
    row = resolve_name(config.model, min(preprocess.img_size))
    say_row(config.model, row, min(preprocess.img_size))
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(config.seed)  # the CPU's alone, where weights are drawn
        model = create_model(
            row, img_size=preprocess.img_size, in_chans=preprocess.in_chans, num_classes=len(splits.classes),
            **_dropouts(row, config),
        )  # fmt: skip
    model.preprocess, model.classes, model.images = preprocess, splits.classes, describe(splits)
    _say_size(model, "as --img-size says" if config.img_size else "its own size" if native else "the images' own size")
    return model


def _say_size(model: Backbone, why: str) -> None:
    """Tells the logger `vitrail`, in one line, what size the images get and why, and how it is not the row's own."""
    size, native = model.preprocess.img_size, native_size(model.variant)
    odd = ""
    if size != (native, native):
        cell = f"{model.feature_info[-1].reduction:.3g}"
        odd = (
            f"; it is made for {native} x {native} (--img-size {native}); a cell of its last map is {cell} pixels wide"
        )
    LOG.info("%s is trained on images of %d x %d pixels, %s%s", model.variant, *size, why, odd)


def _dropouts(row: str, config: TrainConfig) -> dict[str, Any]:
    """The dropouts that are on, by the names of the model's fields."""
    known = {f.name for f in fields(FAMILIES[ROWS[row]].config)}
    wanted = {"drop_rate": ("--drop-rate", config.drop_rate), "drop_path_rate": ("--drop-path", config.drop_path)}
    for name, (flag, value) in wanted.items():
        if value and name not in known:
            raise ValueError(f"{row} takes no {flag}; got {value}: leave it out")
    return {name: value for name, (_, value) in wanted.items() if value}
