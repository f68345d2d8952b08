"""Published weights by name: where they lie, under which licence, and how images are prepared for them.

    vit_base_patch16_224                         a row: its first source
    vit_base_patch16_224.augreg_in21k_ft_in1k    a row and a tag, as timm names weights
    hf-hub:org/name                              any repository of the hub with a network of a family here

The lists themselves are `published`. Nothing is fetched before weights are asked for.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from vitrail.names import nearest
from vitrail.records import Preprocess
from vitrail.weights.fetch import fetch_from_hub, fetch_url
from vitrail.weights.published import PUBLISHED, Published

HUB = ("hf-hub:", "hf_hub:", "hub:")


@dataclass(frozen=True)
class Source:
    """One published file of weights."""

    name: str
    """row.tag"""
    row: str
    place: str
    """`hub:org/name`, or a URL"""
    file: str
    licence: str
    classes: int
    """logits of its head; 0 without one"""
    preprocess: Preprocess
    keys: str
    """whose names its tensors have"""

    def fetch(self) -> Path:
        """The file on this disk. Raises `FetchError` where it cannot be had."""
        return fetch_from_hub(self.place[4:], self.file) if self.place.startswith("hub:") else fetch_url(self.place)


def _sources(line: Published) -> list[Source]:
    return [
        Source(
            name=f"{line.row}.{tag}",
            row=line.row,
            place=f"{line.place}.{tag}" if line.place.startswith("hub:") else line.place,
            file="model.safetensors" if line.place.startswith("hub:") else line.place.rpartition("/")[2],
            licence=line.licence,
            classes=line.classes,
            preprocess=line.preprocess,
            keys=line.keys,
        )
        for tag in line.tags.split()
    ]


SOURCES: dict[str, Source] = {source.name: source for line in PUBLISHED for source in _sources(line)}


def find_source(name: str) -> Source | None:
    """The source that `row` or `row.tag` names, a row's first; None where there is none of that name."""
    return SOURCES.get(name) or next((source for source in SOURCES.values() if source.row == name), None)


def near_sources(name: str) -> list[str]:
    """Names of sources that are most like a wrong one."""
    same = [source.name for source in SOURCES.values() if source.row == name.partition(".")[0]]
    return same[:5] or nearest(name, SOURCES)
