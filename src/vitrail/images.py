"""An image file -> a uint8 tensor (3, H, W), upright, in RGB; or an error that names the file.

Decoded with Pillow: only the formats below, only their first frame, no more than `MAX_PIXELS` pixels.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import IO

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor

FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF")
SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff"})
MAX_PIXELS = 89_478_485
"""a quarter of a gigabyte once decoded; larger files are refused before they are decoded"""


class ImageError(ValueError):
    """An image that cannot be used. The message holds the path and the reason.

    A worker process hands an error on as the text of its traceback: of that, the last line is kept.
    """

    def __init__(self, message: str) -> None:
        if message.startswith("Caught "):
            message = message.rstrip().splitlines()[-1].partition(": ")[2]
        super().__init__(message)


class UnequalSizesError(ImageError):
    """Images that should share one size do not."""


def open_image(source: str | Path | IO[bytes]) -> Image.Image:
    """The picture, upright (EXIF), as RGB with 8 bits a channel; transparency is laid on white.

    Raises `ImageError` with path and reason where there is no file, no image, a damaged one, or one too large.
    """
    name = str(source) if isinstance(source, str | Path) else "the given file"
    try:
        with Image.open(source, formats=FORMATS) as image:
            if image.width * image.height > MAX_PIXELS:
                raise ImageError(f"{name}: {image.width} x {image.height} pixels; at most {MAX_PIXELS:,} are decoded")
            return to_rgb(ImageOps.exif_transpose(image))
    except UnidentifiedImageError:
        raise ImageError(f"{name}: not a readable image; one of {', '.join(FORMATS)} is needed") from None
    except FileNotFoundError:
        raise ImageError(f"{name}: there is no such file") from None
    except (OSError, SyntaxError, EOFError, Image.DecompressionBombError) as error:
        raise ImageError(f"{name}: {error}") from error


def to_rgb(image: Image.Image) -> Image.Image:
    """Any Pillow mode -> RGB. 16-bit greys are scaled linearly, where a plain conversion would cut them off at 255."""
    if image.mode.startswith("I;16"):
        image = Image.fromarray((np.asarray(image, dtype=np.uint16) / 257).round().astype(np.uint8))
    if image.has_transparency_data:
        white = Image.new("RGBA", image.size, "white")
        return Image.alpha_composite(white, image.convert("RGBA")).convert("RGB")
    return image.convert("RGB")


def to_tensor(image: Image.Image) -> Tensor:
    """A Pillow picture of any mode -> uint8 (3, H, W)."""
    return torch.from_numpy(np.array(to_rgb(image))).permute(2, 0, 1).contiguous()


def read_image(source: str | Path | IO[bytes]) -> Tensor:
    """An image file -> uint8 (3, H, W). Raises `ImageError`, as `open_image` does."""
    return to_tensor(open_image(source))


def read_images(paths: Sequence[Path]) -> Tensor:
    """Image files of one size -> uint8 (N, 3, H, W). Raises `ImageError`; `UnequalSizesError` at the first odd one.

    In one thread: for small images the interpreter, not the decoder, takes the time, and threads only contend for it.
    """
    size = open_image(paths[0]).size
    pixels = np.empty((len(paths), size[1], size[0], 3), dtype=np.uint8)
    for row, path in enumerate(paths):
        image = open_image(path)
        if image.size != size:
            raise UnequalSizesError(
                f"{path}: {image.width} x {image.height} pixels where the others have {size[0]} x {size[1]}: "
                "images of many sizes are read when needed, with in_memory off"
            )
        pixels[row] = np.asarray(image)
    return torch.from_numpy(pixels).permute(0, 3, 1, 2).contiguous()
