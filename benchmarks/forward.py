"""Inference speed of ViT rows beside the same networks from other libraries, as a Markdown table.

    python benchmarks/forward.py vit_tiny_patch16_224 --batch 1 8 --repeats 9

All give the same logits; ours leaves out of its last block what no head reads. The whole network is in the dtype
named; on a GPU `--compile` adds compiled ones, and `--peak` (TFLOP/s of the chip in bf16) a column of model FLOPs
utilisation. Figures are medians; ratios above 1 say how many times faster vitrail is.
"""

from __future__ import annotations

import argparse
from functools import partial

import torch
from clock import machine, median, ratio, rounds
from peers import PACKAGES, SETTINGS, build
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

ROWS = ("vit_tiny_patch16_224", "vit_small_patch16_224", "vit_base_patch16_224", "vit_tiny_patch4_32")
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def measure(row: str, args: argparse.Namespace) -> list[str]:
    """The table's lines for one row of the registry."""
    models, lines = build(row), []
    flops = _flops(models["vitrail"])
    for label, dtype in DTYPES.items():
        models = {name: model.to(args.device, dtype) for name, model in models.items()}
        ready = {name: torch.compile(model) if args.compile else model for name, model in models.items()}
        for batch in args.batch:
            images = torch.randn(batch, 3, *models["vitrail"].config.img_size).to(args.device, dtype)
            calls = {name: partial(model, images) for name, model in ready.items()}
            found = rounds(calls, args.repeats, args.device)
            speed = batch / median(found, "vitrail")
            cells = [row, label, str(batch), f"{speed:.1f}", *(f"{ratio(found, name):.2f}" for name in SETTINGS)]
            cells += [f"{speed * flops / args.peak / 1e10:.0f} %"] if args.peak else []
            lines.append(f"| {' | '.join(cells)} |")
    return lines


def _flops(model: nn.Module) -> int:
    """Floating-point operations of one image; a multiplication and its addition are two."""
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(torch.zeros(1, 3, *model.config.img_size))
    return counter.get_total_flops()


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("rows", nargs="*", default=ROWS, help="rows of `vitrail models 'vit_*'`")
    parser.add_argument("--batch", type=int, nargs="+", default=(1, 8), help="images in a batch")
    parser.add_argument("--repeats", type=int, default=9, help="rounds that count")
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--compile", action="store_true", help="compile all of them")
    parser.add_argument("--peak", type=float, default=0.0, help="TFLOP/s of the chip: adds a column of utilisation")
    args = parser.parse_args()
    print(f"{machine(args.device, *PACKAGES)}\n")
    columns = ["model", "dtype", "batch", "images/s", *(f"× {name}" for name in SETTINGS), *(["MFU"] * (args.peak > 0))]
    print(f"| {' | '.join(columns)} |\n|---|---|{'---:|' * (len(columns) - 2)}")
    for row in args.rows:
        print("\n".join(measure(row, args)), flush=True)


if __name__ == "__main__":
    main()
