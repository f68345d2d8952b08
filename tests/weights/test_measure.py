"""What a pickle makes is measured before it is made: what is written by PyTorch passes, what has no end does not."""

from __future__ import annotations

import io
import pickle
import random
import struct
from collections import Counter, OrderedDict, defaultdict
from typing import Any

import numpy as np
import pytest
import torch

from vitrail.weights.measure import MOST_DEPTH, MOST_STEPS, OPCODES, Scale
from vitrail.weights.read import CheckpointError, read_checkpoint


def text(value: str) -> bytes:
    return b"X" + struct.pack("<I", len(value)) + value.encode()


def weighed(pickled: bytes) -> int:
    """Values met on the way."""
    scale = Scale()
    scale.run(io.BytesIO(b"\x80\x02" + pickled + b"."))
    return scale.met.parts


def test_what_training_scripts_write_passes(shop: Any):
    state = shop.state()
    settings = {"sizes": [(1, 2), {"a": {3}}], ("a", 1): 2, "deep": [[[[[]]]]], "text": "x" * 10_000}
    held = {
        "model": state, "model_ema": state, "again": [state, state], "count": Counter("abc"),
        "log": defaultdict(list, {"loss": [1.0] * 3000}), "more": OrderedDict((str(n), n) for n in range(3000)),
        "rng": [random.getstate(), torch.get_rng_state(), np.random.get_state()], "settings": settings,
        "optimizer": {"state": {n: {"exp_avg": t} for n, t in enumerate(state.values())}, "param_groups": [settings]},
    }  # fmt: skip
    for write in (shop.torch, shop.legacy):
        assert read_checkpoint(write(held)).tensors.keys() == state.keys()


def test_many_tensors_pass_with_an_optimiser(shop: Any):
    zero = torch.zeros(1)
    state = {f"patch_embed.proj.weight.{number}": zero.clone() for number in range(5000)}
    held = {"model": state, "optimizer": {n: {"exp_avg": zero, "exp_avg_sq": zero} for n in range(5000)}}
    assert len(read_checkpoint(shop.torch(held)).tensors) == 5000


WRONG: dict[str, tuple[bytes, str]] = {
    "depth": (b")" + b"\x85" * (MOST_DEPTH + 1), "values in one another more than 64 deep"),
    "lists in lists": (b"]" * 100 + b"a" * 99, "values in one another more than 64 deep"),
    "doubling": (
        b")q\x00" + b"".join(b"h%ch%c\x86q%c" % (n, n, n + 1) for n in range(40)),
        "more than 10,000,000 values, each counted as often as it is met",
    ),
    "copies": (
        b"ccollections\nCounter\nq\x00](" + b"N" * 100_000 + b"e\x85q\x01" + b"h\x00h\x01R" * 100,
        "more than 10,000,000 values, each counted as often as it is met",
    ),
    "a list that grows inside another": (b"]q\x00](h\x00eh\x00(Ne", "a list or dict that grows inside another"),
    "a text that is filled": (text("a") + b"(Ne", "a list or dict that grows inside another"),
    "a number that is filled": (b"N(Ne", "a list or dict that grows inside another"),
    "a call of a tuple": (b"))R", "a call of what has no name"),
    "a class that is a tuple": (b"))\x81", "a call of what has no name"),
    "another opcode": (b"N0", "opcode POP, which PyTorch neither writes nor reads"),
    "steps": (b"N" * MOST_STEPS, "a pickle of more than 3,000,000 steps"),
}


@pytest.mark.fault(56)
@pytest.mark.parametrize("what", WRONG)
def test_what_has_no_end_is_refused_with_the_reason(what: str, shop: Any):
    pickled, reason = WRONG[what]
    with pytest.raises(ValueError, match=f"^{reason}$"):
        weighed(pickled)
    path = shop.archive(shop.members() | {"good/data.pkl": b"\x80\x02" + pickled + b"."})
    with pytest.raises(CheckpointError, match=r"m\.zip: damaged, not readable as torch \('.*'\): fetch it again"):
        read_checkpoint(path)


@pytest.mark.parametrize("pickled", [b"\x87", b"h\x07", b"e", b"t", b"u", b"", b"Q", b"R", b"N\x81", b"b"])
def test_what_is_not_there_is_refused(pickled: bytes):
    with pytest.raises(LookupError):
        weighed(pickled)


def test_what_is_shared_counts_as_often_as_it_is_met():
    pair = b"NN\x86q\x00"  # three parts, five with the two tuples around
    assert weighed(pair + b"h\x00h\x00\x86") - weighed(b"N") == 6
    assert weighed(b"](NNNe") - weighed(b"N") == 3


def test_keys_count_each_time_and_texts_by_their_length():
    entry = b"(" + text("x" * 80) + b"Nu"
    assert weighed(b"}" + entry) - weighed(b"}") == 11 + 11 + 1  # as a key, and in what is returned
    assert weighed(b"}" + text("x" * 80) + b"Ns") == weighed(b"}" + entry)


def test_the_opcodes_are_those_that_pytorch_reads():
    """As its reader imports them."""
    known = {name for name in vars(torch._weights_only_unpickler) if name in pickle.__all__ and name.isupper()}
    assert set(OPCODES) == known
