"""What is a Vision Transformer's own: tokens kept, padded and prompted, positions, pooling, and its words."""

from __future__ import annotations

import copy
import pickle
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from vitrail.layers.embed import sincos_2d
from vitrail.models.backbone import Tokens
from vitrail.models.vit import VisionTransformer
from vitrail.models.vit_config import ViTConfig
from vitrail.weights.load import load_model

SMALL: dict[str, Any] = dict(img_size=32, patch_size=8, embed_dim=24, depth=3, num_heads=3, num_classes=7)
POOLS: dict[str, dict[str, Any]] = {
    "token": {},
    "avg": dict(global_pool="avg"),
    "avg without a class token": dict(global_pool="avg", class_token=False),
    "map": dict(global_pool="map"),
    "map with registers": dict(global_pool="map", reg_tokens=2, no_embed_class=True),
}


def build(**options: Any) -> VisionTransformer:
    """A small model with every parameter random: fresh ones hide mistakes behind zeros and ones."""
    model = VisionTransformer(**{**SMALL, **options}).eval()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            centre = 1 if parameter.ndim == 1 and name.endswith("weight") else 0  # norms pass their input on
            parameter.copy_(centre + torch.randn(parameter.shape, generator=generator) * 0.3)
    return model


def pick(tokens: Tensor, keep: Tensor) -> Tensor:
    return torch.stack([row[index] for row, index in zip(tokens, keep, strict=True)])


def close(ours: Tensor, theirs: Tensor) -> None:
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5 * max(1.0, theirs.abs().max().item()))


# ---- keeping tokens


@torch.no_grad()
@pytest.mark.parametrize("options", [{}, dict(reg_tokens=2), dict(reg_tokens=2, no_embed_class=True)])
def test_keeping_tokens_is_hiding_the_others(options: dict[str, Any]) -> None:
    model, x = build(**options), torch.randn(2, 3, 32, 32)
    tokens = model.embed(x)
    keep = torch.tensor([[5, 0, 15, 7], [1, 2, 3, 11]])
    bias = torch.zeros(2, 1, 1, tokens.prefix + 16)
    for sample in range(2):
        dropped = [i for i in range(16) if i not in keep[sample].tolist()]
        bias[sample, ..., [tokens.prefix + i for i in dropped]] = float("-inf")
    state = tokens.x + tokens.pos
    for block in model.blocks:
        state = block(state, bias=bias)
    state = model.norm(state)
    after = model.encode(tokens, keep)
    kept = after.x
    assert after.pos is None and torch.equal(after.cells, keep)
    assert kept.shape == (2, tokens.prefix + 4, 24)
    close(kept[:, : tokens.prefix], state[:, : tokens.prefix])
    close(kept[:, tokens.prefix :], pick(state[:, tokens.prefix :], keep))


@torch.no_grad()
def test_keeping_all_in_order_changes_nothing_and_a_permutation_only_the_order() -> None:
    model, x = build(reg_tokens=1), torch.randn(2, 3, 32, 32)
    tokens = model.embed(x)
    plain = model.encode(tokens).x
    assert torch.equal(model.encode(tokens, torch.arange(16).expand(2, 16)).x, plain)
    order = torch.stack([torch.randperm(16), torch.randperm(16)])
    shuffled = model.encode(tokens, order).x
    close(shuffled[:, 2:], pick(plain[:, 2:], order))
    close(shuffled[:, :2], plain[:, :2])


def test_dropped_tokens_get_no_gradient() -> None:
    model, x = build(), torch.randn(1, 3, 32, 32, requires_grad=True)
    model.forward_head(model.encode(model.embed(x), torch.tensor([[0, 5]]))).sum().backward()
    touched = x.grad.abs().amax(1)[0].unfold(0, 8, 8).unfold(1, 8, 8).amax((2, 3)).flatten().nonzero().flatten()
    assert touched.tolist() == [0, 5]


@torch.no_grad()
def test_keep_chooses_among_padded_tokens_too() -> None:
    model, x = build(), torch.randn(1, 3, 32, 32)
    mask = torch.zeros(1, 32, 32, dtype=torch.bool)
    mask[:, :, 8:] = True  # column 0 is seen: tokens 0, 4, 8, 12
    both = model.encode(model.embed(x, mask), torch.tensor([[4, 9, 0]])).x
    alone = model.encode(model.embed(x), torch.tensor([[4, 0]])).x
    close(both[:, [0, 1, 3]], alone)


# ---- padded pixels


@torch.no_grad()
@pytest.mark.parametrize("case", POOLS)
def test_a_padded_batch_answers_as_each_image_alone(case: str) -> None:
    """Without positions, an image in the corner of a larger canvas is the same set of tokens."""
    model = build(**POOLS[case], pos_embed="none")
    images = [torch.randn(3, 24, 40), torch.randn(3, 48, 32)]
    canvas, mask = torch.randn(2, 3, 48, 56), torch.ones(2, 48, 56, dtype=torch.bool)
    for i, image in enumerate(images):
        canvas[i, :, : image.shape[1], : image.shape[2]] = image
        mask[i, : image.shape[1], : image.shape[2]] = False
    together = model(canvas, mask)
    for logits, image in zip(together, images, strict=True):
        close(logits, model(image[None])[0])
    assert not torch.allclose(model(canvas), together, atol=0.1)


@torch.no_grad()
@pytest.mark.parametrize("pos_embed", ["learn", "sincos"])
@pytest.mark.parametrize("case", POOLS)
def test_padded_tokens_are_as_if_dropped(case: str, pos_embed: str) -> None:
    model, x = build(**POOLS[case], pos_embed=pos_embed), torch.randn(1, 3, 32, 32)
    mask = torch.zeros(1, 32, 32, dtype=torch.bool)
    mask[:, 16:] = mask[:, :, 24:] = True
    seen = torch.tensor([[0, 1, 2, 4, 5, 6]])
    close(model(x, mask), model.forward_head(model.encode(model.embed(x), seen)))


@torch.no_grad()
def test_a_mask_that_hides_nothing_changes_nothing() -> None:
    model, x = build(global_pool="avg"), torch.randn(2, 3, 32, 32)
    close(model(x, torch.zeros(2, 32, 32, dtype=torch.bool)), model(x))


def test_a_mask_of_another_shape_is_refused() -> None:
    with pytest.raises(ValueError, match=r"mask must be \(B, H, W\) like the images, \(2, 32, 32\); got \(2, 4, 4\)"):
        build()(torch.zeros(2, 3, 32, 32), torch.zeros(2, 4, 4, dtype=torch.bool))


# ---- prefix tokens


@torch.no_grad()
def test_prompts_without_positions_are_registers() -> None:
    """VPT-shallow: prompts put behind the class token, with positions of zero, are `reg_tokens`."""
    registers, plain = build(reg_tokens=4, no_embed_class=True), build(no_embed_class=True)
    state = registers.state_dict()
    prompts = state.pop("reg_token")
    plain.load_state_dict(state)
    x = torch.randn(2, 3, 32, 32)
    tokens = plain.embed(x)
    prompted = Tokens(
        torch.cat([tokens.x[:, :1], prompts.expand(2, -1, -1), tokens.x[:, 1:]], dim=1),
        torch.cat([tokens.pos[:, :1], torch.zeros(1, 4, 24), tokens.pos[:, 1:]], dim=1),
        tokens.grid,
        prefix=5,
    )
    close(plain.forward_head(plain.encode(prompted)), registers(x))


@torch.no_grad()
@pytest.mark.parametrize("bare", [True, False])
def test_rows_are_class_registers_patches(bare: bool) -> None:
    model, x = build(reg_tokens=2, no_embed_class=bare), torch.randn(2, 3, 32, 40)
    tokens = model.embed(x)
    assert (tokens.grid, tokens.prefix, model.num_prefix_tokens) == ((4, 5), 3, 3)
    assert torch.equal(tokens.x[:, :1], model.cls_token.expand(2, -1, -1))
    assert torch.equal(tokens.x[:, 1:3], model.reg_token.expand(2, -1, -1))
    assert torch.equal(tokens.x[:, 3:], model.patch_embed(x))
    assert tokens.pos.shape == (1, 23, 24)
    assert bool((tokens.pos[:, :3] == 0).all()) == bare
    assert model.pos_embed.shape == (1, 16 + (0 if bare else 3), 24)


@torch.no_grad()
def test_features_are_the_states_after_each_block() -> None:
    model, x = build(reg_tokens=1), torch.randn(2, 3, 32, 40)
    tokens = model.embed(x)
    state, states = tokens.x + tokens.pos, []
    for block in model.blocks:
        state = block(state)
        states.append(state)
    found = model.features(x, indices=[2, 0, -3], norm=False)
    for i, (cells, prefix) in enumerate(zip(found.maps, found.prefix, strict=True)):
        truth = states[[2, 0, 0][i]]
        assert torch.equal(prefix, truth[:, :2])
        assert torch.equal(cells[:, :, 1, 3], truth[:, 2 + 5 + 3])
    assert torch.equal(model.features(x, indices=1).prefix[0], model.norm(state)[:, :2])


@pytest.mark.parametrize("number", [0, 4, -1])
def test_features_as_a_number_asks_for_the_last_so_many(number: int) -> None:
    with pytest.raises(ValueError, match=rf"the last so many features, 1 … 3; got {number}"):
        build().features(torch.zeros(1, 3, 32, 32), indices=number)


# ---- positions


@torch.no_grad()
def test_sincos_positions_at_the_configured_grid_are_the_formula() -> None:
    model = VisionTransformer(**SMALL, pos_embed="sincos", class_token=False, global_pool="avg")
    assert torch.equal(model.positions((4, 4)), sincos_2d((4, 4), 24))


@torch.no_grad()
def test_without_positions_patches_may_be_shuffled() -> None:
    model, x = build(pos_embed="none"), torch.randn(1, 3, 32, 32)
    assert model.positions((4, 4)) is None
    close(model(x.roll(8, dims=3)), model(x))
    learned = build()
    assert not torch.allclose(learned(x.roll(8, dims=3)), learned(x), atol=0.1)


# ---- pooling and heads


@torch.no_grad()
def test_pooling_leaves_the_prefix_out() -> None:
    x = torch.randn(2, 19, 24)
    tokens = Tokens(x, None, (4, 4), prefix=3)  # a class token, and two rows that somebody added
    mean = build(global_pool="avg")
    close(mean.forward_head(tokens, pre_logits=True), mean.fc_norm(x[:, 3:].mean(1)))
    assert torch.equal(build().forward_head(tokens, pre_logits=True), x[:, 0])
    pooled = build(global_pool="map")
    assert torch.equal(pooled.forward_head(tokens, pre_logits=True), pooled.attn_pool(x[:, 3:]))


@torch.no_grad()
def test_blocks_run_in_parts_are_the_whole() -> None:
    model, tokens = build(reg_tokens=1, depth=3), build(reg_tokens=1, depth=3).embed(torch.randn(2, 3, 32, 32))
    keep = torch.tensor([[3, 1, 8, 0], [0, 2, 4, 6]])
    first = model.encode(tokens, keep, blocks=slice(2), norm=False)
    again = torch.tensor([[2, 0], [1, 3]])  # of those that are left
    whole = model.encode(model.encode(first, blocks=slice(2, None), norm=False), blocks=slice(0))
    assert torch.equal(whole.x, model.encode(tokens, keep).x)
    fewer = model.encode(first, again, blocks=slice(2, None))
    assert fewer.cells.tolist() == [[8, 3], [2, 6]]
    assert fewer.x.shape == (2, 2 + 2, 24)


@torch.no_grad()
def test_features_run_no_block_beyond_the_last_that_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    model, runs = build(depth=3), []
    for index, block in enumerate(model.blocks):
        block.register_forward_hook(lambda *_, index=index: runs.append(index))
    model.features(torch.randn(1, 3, 32, 32), indices=[1, 0])
    assert runs == [0, 1]


def test_a_head_put_in_by_hand_is_the_models_head(tmp_path: Path) -> None:
    model = build(num_classes=5)
    model.classes = tuple("abcde")
    model.head = nn.Linear(model.head.in_features, 3)
    assert model.num_classes == 3
    assert (model.card().config["num_classes"], model.card().classes) == (3, ())
    again = load_model(model.save_pretrained(tmp_path / "m"))
    assert torch.equal(again(x := torch.randn(1, 3, 32, 32)), model(x))


@pytest.mark.parametrize(
    ("given", "words"),
    [
        (dict(depth="12"), "depth must be int; got '12'"),
        (dict(depth=2.5), "depth must be int; got 2.5"),
        (dict(embed_dim=48.0), "embed_dim must be int; got 48.0"),
        (dict(mlp_ratio=float("nan")), "mlp_ratio must be float; got nan"),
        (dict(qkv_bias=1), "qkv_bias must be bool; got 1"),
        (dict(init_values="x"), "init_values must be None or float; got 'x'"),
    ],
)
def test_a_value_of_another_kind_is_named(given: dict[str, Any], words: str) -> None:
    with pytest.raises(TypeError, match=re.escape(words)):
        ViTConfig(**given)


@pytest.mark.parametrize("size", ["224", 224.0, (32,), (3, 224, 224), (32.0, 32)])
def test_a_size_is_one_or_two_whole_numbers(size: Any) -> None:
    with pytest.raises(ValueError, match=r"a size is one whole number of pixels, or \(height, width\); got"):
        ViTConfig(img_size=size)


def test_feature_info_of_rectangular_patches_has_both_strides() -> None:
    info = build(patch_size=(8, 4)).feature_info[0]
    assert (info.reduction, info.reduction_w) == (8, 4)


@pytest.mark.parametrize(
    ("options", "late"),
    [
        ({}, False),
        (dict(global_pool="avg"), True),
        (dict(global_pool="avg", fc_norm=False), False),
        (dict(fc_norm=True), True),
    ],
)
def test_the_norm_stands_before_or_after_pooling(options: dict[str, Any], late: bool) -> None:
    model = build(**options)
    assert isinstance(model.fc_norm, nn.LayerNorm) == late
    assert isinstance(model.norm, nn.Identity) == late


def test_dropout_after_positions_acts_in_training_alone() -> None:
    model, x, seen = build(pos_drop_rate=0.5), torch.randn(2, 3, 32, 32), []
    model.blocks[0].register_forward_pre_hook(lambda _, args: seen.append((args[0] == 0).float().mean().item()))
    model(x)
    model.train()(x)
    assert seen[0] == 0
    assert seen[1] == pytest.approx(0.5, abs=0.1)


@pytest.mark.parametrize("keep", [[[-1, 0]], [[0, 16]]])
def test_only_image_tokens_can_be_kept(keep: list[list[int]]) -> None:
    model = build()
    tokens = model.embed(torch.randn(1, 3, 32, 32))
    with pytest.raises(ValueError, match=r"keep must count image tokens, 0 … 15; got -?\d+ … \d+"):
        model.encode(tokens, torch.tensor(keep))


def test_dropouts_stand_where_they_are_named() -> None:
    rates = dict(drop_rate=0.1, pos_drop_rate=0.2, proj_drop_rate=0.3, attn_drop_rate=0.4, drop_path_rate=0.2)
    model = build(**rates)
    assert (model.head_drop.p, model.pos_drop.p, model.blocks[0].mlp.drop.p) == (0.1, 0.2, 0.3)
    assert model.blocks[2].attn.attn_drop == 0.4
    assert [getattr(b.drop_path1, "drop_prob", 0.0) for b in model.blocks] == pytest.approx([0, 0.1, 0.2])


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_a_new_head_is_of_the_models_dtype(dtype: torch.dtype) -> None:
    model = build().to(dtype)
    model.reset_classifier(3)
    assert model(torch.randn(1, 3, 32, 32, dtype=dtype)).dtype == dtype
    assert (model.head.bias == 0).all()


def test_a_head_replaced_by_hand_works() -> None:
    model = build()
    model.head = nn.Linear(model.head.in_features, 4)
    for part in (model.patch_embed, model.blocks):
        part.requires_grad_(False)
    model(x := torch.randn(2, 3, 32, 32)).sum().backward()
    assert model(x).shape == (2, 4)
    assert model.head.weight.grad is not None
    assert model.blocks[0].attn.qkv.weight.grad is None
    model.reset_classifier(5)
    assert model(x).shape == (2, 5)


@torch.no_grad()
def test_copies_and_pickles_answer_the_same() -> None:
    model, x = build(reg_tokens=1, pos_embed="sincos"), torch.randn(1, 3, 32, 32)
    model.classes, model.variant = ("a", "b"), "mine"
    for again in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(again(x), model(x))
        assert (again.config, again.classes, again.variant) == (model.config, ("a", "b"), "mine")
        assert again.head.weight.data_ptr() != model.head.weight.data_ptr()


# ---- configs


def test_configs_are_values() -> None:
    config = ViTConfig(img_size=32, dim=192)
    for again in (
        copy.deepcopy(config),
        pickle.loads(pickle.dumps(config)),
        ViTConfig(img_size=[32, 32], embed_dim=192),
    ):
        assert again == config
        assert hash(again) == hash(config)
    with pytest.raises(AttributeError):
        config.depth = 3
    with pytest.raises(TypeError):
        ViTConfig(32)


def test_a_model_takes_a_config_or_its_fields() -> None:
    assert VisionTransformer(ViTConfig(**SMALL)).config == VisionTransformer(**SMALL).config
    with pytest.raises(TypeError, match="give a ViTConfig or its fields, not both; got also depth, img_size"):
        VisionTransformer(ViTConfig(**SMALL), depth=3, img_size=32)


def test_preprocess_follows_the_config() -> None:
    model = build(img_size=(32, 48), in_chans=5)
    assert (model.preprocess.img_size, model.preprocess.in_chans) == ((32, 48), 5)


WRONG: list[tuple[dict[str, Any], str]] = [
    (dict(img_size=0), r"img_size must be at least 1; got \(0, 0\)"),
    (dict(img_size=(32, -8)), r"img_size must be at least 1; got \(32, -8\)"),
    (dict(patch_size=0), r"patch_size must be at least 1; got \(0, 0\)"),
    *[({name: 0}, f"{name} must be at least 1; got 0") for name in ("embed_dim", "depth", "num_heads", "in_chans")],
    *[({name: -1}, f"{name} must be at least 0; got -1") for name in ("num_classes", "reg_tokens")],
    (dict(embed_dim=0, mlp_dim=3), "embed_dim must be at least 1; got 0"),
    *[
        ({f"{name}_rate": rate}, rf"{name}_rate must lie in \[0, 1\); got {rate}")
        for name in ("drop", "pos_drop", "proj_drop", "attn_drop", "drop_path")
        for rate in (-0.1, 1.0)
    ],
    *[({"norm_eps": eps}, rf"norm_eps must lie in \(0, 1\); got {eps}") for eps in (-1.0, 0.0, 1.0)],
    (dict(mlp_ratio=0), "mlp_ratio must leave a hidden width of at least 1; got 0: the usual is 4"),
    (dict(class_token=False), "global_pool 'token' needs class_token=True; got False: use global_pool='avg' or 'map'"),
    (dict(global_pool="tokens"), "global_pool must be one of token, avg, map; got 'tokens': did you mean token"),
    (dict(pos_embed="sin"), "pos_embed must be one of learn, sincos, none; got 'sin': did you mean sincos"),
    (dict(embed="linera"), "embed must be one of conv, linear, overlap, stem; got 'linera': did you mean linear"),
    (dict(norm="layer_norm"), "norm must be one of layernorm, rmsnorm, batchnorm; got 'layer_norm': did you mean"),
    (dict(act="geluu"), "act must be one of gelu, gelu_tanh, quick_gelu, relu, silu; got 'geluu': did you mean gelu"),
    (dict(attn="flash"), "attn must be auto, fused or eager; got 'flash'"),
    (dict(img_size=225), "img_size 225 is not divisible by patch_size 8: use 224 or 232, or dynamic_pad=True"),
    (dict(num_heads=5), "embed_dim 24 is not divisible by num_heads 5: use 4 heads or a width of 25"),
    (dict(embed_dim=30, pos_embed="sincos"), "sin-cos positions need embed_dim divisible by 4; got 30: use 32"),
]  # fmt: skip


@pytest.mark.parametrize(("wrong", "message"), WRONG)
def test_wrong_values_say_the_rule_and_the_mend(wrong: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        VisionTransformer(**{**SMALL, **wrong})


def test_layer_scale_is_left_out_by_none_only() -> None:
    assert isinstance(build(init_values=None).blocks[0].ls1, nn.Identity)
    assert [build(init_values=value).blocks[0].ls2.init_values for value in (1e-5, 0.0)] == [1e-5, 0.0]
