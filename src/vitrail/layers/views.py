"""Patches of an image at another size than its own, for networks that look at it at several.

    image (B, C_in, H, W) ── resized, or its middle ──> view (B, C_in, h·patch, w·patch) ── PatchEmbed ──> (B, h·w, C)

Legend: `B` batch, `C_in` channels, `H`, `W` pixels, `h`, `w` token grid, `N` = h·w, `C` width.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from vitrail.layers.embed import PatchEmbed, Size, check_channels, pair

STEMS = {12: ((7, 4, 3), (3, 3, 0), (3, 1, 1)), 16: ((7, 4, 3), (3, 2, 1), (3, 2, 1))}
"""patch size -> kernel, stride and padding of the three convolutions that cut it"""


class ScaledPatchEmbed(PatchEmbed):
    """Patches of the image at `scale` times its size (Chen et al. 2021, CrossViT): (B, C_in, H, W) -> (B, N, C).

    At scale 1 the view is the image itself, which must divide into patches or have `dynamic_pad`. Any other view is
    resized to the whole number of patches nearest to `scale` times the image; with `crop` it is cut out of the centre
    where it is no larger than the image. `fixed` gives images of every size the view of `img_size`; `stem` cuts patches
    by three convolutions.
    """

    def __init__(
        self,
        img_size: Size,
        patch_size: int,
        in_chans: int,
        embed_dim: int,
        *,
        scale: float = 1.0,
        crop: bool = False,
        fixed: bool = False,
        stem: bool = False,
        dynamic_pad: bool = False,
    ) -> None:
        view = view_size(pair(img_size), scale, patch_size)
        super().__init__(view, patch_size, in_chans, embed_dim, dynamic_pad=dynamic_pad)
        self.scale, self.crop, self.fixed = scale, crop, view if fixed else None
        if stem:
            self.add_module("proj", strided_stem(in_chans, embed_dim, patch_size))

    def forward(self, images: Tensor) -> Tensor:
        check_channels(images, self.in_chans)
        return super().forward(self.view(images))

    def view(self, images: Tensor) -> Tensor:
        """(B, C_in, H, W) -> (B, C_in, …): the image itself, or its middle, or bicubically resized, as timm does."""
        own, size = (images.shape[-2], images.shape[-1]), self.size(images)
        if size == own:
            return images
        if self._cuts(own, size):
            return middle(images, size)
        return F.interpolate(images, size=size, mode="bicubic", align_corners=False)

    def padding(self, mask: Tensor) -> Tensor:
        """Padded pixels (B, H, W) bool -> (B, N) bool: true where a patch holds nothing but padding."""
        own, size = (mask.shape[-2], mask.shape[-1]), self.size(mask)
        if self._cuts(own, size):
            return super().padding(middle(mask, size))
        seen = F.adaptive_max_pool2d((~mask)[:, None].float(), size)
        return super().padding(seen[:, 0] == 0)  # a pixel made of padding alone

    def size(self, images: Tensor) -> tuple[int, int]:
        """Height and width of the view of images (…, H, W)."""
        return self.fixed or view_size((images.shape[-2], images.shape[-1]), self.scale, self.patch_size[0])

    def _cuts(self, own: tuple[int, int], size: tuple[int, int]) -> bool:
        return self.crop and size[0] <= own[0] and size[1] <= own[1]


def view_size(image: tuple[int, int], scale: float, patch: int) -> tuple[int, int]:
    """The image's own height and width at scale 1; at another, the whole number of patches nearest to `scale` times."""
    if scale == 1:
        return image
    height, width = (patch * max(1, round(side * scale / patch)) for side in image)
    return height, width


def middle(x: Tensor, size: tuple[int, int]) -> Tensor:
    """(…, H, W) -> (…, height, width) from its centre."""
    top, left = round((x.shape[-2] - size[0]) / 2), round((x.shape[-1] - size[1]) / 2)
    return x[..., top : top + size[0], left : left + size[1]]


def strided_stem(in_chans: int, embed_dim: int, patch_size: int) -> nn.Sequential:
    """Three convolutions, ReLU between them, whose strides make up a patch: (B, C_in, H, W) -> (B, C, h, w).

    Source: Chen et al. 2021 (CrossViT), the † models of section 4.1. Raises `ValueError` for patches not in `STEMS`.
    """
    if patch_size not in STEMS or embed_dim < 4:
        raise ValueError(
            f"multi_conv cuts patches of {' or '.join(map(str, STEMS))} pixels into widths of at least 4; "
            f"got patch_size {patch_size} and embed_dim {embed_dim}: use multi_conv=False"
        )
    widths = (in_chans, embed_dim // 4, embed_dim // 2, embed_dim)
    layers: list[nn.Module] = []
    for i, (kernel, stride, padding) in enumerate(STEMS[patch_size]):
        layers += [nn.Conv2d(widths[i], widths[i + 1], kernel, stride, padding), nn.ReLU(inplace=True)]
    return nn.Sequential(*layers[:-1])
