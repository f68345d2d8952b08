"""What this machine can do at all: matrix products by PyTorch's own choice and by oneDNN, as a Markdown table.

python benchmarks/ceiling.py --side 2048
"""

from __future__ import annotations

import argparse
from functools import partial

import torch
import torch.nn.functional as F
from clock import machine, median, rounds


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--side", type=int, default=2048, help="rows and columns of both matrices")
    parser.add_argument("--repeats", type=int, default=5, help="rounds that count")
    args = parser.parse_args()
    print(f"{machine('cpu')}\n\n| dtype | F.linear, GFLOP/s | oneDNN, GFLOP/s |\n|---|---:|---:|")
    for dtype in (torch.float32, torch.bfloat16):
        x, weight = (torch.randn(args.side, args.side).to(dtype) for _ in range(2))
        onednn = partial(torch.ops.mkldnn._linear_pointwise, x, weight, None, "none", [], "")
        found = rounds({"usual": partial(F.linear, x, weight), "onednn": onednn}, args.repeats)
        usual, other = (2e-9 * args.side**3 / median(found, name) for name in ("usual", "onednn"))
        print(f"| {str(dtype).removeprefix('torch.')} | {usual:.0f} | {other:.0f} |")


if __name__ == "__main__":
    main()
