"""What is a ResNet's own: its ranges, and padded pixels."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from vitrail.models.cnn import ResNet, ResNetConfig


@pytest.mark.parametrize(
    ("given", "words"),
    [
        (
            dict(depths=()),
            r"depths must be a tuple of whole numbers, one for each of 1 to 8 stages, such as .*got \(\)",
        ),
        (dict(depths=3), "depths must be a tuple of whole numbers, one for each of 1 to 8 stages, such as .*got 3"),
        (dict(depths=(1,) * 9), "depths must be a tuple of whole numbers, one for each of 1 to 8 stages"),
        (dict(depths=(2, 0)), r"depths must be at least 1; got \(2, 0\)"),
        (dict(embed_dim=0), "embed_dim must be at least 1; got 0"),
        (dict(drop_rate=1.0), r"drop_rate must lie in \[0, 1\)"),
        (dict(stem="smal"), "did you mean small"),
        (dict(block="botleneck"), "block must be one of basic, bottleneck; got 'botleneck': did you mean bottleneck"),
    ],
)
def test_a_value_out_of_range_is_named(given: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        ResNetConfig(**given)


@torch.no_grad()
def test_padded_pixels_count_as_zeros_and_are_not_pooled() -> None:
    model = ResNet(embed_dim=8, stem="small", img_size=32, num_classes=3).eval()
    x, mask = torch.randn(2, 3, 32, 32), torch.zeros(2, 32, 32, dtype=torch.bool)
    mask[:, 20:] = True
    cut = x.clone()
    cut[:, :, 20:] = 0
    last = model.forward_features(cut).map
    seen = last[:, :, :3]  # rows of 8 pixels: the third holds four that are no padding
    assert torch.allclose(model(x, mask), model.fc(seen.mean(dim=(2, 3))), atol=1e-6)
    assert torch.allclose(model(cut), model.fc(last.mean(dim=(2, 3))), atol=1e-6)
    assert torch.equal(model.features(x, mask=mask).maps[0], model.features(cut).maps[0])


def test_a_mask_of_another_size_is_named() -> None:
    model = ResNet(embed_dim=8, stem="small", img_size=32, num_classes=3).eval()
    with pytest.raises(ValueError, match=r"mask must be \(B, H, W\) like the images, \(2, 32, 32\); got \(2, 16, 16\)"):
        model(torch.zeros(2, 3, 32, 32), torch.zeros(2, 16, 16, dtype=torch.bool))


def test_a_step_back_at_48_pixels_is_survived() -> None:
    """A process would end here, with torch 2.15 on a CPU, if images were laid out channels last."""
    model = ResNet(img_size=48, embed_dim=8, stem="small", num_classes=10).train()
    for batch in (1, 2, 3, 4):
        model(torch.randn(batch, 3, 48, 48)).square().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
