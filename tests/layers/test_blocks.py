"""The block is its residual equations, and each leaf its formula."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from vitrail.layers import parts
from vitrail.layers.attention import Layout
from vitrail.layers.blocks import MLPS, Block, DropPath, LayerScale, Mlp, run_block


def randomise(module: nn.Module) -> None:
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=0.3)


def test_drop_path_zeroes_whole_samples_and_keeps_the_expectation() -> None:
    layer = DropPath(0.3).train()
    x = torch.randn(1, 3, 4).expand(20_000, 3, 4)
    out = layer(x)
    dropped = (out == 0).flatten(1).all(dim=1)
    assert abs(dropped.float().mean() - 0.3) < 0.013  # 4 deviations
    assert torch.allclose(out[~dropped], x[~dropped] / 0.7)
    assert torch.allclose(out.mean(0), x[0], atol=0.06)


@pytest.mark.parametrize("layer", [DropPath(0.9).eval(), DropPath(0.0).train()])
def test_drop_path_is_the_identity_outside_training_and_at_zero(layer: DropPath) -> None:
    x = torch.randn(4, 3)
    assert layer(x) is x


def test_drop_path_says_its_rate() -> None:
    assert repr(DropPath(0.125)) == "DropPath(drop_prob=0.125)"


def test_layer_scale_is_a_factor_per_channel() -> None:
    layer = LayerScale(4, 0.1)
    assert torch.equal(layer.gamma, torch.full((4,), 0.1))
    with torch.no_grad():
        layer.gamma.copy_(torch.tensor([1.0, 2.0, 0.0, -1.0]))
    assert torch.equal(layer(torch.ones(2, 3, 4)), layer.gamma.expand(2, 3, 4))


@torch.no_grad()
@pytest.mark.parametrize(
    ("act", "formula"),
    [
        ("gelu", lambda x: x * (1 + torch.erf(x / 2**0.5)) / 2),
        ("gelu_tanh", lambda x: x * (1 + torch.tanh((2 / torch.pi) ** 0.5 * (x + 0.044715 * x**3))) / 2),
        ("relu", lambda x: x * (x > 0)),
    ],
)
def test_mlp_is_two_linear_layers_and_an_activation(act: str, formula: Callable[[Tensor], Tensor]) -> None:
    mlp = Mlp(6, 10, act=act)
    randomise(mlp)
    x = torch.randn(2, 3, 6)
    hidden = formula(x @ mlp.fc1.weight.T + mlp.fc1.bias)
    assert torch.allclose(mlp(x), hidden @ mlp.fc2.weight.T + mlp.fc2.bias, atol=1e-5)


def test_mlp_width_defaults_to_its_input() -> None:
    assert Mlp(6).fc1.out_features == 6


@torch.no_grad()
@pytest.mark.parametrize("kind", MLPS)
def test_an_mlp_takes_some_images_at_a_time(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    mlp, x = MLPS[kind](6, 10).eval(), torch.randn(5, 4, 6)
    whole, given, real = mlp(x), [], mlp.all_at_once
    monkeypatch.setattr(parts, "TOKENS", 1)
    monkeypatch.setattr(parts, "WIDE", 2 * 4 * mlp.wide)
    monkeypatch.setattr(mlp, "all_at_once", lambda x: given.append(len(x)) or real(x))
    torch.testing.assert_close(mlp(x), whole, rtol=0, atol=1e-6)
    assert given == [2, 2, 1]
    with torch.enable_grad():
        mlp(x)
    assert given == [2, 2, 1, 5]


def test_mlp_drops_in_training_only() -> None:
    mlp = Mlp(6, 10, drop=0.5)
    assert (mlp.train()(torch.randn(50, 6)) == 0).float().mean() > 0.3
    assert (mlp.eval()(torch.randn(50, 6)) == 0).sum() == 0


@torch.no_grad()
@pytest.mark.parametrize("norm", ["layernorm", "rmsnorm"])
@pytest.mark.parametrize("init_values", [None, 0.1])
def test_block_is_the_residual_equations(norm: str, init_values: float | None) -> None:
    block = Block(12, 3, mlp_ratio=2, init_values=init_values, norm=norm, drop_path=0.5).eval()
    randomise(block)
    x, bias = torch.randn(2, 5, 12), torch.randn(2, 1, 5, 5)
    scale1, scale2 = (1, 1) if init_values is None else (block.ls1.gamma, block.ls2.gamma)
    middle = x + scale1 * block.attn(block.norm1(x), bias=bias)
    truth = middle + scale2 * block.mlp(block.norm2(middle))
    assert torch.allclose(block(x, bias=bias), truth, atol=1e-5)
    assert not torch.allclose(block(x), truth, atol=1e-2)


@torch.no_grad()
def test_block_norms_are_their_formulas() -> None:
    x = torch.randn(2, 5, 12) * 3 + 1
    layer = Block(12, 3).norm1
    centred = x - x.mean(-1, keepdim=True)
    assert torch.allclose(layer(x), centred / (centred.square().mean(-1, keepdim=True) + 1e-6).sqrt(), atol=1e-5)
    rms = Block(12, 3, norm="rmsnorm").norm1
    assert torch.allclose(rms(x), x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt(), atol=1e-5)
    assert layer.eps == rms.eps == 1e-6


def test_each_branch_is_dropped_by_itself() -> None:
    """Four kinds of samples: both branches, either, none; with rate 0.5 each is a quarter."""
    block = Block(12, 3, drop_path=0.5).train()
    x = torch.randn(1, 5, 12).expand(4000, 5, 12)
    with torch.no_grad():
        kinds = (block(x) - x)[:, 0, :2].mul(1e4).round().unique(dim=0, return_counts=True)[1]
    assert len(kinds) == 4
    assert all(abs(kinds / 4000 - 0.25) < 0.03)


def test_rates_reach_their_layers() -> None:
    block = Block(12, 3, mlp_ratio=2.5, qkv_bias=False, proj_drop=0.1, attn_drop=0.2, drop_path=0.3, attn="eager")
    assert block.mlp.fc1.out_features == 30
    assert block.attn.qkv.bias is None
    assert (block.attn.proj_drop.p, block.mlp.drop.p, block.attn.attn_drop) == (0.1, 0.1, 0.2)
    assert (block.drop_path1.drop_prob, block.drop_path2.drop_prob, block.attn.attn) == (0.3, 0.3, "eager")


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (partial(DropPath, 1.0), r"drop_path_rate must lie in \[0, 1\); got 1.0"),
        (partial(DropPath, -0.1), r"drop_path_rate must lie in \[0, 1\); got -0.1"),
        (partial(Mlp, 6, act="gelo"), "act must be one of gelu, gelu_tanh, quick_gelu, relu, silu; got 'gelo'"),
        (partial(Block, 12, 3, norm="rms"), "norm must be one of layernorm, rmsnorm, batchnorm; got 'rms'"),
    ],
)
def test_wrong_pieces_say_the_rule(make: Callable[[], nn.Module], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


# ---- running a block


class Counting(nn.Module):
    """A block that counts how often it runs."""

    def __init__(self) -> None:
        super().__init__()
        self.runs, self.inner = 0, Block(12, 3)

    def forward(self, x: Tensor, **options: Any) -> Tensor:
        self.runs += 1
        return self.inner(x, **options)


@pytest.mark.parametrize(("checkpointing", "runs"), [(False, 1), (True, 2)])
def test_checkpointing_runs_a_block_again_for_the_same_gradient(checkpointing: bool, runs: int) -> None:
    block, x, bias = Counting(), torch.randn(2, 5, 12, requires_grad=True), torch.randn(5, 5)
    layout = Layout((1, 5))
    run_block(block, x, checkpointing=checkpointing, bias=bias, layout=layout).square().sum().backward()
    assert block.runs == runs
    truth = torch.autograd.grad(block.inner(x, bias=bias, layout=layout).square().sum(), x)[0]
    assert torch.allclose(x.grad, truth, atol=1e-5)


def test_nothing_is_checkpointed_without_gradients() -> None:
    block, x = Counting(), torch.randn(2, 5, 12, requires_grad=True)
    with torch.no_grad():
        assert not run_block(block, x, checkpointing=True).requires_grad
    assert block.runs == 1


def test_a_default_device_does_not_turn_checkpointing_off() -> None:
    block, x = Counting(), torch.randn(2, 5, 12, requires_grad=True)
    with torch.device("cpu"):  # a torch function mode, as any watcher is one
        run_block(block, x, checkpointing=True).sum().backward()
    assert block.runs == 2
