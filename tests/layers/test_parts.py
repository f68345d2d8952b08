"""A wide layer in parts: the same function as all at once, taken where nobody wants what lies between."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from vitrail.layers import parts
from vitrail.layers.parts import by_parts

WIDE = 8


class Wide(nn.Module):
    """(n, …, 3) -> (n, …, 3), remembering how many it was given at a time."""

    def __init__(self) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(3, WIDE), nn.Linear(WIDE, 3)
        self.given: list[int] = []
        self.eval()

    def forward(self, x: Tensor, *more: Tensor | None) -> Tensor:
        return by_parts(self, self._forward, x, *more, wide=WIDE)

    def _forward(self, x: Tensor, *more: Tensor | None) -> Tensor:
        self.given.append(len(x))
        return sum((tensor for tensor in more if tensor is not None), self.wide(x))

    def wide(self, x: Tensor) -> Tensor:
        return self.fc2(self.fc1(x).relu())


@pytest.fixture
def layer(monkeypatch: pytest.MonkeyPatch) -> Wide:
    """A layer that is parted from 12 tokens on."""
    monkeypatch.setattr(parts, "WIDE", 12 * WIDE)
    monkeypatch.setattr(parts, "TOKENS", 1)
    return Wide()


@torch.no_grad()
@pytest.mark.parametrize(
    ("shape", "given"),
    [
        ((3,), [3]),
        ((30, 3), [10, 10, 10]),
        ((12, 3), [12]),
        ((13, 3), [7, 6]),
        ((5, 6, 3), [2, 2, 1]),
        ((5, 2, 3, 3), [2, 2, 1]),
        ((2, 40, 3), [1, 1]),
        ((30, 0, 3), [10, 10, 10]),
        ((0, 6, 3), [0]),
    ],
)
def test_parts_are_the_whole(shape: tuple[int, ...], given: list[int], layer: Wide) -> None:
    x = torch.randn(shape)
    torch.testing.assert_close(layer(x), layer._forward(x), atol=1e-6, rtol=1e-6)
    assert layer.given[:-1] == given


@torch.no_grad()
def test_a_vector_is_not_cut_across(layer: Wide, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parts, "WIDE", 2 * WIDE)
    assert layer(torch.randn(3)).shape == (3,)
    assert layer.given == [3]


@torch.no_grad()
def test_parts_are_of_no_fewer_tokens_than_pay(layer: Wide, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parts, "TOKENS", 20)
    layer(torch.randn(30, 3)), layer(torch.randn(5, 6, 3))
    assert layer.given == [15, 15, 3, 2]


@torch.no_grad()
def test_what_belongs_to_each_is_parted_alike_and_what_is_not_there_stays_away(layer: Wide) -> None:
    x, other = torch.randn(5, 6, 3), torch.randn(5, 1, 1)
    torch.testing.assert_close(layer(x, None, other), layer._forward(x, None, other), atol=1e-6, rtol=1e-6)
    assert layer.given == [2, 2, 1, 5]


def test_gradients_are_of_the_whole(layer: Wide) -> None:
    layer(torch.randn(30, 3)).sum().backward()
    assert layer.given == [30]


@torch.no_grad()
@pytest.mark.parametrize("what", ["training", "a part in training", "hook", "counter", "autocast", "vmap"])
def test_whoever_looks_or_draws_has_the_whole(what: str, layer: Wide) -> None:
    x = torch.randn(5, 6, 3)
    if what == "training":
        layer.train()(x)
    elif what == "a part in training":  # dropout that is left on, to see how sure a network is
        layer.fc1.train()
        layer(x)
    elif what == "hook":
        shapes: list[Any] = []
        layer.fc1.register_forward_hook(lambda module, given, made: shapes.append(made.shape))
        layer(x)
        assert shapes == [(5, 6, WIDE)]
    elif what == "counter":
        with FlopCounterMode(display=False):
            layer(x)
    elif what == "autocast":
        with torch.autocast("cpu", torch.bfloat16):
            layer(x)
    else:
        torch.vmap(layer)(x[None])
    assert layer.given == [5]


class Forgetful(Wide):
    """Such a layer that an export may trace."""

    def forward(self, x: Tensor) -> Tensor:
        return by_parts(self, self.wide, x, wide=WIDE)


@torch.no_grad()
@pytest.mark.usefixtures("layer")
def test_an_export_takes_any_number_of_images() -> None:
    layer, x = Forgetful(), torch.randn(40, 6, 3)
    program = torch.export.export(layer, (x[:5],), dynamic_shapes=({0: torch.export.Dim("images", min=2, max=64)},))
    torch.testing.assert_close(program.module()(x), layer.wide(x), atol=1e-6, rtol=1e-6)
