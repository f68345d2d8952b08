"""What is a ConvNeXt's own: its ranges, its block, what its scales begin with."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from vitrail.models.convnext import Block, ConvNeXt, ConvNeXtConfig

TINY: dict[str, Any] = dict(img_size=32, patch_size=2, embed_dim=8, depths=(1, 2), num_classes=3)


@pytest.mark.parametrize(
    ("given", "words"),
    [
        (
            dict(depths=()),
            r"depths must be a tuple of whole numbers, one for each of 1 to 8 stages, such as .*got \(\)",
        ),
        (dict(depths=2), "depths must be a tuple of whole numbers, one for each of 1 to 8 stages, such as .*got 2"),
        (dict(depths=(2, 0)), r"depths must be at least 1; got \(2, 0\)"),
        (dict(img_size=(31, 64)), r"img_size must be at least 32; got \(31, 64\)"),
        (dict(patch_size=0), "patch_size must be at least 1; got 0"),
        (dict(drop_path_rate=1.0), r"drop_path_rate must lie in \[0, 1\)"),
    ],
)
def test_a_value_out_of_range_is_named(given: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        ConvNeXtConfig(**given)


@torch.no_grad()
def test_an_image_is_large_enough_for_one_cell_in_the_last_stage() -> None:
    model = ConvNeXt(**TINY).eval()
    assert model(torch.zeros(1, 3, 4, 5)).shape == (1, 3)
    with pytest.raises(ValueError, match="images must be at least 4 pixels a side.*; got 3 x 9: use larger images"):
        model(torch.zeros(1, 3, 3, 9))


@torch.no_grad()
def test_a_block_is_its_input_where_its_scale_is_zero() -> None:
    block = Block(8, init_values=0.0, drop_path=0.0)
    assert torch.equal(block(x := torch.randn(2, 8, 5, 7)), x)


def test_scales_begin_as_asked_and_branches_drop_out_more_and_more() -> None:
    model = ConvNeXt(**TINY, init_values=0.25, drop_path_rate=0.2)
    blocks = [block for stage in model.stages for block in stage.blocks]
    assert all((block.gamma == 0.25).all() for block in blocks)
    assert [getattr(block.drop_path, "drop_prob", 0.0) for block in blocks] == [0.0, 0.1, 0.2]


@torch.no_grad()
def test_padded_pixels_are_not_pooled() -> None:
    model = ConvNeXt(**TINY).eval()
    x, mask = torch.randn(2, 3, 32, 32), torch.zeros(2, 32, 32, dtype=torch.bool)
    mask[:, 20:] = True
    cut = x.masked_fill(mask[:, None], 0)
    last = model.forward_features(cut).map  # 8 rows of 4 pixels, 5 of them seen
    pooled = model.neck(last[:, :, :5].mean(dim=(2, 3)))
    assert torch.allclose(model(x, mask), model.head.fc(pooled), atol=1e-6)
