"""A network by its name, with or without weights, and any model folder.

create_model("vit_tiny", img_size=32)           fresh weights
create_model("bloodcells", pretrained=True)     a model that ships with the package
create_model("vit_base", pretrained=True)       published weights, fetched once
load_model("runs/demo")                         a folder, ours or timm's or transformers', ready to answer
load_weights(model, "swin_tiny.pth")            anybody's file, into a network that is there
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from vitrail.folder import FolderError, find_folder
from vitrail.layers.embed import pair
from vitrail.models.backbone import Backbone
from vitrail.models.registry import ROWS, build_model, elsewhere, resolve_name
from vitrail.names import MODEL_SPELLINGS, closest, nearest, shortened, unpacked
from vitrail.records import Preprocess
from vitrail.weights.fit import Report, Rest, tell
from vitrail.weights.foreign import (
    LOCAL,
    File,
    base_by,
    fetched,
    filled,
    is_own,
    model_of_file,
    model_of_source,
    place_of,
    put_in,
    read_file,
)
from vitrail.weights.own import load_folder
from vitrail.weights.read import CheckpointError
from vitrail.weights.sidecar import read_sidecar
from vitrail.weights.sources import SOURCES, find_source, near_sources

ASSETS = Path(__file__).parents[1] / "assets" / "models"
ENDINGS = (".safetensors", ".pth", ".pt", ".bin", ".ckpt", ".npz")
LOG = logging.getLogger("vitrail")


class Shipped(NamedTuple):
    """A trained model inside the package."""

    folder: Path
    description: str


SHIPPED: dict[str, Shipped] = {
    "bloodcells": Shipped(ASSETS / "bloodcells", "red cells, white cells and platelets, cropped from blood smears"),
}


def create_model(
    name: str,
    pretrained: bool = False,
    *,
    bands: Sequence[str] | None = None,
    rest: Rest = "mean",
    **overrides: Any,
) -> Backbone:
    """A network in training mode by its name: fresh, or with `pretrained` holding the weights published for it.

    `name` is a registry row or its short name, with a tag where weights are meant that are not the row's first
    (`vit_base_patch16_224.dino`), a model that ships with the package, `hf-hub:org/name`, or `local-dir:path`.
    `overrides` are fields of the family's config, in other libraries' spellings too. With `pretrained`, another
    `num_classes` makes a new head, and what belongs to another `img_size`, `patch_size` or window is resized, as the
    logger `vitrail` is told, of a fresh head by a warning. For other `in_chans`, `bands` names each channel: kernels of
    red, green and blue go where those are named, and `rest` says what the others get: the mean of the three, zero, or
    random numbers.

    Raises `ValueError` for an unknown name and for weights that do not fit, `TypeError` for an unknown field, each
    naming the nearest, for a name that is no text, and for a `pretrained` that is a path; `FetchError` where weights
    cannot be had.
    """
    _check_asked(name, pretrained)
    overrides = unpacked(overrides)
    if pretrained:
        return _pretrained(name, overrides, bands, rest)
    if bands is not None:
        raise ValueError(f"bands say where trained kernels go; {name} begins with fresh ones: give in_chans alone")
    source = SOURCES.get(name)
    model = build_model(name if source is None else source.row, **overrides)
    say_row(name, name if source is not None else model.variant, min(model.preprocess.img_size))
    return model


def _check_asked(name: Any, pretrained: Any) -> None:
    """A name, and whether its weights are wanted, which some names are alone. Raises as `create_model` does."""
    if not isinstance(name, str):
        raise TypeError(f"create_model takes the name of a model, such as 'vit_tiny'; got {shortened(name)}")
    if not isinstance(pretrained, bool):
        raise TypeError(
            f"pretrained is True, for the weights published for {name}, or False; got {shortened(pretrained)}: "
            "load_weights(model, path) puts a file's weights into a network, create_model('local-dir:path', "
            "pretrained=True) makes the one that a file or folder is for"
        )
    if not pretrained and place_of(name):
        raise ValueError(f"{name} names weights: use create_model({name!r}, pretrained=True)")
    if not pretrained and name in SHIPPED:
        raise ValueError(f"{name} ships with its weights: use create_model({name!r}, pretrained=True)")


def _pretrained(name: str, overrides: dict[str, Any], bands: Sequence[str] | None, rest: Rest) -> Backbone:
    if name in SHIPPED:
        return load_folder(SHIPPED[name].folder, overrides, bands, rest)
    if place := place_of(name):
        return model_of_file(fetched(place), overrides, bands, rest)
    source = find_source(name) or find_source(_row_of(name, overrides))
    if source is None:
        raise ValueError(_no_weights(name))
    return model_of_source(source, overrides, bands, rest)


def _row_of(name: str, overrides: Mapping[str, Any]) -> str:
    """The row of a short name, for the image size that is asked for; empty where there is none."""
    sizes = [value for word, value in overrides.items() if MODEL_SPELLINGS.get(word, word) == "img_size"]
    try:
        return resolve_name(name, min(pair(sizes[0])) if sizes else 224)
    except ValueError:
        return ""


def load_weights(
    model: Backbone,
    source: str | Path,
    *,
    part: str | None = None,
    new_head: bool = False,
    bands: Sequence[str] | None = None,
    rest: Rest = "mean",
) -> Report:
    """Puts somebody's weights into a network: a file, a folder of one, or published weights by their name.

    Names of timm, transformers, torchvision, the authors and Google are known; positions, bias tables, patches and
    channels are resized to the network (`weights.fit`). The head must fit too, unless `new_head` asks to leave the
    network's own. Of a file that holds several networks, `part` names one. The network takes over how images are
    prepared, where that is known. It is changed only once everything fits.

    Raises `CheckpointError` (a `ValueError`) that names what is missing, extra or of a shape that cannot be made to
    fit, `UnsafeCheckpoint` for a file that would run code, `FetchError` for weights that cannot be had, `TypeError` for
    what is neither a path nor a name.
    """
    if not isinstance(source, str | Path):
        raise TypeError(
            f"load_weights takes a file, a folder or a name; got {type(source).__name__}: save the tensors by "
            "torch.save, or, where their names are this network's own, use model.load_state_dict"
        )
    if Path(source).exists():
        file, known = read_file(Path(source), part), None
    else:
        file, known = _named(str(source), part)
    report = put_in(model, file, known, new_head=new_head, bands=bands, rest=rest)
    tell(file.where, report)
    return report


def _named(name: str, part: str | None) -> tuple[File, Preprocess | None]:
    """What a name of weights stands for, and how images are prepared for them where the file does not say."""
    if name in SHIPPED:
        return read_file(SHIPPED[name].folder, part), None
    if place := place_of(name):
        return read_file(fetched(place), part), None
    source = find_source(name) or find_source(_row_of(name, {}))
    if source is None:
        raise CheckpointError(
            f"{name}: neither a file nor published weights; published are {', '.join(near_sources(name))} and more "
            "(`vitrail models --pretrained`)"
        )
    return read_file(source.fetch(), part), source.preprocess


def say_row(name: str, row: str, img_size: int) -> None:
    """Tells the logger `vitrail` which row a short name became, for images of so many pixels."""
    if row != name:
        LOG.info("%s is %s, for images of %d pixels", name, row, img_size)


def load_model(name_or_path: str | Path) -> Backbone:
    """The network of a model folder, of a run folder, or a shipped one by its name: in evaluation mode, fp32, CPU.

    Its `preprocess`, `classes`, `images` and `variant` are those of the folder's card. A folder of timm's or
    transformers' is opened as `create_model("local-dir:…")` does: classes and preprocessing are those of the files
    beside its weights; where none says how images are prepared, the logger `vitrail` is told what is taken. A name wins
    over a folder of that name; `./name` is the folder.

    Raises `FolderError` (a `ValueError`) where there is no such model, where files are damaged, and where card and
    weights do not fit each other; `CheckpointError` (one too) where others' weights are of no network here; `TypeError`
    for what is neither name nor path.
    """
    if not isinstance(name_or_path, str | Path):
        raise TypeError(f"a model is found by a name or a folder's path; got {shortened(name_or_path)}: give one")
    if name_or_path in SHIPPED:
        return load_folder(SHIPPED[str(name_or_path)].folder).eval()
    if _is_architecture(str(name_or_path)) and not Path(name_or_path).exists():
        raise FolderError(
            f"{name_or_path} is an architecture without weights: train it, or use create_model({str(name_or_path)!r}); "
            f"with weights there is {', '.join(SHIPPED)}"
        )
    if (path := Path(name_or_path)).is_file():
        raise FolderError(f"a model is named by the folder of its run or its own; got the file {path}: {_way_in(path)}")
    if _is_of_others(path):
        return model_of_file(path, {}).eval()
    try:
        folder = find_folder(name_or_path)
    except FolderError as error:
        raise FolderError(f"{error}; by name there is {', '.join(SHIPPED)}") from None
    return load_folder(folder).eval()


def _way_in(file: Path) -> str:
    """How to open what a file holds."""
    home = file.parent.parent if file.parent.name == "checkpoints" else file.parent
    if is_own(home):
        return f"name {home}"
    return f"name a folder, or open a file of weights by create_model('{LOCAL}{file}', pretrained=True)"


def _is_of_others(path: Path) -> bool:
    """Whether a folder says that it is timm's or transformers'."""
    return path.is_dir() and not is_own(path) and bool(read_sidecar(path).architecture)


def open_weights(
    source: str, row: str = "", *, bands: Sequence[str] | None = None, rest: Rest = "mean", **overrides: Any
) -> Backbone:
    """The network that a model folder, a file or published weights hold; `row` names it where a file does not tell.

    `bands`, `rest` and `overrides` are those of `create_model`. Raises as `create_model` and `load_weights` do.
    """
    path = Path(source)
    if row:
        file, known = (read_file(path), None) if path.exists() else _named(source, None)
        return filled(base_by(file, row), file, overrides, known, bands, rest).eval()
    if path.exists():
        return model_of_file(path, overrides, bands, rest).eval()
    if place_of(source) is None and _is_place(path):
        raise CheckpointError(_no_place(path))
    return create_model(source, pretrained=True, bands=bands, rest=rest, **overrides).eval()


def _is_place(path: Path) -> bool:
    """Whether what names weights can be no published name: a folder, or a file's ending, is in it."""
    return len(path.parts) > 1 or path.is_absolute() or path.suffix in ENDINGS


def _no_place(path: Path) -> str:
    there = path.parent.is_dir()
    close = closest(path.name, (beside.name for beside in path.parent.iterdir())) if there else None
    mend = f"the nearest is {path.parent / close}" if close else "look at the path" if there else f"nor {path.parent}"
    return f"there is no such folder or file as {path}: {mend}"


def _is_architecture(name: str) -> bool:
    try:
        return bool(resolve_name(name))
    except ValueError:
        return False


def _no_weights(name: str) -> str:
    shipped = "; ".join(f"{row} ({model.description})" for row, model in SHIPPED.items())
    meant = elsewhere(name) or f"the nearest are {near(name)}"
    found = "" if _is_architecture(name) else f", and no such model: {meant}"
    return (
        f"no weights are known for {name!r}{found}; the package ships {shipped}; published are "
        f"{', '.join(near_sources(name))} and more (`vitrail models --pretrained`); load_model(path) takes any model "
        "folder, load_weights(model, path) any checkpoint"
    )


def near(name: str) -> str:
    """Models whose names are most like a wrong one."""
    return ", ".join(nearest(name, [*SHIPPED, *ROWS]))
