"""What is CaiT's own: talking heads, LayerScale, a class token that comes at the end, padding, and its words."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from vitrail.explain.maps import attention_map, rollout_map
from vitrail.explain.record import record_attention
from vitrail.layers import blocks, talking
from vitrail.models.cait import VARIANTS, Block, CaiT, CaiTConfig, ClassAttention, TalkingHeads
from vitrail.models.registry import build_model

SMALL: dict[str, Any] = dict(img_size=32, patch_size=8, embed_dim=24, depth=3, num_heads=3, num_classes=7)


def build(**options: Any) -> CaiT:
    """A small model with every parameter random: fresh ones hide mistakes behind zeros and ones."""
    model = CaiT(**{**SMALL, **options}).eval()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            centre = 1 if parameter.ndim == 1 and name.endswith("weight") else 0  # norms pass their input on
            parameter.copy_(centre + torch.randn(parameter.shape, generator=generator) * 0.3)
    return model


def close(ours: Tensor, theirs: Tensor) -> None:
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5 * max(1.0, theirs.abs().max().item()))


# ---- blocks


@torch.no_grad()
def test_heads_that_say_nothing_new_make_a_plain_block_with_layer_scale() -> None:
    ours, plain = build().blocks[0], blocks.Block(24, 3, init_values=1.0).eval()
    for part in (ours.attn.proj_l, ours.attn.proj_w):
        part.weight.copy_(torch.eye(3))
    ours.attn.proj_w.bias.zero_()
    state = ours.state_dict()
    state |= {"ls1.gamma": state.pop("gamma_1"), "ls2.gamma": state.pop("gamma_2")}
    plain.load_state_dict(
        {name: value for name, value in state.items() if ".proj_l." not in name and ".proj_w." not in name}
    )
    close(ours(x := torch.randn(2, 5, 24)), plain(x))


def test_the_bias_that_the_softmax_removes_is_removed_and_has_a_gradient_of_zero() -> None:
    model, x = build(), torch.randn(2, 3, 32, 32)
    before = model(x)
    before.sum().backward()
    for block in model.blocks:
        assert torch.equal(block.attn.proj_l.bias.grad, torch.zeros(3))
        block.attn.proj_l.bias.data.add_(5)
    close(model(x), before)


@torch.no_grad()
def test_training_and_inference_are_one_function(monkeypatch: pytest.MonkeyPatch) -> None:
    """Maps written over each other, three images at a time, and maps that a gradient could follow."""
    monkeypatch.setattr(talking, "CACHED_SCORES", 3 * 3 * 16 * 16)
    model, x = build().double(), torch.randn(8, 3, 32, 32).double()
    with torch.enable_grad():
        followed = model(x)
    assert followed.requires_grad
    torch.testing.assert_close(model(x), followed, rtol=0, atol=1e-12)


# ---- the class token


@torch.no_grad()
def test_class_attention_leaves_image_tokens_as_they_are() -> None:
    model, x = build(), torch.randn(2, 3, 32, 40)
    tokens = model.embed(x)
    inner, whole = model.encode(tokens, norm=False), model.encode(tokens)
    assert (tokens.prefix, inner.prefix, whole.prefix) == (0, 0, 1)
    assert whole.x.shape == (2, 1 + 4 * 5, 24)
    assert torch.equal(whole.x[:, 1:], model.norm(inner.x))


@torch.no_grad()
def test_the_class_token_looks_at_itself_and_at_all_image_tokens() -> None:
    block = build().blocks_token_only[0]
    cls, tokens = torch.randn(2, 1, 24), torch.randn(2, 5, 24)
    seen = block.norm1(torch.cat([cls, tokens], 1))
    attn = block.attn
    q, k, v = (part(seen).view(2, 6, 3, 8).transpose(1, 2) for part in (attn.q, attn.k, attn.v))
    weights = (q[:, :, :1] @ k.transpose(2, 3) * 8**-0.5).softmax(-1)
    out = attn.proj((weights @ v).transpose(1, 2).flatten(2))
    x = cls + block.gamma_1 * out
    close(block(cls, tokens=tokens), x + block.gamma_2 * block.mlp(block.norm2(x)))


@torch.no_grad()
@pytest.mark.parametrize("pool", ["token", "avg"])
def test_pooling(pool: str) -> None:
    model, x = build(global_pool=pool), torch.randn(2, 3, 32, 32)
    tokens = model.forward_features(x)
    read = {"token": tokens.x[:, 0], "avg": tokens.x[:, 1:].mean(1)}[pool]
    close(model.forward_head(tokens, pre_logits=True), read)
    close(model(x), model.head(read))


@torch.no_grad()
def test_where_the_mean_is_read_no_class_attention_runs_unless_somebody_looks() -> None:
    model, x = build(global_pool="avg"), torch.randn(2, 3, 32, 32)
    whole = model.forward_head(model.forward_features(x))
    with record_attention() as record:
        logits = model(x)
    close(logits, whole)
    assert [tuple(seen.weights.shape[-2:]) for seen in record.maps] == [(16, 16)] * 3
    assert rollout_map(record.maps).shape == (2, 4, 4)
    ran: list[nn.Module] = []
    model.blocks_token_only[1].register_forward_hook(lambda module, *_: ran.append(module))
    close(model(x), whole)
    assert ran == [model.blocks_token_only[1]]


class ReadsClass(CaiT):
    def forward_head(self, x: Any, pre_logits: bool = False) -> Tensor:
        return self.head(x.x[:, 0])


@torch.no_grad()
def test_a_model_made_of_ours_is_asked_as_a_whole() -> None:
    model, x = ReadsClass(**SMALL, global_pool="avg").eval(), torch.randn(2, 3, 32, 32)
    assert torch.equal(model(x), model.head(model.forward_features(x).x[:, 0]))


# ---- recording


@torch.no_grad()
def test_maps_of_self_attention_and_of_class_attention() -> None:
    model, x = build(depth_token_only=2), torch.randn(2, 3, 32, 40)
    with record_attention() as record:
        model(x)
    assert [tuple(seen.weights.shape[-2:]) for seen in record.maps] == [(20, 20)] * 3 + [(1, 21)] * 2
    close(attention_map(record.maps[3]), record.maps[3].weights.mean(1)[:, 0, 1:].view(2, 4, 5))
    close(attention_map(record.maps[0]), record.maps[0].effective.mean((1, 2)).view(2, 4, 5))
    close(attention_map(record.maps[0], query=(1, 2)), record.maps[0].effective.mean(1)[:, 7].view(2, 4, 5))


@torch.no_grad()
def test_what_is_recorded_is_what_weighs_the_values() -> None:
    """Padding too: no weight on hidden keys, though every key gets the bias after the softmax."""
    model, x = build(), torch.randn(2, 3, 32, 32)
    mask = torch.zeros(2, 32, 32, dtype=torch.bool)
    mask[:, :, 16:] = True
    block, inputs, outputs = model.blocks[0].attn, [], []
    block.qkv.register_forward_hook(lambda *args: inputs.append(args[-1]))
    block.proj.register_forward_pre_hook(lambda _, args: outputs.append(args[0]))
    with record_attention() as record, record_attention(layers=[1], queries=[3]) as part:
        model(x, mask)
    values = inputs[0].view(2, 16, 3, 3, 8)[:, :, 2].transpose(1, 2)  # (B, A, N, D)
    acting = record.maps[0].acting
    close(outputs[0], (acting @ values).transpose(1, 2).flatten(2))
    hidden = acting.view(2, 3, 16, 4, 4)[..., 2:]
    assert (hidden == 0).all() and (acting != 0).any()
    close(part.maps[0].acting, acting[:, :, 3:4])


@torch.no_grad()
def test_rows_that_somebody_adds_are_seen_by_the_class_token_and_lie_nowhere() -> None:
    model, x = build(), torch.randn(2, 3, 32, 32)
    tokens, extra = model.embed(x), torch.randn(2, 2, 24)
    more = tokens._replace(x=torch.cat([extra, tokens.x], 1), pos=nn.functional.pad(tokens.pos, (0, 0, 2, 0)), prefix=2)
    with record_attention() as record:
        whole = model.encode(more)
    last = record.maps[-1]
    assert (whole.prefix, tuple(last.weights.shape)) == (3, (2, 3, 1, 3 + 16))
    close(attention_map(last), last.weights.mean(1)[:, 0, 3:].view(2, 4, 4))
    assert rollout_map(record.maps).shape == (2, 4, 4)


# ---- padded pixels


@torch.no_grad()
@pytest.mark.parametrize("pool", ["token", "avg"])
def test_padded_tokens_are_as_if_dropped(pool: str) -> None:
    model, x = build(global_pool=pool), torch.randn(1, 3, 32, 32)
    mask = torch.zeros(1, 32, 32, dtype=torch.bool)
    mask[:, 16:] = mask[:, :, 24:] = True
    seen = torch.tensor([[0, 1, 2, 4, 5, 6]])
    close(model(x, mask), model.forward_head(model.encode(model.embed(x), seen)))


@pytest.mark.parametrize("pool", ["token", "avg"])
def test_an_image_of_padding_alone_harms_nobody(pool: str) -> None:
    model = build(global_pool=pool)
    x = torch.randn(2, 3, 32, 32, requires_grad=True)
    mask = torch.zeros(2, 32, 32, dtype=torch.bool)
    mask[1] = True
    logits = model(x, mask)
    close(logits[:1], model(x[:1]))
    close(logits[1:], model(torch.randn(1, 3, 32, 32), mask[1:]))  # whatever stands there
    logits.sum().backward()
    assert x.grad.isfinite().all() and x.grad[0].any() and not x.grad[1].any()
    assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())


# ---- sizes


@torch.no_grad()
@pytest.mark.parametrize("size", [(32, 32), (96, 96), (224, 224), (256, 256), (224, 320), (16, 8)])
def test_any_size_that_divides(size: tuple[int, int]) -> None:
    model = build(patch_size=16 if min(size) > 32 else 8, depth=1)
    found = model.features(torch.randn(1, 3, *size))
    assert found.maps[0].shape[2:] == tuple(side // model.config.patch_size[0] for side in size)
    assert model(torch.randn(1, 3, *size)).isfinite().all()


@torch.no_grad()
def test_what_does_not_divide_is_named_or_padded_with_black() -> None:
    x = torch.randn(2, 3, 33, 50)
    with pytest.raises(ValueError, match="img_size 33 is not divisible by patch_size 8: use 32 or 40, or dynamic_pad"):
        build()(x)
    padded = nn.functional.pad(x, (0, 6, 0, 7))
    close(build(dynamic_pad=True)(x), build()(padded))


@torch.no_grad()
def test_a_rectangle_has_rectangular_patches_and_strides() -> None:
    model = build(img_size=(32, 48), patch_size=(8, 4))
    assert (model.feature_info[0].reduction, model.feature_info[0].reduction_w) == (8, 4)
    assert model.position_tables()["pos_embed"].grid == (4, 12)
    assert model.features(torch.zeros(1, 3, 24, 40)).maps[0].shape == (1, 24, 3, 10)


@torch.no_grad()
def test_features_are_the_states_after_each_block() -> None:
    model, x = build(), torch.randn(2, 3, 32, 40)
    tokens = model.embed(x)
    state, states = tokens.x + tokens.pos, []
    for block in model.blocks:
        state = block(state)
        states.append(state)
    found = model.features(x, indices=[2, 0, -3], norm=False)
    for cells, prefix, truth in zip(found.maps, found.prefix, (states[2], states[0], states[0]), strict=True):
        assert prefix.shape == (2, 0, 24)
        assert torch.equal(cells[:, :, 1, 3], truth[:, 5 + 3])
    last = model.features(x, indices=1).maps[0]
    close(last.flatten(2).transpose(1, 2), model.forward_features(x).x[:, 1:])


# ---- care


def test_first_weights() -> None:
    torch.manual_seed(0)
    model = CaiT(**{**SMALL, "embed_dim": 192, "num_classes": 200}, init_values=1e-5)
    for block in (*model.blocks, *model.blocks_token_only):
        assert (block.gamma_1 == 1e-5).all() and (block.gamma_2 == 1e-5).all()
    for weight in (model.blocks[1].attn.qkv.weight, model.blocks_token_only[0].attn.k.weight, model.pos_embed):
        assert weight.std().item() == pytest.approx(0.02, rel=0.05)
    assert model.cls_token.std().item() == pytest.approx(0.02, rel=0.25)
    assert model.patch_embed.proj.weight.std().item() == pytest.approx(192**-0.5, rel=0.05)
    assert not model.patch_embed.proj.bias.any() and not model.blocks[0].attn.proj_w.bias.any()


def test_groups_go_from_input_to_head_and_the_class_token_enters_late() -> None:
    groups = build(depth_token_only=2).layer_groups()
    assert len(groups) == 1 + 3 + 2 + 1
    assert groups[0] == ["pos_embed", "patch_embed.proj.weight", "patch_embed.proj.bias"]
    assert all(name.startswith("blocks.2.") for name in groups[3])
    assert {name.partition(".")[0] for name in groups[4]} == {"cls_token", "blocks_token_only"}
    assert all(name.startswith("blocks_token_only.1.") for name in groups[5])
    assert groups[6] == ["norm.weight", "norm.bias", "head.weight", "head.bias"]


def test_dropouts_stand_where_they_are_named() -> None:
    rates = dict(drop_rate=0.1, pos_drop_rate=0.2, proj_drop_rate=0.3, attn_drop_rate=0.4, drop_path_rate=0.25)
    model = build(**rates)
    assert (model.head_drop.p, model.pos_drop.p) == (0.1, 0.2)
    for block in model.blocks:
        assert (block.mlp.drop.p, block.attn.proj_drop.p, block.attn.attn_drop) == (0.3, 0.3, 0.4)
        assert block.drop_path.drop_prob == 0.25
    assert model.blocks_token_only[0].mlp.drop.p == 0
    assert not any(isinstance(part, blocks.DropPath) for part in model.blocks_token_only.modules())


def test_stochastic_depth_leaves_branches_out() -> None:
    torch.manual_seed(0)
    block = Block(CaiTConfig(**{**SMALL, "drop_path_rate": 0.5})).train()
    for parameter in block.parameters():
        nn.init.normal_(parameter, std=0.3)
    x = torch.randn(64, 5, 24)
    assert (block(x) == x).all(2).all(1).float().mean().item() == pytest.approx(0.25, abs=0.15)
    assert not (block.eval()(x) == x).all(2).all(1).any()


@pytest.mark.parametrize("checkpointing", [False, True])
def test_checkpointing_runs_every_block_again_in_the_backward_pass(checkpointing: bool) -> None:
    model, runs = build().train(), []
    model.set_grad_checkpointing(checkpointing)
    for block in (*model.blocks, *model.blocks_token_only):
        block.norm2.register_forward_hook(lambda module, *_: runs.append(module))
    logits = model(torch.randn(2, 3, 32, 32))
    assert len(runs) == 5
    logits.sum().backward()
    assert len(runs) == (10 if checkpointing else 5)


def test_dropped_weights_are_those_after_the_mix() -> None:
    heads = TalkingHeads(24, 3, attn_drop=0.5)
    x = torch.randn(2, 7, 24)
    assert not torch.allclose(heads.train()(x), heads(x))
    assert torch.equal(heads.eval()(x), heads(x))


def test_the_small_row_and_short_names() -> None:
    with torch.device("meta"):
        assert build_model("cait_xxs").variant == "cait_xxs_patch4_32"
        assert build_model("cait_s24", img_size=384).variant == "cait_s24_384"
        assert build_model("cait_xxs24", heads=8, dim=48).config.num_heads == 8
    assert all(row.embed_dim // row.num_heads == 48 for name, row in VARIANTS.items() if name != "cait_debug")


WRONG: list[tuple[dict[str, Any], str]] = [
    (dict(img_size=0), r"img_size must be at least 1; got \(0, 0\)"),
    *[
        ({name: 0}, f"{name} must be at least 1; got 0")
        for name in ("embed_dim", "depth", "depth_token_only", "num_heads", "in_chans")
    ],
    (dict(num_classes=-1), "num_classes must be at least 0; got -1"),
    *[
        ({f"{name}_rate": 1.0}, rf"{name}_rate must lie in \[0, 1\); got 1.0")
        for name in ("drop", "pos_drop", "proj_drop", "attn_drop", "drop_path")
    ],
    (dict(mlp_ratio=0), "mlp_ratio must leave a hidden width of at least 1; got 0: the usual is 4"),
    (dict(mlp_ratio_token_only=0), "mlp_ratio_token_only must leave a hidden width of at least 1; got 0: the usual is"),
    (dict(global_pool="map"), "global_pool must be one of token, avg; got 'map'"),
    (dict(attn="flash"), "attn must be auto, fused or eager; got 'flash'"),
    (dict(img_size=225), "img_size 225 is not divisible by patch_size 8: use 224 or 232, or dynamic_pad=True"),
    (dict(num_heads=5), "embed_dim 24 is not divisible by num_heads 5: use 4 heads or a width of 25"),
]  # fmt: skip


@pytest.mark.parametrize(("wrong", "message"), WRONG)
def test_wrong_values_say_the_rule_and_the_mend(wrong: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        CaiT(**{**SMALL, **wrong})


def test_a_mask_of_another_shape_is_refused() -> None:
    with pytest.raises(ValueError, match=r"mask must be \(B, H, W\) like the images, \(2, 32, 32\); got \(2, 4, 4\)"):
        build()(torch.zeros(2, 3, 32, 32), torch.zeros(2, 4, 4, dtype=torch.bool))


def test_class_attention_names_a_width_that_does_not_divide_into_heads() -> None:
    with pytest.raises(ValueError, match="embed_dim 24 is not divisible by num_heads 5: use 4 heads or a width of 25"):
        ClassAttention(24, 5)
