"""How exactly our networks answer as other libraries' do: the largest differences of logits and of features.

For every row of the registry and every library that has it: the library's network gets random weights, its file is
loaded as anybody's would be, and both answer the same images in fp32, at the row's own size and at another.
"""

from __future__ import annotations

import logging
import re
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from vitrail.layers.embed import pair
from vitrail.layers.linear import plain_linear
from vitrail.models.backbone import Backbone
from vitrail.models.registry import build_model, list_models
from vitrail.names import check_choice
from vitrail.research.peers import INSTALL, SOURCES, Peer, build_peer
from vitrail.weights.load import load_weights

LOG = logging.getLogger("vitrail")
MOST_PARAMETERS = 700_000_000
"""of a row that is compared among others: both networks stand in memory, in fp32"""


class Parity(NamedTuple):
    """One row against one library at one size."""

    row: str
    source: str
    size: tuple[int, int]
    logits: float
    """the largest difference, as a share of the largest logit"""
    features: float
    """the largest share over all intermediate features"""
    compared: int
    """how many features"""
    parameters: tuple[int, int]
    """ours and theirs"""


def parity_table(
    pattern: str = "*", sources: Sequence[str] | None = None, dtype: torch.dtype = torch.float32
) -> Iterator[Parity]:
    """The comparisons of all rows that match a shell pattern, one at a time; two images each.

    In `torch.float64` what is left of a difference is no rounding.

    Without `sources`, all libraries that are installed. A row of more than `MOST_PARAMETERS` is left out unless it is
    the only one. The logger `vitrail` is told of what is left out. Raises `ValueError` where a library that is named is
    unknown or not installed, or where a network is not the same.
    """
    for source in sources or ():
        check_choice("sources", source, SOURCES)
    named = sources or [source for source in SOURCES if _is_there(source)]
    for row in _small_enough(list_models(pattern)):
        for source in named:
            peer = build_peer(row, source)
            if peer is not None:
                yield from compare(row, peer, dtype)


def _is_there(source: str) -> bool:
    there = find_spec(source) is not None
    if not there:
        LOG.info("%s is not installed and left out: %s installs it", source, INSTALL)
    return there


def _small_enough(rows: list[str]) -> Iterator[str]:
    for row in rows:
        with torch.device("meta"):
            count = _count(build_model(row))
        if len(rows) == 1 or count <= MOST_PARAMETERS:
            yield row
        else:
            LOG.info("%s is left out for its %s parameters: name it alone to have it", row, f"{count:,}")


@torch.no_grad()
def compare(row: str, peer: Peer, dtype: torch.dtype = torch.float32) -> Iterator[Parity]:
    """One row against one library, at its own size and at another, where the library runs at another.

    Raises what the library raises at the row's own size.
    """
    ours = build_model(row, **peer.options)
    with tempfile.TemporaryDirectory() as folder:
        load_weights(ours, peer.save(peer.model, Path(folder)))
    ours.eval().to(dtype)
    peer.model.to(dtype)
    counts = _count(ours), _count(peer.model)
    own = pair(ours.config.img_size)
    for size in (own,) if peer.own_size else (own, other_size(ours)):
        images = torch.randn(2, 3, *size, generator=torch.Generator().manual_seed(1)).to(dtype)
        try:
            theirs, states = _answer(peer, images)
        except (ValueError, AssertionError, RuntimeError):  # each says otherwise that it takes its own size alone
            if size == own:
                raise
            continue
        with plain_linear():
            logits, maps = ours(images), ours.features(images, norm=peer.normed)
        shares = [
            share(_laid(state, like, prefix.shape[1]), like) for state, like, prefix in zip(states, *maps, strict=True)
        ]
        yield Parity(row, peer.source, size, share(theirs, logits), max(shares), len(shares), counts)


def other_size(model: Backbone) -> tuple[int, int]:
    """Not square, and not the one that positions were made for: three quarters as high, half as wide again."""
    height, width = pair(model.config.img_size)
    cell = model.cell
    return height * 3 // 4 // cell * cell, width * 3 // 2 // cell * cell


def share(theirs: Tensor, ours: Tensor) -> float:
    """The largest difference, as a share of the largest number."""
    return float((theirs - ours).abs().max() / ours.abs().max())


def _count(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def _answer(peer: Peer, images: Tensor) -> tuple[Tensor, list[Tensor]]:
    with _outputs(peer) as states:
        logits = peer.logits(peer.model(images))
    return logits, states


@contextmanager
def _outputs(peer: Peer) -> Iterator[list[Tensor]]:
    """What the modules named by `peer.states` give, in the order in which they run."""
    seen: list[Tensor] = []

    def keep(module: nn.Module, args: Any, out: Any) -> None:
        seen.extend(out if isinstance(out, list) else [_first(out)])

    named = peer.model.named_modules()
    hooks = [module.register_forward_hook(keep) for name, module in named if re.fullmatch(peer.states, name)]
    try:
        yield seen
    finally:
        for hook in hooks:
            hook.remove()


def _first(out: Any) -> Tensor:
    """What stands first in a tuple of tuples: some libraries give attention and more beside a state."""
    while isinstance(out, tuple):
        out = out[0]
    assert isinstance(out, Tensor)
    return out


def _laid(state: Tensor, like: Tensor, prefix: int) -> Tensor:
    """Another library's state as a map (B, C, h, w): from tokens (B, P + N, C), (B, h, w, C), or as it is."""
    if state.ndim == 3:
        return state[:, prefix:].transpose(1, 2).unflatten(2, tuple(like.shape[-2:]))
    return state if state.shape == like.shape else state.permute(0, 3, 1, 2)
