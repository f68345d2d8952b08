"""Files that could run code when they are read: refused wherever a model or a run is read, and never run."""

from __future__ import annotations

import argparse
import ast
import io
import os
import pickle
import re
import shutil
from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest
import torch
from torch import nn

from vitrail import folder
from vitrail.cli import main
from vitrail.folder import FolderError, write_folder
from vitrail.models.registry import build_model
from vitrail.predict import ViTClassifier
from vitrail.train.checkpoint import WholeFiles, damage, newest_whole
from vitrail.weights.load import load_model

SOURCE = Path(folder.__file__).parent
Hostile = Callable[[Path], None]


class Payload:
    """Whoever unpickles it makes a file."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.mkdir, (str(self.marker),)


def content(path: Path) -> dict[str, object]:
    """What a run's checkpoint holds, with a payload beside it that makes `ran` next to the file."""
    return {"state_dict": {}, "history": {}, "told": {}, "extra": Payload(path.with_name("ran"))}


def zipped(path: Path) -> None:
    torch.save(content(path), path)


def legacy(path: Path) -> None:
    torch.save(content(path), path, _use_new_zipfile_serialization=False)


def bare(path: Path) -> None:
    path.write_bytes(pickle.dumps(content(path), protocol=2))  # of newer ones torch warns


def exported(path: Path) -> None:
    """A program: nothing hostile in it, but what may be in one is not looked at."""
    path.write_bytes(program())


@cache
def program() -> bytes:
    file = io.BytesIO()
    torch.export.save(torch.export.export(nn.Linear(2, 2), (torch.zeros(1, 2),)), file)
    return file.getvalue()


def with_namespace(path: Path) -> None:
    """As training scripts of papers write them."""
    torch.save({"model": nn.Linear(2, 2).state_dict(), "args": argparse.Namespace(lr=0.1)}, path)


KINDS = [
    pytest.param(zipped, "m.pth", id="zip"),
    pytest.param(legacy, "m.pth", id="legacy"),
    pytest.param(bare, "m.pth", id="pickle"),
    pytest.param(exported, "m.pt2", id="pt2"),
    pytest.param(with_namespace, "m.pth", id="namespace"),
]


@pytest.mark.parametrize("unpickle", [pickle.loads, None])
def test_the_payloads_go_off(tmp_path: Path, unpickle: Callable[[bytes], object] | None):
    """Otherwise the tests below would show nothing."""
    bare(tmp_path / "m.pth")
    zipped(tmp_path / "n.pth")
    if unpickle:
        unpickle((tmp_path / "m.pth").read_bytes())
    else:
        torch.load(tmp_path / "n.pth", weights_only=False)
    assert (tmp_path / "ran").is_dir()


@pytest.mark.fault(1, 2, 3, 4)
@pytest.mark.parametrize(("write", "name"), KINDS)
def test_a_file_is_no_model(tmp_path: Path, write: Hostile, name: str):
    file = tmp_path / name
    write(file)
    for read in (load_model, ViTClassifier.from_pretrained):
        with pytest.raises(FolderError, match=f"named by the folder of its run or its own; got the file {file}: name"):
            read(file)
    with pytest.raises(FolderError, match=r"holds config\.json and model\.safetensors"):
        load_model(tmp_path)
    assert not (tmp_path / "ran").exists()


@pytest.mark.fault(1, 2, 3, 4)
@pytest.mark.parametrize(("write", "name"), KINDS)
def test_a_model_folder_with_other_weights_is_refused(tmp_path: Path, write: Hostile, name: str):
    """Under the name of its weights, in a manifest that says it is right."""
    made = build_model("vit_debug", depth=1)
    place = write_folder(tmp_path / "m", made.state_dict(), made.card())
    write(place / "model.safetensors")
    (place / "manifest.json").write_text(folder._manifest(place))
    for read in (load_model, ViTClassifier.from_pretrained):
        with pytest.raises(FolderError, match=r"model\.safetensors: not a readable safetensors file"):
            read(place)
    assert not (place / "ran").exists()


@pytest.mark.fault(1, 2, 3, 4)
@pytest.mark.parametrize(("write", "name"), KINDS)
def test_a_run_does_not_go_on_from_it(tmp_path: Path, write: Hostile, name: str):
    file = tmp_path / "last.ckpt"
    write(file)
    assert damage(file)
    with pytest.raises(ValueError, match=r"a whole checkpoint; .* holds none \(last\.ckpt: "):
        newest_whole(tmp_path)
    with pytest.raises((pickle.UnpicklingError, RuntimeError)):
        WholeFiles().load_checkpoint(file)
    assert not (tmp_path / "ran").exists()


@pytest.fixture(scope="module")
def run(photos: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("unsafe") / "run"
    words = ["--model", "vit_debug", "--epochs", "1", "--batch-size", "4", "--val-fraction", "0.2", "--device", "cpu"]
    assert main(["train", *words, "--data", f"folder:{photos}", "--out", str(out)]) == 0
    return out


@pytest.mark.fault(1, 2, 3, 4)
@pytest.mark.parametrize(("write", "name"), KINDS)
def test_the_command_refuses_it(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], write: Hostile, name: str
):
    places = Path(shutil.copytree(run, tmp_path / "run")) / "checkpoints"
    for file in list(places.glob("*.ckpt")):
        write(file)
    assert main(["train", "--resume", str(tmp_path / "run")]) != 0
    assert "last.ckpt: " in (said := capsys.readouterr().err) and "Traceback" not in said
    assert not list(tmp_path.rglob("ran"))


@pytest.mark.fault(1, 2, 4)
@pytest.mark.parametrize("file", sorted(SOURCE.rglob("*.py")), ids=lambda file: file.relative_to(SOURCE).as_posix())
def test_nothing_here_reads_a_file_by_running_it(file: Path):
    text = file.read_text(encoding="utf-8")
    assert not re.search(
        r"weights_only\W+False|allow_pickle\s*=\s*(?!False)|add_safe_globals|pickle\.loads?\b|Unpickler", text
    )
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Call) and ast.unparse(node.func) == "torch.load":
            assert "weights_only=True" in [ast.unparse(keyword) for keyword in node.keywords]
