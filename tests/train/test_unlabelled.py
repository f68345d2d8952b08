"""Training with images that have no label: they change neither weights nor figures, and nobody waits for them."""

from __future__ import annotations

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
    assert history["train_loss"] == [0]
    still = TrainConfig(epochs=1, device="cpu", lr=1e-12, min_lr=0)
    labelled, all_rows = rows(8, slice(0, 0)), rows(8, slice(2, 7))
    sparse = fit(make_task(), DataLoader(all_rows, batch_size=3), None, still)["train_loss"]
    alone = [make_task()(make_task().prepare([part[[0, 1, 7]] for part in labelled.tensors]))["loss"].item()]
    assert sparse == pytest.approx(alone, abs=1e-5)


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
