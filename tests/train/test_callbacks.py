"""Signals and TensorBoard, without a run around them."""

from __future__ import annotations

import signal
from types import SimpleNamespace

import pytest

from vitrail.records import History
from vitrail.train.callbacks import StopOnSignal, TensorBoardLog, handlers_kept

MAIN = SimpleNamespace(is_global_zero=True)


def test_tensorboard_takes_back_what_was_written_after_the_checkpoint(tmp_path, monkeypatch):
    """A run that was stopped in epoch 3 and resumed after epoch 2 writes epoch 3 again."""
    pytest.importorskip("tensorboard")
    record = SimpleNamespace(history=History(rows=[{"epoch": 1}, {"epoch": 2}]))
    board, opened = TensorBoardLog(record, tmp_path), []
    board._open = lambda folder, purge_step: opened.append((folder, purge_step))
    board.on_train_start(MAIN, None)
    assert opened == [(str(tmp_path), 3)]


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
