"""The running average of the weights."""

from __future__ import annotations

import pytest
import torch

from vitrail.train.ema import WeightEma, averaged


def weights(task):
    return {name: p.detach().clone() for name, p in averaged(task)}


@pytest.fixture
def started(make_task):
    task = make_task()
    ema = WeightEma(task, decay=0.5)
    ema.on_fit_start(None, None)
    return task, ema


def move(task, by=1.0):
    with torch.no_grad():
        for p in task.parameters():
            p.add_(by)


def test_the_recurrence(started):
    task, ema = started
    expected = weights(task)
    for t in range(12):
        move(task)
        ema.update()
        d = min(0.5, (1 + t) / (10 + t))
        expected = {name: d * expected[name] + (1 - d) * p.detach() for name, p in averaged(task)}
    torch.testing.assert_close(ema.averages, expected)


@pytest.mark.fault(48)
def test_before_the_first_update_nothing_is_swapped(started):
    task, ema = started
    move(task)
    before = weights(task)
    ema.on_validation_start(None, None)
    assert all(torch.equal(p, before[name]) for name, p in averaged(task))
    ema.on_validation_end(None, None)
    assert all(torch.equal(p, before[name]) for name, p in averaged(task))


def test_validation_sees_the_averages_and_training_the_weights(started):
    task, ema = started
    move(task)
    ema.update()
    raw, mean = weights(task), {name: a.clone() for name, a in ema.averages.items()}
    ema.on_validation_start(None, None)
    torch.testing.assert_close(weights(task), mean)
    ema.on_validation_end(None, None)
    torch.testing.assert_close(weights(task), raw, rtol=0, atol=0)
    torch.testing.assert_close(ema.averages, mean, rtol=0, atol=0)


def test_an_error_in_validation_gives_the_weights_back(started):
    task, ema = started
    move(task)
    ema.update()
    raw = weights(task)
    ema.on_validation_start(None, None)
    ema.on_exception(None, None, ValueError())
    torch.testing.assert_close(weights(task), raw, rtol=0, atol=0)
    ema.on_exception(None, None, ValueError())  # outside validation, nothing to give back
    torch.testing.assert_close(weights(task), raw, rtol=0, atol=0)


def test_state_travels(started, make_task):
    task, ema = started
    move(task)
    ema.update()
    other = WeightEma(make_task(seed=1), decay=0.5)
    other.load_state_dict(ema.state_dict())
    other.on_fit_start(None, None)
    assert other.updates == 1
    torch.testing.assert_close(other.averages, ema.averages, rtol=0, atol=0)
    assert all(other.averages[name] is not ema.averages[name] for name in ema.averages)


def test_only_what_the_task_names_is_averaged(make_task):
    task = make_task()
    task.averaged_modules = lambda: [task.backbone.head, task.backbone.norm]
    assert [name for name, _ in averaged(task)] == ["0.weight", "0.bias", "1.weight", "1.bias"]
