"""A trained model on disk: a folder with `model.safetensors`, `config.json` and `manifest.json`.

The manifest holds the sha256 of the other two, so that one flipped byte is found; nothing in a folder is ever executed.
A folder is written beside its place and then renamed: it is there whole or not at all.

    name/            the model folder
    .name.<x>.new/   one being written; whatever a killed process left of it is never read
    .name.old/       the previous one, for the moment between two renames; read if that moment was the last
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
import re
import secrets
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from vitrail.files import flush
from vitrail.names import closest, is_printable, shortened
from vitrail.records import ModelCard

WEIGHTS, CONFIG, MANIFEST = "model.safetensors", "config.json", "manifest.json"
MAX_JSON_BYTES = 16_000_000
MAX_NUMBER = 1_000_000
"""no size of a network is larger; a hostile one would fill the memory"""
LIMITS = {"img_size": 16_384, "depth": 1_000, "depths": 1_000}
"""of these no network has more: each pixel costs memory, each layer a module, before any weight is looked at"""
MAX_NAME = 1000
Kind = type | tuple[type, ...]
CARD: dict[str, Kind] = {
    "family": str, "name": str, "images": str, "version": str, "config": dict, "preprocess": dict, "training": dict,
    "classes": list,
}  # fmt: skip
"""the JSON type of every entry of a card"""
PREPROCESS: dict[str, Kind] = {
    "img_size": list, "mean": list, "std": list, "interpolation": str, "crop_pct": (int, float), "crop_mode": str,
    "known": bool,
}  # fmt: skip
LISTED: dict[str, Kind] = {"img_size": int, "mean": (int, float), "std": (int, float)}
"""what the lists of `preprocess` hold"""
WORDS: dict[Kind, str] = {
    dict: "an object", list: "a list", bool: "true or false", str: "text", int: "a whole number",
    (int, float): "a number",
}  # fmt: skip


LOG = logging.getLogger("vitrail")


class FolderError(ValueError):
    """A model folder that is not there, is damaged, or says what cannot be. The message holds the path."""


# ---- writing


def write_folder(
    path: Path, state_dict: Mapping[str, Tensor], card: ModelCard, *, dtype: torch.dtype | None = None
) -> Path:
    """Writes weights, card and manifest; returns `path`. A model folder that stands there is replaced.

    `dtype` (fp16, bf16 …) stores every floating tensor in that type. Raises `FolderError` where something other than
    a model folder stands at `path`, where a value overflows `dtype`, and where the card cannot be written as JSON.
    """
    _refuse_foreign(Path(path).resolve())
    config = card_text(card)
    tensors = {name: _stored(name, tensor, dtype) for name, tensor in state_dict.items()}
    with whole_folder(path) as fresh:
        save_tensors(tensors, fresh / WEIGHTS)
        (fresh / CONFIG).write_text(config, encoding="utf-8")
        (fresh / MANIFEST).write_text(_manifest(fresh), encoding="utf-8")
    return Path(path)


@contextmanager
def whole_folder(path: str | Path) -> Iterator[Path]:
    """A folder to be filled beside `path`, synced and renamed at the end: it is there whole or not at all.

    What stands at `path` is replaced; after an error it is as it was, and nothing is left behind.
    """
    target = Path(path).resolve()
    target.parent.mkdir(parents=True, exist_ok=True)
    fresh = target.with_name(f".{target.name}.{secrets.token_hex(4)}.new")
    fresh.mkdir()
    try:
        yield fresh
        for part in (*fresh.iterdir(), fresh):
            flush(part)
        _put_in_place(fresh, target)
    except BaseException:
        shutil.rmtree(fresh, ignore_errors=True)
        raise


def save_tensors(tensors: dict[str, Tensor], file: Path) -> None:
    """Writes safetensors with PyTorch's mark. Raises `FolderError` where that cannot be."""
    try:
        save_file(_unshared(tensors), file, metadata={"format": "pt"})
        file.chmod(0o644)  # safetensors makes files for their owner alone
    except SafetensorError as error:
        raise FolderError(f"{file.parent.parent}: weights could not be written ({error}): look at the disk") from error


def _put_in_place(fresh: Path, target: Path) -> None:
    old = _previous(target)
    if target.exists():
        shutil.rmtree(old, ignore_errors=True)
        target.rename(old)
    try:
        fresh.rename(target)
    except OSError:
        old.rename(target) if old.exists() else None
        raise
    flush(target.parent)
    shutil.rmtree(old, ignore_errors=True)


def _previous(target: Path) -> Path:
    return target.parent / f".{target.name}.old"


def _refuse_foreign(target: Path) -> None:
    """Only a model folder, an empty folder or nothing may stand where one is written."""
    if not target.exists():
        return
    held = {part.name for part in target.iterdir()} if target.is_dir() else {"no folder but a file"}
    others = sorted(held - {WEIGHTS, CONFIG, MANIFEST})
    if others:
        raise FolderError(
            f"a model is written to a new folder or over another model; {target} holds {', '.join(others[:3])}: "
            "choose another path, or move that away"
        )
    if held:
        read_card(target)  # three files of these names may still be somebody else's


def _stored(name: str, tensor: Tensor, dtype: torch.dtype | None) -> Tensor:
    tensor = tensor.detach().cpu()
    if dtype is None or not tensor.is_floating_point():
        return tensor.contiguous()
    small = tensor.to(dtype)
    if bool((small.isinf() & tensor.isfinite()).any()):
        raise FolderError(f"{name} reaches {tensor.abs().max():.3g}, too much for {dtype}: write it without dtype")
    return small.contiguous()


def _unshared(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Tensors that share memory, such as tied weights, become copies: the format takes none that do."""
    seen: set[int] = set()
    apart = {}
    for name, tensor in tensors.items():
        memory = tensor.untyped_storage().data_ptr()
        apart[name] = tensor.clone() if memory in seen else tensor
        seen.add(memory)
    return apart


def card_text(card: ModelCard) -> str:
    """What is written of a card. Raises `FolderError` for what could not be read back, or is nothing for JSON."""
    if too_long := [name for name in card.classes if len(name) > MAX_NAME]:
        raise FolderError(f"classes must be names of at most {MAX_NAME} characters; got {shortened(too_long[0])}")
    for key, value in card.to_dict().items():
        _check_text("a model card", key, value)
    try:
        return json.dumps(_plain(card.to_dict()), indent=2, sort_keys=True, ensure_ascii=False) + "\n"
    except TypeError as error:
        raise FolderError(f"a model card holds text, numbers, lists and dicts; {error}: convert it") from None


def _plain(value: Any) -> Any:
    """JSON has no NaN and no infinity: they become null."""
    if isinstance(value, dict):
        return {key: _plain(part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(part) for part in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _manifest(folder: Path) -> str:
    sums = {
        name: {"bytes": (folder / name).stat().st_size, "sha256": _sha256(folder / name)} for name in (CONFIG, WEIGHTS)
    }
    return json.dumps({"files": sums}, indent=2, sort_keys=True) + "\n"


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


# ---- finding


def find_folder(path: str | Path) -> Path:
    """The model folder that `path` means: itself, or the `model/` of a run folder.

    Raises `FolderError` that names what was looked for and the sibling that would do, if one has a name like it.
    """
    path = Path(path)
    for place in (path, path / "model"):
        for folder in (place, _previous(place.absolute())):
            if _is_model(folder):
                return folder
    missing = [name for name in (CONFIG, WEIGHTS) if not (path / name).is_file()]
    state = "is a file" if path.is_file() else f"lacks {' and '.join(missing)}" if path.exists() else "does not exist"
    siblings = [s.name for s in path.absolute().parent.glob("[!.]*") if _is_model(s) or _is_model(s / "model")]
    close = closest(path.name, siblings)
    none = "none of the models beside it has a name like that" if siblings else "no model stands beside it"
    mend = f"the nearest beside it is {path.parent / close}" if close else none
    raise FolderError(f"a model folder holds {CONFIG} and {WEIGHTS}, in itself or in model/; {path} {state}: {mend}")


def _is_model(folder: Path) -> bool:
    return (folder / CONFIG).is_file() and (folder / WEIGHTS).is_file()


# ---- reading


def read_card(path: Path) -> ModelCard:
    """What a model folder says of itself, checked against its manifest.

    Raises `FolderError` where `config.json` is missing, damaged, or holds what a card does not: unknown entries, wrong
    types, paths for names, numbers that no network has.
    """
    _verify(path, CONFIG)
    file = path / CONFIG
    values = _read_json(file)
    try:
        _check_values(file, values)
        return ModelCard.from_dict(values)
    except FolderError:
        raise
    except (TypeError, ValueError, RecursionError) as error:
        raise FolderError(f"{file}: {error}") from None


def read_weights(path: Path) -> dict[str, Tensor]:
    """The tensors of a model folder on the CPU, in the type they are stored in, checked against its manifest.

    Raises `FolderError` where the file is missing or damaged; where there is no manifest to check it by, the logger
    `vitrail` is told.
    """
    _verify(path, WEIGHTS)
    file = path / WEIGHTS
    try:
        return {name: tensor.clone() for name, tensor in load_file(file).items()}  # the loaded ones lie in the file
    except (SafetensorError, OSError, ValueError, KeyError) as error:
        raise FolderError(f"{file}: not a readable safetensors file ({error}): fetch or write it again") from None


def _verify(path: Path, name: str) -> None:
    """One file against the manifest: size, then sha256."""
    file = path / name
    if not file.is_file():
        raise FolderError(f"{file}: there is no such file, and a model folder needs it: fetch or write the model again")
    if not (path / MANIFEST).is_file():
        LOG.warning("%s: integrity unchecked, since there is no %s", file, MANIFEST)
        return
    size, digest = _expected(path / MANIFEST, name)
    mend = "fetch or write the model again"
    if file.stat().st_size != size:
        raise FolderError(f"{file}: damaged, {file.stat().st_size} bytes where {MANIFEST} says {size}: {mend}")
    if _sha256(file) != digest:
        raise FolderError(f"{file}: damaged or changed, its sha256 differs from {MANIFEST}: {mend}")


def _expected(manifest: Path, name: str) -> tuple[int, str]:
    match _read_json(manifest):
        case {"files": {**files}} if set(files) == {CONFIG, WEIGHTS}:
            match files[name]:
                case {"bytes": int(size), "sha256": str(digest)}:
                    return size, digest
    raise FolderError(f"{manifest}: it must hold `bytes` and `sha256` of {CONFIG} and {WEIGHTS} alone, under `files`")


def _read_json(file: Path) -> dict[str, Any]:
    if file.stat().st_size > MAX_JSON_BYTES:
        raise FolderError(f"{file}: {file.stat().st_size:,} bytes; at most {MAX_JSON_BYTES:,} are read")
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, RecursionError, OSError) as error:
        raise FolderError(f"{file}: not readable as JSON ({error})") from None
    if not isinstance(values, dict):
        raise FolderError(f"{file}: it must hold an object; got {shortened(values)}")
    return values


def _check_values(file: Path, values: Mapping[str, Any]) -> None:
    _check_entries(file, values)
    _check_preprocess(file, values.get("preprocess", {}))
    for part in ("config", "preprocess"):
        _check_numbers(file, part, values.get(part, {}))
    for key, value in values.items():
        _check_text(str(file), key, value)


def _check_entries(file: Path, values: Mapping[str, Any]) -> None:
    for key, value in values.items():
        _check_kind(file, key, value, CARD.get(key, object))
    for key in ("family", "name"):
        if not re.fullmatch(r"[\w.\-]*", values.get(key, "")):
            raise FolderError(f"{file}: {key} must be a plain name; got {shortened(values[key])}")
    if not all(isinstance(name, str) and len(name) <= MAX_NAME for name in values.get("classes", [])):
        raise FolderError(f"{file}: classes must be names of at most {MAX_NAME} characters")


def _check_preprocess(file: Path, values: Mapping[str, Any]) -> None:
    for key, value in values.items():
        _check_kind(file, f"preprocess.{key}", value, PREPROCESS.get(key, object))
    for key, kind in LISTED.items():
        for part in values.get(key, []):
            _check_kind(file, f"each of preprocess.{key}", part, kind)


def _check_kind(file: Path, where: str, value: Any, kind: Kind) -> None:
    if not isinstance(value, kind):
        raise FolderError(f"{file}: {where} must be {WORDS[kind]}; got {shortened(value)}")


def _check_numbers(file: Path, where: str, value: Any, limit: int = MAX_NUMBER) -> None:
    parts = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, part in parts:
        _check_numbers(file, f"{where}.{key}", part, LIMITS.get(str(key), limit))
    if isinstance(value, int | float) and not abs(value) <= limit:
        raise FolderError(f"{file}: {where} must lie within ±{limit:,}; got {shortened(value)}")


def _check_text(whose: str, where: str, value: Any) -> None:
    """No control characters anywhere, which a terminal would obey. Raises `FolderError`."""
    if isinstance(value, dict):
        for key, part in value.items():
            _check_text(whose, where, key)
            _check_text(whose, f"{where}.{key}", part)
    elif isinstance(value, list | tuple):
        for part in value:
            _check_text(whose, where, part)
    elif isinstance(value, str) and not is_printable(value):
        raise FolderError(f"{whose}: {where} must hold no control characters; got {shortened(value)}: rename it")
