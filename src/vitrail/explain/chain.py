"""Which maps rollout can multiply: each must lead from all tokens of the layer before to the same tokens, or end there.

Legend: `Q` queries, `K` keys.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from vitrail.explain.choice import CannotExplainError
from vitrail.explain.places import key_prefix
from vitrail.explain.record import AttentionMap

MEND = "use method='attention' (--method attention), which shows one layer by itself"


def queries(seen: AttentionMap) -> int:
    return seen.weights.shape[-2]


def keys(seen: AttentionMap) -> int:
    return seen.weights.shape[-1]


def check_chain(maps: Sequence[AttentionMap], fusion: str) -> None:
    """Raises `CannotExplainError` unless the maps can be multiplied, `ValueError` where the recording is at fault."""
    if not maps:
        raise ValueError("rollout needs at least one attention map; got none: see record_attention")
    for below, seen in zip([None, *maps], maps, strict=False):
        _check_recorded(below, seen, fusion)
        if reason := _not_square(seen) or (_not_next(below, seen) if below else ""):
            raise CannotExplainError(
                "rollout is a product of matrices, each of which must lead from all tokens to the same tokens: "
                f"layer {seen.layer} {reason}: {MEND}"
            )


def check_tail(tail: Sequence[AttentionMap], below: AttentionMap, fusion: str) -> None:
    """Raises like `check_chain` unless `tail` is attention pooling, or class attention, to the tokens `below` left."""
    for before, seen in zip([below, *tail], tail, strict=False):
        _check_recorded(before, seen, fusion)
        if reason := _no_end(below, seen, tail):
            raise CannotExplainError(
                f"rollout ends in attention pooling or in class attention: layer {seen.layer} {reason}: {MEND}"
            )


def _check_recorded(below: AttentionMap | None, seen: AttentionMap, fusion: str) -> None:
    """Raises `ValueError` where the recording left something out."""
    if seen.heads == "mean" and fusion != "mean":
        raise ValueError(f"layer {seen.layer} was recorded with heads='mean'; got {fusion!r}: record with heads=None")
    if seen.queries is not None:
        raise ValueError(
            f"layer {seen.layer} was recorded with rows {list(seen.queries)} only; record with queries=None"
        )
    if below and seen.layer != below.layer + 1:
        raise ValueError(f"layer {seen.layer} follows layer {below.layer}: record the layers between too")


def _not_square(seen: AttentionMap) -> str:
    """Why a map does not lead from its tokens to themselves, or empty."""
    layout = seen.layout
    if layout and layout.windows > 1:
        return f"attends within {layout.windows} windows, so its map holds no flow between them"
    if queries(seen) != keys(seen):
        return f"has {queries(seen)} queries and {keys(seen)} keys, so its keys are other tokens than its queries"
    if layout and not _same_index(layout.query_index, layout.key_index):
        return "has queries that stand for other image cells than its keys"
    return ""


def _not_next(below: AttentionMap, seen: AttentionMap) -> str:
    """Why a map does not start from the tokens where the one before ended, or empty."""
    if below.layout and seen.layout and below.layout.branch != seen.layout.branch:
        return f"belongs to another branch of the network than layer {below.layer}"
    if keys(below) != keys(seen):
        return f"has {keys(seen)} tokens where layer {below.layer} left {keys(below)}"
    return _other_cells(below, seen)


def _other_cells(below: AttentionMap, seen: AttentionMap) -> str:
    if below.layout and seen.layout and not _same_index(below.layout.key_index, seen.layout.key_index):
        return f"has its tokens stand for other image cells than layer {below.layer}"
    return ""


def _no_end(below: AttentionMap, seen: AttentionMap, tail: Sequence[AttentionMap]) -> str:
    """Why a map is neither attention pooling of the tokens that `below` left nor class attention to them, or empty."""
    rows, columns, tokens = queries(seen), keys(seen), keys(below)
    pools = len(tail) == 1 and rows < columns <= tokens
    if seen.layout and seen.layout.windows > 1:
        return f"attends within {seen.layout.windows} windows"
    if not pools and (columns != rows + tokens or rows != queries(tail[0])):
        return (
            f"has {rows} queries and {columns} keys where layer {below.layer} left {tokens} tokens: one layer may pool "
            "these tokens; class attention has them as keys after its own queries, which are as many in every layer"
        )
    if below.layout and seen.layout and key_prefix(seen.layout) - below.layout.prefix != columns - tokens:
        return (
            f"has {key_prefix(seen.layout)} of {columns} keys before the image tokens where layer {below.layer} left "
            f"{below.layout.prefix} of {tokens} tokens there, so its image tokens are others"
        )
    return _other_cells(below, seen)


def _same_index(one: Tensor | None, other: Tensor | None) -> bool:
    return one is other or (one is not None and other is not None and torch.equal(one, other))
