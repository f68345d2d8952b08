"""From what a file holds to the weights in it: the wrappers of training scripts, taken off.

    {"epoch": 3, "model_ema": {"module.…": …}}      dicts in dicts: the averaged and the better before the others
    {"student.…": …, "teacher.…": …}                networks in one dict, by what their names begin with
    {"task.backbone.…": …}, averages beside         a checkpoint of a run of this package

Names say what is a network: those of a known layout, or of the first layer of a network here. So what a prefix hides is
found whatever the prefix is, and what stands beside it (a loss, a metric, a text tower) is left.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

from torch import Tensor

from vitrail.names import printable
from vitrail.weights.layouts import is_network

MOST_WRAPPERS = 8
WRAPPERS = ("averages", "state_dict_ema", "model_ema", "ema_model", "ema", "state_dict", "model", "teacher", "student",
            "target_encoder", "encoder", "module", "net", "params")  # fmt: skip
"""where training scripts put a network's weights, the averaged and the better before the others"""
PREFIXES = ("module.", "_orig_mod.", "model.", "task.backbone.")
"""what wrappers put before every name: DDP, `torch.compile`, Lightning, runs of this package"""
AVERAGED = "0."
"""before names in `train.ema`'s averages: the number of the module that is averaged, the task"""
DEEPEST = 3
"""parts of the longest prefix that is looked for"""
SHARE = 0.1
"""of all tensors of a file, what a network in it has at least"""
WHOLE = 0.5
"""of the tensors of the largest network in a dict, what a better one has at least: averages of some weights are none"""
MOST_TENSORS = 20_000
HEADS = {"head", "heads", "head_dist", "classifier", "fc"}
"""modules that make logits, as networks call them"""


class Found(NamedTuple):
    """The weights in a file."""

    tensors: dict[str, Tensor]
    wrappers: tuple[str, ...]
    """what was taken off, outermost first: `model`, `module.` …"""
    others: tuple[str, ...]
    """what stands beside the weights"""
    passed: tuple[str, ...]
    """other networks in the file, as `part` names them"""
    untaken: tuple[str, ...]
    """tensors that stood beside the weights under names of their own: somebody's head"""


def unwrapped(held: Any, part: str | None = None) -> Found:
    """The weights in what a file holds; of several networks the one that `part` names, or the first of `WRAPPERS`.

    Raises `ValueError` where there are none or too many, where nothing says which of several is meant, and where there
    is no such part.
    """
    held, wrappers, others, passed, part = _out_of_dicts(_with_averages(held), part)
    tensors, untaken = tensors_of(held), list[str]()
    if len(tensors) > MOST_TENSORS:
        raise ValueError(f"{len(tensors):,} tensors; no network here has more than {MOST_TENSORS:,}")
    others += [str(name) for name in held if name not in tensors]
    while len(wrappers) < MOST_WRAPPERS and (prefix := _prefix(tensors, part, passed)):
        wrappers.append(prefix)
        untaken += [name for name in tensors if not name.startswith((prefix, *passed))]
        tensors = {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}
        part = None if _is_named(prefix, part) else part
    if part is not None:
        beside = list(dict.fromkeys(name.rstrip(".") for name in [*others, *untaken, *passed]))
        raise ValueError(f"there is no part {part!r} in it; beside the weights stand {_contents(beside)}")
    found = tuple(name.rstrip(".") for name in passed)
    return Found(tensors, tuple(wrappers), (*others, *untaken), found, tuple(untaken))


def is_head(name: str) -> bool:
    """Whether a tensor's name is that of something's head."""
    return not HEADS.isdisjoint(name.split("."))


def _with_averages(held: Any) -> Any:
    """A checkpoint of a run with the averages of its weights as a state_dict of their own, if it has any."""
    match held:
        case {"state_dict": {**weights}, "callbacks": {"WeightEma": {"updates": int(n), "averages": {**averages}}}}:
            named = {f"task.{str(name).removeprefix(AVERAGED)}": tensor for name, tensor in averages.items()}
            return {**held, "averages": weights | named} if n and named.keys() <= weights.keys() else held
    return held


# ---- dicts in dicts


def _out_of_dicts(held: Any, part: str | None) -> tuple[Any, list[str], list[str], list[str], str | None]:
    wrappers: list[str] = []
    others: list[str] = []
    passed: list[str] = []
    while (key := _wrapper(held, part)) and len(wrappers) < MOST_WRAPPERS:
        beside = [str(name) for name in held if name != key]
        passed += [name for name in WRAPPERS if name in beside and _has_tensors(held[name])]
        others += beside
        wrappers.append(key)
        held, part = held[key], None if key == part else part
    if key or not tensors_of(held):
        raise ValueError(_none_in(held))
    return held, wrappers, others, passed, part


def _wrapper(held: Any, part: str | None) -> str | None:
    """The entry of a dict in which the weights stand, or None where they are its own entries."""
    entries = held.items() if isinstance(held, Mapping) else ()
    inner = [name for name, value in entries if isinstance(name, str) and _has_tensors(value)]
    if part in inner:
        return part
    known = [name for name in WRAPPERS if name in inner]
    sizes = {name: _network_size(held[name], *held[name].values()) for name in inner}
    if most := max((sizes[name] for name in known), default=0):
        return next(name for name in known if sizes[name] >= WHOLE * most)
    networks = [name for name in inner if sizes[name]]
    if inner and _network_size(held):
        return None
    if len(networks) == 1:
        return networks[0]
    if known:
        return known[0]
    return inner[0] if len(inner) == 1 and not tensors_of(held) else None


def _network_size(*held: Any) -> int:
    """How many tensors the largest network has among dicts of tensors; 0 where none is one."""
    whole = (names for names in map(tensors_of, held) if 0 < len(names) <= MOST_TENSORS)
    return max((len(names) for names in whole if is_network(names) or _networks(names)), default=0)


def _has_tensors(held: Any) -> bool:
    """Whether it is a dict of tensors, or of dicts of tensors."""
    return isinstance(held, Mapping) and any(isinstance(v, Tensor) or tensors_of(v) for v in held.values())


def tensors_of(held: Any) -> dict[str, Tensor]:
    """The tensors of a dict that have a name, without what a file may have hung onto them."""
    entries = held.items() if isinstance(held, Mapping) else ()
    return {name: Tensor.detach(t) for name, t in entries if isinstance(name, str) and isinstance(t, Tensor)}


# ---- networks in one dict


def _prefix(tensors: Mapping[str, Tensor], part: str | None, passed: list[str]) -> str:
    """What to take off the names, with all that does not begin so; empty where they are a network's already.

    Prefixes of the other networks join `passed`. Raises `ValueError` where nothing says which of several is meant.
    """
    shared = next((prefix for prefix in PREFIXES if all(name.startswith(prefix) for name in tensors)), "")
    if shared or is_network(tensors):
        return shared
    found = _networks(tensors)
    named = [prefix for prefix in found if _is_named(prefix, part)] if part else sorted(found, key=_rank)
    chosen = named[0] if named else ""
    if part is None and len(found) > 1 and _rank(chosen) == len(WRAPPERS):
        raise ValueError(f"several networks are in it ({_contents(found)}): name one by part")
    passed += [prefix for prefix in found if prefix != chosen]
    return chosen


def _networks(names: Iterable[str]) -> list[str]:
    """Prefixes under which names are those of a network, the outermost of each."""
    names = list(names)
    found: list[str] = []
    for deep in range(1, DEEPEST + 1):
        heads = Counter(".".join(name.split(".")[:deep]) + "." for name in names if name.count(".") >= deep)
        large = [prefix for prefix, n in heads.items() if n >= SHARE * len(names)]
        for prefix in large:
            inner = [name.removeprefix(prefix) for name in names if name.startswith(prefix)]
            if not prefix.startswith(tuple(found)) and is_network(inner):
                found.append(prefix)
    return found


def _rank(prefix: str) -> int:
    """Where a prefix stands in `WRAPPERS`; after all of them, where it does not."""
    places = [WRAPPERS.index(word) for word in prefix.split(".") if word in WRAPPERS]
    return min(places, default=len(WRAPPERS))


def _is_named(prefix: str, part: str | None) -> bool:
    return part is not None and (part in prefix.split(".") or part == prefix.rstrip("."))


def _none_in(held: Any) -> str:
    """Why no weights are found in what a file holds."""
    if not isinstance(held, Mapping):
        what = f"a {type(held).__name__}" + (f" of {len(held)}" if isinstance(held, list | tuple) else "")
        return f"weights are a dict of tensors by their names; it holds {what}: save the state_dict alone"
    parts = [name for name, value in held.items() if isinstance(name, str) and _has_tensors(value)]
    if len(parts) > 1:
        return f"several state_dicts are in it ({_contents(parts)}): name one by part"
    return f"there is no state_dict in it, but a dict of {_contents(held)}: save the state_dict alone"


def _contents(names: Iterable[Any]) -> str:
    """Names in a file, told briefly."""
    return ", ".join(printable(str(name)[:60]) for name in list(names)[:8]) or "nothing"
