"""Weights in several files: what the index beside them says.

{"weight_map": {"cls_token": "model-00001-of-00002.safetensors", …}}
"""

from __future__ import annotations

import json
import re
from pathlib import Path

from vitrail.folder import MAX_JSON_BYTES
from vitrail.names import shortened

INDICES = ("model.safetensors.index.json", "pytorch_model.bin.index.json")
PART = re.compile(r"\w[\w.\-]*")
"""a file beside its index"""


def parts_of(index: Path) -> dict[str, str]:
    """Which file beside an index holds each tensor. Raises `ValueError` for what is no index of such files."""
    if index.stat().st_size > MAX_JSON_BYTES:
        raise ValueError(f"{index}: an index has at most {MAX_JSON_BYTES:,} bytes; got {index.stat().st_size:,}")
    try:
        places = dict(json.loads(index.read_text(encoding="utf-8"))["weight_map"])
    except (LookupError, TypeError, ValueError, RecursionError) as error:
        reason = shortened(str(error) or type(error).__name__)
        raise ValueError(f"{index}: damaged, not readable as an index ({reason}): fetch it again") from None
    for name in places.values():
        if not (isinstance(name, str) and PART.fullmatch(name)):
            raise ValueError(f"{index}: parts must lie beside their index; got {shortened(name)}")
    return places
