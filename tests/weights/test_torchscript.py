"""Archives of TorchScript: their tensors are read, what they would run is not, and what lies is refused."""

from __future__ import annotations

import struct
import warnings
import zipfile
from collections.abc import Callable, Iterator
from enum import Enum
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from vitrail.models.registry import build_model
from vitrail.weights.load import create_model
from vitrail.weights.read import CheckpointError, UnsafeCheckpoint, read_checkpoint
from vitrail.weights.torchscript import DTYPES, MOST_PARTS, MOST_STEPS


def by_pytorch(path: Path) -> dict[str, Tensor]:
    """What TorchScript itself makes of a file."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        return dict(torch.jit.load(path).state_dict())


def members_of(path: Path) -> dict[str, bytes]:
    with zipfile.ZipFile(path) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


# ---- what is whole


def test_an_archive_finds_its_network(shop: Any):
    path = shop.torchscript(build_model("vit_debug").state_dict())
    assert create_model(f"local-dir:{path}", pretrained=True).variant == "vit_debug"


class Settled(nn.Module):
    """What else modules hold: settings of every kind, lists, and a list of tensors."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 2)
        self.number, self.text, self.share, self.switch = 3, "gelu", 0.5, True
        self.sizes, self.shares = [1, 2], [0.5]
        self.either, self.table = (1, "a"), {"a": 1}
        self.others = [torch.ones(1)]
        self.device = torch.device("cpu")
        self.layers = nn.ModuleList([nn.Linear(2, 2), nn.BatchNorm1d(2)])
        self.tied = self.layers[0]

    def forward(self, x: Tensor) -> Tensor:
        n = self.number + len(self.text) + len(self.sizes) + len(self.shares) + len(self.table) + len(self.others)
        if self.switch and self.either[0] > 0 and self.device == x.device:
            n += int(self.share)
        for layer in self.layers:
            x = layer(x)
        return self.tied(x) * n + self.conv.weight.sum()


def test_settings_are_left_out_and_shared_weights_stand_under_both_names(shop: Any):
    path = shop.torchscript(Settled())
    found, expected = read_checkpoint(path).tensors, by_pytorch(path)
    assert found.keys() == expected.keys() and {"tied.weight", "layers.0.weight"} <= found.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)


class Order(Enum):
    """A setting, as timm's networks have one for the order of an image's dimensions."""

    CHANNELS_FIRST = "NCHW"


class Ordered(nn.Linear):
    """A layer with such a setting."""

    def __init__(self) -> None:
        super().__init__(3, 2)
        self.order = Order.CHANNELS_FIRST


def test_values_of_an_enumeration_are_settings(shop: Any):
    path = shop.torchscript(Ordered())
    found, expected = read_checkpoint(path).tensors, by_pytorch(path)
    assert found.keys() == expected.keys() == {"weight", "bias"}
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_every_kind_of_number_and_of_view_is_what_pytorch_reads(shop: Any):
    module = nn.Identity()
    for number, dtype in enumerate(DTYPES.values()):
        module.register_buffer(f"b{number}", torch.arange(2, 14).to(dtype).reshape(3, 4))
    module.register_buffer("turned", module.b0.T)
    module.register_buffer("part", module.b0[1:, 1:])
    module.register_buffer("none", torch.empty(0, 3))
    module.register_buffer("one", torch.tensor(7))
    path = shop.torchscript(module)
    with pytest.raises(CheckpointError, match=r"'b\d+' must be a plain tensor of real numbers; got torch\.complex"):
        read_checkpoint(path)
    for number, dtype in enumerate(DTYPES.values()):
        if dtype.is_complex:
            del module._buffers[f"b{number}"]
    found, expected = read_checkpoint(shop.torchscript(module)).tensors, by_pytorch(path)
    assert found.keys() == expected.keys() and len(found) == len(DTYPES) + 2
    for name, value in expected.items():
        assert torch.equal(found[name], value) and found[name].dtype == value.dtype, name
        assert found[name].stride() == value.stride(), name


def test_entries_of_a_dict_that_no_name_bears_are_settings(shop: Any):
    value = tensor("0", 4, (4,))
    pickled = b"c__torch__\nM\n)\x81}(" + number(3) + value + numbers(1, 2) + value + text("weight") + value + b"ub"
    assert set(read_checkpoint(shop.archive(archive(b"", pickled))).tensors) == {"weight"}


def test_numbers_that_lay_on_a_gpu_lie_on_the_cpu(shop: Any):
    path = shop.archive(archive(tensor("0", 4, (4,), device="cuda:0")))
    assert read_checkpoint(path).tensors["weight"].device.type == "cpu"


def test_a_frozen_archive_has_no_weights_and_says_why(shop: Any):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        module = torch.jit.freeze(torch.jit.script(nn.Sequential(nn.Linear(2, 2)).eval()))
        torch.jit.save(module, shop.place / "f.pt")
    with pytest.raises(
        CheckpointError, match=r"f\.pt: weights are param.*torch\.jit\.freeze.*: save it before it is f"
    ):
        read_checkpoint(shop.place / "f.pt")


# ---- what would run


class Loud(nn.Module):
    """Says so when it is loaded, and refuses."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(2))
        self.training = False

    def forward(self, x: Tensor) -> Tensor:
        return x * self.weight

    @torch.jit.export
    def __getstate__(self) -> tuple[Tensor, bool]:
        return self.weight, self.training

    @torch.jit.export
    def __setstate__(self, state: tuple[Tensor, bool]) -> None:
        print("code is run")
        raise RuntimeError("code is run")


class Quiet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.loud = Loud()
        self.norm = nn.LayerNorm(2)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.loud(x))


@pytest.mark.fault(1, 3)
def test_what_an_archive_would_run_when_it_is_loaded_is_not_run(shop: Any, capfd: pytest.CaptureFixture[str]):
    path = shop.torchscript(Quiet())
    assert set(read_checkpoint(path).tensors) == {"norm.weight", "norm.bias"}
    assert "code is run" not in "".join(capfd.readouterr())
    with pytest.raises(torch.jit.Error, match="code is run"):
        by_pytorch(path)  # otherwise this would show nothing


@pytest.mark.fault(1, 3)
def test_the_code_of_an_archive_is_never_opened(shop: Any):
    members = members_of(shop.torchscript(nn.LayerNorm(2), "good.pt"))
    code = {name: b"\xff no program" for name in members if "/code/" in name}
    assert len(code) >= 1
    path = shop.archive(members | code)
    assert set(read_checkpoint(path).tensors) == {"weight", "bias"}
    with pytest.raises(RuntimeError):
        by_pytorch(path)


# ---- archives by hand


def number(value: int) -> bytes:
    return b"J" + struct.pack("<i", value)


def numbers(*values: int) -> bytes:
    return b"(" + b"".join(map(number, values)) + b"t"


def text(value: str) -> bytes:
    return b"X" + struct.pack("<I", len(value)) + value.encode()


def called(name: str, arguments: bytes) -> bytes:
    return b"c" + name.replace(" ", "\n").encode() + b"\n" + arguments + b"R"


def tensor(
    key: str, count: int, size: tuple[int, ...], stride: tuple[int, ...] = (1,), offset: int = 0,
    kind: str = "torch\nFloatStorage", device: str = "cpu",
) -> bytes:  # fmt: skip
    place = b"(" + text("storage") + b"c" + kind.encode() + b"\n" + text(key) + text(device) + number(count) + b"tQ"
    hooks = called("collections OrderedDict", b")")
    arguments = b"(" + place + number(offset) + numbers(*size) + numbers(*stride) + b"\x89" + hooks + b"t"
    return called("torch._utils _rebuild_tensor_v2", arguments)


def module(*items: bytes, kind: str = "__torch__ M") -> bytes:
    """A module with attributes, names and values in turn."""
    return b"c" + kind.replace(" ", "\n").encode() + b"\n)\x81}(" + b"".join(items) + b"ub"


def archive(value: bytes, pickled: bytes | None = None) -> dict[str, bytes]:
    """Members of an archive whose one module has the attribute `weight`; four numbers are there."""
    whole = module(text("weight"), value) if pickled is None else pickled
    return {
        "m/data.pkl": b"\x80\x02" + whole + b".",
        "m/data/0": bytes(16),
        "m/constants.pkl": b"\x80\x02).",
        "m/code/a": b"",
    }


def test_an_archive_made_by_hand_is_read(shop: Any):
    """Otherwise the tests below would show nothing."""
    found = read_checkpoint(shop.archive(archive(tensor("0", 4, (2, 2), (2, 1)))))
    assert found.kind == "torchscript" and torch.equal(found.tensors["weight"], torch.zeros(2, 2))


def inside_itself(*items: bytes) -> bytes:
    return b"c__torch__\nM\n)\x81q\x00}(" + text("a") + b"h\x00" + b"".join(items) + b"ub"


def doubling() -> bytes:
    """Each of fifty modules holds the one before it twice: 2^50 names for one tensor."""
    made = module(text("weight"), tensor("0", 4, (4,))) + b"q\x00"
    for level in range(1, 50):
        below = b"h" + bytes([level - 1])
        made += module(text("a"), below, text("b"), below) + b"q" + bytes([level])
    return made


def deep() -> bytes:
    return (b"c__torch__\nM\n)\x81}(" + text("a")) * 5000 + tensor("0", 4, (4,)) + b"ub" * 5000


def many_parts() -> Iterator[bytes]:
    yield text("a") + b"c__torch__\nM\n)\x81q\x00"
    yield from (text(str(part)) + b"h\x00" for part in range(MOST_PARTS))


def text_for_numbers() -> bytes:
    return b"(" + text("0") + number(0) + numbers() + numbers() + b"t"


WRONG: dict[str, tuple[bytes | None, bytes | None, str]] = {
    "fewer numbers than said": (tensor("0", 5, (5,)), None, "storage 0 needs 20 bytes and has 16"),
    "more numbers than said": (tensor("0", 3, (3,)), None, "storage 0 needs 12 bytes and has 16"),
    "a negative count": (tensor("0", -4, (4,)), None, "storage 0 needs -16 bytes and has 16"),
    "numbers that are not there": (tensor("1", 4, (4,)), None, "no item named .*m/data/1"),
    "numbers elsewhere": (tensor("../../etc/passwd", 4, (4,)), None, "no item named .*etc/passwd"),
    "a view past its end": (tensor("0", 4, (3,), offset=2), None, "setStorage: sizes"),
    "a view before its start": (tensor("0", 4, (3,), offset=-1), None, "offset"),
    "a negative side": (tensor("0", 4, (-3,)), None, "Storage size calculation"),
    "a negative stride": (tensor("0", 4, (2,), (-1,)), None, "Negative stride"),
    "sides that overflow": (tensor("0", 4, (2**31 - 1,) * 4, (0,) * 4), None, "overflow"),
    "one number as terabytes": (tensor("0", 4, (10**6, 10**6), (0, 0)), None, "is larger than its memory"),
    "no module": (None, b"}", "holds no module"),
    "a tensor": (None, tensor("0", 4, (4,)), "holds no module"),
    "an end without a value": (None, b"", "pop from empty list"),
    "a module in itself": (None, inside_itself(), "without end"),
    "a module in itself, widely": (None, inside_itself(*(text(str(i)) + b"h\x00" for i in range(500))), "without end"),
    "doubling modules": (None, doubling(), "without end"),
    "depth": (None, deep(), "without end"),
    "more parts than any network": (None, module(*many_parts()), "or more than 20,000"),
    "a long name": (None, module(text("x" * 2000), tensor("0", 4, (4,))), "without end"),
    "more steps than any network": (None, b"N" * (MOST_STEPS + 1), "more than 300,000 steps"),
    "an opcode of Python's": (None, module() + b"0", "opcode POP, which TorchScript does not write"),
    "depth of tuples": (None, b")" + b"\x85" * 100_000, "holds no module"),
    "a state for a list": (None, b"]}b", "a state for list"),
    "a state for nothing": (None, b"}b", "list index out of range"),
    "a name without its value": (None, b"}(" + text("a") + b"u", "shorter"),
    "a memo of nothing": (None, b"h\x07", "7"),
    "no mark": (None, module() + b"t", "pop from empty list"),
    "an empty stack": (None, b"\x87", "an empty stack"),
    "a call of a class": (None, called("__torch__ M", b")"), "its data.pkl holds no module"),
    "a call of numbers": (None, called("torch FloatStorage", b")"), "torch FloatStorage"),
    "a module of numbers": (None, module(kind="torch FloatStorage"), "torch FloatStorage is no class of the archive"),
    "numbers of a class": (tensor("0", 4, (4,), kind="__torch__\nM"), None, "__torch__ M"),
    "a number's name": (tensor("0", 4, (4,)).replace(text("0"), number(0)), None, "a text and a count; got int and in"),
    "a text for a count": (tensor("0", 4, (4,)).replace(number(4) + b"tQ", text("4") + b"tQ"), None, "got str and str"),
    "a text for numbers": (called("torch._utils _rebuild_tensor_v2", text_for_numbers()), None, "as_strided"),
    "bytes of a number": (None, b"\x96" + struct.pack("<Q", 2 * 10**9), "expected 2000000000 bytes"),
}  # fmt: skip


@pytest.mark.fault(5, 12)
@pytest.mark.parametrize("what", WRONG)
def test_what_is_not_as_pytorch_writes_it_is_one_clear_error(what: str, shop: Any):
    value, pickled, reason = WRONG[what]
    path = shop.archive(archive(value or b"", pickled))
    with pytest.raises(CheckpointError, match=reason):
        read_checkpoint(path)
    assert shop.wrong(shop.network(), path) == ""


NAMES = {
    "posix system": "a command",
    "builtins eval": "an expression",
    "builtins getattr": "an attribute",
    "torch.jit _load": "a function of torch",
    "torch._utils _rebuild_qtensor": "quantised numbers",
    "torch QInt8Storage": "quantised storage",
    "torch._utils _rebuild_tensor_v3": "another way to make tensors",
    "argparse Namespace": "what others' settings are",
    "__torch__evil M": "a module of a like name",
}


@pytest.mark.fault(1, 4)
@pytest.mark.parametrize("name", NAMES)
def test_a_name_that_is_not_listed_is_refused_and_told(name: str, shop: Any):
    for pickled in (called(name, text("true") + b"\x85"), module(text("a"), called(name, b")")), module(kind=name)):
        path = shop.archive(archive(b"", pickled))
        told = name.replace(" ", r"\.")
        with pytest.raises(UnsafeCheckpoint, match=rf"m\.zip: its pickle wants {told}, which could run code; nothing"):
            read_checkpoint(path)


@pytest.mark.fault(1, 4)
@pytest.mark.parametrize("opcodes", [b"\x8c\x05posix\x8c\x06system\x93", b"(S'true'\niposix\nsystem\n"])
def test_an_opcode_that_names_otherwise_is_refused_too(opcodes: bytes, shop: Any):
    path = shop.archive(archive(b"", opcodes + text("true") + b"\x85R"))
    with pytest.raises(UnsafeCheckpoint, match=r"its pickle wants posix\.system"):
        read_checkpoint(path)


# ---- damage


def cut(whole: bytes) -> Iterator[tuple[str, bytes]]:
    for part in range(32):
        yield f"cut at {part}/32", whole[: len(whole) * part // 32]


def flipped(whole: bytes) -> Iterator[tuple[str, bytes]]:
    """One bit of what is read: of the pickle and of the numbers."""
    starts = [whole.index(b"\x80\x02c__torch__"), whole.index(b"\xcd\xab\xcd\xab")]
    for start in starts:
        for at in range(start, start + 64):
            yield f"bit of byte {at}", whole[:at] + bytes([whole[at] ^ 1 << at % 8]) + whole[at + 1 :]


@pytest.mark.fault(5, 6)
@pytest.mark.parametrize("damage", [cut, flipped])
def test_a_damaged_archive_is_one_clear_error(damage: Callable[[bytes], Iterator[tuple[str, bytes]]], shop: Any):
    state = shop.state() | {"head.bias": torch.frombuffer(bytearray(b"\xcd\xab" * 32), dtype=torch.float32)}
    model, wrong = shop.network(num_classes=16), {}
    state |= {"head.weight": torch.zeros(16, 12)}
    path = shop.torchscript(state)
    assert shop.wrong(model, path) == "loaded"
    for what, data in damage(path.read_bytes()):
        if found := shop.wrong(model, shop.bytes(data, "damaged.pt")):
            wrong[what] = found
    assert wrong == {}


@pytest.mark.fault(12)
def test_an_archive_that_is_packed_otherwise_is_refused(shop: Any):
    good = archive(tensor("0", 4, (4,)))
    for name, reason in (("m/data.pkl", "not compressed"), ("m/data/0", "not compressed")):
        with zipfile.ZipFile(shop.place / "c.pt", "w") as made:
            for member, data in good.items():
                made.writestr(member, data, zipfile.ZIP_DEFLATED if member == name else zipfile.ZIP_STORED)
        with pytest.raises(CheckpointError, match=reason):
            read_checkpoint(shop.place / "c.pt")
    with pytest.raises(CheckpointError, match=r"no place outside itself; got '/m/x'"):
        read_checkpoint(shop.archive(good | {"/m/x": b""}))
    with pytest.raises(CheckpointError, match="too many values"):
        read_checkpoint(shop.archive(good | {"n/data.pkl": good["m/data.pkl"]}))
    with pytest.raises(CheckpointError, match=r"a pickle of names and settings has at most 2,000,000 bytes; got 2,1"):
        read_checkpoint(shop.archive(archive(b"", b"N" * 2_100_000)))


def test_code_may_be_compressed_and_is_not_counted(shop: Any):
    with zipfile.ZipFile(shop.place / "c.pt", "w") as made:
        for member, data in archive(tensor("0", 4, (4,))).items():
            made.writestr(member, data)
        made.writestr("m/code/much.py", bytes(10**6), zipfile.ZIP_DEFLATED)
    assert set(read_checkpoint(shop.place / "c.pt").tensors) == {"weight"}


@pytest.mark.fault(3)
def test_an_exported_program_is_refused_whatever_stands_beside_it(shop: Any):
    path = shop.archive(archive(tensor("0", 4, (4,))) | {"m/archive_format": b"pt2"})
    with pytest.raises(UnsafeCheckpoint, match=r"a program \('m/archive_format'\), which runs when it is loaded"):
        read_checkpoint(path)
