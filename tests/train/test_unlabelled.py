"""Training with images that have no label: they change neither weights nor figures, and nobody waits for them."""

from __future__ import annotations

import csv
import json
import math
from dataclasses import replace

import pytest
import torch
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

from vitrail.records import UNLABELLED
from vitrail.train.config import TrainConfig
from vitrail.train.engine import fit


def rows(count, unlabelled):
    pixels = torch.randint(256, (count, 3, 8, 8), generator=torch.Generator().manual_seed(0)).to(torch.uint8)
    labels = torch.arange(count) % 3
    labels[unlabelled] = UNLABELLED
    return TensorDataset(pixels, labels)


@pytest.mark.fault(31)
def test_batches_without_a_label_leave_the_weights_but_for_decay(make_task, fingerprint):
    """And the loss of an epoch is the mean over its labelled images."""
    config = TrainConfig(epochs=1, device="cpu", weight_decay=0)
    task = make_task()
    before = fingerprint(task)
    history = fit(task, DataLoader(rows(8, slice(None)), batch_size=4), None, config)
    assert fingerprint(task) == before
    assert math.isnan(*history["train_loss"])
    still = TrainConfig(epochs=1, device="cpu", lr=1e-12, min_lr=0)
    labelled, all_rows = rows(8, slice(0, 0)), rows(8, slice(2, 7))
    sparse = fit(make_task(), DataLoader(all_rows, batch_size=3), None, still)["train_loss"]
    alone = [make_task()(make_task().prepare([part[[0, 1, 7]] for part in labelled.tensors]))["loss"].item()]
    assert sparse == pytest.approx(alone, abs=1e-5)


def test_an_epoch_without_a_label_has_no_loss_and_may_be_the_best(make_task, tmp_path):
    """Its figures on held-out images count; a resumed run, the model's card and TensorBoard take it as it is."""
    bare, labelled = (DataLoader(rows(8, which), batch_size=4) for which in (slice(None), slice(0, 0)))
    config = TrainConfig(epochs=1, device="cpu", weight_decay=0, log="tensorboard")
    fit(make_task(), bare, labelled, config, out=tmp_path)
    history = fit(make_task(), bare, labelled, replace(config, epochs=2), out=tmp_path, resume=True)
    assert all(map(math.isnan, history["train_loss"])) and len(history) == 2
    assert history.best("val_loss", "min") is history.rows[1]
    figures = json.loads((tmp_path / "model" / "config.json").read_text())["training"]["figures"]
    assert (figures["epoch"], figures["train_loss"]) == (2, None)
    table = csv.DictReader((tmp_path / "history.csv").read_text().splitlines())
    assert [row["train_loss"] for row in table] == ["nan", "nan"]


@pytest.mark.fault(31)
@pytest.mark.forks
def test_a_process_without_a_label_keeps_no_other_waiting(make_task, in_two_processes, tmp_path):
    images = rows(16, slice(1, None, 2))  # all those of the second process

    def work(rank):
        sampler = DistributedSampler(images, 2, rank, shuffle=False)
        task, loader = make_task(), DataLoader(images, batch_size=4, sampler=sampler)
        history = fit(task, loader, loader, TrainConfig(epochs=2, device="cpu", devices=2))
        torch.save((history["train_loss"], task.backbone.head.weight.tolist()), tmp_path / f"{rank}.pt")

    in_two_processes(work)
    first, second = (torch.load(tmp_path / f"{rank}.pt") for rank in (0, 1))
    assert first == second
    assert all(0 < loss < 3 for loss in first[0])
