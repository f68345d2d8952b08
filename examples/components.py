"""Every piece of a Vision Transformer alone, with the shapes that go in and come out.

python examples/components.py
"""

import torch

from vitrail import Attention, Block, Mlp, PatchEmbed, VisionTransformer
from vitrail.layers.attention import attend, attention_weights
from vitrail.layers.blocks import DropPath, LayerScale
from vitrail.layers.embed import resize_positions, sincos_2d
from vitrail.layers.tokens import AttentionPool, keep_tokens, mean_tokens


def show(name: str, before: torch.Tensor, after: torch.Tensor) -> torch.Tensor:
    print(f"{name:<34} {tuple(before.shape)!s:>18} -> {tuple(after.shape)}")
    return after


def main() -> None:
    torch.manual_seed(0)
    images = torch.randn(2, 3, 224, 224)

    tokens = show("PatchEmbed, a convolution", images, PatchEmbed(224, 16, 3, 384)(images))
    show("PatchEmbed, cut and multiply", images, PatchEmbed(224, 16, 3, 384, kind="linear")(images))

    positions = sincos_2d((14, 14), 384)
    tokens = show("+ 2-D sin-cos positions", tokens, tokens + positions)
    show("positions at 20 x 20 patches", positions, resize_positions(positions, (14, 14), (20, 20)))

    q = k = v = tokens.unflatten(-1, (6, 64)).transpose(1, 2)
    show("attend: softmax(q kᵀ / √D) v", q, attend(q, k, v))
    rows = show("its weights, each row sums to 1", q, attention_weights(q, k))
    print(f"{'':<34} largest row sum {rows.sum(-1).max():.6f}")

    show("Attention, 6 heads", tokens, Attention(384, num_heads=6)(tokens))
    show("Mlp", tokens, Mlp(384, 1536)(tokens))
    show("LayerScale", tokens, LayerScale(384)(tokens))
    dropped = show("DropPath 0.5, in training", tokens, DropPath(0.5).train()(tokens))
    print(f"{'':<34} samples left out: {int((dropped.flatten(1) == 0).all(1).sum())} of 2")
    show("Block", tokens, Block(384, num_heads=6)(tokens))

    show("mean over tokens", tokens, mean_tokens(tokens))
    show("AttentionPool", tokens, AttentionPool(384, num_heads=6)(tokens))
    show("49 of 196 patches kept", tokens, keep_tokens(tokens, torch.arange(49).expand(2, -1), prefix=0))

    model = VisionTransformer(img_size=224, patch_size=16, embed_dim=384, depth=2, num_heads=6, num_classes=10)
    show("VisionTransformer", images, model(images))
    show("... its features after block 2", images, model.features(images, indices=[-1]).maps[0])
    show("... at another image size", images[..., :160], model(images[..., :160]))


if __name__ == "__main__":
    main()
