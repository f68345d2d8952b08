"""A network by its name, with or without weights, and any model folder.

create_model("vit_tiny", img_size=32)           fresh weights
create_model("bloodcells", pretrained=True)     a model that ships with the package
load_model("runs/demo")                         a folder, ready to answer
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor

from vitrail.folder import FolderError, find_folder, read_card, read_weights
from vitrail.layers.embed import PatchEmbed, pair, resize_positions
from vitrail.models.backbone import Backbone
from vitrail.models.config import spelled
from vitrail.models.registry import FAMILIES, ROWS, build_from_config, build_model, resolve_name
from vitrail.names import nearest, shortened, unpacked
from vitrail.records import ModelCard

ASSETS = Path(__file__).parents[1] / "assets" / "models"
FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
"""types that weights may be stored in; all are loaded as fp32"""
SPARE_BYTES = 64_000_000
"""what derived buffers may take beside four times the bytes of the weights"""
STRETCH = 4
"""how many times larger or smaller than the network's own size images may be prepared"""
LOG = logging.getLogger("vitrail")


class Shipped(NamedTuple):
    """A trained model inside the package."""

    folder: Path
    description: str


SHIPPED: dict[str, Shipped] = {
    "bloodcells": Shipped(ASSETS / "bloodcells", "red cells, white cells and platelets, cropped from blood smears"),
}


def create_model(name: str, pretrained: bool = False, **overrides: Any) -> Backbone:
    """A network in training mode: a registry row or its short name; with `pretrained`, a model that ships with weights.

    `overrides` are fields of the family's config, in other libraries' spellings too. With `pretrained`, a changed
    `num_classes` makes a new head, and with another `img_size` learned positions are interpolated, as timm does; what
    would change the shape of other weights is an error. Raises `ValueError` for
    an unknown name, `TypeError` for an unknown field, each naming the nearest, and for a name that is no text;
    `ValueError` where no weights are known.
    The logger `vitrail` is told, as information, which row a short name became.
    """
    if not isinstance(name, str):
        raise TypeError(f"create_model takes the name of a model, such as 'vit_tiny'; got {shortened(name)}")
    if pretrained:
        if name not in SHIPPED:
            raise ValueError(_no_weights(name))
        return _load(SHIPPED[name].folder, overrides)
    if name in SHIPPED:
        raise ValueError(f"{name} ships with its weights: use create_model({name!r}, pretrained=True)")
    model = build_model(name, **unpacked(overrides))
    say_row(name, model.variant, min(model.preprocess.img_size))
    return model


def say_row(name: str, row: str, img_size: int) -> None:
    """Tells the logger `vitrail` which row a short name became, for images of so many pixels."""
    if row != name:
        LOG.info("%s is %s, for images of %d pixels", name, row, img_size)


def load_model(name_or_path: str | Path) -> Backbone:
    """The network of a model folder, of a run folder, or a shipped one by its name: in evaluation mode, fp32, CPU.

    Its `preprocess`, `classes`, `images` and `variant` are those of the folder's card. A name wins over a folder of
    that name; `./name` is the folder. Raises `FolderError` (a `ValueError`) where there is no such model, where files
    are damaged, and where card and weights do not fit each other; `TypeError` for what is neither name nor path.
    """
    if not isinstance(name_or_path, str | Path):
        raise TypeError(f"a model is found by a name or a folder's path; got {shortened(name_or_path)}: give one")
    if name_or_path in SHIPPED:
        return _load(SHIPPED[str(name_or_path)].folder).eval()
    if _is_architecture(str(name_or_path)) and not Path(name_or_path).exists():
        raise FolderError(
            f"{name_or_path} is an architecture without weights: train it, or use create_model({str(name_or_path)!r}); "
            f"with weights there is {', '.join(SHIPPED)}"
        )
    if (path := Path(name_or_path)).is_file():
        home = path.parent.parent if path.parent.name == "checkpoints" else path.parent
        raise FolderError(f"a model is named by the folder of its run or its own; got the file {path}: name {home}")
    try:
        folder = find_folder(name_or_path)
    except FolderError as error:
        raise FolderError(f"{error}; by name there is {', '.join(SHIPPED)}") from None
    return _load(folder).eval()


def _is_architecture(name: str) -> bool:
    try:
        return bool(resolve_name(name))
    except ValueError:
        return False


def _no_weights(name: str) -> str:
    known = "; ".join(f"{row} ({shipped.description})" for row, shipped in SHIPPED.items())
    near = (
        ""
        if _is_architecture(name)
        else f", and no such model: the nearest are {', '.join(nearest(name, [*SHIPPED, *ROWS]))}"
    )
    return f"no weights are known for {name!r}{near}; known are {known}; load_model(path) takes any model folder"


def _load(folder: Path, overrides: Mapping[str, Any] | None = None) -> Backbone:
    """The card's network with `overrides` of its config; its weights are put in once all are known to fit."""
    card, weights = read_card(folder), read_weights(folder)
    if card.family not in FAMILIES:
        raise FolderError(f"{folder}: family must be one of {', '.join(FAMILIES)}; got {card.family!r}")
    _check_depth(folder, card, weights)
    model = _empty(folder, card, {})
    _check_fit(folder, model.state_dict(), weights)
    _check_card(folder, model, card)
    changes = spelled(type(model.config), overrides or {}, model.config)
    classes = changes.pop("num_classes", model.config.num_classes)
    if changes:
        saved, model = model, _empty(folder, card, changes)
        weights = _resized(weights, saved, model)
        _check_fit(folder, model.state_dict(), weights)
    _fill(folder, model, weights)
    model.preprocess, model.classes, model.images = card.preprocess, card.classes, card.images
    if "img_size" in changes:
        model.preprocess = card.preprocess.replace(img_size=pair(model.config.img_size))
    if classes != model.config.num_classes:
        model.reset_classifier(classes)
    return model


def _resized(weights: dict[str, Tensor], saved: Backbone, model: Backbone) -> dict[str, Tensor]:
    """`weights` with learned positions, where there are any, from the grid they were saved with at that of `model`."""
    pos = weights.get("pos_embed")
    if pos is None:
        return weights
    old, new = (cast(PatchEmbed, network.get_submodule("patch_embed")).grid_size for network in (saved, model))
    if old != new:
        LOG.info("positions of a grid of %d x %d cells are interpolated to %d x %d", *old, *new)
    return {**weights, "pos_embed": resize_positions(pos, old, new, prefix=pos.shape[1] - old[0] * old[1])}


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
    numbers = [n for value in said for n in (value if isinstance(value, list) else [value]) if isinstance(n, int)]
    if (layers := sum(max(n, 1) for n in numbers)) > len(weights):
        raise FolderError(
            f"{folder}: a config of {layers:,} layers needs a tensor for each; the weights hold {len(weights)}: "
            "load them with the config they had"
        )


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


def _check_fit(folder: Path, wanted: Mapping[str, Tensor], weights: Mapping[str, Tensor]) -> None:
    """Every name on both sides, every shape equal, every float a float."""
    shapes = [
        f"{name} {tuple(weights[name].shape)} for {tuple(tensor.shape)}"
        for name, tensor in wanted.items()
        if name in weights and weights[name].shape != tensor.shape
    ]
    types = [
        f"{name} {weights[name].dtype}"
        for name, tensor in wanted.items()
        if name in weights and tensor.is_floating_point() and weights[name].dtype not in FLOATS
    ]
    faults = {
        "missing": [name for name in wanted if name not in weights],
        "extra": [name for name in weights if name not in wanted],
        "wrong shape": shapes,
        "wrong type": types,
    }
    found = "; ".join(f"{kind}: {_first(names)}" for kind, names in faults.items() if names)
    if found:
        raise FolderError(f"{folder}: weights must fit the config exactly; {found}: load them with the config they had")


def _first(names: list[str], most: int = 10) -> str:
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


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
