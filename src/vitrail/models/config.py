"""What a family's config is: a frozen dataclass that checks itself and takes other libraries' spellings.

ViTConfig(img_size=32, heads=4)  ── spelled ──>  img_size, num_heads  ── checked ──>  a config
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from functools import wraps
from typing import Any, TypeVar, dataclass_transform, get_args, get_type_hints

from vitrail.names import KERNELS, MODEL_SPELLINGS, POOLINGS, normalise_kwargs

T = TypeVar("T")


def choose(kind: type[T], config: T | None, given: Mapping[str, Any]) -> T:
    """A constructor's config: the one given, or one made of the fields given. Raises `TypeError` for both."""
    if config is not None and given:
        raise TypeError(f"give a {kind.__name__} or its fields, not both; got also {', '.join(given)}")
    return kind(**given) if config is None else config


@dataclass_transform(kw_only_default=True, frozen_default=True)
def family_config(cls: type[T]) -> type[T]:
    """A frozen, keyword-only dataclass that also takes other libraries' spellings of its fields (`vitrail.names`)."""
    made = dataclass(frozen=True, kw_only=True)(cls)
    plain_init = made.__init__

    @wraps(plain_init)
    def init(self: T, **given: Any) -> None:
        values = spelled(cls, given)
        _check_kinds(made, values)
        plain_init(self, **values)

    made.__init__ = init  # type: ignore[method-assign, assignment]
    return made


def check_least(config: Any, least: Mapping[str, int]) -> None:
    """Raises `ValueError` where a field, or one number of a field of several, is less than it may be."""
    for name, bound in least.items():
        if min(flat(getattr(config, name)), default=bound) < bound:
            raise ValueError(f"{name} must be at least {bound}; got {getattr(config, name)}")


def check_rates(config: Any) -> None:
    """Raises `ValueError` where a field whose name ends in `_rate` is no share in [0, 1)."""
    for name in (f.name for f in fields(config) if f.name.endswith("_rate")):
        if not 0 <= getattr(config, name) < 1:
            raise ValueError(f"{name} must lie in [0, 1); got {getattr(config, name)}")


def check_epsilons(config: Any) -> None:
    """Raises `ValueError` where a field whose name ends in `_eps` is no number in (0, 1)."""
    for name in (f.name for f in fields(config) if f.name.endswith("_eps")):
        if not 0 < getattr(config, name) < 1:
            raise ValueError(f"{name} must lie in (0, 1); got {getattr(config, name)}: the usual are 1e-6 and 1e-5")


def check_hidden(config: Any, widths: str, ratios: str) -> None:
    """Raises `ValueError` where the ratios of a field leave an MLP of these widths nothing hidden."""
    given = getattr(config, ratios)
    pairs = zip(flat(getattr(config, widths)), flat(given), strict=True)
    if min(int(width * ratio) for width, ratio in pairs) < 1:
        raise ValueError(f"{ratios} must leave a hidden width of at least 1; got {given}: the usual is 4")


def check_numbers(
    config: Any, name: str, what: str, counts: Sequence[int] | None = None, kinds: tuple[type, ...] = (int,)
) -> None:
    """Makes a tuple of a field of several finite numbers, as many as one of `counts`, which are `what`.

    Raises `ValueError` where it is anything else.
    """
    value = getattr(config, name)
    listed = isinstance(value, tuple | list) and (counts is None or len(value) in counts)
    if not listed or not all(type(number) in kinds and math.isfinite(number) for number in value):
        kind = "finite" if float in kinds else "whole"
        raise ValueError(f"{name} must be a tuple of {kind} numbers, {what}; got {value!r}")
    object.__setattr__(config, name, tuple(value))


def check_stages(config: Any, *names: str) -> None:
    """Makes tuples of `depths` and of the fields `names`, which hold one number a stage.

    Raises `ValueError` where one is no list of numbers, whole ones but for `mlp_ratios`, or names other many stages.
    Eight stages make a cell of hundreds of pixels; more would be a mistake.
    """
    for name in ("depths", *names):
        kinds = (int, float) if name == "mlp_ratios" else (int,)
        check_numbers(config, name, "one for each of 1 to 8 stages, such as (2, 2, 6, 2)", range(1, 9), kinds)
    for name in names:
        if len(getattr(config, name)) != len(config.depths):
            raise ValueError(
                f"{name} must name a number for each of the {len(config.depths)} stages of depths {config.depths}; "
                f"got {getattr(config, name)}"
            )


def flat(value: Any) -> list[Any]:
    """The values of a list, and of lists within it; of one that is no list, that one."""
    return [number for part in value for number in flat(part)] if isinstance(value, tuple | list) else [value]


def tuples(value: Any) -> Any:
    """As a config holds it: JSON has lists for tuples."""
    return tuple(tuples(part) for part in value) if isinstance(value, list) else value


def _check_kinds(config: type, values: Mapping[str, Any]) -> None:
    """Raises `TypeError` where a number or a switch is something else; words and sizes are for the config itself."""
    hints = get_type_hints(config)
    for name, value in values.items():
        kinds = set(get_args(hints[name]) or (hints[name],))
        if kinds <= {int, float, bool, type(None)}:
            whole = type(value) is int or (float in kinds and type(value) is float and math.isfinite(value))
            if not (type(value) in kinds - {float} or (whole and kinds & {int, float})):
                wanted = " or ".join(sorted("None" if kind is type(None) else kind.__name__ for kind in kinds))
                raise TypeError(f"{name} must be {wanted}; got {value!r}")


def spelled(config: type, given: Mapping[str, Any], base: Any = None) -> dict[str, Any]:
    """`given` in the field names of a family's config. Raises `TypeError` for a name it cannot place.

    What is not given stands in `base`, a config, or in the defaults: a hidden width becomes a ratio by them.
    """
    values = {f.name: getattr(base, f.name, f.default) for f in fields(config)}
    ours = normalise_kwargs(_derived(given, values), values, MODEL_SPELLINGS, config.__name__)
    if "global_pool" in ours:
        ours["global_pool"] = POOLINGS.get(ours["global_pool"], ours["global_pool"])
    return ours


def _derived(given: Mapping[str, Any], values: dict[str, Any]) -> dict[str, Any]:
    """`given` with words that are another field's value in other units: hidden widths and kernel switches."""
    given = dict(given)
    kernel = _only(given, "flash_attention", "attn_implementation", "attn")
    if kernel == "flash_attention":
        given["attn"] = "fused" if given.pop(kernel) else "eager"
    elif kernel == "attn_implementation":
        given["attn"] = KERNELS.get(said := given.pop(kernel), said)
    hidden = _only(given, "mlp_dim", "intermediate_size", "mlp_ratio")
    if hidden not in (None, "mlp_ratio") and "mlp_ratio" in values:
        widths = [value for word, value in given.items() if MODEL_SPELLINGS.get(word, word) == "embed_dim"]
        width = (widths or [values["embed_dim"]])[0]
        if not isinstance(width, int):
            raise TypeError(f"{hidden} is for networks of one width; this one has {width}: give mlp_ratio")
        given["mlp_ratio"] = _ratio(given.pop(hidden), max(1, width))
    return given


def _ratio(hidden: int, width: int) -> float:
    """hidden / width, a rounding step more where int(width * ratio) would otherwise lose one."""
    ratio = hidden / width
    return ratio if int(width * ratio) == hidden else math.nextafter(ratio, math.inf)


def _only(given: Mapping[str, Any], *words: str) -> str | None:
    """Which of these words for the last of them is given. Raises `TypeError` for two."""
    found = [word for word in words if word in given]
    if len(found) > 1:
        raise TypeError(f"one spelling of {words[-1]} is enough; got both {found[0]} and {found[1]}: drop one")
    return found[0] if found else None
