"""SIGKILL to a run of two processes with everything on: what is resumed ends as what nobody disturbed.

Mixup and CutMix, two workers a process, images that grow, a teacher, an average of weights: all that holds state, or
draws. A run has a session of its own, as a shell or a scheduler gives it, by which whatever outlives it is found.
"""

from __future__ import annotations

import csv
import errno
import json
import multiprocessing
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from safetensors.torch import load_file
from torch.utils.data import get_worker_info

from vitrail.cli import main
from vitrail.data.imagesets import FileSet
from vitrail.models.registry import build_model
from vitrail.records import Preprocess
from vitrail.tasks.classify import Classify

KILLS = 20
FORK = multiprocessing.get_context("fork")
BEGUN = "training images have a short side"
"""the last that a run says before it trains"""
PATIENCE = 60
"""seconds that a run may take"""
TIMES = ("seconds", "images_per_second", "data_wait")
GONE = 10
"""seconds in which the system has removed what was killed"""
PROCESSES = Path("/proc")
EVERYTHING = [
    "--model", "vit_debug", "--epochs", "4", "--batch-size", "4", "--device", "cpu", "--devices", "2", "--workers", "2",
    "--mixup", "0.4", "--cutmix", "1", "--drop-path", "0.1", "--grow-from", "16", "--ema", "0.9",
    "--distillation", "soft", "--in-memory", "no", "--lr", "1e-3", "--worker-timeout", "60",
]  # fmt: skip
pytestmark = [
    pytest.mark.forks,
    pytest.mark.skipif(not PROCESSES.is_dir(), reason="looks for processes in /proc"),
]


@pytest.fixture(scope="module")
def many(tmp_path_factory: pytest.TempPathFactory, make_photos: Callable[[Path, int, int], Path]) -> Path:
    """Eighty pictures of 32 x 32 pixels in two classes, as `photos` are."""
    return make_photos(tmp_path_factory.mktemp("many"), 40, 1)


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small CNN, which has learnt nothing: its answers are as good to repeat as others."""
    torch.manual_seed(2)
    model = build_model("resnet_debug", num_classes=2)
    model.classes, model.preprocess = ("bright", "dark"), Preprocess(img_size=(32, 32), mean=(0.5,) * 3, std=(0.2,) * 3)
    folder = tmp_path_factory.mktemp("teacher") / "model"
    Classify(model).save_pretrained(folder)
    return folder


class Forks(FORK.Process):  # type: ignore[name-defined,misc]
    """Both processes of a run in one group, forked from here as torchrun would start them: no second is lost loading.

    `setup` comes before all else in each of them.
    """

    def __init__(self, words: list[str], log: Path, setup: Callable[[], None]) -> None:
        super().__init__()
        self.words, self.log, self.setup = words, log, setup

    def run(self) -> None:
        os.setsid()
        sys.stdout = sys.stderr = self.log.open("a", buffering=1)
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            os.environ.update({"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(probe.getsockname()[1])})
        os.environ.update({"WORLD_SIZE": "2", "TORCHELASTIC_RUN_ID": "a run"})
        both = [FORK.Process(target=self._one, args=(rank,)) for rank in (0, 1)]
        for process in both:
            process.start()
        for process in both:
            process.join()
        sys.exit(max(abs(process.exitcode) for process in both))

    def _one(self, rank: int) -> None:
        os.environ.update({"RANK": str(rank), "LOCAL_RANK": str(rank)})
        torch.set_num_threads(torch.get_num_threads())  # renews a fork's pool, which two threads must not
        self.setup()
        sys.exit(main(["train", *self.words]))

    def wait(self, timeout: float | None = None) -> int | None:
        self.join(timeout)
        return self.exitcode


class Command(subprocess.Popen[bytes]):
    """The installed command, which starts its second process itself."""

    def __init__(self, words: list[str], log: Path, setup: Callable[[], None]) -> None:
        script = str(Path(sys.executable).with_name("vitrail"))
        with log.open("ab") as file:
            super().__init__([script, "train", *words], stdout=file, stderr=file, start_new_session=True)


class Started(NamedTuple):
    """A run in a session of its own."""

    process: Forks | Command
    log: Path

    def wait_until_it_trains(self) -> None:
        wait = time.monotonic() + PATIENCE
        while BEGUN not in self.said():
            assert time.monotonic() < wait and not self.ended(), self.said()
            time.sleep(0.02)

    def ended(self) -> bool:
        return not self.process.is_alive() if isinstance(self.process, Forks) else self.process.poll() is not None

    def said(self) -> str:
        return self.log.read_text() if self.log.exists() else ""

    def kill(self) -> None:
        """Ends the whole group as a power cut would."""
        os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()

    def left(self) -> list[str]:
        """The processes of its session, which those that it starts are born into."""
        return [folder.name for folder in PROCESSES.glob("[0-9]*") if _session(folder) == self.process.pid]

    def check_gone(self) -> None:
        """Fails if a process outlives it by more than `GONE` seconds."""
        wait = time.monotonic() + GONE
        while left := self.left():
            assert time.monotonic() < wait, f"processes are left: {left}"
            time.sleep(0.05)


def _session(folder: Path) -> int:
    """Of a living process; 0 for one that has ended."""
    try:
        state, _, _, session = (folder / "stat").read_text().rpartition(")")[2].split()[:4]
    except OSError:
        return 0
    return int(session) if state != "Z" else 0


@pytest.fixture
def start(many: Path, teacher: Path) -> Iterator[Callable[..., Started]]:
    """`start(out, *flags)` begins the run of a folder, or goes on with it where it has a checkpoint."""
    started: list[Started] = []

    def begin(
        out: Path, *flags: str, way: type[Forks | Command] = Forks, setup: Callable[[], None] = lambda: None,
        data: Path = many,
    ) -> Started:  # fmt: skip
        new = ["--data", f"folder:{data}", "--out", str(out), *EVERYTHING, "--teacher", str(teacher)]
        words = ["--resume", str(out)] if has_begun(out) else new
        log = out.parent / f"{out.name}-{len(started)}.log"
        process = way([*words, *flags], log, setup)
        if isinstance(process, Forks):
            process.start()
        started.append(Started(process, log))
        return started[-1]

    yield begin
    for one in started:
        if one.left():
            one.kill()


def has_begun(out: Path) -> bool:
    return any(out.glob("checkpoints/*.ckpt"))


def end_of(out: Path) -> dict[str, Any]:
    """All that a run ends with: its weights, those that are kept, their average, the optimiser's state, the figures."""
    last = torch.load(out / "checkpoints" / "last.ckpt", weights_only=True)
    with (out / "history.csv").open(newline="", encoding="utf-8") as file:
        rows = [{name: value for name, value in row.items() if name not in TIMES} for row in csv.DictReader(file)]
    metrics = json.loads((out / "metrics.json").read_text())
    return {
        "weights": last["state_dict"], "average": last["callbacks"]["WeightEma"], "rows": rows,
        "optimizer": last["optimizer_states"], "kept": load_file(out / "model" / "model.safetensors"),
        "metrics": {name: value for name, value in metrics.items() if name not in {"command", *TIMES}},
    }  # fmt: skip


def equal(one: Any, other: Any) -> bool:
    if isinstance(one, torch.Tensor):
        return torch.equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(equal(one[name], other[name]) for name in one)
    if isinstance(one, list):
        return len(one) == len(other) and all(map(equal, one, other))
    return bool(one == other)


def files(out: Path) -> set[str]:
    return {str(path.relative_to(out)) for path in out.rglob("*")}


def finish(run: Started) -> None:
    assert run.process.wait(timeout=PATIENCE) == 0, run.said()
    run.check_gone()


def check(kills: int, seed: int, way: type[Forks | Command], start: Callable[..., Started], tmp_path: Path) -> None:
    """Kills runs at moments drawn from the time in which a whole one trains, evaluates and reports.

    Every second one is killed again after it was resumed. Each then comes to its end.
    """
    run = start(tmp_path / "whole", way=way)
    run.wait_until_it_trains()
    began = time.monotonic()
    finish(run)
    seconds, whole, dice = time.monotonic() - began, end_of(tmp_path / "whole"), random.Random(seed)
    assert [float(row["epoch"]) for row in whole["rows"]] == [1, 2, 3, 4]
    for number in range(kills):
        out = tmp_path / str(number)
        for moment in (moments := [dice.uniform(0, seconds) for _ in range(1 + number % 2)]):
            run = start(out, way=way)
            run.wait_until_it_trains()
            time.sleep(moment)
            run.kill()
            run.check_gone()
        finish(start(out, way=way))
        assert equal(end_of(out), whole), moments
        assert files(out) == files(tmp_path / "whole"), moments


@pytest.mark.fault(42)
def test_two_kills_of_a_run_with_everything_on(start: Callable[..., Started], tmp_path: Path):
    check(2, 0, Forks, start, tmp_path)


@pytest.mark.full
@pytest.mark.timeout(5400)
@pytest.mark.fault(42)
@pytest.mark.parametrize("way", [Forks, Command])
def test_twenty_of_twenty_kills_of_a_run_with_everything_on(
    way: type[Forks | Command], start: Callable[..., Started], tmp_path: Path
):
    check(KILLS, 1, way, start, tmp_path)


# ---- what else may happen to such a run


def failing(wanted: str, number: int, last: Path) -> Callable[[], None]:
    """Files of which the path has `wanted` in it cannot be written once `last` is there."""

    def setup() -> None:
        plain = Path.open

        def opened(path: Path, mode: str = "r", *args: Any, **kwargs: Any) -> Any:
            if "x" in mode and wanted in str(path) and last.exists():
                raise OSError(number, os.strerror(number), str(path))
            return plain(path, mode, *args, **kwargs)

        Path.open = opened  # type: ignore[method-assign,assignment]

    return setup


def in_a_worker(fate: Callable[[], None], last: Path) -> Callable[[], None]:
    """Something happens to the worker that reads one of the training images, once `last` is there."""

    def setup() -> None:
        plain = FileSet.image

        def image(self: FileSet, index: int) -> Any:
            if index == 40 and get_worker_info() is not None and last.exists():
                fate()
            return plain(self, index)

        FileSet.image = image  # type: ignore[method-assign]

    return setup


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def hang() -> None:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    time.sleep(1000)


FULL = partial(failing, ".part", errno.ENOSPC)
READ_ONLY = partial(failing, ".part", errno.EROFS)
KILLED = "was killed by SIGKILL"
HANGS = "within 3 s (--worker-timeout); worker"


@pytest.mark.fault(13, 36, 37)
@pytest.mark.parametrize(
    ("fault", "said"),
    [
        (FULL, "No space left on device"),
        (partial(in_a_worker, die), KILLED),
        pytest.param(READ_ONLY, "Read-only file system", marks=pytest.mark.full),
        pytest.param(partial(in_a_worker, hang), HANGS, marks=pytest.mark.full),
    ],
    ids=["full", "killed", "read-only", "hangs"],
)
def test_what_ends_a_run_with_everything_on_is_said_and_nothing_is_lost(
    fault: Callable[[Path], Callable[[], None]], said: str, start: Callable[..., Started], tmp_path: Path
):
    """After its first checkpoint: both processes end, none is left, and it is gone on with as if nothing had been."""
    out = tmp_path / "run"
    run = start(out, "--worker-timeout", "3", setup=fault(out / "checkpoints" / "last.ckpt"))
    assert run.process.wait(timeout=PATIENCE) not in (0, None), run.said()
    run.check_gone()
    assert said in run.said()
    assert has_begun(out) and not list(out.rglob("*.part"))
    finish(start(out, "--worker-timeout", "60"))
    finish(start(tmp_path / "whole"))
    assert equal(end_of(out), end_of(tmp_path / "whole"))


@pytest.mark.full
@pytest.mark.fault(18, 42)
def test_an_image_that_cannot_be_read_in_a_run_with_everything_on(
    many: Path, start: Callable[..., Started], tmp_path: Path
):
    """It ends the run and is named, or is skipped; then a kill changes nothing either."""
    data, skip = shutil.copytree(many, tmp_path / "data"), ("--on-bad-image", "skip")
    (data / "dark" / "7.png").write_bytes(b"")
    run = start(tmp_path / "run", data=data)
    assert run.process.wait(timeout=PATIENCE) == 2
    run.check_gone()
    assert f"{data / 'dark' / '7.png'}: " in run.said()
    finish(start(tmp_path / "whole", *skip, data=data))
    run = start(tmp_path / "killed", *skip, data=data)
    while not has_begun(tmp_path / "killed"):
        time.sleep(0.02)
    run.kill()
    run.check_gone()
    finish(start(tmp_path / "killed", *skip, data=data))
    assert equal(end_of(tmp_path / "killed"), end_of(tmp_path / "whole"))
    for out in ("whole", "killed"):
        with (tmp_path / out / "bad_images.csv").open(encoding="utf-8", newline="") as file:
            assert [row["id"] for row in csv.DictReader(file)] == ["dark/7.png"]
