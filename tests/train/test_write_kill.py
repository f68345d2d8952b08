"""SIGKILL at a random point of one checkpoint's writing: the newest checkpoint or the one before it loads."""

from __future__ import annotations

import multiprocessing
import os
import random
import signal
import time
from itertools import count
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from vitrail.train.checkpoint import BEST, KEPT, Checkpoints, WholeFiles, damage, newest_whole
from vitrail.train.claim import claimed

FORK = multiprocessing.get_context("fork")
NUMBERS = 100_000
"""of each of three tensors, so that most of the time passes in writing them"""


def save_for_ever(run, said):
    """Writes one checkpoint after the other, and says the number of each that is finished."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
    with claimed(run):
        for number in count(1):
            state = {name: torch.full((NUMBERS,), float(number)) for name in "abc"}
            parts = {name: {key: [] for key in inner} for name, inner in KEPT.items()}
            content = parts | {"state_dict": state, "told": {"trained": {}, "number": number}}
            trainer = SimpleNamespace(
                lightning_module=nn.Linear(1, 1),
                is_global_zero=True,
                save_checkpoint=lambda path, content=content: WholeFiles().save_checkpoint(content, path),
            )
            Checkpoints(None, run / "checkpoints").save(trainer, *([BEST] if number % 2 else []))
            said.send(number)


def killed_in_a_write(run, dice):
    """The number of the last checkpoint that was finished before the kill."""
    heard, said = FORK.Pipe(duplex=False)
    process = FORK.Process(target=save_for_ever, args=(run, said))
    process.start()
    said.close()
    numbers = [heard.recv()]
    began = time.monotonic()
    numbers.append(heard.recv())
    time.sleep(dice.uniform(0, 2 * (time.monotonic() - began)))
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    while heard.poll():
        try:
            numbers.append(heard.recv())
        except EOFError:
            break
    return numbers[-1]


def survives(kills, folder):
    dice, within, left = random.Random(14), 0, 0
    for kill in range(kills):
        run = folder / str(kill)
        finished = killed_in_a_write(run, dice)
        left += any((run / "checkpoints").glob(".*"))
        assert not any(damage(path) for path in (run / "checkpoints").glob("*.ckpt")), "one is there, but not whole"
        state = WholeFiles().load_checkpoint(newest_whole(run / "checkpoints"))
        number = state["told"]["number"]
        assert number in (finished, finished + 1), "a checkpoint that was finished is lost"
        assert all((tensor == number).all() for tensor in state["state_dict"].values())
        within += number == finished
        with claimed(run):
            assert {path.suffix for path in (run / "checkpoints").iterdir()} == {".ckpt"}
    assert left > kills / 10, "too few kills came while a file was written"
    assert within


@pytest.mark.fault(14)
def test_twenty_kills_within_a_write(tmp_path):
    survives(20, tmp_path)


@pytest.mark.full
@pytest.mark.fault(14)
@pytest.mark.timeout(600)
def test_two_hundred_kills_within_a_write(tmp_path):
    survives(200, tmp_path)
