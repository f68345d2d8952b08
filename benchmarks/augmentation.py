"""What share of a training step augmentation takes, on small images in memory, as a Markdown table.

    python benchmarks/augmentation.py vit_tiny_patch4_32 --batch 128

A step is what `vitrail train` does with a batch: draw it from memory, augment, normalise, forward, backward, AdamW.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from functools import partial
from itertools import chain, repeat
from typing import Any

import torch
from clock import machine, median, rounds

from vitrail.data.augment import AugmentConfig, BatchAugment
from vitrail.data.imagesets import TensorSet
from vitrail.data.loading import make_loader
from vitrail.models.registry import build_model
from vitrail.records import Batch
from vitrail.tasks.classify import Classify
from vitrail.train.config import TrainConfig
from vitrail.train.optim import make_optimizer

RECIPES = {
    "crop and flip (the default)": AugmentConfig(),
    "and mixup and cutmix": AugmentConfig(mixup=0.8, cutmix=1.0),
    "and RandAugment and erasing": AugmentConfig(mixup=0.8, cutmix=1.0, auto_augment="rand", erase=0.25),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("row", nargs="?", default="vit_tiny_patch4_32")
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--repeats", type=int, default=5)
    args = parser.parse_args()
    print(f"{args.row}, batch {args.batch}, fp32; {machine('cpu')}\n")
    print("| recipe | augmentation, ms | draw, ms | step, ms | share of the step |\n|---|---:|---:|---:|---:|")
    for name, recipe in RECIPES.items():
        found = rounds(calls(args.row, args.batch, recipe), args.repeats)
        augment, draw, step = (1000 * median(found, part) for part in ("augment", "draw", "step"))
        print(f"| {name} | {augment:.1f} | {draw:.1f} | {step:.0f} | {augment / (augment + draw + step):.1%} |")


def calls(row: str, batch: int, recipe: AugmentConfig) -> dict[str, Callable[[], Any]]:
    """The three parts of a step, each to be called alone."""
    model = build_model(row).train()
    task = Classify(model)
    size = model.config.img_size
    pixels = torch.randint(256, (4 * batch, 3, *size), dtype=torch.uint8)
    images = TensorSet(pixels, torch.randint(10, (4 * batch,)), [f"class {n}" for n in range(10)], range(4 * batch))
    batches = chain.from_iterable(repeat(make_loader(images, batch_size=batch, train=True)))
    drawn = next(batches)
    augment = BatchAugment(recipe, model.preprocess, model.num_classes)
    ready = augment(drawn)
    optimizer = make_optimizer(task, TrainConfig())
    return {
        "augment": partial(augment, drawn),
        "draw": partial(next, batches),
        "step": partial(step, task, optimizer, ready),
    }


def step(task: Classify, optimizer: torch.optim.Optimizer, batch: Batch) -> None:
    optimizer.zero_grad()
    task(batch)["loss"].backward()
    optimizer.step()


if __name__ == "__main__":
    main()
