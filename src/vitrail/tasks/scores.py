"""How well a classifier answers, and how far its confidence may be believed.

| figure                  | law                                                                               |
|-------------------------|-----------------------------------------------------------------------------------|
| `loss`                  | mean cross-entropy, each image weighing as much as of it is labelled              |
| `accuracy`              | share of images whose best class is the true one                                  |
| `balanced_accuracy`     | mean recall over the classes that occur                                           |
| `precision` (K,)        | of the images called k, the share that is k; NaN where none is called so          |
| `recall` (K,)           | of the images that are k, the share called so; NaN where there is none            |
| `f1` (K,)               | harmonic mean of the two, 0 where one is unknown; NaN where both are              |
| `confusion` (K, K)      | images by true class (row) and answer (column)                                    |
| `reliability` (bins, 3) | images by confidence in equal bins (lower, upper]: count, mean confidence, accuracy |
| `ece`                   | mean over images of their bin's |confidence - accuracy| (Guo et al. 2017, eq. 3)  |

This file imports torchmetrics, which takes seconds: it is imported where figures are first asked for.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric, MetricCollection
from torchmetrics.classification import (
    MulticlassAccuracy,
    MulticlassConfusionMatrix,
    MulticlassF1Score,
    MulticlassPrecision,
    MulticlassRecall,
)


def classification_scores(num_classes: int, unlabelled: int) -> MetricCollection:
    """All figures above. `update(preds=logits (B, K), target=(B,), losses=(B,), weights=(B,))` adds a batch.

    Images whose target is `unlabelled`, and losses that weigh nothing, do not count. Targets are taken as checked.
    `compute` raises `ValueError` where nothing counted: of several processes, in none of them.
    """
    given: dict[str, Any] = {"num_classes": num_classes, "ignore_index": unlabelled, "validate_args": False}
    unknown: dict[str, Any] = {**given, "zero_division": math.nan}
    return MetricCollection(
        {
            "loss": MeanLoss(),
            "accuracy": MulticlassAccuracy(average="micro", **given),
            "balanced_accuracy": BalancedAccuracy(**given),
            "precision": MulticlassPrecision(average="none", **unknown),
            "recall": MulticlassRecall(average="none", **unknown),
            "f1": MulticlassF1Score(average="none", **unknown),
            "confusion": MulticlassConfusionMatrix(**given),
            "calibration": Reliability(unlabelled),
        }
    )


class MeanLoss(Metric):
    """`update(losses (B,), weights (B,))` -> the sum of the losses over that of the weights, as in training.

    A loss already holds its weight; what weighs nothing does not count. A NaN is shown, which torchmetrics' own mean
    does only where it ignores weights.
    """

    full_state_update = False
    is_differentiable = False
    total: Tensor
    weight: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.add_state("total", torch.tensor(0.0), dist_reduce_fx="sum")
        self.add_state("weight", torch.tensor(0.0), dist_reduce_fx="sum")

    def update(self, losses: Tensor, weights: Tensor) -> None:
        self.total += losses.where(weights > 0, 0).sum()
        self.weight += weights.sum()

    def compute(self) -> Tensor:
        return self.total / self.weight


class BalancedAccuracy(MulticlassConfusionMatrix):
    """Mean recall over the classes that occur; a class that is only ever guessed does not count.

    `compute` raises `ValueError` where none occurs: the other figures would then be 0 or NaN, and look like figures.
    """

    def compute(self) -> Tensor:
        confusion = super().compute()  # over all processes, so that all of them raise or none does
        images = confusion.sum(1)
        if not images.any():
            raise ValueError(
                "figures need an image that can be read and has a label; got none: look at the labels, and at the "
                "images that were left out"
            )
        return (confusion.diagonal()[images > 0] / images[images > 0]).mean()


class Reliability(Metric):
    """Confidence against accuracy: `reliability` (bins, 3) and `ece`, as the module's table says.

    `update(preds (B, K) logits, target (B,))` leaves out targets that are `unlabelled`. An empty bin is a row of zeros.
    """

    full_state_update = False
    is_differentiable = False
    count: Tensor
    confidence: Tensor
    correct: Tensor

    def __init__(self, unlabelled: int, bins: int = 15) -> None:
        super().__init__()
        if bins < 1:
            raise ValueError(f"bins must be at least 1; got {bins}")
        self.unlabelled, self.bins = unlabelled, bins
        self.add_state("count", torch.zeros(bins, dtype=torch.long), dist_reduce_fx="sum")
        self.add_state("confidence", torch.zeros(bins), dist_reduce_fx="sum")
        self.add_state("correct", torch.zeros(bins, dtype=torch.long), dist_reduce_fx="sum")

    def update(self, preds: Tensor, target: Tensor) -> None:
        confidence, answer = preds.float().softmax(-1).max(-1)
        index = ((confidence * self.bins).ceil().long() - 1).clamp(0, self.bins - 1)
        member = index[:, None] == torch.arange(self.bins, device=index.device)  # (B, bins)
        member &= (target != self.unlabelled)[:, None]
        self.count += member.sum(0)
        self.confidence += (member * confidence[:, None]).sum(0)
        self.correct += (member & (answer == target)[:, None]).sum(0)

    def compute(self) -> dict[str, Tensor]:
        images = self.count.clamp(min=1)
        table = torch.stack([self.count, self.confidence / images, self.correct / images], dim=1)
        gaps = (table[:, 1] - table[:, 2]).abs() * self.count
        return {"reliability": table, "ece": gaps.sum() / self.count.sum().clamp(min=1)}
