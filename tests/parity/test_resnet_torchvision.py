"""Our ResNet-18 against torchvision's: the same keys, the same logits."""

from __future__ import annotations

import torch
from torchvision.models import resnet18

from vitrail.models.cnn import ResNet


def test_resnet18_equals_torchvision() -> None:
    theirs = resnet18(weights=None, num_classes=7).eval()
    generator = torch.Generator().manual_seed(0)
    state = {k: v.clone() for k, v in theirs.state_dict().items()}
    for value in state.values():
        if value.is_floating_point():
            value.copy_(torch.rand(value.shape, generator=generator) * 0.1 + 0.01)
    theirs.load_state_dict(state)
    ours = ResNet(num_classes=7).eval()
    ours.load_state_dict(theirs.state_dict(), strict=True)
    with torch.no_grad():
        expected = theirs(x := torch.randn(2, 3, 96, 64))
        torch.testing.assert_close(ours(x), expected, rtol=1e-5, atol=1e-5)
