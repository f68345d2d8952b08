"""Weights made to fit a network of another size: what is resized, what is left out, and a report of it.

    positions        interpolated to the network's grid (Dosovitskiy et al. 2021, section 3.2)
    bias tables      interpolated to the network's window (Liu et al. 2021, section 4.1)
    patch kernels    resampled so that patches of a resized image give the same tokens (Beyer et al. 2023, FlexiViT)
    pixel channels   kernels go to the bands of their names

Whatever has its size already is the very tensor that was given. The network is changed by `put` alone, at the end.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal, TypeGuard

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vitrail.layers.embed import resize_positions, resize_relative_bias
from vitrail.layers.relative import resize_relative
from vitrail.models.backbone import Backbone, PositionTable
from vitrail.names import check_choice, closest, printable, shortened
from vitrail.weights.read import CheckpointError
from vitrail.weights.wrapped import is_head

LOG = logging.getLogger("vitrail")
RGB = ("red", "green", "blue")
Rest = Literal["mean", "zero", "random"]
FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
"""types that weights may be stored in"""
LEAVE_HEAD = (
    "load_weights(model, path, new_head=True) leaves a network its own head, create_model('local-dir:path', "
    "pretrained=True, num_classes=0) makes one without"
)
"""what to do where the head alone does not fit"""
MOST_TOLD = 100
"""characters of one name and its shapes in a message"""
MOST_PIXELS = 256
"""the side of the largest patch that is resized: the work grows with its square"""


@dataclass
class Report:
    """What became of a checkpoint's tensors."""

    taken: int = 0
    """how many stand in the network"""
    renamed: int = 0
    """how many of them had another name"""
    source: str = ""
    """whose names they had"""
    wrappers: tuple[str, ...] = ()
    """what the file has around its weights, outermost first"""
    passed: tuple[str, ...] = ()
    """other networks in the file, as `part` names them"""
    untaken: tuple[str, ...] = ()
    """tensors of the file that stood beside the weights, under other names"""
    resized: list[str] = field(default_factory=list)
    """a line each: name, old and new shape"""
    bands: tuple[str, ...] = ()
    """what the network's channels are, where kernels were laid out for them"""
    left: list[str] = field(default_factory=list)
    """what was left as it was, because it was asked for: the head"""
    unused: list[str] = field(default_factory=list)
    """what the network has no place for: somebody's head"""
    remarks: list[str] = field(default_factory=list)
    """what else changes answers a little: another epsilon"""
    faults: list[str] = field(default_factory=list)
    """why answers may be wrong though all fits: NaN, or a config that says what is not read"""
    left_out: Mapping[str, Sequence[str]] = field(default_factory=dict)
    """names for which this package has no use, by what they are: the text tower, a decoder"""

    def lines(self) -> list[str]:
        """As they are told."""
        names = f", translated from the names of {self.source}" if self.renamed else ""
        told = [f"{self.taken} tensors{names}"]
        told += [f"taken out of {' > '.join(self.wrappers)}{_not(self.passed)}"] if self.wrappers else []
        told += [f"not taken: {first(self.untaken)}"] if self.untaken else []
        told += [*(f"resized {line}" for line in self.resized)]
        told += [f"channels by bands {first(self.bands)}{_without(self.bands)}"] if self.bands else []
        told += [f"fresh: {', '.join(self.left)}"] if self.left else []
        parts = [f"{what} ({len(names)} tensors)" if len(names) > 1 else what for what, names in self.left_out.items()]
        told += [f"not used: {first([*parts, *self.unused])}"] if parts or self.unused else []
        return told + self.remarks + self.faults


def _without(bands: Sequence[str]) -> str:
    """Which bands no kernel was trained for, in words."""
    others = [band for band in bands if band.strip().lower() not in RGB]
    return f", no trained kernels being for {first(others)}" if others else ""


def _not(passed: Sequence[str]) -> str:
    return f", not {first(passed)}, which part= names" if passed else ""


def fitted(
    where: str,
    model: Backbone,
    tensors: Mapping[str, Tensor],
    report: Report,
    *,
    new_head: bool = False,
    tables: Mapping[str, PositionTable] | None = None,
    bands: Sequence[str] | None = None,
    rest: Rest = "mean",
) -> dict[str, Tensor]:
    """`tensors`, by our names, as `model` needs them: every weight of it, but for its heads' with `new_head`.

    `tables` says what tables of positions were made for, where that is known; else for squares. Raises
    `CheckpointError`, its message beginning with `where`, that names every tensor missing, extra, or of a shape or type
    that cannot be made to fit; nothing is changed then.
    """
    wanted, made, heads = model.state_dict(), dict(tensors), model.head_weights()
    if new_head or not model.num_classes:
        report.left += [name for name in wanted if name in heads]
        report.unused += [name for name in made if _is_of(heads, name)]
        made = {name: value for name, value in made.items() if not _is_of(heads, name)}
    made = at_patches(where, model, at_grids(model, made, tables), bands, rest)
    body = {name: value for name, value in wanted.items() if name not in report.left}
    check_fit(where, body, made, heads)
    report.taken = len(made)
    report.faults += not_finite(made)
    kernels, changed = model.pixel_weights(), [name for name, value in made.items() if value is not tensors[name]]
    report.bands = tuple(bands or ()) if any(name in kernels for name in changed) else ()
    report.resized += [
        f"{name} {shape_of(tensors[name])} -> {shape_of(made[name])}"
        for name in changed
        if name not in kernels or made[name].shape != tensors[name].shape
    ]
    return made


def not_finite(weights: Mapping[str, Tensor]) -> list[str]:
    """A line that names the first tensor with a NaN or an infinity and says how many there are; none where all is well.

    A sum shows it without memory of its own; a sum that alone is too large is looked at again.
    """
    suspect = (name for name, value in weights.items() if value.dtype in FLOATS and not value.sum().isfinite())
    bad = [name for name in suspect if not weights[name].isfinite().all()]
    return [f"NaN or infinite numbers in {len(bad)} of {len(weights)} tensors, first in {first(bad, 1)}"] if bad else []


def tell(where: str, report: Report, loud: bool = False) -> None:
    """Tells the logger `vitrail` what became of tensors, if anything did.

    Faults are a warning, and a head that was left in the file; if `loud`, all is.
    """
    if len(lines := report.lines()) > 1 or report.renamed:
        loud = loud or bool(report.faults) or any(map(is_head, report.untaken))
        LOG.log(logging.WARNING if loud else logging.INFO, "%s: %s", where, "; ".join(lines))


def put(model: nn.Module, weights: Mapping[str, Tensor]) -> None:
    """Writes weights that are known to fit into a network's own memory, in its types."""
    state = model.state_dict(keep_vars=True)
    with torch.no_grad():
        for name, value in weights.items():
            state[name].copy_(value)


def check_fit(
    where: str, wanted: Mapping[str, Tensor], weights: Mapping[str, Tensor], heads: Collection[str] = ()
) -> None:
    """Every name on both sides, every shape equal, every float a float. Raises `CheckpointError`."""
    faults = misfits(wanted, weights)
    if not faults:
        return
    found = "; ".join(f"{kind}: {first(names)}" for kind, names in faults.items())
    only_head = all(_is_of(heads, name) for names in faults.values() for name in names)
    mend = f": {LEAVE_HEAD}" if only_head else ""
    raise CheckpointError(f"{where}: weights must fit the network exactly; {found}{mend}")


def _is_of(heads: Collection[str], name: str) -> bool:
    """Whether a name, or what is told of it, is of a head: one of ours, or what could not be made one (`keymap`)."""
    return name.partition(" ")[0] in heads or any(f"(no piece of {head}" in name for head in heads)


def misfits(wanted: Mapping[str, Tensor], weights: Mapping[str, Tensor]) -> dict[str, list[str]]:
    """What keeps weights from fitting, by kind; empty where nothing does."""
    shared = [name for name in wanted if name in weights]
    faults = {
        "missing": [name for name in wanted if name not in weights],
        "extra": [name for name in weights if name not in wanted],
        "wrong shape": [
            f"{name} {shape_of(weights[name])} for {shape_of(wanted[name])}"
            for name in shared
            if weights[name].shape != wanted[name].shape
        ],
        "wrong type": [
            f"{name} {weights[name].dtype}"
            for name in shared
            if wanted[name].is_floating_point() and weights[name].dtype not in FLOATS
        ],
    }
    return {kind: names for kind, names in faults.items() if names}


def first(names: Sequence[str], most: int = 10) -> str:
    """The first of many names, each of a length to be read, and how many more there are."""
    told = ", ".join(printable(name[:MOST_TOLD]) for name in names[:most])
    return told + (f" and {len(names) - most} more" if len(names) > most else "")


def shape_of(tensor: Tensor) -> tuple[int, ...]:
    return tuple(tensor.shape)


# ---- positions


def at_grids(
    model: Backbone, tensors: Mapping[str, Tensor], tables: Mapping[str, PositionTable] | None = None
) -> dict[str, Tensor]:
    """`tensors` with the tables of positions that can be resized at the grids and windows of `model`."""
    wanted, made = model.state_dict(), dict(tensors)
    for name, table in model.position_tables().items():
        if can_be_resized(made.get(name), wanted[name]):
            old = (tables or {}).get(name)
            if old is None or old.prefix != table.prefix or _rows(old) != made[name].shape[-2]:
                old = guessed_table(made[name], table)
            made[name] = made[name] if old is None else resized(made[name], old, table)
    return made


def can_be_resized(table: Tensor | None, like: Tensor) -> TypeGuard[Tensor]:
    """Whether all but the number of rows is right; `check_fit` tells the rest."""
    if table is None or table.ndim != like.ndim or table.dtype not in FLOATS:
        return False
    return table.shape[-1] == like.shape[-1] and table.shape[:-2] == like.shape[:-2]


def guessed_table(table: Tensor, like: PositionTable) -> PositionTable | None:
    """What a table of positions was made for, if for the same or for a square; None where for neither."""
    rows = table.shape[-2]
    side = math.isqrt(max(0, rows - like.prefix))
    side = (side + 1) // 2 if like.relative else side
    square = like._replace(grid=(side, side))
    return next((made for made in (like, square) if side and _rows(made) == rows), None)


def _rows(table: PositionTable) -> int:
    h, w = table.grid
    return table.prefix + ((2 * h - 1) * (2 * w - 1) if table.relative else h * w)


def resized(table: Tensor, old: PositionTable, new: PositionTable) -> Tensor:
    """A table at another grid or window; the very same where that is the same."""
    if old.grid == new.grid:
        return table
    if not new.relative:
        return resize_positions(table, old.grid, new.grid, new.prefix, filter=new.filter)
    return (resize_relative if new.prefix else resize_relative_bias)(table, old.grid, new.grid)


# ---- pixels


def at_patches(
    where: str,
    model: Backbone,
    tensors: Mapping[str, Tensor],
    bands: Sequence[str] | None = None,
    rest: Rest = "mean",
) -> dict[str, Tensor]:
    """`tensors` with kernels over pixels for the patches and channels of `model`. Raises as `pixels` does."""
    wanted, made = model.state_dict(), dict(tensors)
    for name in model.pixel_weights():
        if name in made and made[name].dtype in FLOATS:
            made[name] = pixels(where, name, made[name], wanted[name], bands, rest)
    return made


def pixels(where: str, name: str, weight: Tensor, like: Tensor, bands: Sequence[str] | None, rest: Rest) -> Tensor:
    """A kernel (C, C_in, p, q) for other channels and another patch size; the very same where both are the same."""
    if weight.ndim != 4 or like.ndim != 4 or weight.shape[0] != like.shape[0]:
        return weight
    if not all(1 <= side <= MOST_PIXELS for side in weight.shape[2:]):
        return weight
    if weight.shape[2:] != like.shape[2:]:
        weight = resize_patches(weight, (like.shape[2], like.shape[3]))
    if bands is not None:
        return for_bands(where, weight, like.shape[1], bands, rest)
    if like.shape[1] == 1 and weight.shape[1] == 3:  # grey is red, green and blue alike
        return weight.sum(1, keepdim=True)
    if like.shape[1] != weight.shape[1]:
        raise CheckpointError(
            f"{where}: {name} is for {weight.shape[1]} channels and the network takes {like.shape[1]}: say which they "
            "are, bands=('red', 'green', 'blue', ...), or build it with in_chans as the weights have it"
        )
    return weight


def for_bands(where: str, weight: Tensor, channels: int, bands: Sequence[str], rest: Rest) -> Tensor:
    """RGB kernels (C, 3, p, q) at the bands named red, green and blue; the rest by `REST` -> (C, bands, p, q)."""
    check_choice("rest", rest, REST)
    if isinstance(bands, str):
        raise CheckpointError(
            f"{where}: bands must be a sequence of names, one a channel; got the text {shortened(bands)}: say "
            "bands=('red', 'green', 'blue', ...)"
        )
    names = [band.strip().lower() for band in bands]
    if len(names) != channels or len(set(names)) != len(names):
        raise CheckpointError(f"{where}: bands must name each of the {channels} channels once; got {', '.join(bands)}")
    if wrong := [name for name in names if name not in RGB and closest(name, RGB)]:
        raise CheckpointError(
            f"{where}: bands have names of their own but for red, green and blue, whose kernels the weights hold; got "
            f"{shortened(wrong[0])}: did you mean {closest(wrong[0], RGB)}?"
        )
    if not set(RGB) & set(names):
        raise CheckpointError(
            f"{where}: bands must name red, green or blue among the channels, whose kernels the weights hold; got "
            f"{first(list(bands))}: call the nearest of them so, or train from fresh weights"
        )
    if weight.shape[1] != 3:
        raise CheckpointError(f"{where}: bands are for weights of red, green and blue; got {weight.shape[1]} channels")
    made = [weight[:, RGB.index(band)] if band in RGB else REST[rest](weight) for band in names]
    stacked = torch.stack(made, 1)
    return weight if torch.equal(stacked, weight) else stacked


REST: dict[str, Callable[[Tensor], Tensor]] = {
    "mean": lambda weight: weight.mean(1),
    "zero": lambda weight: torch.zeros_like(weight[:, 0]),
    "random": lambda weight: torch.randn_like(weight[:, 0]) * weight.std(),
}
"""kernels (C, 3, p, q) -> the kernel (C, p, q) of a band that they know nothing of"""


def resize_patches(weight: Tensor, size: tuple[int, int]) -> Tensor:
    """Kernels (C, C_in, p, q) for patches of another size, such that w'(resized patch) is nearest to w(patch).

    With B the matrix that resizes a patch, w' = pinv(Bᵀ) w (Beyer et al. 2023, "FlexiViT", section 3.4). B resizes rows
    and columns apart, B = B_p ⊗ B_q, and so does its pseudo-inverse.
    """
    back_p, back_q = (_unresize(old, new) for old, new in zip(weight.shape[2:], size, strict=True))  # (P, p), (Q, q)
    return torch.einsum("Pp,ocpq,Qq->ocPQ", back_p, weight.double(), back_q).to(weight.dtype)


def _unresize(old: int, new: int) -> Tensor:
    """pinv(Bᵀ) of the resizing of `old` pixels in a row to `new` -> (new, old), in double precision."""
    lit = torch.eye(old, dtype=torch.float64)[:, None, None]  # (old, 1, 1, old), a pixel in each
    rows = F.interpolate(lit, size=(1, new), mode="bicubic", antialias=True, align_corners=False)
    return torch.linalg.pinv(rows.flatten(1))
