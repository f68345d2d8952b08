"""Somebody else's weights -> a network: read, renamed, resized, put in, with what is known of their images.

local-dir:path, hf-hub:org/name ── fetched ──> a file ── read_file ──> File ── put_in ──> the network that is there
                                                                         └─ model_of_file ──> one made for it
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from vitrail.folder import CONFIG, WEIGHTS, find_folder, read_weights
from vitrail.layers.embed import pair
from vitrail.models.backbone import Backbone, PositionTable
from vitrail.models.config import spelled
from vitrail.models.registry import FAMILIES, ROWS
from vitrail.names import shortened
from vitrail.records import Preprocess
from vitrail.weights.doctor import fitting_rows
from vitrail.weights.fetch import FetchError, Unreachable, fetch_from_hub, fetch_parts
from vitrail.weights.fit import RGB, Report, Rest, can_be_resized, fitted, guessed_table, put, tell
from vitrail.weights.layouts import favoured, left_out, ours
from vitrail.weights.own import banded_preprocess, load_folder, saved_tables, whole_numbers
from vitrail.weights.read import FOLDER_FILES, CheckpointError, read_checkpoint
from vitrail.weights.shards import INDICES
from vitrail.weights.sidecar import Sidecar, read_sidecar
from vitrail.weights.sources import HUB, Source
from vitrail.weights.transformers_networks import network_of

LOCAL = "local-dir:"
FREE = {
    "img_size", "patch_size", "in_chans", "num_classes", "window_size", "ref_feat_shape", "attn", "dynamic_pad",
    "drop_rate", "pos_drop_rate", "proj_drop_rate", "attn_drop_rate", "drop_path_rate", "init_values",
}  # fmt: skip
"""fields in which a network may differ from the one that its weights were of: sizes, or what trained nets do not use"""
LAYERS = ("_layer", "block_fn")
"""how the names of timm's arguments end that say which layers a network has: what no shape shows"""
EPSILONS = {"norm_eps", "conv_norm_eps"}
NEAR_EPSILON = 1e-5


class Place(NamedTuple):
    """Where a name says that weights lie."""

    repo: str
    """of the hub; empty for a folder or file on this disk"""
    path: Path


class Base(NamedTuple):
    """What a network is made of: a row of the registry, or what stands beside its weights."""

    family: str
    config: Any
    row: str = ""

    def built(self, fields: Mapping[str, Any]) -> Backbone:
        """The network with these fields of its config."""
        model = FAMILIES[self.family].model(replace(self.config, **fields))
        model.variant = self.row
        return model


class File(NamedTuple):
    """A file of weights, read."""

    where: str
    tensors: dict[str, Tensor]
    """by our names"""
    source: str
    """whose names they had"""
    renamed: int
    beside: Sidecar
    tables: Mapping[str, PositionTable]
    """what tables of positions were made for, where that is known"""
    left_out: Mapping[str, Sequence[str]] = {}
    """its names for which this package has no use, by what they are, in words"""
    favoured: str = ""
    """part of the name of the row that is meant where several have its shapes"""
    wrappers: tuple[str, ...] = ()
    """what was around the weights, outermost first"""
    passed: tuple[str, ...] = ()
    """other networks in the file, as `part` names them"""
    untaken: tuple[str, ...] = ()
    """tensors beside the weights, under names of their own"""


def place_of(name: str) -> Place | None:
    """What `hf-hub:org/name` and `local-dir:path` mean; None for other names."""
    hub = next((prefix for prefix in HUB if name.startswith(prefix)), None)
    if name in (*HUB, LOCAL):
        raise CheckpointError(f"{name} must be followed by what it names: hf-hub:org/name, local-dir:path")
    if hub is not None:
        return Place(name.removeprefix(hub), Path())
    return Place("", Path(name.removeprefix(LOCAL))) if name.startswith(LOCAL) else None


def fetched(place: Place) -> Path:
    """The file on this disk, or the index of several. Raises `FetchError` where the hub has none of the usual names."""
    if not place.repo:
        return place.path
    path = _first_of_hub(place.repo)
    if path.name in INDICES:
        fetch_parts(place.repo, path)
    return path


def _first_of_hub(repo: str) -> Path:
    """The first of the usual files that the hub has; once it could not be reached, that its cache has."""
    failed: list[FetchError] = []
    for name in (*FOLDER_FILES[:-1], *INDICES):
        try:
            return fetch_from_hub(repo, name, cached=any(isinstance(error, Unreachable) for error in failed))
        except FetchError as error:
            failed.append(error)
    raise failed[0]


def is_own(path: Path) -> bool:
    """Whether a folder is a model folder of ours, or a run folder that holds one."""
    if not path.is_dir():
        return False
    home = path / "model" if not (path / CONFIG).exists() and (path / "model" / CONFIG).is_file() else path
    return read_sidecar(home).card is not None


def read_file(path: Path, part: str | None = None) -> File:
    """A file, or a folder that holds one, with its names turned into ours. Model folders of ours are checked."""
    path = find_folder(path) if is_own(path) else path
    beside = read_sidecar(path)
    if beside.card is not None and path.is_dir():
        weights = read_weights(find_folder(path))
        return File(str(path), weights, "vitrail", 0, beside, saved_tables(path, beside.card, weights))
    checkpoint = read_checkpoint(path, part)
    tensors, source = ours(checkpoint.tensors)
    renamed = len(tensors.keys() - checkpoint.tensors.keys())
    tables = saved_tables(path.parent, beside.card, tensors) if beside.card and path.name == WEIGHTS else {}
    spare, row = left_out(checkpoint.tensors), favoured(checkpoint.tensors)
    around = (checkpoint.wrappers, checkpoint.passed, checkpoint.untaken)
    return File(str(checkpoint.path), tensors, source, renamed, beside, tables, spare, row, *around)


def put_in(
    model: Backbone,
    file: File,
    preprocess: Preprocess | None = None,
    *,
    new_head: bool = False,
    bands: Sequence[str] | None = None,
    rest: Rest = "mean",
) -> Report:
    """Writes a file's weights into a network, once all of them fit; it takes over what is known of their images."""
    report = Report(source=file.source, renamed=file.renamed, left_out=file.left_out)
    report.wrappers, report.passed, report.untaken = file.wrappers, file.passed, file.untaken
    check_said(model, file, report)
    made = fitted(
        file.where, model, file.tensors, report, new_head=new_head, tables=file.tables, bands=bands, rest=rest
    )
    known = preprocess or file.beside.preprocess
    if known is not None and known.in_chans == len(RGB) and bands is not None:
        known = banded_preprocess(known, bands)
    put(model, made)
    model.weights = file.where
    if known is not None and known.in_chans == model.preprocess.in_chans:
        model.preprocess = known.replace(img_size=pair(model.config.img_size))
    if not new_head:
        fitting = len(file.beside.classes) == model.num_classes
        model.classes = file.beside.classes if fitting else ()
    model.images = file.beside.card.images if file.beside.card is not None else ""
    return report


def check_said(model: Backbone, file: File, report: Report) -> None:
    """What no shape shows, such as heads and activations, must be as the file's own config says where there is one.

    Raises `CheckpointError`. Epsilons that differ by little are a remark, for they change answers by little.
    """
    card = file.beside.card
    _said(file)
    saved = dict(file.beside.fields) if card is None else dict(card.config)
    own = asdict(model.config)
    if card is not None and card.family != model.family:
        return  # their shapes will tell
    other = {
        name: (own[name], like(saved[name]))
        for name in saved
        if name in own and name not in FREE and like(saved[name]) != own[name]
    }
    near = {name for name, (a, b) in other.items() if name in EPSILONS and max(a, b) <= NEAR_EPSILON}
    for name in sorted(near):
        made, own_eps = other[name][1], other[name][0]
        report.remarks.append(f"made with {name}={made:g}, the network has {own_eps:g}: answers differ by little")
    if wrong := sorted(other.keys() - near):
        pairs = ", ".join(f"{name}={other[name][0]!r}, not {other[name][1]!r}" for name in wrong)
        raise CheckpointError(
            f"{file.where}: weights must be of a network of the same config; this one has {pairs}: build it so, or use "
            f"create_model('local-dir:{file.where}', pretrained=True)"
        )


def like(value: Any) -> Any:
    """As a config holds it: JSON has lists for tuples."""
    return tuple(like(part) for part in value) if isinstance(value, list) else value


def model_of_source(
    source: Source, overrides: Mapping[str, Any], bands: Sequence[str] | None = None, rest: Rest = "mean"
) -> Backbone:
    """The row that published weights are for, holding them."""
    return filled(base_of(source.row), read_file(source.fetch()), overrides, source.preprocess, bands, rest)


def model_of_file(
    path: Path, overrides: Mapping[str, Any], bands: Sequence[str] | None = None, rest: Rest = "mean"
) -> Backbone:
    """The network that a file of weights is for, holding them.

    A model folder of ours says which; of other files the shapes do, and what stands beside them.
    """
    own = path.parent if path.name == WEIGHTS else path
    if is_own(own):
        return load_folder(find_folder(own), overrides, bands, rest)
    file = read_file(path)
    base = _said(file)
    if row := row_of(file):
        base = base_of(row)
    if base is None:
        raise CheckpointError(
            f"{file.where}: no network here has these shapes; `vitrail inspect` shows the nearest: build it yourself "
            "and use load_weights(model, path)"
        )
    return filled(base, file, overrides, file.beside.preprocess, bands, rest)


def base_of(row: str) -> Base:
    """A row of the registry."""
    return Base(ROWS[row], FAMILIES[ROWS[row]].variants[row], row)


def _said(file: File) -> Base | None:
    """The network that transformers' config says of its file; None where it says none, or the file is another's."""
    if not file.source.startswith("transformers"):
        return None
    try:
        found = network_of(file.beside.transformers)
        if found is None:
            return None
        family, said = found
        _check_plausible(file, said)
        base = Base(family, FAMILIES[family].config(**said))
        with torch.device("meta"):
            base.built({})  # what no config refuses, such as heads that do not divide a width, a network does
        return base
    except CheckpointError:
        raise
    except (TypeError, ValueError, ArithmeticError, LookupError) as error:
        raise CheckpointError(f"{file.where}: {CONFIG} beside it says no network of this package: {error}") from None


def row_of(file: File) -> str:
    """The row that a file is for: the one that is named beside it, if it can be, else the nearest; or empty."""
    said, fitting = file.beside.architecture, fitting_rows(file.tensors, file.favoured)
    if said in ROWS and (said in fitting or file.beside.fields):
        return said
    return fitting[0] if fitting else ""


def filled(
    base: Base,
    file: File,
    overrides: Mapping[str, Any],
    preprocess: Preprocess | None = None,
    bands: Sequence[str] | None = None,
    rest: Rest = "mean",
) -> Backbone:
    """A network with `overrides`, holding a file's weights: with its head, channels and size where none is asked for.

    Raises `CheckpointError` as `put_in` does.
    """
    given = spelled(type(base.config), overrides, base.config)
    said = _plausible(file, base.config)
    with torch.device("meta"):
        bare = base.built(said)
    said |= {name: value for name, value in _seen(bare, file.tensors, bands).items() if name not in given}
    model = base.built({**said, **given})
    heads = [file.tensors[name] for name in model.head_weights() if name in file.tensors]
    classes = int(heads[0].shape[0]) if heads else 0
    if "num_classes" not in given and model.num_classes != classes:
        model.reset_classifier(classes)
    new_head = model.num_classes != classes
    report = put_in(model, file, preprocess, new_head=new_head, bands=bands, rest=rest)
    tell(file.where, report, loud=bool(report.left))  # nobody gets this report, and a fresh head answers at random
    return model


def _plausible(file: File, config: Any) -> dict[str, Any]:
    """What stands beside a file, as far as a config has such fields, and its weights could be of such a network."""
    known, beside = {f.name for f in fields(config)}, file.beside.fields
    said = {name: value for name, value in beside.items() if name in known}
    if strange := [name for name in beside if name.endswith(LAYERS)]:
        raise CheckpointError(
            f"{file.where}: model_args beside it has {strange[0]}={shortened(beside[strange[0]])}, which no network "
            "here takes by that name: build it yourself and use load_weights(model, path)"
        )
    _check_plausible(file, said)
    return said


def _check_plausible(file: File, said: Mapping[str, Any]) -> None:
    layers = sum(max(1, n) for name in ("depth", "depths") for n in whole_numbers(said.get(name, 0)))
    largest = max((max(tensor.shape, default=0) for tensor in file.tensors.values()), default=0)
    numbers = [n for name, value in said.items() if name != "img_size" for n in whole_numbers(value)]
    if layers > 2 * len(file.tensors) + 2 or max(numbers, default=0) > max(largest, 1):
        raise CheckpointError(f"{file.where}: what stands beside it describes a larger network than its weights are of")


def _seen(model: Backbone, tensors: Mapping[str, Tensor], bands: Sequence[str] | None) -> dict[str, Any]:
    """What weights show of the network they were of: the size of its images, and its channels."""
    size, own = size_of(model, tensors), model.state_dict()
    seen: dict[str, Any] = {} if size == pair(model.config.img_size) else {"img_size": size}
    kernels = [tensors[name] for name in model.pixel_weights() if name in tensors and own[name].ndim == 4]
    if bands is None and kernels and kernels[0].ndim == 4 and kernels[0].shape[1] != model.preprocess.in_chans:
        seen["in_chans"] = int(kernels[0].shape[1])
    return seen


def size_of(model: Backbone, tensors: Mapping[str, Tensor]) -> tuple[int, int]:
    """The image size that tables of positions were made for, if it was square; the model's own where none says more."""
    height, width = pair(model.config.img_size)
    own = model.state_dict()
    for name, table in model.position_tables().items():
        known = can_be_resized(tensors.get(name), own[name]) and height == width
        old = guessed_table(tensors[name], table) if known else None
        if old is not None and not table.relative:
            return height * old.grid[0] // table.grid[0], width * old.grid[1] // table.grid[1]
    return height, width
