"""What holds for every test: no network, one thread, fixed seeds, no window."""

from __future__ import annotations

import os
import random
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

os.environ["MPLBACKEND"] = "Agg"
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
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of twelve pictures of 32 x 32 pixels in two classes: dark and bright noise, easy to tell apart."""
    folder = tmp_path_factory.mktemp("photos")
    generator = torch.Generator().manual_seed(0)
    for name, low in (("bright", 130), ("dark", 0)):
        (folder / name).mkdir()
        for number in range(6):
            noise = torch.randint(low, low + 120, (32, 32, 3), dtype=torch.uint8, generator=generator)
            Image.fromarray(noise.numpy()).save(folder / name / f"{number}.png")
    return folder


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of original data sets beside the checkout; the test is skipped where there is none."""
    path = ROOT.parent / "shared" / "data"
    if not path.is_dir():
        pytest.skip(f"needs the original data sets in {path.parent.name}/{path.name} beside the checkout")
    return path
