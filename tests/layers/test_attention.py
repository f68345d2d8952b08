"""`attend` is one function whatever the kernel, and can be watched; `Attention` is the published layer."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from vitrail.layers import attention
from vitrail.layers.attention import (
    EAGER_TOKENS,
    SDPA_QUERIES,
    Attention,
    Layout,
    attend,
    attention_weights,
    with_causal,
)
from vitrail.layers.blocks import NORMS
from vitrail.layers.talking import Mix
from vitrail.models.vit import VisionTransformer

BATCH, HEADS, QUERIES, KEYS, WIDTH = 2, 3, 5, 7, 4
BIAS = torch.randn(BATCH, 1, QUERIES, KEYS, generator=torch.Generator().manual_seed(5))
BIAS[1, :, :, 3] = float("-inf")
OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "bias with a hidden key": dict(bias=BIAS),
    "bias of one head": dict(bias=BIAS[:1, 0]),
    "causal": dict(causal=True),
    "causal and bias": dict(causal=True, bias=BIAS),
    "scale": dict(scale=0.1),
    "scale of zero": dict(scale=0.0),
}


def qkv(keys: int = KEYS, dtype: torch.dtype = torch.float32, heads: int = HEADS) -> tuple[Tensor, Tensor, Tensor]:
    shapes = ((BATCH, heads, QUERIES, WIDTH), (BATCH, heads, keys, WIDTH), (BATCH, heads, keys, WIDTH))
    q, k, v = (torch.randn(shape, dtype=dtype) for shape in shapes)
    return q, k, v


def by_loops(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None = None,
    scale: float | None = None,
    causal: bool = False,
    mix: Mix | None = None,
) -> Tensor:
    """The definition, one number at a time, in float64."""
    q, k, v = q.double(), k.double(), v.double()
    batch, heads, queries, keys = *q.shape[:3], k.shape[2]
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    scores = torch.zeros(batch, heads, queries, keys, dtype=torch.float64)
    for b, h, i, j in torch.cartesian_prod(*map(torch.arange, scores.shape)).tolist():
        scores[b, h, i, j] = (q[b, h, i] * k[b, h, j]).sum() * scale
    if mix is not None:
        scores = sum_over_heads(scores, mix.before, torch.zeros(heads))
    if bias is not None:
        scores = scores + bias.double()
    if causal:
        for i in range(queries):
            scores[:, :, i, i + 1 :] = float("-inf")
    weights = scores.exp() / scores.exp().sum(-1, keepdim=True)
    if mix is not None:
        mixed = sum_over_heads(weights, mix.after, torch.zeros(heads) if mix.after_bias is None else mix.after_bias)
        weights = mixed.masked_fill(scores == float("-inf"), 0)
    return weights @ v


def sum_over_heads(maps: Tensor, matrix: Tensor, bias: Tensor) -> Tensor:
    mixed = torch.zeros_like(maps)
    for to in range(maps.shape[1]):
        mixed[:, to] = bias[to]
        for source in range(maps.shape[1]):
            mixed[:, to] += matrix[to, source].double() * maps[:, source]
    return mixed


@pytest.mark.parametrize("case", OPTIONS)
def test_fused_and_eager_are_the_definition(case: str) -> None:
    q, k, v = qkv()
    truth = by_loops(q, k, v, **OPTIONS[case])
    for kernel in ("fused", "eager", "auto"):
        out = attend(q, k, v, kernel=kernel, **OPTIONS[case])
        assert (out - truth).abs().max() <= 1e-6, kernel


@pytest.mark.parametrize("after_bias", [None, torch.tensor([0.1, -0.2, 0.3])], ids=["no bias", "bias"])
def test_talking_heads_are_the_definition(after_bias: Tensor | None) -> None:
    q, k, v = qkv()
    mix = Mix(torch.randn(HEADS, HEADS), torch.randn(HEADS, HEADS), after_bias)
    truth = by_loops(q, k, v, mix=mix, bias=BIAS)
    assert (attend(q, k, v, mix=mix, bias=BIAS, kernel="fused") - truth).abs().max() <= 1e-5
    plain = Mix(torch.eye(HEADS), torch.eye(HEADS))
    assert torch.allclose(attend(q, k, v, mix=plain), attend(q, k, v), atol=1e-6)


def test_weights_are_rows_that_sum_to_one_and_hidden_keys_get_none() -> None:
    q, k, _ = qkv()
    weights = attention_weights(q, k, bias=BIAS, causal=True)
    assert torch.allclose(weights.sum(-1), torch.ones(BATCH, HEADS, QUERIES), atol=1e-6)
    assert weights[1, :, :, 3].abs().max() == 0
    assert torch.equal(weights[0, 0] == 0, with_causal(None, True, q, k)[0, 0] == float("-inf"))


@pytest.mark.parametrize("kernel", ["fused", "eager"])
def test_a_bias_that_is_no_number_is_refused(kernel: Any) -> None:
    with pytest.raises(ValueError, match=r"bias is added to the scores.*got torch.bool"):
        attend(*qkv(), bias=torch.ones(QUERIES, KEYS, dtype=torch.bool), kernel=kernel)


@pytest.mark.parametrize("kernel", ["fused", "eager"])
def test_dropout_keeps_the_expectation_and_drops_its_share(kernel: Any) -> None:
    samples, keys, rate = 4000, 10, 0.3
    q, k = torch.randn(1, 1, 1, 4).expand(samples, 1, 1, 4), torch.randn(1, 1, keys, 4).expand(samples, 1, keys, 4)
    v = torch.eye(keys).expand(samples, 1, keys, keys)  # the answer is then the row of weights itself
    dropped = attend(q, k, v, dropout=rate, kernel=kernel)[:, 0, 0]
    weights = attention_weights(q[:1], k[:1])[0, 0, 0]
    assert abs((dropped == 0).float().mean() - rate) < 0.01  # 40000 draws: 4 deviations
    assert torch.allclose(dropped.mean(0), weights, atol=0.012)
    kept = dropped[dropped[:, 0] != 0, 0]
    assert torch.allclose(kept, weights[0] / (1 - rate), atol=1e-6)


@pytest.mark.parametrize("kernel", ["fused", "eager"])
def test_windows_folded_into_heads_are_attention_in_each_window(kernel: Any) -> None:
    windows, size = 4, 9
    q, k, v = (torch.randn(BATCH, windows, HEADS, size, WIDTH) for _ in range(3))
    bias, mask = torch.randn(HEADS, size, size), torch.randn(windows, 1, size, size)
    truth = F.scaled_dot_product_attention(q, k, v, attn_mask=bias + mask)
    folded = attend(*(t.flatten(1, 2) for t in (q, k, v)), bias=(bias + mask).flatten(0, 1), kernel=kernel)
    assert (folded.unflatten(1, (windows, HEADS)) - truth).abs().max() <= 2e-6


@pytest.mark.parametrize("kernel", ["fused", "eager"])
def test_gradients_of_both_kernels_agree(kernel: Any) -> None:
    leaves = [t.requires_grad_() for t in qkv()]
    by_loops_gradients = torch.autograd.grad(by_loops(*leaves).square().sum(), leaves)
    gradients = torch.autograd.grad(attend(*leaves, kernel=kernel).square().sum(), leaves)
    for ours, theirs in zip(gradients, by_loops_gradients, strict=True):
        assert torch.allclose(ours, theirs, atol=1e-5)


# ---- which kernel


@pytest.fixture
def fused_calls(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
    """The key shapes that SDPA was called with."""
    calls: list[tuple[int, ...]] = []
    real = F.scaled_dot_product_attention

    def spy(q: Tensor, k: Tensor, *rest: Any, **options: Any) -> Tensor:
        calls.append(tuple(k.shape))
        return real(q, k, *rest, **options)

    monkeypatch.setattr(F, "scaled_dot_product_attention", spy)
    return calls


@pytest.mark.parametrize(
    ("dtype", "keys", "compiling", "fused"),
    [
        (torch.float32, KEYS, False, True),
        (torch.bfloat16, KEYS, False, False),
        (torch.bfloat16, EAGER_TOKENS, False, False),
        (torch.bfloat16, EAGER_TOKENS + 1, False, True),
        (torch.bfloat16, KEYS, True, True),
    ],
)
def test_auto_takes_the_fast_kernel(
    dtype: torch.dtype,
    keys: int,
    compiling: bool,
    fused: bool,
    fused_calls: list[Any],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: compiling)
    monkeypatch.setattr(attention, "EAGER_SCORES", 1)
    attend(*qkv(keys, dtype))
    assert bool(fused_calls) == fused


def test_few_scores_are_one_call_in_any_dtype(fused_calls: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    q, k, v = qkv(dtype=torch.bfloat16)
    for queries in (QUERIES, SDPA_QUERIES):  # fewer queries cost as much as so many
        monkeypatch.setattr(attention, "SDPA_QUERIES", queries)
        monkeypatch.setattr(attention, "EAGER_SCORES", BATCH * HEADS * queries * KEYS + 1)
        attend(q, k, v)
        assert len(fused_calls) == 1
        monkeypatch.setattr(attention, "EAGER_SCORES", BATCH * HEADS * queries * KEYS)
        attend(q, k, v)
        assert len(fused_calls) == 1
        fused_calls.clear()


def test_a_bias_that_learns_is_added_by_hand(fused_calls: list[Any]) -> None:
    """PyTorch's CPU kernel gives a bias no gradient, and its fallback is slower than matmul and softmax."""
    bias = BIAS.clone().requires_grad_()
    attend(*qkv(), bias=bias).sum().backward()
    assert bias.grad is not None and not fused_calls
    attend(*qkv(), bias=bias, kernel="fused")
    with torch.no_grad():
        attend(*qkv(), bias=bias + 0)
    assert len(fused_calls) == 2


def test_a_named_kernel_is_taken_whatever_the_dtype(fused_calls: list[Any]) -> None:
    attend(*qkv(dtype=torch.bfloat16), kernel="fused")
    assert len(fused_calls) == 1
    attend(*qkv(), kernel="eager")
    attend(*qkv(), mix=Mix(torch.eye(HEADS), torch.eye(HEADS)), kernel="fused")  # no kernel mixes heads
    assert len(fused_calls) == 1


def test_bf16_stays_bf16_and_near_float32() -> None:
    q, k, v = qkv(dtype=torch.bfloat16)
    for kernel in ("eager", "fused"):
        out = attend(q, k, v, kernel=kernel)
        assert out.dtype == torch.bfloat16
        assert (out - by_loops(q, k, v)).abs().max() < 0.03


# ---- watching


class Watch(TorchFunctionMode):
    """Notes each attention function that is announced, and lets it run."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[tuple[Any, dict[str, Any]]] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in (attend, F.scaled_dot_product_attention):
            self.seen.append((func, kwargs or {}))
        return func(*args, **(kwargs or {}))


@torch.no_grad()
@pytest.mark.parametrize("kernel", ["fused", "eager"])
def test_a_mode_sees_one_call_a_layer_with_its_layout(kernel: Any) -> None:
    model = VisionTransformer(
        img_size=(32, 48), patch_size=8, embed_dim=24, depth=3, num_heads=3, reg_tokens=2, attn=kernel
    ).eval()
    x = torch.randn(1, 3, 32, 48)
    plain = model(x)
    with Watch() as watch:
        watched = model(x)
    assert torch.equal(plain, watched)
    assert [func for func, _ in watch.seen] == [attend] * 3  # the SDPA inside is not announced again
    for _, options in watch.seen:
        layout = options["layout"]
        assert (layout.grid, layout.prefix, layout.windows) == ((4, 6), 3, 1)
        assert layout.query_index is None
        assert layout.key_index is None


@torch.no_grad()
def test_kept_tokens_are_named_in_the_layout() -> None:
    model = VisionTransformer(img_size=32, patch_size=8, embed_dim=24, depth=1, num_heads=3).eval()
    keep = torch.tensor([[3, 1, 9]])
    with Watch() as watch:
        model.encode(model.embed(torch.randn(1, 3, 32, 32)), keep)
    layout = watch.seen[0][1]["layout"]
    assert torch.equal(layout.query_index, keep)
    assert torch.equal(layout.key_index, keep)


def test_a_tensor_subclass_may_answer_for_attend() -> None:
    class Answer(torch.Tensor):
        @classmethod
        def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            return ("answered", kwargs["scale"]) if func is attend else NotImplemented

    q, k, v = qkv()
    assert attend(q, k, v.as_subclass(Answer), scale=0.5) == ("answered", 0.5)


# ---- the layer


@torch.no_grad()
def test_attention_equals_torch_multihead_attention() -> None:
    theirs = nn.MultiheadAttention(24, 3, batch_first=True).eval()
    for parameter in theirs.parameters():
        nn.init.normal_(parameter, std=0.3)
    ours = Attention(24, 3).eval()
    ours.qkv.weight.copy_(theirs.in_proj_weight)
    ours.qkv.bias.copy_(theirs.in_proj_bias)
    ours.proj.load_state_dict(theirs.out_proj.state_dict())
    x, bias = torch.randn(2, 7, 24), torch.randn(7, 7)
    bias[:, 2] = float("-inf")
    assert torch.allclose(ours(x), theirs(x, x, x)[0], atol=1e-5)
    assert torch.allclose(ours(x, bias=bias), theirs(x, x, x, attn_mask=bias)[0], atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("norm", ["layernorm", "rmsnorm"])  # batch norm takes the length that all tokens have
def test_query_and_key_norm_fix_the_length_of_each_head(norm: str) -> None:
    """After the norm a query is sqrt(D) long whatever came in, so scaling the projection changes nothing."""
    layer = Attention(24, 3, qk_norm=NORMS[norm]).eval()
    x = torch.randn(2, 7, 24)
    before = layer(x)
    layer.qkv.weight[:48] *= 7
    layer.qkv.bias[:48] *= 7
    assert torch.allclose(layer(x), before, atol=1e-3)
    for parameter in layer.k_norm.parameters():
        parameter.zero_()  # keys of zero: every value weighs the same
    assert torch.allclose(
        layer(x), layer.proj(layer.qkv(x)[..., 48:].mean(1, keepdim=True)).expand(2, 7, 24), atol=1e-6
    )
    assert isinstance(layer.q_norm, type(NORMS[norm](8)))
    assert layer.q_norm.weight.shape == (8,)


def test_weights_are_dropped_in_training_only() -> None:
    layer = Attention(24, 3, attn_drop=0.5, proj_drop=0.0)
    x = torch.randn(2, 7, 24)
    assert not torch.allclose(layer.train()(x), layer(x))
    assert torch.equal(layer.eval()(x), layer(x))


def test_projections_are_dropped_in_training_only() -> None:
    layer = Attention(24, 3, proj_drop=0.5)
    assert (layer.train()(torch.randn(2, 7, 24)) == 0).float().mean() > 0.3
    assert (layer.eval()(torch.randn(2, 7, 24)) == 0).sum() == 0


def test_bias_is_left_out_of_qkv_only() -> None:
    layer = Attention(24, 3, qkv_bias=False)
    assert layer.qkv.bias is None
    assert layer.proj.bias is not None


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (partial(Attention, 100, 3), "embed_dim 100 is not divisible by num_heads 3: use 2 heads or a width of 99"),
        (partial(Attention, 4, 12), "embed_dim 4 is not divisible by num_heads 12: use 4 heads or a width of 12"),
        (partial(Attention, 24, 3, attn="fast"), "attn must be auto, fused or eager; got 'fast'"),
    ],
)
def test_wrong_attention_says_how_to_mend_it(make: Callable[[], Attention], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


def test_layout_is_of_the_whole_grid_unless_told() -> None:
    layout = Layout((2, 3))
    assert (layout.prefix, layout.windows, layout.query_index, layout.key_index) == (0, 1, None, None)
