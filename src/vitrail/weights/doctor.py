"""What a checkpoint is: whose names it has, which network it is for, and what stands between it and another one.

vitrail inspect FILE                  layout, network, size, classes
vitrail inspect FILE --model NAME     and what would be renamed, resized, missing or extra
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from vitrail.models.backbone import Backbone
from vitrail.models.config import flat, tuples
from vitrail.models.registry import FAMILIES, ROWS, build_model
from vitrail.records import ModelCard
from vitrail.weights.fit import LEAVE_HEAD, Report, at_grids, at_patches, first, fitted, misfits, not_finite, shape_of
from vitrail.weights.layouts import favoured, left_out, ours
from vitrail.weights.read import Checkpoint, CheckpointError, read_checkpoint
from vitrail.weights.said import said_network
from vitrail.weights.sidecar import Sidecar, read_sidecar

MOST_LINES = 20
ALIKE = 0.5
"""the share of a network's tensors that must be there for a row to be named as the nearest"""
Shapes = Mapping[str, tuple[int, ...]]


class Likeness(NamedTuple):
    """How near a registry row is to somebody's tensors."""

    row: str
    share: float
    """of all names on either side, those with equal shapes; heads, positions and channels of pixels aside"""
    exact: bool
    """positions too"""


def likeness(tensors: Mapping[str, Tensor], favoured: str = "") -> list[Likeness]:
    """Rows of the registry by how near they are to tensors with our names, the nearest first.

    Of equally near ones those count alone that have `favoured` in their names, if any has.
    """
    shapes = {name: shape_of(tensor) for name, tensor in tensors.items()}
    widths = {shape[0] for shape in shapes.values() if len(shape) == 1}
    found = []
    for family in _families(shapes):
        for row, config in FAMILIES[family].variants.items():
            if _width(config) in widths:
                found.append(_like(row, shapes))
    meant = {like.share for like in found if favoured in like.row}
    left = [like for like in found if favoured in like.row or like.share not in meant]
    return sorted(left, key=lambda like: (-like.share, not like.exact))


def _width(config: Any) -> int:
    """The greatest width of a network: its one, or that of its widest stage."""
    given = vars(config)
    return max(flat(given["embed_dims"] if "embed_dims" in given else given["embed_dim"]))


def fitting_rows(tensors: Mapping[str, Tensor], favoured: str = "") -> list[str]:
    """Rows that tensors with our names can be of but for heads, positions and channels, the likeliest first."""
    return [like.row for like in likeness(tensors, favoured) if like.share == 1]


def _like(row: str, shapes: Shapes) -> Likeness:
    body, loose, kernels = _row_shapes(row)
    own = {name: _patch(shape) if name in kernels else shape for name, shape in shapes.items() if name not in loose}
    same = sum(own.get(name) == shape for name, shape in body.items())
    exact = all(shapes.get(name) == shape for name, shape in loose.items() if shape and name in shapes)
    return Likeness(row, same / max(1, len(own.keys() | body.keys())), exact)


@cache
def _row_shapes(row: str) -> tuple[Shapes, Shapes, frozenset[str]]:
    """The shapes of a row's weights: those that every size of it shares, those of heads and positions; pixel kernels.

    The size of its patches is part of what a network is, and the number of its channels is not.
    """
    with torch.device("meta"):
        model = build_model(row)
    heads, tables, kernels = model.head_weights(), model.position_tables(), frozenset(model.pixel_weights())
    loose: dict[str, tuple[int, ...]] = dict.fromkeys(heads, ())
    body = {}
    for name, value in model.state_dict().items():
        if name in tables:
            loose[name] = shape_of(value)
        elif name not in heads:
            body[name] = _patch(shape_of(value)) if name in kernels else shape_of(value)
    return body, loose, kernels


def _patch(kernel: tuple[int, ...]) -> tuple[int, ...]:
    """The shape of a kernel (C, C_in, p, q), its channels left out: (C, p, q)."""
    return kernel[:1] + kernel[2:]


def _families(shapes: Shapes) -> list[str]:
    """Families whose debug row has names like these, blocks and stages not counted; the most alike first."""
    names = {_plain(name) for name in shapes}
    shares = {}
    for family, kind in FAMILIES.items():
        own = {_plain(name) for name in _row_shapes(next(iter(kind.variants)))[0]}
        shares[family] = len(own & names) / min(len(own), len(names))
    return [family for family, share in sorted(shares.items(), key=lambda item: -item[1]) if share >= ALIKE]


def _plain(name: str) -> str:
    return re.sub(r"\d+", "#", name)


# ---- what is told


def inspect(path: str | Path, model: str | Backbone | None = None, part: str | None = None) -> list[str]:
    """What a checkpoint is, and with `model` what would become of it there: at most `MOST_LINES` lines.

    Raises `CheckpointError` where the file cannot be read.
    """
    checkpoint = read_checkpoint(path, part)
    tensors, source = ours(checkpoint.tensors)
    near = likeness(tensors, favoured(checkpoint.tensors))
    names = [f"names: {source}'s", *_about_dropped(checkpoint)]
    told = [
        *_about_file(checkpoint),
        *not_finite(checkpoint.tensors),
        *names,
        *_about_network(tensors, near, read_sidecar(checkpoint.path).card),
        *_about_sidecar(checkpoint, tensors),
    ]
    if model is not None:
        network = build_model(model) if isinstance(model, str) else model
        told += _about_fit(network, checkpoint, tensors, near)
    return told[:MOST_LINES]


def _about_file(checkpoint: Checkpoint) -> list[str]:
    tensors = checkpoint.tensors.values()
    size = sum(t.numel() * t.element_size() for t in tensors)
    kinds = ", ".join(str(kind).removeprefix("torch.") for kind, _ in Counter(t.dtype for t in tensors).most_common(3))
    told = [f"{checkpoint.path}: {checkpoint.kind}, {len(tensors)} tensors, {size / 1e6:,.1f} MB, {kinds}"]
    told += [f"taken out of: {' > '.join(checkpoint.wrappers)}"] if checkpoint.wrappers else []
    told += [f"other networks in it, which --part names: {first(checkpoint.passed)}"] if checkpoint.passed else []
    return told + ([f"beside the weights: {first(list(checkpoint.others), 6)}"] if checkpoint.others else [])


def _about_dropped(checkpoint: Checkpoint) -> list[str]:
    parts = left_out(checkpoint.tensors).items()
    return [f"of no use here: {what} ({len(names)}): {first(names, 4)}" for what, names in parts]


def _about_network(tensors: Mapping[str, Tensor], near: list[Likeness], card: ModelCard | None) -> list[str]:
    if card is not None and not (near and near[0].share == 1):
        return [f"network: {_by_card(card)}", f"classes: {card.config['num_classes'] or 'no head'}"]
    if not near or near[0].share < ALIKE:
        heads = Counter(name.partition(".")[0] for name in tensors)
        return [f"network: none that is known here; names begin with {first([*dict(heads.most_common())], 6)}"]
    best = near[0]
    if best.share < 1:
        return [f"network: not one that is known here; the nearest is {best.row} ({best.share:.0%} of its tensors)"]
    head = _head(best.row, tensors)
    same = [like.row for like in near if like.share == 1]
    others = f"; but for positions also {first(same[1:], 3)}" if len(same) > 1 else ""
    return [f"network: {best.row}, a {ROWS[best.row]}{'' if best.exact else ' of another image size'}{others}", head]


def _by_card(card: ModelCard) -> str:
    """What a card of ours says of a network that is no row, and how it is not the row that it began as."""
    if card.name not in ROWS:
        return f"a {card.family} of its own, as its config.json says"
    row = asdict(FAMILIES[card.family].variants[card.name])
    other = {name: value for name, value in card.config.items() if tuples(value) != row[name]}
    changes = ", ".join(f"{name}={value}" for name, value in other.items() if name != "num_classes")
    return f"{card.name}, a {card.family}, with {changes}"


def _head(row: str, tensors: Mapping[str, Tensor]) -> str:
    with torch.device("meta"):
        heads = build_model(row).head_weights()
    found = [tensors[name].shape[0] for name in heads if name in tensors]
    return f"classes: {found[0]}" if found else "classes: no head"


def _about_sidecar(checkpoint: Checkpoint, tensors: Mapping[str, Tensor]) -> list[str]:
    beside: Sidecar = read_sidecar(checkpoint.path)
    made = _makes(str(checkpoint.path), beside, tensors)
    told = [f"beside it: {beside.architecture}{made}"] if beside.architecture else []
    if beside.preprocess is not None:
        p = beside.preprocess
        told.append(
            f"images: {p.img_size[0]} x {p.img_size[1]}, mean {_short(p.mean)}, std {_short(p.std)}, {p.interpolation}"
        )
    return told


def _makes(path: str, beside: Sidecar, tensors: Mapping[str, Tensor]) -> str:
    """How to have the network that transformers' config says, which need be no row, if these are its weights."""
    try:
        said = said_network(path, beside.transformers, tensors)
    except CheckpointError:  # a network of another package: no word of one here
        return ""
    if said is None:
        return ""
    with torch.device("meta"):
        network = said.built({})
        heads = [tensors[name] for name in network.head_weights() if name in tensors]
        network.reset_classifier(len(heads[0]) if heads else 0)
    if misfits(network.state_dict(), tensors):
        return ""
    classes = f"{network.num_classes} classes" if network.num_classes else "no head"
    height, width = network.preprocess.img_size
    of = f"of {height} x {width} pixels and {classes}"
    return f", {of}, which create_model('local-dir:{path}', pretrained=True) makes"


def _short(values: tuple[float, ...]) -> str:
    return "(" + ", ".join(f"{value:.3g}" for value in values) + ")"


def _about_fit(model: Backbone, checkpoint: Checkpoint, tensors: dict[str, Tensor], near: list[Likeness]) -> list[str]:
    """Against one network: what fits, and what keeps the rest from it."""
    report = Report(renamed=len(tensors.keys() - checkpoint.tensors.keys()))
    name = model.variant or type(model).__name__
    renamed = "names are translated, " if report.renamed else ""
    try:
        made = fitted("", model, tensors, report)
    except CheckpointError:
        found = misfits(model.state_dict(), _resizable(model, tensors))
        told = [f"against {name}: does not fit; {renamed}{_equal(model, tensors)} tensors as they are"]
        told += [f"{kind} ({len(names)}): {first(names, 4)}" for kind, names in found.items()]
        if _fits_but_for_head(model, tensors):
            told.append(f"its head alone does not fit: {LEAVE_HEAD}")
        return told + ([f"it fits {near[0].row}"] if near and near[0].share == 1 and near[0].row != name else [])
    told = [f"against {name}: fits; {renamed}{len(report.resized)} resized, {len(made)} in all"]
    return told + [f"resized: {line}" for line in report.resized[:6]]


def _fits_but_for_head(model: Backbone, tensors: Mapping[str, Tensor]) -> bool:
    try:
        fitted("", model, tensors, Report(), new_head=True)
    except CheckpointError:
        return False
    return True


def _resizable(model: Backbone, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Tensors with all that can be resized to the network resized, so that only the others count as faults."""
    made = at_grids(model, tensors)
    try:
        return at_patches("", model, made)
    except CheckpointError:  # channels that nobody has named
        return made


def _equal(model: Backbone, tensors: Mapping[str, Tensor]) -> int:
    return sum(name in tensors and tensors[name].shape == like.shape for name, like in model.state_dict().items())
