"""Cross-attention of one token, against PyTorch's multi-head attention."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from vitrail.layers.cross import CrossAttention, CrossAttentionBlock

X = torch.randn(2, 7, 12, generator=torch.Generator().manual_seed(0))


def by_pytorch(layer: CrossAttention, x: Tensor, hidden: Tensor | None = None) -> Tensor:
    """(B, 1, C) by `F.multi_head_attention_forward`, which knows nothing of our code."""
    parts = (layer.wq, layer.wk, layer.wv)
    biases = [part.bias if part.bias is not None else torch.zeros(12) for part in parts]
    q, k = x[:, :1].transpose(0, 1), x.transpose(0, 1)
    out, _ = F.multi_head_attention_forward(
        q, k, k, 12, layer.num_heads, torch.cat([part.weight for part in parts]), torch.cat(biases), None, None, False,
        0.0, layer.proj.weight, layer.proj.bias, key_padding_mask=hidden,
    )  # fmt: skip
    return out.transpose(0, 1)


@pytest.mark.parametrize("heads", [1, 3])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("attn", ["fused", "eager"])
@torch.no_grad()
def test_the_first_token_asks_all(heads: int, bias: bool, attn: str) -> None:
    layer = CrossAttention(12, heads, qkv_bias=bias, attn=attn)
    torch.testing.assert_close(layer(X), by_pytorch(layer, X), atol=1e-6, rtol=0)
    assert layer(X).shape == (2, 1, 12)


@torch.no_grad()
def test_hidden_keys_are_not_seen() -> None:
    layer = CrossAttention(12, 3)
    hidden = torch.zeros(2, 7, dtype=torch.bool)
    hidden[:, 5:] = True
    bias = torch.zeros(2, 1, 1, 7).masked_fill(hidden[:, None, None], float("-inf"))
    torch.testing.assert_close(layer(X, bias=bias), by_pytorch(layer, X, hidden), atol=1e-6, rtol=0)
    torch.testing.assert_close(layer(X, bias=bias), layer(X[:, :5]), atol=1e-6, rtol=0)


def test_a_width_that_does_not_divide_into_heads_is_named() -> None:
    with pytest.raises(ValueError, match="embed_dim 12 is not divisible by num_heads 5: use 4 heads or a width of 10"):
        CrossAttention(12, 5)


def test_weights_are_dropped_in_training_alone() -> None:
    layer = CrossAttention(12, 3, attn_drop=0.5)
    assert not torch.equal(layer(X), layer(X))
    assert torch.equal(layer.eval()(X), layer(X))


@torch.no_grad()
def test_the_block_adds_to_the_first_token_alone() -> None:
    block = CrossAttentionBlock(12, 3).eval()
    torch.testing.assert_close(block(X), X[:, :1] + by_pytorch(block.attn, block.norm1(X)), atol=1e-6, rtol=0)


def test_a_dropped_branch_leaves_the_token_as_it_is() -> None:
    block = CrossAttentionBlock(12, 3, drop_path=0.999).train()
    torch.manual_seed(0)
    assert torch.equal(block(X), X[:, :1])
