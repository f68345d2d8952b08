"""Two machines, as network namespaces that are joined by a cable: one is lost in the middle of a run.

Needs the right to make namespaces (root) and `ip` of iproute2; elsewhere the test is skipped.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from safetensors.torch import load_file

ROOT = Path(__file__).resolve().parents[2]
ENDS_WITHIN = 60
"""seconds from the loss of a machine to the end of the run on the other"""
PORT = 29400


def ip(*words: str) -> str:
    return subprocess.run(["ip", *words], check=True, capture_output=True, text=True).stdout


class Host:
    """One of two machines: a namespace with an end of the cable."""

    def __init__(self, number: int) -> None:
        self.number, self.name = number, f"vitrail{os.getpid()}{'ab'[number]}"
        self.cable, self.address = f"vt{os.getpid()}{'ab'[number]}", f"10.77.0.{number + 1}"

    def begin(self) -> None:
        ip("link", "set", self.cable, "netns", self.name)
        for words in (["addr", "add", f"{self.address}/24", "dev", self.cable], ["link", "set", self.cable, "up"]):
            ip("-n", self.name, *words)
        ip("-n", self.name, "link", "set", "lo", "up")

    def pids(self) -> list[int]:
        return [int(pid) for pid in ip("netns", "pids", self.name).split()]

    def kill(self) -> None:
        for pid in self.pids():
            os.kill(pid, signal.SIGKILL)

    def run(self, log: Path, nodes: int, *words: str) -> subprocess.Popen[bytes]:
        """vitrail under torchrun on this machine, one of `nodes`."""
        launcher = [sys.executable, "-m", "torch.distributed.run", f"--nnodes={nodes}", "--nproc-per-node=1"]
        meeting = [f"--node-rank={self.number}", "--master-addr=10.77.0.1", f"--master-port={PORT}"]
        environment = {**os.environ, "GLOO_SOCKET_IFNAME": self.cable, "OMP_NUM_THREADS": "1"}
        with log.open("wb") as file:
            return subprocess.Popen(
                ["ip", "netns", "exec", self.name, *launcher, *meeting, "-m", "vitrail", *words],
                stdout=file, stderr=subprocess.STDOUT, env=environment, start_new_session=True,
            )  # fmt: skip


@pytest.fixture
def hosts() -> Iterator[list[Host]]:
    both = [Host(0), Host(1)]
    try:
        for host in both:
            ip("netns", "add", host.name)
        ip("link", "add", both[0].cable, "type", "veth", "peer", "name", both[1].cable)
        for host in both:
            host.begin()
    except (OSError, subprocess.CalledProcessError) as error:
        for host in both:
            subprocess.run(["ip", "netns", "del", host.name], check=False, capture_output=True)
        pytest.skip(f"this machine makes no network namespaces: {error}")
    yield both
    for host in both:
        host.kill()
        ip("netns", "del", host.name)


@pytest.fixture
def words(photos: Path) -> list[str]:
    """A run of a few seconds."""
    given = {
        "data": f"folder:{photos}", "model": "vit_debug", "batch-size": 2, "val-fraction": 0.34, "device": "cpu",
        "epochs": 12, "num-nodes": 2, "ema": 0.9, "mixup": 0.2,
    }  # fmt: skip
    return ["train", *(str(word) for name, value in given.items() for word in (f"--{name}", value))]


def together(hosts: list[Host], folder: Path, *words: str) -> list[subprocess.Popen[bytes]]:
    return [host.run(folder / f"{host.number}.log", len(hosts), *words) for host in hosts]


def finished(hosts: list[Host], folder: Path, *words: str, timeout: float = 240) -> None:
    for host, process in zip(hosts, together(hosts, folder, *words), strict=True):
        assert process.wait(timeout) == 0, (folder / f"{host.number}.log").read_text()


def lose(hosts: list[Host], victim: int, folder: Path, *words: str) -> str:
    """Starts a run, kills one machine after two epochs, and gives what the other said by its end."""
    processes, history = together(hosts, folder, *words), folder / "run" / "history.csv"
    until = time.monotonic() + 120
    while not (history.is_file() and history.read_text().count("\n") > 3):
        assert time.monotonic() < until, (folder / "0.log").read_text()
        time.sleep(0.02)
    hosts[victim].kill()
    survivor = hosts[1 - victim]
    assert processes[1 - victim].wait(ENDS_WITHIN) != 0
    processes[victim].wait()
    assert survivor.pids() == []
    return (folder / f"{survivor.number}.log").read_text()


@pytest.mark.full
@pytest.mark.timeout(900)
@pytest.mark.fault(42, 44, 45)
@pytest.mark.parametrize(("strategy", "victim"), [("ddp", 1), ("fsdp", 0)])
def test_a_machine_that_is_lost(strategy: str, victim: int, hosts: list[Host], words: list[str], tmp_path: Path):
    """The other ends with an error, no process stays; both go on bit for bit, or one alone if told so."""
    words = [*words, "--strategy", strategy]
    whole, broken, alone = (tmp_path / name for name in ("whole", "broken", "alone"))
    whole.mkdir()
    broken.mkdir()
    finished(hosts, whole, *words, "--out", f"{whole}/run")
    said = lose(hosts, victim, broken, *words, "--out", f"{broken}/run")
    shutil.copytree(broken, alone)
    finished(hosts, broken, "train", "--resume", f"{broken}/run")
    one, other = (load_file(folder / "run" / "model" / "model.safetensors") for folder in (whole, broken))
    assert all(bool((value == other[name]).all()) for name, value in one.items())
    assert "error: all 2 processes of a run take each step together; one ended, or is out of reach (" in said
    assert f"go on with: vitrail train --resume {broken}/run" in said
    assert f"[rank{1 - victim}]: Traceback" not in said

    fewer = ["train", "--resume", f"{alone}/run", "--num-nodes", "1"]
    assert hosts[0].run(alone / "0.log", 1, *fewer).wait(120) != 0
    assert "--num-nodes was 2, got 1: " in (refused := (alone / "0.log").read_text())
    assert "or go on all the same with --allow-world-change" in refused
    finished(hosts[:1], alone, *fewer, "--allow-world-change")
    assert "each step has its 4 images still: --accumulate is 2" in (alone / "0.log").read_text()
