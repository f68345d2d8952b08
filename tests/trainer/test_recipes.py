"""The recipes in `configs/`: each is read, says where its result stands, and trains what it says."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image

from vitrail.models.registry import ROWS, resolve_name
from vitrail.train.config import TrainConfig
from vitrail.trainer import run_training
from vitrail.weights.load import load_model

CONFIGS = Path(__file__).resolve().parents[2] / "configs"
SHARED = set(CONFIGS.rglob("training.yaml"))
RECIPES = sorted(set(CONFIGS.rglob("*.yaml")) - SHARED)
IMAGENET = [path for path in RECIPES if path.parent.name == "imagenet"]


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_a_recipe_says_its_command_and_where_its_result_stands(path: Path):
    config, text = TrainConfig.from_yaml(path), path.read_text(encoding="utf-8")
    header = [line for line in text.splitlines() if line.startswith("#")]
    assert f"#   vitrail train --config {path.relative_to(CONFIGS.parent)} --data-dir DIR" in header
    published = any("Published: " in line and " % top-1" in line for line in header)
    assert published == (path in IMAGENET)
    assert published or "# Results, hardware and times: docs/results.md." in header
    row = resolve_name(config.model, 224 if path in IMAGENET else 32)
    assert row in ROWS and row.endswith("_224" if path in IMAGENET else "_32")
    assert config.out.startswith("runs/"), "each has a folder of its own"


def test_no_two_recipes_share_a_folder():
    outs = [TrainConfig.from_yaml(path).out for path in RECIPES]
    assert len(set(outs)) == len(outs) == len(RECIPES) >= 14


def test_what_recipes_share_stands_in_one_file():
    for path in set(RECIPES) - set(IMAGENET):
        assert path.read_text().count("include: training.yaml") == 1
    shared = TrainConfig.from_yaml(CONFIGS / "training.yaml")
    for path in set(CONFIGS.glob("*.yaml")) & set(RECIPES):
        own = TrainConfig.from_yaml(path)
        assert (own.epochs, own.lr, own.batch_size) == (shared.epochs, shared.lr, shared.batch_size)
    for path in set((CONFIGS / "quick").glob("*.yaml")) & set(RECIPES):
        own = TrainConfig.from_yaml(path)
        assert (own.mixup, own.auto_augment, own.grow_from, own.label_smoothing) == (0, "none", 16, 0.1)
        assert own.epochs <= 30


@pytest.mark.parametrize(
    ("name", "batch", "lr", "epochs"),
    [
        ("vit_base_patch16", 4096, 3e-3, 300),
        ("vit_base_patch16_avg", 1024, 1e-3, 300),
        ("vit_large_patch16", 1024, 0.5, 600),
        ("deit_base_patch16", 1024, 1e-3, 300),
        ("swin_tiny", 1024, 1e-3, 300),
        ("swin_base", 1024, 1e-3, 300),
    ],
)
def test_published_batches_and_rates(name: str, batch: int, lr: float, epochs: int):
    config = TrainConfig.from_yaml(CONFIGS / "imagenet" / f"{name}.yaml")
    assert config.batch_size * config.devices * config.num_nodes * config.accumulate == batch
    assert (config.numbers().lr, config.epochs) == (lr, epochs)


def test_the_two_recipes_of_one_row_read_other_tokens():
    pools = {TrainConfig.from_yaml(path).global_pool for path in IMAGENET if path.stem.startswith("vit_base_patch16")}
    assert pools == {"auto", "avg"}


@pytest.mark.parametrize("name", ["deit_base_patch16", "swin_tiny", "swin_base"])
def test_strengths_that_are_drawn_as_timms(name: str):
    """rand-m9-mstd0.5: 9 and 0.5 of 10, each operation by half."""
    config = TrainConfig.from_yaml(CONFIGS / "imagenet" / f"{name}.yaml")
    assert (config.auto_augment, config.rand_ops, config.rand_chance) == ("rand", 2, 0.5)
    assert (config.rand_magnitude / 30, config.rand_std / 30) == (0.9, 0.05)


@pytest.fixture(scope="module")
def imagenet(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """train/ and val/ with a folder for each of three synsets: photographs of several sizes."""
    root = tmp_path_factory.mktemp("imagenet")
    generator = torch.Generator().manual_seed(0)
    for part, count in (("train", 6), ("val", 2)):
        for low, synset in ((0, "n01440764"), (60, "n02102040"), (120, "n03000684")):
            for number in range(count):
                path = root / part / synset / f"{synset}_{number}.JPEG"
                path.parent.mkdir(parents=True, exist_ok=True)
                shape = (48 + 8 * number, 64, 3)
                noise = torch.randint(low, low + 120, shape, dtype=torch.uint8, generator=generator)
                Image.fromarray(noise.numpy()).save(path)
    return root


@pytest.mark.parametrize("path", IMAGENET, ids=lambda path: path.stem)
def test_an_imagenet_recipe_runs_from_end_to_end(path: Path, imagenet: Path, tmp_path: Path):
    """With a small network of its family, and on one device; all else is the recipe's."""
    config = TrainConfig.from_yaml(path)
    model = f"{config.model.partition('_')[0]}_debug"
    run = replace(
        config, model=model, img_size=32, data_dir=str(imagenet), devices=1, num_nodes=1, workers=0, batch_size=6,
        epochs=1, debug=True, device="cpu", precision="fp32", out=str(tmp_path / "run"),
    )  # fmt: skip
    history = run_training(run)
    assert history.rows[-1]["train_loss"] > 0 and "val_accuracy" in history.rows[-1]
    wanted = {"auto": {"token", "none"}}.get(config.global_pool, {config.global_pool})
    assert getattr(load_model(tmp_path / "run").config, "global_pool", "none") in wanted
    assert (tmp_path / "run" / "report.html").is_file() and (tmp_path / "run" / "model").is_dir()
