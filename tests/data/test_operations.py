"""Every operation against torchvision's on single images; each image of a batch with a level of its own."""

from __future__ import annotations

import math

import pytest
import torch
from torchvision.transforms import InterpolationMode
from torchvision.transforms.v2 import functional as oracle

from vitrail.data.operations import COLOURS, NAMES, SHAPES, sharpness, warp

LEVELS = torch.tensor([-0.9, -0.3, 0.0, 0.5, 0.9])


def pictures(count: int = 5, side: int = 16) -> torch.Tensor:
    """uint8 (count, 3, side, side + 4): noise of many contrasts, the last one constant in a channel."""
    images = torch.rand(count, 3, side, side + 4) * torch.linspace(0.2, 1, count).view(-1, 1, 1, 1) * 255
    images[-1, 0] = 99
    return images.round().to(torch.uint8)


def by_image(images, levels, function):
    return torch.stack([function(image, float(level)) for image, level in zip(images, levels, strict=True)])


@pytest.mark.parametrize(
    ("name", "function"),
    [
        ("brightness", lambda image, level: oracle.adjust_brightness(image, 1 + level)),
        ("contrast", lambda image, level: oracle.adjust_contrast(image, 1 + level)),
        ("colour", lambda image, level: oracle.adjust_saturation(image, 1 + level)),
        ("sharpness", lambda image, level: oracle.adjust_sharpness(image, 1 + level)),
        ("autocontrast", lambda image, level: oracle.autocontrast(image)),
        ("invert", lambda image, level: oracle.invert(image)),
    ],
)
def test_colours_in_floats(name, function):
    images = pictures().float() / 255
    torch.testing.assert_close(COLOURS[name](images, LEVELS), by_image(images, LEVELS, function), atol=2e-5, rtol=0)


@pytest.mark.parametrize(
    ("name", "levels", "function"),
    [
        ("posterize", [8, 4, 2, 5, 1], lambda image, level: oracle.posterize(image, int(level))),
        ("solarize", [1, 0, 0.5, 0.25, 0.75], lambda image, level: oracle.solarize(image, level * 255)),
        ("equalize", [0] * 5, lambda image, level: oracle.equalize(image)),
    ],
)
def test_colours_in_whole_numbers(name, levels, function):
    images = pictures()
    got = (COLOURS[name](images.float() / 255, torch.tensor(levels).float()) * 255).round().to(torch.uint8)
    assert torch.equal(got, by_image(images, levels, function))


def test_equalize_leaves_an_image_of_one_value():
    flat = torch.full((1, 3, 4, 4), 100 / 255)
    torch.testing.assert_close(COLOURS["equalize"](flat, torch.zeros(1)), flat)


def affine(angle=0.0, shift=(0, 0), shear=(0.0, 0.0), corner=True):
    centre = [0, 0] if corner else None
    return lambda image: oracle.affine(
        image, angle, list(shift), 1.0, list(shear), interpolation=InterpolationMode.BILINEAR, center=centre
    )


@pytest.mark.parametrize(
    ("name", "level", "function"),
    [
        ("shear_x", 0.3, affine(shear=(math.degrees(math.atan(0.3)), 0.0))),
        ("shear_x", -0.99, affine(shear=(math.degrees(math.atan(-0.99)), 0.0))),
        ("shear_y", 0.3, affine(shear=(0.0, math.degrees(math.atan(0.3))))),
        ("translate_x", 3.7, affine(shift=(3, 0))),
        ("translate_x", -3.7, affine(shift=(-3, 0))),
        ("translate_y", 5.0, affine(shift=(0, 5))),
        ("rotate", 25.0, affine(angle=-25.0, corner=False)),
        ("rotate", -135.0, affine(angle=135.0, corner=False)),
        ("rotate", 40.0, lambda image: oracle.rotate(image, 40.0, interpolation=InterpolationMode.BILINEAR)),
    ],
)
def test_shapes(name, level, function):
    image = pictures()[:1].float() / 255
    matrix = SHAPES[name](torch.tensor([level]), *image.shape[-2:])
    torch.testing.assert_close(warp(image, matrix, torch.zeros(3)), function(image), atol=2e-5, rtol=0)


def test_the_outside_is_filled():
    image = torch.rand(1, 3, 8, 8)
    fill = torch.tensor([0.1, 0.2, 0.3])
    moved = warp(image, SHAPES["translate_x"](torch.tensor([3.0]), 8, 8), fill)
    torch.testing.assert_close(moved[0, :, :, :3], fill.view(3, 1, 1).expand(3, 8, 3))
    torch.testing.assert_close(moved[..., 3:], image[..., :-3])


def test_composed_matrices_are_one_after_the_other():
    """Whole-pixel moves and quarter turns lose nothing, so two resamplings must equal one."""
    image, zero = torch.rand(1, 3, 8, 8), torch.zeros(3)
    first, second = (
        SHAPES["translate_x"](torch.tensor([2.0]), 8, 8),
        SHAPES["rotate"](torch.tensor([90.0]), 8, 8),
    )
    torch.testing.assert_close(warp(image, first @ second, zero), warp(warp(image, first, zero), second, zero))
    assert not torch.allclose(warp(image, second @ first, zero), warp(image, first @ second, zero))


def test_names_are_unique():
    assert len(set(NAMES)) == len(NAMES) == 1 + len(SHAPES) + len(COLOURS)


@pytest.mark.parametrize("size", [(1, 9), (9, 2), (2, 2)])
def test_what_is_too_small_to_smooth_stays(size):
    images = torch.rand(2, 3, *size)
    assert sharpness(images, torch.tensor([-1.0, 0.9])) is images
