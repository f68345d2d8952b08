"""What a page says of a training run: plain facts, checked when they are put together.

Legend: `K` classes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor

from vitrail.images import AnyImage
from vitrail.records import Classification, Explanation, History

NEEDED = ("accuracy", "balanced_accuracy", "ece")


@dataclass(frozen=True, kw_only=True)
class Example:
    """One held-out image, what the model answered, and where it looked."""

    image: AnyImage
    """as the model saw it, resized and cropped, not normalised"""
    truth: str
    answer: Classification
    """its `id` is shown as the name of the image"""
    explanation: Explanation | None = None
    """its heat is laid over the image; None shows the image alone"""

    @property
    def right(self) -> bool:
        return self.answer.label == self.truth


class Kept(NamedTuple):
    """The epoch whose weights the model has."""

    epoch: int
    figure: str | None = None
    """the validation figure that it is the best in, such as `accuracy`; None where it is only the last epoch"""
    value: float | None = None


@dataclass(frozen=True, kw_only=True)
class RunReport:
    """All that a page says of a run. Figures are of the held-out split and stand as given: nothing is recomputed."""

    title: str
    model: str
    """the registry name"""
    parameters: int
    img_size: tuple[int, int]
    """height and width in pixels"""
    data: str
    counts: Mapping[str, Sequence[int]]
    """images of every class, in the order of `classes`, by split: `{"train": (…), "val": (…), "test": (…)}`"""
    classes: tuple[str, ...]
    command: str
    machine: str
    date: str
    seconds: float
    """of training"""
    history: History
    kept: Kept | None = None
    split: str
    """the held-out split that the figures are of"""
    figures: Mapping[str, float]
    """`accuracy`, `balanced_accuracy` and `ece` in 0 … 1, and any others"""
    precision: Tensor
    """(K,), NaN where a class was never answered"""
    recall: Tensor
    """(K,), NaN where a class has no images"""
    f1: Tensor
    """(K,)"""
    confusion: Tensor
    """(K, K) counts, rows are the truth"""
    reliability: Tensor
    """(bins, 3): count, mean confidence, accuracy"""
    examples: Sequence[Example] = ()
    notes: Sequence[str] = ()
    """what a reader should mind, in plain sentences"""

    def __post_init__(self) -> None:
        missing = [name for name in NEEDED if name not in self.figures]
        if missing:
            raise ValueError(f"figures must hold {', '.join(NEEDED)}; got none for {', '.join(missing)}")
        k = len(self.classes)
        shapes = {"precision": (k,), "recall": (k,), "f1": (k,), "confusion": (k, k)}
        for name, shape in shapes.items():
            if getattr(self, name).shape != shape:
                raise ValueError(f"{name} must be {shape} for {k} classes; got {tuple(getattr(self, name).shape)}")
        for split, counts in self.counts.items():
            if len(counts) != k:
                raise ValueError(f"counts must hold one number a class, {k} of them; got {len(counts)} for {split!r}")

    @property
    def support(self) -> list[int]:
        """Held-out images of every class."""
        return [int(n) for n in self.confusion.sum(1).tolist()]

    @property
    def commonest(self) -> int:
        """The class with the most held-out images: the best constant answer."""
        return max(range(len(self.classes)), key=self.support.__getitem__)

    @property
    def baseline(self) -> float:
        """Accuracy of always answering the commonest held-out class."""
        return self.support[self.commonest] / max(sum(self.support), 1)

    @property
    def balanced_baseline(self) -> float:
        """Balanced accuracy of any constant answer: one over the number of classes that have held-out images."""
        return 1 / max(sum(n > 0 for n in self.support), 1)
