"""Our own model folders -> networks: the card says which, the weights are put in once all are known to fit."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vitrail.folder import FolderError, read_card, read_weights
from vitrail.layers.embed import pair
from vitrail.models.backbone import Backbone, PositionTable
from vitrail.models.config import flat, spelled
from vitrail.models.registry import FAMILIES, build_from_config
from vitrail.records import ModelCard, Preprocess
from vitrail.weights.fit import RGB, Report, Rest, check_fit, fitted, tell
from vitrail.weights.read import CheckpointError

SPARE_BYTES = 64_000_000
"""what derived buffers may take beside four times the bytes of the weights"""
STRETCH = 4
"""how many times larger or smaller than the network's own size images may be prepared"""


def load_folder(
    folder: Path,
    overrides: Mapping[str, Any] | None = None,
    bands: Sequence[str] | None = None,
    rest: Rest = "mean",
) -> Backbone:
    """The card's network with `overrides` of its config, its weights resized where that asks for it.

    `bands` and `rest` are those of `create_model`.

    Raises `FolderError` where files are damaged and where card and weights do not fit each other.
    """
    card, weights = read_card(folder), read_weights(folder)
    if card.family not in FAMILIES:
        raise FolderError(f"{folder}: family must be one of {', '.join(FAMILIES)}; got {card.family!r}")
    _check_depth(folder, card, weights)
    model = _empty(folder, card, {})
    _check_fit(folder, model, weights)
    _check_card(folder, model, card)
    changes = spelled(type(model.config), overrides or {}, model.config)
    classes = changes.pop("num_classes", model.config.num_classes)
    if changes or bands is not None:
        saved, model = model, _empty(folder, card, changes)
        weights = _resized(folder, weights, saved, model, bands, rest)
    _fill(folder, model, weights)
    model.preprocess, model.classes, model.images = card.preprocess, card.classes, card.images
    if bands is not None:
        model.preprocess = banded_preprocess(card.preprocess, bands)
    model.weights = str(folder)
    if "img_size" in changes:
        model.preprocess = model.preprocess.replace(img_size=pair(model.config.img_size))
    if classes != model.config.num_classes:
        model.reset_classifier(classes)
        fresh = sorted(model.head_weights()) if classes else []
        tell(str(folder), Report(taken=len(model.state_dict()) - len(fresh), left=fresh), loud=bool(fresh))
    return model


def banded_preprocess(preprocess: Preprocess, bands: Sequence[str]) -> Preprocess:
    """How images of these bands are prepared: red, green and blue as before, the others by the mean of the three."""
    names = [band.strip().lower() for band in bands]

    def spread(values: tuple[float, ...]) -> tuple[float, ...]:
        return tuple(values[RGB.index(name)] if name in RGB else sum(values) / len(values) for name in names)

    return preprocess.replace(mean=spread(preprocess.mean), std=spread(preprocess.std))


def saved_tables(folder: Path, card: ModelCard, weights: Mapping[str, Tensor]) -> dict[str, PositionTable]:
    """What the tables of positions in a folder's weights were made for. Raises `FolderError` as `load_folder` does."""
    _check_depth(folder, card, weights)
    return _empty(folder, card, {}).position_tables()


def _resized(
    folder: Path,
    weights: dict[str, Tensor],
    saved: Backbone,
    model: Backbone,
    bands: Sequence[str] | None,
    rest: Rest,
) -> dict[str, Tensor]:
    """`weights` of the network `saved`, as `model` of another size or other channels needs them."""
    report = Report()
    try:
        made = fitted(str(folder), model, weights, report, tables=saved.position_tables(), bands=bands, rest=rest)
    except CheckpointError as error:
        raise FolderError(str(error)) from None
    tell(str(folder), report)
    return made


def _check_fit(folder: Path, model: Backbone, weights: Mapping[str, Tensor]) -> None:
    try:
        check_fit(str(folder), model.state_dict(), weights)
    except CheckpointError as error:
        raise FolderError(f"{error}: load them with the config they had") from None


def _fill(folder: Path, model: Backbone, weights: Mapping[str, Tensor]) -> None:
    """Puts `weights` into a network without memory, and what no file holds into its derived buffers."""
    wanted = model.state_dict()
    derived = [buffer for name, buffer in model.named_buffers() if name not in wanted]
    if derived:
        _check_memory(folder, derived, weights)
        _derive(folder, model)
    model.load_state_dict({name: weights[name].to(like.dtype) for name, like in wanted.items()}, assign=True)


def _check_depth(folder: Path, card: ModelCard, weights: Mapping[str, Tensor]) -> None:
    """Every layer has a tensor at least: a config of many more would build modules until the memory is full."""
    said = [card.config[key] for key in ("depth", "depths") if key in card.config]
    if (layers := sum(max(n, 1) for n in whole_numbers(said))) > len(weights):
        raise FolderError(
            f"{folder}: a config of {layers:,} layers needs a tensor for each; the weights hold {len(weights)}: "
            "load them with the config they had"
        )


def whole_numbers(value: Any) -> list[int]:
    """Those in a list, and in lists within it: blocks, blocks of each stage, of each branch of each stage."""
    return [number for number in flat(value) if isinstance(number, int)]


def _check_memory(folder: Path, derived: Sequence[Tensor], weights: Mapping[str, Tensor]) -> None:
    needed = sum(buffer.numel() * buffer.element_size() for buffer in derived)
    most = 4 * sum(weight.numel() * weight.element_size() for weight in weights.values()) + SPARE_BYTES
    if needed > most:
        raise FolderError(
            f"{folder}: its config asks for {needed:,} bytes beside the weights; at most {most:,} are given: "
            "a smaller img_size or a larger patch_size asks for less"
        )


def _derive(folder: Path, model: Backbone) -> None:
    try:
        model.to_empty(device="cpu")
        with torch.random.fork_rng(devices=[]):
            model.init_weights()
    except (RuntimeError, MemoryError) as error:
        raise FolderError(f"{folder}: no memory could be had for its network: {error}") from error


def _empty(folder: Path, card: ModelCard, changes: Mapping[str, Any]) -> Backbone:
    try:
        with torch.device("meta"):
            return build_from_config(card.family, {**card.config, **changes}, card.name)
    except (TypeError, ValueError, ArithmeticError, RuntimeError, MemoryError) as error:
        raise FolderError(f"{folder}: its config makes no {card.family}: {error}") from error


def _check_card(folder: Path, model: Backbone, card: ModelCard) -> None:
    """What the card says beside its config must agree with the network."""
    logits = model.config.num_classes
    if card.classes and len(card.classes) != logits:
        raise FolderError(f"{folder}: classes must name all {logits} logits; config.json has {len(card.classes)} names")
    if card.preprocess.in_chans != model.preprocess.in_chans:
        raise FolderError(
            f"{folder}: preprocess must describe {model.preprocess.in_chans} channels, as the network takes; "
            f"config.json has {card.preprocess.in_chans}"
        )
    own, prepared = pair(card.config.get("img_size", model.config.img_size)), card.preprocess.img_size
    if any(not 1 / STRETCH <= new / old <= STRETCH for new, old in zip(prepared, own, strict=True)):
        raise FolderError(
            f"{folder}: preprocess.img_size must be within {STRETCH} times the network's img_size {own}, larger or "
            f"smaller; config.json has {prepared}"
        )
