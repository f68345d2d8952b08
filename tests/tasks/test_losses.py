"""Losses against closed forms, timm and torchvision; weights of classes against scikit-learn and PyTorch."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from sklearn.utils.class_weight import compute_class_weight
from timm.loss import AsymmetricLossMultiLabel, AsymmetricLossSingleLabel, BinaryCrossEntropy
from torch import Tensor
from torchvision.ops import sigmoid_focal_loss

from vitrail.models.registry import build_model
from vitrail.records import UNLABELLED, Batch
from vitrail.tasks.base import evaluate
from vitrail.tasks.classify import Classify
from vitrail.tasks.losses import LOSSES, LossConfig, class_weights, image_losses, labelled

K = 5
WEIGHTS = torch.tensor([0.5, 2.0, 1.0, 3.0, 0.1])
NAMES = ("cat", "dog", "elk", "fox", "gnu")


def drawn(count: int = 7) -> tuple[Tensor, Tensor]:
    """Logits (B, K) and class indices (B,)."""
    generator = torch.Generator().manual_seed(2)
    return torch.randn(count, K, generator=generator) * 3, torch.randint(K, (count,), generator=generator)


def one_hot(target: Tensor) -> Tensor:
    return F.one_hot(target, K).float()


class Term(NamedTuple):
    """One class of one image: its weight, its share, softmax, sigmoid, and the image's own weight."""

    w: float
    t: float
    p: float
    q: float
    whole: float


def absent(x: Term, config: LossConfig) -> float:
    r = max(x.q - config.asl_clip, 0)
    return r**config.asl_gamma_neg * math.log(1 - r)


BY_HAND: dict[str, Callable[[Term, LossConfig], float]] = {
    "cross_entropy": lambda x, c: -x.w * x.t * math.log(x.p),
    "focal": lambda x, c: -x.w * x.t * (1 - x.p) ** c.focal_gamma * math.log(x.p),
    "bce": lambda x, c: -x.whole / K * (x.t * math.log(x.q) + (1 - x.t) * math.log(1 - x.q)),
    "asymmetric": lambda x, c: -x.whole * (
        x.t * (1 - x.q) ** c.asl_gamma_pos * math.log(x.q) + (1 - x.t) * absent(x, c)
    ),
}  # fmt: skip


def by_hand(name: str, logits: Tensor, shares: Tensor, config: LossConfig, weights: Tensor) -> list[float]:
    """The module's table, number by number, with smoothing."""
    found = []
    for row, part in zip(logits.double().tolist(), shares.double().tolist(), strict=True):
        total, whole = sum(map(math.exp, row)), sum(x * y for x, y in zip(weights.tolist(), part, strict=True))
        terms = [
            Term(w, share * (1 - config.label_smoothing) + config.label_smoothing / K, math.exp(x) / total,
                 1 / (1 + math.exp(-x)), whole)
            for w, share, x in zip(weights.tolist(), part, row, strict=True)
        ]  # fmt: skip
        found.append(sum(BY_HAND[name](term, config) for term in terms))
    return found


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("form", ["indices", "one-hot", "shares"])
@pytest.mark.parametrize("name", LOSSES)
def test_each_loss_is_what_its_table_says(name: str, form: str, smoothing: float):
    logits, target = drawn()
    config = LossConfig(loss=name, label_smoothing=smoothing, focal_gamma=1.5, asl_gamma_pos=0.5)
    shares = 0.7 * one_hot(target) + 0.3 * one_hot(target.roll(1)) if form == "shares" else one_hot(target)
    found = image_losses(logits, target if form == "indices" else shares, config, WEIGHTS)
    assert found.tolist() == pytest.approx(by_hand(name, logits, shares, config, WEIGHTS), rel=1e-4)
    alone = image_losses(logits, target if form == "indices" else shares, config)
    assert alone.tolist() == pytest.approx(by_hand(name, logits, shares, config, torch.ones(K)), rel=1e-4)


# ---- against other libraries


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_bce_is_timms_and_pytorchs(smoothing: float):
    logits, target = drawn()
    found = image_losses(logits, target, LossConfig(loss="bce", label_smoothing=smoothing)).mean()
    torch.testing.assert_close(found, BinaryCrossEntropy(smoothing=smoothing)(logits, target))
    plain = image_losses(logits, target, LossConfig(loss="bce")).mean()
    torch.testing.assert_close(plain, F.binary_cross_entropy_with_logits(logits, one_hot(target)))


@pytest.mark.parametrize("threshold", [None, 0.0, 0.35])
def test_bce_of_mixed_images_is_timms(threshold: float | None):
    """0 makes both classes of a mixed image wholly there, 0.35 the larger one alone."""
    logits, target = drawn()
    shares = 0.7 * one_hot(target) + 0.3 * one_hot(target.roll(1))
    found = image_losses(logits, shares, LossConfig(loss="bce", bce_threshold=threshold)).mean()
    torch.testing.assert_close(found, BinaryCrossEntropy(smoothing=0, target_threshold=threshold)(logits, shares))


@pytest.mark.parametrize(("neg", "pos", "clip"), [(4.0, 0.0, 0.05), (4.0, 1.0, 0.05), (2.0, 0.5, 0.0), (0.0, 0.0, 0.2)])
def test_asymmetric_is_timms(neg: float, pos: float, clip: float):
    logits, target = drawn()
    config = LossConfig(loss="asymmetric", asl_gamma_neg=neg, asl_gamma_pos=pos, asl_clip=clip)
    theirs = AsymmetricLossMultiLabel(gamma_neg=neg, gamma_pos=pos, clip=clip)
    torch.testing.assert_close(image_losses(logits, target, config).mean(), theirs(logits, one_hot(target)))


@pytest.mark.parametrize("gamma", [0.5, 1.0, 2.0, 5.0])
def test_focal_is_timms_and_of_two_classes_torchvisions(gamma: float):
    logits, target = drawn()
    config = LossConfig(loss="focal", focal_gamma=gamma)
    theirs = AsymmetricLossSingleLabel(gamma_pos=gamma, gamma_neg=0, eps=0, reduction="none")
    torch.testing.assert_close(image_losses(logits, target, config), theirs(logits, target))
    two, label = logits[:, :2], target % 2
    binary = sigmoid_focal_loss(two[:, 1] - two[:, 0], label.float(), alpha=-1, gamma=gamma)
    torch.testing.assert_close(image_losses(two, label, config), binary)


def test_losses_without_focus_are_the_plain_ones():
    logits, target = drawn()
    torch.testing.assert_close(
        image_losses(logits, target, LossConfig(loss="focal", focal_gamma=0)),
        F.cross_entropy(logits, target, reduction="none"),
    )
    even = LossConfig(loss="asymmetric", asl_gamma_neg=0, asl_clip=0)
    torch.testing.assert_close(
        image_losses(logits, target, even), K * image_losses(logits, target, LossConfig(loss="bce"))
    )


# ---- labels of every kind, and arithmetic


@pytest.mark.parametrize("name", LOSSES)
def test_an_image_without_a_label_costs_nothing(name: str):
    logits, target = drawn()
    target[2] = UNLABELLED
    for label in (target, one_hot(target.clamp(min=0)) * (target >= 0)[:, None]):
        logits.requires_grad_(True).grad = None
        losses = image_losses(logits, label, LossConfig(loss=name, label_smoothing=0.1), WEIGHTS)
        losses.sum().backward()
        assert losses[2] == 0 and losses[3] > 0 and (logits.grad[2] == 0).all()
        assert labelled(label, WEIGHTS)[2] == 0


@pytest.mark.parametrize("name", LOSSES)
def test_the_labelled_part_of_a_mixed_image_costs_its_share(name: str):
    logits, target = drawn()
    config = LossConfig(loss=name, label_smoothing=0.1)
    part, whole = (image_losses(logits, share * one_hot(target), config, WEIGHTS) for share in (0.4, 1.0))
    torch.testing.assert_close(part, 0.4 * whole)


def test_of_several_labels_each_is_there():
    logits = drawn(1)[0]
    several = torch.tensor([[1.0, 0, 1, 0, 0]])
    found = image_losses(logits, several, LossConfig(loss="bce")) / labelled(several)
    torch.testing.assert_close(found[0], F.binary_cross_entropy_with_logits(logits, several))


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("gamma", [0.0, 0.5, 4.0])
def test_sure_answers_have_finite_gradients(name: str, gamma: float):
    logits = torch.tensor([[90.0, -90, -90, -90, -90], [-200, 0, 200, 0, 0], [0.0, 0, 0, 0, 0]], requires_grad=True)
    for clip in (0.0, 0.05):
        config = LossConfig(loss=name, focal_gamma=gamma, asl_gamma_neg=gamma, asl_gamma_pos=gamma, asl_clip=clip)
        for label in (0, 1):
            losses = image_losses(logits, torch.full((3,), label), config)
            (gradient,) = torch.autograd.grad(losses.sum(), logits)
            assert losses.isfinite().all() and gradient.isfinite().all()


@pytest.mark.parametrize("name", LOSSES)
def test_arithmetic_is_in_fp32_under_autocast(name: str):
    logits, target = drawn()
    logits, config = logits.bfloat16(), LossConfig(loss=name)
    alone = image_losses(logits.float(), target, config, WEIGHTS)
    with torch.autocast("cpu", torch.bfloat16):
        found = image_losses(logits, target, config, WEIGHTS)
        assert torch.equal(labelled(target, WEIGHTS), WEIGHTS[target])
    assert found.dtype == torch.float32 and torch.equal(found, alone)
    assert image_losses(logits.double(), target, config, WEIGHTS).dtype == torch.float64


# ---- weights of classes


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_weighted_cross_entropy_is_pytorchs(smoothing: float):
    """Its mean over class indices; of shares its sum, and then what is the same for a label that is all one class."""
    logits, target = drawn()
    target[1] = UNLABELLED
    config = LossConfig(label_smoothing=smoothing)
    found = image_losses(logits, target, config, WEIGHTS).sum() / labelled(target, WEIGHTS).sum()
    theirs = F.cross_entropy(logits, target, WEIGHTS, ignore_index=UNLABELLED, label_smoothing=smoothing)
    torch.testing.assert_close(found, theirs, rtol=1e-6, atol=0)
    logits, target = logits[2:], target[2:]
    shares = 0.7 * one_hot(target) + 0.3 * one_hot(target.roll(1))
    total = F.cross_entropy(logits, shares, WEIGHTS, label_smoothing=smoothing, reduction="sum")
    torch.testing.assert_close(image_losses(logits, shares, config, WEIGHTS).sum(), total)
    torch.testing.assert_close(labelled(shares, WEIGHTS), 0.7 * WEIGHTS[target] + 0.3 * WEIGHTS[target.roll(1)])
    hard = image_losses(logits, target, config, WEIGHTS) / labelled(target, WEIGHTS)
    soft = image_losses(logits, one_hot(target), config, WEIGHTS) / labelled(one_hot(target), WEIGHTS)
    torch.testing.assert_close(soft, hard)


def test_balanced_weights_are_scikit_learns():
    counts = [3, 1, 40, 7, 9]
    labels = [k for k, count in enumerate(counts) for _ in range(count)]
    expected = compute_class_weight("balanced", classes=np.arange(K), y=labels)
    found = class_weights(LossConfig(class_weights="balanced"), NAMES, counts)
    assert found is not None and found.dtype == torch.float32
    assert found.tolist() == pytest.approx(expected.tolist(), rel=1e-6)


def test_effective_weights_go_from_none_to_balanced():
    counts = [3, 1, 40, 7, 9]

    def found(beta: float) -> Tensor:
        weights = class_weights(LossConfig(class_weights="effective", effective_beta=beta), NAMES, counts)
        assert weights is not None and float(weights.mean()) == pytest.approx(1)
        return weights

    assert found(0.0).tolist() == [1] * K
    inverse = torch.tensor([1 / n for n in counts])
    torch.testing.assert_close(found(1 - 1e-9), inverse / inverse.mean(), rtol=1e-5, atol=0)
    by_hand = torch.tensor([0.1 / (1 - 0.9**n) for n in counts])
    torch.testing.assert_close(found(0.9), by_hand / by_hand.mean())


def test_weights_by_name():
    assert class_weights(LossConfig(), NAMES) is None
    found = class_weights(LossConfig(class_weights="dog: 2.5, gnu:1e-1"), NAMES)
    assert found is not None and found.tolist() == pytest.approx([1, 2.5, 1, 1, 0.1])
    odd = class_weights(LossConfig(class_weights="a:b:3"), ("a:b", "c"))
    assert odd is not None and odd.tolist() == [3, 1]


@pytest.mark.parametrize(("said", "counts", "message"), [
    ("balanced", [1, 0, 2, 0, 1], "balanced needs training images of every class; got none of dog, fox: add some"),
    ("effective", [1, 0, 2, 2, 1], "--class-weights effective needs training images of every class; got none of dog"),
    ("balanced", None, "which loaders of one's own do not tell: give numbers, such as cat:2,dog:0.5"),
    ("dgo:2", None, "--class-weights must name the data's classes; got 'dgo': the nearest are dog, "),
])  # fmt: skip
def test_weights_that_cannot_be(said: str, counts: list[int] | None, message: str):
    with pytest.raises(ValueError, match=message):
        class_weights(LossConfig(class_weights=said), NAMES, counts)


@pytest.mark.parametrize(("field", "value", "message"), [
    ("loss", "focl", "--loss must be one of cross_entropy, bce, focal, asymmetric; got 'focl': did you mean focal"),
    ("label_smoothing", 1.0, r"--label-smoothing must lie in \[0, 1\); got 1.0"),
    ("asl_clip", -0.1, r"--asl-clip must lie in \[0, 1\); got -0.1"),
    ("effective_beta", 1.0, r"--effective-beta must lie in \[0, 1\); got 1.0"),
    ("focal_gamma", -1.0, "--focal-gamma must be 0 or more; got -1.0"),
    ("asl_gamma_neg", math.inf, "--asl-gamma-neg must be 0 or more; got inf"),
    ("asl_gamma_pos", math.nan, "--asl-gamma-pos must be 0 or more; got nan"),
    ("bce_threshold", 1.0, r"--bce-threshold must lie in \[0, 1\), or be none; got 1.0"),
    ("class_weights", "balance", "--class-weights must be none, balanced, effective, or a positive number for each .* "
     "such as cat:2,dog:0.5; got 'balance'"),
    ("class_weights", "cat:2,", "named once, such as cat:2,dog:0.5; got ''"),
    ("class_weights", "cat:2,cat:3", "got 'cat:3'"),
    ("class_weights", "cat:-1", "got 'cat:-1'"),
    ("class_weights", "cat:nan", "got 'cat:nan'"),
])  # fmt: skip
def test_settings_out_of_range_name_the_flag(field: str, value: object, message: str):
    with pytest.raises(ValueError, match=message):
        LossConfig(**{field: value})


# ---- in the task


@pytest.fixture(scope="module")
def data() -> Batch:
    generator = torch.Generator().manual_seed(1)
    return Batch(image=torch.randn(6, 3, 32, 32, generator=generator), label=torch.arange(6) % K)


@pytest.mark.parametrize("name", LOSSES)
def test_a_task_minimises_the_loss_that_it_is_told(name: str, data: Batch):
    model = build_model("vit_debug", num_classes=K, depth=1).eval()
    config = LossConfig(loss=name, label_smoothing=0.1)
    task, label = Classify(model, config, WEIGHTS), data["label"]
    losses = image_losses(model(data["image"]), label, config, WEIGHTS)
    torch.testing.assert_close(task(data)["loss"], losses.sum() / WEIGHTS[label].sum())
    assert task.weight(data) == pytest.approx(float(WEIGHTS[label].sum()))


@pytest.mark.parametrize("name", LOSSES)
def test_the_figure_is_the_cross_entropy_of_the_answers(name: str, data: Batch):
    """Whatever was trained with, so that recipes can be compared; and answers are softmax shares."""
    model = build_model("vit_debug", num_classes=K, depth=1).eval()
    told, plain = Classify(model, LossConfig(loss=name, label_smoothing=0.3), WEIGHTS), Classify(model)
    assert evaluate(told, [data])["loss"] == evaluate(plain, [data])["loss"]
    torch.testing.assert_close(evaluate(told, [data])["loss"], F.cross_entropy(model(data["image"]), data["label"]))
    assert sum(share for _, share in told.predict(data)[0].top) == pytest.approx(1)


def test_weights_are_no_weights_of_the_network():
    model = build_model("vit_debug", num_classes=K, depth=1)
    task = Classify(model, class_weights=WEIGHTS.tolist())
    assert task.state_dict().keys() == Classify(model).state_dict().keys()
    assert task.to("meta").class_weights.device.type == "meta"  # but go where it goes
    for wrong in ([1.0] * 4, [1.0, 0, 1, 1, 1], [1.0, math.nan, 1, 1, 1]):
        with pytest.raises(ValueError, match="class_weights must be 5 positive numbers; got"):
            Classify(build_model("vit_debug", num_classes=K, depth=1), class_weights=wrong)


def test_a_batch_whose_classes_weigh_little_is_an_average_all_the_same(data: Batch):
    model = build_model("vit_debug", num_classes=K, depth=1).eval()
    once, less = (Classify(model, class_weights=factor * WEIGHTS)(data)["loss"] for factor in (1, 1e-3))
    torch.testing.assert_close(once, less)
