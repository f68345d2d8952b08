"""Attention of one image as pictures: a thin class over prediction, explanation and drawing.

image ── Predictor.prepare ──> what the network sees ── explain ──> Explanations (h, w) ── draw ──> figures
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn

from vitrail.draw.canvas import Drawing, save_figure
from vitrail.draw.pictures import AnyImage, head_grid, layer_row, overlay, patch_picture, sheet
from vitrail.explain.maps import Query, attention_map, rollout_map
from vitrail.explain.record import AttentionMap, record_attention
from vitrail.names import nearest
from vitrail.predict import Predictor
from vitrail.records import Explanation, Preprocess

METHODS = ("rollout", "attention")
Fusing = Literal["mean", "max", "min"]


@dataclass(frozen=True)
class AttentionMaps:
    """The maps of one image, with the picture as the network saw it. Iterates over its explanations."""

    picture: Tensor
    """(C, H, W) uint8"""
    maps: tuple[Explanation, ...]

    def __len__(self) -> int:
        return len(self.maps)

    def __iter__(self) -> Iterator[Explanation]:
        return iter(self.maps)

    def __getitem__(self, index: int) -> Explanation:
        return self.maps[index]


class AttentionVisualizer:
    """Where a model looked: `AttentionVisualizer(model).visualize_attention("photo.jpg")`.

    `model` is a vitrail model, a `Predictor`, the name or folder of one, or any other network together with the
    `preprocess` that its images need. Layers count from 1; `layer_idx` counts from 0, negatives from the end.
    """

    def __init__(
        self, model: Predictor | nn.Module | str | Path, *, preprocess: Preprocess | None = None, device: str = "auto"
    ) -> None:
        if isinstance(model, str | Path):
            model = Predictor.from_pretrained(model, device=device)
        self.predictor = (
            model if isinstance(model, Predictor) else Predictor(model, preprocess=preprocess, device=device)
        )

    def generate_attention_maps(
        self, image: AnyImage, layers: Sequence[int] | None = None, heads: str | int = "mean"
    ) -> AttentionMaps:
        """What the class token attended to: one map a layer, or one a layer and head with `heads="all"`.

        `layers` counts from 1, in the order in which the maps are wanted; None means all. Without a class token it is
        the mean over all tokens. Raises `ValueError` naming the depth where a layer is out of range.
        """
        picture, recorded = self._record(image, layers)
        maps = [explanation for found in recorded for explanation in _explanations(found, heads)]
        return AttentionMaps(picture, tuple(maps))

    def plot_attention_maps(self, maps: AttentionMaps, save_path: str | Path | None = None) -> Drawing:
        """The picture and its maps in one row, each over the picture; several heads of one layer as a grid."""
        titles = [f"layer {m.layer}, {_heads_title(m.heads)}" for m in maps]
        if len({m.layer for m in maps}) == 1 and len(maps) > 1:
            figure = head_grid(maps.picture, torch.stack([m.heat for m in maps]))
        else:
            figure = layer_row(maps.picture, [m.heat for m in maps], titles)
        return _saved(figure, save_path)

    def visualize_attention(
        self, image: AnyImage, layer_idx: int = -1, head_idx: int | None = None, save_path: str | Path | None = None
    ) -> Drawing:
        """One layer of one image: every head as a grid, or one head. `layer_idx` and `head_idx` count from 0."""
        picture, recorded = self._record(image, None)
        if not -len(recorded) <= layer_idx < len(recorded):
            raise ValueError(
                f"layer_idx must lie in -{len(recorded)} … {len(recorded) - 1}: the model has a depth of "
                f"{len(recorded)} attention layers; got {layer_idx}"
            )
        maps = _explanations(recorded[layer_idx], "all" if head_idx is None else head_idx)
        return self.plot_attention_maps(AttentionMaps(picture, tuple(maps)), save_path)

    def rollout(
        self, image: AnyImage, fusion: Fusing = "mean", discard: float = 0.0, save_path: str | Path | None = None
    ) -> Drawing:
        """The picture beside its attention rollout over all layers (Abnar and Zuidema 2020), and the answer."""
        picture, heat, answer = self._rollout(image, fusion, discard)
        figure = sheet([picture, overlay(picture, heat)], [answer, f"rollout, {fusion} of heads"], columns=2)
        return _saved(figure, save_path)

    def save(
        self,
        image: str | Path,
        out: str | Path,
        *,
        name: str = "",
        method: str = "rollout",
        layers: Sequence[int] | None = None,
        heads: str | int = "mean",
    ) -> list[Path]:
        """Writes the pictures of one image file into the folder `out` as PNG and returns their paths.

        Their names begin with `name`, by default the file's without its ending.
        """
        if method not in METHODS:
            close = nearest(method, METHODS, 1)[0]
            raise ValueError(f"method must be one of {', '.join(METHODS)}; got {method!r}: did you mean {close}?")
        out, stem = Path(out), name or Path(image).stem
        if method == "rollout":
            if layers is not None:
                raise ValueError("rollout goes over all layers: leave --layers out, or take --method attention")
            path = out / f"{stem}_rollout.png"
            self.rollout(image, _fusion(heads), save_path=path)
            return [path]
        maps = self.generate_attention_maps(image, layers, heads)
        if heads != "all":
            path = out / f"{stem}_attention.png"
            self.plot_attention_maps(maps, path)
            return [path]
        return [self._save_layer(maps, layer, out / f"{stem}_layer{layer:02d}_heads.png") for layer in _layers(maps)]

    def _save_layer(self, maps: AttentionMaps, layer: int, path: Path) -> Path:
        self.plot_attention_maps(AttentionMaps(maps.picture, tuple(m for m in maps if m.layer == layer)), path)
        return path

    def _record(self, image: AnyImage, layers: Sequence[int] | None) -> tuple[Tensor, list[AttentionMap]]:
        picture, ready = self.predictor.look(image)
        with record_attention(layers=layers) as record:
            self.predictor.logits(ready)
        by_layer = {found.layer: found for found in record.maps}
        return picture, [by_layer[layer] for layer in layers or by_layer]

    def _rollout(self, image: AnyImage, fusion: Fusing, discard: float) -> tuple[Tensor, Tensor, str]:
        picture, ready = self.predictor.look(image)
        with record_attention() as record:
            logits = self.predictor.logits(ready)
        heat = rollout_map(record.maps, fusion=fusion, discard=discard)[0]
        return picture, heat.cpu(), str(self.predictor.answer(logits)[0])


def visualize_patch_embedding(
    image: AnyImage, patch_size: int | tuple[int, int] = 16, save_path: str | Path | None = None
) -> Drawing:
    """The picture beside the patches that a patch embedding cuts it into, numbered in reading order."""
    return _saved(patch_picture(image, patch_size), save_path)


def _explanations(found: AttentionMap, heads: str | int) -> list[Explanation]:
    count = found.weights.shape[1]
    chosen: list[Any] = list(range(count)) if heads == "all" else [_head(heads)]
    query: Query = "mean" if found.layout and not found.layout.prefix else "class"
    heats = [attention_map(found, head, query)[0].cpu() for head in chosen]
    return [
        Explanation(method="attention", heat=heat, layer=found.layer, heads=str(head))
        for head, heat in zip(chosen, heats, strict=True)
    ]


def _head(heads: str | int) -> str | int:
    return int(heads) if isinstance(heads, int) or heads.isdecimal() else heads


def _fusion(heads: str | int) -> Fusing:
    if heads not in ("mean", "max", "min"):
        raise ValueError(f"rollout fuses heads by mean, max or min; got {heads!r}: or take --method attention")
    return cast(Fusing, heads)


def _heads_title(heads: str) -> str:
    return f"head {heads}" if heads.isdecimal() else f"{heads} of heads"


def _layers(maps: AttentionMaps) -> list[int]:
    return sorted({m.layer for m in maps if m.layer is not None})


def _saved(figure: Drawing, path: str | Path | None) -> Drawing:
    if path is not None:
        save_figure(figure, path)
    return figure
