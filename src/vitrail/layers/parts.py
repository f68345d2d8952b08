"""A layer that is wide inside, for some of its rows at a time: what it makes between stays in the caches.

    (n, …, C) ── first rows ──> wide ──> (rows, …, C) ─┐
              ── next rows ───> wide ──> (rows, …, C) ─┴─> (n, …, C)

An MLP makes several times as many numbers as it takes, twice, before and after its activation. Whole batches of them
would go to memory and back; they are also what a pass takes most memory for. Where gradients are wanted they are kept
anyway, so there nothing is parted.

Legend: `n` images or tokens, whatever the layer treats each alone; `C` width.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn

from vitrail.layers.linear import is_hooked
from vitrail.layers.talking import may_overwrite

WIDE = 2**20  # numbers between: about as many as the shared cache of some cores keeps until the next product
TOKENS = 1024  # and about as many tokens at least, or weights are read again for too little


def by_parts(owner: nn.Module, layer: Callable[..., Tensor], x: Tensor, *more: Tensor | None, wide: int) -> Tensor:
    """`layer(x, *more)`, (n, …, C) -> (n, …, C), for some of the n at a time; `wide` numbers a token between.

    All at once where gradients are wanted, `owner` or a part of it trains (dropout may draw) or has a hook in it, or
    somebody reads along, and on other devices than the CPU. Sums may be rounded otherwise, as products of another size
    are.
    """
    if x.ndim < 2 or not may_overwrite(x):
        return layer(x, *more)
    tokens = max(1, math.prod(x.shape[1:-1]))
    most = max(WIDE // wide, TOKENS) // tokens or 1
    if x.shape[0] <= most or any(part.training for part in owner.modules()) or is_hooked(owner):
        return layer(x, *more)
    count = math.ceil(x.shape[0] / math.ceil(x.shape[0] / most))  # as even as they go
    parts = zip(*([None] * len(x) if t is None else t.split(count) for t in (x, *more)), strict=False)
    return torch.cat([layer(*part) for part in parts])
