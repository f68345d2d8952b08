"""Any image -> a uint8 tensor (C, H, W), upright, in RGB where it is a picture; or an error that names it.

Files are decoded with Pillow: only the formats below, only their first frame, no more than `MAX_PIXELS` pixels.

Legend: `C` channels, `H`, `W` image height and width.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch
from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError
from torch import Tensor

FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF")
SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff"})
MAX_PIXELS = 89_478_485
"""a quarter of a gigabyte once decoded; larger files are refused before they are decoded"""
SLACK = 0.01
"""how far a float image may leave [0, 1]: bicubic resizing overshoots a little"""
REDUCED = (8, 4, 2)
"""by what a JPEG can be made smaller while it is decoded, since its blocks have 8 x 8 pixels"""
SPARE = 1.5
"""pixels a side, for each that is asked for, that a JPEG decoded smaller has at least"""
AnyImage = str | Path | Image.Image | Tensor | np.ndarray[Any, Any]
"""a path, a Pillow picture, a tensor (C, H, W), or an array (H, W, C) or (H, W); values uint8, or float in [0, 1]"""
Part = tuple[int, int, int, int]
"""top, left, height, width"""


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
    with _opened(source) as image:
        return to_rgb(image)


def read_part(source: str | Path | IO[bytes], choose: Callable[[int, int], Part], least: tuple[int, int]) -> Tensor:
    """The part of a picture that `choose(height, width)` names -> uint8 (3, h, w), to be resized to `least`.

    A JPEG is decoded at 1/2, 1/4 or 1/8 of its size, and so is the part, where at least `SPARE` times `least` is left
    of it: a photograph of 12 megapixels is then ready in a fraction of the time. Otherwise the pixels are those of
    `read_image`. Raises `ImageError`, as `open_image` does.
    """
    with _opened(source) as image:
        if image.mode != "RGB" or _turned(image) or image.has_transparency_data:
            pixels = to_tensor(image)
            top, left, height, width = choose(*pixels.shape[-2:])
            return pixels[:, top : top + height, left : left + width]
        part = choose(image.height, image.width)
        return _as_tensor(image.crop(_smaller(image, part, least)))


def _smaller(image: Image.Image, part: Part, least: tuple[int, int]) -> tuple[int, int, int, int]:
    """Has the picture decoded as small as `least` of the part allows. Gives the part's left, top, right and bottom."""
    top, left, height, width = part
    own = image.size
    spare = min(height / least[0], width / least[1]) / SPARE
    by = next((number for number in REDUCED if number <= spare), 1)
    if by > 1:
        image.draft("RGB", (own[0] // by, own[1] // by))  # does nothing but to a JPEG
    wide, high = image.width / own[0], image.height / own[1]
    return round(left * wide), round(top * high), round((left + width) * wide), round((top + height) * high)


@contextmanager
def _opened(source: str | Path | IO[bytes]) -> Iterator[Image.Image]:
    """A file whose header has been read, and whose pixels are decoded when somebody asks for them."""
    if isinstance(source, str | Path):
        _check_file(source)
    name = str(source) if isinstance(source, str | Path) else "the given file"
    with _named(name), Image.open(source, formats=FORMATS) as image:
        if image.width * image.height > MAX_PIXELS:
            raise ImageError(f"{name}: {image.width} x {image.height} pixels; at most {MAX_PIXELS:,} are decoded")
        yield image


def _check_file(path: str | Path) -> None:
    """A pipe would be waited for, and a device read without end."""
    if not Path(path).exists():
        raise ImageError(f"{path}: there is no such file")
    if not Path(path).is_file():
        kind = "a folder" if Path(path).is_dir() else "a pipe or a device"
        raise ImageError(f"{path}: an image must be a regular file; got {kind}: name an image file")


@contextmanager
def _named(name: str) -> Iterator[None]:
    """Whatever a decoder says of a file as one `ImageError`: a hostile file can raise nearly anything out of Pillow."""
    try:
        yield
    except ImageError:
        raise
    except UnidentifiedImageError:
        raise ImageError(f"{name}: not a readable image; one of {', '.join(FORMATS)} is needed") from None
    except Exception as error:
        raise ImageError(f"{name}: {str(error) or type(error).__name__}") from error


def to_rgb(image: Image.Image) -> Image.Image:
    """Any Pillow mode -> RGB, upright by its EXIF orientation, transparency laid on white; itself if it is all that.

    A plain conversion would cut greys of more than 8 bits off at 255. Here 16-bit ones (`I;16`) are scaled linearly,
    and 32-bit ones are taken as arrays are: floats (`F`) lie in [0, 1], and whole numbers (`I`), which may mean any
    range, raise `ValueError`, as floats outside it do.
    """
    if _turned(image):
        image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I;16"):
        image = Image.fromarray((np.asarray(image, dtype=np.uint16) / 257).round().astype(np.uint8))
    elif image.mode in ("I", "F"):
        image = Image.fromarray(_to_bytes(torch.from_numpy(np.array(image))).numpy())
    if image.has_transparency_data:
        white = Image.new("RGBA", image.size, "white")
        return Image.alpha_composite(white, image.convert("RGBA")).convert("RGB")
    image.load()
    return image if image.mode == "RGB" else image.convert("RGB")


def _turned(image: Image.Image) -> bool:
    """Whether a camera was held so that the picture is to be turned, or mirrored, before it is seen."""
    return image.getexif().get(ExifTags.Base.Orientation, 1) != 1


def to_tensor(image: Image.Image) -> Tensor:
    """A Pillow picture -> uint8 (3, H, W), upright; in memory it stays pixel by pixel, which resizing is fastest with.

    Raises `ImageError` where its file is damaged, and where `to_rgb` refuses its values.
    """
    with _named("the given picture"):
        return _as_tensor(to_rgb(image))


def _as_tensor(image: Image.Image) -> Tensor:
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)


def to_pixels(image: AnyImage) -> Tensor:
    """Any image -> uint8 (C, H, W) on the CPU; floats in [0, 1] are rounded to 8 bits, (H, W) arrays become RGB.

    Raises `ValueError` for another type, shape or range of values, naming it, and `ImageError` (one too) for a file
    that cannot be read.
    """
    if isinstance(image, str | Path):
        return read_image(image)
    if isinstance(image, Image.Image):
        return to_tensor(image)
    if isinstance(image, np.ndarray):
        return _from_array(image)
    if not isinstance(image, Tensor):
        raise ValueError(f"an image is a path, a Pillow picture, a tensor or an array; got {type(image).__name__}")
    if image.ndim != 3 or not image.numel():
        raise ValueError(f"an image as a tensor is (C, H, W); got shape {tuple(image.shape)}{_batch_hint(image.ndim)}")
    return _to_bytes(image.detach().cpu())


def _from_array(image: np.ndarray[Any, Any]) -> Tensor:
    if image.ndim not in (2, 3) or not image.size:
        raise ValueError(
            f"an image as an array is (H, W, C) or (H, W); got shape {image.shape}{_batch_hint(image.ndim)}"
        )
    if image.dtype != np.uint8 and image.dtype.kind != "f":
        raise ValueError(_wrong_values(str(image.dtype)))
    pixels = _to_bytes(torch.from_numpy(np.array(image, dtype=None if image.dtype == np.uint8 else np.float32)))
    return pixels.expand(3, -1, -1).contiguous() if image.ndim == 2 else pixels.permute(2, 0, 1)


def _batch_hint(dims: int) -> str:
    return ": give list(batch)" if dims == 4 else ""


def _to_bytes(image: Tensor) -> Tensor:
    """uint8 as it is; float in [0, 1] rounded to 0 … 255."""
    if image.dtype == torch.uint8:
        return image
    if not image.is_floating_point():
        raise ValueError(_wrong_values(str(image.dtype)))
    low, high = image.min().item(), image.max().item()
    if not (low >= -SLACK and high <= 1 + SLACK):
        raise ValueError(
            f"a float image must lie in [0, 1]; got {low:.3g} … {high:.3g}: divide by 255 if that is its range, or, "
            "if it is normalised, undo it with preprocess.denormalise(image)"
        )
    return (image.float().clamp(0, 1) * 255).round().to(torch.uint8)


def _wrong_values(dtype: str) -> str:
    return f"an image must be uint8 or float; got {dtype}: scale it to 0 … 255 and convert it to uint8"


def read_image(source: str | Path | IO[bytes]) -> Tensor:
    """An image file -> uint8 (3, H, W). Raises `ImageError`, as `open_image` does."""
    return to_tensor(open_image(source))


def read_images(paths: Sequence[Path], bad: dict[int, str] | None = None) -> Tensor:
    """Image files of one size -> uint8 (N, 3, H, W). Raises `ImageError`; `UnequalSizesError` at the first odd one.

    With `bad`, a file that cannot be read has a black row and its reason in `bad`, by row; `ImageError` is then
    raised only where that is so of all.
    In one thread: for small images the interpreter, not the decoder, takes the time, and threads only contend for it.
    """
    pixels: np.ndarray[Any, Any] | None = None
    for row, path in enumerate(paths):
        try:
            image = open_image(path)
        except ImageError as error:
            if bad is None:
                raise
            bad[row] = str(error)
            continue
        if pixels is None:
            pixels = np.zeros((len(paths), image.height, image.width, 3), dtype=np.uint8)
        _put(image, pixels, row, path)
    if pixels is None:
        raise ImageError(f"none of {len(paths)} images could be read; {(bad or {}).get(0)}")
    return torch.from_numpy(pixels).permute(0, 3, 1, 2).contiguous()


def _put(image: Image.Image, pixels: np.ndarray[Any, Any], row: int, path: Path) -> None:
    height, width = pixels.shape[1:3]
    if image.size != (width, height):
        raise UnequalSizesError(
            f"{path}: {image.width} x {image.height} pixels where the others have {width} x {height}: "
            "images of many sizes are read when needed, with in_memory off"
        )
    pixels[row] = np.asarray(image)
