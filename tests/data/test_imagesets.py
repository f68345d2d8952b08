"""Image sets: what they give, their statistics, and stratified draws."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings, strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from vitrail.data.datasets import image_folder
from vitrail.data.imagesets import Sample, Splits, collate, draw_stratified
from vitrail.records import IMAGENET_MEAN, Batch


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


class Largest(TorchDispatchMode):
    """How many bytes the largest copy of pixels took."""

    nbytes = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        made = func(*args, **(kwargs or {}))
        if isinstance(made, torch.Tensor) and made.dtype == torch.uint8 and not func.is_view:
            self.nbytes = max(self.nbytes, made.nbytes)
        return made


def test_one_unread_image_makes_no_copy_of_the_whole_set(tensor_set):
    tensor_set.bad_images = {3: "n3: empty"}
    with Largest() as largest:
        tensor_set.statistics()
    assert largest.nbytes == tensor_set.images[:, 0].nbytes, "one channel at a time"


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
    ids = [f"{n}.png" for n in range(len(labels))]
    drawn = draw_stratified(labels, ids, fraction, parts, seed)
    assert torch.cat(drawn).sort().values.tolist() == list(range(sum(counts)))
    for label, count in enumerate(counts):
        shares = [int((labels[rows] == label).sum()) for rows in drawn]
        assert len(set(shares[1:])) == 1
        assert shares[0] >= 1
        assert shares[1] >= 1 or count <= parts
        assert shares[1] <= max(1, round(fraction * count))


def test_a_draw_is_a_function_of_the_seed():
    labels = torch.arange(200) % 4
    ids = [f"{n}.png" for n in range(200)]
    first, again, other = (draw_stratified(labels, ids, 0.1, 1, seed)[1].tolist() for seed in (3, 3, 4))
    assert first == again
    assert first != other


@settings(max_examples=40, deadline=None)
@given(count=st.integers(6, 60), new=st.integers(0, 10**6), place=st.integers(0, 60), seed=st.integers(0, 99))
def test_an_added_image_hardly_moves_any(count, new, place, seed):
    """At most one goes out of, or into, each part of its class, and none from one part to the other."""

    def parts(ids):
        labels = torch.tensor([int(name[0]) for name in ids])
        return [{ids[row] for row in rows.tolist()} for rows in draw_stratified(labels, ids, 0.2, 2, seed)]

    ids = [f"{n % 2}/{n}" for n in range(count)]
    (_, val, test), (_, val2, test2) = parts(ids), parts([*ids[:place], f"0/new{new}", *ids[place:]])
    assert len(val ^ val2) <= 2
    assert len(test ^ test2) <= 2
    assert not val & test2 and not test & val2
    assert {name for name in val ^ val2 | test ^ test2 if name[0] == "1"} == set()


def test_a_draw_does_not_depend_on_the_order_of_files():
    labels, ids = torch.arange(40) % 2, [f"{n}.png" for n in range(40)]
    turned = draw_stratified(labels.flip(0), ids[::-1], 0.1, 2, 0)
    for rows, other in zip(draw_stratified(labels, ids, 0.1, 2, 0), turned, strict=True):
        assert {ids[row] for row in rows.tolist()} == {ids[39 - row] for row in other.tolist()}


# ---- samples to batches


def full_sample(n: int) -> Sample:
    return Sample(
        image=torch.full((3, 4, 5), n, dtype=torch.uint8), label=n,
        boxes=torch.tensor([[0, 0, 2.0, 3]] * n).view(n, 4), classes=torch.zeros(n),
        mask=torch.zeros(4, 5), pad_mask=torch.zeros(4, 5, dtype=torch.bool), text=f"t{n}",
        target={"depth": torch.full((4, 5), float(n))}, side={"age": torch.tensor(float(n))},
        views=[torch.zeros(3, 4, 4), torch.zeros(3, 2, 2)], meta={"size": (4, 5)}, id=f"n{n}",
    )  # fmt: skip


def test_every_key_is_joined_by_its_kind():
    batch = collate([full_sample(n) for n in range(3)])
    assert set(batch) == set(Batch.__annotations__) == set(Sample.__annotations__)
    assert batch["image"].shape == (3, 3, 4, 5)
    assert batch["label"].tolist() == [0, 1, 2]
    assert [len(boxes) for boxes in batch["boxes"]] == [len(classes) for classes in batch["classes"]] == [0, 1, 2]
    assert batch["mask"].shape == batch["pad_mask"].shape == batch["target"]["depth"].shape == (3, 4, 5)
    assert batch["side"]["age"].tolist() == [0, 1, 2]
    assert [view.shape for view in batch["views"]] == [(3, 3, 4, 4), (3, 3, 2, 2)]
    assert (batch["text"], batch["id"], batch["meta"][2]) == (["t0", "t1", "t2"], ["n0", "n1", "n2"], {"size": (4, 5)})


def test_soft_labels_and_bare_images():
    image = torch.zeros(3, 4, 4, dtype=torch.uint8)
    assert set(collate([Sample(image=image), Sample(image=image)])) == {"image"}
    assert collate([Sample(image=image, label=torch.tensor([0.2, 0.8]))] * 2)["label"].shape == (2, 2)


@pytest.mark.parametrize(
    ("second", "message"),
    [
        ({"image": torch.zeros(3, 4, 4), "id": "b"}, "must have the same keys; b and the first differ in label"),
        (
            {"image": torch.zeros(3, 4, 9), "label": 1, "id": "b"},
            r"image must have one shape .*\(3, 4, 9\)\]: give",
        ),
    ],
)
def test_samples_that_do_not_fit_together(second, message):
    with pytest.raises(ValueError, match=message):
        collate([Sample(image=torch.zeros(3, 4, 4), label=0, id="a"), second])


def test_an_unknown_key_is_named():
    with pytest.raises(ValueError, match="a sample holds boxes, .*; got also 'lable'"):
        collate([{"image": torch.zeros(3, 4, 4), "lable": 0}])
