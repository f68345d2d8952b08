"""Boxes that mean nothing are named with their image; an image without any is no mistake."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from torch import Tensor

from vitrail.data.boxes import check_boxes
from vitrail.data.imagesets import Sample, collate

NAN, INF = float("nan"), float("inf")
SOUND = [[0.0, 0.0, 8.0, 6.0], [1.5, 2.0, 1.6, 2.1]]


def sample(boxes: Any, **more: Any) -> Sample:
    return Sample(image=torch.zeros(3, 6, 8, dtype=torch.uint8), boxes=torch.as_tensor(boxes), id="a/b.png", **more)


@pytest.mark.fault(32)
def test_images_with_and_without_boxes_share_a_batch() -> None:
    made = collate([sample(SOUND), sample(torch.zeros(0, 4))])
    assert [tuple(boxes.shape) for boxes in made["boxes"]] == [(2, 4), (0, 4)]


@pytest.mark.fault(32)
@pytest.mark.parametrize(
    "box",
    [
        [3.0, 1.0, 3.0, 2.0],  # no width
        [3.0, 2.0, 4.0, 2.0],  # no height
        [4.0, 1.0, 3.0, 2.0],
        [1.0, 3.0, 2.0, 2.0],
        [-0.1, 0.0, 2.0, 2.0],
        [0.0, 0.0, 8.1, 2.0],
        [0.0, 0.0, 2.0, 6.1],
        [NAN, 0.0, 2.0, 2.0],
        [0.0, 0.0, 2.0, NAN],
        [0.0, 0.0, INF, 2.0],
        [0.0, -INF, 2.0, 2.0],
    ],
)
def test_a_box_that_is_none_is_named_with_its_image(box: list[float]) -> None:
    said = re.escape(f"a/b.png: a box is x0, y0, x1, y1 with x0 < x1 and y0 < y1 inside 8 x 6 pixels; box 1 is {box}")
    with pytest.raises(ValueError, match=f"^{said}: mend it or leave it out$"):
        collate([sample(SOUND), sample([SOUND[0], box])])


@pytest.mark.fault(32)
def test_many_are_counted() -> None:
    with pytest.raises(ValueError, match=r"box 2 is \[0.0, 0.0, 0.0, 0.0\] and 4 more: mend"):
        collate([sample(torch.zeros(7, 4))])


@pytest.mark.fault(32)
@pytest.mark.parametrize("boxes", [torch.zeros(0), torch.zeros(4), torch.zeros(2, 5), torch.ones(1, 4).long()])
def test_another_shape_or_type_is_named(boxes: Tensor) -> None:
    with pytest.raises(ValueError, match=r"a/b.png: boxes must be floats \(n, 4\), and \(0, 4\) for .* got"):
        collate([sample(boxes)])


@pytest.mark.fault(32)
def test_each_box_has_one_class() -> None:
    collate([sample(SOUND, classes=torch.tensor([1, 0]))])
    with pytest.raises(ValueError, match=r"a/b.png: classes must be one a box, \(2,\); got \(3,\)"):
        collate([sample(SOUND, classes=torch.zeros(3))])


def test_the_shipped_boxes_are_sound() -> None:
    from vitrail.data.bloodcells import bloodcells_boxes

    for photo in bloodcells_boxes("test"):
        check_boxes(photo.boxes, photo.labels, (240, 320), "photograph")
