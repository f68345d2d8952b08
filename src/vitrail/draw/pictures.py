"""Pictures of what a model sees: heat laid over an image, a panel a head, a panel a layer, the image as patches.

    image ── to_picture ──> (H, W, 3) uint8 ──┬── overlay(heat) ──> one PIL image
    heat (h, w) ── enlarged to (H, W) ────────┘          └── sheet ──> head_grid, layer_row

Every map is scaled to its own range before it is coloured, so colours compare places in one panel, not two panels; the
range stands below the panel, and a bar says what dark and light mean.
A model sees a resized and cropped image: give that one here, or heat and image do not lie on each other.

Legend: `C` channels, `H`, `W` image height and width, `h`, `w` rows and columns of a token grid.
"""

from __future__ import annotations

import math
import textwrap
from collections.abc import Sequence
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Colormap
from matplotlib.patheffects import withStroke
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from vitrail.draw.canvas import INK, MUTED, SMALL, Canvas
from vitrail.images import AnyImage, to_pixels
from vitrail.names import nearest
from vitrail.records import Explanation

Pixels = NDArray[np.uint8]
PANEL = 2.2
"""inches"""
SHARP = 224
"""pixels of the short side below which a picture is enlarged before heat is laid over it"""


def to_picture(image: AnyImage) -> Pixels:
    """Any image as an (H, W, 3) uint8 array, upright.

    Takes what `vitrail.images.to_pixels` takes, and raises what it raises. One or two channels are shown as grey
    (the first), more than three by their first three.
    """
    pixels = to_pixels(image)
    pixels = pixels[:3] if len(pixels) >= 3 else pixels[:1].expand(3, -1, -1)
    return pixels.permute(1, 2, 0).contiguous().numpy()


def overlay(
    image: AnyImage,
    heat: Tensor,
    *,
    alpha: float = 0.5,
    cmap: str = "inferno",
    size: tuple[int, int] | None = None,
) -> Image.Image:
    """`heat` (h, w), scaled to its own range, in colour over the image.

    `alpha` is the weight of the colour, 0 … 1. `cmap` is a matplotlib colour map; the default is readable with any kind
    of colour vision and in grey. `size` is the (height, width) of the result, by default the image's.
    """
    if not 0 <= alpha <= 1:
        raise ValueError(f"alpha must lie in [0, 1]; got {alpha}")
    picture = _resized(to_picture(image), size)
    level = _enlarged(heat, picture.shape[:2])
    mixed = (1 - alpha) * picture + alpha * 255 * _colormap(cmap)(level)[..., :3]
    return Image.fromarray(mixed.round().astype(np.uint8))


def head_grid(
    image: AnyImage,
    maps: Tensor,
    *,
    columns: int | None = None,
    caption: str = "image",
    title: str = "",
    cmap: str = "inferno",
) -> Canvas:
    """One panel a head with its number (from 0), in rows, the image at the head of each. `maps` is (heads, h, w).

    Rows are as long as leaves the last of them fullest, unless `columns` says how many heads stand in each.
    """
    if maps.ndim != 3 or not len(maps):
        raise ValueError(f"maps must be (heads, h, w) with at least one head; got shape {tuple(maps.shape)}")
    titles = [f"head {i}" for i in range(len(maps))]
    columns = _even(len(maps)) if columns is None else columns
    return layer_row(image, list(maps), titles, columns=columns, caption=caption, title=title, cmap=cmap)


def layer_row(
    image: AnyImage,
    maps: Sequence[Tensor],
    titles: Sequence[str],
    *,
    columns: int | None = None,
    caption: str = "image",
    title: str = "",
    cmap: str = "inferno",
) -> Canvas:
    """The image under its `caption` and one panel a map, its lowest and highest value below it.

    `maps` are (h, w) each and may differ in size. By default that is one row. With `columns` it is rows of so many
    maps, the image at the head of each. `title` stands over the whole.
    """
    if len(maps) != len(titles) or not maps:
        raise ValueError(f"every map needs one title; got {len(maps)} maps and {len(titles)} titles")
    columns = len(maps) if columns is None else columns
    if columns < 1:
        raise ValueError(f"columns must be at least 1; got {columns}")
    picture, panels = _panels(image, maps, cmap)
    rows = range(0, len(maps), columns)
    pictures = [one for start in rows for one in (picture, *panels[start : start + columns])]
    captions = [one for start in rows for one in (caption, *titles[start : start + columns])]
    drawing = sheet(pictures, captions, columns=columns + 1)
    shown = [axes for n, axes in enumerate(drawing.axes[: len(pictures)]) if n % (columns + 1)]
    for axes, heat in zip(shown, maps, strict=True):
        axes.set_xlabel(_range(heat), fontsize=SMALL, color=MUTED, labelpad=3)
    _frame(drawing, title, cmap, len(rows))
    return drawing


def _even(count: int) -> int:
    """The length of rows whose last one is fullest, so that none is left with a single panel; 4 where it can be."""
    return count if count <= 4 else min((4, 3, 5, 6), key=lambda length: -count % length / length)


def _frame(drawing: Canvas, title: str, cmap: str, rows: int) -> None:
    """Room for the values below `rows` of panels, for a title over them, and for the scale of colours under them."""
    drawing.set_figheight(drawing.get_figheight() + 0.2 * rows + 0.45 + (0.3 if title else 0))
    if title:
        drawing.suptitle(title, fontsize=10, fontweight="bold", color=INK, parse_math=False)
    thin = 0.12 / drawing.get_figheight()
    colours = ScalarMappable(cmap=_colormap(cmap))
    bar = drawing.colorbar(colours, ax=drawing.axes, location="bottom", ticks=(), aspect=30, fraction=thin, pad=0.02)
    bar.set_label("dark: the lowest value of a panel   light: its highest", fontsize=SMALL, color=INK)
    bar.outline.set_visible(False)


def _range(heat: Tensor) -> str:
    """Its lowest and highest value, to two digits of the larger one."""
    low, high = heat.min().item(), heat.max().item()
    digits = 2 - math.ceil(math.log10(max(abs(low), abs(high)) or 1))
    return f"{round(low, digits):g} … {round(high, digits):g}"


def sheet(images: Sequence[AnyImage], captions: Sequence[str] = (), *, columns: int = 4) -> Canvas:
    """Pictures in rows of `columns`, each under its caption (wrapped; empty or no captions at all are fine)."""
    if not images:
        raise ValueError("a sheet needs at least one image; got none")
    if captions and len(captions) != len(images):
        raise ValueError(f"every image needs one caption; got {len(images)} images and {len(captions)} captions")
    if columns < 1:
        raise ValueError(f"columns must be at least 1; got {columns}")
    columns = min(columns, len(images))
    pictures = [to_picture(image) for image in images]
    lines = [textwrap.fill(caption, 28) for caption in captions or [""] * len(images)]
    heights = [
        max(_inches(picture, line) for picture, line in zip(pictures[i:][:columns], lines[i:][:columns], strict=True))
        for i in range(0, len(pictures), columns)
    ]
    drawing = Canvas(PANEL * columns, sum(heights), "compressed")
    grid = drawing.subplots(len(heights), columns, squeeze=False, height_ratios=heights)
    for axes in grid.flat[len(pictures) :]:
        axes.set_axis_off()
    for axes, picture, line in zip(grid.flat, pictures, lines, strict=False):
        _show(axes, picture, line)
    return drawing


def patch_picture(image: AnyImage, patch_size: int | tuple[int, int] = 16) -> Canvas:
    """The image beside the patches that a `PatchEmbed` cuts it into, with their numbers in reading order, from 0.

    `patch_size` is one side or (height, width) in pixels. Pixels that fill no whole patch are cut off evenly around
    the image, and the title says so. Numbers are left out where they would be too small to read.
    """
    high, wide = (patch_size, patch_size) if isinstance(patch_size, int) else patch_size
    whole = to_picture(image)
    if min(high, wide) < 1 or high > whole.shape[0] or wide > whole.shape[1]:
        raise ValueError(
            f"patch_size must be at least 1 and fit into the image of {whole.shape[0]} x {whole.shape[1]} pixels;"
            f" got {high} x {wide}"
        )
    picture = _whole_patches(whole, high, wide)
    rows, columns = picture.shape[0] // high, picture.shape[1] // wide
    drawing = Canvas(11, 5.4 * min(max(picture.shape[0] / picture.shape[1], 0.3), 2) + 0.5)
    left, right = drawing.subplots(1, 2)
    cut = "" if picture.shape == whole.shape else f", cut from {whole.shape[0]} x {whole.shape[1]}"
    _show(left, picture, f"{picture.shape[0]} x {picture.shape[1]} pixels{cut}")
    _show(right, _apart(picture, high, wide), f"{rows} x {columns} = {rows * columns} patches of {high} x {wide}")
    _number(right, rows, columns)
    return drawing


def _resized(picture: Pixels, size: tuple[int, int] | None) -> Pixels:
    if size is None or size == picture.shape[:2]:
        return picture
    return np.array(Image.fromarray(picture).resize((size[1], size[0]), Image.Resampling.BICUBIC))


def _enlarged(heat: Tensor, size: tuple[int, int]) -> NDArray[np.float32]:
    if heat.ndim != 2 or not heat.numel():
        raise ValueError(f"heat must be (h, w), one number a grid cell; got shape {tuple(heat.shape)}")
    if not heat.isfinite().all():
        raise ValueError("heat must be finite; got NaN or infinity")
    levels: NDArray[np.float32] = Explanation(method="", heat=heat.detach().cpu()).resized(size).numpy()
    return levels


def _colormap(name: str) -> Colormap:
    if name not in matplotlib.colormaps:
        raise ValueError(
            f"cmap must be a matplotlib colour map; got {name!r}, near {', '.join(nearest(name, matplotlib.colormaps))}"
        )
    return matplotlib.colormaps[name]


def _panels(image: AnyImage, maps: Sequence[Tensor], cmap: str) -> tuple[Image.Image, list[Image.Image]]:
    """The image and each map laid over it, enlarged where the image is small."""
    picture = to_picture(image)
    scale = max(1.0, SHARP / min(picture.shape[:2]))
    size = (round(picture.shape[0] * scale), round(picture.shape[1] * scale))
    panels = [overlay(image, heat, alpha=0.6, cmap=cmap, size=size) for heat in maps]
    return Image.fromarray(_resized(picture, size)), panels


def _inches(picture: Pixels, caption: str) -> float:
    aspect = min(max(picture.shape[0] / picture.shape[1], 0.4), 2.5)
    return PANEL * aspect + 0.16 * (caption.count("\n") + 1) + 0.1


def _show(axes: Axes, picture: Pixels, caption: str) -> None:
    axes.imshow(picture, interpolation="nearest" if min(picture.shape[:2]) < SHARP else "antialiased")
    axes.set(xticks=(), yticks=())
    axes.spines[:].set_visible(False)
    axes.set_title(caption, fontsize=SMALL, color=INK, parse_math=False)


def _whole_patches(picture: Pixels, high: int, wide: int) -> Pixels:
    top, left = (picture.shape[0] % high) // 2, (picture.shape[1] % wide) // 2
    rows, columns = picture.shape[0] // high, picture.shape[1] // wide
    return picture[top : top + rows * high, left : left + columns * wide]


def _apart(picture: Pixels, high: int, wide: int) -> Pixels:
    """The patches with white gaps of a tenth of a patch, each patch at least 20 pixels wide so that gaps are thin."""
    scale = -(-20 // min(high, wide))
    big = picture.repeat(scale, 0).repeat(scale, 1)
    high, wide = high * scale, wide * scale
    gap = max(2, min(high, wide) // 10)
    rows, columns = big.shape[0] // high, big.shape[1] // wide
    patches = big.reshape(rows, high, columns, wide, 3)
    spaced = np.full((rows, high + gap, columns, wide + gap, 3), 255, np.uint8)
    spaced[:, :high, :, :wide] = patches
    return spaced.reshape(rows * (high + gap), columns * (wide + gap), 3)


def _number(axes: Axes, rows: int, columns: int) -> None:
    """Numbers in the upper left corner of each patch; the axes show `_apart`'s picture."""
    points = min(9.0, 72 * 5.2 / columns * 0.3)
    if points < 3:
        return
    width, height = axes.get_xlim()[1] + 0.5, axes.get_ylim()[0] + 0.5
    outline = [withStroke(linewidth=points / 5, foreground="black")]
    style: dict[str, Any] = {"fontsize": points, "color": "white", "va": "top", "path_effects": outline}
    for i in range(rows * columns):
        row, column = divmod(i, columns)
        axes.text(width * (column + 0.05) / columns, height * (row + 0.05) / rows, str(i), **style)
