"""Somebody else's weights -> a network: read, renamed, resized, put in, with what is known of their images.

local-dir:path, hf-hub:org/name ── fetched ──> a file ── read_file ──> File ── put_in ──> the network that is there
                                                                         └─ model_of_file ──> one made for it
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor

from vitrail.folder import WEIGHTS, find_folder, read_weights
from vitrail.layers.embed import pair
from vitrail.models.backbone import Backbone, PositionTable
from vitrail.models.config import spelled
from vitrail.models.registry import FAMILIES, ROWS, build_model
from vitrail.records import Preprocess
from vitrail.weights.doctor import likely_row
from vitrail.weights.fetch import FetchError, fetch_from_hub
from vitrail.weights.fit import RGB, Report, Rest, can_be_resized, fitted, guessed_table, put, tell
from vitrail.weights.layouts import ours
from vitrail.weights.own import saved_tables
from vitrail.weights.read import FOLDER_FILES, CheckpointError, read_checkpoint
from vitrail.weights.sidecar import Sidecar, read_sidecar
from vitrail.weights.sources import HUB, Source

LOCAL = "local-dir:"


class Place(NamedTuple):
    """Where a name says that weights lie."""

    repo: str
    """of the hub; empty for a folder or file on this disk"""
    path: Path


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


def place_of(name: str) -> Place | None:
    """What `hf-hub:org/name` and `local-dir:path` mean; None for other names."""
    hub = next((prefix for prefix in HUB if name.startswith(prefix)), None)
    if hub is not None:
        return Place(name.removeprefix(hub), Path())
    return Place("", Path(name.removeprefix(LOCAL))) if name.startswith(LOCAL) else None


def fetched(place: Place) -> Path:
    """The file on this disk. Raises `FetchError` where the hub has none of the usual names."""
    if not place.repo:
        return place.path
    failed = []
    for name in FOLDER_FILES[:-1]:
        try:
            return fetch_from_hub(place.repo, name)
        except FetchError as error:
            failed.append(error)
    raise failed[0]


def read_file(path: Path, part: str | None = None) -> File:
    """A file, or a folder that holds one, with its names turned into ours. Model folders of ours are checked."""
    beside = read_sidecar(path)
    if beside.card is not None and path.is_dir():
        weights = read_weights(find_folder(path))
        return File(str(path), weights, "vitrail", 0, beside, saved_tables(path, beside.card, weights))
    checkpoint = read_checkpoint(path, part)
    tensors, source = ours(checkpoint.tensors)
    renamed = len(tensors.keys() - checkpoint.tensors.keys())
    tables = saved_tables(path.parent, beside.card, tensors) if beside.card and path.name == WEIGHTS else {}
    return File(str(checkpoint.path), tensors, source, renamed, beside, tables)


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
    report = Report(source=file.source, renamed=file.renamed)
    made = fitted(
        file.where, model, file.tensors, report, new_head=new_head, tables=file.tables, bands=bands, rest=rest
    )
    known = preprocess or file.beside.preprocess
    if known is not None and known.in_chans == len(RGB) and bands is not None:
        known = for_bands(known, bands)
    put(model, made)
    model.weights = file.where
    if known is not None and known.in_chans == model.preprocess.in_chans:
        model.preprocess = known.replace(img_size=pair(model.config.img_size))
    if not new_head and len(file.beside.classes) == model.num_classes:
        model.classes = file.beside.classes
    tell(file.where, report)
    return report


def for_bands(preprocess: Preprocess, bands: Sequence[str]) -> Preprocess:
    """How images of these bands are prepared: red, green and blue as before, the others by the mean of the three."""
    names = [band.strip().lower() for band in bands]

    def spread(values: tuple[float, ...]) -> tuple[float, ...]:
        return tuple(values[RGB.index(name)] if name in RGB else sum(values) / len(values) for name in names)

    return preprocess.replace(mean=spread(preprocess.mean), std=spread(preprocess.std))


def model_of_source(
    source: Source, overrides: Mapping[str, Any], bands: Sequence[str] | None = None, rest: Rest = "mean"
) -> Backbone:
    """The row that published weights are for, holding them."""
    return _filled(source.row, read_file(source.fetch()), overrides, source.preprocess, bands, rest)


def model_of_file(
    path: Path, overrides: Mapping[str, Any], bands: Sequence[str] | None = None, rest: Rest = "mean"
) -> Backbone:
    """The network that a file of weights is for, found by its shapes, holding them."""
    file = read_file(path)
    row = likely_row(file.tensors)
    if not row:
        raise CheckpointError(
            f"{file.where}: no network here has these shapes; `vitrail inspect` shows the nearest: build it yourself "
            "and use load_weights(model, path)"
        )
    return _filled(row, file, overrides, file.beside.preprocess, bands, rest)


def _filled(
    row: str,
    file: File,
    overrides: Mapping[str, Any],
    preprocess: Preprocess | None,
    bands: Sequence[str] | None,
    rest: Rest,
) -> Backbone:
    config = FAMILIES[ROWS[row]].variants[row]
    given = spelled(type(config), overrides, config)
    model = build_model(row, **{**file.beside.fields, **given})
    if "img_size" not in given and (size := size_of(model, file.tensors)) != pair(model.config.img_size):
        model = build_model(row, **{**file.beside.fields, **given, "img_size": size})
    heads = [file.tensors[name] for name in model.head_weights() if name in file.tensors]
    classes = int(heads[0].shape[0]) if heads else 0
    if "num_classes" not in given and model.num_classes != classes:
        model.reset_classifier(classes)
    new_head = model.num_classes != classes
    put_in(model, file, preprocess, new_head=new_head, bands=bands, rest=rest)
    return model


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
