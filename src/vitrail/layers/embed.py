"""From pixels to tokens, and where the tokens stand.

    image (B, C_in, H, W) -> PatchEmbed -> (B, h·w, C)          h = H / patch, w = W / patch
                          -> OverlapPatchEmbed -> (B, h·w, C)   h = H / stride, w = W / stride, rounded up
    positions: learned (a parameter of the model) or `sincos_2d`; `resize_positions` carries either to another grid

Legend: `B` batch, `C_in` channels, `H`, `W` pixels, `h`, `w` token grid, `N` = h·w, `P` prefix tokens, `C` width.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vitrail.names import check_choice

Size = int | tuple[int, int]
Filter = Literal["bicubic", "bilinear"]
"""how positions are resized: bicubic with antialiasing, or bilinear without"""


def pair(size: Size) -> tuple[int, int]:
    """7 -> (7, 7); (3, 5) -> (3, 5). Raises `ValueError` for anything but one or two whole numbers."""
    parts = (size, size) if isinstance(size, int) else size
    if not isinstance(parts, tuple | list) or len(parts) != 2 or not all(type(part) is int for part in parts):
        raise ValueError(f"a size is one whole number of pixels, or (height, width); got {size!r}")
    return parts[0], parts[1]


def check_divides(size: tuple[int, int], parts: tuple[int, int], what: str) -> None:
    """Raises `ValueError` where a height or width in pixels does not divide into `parts`, naming the next that do."""
    for side, part in zip(size, parts, strict=True):
        if side % part:
            lower, upper = max(part, side // part * part), (side // part + 1) * part
            mend = f"{lower} or {upper}" if lower < side else f"{upper}"
            raise ValueError(f"img_size {side} is not divisible by {what} {part}: use {mend}, or dynamic_pad=True")


class PatchEmbed(nn.Module):
    """Cuts an image into patches and projects each (Dosovitskiy et al. 2021, eq. 1): (B, C_in, H, W) -> (B, N, C).

    `kind` "conv" is a convolution whose stride is its kernel; "linear" cuts first and multiplies after: the same
    function with the same number of parameters. "overlap" lets patches share pixels, "stem" is several convolutions.
    Any image size that divides into patches is taken at run time;
    `dynamic_pad` pads the right and lower edge with zeros where it does not. Raises `ValueError` otherwise.
    `norm` makes a norm layer of a width, for the tokens.
    """

    def __init__(
        self,
        img_size: Size = 224,
        patch_size: Size = 16,
        in_chans: int = 3,
        embed_dim: int = 768,
        *,
        kind: str = "conv",
        bias: bool = True,
        dynamic_pad: bool = False,
        norm: Callable[[int], nn.Module] | None = None,
    ) -> None:
        super().__init__()
        check_choice("kind", kind, PROJECTIONS)
        self.patch_size, self.in_chans, self.dynamic_pad = pair(patch_size), in_chans, dynamic_pad
        self.grid_size = self.grid(*pair(img_size))
        self.proj: Any = PROJECTIONS[kind](in_chans, embed_dim, self.patch_size, bias)
        self.norm = norm(embed_dim) if norm else nn.Identity()

    @property
    def num_patches(self) -> int:
        return self.grid_size[0] * self.grid_size[1]

    @property
    def pixel_weight(self) -> str:
        """The name of the weight that takes pixels."""
        return next(name for name, _ in self.named_parameters())

    def grid(self, height: int, width: int) -> tuple[int, int]:
        """Rows and columns of patches for an image of this size. Raises `ValueError` where it does not divide."""
        if not self.dynamic_pad:
            check_divides((height, width), self.patch_size, "patch_size")
        return -(-height // self.patch_size[0]), -(-width // self.patch_size[1])

    def forward(self, images: Tensor) -> Tensor:
        return self.norm(self.proj(self.padded(images)).flatten(2).transpose(1, 2))  # (B, N, C)

    def padded(self, images: Tensor) -> Tensor:
        """The images with zeros at their right and lower edge, as far as a patch begun there reaches."""
        check_channels(images, self.in_chans)
        height, width = images.shape[-2:]
        rows, columns = self.grid(height, width)
        below, right = rows * self.patch_size[0] - height, columns * self.patch_size[1] - width
        return F.pad(images, (0, right, 0, below)) if below or right else images

    def padding(self, mask: Tensor) -> Tensor:
        """Padded pixels (B, H, W) bool -> (B, N) bool: true where a patch holds nothing but padding."""
        rows, columns = self.grid(mask.shape[-2], mask.shape[-1])
        below, right = rows * self.patch_size[0] - mask.shape[-2], columns * self.patch_size[1] - mask.shape[-1]
        seen = F.pad(~mask, (0, right, 0, below)).float()
        return F.max_pool2d(seen[:, None], self.patch_size).flatten(1) == 0


class OverlapPatchEmbed(nn.Module):
    """Patches that overlap, projected and normed (Wang et al. 2022, PVT v2, section 3.2): (B, C_in, H, W) -> (B, N, C).

    A convolution whose kernel is wider than its stride and which pads with zeros by half its kernel, so that any size
    works: a cell stands for `stride` pixels a side, the last for what is left. Raises `ValueError` for a kernel that is
    even or no wider than the stride.
    """

    def __init__(
        self, patch_size: int = 7, stride: int = 4, in_chans: int = 3, embed_dim: int = 768, *, norm_eps: float = 1e-5
    ) -> None:
        super().__init__()
        if patch_size % 2 == 0 or patch_size <= stride:
            least = stride + 1 + stride % 2
            raise ValueError(
                f"patch_size must be odd and larger than stride {stride}; got {patch_size}: use {least} or more"
            )
        self.stride, self.in_chans = stride, in_chans
        self.proj = nn.Conv2d(in_chans, embed_dim, patch_size, stride, padding=patch_size // 2)
        self.norm = nn.LayerNorm(embed_dim, eps=norm_eps)

    def grid(self, height: int, width: int) -> tuple[int, int]:
        """Rows and columns of cells for an image of this size."""
        return -(-height // self.stride), -(-width // self.stride)

    def forward(self, images: Tensor) -> Tensor:
        check_channels(images, self.in_chans)
        return self.norm(self.proj(images).flatten(2).transpose(1, 2))  # (B, N, C)

    def padding(self, mask: Tensor) -> Tensor:
        """Padded pixels (B, H, W) bool -> (B, N) bool: true where a cell stands for nothing but padding."""
        seen = (~mask).float()[:, None]
        return F.max_pool2d(seen, self.stride, ceil_mode=True).flatten(1) == 0


def check_channels(images: Tensor, in_chans: int) -> None:
    """Raises `ValueError` unless `images` are (B, in_chans, H, W) floating-point numbers."""
    if images.ndim != 4 or images.shape[1] != in_chans:
        raise ValueError(f"images must be (B, {in_chans}, H, W); got shape {tuple(images.shape)}")
    if not images.is_floating_point():
        raise ValueError(
            f"images must be floating-point, normalised as in training; got {images.dtype}: of uint8 ones, "
            "model.preprocess.normalise(images) makes them"
        )


def check_mask(mask: Tensor | None, images: Tensor) -> None:
    """Raises `ValueError` unless a mask of padded pixels is bool and (B, H, W), as its images (B, C, H, W) are."""
    if mask is None:
        return
    if mask.dtype != torch.bool:
        raise ValueError(f"mask must be bool, true where a pixel is padding; got {mask.dtype}: use mask.bool()")
    if mask.shape != (shape := (images.shape[0], *images.shape[-2:])):
        raise ValueError(f"mask must be (B, H, W) like the images, {shape}; got {tuple(mask.shape)}")


class PatchLinear(nn.Linear):
    """Patches cut out and multiplied by one matrix: (B, C_in, H, W) -> (B, C, h, w)."""

    def __init__(self, in_chans: int, embed_dim: int, patch_size: tuple[int, int], bias: bool = True) -> None:
        super().__init__(in_chans * patch_size[0] * patch_size[1], embed_dim, bias=bias)
        self.patch_size = patch_size

    def forward(self, images: Tensor) -> Tensor:
        (p, q), rows = self.patch_size, images.shape[-2] // self.patch_size[0]
        cut = F.unfold(images, (p, q), stride=(p, q)).transpose(1, 2)  # (B, N, C_in·p·q)
        return super().forward(cut).transpose(1, 2).unflatten(2, (rows, -1))


class ConvStem(nn.Sequential):
    """Halves the image with 3 x 3 convolutions until a pixel is a patch: (B, C_in, H, W) -> (B, C, h, w).

    Source: Xiao et al. 2021, "Early convolutions help transformers see better", section 4: each convolution is followed
    by batch norm and ReLU and doubles the channels up to `embed_dim`; a 1 x 1 convolution comes last. Raises
    `ValueError` for patches whose sides are no equal powers of 2, and for widths that do not halve so often.
    """

    def __init__(self, in_chans: int, embed_dim: int, patch_size: tuple[int, int], bias: bool = True) -> None:
        halvings = patch_size[0].bit_length() - 1
        if patch_size[0] != patch_size[1] or patch_size[0] != 2**halvings or halvings < 1:
            raise ValueError(f"embed 'stem' halves the image: patch_size must be 2, 4, 8, 16, …; got {patch_size}")
        if embed_dim % 2 ** (halvings - 1):
            raise ValueError(
                f"embed 'stem' doubles channels up to embed_dim, which must be divisible by {2 ** (halvings - 1)} for "
                f"patches of {patch_size[0]}; got {embed_dim}"
            )
        widths = [in_chans, *(embed_dim >> step for step in reversed(range(halvings)))]
        layers: list[nn.Module] = []
        for before, after in pairwise(widths):
            conv = nn.Conv2d(before, after, kernel_size=3, stride=2, padding=1, bias=False)
            layers += [conv, nn.BatchNorm2d(after), nn.ReLU()]
        super().__init__(*layers, nn.Conv2d(embed_dim, embed_dim, kernel_size=1, bias=bias))


def _patch_conv(in_chans: int, embed_dim: int, patch_size: tuple[int, int], bias: bool = True) -> nn.Conv2d:
    return nn.Conv2d(in_chans, embed_dim, kernel_size=patch_size, stride=patch_size, bias=bias)


def _overlapping_conv(in_chans: int, embed_dim: int, patch_size: tuple[int, int], bias: bool = True) -> nn.Conv2d:
    """Kernel 2p - 1, padding p - 1, stride p (Wang et al. 2022, PVT v2, section 3.2)."""
    kernel, padding = (2 * patch_size[0] - 1, 2 * patch_size[1] - 1), (patch_size[0] - 1, patch_size[1] - 1)
    return nn.Conv2d(in_chans, embed_dim, kernel, stride=patch_size, padding=padding, bias=bias)


PROJECTIONS: dict[str, Callable[[int, int, tuple[int, int], bool], nn.Module]] = {
    "conv": _patch_conv,
    "linear": PatchLinear,
    "overlap": _overlapping_conv,
    "stem": ConvStem,
}


def sincos_2d(grid: tuple[int, int], dim: int, temperature: float = 10000.0) -> Tensor:
    """Fixed positions (1, N, C): half of the width for columns, half for rows, sines before cosines.

    Source: He et al. 2022 (MAE), section 3 and appendix A.1, after Vaswani et al. 2017, section 3.5; MAE's channel
    order. Raises `ValueError` unless `dim` is divisible by 4.
    """
    if dim % 4:
        raise ValueError(f"sin-cos positions need embed_dim divisible by 4; got {dim}: use {dim // 4 * 4 + 4}")
    rate = temperature ** -(torch.arange(dim // 4, dtype=torch.float64) / (dim // 4))
    rows, columns = torch.meshgrid(*(torch.arange(n, dtype=torch.float64) for n in grid), indexing="ij")
    parts = [angle for place in (columns, rows) for angle in _waves(place.flatten()[:, None] * rate)]
    return torch.cat(parts, dim=1)[None].float()


def _waves(angle: Tensor) -> tuple[Tensor, Tensor]:
    return angle.sin(), angle.cos()


def resize_positions(
    pos: Tensor, old: tuple[int, int], new: tuple[int, int], prefix: int = 0, *, filter: Filter = "bicubic"
) -> Tensor:
    """Positions (1, P + N, C) of grid `old` at grid `new`; prefix rows stay. The same grid returns `pos` itself.

    "bicubic" is timm's, with antialiasing (Dosovitskiy et al. 2021, section 3.2, interpolate); "bilinear" is PVT's.
    """
    if old == new:
        return pos
    image = pos[:, prefix:].float().unflatten(1, old).permute(0, 3, 1, 2)  # (1, C, h, w)
    image = F.interpolate(image, size=new, mode=filter, antialias=filter == "bicubic")
    return torch.cat([pos[:, :prefix], image.flatten(2).transpose(1, 2).to(pos.dtype)], dim=1)


def resize_relative_bias(table: Tensor, old: tuple[int, int], new: tuple[int, int]) -> Tensor:
    """A bias ((2h - 1)(2w - 1), H) for every offset in a window `old`, at window `new`; the same one is itself.

    Bicubic (Liu et al. 2021, "Swin Transformer", section 4.1 and appendix; this filter is the authors').
    """
    if old == new:
        return table
    before, after = ((2 * h - 1, 2 * w - 1) for h, w in (old, new))
    image = table.float().T.unflatten(1, before)[None]  # (1, H, 2h - 1, 2w - 1)
    return F.interpolate(image, size=after, mode="bicubic")[0].flatten(1).T.to(table.dtype)
