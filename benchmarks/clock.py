"""Time, fairly: candidates take turns in one process, so that a change of the machine's speed meets all of them."""

from __future__ import annotations

import math
import os
import platform
import random
import statistics
import time
from collections.abc import Callable, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

Timer = Callable[[], float]
WARM = 2
"""rounds that do not count"""
TURN = 0.1
"""seconds that a candidate's turn lasts at least: shorter calls are repeated, or its caches would still be another's"""


def rounds(
    calls: Mapping[str, Callable[[], Any]], repeats: int, device: str = "cpu", timer: Timer = time.perf_counter
) -> list[dict[str, float]]:
    """Seconds of every call, round by round, in an order that is drawn anew each time.

    `time.process_time` as `timer` counts the processor's, which other work on the machine touches less.
    """
    draw, found = random.Random(0), []
    for _ in range(WARM):
        counts = {name: math.ceil(TURN / _seconds(call, 1, device, timer)) for name, call in calls.items()}
    for _ in range(repeats):
        order = draw.sample(list(calls), len(calls))
        found.append({name: _seconds(calls[name], counts[name], device, timer) for name in order})
    return found


def _seconds(call: Callable[[], Any], count: int, device: str, timer: Timer) -> float:
    _wait(device)
    start = timer()
    for _ in range(count):
        call()
    _wait(device)
    return (timer() - start) / count


def _wait(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def median(found: list[dict[str, float]], name: str) -> float:
    """Seconds."""
    return statistics.median(seconds[name] for seconds in found)


def ratio(found: list[dict[str, float]], name: str, ours: str = "vitrail") -> float:
    """How many times faster we are than `name`: the median over rounds, each of which compares neighbours in time."""
    return statistics.median(seconds[name] / seconds[ours] for seconds in found)


def machine(device: str, *packages: str) -> str:
    """What was measured on, and with which versions: the line above a table."""
    chip = torch.cuda.get_device_name() if device == "cuda" else f"{_processor()}, {torch.get_num_threads()} threads"
    return ", ".join([chip, *(f"{name} {version(name)}" for name in ("torch", *packages))])


def _processor() -> str:
    """Name, family and model: a name alone does not tell generations apart."""
    path = Path("/proc/cpuinfo")
    if not path.exists():
        return platform.processor() or platform.machine()
    lines = (line.partition(":") for line in path.read_text(encoding="utf-8").splitlines() if line.strip())
    facts = {key.strip(): value.strip() for key, _, value in lines}
    name, family, model = (facts.get(key, "?") for key in ("model name", "cpu family", "model"))
    return f"{name} (family {family}, model {model}), {os.cpu_count()} cores"
