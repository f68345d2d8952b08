"""Words become the arguments of any typed function. What each command makes of them stands in tests/cli."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, Any

import pytest

from vitrail.flags import existing, parse


def command(
    files: Annotated[list[str], "what to read"],
    /,
    *,
    size: Annotated[int, "pixels"] = 3,
    layers: Annotated[list[int] | None, "which"] = None,
    out: str = "out",
    rate: int | None = None,
    quick: bool = False,
    as_json: Annotated[bool, "as JSON"] = False,
) -> None:
    """Do something."""


def read(*words: str) -> tuple[list[Any], dict[str, Any]]:
    return parse("tool command", command, list(words))


DEFAULTS = {"size": 3, "layers": None, "out": "out", "rate": None, "quick": False, "as_json": False}


@pytest.mark.parametrize(("words", "files", "flags"), [
    (["a", "b"], ["a", "b"], {}),
    (["a", "--size", "4", "--layers", "1", "2"], ["a"], {"size": 4, "layers": [1, 2]}),
    (["a", "--output-dir=x"], ["a"], {"out": "x"}),
    (["--quick", "a", "--json"], ["a"], {"quick": True, "as_json": True}),
    (["--quick", "no", "a"], ["a"], {"quick": False}),
    (["--quick=true", "a"], ["a"], {"quick": True}),
    (["--layers", "1", "2", "--", "a", "--size"], ["a", "--size"], {"layers": [1, 2]}),
    (["--quick", "--", "true"], ["true"], {"quick": True}),
    (["a", "--rate", "none", "--out", "none"], ["a"], {"out": "none"}),
    (["a", "--rate=null"], ["a"], {}),
    (["a", "--rate", "2"], ["a"], {"rate": 2}),
])  # fmt: skip
def test_words_become_arguments(words: list[str], files: list[str], flags: dict[str, Any]):
    assert read(*words) == ([files], {**DEFAULTS, **flags})


@pytest.mark.parametrize(("words", "message"), [
    (["a", "--szie", "4"], "tool command has no flag --szie: did you mean --size?"),
    (["a", "--opt", "4"], "tool command has no flag --opt: see tool command --help"),
    (["a", "--output", "x", "--out", "y"], "takes one spelling of --out; got --output and --out: drop one"),
    (["a", "--size", "x"], "--size takes a whole number; got x"),
    (["a", "--rate", "x"], "--rate takes a whole number or none; got x"),
    (["--layers", "1", "a"], "--layers takes a whole number; got a: put files before --layers, or after --"),
    ([], "tool command needs files; see tool command --help"),
])  # fmt: skip
def test_wrong_words_are_one_line(words: list[str], message: str):
    with pytest.raises(ValueError, match=re.escape(message)) as caught:
        read(*words)
    assert "\n" not in str(caught.value)


def test_what_is_not_there_names_the_nearest(tmp_path: Path):
    (tmp_path / "photo.jpg").touch()
    assert existing(tmp_path / "photo.jpg") == tmp_path / "photo.jpg"
    with pytest.raises(ValueError, match=r"there is no .*photo\.jpeg; the nearest is .*photo\.jpg$"):
        existing(tmp_path / "photo.jpeg")
    with pytest.raises(ValueError, match=r"there is no .*/song\.ogg; nothing beside it has a name like that$"):
        existing(tmp_path / "song.ogg")
    with pytest.raises(ValueError, match=r"there is no .*/x, nor the folder .*/none$"):
        existing(tmp_path / "none" / "x")
