"""Published weights, on this disk: fetched once, checked, and kept.

    a hub's repository   by `huggingface_hub`: its cache, its offline mode (HF_HUB_OFFLINE), its tokens; in parts too
    a URL                streamed to a temporary file beside its place, then renamed: it is there whole or not at all

A checksum is enforced where it is known: from the file's own name, as PyTorch's `name-1a2b3c4d.pth`, from the folder
that it lies in, as OpenAI's, or from the first time that this machine fetched it, which `name.pth.sha256` records.
"""

from __future__ import annotations

import hashlib
import http.client
import logging
import os
import re
import time
import urllib.error
import urllib.request
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import IO

from vitrail.files import whole_file, write_whole
from vitrail.folder import CONFIG
from vitrail.names import printable, shortened
from vitrail.weights.preprocessing import PROCESSOR
from vitrail.weights.read import CheckpointError
from vitrail.weights.shards import parts_of

CACHE = "VITRAIL_CACHE"
"""names the folder of downloads in the environment; else ~/.cache/vitrail"""
OFFLINE = "HF_HUB_OFFLINE"
ADDRESS = re.compile(r"https?://[^/@\s]+/(?:[^?#\s]*/)?(\w[\w.%+=-]{0,199})(?:[?#]\S*)?")
"""of a file with a name, and without a user's"""
NAMED = re.compile(r"-([0-9a-f]{8,64})\.\w+$|/([0-9a-f]{64})/[^/]+$")
"""the sha256, or how it begins, in an address"""
CHUNK = 1 << 20
MAX_BYTES = 50 * 10**9
MOST_PARTS = 1000
"""files of one checkpoint"""
TIMEOUT = 30.0
"""seconds without a byte"""
ABANDONED = 3600.0
"""seconds since somebody wrote to a file that is not whole"""
LOG = logging.getLogger("vitrail")


class FetchError(CheckpointError):
    """Weights that cannot be had: no network, no such file, another file than before."""


class Unreachable(FetchError):
    """The hub cannot be reached, and its cache has no such file."""


def cache_folder() -> Path:
    """Where downloads are kept."""
    return Path(os.environ.get(CACHE) or Path.home() / ".cache" / "vitrail")


def fetch_from_hub(
    repo: str,
    file: str,
    *,
    revision: str | None = None,
    beside: Sequence[str] = (CONFIG, PROCESSOR),
    cached: bool = False,
) -> Path:
    """One file of a repository on the hub, and the small files beside it that say how it is used.

    `revision` is a commit; without one, the newest that the hub or, offline, its cache has. With `cached` the hub is
    not asked: whoever has waited for it in vain once need not wait again.

    Raises `Unreachable` where nobody can be asked and the cache has none, `FetchError` for any other reason.
    """
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError, LocalEntryNotFoundError

    try:
        path = Path(hf_hub_download(repo, file, revision=revision, local_files_only=cached))
        for name in beside:
            with suppress(EntryNotFoundError):
                hf_hub_download(repo, name, local_files_only=cached)
        return path
    except LocalEntryNotFoundError as error:
        why = f"{OFFLINE} is set" if _offline() else "the hub could not be reached"
        kind = FetchError if isinstance(error.__cause__, HfHubHTTPError) else Unreachable  # an answer came, or none
        raise kind(f"{repo}: {file} is not in the hub's cache, and {why}: fetch it where there is a network") from error
    except (EntryNotFoundError, OSError, ValueError) as error:  # all of the hub's, and of the disk's
        raise FetchError(f"{repo}: {file} could not be had ({_reason(error)}): look at the name") from error


def fetch_parts(repo: str, index: Path) -> None:
    """The files that an index of the hub names, of the index's own commit: so they lie beside it, and fit each other.

    Raises `FetchError` where one cannot be had and where there are too many, and for what is no index.
    """
    try:
        names = sorted(set(parts_of(index).values()))
    except ValueError as error:
        raise FetchError(str(error)) from None
    if len(names) > MOST_PARTS:
        raise FetchError(
            f"{repo}: {index.name} names {len(names):,} files; at most {MOST_PARTS:,} are fetched: give a file"
        )
    got = 0
    for name in names:
        got += fetch_from_hub(repo, name, revision=index.parent.name, beside=()).stat().st_size
        if got > MAX_BYTES:
            raise FetchError(f"{repo}: more than {MAX_BYTES:,} bytes, which no checkpoint has: look at the name")


def fetch_url(url: str) -> Path:
    """The file that a URL names, from the cache or the network; its checksum holds, or `FetchError` says otherwise."""
    place = _place(url)
    if not place.is_file():
        if _offline():
            raise FetchError(f"{url}: not in {cache_folder()}, and {OFFLINE} is set: fetch it where there is a network")
        _download(url, place)
    try:
        _check(url, place)
    except OSError as error:
        raise FetchError(f"{url}: its checksum cannot be kept ({error}): look at {cache_folder()}") from error
    return place


def _place(url: str) -> Path:
    """Where in the cache the file of a URL has its place. Raises `FetchError` where it could have none."""
    found = ADDRESS.fullmatch(url)
    if found is None:
        told = printable(re.sub("//.*@", "//…@", url)[:200])  # a password is not told
        raise FetchError(f"{told}: weights have an address https://host/…/file, without a user's name: mend it")
    return cache_folder() / hashlib.sha256(url.encode()).hexdigest()[:12] / found[1]


def _offline() -> bool:
    return os.environ.get(OFFLINE, "").lower() in ("1", "true", "yes", "on")


def _download(url: str, place: Path) -> None:
    LOG.info("fetching %s", url)
    try:
        _sweep(place.parent)
        with urllib.request.urlopen(url, timeout=TIMEOUT) as answer, whole_file(place) as file:
            _stream(url, answer, file)
    except FetchError:
        raise
    except (http.client.HTTPException, OSError, ValueError) as error:
        if isinstance(error, urllib.error.HTTPError):
            error.close()  # it is an answer too, and holds its connection
        raise FetchError(
            f"{url}: could not be fetched into {cache_folder()} ({_reason(error)}): look at the network and the disk, "
            "or give a file"
        ) from error


def _sweep(folder: Path) -> None:
    """Removes what processes that were killed had begun to write. One that still writes is not as old."""
    for part in folder.glob(".*.part"):
        if time.time() - part.stat().st_mtime > ABANDONED:
            part.unlink(missing_ok=True)


def _stream(url: str, answer: http.client.HTTPResponse, file: IO[bytes]) -> None:
    """All bytes that were promised, and no more than any checkpoint has."""
    promised, got = answer.length, 0
    if promised is None and not answer.chunked:
        raise FetchError(f"{url}: the server does not say how long it is, so that a cut would not be seen: give a file")
    while piece := answer.read(CHUNK):
        got += file.write(piece)
        if got > MAX_BYTES:
            raise FetchError(f"{url}: more than {MAX_BYTES:,} bytes, which no checkpoint has: look at the address")
    if promised is not None and got != promised:
        raise FetchError(f"{url}: {got:,} of {promised:,} bytes came: try again")


def _check(url: str, place: Path) -> None:
    """The file's sha256 against its address and against what was recorded when it was first fetched."""
    with place.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    found = NAMED.search(url.partition("?")[0].partition("#")[0])
    named = found[1] or found[2] if found else ""
    if not digest.startswith(named):
        place.unlink()
        raise FetchError(f"{url}: its sha256 begins {digest[:8]}, its address says {named}: it is removed; try again")
    record = place.with_name(f"{place.name}.sha256")
    if not record.is_file():
        write_whole(record, digest)
    elif (known := record.read_text(encoding="utf-8", errors="replace").strip()) != digest:
        raise FetchError(
            f"{place}: changed since it was first fetched (sha256 {digest[:8]}…, recorded {shortened(known[:8])}…): "
            f"remove {place.parent} to fetch it again"
        )


def _reason(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
