"""Speed of a training step beside the same networks from other libraries, as a Markdown table.

    python benchmarks/training.py vit_tiny_patch4_32 --batch 128 --repeats 5

A step is forward, cross-entropy, backward, clipping at a norm of 1 and AdamW. bf16 is mixed precision (autocast), as
all of these libraries are trained. Ours is the step that `vitrail train` takes: its task, whose last block makes only
what the head reads, and its optimiser, AdamW as one fused kernel; theirs has PyTorch's `AdamW` as it comes. Figures
are medians; ratios above 1 say how many times faster vitrail is.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from clock import machine, median, ratio, rounds
from peers import PACKAGES, SETTINGS, build
from torch import Tensor, nn
from torch.optim import Optimizer

from vitrail.tasks.classify import Classify
from vitrail.train.config import TrainConfig
from vitrail.train.optim import make_optimizer

BATCHES = {
    "vit_tiny_patch4_32": 128,
    "vit_tiny_patch16_224": 16,
    "vit_small_patch16_224": 8,
    "vit_base_patch16_224": 4,
}
"""rows, and how many images of them a step has on a CPU"""


def step(loss: Callable[[], Tensor], model: nn.Module, optimizer: Optimizer, device: str, mixed: bool) -> None:
    optimizer.zero_grad()
    with torch.autocast(device, torch.bfloat16, enabled=mixed):
        value = loss()
    value.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()


def steps(
    models: dict[str, nn.Module], images: Tensor, labels: Tensor, args: argparse.Namespace, mixed: bool
) -> dict[str, partial]:
    task = Classify(models["vitrail"])
    batch = {"image": images, "label": labels}
    calls = {"vitrail": (lambda: task(batch)["loss"], task, make_optimizer(task, TrainConfig()))}
    for name in SETTINGS:
        model = models[name]
        loss = partial(_loss, model, images, labels)
        calls[name] = (loss, model, torch.optim.AdamW(model.parameters(), lr=3e-4, weight_decay=0.05))
    made = torch.compile if args.compile else lambda loss: loss
    return {name: partial(step, made(loss), *rest, args.device, mixed) for name, (loss, *rest) in calls.items()}


def _loss(model: nn.Module, images: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(model(images).float(), labels)


def measure(row: str, batch: int, args: argparse.Namespace) -> list[str]:
    """The table's lines for one row of the registry."""
    models, lines = {name: model.train().to(args.device) for name, model in build(row).items()}, []
    images = torch.randn(batch, 3, *models["vitrail"].config.img_size, device=args.device)
    labels = torch.randint(models["vitrail"].num_classes, (batch,)).to(args.device)
    for label, mixed in (("fp32", False), ("bf16", True)):
        found = rounds(steps(models, images, labels, args, mixed), args.repeats, args.device)
        speed = batch / median(found, "vitrail")
        cells = [row, label, str(batch), f"{speed:.1f}", *(f"{ratio(found, name):.2f}" for name in SETTINGS)]
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("rows", nargs="*", default=BATCHES, help="rows of `vitrail models 'vit_*'`")
    parser.add_argument("--batch", type=int, default=0, help="images a step; by default few enough for a CPU")
    parser.add_argument("--repeats", type=int, default=5, help="rounds that count")
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--compile", action="store_true", help="compile all of them")
    args = parser.parse_args()
    print(f"{machine(args.device, *PACKAGES)}\n")
    columns = ["model", "dtype", "batch", "images/s", *(f"× {name}" for name in SETTINGS)]
    print(f"| {' | '.join(columns)} |\n|---|---|{'---:|' * (len(columns) - 2)}")
    for row in args.rows:
        print("\n".join(measure(row, args.batch or BATCHES.get(row, 8), args)), flush=True)


if __name__ == "__main__":
    main()
