"""Speed and memory of every family beside the same networks of timm, torchvision and transformers, as a Markdown table.

    python benchmarks/families.py swin_tiny_patch4_window7_224 cait_xxs24_224 --batch 4 --repeats 7

Networks are in fp32 with random weights; what they answer is compared by `vitrail parity`. A step is forward,
cross-entropy, backward and AdamW, ours fused as `vitrail train` has it. Candidates take turns in one process; ratios
above 1 say how many times faster vitrail is, and the best of the others counts. Memory is the most that tensors hold
at once in a pass of four times as many images, beyond weights and images.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from clock import machine, median, ratio, rounds
from memory import peak_megabytes
from torch import Tensor, nn

from vitrail.models.registry import build_model
from vitrail.research.peers import build_peer

ROWS = (
    "deit_tiny_distilled_patch16_224", "swin_tiny_patch4_window7_224", "pvt_tiny", "pvt_v2_b0", "pvt_v2_b2",
    "pvt_v2_b2_li", "cait_xxs24_224", "crossvit_9_240", "crossvit_tiny_240", "vit_tiny_r_s16_p8_224",
    "beit_base_patch16_224", "eva02_tiny_patch14_224", "vit_small_patch14_dinov2", "resnet50_224", "convnext_tiny_224",
)  # fmt: skip
UNFUSED = "timm, unfused"
CANDIDATES = ("vitrail", "timm", UNFUSED, "torchvision", "transformers")


def build(row: str, name: str) -> nn.Module | None:
    """A candidate's network as images -> logits; None where the library has none."""
    if name == "vitrail":
        return build_model(row).eval()
    peer = build_peer(row, name.partition(",")[0])
    if peer is None:
        return None
    for part in peer.model.modules():
        if name == UNFUSED and getattr(part, "fused_attn", False):
            part.fused_attn = False
    return Logits(peer.model, peer.logits).eval()


class Logits(nn.Module):
    """Another library's network as one that gives logits."""

    def __init__(self, model: nn.Module, logits: Callable[[object], Tensor]) -> None:
        super().__init__()
        self.model, self.logits = model, logits

    def forward(self, images: Tensor) -> Tensor:
        return self.logits(self.model(images))


def step(model: nn.Module, optimizer: torch.optim.Optimizer, images: Tensor) -> None:
    optimizer.zero_grad()
    logits = model(images)
    F.cross_entropy(logits, torch.zeros(len(images), dtype=torch.long)).backward()
    optimizer.step()


def measure(row: str, args: argparse.Namespace) -> str:
    """The table's line for one row of the registry."""
    models = {name: model for name in CANDIDATES if (model := build(row, name)) is not None}
    images = torch.randn(args.batch, 3, *models["vitrail"].config.img_size)
    with torch.no_grad():
        found = rounds({name: partial(model, images) for name, model in models.items()}, args.repeats)
    cells = [row, str(args.batch), f"{args.batch / median(found, 'vitrail'):.1f}", *_ratios(found, models)]
    others = [name for name in models if name != "vitrail"]
    peaks = _peaks(models, torch.cat([images] * 4))
    took = rounds(_steps(models, images), max(3, args.repeats // 2))
    cells.append(f"{min(ratio(took, name) for name in others):.2f}")
    cells += [f"{peaks['vitrail']:.0f}", f"{min(peaks[name] for name in others):.0f}"]
    return f"| {' | '.join(cells)} |"


def _steps(models: dict[str, nn.Module], images: Tensor) -> dict[str, Callable[[], None]]:
    steps = {}
    for name, model in models.items():
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True if name == "vitrail" else None)
        steps[name] = partial(step, model.train(), optimizer, images)
    return steps


@torch.no_grad()
def _peaks(models: dict[str, nn.Module], images: Tensor) -> dict[str, float]:
    return {name: peak_megabytes(partial(model, images)) for name, model in models.items()}


def _ratios(found: list[dict[str, float]], models: dict[str, nn.Module]) -> list[str]:
    return [f"{ratio(found, name):.2f}" if name in models else "" for name in CANDIDATES[1:]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("rows", nargs="*", default=ROWS, help="rows of `vitrail models`")
    parser.add_argument("--batch", type=int, default=4, help="images in a batch; memory is of four times as many")
    parser.add_argument("--repeats", type=int, default=7, help="rounds that count; half as many for steps")
    args = parser.parse_args()
    print(f"{machine('cpu', 'timm', 'torchvision', 'transformers')}\n")
    columns = [f"× {name}" for name in CANDIDATES[1:]] + ["step, × the best", "MB", "MB, least of the others"]
    print(f"| model | batch | images/s | {' | '.join(columns)} |\n|---|{'---:|' * (len(columns) + 2)}")
    for row in args.rows:
        print(measure(row, args), flush=True)


if __name__ == "__main__":
    main()
