"""Photographs on a disk to batches that a network can be trained on, on one core, as a Markdown table.

    python benchmarks/pictures.py FOLDER --batch 32

Every way takes a random part of each JPEG, resizes it to 224 x 224, mirrors half of them, normalises and stacks.

Below the table stands what that does to the pixels. Where a part is much larger than 224 pixels, vitrail has its JPEG
decoded at a smaller size; how far such images are from those that were decoded whole is their peak signal-to-noise
ratio, and torchvision's bilinear beside its bicubic ones, of the same parts, give a measure for it.
"""

from __future__ import annotations

import argparse
import math
import statistics
import time
from collections.abc import Callable
from functools import partial
from itertools import chain, islice, repeat
from pathlib import Path
from typing import Any

import torch
from clock import machine, median, ratio, rounds
from PIL import Image
from torch import Tensor
from torchvision import transforms
from torchvision.io import ImageReadMode, decode_image
from torchvision.transforms import InterpolationMode, v2

from vitrail.data.augment import AugmentConfig, BatchAugment
from vitrail.data.imagesets import FileSet
from vitrail.data.loading import make_loader
from vitrail.data.transforms import RandomResizedCrop
from vitrail.images import read_image, read_part
from vitrail.records import Preprocess

SIDE = 224
SNAP = 8
"""pixels; parts are compared that begin and end on this grid, since a shift of half a pixel is no loss"""
PRE = Preprocess(img_size=(SIDE, SIDE))
CUT = AugmentConfig(crop="resized")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--repeats", type=int, default=7)
    args = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    paths = sorted(args.folder.rglob("*.jpg"))
    print(f"{len(paths)} JPEGs, {_usual(paths)}, batch {args.batch}; {machine('cpu', 'torchvision', 'pillow')}\n")
    found = rounds(ways(paths, args.batch), args.repeats, timer=time.process_time)
    print("| way | images a second of processor time | vitrail is faster by |\n|---|---:|---:|")
    for name in found[0]:
        print(f"| {name} | {args.batch / median(found, name):.0f} | {ratio(found, name):.2f} |")
    print(f"\n{told(paths)}")


def _usual(paths: list[Path]) -> str:
    sizes = [Image.open(path).size for path in paths]
    width, height = (statistics.median(side) for side in zip(*sizes, strict=True))
    return f"{width:.0f} x {height:.0f} pixels and {statistics.median(p.stat().st_size for p in paths) / 1e3:.0f} kB"


def ways(paths: list[Path], batch: int) -> dict[str, Callable[[], Any]]:
    """Each makes the next batch."""
    pictures = FileSet(paths, torch.zeros(len(paths), dtype=torch.long), ["one"], [str(path) for path in paths])
    loader = make_loader(pictures, batch_size=batch, train=True, transform=RandomResizedCrop(PRE))
    drawn, augment = chain.from_iterable(repeat(loader)), BatchAugment(CUT, PRE, 1)
    turns = {name: chain.from_iterable(repeat(paths)) for name in ("bicubic", "bilinear", "v2")}
    return {
        "vitrail": lambda: augment(next(drawn)),
        "Pillow and torchvision v1, bicubic": partial(_stacked, _v1("bicubic"), turns["bicubic"], batch),
        "Pillow and torchvision v1, bilinear": partial(_stacked, _v1("bilinear"), turns["bilinear"], batch),
        "torchvision decode_image and v2, bicubic": partial(_stacked, _v2(), turns["v2"], batch),
    }


def _stacked(ready: Callable[[Path], Tensor], turn: Any, batch: int) -> Tensor:
    return torch.stack([ready(path) for path in islice(turn, batch)])


def _v1(mode: str) -> Callable[[Path], Tensor]:
    recipe = transforms.Compose([
        transforms.RandomResizedCrop(SIDE, interpolation=InterpolationMode(mode)), transforms.RandomHorizontalFlip(),
        transforms.ToTensor(), transforms.Normalize(PRE.mean, PRE.std),
    ])  # fmt: skip
    return lambda path: recipe(Image.open(path).convert("RGB"))


def _v2() -> Callable[[Path], Tensor]:
    recipe = v2.Compose([
        v2.RandomResizedCrop(SIDE, interpolation=InterpolationMode.BICUBIC, antialias=True), v2.RandomHorizontalFlip(),
        v2.ToDtype(torch.float32, scale=True), v2.Normalize(PRE.mean, PRE.std),
    ])  # fmt: skip
    return lambda path: recipe(decode_image(str(path), ImageReadMode.RGB))


def told(paths: list[Path]) -> str:
    """How many parts were decoded smaller, and how far these are from the others."""
    crop, bilinear = RandomResizedCrop(PRE), RandomResizedCrop(PRE.replace(interpolation="bilinear"))
    ours, theirs = [], []
    for path in paths:
        whole = read_image(path)
        top, left, height, width = box = [side // SNAP * SNAP for side in crop.box(*whole.shape[-2:])]
        part = read_part(path, lambda *_, box=box: box, PRE.img_size)
        if part.shape[-2] < height:
            exact = whole[:, top : top + height, left : left + width]
            ours.append(_noise(crop.sized(part), crop.sized(exact)))
            theirs.append(_noise(bilinear.sized(exact), crop.sized(exact)))
    if not ours:
        return "No part was decoded at a smaller size: all pixels are those of pictures decoded whole."
    return (
        f"{len(ours)} of {len(paths)} parts were decoded at a smaller size: {statistics.median(ours):.1f} dB from "
        f"those decoded whole (least {min(ours):.1f}); bilinear from bicubic {statistics.median(theirs):.1f} dB."
    )


def _noise(one: Tensor, other: Tensor) -> float:
    """Peak signal-to-noise ratio in dB."""
    return 10 * math.log10(255**2 / max((one.float() - other.float()).square().mean().item(), 1e-9))


if __name__ == "__main__":
    main()
