"""Networks of timm and torchvision by their own names, as those libraries build them: to learn from, not to train.

    timm:regnety_160.deit_in1k      any of timm's (extra `timm`)
    torchvision:regnet_y_16gf       any of torchvision's classifiers

Weights are not fetched here: `place` says where their library has published them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple, cast

from torch import nn

from vitrail.names import nearest
from vitrail.records import Preprocess

INSTALL = "pip install 'vitrail[timm]'"


class Foreign(NamedTuple):
    """Another library's network, its weights random."""

    model: nn.Module
    preprocess: Preprocess
    """of its published weights"""
    place: str
    """of those: `hub:org/name`, a URL, or empty where there are none"""
    file: str = "model.safetensors"
    """on the hub"""


def library_of(name: str) -> str:
    """`timm` or `torchvision` for `timm:NAME` and `torchvision:NAME`; empty for other names."""
    library, colon, _ = name.partition(":")
    return library if colon and library in BUILDERS else ""


def foreign_model(name: str, num_classes: int | None = None) -> Foreign:
    """The network of `timm:NAME` or `torchvision:NAME`; without `num_classes`, with the head of its published weights.

    Raises `ValueError` for a name that the library does not have, naming the nearest, and where it is not installed.
    """
    options: dict[str, Any] = {} if num_classes is None else {"num_classes": num_classes}
    library, _, own = name.partition(":")
    return BUILDERS[library](own, options)


def _timm(name: str, options: dict[str, Any]) -> Foreign:
    try:
        import timm
    except ModuleNotFoundError as error:
        raise ValueError(f"timm:{name} needs timm, which is not installed: {INSTALL}") from error
    _check_name("timm", name, name.partition(".")[0], timm.list_models())
    model = timm.create_model(name, pretrained=False, **options)
    cfg: dict[str, Any] = cast(Any, model).pretrained_cfg
    preprocess = Preprocess(
        img_size=tuple(cfg["input_size"][1:]), mean=cfg["mean"], std=cfg["std"], crop_pct=min(1.0, cfg["crop_pct"]),
        interpolation=_filter(cfg["interpolation"]),
    )  # fmt: skip
    hub = f"hub:{cfg['hf_hub_id']}" if cfg.get("hf_hub_id") else ""
    return Foreign(model, preprocess, hub or cfg.get("url") or "", cfg.get("hf_hub_filename") or "model.safetensors")


def _torchvision(name: str, options: dict[str, Any]) -> Foreign:
    from torchvision import models

    _check_name("torchvision", name, name, models.list_models(module=models))
    published = models.get_model_weights(name).DEFAULT
    made = published.transforms()
    crop, resize = made.crop_size[0], made.resize_size[0]
    preprocess = Preprocess(
        img_size=(crop, crop), mean=tuple(made.mean), std=tuple(made.std), crop_pct=min(1.0, crop / resize),
        interpolation=_filter(made.interpolation.value),
    )  # fmt: skip
    return Foreign(models.get_model(name, weights=None, **options), preprocess, published.url)


BUILDERS: dict[str, Callable[[str, dict[str, Any]], Foreign]] = {"timm": _timm, "torchvision": _torchvision}


def _check_name(library: str, name: str, row: str, known: Sequence[str]) -> None:
    if row not in known:
        raise ValueError(f"{library} has no model {name!r}; the nearest are {', '.join(nearest(row, known))}")


def _filter(name: str) -> Literal["bilinear", "bicubic"]:
    """The filter that pictures are resized by; of the rarer ones, and of timm's random choice, bicubic."""
    return cast(Literal["bilinear", "bicubic"], name if name in ("bilinear", "bicubic") else "bicubic")
