"""`--profile`: what bounds a run is measured on its own steps, and nothing that it learns changes."""

from __future__ import annotations

import gzip
import json
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.profiler import ProfilerActivity, profile as torch_profile, record_function
from torch.utils.flop_counter import FlopCounterMode

from vitrail.models.registry import build_model
from vitrail.tasks.classify import Classify
from vitrail.train import engine, profile
from vitrail.train.config import TrainConfig
from vitrail.train.engine import fit
from vitrail.train.operators import Operator, operators_of
from vitrail.train.profile import BACKWARD, BETWEEN, FORWARD, OPTIMISER, PREPARING, WAITING, Found, verdict

PARTS = (WAITING, PREPARING, FORWARD, BACKWARD, OPTIMISER, BETWEEN)


def found(device="cpu", at_work=0.9, products=6.0, flop=3e9, peak=1e12, **milliseconds) -> Found:
    """Ten milliseconds, of which eight are learnt in."""
    spent = dict(zip(PARTS, (0.5, 0.5, 3.0, 4.0, 1.0, 1.0), strict=True)) | milliseconds
    operators = (Operator("aten::mm", 3, 6.0), Operator("aten::gelu", 1, 1.0))
    return Found(device, "fp32", 100.0, spent, at_work, flop, peak, products, 2**30, operators)


@pytest.mark.parametrize(
    ("measured", "said"),
    [
        (found(), "bound by compute: 80% of the time in forward, backward and optimiser, 75% of that in matrix "
                  "products at 50% of what this machine multiplies (1,000 GFLOP/s in fp32), most of the rest in "
                  "aten::gelu"),
        (found(**{WAITING: 10.0}), "bound by data loading: 51% of the time: raise --workers"),
        (found(**{PREPARING: 10.0}), "bound by preparing images: 51% of the time: "),
        (found(**{BETWEEN: 10.0}), "bound by what lies between steps: 53% of the time: validate, keep and log less"),
        (found(at_work=0.3), "bound by starting many small operators: for 70% of forward, backward and"),
        (found("cuda", at_work=0.3), "optimiser the GPU has nothing to do: raise --batch-size"),
        (found("cuda", at_work=0.95, **{WAITING: 10.0}), "bound by compute: "),  # it waits while the GPU is at work
        (found("cuda", at_work=0.4, **{WAITING: 10.0}), "bound by data loading: "),
    ],
)  # fmt: skip
def test_what_bounds_a_run(measured: Found, said: str):
    assert said in verdict(measured)


@pytest.mark.parametrize("steps", [4, 5, 9, 17, 42, 43, 1000])
def test_a_short_run_is_measured_on_fewer_steps(steps: int):
    plan = profile.planned(steps)
    assert len(plan) <= steps
    assert set(plan) == {"warm", "free", "parts", "traced"}
    assert plan == sorted(plan, key=("warm", "free", "parts", "traced").index)


def test_a_run_that_is_too_short_says_so(train, caplog):
    train(epochs=1, batch_size=20, profile=True)
    assert caplog.messages == ["--profile needs a run of 4 steps at least; this one has 3"]


def test_slow_loading_is_what_bounds_a_run(make_task, images, tmp_path: Path, caplog):
    class Slow(list):
        def __iter__(self):
            for item in super().__iter__():
                time.sleep(0.05)
                yield item

    batches = Slow([(images[0].images[:8], images[0].labels[:8])] * 10)
    config = TrainConfig(epochs=1, device="cpu", profile=True, entropy_floor=0)
    fit(make_task(), batches, None, config, out=tmp_path)
    (message,) = [m for m in caplog.messages if m.startswith("--profile")]
    assert message.startswith("--profile: bound by data loading: ")
    written = json.loads((tmp_path / "profile.json").read_text())
    assert message.endswith(written["verdict"])
    assert 50 <= written["milliseconds"][WAITING] < 70
    assert written["images_per_second"] < 8 / 0.05
    table = (tmp_path / "profile.md").read_text()
    assert table.startswith("bound by data loading: ") and all(f"| {part} | " in table for part in PARTS)
    with gzip.open(tmp_path / "profile_trace.json.gz", "rt") as file:
        names = {event["name"] for event in json.load(file)["traceEvents"]}
    assert {"aten::addmm", "aten::mm", "learning"} <= names


def test_products_are_what_bound_a_large_network(images, tmp_path: Path, caplog):
    """FLOPs of linear layers: 2 · 3 (forward, backward by input and by weight) · rows · weights."""
    torch.manual_seed(0)
    model = build_model("vit_tiny", img_size=32, patch_size=8, embed_dim=384, depth=4, num_heads=6, num_classes=3)
    pixels = torch.randint(0, 255, (16, 3, 32, 32), dtype=torch.uint8)
    batches = [(pixels, torch.arange(16) % 3)] * 9
    config = TrainConfig(epochs=1, device="cpu", profile=True, entropy_floor=0)
    fit(Classify(model), batches, None, config, out=tmp_path)
    assert "--profile: bound by compute: " in caplog.text
    written = json.loads((tmp_path / "profile.json").read_text())
    weights = sum(p.numel() for name, p in model.named_parameters() if name.startswith("blocks") and p.ndim == 2)
    layers = 6 * 16 * 17 * weights
    assert 0.8 * layers < written["flop"] < layers  # the last layer makes the class token alone
    assert written["products"] < sum(written["milliseconds"][part] for part in (FORWARD, BACKWARD, OPTIMISER))
    assert written["operators"][0][0] in ("aten::mm", "aten::addmm")
    assert written["peak"] > 1e9 and written["memory"] > 2**27


def test_a_run_that_is_measured_learns_the_same(train, make_task, fingerprint, tmp_path: Path):
    """Over the ends of epochs, where validation comes between two steps that are measured."""
    plain, measured = make_task(), make_task()
    history = train(plain, epochs=4, drop_path=0.1, ema=0.9)
    also = train(measured, epochs=4, drop_path=0.1, ema=0.9, profile=True, out=tmp_path)
    assert (tmp_path / "profile.md").is_file()
    assert history["train_loss"] == also["train_loss"]
    again = make_task()
    train(again, epochs=4, drop_path=0.1, ema=0.9, out=tmp_path / "plain")
    assert fingerprint(again) == fingerprint(measured)


def test_validation_is_no_part_of_a_step(train, monkeypatch, tmp_path: Path):
    """Eight steps an epoch, and a validation of a fifth of a second after each, of which nothing is traced."""
    traced = []

    def validates(self: engine.TaskModule) -> None:
        traced.append(torch.autograd._profiler_enabled())
        self.metrics.reset()
        time.sleep(0.2)

    monkeypatch.setattr(engine.TaskModule, "on_validation_epoch_start", validates)
    train(epochs=3, profile=True, out=tmp_path, entropy_floor=0)
    assert json.loads((tmp_path / "profile.json").read_text())["milliseconds"][BETWEEN] < 20
    monkeypatch.setattr(profile, "planned", lambda steps: ["parts"] + ["traced"] * steps)
    train(epochs=2, profile=True, entropy_floor=0)
    assert traced == [False] * 5


def test_what_cannot_be_written_ends_no_training(train, tmp_path: Path, caplog):
    (tmp_path / "profile.md").mkdir()
    assert len(train(epochs=2, profile=True, out=tmp_path)) == 2
    assert "--profile cannot be taken (" in caplog.text and "training goes on without it" in caplog.text


def test_measuring_that_is_broken_off_leaves_nothing_behind(train, monkeypatch):
    """A step that fails while operators are traced: afterwards nobody traces them."""
    monkeypatch.setattr(profile, "planned", lambda steps: ["traced"] * 9)

    def fails(number: int) -> None:
        if number == 3:
            raise RuntimeError("no more")

    with pytest.raises(RuntimeError, match="no more"):
        train(epochs=1, profile=True, hook=fails)
    assert not torch.autograd._profiler_enabled()


@pytest.mark.parametrize(
    ("row", "options"),
    [("vit_debug", {"global_pool": "avg"}), ("resnet_debug", {}), ("swin_debug", {}), ("cait_debug", {})],
)
def test_flops_are_those_that_torch_counts(row: str, options: dict[str, Any]):
    """torch's counter hooks every module, whereupon the last layer of a network with a class token makes all tokens."""
    torch.manual_seed(0)
    model = build_model(row, num_classes=3, **options)
    images = torch.randn(2, 3, *model.preprocess.img_size)

    def learn() -> None:
        model.zero_grad()
        model(images).square().sum().backward()

    with FlopCounterMode(display=False) as counter:
        learn()
    with torch_profile(activities=[ProfilerActivity.CPU], record_shapes=True) as trace, record_function("learning"):
        learn()
    assert operators_of([trace], "cpu").flop == counter.get_total_flops() > 1e6
