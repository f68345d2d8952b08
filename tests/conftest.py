"""What holds for every test: no network, one thread, fixed seeds, no window."""

from __future__ import annotations

import multiprocessing
import os
import random
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

os.environ["MPLBACKEND"] = "Agg"
ALONE = "VITRAIL_TEST_ALONE"
"""set where a test already has an interpreter of its own"""
ROOT = Path(__file__).resolve().parents[1]
LOCAL = {"localhost", "127.0.0.1", "::1", "0.0.0.0", ""}


def _guarded(connect: Any) -> Any:
    def only_local(self: socket.socket, address: Any) -> Any:
        host = address[0] if isinstance(address, tuple) else ""  # a path or bytes: a socket of this machine
        if host not in LOCAL:
            raise RuntimeError(f"a test may connect to this machine only; got {address}")
        return connect(self, address)

    return only_local


@pytest.fixture(autouse=True, scope="session")
def no_network() -> Iterator[None]:
    """Every connection to another machine is an error that no `except OSError` swallows."""
    with pytest.MonkeyPatch.context() as patch:
        for name in ("connect", "connect_ex"):
            patch.setattr(socket.socket, name, _guarded(getattr(socket.socket, name)))
        yield


@pytest.fixture(autouse=True, scope="session")
def one_thread() -> None:
    """Small tensors are slower on many threads, and results then depend on the machine."""
    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def seeds() -> None:
    random.seed(0)
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def make_photos() -> Callable[[Path, int, int], Path]:
    """`make_photos(folder, each, seed)`: pictures of 32 x 32 pixels in two classes, dark and bright noise."""

    def make(folder: Path, each: int, seed: int) -> Path:
        generator = torch.Generator().manual_seed(seed)
        for name, low in (("bright", 130), ("dark", 0)):
            (folder / name).mkdir()
            for number in range(each):
                noise = torch.randint(low, low + 120, (32, 32, 3), dtype=torch.uint8, generator=generator)
                Image.fromarray(noise.numpy()).save(folder / name / f"{number}.png")
        return folder

    return make


@pytest.fixture(scope="session")
def photos(tmp_path_factory: pytest.TempPathFactory, make_photos: Callable[[Path, int, int], Path]) -> Path:
    """A folder of twelve pictures of 32 x 32 pixels in two classes: dark and bright noise, easy to tell apart."""
    return make_photos(tmp_path_factory.mktemp("photos"), 6, 0)


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of original data sets beside the checkout; the test is skipped where there is none."""
    path = ROOT.parent / "shared" / "data"
    if not path.is_dir():
        pytest.skip(f"needs the original data sets in {path.parent.name}/{path.name} beside the checkout")
    return path


@pytest.hookimpl(tryfirst=True)
def pytest_pyfunc_call(pyfuncitem: pytest.Function) -> bool | None:
    """A test marked `forks` runs in an interpreter of its own where the forks of this one could not train.

    PyTorch refuses backward passes in a fork of a process whose autograd has started threads, as some tests make it do.
    """
    if not pyfuncitem.get_closest_marker("forks") or ALONE in os.environ or _forks_can_train():
        return None
    words = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-m", "", "--rootdir", str(ROOT)]
    done = subprocess.run(
        [*words, f"{ROOT / pyfuncitem.nodeid}"],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env={**os.environ, ALONE: "1"},
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return True


def _forks_can_train() -> bool:
    process = multiprocessing.get_context("fork").Process(target=_train_quietly)
    process.start()
    process.join()
    return process.exitcode == 0


def _train_quietly() -> None:
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
    torch.ones(1, requires_grad=True).sum().backward()


@pytest.fixture
def in_two_processes() -> Callable[[Callable[[int], None]], None]:
    """Runs `work(rank)` in two processes of one run, as torchrun starts them, until both have ended well."""

    def run(work: Callable[[int], None]) -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(probe.getsockname()[1])}

        def one(rank: int) -> None:
            own = {"RANK": str(rank), "LOCAL_RANK": str(rank), "TORCHELASTIC_RUN_ID": "a run", "WORLD_SIZE": "2"}
            os.environ.update(address | own)
            os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
            torch.set_num_threads(torch.get_num_threads())  # renews a fork's pool, which two threads must not
            work(rank)

        both = [multiprocessing.get_context("fork").Process(target=one, args=(rank,)) for rank in (0, 1)]
        for process in both:
            process.start()
        for process in both:
            process.join(60)
            process.kill()
        assert [process.exitcode for process in both] == [0, 0]

    return run
