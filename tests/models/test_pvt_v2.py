"""What is a PVT v2's own: any size, padded pixels, norms of stages, linear reduction, counts, words."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from vitrail.explain.record import record_attention
from vitrail.layers import parts
from vitrail.layers.linear import Linear
from vitrail.models.pvt_v2 import VARIANTS, ConvMlp, PVTV2Config, PyramidVisionTransformerV2

SMALL: dict[str, Any] = dict(
    img_size=64, embed_dims=(8, 16, 24, 32), depths=(1, 2, 1, 1), num_heads=(1, 2, 3, 4), mlp_ratios=(4, 4, 2, 2),
    num_classes=7,
)  # fmt: skip
TIMM = "timm 1.0.31, its model of this name"
HAND = "counted by hand, see `formula`"
# fmt: off
PUBLISHED = {
    "pvt_v2_debug": (    45_794,   None, HAND),
    "pvt_v2_b0":    ( 3_666_760,  0.566, TIMM),
    "pvt_v2_b1":    (14_009_000,  2.108, TIMM),
    "pvt_v2_b2":    (25_362_856,  4.027, TIMM),
    "pvt_v2_b2_li": (22_553_512,  3.889, TIMM),
    "pvt_v2_b3":    (45_238_696,  6.897, TIMM),
    "pvt_v2_b4":    (62_556_072, 10.101, TIMM),
    "pvt_v2_b5":    (81_956_008, 11.717, TIMM),
    "pvt_v2_b0_32": ( 3_408_490,   None, HAND),
}
"""parameters, and thousand millions of multiplications and additions at 224 pixels"""
# fmt: on


def build(**options: Any) -> PyramidVisionTransformerV2:
    """A small model with every parameter random: fresh ones hide mistakes behind zeros and ones."""
    model = PyramidVisionTransformerV2(**{**SMALL, **options}).eval()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            centre = 1 if parameter.ndim == 1 and name.endswith("weight") else 0  # norms pass their input on
            parameter.copy_(centre + torch.randn(parameter.shape, generator=generator) * 0.3)
    return model


def close(ours: Tensor, theirs: Tensor) -> None:
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5 * max(1.0, theirs.abs().max().item()))


# ---- counts


def formula(c: PVTV2Config) -> int:
    """Wang et al. 2022, section 3, term by term."""
    inputs, kernels, total = (c.in_chans, *c.embed_dims[:-1]), (c.patch_size, *(3,) * (len(c.depths) - 1)), 0
    for i, (width, depth, ratio, mlp) in enumerate(zip(c.embed_dims, c.depths, c.sr_ratios, c.mlp_ratios, strict=True)):
        window = 1 if c.linear else ratio
        reduction = (width * window**2 + 1) * width + 2 * width if c.linear or ratio > 1 else 0
        hidden = int(width * mlp)
        block = 4 * (width + 1) * width + (width + 1) * hidden + 10 * hidden + (hidden + 1) * width + 4 * width
        total += (inputs[i] * kernels[i] ** 2 + 1) * width + 2 * width + depth * (block + reduction) + 2 * width
    return total + (c.embed_dims[-1] + 1) * c.num_classes


def test_every_row_has_its_count() -> None:
    assert list(PUBLISHED) == list(VARIANTS)


@pytest.mark.parametrize("row", PUBLISHED)
def test_a_row_has_the_published_count(row: str) -> None:
    expected, _, source = PUBLISHED[row]
    with torch.device("meta"):
        found = sum(p.numel() for p in PyramidVisionTransformerV2(VARIANTS[row]).parameters())
    assert found == formula(VARIANTS[row]) == expected, source


@pytest.mark.parametrize("row", [row for row, (_, macs, _) in PUBLISHED.items() if macs])
def test_a_row_has_the_published_work(row: str) -> None:
    """Within 1 %."""
    with torch.device("meta"), torch.no_grad(), FlopCounterMode(display=False) as counter:
        PyramidVisionTransformerV2(replace(VARIANTS[row], attn="eager"))(torch.empty(1, 3, 224, 224))
    assert counter.get_total_flops() / 2e9 == pytest.approx(PUBLISHED[row][1], rel=0.01)


def test_the_row_for_small_images_ends_with_four_by_four_cells_and_keys() -> None:
    with record_attention() as record, torch.no_grad():
        found = PyramidVisionTransformerV2(VARIANTS["pvt_v2_b0_32"]).features(torch.zeros(1, 3, 32, 32))
    assert [cells.shape[-1] for cells in found.maps] == [32, 16, 8, 4]
    assert {seen.layout.key_grid for seen in record.maps} == {(4, 4)}


# ---- sizes and stages


@pytest.mark.parametrize("linear", [False, True])
@pytest.mark.parametrize("size", [(32, 32), (29, 61), (96, 64), (97, 33), (224, 320)])
@torch.no_grad()
def test_any_size_works_and_every_grid_is_rounded_up(size: tuple[int, int], linear: bool) -> None:
    model, x = build(linear=linear), torch.randn(2, 3, *size)
    found = model.features(x)
    for cells, stride in zip(found.maps, (4, 8, 16, 32), strict=True):
        assert cells.shape[-2:] == (-(-size[0] // stride), -(-size[1] // stride))
    assert [part.shape[1] for part in found.prefix] == [0] * 4
    close(model(x), model.head(found.maps[-1].mean((2, 3))))


@torch.no_grad()
def test_without_norm_a_map_is_what_the_norm_of_its_stage_takes() -> None:
    model, x = build(), torch.randn(2, 3, 64, 96)
    plain, normed = model.features(x, norm=False).maps, model.features(x).maps
    for stage, before, after in zip(model.stages, plain, normed, strict=True):
        close(stage.norm(before.permute(0, 2, 3, 1)).permute(0, 3, 1, 2), after)


@torch.no_grad()
def test_features_run_no_stage_beyond_the_last_that_is_named() -> None:
    model, runs = build(), []
    for number, stage in enumerate(model.stages):
        stage.register_forward_hook(lambda *_, number=number: runs.append(number))
    model.features(torch.randn(1, 3, 64, 64), indices=[1, 0])
    assert runs == [0, 1]


@torch.no_grad()
def test_the_convolution_of_the_mlp_sees_the_neighbours_of_a_cell() -> None:
    mlp = ConvMlp(4, 8)
    x = torch.randn(1, 25, 4)
    changed = x.clone()
    changed[:, 12] += 1  # the middle of 5 x 5
    moved = (mlp(changed, (5, 5)) - mlp(x, (5, 5))).abs().amax((0, 2)) > 1e-7
    assert moved.nonzero().flatten().tolist() == [6, 7, 8, 11, 12, 13, 16, 17, 18]


@torch.no_grad()
def test_the_linear_variant_has_a_relu_before_its_convolution() -> None:
    mlp = ConvMlp(4, 8, relu=True)
    nn.init.zeros_(mlp.fc1.weight)
    nn.init.constant_(mlp.fc1.bias, -1.0)
    nn.init.zeros_(mlp.dwconv.bias)
    assert torch.equal(mlp(torch.randn(1, 9, 4), (3, 3)), mlp.fc2.bias.expand(1, 9, 4))
    assert [isinstance(build(linear=kind).stages[0].blocks[0].mlp.relu, nn.ReLU) for kind in (False, True)] == [
        False,
        True,
    ]


@torch.no_grad()
def test_the_mlp_goes_through_some_images_at_a_time_with_their_padding(monkeypatch: pytest.MonkeyPatch) -> None:
    mlp, counts = ConvMlp(4, 8).eval(), []
    x, padding = torch.randn(5, 25, 4), torch.rand(5, 25) < 0.3
    whole = mlp(x, (5, 5), padding)
    real = ConvMlp._forward

    def spy(self: ConvMlp, grid: tuple[int, int], x: Tensor, padding: Tensor | None) -> Tensor:
        counts.append(len(x))
        return real(self, grid, x, padding)

    monkeypatch.setattr(ConvMlp, "_forward", spy)
    monkeypatch.setattr(parts, "TOKENS", 1)
    monkeypatch.setattr(parts, "WIDE", 2 * 25 * 8)
    close(mlp(x, (5, 5), padding), whole)
    assert counts == [2, 2, 1]


# ---- padded pixels


@torch.no_grad()
def test_a_padded_batch_answers_as_each_image_alone() -> None:
    """Zeros to every convolution, no keys, not pooled: an image in a canvas is the image, whether its size divides."""
    model = build()
    images = [torch.randn(3, 64, 96), torch.randn(3, 45, 61), torch.randn(3, 70, 33)]
    canvas, mask = torch.randn(3, 3, 75, 110), torch.ones(3, 75, 110, dtype=torch.bool)
    for i, image in enumerate(images):
        canvas[i, :, : image.shape[1], : image.shape[2]] = image
        mask[i, : image.shape[1], : image.shape[2]] = False
    together, stages = model(canvas, mask), model.features(canvas, mask=mask).maps
    for i, image in enumerate(images):
        close(together[i], model(image[None])[0])
        for cells, lone in zip(stages, model.features(image[None]).maps, strict=True):
            close(cells[i, :, : lone.shape[2], : lone.shape[3]], lone[0])
    assert not torch.allclose(model(canvas), together, atol=0.01)


@pytest.mark.parametrize("linear", [False, True])
@torch.no_grad()
def test_padded_pixels_are_seen_by_none_and_all_padding_is_finite(linear: bool) -> None:
    model, x, mask = build(linear=linear), torch.randn(3, 3, 64, 64), torch.zeros(3, 64, 64, dtype=torch.bool)
    mask[0, :, 20:] = mask[1] = True
    other = x.masked_fill(mask[:, None], 9.0)
    logits = model(x, mask)
    close(model(other, mask), logits)
    close(logits[2:], model(x[2:]))
    assert logits.isfinite().all()


# ---- first weights, care and words


def test_first_weights_follow_the_authors_laws() -> None:
    model = PyramidVisionTransformerV2(VARIANTS["pvt_v2_b0"])
    for name, part in model.named_modules():
        if isinstance(part, nn.Conv2d):
            fan_out = part.kernel_size[0] ** 2 * (1 if part.groups > 1 else part.out_channels)
            assert part.weight.std().item() == pytest.approx((2 / fan_out) ** 0.5, rel=0.08), name
            assert not part.bias.any()
        elif isinstance(part, Linear):
            assert part.weight.std().item() == pytest.approx(0.02, rel=0.05) and not part.bias.any(), name


def test_layer_groups_keep_a_stage_with_its_blocks() -> None:
    groups = build().layer_groups()
    assert len(groups) == 7  # patches, five blocks, head
    assert all(name.startswith("patch_embed.") for name in groups[0])
    assert "stages.1.downsample.proj.weight" in groups[2] and "stages.1.blocks.0.attn.q.weight" in groups[2]
    assert {name.rpartition(".")[0].partition(".")[2] for name in groups[3]} >= {"1.blocks.1.attn.q", "1.norm"}
    assert all(name.startswith(("stages.1.blocks.1.", "stages.1.norm.")) for name in groups[3])
    assert groups[6] == ["stages.3.norm.weight", "stages.3.norm.bias", "head.weight", "head.bias"]


def test_checkpointing_runs_every_block_again() -> None:
    model, runs = build(), []
    model.set_grad_checkpointing()
    for stage in model.stages:
        for block in stage.blocks:
            block.mlp.register_forward_pre_hook(lambda *_: runs.append(1))
    model(torch.randn(1, 3, 64, 64)).sum().backward()
    assert len(runs) == 10


@pytest.mark.parametrize(
    ("given", "words"),
    [
        (dict(embed_dims=(8, 16)), r"for each of the 4 stages of depths \(1, 2, 1, 1\); got \(8, 16\)"),
        (dict(img_size=28), r"img_size must be at least 29; got \(28, 28\)"),
        (dict(patch_size=4), "patch_size must be odd and larger than stride 4; got 4: use 5 or more"),
        (dict(patch_size=3, stride=3), "patch_size must be odd and larger than stride 3; got 3: use 5 or more"),
        (dict(sr_ratios=(8, 4, 0, 1)), r"sr_ratios must be at least 1; got \(8, 4, 0, 1\)"),
        (
            dict(mlp_ratios=(4, 4, 2, 0.01)),
            r"mlp_ratios must leave a hidden width of at least 1; got \(4, 4, 2, 0.01\): the usual is 4",
        ),
        (dict(num_heads=(1, 2, 5, 4)), "embed_dim 24 is not divisible by num_heads 5"),
        (dict(attn_drop_rate=-0.1), r"attn_drop_rate must lie in \[0, 1\); got -0.1"),
        (dict(norm_eps=1.0), r"norm_eps must lie in \(0, 1\); got 1.0"),
    ],
)
def test_wrong_values_say_the_rule_and_the_mend(given: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        build(**given)


@torch.no_grad()
def test_images_too_small_for_a_window_are_named_and_those_at_the_limit_are_not() -> None:
    model = build(img_size=29)
    assert model(torch.zeros(1, 3, 29, 29)).shape == (1, 7)
    with pytest.raises(ValueError, match="sr_ratio 8 needs at least 8 x 8 cells; got a grid of 7 x 8"):
        model(torch.zeros(1, 3, 28, 29))
    assert build(img_size=8, linear=True)(torch.zeros(1, 3, 8, 5)).shape == (1, 7)


def test_a_mask_of_another_shape_is_refused() -> None:
    with pytest.raises(ValueError, match=r"mask must be \(B, H, W\) like the images, \(2, 64, 64\); got \(2, 4, 4\)"):
        build()(torch.zeros(2, 3, 64, 64), torch.zeros(2, 4, 4, dtype=torch.bool))


def test_other_libraries_words_are_taken() -> None:
    config = PVTV2Config(hidden_sizes=[8, 16, 24, 32], num_attention_heads=[1, 2, 3, 4], linear_attention=True)
    assert (config.embed_dims, config.num_heads, config.linear) == ((8, 16, 24, 32), (1, 2, 3, 4), True)
