"""What convolutional networks share: stages that each make a map, and a head over the mean of the last.

    image (B, C_in, H, W) -> stem -> stages, each (B, C_i, h_i, w_i) -> mean over cells -> (B, num_features) -> (B, K)

Legend: `B` batch, `C_in`, `C` channels, `H`, `W` pixels, `h`, `w` cells of a stage, `K` classes.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from typing import NamedTuple

import torch.nn.functional as F
from torch import Tensor

from vitrail.layers.blocks import run_layer
from vitrail.layers.embed import check_channels, check_mask
from vitrail.layers.tokens import mean_tokens
from vitrail.models.backbone import Backbone, Features


class LastMap(NamedTuple):
    """What the head takes."""

    map: Tensor
    """(B, num_features, h, w)"""
    padding: Tensor | None
    """(B, h, w) true where a cell stands for nothing but padded pixels; None where no pixel is padded"""


class ConvNet(Backbone):
    """A network of stages; `feature_info` names their modules. A family says its stem, its neck and its head."""

    grad_checkpointing = False

    @abstractmethod
    def stem_map(self, images: Tensor) -> Tensor:
        """images (B, C_in, H, W) -> what the first stage takes."""

    @abstractmethod
    def neck(self, pooled: Tensor) -> Tensor:
        """The mean of the last map (B, num_features) -> what the head's linear layer takes, of the same shape."""

    def _through(self, images: Tensor, mask: Tensor | None) -> list[Tensor]:
        """The map after each stage; padded pixels count as zeros."""
        check_channels(images, self.config.in_chans)
        check_mask(mask, images)
        x = self.stem_map(images if mask is None else images.masked_fill(mask[:, None], 0))
        states = []
        for info in self.feature_info:
            stage = self.get_submodule(info.module)
            x = run_layer(stage, x, checkpointing=self.grad_checkpointing)
            states.append(x)
        return states

    def forward_features(self, images: Tensor, mask: Tensor | None = None) -> LastMap:
        """images (B, C_in, H, W) -> the last stage's map; padded pixels count as zeros."""
        x = self._through(images, mask)[-1]
        return LastMap(x, None if mask is None else self._padding(mask, x))

    def _padding(self, mask: Tensor, x: Tensor) -> Tensor:
        """Padded pixels (B, H, W) -> (B, h, w) true where a cell of the last map `x` stands for nothing but padding.

        Each stands for as many pixels as the stride; of a last one that is cut short there may be a cell or none.
        """
        seen = F.max_pool2d((~mask).float()[:, None], int(self.feature_info[-1].reduction), ceil_mode=True)
        return seen[:, 0, : x.shape[-2], : x.shape[-1]] == 0

    def forward_head(self, x: LastMap, pre_logits: bool = False) -> Tensor:
        """The last map -> logits (B, K), or (B, num_features) with `pre_logits`; the mean is over cells with pixels."""
        padding = None if x.padding is None else x.padding.flatten(1)
        pooled = self.neck(mean_tokens(x.map.flatten(2).transpose(1, 2), padding))
        logits: Tensor = pooled if pre_logits else self.get_classifier()(pooled)
        return logits

    def forward_heads(self, x: LastMap) -> tuple[Tensor, ...]:
        """Such a network has one head."""
        return (self.forward_head(x),)

    def features(
        self,
        images: Tensor,
        indices: Sequence[int] | int | None = None,
        norm: bool = True,
        mask: Tensor | None = None,
    ) -> Features:
        """The maps after the stages named by `indices`, as they are: a map has no final norm and no prefix tokens."""
        wanted = self.feature_indices(indices)
        states = self._through(images, mask)
        return Features(
            [states[i] for i in wanted], [states[i].new_zeros(len(images), 0, states[i].shape[1]) for i in wanted]
        )

    def no_weight_decay(self) -> set[str]:
        return set()

    def layer_groups(self) -> list[list[str]]:
        """Stem, each stage, what follows."""
        stages = [f"{info.module}." for info in self.feature_info]
        groups: list[list[str]] = [[] for _ in range(len(stages) + 2)]
        depth = 0  # parameters come in the order of the layers
        for name, _ in self.named_parameters():
            inside = [i + 1 for i, stage in enumerate(stages) if name.startswith(stage)]
            depth = inside[0] if inside else len(stages) + 1 if depth else 0
            groups[depth].append(name)
        return groups if groups[-1] else groups[:-1]

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        self.grad_checkpointing = enable
