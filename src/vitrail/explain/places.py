"""Where attention lies on the image: which rows a query means, which cell each column stands for.

    AttentionMap, query or row ── chosen_rows ──> which rows     columns ── on_image ──> (B, h, w), through the `Layout`

Legend: `B` batch, `W` windows, `Q` queries, `K` keys, `P` prefix, `N` image tokens, `h`, `w` token grid.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor

from vitrail.explain.choice import CannotExplainError, readout_rows
from vitrail.explain.record import AttentionMap
from vitrail.layers.attention import Layout

Query = Literal["class", "mean"] | int | tuple[int, ...]
PREFIX, PADDING = -2, -1  # what a row or column stands for, where it is no cell


def known_layout(seen: AttentionMap) -> Layout:
    """The layout of a map. Raises `CannotExplainError` where it is unknown."""
    if seen.layout is None:
        queries, keys = seen.weights.shape[-2:]
        raise CannotExplainError(
            f"layer {seen.layer} ({queries} queries, {keys} keys) is not known to be a prefix and one image grid, so "
            "it cannot be laid on the image: give record_attention(grid=(h, w), prefix=...) if it is; windows and "
            "reduced keys of foreign models cannot be placed"
        )
    return seen.layout


def key_prefix(layout: Layout) -> int:
    """How many columns come before those of image tokens."""
    return layout.prefix if layout.key_prefix is None else layout.key_prefix


def chosen_rows(seen: AttentionMap, query: Query | None = None, row: int | None = None) -> Tensor:
    """(B, W, Q) true for the recorded rows that stand for `query` (None: "class") or are `row`; one or more an image.

    Raises `ValueError` for a query or row that is not there, for both at once, and for "class" where the head reads
    rows that were not recorded; of these `CannotExplainError` where nobody can tell which rows the head reads.
    """
    if query is not None and row is not None:
        raise ValueError(f"query and row both say which rows are meant: give one; got query={query!r}, row={row}")
    query = "class" if query is None else query
    layout = known_layout(seen)
    rows = _rows(seen, layout)  # all rows, recorded or not
    wanted = _wanted(rows, seen, query) if row is None else _numbered(rows, seen, row)
    chosen = wanted if seen.queries is None else wanted[..., seen.queries]
    part = row is None and query == "class" and chosen.sum() < wanted.sum()
    if part or not chosen.any(2).any(1).all():
        raise ValueError(
            f"layer {seen.layer} has no row for {f'query {query!r}' if row is None else f'row={row}'}, or not all of "
            f"them (prefix rows {layout.prefix}, recorded rows "
            f"{'all' if seen.queries is None else list(seen.queries)}): choose another query, or record all of them"
        )
    return chosen


def on_image(columns: Tensor, seen: AttentionMap) -> Tensor:
    """Columns (B, W, K) of a map like `seen`, summed into the cells they stand for -> (B, h, w); no cell, no weight."""
    layout = known_layout(seen)
    grid = layout.key_grid or layout.grid
    cells = _meaning(layout, layout.key_index, key_prefix(layout), grid, columns)
    cells = _complete(cells, columns.shape[-1], "columns", seen)
    count = math.prod(grid)
    places = torch.where(cells < 0, count, cells).flatten(1)
    heat = columns.new_zeros(columns.shape[0], count + 1).scatter_add_(1, places, columns.flatten(1))
    return heat[:, :count].reshape(-1, *grid)


def _rows(seen: AttentionMap, layout: Layout) -> Tensor:
    """(B, W, P + N) what each row stands for. As many rows as the prefix has are the prefix alone, as in pooling."""
    index = layout.query_index
    if seen.queries is None and index is None and seen.weights.shape[-2] == layout.prefix:
        index = torch.empty(0)
    rows = _meaning(layout, index, layout.prefix, layout.grid, seen.weights)
    return rows if seen.queries is not None else _complete(rows, seen.weights.shape[-2], "rows", seen)


def _meaning(layout: Layout, index: Tensor | None, prefix: int, grid: tuple[int, ...], like: Tensor) -> Tensor:
    """(B, W, P + N) what each row or column stands for: a cell's number, or `PREFIX`, `PADDING`; B of `like`."""
    if index is None:
        index = torch.arange(math.prod(grid))
    elif index.ndim == 2:
        index = index[:, None] if layout.windows == 1 else index[None]
    lead = like.shape[0], layout.windows
    image = index.to(like.device).long().expand(*lead, -1)
    return torch.cat([image.new_full((*lead, prefix), PREFIX), image], dim=-1)


def _complete(meaning: Tensor, count: int, what: str, seen: AttentionMap) -> Tensor:
    if meaning.shape[-1] != count:
        raise ValueError(
            f"the layout of layer {seen.layer} describes {meaning.shape[-1]} {what}, its map has {count}: "
            "whoever called attend gave the wrong Layout, or record_attention the wrong grid and prefix"
        )
    return meaning


def _wanted(rows: Tensor, seen: AttentionMap, query: Query) -> Tensor:
    """(B, W, P + N) true for the rows that stand for `query`."""
    layout = known_layout(seen)
    if query == "mean":
        return rows != PADDING
    if query != "class":
        return rows == _cell(query, layout.grid)
    read = readout_rows(layout)
    if read is None:
        raise CannotExplainError(
            f"layer {seen.layer} has {layout.prefix} rows that are no image cell (class tokens, registers, object "
            "queries), and its Layout does not say which of them the head reads: name one with row=, or whoever calls "
            "attend gives Layout(readout=...)"
        )
    if not read:
        return rows >= 0
    chosen = torch.zeros_like(rows, dtype=torch.bool)
    chosen[..., list(read)] = True
    return chosen


def _numbered(rows: Tensor, seen: AttentionMap, row: int) -> Tensor:
    """(B, W, P + N) true for that row (of each window), unless it is padding."""
    count = rows.shape[-1]
    if not 0 <= row < count:
        raise ValueError(f"row must lie in 0 … {count - 1} at layer {seen.layer}, which has {count} rows; got {row}")
    return (torch.arange(count, device=rows.device) == row) & (rows != PADDING)


def _cell(query: Query, grid: tuple[int, ...]) -> int:
    """The number of a cell in raster order."""
    if isinstance(query, str):
        raise ValueError(f"query must be class, mean, a cell's number or (row, column); got {query!r}")
    if isinstance(query, int):
        inside, number = 0 <= query < math.prod(grid), query
    else:
        inside = len(query) == len(grid) and all(0 <= at < size for at, size in zip(query, grid, strict=True))
        number = sum(at * math.prod(grid[axis + 1 :]) for axis, at in enumerate(query))
    if not inside:
        raise ValueError(f"query must be a cell of the {' x '.join(map(str, grid))} grid, counted from 0; got {query}")
    return number
