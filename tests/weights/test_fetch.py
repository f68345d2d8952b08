"""Downloads, by the code that users run: from a server on this machine, which behaves well and badly."""

from __future__ import annotations

import hashlib
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from vitrail.weights import fetch
from vitrail.weights.fetch import FetchError, cache_folder, fetch_url

DATA = bytes(range(256)) * 40
SUM = hashlib.sha256(DATA).hexdigest()


def whole(handler: Any, data: bytes = DATA) -> None:
    handler.head(200, Content_Length=len(data))
    handler.wfile.write(data)


def cut(handler: Any) -> None:
    handler.head(200, Content_Length=len(DATA) + 1)
    handler.wfile.write(DATA)


def of_no_length(handler: Any) -> None:
    handler.head(200)
    handler.wfile.write(DATA)


def of_strange_length(handler: Any) -> None:
    handler.head(200, Content_Length="many")
    handler.wfile.write(DATA)


def missing(handler: Any) -> None:
    handler.head(404, Content_Length=0)


def silent(handler: Any) -> None:
    handler.server.over.wait(60)


def stalling(handler: Any) -> None:
    handler.head(200, Content_Length=len(DATA))
    handler.wfile.write(DATA[:100])
    handler.wfile.flush()
    handler.server.over.wait(60)


def no_answer(handler: Any) -> None:
    handler.wfile.write(b"this is no HTTP\r\n\r\n")


def elsewhere(handler: Any, to: str) -> None:
    handler.head(302, Location=to, Content_Length=0)


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv(fetch.CACHE, str(tmp_path / "cache"))
    monkeypatch.delenv(fetch.OFFLINE, raising=False)
    return tmp_path / "cache"


def held(cache: Path) -> list[str]:
    return sorted(path.name for path in cache.rglob("*") if path.is_file())


def test_a_file_is_fetched_once_and_kept(server: Any, cache: Path):
    url = server.at("/models/w.pth", whole)
    path = fetch_url(url)
    assert path.read_bytes() == DATA and path.name == "w.pth" and cache in path.parents
    assert fetch_url(url) == path and server.asked == ["/models/w.pth"]
    assert held(cache) == ["w.pth", "w.pth.sha256"] and path.with_name("w.pth.sha256").read_text() == SUM


def test_files_of_one_name_are_told_apart(server: Any):
    one, two = server.at("/a/w.pth", whole), server.at("/b/w.pth", partial(whole, data=b"other"))
    assert fetch_url(one).read_bytes() == DATA and fetch_url(two).read_bytes() == b"other"


@pytest.mark.parametrize(("way", "message"), [
    (cut, "10,240 of 10,241 bytes came: try again"),
    (of_no_length, "does not say how long it is"),
    (of_strange_length, "does not say how long it is"),
    (missing, "404"),
    (silent, "timed out"),
    (stalling, "timed out"),
    (no_answer, "could not be fetched"),
], ids=lambda value: getattr(value, "__name__", ""))  # fmt: skip
def test_what_does_not_come_whole_leaves_nothing(
    way: Callable[[Any], None], message: str, server: Any, cache: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(fetch, "TIMEOUT", 0.3)
    url = server.at("/w.pth", way)
    with pytest.raises(FetchError, match=message) as told:
        fetch_url(url)
    assert str(told.value).startswith(url) and held(cache) == []
    server.at("/w.pth", whole)
    assert fetch_url(url).read_bytes() == DATA


def test_no_server_at_all_is_said(cache: Path):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    with pytest.raises(FetchError, match=r"w\.pth: could not be fetched into .* refused.*: look at the network"):
        fetch_url(f"http://127.0.0.1:{port}/w.pth")
    assert held(cache) == []


def test_more_than_any_checkpoint_has_is_refused(server: Any, cache: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(fetch, "MAX_BYTES", 1000)
    with pytest.raises(FetchError, match="more than 1,000 bytes"):
        fetch_url(server.at("/w.pth", whole))
    assert held(cache) == []


def test_a_redirect_is_followed_but_not_into_this_disk(server: Any, tmp_path: Path, cache: Path):
    url = server.at("/w.pth", partial(elsewhere, to=server.at("/mirror/w.pth", whole)))
    assert fetch_url(url).read_bytes() == DATA
    (tmp_path / "secret").write_bytes(b"secret")
    url = server.at("/x.pth", partial(elsewhere, to=f"file://{tmp_path}/secret"))
    with pytest.raises(FetchError, match="could not be fetched"):
        fetch_url(url)
    assert held(cache) == ["w.pth", "w.pth.sha256"]


# ---- checksums


def test_a_sum_in_the_name_is_enforced(server: Any, cache: Path):
    right = server.at(f"/w-{SUM[:8]}.pth", whole)
    assert fetch_url(right).read_bytes() == DATA
    wrong = server.at("/w-00000000.pth", whole)
    for address in (wrong, f"{wrong}?download=1"):
        with pytest.raises(FetchError, match=rf"sha256 begins {SUM[:8]}, its address says 00000000: it is removed"):
            fetch_url(address)
    assert "w-00000000.pth" not in held(cache)


def test_a_sum_in_the_folder_of_the_address_is_enforced(server: Any, cache: Path):
    right = server.at(f"/clip/{SUM}/w.pt", whole)
    assert fetch_url(f"{right}?download=1").read_bytes() == DATA
    wrong = server.at(f"/clip/{'0' * 64}/w.pt", whole)
    with pytest.raises(FetchError, match=rf"sha256 begins {SUM[:8]}, its address says {'0' * 64}: it is removed"):
        fetch_url(wrong)
    assert held(cache).count("w.pt") == 1


def test_a_file_that_changes_after_it_was_fetched_is_found(server: Any):
    url = server.at("/w.pth", whole)
    path = fetch_url(url)
    path.write_bytes(DATA[:-1] + b"?")
    with pytest.raises(
        FetchError, match=rf"changed since it was first fetched .*recorded '?{SUM[:8]}.*remove {path.parent}"
    ):
        fetch_url(url)
    path.write_bytes(DATA)
    path.with_name("w.pth.sha256").write_bytes(b"\xff\0damaged")
    with pytest.raises(FetchError, match="changed since"):
        fetch_url(url)


# ---- no network, no disk


@pytest.mark.parametrize("word", ["1", "true", "YES", "on"])
def test_offline_only_the_cache_answers(word: str, server: Any, monkeypatch: pytest.MonkeyPatch):
    there, absent = server.at("/w.pth", whole), server.at("/x.pth", whole)
    path = fetch_url(there)
    monkeypatch.setenv(fetch.OFFLINE, word)
    assert fetch_url(there) == path
    with pytest.raises(FetchError, match=r"x\.pth: not in .*, and HF_HUB_OFFLINE is set: fetch it where"):
        fetch_url(absent)
    assert server.asked == ["/w.pth"]


def test_a_cache_that_cannot_be_written_is_named(server: Any, cache: Path, monkeypatch: pytest.MonkeyPatch):
    url = server.at("/w.pth", whole)
    cache.write_text("a file in its place")
    with pytest.raises(FetchError, match=rf"could not be fetched into {cache} .*: look at the network and the disk"):
        fetch_url(url)
    cache.unlink()
    path = fetch_url(url)
    path.with_name("w.pth.sha256").unlink()

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(fetch, "write_whole", full)
    with pytest.raises(FetchError, match=rf"its checksum cannot be kept .*No space left.*: look at {cache}"):
        fetch_url(url)


# ---- addresses


@pytest.mark.parametrize("url", [
    "http://127.0.0.1/", "http://127.0.0.1", "http://127.0.0.1/..", "http://127.0.0.1/a/..", "http://127.0.0.1/.hidden",
    "file:///etc/passwd", "ftp://127.0.0.1/w.pth", "/etc/passwd", "", "http://127.0.0.1/a b.pth", "http://[::1/w.pth\n",
    "http://127.0.0.1/" + "a" * 300, "http://127.0.0.1/..%2f..%2fw.pth/", "http://127.0.0.1/\0", "http://127.0.0.1/\x1b[2J",
])  # fmt: skip
def test_what_is_no_address_of_a_file_is_refused(url: str, cache: Path):
    with pytest.raises(FetchError, match="weights have an address https://host/…/file") as told:
        fetch_url(url)
    assert str(told.value).isprintable() and held(cache) == []


def test_a_password_is_neither_used_nor_told(cache: Path):
    with pytest.raises(FetchError, match="without a user's name") as told:
        fetch_url("https://me:secret@127.0.0.1/w.pth")
    assert "secret" not in str(told.value) and held(cache) == []


@pytest.mark.fault(12)
@pytest.mark.parametrize("path", ["/a/../../../w.pth", "/%2e%2e/%2e%2e/w.pth", "/..%2f..%2fw.pth", "//etc/w.pth"])
def test_no_address_climbs_out_of_the_cache(path: str, server: Any, cache: Path):
    url = server.at(path, whole)
    try:
        found = fetch_url(url)
    except FetchError:
        assert held(cache) == []
    else:
        assert found.resolve().is_relative_to(cache.resolve()) and found.parent.parent == cache
    assert held(cache.parent) == held(cache)


# ---- other processes

FETCH = "import sys; from vitrail.weights.fetch import fetch_url; print(fetch_url(sys.argv[1]))"


def start(url: str) -> subprocess.Popen[str]:
    return subprocess.Popen([sys.executable, "-c", FETCH, url], stdout=subprocess.PIPE, text=True, env=dict(os.environ))


def test_two_at_once_have_the_same_whole_file_and_a_killed_one_leaves_none(server: Any, cache: Path):
    begun = threading.Semaphore(0)
    go_on = threading.Event()

    def slowly(handler: Any) -> None:
        handler.head(200, Content_Length=len(DATA))
        handler.wfile.write(DATA[:5000])
        handler.wfile.flush()
        begun.release()
        go_on.wait(60)
        with suppress(OSError):  # the killed one is gone
            handler.wfile.write(DATA[5000:])

    url = server.at("/w.pth", slowly)
    both, killed = [start(url), start(url)], start(url)
    for _ in range(3):
        assert begun.acquire(timeout=120)
    killed.send_signal(signal.SIGKILL)
    killed.communicate(timeout=60)
    assert "w.pth" not in held(cache)
    go_on.set()
    answers = [process.communicate(timeout=60)[0].strip() for process in both]
    assert [process.returncode for process in both] == [0, 0] and len(set(answers)) == 1
    assert Path(answers[0]).read_bytes() == DATA


def test_what_a_killed_process_left_is_removed_once_it_is_old(server: Any, cache: Path):
    url = server.at("/w.pth", whole)
    folder = fetch_url(url).parent
    (folder / "w.pth").unlink()
    old, new = folder / ".w.pth.1.part", folder / ".w.pth.2.part"
    for part in (old, new):
        part.write_bytes(DATA[:10])
    os.utime(old, (time.time() - 2 * fetch.ABANDONED,) * 2)
    fetch_url(url)
    assert new.exists() and not old.exists()


def test_the_cache_is_in_the_users_own_folder_unless_named(monkeypatch: pytest.MonkeyPatch, cache: Path):
    assert cache_folder() == cache
    monkeypatch.delenv(fetch.CACHE)
    assert cache_folder() == Path.home() / ".cache" / "vitrail"
