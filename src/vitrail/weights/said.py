"""What somebody else's config says of the network that weights beside it are of: the network itself, once it can be.

    transformers' config.json ── network_of ──> a family and its fields ── plausible, and can be built ──> Base

A config is text from anywhere: before a network is built of it, it is held against the tensors that it is to describe.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from vitrail.folder import CONFIG
from vitrail.models.backbone import Backbone
from vitrail.models.registry import FAMILIES, ROWS
from vitrail.weights.own import whole_numbers
from vitrail.weights.read import CheckpointError
from vitrail.weights.transformers_networks import network_of


class Base(NamedTuple):
    """What a network is made of: a row of the registry, or what stands beside its weights."""

    family: str
    config: Any
    row: str = ""

    def built(self, fields: Mapping[str, Any]) -> Backbone:
        """The network with these fields of its config."""
        model = FAMILIES[self.family].model(replace(self.config, **fields))
        model.variant = self.row
        return model


def base_of(row: str) -> Base:
    """A row of the registry."""
    return Base(ROWS[row], FAMILIES[ROWS[row]].variants[row], row)


def said_network(where: str, config: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Base | None:
    """The network that transformers' config says of a file's tensors; None for a `model_type` that is not known.

    Raises `CheckpointError`, its message beginning with `where`, for what no network here can be.
    """
    try:
        found = network_of(config)
        if found is None:
            return None
        family, said = found
        check_plausible(where, said, tensors)
        base = Base(family, FAMILIES[family].config(**said))
        with torch.device("meta"):
            base.built({})  # what no config refuses, such as heads that do not divide a width, a network does
        return base
    except CheckpointError:
        raise
    except (TypeError, ValueError, ArithmeticError, LookupError) as error:
        raise CheckpointError(f"{where}: {CONFIG} beside it says no network of this package: {error}") from None


def check_plausible(where: str, said: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
    """Raises `CheckpointError` where fields describe a larger network than tensors can be of."""
    layers = sum(max(1, n) for name in ("depth", "depths") for n in whole_numbers(said.get(name, 0)))
    largest = max((max(tensor.shape, default=0) for tensor in tensors.values()), default=0)
    numbers = [n for name, value in said.items() if name != "img_size" for n in whole_numbers(value)]
    if layers > 2 * len(tensors) + 2 or max(numbers, default=0) > max(largest, 1):
        raise CheckpointError(f"{where}: what stands beside it describes a larger network than its weights are of")
