"""Small image folders made on the spot."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from PIL import Image

from vitrail.data.imagesets import TensorSet

Folders = Callable[..., Path]


def write(path: Path, size: tuple[int, int] = (8, 8), value: int = 0) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, (value % 256, 128, 255 - value % 256)).save(path)


@pytest.fixture
def write_image() -> Callable[..., None]:
    """write_image(path, size=(8, 8), value=0) writes a plain image and the folders above it."""
    return write


@pytest.fixture
def make_folder(tmp_path: Path) -> Folders:
    """make_folder("train/cat", "train/dog", count=3, size=(8, 8)) writes images and returns the root."""

    def make(*classes: str, count: int = 3, size: tuple[int, int] = (8, 8)) -> Path:
        for place, name in enumerate(classes):
            for n in range(count):
                write(tmp_path / name / f"{n:03d}.png", size, 40 * place + n)
        return tmp_path

    return make


@pytest.fixture
def tensor_set() -> TensorSet:
    """23 images of 3 x 6 x 5; the first pixel of image n is n."""
    images = torch.randint(256, (23, 3, 6, 5), dtype=torch.uint8)
    images[:, 0, 0, 0] = torch.arange(23)
    return TensorSet(images, torch.arange(23) % 3, ("a", "b", "c"), [f"n{i}" for i in range(23)])
