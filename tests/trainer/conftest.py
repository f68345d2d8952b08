"""A finished run of two epochs on a folder of photographs."""

from __future__ import annotations

from pathlib import Path

import pytest

from vitrail.train.config import TrainConfig
from vitrail.trainer import run_training


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
