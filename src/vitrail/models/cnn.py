"""ResNet, the convolutional baseline that a transformer must beat: He et al. 2016, "Deep Residual Learning".

    image (B, 3, H, W) -> stem -> 4 stages of residual blocks, each half the size and twice the width -> mean -> head

Notable choices: the residual block is torchvision's, and so are the keys; the stem for small images is the usual 3 x 3
convolution of stride 1 without max-pooling (He et al. 2016, section 4.2), so that 32 pixels end as 4 x 4.

Legend: `B` batch, `C` channels, `H`, `W` pixels, `h`, `w` cells of a stage, `K` classes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from vitrail.layers.embed import Size, pair
from vitrail.layers.tokens import mean_tokens
from vitrail.models.backbone import Backbone, FeatureInfo, Features, drawn_once, usual_preprocess
from vitrail.models.config import check_least, check_rates, choose, family_config
from vitrail.names import check_choice


@family_config
class ResNetConfig:
    """A ResNet of basic blocks. Defaults are ResNet-18 for ImageNet."""

    img_size: Size = 224
    """pixels, or (height, width); any other size works at run time"""
    in_chans: int = 3
    num_classes: int = 1000
    """0 leaves the head out"""
    embed_dim: int = 64
    """channels of the first stage; each further stage has twice as many"""
    depths: tuple[int, ...] = (2, 2, 2, 2)
    """residual blocks per stage"""
    stem: Literal["imagenet", "small"] = "imagenet"
    """7 x 7 stride 2 and max-pooling, or 3 x 3 stride 1"""
    drop_rate: float = 0.0
    """dropout before the head"""

    def __post_init__(self) -> None:
        object.__setattr__(self, "img_size", pair(self.img_size))
        object.__setattr__(self, "depths", tuple(self.depths))
        check_choice("stem", self.stem, ("imagenet", "small"))
        if not 1 <= len(self.depths) <= 8 or not all(type(n) is int and n >= 1 for n in self.depths):
            raise ValueError(f"depths must name 1 to 8 stages of at least one block each; got {self.depths}")
        check_least(self, {"img_size": 1, "in_chans": 1, "num_classes": 0, "embed_dim": 1})
        check_rates(self)


VARIANTS: dict[str, ResNetConfig] = {
    "resnet_debug": ResNetConfig(img_size=32, embed_dim=8, stem="small", num_classes=10),
    "resnet18_224": ResNetConfig(),
    "resnet18_32": ResNetConfig(img_size=32, stem="small", num_classes=10),
}


class LastMap(NamedTuple):
    """What the head takes."""

    map: Tensor
    """(B, num_features, h, w)"""
    padding: Tensor | None
    """(B, h, w) true where a cell stands for nothing but padded pixels; None where no pixel is padded"""


class ResNet(Backbone):
    """A residual network of basic blocks; see the module's docstring for its shapes. Takes a config or its fields."""

    family = "resnet"

    def __init__(self, config: ResNetConfig | None = None, **fields: Any) -> None:
        super().__init__()
        self.config = c = choose(ResNetConfig, config, fields)
        self.preprocess = usual_preprocess(c.img_size, c.in_chans)
        kernel, stride = (7, 2) if c.stem == "imagenet" else (3, 1)
        with drawn_once(self):
            self.conv1 = nn.Conv2d(c.in_chans, c.embed_dim, kernel, stride, kernel // 2, bias=False)
            self.bn1 = nn.BatchNorm2d(c.embed_dim)
            self.relu = nn.ReLU(inplace=True)
            self.maxpool = nn.MaxPool2d(3, 2, 1) if c.stem == "imagenet" else nn.Identity()
            widths = [c.embed_dim * 2**i for i in range(len(c.depths))]
            inputs = [c.embed_dim, *widths[:-1]]
            self.stages = [f"layer{i + 1}" for i in range(len(c.depths))]
            for i, name in enumerate(self.stages):
                self.add_module(name, _stage(inputs[i], widths[i], c.depths[i], stride=1 if i == 0 else 2))
            first = 4 if c.stem == "imagenet" else 1
            self.feature_info = [FeatureInfo(w, first * 2**i, self.stages[i]) for i, w in enumerate(widths)]
            self.num_features, self.grad_checkpointing = widths[-1], False
            self.head_drop = nn.Dropout(c.drop_rate)
            self.fc = nn.Linear(self.num_features, c.num_classes) if c.num_classes else nn.Identity()

    def _through(self, images: Tensor, mask: Tensor | None) -> list[Tensor]:
        if images.ndim != 4 or images.shape[1] != self.config.in_chans:
            raise ValueError(f"images must be (B, {self.config.in_chans}, H, W); got shape {tuple(images.shape)}")
        images = images if mask is None else images.masked_fill(mask[:, None], 0)
        x = self.maxpool(self.relu(self.bn1(self.conv1(images))))
        states = []
        for name in self.stages:
            stage = self.get_submodule(name)
            saving = self.grad_checkpointing and torch.is_grad_enabled()
            x = checkpoint(stage, x, use_reentrant=False) if saving else stage(x)
            states.append(x)
        return states

    def forward_features(self, images: Tensor, mask: Tensor | None = None) -> LastMap:
        """images (B, C, H, W) -> the last stage's map; padded pixels count as zeros."""
        x = self._through(images, mask)[-1]
        return LastMap(x, None if mask is None else F.adaptive_max_pool2d((~mask).float(), x.shape[-2:]) == 0)

    def forward_head(self, x: LastMap, pre_logits: bool = False) -> Tensor:
        """The last map -> logits (B, K), or (B, num_features) with `pre_logits`; the mean is over cells with pixels."""
        padding = None if x.padding is None else x.padding.flatten(1)
        pooled = self.head_drop(mean_tokens(x.map.flatten(2).transpose(1, 2), padding))
        return pooled if pre_logits else self.fc(pooled)

    def forward_heads(self, x: LastMap) -> tuple[Tensor, ...]:
        """A ResNet has one head."""
        return (self.forward_head(x),)

    def get_classifier(self) -> nn.Module:
        return self.fc

    def features(
        self,
        images: Tensor,
        indices: Sequence[int] | int | None = None,
        norm: bool = True,
        mask: Tensor | None = None,
    ) -> Features:
        """The maps after the stages named by `indices`; a ResNet has no final norm and no prefix tokens."""
        wanted = self.feature_indices(indices)
        states = self._through(images, mask)
        return Features(
            [states[i] for i in wanted], [states[i].new_zeros(len(images), 0, states[i].shape[1]) for i in wanted]
        )

    def reset_classifier(self, num_classes: int) -> None:
        """A new head for `num_classes` classes (0: none); `classes` is emptied."""
        self.config, self.classes = replace(self.config, num_classes=num_classes), ()
        self.fc = nn.Linear(self.num_features, num_classes).to(self.conv1.weight) if num_classes else nn.Identity()

    @torch.no_grad()
    def init_weights(self) -> None:
        """Convolutions: normal, std sqrt(2 / fan out) (He et al. 2015); norms 1 and 0; the head as PyTorch's Linear."""
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
            elif isinstance(module, nn.BatchNorm2d | nn.Linear):
                module.reset_parameters()

    def pixel_weights(self) -> list[str]:
        return ["conv1.weight"]

    def no_weight_decay(self) -> set[str]:
        return set()

    def layer_groups(self) -> list[list[str]]:
        """Stem, each stage, head."""
        depth = {"conv1": 0, "bn1": 0, **{name: i + 1 for i, name in enumerate(self.stages)}}
        groups: list[list[str]] = [[] for _ in range(len(self.stages) + 2)]
        for name, _ in self.named_parameters():
            groups[depth.get(name.partition(".")[0], -1)].append(name)
        return groups if groups[-1] else groups[:-1]

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        self.grad_checkpointing = enable


def _stage(inputs: int, width: int, depth: int, stride: int) -> nn.Sequential:
    from torchvision.models.resnet import BasicBlock

    change = None
    if stride != 1 or inputs != width:
        change = nn.Sequential(nn.Conv2d(inputs, width, 1, stride, bias=False), nn.BatchNorm2d(width))
    rest = [BasicBlock(width, width) for _ in range(depth - 1)]
    return nn.Sequential(BasicBlock(inputs, width, stride, change), *rest)
