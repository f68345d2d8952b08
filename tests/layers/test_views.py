"""An image at another size: which size, what is seen there, and which patches are padding."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from vitrail.layers.views import ScaledPatchEmbed, middle, strided_stem, view_size


@pytest.mark.parametrize(
    ("image", "scale", "patch", "size"),
    [
        ((240, 240), 224 / 240, 16, (224, 224)),
        ((408, 408), 384 / 408, 16, (384, 384)),
        ((360, 480), 224 / 240, 16, (336, 448)),
        ((225, 317), 1.0, 16, (225, 317)),  # the image itself, whether it divides or not
        ((96, 96), 224 / 240, 16, (96, 96)),  # 89.6 is 5.6 patches
        ((8, 112), 0.5, 16, (16, 64)),  # never fewer than one patch; 3.5 patches are 4
    ],
)
def test_a_view_is_whole_patches(image: tuple[int, int], scale: float, patch: int, size: tuple[int, int]) -> None:
    assert view_size(image, scale, patch) == size


def test_the_middle_is_the_middle() -> None:
    x = torch.arange(7.0).expand(1, 5, 7)
    assert middle(x, (3, 3)).tolist() == [[[2, 3, 4]] * 3]
    assert middle(x.transpose(1, 2), (3, 3))[0, :, 0].tolist() == [2, 3, 4]


def embed(**options: object) -> ScaledPatchEmbed:
    return ScaledPatchEmbed(16, 4, 3, 8, **{"scale": 0.75, **options})


def test_the_view_is_resized_or_cut() -> None:
    x = torch.randn(2, 3, 16, 16)
    assert torch.equal(embed().view(x), F.interpolate(x, size=(12, 12), mode="bicubic"))
    assert torch.equal(embed(crop=True).view(x), x[..., 2:14, 2:14])
    assert embed(scale=1.0).view(x) is x
    assert embed(scale=1.5, crop=True).view(x).shape[-2:] == (24, 24)  # nothing to cut from
    assert embed(fixed=True).view(torch.randn(2, 3, 50, 20)).shape[-2:] == (12, 12)
    assert embed()(x).shape == (2, 9, 8)


def test_a_patch_is_padding_where_all_its_pixels_are() -> None:
    mask = torch.zeros(1, 16, 16, dtype=torch.bool)
    mask[..., 10:] = True  # 10 of 16 columns are 7.5 of 12: two patches of three hold some
    assert embed().padding(mask).view(3, 3).tolist() == [[False, False, True]] * 3
    mask[..., 5:] = True  # 5 of 16 are 3.75 of 12: one patch
    assert embed().padding(mask).view(3, 3).tolist() == [[False, True, True]] * 3
    assert embed(crop=True).padding(mask).view(3, 3).tolist() == [[False, True, True]] * 3
    assert embed(scale=1.0).padding(mask).view(4, 4).tolist() == [[False, False, True, True]] * 4


def test_a_cut_view_has_the_padding_of_its_own_pixels() -> None:
    mask = torch.zeros(1, 16, 16, dtype=torch.bool)
    mask[..., :10] = True  # columns 2 to 13 are seen; resized, the second patch would hold a part of column 10
    assert embed(crop=True).padding(mask).view(3, 3).tolist() == [[True, True, False]] * 3
    assert embed().padding(mask).view(3, 3).tolist() == [[True, False, False]] * 3


@pytest.mark.parametrize("patch", [12, 16])
@pytest.mark.parametrize("cells", [1, 3])
def test_three_convolutions_cut_what_one_would(patch: int, cells: int) -> None:
    assert strided_stem(3, 8, patch)(torch.zeros(1, 3, patch * cells, patch)).shape == (1, 8, cells, 1)


@pytest.mark.parametrize(("patch", "width"), [(8, 8), (12, 3)])
def test_other_patches_are_refused(patch: int, width: int) -> None:
    with pytest.raises(
        ValueError, match=rf"multi_conv cuts patches of 12 or 16.*patch_size {patch} and embed_dim {width}"
    ):
        strided_stem(3, width, patch)


def test_other_channels_are_named_by_the_image_that_was_given() -> None:
    with pytest.raises(ValueError, match=r"images must be \(B, 3, H, W\); got shape \(1, 4, 16, 16\)"):
        embed()(torch.zeros(1, 4, 16, 16))
