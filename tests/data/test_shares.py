"""Processes that share images of which some cannot be read: figures are of all that could be, and nobody waits."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from vitrail.data.imagesets import TensorSet
from vitrail.data.loading import make_loader
from vitrail.models.registry import build_model
from vitrail.tasks.base import evaluate
from vitrail.tasks.classify import Classify


def images(bad: list[int]) -> TensorSet:
    pixels = torch.randint(256, (4, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    return TensorSet(pixels, torch.arange(4) % 2, ("a", "b"), list("wxyz"), dict.fromkeys(bad, "cut short"))


def judged(rank: int, bad: list[int], folder: Path) -> None:
    """What one of two processes finds of its half of the images, or its error, in a file."""
    dist.init_process_group("gloo")
    torch.manual_seed(0)
    task = Classify(build_model("vit_debug", num_classes=2, depth=1))
    found: Any
    try:
        found = evaluate(task, make_loader(images(bad), batch_size=2, train=False, on_bad_image="skip"))["confusion"]
    except ValueError as error:
        found = str(error)
    torch.save(found, folder / f"{rank}.pt")


@pytest.mark.fault(18, 19)
@pytest.mark.forks
@pytest.mark.parametrize(("bad", "read"), [([0, 2], 2), ([0, 1, 2, 3], 0)])
def test_two_processes_have_figures_while_one_of_them_can_read_an_image(
    bad: list[int], read: int, in_two_processes: Callable[[Callable[[int], None]], None], tmp_path: Path
):
    in_two_processes(lambda rank: judged(rank, bad, tmp_path))
    one, other = (torch.load(tmp_path / f"{rank}.pt") for rank in (0, 1))
    if read:
        assert one.sum() == read and torch.equal(one, other)
    else:
        assert one == other
        assert one.startswith("figures need an image that can be read and has a label; got none")
