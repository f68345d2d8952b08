"""The learning rate in closed form; which parameters decay."""

from __future__ import annotations

import math

import pytest
import torch

from vitrail.train.optim import OptimConfig, make_optimizer, warmup_cosine, warmup_steps


def rate(step, total=100, warmup=10):
    return warmup_cosine(step, total, warmup, lr=1e-3, min_lr=1e-5)


@pytest.mark.parametrize("step", range(10))
def test_warmup_is_linear(step):
    assert rate(step) == pytest.approx(1e-3 * (step + 1) / 10)


@pytest.mark.parametrize(
    ("step", "share"), [(9, 1.0), (54, 0.5), (99, 0.0), (24, (1 + math.cos(math.pi / 6)) / 2), (150, 0.0)]
)
def test_cosine_falls_to_the_least(step, share):
    assert rate(step) == pytest.approx(1e-5 + (1e-3 - 1e-5) * share)


def test_every_step_after_the_warmup_is_lower():
    rates = [rate(step) for step in range(9, 100)]
    assert rates == sorted(set(rates), reverse=True)


def test_without_warmup_and_with_nothing_else():
    assert rate(0, total=2, warmup=0) == pytest.approx((1e-3 + 1e-5) / 2)
    assert rate(0, total=1, warmup=0) == pytest.approx(1e-5)
    assert rate(3, total=4, warmup=4) == pytest.approx(1e-3)


@pytest.mark.parametrize(("epochs", "warmup", "steps"), [(100, 5, 50), (3, 5, 15), (10, 0.25, 2), (10, 0, 0)])
def test_warmup_never_takes_more_than_half(epochs, warmup, steps):
    assert warmup_steps(OptimConfig(epochs=epochs, warmup_epochs=warmup), steps_per_epoch=10) == steps


def test_the_least_rate_follows_a_small_peak_unless_it_is_said():
    assert (OptimConfig().min_lr, OptimConfig(lr=1e-7).min_lr) == (1e-6, 1e-7)
    with pytest.raises(ValueError, match=r"--min-lr must lie between 0 and --lr 1e-07; got 1e-05"):
        OptimConfig(lr=1e-7, min_lr=1e-5)


def test_decay_leaves_biases_norms_and_exempt_names_alone(make_task):
    task = make_task()
    names = {id(p): name for name, p in task.named_parameters()}
    groups = make_optimizer(task, OptimConfig(weight_decay=0.1)).param_groups
    found = {group["weight_decay"]: {names[id(p)] for p in group["params"]} for group in groups}
    assert found[0.1] | found[0.0] == set(names.values())
    assert {"backbone.cls_token", "backbone.pos_embed", "backbone.norm.weight", "backbone.head.bias"} <= found[0.0]
    assert {"backbone.head.weight", "backbone.blocks.0.attn.qkv.weight", "backbone.patch_embed.proj.weight"} <= found[
        0.1
    ]


def test_exempt_names_that_nothing_has_are_refused(make_task):
    """As they are where a wrapper renames the parameters: without them positions would decay."""
    task = make_task()
    task.backbone = torch.compile(task.backbone)
    with pytest.raises(ValueError, match=r"must name parameters of the task; got backbone\.cls_token, backbone\.pos_"):
        make_optimizer(task, OptimConfig())


def test_decay_acts_where_it_should(make_task):
    task = make_task()
    before = {name: p.detach().clone() for name, p in task.named_parameters()}
    optimizer = make_optimizer(task, OptimConfig(lr=0.1, weight_decay=0.5))
    for p in task.parameters():
        p.grad = torch.zeros_like(p)
    optimizer.step()
    after = dict(task.named_parameters())
    torch.testing.assert_close(after["backbone.head.weight"], before["backbone.head.weight"] * 0.95)
    assert torch.equal(after["backbone.pos_embed"], before["backbone.pos_embed"])


def test_frozen_parameters_are_left_out(make_task):
    task = make_task()
    task.backbone.requires_grad_(False)
    with pytest.raises(ValueError, match="got none: unfreeze its head"):
        make_optimizer(task, OptimConfig())
    task.backbone.head.requires_grad_(True)
    assert sum(len(g["params"]) for g in make_optimizer(task, OptimConfig()).param_groups) == 2


def test_fused_equals_plain(make_task):
    weights = []
    for fused in (True, False):
        task = make_task()
        optimizer = make_optimizer(task, OptimConfig(lr=0.1), fused=fused)
        assert optimizer.defaults["fused"] is fused
        for p in task.parameters():
            p.grad = torch.ones_like(p)
        optimizer.step()
        weights.append(task.backbone.head.weight)
    torch.testing.assert_close(*weights)


def test_of_a_checkpoint_only_moments_and_rates_are_taken(make_task):
    """How it steps is its own: with the decay it was made with, and the kernel that its precision needs."""
    task = make_task()
    saved = make_optimizer(task, OptimConfig(weight_decay=0.3), fused=False)
    for p in task.parameters():
        p.grad = torch.ones_like(p)
    saved.step()
    for group in saved.param_groups:
        group["lr"] = 0.125
    for fused in (True, False):
        optimizer = make_optimizer(task, OptimConfig(weight_decay=0.1), fused=fused)
        own = [{**group, "lr": 0.125} for group in optimizer.param_groups]
        optimizer.load_state_dict(saved.state_dict())
        assert all(group == was for group, was in zip(optimizer.param_groups, own, strict=True))
        assert optimizer.state[own[0]["params"][0]]["exp_avg"].any()
        optimizer.step()


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("epochs", 0, "--epochs must be at least 1; got 0"),
        ("lr", -1, "--lr must be positive; got -1"),
        ("lr", math.nan, "--lr must be positive; got nan"),
        ("min_lr", 1.0, "--min-lr must lie between 0 and --lr 0.0003; got 1.0"),
        ("weight_decay", -0.1, "--weight-decay must be 0 or more; got -0.1"),
        ("warmup_epochs", -1, "--warmup-epochs must be 0 or more; got -1"),
        ("clip_grad", math.inf, r"--clip-grad must be 0 \(off\) or more; got inf"),
        ("accumulate", 0, "--accumulate must be at least 1; got 0"),
    ],
)
def test_ranges(field, value, message):
    with pytest.raises(ValueError, match=message):
        OptimConfig(**{field: value})
