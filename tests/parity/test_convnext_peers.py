"""Our ConvNeXt against timm's, whose keys are ours, and torchvision's, through its key map."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from torchvision.models.convnext import CNBlockConfig, ConvNeXt as TorchvisionConvNeXt

from vitrail.models.convnext import ConvNeXt
from vitrail.weights.layouts import layout_of, ours as ours_of

DEPTHS, WIDTH, CLASSES = (1, 2, 1, 1), 16, 7
SIZES = [(64, 64), (96, 40), (71, 50)]


def randomise(model: nn.Module) -> None:
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for tensor in model.state_dict().values():
            tensor.copy_(torch.randn(tensor.shape, generator=generator) * 0.3)


def timm_twins() -> tuple[ConvNeXt, nn.Module]:
    timm = pytest.importorskip("timm.models.convnext")
    dims = tuple(WIDTH * 2**i for i in range(len(DEPTHS)))
    theirs = timm.ConvNeXt(depths=DEPTHS, dims=dims, num_classes=CLASSES).eval()
    return _ours(theirs), theirs


def torchvision_twins() -> tuple[ConvNeXt, nn.Module]:
    widths = [WIDTH * 2**i for i in range(len(DEPTHS))]
    settings = [CNBlockConfig(*line) for line in zip(widths, [*widths[1:], None], DEPTHS, strict=True)]
    theirs = TorchvisionConvNeXt(settings, num_classes=CLASSES).eval()
    return _ours(theirs), theirs


def _ours(theirs: nn.Module) -> ConvNeXt:
    randomise(theirs)
    model = ConvNeXt(img_size=64, embed_dim=WIDTH, depths=DEPTHS, num_classes=CLASSES).eval()
    model.load_state_dict(ours_of(theirs.state_dict())[0], strict=True)
    return model


def close(ours: torch.Tensor, theirs: torch.Tensor) -> None:
    """1e-5 of the largest value, in fp32."""
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5 * max(1.0, theirs.abs().max().item()))


@pytest.mark.parametrize("size", SIZES)
@torch.no_grad()
def test_logits_and_every_map_equal_timm(size: tuple[int, int]) -> None:
    ours, theirs = timm_twins()
    x = torch.randn(2, 3, *size)
    close(ours(x), theirs(x))
    for own, other in zip(ours.features(x).maps, theirs.forward_intermediates(x, intermediates_only=True), strict=True):
        close(own, other)


@pytest.mark.parametrize("size", SIZES)
@torch.no_grad()
def test_logits_and_every_map_equal_torchvision(size: tuple[int, int]) -> None:
    ours, theirs = torchvision_twins()
    x, maps = torch.randn(2, 3, *size), []
    for i in (1, 3, 5, 7):
        theirs.features[i].register_forward_hook(lambda *made: maps.append(made[2]))
    close(ours(x), theirs(x))
    for own, other in zip(ours.features(x).maps, maps, strict=True):
        close(own, other)


@pytest.mark.parametrize("twins", [timm_twins, torchvision_twins])
def test_gradients_equal(twins: Any) -> None:
    ours, theirs = twins()
    x = torch.randn(2, 3, 64, 64)
    ours(x).square().mean().backward()
    theirs(x).square().mean().backward()
    mine = {name: p.grad for name, p in ours.named_parameters()}
    others = ours_of({name: p.grad for name, p in theirs.named_parameters()})[0]
    assert mine.keys() == others.keys()
    for name, gradient in others.items():
        assert (mine[name] - gradient).abs().max() <= 1e-4 * max(1.0, gradient.abs().max().item()), name


def test_torchvisions_names_are_known_and_ours_are_nobody_elses() -> None:
    ours, theirs = torchvision_twins()
    found = layout_of(theirs.state_dict())
    assert found is not None and (found.source, found.family) == ("torchvision", "convnext")
    assert layout_of(ours.state_dict()) is None
