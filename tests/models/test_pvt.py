"""What is a PVT's own: positions of each stage, its class token, padded pixels, counts, words."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from vitrail.explain.maps import attention_map
from vitrail.explain.record import record_attention
from vitrail.layers.reduction import SpatialReductionAttention
from vitrail.models.pvt import VARIANTS, PVTConfig, PyramidVisionTransformer

SMALL: dict[str, Any] = dict(
    img_size=64, patch_size=4, embed_dims=(8, 16, 24, 32), depths=(1, 2, 1, 1), num_heads=(1, 2, 3, 4),
    mlp_ratios=(4, 4, 2, 2), num_classes=7,
)  # fmt: skip
AUTHORS = "the authors' code and transformers agree"
HAND = "counted by hand, see `formula`"
# fmt: off
PUBLISHED = {
    "pvt_debug":   (    93_706,  None, HAND),
    "pvt_tiny":    (13_229_288, 1.933, AUTHORS),
    "pvt_small":   (24_485_864, 3.816, AUTHORS),
    "pvt_medium":  (44_208_104, 6.659, AUTHORS),
    "pvt_large":   (61_369_320, 9.814, AUTHORS),
    "pvt_tiny_32": (10_754_442,  None, HAND),
}
"""parameters, and thousand millions of multiplications and additions at 224 pixels"""
# fmt: on


def build(**options: Any) -> PyramidVisionTransformer:
    """A small model with every parameter random: fresh ones hide mistakes behind zeros and ones."""
    model = PyramidVisionTransformer(**{**SMALL, **options}).eval()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            centre = 1 if parameter.ndim == 1 and name.endswith("weight") else 0  # norms pass their input on
            parameter.copy_(centre + torch.randn(parameter.shape, generator=generator) * 0.3)
    return model


def close(ours: Tensor, theirs: Tensor) -> None:
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5 * max(1.0, theirs.abs().max().item()))


# ---- counts


def formula(c: PVTConfig) -> int:
    """Wang et al. 2021, section 3, term by term."""
    inputs, patches, total = (c.in_chans, *c.embed_dims[:-1]), (c.patch_size, *(2,) * (len(c.depths) - 1)), 0
    for i, (width, depth, ratio, mlp) in enumerate(zip(c.embed_dims, c.depths, c.sr_ratios, c.mlp_ratios, strict=True)):
        cells = (c.img_size[0] // c.strides[i]) * (c.img_size[1] // c.strides[i])
        total += (inputs[i] * patches[i] ** 2 + 1) * width + 2 * width + cells * width
        reduction = (width * ratio**2 + 1) * width + 2 * width if ratio > 1 else 0
        hidden = int(width * mlp)
        block = 4 * (width + 1) * width + (width + 1) * hidden + (hidden + 1) * width + 4 * width
        total += depth * (block + reduction)
    last = c.embed_dims[-1]
    return total + 2 * last + 2 * last + (last + 1) * c.num_classes  # class token and its position, norm, head


def test_every_row_has_its_count() -> None:
    assert list(PUBLISHED) == list(VARIANTS)


@pytest.mark.parametrize("row", PUBLISHED)
def test_a_row_has_the_published_count(row: str) -> None:
    expected, _, source = PUBLISHED[row]
    with torch.device("meta"):
        found = sum(p.numel() for p in PyramidVisionTransformer(VARIANTS[row]).parameters())
    assert found == formula(VARIANTS[row]) == expected, source


@pytest.mark.parametrize("row", [row for row, (_, macs, _) in PUBLISHED.items() if macs])
def test_a_row_has_the_published_work(row: str) -> None:
    """Within 1 %, all rows of the last block counted."""
    with torch.device("meta"), torch.no_grad(), FlopCounterMode(display=False) as counter:
        model = PyramidVisionTransformer(replace(VARIANTS[row], attn="eager"))
        model.forward_head(model.forward_features(torch.empty(1, 3, 224, 224)))
    assert counter.get_total_flops() / 2e9 == pytest.approx(PUBLISHED[row][1], rel=0.01)


# ---- positions


@torch.no_grad()
def test_positions_of_the_configured_size_are_the_tables_themselves() -> None:
    model = build()
    for stage, side in enumerate((16, 8, 4, 2)):
        assert model.positions(stage, (side, side)) is model.get_parameter(f"pos_embed{stage + 1}")


@pytest.mark.parametrize("size", [(96, 64), (224, 320), (32, 32)])
@torch.no_grad()
def test_another_size_is_a_network_of_that_size_with_tables_resized_as_the_authors_do(size: tuple[int, int]) -> None:
    """Each stage's table as an image, bilinearly, without antialiasing; the class token's row stays."""
    model, native = build(), build(img_size=size)
    state = model.state_dict()
    for i, side in enumerate((16, 8, 4, 2)):
        name, prefix, stride = f"pos_embed{i + 1}", int(i == 3), 4 * 2**i
        image = state[name][:, prefix:].reshape(1, side, side, -1).permute(0, 3, 1, 2)
        image = F.interpolate(image, size=(size[0] // stride, size[1] // stride), mode="bilinear")
        state[name] = torch.cat([state[name][:, :prefix], image.flatten(2).transpose(1, 2)], dim=1)
    native.load_state_dict(state)
    close(model(x := torch.randn(2, 3, *size)), native(x))


def test_dropout_after_positions_acts_in_every_stage_in_training_alone() -> None:
    model, x, seen = build(pos_drop_rate=0.5), torch.randn(2, 3, 64, 64), []
    for stage in range(4):
        first = model.get_submodule(f"block{stage + 1}.0")
        first.register_forward_pre_hook(lambda _, args: seen.append((args[0] == 0).float().mean().item()))
    model(x)
    model.train()(x)
    assert seen[:4] == [0] * 4
    assert seen[4:] == pytest.approx([0.5] * 4, abs=0.15)


# ---- stages and the class token


@torch.no_grad()
def test_patches_are_the_normed_convolution() -> None:
    patches, x = build().get_submodule("patch_embed1"), torch.randn(2, 3, 64, 64)
    close(patches(x), patches.norm(patches.proj(x).flatten(2).transpose(1, 2)))


@torch.no_grad()
def test_only_the_last_stage_has_a_class_token_and_the_head_reads_it() -> None:
    model, x = build(), torch.randn(2, 3, 64, 96)
    found = model.features(x)
    assert [tuple(part.shape) for part in found.prefix] == [(2, 0, 8), (2, 0, 16), (2, 0, 24), (2, 1, 32)]
    assert [tuple(part.shape[1:]) for part in found.maps] == [(8, 16, 24), (16, 8, 12), (24, 4, 6), (32, 2, 3)]
    close(model(x), model.head(found.prefix[-1][:, 0]))
    close(model.norm(model.features(x, norm=False).prefix[-1]), found.prefix[-1])


@torch.no_grad()
def test_every_map_lies_on_the_grid_of_its_keys() -> None:
    model = build()
    with record_attention() as record:
        model(torch.randn(2, 3, 64, 96))
    grids = [(16, 24), (8, 12), (8, 12), (4, 6), (2, 3)]
    assert [seen.layout.grid for seen in record.maps] == grids
    assert [seen.layout.key_grid for seen in record.maps] == [(2, 3)] * 5
    assert [seen.layout.readout for seen in record.maps] == [()] * 4 + [(0,)]
    assert [seen.weights.shape[2] - h * w for seen, (h, w) in zip(record.maps, grids, strict=True)] == [0, 0, 0, 0, 1]
    assert all(attention_map(seen).shape == (2, 2, 3) for seen in record.maps)


@torch.no_grad()
def test_the_last_block_makes_the_class_token_alone_unless_somebody_looks(monkeypatch: pytest.MonkeyPatch) -> None:
    model, x, seen = build(), torch.randn(2, 3, 64, 64), []
    close(model(x), model.forward_head(model.forward_features(x)))
    model.norm.register_forward_pre_hook(lambda _, args: seen.append(args[0].shape[1]))
    model(x)
    assert seen == [5]  # a hook sees all rows
    model.norm._forward_pre_hooks.clear()
    norm = type(model.norm).forward

    def watched(self: nn.Module, rows: torch.Tensor) -> torch.Tensor:
        if self is model.norm:
            seen.append(rows.shape[1])
        return norm(self, rows)

    monkeypatch.setattr(type(model.norm), "forward", watched)
    model(x)
    model.forward_features(x)
    assert seen == [5, 1, 5]


def test_training_with_and_without_the_other_rows_has_the_same_gradients() -> None:
    short, x = build(), torch.randn(2, 3, 64, 64)
    whole = copy.deepcopy(short)
    short(x).square().sum().backward()
    whole.forward_head(whole.forward_features(x)).square().sum().backward()
    for (name, a), b in zip(short.named_parameters(), whole.parameters(), strict=True):
        assert (a.grad - b.grad).abs().max() <= 1e-4 * max(1.0, b.grad.abs().max().item()), name


def test_layer_groups_keep_a_stage_with_its_first_block() -> None:
    groups = build().layer_groups()
    assert len(groups) == 7  # patches, five blocks, head
    assert groups[0] == [
        "pos_embed1",
        *(f"patch_embed1.{n}" for n in ("proj.weight", "proj.bias", "norm.weight", "norm.bias")),
    ]
    assert (
        "pos_embed2" in groups[2] and "patch_embed2.proj.weight" in groups[2] and "block2.0.attn.sr.weight" in groups[2]
    )
    assert all(name.startswith("block2.1.") for name in groups[3])
    assert {"cls_token", "pos_embed4", "block4.0.attn.q.weight"} <= set(groups[5])
    assert groups[6] == ["norm.weight", "norm.bias", "head.weight", "head.bias"]


def test_norms_after_convolutions_have_an_epsilon_of_their_own() -> None:
    for model, beside in ((build(), 1e-5), (build(conv_norm_eps=1e-6), 1e-6)):
        for name, part in model.named_modules():
            if isinstance(part, nn.LayerNorm):
                assert part.eps == (beside if name.endswith("attn.norm") or name.startswith("patch_") else 1e-6), name


# ---- sizes and padded pixels


@torch.no_grad()
def test_dynamic_pad_adds_zeros_on_the_right_and_below() -> None:
    model, x = build(dynamic_pad=True), torch.randn(2, 3, 50, 70)
    mask = torch.zeros(2, 50, 70, dtype=torch.bool)
    close(model(x), build()(F.pad(x, (0, 26, 0, 14)), F.pad(mask, (0, 26, 0, 14), value=True)))
    mask[:, :, 33:] = True
    close(model(x, mask), build()(F.pad(x, (0, 26, 0, 14)), F.pad(mask, (0, 26, 0, 14), value=True)))
    assert build(img_size=50, dynamic_pad=True).state_dict()["pos_embed1"].shape == (1, 256, 8)


@torch.no_grad()
def test_a_padded_batch_answers_as_each_image_alone() -> None:
    """Without positions, which belong to the canvas, an image in the corner of a larger canvas is the image alone."""
    model = build()
    for stage in range(4):
        model.get_parameter(f"pos_embed{stage + 1}").zero_()
    images = [torch.randn(3, 64, 96), torch.randn(3, 96, 32)]
    canvas, mask = torch.randn(2, 3, 96, 128), torch.ones(2, 96, 128, dtype=torch.bool)
    for i, image in enumerate(images):
        canvas[i, :, : image.shape[1], : image.shape[2]] = image
        mask[i, : image.shape[1], : image.shape[2]] = False
    together = model(canvas, mask)
    for logits, image in zip(together, images, strict=True):
        close(logits, model(image[None])[0])
    assert not torch.allclose(model(canvas), together, atol=0.01)


@torch.no_grad()
def test_an_image_of_nothing_but_padding_has_finite_logits() -> None:
    mask = torch.ones(2, 64, 64, dtype=torch.bool)
    mask[1, :, :32] = False
    x = torch.randn(2, 3, 64, 64)
    assert build()(x, mask).isfinite().all()
    close(build()(x, mask)[1:], build()(x[1:], mask[1:]))


@torch.no_grad()
def test_padding_is_nowhere_on_a_map() -> None:
    mask = torch.zeros(2, 64, 64, dtype=torch.bool)
    mask[:, :, 32:] = True
    with record_attention() as record:
        build()(torch.randn(2, 3, 64, 64), mask)
    for seen in record.maps:
        heat = attention_map(seen)
        assert heat[..., 0].any() and not heat[..., 1].any()


def test_a_size_that_does_not_divide_names_the_next_that_do() -> None:
    message = "img_size {} is not divisible by the last stage's stride 32: use 64 or 96, or dynamic_pad=True"
    with pytest.raises(ValueError, match=message.format(70)):
        build()(torch.zeros(1, 3, 64, 70))
    with pytest.raises(ValueError, match=message.format(90)):
        build(img_size=90)


def test_a_mask_of_another_shape_is_refused() -> None:
    with pytest.raises(ValueError, match=r"mask must be \(B, H, W\) like the images, \(2, 64, 64\); got \(2, 4, 4\)"):
        build()(torch.zeros(2, 3, 64, 64), torch.zeros(2, 4, 4, dtype=torch.bool))


@pytest.mark.parametrize(
    ("given", "words"),
    [
        (dict(depths=()), r"depths must be a tuple of whole numbers, one for each of 1 to 8 stages, such .*; got \(\)"),
        (
            dict(embed_dims=(8, 16, 24.5, 32)),
            r"embed_dims must be a tuple of whole numbers, one for each.*; got \(8, 16, 24.5, 32\)",
        ),
        (dict(num_heads=1), "num_heads must be a tuple of whole numbers.*; got 1"),
        (dict(num_heads=(1, 2)), r"for each of the 4 stages of depths \(1, 2, 1, 1\); got \(1, 2\)"),
        (dict(depths=(1, 0, 1, 1)), r"depths must be at least 1; got \(1, 0, 1, 1\)"),
        (dict(img_size=16), r"img_size must be at least 32; got \(16, 16\)"),
        (
            dict(sr_ratios=(8, 4, 2, 2)),
            r"sr_ratios must end in 1, where the class token has no cell; got \(8, 4, 2, 2\)",
        ),
        (
            dict(mlp_ratios=(4, 4, 2, 0)),
            r"mlp_ratios must leave a hidden width of at least 1; got \(4, 4, 2, 0\): the usual is 4",
        ),
        (
            dict(mlp_ratios=(float("nan"), 1, 1, 1)),
            r"mlp_ratios must be a tuple of finite numbers.*; got \(nan, 1, 1, 1",
        ),
        (
            dict(mlp_ratios=(1, float("inf"), 1, 1)),
            r"mlp_ratios must be a tuple of finite numbers.*; got \(1, inf, 1, 1",
        ),
        (dict(num_heads=(1, 2, 5, 4)), "embed_dim 24 is not divisible by num_heads 5: use 4 heads or a width of 25"),
        (dict(drop_path_rate=1.0), r"drop_path_rate must lie in \[0, 1\); got 1.0"),
        (dict(conv_norm_eps=0.0), r"conv_norm_eps must lie in \(0, 1\); got 0.0: the usual are 1e-6 and 1e-5"),
    ],
)
def test_wrong_values_say_the_rule_and_the_mend(given: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        build(**given)


@torch.no_grad()
def test_images_too_small_for_a_window_are_named() -> None:
    """A ratio of 16 asks for 64 pixels of a network that is built for them."""
    model = build(sr_ratios=(16, 4, 2, 1))
    with pytest.raises(ValueError, match="sr_ratio 16 needs at least 16 x 16 cells; got a grid of 8 x 16"):
        model(torch.zeros(1, 3, 32, 64))


def test_other_libraries_words_are_taken() -> None:
    config = PVTConfig(
        hidden_sizes=[8, 16, 24, 32], num_attention_heads=[1, 2, 3, 4], sequence_reduction_ratios=[4, 2, 1, 1]
    )
    assert (config.embed_dims, config.num_heads, config.sr_ratios) == ((8, 16, 24, 32), (1, 2, 3, 4), (4, 2, 1, 1))
    with pytest.raises(TypeError, match="PVTConfig has no argument 'mlp_dim'"):
        PVTConfig(mlp_dim=64)


def test_rates_of_stochastic_depth_grow_over_all_stages() -> None:
    model = build(drop_path_rate=0.4)
    rates = [
        part.drop_prob
        for name, part in model.named_modules()
        if name.endswith("drop_path2") and hasattr(part, "drop_prob")
    ]
    assert rates == pytest.approx([0.1, 0.2, 0.3, 0.4])


def test_the_reduction_of_a_stage_is_its_ratio() -> None:
    ratios = [
        part.sr_ratio for part in build(sr_ratios=(4, 2, 1, 1)).modules() if isinstance(part, SpatialReductionAttention)
    ]
    assert ratios == [4, 2, 2]
