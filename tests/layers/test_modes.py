"""Evaluation mode for a while: of a part within a whole, within itself, and after an error."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from vitrail.layers.modes import evaluating


def network() -> nn.Sequential:
    model = nn.Sequential(nn.Sequential(nn.Dropout(), nn.Linear(2, 2)), nn.Dropout())
    model[1].eval()
    return model


def modes(model: nn.Module) -> list[bool]:
    return [part.training for part in model.modules()]


def test_every_mode_comes_back_and_gradients_too():
    model = network()
    before = modes(model)
    with pytest.raises(KeyError), evaluating(model):
        assert not any(modes(model)) and not torch.is_grad_enabled()
        raise KeyError
    assert modes(model) == before == [True, True, True, True, False]
    assert torch.is_grad_enabled()


def test_the_last_to_leave_restores():
    """A part is held by itself and with the whole; they end in the order in which they began."""
    model = network()
    before = modes(model)
    whole, part = evaluating(model), evaluating(model[0])
    whole.__enter__()
    part.__enter__()
    whole.__exit__(None, None, None)
    assert modes(model) == [True, False, False, False, False]
    part.__exit__(None, None, None)
    assert modes(model) == before
    torch.set_grad_enabled(True)  # left off by ending in this order, which one thread never does


@pytest.mark.parametrize("whole", [True, False])
def test_compiled_modules_get_their_mode_back(whole):
    """The wrapper shows the mode of what it wraps, which is switched with it."""
    model = network()
    if whole:
        model = torch.compile(model, backend="eager")
    else:
        model[0] = torch.compile(model[0], backend="eager")
    before = modes(model)
    with evaluating(model):
        assert not any(modes(model))
    assert modes(model) == before
    assert before[0]


def test_what_was_added_meanwhile_keeps_its_mode():
    model = network()
    with evaluating(model):
        model.append(nn.Dropout())
    assert modes(model)[-1]
