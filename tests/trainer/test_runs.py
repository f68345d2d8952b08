"""From a config to a run folder: what is written, how training is wired, the demo, and the model for the images."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch.testing import assert_close

from vitrail.data.datasets import load_splits
from vitrail.data.imagesets import Splits, TensorSet
from vitrail.data.loading import make_loader
from vitrail.data.transforms import RandomResizedCrop, eval_transform
from vitrail.evaluation import eval_loader
from vitrail.tasks.base import evaluate
from vitrail.tasks.classify import Classify
from vitrail.train.config import TrainConfig
from vitrail.train.network import make_model
from vitrail.trainer import (
    demo_config,
    resume_training,
    run_training,
)
from vitrail.weights.load import load_model

# ---- a whole run


def test_a_run_folder_is_complete(run: Path, config: TrainConfig):
    found = {str(path.relative_to(run)) for path in run.rglob("*") if path.is_file()}
    assert found == {
        "config.yaml", "splits.json", "images.jsonl", "history.csv", "metrics.json", "report.html",
        "checkpoints/last.ckpt", "checkpoints/previous.ckpt",
        "checkpoints/best.ckpt", "checkpoints/epoch_001.ckpt", "checkpoints/epoch_002.ckpt",
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
        config,
        out=str(tmp_path / "run"),
        workers=2,
        worker_timeout=7,
        batch_size=3,
        crop="resized",
        crop_scale=0.3,
        mixup=0.4,
        erase=0.2,
        repeats=2,
        grow_from=16,
        multi_scale=0.5,
    )
    with pytest.raises(Stop):
        run_training(asked)
    splits, train, val, augment = load_splits(asked), wiring["train"], wiring["val"], wiring["augment"]
    for loader, images, shuffled in ((train, splits.train, True), (val, splits.val, False)):
        assert (loader.dataset.images.ids, loader.num_workers, loader.dataset.seed) == (images.ids, 2, asked.seed)
        assert loader.timeout == 7
        order = loader.batch_sampler
        assert (order.shuffle, order.batch_size, order.seed) == (shuffled, 3, asked.seed)
        assert order.repeats == (2 if shuffled else 1)
    preprocess = splits.preprocess()
    assert train.dataset.transform == RandomResizedCrop(preprocess, 0.3)
    assert val.dataset.transform == eval_transform(preprocess)
    assert wiring["task"].loss.label_smoothing == asked.label_smoothing == 0.1
    assert (augment.config, augment.preprocess, augment.num_classes) == (asked, preprocess, 2)
    assert (augment.sizes.config, augment.sizes.full, augment.sizes.cell) == (asked, (32, 32), 8)
    assert (wiring["config"], wiring["out"], wiring["resume"]) == (asked, Path(asked.out), False)
    assert wiring["notes"] == {"drawn": splits.digests()}


@pytest.mark.usefixtures("wiring")
def test_settings_that_do_nothing_are_told(config: TrainConfig, tmp_path: Path, caplog: pytest.LogCaptureFixture):
    """`crop` stands for what it is at the images' size."""
    with pytest.raises(Stop):
        run_training(replace(config, out=str(tmp_path), crop_scale=0.5, rand_ops=3, pad_mode="reflect", patience=1))
    idle = "--crop-scale needs --crop resized; --rand-ops needs --auto-augment rand"
    assert f"these settings do nothing here: {idle}" in caplog.messages


def test_images_that_keep_their_size_are_not_resized(config: TrainConfig, wiring: dict[str, Any], tmp_path: Path):
    with pytest.raises(Stop):
        run_training(replace(config, out=str(tmp_path)))
    assert wiring["augment"].sizes is None


@pytest.mark.usefixtures("wiring")
def test_sizes_to_come_are_told(config: TrainConfig, tmp_path: Path, caplog: pytest.LogCaptureFixture):
    caplog.set_level("INFO", "vitrail")
    with pytest.raises(Stop):
        run_training(replace(config, out=str(tmp_path), epochs=4, grow_from=16, grow_until=0.5))
    plan = "16 pixels from epoch 1 on, 24 pixels from epoch 2 on, 32 pixels from epoch 3 on"
    assert f"training images have a short side of {plan}" in caplog.messages
    assert not any("do not get to" in message for message in caplog.messages)


@pytest.mark.usefixtures("wiring")
@pytest.mark.parametrize(
    ("size", "until", "debug", "batches"), [(4, 0.75, False, 1), (1, 1.0, False, 4), (1, 1.0, True, 4)]
)
def test_a_run_that_ends_before_its_images_have_grown_says_so(
    size: int, until: float, debug: bool, batches: int, config: TrainConfig, tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
):  # fmt: skip
    short = replace(config, out=str(tmp_path), epochs=1, batch_size=size, grow_from=16, grow_until=until, debug=debug)
    with pytest.raises(Stop):
        run_training(short)
    assert caplog.messages[-1] == (
        f"training images do not get to their full 32 pixels in this run (batches: {batches}): give more --epochs, or "
        "a smaller --grow-until"
    )


@pytest.mark.usefixtures("wiring")
def test_a_guard_on_attention_does_nothing_where_there_is_none(
    config: TrainConfig, tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    for model in ("vit_debug", "resnet_debug", "convnext_debug"):
        caplog.clear()
        with pytest.raises(Stop):
            run_training(replace(config, model=model, out=str(tmp_path), entropy_floor=0.1))
        idle = "these settings do nothing here: --entropy-floor needs a model with attention"
        assert (idle in caplog.messages) == (model != "vit_debug")


@pytest.mark.usefixtures("wiring")
def test_few_held_out_images_are_told(config: TrainConfig, tmp_path: Path, caplog: pytest.LogCaptureFixture):
    with pytest.raises(Stop):
        run_training(replace(config, out=str(tmp_path)))
    few = "4 validation images; 4 test images: too few of every class to say much; give more images, or a larger --val"
    assert [message for message in caplog.messages if few in message]


def test_far_too_many_workers_are_refused_before_the_data_is_read(
    config: TrainConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("vitrail.trainer.load_splits", lambda *_: pytest.fail("the data was read"))
    with pytest.raises(ValueError, match="--workers must be at most"):
        run_training(replace(config, out=str(tmp_path), workers=10**6))


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
    with pytest.raises(ValueError, match=r"needs a run that wrote .*checkpoints; found none: start one with --out"):
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
    assert caplog.messages[0] == "vit_tiny_mlp1 is vit_tiny_mlp1_patch4_32, for images of 36 pixels"
    caplog.clear()
    make_model(TrainConfig(model="vit_debug"), some_splits())
    assert not [message for message in caplog.messages if "vit_debug is vit_debug" in message]


def photographs(folder: Path, sides: tuple[tuple[int, int], ...]) -> str:
    """Four classes of three pictures each, whose sizes are `sides` in turn."""
    for number in range(12):
        place = folder / f"c{number % 4}"
        place.mkdir(exist_ok=True)
        Image.new("RGB", sides[number % len(sides)], (20 * number, 9, 9)).save(place / f"{number}.png")
    return f"folder:{folder}"


ONE, MANY = ((48, 48),), ((48, 48), (60, 40), (90, 70))


@pytest.mark.parametrize(
    ("model", "sides", "img_size", "pixels", "said"),
    [
        ("vit_debug", MANY, None, 32, "vit_debug is trained on images of 32 x 32 pixels, its own size"),
        ("resnet_debug", MANY, None, 32, "resnet_debug is trained on images of 32 x 32 pixels, its own size"),
        ("cait_xxs24_384", MANY, None, 384, "cait_xxs24_384 is trained on images of 384 x 384 pixels, its own size"),
        ("vit_tiny", MANY, None, 224, "vit_tiny_patch16_224 is trained on images of 224 x 224 pixels, its own size"),
        ("vit_debug", MANY, 64, 64, "vit_debug is trained on images of 64 x 64 pixels, as --img-size says; it is made "
         "for 32 x 32 (--img-size 32); a cell of its last map is 8 pixels wide"),
        ("vit_tiny_patch16_224", ONE, None, 48, "vit_tiny_patch16_224 is trained on images of 48 x 48 pixels, the "
         "images' own size; it is made for 224 x 224 (--img-size 224); a cell of its last map is 16 pixels wide"),
        ("vit_tiny", ONE, None, 48, "vit_tiny_patch4_32 is trained on images of 48 x 48 pixels, the images' own "
         "size; it is made for 32 x 32 (--img-size 32); a cell of its last map is 4 pixels wide"),
    ],
)  # fmt: skip
def test_images_have_their_own_size_or_else_the_rows(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, model: str, sides: Any, img_size: int | None, pixels: int,
    said: str,
):  # fmt: skip
    caplog.set_level("INFO", logger="vitrail")
    config = TrainConfig(model=model, data=photographs(tmp_path, sides), img_size=img_size, val_fraction=0.3)
    splits = load_splits(config)
    made = make_model(config, splits)
    assert made.preprocess.img_size == made.config.img_size == (pixels, pixels)
    assert caplog.messages[-1] == said
    batch = next(iter(eval_loader(splits.test, made, config)))
    assert batch["image"].shape[-2:] == (pixels, pixels)


def test_the_record_of_a_run_has_the_rows_size(tmp_path: Path, wiring: dict[str, Any]):
    (folder := tmp_path / "photos").mkdir()
    config = TrainConfig(model="vit_debug", data=photographs(folder, MANY), out=str(tmp_path / "run"), val_fraction=0.3)
    with pytest.raises(Stop):
        run_training(config)
    assert json.loads((tmp_path / "run/splits.json").read_text())["preprocess"]["img_size"] == [32, 32]
    assert next(iter(wiring["train"]))["image"].shape[-2:] == (32, 32)


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


@pytest.mark.parametrize("pool", ["token", "avg", "map"])
def test_a_model_reads_what_the_run_says(pool: str):
    model = make_model(TrainConfig(model="vit_debug", global_pool=pool), some_splits())
    assert model.config.global_pool == pool


def test_a_pooling_that_a_model_has_not():
    assert make_model(TrainConfig(model="vit_debug"), some_splits()).config.global_pool == "token", "its row's"
    with pytest.raises(ValueError, match=r"resnet_debug takes no --global-pool; got avg: leave it out"):
        make_model(TrainConfig(model="resnet_debug", global_pool="avg"), some_splits())


def test_a_loader_for_every_part():
    splits, config = some_splits(), TrainConfig(batch_size=3)
    model = make_model(TrainConfig(model="vit_debug", img_size=16), splits)
    for part in ("train", "val", "test"):
        batches = list(eval_loader(getattr(splits, part), model, config))
        assert [len(batch["id"]) for batch in batches] == [3, 3, 2]
        assert [name for batch in batches for name in batch["id"]] == [str(n) for n in range(8)]
        assert batches[0]["image"].shape == (3, 3, 16, 16)
