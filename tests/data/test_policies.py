"""Policies: the published tables, the range of what is drawn, and operations applied by group."""

from __future__ import annotations

import pytest
import torch
from torchvision.transforms import v2

from vitrail.data.operations import COLOURS, NAMES, SHAPES, SIGNED
from vitrail.data.policies import (
    CIFAR10,
    IMAGENET,
    POLICIES,
    Drawn,
    apply_operations,
    draw_rand,
    draw_trivial,
    level_ranges,
    parse_policy,
)

SPELLED = {"translatex": "translate_x", "translatey": "translate_y", "shearx": "shear_x", "sheary": "shear_y"}


@pytest.mark.parametrize(("text", "name"), [(CIFAR10, "cifar10"), (IMAGENET, "imagenet")])
def test_tables_are_the_published_ones(text, name):
    policy = parse_policy(text)
    theirs = v2.AutoAugment(v2.AutoAugmentPolicy(name))._policies
    ours = []
    for ops, chances, magnitudes in zip(*(part.tolist() for part in policy), strict=True):
        ours.append([(NAMES[o], round(c, 1), round(m * 9)) for o, c, m in zip(ops, chances, magnitudes, strict=True)])
    spelled = {"color": "colour", **SPELLED}
    assert ours == [[(spelled.get(n.lower(), n.lower()), c, m or 0) for n, c, m in row] for row in theirs]


@pytest.mark.parametrize(("wide", "their_class"), [(False, v2.RandAugment), (True, v2.TrivialAugmentWide)])
def test_ranges_are_the_published_ones(wide, their_class):
    ranges = level_ranges(40, 60, wide=wide)
    for name, (make, signed) in their_class._AUGMENTATION_SPACE.items():
        ours = {"color": "colour", **SPELLED}.get(name.lower(), name.lower())
        assert (ours in SIGNED) == signed
        levels = make(31, 40, 60)
        if levels is not None:
            assert ranges[ours] == pytest.approx((float(levels[0]), float(levels[-1])), abs=1e-5)


@pytest.mark.parametrize(
    "policy",
    [
        *POLICIES.values(),
        lambda *size: draw_rand(*size, ops=3, magnitude=30),
        lambda *size: draw_rand(*size, ops=3, magnitude=27, std=6, chance=0.8),
    ],
)
def test_levels_stay_in_range(policy):
    drawn = policy(400, 32, 32)
    limits = {name: (-high, high) if name in SIGNED else (min(low, high), max(low, high))
              for name, (low, high) in level_ranges(32, 32, wide=policy is draw_trivial).items()}  # fmt: skip
    for op, level in zip(drawn.op.flatten().tolist(), drawn.level.flatten().tolist(), strict=True):
        low, high = limits.get(NAMES[op], (0, 0))
        assert low - 1e-5 <= level <= high + 1e-5
    assert len(drawn.op.unique()) > 5


def rotations(**settings):
    """Strengths, 0 … 30, of the rotations that many images get."""
    torch.manual_seed(0)
    drawn = draw_rand(20_000, 32, 32, **settings)
    return drawn.level[drawn.op == NAMES.index("rotate")].abs()


def test_rand_may_draw_its_strength():
    """A rotation by 30 degrees is strength 30."""
    assert set(rotations(magnitude=9).tolist()) == {9.0}
    drawn = rotations(magnitude=9, std=1.5)
    assert (drawn.mean().item(), drawn.std().item()) == pytest.approx((9, 1.5), abs=0.1)
    strong = rotations(magnitude=27, std=3)
    assert strong.max() == 30 and (strong == 30).double().mean() == pytest.approx(0.159, abs=0.02)
    assert rotations(magnitude=0, std=1).min() == 0
    assert torch.equal(drawn, rotations(magnitude=9, std=1.5)), "a function of the seed"


def test_rand_may_leave_operations_out():
    torch.manual_seed(0)
    done = [
        (draw_rand(20_000, 8, 8, chance=chance).op != NAMES.index("identity")).double().mean() for chance in (1, 0.25)
    ]
    assert done[1] / done[0] == pytest.approx(0.25, abs=0.02)


def test_rand_has_its_number_and_strength():
    drawn = draw_rand(500, 32, 32, ops=3, magnitude=15)
    assert drawn.op.shape == (500, 3)
    rotations = drawn.level[drawn.op == NAMES.index("rotate")]
    assert set(rotations.tolist()) == {15.0, -15.0}
    assert NAMES.index("invert") not in drawn.op
    assert set(range(len(NAMES) - 1)) == set(drawn.op.flatten().tolist())


def test_auto_applies_each_step_with_its_probability():
    drawn = POLICIES["imagenet"](20_000, 32, 32)
    policy = parse_policy(IMAGENET)
    expected = float((policy.chance * (policy.op == NAMES.index("equalize"))).sum() / len(policy.op))
    assert float((drawn.op == NAMES.index("equalize")).sum() / 20_000) == pytest.approx(expected, rel=0.05)


def test_groups_equal_one_image_at_a_time():
    images, fill = torch.rand(24, 3, 12, 12), torch.tensor([0.4, 0.5, 0.6])
    drawn = draw_rand(24, 12, 12, ops=3, magnitude=20)
    together = apply_operations(images, drawn, fill)
    alone = [
        apply_operations(images[i : i + 1], Drawn(drawn.op[i : i + 1], drawn.level[i : i + 1]), fill) for i in range(24)
    ]
    torch.testing.assert_close(together, torch.cat(alone), atol=1e-6, rtol=0)


def test_shapes_follow_one_another_in_slot_order():
    images, fill = torch.rand(1, 3, 8, 8), torch.zeros(3)
    steps = {"translate_x": 2.0, "rotate": 90.0}
    move, turn = (Drawn(torch.tensor([[NAMES.index(n)]]), torch.tensor([[level]])) for n, level in steps.items())
    both = Drawn(torch.cat([move.op, turn.op], 1), torch.cat([move.level, turn.level], 1))
    expected = apply_operations(apply_operations(images, move, fill), turn, fill)
    torch.testing.assert_close(apply_operations(images, both, fill), expected)


def test_every_operation_does_something_but_identity():
    images, fill = torch.rand(1, 3, 12, 12) * 0.8, torch.full((3,), 0.5)
    levels = {"posterize": 2.0, "solarize": 0.3, "translate_x": 2.0, "translate_y": 2.0, "rotate": 20.0}
    for name in NAMES:
        drawn = Drawn(torch.tensor([[NAMES.index(name)]]), torch.tensor([[levels.get(name, 0.5)]]))
        changed = not torch.allclose(apply_operations(images, drawn, fill), images)
        assert changed == (name in SHAPES or name in COLOURS), name


def test_the_input_stays_as_it_was():
    images = torch.rand(8, 3, 12, 12)
    before = images.clone()
    apply_operations(images, draw_rand(8, 12, 12), torch.zeros(3))
    assert torch.equal(images, before)
