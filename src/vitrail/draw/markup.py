"""Small pieces of HTML: tables, bars, pictures inside the page, numbers in words.

Arguments are HTML already, but for alternative texts (`alt`) and words from outside (`word`), escaped here.
"""

from __future__ import annotations

import math
import re
from base64 import b64encode
from collections.abc import Sequence
from html import escape

from vitrail.draw.canvas import BLUE, GREEN, INK, MUTED, ORANGE, RULE, Canvas, encode

THEME = {
    INK: "currentColor",
    MUTED: "var(--muted)",
    RULE: "var(--rule)",
    BLUE: "var(--blue)",
    ORANGE: "var(--orange)",
    GREEN: "var(--green)",
}


def inline_svg(drawing: Canvas, alt: str, *, key: str) -> str:
    """`drawing` as an `<svg>` element with the alternative text `alt`; `key` makes its ids unique in the page.

    The house's colours become the page's style variables (`style.SHEET`), so that dark mode reaches into the chart.
    """
    text = encode(drawing, "svg", transparent=True).decode()
    text = re.sub(r"<!--.*?-->", "", text[text.index("<svg") :], flags=re.DOTALL)
    text = re.sub(r' xmlns(:xlink)?="[^"]*"', "", text).replace("xlink:href", "href")
    text = re.sub(r'(\bid="|href="#|url\(#)', rf"\1{key}-", text)
    for colour, variable in THEME.items():
        text = text.replace(colour, variable)
    text = re.sub(r">\s+<", "><", text)
    return text.replace("<svg", f'<svg role="img" aria-label="{escape(alt)}"', 1)


def table(caption: str, head: Sequence[str], rows: str) -> str:
    """`caption`, `head` and `rows` are HTML already."""
    names = "".join(f'<th scope="col">{name}</th>' for name in head)
    inner = f"<table><caption>{caption}</caption><thead><tr>{names}</tr></thead><tbody>{rows}</tbody></table>"
    return wide(caption, inner)


def wide(label: str, inner: str) -> str:
    """What may be wider than the page scrolls by itself, with the keyboard too."""
    return f'<div class="wide" tabindex="0" role="region" aria-label="{label}">{inner}</div>'


def word(text: str) -> str:
    """A name from outside, escaped, that breaks between words and within one only if it is very long."""
    return f'<span class="word">{escape(text)}</span>'


def figure(inner: str) -> str:
    return f"<figure>{inner}</figure>"


def image(data: bytes, kind: str, alt: str) -> str:
    return f'<img alt="{escape(alt)}" src="data:image/{kind};base64,{b64encode(data).decode()}">'


def meter(value: float, mark: float | None = None) -> str:
    """A bar of `value` in 0 … 1, for the eye only: its number always stands beside it."""
    width = 100 * min(max(value, 0), 1) if math.isfinite(value) else 0
    line = "" if mark is None else f'<b style="left:{100 * mark:.1f}%"></b>'
    return f'<div class="meter" aria-hidden="true"><i style="width:{width:.1f}%"></i>{line}</div>'


def percent(value: float) -> str:
    return f"{value:.1%}" if math.isfinite(value) else "–"


def times(count: int) -> str:
    return "once" if count == 1 else f"{count:,} times"


def epochs(count: int) -> str:
    return "1 epoch" if count == 1 else f"{count:,} epochs"


def duration(seconds: float) -> str:
    """`2 min 05 s`, its parts held together by spaces that do not break."""
    whole = round(seconds)
    minutes, rest = divmod(whole, 60)
    if not minutes:
        words = f"{whole} s"
    elif minutes < 60:
        words = f"{minutes} min {rest:02d} s"
    else:
        words = f"{minutes // 60} h {minutes % 60:02d} min"
    return words.replace(" ", "\u00a0")
