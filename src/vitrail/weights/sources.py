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
CLASSES = {"in1k": 1000, "in21k": 21_843, "in22k": 21_841, "imagenet1k_v1": 1000, "imagenet1k_v2": 1000}
"""by the end of a tag; others have no head"""


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


def _source(line: Published) -> list[Source]:
    made = []
    for tag in line.tags.split():
        name, hub = f"{line.row}.{tag}", line.place == "hub:timm"
        place = f"hub:timm/{name}" if hub else line.place
        made.append(
            Source(
                name=name,
                row=line.row,
                place=place,
                file="model.safetensors" if hub else place.rpartition("/")[2],
                licence=line.licence,
                classes=_classes(tag),
                preprocess=line.preprocess,
                keys=line.keys,
            )
        )
    return made


def _classes(tag: str) -> int:
    return next((count for end, count in CLASSES.items() if tag.endswith(end)), 0)


SOURCES: dict[str, Source] = {source.name: source for line in PUBLISHED for source in _source(line)}


def find_source(name: str) -> Source | None:
    """The source that `row` or `row.tag` names, a row's first; None where there is none of that name."""
    return SOURCES.get(name) or next((source for source in SOURCES.values() if source.row == name), None)


def near_sources(name: str) -> list[str]:
    """Names of sources that are most like a wrong one."""
    same = [source.name for source in SOURCES.values() if source.row == name.partition(".")[0]]
    return same[:5] or nearest(name, SOURCES)
