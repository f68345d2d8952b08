"""Signals, and what follows runs with workers."""

from __future__ import annotations

import os
import signal
import time

import pytest
import torch
from torch.utils.data import get_worker_info
from torch.utils.data._utils import signal_handling

from vitrail.data.imagesets import TensorSet
from vitrail.data.loading import make_loader
from vitrail.data.transforms import eval_transform
from vitrail.data.watch import LoaderError
from vitrail.records import Preprocess
from vitrail.train.callbacks import StopOnSignal, handlers_kept


@pytest.fixture
def handlers(monkeypatch):
    """The process's signal handlers, as a table."""
    table = {signal.SIGINT: signal.default_int_handler, signal.SIGTERM: None}

    def put(number, handler):
        if handler is None:
            raise TypeError("signal handler must be signal.SIG_IGN, signal.SIG_DFL, or a callable object")
        before, table[number] = table[number], handler
        return before

    monkeypatch.setattr(signal, "signal", put)
    monkeypatch.setattr(signal, "getsignal", table.__getitem__)
    return table


def test_a_handler_that_python_does_not_know_is_left_alone(handlers):
    before, stop = dict(handlers), StopOnSignal(None)
    with handlers_kept():
        stop.on_train_start(None, None)
        assert handlers == before | {signal.SIGINT: stop._heard}
    assert handlers == before


AS_IT_IS = eval_transform(Preprocess(img_size=(8, 8)))


class Deadly(TensorSet):
    """Images that kill whoever reads them, if that is a worker."""

    def image(self, index):
        if get_worker_info() is not None:
            os.kill(os.getpid(), signal.SIGKILL)
        return super().image(index)


@pytest.fixture
def no_workers_yet(monkeypatch):
    """As in a process that has had no loader with workers."""
    monkeypatch.setattr(signal_handling, "_SIGCHLD_handler_set", False)
    before = signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    yield
    signal.signal(signal.SIGCHLD, before)


@pytest.mark.fault(36)
@pytest.mark.usefixtures("no_workers_yet")
def test_after_a_run_with_workers_one_that_dies_is_heard_of_at_once(train):
    train(epochs=1, workers=1)
    images = Deadly(torch.zeros(8, 3, 8, 8, dtype=torch.uint8), torch.zeros(8), ("a",), list("abcdefgh"))
    images.size = None
    began = time.monotonic()
    with pytest.raises(LoaderError, match="worker 0 was killed by SIGKILL"):
        list(make_loader(images, batch_size=4, train=False, workers=1, timeout=10, transform=AS_IT_IS))
    assert time.monotonic() - began < 8
