"""The size of training images: growing, drawn for each batch, and refused where no whole cells fit."""

from collections import Counter

import pytest
import torch

from vitrail.data.augment import AugmentConfig, BatchAugment
from vitrail.data.sizes import SizeConfig, Sizes, resized
from vitrail.records import Batch, Preprocess

TOTAL = 400
STILL = {"flip": 0.0, "crop": "none"}


def sides(config: SizeConfig, full=(32, 32), cell=4, total=TOTAL):
    sizes = Sizes(config, full, cell)
    return [sizes(number, total) for number in range(total)]


def test_images_grow_in_whole_cells_and_each_size_has_equal_time():
    found = [height for height, width in sides(SizeConfig(grow_from=16, grow_until=0.8)) if height == width]
    assert found == sorted(found)
    assert set(found) == {16, 20, 24, 28, 32}
    assert all(79 <= times <= 81 for times in Counter(found).values()), "a batch more or less, by rounding"


def test_the_last_batch_has_the_full_size_even_where_images_grow_until_then():
    assert sides(SizeConfig(grow_from=28, grow_until=1.0))[-1] == (28, 28), "its share of the run is not over yet"
    assert sides(SizeConfig(grow_from=28, grow_until=0.99))[-1] == (32, 32)


def test_a_picture_that_is_not_square_keeps_its_shape_as_far_as_cells_allow():
    found = sides(SizeConfig(grow_from=16, grow_until=1.0), full=(32, 64), total=4)
    assert found == [(16, 32), (20, 40), (24, 48), (28, 56)]


def test_a_size_for_each_batch_is_drawn_from_the_range():
    torch.manual_seed(0)
    found = Counter(height for height, _ in sides(SizeConfig(multi_scale=0.25)))
    assert set(found) == {24, 28, 32, 36, 40}
    assert min(found[28], found[32], found[36]) > 75 > max(found[24], found[40]) > 25, "the ends are half as wide"


def test_what_is_drawn_follows_the_seed():
    def drawn(seed):
        torch.manual_seed(seed)
        return sides(SizeConfig(multi_scale=0.25, grow_from=16))

    assert drawn(1) == drawn(1) != drawn(2)


def test_the_plan_says_from_which_epoch_on():
    plan = Sizes(SizeConfig(grow_from=16, grow_until=0.8), (32, 32), 8).plan(10, 3)
    assert plan == "16 pixels from epoch 1 on, 24 pixels from epoch 5 on, 32 pixels from epoch 9 on"
    assert Sizes(SizeConfig(multi_scale=0.25), (32, 32), 4).plan(10, 3) == ""


@pytest.mark.parametrize(
    ("epochs", "batches", "within", "grown"),
    [(1, 4, ", 32 pixels within epoch 1", True), (1, 3, ", 24 pixels within epoch 1", False), (1, 1, "", False)],
)
def test_the_plan_of_a_short_run_says_what_its_last_epoch_comes_to(epochs, batches, within, grown):
    sizes = Sizes(SizeConfig(grow_from=16), (32, 32), 8)
    assert sizes.plan(epochs, batches) == f"16 pixels from epoch 1 on{within}"
    total = epochs * batches
    assert sizes.grows_up(total) == grown == (sizes(total - 1, total) == (32, 32))


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"grow_from": 18}, "--grow-from must be a multiple of 4, the model's cell, below 32, its size; got 18"),
        ({"grow_from": 32}, "--grow-from must be a multiple of 4, the model's cell, below 32, its size; got 32"),
        ({"multi_scale": 0.1}, r"--multi-scale must be at least 0.125, one cell of 4 pixels in 32; got 0.1"),
    ],
)
def test_what_leaves_no_whole_cells_is_refused(settings, words):
    with pytest.raises(ValueError, match=words):
        Sizes(SizeConfig(**settings), (32, 32), 4)


def test_a_model_whose_size_is_no_multiple_of_its_cell_keeps_it():
    with pytest.raises(ValueError, match="--img-size must be a multiple of 32, the model's cell, where sizes change; "):
        Sizes(SizeConfig(multi_scale=0.5), (48, 64), 32)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"grow_from": 0}, "--grow-from must be at least 1, or none; got 0"),
        ({"grow_until": 0.0}, r"--grow-until must lie in \(0, 1\]; got 0.0"),
        ({"multi_scale": 1.0}, r"--multi-scale must lie in \[0, 1\); got 1.0"),
    ],
)
def test_settings_out_of_range(settings, words):
    with pytest.raises(ValueError, match=words):
        SizeConfig(**settings)


def test_images_are_resized_after_they_are_varied_and_before_they_are_normalised():
    preprocess = Preprocess(img_size=(32, 32), mean=(0.5,) * 3, std=(0.25,) * 3)
    raw = torch.randint(256, (4, 3, 32, 32), dtype=torch.uint8)
    sizes = Sizes(SizeConfig(grow_from=16), (32, 32), 4)
    augment = BatchAugment(AugmentConfig(**STILL), preprocess, 4, sizes)
    label = torch.arange(4)
    small, full = (augment(Batch(image=raw, label=label), number, 100)["image"] for number in (0, 99))
    assert small.shape == (4, 3, 16, 16)
    torch.testing.assert_close(small, preprocess.normalise(resized(raw.float() / 255, (16, 16), "bicubic")))
    assert torch.equal(full, preprocess.normalise(raw))


def test_bicubic_stays_within_an_image_s_values_and_frames_are_resized_alike():
    edge = torch.zeros(2, 3, 1, 8, 8)
    edge[..., 4:] = 1
    done = resized(edge, (20, 20), "bicubic")
    assert done.shape == (2, 3, 1, 20, 20)
    assert done.min() == 0 and done.max() == 1


def test_what_belongs_to_places_is_not_left_behind():
    preprocess = Preprocess(img_size=(32, 32))
    augment = BatchAugment(AugmentConfig(**STILL), preprocess, 4, Sizes(SizeConfig(grow_from=16), (32, 32), 4))
    batch = Batch(image=torch.zeros(1, 3, 32, 32, dtype=torch.uint8), mask=torch.zeros(1, 32, 32))
    with pytest.raises(ValueError, match="--grow-from and --multi-scale would move images but not their mask"):
        augment(batch)
