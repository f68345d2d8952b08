"""Deep visual prompts: Jia et al. 2022, "Visual Prompt Tuning", arXiv 2203.12119, section 3.2, eq. 6.

    x (B, N, C)  =  [class …, prompts, image tokens]
                         the block's own prompts in their place ──> Block

Shallow prompts (eq. 4 and 5) need no layer of their own: learnt tokens in the prefix are what registers are.

Legend: `B` batch, `N` tokens, `n` prompts, `C` width.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from vitrail.layers.blocks import Block


class PromptedBlock(Block):
    """A pre-norm block that begins by putting `prompts` learnt tokens in the place of as many: (B, N, C) -> (B, N, C).

    What the block before made of the rows from `first` on is left behind.
    """

    def __init__(self, dim: int, num_heads: int, *, prompts: int, first: int, **rest: Any) -> None:
        super().__init__(dim, num_heads, **rest)
        self.first = first
        self.prompt = nn.Parameter(torch.empty(1, prompts, dim))

    def forward(self, x: Tensor, **told: Any) -> Tensor:
        own = self.prompt.expand(len(x), -1, -1).to(x.dtype)  # (B, n, C)
        rest = x[:, self.first + own.shape[1] :]
        return super().forward(torch.cat([x[:, : self.first], own, rest], dim=1), **told)


def init_prompts(prompts: Tensor, patch_size: tuple[int, int]) -> None:
    """Uniform within ±sqrt(6 / (3 p q + C)) for patches of p x q pixels: the law of VPT's code, after Glorot's."""
    bound = (6 / (3 * patch_size[0] * patch_size[1] + prompts.shape[-1])) ** 0.5
    nn.init.uniform_(prompts, -bound, bound)
