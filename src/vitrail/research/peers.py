"""The same networks as other libraries build them, with random weights: what ours are held against.

A `Peer` is one library's network for one row of the registry. Its weights are drawn anew, every parameter and running
statistic, so that nothing hides behind a zero bias or a norm of one; they reach us by the library's own way of saving,
as published files do.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import replace
from operator import attrgetter
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from vitrail.models.registry import FAMILIES, ROWS, TORCHVISION
from vitrail.weights.transformers_configs import CONFIGS

SOURCES = ("timm", "torchvision", "transformers")
INSTALL = "pip install 'vitrail[parity]'"
"""the line that installs them"""


class Peer(NamedTuple):
    """Another library's network for a row."""

    source: str
    model: nn.Module
    states: str
    """a pattern for names of the modules whose outputs are our `features`"""
    save: Callable[[nn.Module, Path], Path]
    """writes its weights as its library does; returns the file or folder"""
    logits: Callable[[Any], Tensor]
    """what a forward returns -> logits"""
    options: Mapping[str, Any] = {}
    """fields of our config that make ours the same network"""
    normed: bool = False
    """whether those outputs are normed, as ours are on demand"""
    own_size: bool = False
    """whether it is the same network at its own size alone: it resizes positions in a way of its own"""


def build_peer(row: str, source: str) -> Peer | None:
    """The network of `row` as `source` builds it, with random weights; None where it has none.

    Raises `ValueError` where the library is not installed, with the line that installs it.
    """
    try:
        return BUILDERS[source](row)
    except ModuleNotFoundError as error:
        raise ValueError(f"{source} is not installed: {INSTALL}") from error


@torch.no_grad()
def randomise(model: nn.Module, seed: int = 0) -> None:
    """Draws every parameter and running statistic anew, so that each has a say and none drowns the others."""
    generator = torch.Generator().manual_seed(seed)
    running = [(name, value) for name, value in model.named_buffers() if "running_" in name]
    for name, value in [*model.named_parameters(), *running]:
        drawn = torch.randn(value.shape, generator=generator)
        if name.endswith("running_var") or (value.ndim == 1 and "bias" not in name):
            value.copy_(1 + 0.1 * drawn.abs())  # variances, and what multiplies channels
        elif value.ndim >= 2 and not re.search("embed$|embeddings$|token$|table$", name):
            value.copy_(drawn * (2 / value[0].numel()) ** 0.5)
        else:
            value.copy_(0.2 * drawn)


def _timm(row: str) -> Peer | None:
    import timm

    if row not in timm.list_models():
        return None
    config = FAMILIES[ROWS[row]].variants[row]
    model = timm.create_model(row, pretrained=False, num_classes=config.num_classes, **_any_size(row))
    return _drawn(row, "timm", STATES["timm"][ROWS[row]], model, _as_state_dict, _plain)


def _any_size(row: str) -> dict[str, Any]:
    """What lets timm's network take another size at run time, where it needs telling."""
    return {"dynamic_img_size": True} if ROWS[row] in ("vit", "deit", "hybrid", "eva") else {}


def _torchvision(row: str) -> Peer | None:
    if row not in TORCHVISION:
        return None
    from torchvision import models

    model = models.get_model(TORCHVISION[row], weights=None)
    return _drawn(row, "torchvision", STATES["torchvision"][ROWS[row]], model, _as_state_dict, _plain)


def _transformers(row: str) -> Peer | None:
    family = ROWS[row]
    if family not in CONFIGS or row.endswith("_debug"):
        return None
    import transformers

    config = replace(FAMILIES[family].variants[row], **OPTIONS.get(("transformers", family), {}))
    try:
        said = CONFIGS[family](config) | {"num_labels": config.num_classes}
    except ValueError:  # a network that transformers has under another name, or has not
        return None
    name, kind = said.pop("architectures")[0], said.pop("model_type")
    model = getattr(transformers, name)(transformers.AutoConfig.for_model(kind, **said))
    peer = _drawn(row, "transformers", STATES["transformers"][kind], model, _as_pretrained, _answer_of(name, config))
    return peer._replace(own_size=kind in RESIZED_OTHERWISE)


def _answer_of(name: str, config: Any) -> Callable[[Any], Tensor]:
    """What transformers' class of this name calls our logits."""
    if name == "DINOv3ViTModel" and config.global_pool == "avg":
        return lambda out: out.last_hidden_state[:, 1 + config.reg_tokens :].mean(1)  # it pools the class token alone
    return attrgetter(next(word for end, word in ANSWERS.items() if name.endswith(end)))


def _drawn(
    row: str,
    source: str,
    states: str | Callable[[Any], str],
    model: nn.Module,
    save: Callable[[nn.Module, Path], Path],
    logits: Callable[[Any], Tensor],
) -> Peer:
    randomise(model)
    family = ROWS[row]
    pattern = states if isinstance(states, str) else states(FAMILIES[family].variants[row])
    return Peer(source, model.eval(), pattern, save, logits, OPTIONS.get((source, family), {}), family in NORMED)


def _plain(out: Any) -> Tensor:
    assert isinstance(out, Tensor)
    return out


def _as_state_dict(model: nn.Module, folder: Path) -> Path:
    torch.save(model.state_dict(), folder / "model.pth")
    return folder / "model.pth"


def _as_pretrained(model: Any, folder: Path) -> Path:
    """Without the bars by which transformers shows its progress: tables are read."""
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        model.save_pretrained(folder)
    finally:
        logging.enable_progress_bar() if shown else None
    return folder


BUILDERS: Mapping[str, Callable[[str], Peer | None]] = {
    "timm": _timm,
    "torchvision": _torchvision,
    "transformers": _transformers,
}


def _last_blocks(template: str) -> Callable[[Any], str]:
    """A pattern for the last block of each stage, from a config with `depths`."""
    return lambda config: "|".join(template.format(i, depth - 1) for i, depth in enumerate(config.depths))


OPTIONS: Mapping[tuple[str, str], Mapping[str, Any]] = {
    ("timm", "crossvit"): {"dynamic_img_size": False},  # timm's resizes images of every size to its own
    ("transformers", "pvt"): {"conv_norm_eps": 1e-6},  # which has one epsilon for all norms
    ("transformers", "pvt_v2"): {"conv_norm_eps": 1e-6},
}
"""by library and family, what makes our network theirs"""
NORMED = ("pvt_v2",)
"""families whose stages end with a norm"""
STATES: Mapping[str, Mapping[str, str | Callable[[Any], str]]] = {
    "timm": {
        **dict.fromkeys(("vit", "deit", "beit", "eva"), r"blocks\.\d+"),
        "hybrid": r"blocks\.\d+",
        "cait": r"blocks\.\d+",
        "crossvit": r"blocks\.\d+",
        "swin": r"layers\.\d+",
        "pvt_v2": r"stages\.\d+",
    },
    "torchvision": {
        "vit": r"encoder\.layers\.encoder_layer_\d+",
        "swin": r"features\.[1357]",
        "resnet": r"layer\d",
        "convnext": r"features\.[1357]",
    },
    "transformers": {
        "vit": r"vit\.layers\.\d+",
        "deit": r"deit\.layers\.\d+",
        "swin": _last_blocks(r"swin\.encoder\.layers\.{}\.blocks\.{}"),
        "pvt": _last_blocks(r"pvt\.encoder\.block\.{}\.{}"),
        "pvt_v2": r"pvt_v2\.encoder\.layers\.\d+",
        "beit": r"beit\.layers\.\d+",
        **dict.fromkeys(("dinov2", "dinov2_with_registers"), r"encoder\.layer\.\d+"),
        "dinov3_vit": r"model\.layer\.\d+",
        "clip_vision_model": r"(vision_model\.)?encoder\.layers\.\d+",
        "siglip_vision_model": r"encoder\.layers\.\d+",
    },
}
"""by library and family, of transformers by `model_type`, the modules after which our `features` are taken, or what
makes them of a config"""
ANSWERS = {
    "ForImageClassification": "logits",
    "WithTeacher": "logits",
    "WithProjection": "image_embeds",
    "Model": "pooler_output",
}
"""by the end of transformers' class, where our logits stand in what it returns"""
RESIZED_OTHERWISE = ("beit", "dinov2")
"""by `model_type`: bias tables linearly, positions without antialiasing"""
