"""The blood cells that ship with the package: 364 photographs (MIT, see their README), 4,886 boxes, three classes.

Two views: whole photographs with boxes (`bloodcells_boxes`), and one square picture a cell (`bloodcells`).
"""

from __future__ import annotations

import csv
from collections.abc import Iterator
from functools import cache
from itertools import groupby
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from vitrail.data.imagesets import TensorSet
from vitrail.images import open_image

CLASSES = ("Platelets", "RBC", "WBC")
MARGIN = 1.25
"""a cell's picture is a square of this times its box's longer side"""
SIZE = 64
LARGEST = 128
"""the photographs show no cell with more pixels than that"""
Corners = tuple[float, float, float, float]
FOLDER = Path(__file__).parents[1] / "assets/bloodcells"


class CellBox(NamedTuple):
    """One cell in one photograph."""

    file: str
    split: str
    label: int
    box: Corners
    """x0, y0, x1, y1 in pixels of the photograph"""


class Boxes(NamedTuple):
    """The cells of one photograph."""

    path: Path
    boxes: Tensor
    """(n, 4) float: x0, y0, x1, y1 in pixels"""
    labels: Tensor
    """(n,) int64, indices into `CLASSES`"""


@cache
def cell_boxes() -> tuple[CellBox, ...]:
    """Every box, photograph by photograph."""
    with (FOLDER / "boxes.csv").open(newline="") as file:
        return tuple(_cell(row) for row in csv.DictReader(file))


def _cell(row: dict[str, str]) -> CellBox:
    x0, y0, x1, y1 = (float(row[key]) for key in ("x0", "y0", "x1", "y1"))
    return CellBox(row["file"], row["split"], CLASSES.index(row["class"]), (x0, y0, x1, y1))


def bloodcells_boxes(split: str) -> list[Boxes]:
    """The photographs of `train`, `val` or `test` with their boxes: for detection."""
    found = [box for box in cell_boxes() if box.split == split]
    if not found:
        raise ValueError(f"bloodcells has the splits train, val, test; got {split!r}")
    return [_photo(file, list(cells)) for file, cells in groupby(found, key=lambda box: box.file)]


def _photo(file: str, cells: list[CellBox]) -> Boxes:
    boxes, labels = torch.tensor([cell.box for cell in cells]), torch.tensor([cell.label for cell in cells])
    return Boxes(FOLDER / f"photos/{file}.webp", boxes, labels)


def square_around(box: Corners, width: int, height: int) -> Corners:
    """The square x0, y0, x1, y1 around a box with `MARGIN`, moved inside the photograph where it hangs over."""
    x0, y0, x1, y1 = box
    side = min(MARGIN * max(x1 - x0, y1 - y0), width, height)
    left = min(max((x0 + x1 - side) / 2, 0), width - side)
    top = min(max((y0 + y1 - side) / 2, 0), height - side)
    return left, top, left + side, top + side


def bloodcells(img_size: int | None = None) -> dict[str, TensorSet]:
    """The cells by split, each resized to `img_size` (64 unless given, at most 128) pixels square."""
    size = min(img_size or SIZE, LARGEST)
    cells = cell_boxes()
    pixels = np.empty((len(cells), size, size, 3), dtype=np.uint8)
    for row, picture in enumerate(_cut(cells, size)):
        pixels[row] = np.asarray(picture)
    images = torch.from_numpy(pixels).permute(0, 3, 1, 2).contiguous()
    every = TensorSet(images, torch.tensor([cell.label for cell in cells]), CLASSES, _ids(cells))
    rows = {split: [i for i, cell in enumerate(cells) if cell.split == split] for split in ("train", "val", "test")}
    return {split: every.subset(torch.tensor(chosen)) for split, chosen in rows.items()}


def _cut(cells: tuple[CellBox, ...], size: int) -> Iterator[Image.Image]:
    for file, group in groupby(cells, key=lambda cell: cell.file):
        photo = open_image(FOLDER / f"photos/{file}.webp")
        for cell in group:
            square = square_around(cell.box, *photo.size)
            yield photo.resize((size, size), Image.Resampling.BICUBIC, box=square)


def _ids(cells: tuple[CellBox, ...]) -> list[str]:
    """Photograph and place in it: `BloodImage_00000/3`."""
    return [f"{file}/{n}" for file, group in groupby(cells, key=lambda cell: cell.file) for n, _ in enumerate(group)]


def bloodcells_samples(folder: str | Path, count: int = 6) -> list[Path]:
    """Writes `count` held-out cells as PNG files, classes in turn, and returns their paths: something to predict."""
    held_out = [[c for c in cell_boxes() if (c.split, c.label) == ("test", label)] for label in range(len(CLASSES))]
    chosen = tuple(cell for group in zip(*held_out, strict=False) for cell in group)[:count]
    paths = [Path(folder) / f"{CLASSES[cell.label].lower()}_{n // len(CLASSES)}.png" for n, cell in enumerate(chosen)]
    Path(folder).mkdir(parents=True, exist_ok=True)
    for path, picture in zip(paths, _cut(chosen, SIZE), strict=True):
        picture.save(path)
    return paths
