"""A plain Vision Transformer over a small convolutional stem, or over any of torchvision's CNNs by its name.

    image (B, C_in, H, W)
      stem "conv", at stride 2^n:
        n - 1 × 3 x 3 convolution of stride 2, norm, ReLU      (B, C/2, 2H/stride, 2W/stride)
        3 x 3 convolution, ReLU, overlapping max-pooling       (B, C, H/stride, W/stride)
      each cell projected                                      (B, N, C)
      positions, blocks, head                                  as in `vit`

Notable choices: the last step of the stem is the tokeniser of Hassani et al. 2021, "Escaping the Big Data Paradigm with
Compact Transformers" (arXiv 2104.05704, section 3.3), which at 32 pixels is all of it; what larger images need before
it are the halving convolutions of Xiao et al. 2021, "Early Convolutions Help Transformers See Better", section 4. The
head reads the mean of the tokens, without a class token, which a network this small does not miss.

Legend: `B` batch, `C_in` channels of an image, `H`, `W` pixels, `N` image tokens, `C` width, `F` channels of a map.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from itertools import pairwise
from typing import Any, Literal

import torch
from torch import Tensor, nn

from vitrail.layers.embed import Size, pair
from vitrail.models.backbone import usual_preprocess
from vitrail.models.config import check_least, family_config
from vitrail.models.hybrid import HybridEmbed
from vitrail.models.vit import VisionTransformer
from vitrail.models.vit_config import ViTConfig
from vitrail.names import check_choice

CELLS = 14
"""about how many cells a side a stem leaves of an image if nobody says its stride, as ViT's 16 pixels do of 224"""
CNNS = (
    "convnext", "densenet", "efficientnet", "mnasnet", "mobilenet", "resnet", "resnext", "shufflenet", "vgg",
    "wide_resnet",
)  # fmt: skip
"""torchvision's names begin with these where a network is one row of modules whose strides are powers of two, and is
built without memory (RegNet is not)"""
PROBE = 16
"""rows of the map that a torchvision CNN is cut by, more than any of its poolings leaves"""
HEADS = ("avgpool", "classifier", "fc")
"""how torchvision calls what follows the last map"""


@family_config
class HybridCNNConfig(ViTConfig):
    """A Vision Transformer over a CNN's map. Defaults are a small one for images of 224 pixels."""

    patch_size: Size = 1
    """cells of the stem's map, or (rows, columns)"""
    embed_dim: int = 384
    depth: int = 6
    num_heads: int = 6
    class_token: bool = False
    global_pool: Literal["token", "avg", "map"] = "avg"
    """class token, mean of image tokens, or attention pooling"""
    stem: str = "conv"
    """conv, or a torchvision CNN such as resnet18, with fresh weights"""
    stem_stride: int | None = None
    """pixels from one cell of the stem's map to the next, a power of two; None: about 14 cells a side, so 2 for images
    of 32 pixels and 16 for 224"""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.stem_stride is None:
            object.__setattr__(self, "stem_stride", _usual_stride(min(pair(self.img_size))))
        check_least(self, {"stem_stride": 2})
        if (below := 2 ** int(math.log2(self.stride))) != self.stride:
            raise ValueError(f"stem_stride must be a power of two; got {self.stem_stride}: use {below} or {2 * below}")

    @property
    def stride(self) -> int:
        """`stem_stride`, which is a number once the config is made."""
        assert self.stem_stride is not None
        return self.stem_stride


def _usual_stride(pixels: int) -> int:
    """The power of two that leaves nearest to `CELLS` cells, by ratio."""
    return int(max(2, 2 ** round(math.log2(pixels / CELLS))))


def _tiny(size: int) -> HybridCNNConfig:
    """The widths of CCT-7/3x1 (Hassani et al. 2021, table 1)."""
    classes = 10 if size == 32 else 1000
    return HybridCNNConfig(img_size=size, embed_dim=256, depth=7, num_heads=4, mlp_ratio=2.0, num_classes=classes)


VARIANTS: dict[str, HybridCNNConfig] = {
    "hybrid_cnn_debug": HybridCNNConfig(
        img_size=64, embed_dim=48, depth=3, num_heads=3, class_token=True, num_classes=10
    ),
    "hybrid_tiny_224": _tiny(224),
    "hybrid_small_224": HybridCNNConfig(),
    "hybrid_small_resnet18_224": HybridCNNConfig(stem="resnet18"),
    # small images
    "hybrid_tiny_32": _tiny(32),
    "hybrid_small_32": HybridCNNConfig(img_size=32, num_classes=10),
}


def halving_stem(in_chans: int, width: int, stride: int) -> tuple[nn.Sequential, int]:
    """Convolutions that halve, and a last whose map pooling halves: (B, C_in, H, W) -> (B, C, H/stride, W/stride)."""
    halvings = int(math.log2(stride)) - 1
    widths = [in_chans, *(max(1, width // 2 ** (halvings - i)) for i in range(halvings))]
    parts: list[nn.Module] = []
    for inputs, outputs in pairwise(widths):
        conv = nn.Conv2d(inputs, outputs, 3, 2, 1, bias=False)
        parts += [conv, nn.BatchNorm2d(outputs), nn.ReLU(inplace=True)]
    last = nn.Conv2d(widths[-1], width, 3, 1, 1, bias=False)
    return nn.Sequential(*parts, last, nn.ReLU(inplace=True), nn.MaxPool2d(3, 2, 1)), width


def torchvision_stem(name: str, in_chans: int, stride: int) -> tuple[nn.Sequential, int]:
    """A torchvision CNN up to the last module whose map has this stride, by its own names, and that map's channels.

    Raises `ValueError` for a name that is none of its CNNs, naming the nearest, and for a stride it has no map of.
    """
    from torchvision import models

    known = [found for found in models.list_models(module=models) if found.startswith(CNNS)]
    check_choice("stem", name, ("conv", *known))
    with torch.device("meta"):
        whole = models.get_model(name, weights=None).eval()  # in training a norm refuses a single cell
        parts, last = _cut(whole, stride)
        if last.shape[-1] != PROBE:
            fitting = [str(s) for s in (2, 4, 8, 16, 32) if _cut(whole, s)[1].shape[-1] == PROBE]
            raise ValueError(f"stem_stride must be {', '.join(fitting)} for the stem {name}; got {stride}")
    return _taking(nn.Sequential(parts).train(), in_chans), last.shape[1]


Parts = OrderedDict[str, nn.Module]


@torch.no_grad()
def _cut(whole: nn.Module, stride: int) -> tuple[Parts, Tensor]:
    """The beginning of a network on the meta device whose map of an image has `PROBE` rows, if it has one so large."""
    return _beginning(whole, torch.empty(1, 3, PROBE * stride, PROBE * stride, device="meta"), PROBE)


def _beginning(part: nn.Module, x: Tensor, least: int) -> tuple[Parts, Tensor]:
    """Children of `part` while the map has `least` rows, the beginning of the one in which it loses them; the map."""
    found: Parts = OrderedDict()
    for name, child in part.named_children():
        if name in HEADS:
            break
        out = child(x)
        if out.shape[-1] < least:
            inner, out = _beginning(child, x, least) if isinstance(child, nn.Sequential) else (None, x)
            return (OrderedDict([*found.items(), (name, nn.Sequential(inner))]) if inner else found), out
        found[name], x = child, out
    return found, x


def _taking(stem: nn.Sequential, in_chans: int) -> nn.Sequential:
    """The stem with a first convolution for this many channels."""
    first = next(part for part in stem.modules() if isinstance(part, nn.Conv2d))
    if in_chans != first.in_channels:
        first.in_channels = in_chans
        first.weight = nn.Parameter(first.weight.new_empty(first.out_channels, in_chans, *first.kernel_size))
    return stem


class HybridCNNViT(VisionTransformer):
    """A plain Vision Transformer over a CNN's map; see the module's docstring for its shapes.

    Takes a `HybridCNNConfig` or its fields: `HybridCNNViT(n_classes=10, embed_dim=384, depth=6, img_size=32)`.
    """

    family = "hybrid_cnn"
    config_class = HybridCNNConfig
    config: HybridCNNConfig
    patch_embed: HybridEmbed
    _rows_read = VisionTransformer._rows_read

    def __init__(self, config: HybridCNNConfig | None = None, **fields: Any) -> None:
        super().__init__(config, **fields)
        self.preprocess = usual_preprocess(self.config.img_size, self.config.in_chans)

    def _make_patch_embed(self) -> HybridEmbed:
        c = self.config
        if c.stem == "conv":
            return HybridEmbed(c, *halving_stem(c.in_chans, c.embed_dim, c.stride), c.stride)
        return HybridEmbed(c, *torchvision_stem(c.stem, c.in_chans, c.stride), c.stride)

    @torch.no_grad()
    def init_weights(self) -> None:
        """`VisionTransformer`'s laws, and those of `HybridEmbed.init_backbone`; ConvNeXt's layer scales are 1e-6."""
        super().init_weights()
        self.patch_embed.init_backbone()
        for name, value in self.patch_embed.backbone.named_parameters():
            if name.endswith("layer_scale"):
                nn.init.constant_(value, 1e-6)
