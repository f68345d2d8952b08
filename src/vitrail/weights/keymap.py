"""How one library's names of weights become another's: a table, read in both directions.

    Row("vit.encoder.layer.{i}.attention.attention.query.{w}", "blocks.{i}.attn.qkv.{w}", part=(0, 3))

`{i}`, `{j}` stand for whole numbers, `{i*2+1}` for twice that and one more, `{w}` for the rest of a name; what stands
in `[…]` may be left out, and is written. A `part` (k, n) is the k-th of n equal pieces of our tensor, along its first
dimension. `form` names how numbers are laid out otherwise, where they are (`FORMS`).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

HOLE = re.compile(r"\{(\w)(?:\*(\d+))?(?:([+-]\d+))?\}")
REST = "w"
BRACKETS = str.maketrans("", "", "[]")


def _conv(x: Tensor) -> Tensor:
    return x.permute(3, 2, 0, 1)


def _class_half(x: Tensor) -> Tensor:
    width = x.shape[1] // 2
    if x[:, width:].any():
        raise ValueError("it reads the mean of the patches too")
    return x[:, :width]


FORMS: dict[str, Callable[[Tensor], Tensor]] = {
    "same": lambda x: x,
    "matrix": lambda x: x.transpose(0, 1),  # (in, out) -> (out, in)
    "heads in": lambda x: x.flatten(1).transpose(0, 1),  # (C, H, D) -> (H·D, C)
    "heads out": lambda x: x.flatten(0, 1).transpose(0, 1),  # (H, D, C) -> (C, H·D)
    "flat": lambda x: x.flatten(),
    "kernel": _conv,  # (p, q, C_in, C) -> (C, C_in, p, q)
    "token": lambda x: x.reshape(1, 1, -1),  # (C,) -> (1, 1, C)
    "table": lambda x: x[None],  # (N, C) -> (1, N, C)
    "first third": lambda x: x[: len(x) // 3],  # of queries, keys and values: the queries
    "last thirds": lambda x: x[len(x) // 3 :],
    "last third": lambda x: x[2 * len(x) // 3 :],
    "zeros": lambda x: x.new_zeros(len(x)),  # a matrix that has no bias there -> the bias it has here
    "zeros of columns": lambda x: x.new_zeros(x.shape[1]),
    "class half": _class_half,  # of a head that reads class token and mean of patches, (K, 2 C) -> (K, C)
}
"""their layout -> ours"""
BACK: dict[str, Callable[[Tensor], Tensor]] = {
    "same": FORMS["same"],
    "matrix": FORMS["matrix"],
    "token": lambda x: x.flatten(),
    "table": lambda x: x[0],
    "first third": FORMS["same"],  # tensors of ours that are one of theirs are joined in the order of their rows
    "last thirds": FORMS["same"],
    "class half": lambda x: torch.cat([x, torch.zeros_like(x)], dim=1),
}
"""our layout -> theirs, where that needs no more than the tensor"""
NOWHERE = ("zeros",)
"""forms of what they do not have: it must be zero to be written"""


class Row(NamedTuple):
    """One kind of tensor: its name there, its name here."""

    theirs: str
    ours: str
    part: tuple[int, int] = (0, 1)
    form: str = "same"


@dataclass(frozen=True)
class KeyMap:
    """The names of one library for one family."""

    source: str
    """whose names: transformers, torchvision, authors, google …"""
    family: str
    """a family of the registry"""
    rows: tuple[Row, ...]
    marks: tuple[str, ...] = ()
    """names, as in `Row.theirs`, that tell this layout from every other: each is there"""
    drop: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    """what this package has no use for, in words -> patterns of their names"""
    favours: str = ""
    """part of the name of the row that is meant where several have the shapes: what no shape shows"""
    shown: Mapping[str, Any] = field(default_factory=dict)
    """fields of a config that all its networks have, which no shape shows either"""
    after: Callable[[dict[str, Tensor]], dict[str, Tensor]] = dict
    """what names alone cannot say, done to the tensors under our names"""

    def knows(self, names: Iterable[str]) -> bool:
        """Whether names of tensors are of this layout."""
        names = list(names)
        return bool(self.marks) and all(any(_match(mark, name) is not None for name in names) for mark in self.marks)

    def left_out(self, names: Iterable[str]) -> dict[str, list[str]]:
        """Those of their names for which this package has no use, by what they are, in words."""
        used = [row.theirs for row in self.rows]
        rest = [name for name in names if not _is_in(used, name)]
        found = {what: [name for name in rest if _is_in(patterns, name)] for what, patterns in self.drop.items()}
        return {what: inside for what, inside in found.items() if inside}

    def to_ours(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Their tensors by our names, pieces put together; what neither `rows` nor `drop` know keeps its name.

        Where a piece is missing or does not fit the others, they stand under names that no network has, which say so.
        """
        made: dict[str, Tensor] = {}
        pieces: dict[str, list[tuple[Row, str, Tensor]]] = {}
        for name, tensor in tensors.items():
            found = [(row, holes) for row in self.rows if (holes := _match(row.theirs, name)) is not None]
            for row, holes in found:
                pieces.setdefault(_fill(row.ours, holes), []).append((row, name, tensor))
            if not found and not self.left_out([name]):
                made[name] = tensor
        for ours, found_pieces in pieces.items():
            made |= _joined(ours, found_pieces)
        try:
            return self.after(made)
        except (RuntimeError, LookupError, ValueError):  # tensors that are not as this library has them
            return made

    def to_theirs(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Our tensors by their names, the first where there are several, in pieces. What is unknown keeps its own.

        Raises `ValueError` for a tensor that they do not have, unless it is zero.
        """
        made: dict[str, Tensor] = {}
        pieces: dict[str, list[tuple[int, Tensor]]] = {}
        for name, tensor in tensors.items():
            found: set[tuple[int, int]] = set()
            for number, row in enumerate(self.rows):
                holes = _match(row.ours, name)
                if holes is None or row.part in found:
                    continue
                found.add(row.part)
                if row.form in NOWHERE:
                    self._check_zero(name, tensor)
                else:
                    piece = BACK[row.form](tensor.chunk(row.part[1])[row.part[0]])
                    pieces.setdefault(_fill(row.theirs, holes), []).append((number, piece))
            if not found:
                made[name] = tensor
        return made | {name: _in_order(found_pieces) for name, found_pieces in pieces.items()}

    def _check_zero(self, name: str, tensor: Tensor) -> None:
        if tensor.any():
            raise ValueError(
                f"{self.source} has no {name}, and here it is not zero: make it zero, leave the head out with "
                "reset_classifier(0), or write this network as timm or vitrail do"
            )


def _in_order(pieces: list[tuple[int, Tensor]]) -> Tensor:
    """One tensor of theirs from those of ours, in the order of their rows."""
    if len(pieces) == 1:
        return pieces[0][1].contiguous()
    return torch.cat([piece for _, piece in sorted(pieces, key=lambda piece: piece[0])])


def _joined(ours: str, pieces: list[tuple[Row, str, Tensor]]) -> dict[str, Tensor]:
    """One tensor of ours from its pieces; or the pieces, under names that say what is wrong with them."""
    pieces = sorted(pieces, key=lambda piece: piece[0].part)
    n = pieces[0][0].part[1]
    if [row.part for row, _, _ in pieces] != [(k, n) for k in range(n)]:
        return {f"{name} ({len(pieces)} of {n} pieces of {ours})": tensor for _, name, tensor in pieces}
    try:
        formed = [FORMS[row.form](tensor) for row, _, tensor in pieces]
        return {ours: torch.cat(formed) if n > 1 else formed[0]}
    except ValueError as error:
        return {f"{name} (no piece of {ours}: {error})": tensor for _, name, tensor in pieces}
    except (RuntimeError, IndexError):  # what this layout does not have, or does not go together
        return {f"{name} (no piece of {ours})": tensor for _, name, tensor in pieces}


@cache
def _pattern(template: str) -> tuple[re.Pattern[str], tuple[tuple[str, int, int], ...]]:
    """A template as a pattern with one group a hole, and what each hole does to its number."""
    holes, text, at = [], "", 0
    for hole in HOLE.finditer(template):
        text += re.escape(template[at : hole.start()]) + ("(.+)" if hole[1] == REST else r"(\d+)")
        holes.append((hole[1], int(hole[2] or 1), int(hole[3] or 0)))
        at = hole.end()
    text += re.escape(template[at:])
    return re.compile(re.sub(r"\\\[(.*?)\\\]", r"(?:\1)?", text)), tuple(holes)


def _match(template: str, name: str) -> dict[str, str | int] | None:
    """What fills the holes of a template so that it is this name; None where nothing does."""
    pattern, holes = _pattern(template)
    found = pattern.fullmatch(name)
    if found is None:
        return None
    filled: dict[str, str | int] = {}
    for (hole, times, plus), text in zip(holes, found.groups(), strict=True):
        value: str | int = text
        if hole != REST:
            value, rest = divmod(int(text) - plus, times)
            if rest or value < 0:
                return None
        if filled.setdefault(hole, value) != value:
            return None
    return filled


def _is_in(templates: Iterable[str], name: str) -> bool:
    return any(_match(template, name) is not None for template in templates)


def _fill(template: str, holes: Mapping[str, str | int]) -> str:
    def put(hole: re.Match[str]) -> str:
        value = holes[hole[1]]
        return value if isinstance(value, str) else str(value * int(hole[2] or 1) + int(hole[3] or 0))

    return HOLE.sub(put, template.translate(BRACKETS))
