"""Anybody's checkpoint file -> its tensors by their names. Nothing in a file is ever executed.

    .safetensors            a header of names, shapes and places, then numbers
    .pth .pt .bin .ckpt     a pickle: read by `torch.load(weights_only=True)`, with the few names in `HARMLESS` beside
    .npz                    arrays of numbers; pickles in them are refused
    .pt2, TorchScript       programs: refused

What a file is, its first bytes say, not its ending. Before tensors are made, sizes are held against the file's own: a
header or a compressed archive that promises more than the file can hold is refused.
"""

from __future__ import annotations

import argparse
import json
import re
import zipfile
from collections import defaultdict
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from vitrail.names import shortened

HARMLESS: list[Any] = [argparse.Namespace, defaultdict, dict]
"""what published training scripts put beside their weights: settings, never called"""
MAX_HEADER = 100_000_000
"""bytes of a safetensors header, as its own reader has it"""
EXPANSION = 20
"""how many times its compressed bytes an array of an .npz may have: trained weights hardly shrink at all"""
WRAPPERS = ("state_dict_ema", "model_ema", "state_dict", "model", "teacher", "student", "target_encoder", "encoder",
            "module", "net", "params")  # fmt: skip
"""where training scripts put a network's weights, the averaged and the better before the others"""
PREFIXES = ("module.", "_orig_mod.", "model.")
"""what wrappers put before every name: DDP, `torch.compile`, Lightning"""
FOLDER_FILES = ("model.safetensors", "pytorch_model.safetensors", "pytorch_model.bin", "open_clip_model.safetensors")
INDEX = "model.safetensors.index.json"


class CheckpointError(ValueError):
    """A checkpoint that cannot be read, is damaged, or does not fit. The message holds the path."""


class UnsafeCheckpoint(CheckpointError):
    """A file that asks to run code when it is read. Nothing of it was run."""


@dataclass(frozen=True)
class Checkpoint:
    """The tensors of one file, as it names them, without the wrappers that all of them share."""

    path: Path
    kind: str
    """safetensors, torch or npz"""
    tensors: dict[str, Tensor]
    wrappers: tuple[str, ...] = ()
    """what was taken off, outermost first: `model`, `module.` …"""
    others: tuple[str, ...] = ()
    """what stands beside the weights in the file: optimiser, epoch, other networks"""


def read_checkpoint(path: str | Path, part: str | None = None) -> Checkpoint:
    """The tensors of a file, or of a folder that holds one file of weights, on the CPU.

    Where a file holds several networks (averages, a teacher), `part` names the one that is wanted; else the first of
    `WRAPPERS` that is there. Raises `UnsafeCheckpoint` for what would run code, `CheckpointError` for what cannot be
    read, each with the path and the reason.
    """
    path = _file_of(Path(path))
    if path.name == INDEX:
        return _sharded(path)
    kind = kind_of(path)
    try:
        held = READERS[kind](path)
    except CheckpointError:
        raise
    except (SafetensorError, OSError, ValueError, KeyError, TypeError, RuntimeError, EOFError, MemoryError) as error:
        raise CheckpointError(f"{path}: not readable as {kind} ({_reason(error)}): fetch it again") from None
    except Exception as error:  # pickle and zip have more kinds than can be named
        raise CheckpointError(f"{path}: damaged, not readable as {kind} ({_reason(error)}): fetch it again") from None
    tensors, wrappers, others = _unwrapped(path, held, part)
    _check_sizes(path, tensors)
    return Checkpoint(path, kind, tensors, wrappers, others)


def kind_of(path: Path) -> str:
    """What a file is by its first bytes, and of an archive by what is in it. Raises `CheckpointError`."""
    with path.open("rb") as file:
        head = file.read(16)
    if not head:
        raise CheckpointError(f"{path}: empty: fetch it again")
    if head[:4] == b"PK\x03\x04":
        return _kind_of_archive(path)
    size = int.from_bytes(head[:8], "little")
    if head[8:9] == b"{":
        if size > min(MAX_HEADER, path.stat().st_size - 8):
            raise CheckpointError(
                f"{path}: a safetensors header of {size:,} bytes in a file of {path.stat().st_size:,}: fetch it again"
            )
        return "safetensors"
    if head[:1] in (b"\x80", b"("):
        return "torch"
    raise CheckpointError(f"{path}: neither safetensors, nor a PyTorch file, nor .npz; it begins with {head[:8]!r}")


def _kind_of_archive(path: Path) -> str:
    try:
        with zipfile.ZipFile(path) as archive:
            members = archive.infolist()
    except (zipfile.BadZipFile, OSError, ValueError) as error:
        raise CheckpointError(f"{path}: damaged, its archive has no readable index ({error}): fetch it again") from None
    names = [member.filename for member in members]
    if all(name.endswith(".npy") for name in names):
        return "npz"
    program = [
        name for name in names if "/code/" in f"/{name}" or "archive_format" in name or "exported_program" in name
    ]
    if program or not any(name.endswith("data.pkl") for name in names):
        raise UnsafeCheckpoint(
            f"{path}: a program ({(program or names)[0]}), which runs when it is loaded: ask for the weights alone, "
            "as safetensors or a state_dict"
        )
    if any(member.compress_type != zipfile.ZIP_STORED for member in members):
        raise CheckpointError(f"{path}: a PyTorch file is not compressed, this one is: fetch it again")
    return "torch"


def _file_of(path: Path) -> Path:
    if path.is_dir():
        found = [path / name for name in (*FOLDER_FILES, INDEX) if (path / name).is_file()]
        if not found:
            raise CheckpointError(f"{path}: a folder of weights holds one of {', '.join(FOLDER_FILES)}: name the file")
        return found[0]
    if not path.is_file():
        raise CheckpointError(f"{path}: there is no such file: look at the path")
    return path


# ---- one reader a kind


def _read_safetensors(path: Path) -> dict[str, Tensor]:
    with safe_open(path, framework="pt", device="cpu") as file:
        return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118


def _read_torch(path: Path) -> Any:
    with torch.serialization.safe_globals([*HARMLESS, *_numpy_scalars()]):
        try:
            return torch.load(path, map_location="cpu", weights_only=True)
        except Exception as error:
            if wanted := _wanted_global(str(error)):
                raise UnsafeCheckpoint(
                    f"{path}: its pickle wants {wanted}, which could run code; nothing was run. Who trusts it loads "
                    "it elsewhere and saves the state_dict alone"
                ) from None
            raise


def _wanted_global(message: str) -> str:
    """The name that a refused pickle asked for, as `torch.load` tells it; empty for other faults."""
    found = re.search(r"(?:Unsupported (?:global: GLOBAL|class)|reduce for unrecognized function) (\S+)", message)
    return found[1].rstrip(",.") if found else ""


def _numpy_scalars() -> list[Any]:
    """A best accuracy or a loss is often kept as numpy's number."""
    import numpy as np

    scalar = np.float64(0).__reduce__()[0]
    kinds = [type(np.dtype(kind)) for kind in ("float64", "float32", "int64", "int32")]
    return [scalar, (scalar, "numpy.core.multiarray.scalar"), np.dtype, *kinds]


def _read_npz(path: Path) -> dict[str, Tensor]:
    import numpy as np

    with zipfile.ZipFile(path) as archive:
        for member in archive.infolist():
            _check_array(path, archive, member)
    with np.load(path, allow_pickle=False) as arrays:
        return {name: torch.from_numpy(np.ascontiguousarray(arrays[name])) for name in arrays.files}


def _check_array(path: Path, archive: zipfile.ZipFile, member: zipfile.ZipInfo) -> None:
    """The header of one array against the bytes that are there. Raises `CheckpointError`."""
    from numpy.lib import format as npy

    with archive.open(member) as file:
        version = npy.read_magic(file)
        read = npy.read_array_header_1_0 if version == (1, 0) else npy.read_array_header_2_0
        shape, _, dtype = read(file)
        header = file.tell()
    if dtype.hasobject:
        raise UnsafeCheckpoint(f"{path}: {member.filename} holds pickled objects; arrays of numbers are read")
    count = 1
    for side in shape:
        count *= side
    expected = count * dtype.itemsize
    if expected != member.file_size - header or member.file_size > EXPANSION * max(member.compress_size, 1000):
        raise CheckpointError(
            f"{path}: {member.filename} promises {expected:,} bytes of {shape}, with {member.compress_size:,} in the "
            "file: fetch it again"
        )


READERS: dict[str, Callable[[Path], Any]] = {
    "safetensors": _read_safetensors,
    "torch": _read_torch,
    "npz": _read_npz,
}


def _sharded(index: Path) -> Checkpoint:
    """Several files, as the index of a large model names them."""
    try:
        places = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        files = sorted(set(places.values()))
    except (ValueError, KeyError, TypeError, AttributeError, OSError) as error:
        raise CheckpointError(f"{index}: no readable index of weights ({_reason(error)}): fetch it again") from None
    strange = [name for name in files if Path(str(name)).name != name]
    if strange:
        raise CheckpointError(f"{index}: parts must lie beside their index; got {shortened(strange[0])}")
    parts = [read_checkpoint(index.parent / name) for name in files]
    return Checkpoint(index, "safetensors", {name: t for part in parts for name, t in part.tensors.items()})


# ---- from what a file holds to the weights in it


def _unwrapped(path: Path, held: Any, part: str | None) -> tuple[dict[str, Tensor], tuple[str, ...], tuple[str, ...]]:
    """The innermost dict of tensors, what was around it, and what lay beside it."""
    wrappers: list[str] = []
    others: list[str] = []
    while isinstance(held, Mapping) and (key := _wrapper(path, held, part, wrappers)):
        others += [str(name) for name in held if name != key]
        wrappers.append(key)
        held, part = held[key], None if key == part else part
    if not isinstance(held, Mapping) or not any(isinstance(value, Tensor) for value in held.values()):
        raise CheckpointError(f"{path}: there is no state_dict in it; it holds {_contents(held)}")
    if part is not None:
        raise CheckpointError(f"{path}: there is no part {part!r} in it; beside the weights stand {_contents(others)}")
    tensors = {str(name): value for name, value in held.items() if isinstance(value, Tensor)}
    others += [str(name) for name in held if str(name) not in tensors]
    while prefix := next((p for p in PREFIXES if all(name.startswith(p) for name in tensors)), None):
        wrappers.append(prefix)
        tensors = {name.removeprefix(prefix): value for name, value in tensors.items()}
    return tensors, tuple(wrappers), tuple(others)


def _wrapper(path: Path, held: Mapping[Any, Any], part: str | None, taken: list[str]) -> str | None:
    """The entry of a dict in which the weights stand, or None where they are its own entries."""
    inner = [str(key) for key, value in held.items() if isinstance(value, Mapping) and _has_tensors(value)]
    if part in inner:
        return part
    known = [key for key in WRAPPERS if key in inner]
    if known or len(inner) != 1 or any(isinstance(value, Tensor) for value in held.values()):
        return known[0] if known else None
    return inner[0]


def _has_tensors(held: Mapping[Any, Any]) -> bool:
    values = list(held.values())
    return any(isinstance(v, Tensor) for v in values) or any(
        isinstance(v, Mapping) and any(isinstance(t, Tensor) for t in v.values()) for v in values
    )


def _check_sizes(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """A view may not be larger than what it looks at: `expand` makes terabytes of four bytes."""
    for name, tensor in tensors.items():
        if tensor.layout != torch.strided or tensor.is_quantized or tensor.is_complex():
            raise CheckpointError(
                f"{path}: {name} is no plain tensor of real numbers; got {tensor.layout}, {tensor.dtype}"
            )
        if tensor.numel() * tensor.element_size() > tensor.untyped_storage().nbytes():
            raise CheckpointError(f"{path}: {name} {tuple(tensor.shape)} is larger than its memory: fetch it again")


def _contents(held: Any) -> str:
    if isinstance(held, Mapping):
        return ", ".join(map(str, list(held)[:8])) or "nothing"
    return ", ".join(held[:8]) or "nothing" if isinstance(held, list) else type(held).__name__


def _reason(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return shortened(lines[0]) if lines else type(error).__name__
