"""How much a pickle makes, measured before anything makes it: what nests without end, or grows as 2^n does, is refused.

A pickle of 150 bytes can hold t = (t, t) sixty times over. That is made at once, since both halves are one; but whoever
hashes it (as a dict does its keys) or prints it (as an error does what it got) meets all 2^60 of them, and of 250,000
tuples in one another hashing ends the process. So here is the machine that PyTorch reads a pickle with
(`torch/_weights_only_unpickler.py`), with measures on its stack in place of values: nothing is made or called.
"""

from __future__ import annotations

import pickletools
from collections.abc import Callable, Iterable
from typing import IO, Any

MOST_DEPTH = 64
"""lists, tuples and dicts in one another; settings of training scripts have some ten"""
MOST_PARTS = 10_000_000
"""values that are met where keys are hashed and names called; a tensor has about twenty"""
MOST_STEPS = 3_000_000
"""opcodes of one pickle: a tensor takes about thirty, an optimiser has two for each"""
LETTERS = 8
"""of a text that count as one part: what copies it takes as much"""


class Made:
    """What a pickle makes, by its measures."""

    __slots__ = ("closed", "depth", "parts")

    def __init__(self, parts: int = 1, closed: bool = False) -> None:
        self.parts, self.depth = parts, 0
        """values in it, what is shared counted as often as it is met; how deep they lie in one another"""
        self.closed = closed
        """whether it has its full size: other values hold it, and counted it"""

    def take(self, items: Iterable[Made]) -> Made:
        """Itself, with these in it. Raises `ValueError` where it is too much, and where it is held already."""
        if self.closed:
            raise ValueError("a list or dict that grows inside another")
        for item in items:
            item.closed = True
            self.parts += item.parts
            self.depth = max(self.depth, item.depth + 1)
        if self.depth > MOST_DEPTH:
            raise ValueError(f"values in one another more than {MOST_DEPTH} deep")
        return self

    def check(self) -> Made:
        """Raises `ValueError` where it has more parts than anything may."""
        if self.parts > MOST_PARTS:
            raise ValueError(f"more than {MOST_PARTS:,} values, each counted as often as it is met")
        return self


PLAIN, NAME = Made(closed=True), Made(closed=True)


class Scale:
    """Reads one pickle as PyTorch does: a stack, the stacks that marks set aside, and what bears a number."""

    def __init__(self) -> None:
        self.stack: list[Made] = []
        self.below: list[list[Made]] = []
        self.aside: dict[int, Made] = {}
        self.met = Made()

    def run(self, pickled: IO[bytes]) -> None:
        """To its end. Raises `ValueError`, or `LookupError` for what is not there."""
        for step, (code, value, _) in enumerate(pickletools.genops(pickled)):
            if step == MOST_STEPS:
                raise ValueError(f"a pickle of more than {MOST_STEPS:,} steps")
            if code.name not in OPCODES:
                raise ValueError(f"opcode {code.name}, which PyTorch neither writes nor reads")
            OPCODES[code.name](self, value)

    def push(self, made: Made) -> None:
        self.stack.append(made)

    def last(self, count: int) -> list[Made]:
        """The topmost, taken off."""
        return [self.stack.pop() for _ in range(count)][::-1]

    def marked(self) -> list[Made]:
        """All above the last mark, taken off."""
        taken, self.stack = self.stack, self.below.pop()
        return taken

    def mark(self, _: object) -> None:
        """MARK."""
        self.below.append(self.stack)
        self.stack = []

    def hold(self, items: list[Made]) -> None:
        """Tuples of these."""
        self.push(Made().take(items).check())

    def fill(self, items: list[Made], keys: list[Made]) -> None:
        """APPENDS, SETITEMS: these into the list or dict below them, which hashes its keys."""
        self.stack[-1].take(items).check()
        self.meet(keys)

    def meet(self, walked: Iterable[Made]) -> None:
        """What PyTorch hashes, copies or may print counts each time."""
        self.met.parts += sum(made.parts for made in walked)
        self.met.check()

    def call(self, _: object) -> None:
        """REDUCE, NEWOBJ: what is called must be a name, for PyTorch prints whatever else it is."""
        called, arguments = self.last(2)
        if called is not NAME:
            raise ValueError("a call of what has no name")
        self.meet([arguments])
        self.push(Made().take([arguments]).check())

    def leave(self, count: int) -> None:
        """BUILD, BINPERSID, STOP: what is read through, and then gone."""
        self.meet(self.last(count))


def _text(scale: Scale, value: str | bytes) -> None:
    scale.push(Made(1 + len(value) // LETTERS, closed=True))


def _set_items(scale: Scale, items: list[Made]) -> None:
    scale.fill(items, items[::2])


def _storage(scale: Scale, _: object) -> None:
    scale.leave(1)
    scale.push(PLAIN)


OPCODES: dict[str, Callable[[Scale, Any], None]] = {
    "PROTO": lambda scale, _: None,
    "STOP": lambda scale, _: scale.leave(1),
    **dict.fromkeys(
        ("NONE", "NEWTRUE", "NEWFALSE", "BININT", "BININT1", "BININT2", "LONG1", "BINFLOAT", "EMPTY_TUPLE"),
        lambda scale, _: scale.push(PLAIN),
    ),
    **dict.fromkeys(("BINUNICODE", "SHORT_BINSTRING"), _text),
    **dict.fromkeys(("EMPTY_LIST", "EMPTY_DICT", "EMPTY_SET"), lambda scale, _: scale.push(Made())),
    "GLOBAL": lambda scale, _: scale.push(NAME),
    "MARK": Scale.mark,
    "TUPLE": lambda scale, _: scale.hold(scale.marked()),
    "TUPLE1": lambda scale, _: scale.hold(scale.last(1)),
    "TUPLE2": lambda scale, _: scale.hold(scale.last(2)),
    "TUPLE3": lambda scale, _: scale.hold(scale.last(3)),
    "APPEND": lambda scale, _: scale.fill(scale.last(1), []),
    "APPENDS": lambda scale, _: scale.fill(scale.marked(), []),
    "SETITEM": lambda scale, _: _set_items(scale, scale.last(2)),
    "SETITEMS": lambda scale, _: _set_items(scale, scale.marked()),
    **dict.fromkeys(("BINPUT", "LONG_BINPUT"), lambda scale, key: scale.aside.update({key: scale.stack[-1]})),
    **dict.fromkeys(("BINGET", "LONG_BINGET"), lambda scale, key: scale.push(scale.aside[key])),
    "REDUCE": Scale.call,
    "NEWOBJ": Scale.call,
    "BUILD": lambda scale, _: scale.leave(1),
    "BINPERSID": _storage,
}
