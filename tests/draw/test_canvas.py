"""Figures without pyplot, and files that are whole or absent."""

import subprocess
import sys
import threading

import pytest
from PIL import Image

from vitrail.draw.canvas import Canvas, save_figure


def charted() -> Canvas:
    drawing = Canvas(1, 1)
    drawing.subplots().plot([0, 1], [0, 1])
    return drawing


def test_png_and_svg_are_what_they_say(tmp_path):
    png = save_figure(charted(), tmp_path / "new" / "a.png")
    svg = save_figure(charted(), str(tmp_path / "a.SVG"))
    with Image.open(png) as image:
        assert image.size == (150, 150)
    assert "<svg" in svg.read_text()
    assert "http://purl.org" not in svg.read_text()


def test_a_picture_is_saved_as_png_jpeg_and_webp(tmp_path):
    for ending, kind in {"png": "PNG", "jpg": "JPEG", "webp": "WEBP"}.items():
        with Image.open(save_figure(Image.new("RGB", (4, 3)), tmp_path / f"a.{ending}")) as image:
            assert image.format == kind


@pytest.mark.parametrize("name", ["a.pgn", "a", "a.svgz"])
def test_another_ending_names_the_good_ones_and_writes_nothing(tmp_path, name):
    with pytest.raises(ValueError, match=rf"ends in \.png, \.svg; got '{name}': try a\.png"):
        save_figure(charted(), tmp_path / name)
    assert not list(tmp_path.iterdir())


def test_a_picture_is_no_svg(tmp_path):
    with pytest.raises(ValueError, match=r"a picture is saved under a name that ends in \.png, \.jpg"):
        save_figure(Image.new("RGB", (4, 3)), tmp_path / "a.svg")


def test_a_failed_write_leaves_the_old_file_and_no_other(tmp_path, monkeypatch):
    path = save_figure(charted(), tmp_path / "a.png")
    old = path.read_bytes()

    def fail(descriptor: int) -> None:
        raise OSError("disk full")

    monkeypatch.setattr("vitrail.files.os.fsync", fail)
    with pytest.raises(OSError, match="disk full"):
        save_figure(Canvas(2, 2), path)
    assert path.read_bytes() == old
    assert list(tmp_path.iterdir()) == [path]


def test_a_figure_shows_itself_in_a_notebook():
    assert charted()._repr_png_().startswith(b"\x89PNG")


def test_eight_threads_draw_at_once():
    drawn: list[bytes] = []
    threads = [threading.Thread(target=lambda: drawn.append(charted()._repr_png_())) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(drawn) == 8
    assert len(set(drawn)) == 1


def test_drawing_never_loads_pyplot():
    code = "import sys, vitrail.draw.pages; sys.exit('matplotlib.pyplot' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
