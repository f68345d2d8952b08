"""Fine-tuning: which weights a run begins with, and which of a network's parameters it trains.

| `--freeze`       | what is trained                                    | source                                    |
|------------------|----------------------------------------------------|-------------------------------------------|
| `none`           | everything                                         |                                           |
| `backbone`       | the head alone: a linear probe                     | Alain & Bengio 2017, 1610.01644           |
| `first:N`        | all but the embedding and the first N layers       | Yosinski et al. 2014, 1411.1792           |
| `gradual:E`      | the last layer; each E epochs one layer more       | Howard & Ruder 2018, ULMFiT, section 3.3  |
| `bias`           | biases and the head                                | Zaken et al. 2022, BitFit                 |
| `lora:R`         | rank-R updates of attention's layers, and the head | Hu et al. 2022, LoRA, section 4           |
| `prompts:N`      | N tokens beside the class token, and the head      | Jia et al. 2022, VPT-shallow, section 3.2 |
| `deep_prompts:N` | the same, N of its own in every layer              | Jia et al. 2022, VPT-deep, section 3.2    |

A layer is one of `layer_groups()`; a task's own parts beside the backbone are trained with the head. Modules of which
nothing is trained are in evaluation mode: their norms keep their means, their dropout rests. Prompts are part of the
network (`prompted`); all else holds while a task is trained (`tuned`), and is undone afterwards: LoRA's updates are
added to the weights, so that a model folder is a plain one.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn

from vitrail.layers.prompts import init_prompts
from vitrail.layers.relative import QVAttention
from vitrail.names import check_choice

if TYPE_CHECKING:
    from vitrail.models.backbone import Backbone
    from vitrail.tasks.base import Task

LOG = logging.getLogger("vitrail")
QUERIES = {"qkv", "q", "k", "v", "kv", "q_proj", "k_proj", "v_proj", "wq", "wk", "wv"}
"""what attention's projections of tokens are called; the one of its answer is `proj` everywhere"""
NAMED = 4
"""parameters that the line about them names"""
PROMPTS = ("prompts", "deep_prompts")


class Strategy(NamedTuple):
    """One word of `--freeze`."""

    counts: str
    """the letter of what the number after its colon counts; empty where none stands there"""
    least: int
    trained: Callable[[Task, int], set[str]]
    """names of the parameters that are trained, of a task that has its prompts and adapters"""


class Freeze(NamedTuple):
    """`--freeze` taken apart."""

    kind: str
    number: int = 0


@dataclass(frozen=True, kw_only=True)
class FinetuneConfig:
    """Which weights training begins with, and which of them it changes."""

    from_weights: str = ""
    """(--from) weights to begin with: a run or model folder, a file, a published name or hf-hub:org/name; none if
    empty"""
    freeze: str = "none"
    """what keeps its weights: none, backbone (all but the head), first:N (layers), gradual:E (epochs a layer), or all
    but bias, lora:R (rank), prompts:N, deep_prompts:N (tokens), each with the head"""

    def __post_init__(self) -> None:
        getattr(super(), "__post_init__", lambda: None)()  # the next config where several are joined by inheritance
        freezing(self.freeze)


def freezing(text: str) -> Freeze:
    """`first:4` -> ("first", 4). Raises `ValueError` for what is no word of the table, or lacks its number."""
    kind, colon, number = text.partition(":")
    check_choice("--freeze", kind, STRATEGIES)
    counts, least, _ = STRATEGIES[kind]
    whole = number.isascii() and number.isdigit()
    if bool(counts) != bool(colon) or (counts and (not whole or int(number) < least)):
        rule = f"{kind}:{counts} with {counts} at least {least}" if counts else f"{kind} without a number"
        raise ValueError(f"--freeze must be {rule}; got {text!r}")
    return Freeze(kind, int(number or 0))


# ---- who is trained


def _all(task: Task, number: int) -> set[str]:
    return {name for name, _ in task.named_parameters()}


def _heads(task: Task, number: int) -> set[str]:
    """The heads of the backbone, and what a task has beside it."""
    heads = {f"backbone.{name}" for name in task.backbone.head_weights()}
    return heads | {name for name in _all(task, 0) if not name.startswith("backbone.")}


def _later(task: Task, number: int) -> set[str]:
    """All but the embedding and the next `number` layers. Raises `ValueError` where nothing but the head is left."""
    groups = task.layer_groups()
    body = len(task.backbone.layer_groups()) - 2
    if number > body:
        raise ValueError(
            f"--freeze first:N must leave the head of {task.backbone.variant or task.backbone.family}, which has "
            f"{body} layers before it; got first:{number}: use less, or backbone"
        )
    return {name for group in groups[number + 1 :] for name in group} | _heads(task, 0)


def _biases(task: Task, number: int) -> set[str]:
    return {name for name in _all(task, 0) if name.endswith("bias")} | _heads(task, 0)


def _prompts(task: Task, number: int) -> set[str]:
    found = {name for name in _all(task, 0) if name == "backbone.reg_token" or name.endswith(".prompt")}
    return found | _heads(task, 0)


STRATEGIES: dict[str, Strategy] = {
    "none": Strategy("", 0, _all),
    "backbone": Strategy("", 0, _heads),
    "first": Strategy("N", 0, _later),
    "gradual": Strategy("E", 1, _all),
    "bias": Strategy("", 0, _biases),
    "lora": Strategy("R", 1, _heads),
    "prompts": Strategy("N", 1, _prompts),
    "deep_prompts": Strategy("N", 1, _prompts),
}
"""the words of `--freeze`; the module's docstring says whose they are"""


def unfrozen(task: Task, every: int, epoch: int) -> set[str]:
    """What gradual unfreezing trains in `epoch` (from 0): the last layer, and one more for each `every` epochs."""
    groups = task.layer_groups()
    layers = 1 + epoch // every + (len(groups) - len(task.backbone.layer_groups()))
    return {name for group in groups[-layers:] for name in group}


def settle(task: Task, trained: Collection[str]) -> None:
    """Lets these parameters alone be trained; puts modules that have others only into evaluation mode."""
    for name, parameter in task.named_parameters():
        parameter.requires_grad_(name in trained)
    task.train()
    for module in task.modules():
        own = list(module.parameters())
        if own and not any(parameter.requires_grad for parameter in own):
            module.eval()


@contextmanager
def tuned(task: Task, freeze: str, seed: int = 0) -> Iterator[None]:
    """Within it, the task trains as `freeze` says; what was frozen by hand before stays so.

    Gradual unfreezing begins with everything trainable, as the optimiser must know it: `train.callbacks.Unfreeze` goes
    on. Afterwards the task has its own layers, flags and modes again, and LoRA's updates are in its weights. Raises
    `ValueError` where the network has no place for the adapters, or too few layers, and where peft is missing.
    """
    chosen = freezing(freeze)
    if chosen.kind == "none":
        yield
        return
    flags = {name: parameter.requires_grad for name, parameter in task.named_parameters()}
    modes = {module: module.training for module in task.modules()}
    free = {name for name, on in flags.items() if on}
    trained = STRATEGIES[chosen.kind].trained(task, chosen.number) & free
    if chosen.kind == "lora":
        trained |= _adapt(task, chosen.number, seed)
    if chosen.kind != "gradual":
        settle(task, trained)
    try:
        yield
    finally:
        merge(task)
        for name, parameter in task.named_parameters():
            parameter.requires_grad_(flags[name])
        for module, mode in modes.items():
            module.training = mode


def say_trained(task: Task, freeze: str, epoch: int = 0) -> None:
    """Tells the logger `vitrail`, in one line, what a task that is `tuned` trains; in `epoch` where that changes."""
    kind, number = freezing(freeze)
    free = {name for name, parameter in task.named_parameters() if parameter.requires_grad}
    trained = free & unfrozen(task, number, epoch) if kind == "gradual" else free
    sizes = {name: parameter.numel() for name, parameter in task.named_parameters()}
    count, total = sum(sizes[name] for name in trained), sum(sizes.values())
    names = [name for name in sizes if name in trained]
    more = f" and {len(names) - NAMED} more" if len(names) > NAMED else ""
    later = "; later one layer more at a time" if trained != free else ""
    LOG.info(
        "--freeze %s trains %s of %s parameters (%.2g %%): %s%s%s", freeze, f"{count:,}", f"{total:,}",
        100 * count / total, ", ".join(names[:NAMED]), more, later,
    )  # fmt: skip


# ---- LoRA


def _adapt(task: Task, rank: int, seed: int) -> set[str]:
    """Puts adapters of peft's beside attention's layers; returns the names of what they train."""
    try:
        from peft import LoraConfig, inject_adapter_in_model
    except ModuleNotFoundError as error:
        raise ValueError(
            "--freeze lora:R needs the peft package; it is not installed: pip install 'vitrail[peft]'"
        ) from error
    targets = _attention_layers(task.backbone)
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)  # the CPU's alone, where weights are drawn
        inject_adapter_in_model(LoraConfig(r=rank, lora_alpha=rank, target_modules=targets), task.backbone)
    del task.backbone.peft_config
    return {name for name, _ in task.named_parameters() if ".lora_" in name}


def _attention_layers(backbone: Backbone) -> list[str]:
    """The linear layers of attention, by name. Raises `ValueError` for a family that has none that are called."""
    found: list[str] = []
    for name, module in backbone.named_modules():
        linear = {part for part, child in module.named_children() if isinstance(child, nn.Linear)}
        if "proj" in linear and linear & QUERIES and not isinstance(module, QVAttention):  # which reads qkv's weights
            found += [f"{name}.{part}" for part in sorted(linear & (QUERIES | {"proj"}))]
    if not found:
        raise ValueError(
            f"--freeze lora:R is for attention whose projections are layers of their own; {backbone.family} has none: "
            "use bias, first:N or backbone"
        )
    return found


def merge(task: Task) -> None:
    """Adds LoRA's updates to the weights they stand beside, and takes the adapters away."""
    adapted = [(name, module) for name, module in task.named_modules() if "lora_A" in dict(module.named_children())]
    for name, module in adapted:
        layer: Any = module
        layer.merge()
        parent, _, part = name.rpartition(".")
        setattr(task.get_submodule(parent), part, layer.get_base_layer())


# ---- prompts


def prompted(backbone: Backbone, freeze: str, seed: int = 0) -> Backbone:
    """The network with fresh prompts after its own prefix tokens, where `freeze` asks for them; else itself.

    They are registers: without positions of their own, of which rows in a table are zero. A network's own registers
    come before them, and are trained with them. Raises `ValueError` for a family that has no place for them.
    """
    kind, count = freezing(freeze)
    if kind not in PROMPTS:
        return backbone
    known = {f.name for f in fields(backbone.config)}
    if "deep_prompts" not in known:
        raise ValueError(
            f"--freeze {kind}:N is for plain ViTs, which have a place for tokens beside the image's; "
            f"{backbone.variant or backbone.family} has none: use bias, first:N or backbone"
        )
    deep = {"deep_prompts": count} if kind == "deep_prompts" else {}
    if deep and backbone.config.deep_prompts:
        raise ValueError(
            f"--freeze deep_prompts:N begins with a network without deep prompts; got {backbone.config.deep_prompts}: "
            "begin with the weights that it was made from"
        )
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        return rebuilt(backbone, **deep, reg_tokens=backbone.config.reg_tokens + count)


def rebuilt(backbone: Backbone, **changes: Any) -> Backbone:
    """A network of the same weights with these fields of its config; what it has more is as it was drawn.

    Registers become more at their end, with prompts' law; tables of positions get rows of zeros for them.
    """
    backbone.check_savable()
    model = type(backbone)(replace(backbone.config, num_classes=backbone.num_classes, **changes))
    state, wanted = backbone.state_dict(), model.state_dict()
    model.load_state_dict({name: _grown(name, state, wanted, backbone) for name in wanted})
    for name in ("preprocess", "classes", "images", "variant", "weights"):
        setattr(model, name, getattr(backbone, name))
    return model


def _grown(name: str, state: Mapping[str, Tensor], wanted: Mapping[str, Tensor], backbone: Any) -> Tensor:
    """A tensor of the larger network: the smaller one's, with rows more for new registers."""
    if name not in state and name != "reg_token":
        return wanted[name]
    own = state[name] if name in state else wanted[name][:, :0]
    more = wanted[name].shape[1] - own.shape[1] if name in ("reg_token", "pos_embed") else 0
    if not more:
        return own
    fresh = own.new_zeros(1, more, own.shape[2])
    if name == "reg_token":
        init_prompts(fresh, backbone.patch_embed.patch_size)
        return torch.cat([own, fresh], dim=1)
    prefix = backbone.num_prefix_tokens
    return torch.cat([own[:, :prefix], fresh, own[:, prefix:]], dim=1)
