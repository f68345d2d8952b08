"""Checkpoints as training scripts really write them: the weights are found, whatever stands around and beside them."""

from __future__ import annotations

import argparse
import json
import random
import re
from collections import OrderedDict, defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from vitrail.models.registry import FAMILIES, build_model
from vitrail.tasks.classify import Classify
from vitrail.train.ema import WeightEma
from vitrail.weights.keymap import KeyMap
from vitrail.weights.layouts import KEYMAPS
from vitrail.weights.load import load_weights
from vitrail.weights.read import CheckpointError, kind_of, read_checkpoint
from vitrail.weights.wrapped import unwrapped

State = dict[str, Any]


def prefixed(state: State, prefix: str) -> State:
    return OrderedDict((prefix + name, value) for name, value in state.items())


def other(state: State) -> State:
    return {name: value + 1 for name, value in state.items()}


def adam(state: State) -> dict[str, Any]:
    moments = {
        number: {"step": 3, "exp_avg": value, "exp_avg_sq": value} for number, value in enumerate(state.values())
    }
    return {"state": moments, "param_groups": [{"lr": 1e-3, "params": list(moments)}]}


WRAPPED: dict[str, tuple[Callable[[State], Any], tuple[str, ...]]] = {
    "a bare state_dict": (lambda s: s, ()),
    "DDP": (lambda s: prefixed(s, "module."), ("module.",)),
    "torch.compile": (lambda s: prefixed(s, "_orig_mod."), ("_orig_mod.",)),
    "DDP of torch.compile": (lambda s: {"model": prefixed(s, "module._orig_mod.")}, ("model", "module.", "_orig_mod.")),
    "Lightning": (
        lambda s: {
            "epoch": 3,
            "global_step": 100,
            "state_dict": prefixed(s, "model."),
            "optimizer_states": [adam(other(s))],
            "lr_schedulers": [{"last_epoch": 3, "base_lrs": [0.1]}],
            "callbacks": {"ModelCheckpoint": {"best_model_score": torch.tensor(0.9), "dirpath": Path("runs")}},
            "hyper_parameters": {"lr": 0.1},
        },
        ("state_dict", "model."),
    ),
    "an optimiser beside": (lambda s: {"optimizer": adam(other(s)), "model": s, "scaler": {"scale": 2.0}}, ("model",)),
    "settings beside": (
        lambda s: {"model": s, "args": argparse.Namespace(lr=0.1, out=Path("runs"), size=(32, 32), best=None)},
        ("model",),
    ),
    "numpy's numbers beside": (
        lambda s: {"state_dict": s, "best_acc1": np.float64(0.8), "loss": np.float32(1), "epoch": np.int64(7)},
        ("state_dict",),
    ),
    "numpy's arrays beside": (
        lambda s: {"model": s, "history": np.arange(5.0), "rng": np.random.get_state()},
        ("model",),
    ),
    "random states beside": (lambda s: {"model": s, "rng": [torch.get_rng_state(), random.getstate()]}, ("model",)),
    "a default dict beside": (lambda s: {"model": s, "log": defaultdict(list, {"loss": [1.0, 2.0]})}, ("model",)),
    "an average beside": (lambda s: {"model": other(s), "model_ema": s, "epoch": 3}, ("model_ema",)),
    "timm's average beside": (
        lambda s: {"state_dict": other(s), "state_dict_ema": prefixed(s, "module."), "arch": "vit", "metric": 80.1},
        ("state_dict_ema", "module."),
    ),
    "teacher and student": (lambda s: {"student": prefixed(other(s), "module."), "teacher": s}, ("teacher",)),
    "an encoder": (
        lambda s: {"encoder": other(s), "predictor": {"w": torch.zeros(1)}, "target_encoder": s},
        ("target_encoder",),
    ),
    "one name nobody knows": (lambda s: {"weights of mine": s, "epoch": 3}, ("weights of mine",)),
    "an AveragedModel's beside": (
        lambda s: {"model": other(s), "model_ema": prefixed(s, "module.") | {"n_averaged": torch.tensor(3)}},
        ("model_ema", "module."),
    ),
    "Lightning with a loss and a metric": (
        lambda s: {
            "state_dict": prefixed(s, "model.") | {"criterion.weight": torch.ones(2), "metric.total": torch.zeros(())}
        },
        ("state_dict", "model."),
    ),
    "Lightning with teacher and student": (
        lambda s: {"state_dict": prefixed(other(s), "student.") | prefixed(s, "teacher.")},
        ("state_dict", "teacher."),
    ),
    "under net": (lambda s: prefixed(s, "net."), ("net.",)),
    "under encoder": (lambda s: prefixed(s, "encoder."), ("encoder.",)),
    "a tower of open_clip": (
        lambda s: prefixed(s, "visual.trunk.") | {"transformer.ln.weight": torch.ones(3)}, ("visual.trunk.",)
    ),
    "a run of ours": (lambda s: {"state_dict": prefixed(s, "task.backbone.")}, ("state_dict", "task.backbone.")),
    "a run of ours with averages": (
        lambda s: {
            "state_dict": prefixed(other(s), "task.backbone."),
            "callbacks": {"WeightEma": {"updates": 3, "averages": prefixed(s, "0.backbone.")}},
        },
        ("averages", "task.backbone."),
    ),
    "a run of ours with averages that have not begun": (
        lambda s: {
            "state_dict": prefixed(s, "task.backbone."),
            "callbacks": {"WeightEma": {"updates": 0, "averages": prefixed(other(s), "0.backbone.")}},
        },
        ("state_dict", "task.backbone."),
    ),
    "a teacher of DINO's, whose layout has a prefix": (lambda s: prefixed(s, "backbone."), ()),
    "two wrappers": (lambda s: {"checkpoint": {"model": s, "epoch": 3}}, ("checkpoint", "model")),
}  # fmt: skip


@pytest.mark.fault(4)
@pytest.mark.parametrize("write", ["torch", "legacy"])
@pytest.mark.parametrize("what", WRAPPED)
def test_the_weights_are_found(what: str, write: str, shop: Any):
    wrap, wrappers = WRAPPED[what]
    state, model = shop.state(), shop.network()
    path = getattr(shop, write)(wrap(state))
    assert read_checkpoint(path).wrappers == wrappers
    load_weights(model, path)
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())


@pytest.mark.fault(4)
def test_numbers_of_an_older_numpy_stand_beside_too(shop: Any):
    members = shop.members({"model": shop.state(), "best": np.float64(0.8), "seen": np.arange(3)})
    old = members["good/data.pkl"].replace(b"numpy._core.multiarray", b"numpy.core.multiarray")
    assert old != members["good/data.pkl"]
    found = read_checkpoint(shop.archive(members | {"good/data.pkl": old}))
    assert found.wrappers == ("model",) and found.others == ("best", "seen")


def test_nothing_of_what_stands_beside_is_kept(shop: Any):
    found = read_checkpoint(shop.torch({"model": shop.state(), "args": argparse.Namespace(lr=0.1), "epoch": 3}))
    assert found.others == ("args", "epoch") and set(found.tensors) == set(shop.state())
    assert {type(value) for value in found.tensors.values()} == {torch.Tensor}


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("write", ["safetensors", "torch", "legacy"])
def test_weights_of_another_precision_become_the_networks(dtype: torch.dtype, write: str, shop: Any):
    state = {name: value.to(dtype) for name, value in shop.state().items()}
    model = shop.network()
    load_weights(model, getattr(shop, write)(state))
    assert {value.dtype for value in model.state_dict().values()} == {torch.float32}
    assert all(torch.equal(value, state[name].float()) for name, value in model.state_dict().items())


def test_parameters_views_and_gradients_are_tensors(shop: Any):
    state = shop.state()
    both = torch.stack([state["norm.weight"], state["norm.bias"]], 1)
    held = state | {"norm.weight": both[:, 0], "norm.bias": torch.nn.Parameter(state["norm.bias"])}
    model = shop.network()
    load_weights(model, shop.torch(held))
    assert torch.equal(model.norm.weight, state["norm.weight"]) and torch.equal(model.norm.bias, state["norm.bias"])


def test_numbers_without_a_dimension_stay_so(shop: Any):
    found = read_checkpoint(shop.npz({"a": torch.tensor(3.0), "b": torch.arange(6.0).view(2, 3).T}))
    assert found.tensors["a"].shape == () and torch.equal(found.tensors["b"], torch.arange(6.0).view(2, 3).T)


# ---- which of several


def test_a_part_is_named(shop: Any):
    state = shop.state()
    path = shop.torch({"net": {"a": state, "b": other(state)}, "model_ema": other(state), "model": state})
    for part, expected in (("model", 0), ("model_ema", 1), (None, 1)):
        found = read_checkpoint(path, part).tensors["norm.bias"]
        assert torch.equal(found, state["norm.bias"] + expected)
    model = shop.network()
    load_weights(model, path, part="model")
    assert torch.equal(model.norm.bias, state["norm.bias"])
    with pytest.raises(CheckpointError, match=r"there is no part 'ema' in it; beside the weights stand net, model"):
        read_checkpoint(path, "ema")
    path = shop.torch({"checkpoint": {"mine": state, "yours": other(state)}, "epoch": 3})
    assert torch.equal(read_checkpoint(path, "yours").tensors["norm.bias"], state["norm.bias"] + 1)
    with pytest.raises(CheckpointError, match=r"several state_dicts are in it \(mine, yours\): name one by part"):
        read_checkpoint(path)


def test_a_part_of_one_state_dict_is_named_by_what_its_names_begin_with(shop: Any):
    state = shop.state()
    path = shop.torch({"state_dict": prefixed(state, "student.") | prefixed(other(state), "teacher.")})
    model = shop.network()
    report = load_weights(model, path, part="student")
    assert torch.equal(model.norm.bias, state["norm.bias"])
    assert "taken out of state_dict > student., not teacher, which part= names" in report.lines()
    load_weights(model, path)
    assert torch.equal(model.norm.bias, state["norm.bias"] + 1)
    with pytest.raises(CheckpointError, match=r"no part 'best' in it; beside the weights stand student, teacher"):
        read_checkpoint(path, "best")


def test_several_networks_of_which_none_is_the_better_are_asked_for_by_part(shop: Any):
    state = shop.state()
    path = shop.torch(prefixed(state, "left.") | prefixed(other(state), "right."))
    with pytest.raises(CheckpointError, match=r"several networks are in it \(left\., right\.\): name one by part"):
        read_checkpoint(path)
    assert torch.equal(read_checkpoint(path, "left").tensors["norm.bias"], state["norm.bias"])


def test_what_was_taken_and_what_was_not_is_reported(shop: Any):
    state = shop.state()
    path = shop.torch({"state_dict": state, "state_dict_ema": other(state)})
    assert (
        "taken out of state_dict_ema, not state_dict, which part= names" in load_weights(shop.network(), path).lines()
    )
    run = {"state_dict": prefixed(state, "task.backbone.")}
    averages = {"callbacks": {"WeightEma": {"updates": 3, "averages": prefixed(other(state), "0.backbone.")}}}
    path, model = shop.torch(run | averages), shop.network()
    report = load_weights(model, path)
    assert "taken out of averages > task.backbone., not state_dict, which part= names" in report.lines()
    load_weights(model, path, part="state_dict")
    assert torch.equal(model.norm.bias, state["norm.bias"])


PARTLY: dict[str, tuple[Callable[[State], Any], tuple[str, ...]]] = {
    "a number of the average": (lambda s: {"model": s, "ema": {"decay": torch.tensor(0.9)}}, ("model",)),
    "an average of some": (lambda s: {"state_dict": s, "state_dict_ema": dict(list(s.items())[:6])}, ("state_dict",)),
    "a name nobody knows beside": (lambda s: {"mine": s, "ema": {"decay": torch.tensor(0.9)}}, ("mine",)),
    "a metric beside": (lambda s: {"mine": s, "best": torch.tensor(0.9)}, ("mine",)),
    "among the weights": (lambda s: {**s, "ema": {"decay": torch.tensor(0.9)}}, ()),
    "an average that is whole": (lambda s: {"model": other(s) | {"text": torch.ones(1)}, "ema": s}, ("ema",)),
}


@pytest.mark.parametrize("what", PARTLY)
def test_a_whole_network_goes_before_a_dict_of_any_tensor(what: str, shop: Any):
    wrap, wrappers = PARTLY[what]
    state, model = shop.state(), shop.network()
    path = shop.torch(wrap(state))
    assert read_checkpoint(path).wrappers == wrappers
    load_weights(model, path)
    assert torch.equal(model.norm.bias, state["norm.bias"])


def test_a_head_beside_the_weights_is_told_as_not_taken(shop: Any, caplog: pytest.LogCaptureFixture):
    body = {name: value for name, value in shop.state().items() if not name.startswith("head")}
    head = {"head.weight": torch.zeros(3, 12), "head.bias": torch.zeros(3)}
    path, model = shop.torch(prefixed(body, "vit.") | head), shop.network(num_classes=0)
    assert read_checkpoint(path).untaken == read_checkpoint(path).others == tuple(head)
    assert "not taken: head.weight, head.bias" in load_weights(model, path).lines()
    assert [(r.levelname, "not taken: head.weight, head.bias" in r.message) for r in caplog.records] == [
        ("WARNING", True)
    ]


def test_what_else_stands_beside_the_weights_is_told_quietly(shop: Any, caplog: pytest.LogCaptureFixture):
    path = shop.torch(prefixed(shop.state(), "net.") | {"loss.weight": torch.zeros(1)})
    with caplog.at_level("INFO"):
        assert "not taken: loss.weight" in load_weights(shop.network(), path).lines()
    assert [record.levelname for record in caplog.records] == ["INFO"]
    path = shop.torch(prefixed(shop.state(), "student.") | prefixed(shop.state(), "teacher."))
    assert load_weights(shop.network(), path).untaken == ()  # another network is told as one


NONE: dict[str, tuple[Any, str]] = {
    "a list": ([torch.zeros(2), 1], "weights are a dict of tensors by their names; it holds a list of 2: save the sta"),
    "a tensor": (torch.zeros(2), "weights are a dict of tensors by their names; it holds a Tensor: save the state_d"),
    "numbers for names": ({0: {"a": torch.zeros(2)}}, "there is no state_dict in it, but a dict of 0: save the state"),
    "nothing": ({}, "there is no state_dict in it, but a dict of nothing: save the state_dict alone"),
}


@pytest.mark.parametrize("what", NONE)
def test_a_file_without_weights_says_what_it_holds(what: str, shop: Any):
    held, said = NONE[what]
    with pytest.raises(CheckpointError, match=rf"m\.pth: {said}"):
        read_checkpoint(shop.torch(held))


def test_tensors_are_counted_before_networks_are_looked_for(shop: Any, monkeypatch: pytest.MonkeyPatch):
    def looked(*_: object) -> bool:
        raise AssertionError("looked")

    monkeypatch.setattr("vitrail.weights.wrapped.is_network", looked)
    one = torch.zeros(1)
    with pytest.raises(ValueError, match=r"^20,001 tensors; no network here has more than 20,000$"):
        unwrapped({str(number): one for number in range(20_001)})
    with pytest.raises(ValueError, match=r"^20,001 tensors; no network here has more than 20,000$"):
        unwrapped({"mine": {str(number): one for number in range(20_001)}})


def test_averages_are_found_where_training_writes_them(shop: Any):
    task = Classify(shop.network())
    average = WeightEma(task, decay=0.5)
    average.on_fit_start(None, None)  # type: ignore[arg-type]
    weights = prefixed(task.state_dict(), "task.")
    path = shop.torch({"state_dict": weights, "callbacks": {"WeightEma": average.state_dict()}})
    assert read_checkpoint(path).wrappers == ("state_dict", "task.backbone.")  # no update yet: they say nothing
    with torch.no_grad():
        task.backbone.norm.bias.fill_(3.0)
    average.update()
    path = shop.torch({"state_dict": weights, "callbacks": {"WeightEma": average.state_dict()}})
    found = read_checkpoint(path)
    assert found.wrappers == ("averages", "task.backbone.") and set(found.tensors) == set(shop.state())
    assert torch.equal(found.tensors["norm.bias"], average.averages["0.backbone.norm.bias"])


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_is_known_under_a_prefix(family: str):
    with torch.device("meta"):
        state = build_model(next(iter(FAMILIES[family].variants))).state_dict()
    assert unwrapped(prefixed(state, "net.") | {"loss.weight": torch.zeros(1)}).wrappers == ("net.",)


@pytest.mark.parametrize("keymap", KEYMAPS, ids=lambda keymap: f"{keymap.source} {keymap.family}")
def test_every_layout_is_known_under_a_prefix_and_without_one(keymap: KeyMap):
    marks = [re.sub(r"\{\w.*?\}", "1", re.sub(r"\[.*?\]", "", mark)) for mark in keymap.marks]
    state = {mark.replace("{w}", "weight"): torch.zeros(1) for mark in marks}
    assert unwrapped(state).wrappers == ()
    assert unwrapped(prefixed(state, "net.")).wrappers == ("net.",)


# ---- files and folders


def test_a_folder_of_a_run_holds_its_model_and_before_that_where_it_stands(shop: Any):
    state = shop.state()
    for folder in ("runs", "runs/checkpoints", "runs/model"):
        (shop.place / folder).mkdir()
    shop.torch({"state_dict": prefixed(state, "task.backbone.")}, "runs/checkpoints/last.ckpt")
    for place in ("runs", "runs/checkpoints"):
        assert read_checkpoint(shop.place / place).path.name == "last.ckpt"
    shop.safetensors(state, "runs/model/model.safetensors")
    assert read_checkpoint(shop.place / "runs").path == shop.place / "runs" / "model" / "model.safetensors"


def test_a_file_is_known_by_its_first_bytes_not_its_ending(shop: Any):
    state = shop.state()
    kinds = {"safetensors": "safetensors", "torch": "torch", "legacy": "torch", "small_npz": "npz"}
    for write, kind in kinds.items():
        path = getattr(shop, write)(state).rename(shop.place / "weights.npz.bin")
        assert kind_of(path) == kind == read_checkpoint(str(path)).kind


@pytest.mark.fault(6)
@pytest.mark.parametrize("write", ["torch", "torchscript"])
def test_one_flipped_byte_of_an_archive_is_seen(write: str, shop: Any):
    """By the sums that an archive has of its parts, which torch does not look at."""
    state = shop.state()
    path = getattr(shop, write)(state)
    whole, weights = bytearray(path.read_bytes()), state["head.weight"].numpy().tobytes()
    whole[whole.index(weights) + 5] ^= 1
    path.write_bytes(whole)
    with pytest.raises(CheckpointError, match=r"damaged, not readable as a checkpoint \(.*Bad CRC-32 for file"):
        read_checkpoint(path)


@pytest.mark.parametrize("write", ["torch", "legacy", "safetensors"])
@pytest.mark.parametrize("name", ["m.safetensors", "m.pth"])
def test_an_ending_is_believed_by_nobody(write: str, name: str, shop: Any):
    state, model = shop.state(), shop.network()
    load_weights(model, getattr(shop, write)(state, name))
    assert torch.equal(model.norm.bias, state["norm.bias"])


@pytest.mark.parametrize(
    ("data", "said"),
    [
        (
            b"version https://git-lfs.github.com/spec/v1\noid sha256:aa\nsize 3\n",
            "a pointer of git-lfs, not the weights",
        ),
        (b"\n<!DOCTYPE html><html><body>Sign in</body></html>", "a page of the web, not weights"),
        (b"<HTML><head></head></HTML>", "a page of the web, not weights"),
    ],
)
@pytest.mark.parametrize("name", ["m.safetensors", "m.pth"])
def test_what_lies_in_place_of_weights_is_recognised(data: bytes, said: str, name: str, shop: Any):
    with pytest.raises(CheckpointError, match=f"{said}: .*fetch the"):
        read_checkpoint(shop.bytes(data, name))


def test_a_device_is_no_file():
    with pytest.raises(CheckpointError, match="/dev/null: weights are read from a file or a folder; this is a device"):
        read_checkpoint("/dev/null")


@pytest.mark.parametrize("name", ["code.pth", "archive_format.pt", "constants.pkl", "exported_program.pth"])
def test_a_file_may_be_called_as_parts_of_programs_are(name: str, shop: Any):
    assert read_checkpoint(shop.torch(shop.state(), name)).kind == "torch"


@pytest.mark.parametrize("name", ["model.safetensors", "pytorch_model.bin"])
def test_a_folder_holds_one_file_of_weights(name: str, shop: Any):
    (shop.place / "repo").mkdir()
    (shop.safetensors if name.endswith("tensors") else shop.torch)(shop.state(), f"repo/{name}")
    (shop.place / "repo" / "config.json").write_text(json.dumps({"architecture": "vit_tiny", "num_classes": 2}))
    model = shop.network()
    for path in (shop.place / "repo", str(shop.place / "repo")):
        assert load_weights(model, path).taken == len(shop.state())
    assert read_checkpoint(shop.place / "repo").path == shop.place / "repo" / name


def test_an_index_of_pickles_too(shop: Any):
    state = shop.state()
    (shop.place / "repo").mkdir()
    names = list(state)
    halves = {"pytorch_model-00001-of-00002.bin": names[:9], "pytorch_model-00002-of-00002.bin": names[9:]}
    for file, part in halves.items():
        shop.torch({f"model.{name}": state[name] for name in part}, f"repo/{file}")
    places = {f"model.{name}": file for file, part in halves.items() for name in part}
    (shop.place / "repo" / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": places}))
    found = read_checkpoint(shop.place / "repo")
    assert found.kind == "sharded" and found.wrappers == ("model.",)
    assert all(torch.equal(value, state[name]) for name, value in found.tensors.items())


def test_what_all_parts_share_is_taken_off_not_what_one_has(shop: Any):
    state = {"model.a": torch.zeros(1), "b": torch.zeros(1), "model.c": torch.zeros(1)}
    assert set(read_checkpoint(shop.shards(state)).tensors) == set(state)


def test_what_is_not_there_is_said(shop: Any):
    with pytest.raises(CheckpointError, match=r"nothing\.pth: there is no such file"):
        read_checkpoint(shop.place / "nothing.pth")
    with pytest.raises(
        CheckpointError, match=r"a folder of weights holds one of model\.safetensors, .*: name the file"
    ):
        read_checkpoint(shop.place)
    folder = shop.shards(shop.state())
    (folder / "a.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"index\.json: its part a\.safetensors is not there"):
        read_checkpoint(folder)
    (folder / "model.safetensors.index.json").write_text('{"weight_map": {"x": "../a.safetensors"}}')
    with pytest.raises(CheckpointError, match=r"index\.json: parts must lie beside their index; got '\.\./a"):
        read_checkpoint(folder)


def test_a_file_that_cannot_be_opened_is_an_error_of_ours(shop: Any, monkeypatch: pytest.MonkeyPatch):
    path = shop.torch(shop.state())

    def denied(*_: object, **__: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "open", denied)
    with pytest.raises(CheckpointError, match=r"m\.pth: damaged, not readable as a checkpoint .*Permission denied"):
        read_checkpoint(path)


def test_what_a_file_hangs_onto_its_tensors_is_left_behind(shop: Any):
    tensor = shop.state()["norm.bias"]
    tensor.numel = 3
    tensor.to = "elsewhere"
    found = read_checkpoint(shop.torch(shop.state() | {"norm.bias": tensor})).tensors["norm.bias"]
    assert torch.equal(found, shop.state()["norm.bias"]) and found.numel() == 12 and vars(found) == {}


@pytest.mark.parametrize("row", ["resnet18d", "resnet10t", "legacy_seresnet18", "resnest14d"])
def test_blocks_of_other_resnets_are_no_networks(row: str, tmp_path: Path):
    """Whose own first layer has another name, while each block has a conv1."""
    theirs = pytest.importorskip("timm").create_model(row, num_classes=3)
    torch.save(theirs.state_dict(), tmp_path / "theirs.pth")
    assert read_checkpoint(tmp_path / "theirs.pth").tensors.keys() == theirs.state_dict().keys()
