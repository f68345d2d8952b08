"""Attention of one image as pictures: a thin class over prediction, explanation and drawing.

image ── Predictor.look ──> what the network sees ── explain ──> Explanations (h, w) ── draw ──> figures
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from vitrail.draw.canvas import Canvas, save_figure
from vitrail.draw.pictures import head_grid, layer_row, patch_picture
from vitrail.explain.choice import Layers, layer_numbers, number_tuple
from vitrail.explain.maps import attention_depth, explain_layers
from vitrail.images import AnyImage, to_pixels
from vitrail.names import shortened
from vitrail.predict import Predictor
from vitrail.records import Explanation, Preprocess

Fusing = Literal["mean", "max", "min"]
LONG_ROW = 12
"""maps in a row of layers"""


@dataclass(frozen=True)
class AttentionMaps:
    """The maps of one image, with the picture as the network saw it. Iterates over its explanations."""

    picture: Tensor
    """(C, H, W) uint8"""
    maps: tuple[Explanation, ...]
    caption: str = "image"
    """what stands over the picture: the answer, where the network gives one, and what of the image is cut off"""

    def __len__(self) -> int:
        return len(self.maps)

    def __iter__(self) -> Iterator[Explanation]:
        return iter(self.maps)

    def __getitem__(self, index: int) -> Explanation:
        return self.maps[index]


class AttentionVisualizer:
    """Where a model looked: `AttentionVisualizer(model).visualize_attention("photo.jpg")`.

    `model` is a vitrail model, a `Predictor`, the name or folder of one, or any other network together with the
    `preprocess` that its images need. A name or folder goes to the best device there is, unless `device` says which; a
    network stays where it is without one. Layers count from 1; `layer_idx` counts from 0, negatives from the end.
    """

    def __init__(
        self,
        model: Predictor | nn.Module | str | Path,
        *,
        preprocess: Preprocess | None = None,
        device: str | None = None,
    ) -> None:
        if isinstance(model, str | Path):
            model = Predictor.from_pretrained(model, device=device or "auto")
        self.predictor = (
            model if isinstance(model, Predictor) else Predictor(model, preprocess=preprocess, device=device)
        )

    def generate_attention_maps(
        self, image: AnyImage, layers: Layers = None, heads: str | int = "mean"
    ) -> AttentionMaps:
        """What the class token attended to: one map a layer, or one a layer and head with `heads="all"`.

        Where the head reads the mean of the image tokens, it is the mean of theirs. `layers`, one or several, count
        from 1, in the order in which the maps are wanted; None means all. Raises `ValueError` naming the depth where a
        layer is out of range, and the number of heads where a head is.
        """
        return self.explain(image, "attention", layers=layers, heads=heads)

    def explain(
        self,
        image: AnyImage,
        method: str = "rollout",
        *,
        layers: Layers = None,
        heads: str | int = "mean",
        discard: float = 0.0,
    ) -> AttentionMaps:
        """The maps of one image by any method of `vitrail.explain.maps.METHODS`, whose arguments these are."""
        pixels = to_pixels(image)
        picture, ready = self.predictor.look(pixels)
        found = explain_layers(self.predictor.model, ready, method, layers=layers, heads=_head(heads), discard=discard)
        maps = tuple(replace(m, heat=m.heat.cpu()) for m in found.maps)
        return AttentionMaps(picture, maps, self._answer(found.output) + self._cut(pixels))

    def plot_attention_maps(self, maps: AttentionMaps, save_path: str | Path | None = None) -> Canvas:
        """The picture and its maps, each over the picture: layers in a row, the heads of one layer as a grid.

        Several heads of several layers are a grid too: a row a layer, a column a head. Under each map stand its lowest
        and its highest value, of attention the share of a patch.
        """
        layers = {m.layer for m in maps}
        heats, titles = [m.heat for m in maps], [_title(m) for m in maps]
        if len(layers) == 1 and len(maps) > 1:
            title = ", ".join([maps[0].method, *(f"layer {n}" for n in _layers(maps))])
            figure = head_grid(maps.picture, torch.stack(heats), caption=maps.caption, title=title)
        else:
            columns = LONG_ROW if len(layers) == len(maps) else max(Counter(m.layer for m in maps).values())
            figure = layer_row(maps.picture, heats, titles, columns=columns, caption=maps.caption)
        return _saved(figure, save_path)

    def visualize_attention(
        self, image: AnyImage, layer_idx: int = -1, head_idx: int | None = None, save_path: str | Path | None = None
    ) -> Canvas:
        """One layer of one image: every head as a grid, or one head. `layer_idx` and `head_idx` count from 0.

        The network runs twice, the first time to count its layers, so that only the one shown is recorded.
        """
        depth = attention_depth(self.predictor.model, self.predictor.look(image)[1])
        number = number_tuple([layer_idx])
        if not number or not -depth <= number[0] < depth:
            raise ValueError(
                f"layer_idx must lie in -{depth} … {depth - 1}: the model has a depth of {depth} attention layers; "
                f"got {shortened(layer_idx)}"
            )
        maps = self.generate_attention_maps(image, number[0] % depth + 1, "all" if head_idx is None else head_idx)
        return self.plot_attention_maps(maps, save_path)

    def rollout(
        self, image: AnyImage, fusion: Fusing = "mean", discard: float = 0.0, save_path: str | Path | None = None
    ) -> Canvas:
        """The picture under its answer, beside its attention rollout over all layers (Abnar and Zuidema 2020)."""
        return self.plot_attention_maps(self.explain(image, "rollout", heads=fusion, discard=discard), save_path)

    def save(
        self,
        image: str | Path,
        out: str | Path,
        *,
        name: str = "",
        method: str = "rollout",
        layers: Layers = None,
        heads: str | int = "mean",
    ) -> list[Path]:
        """Writes the pictures of one image file into the folder `out` as PNG and returns their paths.

        It is one picture, or one a layer with `heads="all"`. Their names begin with `name`, by default the file's
        without its ending, and say what was asked for: `cat_rollout.png`, `cat_attention_layers_2_4_head_0.png`.
        `method`, `layers` and `heads` are those of `explain`, which says what it raises.
        """
        maps = self.explain(image, method, layers=layers, heads=heads)
        out, stem = Path(out), name or Path(image).stem
        if heads == "all":
            return [self._save_layer(maps, n, out / f"{stem}_layer{n:02d}_heads.png") for n in _layers(maps)]
        path = out / f"{stem}_{method}{_choice(layers, heads)}.png"
        self.plot_attention_maps(maps, path)
        return [path]

    def _save_layer(self, maps: AttentionMaps, layer: int, path: Path) -> Path:
        self.plot_attention_maps(replace(maps, maps=tuple(m for m in maps if m.layer == layer)), path)
        return path

    def _answer(self, output: Any) -> str:
        """What the network answered; a backbone without a head, or one that gives no logits, answers nothing."""
        headless = getattr(self.predictor.model, "num_classes", None) == 0
        if headless or not isinstance(output, Tensor) or output.ndim != 2:
            return "image"
        return str(self.predictor.answer(output)[0])

    def _cut(self, pixels: Tensor) -> str:
        """What of the image the network saw, where that was not all."""
        size = (pixels.shape[-2], pixels.shape[-1])
        seen = self.predictor.preprocess.seen(size)
        return "" if seen == size else f" (centre {seen[0]} x {seen[1]} of {size[0]} x {size[1]} pixels seen)"


def visualize_patch_embedding(
    image: AnyImage, patch_size: int | tuple[int, int] = 16, save_path: str | Path | None = None
) -> Canvas:
    """The picture beside the patches that a patch embedding cuts it into, numbered in reading order."""
    return _saved(patch_picture(image, patch_size), save_path)


def _head(heads: str | int) -> Any:
    """A word stays, the number of a head may come as a word too."""
    return int(heads) if isinstance(heads, str) and heads.removeprefix("-").isdecimal() else heads


def _title(found: Explanation) -> str:
    """Such as `layer 3, head 0` for attention, `rollout, mean of heads` for other methods.

    A rollout that ends in a layer has gone through all the layers before it.
    """
    method = [] if found.method == "attention" else [found.method]
    through = found.method == "rollout" and found.layer not in (None, 1)
    layer = [] if found.layer is None else [f"layers 1-{found.layer}" if through else f"layer {found.layer}"]
    heads = f"head {found.heads}" if found.heads.isdecimal() else f"{found.heads} of heads"
    return ", ".join([*method, *layer, heads])


def _choice(layers: Layers, heads: str | int) -> str:
    """The part of a file's name that tells other layers and heads apart; empty for all layers, mean of heads."""
    numbers, head = layer_numbers(layers), _head(heads)
    chosen = [] if numbers is None else ["layer" if len(numbers) == 1 else "layers", *map(str, numbers)]
    fused = [] if head == "mean" else [head] if isinstance(head, str) else ["head", str(head)]
    return "".join(f"_{word}" for word in [*chosen, *fused])


def _layers(maps: AttentionMaps) -> list[int]:
    return sorted({m.layer for m in maps if m.layer is not None})


def _saved(figure: Canvas, path: str | Path | None) -> Canvas:
    if path is not None:
        save_figure(figure, path)
    return figure
