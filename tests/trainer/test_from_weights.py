"""`--from`: a run that begins with somebody's weights, with a head, a size and channels of the data's own."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from vitrail.cli import main
from vitrail.data.datasets import load_splits
from vitrail.data.imagesets import Splits, TensorSet
from vitrail.models.registry import build_model
from vitrail.train.config import TrainConfig
from vitrail.train.engine import Interrupted
from vitrail.train.network import make_model
from vitrail.trainer import resume_training, run_training
from vitrail.weights.convert import convert
from vitrail.weights.load import load_model

CLASSES = ("ant", "bee", "cat")
MEAN = (0.1, 0.2, 0.3)


def some_splits(side: int = 32, channels: int = 3, classes: tuple[str, ...] = CLASSES) -> Splits:
    torch.manual_seed(0)
    images = torch.randint(0, 256, (6, channels, side, side), dtype=torch.uint8)
    part = TensorSet(images, torch.arange(6) % len(classes), classes, [str(n) for n in range(6)])
    return Splits(name="cifar10", train=part, val=part, test=part)


@pytest.fixture
def weights(tmp_path: Path) -> Path:
    """A model folder: trained for ants, bees and cats, by dropping, with a mean of its own and a closer cut."""
    torch.manual_seed(1)
    model = build_model("vit_debug", num_classes=3, drop_path_rate=0.3)
    model.classes, model.preprocess = CLASSES, replace(model.preprocess, mean=MEAN, crop_pct=0.9)
    return model.save_pretrained(tmp_path / "weights")


def begun(source: Any, splits: Splits, **changes: Any) -> Any:
    return make_model(TrainConfig(from_weights=str(source), **changes), splits)


def test_a_head_of_the_same_classes_is_kept(weights: Path, caplog: pytest.LogCaptureFixture):
    caplog.set_level("INFO", logger="vitrail")
    model, trained = begun(weights, some_splits()), load_model(weights)
    assert all(torch.equal(value, trained.state_dict()[name]) for name, value in model.state_dict().items())
    assert caplog.messages == [
        f"{weights}: its head is kept, for the same 3 classes",
        "vit_debug is trained on images of 32 x 32 pixels, the images' own size",
    ]
    assert (model.variant, model.classes, model.training) == ("vit_debug", CLASSES, True)


@pytest.mark.parametrize(
    ("classes", "unlike"),
    [
        (("bee", "ant", "cat"), "the same in another order"),
        (("ant", "bee", "cat", "dog"), "with dog"),
        (("ant", "cat", "fly"), "without bee; with fly"),
    ],
)
def test_other_classes_get_a_fresh_head(
    weights: Path, classes: tuple[str, ...], unlike: str, caplog: pytest.LogCaptureFixture
):
    caplog.set_level("INFO", logger="vitrail")
    model, again, trained = (
        begun(weights, some_splits(classes=classes)),
        begun(weights, some_splits(classes=classes)),
        load_model(weights),
    )
    assert (
        caplog.messages[0] == f"{weights}: a fresh head for {len(classes)} classes, in the place of one for 3: {unlike}"
    )
    assert (model.num_classes, model.config.num_classes, model.classes) == (len(classes), len(classes), classes)
    assert not model.head.bias.any()
    assert torch.equal(model.head.weight, again.head.weight), "it is drawn from the seed"
    assert not torch.equal(model.head.weight[:3], trained.head.weight)
    assert torch.equal(model.blocks[1].mlp.fc1.weight, trained.blocks[1].mlp.fc1.weight)


def test_a_head_of_classes_without_names(weights: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture):
    caplog.set_level("INFO", logger="vitrail")
    torch.save(load_model(weights).state_dict(), tmp_path / "plain.pth")
    begun(tmp_path / "plain.pth", some_splits())
    assert f"{tmp_path / 'plain.pth'}: a fresh head for 3 classes, in the place of one for 3" in caplog.messages


def test_a_head_that_reads_something_else(weights: Path, caplog: pytest.LogCaptureFixture):
    caplog.set_level("INFO", logger="vitrail")
    assert begun(weights, some_splits(), global_pool="token").head.weight.equal(load_model(weights).head.weight)
    caplog.clear()
    model, trained = begun(weights, some_splits(), global_pool="avg"), load_model(weights)
    assert caplog.messages[0] == f"{weights}: its head read token; now it reads avg"
    assert caplog.messages[1] == f"{weights}: a fresh head for 3 classes, in the place of one for 3"
    assert model.config.global_pool == "avg" and not torch.equal(model.head.weight, trained.head.weight)
    own, taken = model.state_dict(), trained.state_dict()
    assert own.keys() == taken.keys() and all(
        torch.equal(own[name], taken[name]) for name in own if not name.startswith("head.")
    )
    again = begun(weights, some_splits(), global_pool="map")
    assert torch.equal(again.norm.weight, trained.norm.weight) and again.attn_pool is not None


def test_weights_that_are_not_there_are_named_with_the_flag_and_the_nearest(weights: Path):
    near = f"there is no such folder or file as {weights}s: the nearest is {weights}"
    with pytest.raises(ValueError, match=f"^--from {weights}s: {near}$"):
        begun(f"{weights}s", some_splits())
    with pytest.raises(ValueError, match=f"as {weights}/no/such: nor {weights}/no$"):
        begun(weights / "no" / "such", some_splits())


def test_a_pooling_that_a_model_has_not(tmp_path: Path):
    build_model("resnet_debug", num_classes=3).save_pretrained(tmp_path / "resnet")
    with pytest.raises(ValueError, match=r"resnet_debug takes no --global-pool; got avg: leave it out"):
        begun(tmp_path / "resnet", some_splits(), global_pool="avg")


def test_the_size_is_the_images_and_the_preprocessing_the_weights(weights: Path, caplog: pytest.LogCaptureFixture):
    caplog.set_level("INFO", logger="vitrail")
    model = begun(weights, some_splits(side=48))
    assert model.config.img_size == model.preprocess.img_size == (48, 48)
    assert (model.preprocess.mean, model.preprocess.crop_pct) == (MEAN, 1.0)
    assert any("resized pos_embed (1, 17, 48) -> (1, 37, 48)" in message for message in caplog.messages)
    assert caplog.messages[-1].startswith("vit_debug is trained on images of 48 x 48 pixels, the images' own size; it ")
    assert begun(weights, some_splits(side=48), img_size=64).preprocess.img_size == (64, 64)


def photographs(folder: Path) -> str:
    for number in range(12):
        place = folder / f"c{number % 3}"
        place.mkdir(exist_ok=True, parents=True)
        Image.new("RGB", [(48, 48), (60, 40)][number % 2], (20 * number, 9, 9)).save(place / f"{number}.png")
    return f"folder:{folder}"


def test_images_of_many_sizes_get_that_of_the_weights(weights: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture):
    caplog.set_level("INFO", logger="vitrail")
    splits = load_splits(TrainConfig(data=photographs(tmp_path / "photos"), val_fraction=0.3))
    model = begun(weights, splits)
    assert (model.preprocess.img_size, model.preprocess.crop_pct) == ((32, 32), 0.9)
    assert caplog.messages[-1] == "vit_debug is trained on images of 32 x 32 pixels, the weights' own size"


def test_grey_images_get_the_sum_of_the_kernels(weights: Path):
    splits = some_splits(channels=1)
    model, trained = begun(weights, splits), load_model(weights)
    assert torch.allclose(model.patch_embed.proj.weight, trained.patch_embed.proj.weight.sum(1, keepdim=True))
    assert model.preprocess.mean == splits.preprocess().mean, "there are no three means to take over"


def test_dropout_is_the_runs_and_not_the_weights(weights: Path):
    assert begun(weights, some_splits()).config.drop_path_rate == 0
    model, trained = begun(weights, some_splits(), drop_path=0.1, drop_rate=0.2), load_model(weights)
    assert (model.config.drop_path_rate, model.config.drop_rate) == (0.1, 0.2)
    assert torch.equal(model.blocks[2].attn.qkv.weight, trained.blocks[2].attn.qkv.weight)
    assert model.preprocess.mean == MEAN


def test_a_dropout_that_the_network_has_not(tmp_path: Path):
    folder = build_model("resnet_debug").save_pretrained(tmp_path / "resnet")
    with pytest.raises(ValueError, match=r"resnet_debug takes no --drop-path; got 0\.1: leave it out"):
        begun(folder, some_splits(), drop_path=0.1)


def test_unknown_preprocessing_is_that_of_the_data(weights: Path, tmp_path: Path):
    model = load_model(weights)
    model.preprocess = model.preprocess.replace(known=False)
    splits = some_splits()
    assert begun(model.save_pretrained(tmp_path / "unknown"), splits).preprocess.mean == splits.preprocess().mean


def test_a_named_model_takes_the_weights_of_a_file(weights: Path, tmp_path: Path):
    torch.save(load_model(weights).state_dict(), tmp_path / "plain.pth")
    model = begun(tmp_path / "plain.pth", some_splits(), model="vit_debug")
    assert torch.equal(model.blocks[0].attn.qkv.weight, load_model(weights).blocks[0].attn.qkv.weight)
    with pytest.raises(ValueError, match="weights must fit the network exactly"):
        begun(tmp_path / "plain.pth", some_splits(), model="swin_debug")


def test_timms_folders_are_taken(weights: Path, tmp_path: Path):
    model = build_model("deit_tiny_patch16_224", num_classes=3)
    folder = convert(model, tmp_path / "timm", "timm")
    found = begun(folder, some_splits(classes=("a", "b")), img_size=32)
    assert torch.equal(found.blocks[3].mlp.fc2.weight, model.blocks[3].mlp.fc2.weight)
    assert (found.num_classes, found.preprocess.img_size) == (2, (32, 32))


def test_weights_that_are_not_there():
    with pytest.raises(ValueError, match="^--from vit_tinny: no weights are known for 'vit_tinny'"):
        begun("vit_tinny", some_splits())


def test_freezing_what_was_drawn_is_said(caplog: pytest.LogCaptureFixture):
    make_model(TrainConfig(model="vit_debug", freeze="backbone"), some_splits())
    assert caplog.messages == ["--freeze backbone freezes weights that are drawn at random: --from names trained ones"]
    assert make_model(TrainConfig(model="vit_debug", freeze="prompts:4"), some_splits()).config.reg_tokens == 4


# ---- whole runs


@pytest.fixture
def photos(tmp_path: Path) -> str:
    torch.manual_seed(0)
    for number in range(30):
        place = tmp_path / "photos" / ("dark", "light", "red")[number % 3]
        place.mkdir(parents=True, exist_ok=True)
        noise = torch.randint(0, 90, (16, 16, 3), dtype=torch.uint8) + 80 * (number % 3)
        Image.fromarray(noise.numpy()).save(place / f"{number}.png")
    return f"folder:{tmp_path / 'photos'}"


@pytest.mark.parametrize("freeze", ["deep_prompts:2", "first:1"])
def test_a_run_goes_on_when_its_weights_are_gone(
    freeze: str, weights: Path, photos: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    recipe: dict[str, Any] = dict(
        data=photos, val_fraction=0.2, epochs=2, batch_size=6, device="cpu", freeze=freeze, from_weights=str(weights),
        img_size=16, drop_path=0.2,
    )  # fmt: skip
    run_training(TrainConfig(**recipe, out=str(tmp_path / "whole")))
    record = json.loads((tmp_path / "whole" / "splits.json").read_text())
    assert record["network"]["name"] == "vit_debug"
    assert record["network"]["config"]["reg_tokens"] == (2 if freeze == "deep_prompts:2" else 0)

    from vitrail.train.engine import TaskModule

    step = TaskModule.training_step

    def interrupted(self: Any, batch: Any, number: int) -> Any:
        if self.trainer.current_epoch == 1 and number == 1:
            import os
            import signal

            os.kill(os.getpid(), signal.SIGINT)
        return step(self, batch, number)

    monkeypatch.setattr(TaskModule, "training_step", interrupted)
    with pytest.raises(Interrupted):
        run_training(TrainConfig(**recipe, out=str(tmp_path / "run")))
    monkeypatch.undo()
    shutil.rmtree(weights)
    resume_training(tmp_path / "run")
    whole, resumed = (load_model(tmp_path / name) for name in ("whole", "run"))
    assert (resumed.preprocess, resumed.classes, resumed.variant) == (whole.preprocess, whole.classes, whole.variant)
    assert all(torch.equal(value, resumed.state_dict()[name]) for name, value in whole.state_dict().items())


@pytest.mark.parametrize("flag", ["--from", "--pretrained", "--finetune", "--initial-checkpoint", "--from-weights"])
def test_other_libraries_flags(flag: str, monkeypatch: pytest.MonkeyPatch):
    seen = []
    monkeypatch.setattr("vitrail.trainer.run_training", lambda config, override: seen.append(config) or [])
    assert main(["train", flag, "somewhere", "--out", "runs/x"]) == 0
    assert (seen[0].from_weights, seen[0].model) == ("somewhere", "auto")


def test_a_file_of_settings_says_from(tmp_path: Path):
    (tmp_path / "a.yaml").write_text("from: somewhere\nfreeze: lora:4\n")
    assert TrainConfig.from_yaml(tmp_path / "a.yaml").changes() == {"from_weights": "somewhere", "freeze": "lora:4"}
