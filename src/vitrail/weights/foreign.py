"""Somebody else's weights -> a network: read, renamed, resized, put in, with what is known of their images.

local-dir:path, hf-hub:org/name ── fetched ──> a file ── read_file ──> File ── put_in ──> the network that is there
                                                                         └─ model_of_file ──> one made for it
"""

from __future__ import annotations

import logging
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from vitrail.folder import CONFIG, WEIGHTS, find_folder, read_weights
from vitrail.layers.embed import pair
from vitrail.models.backbone import Backbone, PositionTable
from vitrail.models.config import spelled, tuples
from vitrail.models.registry import FAMILIES, ROWS
from vitrail.names import shortened
from vitrail.records import ModelCard, Preprocess
from vitrail.weights.doctor import fitting_rows
from vitrail.weights.fetch import FetchError, Unreachable, fetch_from_hub, fetch_parts
from vitrail.weights.fit import RGB, Report, Rest, can_be_resized, fitted, guessed_table, put, tell
from vitrail.weights.layouts import favoured, left_out, ours, shown
from vitrail.weights.own import banded_preprocess, load_folder, saved_tables
from vitrail.weights.read import FOLDER_FILES, CheckpointError, read_checkpoint
from vitrail.weights.said import Base, base_of, check_plausible, said_network
from vitrail.weights.shards import INDICES
from vitrail.weights.sidecar import Sidecar, read_sidecar
from vitrail.weights.sources import HUB, Source
from vitrail.weights.timm_configs import strange_args, uneven_stage

LOG = logging.getLogger("vitrail")
LOCAL = "local-dir:"
RATIOS = {"mlp_ratio", "mlp_ratios"}
RESIZED = {"patch_size", "window_size", "global_blocks"}
FREE = RESIZED | {
    "img_size", "in_chans", "num_classes", "ref_feat_shape", "attn", "dynamic_pad", "drop_rate", "pos_drop_rate",
    "proj_drop_rate", "attn_drop_rate", "drop_path_rate", "init_values", *RATIOS,
}  # fmt: skip
"""fields in which a network may differ from the one that its weights were of: sizes, what trained networks do not use,
and ratios, of which shapes show all that counts"""
POOLING = {"global_pool", "fc_norm"}
"""fields that are a head's matter: they must agree where it is taken"""
NEAR_FIELDS = {"norm_eps", "conv_norm_eps"}
NEAR_EPSILON = 1e-5
UNREAD = "configs of transformers' {} are not read here, and what they say no shape of a weight may show"


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
    said: Base | None
    """the network that transformers' config says, where the names are its"""
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
    """A file, or a folder that holds one, with its names turned into ours. Model folders of ours are checked.

    Raises `CheckpointError` where transformers' config beside it says what no network here can be.
    """
    path = find_folder(path) if is_own(path) else path
    beside = read_sidecar(path)
    if beside.card is not None and path.is_dir():
        weights = read_weights(find_folder(path))
        return File(str(path), weights, "vitrail", 0, beside, None, saved_tables(path, beside.card, weights))
    checkpoint = read_checkpoint(path, part)
    tensors, source = ours(checkpoint.tensors)
    renamed = len(tensors.keys() - checkpoint.tensors.keys())
    tables = saved_tables(path.parent, beside.card, tensors) if beside.card and path.name == WEIGHTS else {}
    spare, row = left_out(checkpoint.tensors), favoured(checkpoint.tensors)
    around, where = (checkpoint.wrappers, checkpoint.passed, checkpoint.untaken), str(checkpoint.path)
    said = said_network(where, beside.transformers, tensors) if source.startswith("transformers") else None
    beside = replace(beside, fields={**shown(checkpoint.tensors), **beside.fields})
    return File(where, tensors, source, renamed, beside, said, tables, spare, row, *around)


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
    check_said(model, file, report, () if new_head or not model.num_classes else POOLING)
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
    if preprocess is None:
        _tell_prepared(model, file)
    if not new_head:
        fitting = len(file.beside.classes) == model.num_classes
        model.classes = file.beside.classes if fitting else ()
    model.images = file.beside.card.images if file.beside.card is not None else ""
    return report


def _tell_prepared(model: Backbone, file: File) -> None:
    """Tells the logger `vitrail`, in one line, what is not known of images or taken otherwise than the files say."""
    if remarks := file.beside.remarks:
        p = model.preprocess
        LOG.warning(
            "%s: %s; taken are img_size %s, mean %s, std %s, crop_mode %s, crop_pct %.4g, %s: set model.preprocess if "
            "they were others",
            Path(file.where).parent, "; ".join(remarks),
            p.img_size, p.mean, p.std, p.crop_mode, p.crop_pct, p.interpolation,
        )  # fmt: skip


def check_said(model: Backbone, file: File, report: Report, pooling: Collection[str] = ()) -> None:
    """What no shape shows, such as heads and activations, must be as the file's own config says where there is one.

    `pooling` names fields that count because a head is taken. Raises `CheckpointError`. Epsilons that differ by little
    are a remark, for they change answers by little.
    """
    card = file.beside.card
    if card is not None and card.family != model.family:
        return  # their shapes will tell
    free, own = FREE | (POOLING - set(pooling)), asdict(model.config)
    saved = {name: tuples(value) for name, value in _saved(file).items() if name in own and name not in free}
    other = {name: (own[name], value) for name, value in saved.items() if value != own[name]}
    near = {name for name, (a, b) in other.items() if name in NEAR_FIELDS and max(a, b) <= NEAR_EPSILON}
    for name in sorted(near):
        made, own_eps = other[name][1], other[name][0]
        report.remarks.append(f"made with {name}={made:g}, the network has {own_eps:g}: answers differ by little")
    report.faults += [*_unread(file, model), *_cut_otherwise(file)]
    if wrong := sorted(other.keys() - near):
        pairs = ", ".join(f"{name}={other[name][0]!r}, not {other[name][1]!r}" for name in wrong)
        raise CheckpointError(
            f"{file.where}: weights must be of a network of the same config; this one has {pairs}: build it so, or use "
            f"create_model('local-dir:{file.where}', pretrained=True)"
        )


def _saved(file: File) -> Mapping[str, Any]:
    """Fields of the network that weights were of, as far as what stands beside them says any."""
    if file.beside.card is not None:
        return file.beside.card.config
    return file.beside.fields if file.said is None else asdict(file.said.config)


def _unread(file: File, model: Backbone) -> list[str]:
    """Lines of what stands beside a file and nothing here reads: whether it changes answers, nobody can tell."""
    known = {f.name for f in fields(model.config)}
    args = [
        f"model_args beside it has {arg}, which no network here takes by that name" for arg in _strange(file, known)
    ]
    return args + ([UNREAD.format(file.beside.architecture)] if _is_of_unread_kind(file) else [])


def _strange(file: File, known: Collection[str]) -> list[str]:
    """timm's arguments beside a file that are none of the fields `known`, with their values."""
    args = file.beside.fields
    return [*(f"{name}={shortened(args[name])}" for name in strange_args(args, known)), *file.beside.unread]


def _is_of_unread_kind(file: File) -> bool:
    """Whether the config of a network of transformers is of a kind that is not read."""
    kind = file.beside.architecture if file.beside.transformers else ""
    return file.source.startswith("transformers") and file.said is None and bool(kind)


def _cut_otherwise(file: File) -> list[str]:
    """A line where timm's Swin was of a size at which its windows are not the ones here."""
    row = file.beside.architecture
    if ROWS.get(row) != "swin" or not file.beside.fields:
        return []
    size = {name: value for name, value in file.beside.fields.items() if name in ("img_size", "window_size")}
    made = replace(base_of(row).config, **size)
    odd = uneven_stage(made)
    return [f"timm's network of img_size {made.img_size} answers otherwise: {odd}"] if odd else []


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
    return filled(base_by(file), file, overrides, bands=bands, rest=rest)


def base_by(file: File, row: str = "") -> Base:
    """The network that a file is for: `row` where one is named, what the card of its run says, what transformers'
    config says, or what its shapes fit.

    Raises `CheckpointError` where there is none, or transformers' config is of a kind that is not read.
    """
    if file.beside.card is not None and not row:
        return _of_card(file, file.beside.card)
    if file.said is not None:
        made = _as_row(file.said, [row] if row else fitting_rows(file.tensors, file.favoured))
        return base_of(row) if row and not made.row else made
    if not row and _is_of_unread_kind(file):
        said = UNREAD.format(file.beside.architecture)
        raise CheckpointError(f"{file.where}: {said}: build it yourself and use load_weights(model, path)")
    if found := row or row_of(file):
        return base_of(found)
    raise CheckpointError(
        f"{file.where}: no network here has these shapes; `vitrail inspect` shows the nearest: build it yourself "
        "and use load_weights(model, path)"
    )


def _of_card(file: File, card: ModelCard) -> Base:
    """The network that a card says, held against the weights before it is built."""
    try:
        check_plausible(file.where, card.config, file.tensors)
        said = {name: tuples(value) for name, value in card.config.items()}
        return Base(card.family, FAMILIES[card.family].config(**said), card.name)
    except (TypeError, ValueError, LookupError) as error:
        raise CheckpointError(f"{file.where}: the card of its run says no network of this package: {error}") from None


def _as_row(said: Base, rows: Sequence[str]) -> Base:
    """A network that is said, as the first of `rows` from which it differs in images, dropout and epsilons alone.

    Without a row, where it differs from all in more.
    """
    saved = asdict(said.config)
    for base in (base_of(row) for row in rows if ROWS[row] == said.family):
        other = {name for name, value in asdict(base.config).items() if saved[name] != value}
        if other <= FREE - RESIZED | NEAR_FIELDS:
            taken = {name: saved[name] for name in other - RATIOS - {"num_classes"}}
            return base._replace(config=replace(base.config, **taken))
    return said


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
    if strange := _strange(file, known):
        raise CheckpointError(
            f"{file.where}: model_args beside it has {strange[0]}, which no network here takes by that name: open it "
            "with timm, or, where it changes no answer, build the network yourself and use load_weights(model, path)"
        )
    check_plausible(file.where, said, file.tensors)
    return said


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
