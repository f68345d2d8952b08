"""A guard on attention: a layer whose every query looks at one key alone has stopped to learn, and soon all do.

    entropy of a row = −Σ w log w / log(keys), 1 where all keys weigh the same, 0 where one has all the weight
    entropy of a layer = mean over the images looked at, its heads and its queries; where windows are masked, below 1

Zhai et al. 2023, "Stabilizing Transformer Training by Preventing Attention Entropy Collapse", section 3: training that
diverges is preceded by layers whose entropy falls to nearly nothing. It is looked at once an epoch, after the last
batch, on a few of its images: the lowest layer's figure stands in the history, and layers below a floor are named.
"""

from __future__ import annotations

import logging
import math
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor

from vitrail.explain.choice import NoAttentionError
from vitrail.explain.record import record_attention
from vitrail.layers.modes import evaluating
from vitrail.records import Batch
from vitrail.tasks.base import Task
from vitrail.train.history import HistoryLog
from vitrail.train.strategies import gathered

LOG = logging.getLogger("vitrail")
LOOKED_AT = 2
"""images: whole maps of all layers are held at once"""
MEND = "lower --lr, lengthen --warmup-epochs, or take a model that norms queries and keys (qk_norm)"


class EntropyGuard(Callback):
    """Puts the lowest entropy of a layer into the history of every epoch, and warns where layers are below `floor`.

    A layer that is told of is told of again only after it was above the floor. Networks without attention, and batches
    without images, are passed by.
    """

    def __init__(self, record: HistoryLog, floor: float) -> None:
        self.record, self.floor = record, floor
        self.attends = True
        """false once it was seen that nothing does"""
        self.low: set[int] = set()
        """layers that were below the floor when it was last looked"""

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Batch, batch_idx: int
    ) -> None:
        if batch_idx + 1 < trainer.num_training_batches or "image" not in batch or not self.attends:
            return
        task: Task = pl_module.task  # type: ignore[assignment]
        with trainer.precision_plugin.forward_context(), gathered(task):
            found = layer_entropies(task, batch["image"][:LOOKED_AT])
        self.attends = bool(found)
        if not found:
            return
        self.record.figures["attention_entropy"] = min(found.values())
        low = {layer for layer, entropy in found.items() if entropy < self.floor}
        if new := sorted(low - self.low):
            named = ", ".join(f"{layer} ({said(found[layer])})" for layer in new)
            LOG.warning(
                "epoch %d: attention looks at single tokens in layer %s, with less than %g of the entropy of looking "
                "at all: training often diverges after this: %s, or silence it with --entropy-floor 0",
                trainer.current_epoch + 1, named, self.floor, MEND,
            )  # fmt: skip
        self.low = low


def layer_entropies(task: Task, images: Tensor) -> dict[int, float]:
    """The entropy of each attention layer (from 1) on `images`, ready for the network; empty without attention.

    Layers of a single key are left out: they have nothing to choose from.
    """
    try:
        with evaluating(task), record_attention() as record:
            task.backbone(images)
    except NoAttentionError:
        return {}
    return {seen.layer: entropy(seen.weights) for seen in record.maps if seen.weights.shape[-1] > 1}


def entropy(weights: Tensor) -> float:
    """(…, K) rows that sum to 1 -> the mean of their entropies, as a share of log K."""
    most = math.log(weights.shape[-1])
    return float((-weights.xlogy(weights)).sum(-1).mean()) / most


def said(entropy: float) -> str:
    """An entropy with three digits, the rest cut off: what is below a floor is not rounded up to it."""
    return f"{math.floor(entropy * 1000) / 1000:.3f}" if entropy >= 1e-3 else "under 0.001"
