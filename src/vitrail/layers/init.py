"""The laws by which weights are first drawn, for the `init_weights` of every network."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from vitrail.layers.blocks import GammaBlock, LayerScale
from vitrail.layers.relative import QVAttention


@torch.no_grad()
def trunc_normal(weight: Tensor, std: float) -> None:
    """A normal cut off at two of its deviations, and as much wider that `std` is left, as in JAX; drawn in one pass."""
    edge = math.erf(math.sqrt(2)) * (1 - 1e-6)  # or rounding would pass the cut
    weight.uniform_(-edge, edge).erfinv_().mul_(math.sqrt(2) * std / 0.87962566)


@torch.no_grad()
def init_leaf(module: nn.Module) -> None:
    """What leaves begin with, whatever network they are in; others are left alone.

    Linear weights: `trunc_normal` of std 0.02 (DeiT, Touvron et al. 2021), biases 0. Norms: 1 and 0, running
    statistics of a normal. LayerScale: its `init_values`. Biases of queries, values and offsets: 0.
    """
    if isinstance(module, nn.Linear):
        trunc_normal(module.weight, 0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
    elif isinstance(module, LayerScale):
        nn.init.constant_(module.gamma, module.init_values)
    elif isinstance(module, GammaBlock):
        nn.init.constant_(module.gamma_1, module.init_values)
        nn.init.constant_(module.gamma_2, module.init_values)
    elif isinstance(module, QVAttention):
        for bias in module.biases():
            nn.init.zeros_(bias)
    elif isinstance(module, nn.LayerNorm | nn.RMSNorm | nn.BatchNorm1d | nn.BatchNorm2d | nn.GroupNorm):
        module.reset_parameters()
