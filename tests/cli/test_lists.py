"""`vitrail models`: rows, and published weights with their whole addresses."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from vitrail.weights.sources import SOURCES

Said = Callable[..., tuple[str, str]]


def test_published_weights_are_a_line_each_with_the_whole_address(said: Said):
    lines = said("models", "--pretrained")[0].splitlines()[1:]
    assert len(lines) == len(SOURCES)
    for line, source in zip(lines, SOURCES.values(), strict=True):
        words = line.split()
        assert (words[0], words[-2], words[-1]) == (source.name, source.keys, source.place)


def test_published_weights_are_found_by_their_row_and_by_their_whole_name(said: Said):
    def named(pattern: str) -> list[str]:
        return [line.split()[0] for line in said("models", "--pretrained", pattern)[0].splitlines()[1:]]

    row = "vit_base_patch16_224"
    assert named(row) == [name for name, source in SOURCES.items() if source.row == row] != []
    assert named(f"{row}.mae") == [f"{row}.mae"]
    assert set(named("pvt_v2_b?")) == {name for name, source in SOURCES.items() if source.row[:-1] == "pvt_v2_b"}


def test_a_narrow_terminal_folds_names_and_addresses(monkeypatch: pytest.MonkeyPatch, said: Said):
    monkeypatch.setattr("vitrail.commands.WIDEST", 90)
    out, _ = said("models", "--pretrained", "vit_tiny_patch16_224.google*")
    assert "…" not in out
    (source,) = [source for name, source in SOURCES.items() if name.startswith("vit_tiny_patch16_224.google")]
    assert source.place == "".join(line.split()[-1] for line in out.splitlines()[1:])
