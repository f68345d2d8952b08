"""Parameters of every ViT row, to the unit."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from vitrail.layers.embed import pair
from vitrail.models.vit import VisionTransformer
from vitrail.models.vit_config import VARIANTS, ViTConfig

TV = "torchvision 0.29, `num_params` of the weights"
TIMM = "timm 1.0.31, its model of this name with 1000 classes"
HAND = "counted by hand, see `formula`"
# fmt: off
PUBLISHED = {
    "vit_debug":                    (     95_530, HAND),
    "vit_tiny_patch16_224":         (  5_717_416, TIMM),
    "vit_tiny_patch16_384":         (  5_790_376, TIMM),
    "vit_small_patch16_224":        ( 22_050_664, TIMM),
    "vit_small_patch32_224":        ( 22_878_952, TIMM),
    "vit_small_patch16_384":        ( 22_196_584, TIMM),
    "vit_small_patch32_384":        ( 22_915_432, TIMM),
    "vit_small_depth6_patch16_224": ( 11_403_880, HAND),
    "vit_base_patch16_224":         ( 86_567_656, TV),
    "vit_base_patch32_224":         ( 88_224_232, TV),
    "vit_base_patch16_384":         ( 86_859_496, TIMM),
    "vit_base_patch32_384":         ( 88_297_192, TIMM),
    "vit_large_patch16_224":        (304_326_632, TV),
    "vit_large_patch32_224":        (306_535_400, TV),
    "vit_large_patch16_384":        (304_715_752, TIMM),
    "vit_large_patch32_384":        (306_632_680, TIMM),
    "vit_huge_patch14_224":         (632_045_800, TV),
    "vit_tiny_patch4_32":           (  2_693_578, HAND),
    "vit_tiny_mlp1_patch4_32":      (  1_363_018, HAND),
    "vit_small_patch4_32":          (  5_560_842, HAND),
    "vit_base_patch4_32":           ( 25_284_106, HAND),
    "vit_nano_patch8_64":           (  1_224_330, HAND),
}
# fmt: on
OTHER_CLASSES = [
    ("vit_small_depth6_patch16_224", 10, 11_022_730),
    ("vit_small_patch16_224", 10, 21_669_514),
    ("vit_large_patch32_224", 0, 305_510_400),
    ("vit_huge_patch14_224", 0, 630_764_800),
]
"""row, classes, parameters: timm 1.0.31 without a head, and with ten classes"""


def count(config: ViTConfig) -> int:
    with torch.device("meta"):
        return sum(p.numel() for p in VisionTransformer(config).parameters())


def formula(c: ViTConfig) -> int:
    """Dosovitskiy et al. 2021, eq. 1 to 4, term by term."""
    width, hidden, patch = c.embed_dim, int(c.embed_dim * c.mlp_ratio), pair(c.patch_size)
    tokens = (pair(c.img_size)[0] // patch[0]) * (pair(c.img_size)[1] // patch[1])
    stem = (c.in_chans * patch[0] * patch[1] + 1) * width + width + (tokens + 1) * width  # patches, class, positions
    attention = (width + 1) * 3 * width + (width + 1) * width
    mlp = (width + 1) * hidden + (hidden + 1) * width
    return stem + c.depth * (attention + mlp + 4 * width) + 2 * width + (width + 1) * c.num_classes


def test_every_row_has_its_count() -> None:
    assert list(PUBLISHED) == list(VARIANTS)


@pytest.mark.parametrize("row", PUBLISHED)
def test_a_row_has_the_published_count(row: str) -> None:
    expected, source = PUBLISHED[row]
    assert count(VARIANTS[row]) == expected, source
    assert formula(VARIANTS[row]) == expected


@pytest.mark.parametrize(("row", "classes", "expected"), OTHER_CLASSES)
def test_with_other_classes(row: str, classes: int, expected: int) -> None:
    assert count(replace(VARIANTS[row], num_classes=classes)) == expected
