"""Seeing attention in any model, without changing it.

    with record_attention() as record:
        model(images)
    record.maps[0].weights                                     # (B, H, Q, K), layer 1

A `TorchFunctionMode` stands between the model and torch for as long as the `with` lasts. It knows four ways to attend:
our `attend` (and `attend_topk`, `attend_linear`), `F.scaled_dot_product_attention`, `F.multi_head_attention_forward`,
and a softmax whose result is then the left operand of a matmul. What one of them does inside is not seen again, so each
attention counts once.

Between a softmax and its matmul it follows copies, reshaping, dropout, products, and the three ways to mix heads named
at `MIXING`. A product with a tensor (a mask of heads, dropout by hand) is the `effective` map. Two limits: a product
with a number, or one that broadcasts the map to more than it was, is not told from the softmax; and after any other
call, such as a sum, a division or a masked fill, the softmax is no longer known and the layer not counted.

The mode is thread-local, sets no hook and leaves nothing behind. Compiled models would show nothing, so while anybody
records, `torch.compiler.set_stance("force_eager")` holds for the whole process.

Legend: `B` batch, `H` heads, `Q` queries, `K` keys, `D` head width, `C` model width, `h`, `w` token grid.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.overrides import TorchFunctionMode
from torch.utils.weak import WeakTensorKeyDictionary

from vitrail.explain.calls import CALLS, fold, pick
from vitrail.explain.choice import Choice, Heads, Layers, Part, Queries, no_attention, no_class_rows
from vitrail.layers.attention import Layout

MAX_PREFIX = 8  # class, distillation and register tokens of any published model
MATMULS = frozenset({"matmul", "__matmul__", "bmm", "einsum"})
CARRIED = frozenset({
    "dropout", "to", "type", "type_as", "float", "half", "bfloat16", "double", "clone", "contiguous",
    "view", "reshape", "unflatten", "flatten",
})  # fmt: skip
"""what may stand between a softmax and the matmul and keeps it what it is"""
PRODUCTS = frozenset({"mul", "mul_", "multiply", "__mul__", "__rmul__", "__imul__"})
"""what may stand there too, and makes something else of it unless it is by a number"""
MIXING = {
    ("weights", "permute"): "heads last",
    ("heads last", "linear"): "mixing",
    ("mixing", "permute"): "mixed",
    ("weights", "conv2d"): "mixed",
    ("weights", "mix"): "mixed",
}
"""talking heads of foreign models: a linear layer over heads, a 1 x 1 convolution, or an einsum that keeps the keys"""
FOLLOWED = MATMULS | CARRIED | PRODUCTS | {"softmax", "permute", "linear", "conv2d"}


@dataclass(frozen=True, eq=False)
class AttentionMap:
    """What one attention layer weighed the values with, for the heads and queries that were asked for."""

    weights: Tensor
    """(B, H, Q, K) softmax, or the kernel matrix of linear attention, before dropout, at least fp32: rows sum to 1"""
    layout: Layout | None
    """which image cells all the rows and columns stand for; None where that is unknown"""
    layer: int
    """counted from 1, in the order of the forward pass"""
    effective: Tensor | None = None
    """(B, H, Q, K) what multiplied the values where the softmax was mixed or multiplied before that; else None.

    Its rows need not sum to 1, and it may be negative.
    """
    heads: Literal["mean"] | tuple[int, ...] | None = None
    """which heads `weights` holds: their mean, these, or (None) all"""
    queries: tuple[int, ...] | None = None
    """which rows `weights` holds; None is all"""

    @property
    def acting(self) -> Tensor:
        """(B, H, Q, K) what multiplied the values: `effective` where there is one, else `weights`."""
        return self.weights if self.effective is None else self.effective


@dataclass
class AttentionRecord:
    """What was seen between the start and the end of the `with`."""

    maps: list[AttentionMap] = field(default_factory=list)
    """one per recorded layer, in the order of the forward pass"""
    depth: int = 0
    """attention layers seen, recorded or not"""


@contextmanager
def record_attention(
    layers: Layers = None,
    heads: Heads = None,
    queries: Queries = None,
    grad: bool = False,
    *,
    grid: tuple[int, int] | None = None,
    prefix: int | None = None,
) -> Iterator[AttentionRecord]:
    """Records the attention of whatever model runs inside the `with`, one forward pass, in this thread.

    Args:
        layers: which layers, one number or several, from 1; None is all. A second forward pass would count on.
        heads: head numbers from 0, one number, or "mean"; None keeps all.
        queries: "class", row numbers from 0, or None for all. Only these are computed. "class" is what the head reads:
            the class token's row, those of two such tokens, or, where it reads the mean, all image tokens'. Layers
            whose rows are not known to stand for anything are left out, unless they are named in `layers`.
        grad: puts the very weights that multiply the values into the graph, for `torch.autograd.grad(y, map.weights)`;
            gradient checkpointing saves nothing meanwhile. Without it the model's output is bit-equal to an unrecorded
            one, save that `nn.MultiheadAttention` leaves its fused inference path (a difference of 1e-7).
        grid: (h, w) of the image tokens of a foreign model. By default the first convolutions tell, or a square fits.
        prefix: rows before the image tokens of a foreign model; by default what the grid leaves, at most 8. Its head is
            taken to read the first of them, where published models have the class token, or without any the mean.

    Raises `ValueError` for layers, heads or queries that are not there, if nothing was recorded, and for `grad` where
    autograd is off or together with `heads` or `queries` (a part of a map is not what multiplies the values).
    """
    recorder = _Recorder(Choice(layers, heads, queries), grad, _Geometry(grid, prefix))
    with _STANCE, recorder:
        yield recorder.record
    recorder.check()


class _EagerStance:
    """Holds compiled models to eager code, process-wide, from the first recording that begins to the last that ends."""

    def __init__(self) -> None:
        self.lock, self.holders, self.held = threading.Lock(), 0, nullcontext()

    def __enter__(self) -> None:
        with self.lock:
            if self.holders == 0:
                self.held = torch.compiler.set_stance("force_eager")  # takes hold at once, remembers what was
            self.holders += 1

    def __exit__(self, *error: object) -> None:
        with self.lock:
            self.holders -= 1
            if self.holders == 0:
                self.held.__exit__(None, None, None)


_STANCE = _EagerStance()


class _Geometry:
    """Guesses the layout of foreign attention: N rows are a prefix and then the grid of a convolution seen before."""

    def __init__(self, grid: tuple[int, int] | None, prefix: int | None) -> None:
        if prefix is not None and prefix < 0:
            raise ValueError(f"prefix must be the number of rows before the image tokens; got {prefix}")
        self.grid, self.prefix = grid, prefix
        self.seen: list[tuple[int, int]] = []
        self.batch: int | None = None

    def see(self, features: Tensor) -> None:
        """Notes the output (B, C, h, w) of a convolution."""
        self.batch = features.shape[0]
        self.seen.append((features.shape[-2], features.shape[-1]))

    def layout(self, batch: int, rows: int, keys: int) -> Layout | None:
        """None unless exactly one prefix and grid fit. A single row over more keys is the query that the head reads."""
        if rows not in (1, keys) or self.batch not in (None, batch):
            return None
        grids = [self.grid] if self.grid else list(reversed(self.seen)) or _squares(keys)
        fits = [grid for grid in grids if self._fits(keys - grid[0] * grid[1])]
        if not fits or (len(fits) > 1 and not self.seen):
            return None
        prefix = keys - fits[0][0] * fits[0][1]
        if rows < keys:
            return Layout(fits[0], 1, key_prefix=prefix, readout=(0,))
        return Layout(fits[0], prefix, readout=(0,) if prefix else ())

    def _fits(self, prefix: int) -> bool:
        return prefix == self.prefix if self.prefix is not None else 0 <= prefix <= MAX_PREFIX


def _squares(rows: int) -> list[tuple[int, int]]:
    return [(side, side) for side in range(math.isqrt(rows), 0, -1)]


class _Recorder(TorchFunctionMode):
    """Sees every torch call of this thread.

    Torch takes a mode off while it handles a call: what happens inside one, a backward pass with layers that are run
    again included, does not count twice.
    """

    def __init__(self, choice: Choice, grad: bool, geometry: _Geometry) -> None:
        super().__init__()
        if grad:
            _need_graph()
            if choice.heads is not None or choice.queries is not None:
                raise ValueError("grad=True records whole maps, for only they multiply the values: drop heads, queries")
        self.choice, self.grad, self.geometry = choice, grad, geometry
        self.record = AttentionRecord()
        self.softmaxes = WeakTensorKeyDictionary()  # what came of a softmax -> _Softmax
        self.tokens = False  # whether a call was seen that networks of tokens make, and ResNet and ConvNeXt do not

    def __torch_function__(self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        with _saving_plainly() if self.grad else nullcontext():
            return self._attention(func, args, kwargs) if func in CALLS else self._other(func, args, kwargs)

    def check(self) -> None:
        """Raises `ValueError` if what was asked for was not there."""
        depth = self.record.depth
        if depth == 0:
            raise no_attention(convolves=bool(self.geometry.seen) and not self.tokens)
        highest = max(self.choice.layers or (1,))
        if highest > depth:  # of a whole range up to it, the one number that somebody asked for
            raise ValueError(f"layers must lie in 1 … {depth}, the attention layers that ran; got [{highest}]")
        if not self.record.maps:
            raise no_class_rows(f"none of the {depth} attention layers has")

    def _attention(self, func: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        """A call that is attention by name."""
        self.record.depth += 1
        if not self.choice.layer(self.record.depth):
            return func(*args, **kwargs)
        call = CALLS[func](self.geometry.batch, *args, **kwargs)
        part = self._part(call.layout, (*call.q.shape[:3], call.k.shape[2]))
        if part is None:
            return func(*args, **kwargs)
        if self.grad:
            weights = _in_graph(call.softmax())
            mixed = call.mixed(weights)
            self._keep(weights, mixed, part)
            return call.apply(weights, mixed)
        with torch.no_grad():
            weights = call.softmax(part.folded, part.rows)
            self._keep(weights, call.mixed(weights, part.rows), part)
        return func(*args, **kwargs)

    def _other(self, func: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        """Any other call: follows what comes of a softmax until it is the left operand of a matmul."""
        name = getattr(func, "__name__", "")
        if name not in FOLLOWED:
            return func(*args, **kwargs)
        tensors = _tensors(args, kwargs)
        self.tokens = self.tokens or _takes_tokens(name, tensors[0])
        known = self._known(tensors[: 2 if name in PRODUCTS else 1])
        mixes = name == "einsum" and _keeps_keys(args[0])
        if known and name in MATMULS and not mixes:
            self._matmul(known)
        out = func(*args, **kwargs)
        if name == "softmax":
            return self._softmax(out, tensors[0], kwargs.get("dim", args[1] if len(args) > 1 else None))
        if known and name in PRODUCTS:
            return self._product(known, tensors, out)
        if known:
            self._carry(known, "mix" if mixes else name, out)
        elif name == "conv2d":
            self.geometry.see(out)
        return out

    def _known(self, tensors: Sequence[Tensor]) -> _Softmax | None:
        return next((self.softmaxes[x] for x in tensors if x in self.softmaxes), None)

    def _softmax(self, out: Tensor, scores: Tensor, dim: int | None) -> Tensor:
        if out.ndim < 3 or dim not in (-1, out.ndim - 1):
            return out
        weights = None
        if self.grad and torch.is_grad_enabled():
            weights = _in_graph(_wide_softmax(fold(scores, self.geometry.batch)))
            out = weights.view_as(out).to(out.dtype)
        self.softmaxes[out] = _Softmax(scores, weights)
        return out

    def _carry(self, known: _Softmax, name: str, out: Tensor) -> None:
        """`out` came of a softmax by a call that keeps it one, or that is a step of mixing its heads."""
        if name in CARRIED:
            self.softmaxes[out] = known
        elif step := MIXING.get((known.state, name)):
            mixed = out if self.grad else out.detach()
            self.softmaxes[out] = replace(known, state=step, mixed=mixed if step == "mixed" else None)

    def _product(self, known: _Softmax, factors: Sequence[Tensor], out: Tensor) -> Tensor:
        """`out` is a softmax times a number, which keeps it, or times a tensor, which makes it an effective map."""
        if out.numel() != known.scores.numel() or sum(x.numel() > 1 for x in factors[:2]) < 2:
            self.softmaxes[out] = known
            return out
        mixed = out if self.grad else out.detach()
        mixed = mixed if mixed.shape == known.scores.shape else mixed.reshape(known.scores.shape)
        mixed = fold(mixed, self.geometry.batch)
        if self.grad and mixed is not out:
            out = mixed.reshape(out.shape)  # so that what acts comes of `mixed`
        self.softmaxes[out] = replace(known, state="mixed", mixed=mixed)
        return out

    def _matmul(self, known: _Softmax) -> None:
        """A softmax weighs values: that is attention. The same softmax used twice counts once."""
        if known.counted or known.state not in ("weights", "mixed"):
            return
        known.counted = True
        self.record.depth += 1
        if not self.choice.layer(self.record.depth):
            return
        if self.grad:
            _need_graph()
        scores = fold(known.scores, self.geometry.batch)
        part = self._part(None, tuple(scores.shape))
        if part is None:
            return
        heads = None if known.mixed is not None else part.folded
        with torch.set_grad_enabled(self.grad):
            weights = _wide_softmax(pick(scores, heads, part.rows)) if known.weights is None else known.weights
            mixed = known.mixed if known.mixed is None else pick(known.mixed, None, part.rows)
            self._keep(weights, mixed, part)

    def _part(self, layout: Layout | None, shape: tuple[int, ...]) -> Part | None:
        """What to keep of a map of `shape` (B, H, Q, K), None for nothing."""
        batch, heads, rows, keys = shape
        layout = layout or self.geometry.layout(batch, rows, keys)
        windows = layout.windows if layout else 1
        return self.choice.part(self.record.depth, layout, windows, heads // windows, rows)

    def _keep(self, weights: Tensor, mixed: Tensor | None, part: Part) -> None:
        """Takes a map to the record; of maps whose heads are mixed, which had to be whole, only the heads wanted."""
        if mixed is not None:
            weights, mixed = pick(weights, part.folded, None), part.fused(pick(mixed, part.folded, None))
        heads: Literal["mean"] | tuple[int, ...] | None = "mean" if part.mean else part.heads
        seen = AttentionMap(part.fused(weights), part.layout, self.record.depth, mixed, heads, part.rows)
        self.record.maps.append(seen)


@dataclass(eq=False)
class _Softmax:
    """A softmax that may turn out to be attention."""

    scores: Tensor
    weights: Tensor | None
    """(B, H, Q, K) in the graph, with `grad`"""
    state: str = "weights"
    """where between the softmax and the matmul: a value of `MIXING`"""
    mixed: Tensor | None = None
    """(B, H, Q, K) what came of mixing the heads"""
    counted: bool = False


def _wide_softmax(scores: Tensor) -> Tensor:
    with torch.autocast(scores.device.type, enabled=False):
        return scores.to(torch.promote_types(scores.dtype, torch.float32)).softmax(-1)


def _tensors(args: Any, kwargs: dict[str, Any]) -> list[Tensor]:
    """The tensors among the arguments, lists opened, in order."""
    opened = [y for x in (*args, *kwargs.values()) for y in (x if isinstance(x, list | tuple) else (x,))]
    return [x for x in opened if isinstance(x, Tensor)]


def _takes_tokens(name: str, x: Tensor) -> bool:
    """Whether it is a product of (B, N, C), or a softmax of maps; ConvNeXt's linear layers take (B, h, w, C)."""
    return x.ndim == 3 if name in MATMULS or name == "linear" else name == "softmax" and x.ndim > 2


def _keeps_keys(equation: Any) -> bool:
    """Whether an einsum leaves the last dimension of its first operand, and so does not sum over keys."""
    if not isinstance(equation, str) or "->" not in equation:
        return False
    operands, result = equation.replace(" ", "").split("->")
    return operands.split(",")[0][-1] in result


def _in_graph(weights: Tensor) -> Tensor:
    _need_graph()
    return weights if weights.requires_grad else weights.requires_grad_()


def _need_graph() -> None:
    """Raises `ValueError` where autograd is off."""
    if torch.is_inference_mode_enabled():
        raise ValueError("grad=True needs the autograd graph, which torch.inference_mode() turns off: leave it")
    if not torch.is_grad_enabled():
        raise ValueError(
            "grad=True needs the autograd graph, and torch.no_grad() is on: leave it, or, where the model does it in "
            "reentrant gradient checkpointing, switch that off"
        )


def _saving_plainly() -> AbstractContextManager[None]:
    """Autograd saves what it needs as it is: checkpointing, itself a pair of such hooks, finds nothing to recompute.

    Only the innermost hooks of a thread count, so this must surround each call, not the whole recording.
    """
    return saved_tensors_hooks(lambda x: x, lambda x: x)
