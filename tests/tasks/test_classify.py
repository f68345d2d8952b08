"""Cross-entropy over heads, hard and soft labels, figures against scikit-learn and numpy, answers in words."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from sklearn import metrics as oracle
from torch import Tensor, nn

from vitrail.models.backbone import Backbone, Tokens
from vitrail.models.registry import build_model
from vitrail.models.vit import VisionTransformer
from vitrail.records import UNLABELLED, Batch
from vitrail.tasks.base import evaluate
from vitrail.tasks.classify import Classify
from vitrail.tasks.losses import LossConfig
from vitrail.tasks.scores import MeanLoss, Reliability, classification_scores
from vitrail.weights.load import load_model

K = 5


class TwoHeads(VisionTransformer):
    """A second head beside the first, as in a distilled model."""

    def __init__(self) -> None:
        super().__init__(img_size=32, patch_size=16, embed_dim=24, depth=1, num_heads=2, num_classes=K)
        self.other = nn.Linear(24, K)

    def forward_heads(self, x: Tokens) -> tuple[Tensor, ...]:
        return self.head(x.x[:, 0]), self.other(x.x[:, 0])

    def forward_head(self, x: Tokens, pre_logits: bool = False) -> Tensor:
        return x.x[:, 0] if pre_logits else torch.stack(self.forward_heads(x)).mean(0)


@pytest.fixture(scope="module")
def backbone() -> Backbone:
    torch.manual_seed(0)
    return build_model("vit_debug", num_classes=K, depth=1)


@pytest.mark.parametrize("head", [nn.Linear(48, 3), nn.Sequential(nn.Linear(48, 9), nn.ReLU(), nn.Linear(9, 3))])
def test_names_are_for_the_head_that_is_there(head: nn.Module):
    model = build_model("vit_debug", depth=1)
    model.head, model.classes = head, ("a", "b", "c")
    assert Classify(model).predict(batch(2))[0].label in model.classes
    model.classes = ("a", "b")
    with pytest.raises(ValueError, match="got 2 names for 3 logits"):
        Classify(model)


def batch(count: int = 6) -> Batch:
    generator = torch.Generator().manual_seed(1)
    images = torch.randn(count, 3, 32, 32, generator=generator)
    return Batch(image=images, label=torch.arange(count) % K, id=[f"{i}.png" for i in range(count)])


def scores_of(logits: Tensor, target: Tensor, parts: int = 3) -> dict[str, np.ndarray[Any, Any]]:
    scores = classification_scores(logits.shape[1], UNLABELLED)
    for x, y in zip(logits.chunk(parts), target.chunk(parts), strict=True):
        scores.update(preds=x, target=y, losses=F.cross_entropy(x, y, reduction="none"), weights=torch.ones(len(y)))
    return {name: value.double().numpy() for name, value in scores.compute().items()}


# ---- loss


def test_the_loss_is_smoothed_cross_entropy(backbone: Backbone):
    task, data = Classify(backbone, LossConfig(label_smoothing=0.1)), batch()
    loss = task(data)["loss"]
    assert loss.ndim == 0 and loss.requires_grad
    shares = torch.full((6, K), 0.1 / K).scatter_add(1, data["label"][:, None], torch.full((6, 1), 0.9))
    expected = -(shares * backbone(data["image"]).log_softmax(-1)).sum(1).mean()
    assert torch.allclose(loss, expected, atol=1e-6)


def test_the_loss_is_the_mean_over_heads_and_the_answer_the_mean_of_logits():
    torch.manual_seed(0)
    model, data = TwoHeads(), batch()
    first, second = model.forward_heads(model.forward_features(data["image"]))
    apart = (F.cross_entropy(first, data["label"]) + F.cross_entropy(second, data["label"])) / 2
    assert torch.allclose(Classify(model)(data)["loss"], apart, atol=1e-6)
    assert torch.allclose(Classify(model).logits(data), (first + second) / 2, atol=1e-6)


def test_soft_labels_of_one_class_are_hard_labels(backbone: Backbone):
    task, hard = Classify(backbone), batch()
    soft = hard | {"label": F.one_hot(hard["label"], K).float()}
    assert torch.allclose(task(soft)["loss"], task(hard)["loss"], atol=1e-6)
    one, two = evaluate(task, [soft]), evaluate(task, [hard])
    assert all(torch.allclose(one[name].double(), two[name].double(), atol=1e-6, equal_nan=True) for name in one)


def test_mixed_labels_share_the_loss(backbone: Backbone):
    task, data = Classify(backbone), batch(1)
    mixed = data | {"label": torch.tensor([[0.7, 0, 0, 0.3, 0]])}
    losses = [task(data | {"label": torch.tensor([k])})["loss"] for k in (0, 3)]
    assert torch.allclose(task(mixed)["loss"], 0.7 * losses[0] + 0.3 * losses[1], atol=1e-6)


def test_smoothing_is_for_training_alone(backbone: Backbone):
    plain, smooth = (evaluate(Classify(backbone, LossConfig(label_smoothing=s)), [batch()])["loss"] for s in (0.0, 0.3))
    assert plain == smooth


def test_a_bare_loop_learns(backbone: Backbone):
    task, data = Classify(copy.deepcopy(backbone)), batch()
    optimizer = torch.optim.AdamW(task.parameters(), lr=1e-3)
    losses = []
    for _ in range(25):
        loss = task(data)["loss"]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0] / 2
    assert float(evaluate(task, [data])["accuracy"]) == 1


@pytest.mark.fault(35)
def test_a_batch_of_one(backbone: Backbone):
    task = Classify(backbone)
    assert task(batch(1))["loss"].isfinite()
    assert float(evaluate(task, [batch(1)])["accuracy"]) in (0, 1)
    assert len(task.predict(batch(1))) == 1


# ---- labels


@pytest.mark.fault(30)
@pytest.mark.parametrize("wrong", [K, -1, 10**6])
@pytest.mark.parametrize("named", [True, False])
def test_a_label_out_of_range_names_the_sample(backbone: Backbone, wrong: int, named: bool):
    task, data = Classify(backbone), batch()
    data["label"][4] = wrong
    if not named:
        del data["id"]
    message = rf"0 … 4, for 5 classes; {'4.png' if named else 'image 4 of the batch'} has {wrong}: mend the labels"
    for call in (task, task.prepare, lambda b: evaluate(task, [b]), lambda b: task.update(task.metrics(), b)):
        with pytest.raises(ValueError, match=message):
            call(data)


@pytest.mark.fault(30)
def test_many_wrong_labels_are_counted(backbone: Backbone):
    data = batch(8) | {"label": torch.full((8,), 9)}
    with pytest.raises(ValueError, match=r"0\.png has 9; .*4\.png has 9; and 3 more"):
        Classify(backbone)(data)


@pytest.mark.parametrize("label", [torch.zeros(5).long(), torch.zeros(6, 4), torch.zeros(6, 1).long(), torch.zeros(6)])
def test_labels_of_another_shape_are_refused(backbone: Backbone, label: Tensor):
    with pytest.raises(ValueError, match=r"class indices \(6,\) or float shares \(6, 5\); got \("):
        Classify(backbone)(batch() | {"label": label})


def test_labels_of_any_integer_type_do(backbone: Backbone):
    task, data = Classify(backbone), batch()
    for kind in (torch.int32, torch.uint8):
        assert torch.equal(task(data | {"label": data["label"].to(kind)})["loss"], task(data)["loss"])


def test_what_cannot_be_a_classifier_is_refused(backbone: Backbone):
    data = batch()
    del data["label"]
    with pytest.raises(ValueError, match="a batch with `image` and `label`; got image, id"):
        Classify(backbone)(data)
    with pytest.raises(ValueError, match="`image` and `label`; got views, label"):
        Classify(backbone)({"views": [batch()["image"]], "label": batch()["label"]})
    with pytest.raises(ValueError, match="num_classes of at least 1; got 0: call reset_classifier"):
        Classify(build_model("vit_debug", num_classes=0))


# ---- figures


@pytest.mark.parametrize("seed", range(4))
def test_figures_equal_scikit_learns(seed: int):
    """Random answers over 5 classes; class 4 never occurs, and class 3 is never the answer."""
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(50, K, generator=generator) * 3
    logits[:, 3] = -20
    target = torch.randint(4, (50,), generator=generator)
    found, answer = scores_of(logits, target), logits.argmax(1)
    given: dict[str, Any] = {"labels": range(K), "average": None, "zero_division": np.nan}
    precision, recall, f1, _ = oracle.precision_recall_fscore_support(target, answer, **given)
    assert found["accuracy"] == pytest.approx(oracle.accuracy_score(target, answer), abs=1e-6)
    occurring = [oracle.recall_score(target, answer, labels=[k], average="macro") for k in range(4)]
    assert found["balanced_accuracy"] == pytest.approx(np.mean(occurring), abs=1e-6)
    for name, expected in (("precision", precision), ("recall", recall), ("f1", f1)):
        assert found[name] == pytest.approx(expected, abs=1e-6, nan_ok=True), name
    assert np.isnan(found["precision"][3]) and np.isnan(found["recall"][4])
    assert (found["confusion"] == oracle.confusion_matrix(target, answer, labels=range(K))).all()
    shares = logits.double().softmax(1)
    assert found["loss"] == pytest.approx(oracle.log_loss(target, shares, labels=range(K)), abs=1e-5)


def test_balanced_accuracy_equals_scikit_learns_on_skewed_classes():
    target = torch.tensor([0] * 40 + [1] * 4 + [2] * 2)
    logits = F.one_hot(torch.where(torch.arange(46) % 3 == 0, 0, target), 3).float()
    expected = oracle.balanced_accuracy_score(target, logits.argmax(1))
    assert scores_of(logits, target)["balanced_accuracy"] == pytest.approx(expected, abs=1e-6)


def test_calibration_equals_numpy():
    generator = torch.Generator().manual_seed(3)
    logits = torch.randn(200, K, generator=generator) * 2
    target = torch.randint(K, (200,), generator=generator)
    found = scores_of(logits, target)
    confidence, answer = (part.numpy() for part in logits.softmax(1).max(1))
    right = answer == target.numpy()
    ece = 0.0
    for b in range(15):
        inside = (confidence > b / 15) & (confidence <= (b + 1) / 15)
        if not inside.any():
            assert (found["reliability"][b] == 0).all()
            continue
        row = [inside.sum(), confidence[inside].mean(), right[inside].mean()]
        assert found["reliability"][b] == pytest.approx(row, abs=1e-5)
        ece += inside.mean() * abs(row[1] - row[2])
    assert found["ece"] == pytest.approx(ece, abs=1e-6)


def test_a_sure_and_right_classifier_is_calibrated_and_a_sure_and_wrong_one_is_not():
    logits = torch.eye(K) * 100
    assert scores_of(logits, torch.arange(K), 1)["ece"] == pytest.approx(0)
    assert scores_of(logits, (torch.arange(K) + 1) % K, 1)["ece"] == pytest.approx(1)


def test_reliability_needs_a_bin():
    with pytest.raises(ValueError, match="bins must be at least 1; got 0"):
        Reliability(UNLABELLED, bins=0)


def test_a_loss_that_is_no_number_stays_visible(backbone: Backbone):
    model = copy.deepcopy(backbone)
    nn.init.constant_(model.head.bias, float("nan"))
    assert evaluate(Classify(model), [batch()])["loss"].isnan()


def test_a_loss_that_weighs_nothing_is_not_looked_at():
    mean = MeanLoss()
    mean.update(torch.tensor([float("nan"), 3.0]), torch.tensor([0.0, 2.0]))
    assert mean.compute() == 1.5


def test_scores_and_tables_by_name(backbone: Backbone):
    found = evaluate(Classify(backbone), [batch(), batch(3)])
    assert {name for name, value in found.items() if value.ndim == 0} == {
        "loss",
        "accuracy",
        "balanced_accuracy",
        "ece",
    }
    tables = {name: tuple(value.shape) for name, value in found.items() if value.ndim}
    assert tables == {"precision": (K,), "recall": (K,), "f1": (K,), "confusion": (K, K), "reliability": (15, 3)}
    assert found["confusion"].sum() == 9 and found["reliability"][:, 0].sum() == 9
    assert Classify.monitor[0] in found


# ---- answers


@torch.no_grad()
def test_answers_are_ranked_and_named(backbone: Backbone):
    model, data = copy.deepcopy(backbone).eval(), batch()
    model.classes = tuple("abcde")
    shares = model(data["image"]).softmax(1)
    for row, answer in enumerate(Classify(model).predict(data, top=3)):
        assert answer.id == f"{row}.png"
        assert answer.label == answer["class"] == "abcde"[int(shares[row].argmax())]
        assert answer.confidence == pytest.approx(float(shares[row].max()))
        assert [share for _, share in answer.top] == sorted(shares[row].tolist(), reverse=True)[:3]


def test_answers_without_names_or_ids(backbone: Backbone):
    data = batch()
    del data["id"]
    answers = Classify(backbone).predict(data, top=99)
    assert {answer.id for answer in answers} == {""}
    assert {name for name, _ in answers[0].top} == {f"class {k}" for k in range(K)}
    with pytest.raises(ValueError, match="top must be at least 1; got 0"):
        Classify(backbone).predict(data, top=0)


# ---- padding, and a head of one's own


@pytest.mark.parametrize("pool", ["token", "avg", "map"])
def test_padded_pixels_are_hidden_in_the_loss_the_figures_and_the_answers(pool: str):
    torch.manual_seed(0)
    task = Classify(build_model("vit_debug", num_classes=K, depth=1, global_pool=pool).eval())
    padded, mask = batch(), torch.zeros(6, 32, 32, dtype=torch.bool)
    mask[..., 16:] = True
    padded["pad_mask"] = mask
    other = padded | {"image": padded["image"].masked_fill(mask[:, None], 7.0)}
    assert not torch.allclose(task.logits(batch()), task.logits(padded), atol=1e-4)  # padding is not seen …
    assert torch.allclose(task.logits(padded), task.logits(other), atol=1e-5)  # … whatever stands there
    assert torch.allclose(task(padded)["loss"], task(other)["loss"], atol=1e-5)
    one, two = evaluate(task, [padded]), evaluate(task, [other])
    assert torch.allclose(one["loss"], two["loss"], atol=1e-5)
    answers = [task.predict(data)[0].confidence for data in (padded, other)]
    assert answers[0] == pytest.approx(answers[1], abs=1e-5)


def test_a_head_put_in_by_hand_goes_all_the_way(tmp_path: Path):
    """Loss, figures, answers, model folder and back: three classes where the config said five."""
    torch.manual_seed(0)
    model = build_model("vit_debug", num_classes=K, depth=1)
    model.classes, model.head = tuple("abcde"), nn.Linear(model.num_features, 3)
    task, data = Classify(model), batch()
    data["label"] = data["label"] % 3
    assert task.num_classes == 3 and task.classes == ("class 0", "class 1", "class 2")
    task(data)["loss"].backward()
    assert evaluate(task, [data])["confusion"].shape == (3, 3)
    with pytest.raises(ValueError, match="for 3 classes; 3.png has 3"):
        task(batch())
    again = Classify(load_model(model.save_pretrained(tmp_path / "model")))
    assert again.num_classes == again.backbone.config.num_classes == 3
    assert again.predict(data) == Classify(model.eval()).predict(data)


@pytest.mark.fault(30)
def test_prepare_looks_at_labels_before_they_go_to_the_device(backbone: Backbone, monkeypatch: pytest.MonkeyPatch):
    """An accelerator's labels are not looked at, since that waits for it."""
    from vitrail.tasks import base

    monkeypatch.setattr(base, "to_device", lambda *_: pytest.fail("a bad label went to the device"))
    with pytest.raises(ValueError, match="for 5 classes; 0.png has 9"):
        Classify(backbone).prepare(batch() | {"label": torch.full((6,), 9)})
