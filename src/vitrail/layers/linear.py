"""A linear layer that takes the faster of two equal matrix products where nobody wants gradients.

    F.linear      copies the bias over the whole result, then adds the product (in fp32 on the CPU: MKL's)
    oneDNN        multiplies and adds in one pass; on some chips its fp32 product alone is twice as fast, on others not

So in bf16 oneDNN is called where there is no gradient to follow; in fp32 where, besides, a timing of some milliseconds,
made once for each number of threads, says that it pays. `activated` has it apply the activation too while the product
is in the cache: one pass over the widest tensor of a block less, and one such tensor less in memory. Sums are rounded
otherwise, by no more. Whoever needs the same bits in every process (`train.fit`, which goes on bit for bit) holds
`plain_linear()` meanwhile.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn.modules.module import _has_any_global_hook
from torch.utils._python_dispatch import _get_current_dispatch_mode

PAYS = 0.98
"""the share of the usual time that oneDNN must stay under"""
ROUNDS = 5
LEAST = 2**26
"""multiplications below which asking costs as much as there is to gain"""
HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
_PLAIN: ContextVar[bool] = ContextVar("plain_linear", default=False)


class Linear(nn.Linear):
    """`torch.nn.Linear` by the fastest kernel: (…, in_features) -> (…, out_features).

    What looks for `type(layer) is nn.Linear`, as `torch.ao.quantization` does, passes it by; `isinstance` finds it.
    """

    def forward(self, x: Tensor) -> Tensor:
        return linear(x, self.weight, self.bias)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """`F.linear` by the fastest kernel, for a bias that is no parameter of its own."""
    if torch.is_grad_enabled() or not _takes_onednn(x, weight, bias):
        return F.linear(x, weight, bias)
    return _onednn(x, weight, bias)


def activated(layer: nn.Module, act: nn.Module, x: Tensor) -> Tensor:
    """act(layer(x)), by one kernel where there is one for both and nobody looks between them."""
    if isinstance(layer, Linear) and isinstance(act, nn.GELU) and not torch.is_grad_enabled():
        plain = type(layer) is Linear and type(act) is nn.GELU and not is_hooked(layer, act)
        if plain and _takes_onednn(x, layer.weight, layer.bias):
            return _onednn(x, layer.weight, layer.bias, "gelu", act.approximate)
    made: Tensor = act(layer(x))
    return made


@contextmanager
def plain_linear() -> Iterator[None]:
    """`F.linear` everywhere in this thread, whatever a timing said: the same bits in every process."""
    before = _PLAIN.set(True)
    try:
        yield
    finally:
        _PLAIN.reset(before)


def _takes_onednn(x: Tensor, weight: Tensor, bias: Tensor | None) -> bool:
    """oneDNN's operator follows neither gradients nor autocast, and is for tensors that fit and are what they seem."""
    if torch.compiler.is_compiling() or torch._C._is_tracing() or x.numel() * weight.size(0) < LEAST:
        return False
    tensors = (x, weight) if bias is None else (x, weight, bias)
    fitting = x.shape[-1] == weight.shape[-1] and len({t.dtype for t in tensors}) == 1
    if not fitting or {t.device.type for t in tensors} != {"cpu"} or _PLAIN.get() or is_traced(*tensors):
        return False
    free = torch.backends.mkldnn.enabled and not torch.is_autocast_enabled("cpu")
    return bool(free) and _is_fast(x.dtype, torch.get_num_threads())


def is_traced(*tensors: Tensor) -> bool:
    """Whether somebody reads along: a tensor's own class, a counter, `torch.func`, forward-mode gradients."""
    own = {type(tensor) for tensor in tensors} - {Tensor, nn.Parameter}
    derived = torch._C._functorch.maybe_current_level() is not None or forward_ad._current_level >= 0
    return bool(own) or derived or _get_current_dispatch_mode() is not None


def is_hooked(*modules: nn.Module) -> bool:
    """Whether anybody looks at what these modules or their parts take and give, by a hook or a `forward` put in."""
    parts = [part for module in modules for part in module.modules()]
    replaced = any("forward" in vars(part) for part in parts)
    return replaced or _has_any_global_hook() or any(getattr(part, kind) for part in parts for kind in HOOKS)


@cache
def _is_fast(dtype: torch.dtype, threads: int) -> bool:
    """Whether oneDNN is there for `dtype`, and pays with so many threads."""
    if not torch.backends.mkldnn.is_available():
        return False
    if dtype == torch.bfloat16:
        return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    return dtype == torch.float32 and _pays()


def _pays() -> bool:
    """Times one fp32 product of a ViT's shape both ways, in turns, and compares the best of each."""
    sizes = (512, 768), (768, 768), (768,)
    x, weight, bias = (torch.ones(size, dtype=torch.float32, device="cpu") for size in sizes)
    calls: tuple[Callable[..., Tensor], ...] = (_onednn, F.linear)
    took = [[_seconds(call, x, weight, bias) for call in calls] for _ in range(ROUNDS)]
    onednn, usual = (min(column) for column in zip(*took, strict=True))  # the first round makes the kernels
    return onednn < PAYS * usual


def _seconds(call: Callable[..., Tensor], *args: Tensor) -> float:
    start = time.perf_counter()
    call(*args)
    return time.perf_counter() - start


def _onednn(x: Tensor, weight: Tensor, bias: Tensor | None, then: str = "none", form: str = "") -> Tensor:
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, then, [], form)
