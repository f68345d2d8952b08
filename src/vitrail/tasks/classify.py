"""Classification: one class an image, by cross-entropy or another loss of `tasks.losses`.

    images (B, C, H, W) -> backbone -> logits (B, K) of each head -> mean of the heads' losses
                                    -> mean logits -> softmax -> the best classes, by name

Labels are class indices (B,) or, where images were mixed, shares of classes (B, K). An image may have no label: the
index -100, PyTorch's `ignore_index`, or shares of zero. The loss is the mean over what is labelled, zero with zero
gradients where nothing is, and figures count labelled images alone. Pixels that the batch marks as padding (`pad_mask`)
are hidden from the backbone.

Notable choices: answers are softmax shares whatever the loss was, so of a network trained with one sigmoid a class they
rank as its sigmoids do, and add up to 1; calibration is measured of just these shares. The figure `loss` is always the
cross-entropy of the answers, without smoothing or weights: so networks of different losses can be compared by it, and
so it is no continuation of a training loss of another kind.

Legend: `B` batch, `C` channels, `H`, `W` pixels, `K` classes.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor

from vitrail.models.backbone import Backbone
from vitrail.names import shortened
from vitrail.records import UNLABELLED, Batch, Classification
from vitrail.tasks.base import Mode, Task
from vitrail.tasks.losses import LossConfig, image_losses, labelled

if TYPE_CHECKING:
    from torchmetrics import MetricCollection


class Classify(Task):
    """Which class is it? The backbone brings the heads, `loss` says what training minimises.

    `class_weights` (K,) says how much an image of each class counts in training (`losses.class_weights`).
    Figures: `loss` (cross-entropy, whatever the training), `accuracy`, `balanced_accuracy`, `ece`; tables `precision`,
    `recall`, `f1` (K,), `confusion` (K, K) and `reliability` (bins, 3). Their laws stand in `vitrail.tasks.scores`.
    """

    monitor: ClassVar[tuple[str, Mode]] = ("accuracy", "max")
    class_weights: Tensor | None

    def __init__(
        self, backbone: Backbone, loss: LossConfig | None = None, class_weights: Sequence[float] | Tensor | None = None
    ) -> None:
        super().__init__()
        if not isinstance(backbone, Backbone):
            raise TypeError(
                f"a task takes one of vitrail's networks as it is; got {type(backbone).__name__}: to compile it, "
                "compile its blocks, `for block in model.blocks: block.compile()`"
            )
        if backbone.num_classes < 1:
            raise ValueError("a classifier needs num_classes of at least 1; got 0: call reset_classifier(num_classes)")
        check_names(backbone.classes, backbone.num_classes, backbone.config.num_classes)
        self.backbone, self.loss = backbone, loss or LossConfig()
        weights = None if class_weights is None else torch.as_tensor(class_weights, dtype=torch.float32)
        if weights is not None and (weights.shape != (self.num_classes,) or not bool((weights > 0).all())):
            raise ValueError(
                f"class_weights must be {self.num_classes} positive numbers; got {shortened(class_weights)}"
            )
        self.register_buffer("class_weights", weights, persistent=False)  # a setting, not something learnt

    @property
    def num_classes(self) -> int:
        """As the head has it now: a head that was put in by hand counts."""
        return self.backbone.num_classes

    @property
    def classes(self) -> tuple[str, ...]:
        """The names of the logits: the backbone's, or `class 0`, `class 1`, … where it has none for this head."""
        known, count = self.backbone.classes, self.num_classes
        return class_names(known if len(known) == count else (), count)

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        """`loss`: the heads' mean over what is labelled, each image weighing as its class does.

        Raises `ValueError` for bad labels.
        """
        self.check(batch)
        return {"loss": self.label_loss(self.backbone.logits_by_head(*self._seen(batch)), batch)}

    def label_loss(self, heads: Sequence[Tensor], batch: Batch) -> Tensor:
        """Logits (B, K) of some heads -> their mean loss by the batch's labels, 0-dimensional."""
        label = _target(batch["label"])
        losses = [image_losses(logits, label, self.loss, self.class_weights).sum() for logits in heads]
        return mean_by(torch.stack(losses).mean(), labelled(label, self.class_weights))

    def weight(self, batch: Batch) -> Tensor:
        """The labelled images of a batch, times the weights of their classes; shares count as they add up."""
        return labelled(_target(batch["label"]), self.class_weights).sum()

    def logits(self, batch: Batch) -> Tensor:
        """(B, K), the heads averaged as the backbone averages them, in fp32 at least."""
        return self.backbone(*self._seen(batch)).float()

    def metrics(self) -> MetricCollection:
        """Fresh figures, as the class's docstring lists them, on the task's device."""
        from vitrail.tasks.scores import classification_scores  # torchmetrics takes seconds to import

        return classification_scores(self.num_classes, UNLABELLED).to(self.device)

    def update(self, metrics: MetricCollection, batch: Batch) -> None:
        """Adds the labelled images of a batch. Figures without any raise `ValueError` when they are computed.

        Of a soft label the largest share is the true class, but `loss` takes all of it, weighed as in training.
        """
        self.check(batch)
        label, logits = _target(batch["label"]), self.logits(batch)
        losses, weights = image_losses(logits, label, LossConfig()), labelled(label)
        metrics.update(preds=logits, target=hard_labels(label), losses=losses, weights=weights)

    def predict(self, batch: Batch, top: int = 5) -> list[Classification]:
        """The best `top` classes of each image with their softmax probabilities; ids are the batch's, or empty."""
        return answers(self.logits(batch), self.classes, batch.get("id"), top)

    def check(self, batch: Batch) -> None:
        """Raises `ValueError` for labels of a wrong shape or type, or out of range, naming the samples.

        The range is looked at on the CPU alone: reading from an accelerator waits for it. `prepare` checks in time.
        """
        label, count = batch.get("label"), self.num_classes
        if label is None or "image" not in batch:
            raise ValueError(f"a classifier learns from a batch with `image` and `label`; got {', '.join(batch)}")
        size = len(batch["image"])
        soft = label.is_floating_point()
        if label.shape != ((size, count) if soft else (size,)):
            raise ValueError(
                f"label must be class indices ({size},) or float shares ({size}, {count}); "
                f"got {tuple(label.shape)} of {label.dtype}"
            )
        if not soft and label.device.type == "cpu" and not bool(_sound(label.long(), count).all()):
            raise ValueError(self._out_of_range(batch))

    def _out_of_range(self, batch: Batch) -> str:
        labels = batch["label"].long()
        ids = batch.get("id") or [f"image {row} of the batch" for row in range(len(labels))]
        bad = (~_sound(labels, self.num_classes)).nonzero().flatten().tolist()
        wrong = [f"{ids[row]} has {int(labels[row])}" for row in bad]
        named = "; ".join(wrong[:5]) + (f"; and {len(wrong) - 5} more" if len(wrong) > 5 else "")
        return (
            f"a label must lie in 0 … {self.num_classes - 1}, for {self.num_classes} classes; {named}: "
            f"mend the labels ({UNLABELLED} is an image without one), or give the model more classes (num_classes)"
        )

    def _seen(self, batch: Batch) -> tuple[Tensor, Tensor | None]:
        """What the backbone takes: images, and which of their pixels are padding."""
        return self.backbone.preprocess.prepare(batch)["image"], batch.get("pad_mask")


def answers(
    logits: Tensor, classes: Sequence[str], ids: Sequence[str] | None = None, top: int = 5
) -> list[Classification]:
    """logits (B, K) -> one answer an image: its best `top` classes with their softmax probabilities, best first."""
    if top < 1:
        raise ValueError(f"top must be at least 1; got {top}")
    best = logits.float().softmax(-1).topk(min(top, len(classes)))
    found = []
    for name, shares, rows in zip(ids or [""] * len(logits), best.values.tolist(), best.indices.tolist(), strict=True):
        ranked = tuple((classes[row], share) for row, share in zip(rows, shares, strict=True))
        found.append(Classification(id=name, label=ranked[0][0], confidence=ranked[0][1], top=ranked))
    return found


def class_names(classes: Sequence[str], count: int) -> tuple[str, ...]:
    """The names of `count` logits: `classes`, or `class 0`, `class 1`, … where they have none."""
    return tuple(classes) or tuple(f"class {k}" for k in range(count))


def check_names(classes: Sequence[str], count: int, former: int | None = None) -> None:
    """Raises `ValueError` unless each of `count` logits has a name, or none has.

    Names of a `former` head, which another was put in the place of, may be left over: they name nothing.
    """
    if classes and len(classes) not in (count, former):
        raise ValueError(
            f"class names must be one a logit; got {len(classes)} names for {count} logits: "
            "name them all, or reset_classifier(num_classes) and train the new head"
        )


def mean_by(total: Tensor, weights: Tensor) -> Tensor:
    """`total` over the sum of the images' weights (B,), or as it is, zero, where they weigh nothing."""
    weight = weights.sum()
    return total / weight.where(weight > 0, 1)


def _target(label: Tensor) -> Tensor:
    return label if label.is_floating_point() else label.long()


def _sound(label: Tensor, count: int) -> Tensor:
    return ((label >= 0) & (label < count)) | (label == UNLABELLED)


def hard_labels(label: Tensor) -> Tensor:
    """Class indices (B,) as they are; of shares (B, K) the largest, or `UNLABELLED` where there are none."""
    if not label.is_floating_point():
        return label
    return label.argmax(-1).where(labelled(label) > 0, UNLABELLED)
