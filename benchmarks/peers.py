"""The same Vision Transformer from every library that has one, by the sizes of our row."""

from __future__ import annotations

from collections.abc import Callable

import timm
import torch
import torchvision
import transformers
import vit_pytorch
from torch import Tensor, nn

from vitrail.models.registry import build_model
from vitrail.models.vit_config import ViTConfig

PACKAGES = ("timm", "torchvision", "transformers", "vit-pytorch")
SETTINGS = ("timm", "timm, unfused", "torchvision", "transformers", "vit-pytorch")
"""timm without its fused attention is the faster one in some settings, and so a peer of its own"""


def build(row: str) -> dict[str, nn.Module]:
    """Our model of a row and its peers, in evaluation mode; timm's have our weights, the others their own.

    Raises `AssertionError` where timm's logits are not ours, or another has more or fewer parameters than we.
    """
    ours = build_model(row).eval()
    found: dict[str, nn.Module] = {"vitrail": ours} | {name: make(ours.config).eval() for name, make in MAKERS.items()}
    images = torch.randn(1, ours.config.in_chans, *ours.config.img_size)
    for name in SETTINGS[:2]:
        found[name].load_state_dict(ours.state_dict())
        with torch.no_grad():
            torch.testing.assert_close(found[name](images), ours(images), atol=1e-4, rtol=1e-4)
    count = sum(p.numel() for p in ours.parameters())
    for name, model in found.items():
        own = sum(p.numel() for p in model.parameters())
        if abs(own / count - 1) > 0.01:  # vit-pytorch norms patches and has fewer biases
            raise AssertionError(f"{name} has {own:,} parameters where {row} has {count:,}")
    return found


def _timm(c: ViTConfig) -> nn.Module:
    return timm.models.vision_transformer.VisionTransformer(
        img_size=c.img_size, patch_size=c.patch_size, embed_dim=c.embed_dim, depth=c.depth, num_heads=c.num_heads,
        mlp_ratio=c.mlp_ratio, num_classes=c.num_classes,
    )  # fmt: skip


def _timm_unfused(c: ViTConfig) -> nn.Module:
    model = _timm(c)
    for block in model.blocks:
        block.attn.fused_attn = False
    return model


def _torchvision(c: ViTConfig) -> nn.Module:
    return torchvision.models.VisionTransformer(
        image_size=c.img_size[0], patch_size=c.patch_size[0], num_layers=c.depth, num_heads=c.num_heads,
        hidden_dim=c.embed_dim, mlp_dim=int(c.embed_dim * c.mlp_ratio), num_classes=c.num_classes,
    )  # fmt: skip


class Logits(nn.Module):
    """transformers' model as one that gives logits."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: Tensor) -> Tensor:
        return self.model(images).logits


def _transformers(c: ViTConfig) -> nn.Module:
    config = transformers.ViTConfig(
        hidden_size=c.embed_dim, num_hidden_layers=c.depth, num_attention_heads=c.num_heads,
        intermediate_size=int(c.embed_dim * c.mlp_ratio), image_size=c.img_size[0], patch_size=c.patch_size[0],
        num_labels=c.num_classes,
    )  # fmt: skip
    return Logits(transformers.ViTForImageClassification(config))


def _vit_pytorch(c: ViTConfig) -> nn.Module:
    return vit_pytorch.ViT(
        image_size=c.img_size[0], patch_size=c.patch_size[0], num_classes=c.num_classes, dim=c.embed_dim,
        depth=c.depth, heads=c.num_heads, dim_head=c.embed_dim // c.num_heads, mlp_dim=int(c.embed_dim * c.mlp_ratio),
    )  # fmt: skip


MAKERS: dict[str, Callable[[ViTConfig], nn.Module]] = dict(
    zip(SETTINGS, (_timm, _timm_unfused, _torchvision, _transformers, _vit_pytorch), strict=True)
)
