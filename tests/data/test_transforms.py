"""The cut for evaluation and the random one, against torchvision's."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st
from PIL import Image
from torchvision.transforms import InterpolationMode, v2

from vitrail.data import transforms
from vitrail.data.augment import AugmentConfig
from vitrail.data.transforms import RandomResizedCrop, eval_transform, resize, train_transform
from vitrail.records import Preprocess


def picture(height: int, width: int) -> torch.Tensor:
    return torch.randint(256, (3, height, width), dtype=torch.uint8)


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
@pytest.mark.parametrize("size", [(20, 31), (200, 90)])
def test_resizing_is_torchvisions(interpolation, size):
    image = picture(60, 45)
    expected = v2.functional.resize(image, list(size), InterpolationMode(interpolation), antialias=True)
    assert torch.equal(resize(image, size, interpolation), expected)


@pytest.mark.parametrize("long", range(64, 104))
@pytest.mark.parametrize("upright", [False, True])
def test_evaluation_is_resize_and_centre_crop(long, upright):
    """Whatever remains beside the cut: odd and even, of both halves."""
    image = picture(long, 64) if upright else picture(64, long)
    preprocess = Preprocess(img_size=(56, 56), crop_pct=0.875)
    theirs = v2.Compose([v2.Resize(64, InterpolationMode.BICUBIC, antialias=True), v2.CenterCrop(56)])
    assert torch.equal(eval_transform(preprocess)(image), theirs(image))


def test_a_clip_is_cut_at_one_place():
    clip = picture(60, 80)[None].expand(4, -1, -1, -1)
    for transform in (RandomResizedCrop(Preprocess(img_size=(24, 24))), eval_transform(Preprocess(img_size=(24, 24)))):
        done = transform(clip)
        assert done.shape == (4, 3, 24, 24)
        assert torch.equal(done, done[:1].expand_as(done))


@pytest.mark.fault(26)
def test_one_pixel_wide():
    """torch's kernel for uint8 is wrong there."""
    image = picture(9, 5)
    expected = torch.nn.functional.interpolate(image[None].float(), (7, 1), mode="bilinear", antialias=True)[0]
    assert torch.equal(resize(image, (7, 1), "bilinear"), expected.round().to(torch.uint8))


def test_squash_keeps_the_whole_picture():
    image = picture(40, 90)
    squash = Preprocess(img_size=(32, 48), crop_mode="squash")
    assert torch.equal(eval_transform(squash)(image), resize(image, (32, 48)))


@pytest.mark.parametrize("large", range(33, 44))
def test_a_squashed_picture_may_be_cut_too(large):
    """As timm's, and transformers' DeiT."""
    image = picture(40, 90)
    squash = Preprocess(img_size=(32, 32), crop_mode="squash", crop_pct=math.nextafter(32 / large, 0))
    theirs = v2.Compose([v2.Resize((large, large), InterpolationMode.BICUBIC, antialias=True), v2.CenterCrop(32)])
    assert torch.equal(eval_transform(squash)(image), theirs(image))


@pytest.mark.fault(26)
@settings(max_examples=60, deadline=None)
@given(
    height=st.integers(1, 120), width=st.integers(1, 120), target=st.tuples(st.integers(1, 60), st.integers(1, 60)),
    crop_pct=st.sampled_from([0.5, 0.875, 0.9, 1.0]),
)  # fmt: skip
def test_any_picture_gets_the_size(height, width, target, crop_pct):
    done = eval_transform(Preprocess(img_size=target, crop_pct=crop_pct))(picture(height, width))
    assert done.shape == (3, *target)
    assert done.dtype == torch.uint8


def test_pillow_and_tensor_agree_and_batches_too():
    pixels = np.random.default_rng(0).integers(0, 256, (50, 70, 3), dtype=np.uint8)
    image = torch.from_numpy(pixels).permute(2, 0, 1)
    fit = eval_transform(Preprocess(img_size=(24, 24), crop_pct=0.9))
    assert torch.equal(fit(Image.fromarray(pixels)), fit(image))
    assert torch.equal(fit(torch.stack([image, image.flip(2)]))[1], fit(image.flip(2)))


def test_a_picture_of_the_right_size_is_not_touched():
    image = picture(32, 32)
    assert eval_transform(Preprocess(img_size=(32, 32)))(image) is image


@settings(max_examples=80, deadline=None)
@given(height=st.integers(1, 300), width=st.integers(1, 300), seed=st.integers(0, 999))
def test_random_parts_lie_inside(height, width, seed):
    torch.manual_seed(seed)
    top, left, h, w = RandomResizedCrop(Preprocess(), 0.08).box(height, width)
    assert 0 <= top <= top + h <= height
    assert 0 <= left <= left + w <= width
    assert min(h, w) >= 1


def test_random_parts_have_the_stated_area_and_shape():
    crop = RandomResizedCrop(Preprocess(), 0.3)
    boxes = [crop.box(400, 500) for _ in range(300)]
    areas = torch.tensor([h * w / 200_000 for _, _, h, w in boxes])
    shapes = torch.tensor([w / h for _, _, h, w in boxes])
    assert 0.29 < areas.min() < 0.35
    assert 0.8 < areas.max() <= 1
    assert 0.74 < shapes.min() < 0.85
    assert 1.2 < shapes.max() < 1.35


def test_the_fallback_is_torchvisions():
    """A strip in which nothing of the wanted area fits."""
    crop, theirs = RandomResizedCrop(Preprocess(), 1.0), v2.RandomResizedCrop(224, scale=(1.0, 1.0))
    for size in ((10, 300), (300, 10)):
        image = torch.zeros(3, *size)
        expected = theirs.make_params([image])
        assert crop.box(*size) == tuple(expected[key] for key in ("top", "left", "height", "width"))


def test_a_random_part_is_resized():
    image = picture(60, 80)
    crop = RandomResizedCrop(Preprocess(img_size=(24, 24)), 0.2)
    torch.manual_seed(3)
    top, left, h, w = crop.box(60, 80)
    torch.manual_seed(3)
    assert torch.equal(crop(image), resize(image[:, top : top + h, left : left + w], (24, 24)))


def test_training_follows_the_crop():
    small, large = Preprocess(img_size=(32, 32)), Preprocess(img_size=(224, 224))
    assert not train_transform(small, AugmentConfig()).random
    assert train_transform(large, AugmentConfig()).random
    assert train_transform(small, AugmentConfig(crop="resized", crop_scale=0.5)) == RandomResizedCrop(small, 0.5)
    assert train_transform(large, AugmentConfig(crop="none")) == eval_transform(large)


@pytest.mark.fault(26)
@pytest.mark.parametrize("shape", [(1, 5000), (5000, 1), (3, 3000), (2, 100_000)])
def test_a_strip_is_not_enlarged_whole(shape, monkeypatch):
    """Its middle is what it would be; the rest is never made large."""
    made = []
    monkeypatch.setattr(
        transforms, "resize", lambda pixels, size, kind: made.append(size) or resize(pixels, size, kind)
    )
    ramp = torch.linspace(0, 255, max(shape)).round().to(torch.uint8)
    pixels = ramp.view(1, *((1, -1) if shape[0] < shape[1] else (-1, 1))).expand(3, *shape).contiguous()
    cut = transforms.eval_transform(Preprocess(img_size=(16, 16), crop_pct=0.875))(pixels)
    assert cut.shape == (3, 16, 16)
    assert max(made[0]) < 16 * 16 * 2
    assert (cut.int() - 128).abs().max() <= 2


@pytest.mark.fault(26)
@pytest.mark.parametrize(("own", "target"), [(49, 1), (98, 2), (47, 3), (55, 224), (71, 224)])
def test_rounding_never_makes_a_picture_too_small(own, target):
    """own * (target / own) < target in floating point."""
    for height, width in ((own, own), (own, 2 * own), (2 * own, own)):
        done = eval_transform(Preprocess(img_size=(target, target), crop_pct=1.0))(picture(height, width))
        assert done.shape == (3, target, target)
