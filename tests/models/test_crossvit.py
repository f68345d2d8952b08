"""CrossViT's own mathematics: who sees whom, at which size, what is recorded of it, and what its config refuses."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from vitrail.explain.choice import CannotExplainError
from vitrail.explain.maps import attention_map, rollout
from vitrail.explain.record import record_attention
from vitrail.models.crossvit import ALIASES, VARIANTS, CrossViT, CrossViTConfig
from vitrail.models.registry import build_model, resolve_name

# fmt: off
PUBLISHED = {
    "crossvit_tiny_240":      (  7_014_800,  1.563),
    "crossvit_small_240":     ( 26_856_272,  5.616),
    "crossvit_base_240":      (105_025_232, 21.191),
    "crossvit_9_240":         (  8_553_296,  1.841),
    "crossvit_15_240":        ( 27_528_464,  5.791),
    "crossvit_18_240":        ( 43_271_408,  9.031),
    "crossvit_9_dagger_240":  (  8_776_592,  1.979),
    "crossvit_15_dagger_240": ( 28_209_008,  6.112),
    "crossvit_18_dagger_240": ( 44_266_976,  9.473),
    "crossvit_15_dagger_408": ( 28_500_080, 21.399),
    "crossvit_18_dagger_408": ( 44_606_560, 32.409),
}
"""parameters of timm 1.0.31's model of this name; 10⁹ multiplications with additions, by torch's counter of its work"""
OURS = {"crossvit_debug": 51_652, "crossvit_tiny_patch4_32": 3_825_620}
# fmt: on
SMALL: dict[str, Any] = dict(
    img_size=32,
    img_scale=(1.0, 30 / 32),
    patch_size=(4, 5),
    embed_dim=(8, 12),
    depth=((1, 1), (1, 2)),
    num_heads=(2, 3),
    mlp_ratio=(2.0, 2.0),
    num_classes=5,
)  # fmt: skip


def build(**options: Any) -> CrossViT:
    """No weight near 0."""
    torch.manual_seed(0)
    model = CrossViT(**{**SMALL, **options}).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.3)
    return model


def images(height: int = 32, width: int = 32) -> Tensor:
    return torch.randn(2, 3, height, width, generator=torch.Generator().manual_seed(2))


# ---- rows


def test_every_row_has_its_count() -> None:
    assert list(VARIANTS) == ["crossvit_debug", *PUBLISHED, "crossvit_tiny_patch4_32"]


@pytest.mark.parametrize("row", VARIANTS)
def test_a_row_has_the_published_count(row: str) -> None:
    with torch.device("meta"):
        model = build_model(row)
    count = sum(p.numel() for p in model.parameters())
    assert count == (PUBLISHED[row][0] if row in PUBLISHED else OURS[row]) == formula(model.config)


def formula(c: CrossViTConfig) -> int:
    """Term by term, patches of one convolution aside from the three of `multi_conv`."""
    count = 0
    for b, (width, patch, scale) in enumerate(zip(c.embed_dim, c.patch_size, c.img_scale, strict=True)):
        grid = round(c.img_size[0] * scale / patch)
        other, hidden = c.embed_dim[1 - b], int(width * c.mlp_ratio[b])
        stem = (c.in_chans * patch**2 + 1) * width
        if c.multi_conv:
            stem = (c.in_chans * 49 + 1) * width // 4 + (9 * width // 4 + 1) * width // 2 + (9 * width // 2 + 1) * width
        block = (width + 1) * 4 * width + (width + 1) * hidden + (hidden + 1) * width + 4 * width
        changes = (
            2 * width + (width + 1) * other
        )  # norm and matrix: once for its own token, once for the guest's return
        fusion = 4 * (width + 1) * width + 2 * width
        count += stem + (2 + grid**2) * width + 2 * width + (width + 1) * c.num_classes
        count += sum(stage[b] for stage in c.depth) * block + len(c.depth) * (2 * changes + fusion)
    return count


@pytest.mark.parametrize("row", PUBLISHED)
def test_a_row_does_the_published_work(row: str) -> None:
    with torch.device("meta"):
        model = build_model(row, attn="eager").eval()
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            model(torch.empty(1, 3, *model.config.img_size))
    assert counter.get_total_flops() / 2e9 == pytest.approx(PUBLISHED[row][1], rel=0.01)


@pytest.mark.parametrize(("name", "row"), [*ALIASES.items(), ("crossvit_15_dagger", "crossvit_15_dagger_240")])
def test_the_authors_names_are_known(name: str, row: str) -> None:
    assert resolve_name(name) == row


def test_the_authors_have_eleven_names() -> None:
    assert len(ALIASES) == 11
    assert ALIASES["crossvit_18_dagger_384"] == "crossvit_18_dagger_408"
    assert resolve_name("crossvit_tiny", 32) == "crossvit_tiny_patch4_32"


# ---- config


def test_a_config_is_the_same_after_a_trip_through_json() -> None:
    for config in VARIANTS.values():
        assert CrossViTConfig(**json.loads(json.dumps(asdict(config)))) == config


WRONG = [
    (dict(embed_dim=192), "embed_dim must be two whole numbers, the small branch's and the large one's; got 192"),
    (dict(patch_size=(4, 5, 6)), r"patch_size must be two whole numbers.*got \(4, 5, 6\)"),
    (dict(num_heads=(2.0, 3)), "num_heads must be two whole numbers"),
    (dict(mlp_ratio=[4, 4, 1]), r"mlp_ratio must be two numbers.*got \[4, 4, 1\]"),
    (dict(img_scale=(1.0, float("nan"))), "img_scale must be two numbers"),
    (dict(img_scale=(1.0, 0.0)), r"img_scale must be above 0; got \(1.0, 0.0\)"),
    (dict(depth=[[1, 4, 0]]), r"a stage of depth must be two whole numbers.*got \[1, 4, 0\]"),
    (dict(depth=()), r"depth must be stages, such as \(\(1, 4\), .*got \(\)"),
    (dict(depth=12), "depth must be stages, such as .*got 12"),
    (dict(depth=((0, 1),)), r"depth must be at least 1; got \(\(0, 1\),\)"),
    (dict(embed_dim=(0, 8)), r"embed_dim must be at least 1; got \(0, 8\)"),
    (dict(mlp_ratio=(0.0, 1.0)), "mlp_ratio must leave a hidden width of at least 1"),
    (dict(global_pool="map"), "global_pool must be one of token, avg; got 'map'"),
    (dict(attn_drop_rate=1.0), r"attn_drop_rate must lie in \[0, 1\); got 1.0"),
    (dict(num_heads=(3, 3)), "embed_dim 8 is not divisible by num_heads 3"),
    (dict(multi_conv=True), "multi_conv cuts patches of 12 or 16 pixels.*patch_size 4"),
    (dict(img_size=33), "img_size 33 is not divisible by patch_size 4: use 32 or 36, or dynamic_pad=True"),
]


@pytest.mark.parametrize(("fields", "message"), WRONG)
def test_what_cannot_be_built_is_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        CrossViT(**{**SMALL, **fields})


# ---- who sees whom


@torch.no_grad()
def test_patches_of_one_branch_meet_those_of_the_other_through_class_tokens_alone() -> None:
    """One stage: patches know their own branch only, each class token both."""
    model = build(depth=((1, 2),))
    xs = [torch.randn(1, 1 + n, c) for n, c in ((64, 8), (36, 12))]
    sights = [model._sight(b, tokens) for b, tokens in enumerate(model._embed(images()[:1], None))]
    before = model.blocks[0](xs, sights)
    after = model.blocks[0]([xs[0], torch.randn_like(xs[1])], sights)
    assert torch.equal(before[0][:, 1:], after[0][:, 1:])
    assert not torch.allclose(before[0][:, 0], after[0][:, 0], atol=1e-3)
    assert not torch.allclose(before[1], after[1], atol=1e-3)


@torch.no_grad()
def test_without_what_comes_back_the_branches_are_two_vision_transformers() -> None:
    """The whole fusion passes through the linear layers that lead back: without them class tokens are those biases."""
    model = build(depth=((1, 1),))
    for change in model.blocks[0].revert_projs:
        nn.init.zeros_(change[2].weight)
    branches = model._embed(images(), None)
    xs, _ = model._through(branches)
    for b, tokens in enumerate(branches):
        alone = model.blocks[0].blocks[b][0](tokens.x)
        torch.testing.assert_close(xs[b][:, 1:], alone[:, 1:])
        torch.testing.assert_close(xs[b][:, 0], model.blocks[0].revert_projs[b][2].bias.expand(2, -1))


@torch.no_grad()
def test_mean_pooling_reads_the_patches() -> None:
    model = build(global_pool="avg")
    pooled = model.forward_head(model.forward_features(images()), pre_logits=True)
    means = [found.mean((2, 3)) for found in model.features(images(), indices=2).maps]
    torch.testing.assert_close(pooled, torch.cat(means, 1))


@torch.no_grad()
def test_both_heads_answer_and_the_mean_is_the_answer() -> None:
    model = build()
    small, large = model.logits_by_head(images())
    torch.testing.assert_close(model(images()), (small + large) / 2)
    assert not torch.allclose(small, large, atol=0.1)
    prefix = model.features(images(), indices=2).prefix
    torch.testing.assert_close(small, model.head[0](prefix[0][:, 0]))
    torch.testing.assert_close(large, model.head[1](prefix[1][:, 0]))


@torch.no_grad()
def test_features_run_no_stage_beyond_the_last_that_is_named() -> None:
    model, ran = build(), []
    for index, stage in enumerate(model.blocks):
        stage.register_forward_hook(lambda *_, index=index: ran.append(index))
    found = model.features(images(), indices=[1, 0])
    assert ran == [0]
    assert [tuple(m.shape[1:]) for m in found.maps] == [(12, 6, 6), (8, 8, 8)]


# ---- sizes


@pytest.mark.parametrize("size", [(32, 32), (28, 28), (96, 96), (224, 224), (224, 320)])
@torch.no_grad()
def test_any_size_that_divides_into_small_patches_is_taken(size: tuple[int, int]) -> None:
    model = build()
    assert model(images(*size)).shape == (2, 5)
    small, large = model.features(images(*size), indices=2).maps
    assert small.shape[-2:] == (size[0] // 4, size[1] // 4)
    assert large.shape[-2:] == tuple(round(side * 6 / 32) for side in size)


@pytest.mark.parametrize("size", [(33, 33), (35, 30), (5, 3)])
@torch.no_grad()
def test_what_does_not_divide_is_padded_on_request_and_refused_otherwise(size: tuple[int, int]) -> None:
    with pytest.raises(ValueError, match=rf"img_size {size[0]} is not divisible by patch_size 4.*dynamic_pad=True"):
        build()(images(*size))
    padding = build(dynamic_pad=True)
    assert padding(images(*size)).isfinite().all()
    assert padding.features(images(*size), indices=[0]).maps[0].shape[-2:] == (-(-size[0] // 4), -(-size[1] // 4))


@torch.no_grad()
def test_padded_pixels_are_unseen_where_patches_are_padded_and_images_resized() -> None:
    """At a size that no patch divides, and where padding cuts through patches of both branches."""
    for options in (dict(dynamic_pad=True), dict(dynamic_img_size=False), dict(crop_scale=True, dynamic_pad=True)):
        model = build(**options)
        mask = torch.zeros(2, 30, 39, dtype=torch.bool)
        mask[:, 19:], mask[..., 22:] = True, True
        one, other = (images(30, 39).masked_fill(mask[:, None], value) for value in (0.0, 50.0))
        torch.testing.assert_close(model(one, mask), model(other, mask))
        assert not torch.allclose(model(one), model(one, mask), atol=1e-3)


@torch.no_grad()
def test_an_image_that_is_all_padding_has_logits() -> None:
    logits = build()(images(), torch.ones(2, 32, 32, dtype=torch.bool))
    assert logits.isfinite().all()


def test_a_mask_of_another_shape_is_refused() -> None:
    with pytest.raises(ValueError, match=r"mask must be \(B, H, W\) like the images, \(2, 32, 32\); got \(2, 16, 16\)"):
        build()(images(), torch.zeros(2, 16, 16, dtype=torch.bool))


# ---- what is recorded


@torch.no_grad()
def test_every_layer_says_whose_patches_it_looks_at() -> None:
    """Stage by stage: the small branch, the large one, the small class token at large patches, and the reverse."""
    with record_attention() as record:
        build()(images())
    told = [(seen.layout.branch, seen.layout.grid, tuple(seen.weights.shape[1:])) for seen in record.maps]
    small, large = (0, (8, 8), (2, 65, 65)), (1, (6, 6), (3, 37, 37))
    fusion = [(1, (6, 6), (3, 1, 37)), (0, (8, 8), (2, 1, 65))]
    assert told == [small, large, *fusion, small, large, large, *fusion]


@torch.no_grad()
def test_cross_attention_is_recorded_as_it_acts_and_lies_on_the_other_branch() -> None:
    model, inputs = build(), []
    cross = model.blocks[0].fusion[0].attn
    cross.register_forward_pre_hook(lambda _, args: inputs.append(args[0]))
    with record_attention() as record:
        model(images())
    x = inputs[0].double()
    q, k = (part.double()(x).unflatten(-1, (3, -1)).transpose(1, 2) for part in (cross.wq, cross.wk))
    expected = (q[:, :, :1] @ k.transpose(-2, -1) / 2).softmax(-1)  # heads of width 4
    torch.testing.assert_close(record.maps[2].weights.double(), expected, atol=1e-6, rtol=0)
    heat = attention_map(record.maps[2])
    torch.testing.assert_close(heat.double(), expected[:, :, 0, 1:].mean(1).view(2, 6, 6), atol=1e-6, rtol=0)


@torch.no_grad()
def test_padding_is_on_no_map_of_either_branch() -> None:
    mask = torch.zeros(2, 32, 32, dtype=torch.bool)
    mask[..., 16:] = True
    with record_attention(queries="class") as record:
        build()(images(), mask)
    for seen in record.maps:
        heat = attention_map(seen)
        assert (seen.layout.key_index == -1).sum() >= 2 * heat.shape[-2] * (heat.shape[-1] // 2)
        assert heat[..., 0].all() and not heat[..., -(heat.shape[-1] // 2) :].any()


@torch.no_grad()
def test_rollout_is_not_taken_from_one_branch_to_the_other() -> None:
    """Even where both have as many tokens."""
    with record_attention() as record:
        build(patch_size=(4, 4), img_scale=(1.0, 1.0), depth=((2, 1),))(images())
    assert rollout(record.maps[:2]).shape == (2, 65, 65)
    with pytest.raises(CannotExplainError, match="layer 3 belongs to another branch of the network than layer 2"):
        rollout(record.maps[:3])


# ---- first weights


def test_init_weights_follows_the_authors_laws() -> None:
    torch.manual_seed(0)
    model = CrossViT(VARIANTS["crossvit_9_dagger_240"])
    for name, parameter in model.named_parameters():
        if name.startswith("patch_embed"):
            fan_in = model.get_submodule(name.rpartition(".")[0]).weight[0].numel()
            assert parameter.abs().max() <= fan_in**-0.5 * (1 + 1e-6)
            assert parameter.abs().max() > 0.9 * fan_in**-0.5
        elif parameter.ndim > 1:
            assert abs(parameter.std() / 0.02 - 1) < 4 / parameter.numel() ** 0.5, name
        else:
            assert (parameter == float("norm" in name or ".0.weight" in name) * ("bias" not in name)).all(), name
