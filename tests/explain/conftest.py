"""What the tests of explanations share: a small network, and attention that no network made."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor
from torch.overrides import _get_current_function_mode_stack

from vitrail.explain.record import AttentionMap
from vitrail.layers.attention import Attention, Layout
from vitrail.models.vit import VisionTransformer


def _stance() -> str:
    from torch._dynamo import eval_frame

    return eval_frame._stance.stance


@pytest.fixture(autouse=True)
def stance() -> Iterator[Callable[[], str]]:
    """Which stance the compiler has. After every test: none is held, and no mode on the stack."""
    yield _stance
    assert _get_current_function_mode_stack() == []
    assert _stance() == "default"


@pytest.fixture
def small_vit() -> Callable[..., VisionTransformer]:
    """fields of the config -> a network of three layers and heads, 4 x 4 tokens, no weight near 0."""

    def make(**fields: object) -> VisionTransformer:
        shape = {"img_size": 32, "patch_size": 8, "embed_dim": 24, "depth": 3, "num_heads": 3, "num_classes": 5}
        model = VisionTransformer(**(shape | fields)).eval()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.normal_(std=0.3)
        return model

    return make


@pytest.fixture
def images() -> Tensor:
    return torch.randn(2, 3, 32, 32)


@pytest.fixture
def expected_maps() -> Callable[[VisionTransformer, Tensor], list[Tensor]]:
    """The attention of every block by hand: softmax(q kᵀ / sqrt(D)) from the block's own input, in float64."""

    def find(model: VisionTransformer, images: Tensor) -> list[Tensor]:
        inputs: list[Tensor] = []
        hooks = [b.attn.register_forward_pre_hook(lambda _, args: inputs.append(args[0])) for b in model.blocks]
        with torch.no_grad():
            model(images)
        for hook in hooks:
            hook.remove()
        return [_softmax_of(block.attn, x) for block, x in zip(model.blocks, inputs, strict=True)]

    return find


def _softmax_of(attn: Attention, x: Tensor) -> Tensor:
    qkv = x.double() @ attn.qkv.weight.double().T + attn.qkv.bias.double()
    batch, tokens, width = x.shape
    q, k, _ = qkv.reshape(batch, tokens, 3, attn.num_heads, -1).permute(2, 0, 3, 1, 4)
    scores = q @ k.transpose(-2, -1) / (width / attn.num_heads) ** 0.5
    return (scores.exp() / scores.exp().sum(-1, keepdim=True)).detach()


def _random_weights(*shape: int) -> Tensor:
    return torch.randn(*shape).mul(2).softmax(-1)


@pytest.fixture
def random_weights() -> Callable[..., Tensor]:
    """a shape -> attention whose rows sum to 1."""
    return _random_weights


@pytest.fixture
def chain() -> Callable[..., list[AttentionMap]]:
    """Maps of layers that follow each other, of two images."""

    def make(
        depth: int = 3,
        prefix: int = 1,
        grid: tuple[int, int] = (2, 3),
        heads: int = 2,
        readout: tuple[int, ...] | None = None,
    ) -> list[AttentionMap]:
        count = prefix + grid[0] * grid[1]
        layout = Layout(grid, prefix, readout=readout)
        return [AttentionMap(_random_weights(2, heads, count, count), layout, n + 1) for n in range(depth)]

    return make
