"""From recorded attention to a map on the image.

    fuse_heads      (B, H, Q, K) -> (B, 1, Q, K)
    attention_map   one layer, one query -> (B, h, w), laid on the image through the layer's `Layout`
    rollout         all layers -> (B, Q, K): what each token is made of, if attention were all there is
    explain_layers  model and image -> `Explained`, by the name of a method in `METHODS`; `explain` is the last of it

Maps and rollout take what multiplied the values: where heads are mixed or masked after the softmax, the effective map.

Legend: `B` batch, `W` windows, `H` heads, `Q` queries, `K` keys, `N` tokens, `P` prefix rows, `h`, `w` token grid.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import reduce
from typing import Literal, NamedTuple, cast

import torch
from torch import Tensor, nn

from vitrail.explain.chain import check_chain, check_tail, keys, queries
from vitrail.explain.choice import Heads, Layers, layer_numbers, number_tuple, readout_rows
from vitrail.explain.places import Query, chosen_rows, known_layout, on_image
from vitrail.explain.record import AttentionMap, record_attention
from vitrail.layers.modes import evaluating
from vitrail.names import check_choice, nearest, shortened
from vitrail.records import Explanation

FusionName = Literal["mean", "max", "min"]
Fusion = FusionName | int | Sequence[int]

FUSIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "mean": lambda maps: maps.mean(1, keepdim=True),
    "max": lambda maps: maps.amax(1, keepdim=True),
    "min": lambda maps: maps.amin(1, keepdim=True),
}


def fuse_heads(weights: Tensor, heads: Fusion = "mean") -> Tensor:
    """(B, H, Q, K) -> (B, 1, Q, K) by mean, max or min, or one head by its number; a list of numbers -> (B, len, Q, K).

    Rows of "max" and "min" no longer sum to 1. Raises `ValueError` for an unknown fusion or head.
    """
    if isinstance(heads, str):
        if heads not in FUSIONS:
            raise ValueError(f"heads must be mean, max, min or head numbers from 0; got {heads!r}")
        return FUSIONS[heads](weights)
    numbers, count = [heads] if isinstance(heads, int) else list(heads), weights.shape[1]
    wrong = [n for n in numbers if not 0 <= n < count]
    if wrong or not numbers:
        raise ValueError(f"heads must lie in 0 … {count - 1}, there are {count} heads; got {wrong or numbers}")
    return weights[:, numbers]


def attention_map(
    seen: AttentionMap, heads: Fusion = "mean", query: Query | None = None, *, row: int | None = None
) -> Tensor:
    """What one query looks at in one layer: (B, h, w) on the grid of the keys; cells that it does not see are 0.

    `query` is "class", the default, for what the head reads (the class token, two such tokens, or the mean of the image
    tokens), an image cell by number or (row, column), or "mean" over all rows recorded. Instead of it, `row` is a row's
    number among all rows, counted from 0: the one way to name a row that is no image cell, such as an object query or
    a register; with windows, it is that row of each. Several heads by a list are averaged.

    Raises `ValueError` where the query, the row or a head was not recorded, and `CannotExplainError` where the layout
    is unknown, or does not say which of several prefix rows the head reads.
    """
    chosen = chosen_rows(seen, query, row)  # (B, W, Q)
    maps = _by_window(seen, heads)  # (B, W, Q, K)
    rows = torch.where(chosen[..., None], maps, 0).sum(2)  # (B, W, K)
    return on_image(rows / chosen.sum((1, 2))[:, None, None], seen)


def rollout(maps: Sequence[AttentionMap], fusion: FusionName = "mean", discard: float = 0.0) -> Tensor:
    """(B, Q, K): how much of each input token is in each output token, rows summing to 1.

    The product over layers, the last one leftmost, of 0.5 A + 0.5 I with rows renormalised, where A is the attention
    with its heads fused. `discard` in [0, 1) first sets that fraction of each query's weights to zero, the smallest,
    but never those on a class token that the head reads. Weights below 0, which mixed heads may have, are no flow and
    count as 0. Source: Abnar & Zuidema 2020, "Quantifying Attention Flow in Transformers", section 3.

    Raises `ValueError` for maps recorded in part or not one after the other, and `CannotExplainError` for those whose
    product means nothing: windowed, with reduced keys, or of other tokens than the layer before.
    """
    if not isinstance(discard, int | float) or not 0 <= discard < 1:
        raise ValueError(f"discard is a fraction of the weights, in [0, 1); got {discard}")
    if fusion not in FUSIONS:
        raise ValueError(f"fusion must be {', '.join(FUSIONS)}; got {fusion!r}: {nearest(str(fusion), FUSIONS, 1)[0]}?")
    check_chain(maps, fusion)
    return reduce(lambda below, step: step @ below, (_step(seen, fusion, discard) for seen in maps))


def rollout_map(maps: Sequence[AttentionMap], fusion: FusionName = "mean", discard: float = 0.0) -> Tensor:
    """Rollout from what the head reads to the image, (B, h, w): the class token, or the mean of the image tokens.

    The last layers may have fewer queries than keys; what they tell is how to weigh the tokens of the layers before.

    Attention pooling (one layer, its query none of its keys) weighs them by its attention A alone: it has no residual
    branch, so nothing of the query itself is in what the head reads.

    Class attention (Touvron et al. 2021, "Going deeper with Image Transformers", section 3) is one layer or several
    whose keys are its own queries, the class token c, and then all tokens X of the layers before, which it leaves as
    they are. Only c has a residual branch, so a layer maps (c, X) to (0.5 A (c, X) + 0.5 c, X). The first of them finds
    a class token that is made of nothing but itself, for no layer before knew it. With A = (a, α), a on c and α on X,
    and s the share of c in c (1 at first), r the row of c over X (0 at first), each layer makes of them

        s ← 0.5 a s + 0.5 s,    r ← 0.5 a r + 0.5 r + 0.5 α,

    and the answer is r times the rollout of the layers before. It sums to 1 - s: the rest is the class token's own,
    which lies nowhere on the image, as in a network whose class token was there from the first layer on.
    """
    end = next((n for n, seen in enumerate(maps) if n and queries(seen) < keys(seen)), len(maps))
    body, tail = maps[:end], maps[end:]
    whole = rollout(body, fusion, discard)  # (B, N, N)
    read = _through_tail(tail, body[-1], fusion, discard) if tail else _read(body[-1], whole.dtype)
    return on_image(read @ whole, body[0])


class Explained(NamedTuple):
    """What a method found, and what the model answered meanwhile."""

    maps: list[Explanation]
    output: Tensor
    """as the model gives it, (1, K) logits of a classifier"""


def explain_layers(
    model: nn.Module,
    image: Tensor,
    method: str = "rollout",
    *,
    layers: Layers = None,
    heads: FusionName | Literal["all"] | int = "mean",
    discard: float = 0.0,
) -> Explained:
    """Explains one prepared image, (C, H, W) or (1, C, H, W) float, by one of `METHODS`. The model runs in eval mode.

    Args:
        layers: one or several, counted from 1, in the order in which maps are wanted. "attention" shows each, by
            default all that can be laid on the image; "rollout" ends at each, by default at the last only.
        heads: how heads are fused, or, for "attention", the number of one head from 0, or "all" for a map of each.
        discard: the fraction of the smallest weights that "rollout" leaves out.

    Raises `ValueError` for an unknown method (naming the nearest), layer or head, and for an image of another kind.
    """
    check_choice("method", method, METHODS)
    asked = Request(layer_numbers(layers), heads, discard)
    batch = _one_image(image)
    with evaluating(model):
        return METHODS[method](model, batch, asked)


def explain(
    model: nn.Module,
    image: Tensor,
    method: str = "rollout",
    *,
    layer: int | None = None,
    heads: FusionName | int = "mean",
    discard: float = 0.0,
) -> Explanation:
    """The last map of `explain_layers`: "attention" in `layer`, or rollout that ends there.

    By default that is the last layer (for "attention", the last that can be laid on the image). Raises what
    `explain_layers` raises.
    """
    return explain_layers(model, image, method, layers=layer, heads=heads, discard=discard).maps[-1]


def attention_depth(model: nn.Module, image: Tensor) -> int:
    """How many attention layers run for one prepared image. Keeps next to nothing of them."""
    with evaluating(model), record_attention([1], heads=[0], queries=[0]) as record:
        model(_one_image(image))
    return record.depth


# ---- one layer


def _by_window(seen: AttentionMap, heads: Fusion) -> Tensor:
    """(B, W, Q, K) with heads fused."""
    windows, maps = known_layout(seen).windows, seen.acting
    maps = maps.reshape(-1, maps.shape[1] // windows, *maps.shape[2:])  # (B·W, H, Q, K)
    maps = fuse_heads(maps, _among_recorded(seen, heads)).mean(1)
    return maps.reshape(-1, windows, *maps.shape[1:])


def _among_recorded(seen: AttentionMap, heads: Fusion) -> Fusion:
    """Numbers of heads -> their places among the recorded ones."""
    if seen.heads == "mean" and heads != "mean":
        raise ValueError(f"layer {seen.layer} was recorded with heads='mean'; got {heads!r}: record with heads=None")
    if isinstance(heads, str) or not isinstance(seen.heads, tuple):
        return heads
    numbers = [heads] if isinstance(heads, int) else list(heads)
    missing = [n for n in numbers if n not in seen.heads]
    if missing:
        raise ValueError(f"layer {seen.layer} was recorded with heads {list(seen.heads)}; got {missing}")
    return [seen.heads.index(n) for n in numbers]


# ---- rollout


def _step(seen: AttentionMap, fusion: FusionName, discard: float) -> Tensor:
    """(B, Q, K): attention and the residual branch in equal parts, rows summing to 1; queries are the first keys."""
    weights = _flow(seen, fusion)
    read = (readout_rows(seen.layout) or ()) if seen.layout else ()
    weights = _without_smallest(weights, discard, [n for n in range(weights.shape[-1]) if n not in read])
    mixed = 0.5 * weights + 0.5 * torch.eye(*weights.shape[-2:], dtype=weights.dtype, device=weights.device)
    return mixed / mixed.sum(-1, keepdim=True)


def _flow(seen: AttentionMap, fusion: FusionName) -> Tensor:
    """(B, Q, K): what acts on the values, heads fused, where it adds to them."""
    return fuse_heads(seen.acting, fusion)[:, 0].clamp(min=0)


def _read(last: AttentionMap, dtype: torch.dtype) -> Tensor:
    """(B, 1, Q): how the head weighs the rows that leave the last layer. Of a single row nothing need be known."""
    if queries(last) == 1:
        return torch.ones(len(last.weights), 1, 1, dtype=dtype, device=last.weights.device)
    rows = chosen_rows(last, "class").to(dtype)
    return rows / rows.sum(-1, keepdim=True)


def _without_smallest(weights: Tensor, fraction: float, columns: list[int]) -> Tensor:
    """(…, K) with the smallest of each row set to 0, that fraction (rounded down) of `columns`."""
    count = int(fraction * len(columns) + 1e-9)  # 0.29 · 100 is 28.999… in floating point
    among = torch.tensor(columns, device=weights.device)
    places = weights[..., among].topk(count, dim=-1, largest=False).indices
    return weights.scatter(-1, among[places], 0.0)


# ---- rollout through the last layers, which have fewer queries than keys


def _through_tail(tail: Sequence[AttentionMap], below: AttentionMap, fusion: FusionName, discard: float) -> Tensor:
    """(B, 1, N): how what the head reads weighs the N tokens that leave `below`, the layer before the tail."""
    check_tail(tail, below, fusion)
    last = tail[-1]
    if keys(last) <= keys(below):
        return _pooled(last, fusion, keys(below))
    steps = (_with_tokens(_step(seen, fusion, discard)) for seen in tail)
    state = reduce(lambda before, step: step @ before, steps)[:, : queries(last)]  # (B, Q, Q + N)
    return (_read(last, state.dtype) @ state)[..., queries(last) :]


def _pooled(pooling: AttentionMap, fusion: FusionName, tokens: int) -> Tensor:
    """(B, 1, N): how attention pooling weighs all tokens, or only those after the prefix."""
    weights = _flow(pooling, fusion)
    weights = _read(pooling, weights.dtype) @ weights  # (B, 1, K)
    weights = torch.nn.functional.pad(weights, (tokens - weights.shape[-1], 0))
    return weights / weights.sum(-1, keepdim=True)


def _with_tokens(step: Tensor) -> Tensor:
    """(B, Q, Q + N) -> (B, Q + N, Q + N): class attention leaves the tokens as they are."""
    tokens = torch.eye(step.shape[-1], dtype=step.dtype, device=step.device)[step.shape[-2] :]
    return torch.cat([step, tokens.expand(step.shape[0], -1, -1)], dim=1)


# ---- methods


class Request(NamedTuple):
    """What a method is asked for."""

    layers: tuple[int, ...] | None
    heads: str | int
    discard: float


def _by_rollout(model: nn.Module, batch: Tensor, asked: Request) -> Explained:
    if not isinstance(asked.heads, str) or asked.heads not in FUSIONS:
        raise ValueError(
            f"rollout fuses heads by mean, max or min; got {shortened(asked.heads)}: "
            "single heads are for method attention"
        )
    fusion = cast(FusionName, asked.heads)
    below = None if asked.layers is None else range(1, max(asked.layers, default=0) + 1)
    with record_attention(below, "mean" if fusion == "mean" else None) as record:
        output = model(batch)
    ends = asked.layers or (None,)
    heats = [rollout_map(record.maps[:end], fusion, asked.discard)[0] for end in ends]
    maps = [Explanation(method="rollout", heat=h, layer=end, heads=fusion) for h, end in zip(heats, ends, strict=True)]
    return Explained(maps, output)


def _by_attention(model: nn.Module, batch: Tensor, asked: Request) -> Explained:
    if asked.discard:
        raise ValueError(f"discard belongs to rollout; got discard={asked.discard} with method='attention'")
    number = () if isinstance(asked.heads, Iterable) else number_tuple(asked.heads)
    if not number and (not isinstance(asked.heads, str) or asked.heads not in (*FUSIONS, "all")):
        got = shortened(asked.heads)
        raise ValueError(f"heads must be {', '.join(FUSIONS)}, all or a head's number from 0; got {got}")
    heads = number[0] if number else asked.heads
    kept: Heads = number or ("mean" if heads == "mean" else None)
    with record_attention(asked.layers, kept, "class") as record:
        output = model(batch)
    by_layer = {seen.layer: seen for seen in record.maps}
    chosen = [by_layer[layer] for layer in asked.layers or by_layer]
    return Explained([found for seen in chosen for found in _of_layer(seen, heads)], output)


def _of_layer(seen: AttentionMap, heads: str | int) -> list[Explanation]:
    """One map of a layer, or one a head."""
    windows = known_layout(seen).windows
    numbers = range(seen.weights.shape[1] // windows) if heads == "all" else [cast(Fusion, heads)]
    return [
        Explanation(method="attention", heat=attention_map(seen, head)[0], layer=seen.layer, heads=str(head))
        for head in numbers
    ]


METHODS: dict[str, Callable[[nn.Module, Tensor, Request], Explained]] = {
    "rollout": _by_rollout,
    "attention": _by_attention,
}
"""all there are, for functions, pictures and the command line alike"""


def _one_image(image: Tensor) -> Tensor:
    if isinstance(image, Tensor) and image.is_floating_point() and image.ndim in (3, 4):
        batch = image[None] if image.ndim == 3 else image
        if len(batch) == 1:
            return batch
    got = f"{tuple(image.shape)} {image.dtype}" if isinstance(image, Tensor) else shortened(image)
    raise ValueError(
        "image must be one prepared image, (C, H, W) or (1, C, H, W) in a floating type; got "
        f"{got}: prepare it with the model's preprocess"
    )
