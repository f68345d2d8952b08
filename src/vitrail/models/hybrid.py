"""Hybrid Vision Transformer: Dosovitskiy et al. 2021, "An Image is Worth 16x16 Words", the hybrid of section 3.1.

    image (B, C_in, H, W)
      root: 7 x 7 convolution, max-pooling     (B, 64, H/4, W/4)
      stage i of bottleneck blocks             (B, 256·2^i, H/4/2^i, W/4/2^i)
      patches of that map, each projected      (B, N, C)
      class token, positions, blocks, head     as in `vit`

Notable choices: the CNN is BiT's ResNet (Kolesnikov et al. 2020, "Big Transfer", section 2.2): group norm in place of
batch norm, so that no image depends on its neighbours in a batch, and standardised weights (Qiao et al. 2019), without
which that trains badly. ReLU follows the norm, as in the first ResNet, not BiT's second. Every side is padded as
TensorFlow's SAME, so that a map has ceil(H / stride) rows at any image size. Names and keys are timm's.

Legend: `B` batch, `C_in` channels of an image, `H`, `W` pixels, `N` image tokens, `C` width, `F` channels of a map.
"""

from __future__ import annotations

from collections import OrderedDict

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vitrail.layers.embed import PROJECTIONS, PatchEmbed, Size, check_channels, pair
from vitrail.models.config import check_least, check_numbers, family_config
from vitrail.models.vit import VisionTransformer
from vitrail.models.vit_config import ViTConfig

GROUPS = 32
"""of every group norm (Wu & He 2018)"""
EPSILON = 1e-8
"""added to the variance of a filter's weights"""


@family_config
class HybridConfig(ViTConfig):
    """A Vision Transformer over the map of a BiT ResNet. Defaults are R50+ViT-B/16 at 224 pixels."""

    patch_size: Size = 1
    """cells of the CNN's map, or (rows, columns)"""
    stem_depths: tuple[int, ...] = (3, 4, 9)
    """bottleneck blocks of each stage, the first at a quarter of the image; none leaves the root alone"""
    stem_width: int = 64
    """channels of the root, a multiple of 32; the first stage has four times as many, each further stage twice more"""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_numbers(self, "stem_depths", "blocks of each of 0 to 6 stages, such as (3, 4, 9)", range(7))
        check_least(self, {"stem_depths": 1, "stem_width": GROUPS})
        if self.stem_width % GROUPS:
            below = self.stem_width // GROUPS * GROUPS
            raise ValueError(
                f"stem_width must be divisible by {GROUPS}, the groups of a norm; got {self.stem_width}: "
                f"use {below} or {below + GROUPS}"
            )

    @property
    def stem_stride(self) -> int:
        """Pixels from one cell of the CNN's map to the next: the root quarters, each stage but the first halves."""
        return int(4 * 2 ** max(0, len(self.stem_depths) - 1))


def _row(size: int, stem: tuple[int, ...], patch: int, dim: int, depth: int, heads: int) -> HybridConfig:
    return HybridConfig(
        img_size=size, stem_depths=stem, patch_size=patch, embed_dim=dim, depth=depth, num_heads=heads
    )  # fmt: skip


# fmt: off
VARIANTS: dict[str, HybridConfig] = {
    "hybrid_debug": HybridConfig(
        img_size=32, stem_depths=(1,), stem_width=32, embed_dim=48, depth=3, num_heads=3, num_classes=10),
    #                              img  stem          patch  width depth heads
    "vit_tiny_r_s16_p8_224":  _row(224, (),               8,   192,   12,    3),
    "vit_tiny_r_s16_p8_384":  _row(384, (),               8,   192,   12,    3),
    "vit_small_r26_s32_224":  _row(224, (2, 2, 2, 2),     1,   384,   12,    6),
    "vit_small_r26_s32_384":  _row(384, (2, 2, 2, 2),     1,   384,   12,    6),
    "vit_base_r26_s32_224":   _row(224, (2, 2, 2, 2),     1,   768,   12,   12),
    "vit_base_r50_s16_224":   _row(224, (3, 4, 9),        1,   768,   12,   12),
    "vit_base_r50_s16_384":   _row(384, (3, 4, 9),        1,   768,   12,   12),
    "vit_large_r50_s32_224":  _row(224, (3, 4, 6, 3),     1,  1024,   24,   16),
    "vit_large_r50_s32_384":  _row(384, (3, 4, 6, 3),     1,  1024,   24,   16),
}
# fmt: on


def same_padding(size: int, kernel: int, stride: int) -> int:
    """How many rows TensorFlow's SAME adds, above and below together, for ceil(size / stride) rows to come out."""
    return max((-(-size // stride) - 1) * stride + kernel - size, 0)


class StdConv2d(nn.Conv2d):
    """Convolution by standardised weights: (B, F, h, w) -> (B, F', ceil(h / stride), ceil(w / stride)).

    Each filter is used with mean 0 and variance 1 over its inputs (Qiao et al. 2019, "Weight Standardization", eq. 2).
    """

    def __init__(self, in_channels: int, out_channels: int, kernel_size: int, stride: int = 1) -> None:
        super().__init__(in_channels, out_channels, kernel_size, stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        filters = self.weight.flatten(1)  # (F', F·k·k)
        weight = F.layer_norm(filters, filters.shape[1:], eps=EPSILON).view_as(self.weight)
        rows, columns = (same_padding(n, self.kernel_size[0], self.stride[0]) for n in x.shape[-2:])
        if rows % 2 or columns % 2:  # SAME puts the odd one below and to the right
            x = F.pad(x, (0, columns % 2, 0, rows % 2))
        return F.conv2d(x, weight, None, self.stride, (rows // 2, columns // 2))


class StemNorm(nn.GroupNorm):
    """Group norm (Wu & He 2018): (B, F, h, w) -> the same. Of one number alone it would leave nothing."""

    def forward(self, x: Tensor) -> Tensor:
        if x.shape[1:].numel() == self.num_groups:
            raise ValueError(
                f"an image must leave the CNN's norms more than one number a group; one cell of {x.shape[1]} channels "
                f"in {self.num_groups} groups is left: use larger images, or a larger stem_width"
            )
        return super().forward(x)


class MaxPoolSame(nn.Module):
    """The largest of 3 x 3 cells at every second: (B, F, h, w) -> (B, F, ceil(h / 2), ceil(w / 2))."""

    def forward(self, x: Tensor) -> Tensor:
        above, left = (same_padding(n, 3, 2) // 2 for n in x.shape[-2:])
        if not x.requires_grad:  # a CPU pools this layout several times faster, but its gradient slower
            x = x.contiguous(memory_format=torch.channels_last)
        x = F.max_pool2d(x, 3, 2, (above, left), ceil_mode=True)  # ceil_mode: the odd one below, to the right
        return x.contiguous()  # the norms that follow are more exact on it


class Bottleneck(nn.Module):
    """Residual block of three convolutions (He et al. 2016, section 4.1), the middle one narrow: (B, F, h, w) -> same.

    The first of a stage projects its shortcut: (B, F, h, w) -> (B, F', ceil(h / stride), ceil(w / stride)).
    """

    def __init__(self, inputs: int, width: int, stride: int = 1, *, project: bool = False) -> None:
        super().__init__()
        narrow = width // 4
        self.downsample = _project(inputs, width, stride) if project else nn.Identity()
        self.conv1 = StdConv2d(inputs, narrow, 1)
        self.norm1 = StemNorm(GROUPS, narrow)
        self.conv2 = StdConv2d(narrow, narrow, 3, stride)
        self.norm2 = StemNorm(GROUPS, narrow)
        self.conv3 = StdConv2d(narrow, width, 1)
        self.norm3 = StemNorm(GROUPS, width)

    def forward(self, x: Tensor) -> Tensor:
        inner = F.relu(self.norm1(self.conv1(x)), inplace=True)
        inner = F.relu(self.norm2(self.conv2(inner)), inplace=True)
        return F.relu(self.norm3(self.conv3(inner)) + self.downsample(x), inplace=True)


def _project(inputs: int, width: int, stride: int) -> nn.Sequential:
    return nn.Sequential(
        OrderedDict(conv=StdConv2d(inputs, width, 1, stride), norm=StemNorm(GROUPS, width))
    )  # fmt: skip


def _stage(inputs: int, width: int, depth: int, stride: int) -> nn.Sequential:
    first = Bottleneck(inputs, width, stride, project=True)
    blocks = nn.Sequential(first, *(Bottleneck(width, width) for _ in range(depth - 1)))
    return nn.Sequential(OrderedDict(blocks=blocks))


def bit_resnet(in_chans: int, width: int, depths: tuple[int, ...]) -> tuple[nn.Sequential, int]:
    """The root and the stages of a BiT ResNet, or the root alone, and the channels of its map."""
    root = OrderedDict(
        conv=StdConv2d(in_chans, width, 7, 2), norm=StemNorm(GROUPS, width), act=nn.ReLU(inplace=True),
        pool=MaxPoolSame(),
    )  # fmt: skip
    if not depths:
        return nn.Sequential(root), width
    widths = [4 * width * 2**i for i in range(len(depths))]
    inputs = [width, *widths[:-1]]
    stages = [_stage(inputs[i], widths[i], depths[i], stride=1 if i == 0 else 2) for i in range(len(depths))]
    return nn.Sequential(OrderedDict(stem=nn.Sequential(root), stages=nn.Sequential(*stages))), widths[-1]


class HybridEmbed(PatchEmbed):
    """A CNN makes a map of the image, whose patches are projected: (B, C_in, H, W) -> (B, N, C).

    `stride` is how many pixels a cell of the map stands for, `channels` how many numbers it holds; a patch is
    `c.patch_size` cells. Pads images and raises errors as `PatchEmbed` does for patches of stride · patch_size pixels.
    """

    def __init__(self, c: ViTConfig, backbone: nn.Module, channels: int, stride: int) -> None:
        self.stride, self.cells = stride, pair(c.patch_size)  # `grid`, which is asked for next, may read them
        pixels = (stride * self.cells[0], stride * self.cells[1])
        super().__init__(
            c.img_size, pixels, c.in_chans, c.embed_dim, kind=c.embed, bias=not c.pre_norm, dynamic_pad=c.dynamic_pad
        )
        self.backbone = backbone
        self.proj = PROJECTIONS[c.embed](channels, c.embed_dim, self.cells, not c.pre_norm)

    def forward(self, images: Tensor) -> Tensor:
        return self.proj(self.backbone(self.padded(images))).flatten(2).transpose(1, 2)  # (B, N, C)

    @property
    def pixel_weight(self) -> str:
        """The name of the weight that takes pixels: the CNN's first convolution's."""
        names = (name for name, part in self.backbone.named_modules() if isinstance(part, nn.Conv2d))
        return f"backbone.{next(names)}.weight"

    def init_backbone(self) -> None:
        """Convolutions: normal, std sqrt(2 / fan out) (He et al. 2015), biases 0; norms are leaves of their own."""
        for part in self.backbone.modules():
            if isinstance(part, nn.Conv2d):
                nn.init.kaiming_normal_(part.weight, mode="fan_out", nonlinearity="relu")
                if part.bias is not None:
                    nn.init.zeros_(part.bias)


class BiTEmbed(HybridEmbed):
    """Over a CNN that takes any size: not the image must divide into patches, but its map of ceil(H / stride) rows."""

    def grid(self, height: int, width: int) -> tuple[int, int]:
        whole = [-(-n // self.stride) * self.stride for n in (height, width)]
        sides = zip(whole, (height, width), self.patch_size, strict=True)
        rows, columns = (up if up % patch == 0 else n for up, n, patch in sides)
        return super().grid(rows, columns)

    def forward(self, images: Tensor) -> Tensor:
        check_channels(images, self.in_chans)
        rows, columns = self.grid(images.shape[-2], images.shape[-1])
        x = self.backbone(images)  # (B, F, ceil(H / stride), ceil(W / stride))
        below, right = rows * self.cells[0] - x.shape[-2], columns * self.cells[1] - x.shape[-1]
        x = F.pad(x, (0, right, 0, below)) if below or right else x
        return self.proj(x).flatten(2).transpose(1, 2)  # (B, N, C)


class HybridViT(VisionTransformer):
    """A Vision Transformer whose patches are of a BiT ResNet's map; see the module's docstring for its shapes.

    Takes a `HybridConfig` or its fields; everything after the patches is `VisionTransformer`'s.
    """

    family = "hybrid"
    config_class = HybridConfig
    config: HybridConfig
    patch_embed: HybridEmbed
    _rows_read = VisionTransformer._rows_read

    def _make_patch_embed(self) -> HybridEmbed:
        c = self.config
        return BiTEmbed(c, *bit_resnet(c.in_chans, c.stem_width, c.stem_depths), c.stem_stride)

    @torch.no_grad()
    def init_weights(self) -> None:
        """`VisionTransformer`'s laws, and those of `HybridEmbed.init_backbone`."""
        super().init_weights()
        self.patch_embed.init_backbone()
