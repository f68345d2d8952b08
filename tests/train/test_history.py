"""The loss of an epoch and the table of all epochs."""

from __future__ import annotations

import math

import pytest
import torch

from vitrail.train.history import HistoryLog, LossMeter, NonFiniteLoss, Reading, write_csv


def reading(loss, images=2, batch=0):
    return Reading(torch.tensor(loss), images, epoch=1, batch=batch, lr=0.5)


def test_the_mean_is_over_images():
    meter = LossMeter()
    meter.add(reading(1.0, images=3))
    meter.add(reading(5.0, images=1))
    assert (meter.total, meter.images, meter.latest) == (8.0, 4, 5.0)


def test_losses_are_read_in_bunches():
    meter = LossMeter(every=3)
    for n in range(5):
        meter.add(reading(1.0))
        assert meter.images == (6 if n >= 2 else 0)
    meter.flush()
    assert meter.images == 10


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_loss_that_is_not_finite_names_its_batch(bad):
    meter = LossMeter(every=3)
    meter.add(reading(1.0))
    meter.add(reading(bad, batch=6))
    with pytest.raises(NonFiniteLoss, match=f"got {bad} in epoch 2, batch 7, at lr 0.5: lower --lr"):
        meter.add(reading(1.0))


def test_the_best_row_is_the_earliest_and_never_nan():
    record = HistoryLog(LossMeter(), ("accuracy", "max"))
    for epoch, value in enumerate([math.nan, 0.5, 0.7, 0.7, 0.6], start=1):
        record.history.rows.append({"epoch": epoch, "val_accuracy": value})
    assert record.best == {"epoch": 3, "val_accuracy": 0.7}
    assert not record.improved
    record.mode = "min"
    assert record.best["epoch"] == 2


def test_without_validation_every_epoch_is_the_best():
    record = HistoryLog(LossMeter(), ("accuracy", "max"))
    record.history.rows.append({"epoch": 1, "train_loss": 1.0})
    assert record.improved
    assert record.best is None


def test_csv_has_the_columns_of_all_rows(tmp_path):
    write_csv(tmp_path / "a.csv", [{"epoch": 1, "lr": 0.5}, {"epoch": 2, "lr": 0.1, "val_loss": 3.0}])
    assert (tmp_path / "a.csv").read_text() == "epoch,lr,val_loss\n1,0.5,\n2,0.1,3.0\n"
