"""SIGKILL at any moment, then `resume`: the very weights, averages and figures of a run that nobody disturbed.

Each run is a forked process of its own, killed from outside after a random time, or by itself at a named place.
"""

from __future__ import annotations

import multiprocessing
import os
import random
import re
import signal
import socket
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from vitrail.processes import is_first
from vitrail.train import checkpoint, engine
from vitrail.train.checkpoint import Checkpoints, newest_whole

FORK = multiprocessing.get_context("fork")
SETTINGS = {
    "plain": {},
    "average": {"ema": 0.9},
    "mixup": {"mixup": 0.2, "crop": "pad"},
    "accumulation": {"accumulate": 3},
    "no clipping": {"clip_grad": 0},
    "bf16": {"precision": "bf16"},
    "all": {"ema": 0.9, "mixup": 0.2, "accumulate": 2, "precision": "bf16", "checkpoint_every": 1},
}
TIMES = ("seconds", "images_per_second", "data_wait")
KILLS, MORE = 20, 100
pytestmark = pytest.mark.forks


class Outcome:
    """What a run ended with, told through a file."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / "outcome.pt"

    def tell(self, task: Any, history: Any) -> None:
        rows = [{name: value for name, value in row.items() if name not in TIMES} for row in history.rows]
        torch.save({"weights": task.state_dict(), "rows": rows}, self.path)

    def read(self) -> dict[str, Any]:
        return torch.load(self.path, weights_only=True)


def equal(one: dict[str, Any], other: dict[str, Any]) -> bool:
    same = all(torch.equal(value, other["weights"][name]) for name, value in one["weights"].items())
    return same and one["rows"] == other["rows"]


@pytest.fixture
def start(train: Callable[..., Any], make_task: Callable[..., Any]) -> Callable[..., Any]:
    """Starts a run in a process of its own: `start(out, resume=…, setup=…, **config)`."""

    def begin(out: Path, *, setup: Callable[[], Any] = lambda: None, **options: Any) -> Any:
        def work() -> None:
            os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
            os.setsid()  # its loader's workers are killed with it
            torch.set_num_threads(torch.get_num_threads())  # renews a fork's pool, which two threads must not
            setup()
            task = make_task(seed=int(options.get("resume", False)), drop_path_rate=0.2, drop_rate=0.1)
            history = train(task, out=out / "run", **options)
            if is_first():
                Outcome(out).tell(task, history)

        process = FORK.Process(target=work)
        process.start()
        return process

    return begin


def kill(process: Any) -> None:
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError:  # not yet a group of its own, or ended
        process.kill()
    process.join()


def has_begun(folder: Path) -> bool:
    return any((folder / "run" / "checkpoints").glob("*.ckpt"))


@pytest.fixture
def undisturbed(start: Callable[..., Any], tmp_path: Path) -> Callable[..., tuple[dict[str, Any], float]]:
    """What a run that nobody disturbs ends with, and how long it takes."""

    def run(**options: Any) -> tuple[dict[str, Any], float]:
        folder, began = tmp_path / "whole", time.monotonic()
        folder.mkdir()
        process = start(folder, **options)
        process.join()
        assert process.exitcode == 0
        return Outcome(folder).read(), time.monotonic() - began

    return run


def survives(folder: Path, start: Callable[..., Any], moments: list[float], **options: Any) -> dict[str, Any]:
    """Kills a run at each of `moments`, resumes it, lets it end, and gives what it ended with."""
    folder.mkdir()
    for moment in moments:
        process = start(folder, resume=has_begun(folder), **options)
        process.join(moment)
        kill(process)
    process = start(folder, resume=has_begun(folder), **options)
    process.join()
    assert process.exitcode == 0
    assert not [path.name for path in (folder / "run").rglob("*") if path.name.endswith((".part", ".new", ".old"))]
    return Outcome(folder).read()


def check(count: int, setting: str, workers: int, start: Any, undisturbed: Any, tmp_path: Path) -> None:
    options = {"workers": workers, **SETTINGS[setting]}
    whole, seconds = undisturbed(**options)
    dice = random.Random(f"{setting} {workers}")
    for number in range(count):
        moments = [dice.uniform(0, seconds) for _ in range(1 + number % 2)]
        assert equal(survives(tmp_path / str(number), start, moments, **options), whole), moments


@pytest.mark.fault(42)
@pytest.mark.parametrize("workers", [0, 2])
def test_a_killed_run_goes_on_bit_for_bit(workers, start, undisturbed, tmp_path):
    check(2, "all", workers, start, undisturbed, tmp_path)


@pytest.mark.full
@pytest.mark.timeout(900)
@pytest.mark.fault(42)
@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("setting", SETTINGS)
def test_twenty_of_twenty_kills(setting, workers, start, undisturbed, tmp_path):
    check(KILLS, setting, workers, start, undisturbed, tmp_path)


@pytest.mark.full
@pytest.mark.timeout(1800)
def test_a_hundred_of_a_hundred_kills(start, undisturbed, tmp_path):
    check(MORE, "all", 0, start, undisturbed, tmp_path)


# ---- named places


def die(*_: Any, **__: Any) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def half_a_file(state: Any, file: Any) -> None:
    file.write(b"half")
    file.flush()
    die()


def at(owner: Any, name: str, call: int, before: bool = True) -> Callable[[], None]:
    """Dies around a function's call of that number."""

    def setup() -> None:
        plain, calls = getattr(owner, name), iter(range(1, 1000))

        def deadly(*args: Any, **kwargs: Any) -> Any:
            last = next(calls) == call
            if last and before:
                die()
            result = plain(*args, **kwargs)
            if last:
                die()
            return result

        setattr(owner, name, deadly)

    return setup


def writing(call: int) -> Callable[[], None]:
    """Dies with a checkpoint half on the disk."""

    def setup() -> None:
        plain, calls = torch.save, iter(range(1, 1000))
        torch.save = lambda state, file: half_a_file(state, file) if next(calls) == call else plain(state, file)

    return setup


PLACES = {
    "in the first batch": at(engine.TaskModule, "training_step", 1),
    "in an epoch": at(engine.TaskModule, "training_step", 13),
    "before an epoch's last step": at(engine.TaskModule, "optimizer_step", 16),
    "after an epoch's last step": at(engine.TaskModule, "optimizer_step", 16, before=False),
    "in an epoch's first batch": at(engine.TaskModule, "training_step", 17),
    "in validation": at(engine.TaskModule, "validation_step", 5),
    "after validation": at(engine.TaskModule, "on_validation_epoch_end", 2, before=False),
    "before a checkpoint": at(Checkpoints, "save", 2),
    "in a checkpoint": writing(2),
    "in the first checkpoint": writing(1),
    "between best and last": at(checkpoint.shutil, "copyfileobj", 2),
    "between previous and last": at(checkpoint, "_keep_previous", 2, before=False),
    "after a checkpoint": at(Checkpoints, "save", 2, before=False),
    "after the last checkpoint": at(Checkpoints, "save", 3, before=False),
    "before the model is written": at(engine, "_take_best", 1),
}


@pytest.mark.fault(14, 42)
@pytest.mark.parametrize("place", PLACES)
def test_wherever_it_is_killed(place, start, undisturbed, tmp_path):
    whole, _ = undisturbed(ema=0.9)
    (tmp_path / "run").mkdir()
    process = start(tmp_path, setup=PLACES[place], ema=0.9)
    process.join()
    assert process.exitcode == -signal.SIGKILL
    if has_begun(tmp_path):
        newest_whole(tmp_path / "run" / "checkpoints")
    process = start(tmp_path, resume=has_begun(tmp_path), ema=0.9)
    process.join()
    assert process.exitcode == 0
    assert equal(Outcome(tmp_path).read(), whole)


# ---- two processes that share each step


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def pair(start: Callable[..., Any], folder: Path, **options: Any) -> list[Any]:
    """Two processes of one run, as torchrun starts them."""
    shared = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}

    def ranked(rank: int) -> Callable[[], None]:
        own = {"RANK": str(rank), "LOCAL_RANK": str(rank), "TORCHELASTIC_RUN_ID": "a run"}
        return lambda: os.environ.update({**shared, **own})

    return [start(folder, setup=ranked(rank), devices=2, **options) for rank in (0, 1)]


def check_pair(kills: int, start: Any, tmp_path: Path, **more: Any) -> None:
    options = {"ema": 0.9, "mixup": 0.2, **more}
    (tmp_path / "whole").mkdir()
    began = time.monotonic()
    assert [done(process) for process in pair(start, tmp_path / "whole", **options)] == [0, 0]
    seconds, whole = time.monotonic() - began, Outcome(tmp_path / "whole").read()
    dice = random.Random(2)
    for number in range(kills):
        folder = tmp_path / str(number)
        folder.mkdir()
        both, moment = pair(start, folder, **options), dice.uniform(0.3, 1) * seconds
        time.sleep(moment)
        for process in both:
            kill(process)
        both = pair(start, folder, resume=has_begun(folder), **options)
        assert [done(process) for process in both] == [0, 0]
        assert equal(Outcome(folder).read(), whole), moment


def done(process: Any) -> int:
    process.join(60)
    if process.is_alive():
        kill(process)
    return int(process.exitcode)


SHARDS = {"strategy": "fsdp", "precision": "bf16"}


@pytest.mark.fault(42)
@pytest.mark.parametrize("more", [{}, SHARDS], ids=["whole", "shards"])
def test_two_processes_go_on_bit_for_bit(more, start, tmp_path):
    check_pair(1, start, tmp_path, **more)


@pytest.mark.full
@pytest.mark.fault(42)
@pytest.mark.timeout(900)
@pytest.mark.parametrize("more", [{}, SHARDS], ids=["whole", "shards"])
def test_twenty_of_twenty_kills_of_two_processes(more, start, tmp_path):
    check_pair(KILLS, start, tmp_path, **more)


@pytest.mark.fault(44)
@pytest.mark.parametrize(("victim", "strategy"), [(0, "ddp"), (1, "fsdp")])
def test_a_process_that_dies_takes_the_other_down(victim, strategy, start, tmp_path, capfd):
    both = pair(start, tmp_path, epochs=2000, strategy=strategy)
    wait = time.monotonic() + 60
    while not has_begun(tmp_path):
        assert time.monotonic() < wait
        time.sleep(0.05)
    kill(both[victim])
    began = time.monotonic()
    assert done(both[1 - victim]) not in (0, None)
    assert time.monotonic() - began < 60
    with pytest.raises(ProcessLookupError):
        os.killpg(both[1 - victim].pid, 0)
    lost = (
        r"ProcessLost: all 2 processes of a run take each step together; one ended, .* go on with: vitrail train --res"
    )
    assert re.search(lost, capfd.readouterr().err)
