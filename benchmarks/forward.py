"""Inference speed of ViT rows beside timm's models of the same name, as a Markdown table.

    python benchmarks/forward.py vit_tiny_patch16_224 --batch 8 --repeats 15

Both models get the same weights, whose logits must agree first. Candidates are interleaved in one process, so that a
change of the machine's speed meets both; the figures are medians. Ratios travel, absolute times do not.
"""

from __future__ import annotations

import argparse
import platform
import statistics
import time
from collections.abc import Callable
from functools import partial

import timm
import torch
from torch import Tensor, nn

from vitrail.models.registry import build_model

ROWS = ("vit_tiny_patch16_224", "vit_small_patch16_224")
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def pair(name: str) -> tuple[nn.Module, nn.Module]:
    """Ours and timm's with equal weights, in evaluation; raises where their logits differ."""
    ours, theirs = build_model(name).eval(), timm.create_model(name, pretrained=False).eval()
    ours.load_state_dict(theirs.state_dict())
    images = torch.randn(1, 3, *ours.config.img_size)
    torch.testing.assert_close(ours(images), theirs(images), atol=1e-4, rtol=1e-4)
    return ours, theirs


def medians(calls: dict[str, Callable[[], Tensor]], repeats: int, synchronise: Callable[[], None]) -> dict[str, float]:
    """Median seconds of every call, taken in turns after two rounds of warming up."""
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for turn in range(repeats + 2):
        for name, call in calls.items():
            start = time.perf_counter()
            call()
            synchronise()
            if turn >= 2:
                seconds[name].append(time.perf_counter() - start)
    return {name: statistics.median(values) for name, values in seconds.items()}


def measure(name: str, batch: int, repeats: int, device: str) -> list[str]:
    """The table's lines for one row of the registry."""
    ours, theirs = pair(name)
    images = torch.randn(batch, 3, *ours.config.img_size)
    lines = []
    for label, dtype in DTYPES.items():
        models = {"vitrail": ours.to(device, dtype), "timm": theirs.to(device, dtype)}
        calls = {who: partial(model, images.to(device, dtype)) for who, model in models.items()}
        took = medians(calls, repeats, torch.cuda.synchronize if device == "cuda" else lambda: None)
        speed = {who: batch / t for who, t in took.items()}
        ratio = speed["vitrail"] / speed["timm"]
        lines.append(f"| {name} | {label} | {batch} | {speed['vitrail']:.1f} | {speed['timm']:.1f} | {ratio:.2f} |")
    return lines


def machine(device: str) -> str:
    if device == "cuda":
        return torch.cuda.get_device_name()
    return f"{platform.processor() or platform.machine()}, {torch.get_num_threads()} threads"


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", default=ROWS, help="rows of the registry that timm has too")
    parser.add_argument("--batch", type=int, default=8, help="images in a batch")
    parser.add_argument("--repeats", type=int, default=9, help="rounds that count")
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    args = parser.parse_args()
    print(f"torch {torch.__version__}, timm {timm.__version__}, {machine(args.device)}\n")
    print("| model | dtype | batch | vitrail, images/s | timm, images/s | ratio |\n|---|---|---:|---:|---:|---:|")
    for name in args.names:
        print("\n".join(measure(name, args.batch, args.repeats, args.device)), flush=True)


if __name__ == "__main__":
    main()
