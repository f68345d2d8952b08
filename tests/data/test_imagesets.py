"""Image sets: what they give, their statistics, and stratified draws."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings, strategies as st

from vitrail.data.datasets import image_folder
from vitrail.data.imagesets import Splits, draw_stratified
from vitrail.records import IMAGENET_MEAN


def test_a_tensor_set_gives_samples_and_batches(tensor_set):
    sample = tensor_set[4]
    assert sample["label"] == 1
    assert sample["id"] == "n4"
    batch = tensor_set.gather([4, 22, 0])
    assert batch["image"][:, 0, 0, 0].tolist() == [4, 22, 0]
    assert batch["label"].tolist() == [1, 1, 0]
    assert batch["id"] == ["n4", "n22", "n0"]
    assert batch["image"].dtype == torch.uint8


def test_a_file_set_gives_the_same_as_one_in_memory(make_folder):
    root = make_folder("cat", "dog")
    files, held = image_folder(root, in_memory=False), image_folder(root, in_memory=True)
    assert (files.size, held.size) == (None, (8, 8))
    one, other = files.gather([5, 0]), held.gather([5, 0])
    assert torch.equal(one["image"], other["image"])
    assert one["id"] == other["id"] == ["dog/002.png", "cat/000.png"]
    assert one["label"].tolist() == other["label"].tolist() == [1, 0]
    assert files.subset(torch.tensor([4])).ids == ["dog/001.png"]


def test_statistics_are_those_of_the_pixels(tensor_set):
    mean, std = tensor_set.statistics()
    pixels = tensor_set.images.double() / 255
    assert mean == pytest.approx(pixels.mean((0, 2, 3)).tolist(), abs=1e-6)
    assert std == pytest.approx(pixels.std((0, 2, 3), correction=0).tolist(), abs=1e-6)


def test_a_constant_channel_can_still_be_normalised(tensor_set):
    tensor_set.images[:, 1] = 7
    assert tensor_set.statistics()[1][1] == pytest.approx(1 / 255, abs=1e-6)


def test_preprocess_follows_the_images(tensor_set, make_folder):
    splits = Splits(name="x", train=tensor_set, val=tensor_set, test=tensor_set)
    assert splits.preprocess().img_size == (6, 5)
    assert splits.preprocess(32).img_size == (32, 32)
    assert splits.preprocess().mean == tensor_set.statistics()[0]
    files = image_folder(make_folder("cat", "dog"), in_memory=False)
    large = Splits(name="x", train=files, val=files, test=files).preprocess()
    assert (large.img_size, large.mean, large.crop_pct) == ((224, 224), IMAGENET_MEAN, 0.875)


@settings(max_examples=50, deadline=None)
@given(
    counts=st.lists(st.integers(1, 60), min_size=1, max_size=5),
    fraction=st.floats(0.01, 0.49),
    parts=st.integers(1, 2),
    seed=st.integers(0, 2**31),
)
def test_a_stratified_draw_is_a_partition(counts, fraction, parts, seed):
    labels = torch.repeat_interleave(torch.arange(len(counts)), torch.tensor(counts))
    drawn = draw_stratified(labels, fraction, parts, seed)
    assert torch.cat(drawn).sort().values.tolist() == list(range(sum(counts)))
    for label, count in enumerate(counts):
        shares = [int((labels[rows] == label).sum()) for rows in drawn]
        assert len(set(shares[1:])) == 1
        assert shares[0] >= 1
        assert shares[1] >= 1 or count <= parts
        assert shares[1] <= max(1, round(fraction * count))


def test_a_draw_is_a_function_of_the_seed():
    labels = torch.arange(200) % 4
    first, again, other = (draw_stratified(labels, 0.1, 1, seed)[1].tolist() for seed in (3, 3, 4))
    assert first == again
    assert first != other
