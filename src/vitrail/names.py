"""Other libraries' spellings, and the nearest right name for a wrong one.

Every place that takes a user's words (constructors, `create_model`, flags, YAML) passes them through here once.
"""

from __future__ import annotations

import difflib
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
}
TRAIN_SPELLINGS = {
    "learning_rate": "lr",
    "n_epochs": "epochs",
    "num_epochs": "epochs",
    "wd": "weight_decay",
    "smoothing": "label_smoothing",
    "mixup_alpha": "mixup",
    "cutmix_alpha": "cutmix",
    "drop_path_rate": "drop_path",
    "output_dir": "out",
    "output": "out",
    "dataset": "data",
    "clip_grad_norm": "clip_grad",
    "gradient_clipping": "clip_grad",
    "aa": "auto_augment",
    "autoaugment": "auto_augment",
    "model_ema": "ema",
}
POOLINGS = {"cls": "token", "tok": "token", "mean": "avg", "gap": "avg"}
"""values of `global_pool` elsewhere"""
KERNELS = {"sdpa": "fused", "flash_attention_2": "fused", "eager": "eager"}
"""values of `attn_implementation` elsewhere"""
AMBIGUOUS = {"dropout": "proj_drop_rate"}
"""words that mean different things elsewhere, and what they are taken for here"""


def nearest(word: str, choices: Iterable[str], n: int = 3) -> list[str]:
    """Up to `n` choices most like `word`, best first; never empty while there are choices."""
    return difflib.get_close_matches(word, list(choices), n=n, cutoff=0.0)


def check_choice(name: str, value: Any, allowed: Collection[str]) -> None:
    """Raises `ValueError` unless `value` is one of `allowed`, naming the nearest."""
    if value not in allowed:
        close = nearest(str(value), allowed, 1)[0]
        raise ValueError(f"{name} must be one of {', '.join(allowed)}; got {value!r}: did you mean {close}?")


def normalise_kwargs(
    given: Mapping[str, Any], known: Iterable[str], spellings: Mapping[str, str], what: str
) -> dict[str, Any]:
    """`given` with every spelling replaced by ours.

    Raises `TypeError` where two spellings of one argument are given, and where a name is unknown, naming the nearest.
    Warns where an ambiguous word is taken for something.
    """
    known = set(known)
    result: dict[str, Any] = {}
    said: dict[str, str] = {}
    for word, value in given.items():
        name = _ours(word, known, spellings, what)
        if name in said:
            raise TypeError(f"{what} takes one spelling of {name}; got both {said[name]} and {word}: drop one")
        said[name], result[name] = word, value
    return result


def _ours(word: str, known: set[str], spellings: Mapping[str, str], what: str) -> str:
    if word in known:
        return word
    if word in AMBIGUOUS and AMBIGUOUS[word] in known:
        warnings.warn(f"{what}: {word} is taken for {AMBIGUOUS[word]}", UserWarning, stacklevel=5)
        return AMBIGUOUS[word]
    if spellings.get(word) in known:
        return spellings[word]
    close = nearest(word, known, 1)
    raise TypeError(f"{what} has no argument {word!r}; the nearest is {close[0] if close else 'none'}")
