"""What a Vision Transformer can be made of: each piece in a case that can be computed otherwise."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from vitrail.explain.record import record_attention
from vitrail.layers.blocks import Block, PostNormBlock, TokenBatchNorm
from vitrail.layers.embed import PatchEmbed
from vitrail.layers.local import LocalAttention
from vitrail.models.beit import BeitConfig
from vitrail.models.vit import VisionTransformer
from vitrail.models.vit_config import ViTConfig

SMALL: dict[str, Any] = dict(img_size=32, patch_size=8, embed_dim=24, depth=3, num_heads=3, num_classes=5)
IMAGES = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
WINDOWS: dict[str, Any] = dict(class_token=False, global_pool="avg")


def build(**options: Any) -> VisionTransformer:
    torch.manual_seed(0)
    model = VisionTransformer(**{**SMALL, **options}).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return model


def close(ours: Tensor, theirs: Tensor) -> None:
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5 * max(1.0, theirs.abs().max().item()))


# ---- one block for all layers


@torch.no_grad()
def test_a_shared_block_is_a_plain_network_with_copies_of_it() -> None:
    shared, plain = build(shared_blocks=True), build()
    state = shared.state_dict()
    first = {name: value for name, value in state.items() if name.startswith("blocks.0.")}
    copies = {name.replace("blocks.0.", f"blocks.{i}."): value for i in range(3) for name, value in first.items()}
    plain.load_state_dict({**state, **copies}, strict=True)
    assert torch.equal(shared(IMAGES), plain(IMAGES))
    for mine, theirs in zip(shared.features(IMAGES).maps, plain.features(IMAGES).maps, strict=True):
        assert torch.equal(mine, theirs)
    assert sum(p.numel() for p in shared.parameters()) < sum(p.numel() for p in plain.parameters())


def test_a_shared_block_gathers_the_gradients_of_every_layer() -> None:
    shared, plain = build(shared_blocks=True).double(), build().double()
    state = shared.state_dict()
    plain.load_state_dict(
        {name: state[f"blocks.0.{name[9:]}"] if name[:6] == "blocks" else state[name] for name in plain.state_dict()}
    )
    for model in (shared, plain):
        model(IMAGES.double()).square().sum().backward()
    total = sum(block.mlp.fc1.weight.grad for block in plain.blocks)
    torch.testing.assert_close(shared.blocks[0].mlp.fc1.weight.grad, total, rtol=1e-9, atol=1e-9)


# ---- windows


@torch.no_grad()
def test_windows_as_large_as_the_grid_are_a_plain_network() -> None:
    local, plain = build(**WINDOWS, window_size=4), build(**WINDOWS)
    plain.load_state_dict(local.state_dict(), strict=True)
    close(local(IMAGES), plain(IMAGES))
    larger = torch.randn(2, 3, 48, 48)
    assert not torch.allclose(local(larger), plain(larger), atol=1e-3)


@torch.no_grad()
def test_some_blocks_look_at_the_whole_image() -> None:
    model = build(**WINDOWS, window_size=2, global_blocks=(1,))
    assert [isinstance(block.attn, LocalAttention) for block in model.blocks] == [True, False, True]
    with record_attention() as record:
        model(IMAGES)
    assert [seen.layout.windows for seen in record.maps] == [4, 1, 4]
    every = build(**WINDOWS, window_size=2, global_blocks=(0, 1, 2))
    assert torch.equal(every(IMAGES), build(**WINDOWS)(IMAGES))


@torch.no_grad()
def test_what_a_local_block_sees_ends_at_its_window() -> None:
    model, changed = build(**WINDOWS, window_size=2, depth=1), IMAGES.clone()
    changed[..., :8, :8] += 1
    moved = (model.features(changed).maps[0] - model.features(IMAGES).maps[0]).abs().amax((0, 1)) > 0
    assert moved.nonzero().tolist() == [[0, 0], [0, 1], [1, 0], [1, 1]]


def test_windows_take_no_choice_of_tokens() -> None:
    model = build(**WINDOWS, window_size=2)
    with pytest.raises(ValueError, match="windows are cut from a whole grid; got a choice of 3 tokens.*window_size=0"):
        model.encode(model.embed(IMAGES), torch.tensor([[0, 1, 2], [3, 4, 5]]))


# ---- norms


@torch.no_grad()
def test_norm_after_each_sum_is_torchs_encoder_layer() -> None:
    theirs = nn.TransformerEncoderLayer(24, 3, 96, dropout=0.0, activation="gelu", batch_first=True).eval()
    for parameter in theirs.parameters():
        parameter.normal_(std=0.3)
    ours = PostNormBlock(24, 3, norm_eps=1e-5).eval()
    names = {
        "self_attn.in_proj_": "attn.qkv.", "self_attn.out_proj.": "attn.proj.", "linear1.": "mlp.fc1.",
        "linear2.": "mlp.fc2.", "norm1.": "norm1.", "norm2.": "norm2.",
    }  # fmt: skip
    theirs_state = theirs.state_dict()
    state = {
        new + n.removeprefix(old): v for n, v in theirs_state.items() for old, new in names.items() if n.startswith(old)
    }
    ours.load_state_dict(state, strict=True)
    x = torch.randn(2, 7, 24)
    close(ours(x), theirs(x))
    close(ours(x, rows=2), theirs(x)[:, :2])


def test_batch_norm_takes_the_mean_over_all_tokens_of_all_images() -> None:
    norm, x = TokenBatchNorm(24, eps=1e-6).train(), 3 + 2 * torch.randn(2, 7, 24)
    y = norm(x)
    assert y.shape == x.shape
    close(y.mean((0, 1)), torch.zeros(24))
    close(y.var((0, 1), unbiased=False), torch.ones(24))
    close(norm.running_mean, 0.1 * x.mean((0, 1)))


def test_batch_norm_in_training_sees_every_token_of_the_last_block_too() -> None:
    model = build(norm="batchnorm").train()
    whole = model.forward_head(model.forward_features(IMAGES))
    assert torch.equal(model(IMAGES), whole)


@torch.no_grad()
@pytest.mark.parametrize("block", ["prenorm", "postnorm", "respostnorm"])
def test_the_last_block_alone_makes_the_class_token_as_all_would(block: str) -> None:
    model = build(block=block)
    close(model(IMAGES), model.forward_head(model.forward_features(IMAGES)))


@torch.no_grad()
def test_the_norm_before_the_blocks_comes_once_whatever_is_run_first() -> None:
    model = build(pre_norm=True)
    tokens = model.embed(IMAGES)
    x = model.norm_pre(tokens.x + tokens.pos)
    for block in model.blocks:
        x = block(x)
    close(model.encode(tokens).x, model.norm(x))
    first = model.encode(tokens, blocks=slice(0), norm=False)
    close(model.encode(first).x, model.norm(x))
    first = model.encode(tokens, blocks=slice(1), norm=False)
    close(model.encode(first, blocks=slice(1, None)).x, model.norm(x))
    assert model.patch_embed.proj.bias is None


# ---- patches


@torch.no_grad()
def test_patches_that_overlap_see_those_before_them_and_no_others() -> None:
    """Their kernels lie around the first pixel of each."""
    made = PatchEmbed(32, 8, 3, 24, kind="overlap")
    assert made.proj.kernel_size == (15, 15)
    changed = IMAGES.clone()
    changed[..., 8:16, 8:16] += 1
    moved = (made(changed) - made(IMAGES)).abs().amax((0, 2)).view(4, 4) > 1e-6
    assert moved.nonzero().tolist() == [[1, 1], [1, 2], [2, 1], [2, 2]]


@torch.no_grad()
@pytest.mark.parametrize("size", [(32, 32), (24, 40)])
@pytest.mark.parametrize("kind", ["overlap", "stem"])
def test_every_embedding_has_the_same_grid(kind: str, size: tuple[int, int]) -> None:
    made = PatchEmbed(32, 8, 3, 24, kind=kind).eval()
    assert made(torch.randn(2, 3, *size)).shape == (2, size[0] // 8 * (size[1] // 8), 24)


def test_a_stem_halves_the_image_and_doubles_its_channels() -> None:
    stem = PatchEmbed(32, 16, 3, 64, kind="stem").proj
    convolutions = [part for part in stem if isinstance(part, nn.Conv2d)]
    assert [part.out_channels for part in convolutions] == [8, 16, 32, 64, 64]
    assert [part.stride[0] for part in convolutions] == [2, 2, 2, 2, 1]
    assert stem(IMAGES).shape == (2, 64, 2, 2)


@pytest.mark.parametrize(
    ("patch", "width", "message"),
    [
        (14, 64, r"patch_size must be 2, 4, 8, 16, …; got \(14, 14\)"),
        ((8, 4), 64, r"patch_size must be 2, 4, 8, 16, …; got \(8, 4\)"),
        (16, 60, "must be divisible by 8 for patches of 16; got 60"),
    ],
)
def test_a_stem_needs_halves(patch: Any, width: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        PatchEmbed(112, patch, 3, width, kind="stem")


@torch.no_grad()
@pytest.mark.parametrize("kind", ["conv", "overlap", "stem"])
def test_what_stands_in_padded_pixels_is_nowhere(kind: str) -> None:
    """Patches that overlap the padding, or hold some of it, see zeros there."""
    model, mask = build(embed=kind), torch.zeros(2, 32, 32, dtype=torch.bool)
    mask[..., 20:] = True
    other = IMAGES.masked_fill(mask[:, None], 9.0)
    assert torch.equal(model(IMAGES, mask), model(other, mask))
    assert not torch.allclose(model(other), model(IMAGES), atol=1e-3)


# ---- words that do not go together


WRONG: list[tuple[dict[str, Any], str]] = [
    (dict(rope="axial", embed_dim=30, num_heads=3), r"embed_dim / num_heads must be divisible by 4; got 30 / 3 = 10"),
    (dict(mlp="swiglu"), "mlp 'swiglu' is gated by act='silu'; got act='gelu'"),
    (dict(shared_blocks=True, drop_path_rate=0.1), "shared_blocks=True has but one; got 0.1: use 0"),
    (dict(window_size=2), r"window_size > 0 is for image tokens alone.*got also class_token: use class_token=False"),
    (dict(**WINDOWS, window_size=2, rel_pos_bias=True), "got also rel_pos_bias"),
    (dict(**WINDOWS, window_size=2, global_blocks=(3,)), r"global_blocks must name blocks, 0 … 2, .*got \(3,\)"),
    *[
        (
            dict(**WINDOWS, window_size=2, global_blocks=wrong),
            "global_blocks must be a tuple of whole numbers, blocks by ",
        )
        for wrong in (3, ("1",), (1.5,), (True,))
    ],
    (dict(global_blocks=(1,)), r"of a network with window_size > 0; got \(1,\) with window_size 0"),
    (dict(window_size=-1), "window_size must be at least 0; got -1"),
    (dict(rope="mixed"), "rope must be one of none, axial, dinov3; got 'mixed'"),
    (dict(block="post"), "block must be one of prenorm, postnorm, respostnorm; got 'post'"),
]


@pytest.mark.parametrize(("wrong", "message"), WRONG)
def test_what_does_not_go_together_says_how_to_mend_it(wrong: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ViTConfig(**{**SMALL, **wrong})


def test_beits_blocks_norm_before_each_branch() -> None:
    with pytest.raises(ValueError, match="block must be prenorm in this family; got 'postnorm'"):
        BeitConfig(block="postnorm")


def test_a_config_from_json_is_the_config() -> None:
    config = ViTConfig(**SMALL, **WINDOWS, window_size=2, global_blocks=(1,), ref_feat_shape=4)
    assert config == ViTConfig(**SMALL, **WINDOWS, window_size=2, global_blocks=[1], ref_feat_shape=[4, 4])


def test_a_block_takes_any_attention() -> None:
    made = Block(24, 3, attention=lambda dim, heads, **_: nn.Identity())
    assert isinstance(made.attn, nn.Identity)
