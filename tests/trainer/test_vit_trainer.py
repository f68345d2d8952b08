"""From loaders of one's own to a trained model."""

from __future__ import annotations

import json
import math
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from vitrail.data.loading import get_data_loaders
from vitrail.models.backbone import Backbone
from vitrail.models.registry import build_model
from vitrail.models.vit_config import ViTConfig
from vitrail.predict import Predictor
from vitrail.records import Preprocess
from vitrail.tasks.base import evaluate
from vitrail.tasks.classify import Classify
from vitrail.tasks.losses import LossConfig
from vitrail.train.config import TrainConfig
from vitrail.train.optim import make_optimizer
from vitrail.train.schedules import rate
from vitrail.trainer import (
    ViTTrainer,
)
from vitrail.weights.load import load_model

TINY = ViTConfig(img_size=8, patch_size=4, embed_dim=16, depth=2, num_heads=2, num_classes=3)
STEPS, LR, BATCH = 3, 1e-2, 6


def plain_loader(count: int = STEPS * BATCH) -> DataLoader[tuple[Tensor, ...]]:
    """What a plain PyTorch script has: normalised images and labels, in a fixed order."""
    labels = torch.arange(count) % 3
    images = torch.randn(count, 3, 8, 8, generator=torch.Generator().manual_seed(1)) + labels.view(-1, 1, 1, 1)
    return DataLoader(TensorDataset(images, labels), batch_size=BATCH)


def tiny() -> Backbone:
    torch.manual_seed(7)
    return build_model("vit_debug", **{name: getattr(TINY, name) for name in TINY.__dataclass_fields__})


def test_a_config_and_plain_loaders():
    torch.manual_seed(0)
    trainer = ViTTrainer(ViTConfig(image_size=8, patch_size=4, num_classes=3, dim=16, depth=2, heads=2), device="cpu")
    history = trainer.train(
        train_loader=plain_loader(), val_loader=plain_loader(), epochs=4, learning_rate=1e-2, warmup_epochs=1
    )
    assert len(history) == 4
    assert history["val_accuracy"][-1] > 0.6
    assert history["train_loss"] == sorted(history["train_loss"], reverse=True)
    assert history["lr"][0] == pytest.approx(1e-2)
    trained = evaluate(Classify(trainer.model), plain_loader())["accuracy"].item()
    assert trained == pytest.approx(history["val_accuracy"][-1])


SILENT = "the model is saved without preprocessing, since its images came ready: give ViTTrainer preprocess="


def test_ready_images_leave_no_preprocessing(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    """Nobody said how they were normalised: pictures are refused, ready images still pass."""
    ViTTrainer(TINY, device="cpu", out=tmp_path / "run").train(plain_loader(), epochs=1)
    assert SILENT in caplog.messages
    model, picture = load_model(tmp_path / "run"), torch.zeros(3, 8, 8, dtype=torch.uint8)
    assert not model.preprocess.known
    with pytest.raises(ValueError, match="ready images does not know how they were normalised; .* give preprocess="):
        Predictor(model).predict(picture)
    assert Predictor(model, preprocess=Preprocess(img_size=(8, 8))).predict(picture).label
    assert evaluate(Classify(model), plain_loader())["loss"].isfinite()


def test_what_was_said_of_ready_images_is_saved(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    said = Preprocess(img_size=(8, 8), mean=(0.1, 0.2, 0.3), std=(0.4, 0.5, 0.6))
    ViTTrainer(TINY, preprocess=said, classes="abc", device="cpu", out=tmp_path / "run").train(plain_loader(), epochs=1)
    model = load_model(tmp_path / "run")
    assert SILENT not in caplog.messages
    assert (model.preprocess, model.classes) == (said, ("a", "b", "c"))
    with pytest.raises(ValueError, match="got 2 names for 3 logits"):
        ViTTrainer(TINY, classes=("a", "b"))


def test_raw_images_need_no_word(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    raw = [{"image": torch.zeros(2, 3, 8, 8, dtype=torch.uint8), "label": torch.tensor([0, 1])}]
    ViTTrainer(TINY, device="cpu", out=tmp_path / "run").train(raw, epochs=1)
    assert Predictor(load_model(tmp_path / "run")).predict(raw[0]["image"][0]).label
    assert SILENT not in caplog.messages


def test_a_head_put_in_by_hand_is_named(tmp_path: Path):
    model = tiny()
    model.head = nn.Linear(16, 5)
    assert ViTTrainer(model, classes="abcde").model.classes == tuple("abcde")
    with pytest.raises(ValueError, match="got 3 names for 5 logits"):
        ViTTrainer(model, classes="abc")


@pytest.mark.parametrize("out", [False, True])
def test_settings_that_do_nothing_are_told_of(out: bool, tmp_path: Path, caplog: pytest.LogCaptureFixture):
    trainer = ViTTrainer(
        TINY, device="cpu", out=tmp_path / "run" if out else None, preprocess=Preprocess(img_size=(8, 8))
    )
    trainer.train(plain_loader(), plain_loader() if out else None, epochs=1, checkpoint_every=1, patience=1)
    idle = "--checkpoint-every needs a folder to write to (out); --patience needs validation images"
    told = [message for message in caplog.messages if "do nothing" in message]
    assert told == ([] if out else [f"these settings do nothing here: {idle}"])


def test_no_validation_and_a_folder(tmp_path: Path):
    model = tiny()
    model.classes, model.preprocess = ("a", "b", "c"), Preprocess(img_size=(8, 8))
    history = ViTTrainer(model, device="cpu", out=tmp_path / "run").train(plain_loader(), n_epochs=1, lr=LR)
    assert "val_accuracy" not in history.rows[0]
    again = load_model(tmp_path / "run")
    assert again.classes == ("a", "b", "c")
    assert all(torch.equal(value, model.state_dict()[name]) for name, value in again.state_dict().items())


@pytest.mark.parametrize("split", ["val", "test"])
def test_loaders_of_ones_own_have_the_same_report(tmp_path: Path, split: str):
    said = Preprocess(img_size=(8, 8))
    trainer = ViTTrainer(TINY, preprocess=said, classes="abc", device="cpu", out=tmp_path / "run", data="my drawings")
    held_out = {"val_loader": plain_loader(9)} | ({"test_loader": plain_loader(6)} if split == "test" else {})
    trainer.train(plain_loader(), epochs=1, **held_out)
    metrics, page = json.loads((tmp_path / "run/metrics.json").read_text()), (tmp_path / "run/report.html").read_text()
    assert (metrics["split"], metrics["data"], metrics["classes"]) == (split, "my drawings", ["a", "b", "c"])
    assert sum(map(sum, metrics["confusion"])) == {"val": 9, "test": 6}[split]
    again = evaluate(Classify(load_model(tmp_path / "run")), held_out[f"{split}_loader"])
    assert metrics["loss"] == pytest.approx(again["loss"].item())
    assert "ViTTrainer(…).train(…," in re.sub("</?span>", "", page)
    assert "attention rollout" in page
    assert ("which also chose the epoch that was kept" in page) == (split == "val")


def test_nothing_held_out_is_nothing_reported(tmp_path: Path):
    ViTTrainer(TINY, preprocess=Preprocess(img_size=(8, 8)), device="cpu", out=tmp_path).train(plain_loader(), epochs=1)
    assert {path.name for path in tmp_path.iterdir()} == {"checkpoints", "config.yaml", "history.csv", "model"}


@pytest.mark.parametrize("clip", [0.0, 0.05])
def test_a_bare_loop_gives_the_same_numbers(clip: float):
    """The one loop of the house does what the five lines do that everybody knows, to the bit."""
    model, config = tiny(), TrainConfig(epochs=1, lr=LR, warmup_epochs=1 / STEPS, clip_grad=clip, weight_decay=0.1)
    task, losses = Classify(model, LossConfig(label_smoothing=0.1)), []
    optimizer = make_optimizer(task, config)
    for step, (images, labels) in enumerate(plain_loader()):
        for group in optimizer.param_groups:
            group["lr"] = rate(step, config.plan(STEPS))
        loss = task({"image": images, "label": labels})["loss"]
        loss.backward()
        if clip:
            torch.nn.utils.clip_grad_norm_(task.parameters(), clip)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    settings = dict(epochs=1, lr=LR, warmup_epochs=1 / STEPS, clip_grad=clip, weight_decay=0.1, label_smoothing=0.1)
    trained = tiny()
    history = ViTTrainer(trained, device="cpu").train(plain_loader(), **settings)
    assert history["train_loss"] == pytest.approx([sum(losses) / STEPS], rel=1e-6)
    untouched = tiny().state_dict()
    for name, value in trained.state_dict().items():
        assert torch.equal(value, model.state_dict()[name]), name
        assert not torch.equal(value, untouched[name]) or not value.is_floating_point(), f"{name} was not trained"


@pytest.mark.parametrize(("settings", "message"), [
    ({"epoch": 3}, "ViTTrainer.train has no argument 'epoch'; the nearest is epochs"),
    ({"lr": 1e-3, "learning_rate": 1e-3}, "takes one spelling of lr; got both lr and learning_rate: drop one"),
    ({"mixup": 0.2, "batch_size": 8}, "on the loaders as they are; got batch_size, mixup: give that to the model, the"),
    ({"out": "runs/x"}, "got out: give that to the model, the loaders or ViTTrainer"),
    ({"epochs": "many"}, "--epochs takes a whole number; got 'many'"),
])  # fmt: skip
def test_settings_that_are_not_taken(settings: dict[str, Any], message: str):
    with pytest.raises(TypeError) as error:
        ViTTrainer(tiny()).train(plain_loader(), **settings)
    assert message in str(error.value)


@pytest.mark.parametrize("model", ["vit_debug", None, nn.Linear(2, 2)])
def test_what_is_no_model_is_refused(model: Any):
    with pytest.raises(
        TypeError, match=r"takes a model of vitrail's or a ViTConfig; got .*: give one that create_model"
    ):
        ViTTrainer(model)


@pytest.mark.parametrize("loaders", [(None, None), ("photos",), ([], 3), ([], None, "photos")])
def test_what_is_no_loader_is_refused(loaders: tuple[Any, ...]):
    with pytest.raises(TypeError, match=r"(train|val|test)_loader must yield batches; got .*: give it a DataLoader"):
        ViTTrainer(tiny(), device="cpu").train(*loaders)


def test_a_diverging_run_says_so():
    with pytest.raises(ValueError, match="loss must stay finite"):
        ViTTrainer(tiny(), device="cpu").train([(torch.full((2, 3, 8, 8), math.inf), torch.tensor([0, 1]))], epochs=1)


@pytest.mark.fault(18, 19)
def test_loaders_of_ones_own_that_skip_have_their_bad_images_in_the_folder(photos: Path, tmp_path: Path):
    data = shutil.copytree(photos, tmp_path / "photos")
    for number in (1, 2):
        path = data / "bright" / f"{number}.png"
        path.write_bytes(path.read_bytes()[:200])
    loaders = get_data_loaders(f"folder:{data}", batch_size=4, val_fraction=0.3, on_bad_image="skip")
    model = build_model("vit_debug", num_classes=2)
    trainer = ViTTrainer(model, classes=("bright", "dark"), device="cpu", out=tmp_path / "run")
    trainer.train(*loaders, epochs=1)
    met = [line.partition(",")[0] for line in (tmp_path / "run" / "bad_images.csv").read_text().splitlines()[1:]]
    used = {name for loader in loaders for name in loader.dataset.images.ids}
    assert set(met) == used & {"bright/1.png", "bright/2.png"} != set()
    assert "could not be read at least once" in (tmp_path / "run" / "report.html").read_text()
    with pytest.raises(ValueError, match="--out must name a new run"):
        trainer.train(*loaders, epochs=1)
    assert (tmp_path / "run" / "bad_images.csv").exists(), "a run that is refused removes nothing"
