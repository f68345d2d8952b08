"""Batches from any loader, on any device, and the modes that evaluation leaves behind."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from vitrail.layers.modes import evaluating
from vitrail.models.registry import build_model
from vitrail.records import Batch
from vitrail.tasks.base import as_batch, batch_count, evaluate, pick_device, to_device
from vitrail.tasks.classify import Classify


@pytest.fixture(scope="module")
def task() -> Classify:
    torch.manual_seed(0)
    return Classify(build_model("vit_debug"))


def raw(count: int = 4, seed: int = 0) -> Batch:
    generator = torch.Generator().manual_seed(seed)
    images = torch.randint(256, (count, 3, 32, 32), dtype=torch.uint8, generator=generator)
    labels = torch.randint(10, (count,), generator=generator)
    return Batch(image=images, label=labels, id=[f"{seed}/{i}.png" for i in range(count)])


def test_a_tuple_becomes_a_batch_and_a_batch_stays():
    batch = raw()
    assert as_batch(batch) is batch
    made = as_batch([batch["image"], batch["label"].tolist()])
    assert torch.equal(made["label"], batch["label"]) and set(made) == {"image", "label"}


@pytest.mark.parametrize(("item", "got"), [
    ({"pixel_values": 1, "labels": 2}, r"the keys \['labels', 'pixel_values'\]"),
    ((torch.zeros(1), 2, 3), "a tuple of Tensor, int, int"),
    (["a", 2], "a list of str, int"),
    (torch.zeros(2, 3), "a Tensor"),
])  # fmt: skip
def test_anything_else_is_refused(item: object, got: str):
    with pytest.raises(
        ValueError, match=rf"must yield \(images, labels\) or a dict with one of image, views, text .*got {got}"
    ):
        as_batch(item)


@pytest.mark.parametrize("batch", [
    {"image": torch.zeros(3, 1, 4, 4), "views": [torch.zeros(2, 1, 4, 4)]},
    {"label": torch.zeros(3), "views": [torch.zeros(3, 1, 4, 4), torch.zeros(3, 1, 2, 2)]},
    {"text": ["a", "b", "c"], "target": {}},
])  # fmt: skip
def test_a_batch_may_be_of_images_views_or_texts(batch: Batch):
    assert as_batch(batch) is batch
    assert batch_count(batch) == 3


def test_views_are_normalised_as_images_are(task: Classify):
    image = raw()["image"]
    ready = task.backbone.preprocess.prepare({"views": [image, image[..., :16, :16], image.float()]})
    assert torch.equal(ready["views"][0], task.prepare(raw())["image"])
    assert ready["views"][1].dtype == torch.float32 and torch.equal(ready["views"][2], image.float())


def test_every_tensor_of_a_batch_moves():
    batch = raw() | {"boxes": [torch.zeros(1, 4)], "side": {"age": torch.ones(4)}, "meta": [{"size": (3, 4)}]}
    moved = to_device(batch, torch.device("meta"))
    assert moved["image"].is_meta and moved["boxes"][0].is_meta and moved["side"]["age"].is_meta
    assert moved["id"] == batch["id"] and moved["meta"] == batch["meta"]
    assert not batch["image"].is_meta


def test_prepare_normalises_raw_images_and_leaves_ready_ones(task: Classify):
    ready = task.prepare(raw())
    assert ready["image"].dtype == torch.float32 and ready["image"].min() == -1
    assert torch.equal(task.prepare(ready)["image"], ready["image"])


def test_evaluation_restores_every_mode(task: Classify):
    task.train()
    task.backbone.blocks[1].eval()  # frozen by somebody
    before = [part.training for part in task.modules()]
    evaluate(task, [raw()])
    assert [part.training for part in task.modules()] == before
    with evaluating(task):
        assert not any(part.training for part in task.modules()) and not torch.is_grad_enabled()
    with pytest.raises(ValueError, match="label"):
        evaluate(task, [raw() | {"label": torch.tensor([99] * 4)}])
    assert [part.training for part in task.modules()] == before and torch.is_grad_enabled()


def test_a_plain_loader_scores_like_our_batches(task: Classify):
    batch = raw(7)
    loader = DataLoader(TensorDataset(batch["image"], batch["label"]), batch_size=3)
    ours, theirs = evaluate(task, [batch]), evaluate(task, loader)
    assert ours.keys() == theirs.keys()
    assert all(torch.allclose(ours[name].double(), theirs[name].double(), atol=1e-6, equal_nan=True) for name in ours)
    assert all(value.device.type == "cpu" and not value.requires_grad for value in ours.values())


def test_an_empty_loader_is_an_error(task: Classify):
    with pytest.raises(ValueError, match="at least one batch; the loader gave none"):
        evaluate(task, [])


def test_parameter_names_are_the_tasks_own(task: Classify):
    names = [name for group in task.layer_groups() for name in group]
    assert sorted(names) == sorted(name for name, _ in task.named_parameters())
    assert task.no_weight_decay() and task.no_weight_decay() <= set(names)
    assert task.averaged_modules() == [task]


def test_a_tasks_own_parameters_come_last(task: Classify):
    class WithScale(Classify):
        def __init__(self) -> None:
            super().__init__(task.backbone)
            self.scale = nn.Parameter(torch.ones(1))

    groups = WithScale().layer_groups()
    assert groups[-1] == ["scale"] and groups[:-1] == task.layer_groups()


def test_devices_are_picked_or_refused(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    assert pick_device() == pick_device("cpu") == torch.device("cpu")
    for name in ("cuda", "cuda:1", "mps", "tpu", "cpu:7", "cpu:banana"):
        with pytest.raises(ValueError, match=rf"one that is here \(cpu\); got '{name}'"):
            pick_device(name)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    assert pick_device().type == "mps"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert pick_device().type == "cuda" and pick_device("cuda:1") == torch.device("cuda", 1)
    with pytest.raises(ValueError, match="got 'cuda:2'"):
        pick_device("cuda:2")


def test_torchmetrics_is_imported_when_figures_are_asked_for():
    code = "import sys, vitrail.tasks.classify, vitrail.predict; print('torchmetrics' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
