"""What is a ViT over a CNN's own: strides by image size, torchvision's CNNs cut where they are wanted."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torchvision import models

from vitrail import create_model
from vitrail.models.hybrid_cnn import HybridCNNConfig, HybridCNNViT, halving_stem, torchvision_stem

TINY: dict[str, Any] = dict(embed_dim=24, depth=1, num_heads=3, num_classes=3)


@pytest.mark.parametrize(("size", "stride"), [(28, 2), (32, 2), (64, 4), (96, 8), (224, 16), (256, 16), ((32, 320), 2)])
def test_the_usual_stride_leaves_about_14_cells(size: Any, stride: int) -> None:
    assert HybridCNNConfig(img_size=size).stem_stride == stride


def test_a_row_keeps_its_stem_at_another_size() -> None:
    with torch.device("meta"):
        assert create_model("hybrid_tiny_32", img_size=64).config.stem_stride == 2
        assert create_model("hybrid_tiny", img_size=32).variant == "hybrid_tiny_32"
        assert create_model("hybrid_tiny").variant == "hybrid_tiny_224"


@pytest.mark.parametrize(
    ("given", "words"),
    [
        (dict(stem_stride=1), "stem_stride must be at least 2; got 1"),
        (dict(stem_stride=12), "stem_stride must be a power of two; got 12: use 8 or 16"),
    ],
)
def test_a_value_out_of_range_is_named(given: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        HybridCNNConfig(**given)


@pytest.mark.parametrize(
    ("given", "words"),
    [
        (dict(stem="resnet81"), "stem must be one of conv, convnext_base, .*; got 'resnet81': did you mean resnet"),
        (dict(stem="vit_b_16"), "stem must be one of conv, "),
        (
            dict(stem="convnext_tiny", stem_stride=2),
            "stem_stride must be 4, 8, 16, 32 for the stem convnext_tiny; got 2",
        ),
        (dict(stem="resnet18", stem_stride=64), "stem_stride must be 2, 4, 8, 16, 32 for the stem resnet18; got 64"),
        (dict(img_size=33), "img_size 33 is not divisible by patch_size 2: use 32 or 34, or dynamic_pad=True"),
    ],
)
def test_a_stem_that_cannot_be_is_named(given: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words), torch.device("meta"):
        HybridCNNViT(**TINY, **given)


@pytest.mark.parametrize("stride", [2, 4, 8, 16])
def test_a_small_stem_has_its_stride(stride: int) -> None:
    stem, channels = halving_stem(3, 48, stride)
    assert channels == 48 and stem(torch.zeros(1, 3, 64, 64)).shape == (1, 48, 64 // stride, 64 // stride)


CUTS = [
    ("resnet18", 16, 256),
    ("convnext_tiny", 8, 192),
    ("mobilenet_v3_small", 16, 48),
    ("vgg11", 8, 512),
    ("shufflenet_v2_x0_5", 16, 96),
    ("densenet121", 4, 128),
    ("mnasnet0_5", 32, 1280),
]


@pytest.mark.parametrize(("name", "stride", "channels"), CUTS)
@torch.no_grad()
def test_a_cnn_of_torchvision_is_cut_at_a_stride(name: str, stride: int, channels: int) -> None:
    """The deepest map of that stride, its weights all drawn by a law, and trained as it comes."""
    with torch.device("meta"):
        stem, found = torchvision_stem(name, 3, stride)
    assert found == channels
    model = HybridCNNViT(**TINY, img_size=64, stem=name, stem_stride=stride)
    assert all(part.training for part in model.modules())
    assert all(value.isfinite().all() for value in model.state_dict().values())
    assert model.patch_embed.backbone(torch.randn(2, 3, 64, 64)).shape == (2, channels, 64 // stride, 64 // stride)
    assert model.state_dict().keys() >= {f"patch_embed.backbone.{name}" for name in stem.state_dict()}


@torch.no_grad()
def test_a_cut_resnet_is_the_beginning_of_the_whole() -> None:
    whole = models.resnet18(weights=None).eval()
    model = HybridCNNViT(**TINY, img_size=64, stem="resnet18", stem_stride=8).eval()
    own = set(model.patch_embed.backbone.state_dict())
    model.patch_embed.backbone.load_state_dict({n: v for n, v in whole.state_dict().items() if n in own})
    x = torch.randn(2, 3, 64, 64)
    expected = whole.layer2(whole.layer1(whole.maxpool(whole.relu(whole.bn1(whole.conv1(x))))))
    assert torch.equal(model.patch_embed.backbone(x), expected)


@torch.no_grad()
def test_a_cnn_takes_other_channels() -> None:
    model = HybridCNNViT(**TINY, img_size=64, stem="resnet18", in_chans=5).eval()
    assert model(torch.randn(1, 5, 64, 64)).shape == (1, 3)
    assert model.pixel_weights() == ["patch_embed.backbone.conv1.weight"]


@torch.no_grad()
def test_what_does_not_divide_is_padded_on_request() -> None:
    model = HybridCNNViT(**TINY, img_size=32, dynamic_pad=True).eval()
    x = torch.randn(1, 3, 31, 33)
    assert torch.equal(model(x), model(torch.nn.functional.pad(x, (0, 1, 0, 1))))


def test_other_words_are_taken() -> None:
    with torch.device("meta"):
        model = HybridCNNViT(n_classes=10, embed_dim=384, depth=6)
    assert (model.num_classes, model.num_features, len(model.blocks)) == (10, 384, 6)
    assert model.preprocess.mean == (0.485, 0.456, 0.406)
