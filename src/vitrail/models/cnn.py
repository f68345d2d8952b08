"""ResNet, the convolutional baseline that a transformer must beat: He et al. 2016, "Deep Residual Learning".

    image (B, 3, H, W) -> stem -> 4 stages of residual blocks, each half the size and twice the width -> mean -> head

Notable choices: the residual blocks are torchvision's, and so are the keys (its bottleneck strides in the 3 x 3
convolution); the stem for small images is the usual 3 x 3 convolution of stride 1 without max-pooling (He et al. 2016,
section 4.2), so that 32 pixels end as 4 x 4.

Legend: `B` batch, `C` channels, `H`, `W` pixels, `h`, `w` cells of a stage, `K` classes.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any, Literal

import torch
from torch import Tensor, nn

from vitrail.layers.embed import Size, pair
from vitrail.layers.linear import Linear
from vitrail.models.backbone import FeatureInfo, drawn_once, usual_preprocess
from vitrail.models.config import check_least, check_rates, check_stages, choose, family_config
from vitrail.models.convnet import ConvNet
from vitrail.names import check_choice


@family_config
class ResNetConfig:
    """Every knob of a ResNet. Defaults are ResNet-18 for ImageNet."""

    img_size: Size = 224
    """pixels, or (height, width); any other size works at run time"""
    in_chans: int = 3
    num_classes: int = 1000
    """0 leaves the head out"""
    embed_dim: int = 64
    """channels of the first stage's 3 x 3 convolutions; each further stage has twice as many"""
    block: Literal["basic", "bottleneck"] = "basic"
    """two 3 x 3 convolutions, or one between two of 1 x 1, the last of which makes four times the channels"""
    depths: tuple[int, ...] = (2, 2, 2, 2)
    """residual blocks per stage"""
    stem: Literal["imagenet", "small"] = "imagenet"
    """7 x 7 stride 2 and max-pooling, or 3 x 3 stride 1"""
    drop_rate: float = 0.0
    """dropout before the head"""
    dynamic_pad: bool = False
    """changes nothing: any size works as it is. Taken so that what is written for one family works for all"""

    def __post_init__(self) -> None:
        object.__setattr__(self, "img_size", pair(self.img_size))
        check_choice("stem", self.stem, ("imagenet", "small"))
        check_choice("block", self.block, ("basic", "bottleneck"))
        check_stages(self)
        check_least(self, dict.fromkeys(("img_size", "in_chans", "embed_dim", "depths"), 1) | {"num_classes": 0})
        check_rates(self)


VARIANTS: dict[str, ResNetConfig] = {
    "resnet_debug": ResNetConfig(img_size=32, embed_dim=8, stem="small", num_classes=10),
    "resnet18_224": ResNetConfig(),
    "resnet50_224": ResNetConfig(block="bottleneck", depths=(3, 4, 6, 3)),
    "resnet18_32": ResNetConfig(img_size=32, stem="small", num_classes=10),
    "resnet50_32": ResNetConfig(img_size=32, stem="small", block="bottleneck", depths=(3, 4, 6, 3), num_classes=10),
}


class ResNet(ConvNet):
    """A residual network; see the module's docstring for its shapes. Takes a config or its fields."""

    family = "resnet"

    def __init__(self, config: ResNetConfig | None = None, **fields: Any) -> None:
        super().__init__()
        self.config = c = choose(ResNetConfig, config, fields)
        self.preprocess = usual_preprocess(c.img_size, c.in_chans)
        kernel, stride, first = (7, 2, 4) if c.stem == "imagenet" else (3, 1, 1)
        with drawn_once(self):
            self.conv1 = nn.Conv2d(c.in_chans, c.embed_dim, kernel, stride, kernel // 2, bias=False)
            self.bn1 = nn.BatchNorm2d(c.embed_dim)
            self.relu = nn.ReLU(inplace=True)
            self.maxpool = nn.MaxPool2d(3, 2, 1) if c.stem == "imagenet" else nn.Identity()
            self.feature_info, inputs = [], c.embed_dim
            for i, depth in enumerate(c.depths):
                stage, width = _stage(c.block, inputs, c.embed_dim * 2**i, depth, stride=1 if i == 0 else 2)
                self.add_module(name := f"layer{i + 1}", stage)
                self.feature_info.append(FeatureInfo(width, first * 2**i, name))
                inputs = width
            self.num_features = inputs
            self.head_drop = nn.Dropout(c.drop_rate)
            self.fc = Linear(self.num_features, c.num_classes) if c.num_classes else nn.Identity()

    def stem_map(self, images: Tensor) -> Tensor:
        return self.maxpool(self.relu(self.bn1(self.conv1(_laid_out(images)))))

    def neck(self, pooled: Tensor) -> Tensor:
        return self.head_drop(pooled)

    def get_classifier(self) -> nn.Module:
        return self.fc

    def reset_classifier(self, num_classes: int) -> None:
        """A new head for `num_classes` classes (0: none); `classes` is emptied."""
        self.config, self.classes = replace(self.config, num_classes=num_classes), ()
        self.fc = Linear(self.num_features, num_classes).to(self.conv1.weight) if num_classes else nn.Identity()

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


def _laid_out(images: Tensor) -> Tensor:
    """Channels last: a CPU convolves and pools them faster. Not with gradients: torch 2.15 may crash going back."""
    return images if torch.is_grad_enabled() else images.contiguous(memory_format=torch.channels_last)


def _stage(block: str, inputs: int, width: int, depth: int, stride: int) -> tuple[nn.Sequential, int]:
    """The blocks of a stage, and the channels that they make."""
    from torchvision.models.resnet import BasicBlock, Bottleneck

    kind = {"basic": BasicBlock, "bottleneck": Bottleneck}[block]
    outputs, change = width * kind.expansion, None
    if stride != 1 or inputs != outputs:
        change = nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs))
    rest = [kind(outputs, width) for _ in range(depth - 1)]
    return nn.Sequential(kind(inputs, width, stride, change), *rest), outputs
