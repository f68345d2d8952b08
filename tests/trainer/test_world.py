"""A run of two processes that is gone on with by one."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from vitrail.train.config import TrainConfig
from vitrail.trainer import resume_training, run_training


@pytest.mark.forks
def test_one_process_goes_on_with_steps_of_as_many_images(
    photos: Path, tmp_path: Path, in_two_processes: Callable[[Callable[[int], None]], None], caplog
):
    config = TrainConfig(
        model="vit_debug", data=f"folder:{photos}", batch_size=2, val_fraction=0.34, device="cpu", epochs=1, devices=2,
        strategy="fsdp", out=str(tmp_path / "run"), ema=0.9,
    )  # fmt: skip
    in_two_processes(lambda rank: run_training(config))
    one = replace(config, devices=1, epochs=2)
    with pytest.raises(ValueError, match=r"--devices was 2, got 1: .* with --allow-world-change \(in Python"):
        resume_training(config.out, one)
    with caplog.at_level(logging.WARNING, "vitrail"):
        history = resume_training(config.out, one, allow_world_change=True)
    assert history["epoch"] == [1, 2]
    assert "each step has its 4 images still: --accumulate is 2 from here on" in caplog.text
    written = tmp_path / "run" / "config.yaml"
    assert TrainConfig.from_yaml(written).accumulate == 2
    assert written.read_text().startswith("# overridden from epoch 2 on: --accumulate 1 -> 2\n")
