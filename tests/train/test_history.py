"""The loss of an epoch and the table of all epochs."""

from __future__ import annotations

import math
import os
import time
from types import SimpleNamespace

import pytest
import torch

from vitrail.train.finite import NonFiniteLoss, Place
from vitrail.train.history import HistoryLog, LossMeter, Reading, Waits, write_csv


def reading(loss, images=2, batch=0, blame=None, labelled=None, **parts):
    place = Place(1, batch, step=40, lr=0.5, ids=("a.png", "b.png"))
    weight = torch.tensor(float(images if labelled is None else labelled))
    return Reading({"loss": torch.tensor(loss), **parts}, weight, images, place, blame)


def log(name, mode):
    return HistoryLog(LossMeter(), SimpleNamespace(allowed=0, skipped=0), (name, mode))


def test_only_waiting_for_batches_is_counted():
    def loader():
        for number in range(3):
            time.sleep(0.02)
            yield number

    waits = Waits()
    for _ in waits.over(loader(), start=1):  # passing over the first is waiting too
        time.sleep(0.05)
    assert 0.06 <= waits.total < 0.1
    assert 0 <= waits.ended - waits.began < 0.02, "the last wait found that there is no more"


def test_the_mean_is_over_images():
    meter = LossMeter()
    meter.add(reading(1.0, images=3))
    meter.add(reading(5.0, images=1))
    assert (meter.totals, meter.images, meter.latest) == ({"loss": 8.0}, 4, 5.0)


@pytest.mark.fault(31)
def test_images_without_a_label_weigh_nothing_and_count_for_the_pace():
    meter = LossMeter()
    meter.add(reading(4.0, images=3, labelled=1))
    meter.add(reading(0.0, images=3, labelled=0))
    assert (meter.totals, meter.weight, meter.images) == ({"loss": 4.0}, 1, 6)


def test_parts_are_summed_beside_the_loss():
    meter = LossMeter(every=2)
    meter.add(reading(1.0, images=3, pixels=torch.tensor(2.0, dtype=torch.bfloat16)))
    meter.add(reading(5.0, images=1, pixels=torch.tensor(4.0)))
    assert meter.totals == {"loss": 8.0, "pixels": 10.0}


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
    place = "epoch 2, batch 7, step 41, at lr 0.5, with a.png, b.png"
    with pytest.raises(NonFiniteLoss, match=f"got {bad} in {place}: lower --lr"):
        meter.add(reading(1.0))
    with pytest.raises(NonFiniteLoss, match=f"{place}, first after blocks.1: lower --lr"):
        LossMeter().add(reading(bad, batch=6, blame=lambda: "blocks.1"))


def test_batches_that_are_left_out_do_not_count():
    meter = LossMeter(skipping=True)
    for loss in (math.nan, 3.0, math.inf):
        meter.add(reading(loss))
    assert (meter.totals, meter.images) == ({"loss": 6.0}, 2)
    meter.reset()
    meter.add(reading(math.nan))
    assert (meter.totals, meter.images) == ({"loss": 0.0}, 0)  # the names are known, for other processes to add


def test_sums_are_taken_over_all_processes():
    record, seen = log("accuracy", "max"), []
    record.meter.add(reading(1.0, images=3, pixels=torch.tensor(2.0)))

    def reduce(sums, reduce_op):
        seen.append(reduce_op)
        return sums + torch.tensor([10.0, 20.0, 4.0, 5.0])

    strategy = SimpleNamespace(reduce=reduce, root_device="cpu")
    trainer = SimpleNamespace(world_size=2, strategy=strategy)
    assert record._over_all_processes(trainer) == ({"loss": 13.0, "pixels": 26.0}, 7, 8)
    assert seen == ["sum"]


def test_the_best_row_is_the_last_of_equals_and_never_nan():
    record = log("accuracy", "max")
    for epoch, value in enumerate([math.nan, 0.5, 0.7, 0.7, 0.6], start=1):
        record.history.rows.append({"epoch": epoch, "val_accuracy": value})
    assert record.best == {"epoch": 4, "val_accuracy": 0.7}
    assert not record.improved
    record.mode = "min"
    assert record.best["epoch"] == 2


def test_the_best_row_is_the_historys():
    """One law: whoever asks the history gets the row that was kept."""
    record = log("loss", "min")
    for epoch, value in enumerate([math.inf, math.nan, 0.5, 0.5], start=1):
        assert record.best is None or record.best["epoch"] == epoch - 1
        record.history.rows.append({"epoch": epoch, "val_loss": value})
    assert record.best is record.history.best("val_loss", "min")


def test_without_validation_every_epoch_is_the_best():
    record = log("accuracy", "max")
    record.history.rows.append({"epoch": 1, "train_loss": 1.0})
    assert record.improved
    assert record.best is None


def test_csv_has_the_columns_of_all_rows(tmp_path):
    write_csv(tmp_path / "a.csv", [{"epoch": 1, "lr": 0.5}, {"epoch": 2, "lr": 0.1, "val_loss": 3.0}])
    assert (tmp_path / "a.csv").read_text() == "epoch,lr,val_loss\n1,0.5,\n2,0.1,3.0\n"


def test_csv_is_written_whole(tmp_path, monkeypatch):
    path = tmp_path / "a.csv"
    write_csv(path, [{"epoch": 1}])

    def full(_):
        raise OSError("no space left")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="no space"):
        write_csv(path, [{"epoch": 1}, {"epoch": 2}])
    assert path.read_text() == "epoch\n1\n"
    assert list(tmp_path.iterdir()) == [path]
