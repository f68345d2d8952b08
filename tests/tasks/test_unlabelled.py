"""Images without a label (-100, or shares of zero): no loss, no gradient, no figure, and no NaN."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from vitrail.models.registry import build_model
from vitrail.records import UNLABELLED, Batch
from vitrail.tasks.base import evaluate
from vitrail.tasks.classify import Classify
from vitrail.tasks.losses import LossConfig, labelled

K = 5


@pytest.fixture
def task() -> Classify:
    torch.manual_seed(0)
    return Classify(build_model("vit_debug", num_classes=K, depth=1).eval(), loss=LossConfig(label_smoothing=0.1))


def batch(*labels: int) -> Batch:
    images = torch.randn(6, 3, 32, 32, generator=torch.Generator().manual_seed(1))[: len(labels)]
    return Batch(image=images, label=torch.tensor(labels), id=[f"{i}.png" for i in range(len(labels))])


def kept(data: Batch, *rows: int) -> Batch:
    places = list(rows)
    return Batch(image=data["image"][places], label=data["label"][places])


def gradients(task: Classify, data: Batch) -> list[Tensor]:
    task.zero_grad()
    task(data)["loss"].backward()
    return [p.grad.clone() for p in task.parameters() if p.grad is not None]


def soft(data: Batch) -> Batch:
    """The same labels as shares of classes: none of any class where there is no label."""
    known = data["label"] != UNLABELLED
    return data | {"label": F.one_hot(data["label"].clamp(min=0), K) * known[:, None].float()}


@pytest.mark.fault(31)
@pytest.mark.parametrize("form", [dict, soft])
def test_the_loss_is_the_mean_over_the_labelled(form, task: Classify):
    data = batch(2, UNLABELLED, 0, UNLABELLED)
    assert task(form(data))["loss"].item() == pytest.approx(task(kept(data, 0, 2))["loss"].item(), abs=1e-6)
    for some, alone in zip(gradients(task, form(data)), gradients(task, kept(data, 0, 2)), strict=True):
        torch.testing.assert_close(some, alone, rtol=1e-4, atol=1e-6)
    assert task.weight(form(data)) == 2


@pytest.mark.fault(31)
@pytest.mark.parametrize("form", [dict, soft])
def test_a_batch_without_any_has_no_loss_and_no_gradient(form, task: Classify):
    data = form(batch(UNLABELLED, UNLABELLED))
    assert task(data)["loss"] == 0
    found = gradients(task, data)
    assert len(found) == len(list(task.parameters()))  # processes that share a step wait for every one of them
    assert all((gradient == 0).all() for gradient in found)
    assert task.weight(data) == 0


@pytest.mark.fault(31)
def test_of_a_mixed_image_the_labelled_share_counts(task: Classify):
    """0.7 of class 2 with 0.3 of an image without a label, beside one of class 0."""
    data = batch(2, 0)
    whole, other = (task(kept(data, row))["loss"] for row in (0, 1))
    mixed = data | {"label": torch.tensor([[0, 0, 0.7, 0, 0], [1.0, 0, 0, 0, 0]])}
    assert torch.allclose(task(mixed)["loss"], (0.7 * whole + other) / 1.7, atol=1e-6)
    assert task.weight(mixed) == pytest.approx(1.7)
    plain = Classify(task.backbone)  # figures know no smoothing
    assert torch.allclose(evaluate(plain, [mixed])["loss"], plain(mixed)["loss"], atol=1e-6)


@pytest.mark.fault(31)
@pytest.mark.parametrize("form", [dict, soft])
def test_figures_are_of_the_labelled_alone(form, task: Classify):
    data, none = batch(2, UNLABELLED, 0, 1), batch(*[UNLABELLED] * 3)
    some, alone = evaluate(task, [form(data), form(none)]), evaluate(task, [kept(data, 0, 2, 3)])
    assert some["confusion"].sum() == 3
    for name, value in alone.items():
        torch.testing.assert_close(some[name], value, rtol=1e-5, atol=1e-6, equal_nan=True)


@pytest.mark.fault(31)
@pytest.mark.parametrize("form", [dict, soft])
def test_where_nothing_is_labelled_there_are_no_figures(form, task: Classify):
    with pytest.raises(ValueError, match="figures need an image that can be read and has a label; got none: look at"):
        evaluate(task, [form(batch(UNLABELLED, UNLABELLED))])


def test_a_class_beyond_seven_bits_is_a_label_in_eight():
    """156, which is -100 in as many bits."""
    assert labelled(torch.tensor([156, 1], dtype=torch.uint8)).tolist() == [1, 1]
    assert labelled(torch.tensor([-100, 1], dtype=torch.int8)).tolist() == [0, 1]


@pytest.mark.fault(31)
@pytest.mark.parametrize("kind", [torch.int64, torch.int32, torch.int8])
def test_it_is_one_number_and_no_other_below_zero(kind: torch.dtype, task: Classify):
    data = batch(1, UNLABELLED)
    assert torch.equal(task(data | {"label": data["label"].to(kind)})["loss"], task(data)["loss"])
    wrong = batch(1, UNLABELLED, -99, -1, K)
    message = r"0 … 4, for 5 classes; 2\.png has -99; 3\.png has -1; 4\.png has 5: mend the labels \(-100 is an image"
    with pytest.raises(ValueError, match=message):
        task(wrong | {"label": wrong["label"].to(kind)})
    byte = data | {"label": torch.tensor([1, 156], dtype=torch.uint8)}  # -100 in as many bits
    with pytest.raises(ValueError, match=r"1\.png has 156"):
        task(byte)
