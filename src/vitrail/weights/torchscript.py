"""The tensors of a TorchScript archive, without TorchScript: nothing of it is compiled, run or looked up.

    name/data.pkl      a pickle: of each module its class and attributes, of each tensor where its numbers lie
    name/data/7        numbers
    name/code/…        what the classes do: never opened

OpenAI's CLIP was published so (Radford et al. 2021). A pickle is a program for a machine with a stack, and opcodes that
call what they name make it dangerous. Here a name stands for a row of a table and for nothing in Python: a class of the
archive becomes a `Module` that holds its attributes, a tensor is a view of numbers that are there. The opcodes are
those that PyTorch writes (`torch/csrc/jit/serialization/pickler.cpp`); at any other the file is refused.
"""

from __future__ import annotations

import pickletools
import zipfile
from collections import deque
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from vitrail.folder import MAX_NAME

OWN_CLASSES = "__torch__"
CODE, CONSTANTS = "code/", "constants.pkl"
"""what is in these archives, and not in one of a state_dict"""
MOST_BYTES = 2_000_000
"""of one pickle: some 100 a tensor, and as many a module"""
MOST_STEPS = 300_000
"""opcodes of one pickle: a tensor takes about 25, a module 40"""
MOST_PARTS = 20_000
"""modules and tensors in one another"""
DTYPES = {
    "torch FloatStorage": torch.float32,
    "torch HalfStorage": torch.float16,
    "torch BFloat16Storage": torch.bfloat16,
    "torch DoubleStorage": torch.float64,
    "torch LongStorage": torch.int64,
    "torch IntStorage": torch.int32,
    "torch ShortStorage": torch.int16,
    "torch CharStorage": torch.int8,
    "torch ByteStorage": torch.uint8,
    "torch BoolStorage": torch.bool,
    "torch ComplexFloatStorage": torch.complex64,
    "torch ComplexDoubleStorage": torch.complex128,
}


class Name(NamedTuple):
    """What a pickle named: text, never what bears the name."""

    text: str


class Module:
    """An object of the archive, whatever its class: what it holds, if that is attributes by their names."""

    def __init__(self) -> None:
        self.attributes: dict[str, Tensor | Module] = {}


def _view(numbers: Tensor, offset: int, size: tuple[int, ...], stride: tuple[int, ...], *_: object) -> Tensor:
    """A tensor of some of a storage's numbers; PyTorch refuses what would lie outside them."""
    return numbers.as_strided(size, stride, offset)


def _nothing(*_: object) -> None:
    """For lists of numbers and devices: settings of programs."""


def _hooks(*_: object) -> dict[str, Any]:
    """For the hooks of a tensor, which a file never has."""
    return {}


CALLS: dict[str, Callable[..., Any]] = {
    "torch._utils _rebuild_tensor_v2": _view,
    "collections OrderedDict": _hooks,
    "torch device": _nothing,
    **{f"torch.jit._pickle build_{kind}list": _nothing for kind in ("int", "double", "bool", "tensor")},
    "torch.jit._pickle restore_type_tag": _nothing,
}
"""all that a pickle may call"""


def inside(name: str) -> str:
    """A member's name in the one folder, called as the file was, in which all of PyTorch's lie."""
    return name.partition("/")[2]


def is_code(name: str) -> bool:
    """Whether a member is what is never opened."""
    return inside(name).startswith(CODE)


def is_known(name: str) -> bool:
    """Whether a pickle of TorchScript may name this: a class of its own, a kind of numbers, or what `CALLS` has."""
    return _is_class(name) or name in DTYPES or name in CALLS


def _is_class(name: str) -> bool:
    return name.partition(" ")[0].partition(".")[0] == OWN_CLASSES


def archive_tensors(archive: zipfile.ZipFile, home: str, pickled: bytes) -> dict[str, Tensor]:
    """Parameters, buffers and other tensors of the module that `home/data.pkl` holds, by their dotted names.

    Raises `ValueError`, `LookupError`, `TypeError` or what `zipfile` and PyTorch raise, for what is not as PyTorch
    writes it: other opcodes, numbers that are not there, a module in itself.
    """
    root = Machine(Numbers(archive, home)).run(pickled)
    if not isinstance(root, Module):
        raise ValueError("its data.pkl holds no module, as TorchScript's does")
    return _flat(root)


def _flat(root: Module) -> dict[str, Tensor]:
    """Tensors by their dotted names, those of outer modules first."""
    found: dict[str, Tensor] = {}
    waiting, parts = deque([("", root)]), 0
    while waiting:
        prefix, module = waiting.popleft()
        for name, value in module.attributes.items():
            whole, parts = prefix + name, parts + 1
            if parts > MOST_PARTS or len(whole) > MAX_NAME:
                raise ValueError(f"modules in one another without end, or more than {MOST_PARTS:,}")
            if isinstance(value, Tensor):
                found[whole] = value
            else:
                waiting.append((f"{whole}.", value))
    return found


class Numbers:
    """The storages of an archive, each read once."""

    def __init__(self, archive: zipfile.ZipFile, home: str) -> None:
        self.archive, self.home = archive, home
        self.read: dict[str, bytearray] = {}

    def __call__(self, place: tuple[Any, ...]) -> Tensor:
        """Of ("storage", kind, key, device, count): the numbers, on the CPU wherever they had been."""
        _, kind, key, _, count = place
        dtype = DTYPES[kind.text]
        if type(key) is not str or type(count) is not int:
            raise ValueError(f"a storage has a text and a count; got {type(key).__name__} and {type(count).__name__}")
        if key not in self.read:
            self.read[key] = bytearray(self.archive.read(f"{self.home}/data/{key}"))
        held = self.read[key]
        if len(held) != count * dtype.itemsize:
            raise ValueError(f"storage {key} needs {count * dtype.itemsize:,} bytes and has {len(held):,}")
        return torch.frombuffer(held, dtype=dtype) if held else torch.empty(0, dtype=dtype)


class Machine:
    """Reads one pickle: a stack, marks in it, and what was set aside under numbers."""

    def __init__(self, numbers: Numbers) -> None:
        self.numbers = numbers
        self.stack: list[Any] = []
        self.marks: list[int] = []
        self.aside: dict[int, Any] = {}

    def run(self, pickled: bytes) -> Any:
        """What it leaves at its end."""
        for step, (code, value, _) in enumerate(pickletools.genops(pickled)):
            if step == MOST_STEPS:
                raise ValueError(f"a pickle of more than {MOST_STEPS:,} steps")
            if code.name not in OPCODES:
                raise ValueError(f"opcode {code.name}, which TorchScript does not write")
            OPCODES[code.name](self, value)
        return self.stack.pop()

    def push(self, value: Any) -> None:
        self.stack.append(value)

    def last(self, count: int) -> tuple[Any, ...]:
        """The topmost values, taken off."""
        if count > len(self.stack):
            raise ValueError("an empty stack")
        taken = tuple(self.stack[len(self.stack) - count :])
        del self.stack[len(self.stack) - count :]
        return taken

    def marked(self) -> tuple[Any, ...]:
        """All above the last mark, taken off."""
        return self.last(len(self.stack) - self.marks.pop())

    def fill(self, _: object) -> None:
        """SETITEMS: names and values into the dict below them.

        What no name bears is a setting, and left out: to hash a tuple of tuples may take forever, or end the process.
        """
        items = self.marked()
        pairs = zip(items[::2], items[1::2], strict=True)
        self.stack[-1].update((name, value) for name, value in pairs if isinstance(name, str))

    def keep_nothing(self, _: object) -> None:
        """APPENDS: a list stays empty, for lists are settings."""
        self.marked()

    def make(self, _: object) -> None:
        """NEWOBJ: a module, whatever its class."""
        kind, _ = self.last(2)
        if not _is_class(kind.text):
            raise ValueError(f"{kind.text} is no class of the archive")
        self.push(Module())

    def build(self, _: object) -> None:
        """BUILD: its state into the module below it. What the class itself would do with it is never asked."""
        (state,) = self.last(1)
        if not isinstance(self.stack[-1], Module):
            raise ValueError(f"a state for {type(self.stack[-1]).__name__}")
        held = state.items() if isinstance(state, dict) else ()
        self.stack[-1].attributes = {
            name: value for name, value in held if isinstance(name, str) and isinstance(value, Tensor | Module)
        }

    def call(self, _: object) -> None:
        """REDUCE: one of `CALLS`; of a class of the archive a value of an enumeration, which is a setting."""
        name, arguments = self.last(2)
        self.push(None if _is_class(name.text) else CALLS[name.text](*arguments))


OPCODES: dict[str, Callable[[Machine, Any], None]] = {
    "PROTO": lambda machine, _: None,
    "STOP": lambda machine, _: None,
    **dict.fromkeys(("BININT", "BININT1", "BININT2", "LONG1", "BINFLOAT", "BINUNICODE"), Machine.push),
    "NONE": lambda machine, _: machine.push(None),
    "NEWTRUE": lambda machine, _: machine.push(True),
    "NEWFALSE": lambda machine, _: machine.push(False),
    "EMPTY_TUPLE": lambda machine, _: machine.push(()),
    "EMPTY_LIST": lambda machine, _: machine.push([]),
    "EMPTY_DICT": lambda machine, _: machine.push({}),
    "MARK": lambda machine, _: machine.marks.append(len(machine.stack)),
    "TUPLE": lambda machine, _: machine.push(machine.marked()),
    "TUPLE1": lambda machine, _: machine.push(machine.last(1)),
    "TUPLE2": lambda machine, _: machine.push(machine.last(2)),
    "TUPLE3": lambda machine, _: machine.push(machine.last(3)),
    "APPENDS": Machine.keep_nothing,
    "SETITEMS": Machine.fill,
    **dict.fromkeys(("BINPUT", "LONG_BINPUT"), lambda machine, key: machine.aside.update({key: machine.stack[-1]})),
    **dict.fromkeys(("BINGET", "LONG_BINGET"), lambda machine, key: machine.push(machine.aside[key])),
    "GLOBAL": lambda machine, text: machine.push(Name(text)),
    "NEWOBJ": Machine.make,
    "BUILD": Machine.build,
    "REDUCE": Machine.call,
    "BINPERSID": lambda machine, _: machine.push(machine.numbers(*machine.last(1))),
}
