"""Anybody's checkpoint file -> its tensors by their names. Nothing in a file is ever executed.

    .safetensors            a header of names, shapes and places, then numbers
    .pth .pt .bin .ckpt     a pickle: its names are looked at, then `torch.load(weights_only=True)` reads it
    .npz                    arrays of numbers; pickles in them are refused
    TorchScript             the tensors of its modules, by `torchscript`; its code stays shut
    *.index.json            which of several files holds which tensor
    .pt2                    a program: refused

What a file is, its first bytes say, not its ending. Before tensors are made, sizes are held against the file's own: a
header or a compressed archive that promises more than the file can hold is refused.
"""

from __future__ import annotations

import io
import math
import pickletools
import re
import zipfile
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from vitrail.folder import MAX_NAME
from vitrail.names import printable, shortened
from vitrail.weights import torchscript
from vitrail.weights.measure import Scale
from vitrail.weights.shards import INDICES, parts_of
from vitrail.weights.wrapped import unwrapped

TENSORS = re.compile(
    r"torch (\w+Storage|u?int\d+|b?float\d+\w*|complex\d+|bool|qu?int\d+|per_\w+|Size|device|Tensor)"
    r"|torch\.storage \w+Storage|torch\._utils _rebuild_\w+|torch\._tensor _rebuild_from_type_v2"
    r"|torch\.nn\.parameter Parameter|torch\.serialization _get_layout"
    r"|collections (OrderedDict|Counter|defaultdict)|_codecs encode|builtins (set|complex)"
)
"""names that a pickle of weights asks for; which of torch's own are safe, torch decides after"""
HARMLESS = (
    "argparse.Namespace", "pathlib.PosixPath", "pathlib.WindowsPath", "numpy.dtype", "numpy.ndarray",
    "numpy.core.multiarray.scalar", "numpy._core.multiarray.scalar",
    "numpy.core.multiarray._reconstruct", "numpy._core.multiarray._reconstruct",
    "builtins.dict", "builtins.list", "builtins.int", "builtins.float",
)  # fmt: skip
"""what published training scripts put beside their weights, settings and best accuracies: `Ignored` stands for it"""
ZIP = b"PK\x03\x04"
PIECE = 1 << 20
"""bytes of an archive that are looked at together"""
MAX_HEADER = 10_000_000
"""bytes of a safetensors header: some hundred a tensor"""
MAX_PICKLE = 8_000_000
"""bytes of a pickle, which holds names and settings; numbers lie beside it"""
EXPORTED = "archive_format"
"""what `torch.export` has in its archives, and nobody else"""
EXPANSION = 20
"""how many times its own bytes an .npz may unpack to: trained weights hardly shrink at all"""
FOLDER_FILES = ("model.safetensors", "pytorch_model.safetensors", "pytorch_model.bin", "open_clip_model.safetensors")


MOST_START = 64
STANDINS = {
    b"version https://git-lfs": "a pointer of git-lfs, not the weights: fetch them with `git lfs pull`",
    **dict.fromkeys(
        (b"<!doctype html", b"<html", b"<?xml"),
        "a page of the web, not weights: the address needs a login, or is of a page about them: fetch the file itself",
    ),
}
"""what lies in place of weights, by its first bytes, and what to do"""
RUN_FILES = ("model/model.safetensors", "checkpoints/last.ckpt", "last.ckpt")
"""what a run of this package leaves: its model, or, before it is done, where it stands"""


class CheckpointError(ValueError):
    """A checkpoint that cannot be read, is damaged, or does not fit. The message holds the path."""


class UnsafeCheckpoint(CheckpointError):
    """A file that asks to run code when it is read. Nothing of it was run."""


@dataclass(frozen=True)
class Checkpoint:
    """The tensors of one file, as it names them, without the wrappers that all of them share."""

    path: Path
    kind: str
    """safetensors, torch, torchscript, npz or sharded"""
    tensors: dict[str, Tensor]
    wrappers: tuple[str, ...] = ()
    """what was taken off, outermost first: `model`, `module.` …"""
    others: tuple[str, ...] = ()
    """what stands beside the weights in the file: optimiser, epoch, other networks"""
    passed: tuple[str, ...] = ()
    """other networks in the file, as `part` names them"""
    untaken: tuple[str, ...] = ()
    """of what stands beside, the tensors under names of their own: somebody's head"""


def read_checkpoint(path: str | Path, part: str | None = None) -> Checkpoint:
    """The tensors of a file, or of a folder that holds one file of weights, on the CPU.

    Where a file holds several networks (averages, a teacher), `part` names the one that is wanted; else the first of
    `wrapped.WRAPPERS` that is there. Raises `UnsafeCheckpoint` for what would run code, `CheckpointError` for what
    cannot be read, each with the path and the reason.
    """
    path, kind = _file_of(Path(path)), "a checkpoint"
    try:
        kind = "sharded" if path.name in INDICES else kind_of(path)
        held = READERS[kind](path)
    except CheckpointError:
        raise
    except Exception as error:  # pickle, zip and numpy have more kinds than can be named
        raise CheckpointError(f"{path}: damaged, not readable as {kind} ({_reason(error)}): fetch it again") from None
    try:
        found = unwrapped(held, part)
    except ValueError as error:
        raise CheckpointError(f"{path}: {error}") from None
    _check_tensors(path, found.tensors)
    return Checkpoint(path, kind, *found)


def kind_of(path: Path) -> str:
    """What a file is by its first bytes, and of an archive by what is in it. Raises `CheckpointError`."""
    with path.open("rb") as file:
        head = file.read(MOST_START)
    if not head:
        raise CheckpointError(f"{path}: empty: fetch it again")
    if said := next((said for start, said in STANDINS.items() if head.lstrip().lower().startswith(start)), None):
        raise CheckpointError(f"{path}: {said}")
    if head.startswith(ZIP):
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
    kind = "npz" if all(name.endswith(".npy") for name in names) else _kind_of_pytorch(path, names)
    if outside := [name for name in names if name.startswith("/") or ".." in PurePosixPath(name).parts]:
        raise CheckpointError(f"{path}: its archive may name no place outside itself; got {shortened(outside[0])}")
    if kind == "torchscript":
        members = [member for member in members if not torchscript.is_code(member.filename)]
    if kind != "npz" and any(member.compress_type != zipfile.ZIP_STORED for member in members):
        raise CheckpointError(f"{path}: a PyTorch file is not compressed, this one is: fetch it again")
    size, promised = path.stat().st_size, sum(member.file_size for member in members)
    if promised > size * (EXPANSION if kind == "npz" else 1):
        raise CheckpointError(f"{path}: {size:,} bytes that would unpack to {promised:,}: fetch it again")
    if kind != "npz":  # numpy looks at the sums itself, torch does not
        _check_sums(path, members)
    return kind


def _check_sums(path: Path, members: Sequence[zipfile.ZipInfo]) -> None:
    """Every member is as it was written. Raises `BadZipFile`."""
    with zipfile.ZipFile(path) as archive:
        for member in members:
            with archive.open(member) as held:
                while held.read(PIECE):
                    pass


def _kind_of_pytorch(path: Path, names: list[str]) -> str:
    """torch or torchscript, which both have a `data.pkl`. Raises `UnsafeCheckpoint` for any other program."""
    inside = {torchscript.inside(name): name for name in names}
    if EXPORTED in inside or "data.pkl" not in inside:
        raise UnsafeCheckpoint(
            f"{path}: a program ({shortened(inside.get(EXPORTED, names[0]))}), which runs when it is loaded: ask for "
            "the weights alone, as safetensors or a state_dict"
        )
    scripted = torchscript.CONSTANTS in inside or any(map(torchscript.is_code, names))
    return "torchscript" if scripted else "torch"


def _file_of(path: Path) -> Path:
    if path.is_dir():
        found = [path / name for name in (*FOLDER_FILES, *INDICES, *RUN_FILES) if (path / name).is_file()]
        if not found:
            raise CheckpointError(f"{path}: a folder of weights holds one of {', '.join(FOLDER_FILES)}: name the file")
        return found[0]
    if not path.exists():
        raise CheckpointError(f"{path}: there is no such file: look at the path")
    if not path.is_file():
        raise CheckpointError(
            f"{path}: weights are read from a file or a folder; this is a device or a pipe: name a file"
        )
    return path


# ---- one reader a kind


def _read_safetensors(path: Path) -> dict[str, Tensor]:
    with safe_open(path, framework="pt", device="cpu") as file:
        return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118


class Ignored:
    """Stands for whatever a training script put beside its weights. Nothing of that is kept."""

    def __new__(cls, *_: object) -> Ignored:
        return super().__new__(cls)

    def __setstate__(self, state: object) -> None:
        """Nothing is taken over."""


def _without_default(factory: object = None) -> dict[Any, Any]:
    """For a `defaultdict`."""
    return {}


def _read_torch(path: Path) -> Any:
    _check_pickles(path)
    asides = [(Ignored, name) for name in HARMLESS]
    safe = torch.serialization.safe_globals([*asides, (_without_default, "collections.defaultdict")])
    with safe, path.open("rb") as file:  # of a path, torch would believe the ending
        return torch.load(file, map_location="cpu", weights_only=True)


def _check_pickles(path: Path) -> None:
    """What a file's pickles ask for, and how much they make, before one is read.

    Raises `UnsafeCheckpoint`, and as `Scale` does.
    """
    with path.open("rb") as file:
        head = io.BytesIO(file.read(MAX_PICKLE))
    if not head.getvalue().startswith(ZIP):
        for _ in range(5):  # a mark, a version, the machine, the weights, the order of what then follows
            if (start := head.tell()) < len(head.getbuffer()):
                _check_pickle(path, head)
                head.seek(start)
                Scale().run(head)
        return
    with zipfile.ZipFile(path) as archive:
        for member in archive.infolist():
            if member.filename.endswith("data.pkl"):
                pickled = _pickle(path, archive, member)
                _check_pickle(path, io.BytesIO(pickled))
                Scale().run(io.BytesIO(pickled))


def _pickle(path: Path, archive: zipfile.ZipFile, member: zipfile.ZipInfo, most: int = MAX_PICKLE) -> bytes:
    if member.file_size > most:
        raise CheckpointError(
            f"{path}: a pickle of names and settings has at most {most:,} bytes; got {member.file_size:,}: save the "
            "state_dict alone"
        )
    return archive.read(member)


def _is_harmless(name: str) -> bool:
    return bool(TENSORS.fullmatch(name)) or name.replace(" ", ".") in HARMLESS


def _check_pickle(path: Path, pickled: io.BytesIO, is_known: Callable[[str], bool] = _is_harmless) -> None:
    texts: deque[object] = deque(maxlen=2)
    for code, value, _ in pickletools.genops(pickled):
        if code.name in ("GLOBAL", "INST", "STACK_GLOBAL"):
            asked = " ".join(map(str, texts)) if value is None else str(value)
            wanted = asked.replace("__builtin__", "builtins")  # Python 2's name, which pickles still have
            if not is_known(wanted):
                raise UnsafeCheckpoint(
                    f"{path}: its pickle wants {printable(wanted[:100]).replace(' ', '.')}, which could run code; "
                    "nothing was run. Who trusts it loads it elsewhere and saves the state_dict alone"
                )
        elif "UNICODE" in code.name:
            texts.append(value)


def _read_torchscript(path: Path) -> dict[str, Tensor]:
    with zipfile.ZipFile(path) as archive:
        (member,) = (member for member in archive.infolist() if torchscript.inside(member.filename) == "data.pkl")
        pickled = _pickle(path, archive, member, torchscript.MOST_BYTES)
        _check_pickle(path, io.BytesIO(pickled), torchscript.is_known)
        tensors = torchscript.archive_tensors(archive, member.filename.partition("/")[0], pickled)
    if not tensors:
        raise CheckpointError(
            f"{path}: weights are parameters of modules; this archive has none, as torch.jit.freeze leaves it, which "
            "makes them part of its code, and that is never opened: save it before it is frozen"
        )
    return tensors


def _read_npz(path: Path) -> dict[str, Tensor]:
    import numpy as np

    with zipfile.ZipFile(path) as archive:
        for member in archive.infolist():
            _check_array(path, archive, member)
    with np.load(path, allow_pickle=False) as arrays:
        return {name: torch.from_numpy(np.asarray(arrays[name], order="C")) for name in arrays.files}


def _check_array(path: Path, archive: zipfile.ZipFile, member: zipfile.ZipInfo) -> None:
    """The header of one array against the bytes that are there. Raises `CheckpointError`."""
    from numpy.lib import format as npy

    with archive.open(member) as file:
        version = npy.read_magic(file)
        read = npy.read_array_header_1_0 if version == (1, 0) else npy.read_array_header_2_0
        shape, _, dtype = read(file)
        header = file.tell()
    if dtype.hasobject:
        raise UnsafeCheckpoint(
            f"{path}: {shortened(member.filename)} holds pickled objects; arrays of numbers are read"
        )
    expected = math.prod(shape) * dtype.itemsize
    if expected != member.file_size - header:
        raise CheckpointError(
            f"{path}: {shortened(member.filename)} promises {expected:,} bytes, and the file holds "
            f"{member.file_size - header:,}: fetch it again"
        )


def _read_sharded(index: Path) -> dict[str, Tensor]:
    """Several files, as the index of a large model names them."""
    try:
        places = parts_of(index)
    except ValueError as error:
        raise CheckpointError(str(error)) from None
    held = {}
    for name in sorted(set(places.values())):
        if not (index.parent / name).is_file():
            raise CheckpointError(f"{index}: its part {name} is not there: fetch it too")
        held[name] = READERS[kind_of(index.parent / name)](index.parent / name)
    lacking = [name for name, place in places.items() if name not in held[place]]
    if lacking:
        raise CheckpointError(f"{index}: {shortened(lacking[0])} is not in its part: fetch them again")
    return {name: held[place][name] for name, place in places.items()}


READERS: dict[str, Callable[[Path], Any]] = {
    "safetensors": _read_safetensors,
    "torch": _read_torch,
    "torchscript": _read_torchscript,
    "npz": _read_npz,
    "sharded": _read_sharded,
}


# ---- what came of it


def _check_tensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Plain numbers under names that a network may have. Raises `CheckpointError`."""
    for name, tensor in tensors.items():
        if len(name) > MAX_NAME:
            raise CheckpointError(f"{path}: a tensor's name has at most {MAX_NAME} characters; got {len(name):,}")
        if not _is_plain(tensor):
            raise CheckpointError(
                f"{path}: {shortened(name)} must be a plain tensor of real numbers; got {tensor.dtype}, "
                f"{tensor.layout}, {tensor.device.type}: save it as one"
            )
        # a view may not be larger than what it looks at: `expand` makes terabytes of four bytes
        if tensor.numel() * tensor.element_size() > tensor.untyped_storage().nbytes():
            raise CheckpointError(
                f"{path}: {shortened(name)} {shortened(tuple(tensor.shape))} is larger than its memory: fetch it again"
            )


def _is_plain(tensor: Tensor) -> bool:
    strange = tensor.is_quantized or tensor.is_complex() or tensor.is_nested or tensor.device.type != "cpu"
    return type(tensor) is Tensor and tensor.layout == torch.strided and not strange


def _reason(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return shortened(lines[0]) if lines else type(error).__name__
