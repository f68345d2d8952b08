"""Published weights, on this disk: fetched once, checked, and kept.

    a hub's repository   by `huggingface_hub`: its cache, its offline mode (HF_HUB_OFFLINE), its tokens
    a URL                streamed to a temporary file beside its place, then renamed: it is there whole or not at all

A checksum is enforced where it is known: from the file's own name, as PyTorch's `name-1a2b3c4d.pth`, or from the first
time that this machine fetched it, which `sums.json` beside the files records.
"""

from __future__ import annotations

import hashlib
import http.client
import json
import logging
import os
import re
import urllib.error
import urllib.parse
import urllib.request
from pathlib import Path
from typing import IO, Any

from vitrail.files import whole_file, write_whole
from vitrail.weights.read import CheckpointError

CACHE = "VITRAIL_CACHE"
"""names the folder of downloads in the environment; else ~/.cache/vitrail"""
OFFLINE = "HF_HUB_OFFLINE"
SUMS = "sums.json"
CHUNK = 1 << 20
MAX_BYTES = 50 * 10**9
TIMEOUT = 30.0
"""seconds without a byte"""
LOG = logging.getLogger("vitrail")


class FetchError(CheckpointError):
    """Weights that cannot be had: no network, no such file, another file than before."""


def cache_folder() -> Path:
    """Where downloads are kept."""
    return Path(os.environ.get(CACHE) or Path.home() / ".cache" / "vitrail")


def fetch_from_hub(repo: str, file: str) -> Path:
    """One file of a repository on the hub, and the small files beside it that say how it is used."""
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError, LocalEntryNotFoundError

    try:
        path = Path(hf_hub_download(repo, file))
        for name in ("config.json", "preprocessor_config.json"):
            try:
                hf_hub_download(repo, name)
            except EntryNotFoundError:
                continue
        return path
    except LocalEntryNotFoundError as error:
        why = "HF_HUB_OFFLINE is set" if _offline() else "the hub could not be reached"
        raise FetchError(
            f"{repo}: {file} is not in the hub's cache, and {why}: fetch it where there is a network"
        ) from error
    except (HfHubHTTPError, OSError, ValueError) as error:
        raise FetchError(f"{repo}: {file} could not be had ({str(error).splitlines()[0]}): look at the name") from error


def fetch_url(url: str) -> Path:
    """The file that a URL names, from the cache or the network; its checksum holds, or `FetchError` says otherwise."""
    name = Path(urllib.parse.urlparse(url).path).name
    place = cache_folder() / hashlib.sha256(url.encode()).hexdigest()[:12] / name
    if not place.is_file():
        if _offline():
            raise FetchError(f"{url}: not in {cache_folder()}, and {OFFLINE} is set: fetch it where there is a network")
        _download(url, place)
    _check(url, place)
    return place


def _offline() -> bool:
    return os.environ.get(OFFLINE, "").lower() in ("1", "true", "yes", "on")


def _download(url: str, place: Path) -> None:
    LOG.info("fetching %s", url)
    try:
        with urllib.request.urlopen(url, timeout=TIMEOUT) as answer, whole_file(place) as file:
            _stream(url, answer, file)
    except FetchError:
        raise
    except (urllib.error.URLError, http.client.HTTPException, OSError, ValueError) as error:
        raise FetchError(f"{url}: could not be fetched ({error}): look at the network, or give a file") from error


def _stream(url: str, answer: Any, file: IO[bytes]) -> None:
    """All bytes that were promised, and no more than any checkpoint has."""
    promised, got = answer.headers.get("Content-Length"), 0
    while piece := answer.read(CHUNK):
        got += file.write(piece)
        if got > MAX_BYTES:
            raise FetchError(f"{url}: more than {MAX_BYTES:,} bytes, which no checkpoint has: look at the address")
    if promised is not None and got != int(promised):
        raise FetchError(f"{url}: {got:,} of {promised} bytes came: try again")


def _check(url: str, place: Path) -> None:
    """The file's sha256 against its name and against what was recorded when it was first fetched."""
    with place.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    named = re.search(r"-([0-9a-f]{8,64})\.\w+$", place.name)
    if named and not digest.startswith(named[1]):
        place.unlink()
        raise FetchError(
            f"{url}: its sha256 begins {digest[:8]} and its name says {named[1]}: it is removed; try again"
        )
    sums = place.with_name(SUMS)
    known = json.loads(sums.read_text(encoding="utf-8")) if sums.is_file() else {}
    if place.name not in known:
        write_whole(sums, json.dumps({**known, place.name: digest}) + "\n")
    elif known[place.name] != digest:
        raise FetchError(
            f"{place}: changed since it was first fetched (sha256 {digest[:8]}…, recorded {known[place.name][:8]}…): "
            f"remove {place.parent} to fetch it again"
        )
