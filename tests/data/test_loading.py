"""Order, sharding, resuming, and the same batches whatever the workers."""

from __future__ import annotations

import pytest
import torch
from hypothesis import assume, given, settings, strategies as st
from PIL import Image

from vitrail.data import imagesets
from vitrail.data.augment import AugmentConfig
from vitrail.data.datasets import DataConfig, image_folder, load_splits
from vitrail.data.imagesets import FileSet, ImageSet, Sample
from vitrail.data.loading import OrderedBatches, Pick, draw_seed, get_data_loaders, make_loader
from vitrail.data.transforms import RandomResizedCrop, eval_transform, train_transform
from vitrail.images import ImageError
from vitrail.records import Preprocess

TINY = Preprocess(img_size=(6, 6))


def rows(batches: OrderedBatches) -> list[list[int]]:
    return [[pick.row for pick in batch] for batch in batches]


@settings(max_examples=80, deadline=None)
@given(
    count=st.integers(1, 90), batch_size=st.integers(1, 20), world=st.integers(1, 4), shuffle=st.booleans(),
    epoch=st.integers(0, 5),
)  # fmt: skip
def test_shards_do_not_overlap(count, batch_size, world, shuffle, epoch):
    assume(count >= world and (shuffle or batch_size > 1 or count % world == 0))
    shards = []
    for rank in range(world):
        order = OrderedBatches(count, batch_size, shuffle=shuffle, seed=7, rank=rank, world=world)
        order.set_epoch(epoch)
        batches = rows(order)
        assert all(len(batch) <= batch_size for batch in batches)
        assert len(batches) == len(order) and all(batches)
        shards.append([row for batch in batches for row in batch])
    drawn = [row for shard in shards for row in shard]
    assert len(set(drawn)) == len(drawn)
    assert len(drawn) == (count - count % world if shuffle else count)
    if shuffle:
        assert len({len(shard) for shard in shards}) == 1


def test_the_place_comes_from_torch_distributed(monkeypatch):
    order = OrderedBatches(10, 2, shuffle=False)
    assert rows(order)[0] == [0, 1]
    for name, value in (("is_initialized", True), ("get_rank", 1), ("get_world_size", 2)):
        monkeypatch.setattr(f"torch.distributed.{name}", lambda value=value: value)
    assert rows(order) == [[1, 3], [5, 7], [9]]
    assert len(order) == 3


@pytest.mark.parametrize("world", [2, 3, 7])
@pytest.mark.parametrize("batch_size", [1, 2, 4])
def test_processes_make_equally_many_steps_in_evaluation(world, batch_size):
    for count in range(1, 40):
        orders = [OrderedBatches(count, batch_size, shuffle=False, rank=rank, world=world) for rank in range(world)]
        if count < world or (batch_size == 1 and count % world):
            for order in orders:  # all of them say so, or the others would wait for the one that stopped
                for ask in (len, list):
                    with pytest.raises(ValueError, match="every process needs an image|draw equally many batches"):
                        ask(order)
            continue
        assert {len(rows(order)) for order in orders} == {len(orders[0])}
        drawn = [row for order in orders for batch in rows(order) for row in batch]
        assert sorted(drawn) == list(range(count))


def test_the_order_is_a_function_of_seed_and_epoch():
    def order(seed, epoch):
        batches = OrderedBatches(50, 8, shuffle=True, seed=seed)
        batches.set_epoch(epoch)
        return rows(batches)

    assert order(0, 3) == order(0, 3)
    assert order(0, 3) != order(0, 4)
    assert order(0, 3) != order(1, 3)
    assert order(0, 1) != order(1, 0)
    assert sorted(row for batch in order(0, 3) for row in batch) == list(range(50))


def test_torchs_generator_is_neither_read_nor_moved():
    before = torch.get_rng_state()
    rows(OrderedBatches(50, 8, shuffle=True))
    assert torch.equal(torch.get_rng_state(), before)


def test_a_resumed_epoch_goes_on():
    order = OrderedBatches(50, 8, shuffle=True, seed=1)
    order.set_epoch(2)
    whole = rows(order)
    order.set_epoch(2, start=3)
    assert rows(order) == whole[3:]
    assert len(order) == len(whole) == 7
    order.set_epoch(3)
    assert len(rows(order)) == 7


def test_a_plain_loop_sees_another_order_every_epoch(tensor_set):
    loader = make_loader(tensor_set, batch_size=8, train=True)
    epochs = [[name for batch in loader for name in batch["id"]] for _ in range(3)]
    assert len({tuple(epoch) for epoch in epochs}) == 3
    loader.batch_sampler.set_epoch(1)
    assert [name for batch in loader for name in batch["id"]] == epochs[1]
    assert [name for batch in loader for name in batch["id"]] == epochs[2]


def test_an_epoch_counts_once_it_is_drawn_to_its_end():
    order = OrderedBatches(50, 8, shuffle=True)
    first = next(iter(order))
    assert next(iter(order)) == first
    running = iter(order)
    assert next(running) == first
    order.set_epoch(7)
    list(running)
    assert (order.epoch, order.start) == (7, 0)  # what was said meanwhile stands
    order.set_epoch(7, start=3)
    rows(order)
    assert (order.epoch, order.start) == (8, 0)


def test_what_is_not_shuffled_stays_the_same():
    order = OrderedBatches(9, 4, shuffle=False)
    assert list(order) == list(order)


@pytest.mark.fault(35)
def test_nothing_is_dropped():
    assert [len(batch) for batch in OrderedBatches(17, 8, shuffle=True)] == [8, 8, 1]


@pytest.mark.fault(35)
@pytest.mark.parametrize("train", [True, False])
def test_a_data_set_smaller_than_a_batch_is_one_batch(tensor_set, train):
    few = tensor_set.subset(torch.arange(3))
    for batch_size, sizes in ((8, [3]), (2, [2, 1])):
        loader = make_loader(few, batch_size=batch_size, train=train)
        assert len(loader) == len(sizes)
        assert [len(batch["label"]) for batch in loader] == sizes


@pytest.mark.parametrize("shuffle", [True, False])
def test_more_processes_than_images_are_refused(shuffle):
    with pytest.raises(ValueError, match="every process needs an image; got 3 for 4: start fewer"):
        list(OrderedBatches(3, 8, shuffle=shuffle, rank=0, world=4))


def test_a_rest_of_single_images_is_refused():
    message = (
        "got 5 images one at a time for 2: take a batch_size of 2 or more, or a number of processes that divides 5"
    )
    with pytest.raises(ValueError, match=message):
        len(OrderedBatches(5, 1, shuffle=False, rank=1, world=2))
    assert len(OrderedBatches(5, 1, shuffle=True, rank=1, world=2)) == 2  # where the epoch is cut


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"count": 0, "batch_size": 8}, "at least one image"),
        ({"count": 5, "batch_size": 8, "rank": 2, "world": 2}, "got rank 2 of world 2"),
        ({"count": 5, "batch_size": 8, "rank": 0}, "both or neither given"),
    ],
)
def test_impossible_orders_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        OrderedBatches(shuffle=True, **arguments)


def test_batches_from_memory(tensor_set):
    batches = list(make_loader(tensor_set, batch_size=10, train=False))
    assert [len(batch["label"]) for batch in batches] == [10, 10, 3]
    assert torch.equal(torch.cat([batch["image"] for batch in batches]), tensor_set.images)
    assert [identity for batch in batches for identity in batch["id"]] == tensor_set.ids


def test_batches_are_brought_to_size(tensor_set):
    fit = eval_transform(TINY)
    batch = next(iter(make_loader(tensor_set, batch_size=4, train=False, transform=fit)))
    assert torch.equal(batch["image"], torch.stack([fit(tensor_set.image(n)) for n in range(4)]))


@pytest.mark.fault(39)
@pytest.mark.filterwarnings("ignore:This DataLoader will create 4 worker processes")
def test_workers_do_not_change_the_batches(make_folder):
    images = image_folder(make_folder("cat", "dog", count=8, size=(9, 7)), in_memory=False)
    crop = RandomResizedCrop(TINY, 0.2)
    seen = []
    for workers in (0, 1, 4):
        torch.manual_seed(workers)  # must not matter
        loader = make_loader(images, batch_size=5, train=True, transform=crop, seed=3, workers=workers)
        loader.batch_sampler.set_epoch(2)
        seen.append(list(loader))
    for other in seen[1:]:
        for one, two in zip(seen[0], other, strict=True):
            assert torch.equal(one["image"], two["image"])
            assert one["id"] == two["id"]
            assert torch.equal(one["label"], two["label"])


def test_each_epoch_and_image_has_its_own_crop(tensor_set):
    class Recorder:
        random = True

        def __init__(self):
            self.seen = {}

        def __call__(self, image):
            self.seen[int(image[0, 0, 0])] = float(torch.rand(()))
            return image

    def numbers(epoch, batch_size=23):
        recorder = Recorder()
        loader = make_loader(tensor_set, batch_size=batch_size, train=True, transform=recorder)
        loader.batch_sampler.set_epoch(epoch)
        list(loader)
        return recorder.seen

    assert numbers(0) == numbers(0, batch_size=4)
    assert len(set(numbers(0).values())) == 23
    assert not set(numbers(0).values()) & set(numbers(1).values())


class Boxed(ImageSet):
    """Four images of 8 x 6 with a box each, of one size or said to be of many."""

    def __init__(self, key="boxes", size=(8, 6)):
        self.labels, self.classes, self.ids, self.size, self.key = (
            torch.zeros(4).long(),
            ("a",),
            list("wxyz"),
            size,
            key,
        )

    def image(self, index):
        return torch.full((3, 8, 6), index, dtype=torch.uint8)

    def subset(self, indices):
        return self

    def __getitem__(self, index):
        boxes = torch.tensor([[0, 0, 2.0, 3]] * index).view(index, 4)
        value = boxes if self.key == "boxes" else torch.zeros(8, 6)
        return Sample(**{**super().__getitem__(index), self.key: value})


@pytest.mark.fault(22)
@pytest.mark.parametrize("key", ["boxes", "mask"])
@pytest.mark.parametrize("size", [(8, 6), None])
@pytest.mark.parametrize("transform", [RandomResizedCrop(TINY), eval_transform(TINY)])
def test_boxes_do_not_move_with_images_yet(key, size, transform):
    message = f"would cut or resize images but not their {key}: give images of the model's size"
    with pytest.raises(ValueError, match=message):
        list(make_loader(Boxed(key, size), batch_size=2, train=True, transform=transform))


def test_boxes_travel_with_images_that_stay():
    fit = eval_transform(Preprocess(img_size=(8, 6)))
    for transform in (None, fit):
        (batch,) = make_loader(Boxed(), batch_size=4, train=False, transform=transform)
        assert [len(boxes) for boxes in batch["boxes"]] == [0, 1, 2, 3]


def test_random_crops_leave_torchs_generator_alone(tensor_set):
    loader = make_loader(tensor_set, batch_size=8, train=True, transform=RandomResizedCrop(TINY))
    before = torch.get_rng_state()
    list(loader)
    assert torch.equal(torch.get_rng_state(), before)


def test_random_crops_leave_the_accelerators_generators_alone(tensor_set, monkeypatch):
    monkeypatch.setattr(torch.cuda, "manual_seed_all", lambda _: pytest.fail("the generators of all GPUs were seeded"))
    list(make_loader(tensor_set, batch_size=8, train=True, transform=RandomResizedCrop(TINY)))


@pytest.mark.filterwarnings("ignore:This DataLoader will create 24 worker processes")  # which is what torch says
def test_workers_far_above_the_machine_are_refused(tensor_set, monkeypatch):
    monkeypatch.setattr("os.cpu_count", lambda: 3)
    assert make_loader(tensor_set, batch_size=8, train=False, workers=24).num_workers == 24
    with pytest.raises(ValueError, match="--workers must be at most 24 on this machine of 3 cores; got 25"):
        make_loader(tensor_set, batch_size=8, train=False, workers=25)
    assert DataConfig(workers=1000).workers == 1000  # a recipe may have been written for another machine


def test_images_of_many_sizes_need_a_transform(make_folder):
    images = image_folder(make_folder("cat", "dog"), in_memory=False)
    with pytest.raises(ValueError, match="give transform=eval_transform"):
        make_loader(images, batch_size=2, train=False)


@pytest.mark.fault(18, 19, 38)
@pytest.mark.parametrize("workers", [0, 1])
def test_an_unreadable_image_is_named_even_by_a_worker(make_folder, workers):
    root = make_folder("cat", "dog")
    images = image_folder(root, in_memory=False)
    (root / "dog/001.png").write_bytes(b"no")
    loader = make_loader(images, batch_size=2, train=False, transform=eval_transform(TINY), workers=workers)
    with pytest.raises(ImageError, match=f"^{root / 'dog/001.png'}: not a readable image"):
        list(loader)


def test_public_loaders_small(make_folder):
    root = make_folder("train/cat", "train/dog", "test/cat", "test/dog", count=10)
    train, val = get_data_loaders(f"folder:{root}", batch_size=8, val_fraction=0.2)
    assert (len(train.dataset), len(val.dataset)) == (16, 4)
    batch = next(iter(train))
    assert batch["image"].shape == (8, 3, 8, 8)
    assert batch["image"].dtype == torch.uint8
    assert next(iter(get_data_loaders(f"folder:{root}", img_size=16)[1]))["image"].shape[-2:] == (16, 16)


def test_public_loaders_large(make_folder):
    root = make_folder("cat", "dog", count=10, size=(120, 100))
    splits = load_splits(DataConfig(data=f"folder:{root}"))
    preprocess = splits.preprocess(112)
    transform = train_transform(preprocess, AugmentConfig())
    loader = make_loader(splits.train, batch_size=4, train=True, transform=transform)
    assert next(iter(loader))["image"].shape == (4, 3, 112, 112)
    train, val = get_data_loaders(f"folder:{root}", img_size=112)
    assert next(iter(train))["image"].shape[1:] == next(iter(val))["image"].shape[1:] == (3, 112, 112)


def test_seeds_are_spread():
    seeds = [draw_seed(seed, epoch, row) for seed in range(4) for epoch in range(10) for row in range(100)]
    assert len(set(seeds)) == len(seeds)
    assert all(0 <= seed < 2**63 for seed in seeds)
    assert draw_seed(0, 1) == draw_seed(0, 1) != draw_seed(1, 0)


@pytest.mark.fault(39)
@pytest.mark.filterwarnings("ignore:This DataLoader will create 4 worker processes")
def test_workers_do_not_change_random_parts(photos):
    """Of pictures in which no two parts are alike."""
    images, crop, seen = image_folder(photos, in_memory=False), RandomResizedCrop(TINY, 0.2), []
    for workers in (0, 1, 4):
        torch.manual_seed(workers)  # must not matter
        seen.append(list(make_loader(images, batch_size=5, train=True, transform=crop, seed=3, workers=workers)))
    for other in seen[1:]:
        assert [batch["id"] for batch in seen[0]] == [batch["id"] for batch in other]
        assert all(torch.equal(one["image"], two["image"]) for one, two in zip(seen[0], other, strict=True))


def copies(order: OrderedBatches) -> list[tuple[int, int]]:
    return [(pick.row, pick.copy) for batch in order for pick in batch]


def test_repeats_are_one_after_another_and_an_epoch_stays_as_long():
    order = OrderedBatches(9, 4, shuffle=True, repeats=3)
    drawn = copies(order)
    assert len(drawn) == 9 and len(order) == 3
    assert [copy for _, copy in drawn] == [0, 1, 2] * 3
    assert all(len({row for row, _ in drawn[first : first + 3]}) == 1 for first in (0, 3, 6))
    assert len({row for row, _ in drawn}) == 3
    seen = {row for row, _ in drawn}
    for _ in range(20):
        seen |= {row for row, _ in copies(order)}
    assert seen == set(range(9)), "later epochs have the others"


def test_repeats_stand_side_by_side_in_several_processes():
    shards = [copies(OrderedBatches(12, 4, shuffle=True, repeats=3, rank=rank, world=3)) for rank in range(3)]
    for picks in zip(*shards, strict=True):
        assert len({row for row, _ in picks}) == 1
        assert [copy for _, copy in picks] == [0, 1, 2]


def test_each_copy_of_an_image_is_cut_in_its_own_way(photos):
    """And the first as it is without repeats."""
    splits = load_splits(DataConfig(data=f"folder:{photos}", val_fraction=0.34))
    cut = train_transform(TINY, AugmentConfig(crop="resized"))

    def drawn(repeats):
        loader = make_loader(splits.train, batch_size=2, train=True, transform=cut, seed=4, repeats=repeats)
        batches = list(loader)
        images = torch.cat([batch["image"] for batch in batches])
        return images, [name for batch in batches for name in batch["id"]]

    images, names = drawn(2)
    assert names[0] == names[1] and not torch.equal(images[0], images[1])
    plain, plain_names = drawn(1)
    assert torch.equal(images[0], plain[plain_names.index(names[0])])
    assert torch.equal(images, drawn(2)[0])


def test_repeats_are_for_training():
    for wrong in ({"shuffle": False, "repeats": 2}, {"shuffle": True, "repeats": 0}):
        with pytest.raises(ValueError, match="repeats must be at least 1, and 1 where images keep their order; got"):
            OrderedBatches(9, 4, **wrong)


def test_of_files_only_the_random_part_is_decoded(tmp_path, monkeypatch):
    """And it is the part that the crop takes of the whole picture under the same seed."""
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        Image.fromarray(torch.randint(256, (48, 64, 3), dtype=torch.uint8).numpy()).save(tmp_path / name / "0.jpg")
    files, crop = image_folder(tmp_path, in_memory=False), RandomResizedCrop(Preprocess(img_size=(32, 32)), 0.2)
    assert isinstance(files, FileSet)
    expected = {}
    for row in range(2):
        torch.manual_seed(Pick(0, row).seed(5))
        expected[files.ids[row]] = crop(files.image(row))
    monkeypatch.setattr(imagesets, "read_image", None)
    batch = next(iter(make_loader(files, batch_size=2, train=True, transform=crop, seed=5)))
    assert all(torch.equal(image, expected[name]) for image, name in zip(batch["image"], batch["id"], strict=True))
