"""Which layers, heads and queries a recording keeps: what the user asks, checked against each map as it comes."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from numbers import Integral
from typing import Any, Literal

from torch import Tensor

from vitrail.layers.attention import Layout
from vitrail.names import shortened

Layers = int | Sequence[int] | None
Heads = Literal["mean"] | int | Sequence[int] | None
Queries = Literal["class"] | int | Sequence[int] | None
UNSEEN = (
    "record_attention saw no attention: run the model inside the `with`, in the same thread. It cannot see "
    "FlashAttention packages, FlexAttention, graphs compiled by other means (torch.jit, exported, ONNX), nor other "
    "threads (DataParallel): switch the model to sdpa or eager attention"
)
CONVOLVES = (
    "record_attention saw no attention: this network has none, as ResNet and ConvNeXt have none, for it convolves and "
    "no layer takes tokens. Rollout and attention, all the explanations there are, need a transformer; the maps of a "
    "vitrail network's stages are model.features(images)"
)


class CannotExplainError(ValueError):
    """A method does not apply to this network: nothing in the call could be changed to make it."""


class NoAttentionError(CannotExplainError):
    """Nothing attended where it could be seen. The message says what cannot be seen, and what to do."""


def readout_rows(layout: Layout) -> tuple[int, ...] | None:
    """The rows that the head reads, () for the mean of the image tokens, None where nobody can tell.

    Where nobody told, it is the one row of the prefix, or without a prefix the mean. Of several rows, which may be
    object queries, each could be the one.
    """
    if layout.readout is None and layout.prefix < 2:
        return (0,) if layout.prefix else ()
    return layout.readout


def number_tuple(given: Any) -> tuple[int, ...]:
    """One whole number, or several, as a tuple; an empty one where anything else is among them."""
    values = tuple(given) if isinstance(given, Iterable) else (given,)
    whole = all(isinstance(value, Integral) and not isinstance(value, bool) for value in values)
    return tuple(map(int, values)) if whole else ()


def layer_numbers(layers: Layers) -> tuple[int, ...] | None:
    """None is all. Raises `ValueError` for what is no number from 1."""
    if layers is None:
        return None
    numbers = number_tuple(layers)
    if min(numbers, default=0) < 1:
        raise ValueError(f"layers must be numbers from 1, or None for all; got {shortened(layers)}")
    return numbers


@dataclass(frozen=True)
class Part:
    """What to keep of one map: row and head numbers, None is all."""

    layout: Layout | None
    windows: int
    heads: tuple[int, ...] | None
    rows: tuple[int, ...] | None
    mean: bool
    count: int
    """heads in a window"""

    @property
    def folded(self) -> list[int] | None:
        """Head numbers as they stand with windows folded in."""
        if self.heads is None:
            return None
        return [window * self.count + head for window in range(self.windows) for head in self.heads]

    def fused(self, weights: Tensor) -> Tensor:
        """(B, windows·H, Q, K), or (B, windows, Q, K) where the mean of the heads is wanted."""
        return weights.unflatten(1, (self.windows, -1)).mean(2) if self.mean else weights


class Choice:
    """Which layers, heads and queries the user asked for."""

    def __init__(self, layers: Layers, heads: Heads, queries: Queries) -> None:
        self.layers = layer_numbers(layers)
        self.heads = heads if heads is None or heads == "mean" else number_tuple(heads)
        self.queries = queries if queries is None or queries == "class" else number_tuple(queries)
        if self.heads == ():
            raise ValueError(f"heads must be mean, head numbers from 0, or None for all; got {shortened(heads)}")
        if self.queries == ():
            raise ValueError(f"queries must be class, row numbers from 0, or None for all; got {shortened(queries)}")

    def layer(self, number: int) -> bool:
        return self.layers is None or number in self.layers

    def part(self, layer: int, layout: Layout | None, windows: int, heads: int, rows: int) -> Part | None:
        """For a map of `heads` heads (in each of `windows`) and `rows` queries. Raises `ValueError` beyond them.

        None, for nothing, where the class rows are wanted, are not known, and the layer was not named.
        """
        numbers = None if isinstance(self.heads, str) else _in_range("heads", self.heads, heads, layer)
        if not isinstance(self.queries, str):
            kept = _in_range("queries", self.queries, rows, layer)
        elif layout is not None and (read := readout_rows(layout)) is not None:
            kept = read or _image_rows(layout, rows)
        elif self.layers is None:
            return None
        else:
            raise no_class_rows(f"layer {layer} has")
        return Part(layout, windows, numbers, kept, self.heads == "mean", heads)


def _image_rows(layout: Layout, count: int) -> tuple[int, ...] | None:
    return tuple(range(layout.prefix, count)) if layout.prefix else None


def no_attention(*, convolves: bool) -> NoAttentionError:
    """The error where nothing attended; `convolves` where all that was seen is a convolutional network."""
    return NoAttentionError(CONVOLVES if convolves else UNSEEN)


def no_class_rows(who: str) -> CannotExplainError:
    return CannotExplainError(
        f"queries='class' needs to know what each row stands for and which of them the head reads, and {who} no layout "
        "that tells: give row numbers or None, or, for a foreign model, grid=(h, w) and prefix=; windows and reduced "
        "keys of foreign models cannot be placed"
    )


def _in_range(what: str, wanted: tuple[int, ...] | None, count: int, layer: int) -> tuple[int, ...] | None:
    wrong = [n for n in wanted or () if not 0 <= n < count]
    if wrong:
        raise ValueError(f"{what} must lie in 0 … {count - 1} at layer {layer}, which has {count} {what}; got {wrong}")
    return wanted
