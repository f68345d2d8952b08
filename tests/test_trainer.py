"""From a config to a run folder, and from loaders of one's own to a trained model."""

from __future__ import annotations

import json
import math
import re
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close
from torch.utils.data import DataLoader, TensorDataset

from vitrail.data.datasets import load_splits
from vitrail.data.imagesets import ImageSet, Splits, TensorSet
from vitrail.data.loading import make_loader
from vitrail.data.transforms import RandomResizedCrop, eval_transform
from vitrail.models.backbone import Backbone
from vitrail.models.registry import build_model
from vitrail.models.vit import ViTConfig
from vitrail.predict import Predictor
from vitrail.records import Batch, Preprocess
from vitrail.tasks.base import evaluate
from vitrail.tasks.classify import Classify
from vitrail.train.config import TrainConfig
from vitrail.train.optim import make_optimizer, warmup_cosine
from vitrail.trainer import (
    ViTTrainer,
    demo_config,
    eval_loader,
    evaluate_model,
    make_model,
    resume_training,
    run_training,
)
from vitrail.weights.load import load_model

TINY = ViTConfig(img_size=8, patch_size=4, embed_dim=16, depth=2, num_heads=2, num_classes=3)
STEPS, LR, BATCH = 3, 1e-2, 6


@pytest.fixture(scope="module")
def config(photos: Path, tmp_path_factory: pytest.TempPathFactory) -> TrainConfig:
    return TrainConfig(
        model="vit_debug", data=f"folder:{photos}", epochs=2, batch_size=4, val_fraction=0.34, seed=3, device="cpu",
        lr=1e-4, checkpoint_every=1, ema=0.9, label_smoothing=0.1, out=str(tmp_path_factory.mktemp("trainer") / "run"),
    )  # fmt: skip


@pytest.fixture(scope="module")
def run(config: TrainConfig) -> Path:
    history = run_training(config)
    assert [row["epoch"] for row in history.rows] == [1, 2]
    return Path(config.out)


# ---- a whole run


def test_a_run_folder_is_complete(run: Path, config: TrainConfig):
    found = {str(path.relative_to(run)) for path in run.rglob("*") if path.is_file()}
    assert found == {
        "config.yaml", "splits.json", "history.csv", "metrics.json", "report.html",
        "checkpoints/last.ckpt", "checkpoints/best.ckpt", "checkpoints/epoch_001.ckpt", "checkpoints/epoch_002.ckpt",
        "model/model.safetensors", "model/config.json", "model/manifest.json",
    }  # fmt: skip
    assert TrainConfig.from_yaml(run / "config.yaml") == config


def test_the_splits_are_recorded(run: Path, config: TrainConfig):
    record = json.loads((run / "splits.json").read_text())
    splits = load_splits(config)
    assert record["drawn"] == {"val": splits.val.ids, "test": splits.test.ids}
    assert record["counts"]["train"] == {"bright": 2, "dark": 2}


def test_the_figures_are_those_of_the_model_on_the_test_images(run: Path, config: TrainConfig):
    splits, model = load_splits(config), load_model(run)
    loader = make_loader(splits.test, batch_size=3, train=False, transform=eval_transform(model.preprocess))
    metrics = json.loads((run / "metrics.json").read_text())
    for name, value in evaluate(Classify(model), loader).items():
        assert_close(torch.tensor(metrics[name], dtype=value.dtype), value)


def test_the_model_folder_says_what_it_is(run: Path, config: TrainConfig):
    model = load_model(run)
    assert (model.variant, model.classes) == ("vit_debug", ("bright", "dark"))
    assert model.preprocess == load_splits(config).preprocess()
    assert model.images


def test_evaluation_draws_the_parts_as_training_did(run: Path, config: TrainConfig):
    """Neither seed nor share is told: with the defaults, training images would be among the test images."""
    metrics = json.loads((run / "metrics.json").read_text())
    for name in (run, run / "model"):
        figures = evaluate_model(name, data=config.data, device="cpu", batch_size=3)
        assert_close(figures["loss"].item(), metrics["loss"])
        assert figures["confusion"].tolist() == metrics["confusion"]
    assert load_splits(replace(config, seed=0, val_fraction=0.05)).test.ids != load_splits(config).test.ids


def test_evaluation_of_another_part(run: Path, config: TrainConfig):
    assert evaluate_model(run, data=config.data, split="train", device="cpu")["confusion"].sum() == 4
    with pytest.raises(ValueError, match="--split must be one of train, val, test; got 'all'"):
        evaluate_model(run, data=config.data, split="all")


def test_evaluation_goes_by_names_where_there_are_names(photos: Path, config: TrainConfig, tmp_path: Path):
    nameless = build_model("vit_debug", num_classes=2)
    nameless.save_pretrained(tmp_path / "two")
    assert evaluate_model(tmp_path / "two", data=config.data, device="cpu")["confusion"].sum() == 2
    build_model("vit_debug", num_classes=4).save_pretrained(tmp_path / "four")
    with pytest.raises(ValueError, match="four knows the classes class 0, class 1, class 2, class 3; .* has bright, d"):
        evaluate_model(tmp_path / "four", data=config.data)


def test_the_same_seed_gives_the_same_model(run: Path, config: TrainConfig, tmp_path: Path):
    torch.manual_seed(123)
    run_training(replace(config, out=str(tmp_path / "again")))
    one, two = load_model(run).state_dict(), load_model(tmp_path / "again").state_dict()
    assert all(torch.equal(one[name], two[name]) for name in one)


# ---- what a config asks for is what is trained


class Stop(Exception):
    """Ends a run where its training would begin."""


@pytest.fixture
def wiring(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """What `run_training` hands to `fit`, which does not run."""
    handed: dict[str, Any] = {}

    def taken(task: Any, train: Any, val: Any, config: TrainConfig, **others: Any) -> None:
        handed.update(task=task, train=train, val=val, config=config, **others)
        raise Stop

    monkeypatch.setattr("vitrail.trainer.fit", taken)
    return handed


def test_training_is_wired_as_the_config_says(config: TrainConfig, wiring: dict[str, Any], tmp_path: Path):
    asked = replace(
        config, out=str(tmp_path / "run"), workers=2, batch_size=3, crop="resized", crop_scale=0.3, mixup=0.4, erase=0.2
    )
    with pytest.raises(Stop):
        run_training(asked)
    splits, train, val, augment = load_splits(asked), wiring["train"], wiring["val"], wiring["augment"]
    for loader, images, shuffled in ((train, splits.train, True), (val, splits.val, False)):
        assert (loader.dataset.images.ids, loader.num_workers, loader.dataset.seed) == (images.ids, 2, asked.seed)
        order = loader.batch_sampler
        assert (order.shuffle, order.batch_size, order.seed) == (shuffled, 3, asked.seed)
    preprocess = splits.preprocess()
    assert train.dataset.transform == RandomResizedCrop(preprocess, 0.3)
    assert val.dataset.transform == eval_transform(preprocess)
    assert wiring["task"].label_smoothing == asked.label_smoothing == 0.1
    assert (augment.config, augment.preprocess, augment.num_classes) == (asked, preprocess, 2)
    assert (wiring["config"], wiring["out"], wiring["resume"]) == (asked, Path(asked.out), False)
    assert wiring["notes"] == {"drawn": splits.digests()}


@pytest.mark.usefixtures("wiring")
def test_settings_that_do_nothing_are_told(config: TrainConfig, tmp_path: Path, caplog: pytest.LogCaptureFixture):
    """`crop` stands for what it is at the images' size."""
    with pytest.raises(Stop):
        run_training(replace(config, out=str(tmp_path), crop_scale=0.5, rand_ops=3, pad_mode="reflect", patience=1))
    idle = "--crop-scale needs --crop resized; --rand-ops needs --auto-augment rand"
    assert caplog.messages == [f"these settings do nothing here: {idle}"]


@pytest.mark.parametrize(("changes", "message"), [
    ({"devices": 3, "val_fraction": 0.2}, "every process needs an image; got 2 for 3: start fewer"),
    ({"devices": 3, "batch_size": 1}, "got 4 images one at a time for 3: take a batch_size of 2 or more"),
])  # fmt: skip
def test_parts_that_cannot_be_shared_are_refused_before_training(
    config: TrainConfig, wiring: dict[str, Any], tmp_path: Path, changes: dict[str, Any], message: str
):
    with pytest.raises(ValueError, match=message):
        run_training(replace(config, out=str(tmp_path), **changes))
    assert not wiring


# ---- what was held out stays so


@pytest.fixture
def own(photos: Path, config: TrainConfig, tmp_path: Path) -> TrainConfig:
    """A recipe of one epoch on a folder of its own, which a test may change."""
    shutil.copytree(photos, tmp_path / "photos")
    return replace(
        config, data=f"folder:{tmp_path / 'photos'}", out=str(tmp_path / "run"), epochs=1, ema=0, checkpoint_every=0
    )


def add_photos(config: TrainConfig, count: int = 12) -> None:
    folder = Path(config.data.removeprefix("folder:"))
    for number in range(count):
        shutil.copy(folder / "dark/0.png", folder / f"dark/new{number}.png")


def drawn(config: TrainConfig) -> dict[str, list[str]]:
    return json.loads((Path(config.out) / "splits.json").read_text())["drawn"]


@pytest.fixture
def trained_on(monkeypatch: pytest.MonkeyPatch) -> set[str]:
    """The ids of all images that a training loader is made of, as they come."""
    seen: set[str] = set()

    def watched(images: ImageSet, **settings: Any) -> DataLoader[Batch]:
        if settings["train"]:
            seen.update(images.ids)
        return make_loader(images, **settings)

    monkeypatch.setattr("vitrail.trainer.make_loader", watched)
    return seen


def test_no_held_out_image_is_ever_trained_on(own: TrainConfig, trained_on: set[str], caplog: pytest.LogCaptureFixture):
    run_training(own)
    before, statistics = drawn(own), load_model(own.out).preprocess
    held_out = {*before["val"], *before["test"]}
    add_photos(own)
    fresh = load_splits(own)
    assert {*fresh.val.ids, *fresh.test.ids} != held_out, "a draw anew is another one"
    resume_training(own.out, replace(own, epochs=2))
    assert not trained_on & held_out
    assert len([name for name in trained_on if "new" in name]) == 12
    assert f"{own.data} has +12 images since its parts were drawn; new ones are for training" in caplog.messages
    assert drawn(own) == before
    assert json.loads((Path(own.out) / "splits.json").read_text())["counts"]["train"] == {"bright": 2, "dark": 14}
    assert load_model(own.out).preprocess == statistics
    figures = evaluate_model(own.out, data=own.data, device="cpu")
    assert figures["confusion"].sum() == len(before["test"])


def test_evaluation_takes_the_parts_of_the_run(own: TrainConfig, tmp_path: Path):
    run_training(own)
    before = evaluate_model(own.out, data=own.data, device="cpu")["loss"]
    shutil.copytree(Path(own.out) / "model", tmp_path / "alone")
    assert evaluate_model(tmp_path / "alone", data=own.data, device="cpu")["loss"] == before
    add_photos(own)
    for name in (Path(own.out), Path(own.out) / "model"):
        assert evaluate_model(name, data=own.data, device="cpu")["loss"] == before
    with pytest.raises(
        ValueError, match=r"is not what it was when .*alone was trained on it, .* evaluate the run fold"
    ):
        evaluate_model(tmp_path / "alone", data=own.data, device="cpu")


def test_a_held_out_image_that_is_gone_is_named(own: TrainConfig):
    run_training(own)
    gone = drawn(own)["test"][0]
    (Path(own.data.removeprefix("folder:")) / gone).unlink()
    for again in (lambda: resume_training(own.out), lambda: evaluate_model(own.out, data=own.data, device="cpu")):
        with pytest.raises(ValueError, match=f"lacks 1 of the images that were set aside from it: {gone}: put them ba"):
            again()


def test_other_data_is_drawn_anew(run: Path, photos: Path, tmp_path: Path):
    """Images of other names were never trained on."""
    for name in ("bright", "dark"):
        (tmp_path / name).mkdir()
        for number in range(6):
            shutil.copy(photos / name / f"{number}.png", tmp_path / name / f"other{number}.png")
    assert evaluate_model(run, data=f"folder:{tmp_path}", device="cpu")["confusion"].sum() == 4


def test_other_classes_or_no_record_end_a_resume(own: TrainConfig):
    run_training(own)
    shutil.copytree(Path(own.data.removeprefix("folder:")) / "dark", Path(own.data.removeprefix("folder:")) / "grey")
    with pytest.raises(
        ValueError, match="had the classes bright, dark when training began; now it has bright, dark, g"
    ):
        resume_training(own.out)
    (Path(own.out) / "splits.json").unlink()
    with pytest.raises(
        ValueError, match=r"splits\.json must say which images were held out; .*: put it back, or train"
    ):
        resume_training(own.out)


# ---- the demo again


@pytest.fixture
def demo(config: TrainConfig, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> TrainConfig:
    """The demo's place with a recipe that takes a moment."""
    tiny = replace(config, epochs=1, ema=0, checkpoint_every=0, out=str(tmp_path / "demo"))
    monkeypatch.setattr("vitrail.trainer.demo_config", lambda out=tiny.out: replace(tiny, out=out))
    return tiny


def test_the_demo_runs_again_in_its_place(demo: TrainConfig):
    run_training(demo)
    (Path(demo.out) / "checkpoints" / "epoch_007.ckpt").touch()
    assert len(run_training(demo)) == 1
    assert not (Path(demo.out) / "checkpoints" / "epoch_007.ckpt").exists()
    assert (Path(demo.out) / "report.html").is_file()


def test_the_demo_removes_nothing_else(demo: TrainConfig, tmp_path: Path):
    run_training(replace(demo, seed=9))
    with pytest.raises(
        ValueError, match=r"over its own last run; .*demo holds checkpoints, config\.yaml, .*: name anot"
    ):
        run_training(demo)
    other = tmp_path / "letters"
    other.mkdir()
    (other / "dear.txt").write_text("x")
    with pytest.raises(ValueError, match=r"letters holds dear\.txt: name another with --out"):
        run_training(replace(demo, out=str(other)))
    assert (other / "dear.txt").is_file()
    with pytest.raises(ValueError, match="--out must name a new run"):  # not the demo's recipe
        run_training(replace(demo, seed=9))


def test_to_resume_needs_a_run(tmp_path: Path, run: Path):
    with pytest.raises(ValueError, match=r"holds config\.yaml; there is none in .*: name a folder made by `train`"):
        resume_training(tmp_path)
    (tmp_path / "config.yaml").write_bytes((run / "config.yaml").read_bytes())
    with pytest.raises(ValueError, match=r"needs a run that wrote .*last\.ckpt; found none: start one with --out"):
        resume_training(tmp_path)


def test_the_demo_is_a_recipe_that_ships():
    config = demo_config("somewhere")
    assert (config.data, config.out) == ("bloodcells", "somewhere")
    assert config.epochs <= 20


# ---- the model for the images


def some_splits(channels: int = 3, side: int = 32, classes: int = 4) -> Splits:
    images = torch.randint(256, (8, channels, side, side), dtype=torch.uint8)
    names = [f"c{k}" for k in range(classes)]
    part = TensorSet(images, torch.arange(8) % classes, names, [str(n) for n in range(8)])
    return Splits(name="cifar10", train=part, val=part, test=part)


def test_a_short_name_is_completed_and_said(caplog: pytest.LogCaptureFixture):
    caplog.set_level("INFO", logger="vitrail")
    model = make_model(TrainConfig(model="vit_tiny_mlp1"), some_splits(side=36))
    assert (model.variant, model.preprocess.img_size) == ("vit_tiny_mlp1_patch4_32", (36, 36))
    assert caplog.messages == ["vit_tiny_mlp1 is vit_tiny_mlp1_patch4_32, for images of 36 pixels"]
    make_model(TrainConfig(model="vit_debug"), some_splits())
    assert len(caplog.messages) == 1


def test_no_generator_is_left_seeded(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(torch.cuda, "manual_seed_all", lambda _: pytest.fail("the generators of all GPUs were seeded"))
    splits, before = some_splits(), torch.get_rng_state()
    make_model(TrainConfig(model="vit_debug"), splits)
    assert torch.equal(torch.get_rng_state(), before)


def test_a_model_fits_its_images():
    splits = some_splits(channels=5)
    model = make_model(TrainConfig(model="vit_debug", img_size=48, drop_path=0.2, drop_rate=0.1), splits)
    assert (model.config.in_chans, model.config.num_classes, model.config.img_size) == (5, 4, (48, 48))
    assert (model.config.drop_path_rate, model.config.drop_rate) == (0.2, 0.1)
    assert model.preprocess == splits.preprocess(48)
    assert model.classes == splits.classes
    assert model(torch.zeros(1, 5, 48, 48)).shape == (1, 4)


def test_a_dropout_that_a_model_has_not():
    with pytest.raises(ValueError, match=r"resnet_debug takes no --drop-path; got 0\.1: leave it out"):
        make_model(TrainConfig(model="resnet_debug", drop_path=0.1), some_splits())
    assert make_model(TrainConfig(model="resnet_debug", drop_rate=0.1), some_splits()).config.drop_rate == 0.1


def test_a_loader_for_every_part():
    splits, config = some_splits(), TrainConfig(batch_size=3)
    model = make_model(TrainConfig(model="vit_debug", img_size=16), splits)
    for part in ("train", "val", "test"):
        batches = list(eval_loader(splits, part, model, config))
        assert [len(batch["id"]) for batch in batches] == [3, 3, 2]
        assert [name for batch in batches for name in batch["id"]] == [str(n) for n in range(8)]
        assert batches[0]["image"].shape == (3, 3, 16, 16)


# ---- loaders of one's own


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
    task, losses = Classify(model, 0.1), []
    optimizer = make_optimizer(task, config)
    for step, (images, labels) in enumerate(plain_loader()):
        for group in optimizer.param_groups:
            group["lr"] = warmup_cosine(step, STEPS, 1, LR, config.min_lr)
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


def test_a_diverging_run_says_so():
    with pytest.raises(ValueError, match="loss must stay finite"):
        ViTTrainer(tiny(), device="cpu").train([(torch.full((2, 3, 8, 8), math.inf), torch.tensor([0, 1]))], epochs=1)
