"""The network that a run trains: a row of `vitrail models`, or somebody's weights, for the images at hand.

TrainConfig, Splits ── make_model ──> a model of the images' size, channels and classes
                                      its weights drawn from the seed, or, with --from, those that are named
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import asdict, fields
from typing import Any

import torch
from torch import nn

from vitrail.data.datasets import describe
from vitrail.data.imagesets import Splits
from vitrail.layers.embed import pair
from vitrail.models.backbone import Backbone
from vitrail.models.registry import FAMILIES, ROWS, build_from_config, native_size, resolve_name
from vitrail.records import Preprocess
from vitrail.train.config import AUTO, DEFAULT, TrainConfig
from vitrail.train.finetune import PROMPTS, freezing, prompted, rebuilt
from vitrail.weights.load import create_model, open_weights, say_row

NAMED = 3
"""classes that a message names"""
LOG = logging.getLogger("vitrail")


def row_named(config: TrainConfig) -> str:
    """The row, or its short name, of a network whose weights are drawn."""
    return DEFAULT if config.model == AUTO else config.model


def make_model(config: TrainConfig, splits: Splits, former: Mapping[str, Any] | None = None) -> Backbone:
    """A model for these images. Says what a short name became, what became of weights, and the size of images.

    With `--from`, weights keep the way in which their images were prepared, but for the size; a head stays where it has
    the same classes. Without `--img-size` the size is the images' own, or, where they have many, that which the row or
    the weights are made for. A run that is gone on with has the network of its `former` record (`network_record`); no
    weights are read again. Raises `ValueError` for an unknown name, for a dropout that the model does not have, for
    prompts in a family without a place for them, and as `open_weights` does.
    """
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(config.seed)  # the CPU's alone, where weights are drawn
        if former is not None:
            model = _again(config, splits, former)
        elif config.from_weights:
            model = prompted(_begun(config, splits), config.freeze, config.seed)
        else:
            model = prompted(_fresh(config, splits), config.freeze, config.seed)
    model.classes, model.images = splits.classes, describe(splits)
    return model


def network_record(config: TrainConfig, model: Backbone) -> dict[str, Any]:
    """What a run remembers of a network that its settings alone do not make again."""
    if not config.from_weights and freezing(config.freeze).kind not in PROMPTS:
        return {}
    return {"network": {"family": model.family, "name": model.variant, "config": asdict(model.config)}}


def _fresh(config: TrainConfig, splits: Splits) -> Backbone:
    name = row_named(config)
    native = None if splits.train.size else native_size(resolve_name(name))
    preprocess = splits.preprocess(config.img_size or native)
    row = resolve_name(name, min(preprocess.img_size))
    say_row(name, row, min(preprocess.img_size))
    if config.freeze != "none":
        LOG.warning("--freeze %s freezes weights that are drawn at random: --from names trained ones", config.freeze)
    known = {f.name for f in fields(FAMILIES[ROWS[row]].config)}
    model = create_model(
        row, img_size=preprocess.img_size, in_chans=preprocess.in_chans, num_classes=len(splits.classes),
        **_dropouts(known, row, config), **_pooling(known, row, config),
    )  # fmt: skip
    model.preprocess = preprocess
    _say_size(model, "as --img-size says" if config.img_size else "its own size" if native else "the images' own size")
    return model


def _begun(config: TrainConfig, splits: Splits) -> Backbone:
    """The network of somebody's weights, for these images and classes."""
    own, row = config.img_size or splits.train.size, "" if config.model == AUTO else config.model
    given: dict[str, Any] = {"in_chans": splits.preprocess().in_chans} | ({"img_size": pair(own)} if own else {})
    try:
        model = open_weights(config.from_weights, row and resolve_name(row, min(pair(own or 224))), **given).train()
    except ValueError as error:
        error.args = (f"--from {config.from_weights}: {error}",)
        raise
    dropouts = _dropouts({f.name for f in fields(model.config)}, model.variant or model.family, config)
    if any(getattr(model.config, name) != value for name, value in dropouts.items()):
        model = rebuilt(model, **dropouts)
    model = _pooled(model, config)
    fit_head(model, splits.classes, config.from_weights)
    model.preprocess = _prepared(model, splits)
    why = "as --img-size says" if config.img_size else "the images' own size" if own else "the weights' own size"
    _say_size(model, why)
    return model


def _pooled(model: Backbone, config: TrainConfig) -> Backbone:
    """The network with the pooling that the run asks for; its norm stays where it is, for its weights are for there.

    A head that read something else is none for it: `classes` is emptied.
    """
    known = {f.name for f in fields(model.config)}
    asked = _pooling(known, model.variant or model.family, config)
    if not asked or asked["global_pool"] == model.config.global_pool:
        return model
    late = {"fc_norm": not isinstance(model.fc_norm, nn.Identity)} if "fc_norm" in known else {}
    was, made = model.config.global_pool, rebuilt(model, **asked, **late)
    made.classes = ()
    LOG.info("%s: its head read %s; now it reads %s", config.from_weights, was, config.global_pool)
    return made


def fit_head(model: Backbone, classes: tuple[str, ...], source: str) -> None:
    """A head for the classes of the data: the weights' own where it has the very same ones, else a fresh one."""
    if model.classes == classes and model.num_classes == len(classes):
        LOG.info("%s: its head is kept, for the same %d classes", source, model.num_classes)
        return
    former, was, count = model.num_classes, model.classes, len(classes)
    model.reset_classifier(count)
    LOG.info(
        "%s: a fresh head for %d classes, in the place of one for %d%s", source, count, former, _unlike(was, classes)
    )


def _unlike(was: tuple[str, ...], classes: tuple[str, ...]) -> str:
    """How the classes of a head are not those of the data, where both have names."""
    gone, new = ([name for name in one if name not in other] for one, other in ((was, classes), (classes, was)))
    if not was:
        return ""
    said = [f"{word} {', '.join(names[:NAMED])}" for word, names in (("without", gone), ("with", new)) if names]
    return f": {'; '.join(said)}" if said else ": the same in another order"


def _prepared(model: Backbone, splits: Splits) -> Preprocess:
    """As the weights' images were, where that is known, at the model's size; small images are taken whole."""
    size, own = pair(model.config.img_size), splits.preprocess()
    kept = model.preprocess if model.preprocess.known and model.preprocess.in_chans == own.in_chans else own
    whole = {"crop_pct": 1.0} if splits.train.size else {}
    return kept.replace(img_size=size, **whole)


def _again(config: TrainConfig, splits: Splits, former: Mapping[str, Any]) -> Backbone:
    """The network of a run's record; its weights are those of the run's checkpoint, whatever they are here."""
    dropouts = _dropouts(set(former["config"]), former["name"] or former["family"], config)
    model = build_from_config(former["family"], {**former["config"], **dropouts}, former["name"])
    model.preprocess = _prepared(model, splits)
    return model


def _say_size(model: Backbone, why: str) -> None:
    """Tells the logger `vitrail`, in one line, what size the images get and why, and how it is not the row's own."""
    size, odd = model.preprocess.img_size, ""
    native = native_size(model.variant) if model.variant else min(size)
    if size != (native, native):
        cell = f"{model.feature_info[-1].reduction:.3g}"
        odd = (
            f"; it is made for {native} x {native} (--img-size {native}); a cell of its last map is {cell} pixels wide"
        )
    LOG.info("%s is trained on images of %d x %d pixels, %s%s", model.variant or model.family, *size, why, odd)


def _dropouts(known: set[str], name: str, config: TrainConfig) -> dict[str, Any]:
    """The dropouts that the run sets, by the names of the model's fields. Raises `ValueError` for one it has not."""
    wanted = {"drop_rate": ("--drop-rate", config.drop_rate), "drop_path_rate": ("--drop-path", config.drop_path)}
    for field, (flag, value) in wanted.items():
        if value and field not in known:
            raise ValueError(f"{name} takes no {flag}; got {value}: leave it out")
    return {field: value for field, (_, value) in wanted.items() if field in known}


def _pooling(known: set[str], name: str, config: TrainConfig) -> dict[str, Any]:
    """What the head is to read, where the run says it. Raises `ValueError` for a model that has no such choice."""
    if config.global_pool == AUTO:
        return {}
    if "global_pool" not in known:
        raise ValueError(f"{name} takes no --global-pool; got {config.global_pool}: leave it out")
    return {"global_pool": config.global_pool}
