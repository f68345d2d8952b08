"""Decoding: what is accepted, how it is brought to RGB, and how a bad file is named."""

from __future__ import annotations

import io
import os
import re
import struct
import zlib

import numpy as np
import pytest
import torch
from PIL import Image, PngImagePlugin

from vitrail import images
from vitrail.images import ImageError, UnequalSizesError, open_image, read_image, read_images, to_pixels, to_rgb


def test_pixels_arrive_as_they_are(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (5, 7, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "a.png")
    image = read_image(tmp_path / "a.png")
    assert image.dtype == torch.uint8
    assert torch.equal(image, torch.from_numpy(pixels).permute(2, 0, 1))


def test_open_files_are_read_too(tmp_path):
    file = io.BytesIO()
    Image.new("RGB", (4, 3), "red").save(file, "PNG")
    file.seek(0)
    assert read_image(file).shape == (3, 3, 4)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_turned_upright(tmp_path, orientation):
    upright = Image.fromarray(np.arange(4 * 6 * 3, dtype=np.uint8).reshape(4, 6, 3) * 3)
    turns = {2: 0, 3: 3, 4: 1, 5: 5, 6: 2, 7: 6, 8: 4}  # the Transpose that undoes what the reader will do
    stored = upright.transpose(Image.Transpose(turns[orientation])) if orientation > 1 else upright
    exif = Image.Exif()
    exif[0x0112] = orientation
    stored.save(tmp_path / "a.png", exif=exif)
    assert torch.equal(read_image(tmp_path / "a.png"), images.to_tensor(upright))


@pytest.mark.parametrize("orientation", range(1, 9))
def test_an_opened_picture_is_turned_as_its_file_is(tmp_path, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.fromarray(np.arange(4 * 6 * 3, dtype=np.uint8).reshape(4, 6, 3)).save(tmp_path / "a.png", exif=exif)
    turned = read_image(tmp_path / "a.png")
    assert turned.shape[1:] == ((4, 6) if orientation < 5 else (6, 4))
    assert torch.equal(to_pixels(Image.open(tmp_path / "a.png")), turned)
    assert torch.equal(to_pixels(open_image(tmp_path / "a.png")), turned)  # once, not twice


@pytest.mark.parametrize(("name", "order"), [("a.png", "<"), ("a.tif", "<"), ("a.tif", ">")])
def test_sixteen_bits_are_scaled_linearly(tmp_path, name, order):
    values = np.linspace(0, 65535, 64).round().astype(f"{order}u2").reshape(8, 8)
    Image.fromarray(values).save(tmp_path / name)
    assert abs(read_image(tmp_path / name).float().mean() / 255 - values.mean() / 65535) < 1e-3


def test_floats_in_a_file_are_taken_as_in_an_array(tmp_path):
    values = np.linspace(0, 1, 64, dtype=np.float32).reshape(8, 8)
    Image.fromarray(values).save(tmp_path / "a.tif")
    assert torch.equal(read_image(tmp_path / "a.tif"), to_pixels(values))
    Image.fromarray(values * 255).save(tmp_path / "b.tif")
    with pytest.raises(ImageError, match=r"b\.tif: a float image must lie in \[0, 1\]; got 0 … 255: divide by 255"):
        read_image(tmp_path / "b.tif")


@pytest.mark.parametrize("dtype", [np.int32, np.int16])
def test_whole_numbers_without_a_known_range_are_refused(tmp_path, dtype):
    Image.fromarray(np.arange(64, dtype=dtype).reshape(8, 8)).save(tmp_path / "a.tif")
    with pytest.raises(ImageError, match=r"a\.tif: an image must be uint8 or float; got .*int32: scale it to 0 … 255"):
        read_image(tmp_path / "a.tif")


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGBA", "CMYK", "YCbCr"])
def test_every_mode_becomes_rgb(mode):
    assert to_rgb(Image.new("RGB", (3, 2), "white").convert(mode)).getpixel((0, 0)) == (255, 255, 255)


def test_transparency_is_laid_on_white():
    assert to_rgb(Image.new("RGBA", (2, 2), (10, 20, 30, 0))).getpixel((0, 0)) == (255, 255, 255)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(ImageError, match=r"none\.jpg: there is no such file"):
        read_image(tmp_path / "none.jpg")


@pytest.mark.parametrize("content", [b"", b"not an image", b"%!PS-Adobe-3.0 EPSF-3.0\n"])
def test_what_is_no_image_is_named(tmp_path, content):
    (tmp_path / "odd.jpg").write_bytes(content)
    with pytest.raises(ImageError, match=r"odd\.jpg: not a readable image; one of JPEG, PNG"):
        read_image(tmp_path / "odd.jpg")


def test_a_truncated_file_is_named(tmp_path):
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 40, 3), dtype=np.uint8)).save(tmp_path / "cut.jpg")
    (tmp_path / "cut.jpg").write_bytes((tmp_path / "cut.jpg").read_bytes()[:-400])
    with pytest.raises(ImageError, match=r"cut\.jpg: .*truncated"):
        read_image(tmp_path / "cut.jpg")


def test_a_folder_with_an_image_name_is_named(tmp_path):
    (tmp_path / "dir.png").mkdir()
    with pytest.raises(ImageError, match=r"dir\.png: an image must be a regular file; got a folder"):
        read_image(tmp_path / "dir.png")


@pytest.mark.skipif(os.name != "posix", reason="pipes and devices as files")
def test_a_pipe_and_a_device_are_named_and_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "pipe.png")
    (tmp_path / "zero.png").symlink_to("/dev/zero")
    for name in ("pipe.png", "zero.png"):
        with pytest.raises(ImageError, match=rf"{name}: an image must be a regular file; got a pipe or a device"):
            read_image(tmp_path / name)


@pytest.mark.parametrize("error", [
    ValueError("Decompressed data too large"), struct.error("unpack requires 4 bytes"), MemoryError(),
    OverflowError("x"), IndexError("odd"), TypeError("odd"), Image.DecompressionBombError("odd"),
    Image.DecompressionBombWarning("odd"),
    zlib.error("odd"), OSError("odd"), SyntaxError("odd"), EOFError(),
])  # fmt: skip
def test_whatever_a_decoder_raises_names_the_file(tmp_path, monkeypatch, error):
    def broken(*_, **__):
        raise error

    Image.new("RGB", (4, 4)).save(tmp_path / "a.png")
    opened = Image.open(tmp_path / "a.png")
    monkeypatch.setattr(images, "to_rgb", broken)
    with pytest.raises(ImageError, match=rf"a\.png: {re.escape(str(error)) or type(error).__name__}$"):
        read_image(tmp_path / "a.png")
    with pytest.raises(ImageError, match="the given picture: "):
        to_pixels(opened)


def test_a_bomb_of_text_is_named(tmp_path):
    text = PngImagePlugin.PngInfo()
    text.add_itxt("a", "x" * 10_000_000, zip=True)
    Image.new("RGB", (4, 4)).save(tmp_path / "bomb.png", pnginfo=text)
    with pytest.raises(ImageError, match=r"bomb\.png: .*too large"):
        read_image(tmp_path / "bomb.png")


@pytest.mark.parametrize("high", [1.0, 1.009])
def test_floats_become_bytes(high):
    assert to_pixels(torch.full((3, 2, 2), high)).unique().tolist() == [255]
    assert to_pixels(np.full((2, 2, 3), 0.5)).unique().tolist() == [128]
    assert to_pixels(np.full((2, 3), 0.5, np.float16)).shape == (3, 2, 3)


def test_an_array_is_copied():
    array = np.zeros((2, 2, 3), np.uint8)
    pixels = to_pixels(array)
    array[:] = 9
    assert not pixels.any()


def test_too_many_pixels_are_refused_before_decoding(tmp_path, monkeypatch):
    Image.new("1", (300, 200)).save(tmp_path / "big.png")
    monkeypatch.setattr(images, "MAX_PIXELS", 59_999)
    with pytest.raises(ImageError, match=r"big\.png: 300 x 200 pixels; at most 59,999"):
        read_image(tmp_path / "big.png")


def test_many_of_one_size_and_an_odd_one(tmp_path):
    paths = [tmp_path / f"{n:03d}.png" for n in range(4)]
    for n, path in enumerate(paths):
        Image.new("RGB", (8, 8), (40 * n, n, 0)).save(path)
    assert torch.equal(read_images(paths), torch.stack([read_image(path) for path in paths]))
    Image.new("RGB", (9, 8)).save(paths[2])
    with pytest.raises(UnequalSizesError, match=r"002\.png: 9 x 8 pixels where the others have 8 x 8"):
        read_images(paths)


def test_an_error_out_of_a_worker_keeps_only_its_last_line():
    told = (
        'Caught ImageError in DataLoader worker process 0.\nOriginal Traceback:\n  File "x"\nImageError: f.jpg: odd\n'
    )
    assert str(ImageError(told)) == "f.jpg: odd"
