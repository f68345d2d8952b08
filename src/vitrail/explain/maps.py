"""From recorded attention to a map on the image.

    fuse_heads      (B, H, Q, K) -> (B, 1, Q, K)
    attention_map   one layer, one query -> (B, h, w), laid on the image through the layer's `Layout`
    rollout         all layers -> (B, Q, K): what each token is made of, if attention were all there is
    explain         model and image -> `Explanation`, by the name of a method

Legend: `B` batch, `W` windows, `H` heads, `Q` queries, `K` keys, `N` tokens, `P` prefix rows, `h`, `w` token grid.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import reduce
from typing import Literal

import torch
from torch import Tensor, nn

from vitrail.explain.choice import Heads
from vitrail.explain.record import AttentionMap, record_attention
from vitrail.layers.attention import Layout
from vitrail.names import nearest
from vitrail.records import Explanation

FusionName = Literal["mean", "max", "min"]
Fusion = FusionName | int | Sequence[int]
Query = Literal["class", "mean"] | int | tuple[int, int]

FUSIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "mean": lambda maps: maps.mean(1, keepdim=True),
    "max": lambda maps: maps.amax(1, keepdim=True),
    "min": lambda maps: maps.amin(1, keepdim=True),
}
CLASS, PREFIX, PADDING = -3, -2, -1  # what an attention row stands for, where it is no cell


def fuse_heads(weights: Tensor, heads: Fusion = "mean") -> Tensor:
    """(B, H, Q, K) -> (B, 1, Q, K) by mean, max or min, or one head by its number; a list of numbers -> (B, len, Q, K).

    Rows of "max" and "min" no longer sum to 1. Raises `ValueError` for an unknown fusion or head.
    """
    if isinstance(heads, str):
        if heads not in FUSIONS:
            raise ValueError(f"heads must be mean, max, min or head numbers from 0; got {heads!r}")
        return FUSIONS[heads](weights)
    numbers = [heads] if isinstance(heads, int) else list(heads)
    wrong = [n for n in numbers if not 0 <= n < weights.shape[1]]
    if wrong or not numbers:
        raise ValueError(f"heads must lie in 0 … {weights.shape[1] - 1}; got {wrong or numbers}")
    return weights[:, numbers]


def attention_map(seen: AttentionMap, heads: Fusion = "mean", query: Query = "class") -> Tensor:
    """What one query looks at in one layer: (B, h, w) on the image grid; cells that it does not see are 0.

    `query` is the class token (prefix row 0), an image cell by number or (row, column), or "mean" over all rows
    recorded. Several heads by a list are averaged. Raises `ValueError` where the layout is unknown, or where the query
    or a head was not recorded.
    """
    layout, batch = _layout(seen), seen.weights.shape[0]
    maps = _by_window(seen, heads)  # (B, W, Q, K)
    chosen = _chosen(seen, layout, query)  # (B, W, Q)
    rows = torch.where(chosen[..., None], maps, 0).sum(2)  # (B, W, K)
    rows = rows / chosen.sum((1, 2))[:, None, None]
    cells = _meaning(layout, layout.key_index, batch, rows.device)
    return _scatter(rows, _complete(cells, maps.shape[-1], "columns", seen), layout.grid)


def rollout(maps: Sequence[AttentionMap], fusion: FusionName = "mean", discard: float = 0.0) -> Tensor:
    """(B, Q, K): how much of each input token is in each output token, rows summing to 1.

    The product over layers, the last one leftmost, of 0.5 A + 0.5 I with rows renormalised, where A is the attention
    with its heads fused. `discard` in [0, 1) first sets that fraction of each query's weights to zero, the smallest,
    but never the class token's. Source: Abnar & Zuidema 2020, "Quantifying Attention Flow in Transformers", section 3.

    Raises `ValueError` for maps whose product means nothing: windowed, with reduced keys, in part, or not consecutive.
    """
    if not 0 <= discard < 1:
        raise ValueError(f"discard is a fraction of the weights, in [0, 1); got {discard}")
    if fusion not in FUSIONS:
        raise ValueError(f"fusion must be {', '.join(FUSIONS)}; got {fusion!r}: {nearest(str(fusion), FUSIONS, 1)[0]}?")
    _check_chain(maps, fusion)
    return reduce(lambda below, step: step @ below, (_step(seen, fusion, discard) for seen in maps))


def rollout_map(maps: Sequence[AttentionMap], fusion: FusionName = "mean", discard: float = 0.0) -> Tensor:
    """Rollout from the class token to the image, (B, h, w); without a class token, from the mean of all tokens.

    Where the last map is attention pooling, whose query is none of the tokens, it tells how to weigh the tokens.
    """
    pooling = maps[-1] if len(maps) > 1 and maps[-1].weights.shape[-2] != maps[0].weights.shape[-2] else None
    whole = rollout(maps[:-1] if pooling else maps, fusion, discard)  # (B, Q, K)
    layout = _layout(maps[0])
    if pooling:
        whole = _pooled(pooling, fusion, whole.shape[-1]) @ whole
    rows = whole[:, :1] if layout.prefix else whole
    cells = _meaning(layout, layout.key_index, whole.shape[0], whole.device)
    return _scatter(rows.mean(1, keepdim=True), _complete(cells, whole.shape[-1], "columns", maps[0]), layout.grid)


def explain(
    model: nn.Module,
    image: Tensor,
    method: str = "rollout",
    *,
    layer: int | None = None,
    heads: FusionName | int = "mean",
    discard: float = 0.0,
) -> Explanation:
    """Explains one prepared image, (C, H, W) or (1, C, H, W) float, by one of `METHODS`. The model runs in eval mode.

    Args:
        layer: "attention" shows this layer, counted from 1, by default the last; "rollout" ends at it.
        heads: how heads are fused, or, for "attention", the number of one head from 0.
        discard: the fraction of the smallest weights that "rollout" leaves out.

    Raises `ValueError` for an unknown method (naming the nearest), layer or head, and for an image of another kind.
    """
    if method not in METHODS:
        close = nearest(method, METHODS, 1)[0]
        raise ValueError(f"method must be one of {', '.join(METHODS)}; got {method!r}: did you mean {close}?")
    batch = _one_image(image)
    with _evaluating(model), torch.no_grad():
        heat, layer = METHODS[method](model, batch, layer, heads, discard)
    return Explanation(method=method, heat=heat[0], layer=layer, heads=str(heads))


# ---- laying a map on the image


def _layout(seen: AttentionMap) -> Layout:
    if seen.layout is None:
        queries, keys = seen.weights.shape[-2:]
        raise ValueError(
            f"layer {seen.layer} ({queries} queries, {keys} keys) is not known to be a prefix and one image grid, so "
            "it cannot be laid on the image: give record_attention(grid=(h, w), prefix=...) if it is; windows and "
            "reduced keys of foreign models cannot be placed"
        )
    return seen.layout


def _by_window(seen: AttentionMap, heads: Fusion) -> Tensor:
    """(B, W, Q, K) with heads fused."""
    windows = _layout(seen).windows
    maps = seen.weights.reshape(-1, seen.weights.shape[1] // windows, *seen.weights.shape[2:])  # (B·W, H, Q, K)
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


def _meaning(layout: Layout, index: Tensor | None, batch: int, device: torch.device) -> Tensor:
    """(B, W, P + N) what each row or column stands for: a cell's number, or `CLASS`, `PREFIX`, `PADDING`."""
    height, width = layout.grid
    if index is None:
        index = torch.arange(height * width)
    elif index.ndim == 2:
        index = index[:, None] if layout.windows == 1 else index[None]
    special = torch.tensor([CLASS] + [PREFIX] * layout.prefix)[: layout.prefix].to(device)
    image = index.to(device).long().expand(batch, layout.windows, -1)
    return torch.cat([special.expand(batch, layout.windows, -1), image], dim=-1)


def _complete(meaning: Tensor, count: int, what: str, seen: AttentionMap) -> Tensor:
    if meaning.shape[-1] != count:
        raise ValueError(
            f"the layout of layer {seen.layer} describes {meaning.shape[-1]} {what}, its map has {count}: "
            "whoever called attend gave the wrong Layout, or record_attention the wrong grid and prefix"
        )
    return meaning


def _chosen(seen: AttentionMap, layout: Layout, query: Query) -> Tensor:
    """(B, W, Q) true for the recorded rows that stand for `query`, at least one for each image."""
    rows = _meaning(layout, layout.query_index, seen.weights.shape[0], seen.weights.device)
    rows = _complete(rows, seen.weights.shape[-2], "rows", seen) if seen.queries is None else rows[..., seen.queries]
    wanted = CLASS if query == "class" else None if query == "mean" else _cell(query, layout.grid)
    chosen = rows != PADDING if wanted is None else rows == wanted
    if not chosen.any(2).any(1).all():
        raise ValueError(
            f"layer {seen.layer} has no row for query {query!r} (prefix rows {layout.prefix}, recorded rows "
            f"{'all' if seen.queries is None else list(seen.queries)}): choose another query, or record all of them"
        )
    return chosen


def _cell(query: Query, grid: tuple[int, int]) -> int:
    height, width = grid
    if isinstance(query, str):
        raise ValueError(f"query must be class, mean, a cell's number or (row, column); got {query!r}")
    row, column = divmod(query, width) if isinstance(query, int) else query
    if not (0 <= row < height and 0 <= column < width):
        raise ValueError(f"query must be a cell of the {height} x {width} grid, counted from 0; got {query}")
    return row * width + column


def _scatter(rows: Tensor, cells: Tensor, grid: tuple[int, int]) -> Tensor:
    """rows (B, W, K) summed into the `cells` (B, W, K) they stand for -> (B, h, w); no cell, no weight."""
    count = grid[0] * grid[1]
    places = torch.where(cells < 0, count, cells).flatten(1)
    heat = rows.new_zeros(rows.shape[0], count + 1).scatter_add_(1, places, rows.flatten(1))
    return heat[:, :count].reshape(-1, *grid)


# ---- rollout


def _step(seen: AttentionMap, fusion: FusionName, discard: float) -> Tensor:
    """(B, N, N): attention and the residual branch in equal parts, rows summing to 1."""
    weights = fuse_heads(seen.weights, fusion)[:, 0]
    has_class = int(seen.layout is not None and seen.layout.prefix > 0)
    weights = torch.cat([weights[..., :has_class], _without_smallest(weights[..., has_class:], discard)], dim=-1)
    mixed = 0.5 * weights + 0.5 * torch.eye(weights.shape[-1], dtype=weights.dtype, device=weights.device)
    return mixed / mixed.sum(-1, keepdim=True)


def _without_smallest(weights: Tensor, fraction: float) -> Tensor:
    """(…, K) with the smallest floor(fraction · K) of each row set to 0."""
    smallest = weights.topk(int(fraction * weights.shape[-1]), dim=-1, largest=False).indices
    return weights.scatter(-1, smallest, 0.0)


def _pooled(pooling: AttentionMap, fusion: FusionName, tokens: int) -> Tensor:
    """(B, 1, N): how attention pooling weighs all tokens, or only those after the prefix."""
    _check_fusion(pooling, fusion)
    weights = fuse_heads(pooling.weights, fusion)[:, 0].mean(1, keepdim=True)  # (B, 1, K)
    missing = tokens - weights.shape[-1]
    if missing < 0:
        raise ValueError(f"layer {pooling.layer} pools {weights.shape[-1]} tokens where only {tokens} came before it")
    weights = torch.nn.functional.pad(weights, (missing, 0))
    return weights / weights.sum(-1, keepdim=True)


def _check_chain(maps: Sequence[AttentionMap], fusion: FusionName) -> None:
    """Raises `ValueError` unless the maps can be multiplied."""
    if not maps:
        raise ValueError("rollout needs at least one attention map; got none: see record_attention")
    for below, seen in zip([None, *maps], maps, strict=False):
        _check_fusion(seen, fusion)
        reason = _not_square(seen) or (_not_next(below, seen) if below else "")
        if reason:
            raise ValueError(
                "rollout is a product of matrices, each of which must lead from all tokens to the same tokens: "
                f"layer {seen.layer} {reason}"
            )


def _check_fusion(seen: AttentionMap, fusion: FusionName) -> None:
    if seen.heads == "mean" and fusion != "mean":
        raise ValueError(f"layer {seen.layer} was recorded with heads='mean'; got {fusion!r}: record with heads=None")


def _not_square(seen: AttentionMap) -> str:
    """Why a map does not lead from its tokens to themselves, or empty."""
    queries, keys = seen.weights.shape[-2:]
    layout = seen.layout
    if seen.queries is not None:
        return f"was recorded with rows {list(seen.queries)} only; record with queries=None"
    if layout and layout.windows > 1:
        return f"attends within {layout.windows} windows, so its map holds no flow between them"
    if queries != keys:
        return f"has {queries} queries and {keys} keys, so its keys are other tokens than its queries"
    if layout and not _same_index(layout.query_index, layout.key_index):
        return "has queries that stand for other image cells than its keys"
    return ""


def _not_next(below: AttentionMap, seen: AttentionMap) -> str:
    """Why a map does not start from the tokens where the one before ended, or empty."""
    before, now = below.weights.shape[-2], seen.weights.shape[-1]
    if seen.layer != below.layer + 1:
        return f"follows layer {below.layer}; the layers between are missing"
    if before != now:
        return f"has {now} tokens where layer {below.layer} left {before}"
    if below.layout and seen.layout and not _same_index(below.layout.key_index, seen.layout.key_index):
        return f"has its tokens stand for other image cells than layer {below.layer}"
    return ""


def _same_index(one: Tensor | None, other: Tensor | None) -> bool:
    return one is other or (one is not None and other is not None and torch.equal(one, other))


# ---- methods


def _explain_rollout(
    model: nn.Module, batch: Tensor, layer: int | None, heads: FusionName | int, discard: float
) -> tuple[Tensor, int | None]:
    if isinstance(heads, int):
        raise ValueError(f"rollout fuses heads by {', '.join(FUSIONS)}; got heads={heads}: use method='attention'")
    layers = None if layer is None else range(1, layer + 1)
    with record_attention(layers, "mean" if heads == "mean" else None) as record:
        model(batch)
    return rollout_map(record.maps, heads, discard), layer


def _explain_attention(
    model: nn.Module, batch: Tensor, layer: int | None, heads: FusionName | int, discard: float
) -> tuple[Tensor, int | None]:
    if discard:
        raise ValueError(f"discard belongs to rollout; got discard={discard} with method='attention'")
    kept: Heads = [heads] if isinstance(heads, int) else "mean" if heads == "mean" else None
    with record_attention(None if layer is None else [layer], kept) as record:
        model(batch)
    seen = next((m for m in reversed(record.maps) if m.layout), record.maps[-1])
    return attention_map(seen, heads, "class" if _layout(seen).prefix else "mean"), seen.layer


METHODS: dict[str, Callable[..., tuple[Tensor, int | None]]] = {
    "rollout": _explain_rollout,
    "attention": _explain_attention,
}


def _one_image(image: Tensor) -> Tensor:
    if image.ndim == 3:
        image = image[None]
    if image.ndim != 4 or image.shape[0] != 1 or not image.is_floating_point():
        raise ValueError(
            "image must be one prepared image, (C, H, W) or (1, C, H, W) in a floating type; got "
            f"{tuple(image.shape)} {image.dtype}: prepare it with the model's preprocess"
        )
    return image


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """Eval mode, and afterwards every module as it was."""
    were = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in were:
            module.training = training
