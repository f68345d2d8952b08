"""BEiT: Bao et al. 2022, "BERT pre-training of image transformers", 2106.08254; BEiT v2: Peng et al. 2022, 2208.06366.

    image (B, C_in, H, W)
      patches, each projected                          (B, N, C)
      [class, patches], nothing added                  (B, 1 + N, C)
      depth × GammaBlock: in each, a learned bias      (B, 1 + N, C)
      for every offset between two tokens
      mean of the patches, norm, head                  (B, K)

Notable choices: names and keys are timm's: LayerScale is `gamma_1`, `gamma_2`; keys have no bias, so `q_bias`, `v_bias`
stand beside `qkv.weight`; every block has its own `relative_position_bias_table`, whose last three rows are for pairs
with the class token. Bias tables are made for one grid and resized for others (`layers.relative`).

Legend: `B` batch, `C_in` channels, `H`, `W` pixels, `N` image tokens, `C` width, `K` classes.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
from torch import nn

from vitrail.layers.attention import Attention
from vitrail.layers.blocks import Block, GammaBlock
from vitrail.layers.relative import QVAttention
from vitrail.models.config import family_config
from vitrail.models.vit import VisionTransformer
from vitrail.models.vit_config import ViTConfig


@family_config
class BeitConfig(ViTConfig):
    """A Vision Transformer's fields, with BEiT's defaults: BEiT-B/16 at 224 pixels."""

    pos_embed: Literal["learn", "sincos", "none"] = "none"
    """positions added to the tokens"""
    rel_pos_bias: bool = True
    """a learned bias for each offset between two tokens"""
    init_values: float | None = 0.1
    """LayerScale's first value; None leaves LayerScale out"""
    global_pool: Literal["token", "avg", "map"] = "avg"
    """class token, mean of image tokens, or attention pooling"""

    def __post_init__(self) -> None:
        ViTConfig.__post_init__(self)
        if self.deep_prompts:
            raise ValueError(
                f"deep_prompts are for plain ViTs' blocks, not this family's; got {self.deep_prompts}: use reg_tokens "
                "alone"
            )
        if self.block != "prenorm":
            raise ValueError(
                f"block must be prenorm in this family; got {self.block!r}: use VisionTransformer(block=…)"
            )


def _row(size: int, dim: int, depth: int, heads: int, init_values: float) -> BeitConfig:
    return BeitConfig(img_size=size, embed_dim=dim, depth=depth, num_heads=heads, init_values=init_values)


# fmt: off
VARIANTS: dict[str, BeitConfig] = {
    "beit_debug": BeitConfig(img_size=32, patch_size=8, embed_dim=48, depth=3, num_heads=3, num_classes=10),
    #                              img width depth heads scale
    "beit_base_patch16_224":    _row(224,  768, 12, 12, 0.1),
    "beit_base_patch16_384":    _row(384,  768, 12, 12, 0.1),
    "beit_large_patch16_224":   _row(224, 1024, 24, 16, 1e-5),
    "beit_large_patch16_384":   _row(384, 1024, 24, 16, 1e-5),
    "beit_large_patch16_512":   _row(512, 1024, 24, 16, 1e-5),
    "beitv2_base_patch16_224":  _row(224,  768, 12, 12, 1e-5),
    "beitv2_large_patch16_224": _row(224, 1024, 24, 16, 1e-5),
    # small images
    "beit_tiny_patch4_32": BeitConfig(img_size=32, patch_size=4, embed_dim=192, depth=6, num_heads=3, num_classes=10),
}
# fmt: on


class Beit(VisionTransformer):
    """A Vision Transformer that knows where tokens stand by learned biases of its scores.

    Takes a `BeitConfig` or its fields. Raises `ValueError` where sizes do not divide, `TypeError` for unknown fields.
    """

    family = "beit"
    config_class = BeitConfig
    _rows_read = VisionTransformer._rows_read

    def _make_block(self, index: int, drop_path: float) -> nn.Module:
        parts, first = self._block_parts(index, drop_path), self.config.init_values
        return Block(**parts) if first is None else GammaBlock(**parts, init_values=first)

    def _attention(self, index: int) -> Callable[..., nn.Module]:
        kind = super()._attention(index)
        return QVAttention if kind is Attention else kind

    @torch.no_grad()
    def init_weights(self) -> None:
        """A Vision Transformer's laws; then the i-th block's `proj` and `fc2` divided by sqrt(2 i) (BEiT's code)."""
        super().init_weights()
        for depth, block in enumerate(self.blocks, start=1):
            for name in ("attn.proj", "mlp.fc2"):
                block.get_parameter(f"{name}.weight").div_((2 * depth) ** 0.5)
