"""What it costs to see attention: time and peak memory of a forward pass, watched and not, as a Markdown table.

    python benchmarks/recording.py vit_base_patch16_224 --size 512

One image, fp32, in evaluation. Each way has a process of its own, since peak memory can only grow; time is the median
of several passes, the peak that of the process beyond what it had with weights loaded and one pass done. timm has no
recorder: its way is to leave fused attention and to hook each `attn_drop`, whose input is the map.
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

import torch
from clock import machine
from torch import Tensor, nn

from vitrail.explain.record import record_attention
from vitrail.models.registry import build_model

ROUNDS = 5


def plain(model: nn.Module, image: Tensor) -> Any:
    return model(image)


def class_rows(model: nn.Module, image: Tensor) -> Any:
    with record_attention(queries="class") as record:
        model(image)
    return record.maps


def head_means(model: nn.Module, image: Tensor) -> Any:
    with record_attention(heads="mean") as record:
        model(image)
    return record.maps


def all_maps(model: nn.Module, image: Tensor) -> Any:
    with record_attention() as record:
        model(image)
    return record.maps


def hooks(model: nn.Module, image: Tensor) -> Any:
    maps: list[Tensor] = []
    handles = []
    for block in model.blocks:
        block.attn.fused_attn = False
        handles.append(block.attn.attn_drop.register_forward_hook(lambda *call: maps.append(call[2])))
    model(image)
    for handle, block in zip(handles, model.blocks, strict=True):
        handle.remove()
        block.attn.fused_attn = True
    return maps


WAYS: dict[str, tuple[str, Callable[[nn.Module, Tensor], Any]]] = {
    "vitrail, nothing": ("vitrail", plain),
    "vitrail, class-token rows of all layers": ("vitrail", class_rows),
    "vitrail, means over heads": ("vitrail", head_means),
    "vitrail, all maps": ("vitrail", all_maps),
    "timm, nothing": ("timm", plain),
    "timm, all maps by hooks": ("timm", hooks),
}
"""name -> library, and how it is done"""


def build(library: str, row: str, size: int) -> nn.Module:
    if library == "vitrail":
        return build_model(row, img_size=size).eval()
    import timm

    return timm.create_model(row, pretrained=False, img_size=size).eval()


@torch.inference_mode()
def measure(way: str, row: str, size: int) -> dict[str, float]:
    """In a process of its own: seconds by turns with the plain pass of the same model, and megabytes at the peak."""
    library, call = WAYS[way]
    model, image = build(library, row, size), torch.randn(1, 3, size, size)
    plain(model, image)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    call(model, image)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    took: list[list[float]] = [[], []]
    for _ in range(ROUNDS):
        for seconds, what in zip(took, (plain, call), strict=True):
            start = time.perf_counter()
            what(model, image)
            seconds.append(time.perf_counter() - start)
    ratios = [watched / alone for alone, watched in zip(*took, strict=True)]
    return {"seconds": statistics.median(took[1]), "ratio": statistics.median(ratios), "megabytes": peak / 1024}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("row", nargs="?", default="vit_base_patch16_224")
    parser.add_argument("--size", type=int, default=512, help="side of the image in pixels")
    parser.add_argument("--way", choices=tuple(WAYS), help="one of them, in this process, as JSON")
    args = parser.parse_args()
    if args.way:
        print(json.dumps(measure(args.way, args.row, args.size)))
        return
    print(f"{args.row} at {args.size} pixels; {machine('cpu', 'timm')}\n")
    print("| what is recorded | s | × the plain pass | MB more at the peak |\n|---|---:|---:|---:|")
    for way in WAYS:
        words = [sys.executable, __file__, args.row, "--size", str(args.size), "--way", way]
        found = json.loads(subprocess.run(words, check=True, capture_output=True, text=True).stdout)
        print(f"| {way} | {found['seconds']:.2f} | {found['ratio']:.2f} | {found['megabytes']:.0f} |", flush=True)


if __name__ == "__main__":
    main()
