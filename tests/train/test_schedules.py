"""Every schedule beside torch's own, and in closed form; its lengths in epochs and in steps."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
import torch
from torch.optim import lr_scheduler

from vitrail.train.optim import OptimConfig
from vitrail.train.schedules import SCHEDULES, USUAL_EPOCHS, Plan, rate

PEAK, LEAST = 1e-3, 1e-5


def planned(schedule, total=100, warmup=10, **more):
    return Plan(schedule, total, warmup, PEAK, LEAST, **more)


def torch_rates(make, count, **options):
    """The rate of every step as a scheduler of torch's sets it, that of its beginning first."""
    optimizer = torch.optim.SGD([torch.zeros(1)], lr=PEAK)
    scheduler = make(optimizer, **options)
    rates = []
    for _ in range(count):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    return rates


@pytest.mark.parametrize("schedule", sorted(SCHEDULES))
def test_warmup_is_linear(schedule):
    plan = planned(schedule, decay=30, restart=20)
    assert [rate(step, plan) for step in range(10)] == pytest.approx([PEAK * n / 10 for n in range(1, 11)])


@pytest.mark.parametrize(
    ("step", "share"), [(9, 1.0), (54, 0.5), (99, 0.0), (24, (1 + math.cos(math.pi / 6)) / 2), (150, 0.0)]
)
def test_cosine_falls_to_the_least(step, share):
    assert rate(step, planned("cosine")) == pytest.approx(LEAST + (PEAK - LEAST) * share)


def test_every_step_of_cosine_after_the_warmup_is_lower():
    rates = [rate(step, planned("cosine")) for step in range(9, 100)]
    assert rates == sorted(set(rates), reverse=True)


def test_without_warmup_and_with_nothing_else():
    assert rate(0, planned("cosine", total=2, warmup=0)) == pytest.approx((PEAK + LEAST) / 2)
    assert rate(0, planned("cosine", total=1, warmup=0)) == pytest.approx(LEAST)
    assert rate(3, planned("cosine", total=4, warmup=4)) == pytest.approx(PEAK)


def test_cosine_is_torchs_a_step_on():
    """Torch's first step has the peak, ours the warm-up's last one: the step before it."""
    theirs = torch_rates(lr_scheduler.CosineAnnealingLR, 91, T_max=90, eta_min=LEAST)
    assert [rate(step, planned("cosine")) for step in range(9, 100)] == pytest.approx(theirs)


def test_linear_is_torchs_a_step_on():
    theirs = torch_rates(lr_scheduler.LinearLR, 91, start_factor=1.0, end_factor=LEAST / PEAK, total_iters=90)
    assert [rate(step, planned("linear")) for step in range(9, 100)] == pytest.approx(theirs)
    assert rate(500, planned("linear")) == LEAST


@pytest.mark.parametrize("factor", [1, 2, 3])
def test_restarts_are_torchs_a_step_on(factor):
    """But that a cycle's last step has the least rate, where torch has begun the next cycle."""
    options = {"T_0": 10, "T_mult": factor, "eta_min": LEAST}
    theirs = torch_rates(lr_scheduler.CosineAnnealingWarmRestarts, 91, **options)
    ours = [rate(step, planned("restarts", restart=10, restart_factor=float(factor))) for step in range(9, 100)]
    ends = {1: range(10, 91, 10), 2: (10, 30, 70), 3: (10, 40)}[factor]
    assert [ours[n] for n in ends] == pytest.approx([LEAST] * len(ends))
    assert [theirs[n] for n in ends] == pytest.approx([PEAK] * len(ends))
    rest = [n for n in range(91) if n not in ends]
    assert [ours[n] for n in rest] == pytest.approx([theirs[n] for n in rest])


def test_one_cycle_is_cosine_and_a_factor_need_not_be_whole():
    one = planned("restarts", restart=90)
    assert [rate(step, one) for step in range(100)] == [rate(step, planned("cosine")) for step in range(100)]
    bent = planned("restarts", restart=10, restart_factor=1.5)
    rates = [rate(step, bent) for step in range(10, 100)]
    rises = [n + 1 for n, (one, next_one) in enumerate(pairwise(rates)) if next_one > one]
    assert rises == [10, 25, 47, 81]  # 10, 25, 47.5 and 81.25 steps after the warm-up


@pytest.mark.parametrize("warmup", [0, 10])
def test_step_is_torchs(warmup):
    theirs = torch_rates(lr_scheduler.StepLR, 100, step_size=30, gamma=0.5)
    plan = planned("step", warmup=warmup, decay=30, decay_rate=0.5)
    assert [rate(step, plan) for step in range(warmup, 100)] == pytest.approx(theirs[warmup:])
    assert rate(10_000, plan) == LEAST


def test_constant_is_constant():
    assert {rate(step, planned("constant")) for step in range(9, 200)} == {PEAK}


@pytest.mark.parametrize("schedule", ["cosine", "linear", "constant"])
def test_what_need_not_jump_does_not(schedule):
    """No step is further from the one before than those of the warm-up, or of a cosine's middle."""
    rates = [rate(step, planned(schedule)) for step in range(120)]
    assert max(abs(b - a) for a, b in pairwise(rates)) <= PEAK / 10 + 1e-12


# ---- lengths


@pytest.mark.parametrize(("epochs", "warmup", "steps"), [(100, 5, 50), (3, 5, 15), (10, 0.25, 2), (10, 0, 0)])
def test_warmup_never_takes_more_than_half(epochs, warmup, steps):
    assert OptimConfig(epochs=epochs, warmup_epochs=warmup).plan(10).warmup == steps
    assert OptimConfig(epochs=epochs, warmup_steps=round(warmup * 10)).plan(10).warmup == steps


@pytest.mark.parametrize("what", sorted(USUAL_EPOCHS))
def test_lengths_in_epochs_and_in_steps(what):
    own = USUAL_EPOCHS[what]
    assert getattr(OptimConfig().plan(7), what) == own * 7
    assert getattr(OptimConfig(**{f"{what}_epochs": 2.0}).plan(7), what) == 14
    assert getattr(OptimConfig(**{f"{what}_steps": 9}).plan(7), what) == 9
    assert OptimConfig().settled()[f"{what}_epochs"] == own
    assert OptimConfig(**{f"{what}_steps": 9}).settled()[f"{what}_epochs"] is None


def test_a_length_below_a_step_is_one_step():
    plan = OptimConfig(decay_epochs=0.01, restart_epochs=0.01).plan(7)
    assert (plan.decay, plan.restart) == (1, 1)


def test_the_plan_says_what_the_config_says():
    config = OptimConfig(
        epochs=3, schedule="step", lr=0.5, min_lr=0.25, decay_rate=0.75, restart_factor=2.0, decay_steps=4
    )
    assert config.plan(10) == Plan("step", 30, 15, 0.5, 0.25, 4, 0.75, 100, 2.0)
    assert (OptimConfig().plan(1).schedule, OptimConfig(optimizer="schedule_free").plan(1).schedule) == (
        "cosine", "constant",
    )  # fmt: skip


@pytest.mark.parametrize("what", sorted(USUAL_EPOCHS))
def test_one_length_in_two_units_is_refused(what):
    message = rf"--{what}-epochs and --{what}-steps are one length in two units; got 3.0 and 100: drop one, or set it"
    with pytest.raises(ValueError, match=message):
        OptimConfig(**{f"{what}_epochs": 3.0, f"{what}_steps": 100})


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("epochs", 0, "--epochs must be at least 1; got 0"),
        ("schedule", "cosin", "--schedule must be one of auto, cosine, .*; got 'cosin': did you mean cosine?"),
        ("warmup_epochs", -1, "--warmup-epochs must be 0 or more; got -1"),
        ("warmup_epochs", math.nan, "--warmup-epochs must be 0 or more; got nan"),
        ("warmup_steps", -1, "--warmup-steps must be 0 or more; got -1"),
        ("decay_epochs", 0, "--decay-epochs must be above 0; got 0"),
        ("decay_steps", 0, "--decay-steps must be at least 1; got 0"),
        ("decay_rate", 0, r"--decay-rate must lie in \(0, 1\]; got 0"),
        ("restart_epochs", math.inf, "--restart-epochs must be above 0; got inf"),
        ("restart_steps", 0, "--restart-steps must be at least 1; got 0"),
        ("restart_factor", 0.5, "--restart-factor must be at least 1; got 0.5"),
    ],
)
def test_ranges(field, value, message):
    with pytest.raises(ValueError, match=message):
        OptimConfig(**{field: value})
