"""Choosing tokens, and making one vector of many."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from vitrail.layers.tokens import AttentionPool, keep_tokens, mean_tokens, padding_bias


def test_keep_tokens_counts_from_the_first_image_token_and_keeps_the_order() -> None:
    x = torch.arange(2 * 7).view(2, 7, 1)
    keep = torch.tensor([[4, 0, 2], [1, 1, 3]])
    kept = keep_tokens(x, keep, prefix=2)
    assert kept[..., 0].tolist() == [[0, 1, 6, 2, 4], [7, 8, 10, 10, 12]]


def test_keep_tokens_of_one_sequence_for_a_batch() -> None:
    x = torch.randn(1, 6, 3)
    keep = torch.tensor([[4, 0], [1, 2]])
    assert torch.equal(keep_tokens(x, keep, prefix=1), keep_tokens(x.expand(2, 6, 3), keep, prefix=1))


def test_keep_tokens_passes_gradients_to_the_kept_only() -> None:
    x = torch.randn(1, 5, 2, requires_grad=True)
    keep_tokens(x, torch.tensor([[3, 1]]), prefix=1).sum().backward()
    assert x.grad[0, :, 0].tolist() == [1, 0, 1, 0, 1]


def test_mean_of_padded_tokens_is_the_mean_of_the_rest() -> None:
    x = torch.randn(3, 5, 4)
    padding = torch.tensor([[False] * 5, [False, True, False, True, True], [True] * 5])
    found = mean_tokens(x, padding)
    assert torch.allclose(found[0], x[0].mean(0))
    assert torch.allclose(found[1], x[1, [0, 2]].mean(0))
    assert torch.equal(found[2], torch.zeros(4))  # nothing seen: no division by zero
    assert torch.allclose(mean_tokens(x), x.mean(1))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_padding_bias_hides_padded_keys_and_never_the_prefix(dtype: torch.dtype) -> None:
    padding = torch.tensor([[False, True, False], [True, True, False]])
    bias = padding_bias(padding, 2, dtype)
    assert bias.shape == (2, 1, 1, 5)
    assert bias.dtype == dtype
    hidden = float("-inf")
    assert bias[:, 0, 0].tolist() == [[0, 0, 0, hidden, 0], [0, 0, hidden, hidden, 0]]


def test_padding_bias_leaves_somebody_to_look_at() -> None:
    """A softmax over hidden keys alone would be no number."""
    padding = torch.tensor([[True, True], [True, False]])
    hidden = float("-inf")
    assert padding_bias(padding, 0, torch.float32)[:, 0, 0].tolist() == [[0, 0], [hidden, 0]]
    assert padding_bias(padding, 1, torch.float32)[:, 0, 0].tolist() == [[0, hidden, hidden], [0, hidden, 0]]


@torch.no_grad()
@pytest.mark.parametrize("norm", ["layernorm", "rmsnorm"])
def test_attention_pool_is_multihead_attention_from_one_learned_query(norm: str) -> None:
    ours, theirs = AttentionPool(24, 3, mlp_ratio=2, norm=norm).eval(), nn.MultiheadAttention(24, 3, batch_first=True)
    for parameter in ours.parameters():
        nn.init.normal_(parameter, std=0.3)
    theirs.in_proj_weight.copy_(torch.cat([ours.q.weight, ours.kv.weight]))
    theirs.in_proj_bias.copy_(torch.cat([ours.q.bias, ours.kv.bias]))
    theirs.out_proj.load_state_dict(ours.proj.state_dict())
    x, padding = torch.randn(2, 7, 24), torch.tensor([[False] * 7, [False] * 4 + [True] * 3])
    pooled = theirs(ours.latent.expand(2, 1, 24), x, x, key_padding_mask=padding)[0]
    truth = (pooled + ours.mlp(ours.norm(pooled)))[:, 0]
    assert torch.allclose(ours(x, bias=padding_bias(padding, 0, x.dtype)), truth, atol=1e-5)
    assert ours.mlp.fc1.out_features == 48


def test_attention_pool_names_a_width_that_does_not_divide_into_heads() -> None:
    with pytest.raises(ValueError, match="embed_dim 24 is not divisible by num_heads 5: use 4 heads or a width of 25"):
        AttentionPool(24, 5)
