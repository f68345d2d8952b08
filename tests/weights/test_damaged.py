"""Six hundred damaged checkpoints: each one clear error, and nothing half-loaded.

Every group is a function that yields (what was done, the path to load). The hostile ones are in `test_hostile.py`, and
what would fill the memory is in `test_bombs.py`. A flipped bit in safetensors without a manifest is in no group: it
cannot be seen.
"""

from __future__ import annotations

import io
import itertools
import json
import random
import struct
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from vitrail.weights.read import CheckpointError, read_checkpoint

Damage = Iterator[tuple[str, Path]]


# ---- cut and flipped


def cut(shop: Any) -> Damage:
    """At every sixteenth of its length."""
    state = shop.state()
    made = {kind: (file := getattr(shop, kind)(state), file) for kind in shop.formats}
    made["part of an index"] = (shop.shards(state, "one") / "a.safetensors", shop.place / "one")
    made["index"] = (shop.shards(state, "two") / "model.safetensors.index.json", shop.place / "two")
    for name in ("model.safetensors", "config.json"):
        folder = shop.network().save_pretrained(shop.place / name.partition(".")[0])
        made[f"our {name}"] = (folder / name, folder)
    for kind, (file, path) in made.items():
        whole = file.read_bytes()
        for part in range(16):
            file.write_bytes(whole[: len(whole) * part // 16])
            yield f"{kind} cut at {part}/16", path


def flipped(shop: Any) -> Damage:
    """One bit, in a model folder of this package, which has a manifest."""
    folder = shop.network().save_pretrained(shop.place / "ours")
    draw = random.Random(0)
    for name, times in (("model.safetensors", 50), ("config.json", 40)):
        whole = (folder / name).read_bytes()
        for _ in range(times):
            at, bit = draw.randrange(len(whole)), 1 << draw.randrange(8)
            (folder / name).write_bytes(whole[:at] + bytes([whole[at] ^ bit]) + whole[at + 1 :])
            yield f"bit {bit} of byte {at} of {name}", folder
        (folder / name).write_bytes(whole)


# ---- tensors that do not fit

SHAPES: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "twice": lambda x: torch.cat([x, x]),
    "a dimension more": lambda x: x[None, None],
    "nothing": lambda x: x[:0],
    "a number": lambda x: x.flatten()[0],
    "flat and one more": lambda x: torch.cat([x.flatten(), x.flatten()[:1]]),
    "no width": lambda x: x[..., :0],
}
TYPES = [torch.int8, torch.int16, torch.int32, torch.int64, torch.uint8, torch.bool]
SMALL = [torch.float8_e4m3fn, torch.float8_e5m2, torch.complex64]
TENSORS = ["pos_embed", "patch_embed.proj.weight", "blocks.0.attn.qkv.weight", "head.bias"]
FORMATS = ("safetensors", "torch", "npz")


def misshapen(shop: Any) -> Damage:
    state = shop.state()
    for (what, change), name, kind in itertools.product(SHAPES.items(), TENSORS, FORMATS):
        yield f"{name}: {what}", getattr(shop, kind)(state | {name: change(state[name])})


def of_another_type(shop: Any) -> Damage:
    state = shop.state()
    for dtype, name, kind in itertools.product(TYPES, TENSORS, FORMATS):
        yield f"{name} as {dtype}", getattr(shop, kind)(state | {name: state[name].to(dtype)})
    for dtype, name in itertools.product(SMALL, TENSORS):
        yield f"{name} as {dtype}", shop.torch(state | {name: state[name].to(dtype)})


NAMES = ["", " ", "\x1b[2J\x07", "a\nb", "\u202etxt", "x" * 10**6, "model." * 10**5, "nul\0", "é" * 500, "../../etc/x"]


def misnamed(shop: Any) -> Damage:
    state = shop.state()
    for kind, name in itertools.product(("safetensors", "torch"), NAMES):
        yield f"a tensor called {name[:20]!r}", getattr(shop, kind)(state | {name: torch.zeros(1)})
    layer = f"vit.encoder.layer.{'9' * 5000}.attention.attention.query.weight"
    yield "a layer of 5000 digits", shop.torch({layer: torch.zeros(1), "vit.embeddings.cls_token": torch.zeros(1)})
    yield "numbers for names", shop.torch(dict(enumerate(state.values())))
    for name, kind in itertools.product(state, ("safetensors", "torch")):
        lacking = {other: value for other, value in state.items() if other != name}
        yield f"without {name}", getattr(shop, kind)(lacking)
        yield f"{name} under another name", getattr(shop, kind)(lacking | {f"{name}_": state[name]})


def no_weights(shop: Any) -> Damage:
    circle: dict[str, Any] = {"t": torch.zeros(1)}
    circle["model"] = circle
    deep: Any = shop.state()
    for _ in range(50):
        deep = {"model": deep}
    kinds = {
        "a list": [1, 2], "a tensor": torch.zeros(3), "nothing": {}, "text": "weights", "a circle": circle,
        "depth": deep, "two networks": {"net_a": shop.state(), "net_b": shop.state()}, "no tensors": {"optimizer": {}},
    }  # fmt: skip
    for what, content in kinds.items():
        yield what, shop.torch(content)
        yield what, shop.legacy(content)
    bare = (b"", b"\0", b"{}", b"PK\3\4", b"PK\5\6" + bytes(18), b"\x80\2.", b"(lp0\n.", b"<html>", bytes(64))
    for data in bare:
        yield f"{data[:8]!r} alone", shop.bytes(data)
    (shop.place / "empty").mkdir()
    yield "an empty folder", shop.place / "empty"


# ---- headers, indices and arrays


def entry(**changes: Any) -> dict[str, Any]:
    return {"dtype": "F32", "shape": [4], "data_offsets": [0, 16]} | changes


HEADERS: dict[str, Any] = {
    "no JSON": b"{nothing of the kind",
    "a list": [1],
    "no text": b"{\xff\xfe}",
    "outside": {"a": entry(data_offsets=[0, 10**12], shape=[10**12 // 4])},
    "negative": {"a": entry(data_offsets=[-16, 0])},
    "backwards": {"a": entry(data_offsets=[16, 0])},
    "overlapping": {"a": entry(), "b": entry(data_offsets=[8, 24])},
    "a gap": {"a": entry(), "b": entry(data_offsets=[32, 48])},
    "another size": {"a": entry(shape=[5])},
    "a negative side": {"a": entry(shape=[-4])},
    "sides that overflow": {"a": entry(shape=[2**62, 4])},
    "a type that is none": {"a": entry(dtype="F31")},
    "no offsets": {"a": {"dtype": "F32", "shape": [4]}},
    "depth": b'{"a":' + b"[" * 100_000,
    "a tensor of a thousand sides": {"pos_embed": entry(shape=[1] * 1000 + [4])},
}


def with_other_headers(shop: Any) -> Damage:
    for what, header in HEADERS.items():
        text = header if isinstance(header, bytes) else json.dumps(header).encode()
        for data in (16, 64):
            yield f"{what}, {data} bytes", shop.bytes(struct.pack("<Q", len(text)) + text + bytes(data))


PARTS = ("..", ".", "../m.safetensors", "/m.safetensors", "sub/a.safetensors", "", "absent.bin", 5, None, ["a"], "a\0b")
INDICES = ("", "[]", "{}", '{"weight_map": 3}', '{"weight_map": {}}', "[" * 100_000, '{"weight_map": {"a": {}}}')


def with_other_indices(shop: Any) -> Damage:
    folder = shop.shards(shop.state())
    shop.safetensors(shop.state(), "m.safetensors")
    index = folder / "model.safetensors.index.json"
    for name in (*PARTS, index.name, str(shop.place / "m.safetensors")):
        index.write_text(json.dumps({"weight_map": {"cls_token": name}}))
        yield f"a part called {name!r}", folder
    for text in INDICES:
        index.write_text(text)
        yield f"an index of {text[:20]!r}", folder
    index.write_text(json.dumps({"weight_map": {"mine": "a.safetensors"}}))
    yield "a tensor that is not in its part", folder


ARRAYS = {
    "more than there is": "{'descr': '<f4', 'fortran_order': False, 'shape': (1000000,)}",
    "less than there is": "{'descr': '<f4', 'fortran_order': False, 'shape': (1,)}",
    "a negative side": "{'descr': '<f4', 'fortran_order': False, 'shape': (-3,)}",
    "a call": "{'descr': __import__('os').getpid(), 'fortran_order': False, 'shape': (3,)}",
    "objects": "{'descr': '|O', 'fortran_order': False, 'shape': (1,)}",
    "records": "{'descr': [('a', '<f4'), ('b', '|O')], 'fortran_order': False, 'shape': (1,)}",
    "text": "{'descr': '<U3', 'fortran_order': False, 'shape': (1,)}",
    "depth": "(" * 5000,
}


def with_other_members(shop: Any) -> Damage:
    members = shop.members()
    numbers = io.BytesIO()
    np.save(numbers, np.zeros(3, dtype=np.float32))
    for name in ("../../x", "/etc/x", "good/../../x"):
        yield f"an array at {name}", shop.archive({f"{name}.npy": numbers.getvalue()})
        yield f"a record at {name}", shop.archive(members | {name: b""})
    for name in members:
        if name.partition("/")[2].startswith("data"):
            yield f"without {name}", shop.archive({other: members[other] for other in members if other != name})
            yield f"a shorter {name}", shop.archive(members | {name: members[name][:-1]})
    with zipfile.ZipFile(shop.place / "c.pth", "w", zipfile.ZIP_DEFLATED) as made:
        for name, data in members.items():
            made.writestr(name, data)
    yield "a compressed PyTorch file", shop.place / "c.pth"
    for what, header in ARRAYS.items():
        text = header.encode() + b"\n"
        array = b"\x93NUMPY\x02\x00" + struct.pack("<I", len(text)) + text + bytes(12)
        yield f"an array of {what}", shop.archive({"a.npy": array})


GROUPS = [
    cut, flipped, misshapen, of_another_type, misnamed, no_weights, with_other_headers, with_other_indices,
    with_other_members,
]  # fmt: skip


# ---- what must happen


@pytest.mark.fault(5, 6, 8, 9, 10, 12)
@pytest.mark.parametrize("group", GROUPS, ids=lambda group: group.__name__)
def test_each_is_one_clear_error_and_changes_nothing(group: Callable[[Any], Damage], shop: Any):
    model, count = shop.network(), 0
    wrong = {}
    for what, path in group(shop):
        count += 1
        if found := shop.wrong(model, path):
            wrong[what] = found
    assert wrong == {}
    assert count >= 20


@pytest.mark.fault(12)
def test_a_place_outside_is_named(shop: Any):
    for name in ("../../x", "/etc/x", "good/../../x"):
        for path in (shop.archive({f"{name}.npy": b""}), shop.archive(shop.members() | {name: b""}, "m.pth")):
            with pytest.raises(CheckpointError, match=rf"its archive may name no place outside itself; got '{name}"):
                read_checkpoint(path)
    index = shop.shards(shop.state()) / "model.safetensors.index.json"
    index.write_text('{"weight_map": {"cls_token": "../m.safetensors"}}')
    with pytest.raises(CheckpointError, match=r"parts must lie beside their index; got '\.\./m\.safetensors'"):
        read_checkpoint(index)


@pytest.mark.parametrize("kind", ["safetensors", "torch", "legacy", "npz", "small_npz", "shards"])
def test_undamaged_they_load(kind: str, shop: Any):
    """Otherwise every file would be refused."""
    model, state = shop.network(), shop.state()
    assert shop.wrong(model, getattr(shop, kind)(state)) == "loaded"
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
