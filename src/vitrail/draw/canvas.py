"""What every drawing stands on: a figure without pyplot, the house's colours, and the way to a file.

pyplot keeps a list of open figures for the whole process; nothing here touches it, so figures may be made in threads,
on machines without a screen, and are freed like any other object.
"""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any, Literal

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from PIL.Image import Image

from vitrail.files import write_whole

INK = "#1f2933"
MUTED = "#7b8794"
RULE = "#d9dee3"
PAPER = "#ffffff"
BLUE = "#0072b2"
ORANGE = "#d55e00"
GREEN = "#009e73"
"""three colours that are told apart with any kind of colour vision: Okabe and Ito 2008, Color Universal Design"""
DPI = 150
SMALL = 8.5
"""points, for everything that is not a title"""
FIGURE_ENDINGS = ("png", "svg")
IMAGE_ENDINGS = ("png", "jpg", "jpeg", "webp")
NO_METADATA = {"Creator": None, "Date": None, "Format": None, "Type": None}


class Canvas(Figure):
    """A matplotlib figure that belongs to no pyplot and shows itself at the end of a notebook cell."""

    def __init__(
        self, width: float, height: float, layout: Literal["constrained", "compressed"] = "constrained"
    ) -> None:
        """`width` and `height` in inches; `compressed` draws pictures of a fixed aspect ratio close together."""
        super().__init__(figsize=(width, height), dpi=DPI, layout=layout, facecolor=PAPER)

    def _repr_png_(self) -> bytes:
        return encode(self, "png")


def encode(drawing: Figure | Image, kind: str, **options: Any) -> bytes:
    """The bytes of a file of `kind` (an ending without its dot). `options` go to the writer of that kind."""
    buffer = io.BytesIO()
    if isinstance(drawing, Image):
        drawing.save(buffer, format="jpeg" if kind == "jpg" else kind, **options)
    else:
        metadata = NO_METADATA if kind == "svg" else None
        drawing.savefig(buffer, format=kind, metadata=metadata, **options)
    return buffer.getvalue()


def save_figure(drawing: Figure | Image, path: str | Path) -> Path:
    """Write a figure (.png, .svg) or a picture (.png, .jpg, .jpeg, .webp), whole or not at all; returns the path.

    Missing folders are made. Raises `ValueError` for any other ending.
    """
    path = Path(path)
    what, endings = ("picture", IMAGE_ENDINGS) if isinstance(drawing, Image) else ("figure", FIGURE_ENDINGS)
    kind = path.suffix[1:].lower()
    if kind not in endings:
        good = ", ".join(f".{ending}" for ending in endings)
        raise ValueError(f"a {what} is saved under a name that ends in {good}; got {path.name!r}: try {path.stem}.png")
    return write_whole(path, encode(drawing, kind))


def dress(axes: Axes, title: str = "", x: str = "", y: str = "") -> None:
    """The house's look for a chart: title on the left, two thin spines, a quiet grid behind the data.

    Words are taken as they stand: a `$` starts no formula.
    """
    axes.set_title(title, loc="left", fontsize=10, fontweight="bold", color=INK, parse_math=False)
    axes.set_xlabel(x, fontsize=SMALL, color=INK, parse_math=False)
    axes.set_ylabel(y, fontsize=SMALL, color=INK, parse_math=False)
    axes.tick_params(labelsize=SMALL, colors=INK, length=3, width=0.6)
    axes.grid(color=RULE, linewidth=0.6)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set(color=MUTED, linewidth=0.6)
