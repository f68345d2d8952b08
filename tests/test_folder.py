"""Model folders: what is written is read, whole or not at all; what is damaged or hostile is refused by name."""

from __future__ import annotations

import json
import logging
import os
import shutil
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from vitrail import folder
from vitrail.folder import FolderError, find_folder, read_card, read_weights, write_folder
from vitrail.records import ModelCard, Preprocess

CARD = ModelCard(
    family="vit", config={"depth": 2, "img_size": [32, 32]}, name="vit_debug", classes=("Äpfel", "b c"),
    preprocess=Preprocess(img_size=(32, 48)), images="fruit", training={"loss": 0.5}, version="0.1.0",
)  # fmt: skip


def state(value: float = 1.0) -> dict[str, torch.Tensor]:
    return {"a.weight": torch.full((3, 4), value), "b": torch.arange(5)}


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return write_folder(tmp_path / "model", state(), CARD)


def names(path: Path) -> list[str]:
    return sorted(part.name for part in path.iterdir())


def rewrite(model: Path, change: dict[str, Any] | str, drop: tuple[str, ...] = ()) -> None:
    """The config changed, and the manifest with it, as somebody hostile would."""
    file = model / "config.json"
    if isinstance(change, str):
        file.write_text(change)
    else:
        values = json.loads(file.read_text()) | change
        file.write_text(json.dumps({k: v for k, v in values.items() if k not in drop}))
    (model / "manifest.json").write_text(folder._manifest(model))


# ---- writing


def test_a_folder_holds_what_was_written(model: Path):
    assert names(model) == ["config.json", "manifest.json", "model.safetensors"]
    assert names(model.parent) == ["model"]
    assert read_card(model) == CARD
    read = read_weights(model)
    assert set(read) == set(state())
    assert all(torch.equal(read[name], value) and read[name].dtype == value.dtype for name, value in state().items())


def test_the_config_is_for_people(model: Path):
    text = (model / "config.json").read_text(encoding="utf-8")
    assert "Äpfel" in text and text.count("\n") > 10
    keys = list(json.loads(text))
    assert keys == sorted(keys)


def test_the_same_model_is_the_same_bytes(tmp_path: Path):
    one, two = (write_folder(tmp_path / name, state(), CARD) for name in "ab")
    for name in names(one):
        assert (one / name).read_bytes() == (two / name).read_bytes()


def test_fp16_halves_floats_alone_and_refuses_overflow(tmp_path: Path):
    read = read_weights(write_folder(tmp_path / "m", state(), CARD, dtype=torch.float16))
    assert read["a.weight"].dtype == torch.float16 and read["b"].dtype == torch.int64
    with pytest.raises(FolderError, match=r"a\.weight reaches 1e\+06, too much for torch\.float16"):
        write_folder(tmp_path / "n", state(1e6), CARD, dtype=torch.float16)
    assert names(tmp_path) == ["m"]


def test_shared_and_strided_tensors_are_written_apart(tmp_path: Path):
    weight = torch.arange(12.0).view(3, 4)
    tied = {"one": weight, "two": weight, "turned": weight.T, "part": weight[1]}
    read = read_weights(write_folder(tmp_path / "m", tied, CARD))
    assert all(torch.equal(read[name], value) for name, value in tied.items())


def test_figures_that_are_no_numbers_become_null(tmp_path: Path):
    card = ModelCard(family="vit", config={}, training={"loss": float("nan"), "scores": [float("inf"), 1.0]})
    path = write_folder(tmp_path / "m", state(), card)
    assert "NaN" not in (path / "config.json").read_text()
    assert read_card(path).training == {"loss": None, "scores": [None, 1.0]}


def test_a_card_that_is_no_json_is_refused_before_anything_is_written(tmp_path: Path):
    with pytest.raises(FolderError, match=r"(?i)path.*convert it"):
        write_folder(tmp_path / "m", state(), ModelCard(family="vit", config={}, training={"out": tmp_path}))
    assert names(tmp_path) == []


def test_a_name_that_a_terminal_would_obey_is_not_written(tmp_path: Path):
    with pytest.raises(FolderError, match=r"a model card: classes must hold no control .*; got '\\x1b\[31mred'"):
        write_folder(tmp_path / "m", state(), ModelCard(family="vit", config={}, classes=("\x1b[31mred",)))
    assert names(tmp_path) == []


def test_a_name_too_long_to_be_read_is_not_written(tmp_path: Path) -> None:
    with pytest.raises(FolderError, match=r"names of at most 1000 characters; got 'bbb"):
        write_folder(tmp_path / "m", {"w": torch.zeros(1)}, ModelCard(family="vit", config={}, classes=("b" * 1001,)))
    assert not (tmp_path / "m").exists()


def test_a_model_is_replaced(model: Path):
    write_folder(model, state(2.0), CARD)
    assert read_weights(model)["a.weight"][0, 0] == 2
    assert names(model.parent) == ["model"]


@pytest.mark.parametrize("step", ["save_file", "_manifest", "flush", "rename"])
def test_the_previous_model_outlives_a_failed_write(model: Path, monkeypatch: pytest.MonkeyPatch, step: str):
    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    rename = Path.rename
    if step == "rename":  # the new one cannot be put in place, when the old one has already left it
        monkeypatch.setattr(Path, "rename", lambda a, b: full() if a.name.endswith(".new") else rename(a, b))
    else:
        monkeypatch.setattr(folder, step, full)
    with pytest.raises(OSError, match="No space left"):
        write_folder(model, state(2.0), CARD)
    monkeypatch.undo()
    assert names(model.parent) == ["model"]
    assert read_weights(model)["a.weight"][0, 0] == 1


def test_a_process_killed_between_the_renames_leaves_the_previous_model(model: Path):
    model.rename(folder._previous(model))
    found = find_folder(model)
    assert read_card(found) == CARD
    write_folder(model, state(2.0), CARD)
    assert read_weights(find_folder(model))["a.weight"][0, 0] == 2
    assert names(model.parent) == ["model"]


@pytest.mark.parametrize("held", [["notes.txt"], ["config.json", "model.safetensors", "tokenizer.json"]])
def test_a_folder_that_is_no_model_is_never_replaced(tmp_path: Path, held: list[str]):
    place = tmp_path / "mine"
    place.mkdir()
    for name in held:
        (place / name).write_text("{}")
    with pytest.raises(
        FolderError, match=rf"mine holds {'notes' if len(held) == 1 else 'tokenizer'}.*choose another path"
    ):
        write_folder(place, state(), CARD)
    assert names(place) == sorted(held)


def test_a_model_of_somebody_elses_and_a_file_are_never_replaced(tmp_path: Path):
    place = tmp_path / "theirs"
    place.mkdir()
    (place / "config.json").write_text('{"architectures": ["ViTModel"]}')
    (place / "model.safetensors").write_bytes(b"")
    with pytest.raises(FolderError, match="architectures"):
        write_folder(place, state(), CARD)
    (tmp_path / "file").write_text("")
    with pytest.raises(FolderError, match="no folder but a file"):
        write_folder(tmp_path / "file", state(), CARD)


def test_an_empty_folder_is_filled_and_parents_are_made(tmp_path: Path):
    (tmp_path / "empty").mkdir()
    for path in (tmp_path / "empty", tmp_path / "a" / "b"):
        assert read_card(write_folder(path, state(), CARD)) == CARD


def test_what_was_read_does_not_change_with_the_file(model: Path):
    read = read_weights(model)
    size = (model / "model.safetensors").stat().st_size
    with (model / "model.safetensors").open("r+b") as file:
        file.write(bytes(size))
    assert all(torch.equal(read[name], value) for name, value in state().items())


# ---- finding


def test_a_run_folder_means_its_model(tmp_path: Path):
    model = write_folder(tmp_path / "runs" / "demo" / "model", state(), CARD)
    assert find_folder(tmp_path / "runs" / "demo") == model
    assert find_folder(str(model)) == model


def test_a_missing_folder_names_the_nearest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    write_folder(tmp_path / "runs" / "demo" / "model", state(), CARD)
    write_folder(tmp_path / "runs" / "cifar", state(), CARD)
    with pytest.raises(
        FolderError, match=r"config\.json and model\.safetensors.*demoo does not exist.*beside it is .*runs/demo$"
    ):
        find_folder(tmp_path / "runs" / "demoo")
    monkeypatch.chdir(tmp_path / "runs")
    with pytest.raises(FolderError, match=r"cifra does not exist: the nearest beside it is cifar$"):
        find_folder("cifra")


def test_a_name_that_is_like_no_other_is_offered_none(model: Path):
    with pytest.raises(FolderError, match="zebra does not exist: none of the models beside it has a name like that$"):
        find_folder(model.parent / "zebra")


def test_leftovers_of_a_killed_write_are_nobodys_nearest(model: Path):
    model.rename(model.parent / ".demo.12345678.new")
    with pytest.raises(FolderError, match="no model stands beside it"):
        find_folder(model.parent / "demo")


def test_what_is_no_model_folder_says_what_it_lacks(model: Path, tmp_path: Path):
    (model / "model.safetensors").unlink()
    with pytest.raises(FolderError, match=r"model lacks model\.safetensors: no model stands beside it"):
        find_folder(model)
    with pytest.raises(FolderError, match=r"config\.json is a file"):
        find_folder(model / "config.json")
    with pytest.raises(FolderError, match="does not exist"):
        find_folder(tmp_path / "x" / "y" / "z")


# ---- damage


@pytest.mark.fault(6)
def test_one_flipped_byte_is_found(model: Path):
    for name, read in (("model.safetensors", read_weights), ("config.json", read_card)):
        data = bytearray((model / name).read_bytes())
        data[-4] ^= 1
        (model / name).write_bytes(data)
        with pytest.raises(FolderError, match=rf"{name}: damaged or changed.*sha256.*again"):
            read(model)


@pytest.mark.fault(5)
def test_cut_weights_are_found_with_and_without_a_manifest(model: Path):
    file = model / "model.safetensors"
    whole = file.read_bytes()
    for part in range(16):
        file.write_bytes(whole[: len(whole) * part // 16])
        with pytest.raises(FolderError, match=rf"damaged, \d+ bytes where manifest.json says {len(whole)}"):
            read_weights(model)
    (model / "manifest.json").unlink()
    for part in range(16):
        file.write_bytes(whole[: len(whole) * part // 16])
        with pytest.raises(FolderError, match="not a readable safetensors"):
            read_weights(model)


@pytest.mark.fault(6)
def test_without_a_manifest_integrity_is_unchecked_and_it_says_so(model: Path, caplog: pytest.LogCaptureFixture):
    (model / "manifest.json").unlink()
    read_weights(model)
    said = f"{model / 'model.safetensors'}: integrity unchecked, since there is no manifest.json"
    assert caplog.record_tuples == [("vitrail", logging.WARNING, said)]


@pytest.mark.parametrize("text", [
    "[]", "{", '{"files": {}}', '{"files": {"config.json": 1, "model.safetensors": 2}}',
    '{"files": {"config.json": {"bytes": "1", "sha256": ""}, "model.safetensors": {}}}',
    '{"files": {"config.json": {}, "model.safetensors": {}, "../../passwd": {"bytes": 1, "sha256": ""}}}',
])  # fmt: skip
def test_a_broken_manifest_is_refused(model: Path, text: str):
    (model / "manifest.json").write_text(text)
    with pytest.raises(FolderError, match=r"manifest\.json: "):
        read_weights(model)


def test_missing_files_are_named(model: Path):
    (model / "config.json").unlink()
    with pytest.raises(FolderError, match=r"config\.json: there is no such file.*write the model again"):
        read_card(model)


# ---- hostile cards

DEEP = "[" * 100_000


@pytest.mark.parametrize(("change", "message"), [
    ({"config": []}, "config must be an object; got \\[\\]"),
    ({"family": 3}, "family must be text; got 3"),
    ({"classes": "abc"}, "classes must be a list"),
    ({"classes": ["a", 2]}, "classes must be names"),
    ({"classes": ["a" * 1001]}, "at most 1000 characters"),
    ({"family": "../../etc/passwd"}, "family must be a plain name; got '../../etc/passwd'"),
    ({"name": "a/b"}, "name must be a plain name"),
    ({"config": {"depth": 10**12}}, r"config\.depth must lie within ±1,000; got 1\.000e\+12"),
    ({"config": {"depths": [2, 1001]}}, r"config\.depths\.1 must lie within ±1,000; got 1001"),
    ({"config": {"img_size": [32, 16385]}}, r"config\.img_size\.1 must lie within ±16,384; got 16385"),
    ({"config": {"patch_size": 10**7}}, r"config\.patch_size must lie within ±1,000,000"),
    ({"preprocess": {"img_size": [10**6, 10**6]}}, r"preprocess\.img_size\.0 must lie within ±16,384"),
    ({"classes": ["a", "\x1b[2Jb"]}, r"classes must hold no control characters; got '\\x1b\[2Jb': rename it"),
    ({"images": "cells\u202e"}, r"images must hold no control characters; got 'cells\\u202e'"),
    ({"training": {"recipe": {"out": "a\rb"}}}, r"training\.recipe\.out must hold no control characters"),
    ({"training": {"a\x07": 1}}, r"training must hold no control characters"),
    ({"config": {"sizes": [{"x": -(10**400)}]}}, r"config\.sizes\.0\.x .* a huge number"),
    ({"preprocess": {"img_size": [10**9, 1]}}, r"preprocess\.img_size\.0"),
    ({"preprocess": {"mean": 3}}, r"preprocess\.mean must be a list; got 3"),
    ({"preprocess": {"std": ["a", "b", "c"]}}, r"each of preprocess\.std must be a number; got 'a'"),
    ({"preprocess": {"img_size": [32.5, 32]}}, r"each of preprocess\.img_size must be a whole number; got 32\.5"),
    ({"preprocess": {"crop_pct": "1"}}, r"preprocess\.crop_pct must be a number"),
    ({"preprocess": {"run": "rm"}}, "got also 'run'"),
    ({"preprocess": {"crop_pct": float("inf")}}, r"preprocess\.crop_pct"),
    ({"hook": "os.system"}, "got also 'hook'"),
    ("[1]", "it must hold an object; got \\[1\\]"),
    ("nonsense", "not readable as JSON"),
    (DEEP, "not readable as JSON"),
    ('{"config": {"depth": ' + "1" * 5000 + "}}", "not readable as JSON"),
    ("{}", "family"),
])  # fmt: skip
def test_a_hostile_card_is_refused_by_name(model: Path, change: dict[str, Any] | str, message: str):
    rewrite(model, change)
    with pytest.raises(FolderError, match=message):
        read_card(model)


def test_a_huge_card_is_not_even_read(model: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(folder, "MAX_JSON_BYTES", 400)
    rewrite(model, {"images": "x" * 500})
    monkeypatch.setattr(
        folder, "_expected", lambda *_: ((model / "config.json").stat().st_size, folder._sha256(model / "config.json"))
    )
    with pytest.raises(FolderError, match="at most 400 are read"):
        read_card(model)


@pytest.mark.skipif(os.name != "posix", reason="modes of folders")
def test_the_folder_has_the_mode_of_any_new_folder(tmp_path: Path, model: Path):
    (tmp_path / "plain").mkdir()
    assert model.stat().st_mode == (tmp_path / "plain").stat().st_mode


def test_a_linked_folder_is_replaced_where_it_stands(tmp_path: Path, model: Path):
    (tmp_path / "link").symlink_to(model)
    write_folder(tmp_path / "link", state(2.0), CARD)
    assert (tmp_path / "link").is_symlink()
    assert read_weights(model)["a.weight"][0, 0] == 2
    shutil.rmtree(model)


@pytest.mark.fault(7)
@pytest.mark.skipif(os.name != "posix", reason="measured by `resource` in a forked process")
@pytest.mark.parametrize("manifest", [True, False])
@pytest.mark.parametrize("stated", [10**15, 10**8, 2**64 - 1])
def test_a_monstrous_header_is_refused_at_once(model: Path, manifest: bool, stated: int):
    """In a process of its own: the peak of this one may be far above what it holds now, and hide any cost."""
    import multiprocessing
    from resource import RUSAGE_SELF, getrusage  # not on every system

    (model / "model.safetensors").write_bytes(stated.to_bytes(8, "little") + b"{}")
    (model / "manifest.json").write_text(folder._manifest(model))
    if not manifest:
        (model / "manifest.json").unlink()

    def measured(pipe: Any) -> None:
        before, start, error = getrusage(RUSAGE_SELF).ru_maxrss, time.perf_counter(), ""
        try:
            read_weights(model)
        except FolderError as refused:
            error = str(refused)
        pipe.send((error, time.perf_counter() - start, getrusage(RUSAGE_SELF).ru_maxrss - before))

    fork = multiprocessing.get_context("fork")
    here, there = fork.Pipe()
    process = fork.Process(target=measured, args=(there,))
    process.start()
    assert here.poll(30)
    error, seconds, size = here.recv()
    process.join()
    assert "not a readable safetensors" in error
    assert seconds < 1
    assert size * (1 if sys.platform == "darwin" else 1024) < 50e6
