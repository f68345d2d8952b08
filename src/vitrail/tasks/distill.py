"""Classification taught by labels and by a trained network: Hinton et al. 2015, "Distilling the Knowledge in a Neural
Network"; Touvron et al. 2021, "Training data-efficient image transformers & distillation through attention", section 3.

    images ─┬─ student ──> logits of each head ──────────────────── (1 - α) · loss by the labels ─┐
            │                               └─ the teacher's head, else every one ──┐             ├─ sum
            └─ its own normalisation and size ── teacher, frozen ──> logits ── α · loss by them ──┘

    hard    cross-entropy of the student with the class that the teacher would answer      (DeiT, equation 3)
    soft    τ² KL(softmax(teacher / τ) ‖ softmax(student / τ)), a sum over classes         (DeiT, equation 2)

Notable choices: both losses are means over images (the code of DeiT also divides `soft` by the number of classes).
A network with a head for it (DeiT's distillation token) learns labels by the first and the teacher by the second; with
others each head learns both. The teacher sees the very pixels that the student sees, mixed ones too, and answers for
them as they are. It is no part of the task: not among its parameters, nor its state, nor its mode. An image without a
label is not learnt from, though the teacher would know an answer.

Legend: `B` batch, `C` channels, `H`, `W` pixels, `K` classes.
"""

from __future__ import annotations

import hashlib
import logging
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vitrail.layers.modes import evaluating
from vitrail.models.backbone import Backbone
from vitrail.names import check_choice, require, shortened
from vitrail.records import Batch, Preprocess
from vitrail.tasks.classify import Classify, check_names, mean_by
from vitrail.tasks.losses import LossConfig, labelled

LOG = logging.getLogger("vitrail")
Distillation = Literal["hard", "soft"]


@dataclass(frozen=True, kw_only=True)
class DistillConfig:
    """What is learnt from a trained network."""

    teacher: str = ""
    """a trained network to learn from beside the labels: a run or model folder, a file of weights, published weights
    by name, timm:NAME or torchvision:NAME; empty for none"""
    teacher_path: str = ""
    """a file of weights for the network that --teacher names; empty where that says it all"""
    distillation: Distillation = "hard"
    """hard: the teacher's answer is a second label; soft: its probabilities are learnt"""
    distillation_alpha: float = 0.5
    """share of the loss that the teacher has; the labels have the rest"""
    distillation_tau: float = 3.0
    """distillation soft: temperature; the higher, the more the classes count that the teacher does not answer"""

    def __post_init__(self) -> None:
        getattr(super(), "__post_init__", lambda: None)()  # the next config where several are joined by inheritance
        check_choice("--distillation", self.distillation, get_args(Distillation))
        alpha, tau = self.distillation_alpha, self.distillation_tau
        require(0 < alpha <= 1, "distillation_alpha", "lie in (0, 1]", alpha)
        require(0 < tau < math.inf, "distillation_tau", "be positive", tau)


class Teacher:
    """A trained network to learn from, how it wants its images, and what its logits are called. No module.

    `model` maps (B, C, H, W) to logits (B, K). One of vitrail's brings `preprocess` and `classes`; any other needs
    `preprocess`. Whoever asks it finds it in evaluation mode and without gradients; afterwards it is as it was, but for
    its device, which is that of the images. Raises `ValueError` without `preprocess`, and for one that nobody knows.
    """

    def __init__(
        self, model: nn.Module, *, preprocess: Preprocess | None = None, classes: Sequence[str] = (), name: str = ""
    ) -> None:
        if isinstance(model, Backbone):
            preprocess, classes = preprocess or model.preprocess, classes or model.classes
            name = name or model.variant
            if model.num_classes < 1:
                raise ValueError("a teacher answers with classes; got a network without a head: train it first")
        if preprocess is None or not preprocess.known:
            raise ValueError(
                f"a teacher needs its preprocess, since it sees the student's images; got {type(model).__name__} "
                "without: add preprocess=Preprocess(img_size=…, mean=…, std=…)"
            )
        self.model, self.preprocess, self.classes = model, preprocess, tuple(classes)
        self.name = name or type(model).__name__

    def logits(self, images: Tensor, preprocess: Preprocess) -> Tensor:
        """images (B, C, H, W) as `preprocess` made them -> logits (B, K), in fp32 at least, without a graph.

        Raises `ValueError` for what is no logits.
        """
        self.model.to(images.device)
        with evaluating(self.model):
            found = self.model(self.seen(images, preprocess))
        if not isinstance(found, Tensor) or found.ndim != 2 or len(found) != len(images):
            got = tuple(found.shape) if isinstance(found, Tensor) else type(found).__name__
            raise ValueError(f"a teacher maps {len(images)} images to logits ({len(images)}, K); got {got}: wrap it")
        return found.to(torch.promote_types(found.dtype, torch.float32))

    def seen(self, images: Tensor, preprocess: Preprocess) -> Tensor:
        """Images as `preprocess` made them -> as the teacher wants them: of its normalisation, then of its size."""
        own = self.preprocess
        if (preprocess.mean, preprocess.std) != (own.mean, own.std):
            images = own.normalise(preprocess.denormalise(images))
        if images.shape[-2:] == own.img_size:
            return images
        return F.interpolate(images, own.img_size, mode=own.interpolation, antialias=True)

    def fingerprint(self) -> str:
        """What tells this teacher from another: its name, and a sum over its weights and its preparation."""
        own = self.preprocess
        digest = hashlib.sha256(repr((own.img_size, own.mean, own.std, own.interpolation)).encode())
        for name, value in self.model.state_dict().items():
            digest.update(name.encode())
            digest.update(value.cpu().contiguous().flatten().view(torch.uint8).numpy())
        return f"{self.name} with sha256 {digest.hexdigest()[:16]}"


class Distill(Classify):
    """A classifier that learns from labels and from a `Teacher`; it answers, and is judged, as `Classify` is.

    `loss` and `class_weights` are for the labels. Where both have class names, the teacher's logits are put in the
    student's order. Raises `ValueError` for a teacher with other classes or channels, and for the student itself.
    """

    def __init__(
        self,
        backbone: Backbone,
        teacher: Teacher | Backbone,
        distillation: DistillConfig | None = None,
        loss: LossConfig | None = None,
        class_weights: Sequence[float] | Tensor | None = None,
    ) -> None:
        super().__init__(backbone, loss, class_weights)
        self.distillation = distillation or DistillConfig()
        self.teacher = teacher if isinstance(teacher, Teacher) else Teacher(teacher)
        if self.teacher.model is backbone:
            raise ValueError("a teacher is another network than its student; got one for both: copy.deepcopy it")
        self.order = self._order()

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        """`loss`: (1 - α) `label_loss` + α `teacher_loss`, each the mean over heads and over what is labelled.

        Raises `ValueError` for bad labels, and for images whose preparation or padding the teacher cannot follow.
        """
        self.check(batch)
        self._check_seen(batch)
        images, _ = self._seen(batch)
        heads, number = self.backbone.logits_by_head(images), self.backbone.teacher_head
        first, second = (heads, heads) if number is None else (heads[:number], heads[number:])
        by_label = self.label_loss(first, batch)
        by_teacher = self.teacher_loss(second, self.teacher_logits(images), batch)
        alpha = self.distillation.distillation_alpha
        total = (1 - alpha) * by_label + alpha * by_teacher
        return {"loss": total, "label_loss": by_label, "teacher_loss": by_teacher}

    def teacher_logits(self, images: Tensor) -> Tensor:
        """The student's images (B, C, H, W) -> the teacher's logits (B, K), in the student's order of classes."""
        found = self.teacher.logits(images, self.backbone.preprocess)
        return found if self.order is None else found[:, self.order.to(found.device)]

    def teacher_loss(self, heads: Sequence[Tensor], taught: Tensor, batch: Batch) -> Tensor:
        """Logits (B, K) of some heads and of the teacher -> their mean loss, 0-dimensional."""
        known = labelled(batch["label"])
        law, tau = LAWS[self.distillation.distillation], self.distillation.distillation_tau
        losses = [(known * law(logits.to(taught.dtype), taught, tau)).sum() for logits in heads]
        return mean_by(torch.stack(losses).mean(), known)

    def taught_by(self) -> str | None:
        return self.teacher.fingerprint()

    def _check_seen(self, batch: Batch) -> None:
        """Raises `ValueError` for images that the teacher cannot be shown."""
        if "pad_mask" in batch:
            raise ValueError("a teacher sees whole images; got a batch with `pad_mask`: give images of one size")
        if not self.backbone.preprocess.known:
            raise ValueError(
                "a teacher needs to know how the student's images were normalised; got ready ones of which nobody said "
                "it: give preprocess=Preprocess(img_size=…, mean=…, std=…) to the trainer"
            )

    def _order(self) -> Tensor | None:
        """Where the teacher has each of the student's classes; None where it has them in the same order.

        Raises `ValueError` for other classes, other numbers of them, and other channels.
        """
        own, theirs = self.backbone.preprocess, self.teacher.preprocess
        if own.in_chans != theirs.in_chans:
            raise ValueError(
                f"a teacher must see the student's channels; it takes {theirs.in_chans}, the student {own.in_chans}: "
                "take another teacher"
            )
        probe = torch.zeros(1, theirs.in_chans, *theirs.img_size, device=self.device)
        count = self.teacher.logits(probe, theirs).shape[1]
        if count != self.num_classes:
            raise ValueError(
                f"a teacher must have the student's classes; {self.teacher.name} has {count}, the student "
                f"{self.num_classes}: train a teacher on this data"
            )
        named, wanted = self.teacher.classes, self.backbone.classes
        check_names(named, count)
        if not named or not wanted or named == wanted:
            return None
        order = _order_of(wanted, named, self.teacher.name)
        LOG.info("the teacher's classes stand in another order; its answers are put in the student's")
        return order


def _order_of(wanted: tuple[str, ...], named: tuple[str, ...], teacher: str) -> Tensor:
    """(K,) where each of `wanted` stands in `named`. Raises `ValueError` unless they are the same names, each once."""
    odd = set(named) ^ set(wanted) or {name for name in named if named.count(name) > 1}
    if odd:
        raise ValueError(
            f"a teacher must have the student's classes; {teacher} has {shortened(named)}, the student "
            f"{shortened(wanted)}, which differ in {', '.join(sorted(odd)[:3])}: take a teacher of these classes, or, "
            "where they are the same by other names, Teacher(model, classes=…) with the student's"
        )
    return torch.tensor([named.index(name) for name in wanted])


def hard(student: Tensor, teacher: Tensor, tau: float) -> Tensor:
    """logits (B, K) of both -> (B,) cross-entropy with the teacher's answer."""
    return F.cross_entropy(student, teacher.argmax(-1), reduction="none")


def soft(student: Tensor, teacher: Tensor, tau: float) -> Tensor:
    """logits (B, K) of both -> (B,) τ² KL(softmax(teacher / τ) ‖ softmax(student / τ)); τ² keeps gradients' size."""
    log_student, log_teacher = ((logits / tau).log_softmax(-1) for logits in (student, teacher))
    return tau**2 * F.kl_div(log_student, log_teacher, reduction="none", log_target=True).sum(-1)


LAWS: dict[str, Callable[[Tensor, Tensor, float], Tensor]] = {"hard": hard, "soft": soft}
