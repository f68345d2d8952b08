"""DeiT: Touvron et al. 2021, "Training data-efficient image transformers & distillation through attention", 2012.12877.

    image (B, C_in, H, W)
      patches, each projected                     (B, N, C)
      [class, distillation, patches] + positions  (B, 2 + N, C)         section 4, "Distillation token"
      depth × Block, norm                         (B, 2 + N, C)
      head of the first token: the labels         (B, K)  ┐ averaged: (B, K)
      head of the second token: the teacher       (B, K)  ┘ section 4, "Classification with our approach"

Notable choices: without distillation DeiT is a Vision Transformer, trained otherwise; so `distilled=False` leaves out
the second token and head. `forward` averages logits, as timm and transformers do, where the paper adds the softmax
outputs. Names and keys are timm's.

Legend: `B` batch, `C_in` channels, `H`, `W` pixels, `N` image tokens, `C` width, `K` classes.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from vitrail.layers.init import init_leaf, trunc_normal
from vitrail.layers.linear import Linear
from vitrail.models.backbone import Tokens, usual_preprocess
from vitrail.models.config import family_config
from vitrail.models.vit import VisionTransformer
from vitrail.models.vit_config import ViTConfig


@family_config
class DeiTConfig(ViTConfig):
    """A Vision Transformer's fields and one more. Defaults are the distilled DeiT-B/16 at 224 pixels."""

    distilled: bool = True
    """a second token with a head of its own, to learn from a teacher"""

    def __post_init__(self) -> None:
        ViTConfig.__post_init__(self)
        if self.distilled and (self.global_pool, self.class_token) != ("token", True):
            raise ValueError(
                "distilled=True reads a class and a distillation token: global_pool='token', class_token=True; got "
                f"{self.global_pool!r}, {self.class_token}: use distilled=False"
            )


def _row(size: int, dim: int, heads: int, distilled: bool = False) -> DeiTConfig:
    return DeiTConfig(img_size=size, embed_dim=dim, num_heads=heads, distilled=distilled)


# fmt: off
VARIANTS: dict[str, DeiTConfig] = {
    "deit_debug": DeiTConfig(img_size=32, patch_size=8, embed_dim=48, depth=3, num_heads=3, num_classes=10),
    #                                        img width heads
    "deit_tiny_patch16_224":            _row(224,  192,   3),
    "deit_small_patch16_224":           _row(224,  384,   6),
    "deit_base_patch16_224":            _row(224,  768,  12),
    "deit_base_patch16_384":            _row(384,  768,  12),
    "deit_tiny_distilled_patch16_224":  _row(224,  192,   3, distilled=True),
    "deit_small_distilled_patch16_224": _row(224,  384,   6, distilled=True),
    "deit_base_distilled_patch16_224":  _row(224,  768,  12, distilled=True),
    "deit_base_distilled_patch16_384":  _row(384,  768,  12, distilled=True),
    # small images
    "deit_tiny_distilled_patch4_32": DeiTConfig(
        img_size=32, patch_size=4, embed_dim=192, depth=6, num_heads=3, num_classes=10),
}
# fmt: on


class DeiT(VisionTransformer):
    """A Vision Transformer that also learns from a teacher, by a token of its own.

    Takes a `DeiTConfig` or its fields. Raises `ValueError` where sizes do not divide, `TypeError` for unknown fields.
    """

    family = "deit"
    config: DeiTConfig
    config_class = DeiTConfig
    prefix_names = ("cls_token", "dist_token", "reg_token")

    def __init__(self, config: DeiTConfig | None = None, **fields: Any) -> None:
        super().__init__(config, **fields)
        self.preprocess = usual_preprocess(self.config.img_size, self.config.in_chans)

    def _make_prefix(self) -> None:
        super()._make_prefix()
        self.dist_token = nn.Parameter(torch.empty(1, 1, self.config.embed_dim)) if self.config.distilled else None

    def _make_head(self) -> None:
        super()._make_head()
        self.head_dist = self._new_head()

    def _new_head(self) -> nn.Module | None:
        """The second head; none where nothing is distilled."""
        c = self.config
        if not c.distilled:
            return None
        return Linear(c.embed_dim, c.num_classes) if c.num_classes else nn.Identity()

    def _readout(self) -> tuple[int, ...]:
        return (0, 1) if self.config.distilled else super()._readout()

    def _rows_read(self) -> int | None:
        return 2 if self.config.distilled else super()._rows_read()

    @property
    def teacher_head(self) -> int | None:
        return 1 if self.config.distilled else None

    def forward_heads(self, x: Tokens) -> tuple[Tensor, ...]:
        """The logits (B, K) of the class token, and those of the distillation token where there is one."""
        if self.head_dist is None:
            return super().forward_heads(x)
        label, teacher = self._read_tokens(x)
        return self.head(label), self.head_dist(teacher)

    def forward_head(self, x: Tokens, pre_logits: bool = False) -> Tensor:
        """Tokens of `forward_features` or `encode` -> the mean of both heads' logits (B, K); of both tokens (B, C).

        Raises `ValueError` where one head makes more logits than the other.
        """
        if self.head_dist is None:
            return super().forward_head(x, pre_logits)
        first, second = self._read_tokens(x) if pre_logits else self.forward_heads(x)
        if first.shape != second.shape:
            raise ValueError(
                f"head and head_dist must make as many logits, for forward is their mean; got {first.shape[1]} and "
                f"{second.shape[1]}: put in both, or use reset_classifier(num_classes)"
            )
        return (first + second) / 2

    def _read_tokens(self, x: Tokens) -> tuple[Tensor, Tensor]:
        return self.head_drop(self.fc_norm(x.x[:, 0])), self.head_drop(self.fc_norm(x.x[:, 1]))

    def reset_classifier(self, num_classes: int) -> None:
        """New heads for `num_classes` classes (0: none), initialised by their law; `classes` is emptied."""
        super().reset_classifier(num_classes)
        self.head_dist = self._new_head()
        if self.head_dist is not None:
            self.head_dist.to(next(self.patch_embed.parameters()))
            init_leaf(self.head_dist)

    @torch.no_grad()
    def init_weights(self) -> None:
        """A Vision Transformer's laws; the distillation token: truncated normal, std 0.02 (the authors' code)."""
        super().init_weights()
        if self.dist_token is not None:
            trunc_normal(self.dist_token, 0.02)
