"""What happens in one step: how gradients add up, what is clipped, in which precision, mode and randomness."""

from __future__ import annotations

import os
import signal
from dataclasses import asdict

import pytest
import torch
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

from vitrail.data.loading import draw_seed
from vitrail.models.cnn import ResNet
from vitrail.records import Preprocess
from vitrail.tasks.classify import Classify
from vitrail.train import engine, finite, machine
from vitrail.train.config import TrainConfig
from vitrail.train.engine import Interrupted, fit
from vitrail.weights.load import load_model


def same_batches(count, size=8):
    generator = torch.Generator().manual_seed(1)
    batch = torch.randn(size, 3, 8, 8, generator=generator), torch.arange(size) % 3
    return [batch] * count


@pytest.fixture
def norms(monkeypatch):
    """The norm of the gradient before each clipping, and what it was to be clipped to."""
    seen, clip = [], finite.clip_grads_with_norm_

    def watched(parameters, limit, norm):
        seen.append((norm.item(), limit))
        clip(parameters, limit, norm)

    monkeypatch.setattr(finite, "clip_grads_with_norm_", watched)
    return seen


@pytest.mark.parametrize("accumulate", [1, 2, 3, 4, 9])
def test_batches_left_over_at_an_epochs_end_are_averaged_among_themselves(accumulate, make_task, norms):
    """Seven equal batches have one gradient, however many of them make a step."""
    config = TrainConfig(epochs=2, lr=1e-12, min_lr=0, clip_grad=1e6, accumulate=accumulate, device="cpu")
    fit(make_task(), same_batches(7), None, config)
    steps = 2 * -(-7 // accumulate)
    assert [norm for norm, _ in norms] == pytest.approx([norms[0][0]] * steps, rel=1e-4)
    alone = make_task()
    alone(alone.prepare(same_batches(1)[0]))["loss"].backward()
    whole = torch.stack([p.grad.norm() for p in alone.parameters()]).norm().item()
    assert norms[0] == (pytest.approx(whole, rel=1e-4), 1e6)


def test_the_loss_that_is_told_is_not_scaled(make_task):
    histories = [
        fit(make_task(), same_batches(3), None, TrainConfig(epochs=1, lr=1e-12, min_lr=0, accumulate=n, device="cpu"))
        for n in (1, 2)
    ]
    assert histories[0]["train_loss"] == pytest.approx(histories[1]["train_loss"])


@pytest.mark.parametrize(("precision", "kind"), [("fp32", None), ("bf16", torch.bfloat16)])
def test_the_precision_is_that_of_the_forward_pass(precision, kind, make_task):
    task, seen = make_task(), set()
    task.backbone.blocks[0].attn.qkv.register_forward_hook(lambda *args: seen.add(args[2].dtype))
    loader = same_batches(1)
    fit(task, loader, loader, TrainConfig(epochs=1, precision=precision, device="cpu"))
    assert seen == {kind or torch.float32}
    assert all(p.dtype == torch.float32 for p in task.parameters())


def test_debug_takes_a_few_batches_of_validation_too(make_task):
    task, seen = make_task(), []
    update = task.update
    task.update = lambda metrics, batch: (seen.append(len(seen)), update(metrics, batch))
    fit(task, same_batches(9), same_batches(9), TrainConfig(epochs=1, debug=True, device="cpu"))
    assert len(seen) == machine.DEBUG_BATCHES


@pytest.mark.fault(30)
def test_labels_are_looked_at_before_they_go_to_the_device(make_task, monkeypatch):
    task, order = make_task(), []
    check, move = task.check, engine.to_device
    task.check = lambda batch: (order.append("check"), check(batch))
    monkeypatch.setattr(engine, "to_device", lambda *args: (order.append("move"), move(*args))[1])
    fit(task, same_batches(1), None, TrainConfig(epochs=1, device="cpu"))
    assert order[:2] == ["check", "move"]


def test_every_process_draws_for_itself(make_task, monkeypatch):
    drawn = []
    monkeypatch.setattr(engine, "draw_seed", lambda *args: drawn.append(args) or draw_seed(*args))
    monkeypatch.setattr(engine.TaskModule, "global_rank", property(lambda self: 5))
    fit(make_task(), same_batches(2), None, TrainConfig(epochs=1, seed=3, device="cpu"))
    assert drawn == [(3, 0, 5), (3, 1, 5)]


def test_a_groups_own_scale_of_the_learning_rate(make_task, monkeypatch):
    plain, made = engine.make_optimizer, []

    def layered(*args, **options):
        optimizer = plain(*args, **options)
        optimizer.param_groups[1]["lr_scale"] = 0.25
        made.append(optimizer)
        return optimizer

    monkeypatch.setattr(engine, "make_optimizer", layered)
    history = fit(make_task(), same_batches(3), None, TrainConfig(epochs=1, lr=1e-2, device="cpu"))
    rates = [group["lr"] for group in made[-1].param_groups]
    assert rates == pytest.approx([history["lr"][-1], history["lr"][-1] / 4])


def test_frozen_norms_keep_their_means(images):
    """Frozen and in evaluation mode stays so; frozen alone, or evaluating alone, does not."""
    task = Classify(ResNet(embed_dim=8, stem="small", img_size=8, num_classes=3).eval())
    still, moving = task.backbone.bn1, task.backbone.layer1[0].bn1
    still.requires_grad_(False)
    moving.requires_grad_(False).train()
    modes = []
    task.backbone.conv1.register_forward_hook(lambda *_: modes.append((still.training, task.backbone.fc.training)))
    before = still.running_mean.clone(), moving.running_mean.clone()
    fit(task, same_batches(2), None, TrainConfig(epochs=1, device="cpu", entropy_floor=0))
    assert set(modes) == {(False, True)}
    assert torch.equal(still.running_mean, before[0])
    assert not torch.equal(moving.running_mean, before[1])


def test_the_global_generator_is_left_as_it_was(train, make_task):
    task = make_task()
    torch.manual_seed(12)
    expected = torch.rand(3)
    torch.manual_seed(12)
    train(task, epochs=1, hook=lambda number: torch.rand(1))
    assert torch.equal(torch.rand(3), expected)


# ---- refused before anything is trained


def test_a_network_that_no_folder_can_hold(train, make_task, tmp_path):
    task, begun = make_task(), []
    task.backbone.head = torch.nn.Sequential(torch.nn.Linear(16, 8), torch.nn.ReLU(), torch.nn.Linear(8, 3))
    with pytest.raises(
        ValueError, match=r"as its config describes it; got head\.0\.weight, .* beside that: make heads"
    ):
        train(task, out=tmp_path / "run", hook=begun.append)
    assert not begun
    assert not (tmp_path / "run").exists()
    assert len(train(task, epochs=1)) == 1


@pytest.mark.fault(34)
def test_a_class_name_that_no_folder_can_hold(train, make_task, tmp_path):
    task, begun = make_task(), []
    task.backbone.classes = ("dark", "gr\ney", "light")
    with pytest.raises(ValueError, match=r"classes must hold no control characters; got 'gr\\ney': rename it"):
        train(task, out=tmp_path / "run", hook=begun.append)
    assert not begun


def test_a_task_says_what_is_saved_of_it(train, make_task, tmp_path):
    task, saved = make_task(), []
    plain = task.save_pretrained
    task.save_pretrained = lambda path, **training: (
        saved.append((path.name, sorted(training))) or plain(path, **training)
    )
    train(task, out=tmp_path, epochs=1)
    assert saved == [("model", ["figures", "recipe"])]


def test_compiled_blocks_are_saved_by_their_plain_names(make_task, tmp_path):
    model = make_task().backbone
    model.blocks[0] = torch.compile(model.blocks[0])
    again = load_model(model.save_pretrained(tmp_path / "m"))
    assert torch.equal(again.blocks[0].mlp.fc1.weight, model.blocks[0].mlp.fc1.weight)


def test_a_missing_part_is_named(make_task, tmp_path):
    model = make_task().backbone
    del model.blocks[1]
    with pytest.raises(ValueError, match=r"got blocks\.1\.attn\.proj\.bias, .* missing from that"):
        model.save_pretrained(tmp_path / "m")
    assert asdict(model.config)["depth"] == 2


@pytest.mark.parametrize("name", ["WORLD_SIZE", "SLURM_STEP_NUM_TASKS"])
def test_processes_that_would_each_train_alone_are_refused(name, train, monkeypatch, tmp_path):
    monkeypatch.setenv(name, "2")
    with pytest.raises(ValueError, match=rf"must be the number of processes .*; got 1 where {name} is 2: give --dev"):
        train(out=tmp_path)
    machine.machine(TrainConfig(device="cpu", devices=2))
    monkeypatch.setenv(name, "1")
    machine.machine(TrainConfig(device="cpu"))


class Stream(IterableDataset):
    def __iter__(self):
        return iter(same_batches(2))


def test_loaders_without_batches_or_a_length(make_task):
    config, rows = TrainConfig(epochs=1, device="cpu"), same_batches(1)
    for what, loaders in {"training": (DataLoader(Stream()), None), "validation": (rows, DataLoader(Stream()))}.items():
        with pytest.raises(ValueError, match=rf"{what} needs a loader that knows its number of batches; got a DataLo"):
            fit(make_task(), *loaders, config)
    for what, loaders in {"training": ([], None), "validation": (rows, [])}.items():
        with pytest.raises(ValueError, match=f"{what} needs at least one batch; the loader has none: add images"):
            fit(make_task(), *loaders, config)


def test_a_wrapped_backbone_is_refused(make_task):
    with pytest.raises(TypeError, match=r"networks as it is; got OptimizedModule: to compile it, compile its blocks"):
        Classify(torch.compile(make_task().backbone))


def test_a_loader_with_an_order_of_its_own_goes_on_where_it_stopped(images, make_task, tmp_path):
    """What was trained on in this epoch is passed over, and the rest is trained on."""
    loader, seen = DataLoader(TensorDataset(images[0].images, images[0].labels), batch_size=10), []

    def watched(batch, number, total):
        seen.append(int(batch["image"][0, 0, 0, 0]))
        if len(seen) == 3:
            os.kill(os.getpid(), signal.SIGINT)
        return Preprocess(mean=(0.5,) * 3, std=(0.25,) * 3).prepare(batch)

    config = TrainConfig(epochs=1, device="cpu")
    with pytest.raises(Interrupted):
        fit(make_task(), loader, None, config, out=tmp_path, augment=watched)
    assert len(seen) == 3
    fit(make_task(), loader, None, config, out=tmp_path, augment=watched, resume=True)
    assert seen == images[0].images[::10, 0, 0, 0].tolist()
