"""timm's ViT of the same sizes, trained with timm's parts by the defaults of its training script: accuracy and speed.

    python benchmarks/timm_recipe.py DATA/train DATA/test --row vit_tiny_mlp1_patch4_32 --epochs 100 --keep timm.pt

The script (train.py of timm 1.0) is not part of the package; what it does unless told otherwise is SGD with momentum at
a rate of 0.1 for 256 images, cosine to 0 after 5 epochs of warm-up, weight decay 2e-5, label smoothing of 0.1, random
parts of 8 to 100 % of the picture, mirroring and colour jitter of 0.4. `--opt adamw --lr-base 1e-3 --weight-decay 0.05`
is how it is told to train ViTs. A run that was stopped goes on where `--keep` says.
"""

from __future__ import annotations

import argparse
import math
import time
from pathlib import Path

import torch
from clock import machine
from peers import MAKERS
from timm.data import create_dataset, create_loader
from timm.loss import LabelSmoothingCrossEntropy
from timm.optim import create_optimizer_v2
from timm.scheduler import create_scheduler_v2
from torch import nn

from vitrail.models.registry import build_model


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("train", type=Path, help="a folder with a folder for each class")
    parser.add_argument("test", type=Path)
    parser.add_argument("--row", default="vit_tiny_mlp1_patch4_32")
    parser.add_argument("--epochs", type=int, default=100)
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--opt", default="sgd")
    parser.add_argument("--lr-base", type=float, default=0.1)
    parser.add_argument("--weight-decay", type=float, default=2e-5)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--workers", type=int, default=0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--keep", type=Path, help="a file that holds the run, epoch by epoch")
    args = parser.parse_args()
    torch.manual_seed(args.seed)
    print(f"{args.row} of timm, {args.opt}, {args.epochs} epochs, bf16; {machine(args.device, 'timm')}")
    loaders = [_loader(folder, args, training) for folder, training in ((args.train, True), (args.test, False))]
    config = build_model(args.row, num_classes=len(loaders[0].dataset.reader.class_to_idx)).config
    print(f"test accuracy {run(MAKERS['timm'](config).to(args.device), *loaders, args):.2%}")


def _loader(folder: Path, args: argparse.Namespace, training: bool) -> torch.utils.data.DataLoader:
    size = build_model(args.row).config.img_size
    return create_loader(
        create_dataset("", root=str(folder)), input_size=(3, *size), batch_size=args.batch, is_training=training,
        scale=(0.08, 1.0), interpolation="random" if training else "bicubic", crop_pct=1.0, num_workers=args.workers,
        device=torch.device(args.device), use_prefetcher=args.device == "cuda", persistent_workers=args.workers > 0,
    )  # fmt: skip


def run(model: nn.Module, train, test, args: argparse.Namespace) -> float:
    """Trains to the end, and gives the last weights' accuracy."""
    rate = args.lr_base * (args.batch / 256) ** (0.5 if "ada" in args.opt or "lamb" in args.opt else 1)
    optimizer = create_optimizer_v2(model, opt=args.opt, lr=rate, weight_decay=args.weight_decay, momentum=0.9)
    warm = min(5, args.epochs // 4)
    schedule, _ = create_scheduler_v2(optimizer, num_epochs=args.epochs, warmup_epochs=warm, warmup_prefix=False)
    state = torch.load(args.keep, weights_only=True) if args.keep and args.keep.exists() else {"epoch": 0, "seconds": 0}
    if state["epoch"]:
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
    for epoch in range(state["epoch"], args.epochs):
        began = time.perf_counter()
        schedule.step(epoch)
        torch.manual_seed(args.seed + 1000 * epoch)
        loss, waited = _epoch(model, train, optimizer, args.device)
        took = time.perf_counter() - began
        images = len(train.dataset) / took
        state = {
            "epoch": epoch + 1, "seconds": state["seconds"] + took, "model": model.state_dict(),
            "optimizer": optimizer.state_dict(),
        }  # fmt: skip
        if args.keep:
            torch.save(state, args.keep.with_suffix(".part"))
            args.keep.with_suffix(".part").rename(args.keep)
        print(f"epoch {epoch + 1}: loss {loss:.4f}, {images:.0f} images/s, waited {waited / took:.1%}", flush=True)
        if not math.isfinite(loss):
            break
    print(f"{state['seconds']:.0f} s of training")
    return _accuracy(model, test, args.device)


def _epoch(model: nn.Module, loader, optimizer: torch.optim.Optimizer, device: str) -> tuple[float, float]:
    """The mean loss, and how many seconds were spent waiting for images."""
    model.train()
    criterion, total, waited, end = LabelSmoothingCrossEntropy(0.1), 0.0, 0.0, time.perf_counter()
    for images, labels in loader:
        waited += time.perf_counter() - end
        with torch.autocast(device, torch.bfloat16):
            value = criterion(model(images.to(device)).float(), labels.to(device))
        optimizer.zero_grad()
        value.backward()
        optimizer.step()
        total += value.item() / len(loader)
        end = time.perf_counter()
    return total, waited


@torch.no_grad()
def _accuracy(model: nn.Module, loader, device: str) -> float:
    model.eval()
    right = 0
    for images, labels in loader:
        with torch.autocast(device, torch.bfloat16):
            right += int((model(images.to(device)).argmax(1).cpu() == labels.cpu()).sum())
    return right / len(loader.dataset)


if __name__ == "__main__":
    main()
