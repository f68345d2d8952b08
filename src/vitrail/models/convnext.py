"""ConvNeXt, a convolutional network built as transformers are: Liu et al. 2022, "A ConvNet for the 2020s".

    image (B, C_in, H, W)
      patches of 4 x 4, each projected, norm         (B, C, H/4, W/4)
      4 stages of blocks; between two of them
        norm, convolution of 2 x 2 with stride 2     (B, 2C, h/2, w/2)
      mean, norm, head                               (B, K)

Notable choices: names and keys are timm's; a map that does not divide loses its last row or column on the way down,
as there and in torchvision; rows for small images have patches of 2 x 2, so that 32 pixels end as 2 x 2.

Legend: `B` batch, `C_in` channels of an image, `H`, `W` pixels, `C` channels, `h`, `w` cells of a stage, `K` classes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, cast

import torch
from torch import Tensor, nn

from vitrail.layers.blocks import DropPath, Mlp, drop_path_rates
from vitrail.layers.embed import Size, pair
from vitrail.layers.init import init_leaf, trunc_normal
from vitrail.layers.linear import Linear
from vitrail.models.backbone import FeatureInfo, drawn_once, usual_preprocess
from vitrail.models.config import check_least, check_rates, check_stages, choose, family_config
from vitrail.models.convnet import ConvNet

EPSILON = 1e-6
"""of every norm"""


@family_config
class ConvNeXtConfig:
    """Every knob of a ConvNeXt. Defaults are ConvNeXt-T for ImageNet."""

    img_size: Size = 224
    """pixels, or (height, width); any other size works at run time, down to one cell in the last stage"""
    in_chans: int = 3
    num_classes: int = 1000
    """0 leaves the head out"""
    patch_size: int = 4
    """pixels, a side of the stem's patches"""
    embed_dim: int = 96
    """channels of the first stage; each further stage has twice as many"""
    depths: tuple[int, ...] = (3, 3, 9, 3)
    """blocks per stage"""
    init_values: float = 1e-6
    """first value of the scale of each residual branch"""
    drop_rate: float = 0.0
    """dropout before the head"""
    drop_path_rate: float = 0.0
    """stochastic depth of the last block; grows linearly from 0"""
    dynamic_pad: bool = False
    """changes nothing: any size works as it is. Taken so that what is written for one family works for all"""

    def __post_init__(self) -> None:
        object.__setattr__(self, "img_size", pair(self.img_size))
        check_stages(self)
        check_least(self, dict.fromkeys(("depths", "patch_size", "embed_dim", "in_chans"), 1) | {"num_classes": 0})
        check_least(self, {"img_size": self.least})
        check_rates(self)

    @property
    def least(self) -> int:
        """Pixels a side that leave the last stage one cell."""
        return int(self.patch_size * 2 ** (len(self.depths) - 1))


VARIANTS: dict[str, ConvNeXtConfig] = {
    "convnext_debug": ConvNeXtConfig(img_size=32, patch_size=2, embed_dim=12, depths=(1, 2, 1), num_classes=10),
    "convnext_tiny_224": ConvNeXtConfig(),
    # small images
    "convnext_tiny_32": ConvNeXtConfig(img_size=32, patch_size=2, num_classes=10),
}


class LayerNorm2d(nn.LayerNorm):
    """Norm over the channels of each cell: (B, C, h, w) -> the same."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class Block(nn.Module):
    """Depthwise convolution over 7 x 7 cells, then an MLP on each cell, scaled and added: (B, C, h, w) -> the same.

    Liu et al. 2022, figure 4; the scale is LayerScale (Touvron et al. 2021).
    """

    def __init__(self, dim: int, init_values: float, drop_path: float) -> None:
        super().__init__()
        self.conv_dw = nn.Conv2d(dim, dim, 7, padding=3, groups=dim)
        self.norm = nn.LayerNorm(dim, eps=EPSILON)
        self.mlp = Mlp(dim, 4 * dim)
        self.gamma = nn.Parameter(torch.full((dim,), init_values))
        self.drop_path = DropPath(drop_path) if drop_path else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        inner = self.norm(self.conv_dw(x).permute(0, 2, 3, 1))  # (B, h, w, C)
        inner = self.gamma * self.mlp(inner)
        return x + self.drop_path(inner.permute(0, 3, 1, 2))


class Stage(nn.Module):
    """Blocks at one size, after a convolution that halves, but in the first: (B, C', h', w') -> (B, C, h, w)."""

    def __init__(self, inputs: int, dim: int, init_values: float, drop_paths: Sequence[float]) -> None:
        super().__init__()
        halve = nn.Sequential(LayerNorm2d(inputs, eps=EPSILON), nn.Conv2d(inputs, dim, 2, 2))
        self.downsample = nn.Identity() if inputs == dim else halve
        self.blocks = nn.Sequential(*(Block(dim, init_values, rate) for rate in drop_paths))

    def forward(self, x: Tensor) -> Tensor:
        return self.blocks(self.downsample(x))


class Head(nn.Module):
    """Norm and dropout of the pooled map, and the linear layer after them, which whoever wants logits calls."""

    def __init__(self, dim: int, num_classes: int, drop_rate: float) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(dim, eps=EPSILON)
        self.drop = nn.Dropout(drop_rate)
        self.fc = Linear(dim, num_classes) if num_classes else nn.Identity()

    def forward(self, pooled: Tensor) -> Tensor:
        return self.drop(self.norm(pooled))


class ConvNeXt(ConvNet):
    """A ConvNeXt; see the module's docstring for its shapes. Takes a config or its fields.

    Raises `ValueError` for images too small for one cell in the last stage.
    """

    family = "convnext"

    def __init__(self, config: ConvNeXtConfig | None = None, **fields: Any) -> None:
        super().__init__()
        self.config = c = choose(ConvNeXtConfig, config, fields)
        self.preprocess = usual_preprocess(c.img_size, c.in_chans)
        widths = [c.embed_dim * 2**i for i in range(len(c.depths))]
        self.feature_info = [FeatureInfo(w, c.patch_size * 2**i, f"stages.{i}") for i, w in enumerate(widths)]
        self.num_features = widths[-1]
        with drawn_once(self):
            patches = nn.Conv2d(c.in_chans, widths[0], c.patch_size, c.patch_size)
            self.stem = nn.Sequential(patches, LayerNorm2d(widths[0], eps=EPSILON))
            rates, first = drop_path_rates(c.drop_path_rate, sum(c.depths)), 0
            self.stages = nn.ModuleList()
            for inputs, width, depth in zip([widths[0], *widths], widths, c.depths, strict=False):
                self.stages.append(Stage(inputs, width, c.init_values, rates[first : first + depth]))
                first += depth
            self.head = Head(self.num_features, c.num_classes, c.drop_rate)

    def stem_map(self, images: Tensor) -> Tensor:
        height, width = images.shape[-2:]
        if min(height, width) < (least := self.config.least):
            raise ValueError(
                f"images must be at least {least} pixels a side, one cell in the last stage; got {height} x {width}: "
                "use larger images, or a smaller patch_size"
            )
        return self.stem(images)

    def neck(self, pooled: Tensor) -> Tensor:
        return self.head(pooled)

    def get_classifier(self) -> nn.Module:
        return self.head.fc

    def reset_classifier(self, num_classes: int) -> None:
        """A new head for `num_classes` classes (0: none), initialised by its law; `classes` is emptied."""
        self.config, self.classes = replace(self.config, num_classes=num_classes), ()
        like = self.head.norm.weight
        self.head.fc = Linear(self.num_features, num_classes).to(like) if num_classes else nn.Identity()
        init_leaf(self.head.fc)

    @torch.no_grad()
    def init_weights(self) -> None:
        """Convolutions and linear layers: truncated normal, std 0.02; biases 0; norms 1 and 0; scales `init_values`.

        Liu et al. 2022, appendix A.1.
        """
        for module in self.modules():
            init_leaf(module)
            if isinstance(module, nn.Conv2d):
                trunc_normal(module.weight, 0.02)
                nn.init.zeros_(cast(Tensor, module.bias))
            elif isinstance(module, Block):
                nn.init.constant_(module.gamma, self.config.init_values)

    def pixel_weights(self) -> list[str]:
        return ["stem.0.weight"]
