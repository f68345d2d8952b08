"""A run with a teacher: where it comes from, that no checkpoint holds it, and that a resume takes no other."""

from __future__ import annotations

import copy
import logging
import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from safetensors.torch import save_file
from torch import nn
from torchvision import models

from vitrail.cli import main
from vitrail.models import foreign
from vitrail.models.backbone import Backbone
from vitrail.models.registry import build_model
from vitrail.records import Preprocess
from vitrail.tasks.distill import Distill, DistillConfig, Teacher
from vitrail.tasks.losses import LossConfig
from vitrail.train import task as tasks
from vitrail.train.checkpoint import read
from vitrail.train.config import TrainConfig, say_idle
from vitrail.train.engine import Interrupted
from vitrail.train.task import load_teacher, make_task
from vitrail.trainer import ViTTrainer, run_training

CLASSES = ("dark", "grey", "light")
SIZES = {"img_size": 8, "num_classes": 3}


@pytest.fixture
def teacher() -> Backbone:
    torch.manual_seed(9)
    model = build_model("resnet_debug", **SIZES)
    model.preprocess, model.classes = Preprocess(img_size=(8, 8), mean=(0.4,) * 3, std=(0.3,) * 3), CLASSES
    return model


@pytest.fixture
def make_student(make_task, teacher: Backbone) -> Callable[..., Distill]:
    """A task of `train`, with dropout, and with a teacher."""

    def make(taught: nn.Module | None = None, **options: Any) -> Distill:
        student = make_task(drop_path_rate=0.2).backbone
        return Distill(student, teacher if taught is None else taught, DistillConfig(distillation="soft"), **options)

    return make


# ---- one loop, and checkpoints


def test_no_checkpoint_average_or_optimiser_holds_the_teacher(train, make_student, teacher: Backbone, tmp_path: Path):
    before = copy.deepcopy(teacher.state_dict())
    task = make_student()
    history = train(task, out=tmp_path, ema=0.9, epochs=2)
    state = torch.load(tmp_path / "checkpoints" / "last.ckpt", weights_only=True)
    own = dict(task.named_parameters())
    assert state["state_dict"].keys() == {f"task.{name}" for name in task.state_dict()}
    assert len(state["callbacks"]["WeightEma"]["averages"]) == len(own)
    assert sum(len(group["params"]) for group in state["optimizer_states"][0]["param_groups"]) == len(own)
    assert {p.device for p in teacher.parameters()} == {torch.device("cpu")}
    assert all(torch.equal(value, before[name]) for name, value in teacher.state_dict().items())
    assert {"train_loss", "train_label_loss", "train_teacher_loss"} <= set(history.rows[0])


@pytest.mark.parametrize("stop", [5, 8])
def test_a_resumed_run_is_bit_identical(stop: int, train, make_student, fingerprint, tmp_path: Path):
    recipe = {"ema": 0.9, "mixup": 0.2, "crop": "pad", "accumulate": 2}
    loss = {"loss": LossConfig(loss="focal", label_smoothing=0.1), "class_weights": [1.0, 2.0, 0.5]}
    whole = make_student(**loss)
    history = train(whole, out=tmp_path / "whole", **recipe)

    def hook(number: int) -> None:
        if number == stop:
            os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(Interrupted):
        train(make_student(**loss), out=tmp_path / "run", hook=hook, **recipe)
    again = make_student(**loss)
    resumed = train(again, out=tmp_path / "run", resume=True, **recipe)
    assert fingerprint(again) == fingerprint(whole)
    assert resumed["train_loss"] == history["train_loss"]


def test_another_teacher_is_refused(train, make_task, make_student, teacher: Backbone, tmp_path: Path):
    """By its weights and its preparation, wherever it lies; and the lack of one, and one where there was none."""
    train(make_student(), out=tmp_path / "run", epochs=1)
    assert read(tmp_path / "run" / "checkpoints" / "last.ckpt")["told"]["teacher"].startswith(
        "resnet_debug with sha256"
    )
    other = copy.deepcopy(teacher)
    with torch.no_grad():
        other.fc.bias += 1
    was = "--teacher was resnet_debug with sha256 [0-9a-f]{16}, got "
    for task, found in ((make_student(other), "resnet_debug with sha256"), (make_task(drop_path_rate=0.2), "None")):
        with pytest.raises(ValueError, match=f"{was}{found}.*go on all the same with --override teacher "):
            train(task, out=tmp_path / "run", resume=True, epochs=2)
    assert len(train(make_student(copy.deepcopy(teacher)), out=tmp_path / "run", resume=True, epochs=2)) == 2
    assert len(train(make_student(other), out=tmp_path / "run", resume=True, epochs=3, override=["teacher"])) == 3
    train(make_task(drop_path_rate=0.2), out=tmp_path / "alone", epochs=1)
    with pytest.raises(ValueError, match="--teacher was None, got resnet_debug with sha256"):
        train(make_student(), out=tmp_path / "alone", resume=True, epochs=2)


# ---- where a teacher comes from


def answers(teacher: Teacher) -> torch.Tensor:
    size = teacher.preprocess.img_size
    return teacher.logits(torch.ones(2, 3, *size), teacher.preprocess)


def test_a_model_folder_and_a_file_of_ours(teacher: Backbone, tmp_path: Path, caplog: pytest.LogCaptureFixture):
    caplog.set_level(logging.INFO)
    folder, expected = teacher.save_pretrained(tmp_path / "run" / "model"), answers(Teacher(teacher))
    for place in (folder, folder.parent, folder / "model.safetensors"):
        found = load_teacher(DistillConfig(teacher=str(place)), 3)
        assert (found.classes, found.preprocess, found.name) == (CLASSES, teacher.preprocess, "resnet_debug")
        torch.testing.assert_close(answers(found), expected, rtol=0, atol=0)
    said = "the teacher is resnet_debug; it sees the same images at 8 x 8 pixels, mean (0.4, 0.4, 0.4), std"
    assert any(line.startswith(said) for line in caplog.messages)
    torch.save(teacher.state_dict(), tmp_path / "alone.pth")
    found = load_teacher(DistillConfig(teacher="resnet_debug", teacher_path=str(tmp_path / "alone.pth")), 3)
    assert torch.equal(found.model.fc.weight, teacher.fc.weight)


@pytest.mark.parametrize("ending", ["pth", "safetensors"])
@pytest.mark.parametrize("name", ["timm:test_vit", "torchvision:shufflenet_v2_x0_5"])
def test_a_checkpoint_of_timms_and_of_torchvisions(name: str, ending: str, tmp_path: Path):
    torch.manual_seed(3)
    library, _, row = name.partition(":")
    theirs = timm.create_model(row, num_classes=3) if library == "timm" else models.get_model(row, num_classes=3)
    file = tmp_path / f"weights.{ending}"
    save_file(theirs.state_dict(), file) if ending == "safetensors" else torch.save(
        {"model": theirs.state_dict()}, file
    )
    found = load_teacher(DistillConfig(teacher=name, teacher_path=str(file)), 3)
    side = 160 if library == "timm" else 224
    assert found.preprocess.img_size == (side, side) and found.name == name and found.classes == ()
    images = torch.randn(2, 3, side, side)
    with torch.no_grad():
        torch.testing.assert_close(found.logits(images, found.preprocess), theirs.eval()(images), rtol=0, atol=0)
    with pytest.raises(ValueError, match=rf"--teacher {name}: .* own names and 5 classes; 2 differ: .* is \(3,"):
        load_teacher(DistillConfig(teacher=name, teacher_path=str(file)), 5)


def test_published_weights_of_others_are_fetched_from_where_they_are(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    """By the package's own way, which checks them: nothing of theirs runs, and nothing is fetched here."""
    asked: list[tuple[Any, ...]] = []

    def hub(repo: str, file: str, **options: Any) -> Path:
        asked.append((repo, file))
        save_file(timm.create_model("test_vit").state_dict(), tmp_path / "hub.safetensors")
        return tmp_path / "hub.safetensors"

    def url(address: str) -> Path:
        asked.append((address,))
        torch.save(models.get_model("shufflenet_v2_x0_5").state_dict(), tmp_path / "url.pth")
        return tmp_path / "url.pth"

    monkeypatch.setattr(tasks, "fetch_from_hub", hub)
    monkeypatch.setattr(tasks, "fetch_url", url)
    for name in ("timm:test_vit.r160_in1k", "torchvision:shufflenet_v2_x0_5"):
        assert answers(load_teacher(DistillConfig(teacher=name), 3)).shape == (2, 1000)
    assert asked[0] == ("timm/test_vit.r160_in1k", "model.safetensors")
    assert asked[1][0].startswith("https://download.pytorch.org/models/shufflenetv2_x0.5-")


@pytest.mark.parametrize(("settings", "message"), [
    ({"teacher": "timm:resnet81"}, "--teacher timm:resnet81: timm has no model 'resnet81'; the nearest are resnet"),
    ({"teacher": "torchvision:resnet81"}, "torchvision has no model 'resnet81'; the nearest are resnet"),
    ({"teacher": "timm:resnet18d_nothing.here"}, "timm has no model 'resnet18d_nothing.here'"),
    ({"teacher": "resnet81_224"}, "--teacher resnet81_224: no weights are known for 'resnet81_224', and no such model"),
    ({"teacher": "resnet81", "teacher_path": "x.pth"}, "--teacher resnet81: .*resnet"),
    ({"teacher": "no/such/folder"}, "--teacher no/such/folder: there is no such folder or file as .*: nor no/such"),
    ({"teacher": "resnet.pth"}, "--teacher resnet.pth: there is no such folder or file as resnet.pth: look at the pa"),
])  # fmt: skip
def test_what_is_no_teacher_is_named(settings: dict[str, str], message: str):
    with pytest.raises(ValueError, match=message):
        load_teacher(DistillConfig(**settings), 3)


def test_a_network_without_published_weights_needs_a_file():
    nothing = foreign.Foreign(nn.Identity(), Preprocess(), "")
    with pytest.raises(
        ValueError, match="its library has published no weights for it: name a file with --teacher-path"
    ):
        tasks._fetched(nothing)


def test_a_missing_timm_names_its_line(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(__import__("sys").modules, "timm", None)
    with pytest.raises(ValueError, match=r"timm:resnet18 needs timm, which is not installed: pip install 'vitrail\[ti"):
        load_teacher(DistillConfig(teacher="timm:resnet18"), 3)


# ---- a whole run


def test_a_run_is_taught_from_the_command_line(photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    """A CNN first, then a student with a distillation token: with mixing and class weights, gone on with, judged."""
    data = ["--data", f"folder:{photos}", "--val-fraction", "0.34", "--batch-size", "4", "--device", "cpu"]
    cnn, taught = tmp_path / "cnn", tmp_path / "taught"
    assert main(["train", "--model", "resnet_debug", "--epochs", "1", "--out", str(cnn), *data]) == 0
    words = ["train", "--model", "deit_debug", "--teacher-model", str(cnn / "model"), "--distillation-type", "soft",
             "--distillation-tau", "2", "--class-weights", "balanced", "--mixup", "0.2", *data]  # fmt: skip
    assert main([*words, "--epochs", "1", "--out", str(taught)]) == 0
    moved = shutil.move(cnn, tmp_path / "elsewhere")
    again = ["train", "--resume", str(taught), "--epochs", "2"]
    capsys.readouterr()
    assert main(again) == 2
    assert f"--teacher {cnn / 'model'}: there is no such folder or file" in capsys.readouterr().err
    assert main([*again, "--teacher", str(Path(moved) / "model")]) == 0
    rows = (taught / "history.csv").read_text().splitlines()
    assert len(rows) == 3 and "train_teacher_loss" in rows[0]
    assert main(["eval", str(taught), "--data", f"folder:{photos}"]) == 0
    assert (taught / "report.html").is_file() and TrainConfig.from_yaml(taught / "config.yaml").distillation == "soft"


def test_the_task_is_as_the_settings_say(photos: Path, teacher: Backbone, tmp_path: Path):
    model = build_model("deit_debug", img_size=8, patch_size=4, num_classes=3)
    model.preprocess, model.classes = teacher.preprocess, CLASSES
    given = {"loss": "bce", "label_smoothing": 0.1, "class_weights": "effective", "distillation_alpha": 0.2}
    config = TrainConfig(teacher=str(teacher.save_pretrained(tmp_path / "model")), **given)
    task = make_task(model, config, [4, 2, 1])
    assert isinstance(task, Distill) and (task.loss, task.distillation) == (config, config)
    assert task.class_weights is not None and task.class_weights[2] > task.class_weights[1] > task.class_weights[0]
    plain = make_task(model, TrainConfig(class_weights="light:2"))
    assert not isinstance(plain, Distill) and plain.class_weights.tolist() == [1, 1, 2]
    with pytest.raises(ValueError, match="--class-weights must name the data's classes; got 'bright'"):
        make_task(model, TrainConfig(class_weights="bright:2"))
    with pytest.raises(ValueError, match="--class-weights must name the data's classes; got 'light'"):
        run_training(TrainConfig(data=f"folder:{photos}", class_weights="light:2", out=str(tmp_path / "run")))


def test_loaders_of_ones_own_are_taught_too(teacher: Backbone, images, tmp_path: Path):
    folder = teacher.save_pretrained(tmp_path / "model")
    student = build_model("deit_debug", img_size=8, patch_size=4, num_classes=3)
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(images[0].images, images[0].labels), 16)
    trainer = ViTTrainer(student, preprocess=teacher.preprocess, classes=CLASSES, device="cpu")
    history = trainer.train(loader, epochs=1, teacher=str(folder), loss="focal", class_weights="grey:2")
    assert history["train_teacher_loss"]
    with pytest.raises(ValueError, match="loaders of one's own do not tell"):
        trainer.train(loader, epochs=1, class_weights="balanced")


@pytest.mark.parametrize(("settings", "said"), [
    ({"focal_gamma": 1.0, "bce_threshold": 0.0}, "--bce-threshold needs --loss bce; --focal-gamma needs --loss focal"),
    ({"loss": "bce", "asl_clip": 0.1, "bce_threshold": 0.1}, "--asl-clip needs --loss asymmetric"),
    ({"effective_beta": 0.9, "class_weights": "balanced"}, "--effective-beta needs --class-weights effective"),
    ({"distillation": "soft", "teacher_path": "x"}, "--teacher-path needs --teacher; --distillation needs --teacher"),
    ({"distillation": "soft", "distillation_tau": 2.0},
     "--distillation needs --teacher; --distillation-tau needs --teacher and --distillation soft"),
    ({"teacher": "x", "distillation_tau": 2.0}, "--distillation-tau needs --teacher and --distillation soft"),
])  # fmt: skip
def test_settings_that_do_nothing_are_told(settings: dict[str, Any], said: str, caplog: pytest.LogCaptureFixture):
    say_idle(TrainConfig(**settings))
    assert caplog.messages == [f"these settings do nothing here: {said}"]
