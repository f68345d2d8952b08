"""A teacher beside the labels: formulas by hand, what it sees, and that it is no part of the task."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vitrail.data.augment import AugmentConfig, BatchAugment
from vitrail.models.backbone import Backbone
from vitrail.models.registry import build_model
from vitrail.records import IMAGENET_MEAN, IMAGENET_STD, UNLABELLED, Batch, Preprocess
from vitrail.tasks.base import evaluate
from vitrail.tasks.classify import Classify
from vitrail.tasks.distill import LAWS, Distill, DistillConfig, Teacher
from vitrail.tasks.losses import LossConfig

K = 4
OWN = Preprocess(img_size=(32, 32), mean=IMAGENET_MEAN, std=IMAGENET_STD)
NAMES = ("ash", "birch", "cedar", "date")


def network(row: str = "deit_debug", seed: int = 0, **fields: Any) -> Backbone:
    torch.manual_seed(seed)
    model = build_model(row, num_classes=K, **fields)
    model.preprocess = OWN
    return model


class Peer(nn.Module):
    """A network of nobody here: what it is shown stays in `seen`, and it answers by an image's mean colours."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.drop, self.head = nn.BatchNorm2d(3), nn.Dropout(0.5), nn.Linear(3, K)

    def forward(self, images: Tensor) -> Tensor:
        self.seen = images
        return self.head(self.drop(self.norm(images).mean((2, 3))))


@pytest.fixture
def peer() -> Peer:
    torch.manual_seed(5)
    return Peer()


@pytest.fixture
def teacher(peer: Peer) -> Teacher:
    return Teacher(peer, preprocess=OWN)


def batch(count: int = 6) -> Batch:
    generator = torch.Generator().manual_seed(1)
    pixels = torch.randint(256, (count, 3, 32, 32), generator=generator, dtype=torch.uint8)
    return Batch(image=OWN.normalise(pixels), label=torch.arange(count) % K)


# ---- the loss


@pytest.mark.parametrize("row", ["deit_debug", "vit_debug", "crossvit_debug"])
@pytest.mark.parametrize("kind", LAWS)
def test_the_loss_is_the_formula(kind: str, row: str, teacher: Teacher):
    """With a distillation token the first head learns labels and the second the teacher; without, each head both."""
    model, data = network(row).eval(), batch()
    config = DistillConfig(distillation=kind, distillation_alpha=0.3, distillation_tau=2.0)
    task = Distill(model, teacher, config, LossConfig(label_smoothing=0.1))
    heads, taught = model.logits_by_head(data["image"]), teacher.logits(data["image"], OWN)

    def by_label(logits: Tensor) -> Tensor:
        return F.cross_entropy(logits, data["label"], label_smoothing=0.1)

    def by_teacher(logits: Tensor) -> Tensor:
        if kind == "hard":
            return F.cross_entropy(logits, taught.argmax(1))
        p, q = (taught / 2).softmax(1), (logits / 2).softmax(1)
        return 4 * (p * (p / q).log()).sum(1).mean()

    first, second = (heads[:1], heads[1:]) if row == "deit_debug" else (heads, heads)
    assert len(heads) == {"deit_debug": 2, "vit_debug": 1, "crossvit_debug": 2}[row]
    expected = 0.7 * sum(map(by_label, first)) / len(first) + 0.3 * sum(map(by_teacher, second)) / len(second)
    found = task(data)
    torch.testing.assert_close(found["loss"], expected)
    torch.testing.assert_close(found["loss"], 0.7 * found["label_loss"] + 0.3 * found["teacher_loss"])


def test_each_head_of_deit_has_its_own_teacher(teacher: Teacher):
    model, data = network(), batch()
    for alpha, idle in ((1.0, model.head), (1e-9, model.head_dist)):
        model.zero_grad()
        Distill(model, teacher, DistillConfig(distillation_alpha=alpha))(data)["loss"].backward()
        busy = model.head_dist if idle is model.head else model.head
        assert idle.weight.grad.abs().max() < 1e-6 < busy.weight.grad.abs().max()


def test_labels_that_are_missing_or_mixed(teacher: Teacher):
    """What is not labelled is not learnt from; a mixed image is, as far as it is, and the teacher sees it as it is."""
    task, data = Distill(network().eval(), teacher), batch()
    some = Batch(image=data["image"][:2], label=data["label"][:2])
    data["label"][2:] = UNLABELLED
    for name, value in task(data).items():
        torch.testing.assert_close(value, task(some)[name])
    none = task(data | {"label": torch.full((6,), UNLABELLED)})
    assert none["loss"] == none["teacher_loss"] == 0
    none["loss"].backward()
    assert all(p.grad is not None and not p.grad.any() for p in task.parameters())
    torch.manual_seed(0)
    augment = BatchAugment(AugmentConfig(mixup=0.5, crop="none", flip=0), OWN, K)
    mixed = augment(Batch(image=torch.randint(256, (6, 3, 32, 32), dtype=torch.uint8), label=torch.arange(6) % K), 1)
    assert mixed["label"].is_floating_point() and task(mixed)["loss"].isfinite()
    assert torch.equal(teacher.model.seen, mixed["image"])
    half = Batch(image=data["image"][:1], label=torch.tensor([[0.5, 0, 0, 0]]))
    torch.testing.assert_close(task(half)["teacher_loss"], task(half | {"label": torch.tensor([0])})["teacher_loss"])


def test_weights_of_classes_are_for_labels_alone(teacher: Teacher):
    model, data = network().eval(), batch()
    plain, weighed = (Distill(model, teacher, class_weights=w)(data) for w in (None, [1.0, 2.0, 3.0, 4.0]))
    assert plain["teacher_loss"] == weighed["teacher_loss"] and plain["label_loss"] != weighed["label_loss"]


# ---- the teacher is no part of the task


def test_a_teacher_is_no_part_of_the_task(peer: Peer):
    task, alone = Distill(network(), Teacher(peer, preprocess=OWN)), network()
    names = {f"backbone.{name}" for name, _ in alone.named_parameters()}
    assert {name for name, _ in task.named_parameters()} == names == {n for group in task.layer_groups() for n in group}
    assert task.state_dict().keys() == {f"backbone.{name}" for name in alone.state_dict()}
    assert peer not in set(task.modules()) | {part for m in task.averaged_modules() for part in m.modules()}


def test_a_teacher_is_asked_in_evaluation_mode_and_stays_as_it_is(peer: Peer):
    """Its norms keep their means, its dropout is off, and its modes are its own."""
    task, data = Distill(network(), Teacher(peer, preprocess=OWN)), batch()
    peer.train()
    peer.drop.eval()
    before = copy.deepcopy(peer.state_dict())
    torch.manual_seed(1)
    task.train()(data)["loss"].backward()
    after = torch.random.get_rng_state()
    assert all(torch.equal(value, before[name]) for name, value in peer.state_dict().items())
    assert all(p.grad is None and p.requires_grad for p in peer.parameters())
    assert peer.training and peer.norm.training and not peer.drop.training
    assert not task.teacher_logits(data["image"]).requires_grad
    assert torch.equal(task.teacher_logits(data["image"]), peer.eval()(data["image"]))
    torch.manual_seed(1)
    task(data)
    assert torch.equal(after, torch.random.get_rng_state())


def test_figures_and_answers_are_the_students(teacher: Teacher):
    task, data = Distill(network().eval(), teacher), batch()
    assert set(evaluate(task, [data])) == set(evaluate(Classify(task.backbone), [data]))
    teacher.model.seen = None
    assert len(task.predict(data)) == 6 and teacher.model.seen is None


def test_arithmetic_is_in_fp32_under_autocast(teacher: Teacher):
    task, data = Distill(network().eval(), teacher, DistillConfig(distillation="soft")), batch()
    with torch.autocast("cpu", torch.bfloat16):
        found = task(data)
        heads, taught = task.backbone.logits_by_head(data["image"]), task.teacher_logits(data["image"])
    assert {value.dtype for value in found.values()} == {torch.float32} and heads[0].dtype == torch.bfloat16
    expected = task.teacher_loss([heads[1].float()], taught.float(), data)
    torch.testing.assert_close(found["teacher_loss"], expected, rtol=0, atol=0)


# ---- what it sees


def test_a_teacher_sees_the_same_pixels_in_its_own_way(peer: Peer):
    pixels = torch.rand(2, 3, 32, 32)
    theirs = Preprocess(img_size=(16, 24), mean=(0.5, 0.4, 0.3), std=(0.2, 0.3, 0.4), interpolation="bilinear")
    task = Distill(network(), Teacher(peer, preprocess=theirs))
    task.teacher_logits(OWN.normalise(pixels))
    small = F.interpolate(pixels, (16, 24), mode="bilinear", antialias=True)
    torch.testing.assert_close(peer.seen, theirs.normalise(small), rtol=1e-5, atol=1e-5)


def test_images_of_the_same_preparation_are_passed_on_untouched(peer: Peer):
    """Even such as no picture has."""
    task, images = Distill(network(), Teacher(peer, preprocess=OWN)), 9 * torch.randn(2, 3, 32, 32)
    task.teacher_logits(images)
    assert peer.seen is images


# ---- whose classes


def test_classes_in_another_order_are_put_in_the_students(peer: Peer, caplog: pytest.LogCaptureFixture):
    caplog.set_level("INFO")
    student, data = network(), batch()
    student.classes = NAMES
    theirs = ("cedar", "ash", "date", "birch")
    task = Distill(student, Teacher(peer, preprocess=OWN, classes=theirs))
    assert "the teacher's classes stand in another order; its answers are put in the student's" in caplog.messages
    found, raw = task.teacher_logits(data["image"]), task.teacher.logits(data["image"], OWN)
    for place, name in enumerate(NAMES):
        assert torch.equal(found[:, place], raw[:, theirs.index(name)])
    for same in (NAMES, ()):
        task = Distill(student, Teacher(peer, preprocess=OWN, classes=same))
        assert torch.equal(task.teacher_logits(data["image"]), raw)


@pytest.mark.parametrize(("own", "theirs", "message"), [
    ("abcd", "abce", r"Peer has \('a', 'b', 'c', 'e'\), the .*, which differ in d, e: take a teacher of"),
    ("aabc", "abac", "which differ in a: take a teacher of these classes, or, where"),
    ("abcd", "abc", "class names must be one a logit; got 3 names for 4 logits"),
])  # fmt: skip
def test_other_classes_are_refused(own: str, theirs: str, message: str, peer: Peer):
    student = network()
    student.classes = tuple(own)
    with pytest.raises(ValueError, match=message):
        Distill(student, Teacher(peer, preprocess=OWN, classes=theirs))


def test_a_teacher_that_cannot_be_is_refused(peer: Peer):
    student = network()
    with pytest.raises(ValueError, match="a teacher must have the student's classes; resnet_debug has 10, the student"):
        Distill(student, build_model("resnet_debug"))
    with pytest.raises(ValueError, match="student's channels; it takes 1, the student 3: take another teacher"):
        Distill(student, build_model("vit_debug", in_chans=1, num_classes=K))
    with pytest.raises(ValueError, match=r"got one for both: copy\.deepcopy it"):
        Distill(student, student)
    with pytest.raises(ValueError, match="a network without a head: train it first"):
        Teacher(build_model("vit_debug", num_classes=0))
    for unknown in (None, OWN.replace(known=False)):
        with pytest.raises(ValueError, match="a teacher needs its preprocess, .*; got Peer without: add preprocess="):
            Teacher(peer, preprocess=unknown)
    with pytest.raises(ValueError, match=r"maps 1 images to logits \(1, K\); got \(1, 3, 32, 32\): wrap it"):
        Distill(student, Teacher(peer.norm, preprocess=OWN))


def test_images_that_a_teacher_cannot_be_shown_are_refused(teacher: Teacher):
    task, data = Distill(network(), teacher), batch()
    with pytest.raises(ValueError, match="a teacher sees whole images; got a batch with `pad_mask`"):
        task(data | {"pad_mask": torch.zeros(6, 32, 32, dtype=torch.bool)})
    task.backbone.preprocess = OWN.replace(known=False)
    with pytest.raises(ValueError, match="got ready ones of which nobody said it: give preprocess="):
        task(data)


@pytest.mark.parametrize(("field", "value", "message"), [
    ("distillation", "sfot", "--distillation must be one of hard, soft; got 'sfot': did you mean soft"),
    ("distillation_alpha", 0.0, r"--distillation-alpha must lie in \(0, 1\]; got 0.0"),
    ("distillation_alpha", 1.1, r"--distillation-alpha must lie in \(0, 1\]; got 1.1"),
    ("distillation_tau", 0.0, "--distillation-tau must be positive; got 0.0"),
    ("distillation_tau", float("inf"), "--distillation-tau must be positive; got inf"),
])  # fmt: skip
def test_settings_out_of_range_name_the_flag(field: str, value: object, message: str):
    with pytest.raises(ValueError, match=message):
        DistillConfig(**{field: value})


def test_a_teacher_is_told_from_another_by_weights_and_preparation(peer: Peer):
    own = Teacher(peer, preprocess=OWN, name="a").fingerprint()
    assert (
        own.startswith("a with sha256 ") and own == Teacher(copy.deepcopy(peer), preprocess=OWN, name="a").fingerprint()
    )
    other = Teacher(peer, preprocess=OWN.replace(img_size=(16, 16)), name="a").fingerprint()
    with torch.no_grad():
        peer.norm.running_mean[0] += 1e-6
    assert len({own, other, Teacher(peer, preprocess=OWN, name="a").fingerprint()}) == 3


# ---- what it is for


def stripes(count: int, seed: int) -> tuple[Tensor, Tensor]:
    """Images of four kinds of stripes under noise, and their kinds."""
    generator = torch.Generator().manual_seed(seed)
    kinds = torch.randint(K, (count,), generator=generator)
    rows, columns = torch.meshgrid(torch.arange(32), torch.arange(32), indexing="ij")
    patterns = torch.stack([(rows // 4) % 2, (columns // 4) % 2, ((rows + columns) // 4) % 2, (rows // 8) % 2]).float()
    images = patterns[kinds][:, None] + 0.5 * torch.randn(count, 3, 32, 32, generator=generator)
    return images, kinds


def learnt(task: nn.Module, images: Tensor, labels: Tensor, steps: int) -> nn.Module:
    optimizer = torch.optim.AdamW(task.parameters(), lr=2e-3)
    for step in range(steps):
        rows = torch.arange(step * 32, (step + 1) * 32) % len(images)
        loss = task(Batch(image=images[rows], label=labels[rows]))["loss"]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return task


@pytest.mark.parametrize("kind", LAWS)
def test_a_student_learns_faster_from_a_good_teacher(kind: str):
    """Nine labels of ten are drawn; the teacher, a CNN, has seen right ones. Without it the student stays behind."""
    images, right = stripes(512, 0)
    held_out = [dict(zip(("image", "label"), stripes(256, 1), strict=True))]
    generator = torch.Generator().manual_seed(2)
    random = torch.rand(512, generator=generator) < 0.9
    labels = torch.where(random, torch.randint(K, (512,), generator=generator), right)
    expert = learnt(Classify(network("resnet_debug")), images, right, 40)
    assert evaluate(expert, held_out)["accuracy"] > 0.9
    config = DistillConfig(distillation=kind, distillation_alpha=0.9)
    taught = learnt(Distill(network(seed=1), expert.backbone, config), images, labels, 40)
    alone = learnt(Classify(network(seed=1)), images, labels, 40)
    found = [float(evaluate(task, held_out)["accuracy"]) for task in (taught, alone)]
    assert found[0] > found[1] + 0.2
