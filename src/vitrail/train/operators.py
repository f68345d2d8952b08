"""What operators did in some steps that torch's profiler saw: their times, and what they multiplied.

FLOPs are counted from the shapes that operators were called with. torch's own counter (`torch.utils.flop_counter`) says
the same of the same operators, but hooks every module: networks then make what they leave out otherwise.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

from torch.profiler import profile

SHORT = 10.0
"""microseconds below which an operator is mostly its own beginning"""
PRODUCTS = re.compile(r"mm$|convolution|attention|linear", re.IGNORECASE)
"""names of operators that multiply matrices"""
TOP = 10
"""operators that are listed"""
LEARNS = "learning"
"""name of what lies between the beginning of a batch and its end"""
Shapes = Sequence[Sequence[int]]
Count = Callable[[Shapes, Sequence[Any]], int]


class Operator(NamedTuple):
    """An operator's own time in a step, without that of the operators that it calls."""

    name: str
    calls: float
    milliseconds: float


class Traced(NamedTuple):
    """What operators did in a step, on average."""

    worked: float
    """milliseconds that a CPU spent in operators of `SHORT` or more, a GPU in any kernel"""
    products: float
    """milliseconds in products, convolutions and attention"""
    flop: float
    operators: tuple[Operator, ...]


def operators_of(traces: Sequence[profile], device: str) -> Traced:
    """What was done from the beginning of each batch to its end; a GPU's work before that too."""
    worked = products = flop = 0.0
    spent: Counter[str] = Counter()
    calls: Counter[str] = Counter()
    for trace in traces:
        for event in trace.events():
            if event.device_type.name != "CPU" and not event.is_user_annotation:
                worked += event.self_device_time_total
        for event in _learning(trace):
            own = event.self_device_time_total if device == "cuda" else event.self_cpu_time_total
            worked += own if device != "cuda" and own >= SHORT else 0.0
            products += own if PRODUCTS.search(event.name) else 0.0
            flop += FLOPS[event.name](event.input_shapes, event.concrete_inputs) if event.name in FLOPS else 0
            spent[event.name] += own
            calls[event.name] += 1
    steps = len(traces)
    longest = tuple(Operator(name, calls[name] / steps, us / steps / 1e3) for name, us in spent.most_common(TOP))
    return Traced(worked / steps / 1e3, products / steps / 1e3, flop / steps, longest)


def _learning(trace: profile) -> Iterator[Any]:
    """The operators that were called while a batch was learnt from; not what somebody named, which may hold any."""
    operators = [event for event in trace.events() if event.device_type.name == "CPU"]
    (learns,) = (event.time_range for event in operators if event.name == LEARNS)
    for event in operators:
        named = "::" not in event.name or event.name.startswith("autograd::")
        if not named and learns.start <= event.time_range.start <= learns.end:
            yield event


def _product(first: int) -> Count:
    """(…, n, k) times (…, k, m), which are inputs `first` and the next."""
    return lambda shapes, _: 2 * math.prod(shapes[first]) * shapes[first + 1][-1]


def _attention(shapes: Shapes, _: Any) -> int:
    """Queries (B, H, N, D), keys (B, H, M, D) and values (B, H, M, E)."""
    q, k, v = shapes[:3]
    return 2 * math.prod(q[:-1]) * k[-2] * (k[-1] + v[-1])


def _attention_back(shapes: Shapes, _: Any) -> int:
    """After the output's gradient come queries, keys and values: the scores once more, and four more products."""
    q, k, v = shapes[1:4]
    return 2 * math.prod(q[:-1]) * k[-2] * (3 * k[-1] + 2 * v[-1])


def _convolution(shapes: Shapes, values: Sequence[Any]) -> int:
    (batch, _, *size), weight = shapes[:2]
    stride, padding, dilation = values[3:6]
    out = [
        (side + 2 * pad - far * (kernel - 1) - 1) // step + 1
        for side, pad, far, kernel, step in zip(size, padding, dilation, weight[2:], stride, strict=True)
    ]
    return 2 * batch * math.prod(out) * math.prod(weight)


def _convolution_back(shapes: Shapes, values: Sequence[Any]) -> int:
    """Of the input, if it has a gradient, and of the weight."""
    grad, _, weight = shapes[:3]
    wanted = sum(values[-1][:2])
    return wanted * 2 * grad[0] * math.prod(grad[2:]) * math.prod(weight)


FUSED = ("flash_attention", "flash_attention_for_cpu", "efficient_attention", "cudnn_attention")
FLOPS: dict[str, Count] = {
    "aten::mm": _product(0), "aten::bmm": _product(0), "aten::addmm": _product(1), "aten::baddbmm": _product(1),
    "aten::convolution": _convolution, "aten::convolution_backward": _convolution_back,
    **{f"aten::_scaled_dot_product_{kernel}": _attention for kernel in FUSED},
    **{f"aten::_scaled_dot_product_{kernel}_backward": _attention_back for kernel in FUSED},
}  # fmt: skip
"""FLOPs by an operator's shapes and its other inputs; what is no product has none"""
