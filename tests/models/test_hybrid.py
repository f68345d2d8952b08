"""What is a hybrid's own: standardised weights, TensorFlow's padding, what its map is cut into."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from vitrail.models.hybrid import HybridConfig, HybridViT, MaxPoolSame, StdConv2d, same_padding

TINY: dict[str, Any] = dict(
    img_size=32, stem_depths=(1,), stem_width=32, embed_dim=24, depth=1, num_heads=3, num_classes=3
)


@pytest.mark.parametrize(
    ("given", "words"),
    [
        (dict(stem_depths=(2, 0)), r"stem_depths must be at least 1; got \(2, 0\)"),
        (dict(stem_depths=(1,) * 7), "stem_depths must be a tuple of whole numbers, blocks of each of 0 to 6 stages"),
        (dict(stem_depths=3), r"stem_depths must be a tuple of whole numbers, .* such as \(3, 4, 9\); got 3"),
        (dict(stem_width=16), "stem_width must be at least 32; got 16"),
        (dict(stem_width=72), "stem_width must be divisible by 32, the groups of a norm; got 72: use 64 or 96"),
        (dict(embed_dim=0), "embed_dim must be at least 1; got 0"),
    ],
)
def test_a_value_out_of_range_is_named(given: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        HybridConfig(**given)


@pytest.mark.parametrize("size", [(1, 1), (2, 2), (4, 3)])
@pytest.mark.parametrize("batch", [1, 3])
@torch.no_grad()
def test_images_of_which_a_norm_would_leave_nothing(size: tuple[int, int], batch: int) -> None:
    x = torch.randn(batch, 3, *size)
    with pytest.raises(ValueError, match=r"more than one number a group; one cell of 32 .* use larger images, or a la"):
        HybridViT(**TINY).eval()(x)
    assert HybridViT(**TINY | dict(stem_width=64)).eval()(x).isfinite().all()


@pytest.mark.parametrize("pre_norm", [False, True])
def test_patches_that_are_normed_before_the_blocks_have_no_bias(pre_norm: bool) -> None:
    assert (HybridViT(**TINY, pre_norm=pre_norm).patch_embed.proj.bias is None) == pre_norm


@pytest.mark.parametrize("depths", [(), (1,), (1, 1), (1, 1, 1, 1)])
def test_the_stride_is_what_the_map_has(depths: tuple[int, ...]) -> None:
    model = HybridViT(**{**TINY, "stem_depths": depths})
    map_ = model.patch_embed.backbone(torch.zeros(1, 3, 64, 64))
    assert map_.shape[-1] * model.config.stem_stride == 64
    assert model.feature_info[0].reduction == model.config.stem_stride


@torch.no_grad()
def test_the_scale_and_mean_of_a_filter_change_nothing() -> None:
    """Qiao et al. 2019, eq. 2: filters are standardised, so only their direction counts."""
    conv = StdConv2d(4, 5, 3)
    x, before = torch.randn(2, 4, 9, 9), conv.weight.clone()
    expected = conv(x)
    assert not torch.allclose(expected, nn.functional.conv2d(x, before, padding=1), atol=1e-2)
    conv.weight.copy_(7 * before + torch.randn(5, 1, 1, 1))
    torch.testing.assert_close(conv(x), expected, rtol=1e-4, atol=1e-4)
    filters = (before - before.mean((1, 2, 3), keepdim=True)) / before.std((1, 2, 3), correction=0, keepdim=True)
    torch.testing.assert_close(expected, nn.functional.conv2d(x, filters, padding=1), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("size", [7, 8, 9, 16, 33])
@pytest.mark.parametrize(("kernel", "stride"), [(1, 2), (3, 1), (3, 2), (7, 2)])
@torch.no_grad()
def test_a_side_is_padded_as_tensorflow_pads_it(size: int, kernel: int, stride: int) -> None:
    """Where the padding is odd, the larger half is below and to the right."""
    total = same_padding(size, kernel, stride)
    above, below = total // 2, total - total // 2
    conv, x = StdConv2d(2, 3, kernel, stride).double(), torch.randn(1, 2, size, 8).double()
    right = same_padding(8, kernel, stride)
    filled = nn.functional.pad(x, (right // 2, right - right // 2, above, below))
    weight = nn.functional.layer_norm(conv.weight, conv.weight.shape[1:], eps=1e-8)
    found = conv(x)
    assert found.shape[-2] == -(-size // stride)
    torch.testing.assert_close(found, nn.functional.conv2d(filled, weight, stride=stride))


@pytest.mark.parametrize("size", [7, 8, 9, 32])
def test_pooling_is_padded_likewise(size: int) -> None:
    x, total = torch.rand(1, 2, size, size), same_padding(size, 3, 2)
    sides = (total // 2, total - total // 2) * 2
    expected = nn.functional.max_pool2d(nn.functional.pad(x, sides), 3, 2)  # nothing here is below zero
    assert torch.equal(MaxPoolSame()(x), expected)


@torch.no_grad()
def test_images_of_one_batch_do_not_know_each_other_in_training() -> None:
    model = HybridViT(**TINY).train()
    x = torch.randn(3, 3, 32, 32)
    assert torch.allclose(model(x)[:1], model(x[:1]), atol=1e-5)


@torch.no_grad()
def test_a_patch_that_is_partly_padding_does_not_see_it() -> None:
    model = HybridViT(**TINY).eval()
    x, mask = torch.randn(2, 3, 32, 32), torch.zeros(2, 32, 32, dtype=torch.bool)
    mask[:, 27:] = True
    other = x.masked_fill(mask[:, None], 9.0)
    assert torch.equal(model(x, mask), model(other, mask))
    assert model.embed(x, mask).padding.sum() == 2 * 8  # of 8 x 8 cells of 4 pixels, the last row


def test_every_block_of_the_cnn_is_in_the_first_group() -> None:
    model = HybridViT(**TINY)
    first = model.layer_groups()[0]
    assert {name for name, _ in model.named_parameters() if "backbone" in name} < set(first)
    assert model.pixel_weights() == ["patch_embed.backbone.stem.conv.weight"]
    assert HybridViT(**{**TINY, "stem_depths": ()}).pixel_weights() == ["patch_embed.backbone.conv.weight"]
