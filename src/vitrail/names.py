"""Other libraries' spellings, the nearest right name for a wrong one, and strange values in a form fit to be shown.

Every place that takes a user's words (constructors, `create_model`, flags, YAML) passes them through here once.
"""

from __future__ import annotations

import difflib
import reprlib
import sys
import unicodedata
import warnings
from collections.abc import Collection, Iterable, Mapping
from typing import Any

MODEL_SPELLINGS = {
    "image_size": "img_size",
    "input_size": "img_size",
    "in_channels": "in_chans",
    "num_channels": "in_chans",
    "channels": "in_chans",
    "n_classes": "num_classes",
    "num_labels": "num_classes",
    "dim": "embed_dim",
    "hidden_size": "embed_dim",
    "hidden_dim": "embed_dim",
    "width": "embed_dim",
    "hidden_sizes": "embed_dims",
    "num_hidden_layers": "depth",
    "num_layers": "depth",
    "n_layers": "depth",
    "heads": "num_heads",
    "n_heads": "num_heads",
    "num_attention_heads": "num_heads",
    "hidden_dropout_prob": "proj_drop_rate",
    "emb_dropout": "pos_drop_rate",
    "attention_dropout": "attn_drop_rate",
    "attention_probs_dropout_prob": "attn_drop_rate",
    "drop_path": "drop_path_rate",
    "stochastic_depth_prob": "drop_path_rate",
    "pool": "global_pool",
    "pool_type": "global_pool",
    "cls_token": "class_token",
    "num_registers": "reg_tokens",
    "sequence_reduction_ratios": "sr_ratios",
    "linear_attention": "linear",
}
TRAIN_SPELLINGS = {
    "learning_rate": "lr",
    "n_epochs": "epochs",
    "num_epochs": "epochs",
    "wd": "weight_decay",
    "opt": "optimizer",
    "optim": "optimizer",
    "sched": "schedule",
    "scheduler": "schedule",
    "lr_scheduler": "schedule",
    "lr_scheduler_type": "schedule",
    "lr_min": "min_lr",
    "lr_step_size": "decay_epochs",
    "lr_gamma": "decay_rate",
    "lr_warmup_epochs": "warmup_epochs",
    "num_warmup_steps": "warmup_steps",
    "adam_beta2": "beta2",
    "smoothing": "label_smoothing",
    "mixup_alpha": "mixup",
    "cutmix_alpha": "cutmix",
    "drop_path_rate": "drop_path",
    "pool": "global_pool",
    "pool_type": "global_pool",
    "gp": "global_pool",
    "output_dir": "out",
    "output": "out",
    "dataset": "data",
    "clip_grad_norm": "clip_grad",
    "gradient_clipping": "clip_grad",
    "image_size": "img_size",
    "input_size": "img_size",
    "num_workers": "workers",
    "n_workers": "workers",
    "aa": "auto_augment",
    "autoaugment": "auto_augment",
    "model_ema": "ema",
    "aug_repeats": "repeats",
    "ra_reps": "repeats",
    "criterion": "loss",
    "loss_type": "loss",
    "bce_target_thresh": "bce_threshold",
    "gamma_neg": "asl_gamma_neg",
    "gamma_pos": "asl_gamma_pos",
    "class_weight": "class_weights",
    "teacher_model": "teacher",
    "teacher_weights": "teacher_path",
    "distillation_type": "distillation",
    "report_to": "log",
    "logger": "log",
    "from": "from_weights",
    "pretrained": "from_weights",
    "finetune": "from_weights",
    "initial_checkpoint": "from_weights",
}
POOLINGS = {"cls": "token", "tok": "token", "mean": "avg", "gap": "avg"}
"""values of `global_pool` elsewhere"""
KERNELS = {"sdpa": "fused", "flash_attention_2": "fused", "eager": "eager"}
"""values of `attn_implementation` elsewhere"""
AMBIGUOUS = {"dropout": "proj_drop_rate"}
"""words that mean different things elsewhere, and what they are taken for in a model"""
AMBIGUOUS_IN_TRAINING = {"dropout": "drop_rate"}
"""the same for a training run, which has not all of a model's fields"""
BY_DATA = dict.fromkeys(("num_classes", "in_chans"), "the data says it")
BY_ROW = dict.fromkeys(
    (
        "embed_dim", "depth", "num_heads", "mlp_ratio", "mlp_dim", "intermediate_size", "patch_size", "qkv_bias",
        "class_token", "reg_tokens", "pos_embed", "attn_drop_rate", "proj_drop_rate", "pos_drop_rate",
        "attn", "attn_implementation", "flash_attention",
    ),
    "the row that `model` names says it (`vitrail models`); for a model of your own take create_model and ViTTrainer",
)  # fmt: skip
SETTLED = BY_DATA | BY_ROW
"""words of a model that a training run does not take, and why"""
DONE_OTHERWISE = {
    "dynamic_img_size": "images of other sizes are always taken",
    "checkpoint_path": "load_weights(model, path) puts a file's weights into a network",
    "features_only": "model.features(images) gives the features of any network",
    "pretrained_cfg": "model.preprocess says how images are prepared, and can be set",
}
"""arguments of timm's `create_model`, and what is there in their place"""
BEGINNING = 3
"""letters that are enough to know a word by"""
CLOSE = 0.7
"""likeness (difflib's ratio) from which a name is offered for a wrong one"""
LONGEST_WORD = 100
BIDI = frozenset("\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069")
"""characters that turn the order in which others are shown"""


def nothing(word: str) -> bool:
    """Whether a word of a flag or a YAML file means that there is no value; `null` is YAML's own."""
    return word in ("none", "None", "null")


def nearest(word: str, choices: Iterable[str], n: int = 3, cutoff: float = 0.0) -> list[str]:
    """Up to `n` choices most like `word`, best first; with `cutoff` 0 never empty while there are choices."""
    return difflib.get_close_matches(word[:LONGEST_WORD], list(choices), n=n, cutoff=cutoff)


def closest(word: str, choices: Iterable[str]) -> str | None:
    """The choice that `word` was probably meant to be, or is the beginning of; None where none is like it."""
    choices = list(choices)
    begun = [choice for choice in choices if len(word) >= BEGINNING and choice.startswith(word)]
    return next(iter([*nearest(word, choices, 1, CLOSE), *begun]), None)


def check_choice(name: str, value: Any, allowed: Collection[str]) -> None:
    """Raises `ValueError` unless `value` is one of `allowed`, naming the one that was probably meant."""
    if not isinstance(value, str) or value not in allowed:
        close = closest(str(value), allowed) if isinstance(value, str) else None
        mend = f": did you mean {close}?" if close else ""
        raise ValueError(f"{name} must be one of {', '.join(allowed)}; got {shortened(value)}{mend}")


def shortened(value: Any) -> str:
    """`repr(value)` in at most 60 characters, and no more work than that: nested lists are not followed down."""
    if isinstance(value, int) and abs(value) >= 10**9:
        return f"{value:.3e}" if abs(value) < 10**300 else "a huge number"
    text = _BRIEF.repr(value)
    return text if len(text) <= 60 else f"{text[:57]}…"


def _brief() -> reprlib.Repr:
    brief = reprlib.Repr()
    brief.maxlevel, brief.maxstring, brief.maxother = 2, 60, 60
    return brief


_BRIEF = _brief()


def printable(text: str) -> str:
    """`text` with every control character, which a terminal would obey, as its escape."""
    return "".join(char if _shown(char) else char.encode("unicode_escape").decode() for char in text)


def is_printable(text: str) -> bool:
    """Whether `text` holds no control character."""
    return all(map(_shown, text))


def _shown(char: str) -> bool:
    return char not in BIDI and unicodedata.category(char) not in ("Cc", "Cs", "Zl", "Zp")


def require(holds: bool, field: str, rule: str, got: object) -> None:
    """Raises `ValueError` with the flag's name, the rule and what was got, unless the rule holds."""
    if not holds:
        raise ValueError(f"--{field.replace('_', '-')} must {rule}; got {got}")


def normalise_kwargs(
    given: Mapping[str, Any], known: Iterable[str], spellings: Mapping[str, str], what: str
) -> dict[str, Any]:
    """`given` with every spelling replaced by ours.

    Raises `TypeError` where two spellings of one argument are given, and where a name is unknown, naming the nearest,
    or what settles it. Warns, at the user's line, where an ambiguous word is taken for something.
    """
    known = set(known)
    result: dict[str, Any] = {}
    said: dict[str, str] = {}
    for word, value in (unpacked(given) if "in_chans" in known else given).items():
        name = our_word(word, known, spellings, what)
        if name is None:
            raise TypeError(f"{what} has no argument {shortened(word)}; {_instead(word, known)}")
        if name in said:
            raise TypeError(f"{what} takes one spelling of {name}; got both {said[name]} and {word}: drop one")
        said[name], result[name] = word, value
    return result


def our_word(word: str, known: Collection[str], spellings: Mapping[str, str], what: str) -> str | None:
    """The one of `known` that `word` means; None where it means none. Warns where the word is ambiguous."""
    if word in known:
        return word
    for table in (AMBIGUOUS, AMBIGUOUS_IN_TRAINING):
        if table.get(word) in known:
            _warn(f"{what}: {word} is taken for {table[word]}")
            return table[word]
    return spellings[word] if spellings.get(word) in known else None


def settled(word: str, known: Collection[str]) -> str | None:
    """Why a model's word is no argument where a model and its data are named by others; None for any other word."""
    return SETTLED.get(MODEL_SPELLINGS.get(word, word)) if {"model", "data"} <= set(known) else None


def unpacked(given: Mapping[str, Any]) -> dict[str, Any]:
    """`given` with timm's `input_size=(C, H, W)` as `in_chans` and `input_size=(H, W)`.

    Raises `ValueError` where other channels are given beside it.
    """
    match given.get("input_size"):
        case [channels, height, width]:
            beside = [value for word, value in given.items() if MODEL_SPELLINGS.get(word, word) == "in_chans"]
            if beside and beside[0] != channels:
                raise ValueError(
                    f"input_size is (channels, height, width); got {channels} channels in it and {beside[0]} beside it:"
                    " drop one"
                )
            own = {} if beside else {"in_chans": channels}
            return {**given, "input_size": (height, width), **own}
    return dict(given)


def _instead(word: str, known: Collection[str]) -> str:
    if reason := settled(word, known):
        return reason
    if word in DONE_OTHERWISE and "img_size" in known:
        return f"leave it out: {DONE_OTHERWISE[word]}"
    close = closest(word, known)
    return f"the nearest is {close}" if close else f"it takes {', '.join(sorted(known)) or 'none'}"


def _warn(message: str) -> None:
    """Shown at the first line outside this package, however deep the call came in."""
    level, frame = 2, sys._getframe(1)
    while frame.f_back is not None and frame.f_globals.get("__name__", "").partition(".")[0] == "vitrail":
        level, frame = level + 1, frame.f_back
    warnings.warn(message, UserWarning, stacklevel=level)
