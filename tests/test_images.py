"""Decoding: what is accepted, how it is brought to RGB, and how a bad file is named."""

from __future__ import annotations

import io
import multiprocessing
import os
import re
import struct
import sys
import time
import warnings
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


@pytest.mark.fault(22)
@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_turned_upright(tmp_path, orientation):
    upright = Image.fromarray(np.arange(4 * 6 * 3, dtype=np.uint8).reshape(4, 6, 3) * 3)
    turns = {2: 0, 3: 3, 4: 1, 5: 5, 6: 2, 7: 6, 8: 4}  # the Transpose that undoes what the reader will do
    stored = upright.transpose(Image.Transpose(turns[orientation])) if orientation > 1 else upright
    exif = Image.Exif()
    exif[0x0112] = orientation
    stored.save(tmp_path / "a.png", exif=exif)
    assert torch.equal(read_image(tmp_path / "a.png"), images.to_tensor(upright))


@pytest.mark.fault(22)
@pytest.mark.parametrize("orientation", range(1, 9))
def test_an_opened_picture_is_turned_as_its_file_is(tmp_path, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.fromarray(np.arange(4 * 6 * 3, dtype=np.uint8).reshape(4, 6, 3)).save(tmp_path / "a.png", exif=exif)
    turned = read_image(tmp_path / "a.png")
    assert turned.shape[1:] == ((4, 6) if orientation < 5 else (6, 4))
    assert torch.equal(to_pixels(Image.open(tmp_path / "a.png")), turned)
    assert torch.equal(to_pixels(open_image(tmp_path / "a.png")), turned)  # once, not twice


@pytest.mark.fault(20)
@pytest.mark.parametrize(("name", "order"), [("a.png", "<"), ("a.tif", "<"), ("a.tif", ">")])
def test_sixteen_bits_are_scaled_linearly(tmp_path, name, order):
    values = np.linspace(0, 65535, 64).round().astype(f"{order}u2").reshape(8, 8)
    Image.fromarray(values).save(tmp_path / name)
    assert abs(read_image(tmp_path / name).float().mean() / 255 - values.mean() / 65535) < 1e-3


@pytest.mark.fault(25)
def test_floats_in_a_file_are_taken_as_in_an_array(tmp_path):
    values = np.linspace(0, 1, 64, dtype=np.float32).reshape(8, 8)
    Image.fromarray(values).save(tmp_path / "a.tif")
    assert torch.equal(read_image(tmp_path / "a.tif"), to_pixels(values))
    Image.fromarray(values * 255).save(tmp_path / "b.tif")
    with pytest.raises(ImageError, match=r"b\.tif: a float image must lie in \[0, 1\]; got 0 … 255: divide by 255"):
        read_image(tmp_path / "b.tif")


@pytest.mark.fault(25)
@pytest.mark.parametrize("dtype", [np.int32, np.int16])
def test_whole_numbers_without_a_known_range_are_refused(tmp_path, dtype):
    Image.fromarray(np.arange(64, dtype=dtype).reshape(8, 8)).save(tmp_path / "a.tif")
    with pytest.raises(ImageError, match=r"a\.tif: an image must be uint8 or float; got .*int32: scale it to 0 … 255"):
        read_image(tmp_path / "a.tif")


def png_of_16_bits(values):
    """A PNG in RGB with 16 bits a channel, (H, W, 3), which Pillow reads but does not write."""
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in values)
    return io.BytesIO(png(*values.shape[1::-1], bits=16, colours=2, data=zlib.compress(rows)))


def png(width, height, *, bits=1, colours=0, data=b""):
    """A PNG of a stated size, whatever its data."""
    header = struct.pack(">IIBBBBB", width, height, bits, colours, 0, 0, 0)
    parts = ((b"IHDR", header), (b"IDAT", data), (b"IEND", b""))
    chunks = (struct.pack(">I", len(b)) + a + b + struct.pack(">I", zlib.crc32(a + b)) for a, b in parts)
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunks)


@pytest.mark.fault(20)
def test_sixteen_bits_in_colour_are_scaled_linearly():
    values = np.random.default_rng(0).integers(0, 65536, (32, 32, 3))
    read = read_image(png_of_16_bits(values)).permute(1, 2, 0).numpy() / 255
    assert abs(read.mean() - values.mean() / 65535) < 1e-3
    assert np.abs(read - values / 65535).max() <= 1 / 255


# ---- modes

PALETTE = (10, 20, 30, 40, 50, 60)
MODES = [
    # mode, the pixel, how the file is saved, the pixel in RGB
    ("1", 1, {}, (255, 255, 255)),
    ("1", 0, {}, (0, 0, 0)),
    ("L", 77, {}, (77, 77, 77)),
    ("L", 77, {"transparency": 77}, (255, 255, 255)),
    ("L", 77, {"transparency": 78}, (77, 77, 77)),
    ("LA", (77, 0), {}, (255, 255, 255)),
    ("LA", (51, 51), {}, (214, 214, 214)),  # a fifth of 51, four fifths of white
    ("LA", (77, 255), {}, (77, 77, 77)),
    ("P", 1, {}, (40, 50, 60)),
    ("P", 1, {"transparency": 1}, (255, 255, 255)),
    ("P", 1, {"transparency": 0}, (40, 50, 60)),
    ("P", 1, {"transparency": bytes([255, 51])}, (212, 214, 216)),
    ("P", 1, {"format": "GIF", "transparency": 1}, (255, 255, 255)),
    ("RGB", (1, 2, 3), {}, (1, 2, 3)),
    ("RGB", (1, 2, 3), {"transparency": (1, 2, 3)}, (255, 255, 255)),
    ("RGBA", (10, 20, 30, 0), {}, (255, 255, 255)),
    ("RGBA", (10, 20, 30, 51), {}, (206, 208, 210)),
    ("RGBA", (10, 20, 30, 255), {}, (10, 20, 30)),
    ("RGBA", (10, 20, 30, 0), {"format": "WEBP", "lossless": True, "exact": True}, (255, 255, 255)),
    ("RGBA", (10, 20, 30, 0), {"format": "TIFF"}, (255, 255, 255)),
    ("CMYK", (0, 255, 255, 0), {"format": "TIFF"}, (255, 0, 0)),
    ("YCbCr", (255, 128, 128), {"format": "TIFF"}, (255, 255, 255)),
    ("I;16", 25700, {}, (100, 100, 100)),
    ("I;16", 25700, {"format": "TIFF"}, (100, 100, 100)),
    ("F", 0.2, {"format": "TIFF"}, (51, 51, 51)),
]


def stored(picture, **how):
    file = io.BytesIO()
    picture.save(file, **{"format": "PNG"} | how)
    return file


@pytest.mark.fault(24, 25)
@pytest.mark.parametrize(("mode", "pixel", "how", "expected"), MODES)
def test_every_mode_has_its_rgb(mode, pixel, how, expected):
    """Out of a file and as a picture in memory; what is transparent is white, whatever colour hides there."""
    picture = Image.new(mode, (3, 2), pixel)
    if mode == "P":
        picture.putpalette(PALETTE)
    file = stored(picture, **how)
    assert read_image(file).flatten(1).unique(dim=1).flatten().tolist() == list(expected)
    assert to_pixels(Image.open(file))[:, 0, 0].tolist() == list(expected)
    if not how or "transparency" not in how:
        assert to_rgb(picture).getpixel((2, 1)) == expected


@pytest.mark.fault(21)
def test_cmyk_is_what_pillow_makes_of_it():
    noise = np.random.default_rng(0).integers(0, 256, (8, 8, 4), dtype=np.uint8)
    file = stored(Image.fromarray(noise, "CMYK"), format="JPEG")
    by_pillow = np.array(Image.open(file).convert("RGB"))
    assert len(np.unique(by_pillow)) > 20
    assert torch.equal(read_image(file), torch.from_numpy(by_pillow).permute(2, 0, 1))


@pytest.mark.fault(23)
@pytest.mark.parametrize("how", [
    {"format": "GIF"}, {"format": "WEBP", "lossless": True}, {"format": "PNG"},
    {"format": "PNG", "default_image": True}, {"format": "TIFF"},
], ids=lambda how: "-".join(how.values() if len(how) == 1 else map(str, how.values())))  # fmt: skip
def test_of_many_frames_the_first_counts(how):
    first, *others = (Image.new("RGB", (4, 3), colour) for colour in ("red", "lime", "blue"))
    file = stored(first, save_all=True, append_images=others, **how)
    assert Image.open(file).n_frames == 3 or how.get("default_image")
    assert torch.equal(read_image(file), images.to_tensor(first))
    assert torch.equal(to_pixels(Image.open(file)), images.to_tensor(first))


@pytest.mark.fault(26)
@pytest.mark.parametrize("size", [(1, 1), (1, 5000), (3000, 1), (7, 3)])
def test_odd_sizes_are_read(size):
    assert read_image(stored(Image.new("RGB", size))).shape == (3, *size[::-1])


@pytest.mark.fault(34)
@pytest.mark.parametrize("name", ["Käse 猫.png", " leading and  inner.png", "two\nlines.png", "wrong ending.jpg"])
def test_odd_names_are_read_and_named(tmp_path, name):
    (tmp_path / name).write_bytes(stored(Image.new("RGB", (2, 2), "red")).getvalue())
    assert read_image(tmp_path / name)[:, 0, 0].tolist() == [255, 0, 0]
    (tmp_path / name).write_bytes(b"")
    with pytest.raises(ImageError, match=re.escape(f"{tmp_path / name}: not a readable image")):
        read_image(tmp_path / name)


# ---- what is refused


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(ImageError, match=r"none\.jpg: there is no such file"):
        read_image(tmp_path / "none.jpg")


@pytest.mark.fault(19)
@pytest.mark.parametrize("content", [b"", b"not an image", b"%!PS-Adobe-3.0 EPSF-3.0\n"])
def test_what_is_no_image_is_named(tmp_path, content):
    (tmp_path / "odd.jpg").write_bytes(content)
    with pytest.raises(ImageError, match=r"odd\.jpg: not a readable image; one of JPEG, PNG"):
        read_image(tmp_path / "odd.jpg")


FOREIGN = {
    "eps": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n0 0 9 9 rectfill\n",
    "fits": b"".join(card.ljust(80) for card in (
        b"SIMPLE  =                    T", b"BITPIX  =                    8", b"NAXIS   =                    2",
        b"NAXIS1  =                    2", b"NAXIS2  =                    2", b"END",
    )).ljust(2880) + bytes(2880),
    "wmf": b"\xd7\xcd\xc6\x9a\0\0" + struct.pack("<4hHI", 0, 0, 9, 9, 72, 0) + b"\0\0\1\0\t\0".ljust(60, b"\0"),
    "svg": b'<svg xmlns="http://www.w3.org/2000/svg" width="9" height="9"/>',
}  # fmt: skip
WRITTEN = ("PDF", "EPS", "PPM", "ICO", "TGA", "JPEG2000", "AVIF")


@pytest.mark.fault(29)
@pytest.mark.parametrize("kind", [*FOREIGN, *WRITTEN])
def test_other_formats_are_refused_under_any_name(tmp_path, kind):
    content = FOREIGN.get(kind) or stored(Image.new("RGB", (16, 16)), format=kind).getvalue()
    (tmp_path / "a.png").write_bytes(content)
    with pytest.raises(ImageError, match=r"a\.png: not a readable image; one of JPEG, PNG, WEBP, BMP, GIF, TIFF is"):
        read_image(tmp_path / "a.png")


def read_or_refused(file):
    """The pixels, or None where the file is refused by its name."""
    try:
        return read_image(file)
    except ImageError as error:
        named = str(error).startswith(f"{file}: ")
    assert named
    return None


@pytest.mark.fault(18)
@pytest.mark.parametrize("how", [
    {"format": "JPEG"}, {"format": "JPEG", "progressive": True}, {"format": "PNG"}, {"format": "GIF"},
    {"format": "BMP"}, {"format": "WEBP"}, {"format": "TIFF"}, {"format": "TIFF", "compression": "tiff_lzw"},
], ids=lambda how: "-".join(map(str, how.values())))  # fmt: skip
def test_wherever_a_file_is_cut_it_is_refused_or_whole(tmp_path, how):
    """Some formats end in bytes that hold no pixel; nothing is ever half grey."""
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 40, 3), dtype=np.uint8))
    content, file = stored(picture, **how).getvalue(), tmp_path / "a.img"
    file.write_bytes(content)
    whole, refused = read_image(file), 0
    for length in [*(len(content) * part // 16 for part in range(16)), len(content) - 8, len(content) - 1]:
        file.write_bytes(content[:length])
        read = read_or_refused(file)
        assert read is None or torch.equal(read, whole)
        refused += read is None
    assert refused >= 16


@pytest.mark.fault(18)
def test_a_truncated_file_is_named(tmp_path):
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 40, 3), dtype=np.uint8)).save(tmp_path / "cut.jpg")
    (tmp_path / "cut.jpg").write_bytes((tmp_path / "cut.jpg").read_bytes()[:-400])
    with pytest.raises(ImageError, match=r"cut\.jpg: .*truncated"):
        read_image(tmp_path / "cut.jpg")


@pytest.mark.fault(19)
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


FORK = multiprocessing.get_context("fork") if os.name == "posix" else None
MOST_SECONDS, MOST_BYTES = 0.1, 50e6


def cost(path, limit):
    """What reading costs in a process of its own: the error, seconds, bytes. `limit` is Pillow's own."""

    def measured(pipe):
        Image.MAX_IMAGE_PIXELS = limit
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Pillow warns; whoever silences that must still be refused
            before, start = peak_bytes(), time.perf_counter()
            try:
                error = f"read as {tuple(read_image(path).shape)}"
            except ImageError as refused:
                error = str(refused)
            pipe.send((error, time.perf_counter() - start, peak_bytes() - before))

    here, there = FORK.Pipe()
    process = FORK.Process(target=measured, args=(there,))
    process.start()
    assert here.poll(60)
    answer = here.recv()
    process.join()
    return answer


def peak_bytes():
    import resource  # not on every system

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def zeros(count):
    """So many zero bytes, deflated."""
    packer = zlib.compressobj(9)
    return (
        b"".join(packer.compress(bytes(min(1 << 20, count - at))) for at in range(0, count, 1 << 20)) + packer.flush()
    )


BOMBS = {
    "png": lambda: png(20_000, 20_000, data=zeros(20_000 * 2501)),
    "empty-png": lambda: png(60_000, 60_000),
    "gif": lambda: b"GIF89a" + struct.pack("<2H", 60000, 60000) + b"\xf0" + bytes(8) + b",\0\0\0\0\1\0\1\0\0\2\2D\1\0;",
    "bmp": lambda: b"BM" + struct.pack("<IHHIIiiHHIIiiII", 54, 0, 0, 54, 40, 20_000, -20_000, 1, 24, 0, 0, 1, 1, 0, 0),
    "tiff": lambda: stored(Image.new("1", (20_000, 20_000)), format="TIFF", compression="group4").getvalue(),
}  # fmt: skip


@pytest.mark.fault(16)
@pytest.mark.skipif(os.name != "posix", reason="measured in a forked process")
@pytest.mark.parametrize("kind", BOMBS)
def test_a_bomb_is_refused_at_once(tmp_path, kind):
    path = tmp_path / "bomb.png"
    path.write_bytes(BOMBS[kind]())
    for limit in (Image.MAX_IMAGE_PIXELS, None):  # another library may have taken Pillow's own limit away
        error, seconds, size = cost(path, limit)
        assert re.search(r"bomb\.png: .*(exceeds limit of|pixels; at most 89,478,485 are decoded)", error)
        assert seconds < MOST_SECONDS and size < MOST_BYTES


@pytest.mark.fault(17)
@pytest.mark.skipif(os.name != "posix", reason="measured in a forked process")
@pytest.mark.parametrize(("width", "height"), [(9_460, 9_460), (13_376, 13_376)])
def test_where_pillow_only_warns_the_file_is_refused(tmp_path, width, height):
    (tmp_path / "large.png").write_bytes(png(width, height, data=zeros(height * (width // 8 + 1))))
    error, seconds, size = cost(tmp_path / "large.png", Image.MAX_IMAGE_PIXELS)
    assert error.endswith(f"large.png: {width} x {height} pixels; at most 89,478,485 are decoded")
    assert seconds < MOST_SECONDS and size < MOST_BYTES


@pytest.mark.fault(16)
def test_a_bomb_of_text_is_named(tmp_path):
    text = PngImagePlugin.PngInfo()
    text.add_itxt("a", "x" * 10_000_000, zip=True)
    Image.new("RGB", (4, 4)).save(tmp_path / "bomb.png", pnginfo=text)
    with pytest.raises(ImageError, match=r"bomb\.png: .*too large"):
        read_image(tmp_path / "bomb.png")


@pytest.mark.fault(18, 19)
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("count", [200, pytest.param(10_000, marks=pytest.mark.full)])
def test_whatever_is_changed_in_a_file_it_is_an_image_or_named(tmp_path, monkeypatch, count):
    monkeypatch.setattr(images, "MAX_PIXELS", 1_000_000)
    draw, file = np.random.default_rng(0), tmp_path / "a.img"
    picture = Image.fromarray(draw.integers(0, 256, (12, 9, 3), dtype=np.uint8))
    whole = [stored(picture, format=name).getvalue() for name in images.FORMATS]
    refused = 0
    for number in range(count):
        content = bytearray(whole[number % len(whole)])
        for at in draw.integers(0, len(content), draw.integers(1, 9)):
            content[at] = draw.integers(256)
        file.write_bytes(content)
        read = read_or_refused(file)
        assert read is None or (read.dtype == torch.uint8 and read.ndim == 3 and len(read) == 3 and read.numel())
        refused += read is None
    assert 0 < refused < count


@pytest.mark.fault(27)
@pytest.mark.parametrize("odd", [np.nan, np.inf, -np.inf])
def test_one_value_that_is_no_number_is_refused(tmp_path, odd):
    values = np.full((4, 5, 3), 0.5, np.float32)
    values[2, 3, 1] = odd
    tensor, picture = torch.from_numpy(values).permute(2, 0, 1), Image.fromarray(values[..., 1])
    picture.save(tmp_path / "odd.tif")
    for given in (values, values[..., 1], tensor, tensor.half(), picture, tmp_path / "odd.tif"):
        with pytest.raises(ValueError, match=r"must lie in \[0, 1\]; got .*(nan|inf)"):
            to_pixels(given)


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


@pytest.mark.fault(17)
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


def test_of_many_those_that_cannot_be_read_are_black_and_have_a_reason(tmp_path):
    paths = [tmp_path / f"{n}.png" for n in range(4)]
    for path in paths[1:3]:
        Image.new("RGB", (8, 6), (200, 100, 0)).save(path)
    paths[0].write_text("no image")
    with pytest.raises(ImageError, match=rf"^{paths[0]}: "):
        read_images(paths)
    unread: dict[int, str] = {}
    found = read_images(paths, unread)
    assert torch.equal(found[1:3], torch.stack([read_image(path) for path in paths[1:3]]))
    assert not found[[0, 3]].any()
    assert unread == {0: unread[0], 3: f"{paths[3]}: there is no such file"}
    with pytest.raises(ImageError, match=rf"^none of 2 images could be read; {paths[0]}: not a readable image"):
        read_images(paths[::3], {})


def test_an_error_out_of_a_worker_keeps_only_its_last_line():
    told = (
        'Caught ImageError in DataLoader worker process 0.\nOriginal Traceback:\n  File "x"\nImageError: f.jpg: odd\n'
    )
    assert str(ImageError(told)) == "f.jpg: odd"


def whole(height: int, width: int) -> images.Part:
    return 0, 0, height, width


def soft_noise(width: int, height: int) -> Image.Image:
    """Smooth enough to have the same look at half the size."""
    small = np.random.default_rng(0).integers(0, 256, (height // 16, width // 16, 3), dtype=np.uint8)
    return Image.fromarray(small).resize((width, height), Image.Resampling.BICUBIC)


@pytest.mark.parametrize(
    ("name", "mode"),
    [("a.jpg", "RGB"), ("a.jpg", "L"), ("a.jpg", "CMYK"), ("a.png", "RGB"), ("a.png", "RGBA"), ("a.webp", "RGB")],
)
@pytest.mark.parametrize("orientation", [1, 3, 6])
def test_a_part_is_the_pictures(tmp_path, name, mode, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    soft_noise(96, 64).convert(mode).save(tmp_path / name, exif=exif)
    part, picture = (3, 5, 40, 50), read_image(tmp_path / name)
    assert torch.equal(images.read_part(tmp_path / name, lambda *_: part, (30, 30)), picture[:, 3:43, 5:55])
    seen = []
    images.read_part(tmp_path / name, lambda *size: seen.append(size) or whole(*size), (60, 60))
    assert seen == [tuple(picture.shape[1:])]


@pytest.mark.parametrize(("least", "by"), [(220, 1), (171, 1), (170, 2), (86, 2), (85, 4), (42, 8), (8, 8)])
def test_a_jpeg_is_decoded_as_small_as_will_do(tmp_path, least, by):
    """Of 512 pixels at least one and a half times as many as are asked for remain, and it is the same part."""
    soft_noise(1024, 768).save(tmp_path / "a.jpg", quality=95)
    top, left = 128, 256
    part = images.read_part(tmp_path / "a.jpg", lambda *_: (top, left, 512, 512), (least, least))
    assert part.shape == (3, 512 // by, 512 // by)
    exact = read_image(tmp_path / "a.jpg")[:, top : top + 512, left : left + 512]
    exact = torch.nn.functional.avg_pool2d(exact.float(), by)
    assert (part - exact).abs().mean() < 2


def test_what_has_odd_sides_is_decoded_smaller_too(tmp_path):
    soft_noise(1008, 768).crop((0, 0, 1001, 767)).save(tmp_path / "a.jpg", quality=95)
    assert images.read_part(tmp_path / "a.jpg", whole, (60, 60)).shape == (3, 96, 126)
    corner = images.read_part(tmp_path / "a.jpg", lambda h, w: (h - 700, w - 700, 700, 700), (50, 50))
    assert corner.shape == (3, 88, 88)


@pytest.mark.fault(18)
def test_a_part_of_a_truncated_file_is_named(tmp_path):
    soft_noise(1024, 768).save(tmp_path / "cut.jpg")
    data = (tmp_path / "cut.jpg").read_bytes()
    (tmp_path / "cut.jpg").write_bytes(data[: len(data) // 2])
    for least in ((60, 60), (700, 700)):
        with pytest.raises(ImageError, match=r"cut\.jpg: .*truncated"):
            images.read_part(tmp_path / "cut.jpg", whole, least)


def test_a_picture_that_is_ready_is_not_copied():
    ready = Image.new("RGB", (4, 3))
    assert to_rgb(ready) is ready
