"""Evaluation mode for a while, in any number of threads at once.

Every submodule is counted: the first who wants it in evaluation saves its mode, the last who is done restores it. So
two threads that share a model do not put it back into training under each other, nor leave it in evaluation for good.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import nn


@dataclass
class _Held:
    """A module that somebody wants in evaluation mode."""

    module: nn.Module
    training: bool
    """its mode before the first of the holders came"""
    holders: int = 0


_LOCK = threading.Lock()
_HELD: dict[int, _Held] = {}  # by id: a module may define equality as it likes


@contextmanager
def evaluating(module: nn.Module) -> Iterator[None]:
    """Evaluation mode without gradients; afterwards every submodule has the mode that it had, after an error too.

    Modes are shared by all threads: a thread that trains the same module meanwhile finds it in evaluation mode.
    """
    parts = list(module.modules())  # those that came are those that leave, whatever is added meanwhile
    _hold(parts)
    try:
        with torch.no_grad():
            yield
    finally:
        _release(parts)


def _hold(parts: list[nn.Module]) -> None:
    """All modes are saved before one is changed: a compiled module has the mode of what it wraps."""
    with _LOCK:
        for part in parts:
            _HELD.setdefault(id(part), _Held(part, part.training)).holders += 1
        for part in parts:
            part.training = False


def _release(parts: list[nn.Module]) -> None:
    with _LOCK:
        for part in parts:
            held = _HELD[id(part)]
            held.holders -= 1
            if held.holders == 0:
                part.training = _HELD.pop(id(part)).training
