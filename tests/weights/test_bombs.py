"""Small files that would fill the memory, crash the process or keep it forever: refused, each tried in one of its own.

What would fill the memory is refused within 50 MB and a second.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import resource
import struct
import time
import zipfile
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

GIGA = 2 * 10**9
"""what each would take: enough to be seen, little enough to survive"""
MOST_BYTES, MOST_SECONDS = 50 * 10**6, 2.0  # of a processor that others may share; what is not refused takes minutes
PATIENCE = 60
"""seconds for a process to answer"""


def header(size: int, text: bytes = b"{") -> Callable[[Any], Path]:
    return lambda shop: shop.bytes(struct.pack("<Q", size) + text)


def many_names(shop: Any) -> Path:
    entry = {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]}
    text = json.dumps({str(number): entry for number in range(300_000)}).encode()
    return shop.bytes(struct.pack("<Q", len(text)) + text)


def pickled(*opcodes: bytes) -> Callable[[Any], Path]:
    return lambda shop: shop.archive(shop.members() | {"good/data.pkl": b"\x80\x02" + b"".join(opcodes) + b"."})


def number(value: int) -> bytes:
    return b"J" + struct.pack("<i", value)


def text(value: str) -> bytes:
    return b"X" + struct.pack("<I", len(value)) + value.encode()


def numpy_of(kind: str) -> bytes:
    """A numpy number of so many bytes, as old training scripts keep their best accuracy."""
    made = b"cnumpy\ndtype\n" + text(kind) + b"\x85R"
    return b"cnumpy.core.multiarray\nscalar\n" + made + b"\x85R"


def legacy_of_much(shop: Any) -> Path:
    """A storage that says of itself that it is larger than the file."""
    path = shop.legacy({"cls_token": torch.zeros(1000)})
    data = path.read_bytes()
    many = number(GIGA // 4)
    return shop.bytes(data.replace(b"M\xe8\x03", many).replace(struct.pack("<q", 1000), struct.pack("<q", GIGA // 4)))


def deflated(member: str) -> Callable[[Any], Path]:
    """Zeros, a thousand times smaller in the file."""

    def write(shop: Any) -> Path:
        array = {"descr": "<f4", "fortran_order": False, "shape": (GIGA // 40,)}
        with zipfile.ZipFile(shop.place / "m.zip", "w", zipfile.ZIP_DEFLATED) as made, made.open(member, "w") as file:
            np.lib.format.write_array_header_1_0(file, array)
            for _ in range(GIGA // 10**7):
                file.write(bytes(10**6))
        return shop.place / "m.zip"

    return write


def overlapping(shop: Any) -> Path:
    """A thousand arrays, all of them the same megabyte of the file."""
    path = shop.npz({"x": torch.rand(250_000)})
    with zipfile.ZipFile(path, "a") as made:
        (first,) = made.infolist()
        for copy in range(1000):
            again = zipfile.ZipInfo(f"{copy}.npy")
            for name in ("CRC", "compress_size", "file_size", "header_offset", "create_system"):
                setattr(again, name, getattr(first, name))
            made.filelist.append(again)
        made._didModify = True
    return path


def expanded(shop: Any) -> Path:
    return shop.torch(shop.state() | {"cls_token": torch.zeros(1).expand(10**6, 10**6)})


def no_width(shop: Any) -> Path:
    """Kernels without a channel, for patches whose resizing would take terabytes."""
    kernel = torch.zeros(12, 0, 20_000, 20_000)
    return shop.safetensors(shop.state() | {"patch_embed.proj.weight": kernel})


def wide(shop: Any) -> Path:
    return shop.safetensors(shop.state() | {"patch_embed.proj.weight": torch.zeros(12, 0, 200, 200)})


def module(*opcodes: bytes) -> Callable[[Any], Path]:
    """An archive of TorchScript, with a pickle by hand."""
    made = b"\x80\x02" + b"".join(opcodes) + b"."
    return lambda shop: shop.archive({"m/data.pkl": made, "m/data/0": bytes(16), "m/constants.pkl": b"\x80\x02)."})


def in_itself(names: int) -> bytes:
    return b"c__torch__\nM\n)\x81q\x00}(" + b"".join(text(f"{'x' * 80}{i}") + b"h\x00" for i in range(names)) + b"ub"


def packed_module(shop: Any) -> Path:
    with zipfile.ZipFile(shop.place / "m.pt", "w", zipfile.ZIP_DEFLATED) as made:
        made.writestr("m/constants.pkl", b"\x80\x02).")
        made.writestr("m/data.pkl", b"\x80\x02}.")
        with made.open("m/data/0", "w") as file:
            for _ in range(GIGA // 10**7):
                file.write(bytes(10**6))
    return shop.place / "m.pt"


def of_a_thousand(shop: Any, keys: list[int]) -> Path:
    """A module of a thousand tensors, each of a megabyte, and one megabyte."""
    made = b"\x80\x02c__torch__\nM\n)\x81}("
    for name, key in enumerate(keys):
        place = (
            b"(" + text("storage") + b"ctorch\nFloatStorage\n" + text(str(key)) + text("cpu") + number(250_000) + b"tQ"
        )
        sizes = number(0) + b"(" + number(250_000) + b"t(" + number(1) + b"t\x89ccollections\nOrderedDict\n)R"
        made += text(str(name)) + b"ctorch._utils\n_rebuild_tensor_v2\n(" + place + sizes + b"tR"
    return shop.archive({"m/data.pkl": made + b"ub.", "m/data/0": bytes(10**6), "m/constants.pkl": b"\x80\x02)."})


def one_storage_for_many(shop: Any) -> Path:
    return of_a_thousand(shop, [0] * 1000)


def one_storage_often(shop: Any) -> Path:
    """A thousand members, all of them the same megabyte of the file."""
    path = of_a_thousand(shop, list(range(1000)))
    with zipfile.ZipFile(path, "a") as made:
        first = made.getinfo("m/data/0")
        for copy in range(1, 1000):
            again = zipfile.ZipInfo(f"m/data/{copy}")
            for name in ("CRC", "compress_size", "file_size", "header_offset", "create_system"):
                setattr(again, name, getattr(first, name))
            made.filelist.append(again)
        made._didModify = True
    return path


def long_index(shop: Any) -> Path:
    folder = shop.shards(shop.state())
    (folder / "model.safetensors.index.json").write_bytes(b"[" * 40_000_000)
    return folder


BOMBS: dict[str, Callable[[Any], Path]] = {
    "a header of 10^15 bytes": header(10**15),
    "a header of 2^63 bytes": header(2**63),
    "a header of 2^64 - 1 bytes": header(2**64 - 1),
    "a header of more than the file": header(5 * 10**6, b'{"a": 3}'),
    "300 000 names": many_names,
    "bytes of a number": pickled(b"cbuiltins\nbytearray\n", number(GIGA), b"\x85R"),
    "bytes of a number, by an older name": pickled(b"c__builtin__\nbytearray\n", number(GIGA), b"\x85R"),
    "a numpy number": pickled(numpy_of(f"V{GIGA}")),
    "a storage": legacy_of_much,
    "a long pickle": pickled(b"N0" * 5_000_000, b"N"),
    "an array of zeros": deflated("a.npy"),
    "zeros for PyTorch": deflated("m/data.pkl"),
    "one array a thousand times": overlapping,
    "one number as terabytes": expanded,
    "kernels of huge patches": no_width,
    "kernels of large patches": wide,
    "a long index": long_index,
    "a module in itself": module(in_itself(1)),
    "a module in itself, under many names": module(in_itself(15_000)),
    "a module of two million dicts": module(b"}" * 1_900_000),
    "a module of half a million lists": module(b"]0" * 900_000),
    "bytes of a module": module(b"\x96" + struct.pack("<Q", GIGA)),
    "an integer of a module": module(b"\x8b" + struct.pack("<i", GIGA)),
    "a memo of a module": module(b"Nr" + struct.pack("<I", 2**32 - 1)),
    "zeros for a module": packed_module,
    "one storage a thousand times": one_storage_often,
    "one storage for a thousand tensors": one_storage_for_many,
}


# ---- what nests without end, or doubles

DEEP = b")" + b"\x85" * 250_000
"""tuples in one another: hashing them calls itself until the stack is full"""


def doubled(times: int, pair: bytes = b"\x86") -> bytes:
    """t = (t, t), so many times: 2^n parts. It lies under number `times`; the stack holds the others too."""
    below = (b"h" + bytes([level]) for level in range(times))
    return b")q\x00" + b"".join(t + t + pair + b"q" + bytes([level]) for level, t in enumerate(below, 1))


def lists(times: int) -> bytes:
    """Lists in lists, each filled with the one below it, twice, once the one above has it: 2^n when printed."""
    made = b"".join(b"]q" + bytes([level]) for level in range(times + 1))
    fills = (b"h" + bytes([level]) + b"(" + (b"h" + bytes([level - 1])) * 2 + b"e" for level in range(times, 0, -1))
    return made + b"".join(fills)


SIXTY = doubled(60)
TOP = b"h" + bytes([60])
STORAGE = b"(" + text("storage") + b"ctorch\nFloatStorage\n%b" + text("cpu") + number(4) + b"tQ"
ENDLESS: dict[str, bytes] = {
    "a deep key": b"}(" + DEEP + b"Nu",
    "a deep key alone": b"}" + DEEP + b"Ns",
    "a doubled key": SIXTY + b"}(" + TOP + b"Nu",
    "a doubled key alone": SIXTY + b"}" + TOP + b"Ns",
    "a doubled key of threes": doubled(60, b"N\x87") + b"}(" + TOP + b"Nu",
    "a deep name of numbers": STORAGE % DEEP,
    "doubled names of numbers": SIXTY + STORAGE % TOP,
    "a deep one of a set": b"cbuiltins\nset\n](" + DEEP + b"e\x85R",
    "a doubled one of a set": SIXTY + b"cbuiltins\nset\n](" + TOP + b"e\x85R",
    "a doubled one of an ordered dict": SIXTY + b"ccollections\nOrderedDict\n](" + TOP + b"N\x86e\x85R",
    "a doubled function": SIXTY + TOP + b")R",
    "a doubled class": SIXTY + TOP + b")\x81",
    "a doubled layout": SIXTY + b"ctorch._utils\n_rebuild_sparse_tensor\n" + TOP + b"N\x86R",
    "a scheme of lists": lists(60) + b"ctorch._utils\n_rebuild_qtensor\n(NNNN" + TOP + b"\x85NNtR",
    "a long text copied often": (
        b"c_codecs\nencode\nq\x00" + text("x" * 10**6) + text("latin1") + b"\x86q\x01" + b"h\x00h\x01R" * 50_000
    ),
    "a long list copied often": (
        b"ccollections\nOrderedDict\nq\x00](" + b"".join(number(n) + b"N\x86" for n in range(50_000)) + b"e\x85q\x01"
        + b"h\x00h\x01R" * 50_000
    ),
}  # fmt: skip
KINDS: dict[str, Callable[[Any, bytes], Path]] = {
    "an archive": lambda shop, made: pickled(made)(shop),
    "bare": lambda shop, made: shop.bytes(b"\x80\x02" + made + b"."),
    "TorchScript": lambda shop, made: module(made)(shop),
}


def tried(shop: Any, path: Path, answers: Connection) -> None:
    model = shop.network()
    before = int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    begun = time.process_time()
    wrong = shop.wrong(model, path)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    answers.send((wrong, peak - before, time.process_time() - begun))


def in_a_fork(shop: Any, path: Path) -> tuple[str, int, float]:
    here, there = multiprocessing.Pipe(duplex=False)
    process = multiprocessing.get_context("fork").Process(target=tried, args=(shop, path, there))
    process.start()
    there.close()
    try:
        assert here.poll(PATIENCE), "no answer"
        return here.recv()  # of a process that crashed, the end of the file
    finally:
        process.kill()
        process.join()


@pytest.fixture(autouse=True)
def warm(shop: Any) -> None:
    """What the first load of a process imports is not what a file takes."""
    assert shop.wrong(shop.network(), shop.safetensors(shop.state(), "good.safetensors")) == "loaded"


@pytest.mark.fault(7)
@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="needs Linux to ask for the memory in use")
@pytest.mark.parametrize("what", BOMBS)
def test_it_is_refused_at_once(what: str, shop: Any):
    wrong, grown, seconds = in_a_fork(shop, BOMBS[what](shop))
    assert wrong == ""
    assert grown < MOST_BYTES, f"{grown:,} bytes"
    assert seconds < MOST_SECONDS


@pytest.mark.fault(56)
@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="needs Linux to ask for the memory in use")
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("what", ENDLESS)
def test_what_nests_without_end_is_refused_and_the_process_lives(what: str, kind: str, shop: Any):
    wrong, grown, _ = in_a_fork(shop, KINDS[kind](shop, ENDLESS[what]))
    assert wrong == ""
    assert grown < 4 * MOST_BYTES, f"{grown:,} bytes"


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="needs Linux to ask for the memory in use")
def test_memory_that_is_used_is_seen(shop: Any, monkeypatch: pytest.MonkeyPatch):
    """Otherwise the test above would show nothing."""
    monkeypatch.setattr(type(shop), "wrong", lambda *_: bytes(10**8).hex()[:3])
    wrong, grown, _ = in_a_fork(shop, shop.place)
    assert wrong == "000" and grown > 10**8
