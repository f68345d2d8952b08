"""Talking heads in parts: the same function as all at once, taken where nobody reads along."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from vitrail.layers import attention, talking
from vitrail.layers.attention import attend, attention_weights
from vitrail.layers.talking import Mix, mix_heads

BATCH, HEADS, QUERIES, KEYS, WIDTH = 5, 3, 6, 7, 4
HIDDEN = float("-inf")


def qkv(batch: int = BATCH, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    """Cut out of one tensor, as layers have them: rows of a head do not lie together."""
    x = torch.randn(batch, KEYS, 3, HEADS, WIDTH, dtype=dtype)
    q, k, v = x.permute(2, 0, 3, 1, 4)
    return q[:, :, :QUERIES], k, v


def mix(dtype: torch.dtype = torch.float32) -> Mix:
    return Mix(*(torch.randn(size, dtype=dtype) for size in ((HEADS, HEADS), (HEADS, HEADS), (HEADS,))))


def hiding(*size: int) -> Tensor:
    """A random bias with a hidden key that is another one for every image, head and query."""
    bias = torch.randn(size)
    return bias.scatter(-1, torch.randint(KEYS, (*size[:-1], 1)), HIDDEN)


BIASES: dict[str, dict[str, Any]] = {
    "none": {},
    "of each image": dict(bias=hiding(BATCH, 1, 1, KEYS)),
    "of each head": dict(bias=hiding(HEADS, QUERIES, KEYS)),
    "of everything": dict(bias=hiding(BATCH, HEADS, QUERIES, KEYS)),
    "of each query": dict(bias=hiding(QUERIES, KEYS)),
    "causal": dict(causal=True),
    "causal and its own": dict(causal=True, bias=hiding(1, 1, QUERIES, KEYS).index_fill(-1, torch.tensor([0]), 0.5)),
}


@pytest.fixture
def parts(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many images each part had, two at a time."""
    monkeypatch.setattr(talking, "CACHED_SCORES", 2 * HEADS * QUERIES * KEYS)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    counts: list[int] = []
    real = talking._attend

    def spy(q: Tensor, *args: Any) -> Tensor:
        counts.append(len(q))
        return real(q, *args)

    monkeypatch.setattr(talking, "_attend", spy)
    return counts


@pytest.mark.parametrize("scale", [None, 0.3])
@pytest.mark.parametrize("case", BIASES)
def test_in_parts_it_is_the_same_function(case: str, scale: float | None, parts: list[int]) -> None:
    q, k, v = (x.double() for x in qkv())
    given = {name: x.double() if isinstance(x, Tensor) else x for name, x in BIASES[case].items()}
    heads = mix(torch.float64)
    whole = attend(q, k, v, mix=heads, scale=scale, **given)
    assert parts == []
    by_definition = attention_weights(q, k, mix=heads, scale=scale, **given) @ v
    with torch.no_grad():
        found = attend(q, k, v, mix=heads, scale=scale, **given)
        few = attend(q, k, v, mix=heads, scale=scale, rows=2, **given)
    assert parts == [2, 2, 1, 5]
    for answer in (whole, found):
        torch.testing.assert_close(answer, by_definition, rtol=0, atol=1e-12)
    torch.testing.assert_close(few, found[:, :, :2], rtol=0, atol=1e-12)


@torch.no_grad()
def test_without_a_bias_after_the_softmax_too(parts: list[int]) -> None:
    q, k, v = qkv()
    heads = mix()._replace(after_bias=None)
    torch.testing.assert_close(attend(q, k, v, mix=heads), attention_weights(q, k, mix=heads) @ v, rtol=0, atol=1e-5)
    assert parts == [2, 2, 1]


@torch.no_grad()
def test_values_of_hidden_keys_are_not_seen() -> None:
    """The bias after the softmax, on every key that is there, is none on those."""
    q, k, v = qkv()
    heads, bias = mix(), hiding(BATCH, 1, 1, KEYS)
    changed = v + 100 * (bias == HIDDEN).squeeze(1).squeeze(1)[:, None, :, None]
    assert torch.equal(attend(q, k, v, mix=heads, bias=bias), attend(q, k, changed, mix=heads, bias=bias))
    weights = attention_weights(q, k, mix=heads, bias=bias)
    assert weights.masked_select(bias == HIDDEN).abs().max() == 0


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_no_images_and_no_queries_have_no_answers(dtype: torch.dtype) -> None:
    q, k, v = qkv(0, dtype)
    assert attend(q, k, v, mix=mix(dtype)).shape == (0, HEADS, QUERIES, WIDTH)
    q, k, v = qkv(2, dtype)
    assert attend(q[:, :, :0], k, v, mix=mix(dtype)).shape == (2, HEADS, 0, WIDTH)


@torch.no_grad()
def test_bf16_stays_bf16_and_near_float32(parts: list[int]) -> None:
    q, k, v = qkv()
    heads = mix()
    found = attend(*(x.bfloat16() for x in (q, k, v)), mix=Mix(*(x.bfloat16() for x in heads)))
    assert found.dtype == torch.bfloat16 and parts
    truth = attend(q, k, v, mix=heads)
    assert (found - truth).abs().max() <= 0.03 * truth.abs().max()


def plainly() -> Tensor:
    q, k, v = qkv()
    return attend(q, k, v, mix=mix())


def with_other_dtypes() -> Tensor:
    q, k, v = qkv()
    return attend(q, k, v, mix=Mix(torch.eye(HEADS), torch.eye(HEADS), torch.zeros(HEADS, dtype=torch.float64)))


def under_autocast() -> Tensor:
    with torch.autocast("cpu", torch.bfloat16):
        return plainly()


def under_vmap() -> Tensor:
    q, k, v = qkv()
    heads = mix()
    return torch.func.vmap(lambda one: attend(one[None], k[:1], v[:1], mix=heads))(q)


def with_dropout() -> Tensor:
    q, k, v = qkv()
    return attend(q, k, v, mix=mix(), dropout=0.5)


@torch.no_grad()
@pytest.mark.parametrize("call", [with_other_dtypes, under_autocast, under_vmap, with_dropout])
def test_who_reads_along_gets_it_all_at_once(call: Any, parts: list[int]) -> None:
    assert call().isfinite().all()
    assert parts == []
    plainly()
    assert parts


def test_gradients_are_those_of_the_definition() -> None:
    """Of a step, where nothing may be written over."""
    q, k, v = (x.double().requires_grad_() for x in qkv(2))
    heads = Mix(*(x.requires_grad_() for x in mix(torch.float64)))
    assert torch.autograd.gradcheck(lambda q, k, v, *m: attend(q, k, v, mix=Mix(*m)), (q, k, v, *heads))


def test_a_mixed_head_is_a_weighted_sum_of_all() -> None:
    maps, matrix = torch.randn(2, HEADS, 4, 5), torch.randn(HEADS, HEADS)
    mixed = mix_heads(maps, matrix)
    for head in range(HEADS):
        torch.testing.assert_close(mixed[:, head], sum(matrix[head, i] * maps[:, i] for i in range(HEADS)))


def test_the_part_is_as_large_as_the_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    """One image where its maps alone are more than that."""
    sizes: list[int] = []
    monkeypatch.setattr(talking, "_attend", lambda q, *args: sizes.append(len(q)) or q)
    monkeypatch.setattr(talking, "CACHED_SCORES", 1)
    q, k, v = qkv()
    with torch.no_grad():
        attention.attend(q, k, v, mix=mix())
    assert sizes == [1] * BATCH


@torch.no_grad()
def test_every_thread_has_a_cache(parts: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    q, k, v = qkv()
    attention.attend(q, k, v, mix=mix())
    assert parts == [4, 1]
