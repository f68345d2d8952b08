"""Google's JAX files of hybrids: what timm reads from one is what we read from it."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from vitrail.weights.layouts import layout_of, ours as ours_of

hybrid = pytest.importorskip("timm.models.vision_transformer_hybrid")

WIDTH, HEADS, CLASSES = 48, 3, 7


def google_file(depths: tuple[int, ...], patch: int, path: Path) -> None:
    """A hybrid's file with random numbers: names and shapes as in Google's, kernels (p, q, in, out)."""
    shapes: dict[str, tuple[int, ...]] = {"conv_root/kernel": (7, 7, 3, 64), "cls": (1, 1, WIDTH)}
    shapes |= _norm("gn_root", (1, 1, 1, 64))
    inputs = 64
    for i, depth in enumerate(depths):
        width = 256 * 2**i
        for j in range(depth):
            unit, narrow = f"block{i + 1}/unit{j + 1}", width // 4
            kernels = [(1, 1, inputs, narrow), (3, 3, narrow, narrow), (1, 1, narrow, width)]
            for k, kernel in enumerate(kernels):
                shapes |= {f"{unit}/conv{k + 1}/kernel": kernel, **_norm(f"{unit}/gn{k + 1}", (1, 1, 1, kernel[3]))}
            if j == 0:
                shapes |= {
                    f"{unit}/conv_proj/kernel": (1, 1, inputs, width),
                    **_norm(f"{unit}/gn_proj", (1, 1, 1, width)),
                }
            inputs = width
    shapes |= {"embedding/kernel": (patch, patch, inputs, WIDTH), "embedding/bias": (WIDTH,)}
    cells = 64 // (4 * 2 ** max(0, len(depths) - 1)) // patch
    shapes |= {"Transformer/posembed_input/pos_embedding": (1, 1 + cells**2, WIDTH)}
    shapes |= _block("Transformer/encoderblock_0") | _block("Transformer/encoderblock_1")
    shapes |= {**_norm("Transformer/encoder_norm", (WIDTH,)), "head/kernel": (WIDTH, CLASSES), "head/bias": (CLASSES,)}
    draw = np.random.default_rng(0)
    np.savez(path, **{name: draw.standard_normal(shape).astype("float32") for name, shape in shapes.items()})


def _norm(name: str, shape: tuple[int, ...]) -> dict[str, tuple[int, ...]]:
    return {f"{name}/scale": shape, f"{name}/bias": shape}


def _block(name: str) -> dict[str, tuple[int, ...]]:
    heads, own = f"{name}/MultiHeadDotProductAttention_1", WIDTH // HEADS
    shapes = {**_norm(f"{name}/LayerNorm_0", (WIDTH,)), **_norm(f"{name}/LayerNorm_2", (WIDTH,))}
    for kind in ("query", "key", "value"):
        shapes |= {f"{heads}/{kind}/kernel": (WIDTH, HEADS, own), f"{heads}/{kind}/bias": (HEADS, own)}
    shapes |= {f"{heads}/out/kernel": (HEADS, own, WIDTH), f"{heads}/out/bias": (WIDTH,)}
    mlp = f"{name}/MlpBlock_3"
    shapes |= {f"{mlp}/Dense_0/kernel": (WIDTH, 4 * WIDTH), f"{mlp}/Dense_0/bias": (4 * WIDTH,)}
    return shapes | {f"{mlp}/Dense_1/kernel": (4 * WIDTH, WIDTH), f"{mlp}/Dense_1/bias": (WIDTH,)}


@pytest.mark.parametrize(("depths", "patch"), [((), 8), ((1, 2), 1)])
def test_a_file_is_read_as_timm_reads_it(depths: tuple[int, ...], patch: int, tmp_path: Path) -> None:
    google_file(depths, patch, path := tmp_path / "hybrid.npz")
    options: dict[str, Any] = dict(img_size=64, patch_size=patch, embed_dim=WIDTH, depth=2, num_heads=HEADS)
    embed = partial(hybrid.HybridEmbed, backbone=hybrid._resnetv2(depths))
    theirs = hybrid.VisionTransformer(**options, num_classes=CLASSES, embed_layer=embed)
    theirs.load_pretrained(str(path))
    tensors = {name: torch.from_numpy(value) for name, value in np.load(path).items()}
    found = layout_of(tensors)
    assert found is not None and (found.source, found.family) == ("google", "hybrid")
    read, expected = ours_of(tensors)[0], theirs.state_dict()
    assert read.keys() == expected.keys()
    for name, value in expected.items():
        assert torch.equal(read[name], value), name
