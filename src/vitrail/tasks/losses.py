"""What an image's logits cost, given its label: four losses, and how much each class weighs.

With t the label's share of each class, p = softmax(logits), q = sigmoid(logits) and w the weights of the classes:

| loss          | of one image                                                         | source                      |
|---------------|----------------------------------------------------------------------|-----------------------------|
| cross_entropy | - Σ w t log p                                                        |                             |
| focal         | - Σ w t (1 - p)^γ log p                                              | Lin et al. 2017, equation 4 |
| bce           | - (Σ w t) · mean over classes of [t log q + (1 - t) log(1 - q)]      | Wightman et al. 2021, §2    |
| asymmetric    | - (Σ w t) · Σ [t (1 - q)^γ⁺ log q + (1 - t) r^γ⁻ log(1 - r)]         | Ridnik et al. 2021, eq. 4-7 |

where r = max(q - m, 0). Whoever averages divides by the images' weights Σ w t: with class indices that is PyTorch's
weighted cross-entropy, and a label of shares that is all one class costs and weighs the same (PyTorch divides by the
number of images there). Sigmoid losses weigh whole images, as Cui et al. 2019, "Class-Balanced Loss", do.

Notable choices: focal takes the softmax, since an image here is of one class, where Lin et al. have a sigmoid a class;
there the two differ. `bce` is the mean over classes, as published ("ResNet strikes back", and DeiT III, Touvron et al.
2022); both make every class of a mixed image 1: `bce_threshold` 0. Smoothing ε makes t into (1 - ε) t + ε / K first.
Of an image that is labelled in part (mixed with one that is not), t is the shares of that part, and weighs its size.
Arithmetic is in fp32 at least, under autocast too.

Legend: `B` batch, `K` classes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

from vitrail.names import check_choice, nearest, require
from vitrail.records import UNLABELLED

LossName = Literal["cross_entropy", "bce", "focal", "asymmetric"]
COUNTED = ("balanced", "effective")
"""class weights that follow from how many images each class has"""


@dataclass(frozen=True, kw_only=True)
class LossConfig:
    """What training minimises."""

    loss: LossName = "cross_entropy"
    """cross_entropy; bce: a yes or no for each class; focal: sure answers count less; asymmetric: absent classes do"""
    label_smoothing: float = 0.0
    """share of the target spread over all classes"""
    bce_threshold: float | None = None
    """bce: classes of a mixed image with a larger share than this are wholly there, others not; none keeps shares"""
    focal_gamma: float = 2.0
    """focal: how much less a sure answer counts; 0 is cross-entropy"""
    asl_gamma_neg: float = 4.0
    """asymmetric: how much less an absent class counts that is surely absent"""
    asl_gamma_pos: float = 0.0
    """asymmetric: how much less the true class counts when it is sure"""
    asl_clip: float = 0.05
    """asymmetric: probability below which an absent class costs nothing"""
    class_weights: str = "none"
    """none; balanced: images of rare classes count more, so that classes count alike; effective: less so (see
    --effective-beta); or numbers by class, such as cat:2,dog:0.5, where others have 1"""
    effective_beta: float = 0.999
    """class weights effective: from 0, all alike, towards 1, balanced"""

    def __post_init__(self) -> None:
        getattr(super(), "__post_init__", lambda: None)()  # the next config where several are joined by inheritance
        check_choice("--loss", self.loss, get_args(LossName))
        for name in ("label_smoothing", "asl_clip", "effective_beta"):
            require(0 <= getattr(self, name) < 1, name, "lie in [0, 1)", getattr(self, name))
        for name in ("focal_gamma", "asl_gamma_neg", "asl_gamma_pos"):
            require(0 <= getattr(self, name) < math.inf, name, "be 0 or more", getattr(self, name))
        threshold = self.bce_threshold
        require(threshold is None or 0 <= threshold < 1, "bce_threshold", "lie in [0, 1), or be none", threshold)
        if self.class_weights not in ("none", *COUNTED):
            _said_weights(self.class_weights)


def image_losses(logits: Tensor, target: Tensor, config: LossConfig, weights: Tensor | None = None) -> Tensor:
    """logits (B, K), class indices (B,) or shares (B, K), weights of classes (K,) -> what each image costs (B,).

    An image without a label costs nothing. `labelled(target, weights)` is what to divide their sum by.
    """
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return LOSSES[config.loss](logits, target, config, weights if weights is None else weights.to(logits))


def labelled(target: Tensor, weights: Tensor | None = None) -> Tensor:
    """(B,) float, what each image weighs: the sum of its shares (B, K), each times its class's weight (K,).

    So by default 1 for an image with a class index, and 0 for `UNLABELLED`.
    """
    if target.is_floating_point():
        return (target if weights is None else target * weights).sum(-1)
    known = (target.long() != UNLABELLED).float()
    return known if weights is None else known * weights[target.long().clamp(min=0)]


def cross_entropy(logits: Tensor, target: Tensor, config: LossConfig, weights: Tensor | None = None) -> Tensor:
    """The module's table."""
    if target.is_floating_point():
        spread = labelled(target)[:, None] / logits.shape[-1]
        return F.cross_entropy(logits, target.lerp(spread, config.label_smoothing), weights, reduction="none")
    return F.cross_entropy(
        logits, target, weights, ignore_index=UNLABELLED, reduction="none", label_smoothing=config.label_smoothing
    )


def focal(logits: Tensor, target: Tensor, config: LossConfig, weights: Tensor | None = None) -> Tensor:
    """The module's table."""
    shares = _shares(target, logits)
    shares = shares.lerp(labelled(shares)[:, None] / logits.shape[-1], config.label_smoothing)
    log_p = logits.log_softmax(-1)
    losses = -shares * _focus(-torch.expm1(log_p), config.focal_gamma) * log_p
    return (losses if weights is None else losses * weights).sum(-1)


def bce(logits: Tensor, target: Tensor, config: LossConfig, weights: Tensor | None = None) -> Tensor:
    """The module's table."""
    there = _there(target, logits)
    if config.bce_threshold is not None:
        there = (there > config.bce_threshold).to(there)
    wanted = _smoothed(there, config.label_smoothing)
    losses = F.binary_cross_entropy_with_logits(logits, wanted, reduction="none").mean(-1)
    return labelled(target, weights) * losses


def asymmetric(logits: Tensor, target: Tensor, config: LossConfig, weights: Tensor | None = None) -> Tensor:
    """The module's table."""
    wanted, clip = _smoothed(_there(target, logits), config.label_smoothing), config.asl_clip
    shifted = (logits.sigmoid() - clip).clamp(min=0)
    log_absent = torch.log1p(-shifted) if clip else F.logsigmoid(-logits)
    there = _focus((-logits).sigmoid(), config.asl_gamma_pos) * F.logsigmoid(logits)
    absent = _focus(shifted, config.asl_gamma_neg) * log_absent
    return -labelled(target, weights) * (wanted * there + (1 - wanted) * absent).sum(-1)


LOSSES: dict[str, Callable[[Tensor, Tensor, LossConfig, Tensor | None], Tensor]] = {
    "cross_entropy": cross_entropy, "bce": bce, "focal": focal, "asymmetric": asymmetric,
}  # fmt: skip


def _focus(share: Tensor, gamma: float) -> Tensor:
    """share^γ. Never of zero itself, where a γ below 1 has an infinite slope."""
    return share.clamp(min=torch.finfo(share.dtype).eps) ** gamma


def _shares(target: Tensor, logits: Tensor) -> Tensor:
    """Class indices as shares (B, K), none of any class for an image without a label; shares as they are."""
    if target.is_floating_point():
        return target.to(logits)
    classes = torch.arange(logits.shape[-1], device=target.device)
    return (target[:, None] == classes).to(logits)


def _there(target: Tensor, logits: Tensor) -> Tensor:
    """(B, K) how far each class is there, for losses that are not linear in it: shares of the part that is labelled.

    Shares that add up to more than 1 are several classes, each there by itself.
    """
    shares = _shares(target, logits)
    known = labelled(shares)[:, None]
    return shares / known.where(known > 0, 1).clamp(max=1)


def _smoothed(there: Tensor, smoothing: float) -> Tensor:
    return there * (1 - smoothing) + smoothing / there.shape[-1]


# ---- how much each class weighs


def class_weights(config: LossConfig, classes: Sequence[str], counts: Sequence[int] | None = None) -> Tensor | None:
    """(K,) what `--class-weights` means for these classes, `counts` being the training images of each; None for none.

    balanced is N / (K n), as scikit-learn's; effective is (1 - β) / (1 - β^n), scaled to a mean of 1 (Cui et al. 2019,
    equation 2). Raises `ValueError` for a class without images, counts that nobody knows, and a name that no class has.
    """
    said = config.class_weights
    if said == "none":
        return None
    if said not in COUNTED:
        return torch.tensor(_by_name(_said_weights(said), classes))
    images = _counted(said, classes, counts)
    if said == "balanced":
        return (images.sum() / (len(classes) * images)).float()
    found = (1 - config.effective_beta) / (1 - config.effective_beta**images)
    return (found / found.mean()).float()


def _counted(said: str, classes: Sequence[str], counts: Sequence[int] | None) -> Tensor:
    """(K,) float64. Raises `ValueError` where a class has no image, and where nobody counted."""
    if counts is None:
        raise ValueError(
            f"--class-weights {said} needs the number of training images of each class, which loaders of one's own do "
            "not tell: give numbers, such as cat:2,dog:0.5"
        )
    if empty := [name for name, count in zip(classes, counts, strict=True) if not count]:
        raise ValueError(
            f"--class-weights {said} needs training images of every class; got none of {', '.join(empty[:5])}: add "
            "some, take the class away, or give numbers, such as cat:2,dog:0.5"
        )
    return torch.tensor(counts, dtype=torch.float64)


def _by_name(said: Mapping[str, float], classes: Sequence[str]) -> list[float]:
    if strange := [name for name in said if name not in classes]:
        near = ", ".join(nearest(strange[0], classes))
        raise ValueError(f"--class-weights must name the data's classes; got {strange[0]!r}: the nearest are {near}")
    return [said.get(name, 1.0) for name in classes]


def _said_weights(text: str) -> dict[str, float]:
    """`cat:2,dog:0.5` -> numbers by name. Raises `ValueError` for anything else."""
    found: dict[str, float] = {}
    for part in text.split(","):
        name, _, number = (word.strip() for word in part.rpartition(":"))
        if not name or not _is_weight(number) or name in found:
            raise ValueError(
                f"--class-weights must be none, {', '.join(COUNTED)}, or a positive number for each class that is "
                f"named once, such as cat:2,dog:0.5; got {part.strip()!r}"
            )
        found[name] = float(number)
    return found


def _is_weight(number: str) -> bool:
    try:
        return 0 < float(number) < math.inf
    except ValueError:
        return False
