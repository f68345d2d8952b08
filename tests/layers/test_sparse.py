"""Top-k and linear attention by the identities that define them, and what a recorder sees of them."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from vitrail.explain.maps import attention_map
from vitrail.explain.record import record_attention
from vitrail.layers.attention import Layout, attend, attention_weights
from vitrail.layers.sparse import attend_linear, attend_topk, linear_weights, topk_weights

BATCH, HEADS, QUERIES, KEYS, WIDTH = 2, 3, 6, 9, 4
HIDDEN = float("-inf")


def qkv() -> tuple[Tensor, Tensor, Tensor]:
    q, k, v = torch.randn(3, BATCH, HEADS, KEYS, WIDTH, dtype=torch.float64)
    return q[:, :, :QUERIES], k, v


def hidden_keys() -> Tensor:
    """(B, 1, 1, N): two keys of each image have no weight, others less or more."""
    bias = torch.randn(BATCH, 1, 1, KEYS, dtype=torch.float64)
    bias[0, ..., :2] = bias[1, ..., 4:6] = HIDDEN
    return bias


def close(ours: Tensor, theirs: Tensor) -> None:
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-12)


# ---- top-k


@pytest.mark.parametrize("top", [KEYS, KEYS + 5])
@pytest.mark.parametrize("options", [{}, dict(bias=hidden_keys()), dict(scale=0.2)])
def test_the_best_of_all_keys_are_all_keys(top: int, options: dict[str, Any]) -> None:
    q, k, v = qkv()
    close(attend_topk(q, k, v, top=top, **options), attend(q, k, v, **options))


@pytest.mark.parametrize("top", [1, 2, 5])
@pytest.mark.parametrize("bias", [None, hidden_keys()], ids=["no bias", "bias"])
def test_it_is_dense_attention_that_hides_the_others(top: int, bias: Tensor | None) -> None:
    q, k, v = qkv()
    scores = q @ k.transpose(-2, -1) * 0.7 + (0 if bias is None else bias)
    rank = (scores[..., None, :] > scores[..., None]).sum(-1)  # how many keys suit the query better
    dense = scores.new_zeros(()).where(rank < top, HIDDEN)
    dense = dense if bias is None else dense + bias
    close(attend_topk(q, k, v, top=top, bias=bias, scale=0.7), attend(q, k, v, bias=dense, scale=0.7))


def test_weights_are_rows_that_sum_to_one_with_so_many_numbers() -> None:
    q, k, _ = qkv()
    weights = topk_weights(q, k, top=3)
    close(weights.sum(-1), torch.ones(BATCH, HEADS, QUERIES).double())
    assert ((weights > 0).sum(-1) == 3).all()
    ties = topk_weights(torch.zeros_like(q), k, top=3)  # of keys that suit alike, no more either
    assert ((ties > 0).sum(-1) == 3).all()
    few = topk_weights(q, k, top=8, bias=hidden_keys())
    assert ((few > 0).sum(-1) == 7).all()


def test_a_gradient_reaches_the_keys_that_are_looked_at() -> None:
    q, k, v = (x.requires_grad_() for x in qkv())
    attend_topk(q, k, v, top=1).sum().backward()
    seen = topk_weights(q, k, top=1).sum(-2) > 0  # (B, H, N)
    assert torch.equal(v.grad.abs().sum(-1) > 0, seen)
    assert torch.autograd.gradcheck(partial(attend_topk, top=3), (q, k, v))


def test_weights_are_dropped_by_their_share() -> None:
    q, k = torch.zeros(1, 1, 4000, 4), torch.zeros(1, 1, 5, 4)
    out = attend_topk(q, k, torch.ones(1, 1, 5, 1), top=5, dropout=0.4)
    assert out.mean().item() == pytest.approx(1, abs=0.05) and out.std() > 0.1


@pytest.mark.parametrize("top", [0, -1])
def test_no_key_at_all_is_refused(top: int) -> None:
    with pytest.raises(ValueError, match=f"top must be at least 1 key a query; got {top}"):
        attend_topk(*qkv(), top=top)


# ---- linear


def kernel(q: Tensor, k: Tensor) -> Tensor:
    """φ(q)·φ(k) for every pair."""
    q, k = (torch.where(x > 0, x + 1, x.exp()) for x in (q, k))
    return torch.einsum("bhqd,bhnd->bhqn", q, k)


@pytest.mark.parametrize("bias", [None, hidden_keys(), hidden_keys()[0, 0, 0]], ids=["none", "each image", "all"])
def test_it_is_the_explicit_kernel_matrix(bias: Tensor | None) -> None:
    q, k, v = qkv()
    explicit = kernel(q, k) * (1 if bias is None else bias.exp())
    explicit = explicit / explicit.sum(-1, keepdim=True)
    close(linear_weights(q, k, bias=bias), explicit)
    close(attend_linear(q, k, v, bias=bias), explicit @ v)


def test_hidden_keys_are_as_if_left_out() -> None:
    q, k, v = qkv()
    bias = torch.zeros(KEYS).index_fill(0, torch.tensor([0, 1]), HIDDEN)
    close(attend_linear(q, k, v, bias=bias), attend_linear(q, k[:, :, 2:], v[:, :, 2:]))


def test_no_map_is_made() -> None:
    """One of so many tokens would take 160 GB."""
    q, k, v = torch.randn(3, 1, 1, 200_000, 2)
    assert attend_linear(q, k, v).isfinite().all()


def test_gradients_of_linear_attention() -> None:
    assert torch.autograd.gradcheck(attend_linear, tuple(x.requires_grad_() for x in qkv()))


def test_in_bf16_everything_within_is_float32() -> None:
    q, k, v = (x.bfloat16() for x in qkv())
    wide = [x.float() for x in (q, k, v)]
    out = attend_linear(q, k, v)
    assert out.dtype == torch.bfloat16 and torch.equal(out, attend_linear(*wide).bfloat16())
    with torch.autocast("cpu", torch.bfloat16):
        within = attend_linear(*wide)
    assert torch.equal(within, attend_linear(*wide))


def test_a_bias_that_tells_queries_apart_is_refused() -> None:
    with pytest.raises(ValueError, match=r"a bias must be \(…, 1, N\); got \(6, 9\)"):
        attend_linear(*qkv(), bias=torch.zeros(QUERIES, KEYS))


# ---- watching

CASES: dict[str, tuple[Callable[..., Tensor], Callable[..., Tensor]]] = {
    "top-k": (partial(attend_topk, top=3), partial(topk_weights, top=3)),
    "linear": (attend_linear, linear_weights),
}


@pytest.mark.parametrize("bias", [None, hidden_keys()], ids=["no bias", "bias"])
@pytest.mark.parametrize("case", CASES)
def test_a_recorder_sees_the_weights_that_act(case: str, bias: Tensor | None) -> None:
    attends, weighs = CASES[case]
    q, k, v = qkv()
    layout = Layout((3, 3), query_index=torch.arange(QUERIES), readout=())
    with record_attention() as record:
        out = attends(q, k, v, bias=bias, layout=layout)
    assert torch.equal(out, attends(q, k, v, bias=bias))
    (seen,) = record.maps
    close(seen.weights, weighs(q, k, bias=bias))
    close(seen.acting @ v, out)
    assert attention_map(seen).shape == (BATCH, 3, 3)
    with record_attention(heads=[2], queries=[4]) as part:
        attends(q, k, v, bias=bias)
    close(part.maps[0].weights, seen.weights[:, 2:, 4:5])


@pytest.mark.parametrize("case", CASES)
def test_recorded_maps_stand_in_the_graph(case: str) -> None:
    attends, _ = CASES[case]
    q, k, v = (x.requires_grad_() for x in qkv())
    with record_attention(grad=True) as record:
        out = attends(q, k, v)
    close(out, attends(q, k, v))
    (grad,) = torch.autograd.grad(out.sum(), record.maps[0].weights)
    close(grad, v.sum(-1)[:, :, None].expand_as(grad))


def test_a_tensor_of_its_own_class_may_answer() -> None:
    class Answer(torch.Tensor):
        @classmethod
        def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            return func if func in (attend_topk, attend_linear) else NotImplemented

    q, k, v = qkv()
    assert attend_topk(q, k, v.as_subclass(Answer), top=1) is attend_topk
    assert attend_linear(q, k, v.as_subclass(Answer)) is attend_linear


def test_softmax_attention_is_neither() -> None:
    q, k, v = qkv()
    dense = attention_weights(q, k) @ v
    assert (attend_topk(q, k, v, top=3) - dense).abs().max() > 0.01
    assert (attend_linear(q, k, v) - dense).abs().max() > 0.01
