"""Checkpoints that want to run something when they are read: refused with the reason, and nothing is run.

A hundred of them: kinds of payload x places in a file x formats, pickles written by hand, programs, arrays of objects.
"""

from __future__ import annotations

import argparse
import io
import itertools
import os
import pickle
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from vitrail.weights.load import load_weights
from vitrail.weights.read import CheckpointError, UnsafeCheckpoint


class Payload:
    """Whoever unpickles it makes a folder."""

    def __init__(self, marker: Path) -> None:
        self.marker = str(marker)

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (self.marker,)


class Evaluated(Payload):
    def __reduce__(self) -> tuple[Any, ...]:
        return eval, (f"__import__('os').mkdir({self.marker!r})",)


class Shell(Payload):
    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (f"mkdir {self.marker}",)


class Loaded(Payload):
    """By way of a function of torch, which unpickles the rest."""

    def __reduce__(self) -> tuple[Any, ...]:
        return torch.storage._load_from_bytes, (_saved(Payload(Path(self.marker))),)


class Attribute(Payload):
    """What is then called is got first."""

    def __reduce__(self) -> tuple[Any, ...]:
        return getattr, ("text", "upper")


class Stateful(Payload):
    """Nothing is called but to make it; its state is set."""

    def __reduce__(self) -> tuple[Any, ...]:
        return object.__new__, (Payload,), {"marker": self.marker}


class Pointing:
    """It becomes a persistent id that is no storage."""


class Pointer(pickle.Pickler):
    def persistent_id(self, obj: Any) -> Any:
        return ("module", "os", "system") if isinstance(obj, Pointing) else None


def _saved(content: Any) -> bytes:
    file = io.BytesIO()
    torch.save(content, file)
    return file.getvalue()


def _pointed() -> bytes:
    file = io.BytesIO()
    Pointer(file, protocol=2).dump({"model": Pointing()})
    return file.getvalue()


PAYLOADS = [Payload, Evaluated, Shell, Loaded, Attribute, Stateful]
PLACES: dict[str, Callable[[Any, Any], Any]] = {
    "alone": lambda bad, state: bad,
    "beside the weights": lambda bad, state: {"model": state, "extra": bad},
    "among the weights": lambda bad, state: {**state, "extra": bad},
    "in the optimiser": lambda bad, state: {"model": state, "optimizer": {"state": {0: {"step": bad}}}},
    "in the settings": lambda bad, state: {"model": state, "args": argparse.Namespace(lr=0.1, out=bad)},
}
FORMATS = ("torch", "legacy", "pickle")
WANTED = [
    (Payload, r"posix\.mkdir"),
    (Evaluated, r"builtins\.eval"),
    (Shell, r"posix\.system"),
    (Attribute, r"builtins\.getattr"),
]


def payloads(shop: Any) -> Iterator[tuple[str, Path]]:
    for kind, (where, put), how in itertools.product(PAYLOADS, PLACES.items(), FORMATS):
        bad = kind(shop.place / "ran")
        yield f"{kind.__name__} {where}, {how}", getattr(shop, how)(put(bad, shop.state()))


def handmade(shop: Any) -> Iterator[tuple[str, Path]]:
    """Opcodes that Python's own pickler does not write here."""
    marker = str(shop.place / "ran").encode()
    called = bytes([len(marker)]) + marker
    pickles = {
        "INST": b"(S'" + marker + b"'\nios\nmkdir\n.",
        "a stacked name": b"\x80\x04\x8c\x02os\x8c\x05mkdir\x93\x8c" + called + b"\x85R.",
        "a name of lines and escapes": b"\x80\x02c\x1b[2J\nx\ny\n.",
        "an unknown name": b"\x80\x02cnobody.knows\nthis\n.",
    }
    for what, data in pickles.items():
        yield f"{what}, bare", shop.bytes(data)
        yield f"{what}, in an archive", shop.archive(shop.members() | {"good/data.pkl": data})


def programs(shop: Any) -> Iterator[tuple[str, Path]]:
    members = shop.members()
    yield "TorchScript without a module", shop.archive({"good/code/a.py": b""})
    yield "an exported program's weights", shop.archive(members | {"good/archive_format": b"pt2"})
    file = io.BytesIO()
    torch.export.save(torch.export.export(nn.Linear(2, 2), (torch.zeros(1, 2),)), file)
    yield "an exported program", shop.bytes(file.getvalue(), "m.pt2")
    yield "no weights at all", shop.archive({"read.me": b"hello"})
    np.savez(shop.place / "o.npz", cls_token=np.array([Payload(shop.place / "ran")], dtype=object))
    yield "an array of objects", shop.place / "o.npz"


def broken(shop: Any) -> Iterator[tuple[str, Path]]:
    """Not refused for what they would run, but for what no pickle of weights has."""
    pickles = {
        "an extension": b"\x80\x02\x82\x01.",
        "a persistent id": _pointed(),
        "a state for a dict": b"\x80\x02}}b.",
        "a call of a dict": b"\x80\x02})R.",
        "depth": b"\x80\x02)" + b"\x85" * 100_000 + b".",
        "a memo of nothing": b"\x80\x02h\x05.",
        "more than there is": b"\x80\x02X\xff\xff\xff\x7fabc.",
        "an empty stack": b"\x80\x020000.",
    }
    for what, data in pickles.items():
        yield f"{what}, bare", shop.bytes(data)
        yield f"{what}, in an archive", shop.archive(shop.members() | {"good/data.pkl": data})


@pytest.mark.fault(1, 2, 3, 4, 8)
@pytest.mark.parametrize("group", [payloads, handmade, programs], ids=lambda group: group.__name__)
def test_what_wants_to_run_is_refused_and_not_run(group: Callable[[Any], Iterator[tuple[str, Path]]], shop: Any):
    model, wrong = shop.network(), {}
    for what, path in group(shop):
        with pytest.raises(UnsafeCheckpoint, match=r"could run code; nothing was run|which runs when|pickled objects"):
            load_weights(model, path)
        if found := shop.wrong(model, path):
            wrong[what] = found
    assert wrong == {}
    assert not (shop.place / "ran").exists()


@pytest.mark.fault(1, 2)
def test_a_pickle_that_is_none_is_refused(shop: Any):
    model = shop.network()
    wrong = {what: found for what, path in broken(shop) if (found := shop.wrong(model, path))}
    assert wrong == {}


@pytest.mark.fault(1, 2, 3)
def test_the_error_names_what_it_wanted(shop: Any):
    for kind, name in WANTED:
        with pytest.raises(CheckpointError, match=rf"m\.pth: its pickle wants {name}, which could run"):
            load_weights(shop.network(), shop.torch({"model": kind(shop.place / "ran")}))
    with pytest.raises(
        CheckpointError, match=r"m\.zip: a program \('good/archive_format'\), which runs when it is loa"
    ):
        load_weights(shop.network(), shop.archive(shop.members() | {"good/archive_format": b"pt2"}))


@pytest.mark.parametrize("kind", [Payload, Evaluated, Shell, Loaded], ids=lambda kind: kind.__name__)
def test_the_payloads_go_off(kind: type[Payload], shop: Any):
    """Otherwise the tests above would show nothing."""
    path = shop.torch(PLACES["in the settings"](kind(shop.place / "ran"), {}))
    torch.load(path, weights_only=False)
    assert (shop.place / "ran").is_dir()
