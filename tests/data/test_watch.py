"""Workers that are killed, hang or fail: an error that names worker, path and image, and no process left behind."""

from __future__ import annotations

import errno
import gc
import multiprocessing
import os
import signal
import time

import pytest
import torch
from torch.utils.data import get_worker_info

from vitrail.data.badimages import BadImages
from vitrail.data.imagesets import TensorSet
from vitrail.data.loading import make_loader
from vitrail.data.watch import LoaderError, counted_in
from vitrail.images import ImageError


class Deadly(TensorSet):
    """Images of which one does something to the worker that reads it."""

    fate = staticmethod(lambda: None)
    at = 13

    def image(self, index):
        if index == self.at and get_worker_info() is not None:
            self.fate()
        return super().image(index)


class Random:
    random = True

    def __call__(self, image):
        return image


def loader(fate, timeout=300.0, workers=2):
    names = [f"p/{n}.png" for n in range(40)]
    images = Deadly(torch.zeros(40, 3, 4, 4, dtype=torch.uint8), torch.zeros(40), ("a",), names)
    images.fate = fate
    return make_loader(images, batch_size=4, train=False, workers=workers, timeout=timeout, transform=Random())


@pytest.fixture
def workers_here():
    """`workers_here()`: the processes begun since, without those of other tests' loaders that something still holds."""
    gc.collect()
    others = multiprocessing.active_children()
    return lambda: [process for process in multiprocessing.active_children() if process not in others]


def die():
    os.kill(os.getpid(), signal.SIGKILL)


def hang():
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    time.sleep(1000)


def fail():
    raise ImageError("p/13.png: not a readable image")


@pytest.mark.fault(36)
@pytest.mark.parametrize("workers", [1, 2])
def test_a_worker_that_is_killed_is_named_with_its_image(workers, workers_here):
    began = time.monotonic()
    words = rf"worker {workers - 1} was killed by SIGKILL, as the system does .* while at p/13\.png \(image 13\)"
    with pytest.raises(LoaderError, match=words):
        list(loader(die, workers=workers))
    assert time.monotonic() - began < 60
    assert workers_here() == []


@pytest.mark.fault(36)
def test_a_worker_that_dies_while_something_else_is_done_is_named_too(workers_here):
    """The system tells of it at once: in a training step, or wherever the program is."""
    words = r"worker \d was killed by SIGKILL, as the system does .* while at "
    with pytest.raises(LoaderError, match=words), counted_in(BadImages(), made := loader(None)):
        batches = iter(made)
        next(batches)
        os.kill(workers_here()[0].pid, signal.SIGKILL)
        time.sleep(20)
    del batches, made
    gc.collect()
    assert workers_here() == []


def test_an_error_of_somebody_elses_worker_passes():
    made = loader(None)
    made.dataset.images.at = None
    list(made)
    for text in ("DataLoader worker (pid 1) is killed by signal: Killed.", "DataLoader worker"):
        with pytest.raises(RuntimeError, match="DataLoader worker") as error, counted_in(BadImages(), made):
            raise RuntimeError(text)
        assert not isinstance(error.value, LoaderError)


@pytest.mark.fault(37)
def test_a_worker_that_hangs_is_named_and_ended(workers_here):
    began = time.monotonic()
    words = r"within 2 s \(--worker-timeout\); worker 1 has been at p/13\.png \(image 13\) for \d+ s"
    with pytest.raises(LoaderError, match=words):
        list(loader(hang, timeout=2))
    assert time.monotonic() - began < 60
    assert workers_here() == []


@pytest.mark.fault(38)
def test_an_image_that_fails_in_a_worker_is_named():
    with pytest.raises(ImageError, match=r"^p/13\.png: not a readable image$"):
        list(loader(fail))


def test_a_loader_goes_on_after_an_error():
    made = loader(die)
    for _ in range(2):
        with pytest.raises(LoaderError):
            list(made)
    made.dataset.images.at = None
    assert len(list(made)) == 10


def test_other_errors_pass():
    def wrong():
        raise RuntimeError("a bug of its own")

    with pytest.raises(RuntimeError, match="a bug of its own") as error:
        list(loader(wrong))
    assert not isinstance(error.value, LoaderError)


@pytest.mark.parametrize("workers", [0, 2])
def test_a_disk_that_times_out_is_no_worker_that_hangs(workers):
    """Whether an image is read or a log written: the error is the system's own."""

    def late(*_):
        raise TimeoutError(errno.ETIMEDOUT, "Connection timed out")

    made = loader(late, workers=workers)
    made.dataset.images.image = late
    with pytest.raises(TimeoutError, match="Connection timed out"):
        list(made)
    made = loader(None, workers=workers)
    made.dataset.images.at, made.bad.add = None, late
    with pytest.raises(TimeoutError, match="Connection timed out"):
        list(made)


class Slow(Random):
    """Takes half a second over one image and hangs over the next; `at` are their numbers."""

    def __init__(self, slow, at):
        self.slow, self.at = slow, at

    def __call__(self, image):
        number = int(image[0, 0, 0])
        if number == self.slow:
            time.sleep(0.5)
        if number == self.at:
            time.sleep(1000)
        return image


@pytest.mark.fault(37)
@pytest.mark.parametrize(("slow", "at", "worker"), [(None, 1, 0), (12, 13, 1)])
def test_of_two_workers_the_one_that_hangs_is_named(slow, at, worker):
    """Not the other, which has done all that it was given and waits, since earlier than the one that hangs began."""
    rows = torch.arange(40, dtype=torch.uint8).view(-1, 1, 1, 1).expand(-1, 3, 4, 4)
    images = TensorSet(rows, torch.zeros(40), ("a",), [f"p/{n}.png" for n in range(40)])
    made = make_loader(images, batch_size=4, train=False, workers=2, timeout=2, transform=Slow(slow, at))
    with pytest.raises(LoaderError, match=rf"worker {worker} has been at p/{at}\.png \(image {at}\)"):
        list(made)


@pytest.mark.fault(36)
def test_after_a_kill_no_process_is_left_while_the_loader_lives(workers_here):
    made = loader(die)
    with pytest.raises(LoaderError):
        list(made)
    assert workers_here() == []
