"""Our ResNets against torchvision's: the same keys, the same logits and maps, the same gradients."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import nn
from torchvision import models

from vitrail.models.cnn import VARIANTS, ResNet

PEERS: dict[str, Callable[..., nn.Module]] = {"resnet18_224": models.resnet18, "resnet50_224": models.resnet50}
SIZES = [(96, 64), (75, 101)]


def twins(row: str) -> tuple[ResNet, nn.Module]:
    theirs = PEERS[row](weights=None).eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, value in theirs.state_dict().items():
            if name.endswith("running_var") or (value.ndim == 1 and name.endswith("weight")):
                value.copy_(torch.rand(value.shape, generator=generator) + 0.5)
            elif value.is_floating_point():
                value.copy_(torch.randn(value.shape, generator=generator) * 0.05)
    ours = ResNet(VARIANTS[row]).eval()
    ours.load_state_dict(theirs.state_dict(), strict=True)
    return ours, theirs


def close(ours: torch.Tensor, theirs: torch.Tensor) -> None:
    """1e-5 of the largest value, in fp32."""
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5 * max(1.0, theirs.abs().max().item()))


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("row", PEERS)
@torch.no_grad()
def test_logits_and_every_map_equal_torchvision(row: str, size: tuple[int, int]) -> None:
    ours, theirs = twins(row)
    x, maps = torch.randn(2, 3, *size), []
    for i in range(4):
        theirs.get_submodule(f"layer{i + 1}").register_forward_hook(lambda *made: maps.append(made[2]))
    close(ours(x), theirs(x))
    found = ours.features(x).maps
    assert len(found) == len(maps) == 4
    for own, other in zip(found, maps, strict=True):
        close(own, other)


def test_gradients_equal_torchvision() -> None:
    ours, theirs = twins("resnet50_224")
    x = torch.randn(2, 3, 64, 64)
    ours(x).square().mean().backward()
    theirs(x).square().mean().backward()
    mine = dict(ours.named_parameters())
    for name, parameter in theirs.named_parameters():
        scale = parameter.grad.abs().max().item()
        assert (mine[name].grad - parameter.grad).abs().max() <= 1e-4 * max(1.0, scale), name
