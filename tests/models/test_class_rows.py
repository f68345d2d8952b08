"""The last block makes the class token alone: the same function, unless somebody looks at the rest."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from vitrail.explain.record import record_attention
from vitrail.layers.blocks import Block, Mlp
from vitrail.models.registry import build_model
from vitrail.models.vit import VisionTransformer

SMALL: dict[str, Any] = dict(img_size=16, patch_size=4, embed_dim=24, depth=3, num_heads=3, num_classes=5)
IMAGES = torch.randn(3, 3, 16, 16, generator=torch.Generator().manual_seed(0))


def build(**options: Any) -> VisionTransformer:
    torch.manual_seed(0)
    model = VisionTransformer(**{**SMALL, **options}).train()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


@pytest.fixture
def tokens(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many tokens each MLP was given, block by block."""
    counts: list[int] = []
    real = Mlp.forward

    def spy(self: Mlp, x: Tensor) -> Tensor:
        counts.append(x.shape[1])
        return real(self, x)

    monkeypatch.setattr(Mlp, "forward", spy)
    return counts


def answer(model: VisionTransformer, call: Callable[[VisionTransformer, Tensor], Tensor]) -> list[Tensor]:
    """Logits and all gradients, under one seed."""
    model.zero_grad()
    torch.manual_seed(1)
    logits = call(model, IMAGES.double())
    logits.square().sum().backward()
    return [logits, *(p.grad for p in model.parameters() if p.grad is not None)]


def spared(model: VisionTransformer, x: Tensor) -> Tensor:
    return model(x)


def whole(model: VisionTransformer, x: Tensor) -> Tensor:
    return model.forward_head(model.forward_features(x))


@pytest.mark.parametrize(
    "options",
    [
        {},
        dict(drop_path_rate=0.5),
        dict(reg_tokens=2, qk_norm=True, init_values=0.1),
        dict(fc_norm=True, norm="rmsnorm"),
        dict(attn="eager"),
        dict(drop_rate=0.5, pos_drop_rate=0.2),
    ],
)
@pytest.mark.parametrize("checkpointing", [False, True])
def test_logits_and_gradients_are_the_same(options: dict[str, Any], checkpointing: bool, tokens: list[int]) -> None:
    model = build(**options).double()
    model.set_grad_checkpointing(checkpointing)
    mine, theirs = answer(model, spared), answer(model, whole)
    assert len(mine) == len(theirs) == 1 + len(list(model.parameters()))
    for a, b in zip(mine, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)
    assert min(tokens) == 1


def test_padding_is_not_seen_by_the_class_token_either() -> None:
    model, mask = build().double(), torch.zeros(3, 16, 16, dtype=torch.bool)
    mask[:, :, 8:] = True
    full = model.forward_head(model.forward_features(IMAGES.double(), mask))
    torch.testing.assert_close(model(IMAGES.double(), mask), full, rtol=1e-10, atol=1e-12)


def test_each_head_is_told_as_forward_tells_them(tokens: list[int]) -> None:
    model = build()
    assert torch.equal(model.logits_by_head(IMAGES)[0], model(IMAGES))
    assert tokens == 2 * [17, 17, 1]


def ignored(*_: Any) -> None:
    return None


WATCHED: dict[str, Callable[[VisionTransformer], Any]] = {
    "a hook on the last block": lambda model: model.blocks[-1].register_forward_hook(ignored),
    "a hook inside it": lambda model: model.blocks[-1].mlp.act.register_forward_pre_hook(ignored),
    "a hook for gradients": lambda model: model.blocks[-1].norm2.register_full_backward_hook(ignored),
    "a hook on the norm": lambda model: model.norm.register_forward_hook(ignored),
    "a hook on everything": lambda model: nn.modules.module.register_module_forward_hook(ignored),
}


@pytest.mark.parametrize("who", WATCHED)
def test_who_watches_the_last_block_sees_all_tokens(who: str, tokens: list[int]) -> None:
    model = build()
    handle = WATCHED[who](model)
    model(IMAGES)
    handle.remove()
    assert tokens == [17, 17, 17]
    model(IMAGES)
    assert tokens[3:] == [17, 17, 1]


def test_a_hook_on_another_block_changes_nothing(tokens: list[int]) -> None:
    model = build()
    model.blocks[0].register_forward_hook(ignored)
    model(IMAGES)
    assert tokens == [17, 17, 1]


@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("attn", ["fused", "eager"])
def test_recorded_attention_has_all_rows_and_changes_nothing(grad: bool, attn: str, tokens: list[int]) -> None:
    """Queries are whole where they are announced."""
    model = build(attn=attn)
    plain = model(IMAGES)
    with record_attention(grad=grad) as record:
        recorded = model(IMAGES)
    assert torch.equal(plain, recorded) or grad
    torch.testing.assert_close(plain, recorded, atol=1e-6, rtol=0)
    assert tokens == 2 * [17, 17, 1]
    with record_attention(grad=grad) as whole:
        model.forward_features(IMAGES)
    assert [tuple(seen.weights.shape[-2:]) for seen in record.maps] == 3 * [(17, 17)]
    for mine, theirs in zip(record.maps, whole.maps, strict=True):
        torch.testing.assert_close(mine.weights, theirs.weights, atol=1e-6, rtol=0)


@pytest.mark.parametrize("drop", ["proj_drop_rate", "attn_drop_rate"])
def test_what_dropout_drops_does_not_depend_on_who_watches(drop: str, tokens: list[int]) -> None:
    model, seen = build(**{drop: 0.3}), []
    for watch in (False, True):
        handle = model.norm.register_forward_hook(ignored) if watch else None
        torch.manual_seed(5)
        seen.append(model(IMAGES))
        if handle is not None:
            handle.remove()
    assert torch.equal(*seen)
    assert set(tokens) == {17}
    model.eval()(IMAGES)
    assert tokens[-1] == 1


@pytest.mark.parametrize("pool", ["avg", "map"])
def test_where_more_is_read_all_tokens_are_made(pool: str, tokens: list[int]) -> None:
    build(global_pool=pool)(IMAGES)
    assert tokens[:3] == [17, 17, 17]


def test_features_have_all_tokens_and_evaluation_is_as_training(tokens: list[int]) -> None:
    model = build()
    assert model.forward_features(IMAGES).x.shape == (3, 17, 24)
    model.features(IMAGES)
    assert set(tokens) == {17}
    model.eval()(IMAGES)
    assert tokens[-3:] == [17, 17, 1]


class Scaled(VisionTransformer):
    def forward_features(self, images: Tensor, mask: Tensor | None = None) -> Any:
        tokens = super().forward_features(images, mask)
        return tokens._replace(x=100 * tokens.x)


class ReadsPatches(VisionTransformer):
    def forward_head(self, x: Any, pre_logits: bool = False) -> Tensor:
        return self.head(x.x[:, 1:].mean(1))


@pytest.mark.parametrize("family", [Scaled, ReadsPatches])
def test_a_model_made_of_ours_is_asked_as_a_whole(family: Any) -> None:
    model = family(**SMALL).eval()
    whole = model.forward_head(model.forward_features(IMAGES))
    assert torch.equal(model(IMAGES), whole)
    assert torch.equal(model.logits_by_head(IMAGES)[0], whole)


class OwnAttention(nn.Module):
    def __init__(self, attn: nn.Module) -> None:
        super().__init__()
        self.attn = attn

    def forward(self, x: Tensor, *, bias: Any = None, layout: Any = None) -> Tensor:
        return self.attn(x, bias=bias, layout=layout)


class OwnBlock(Block):
    def forward(self, x: Tensor, *, bias: Any = None, layout: Any = None) -> Tensor:
        return super().forward(x, bias=bias, layout=layout)


@pytest.mark.parametrize("row", ["hybrid_debug", "hybrid_cnn_debug", "beit_debug"])
def test_families_that_say_so_are_spared_too(row: str, tokens: list[int]) -> None:
    model = build_model(row, global_pool="token").eval()
    x = torch.randn(2, 3, *model.preprocess.img_size)
    spared_logits = model(x)
    torch.testing.assert_close(spared_logits, model.forward_head(model.forward_features(x)), atol=1e-5, rtol=0)
    depth = len(tokens) // 2
    assert tokens[depth - 1] == 1 and min(tokens[depth:]) > 1


@pytest.mark.parametrize("training", [False, True])
def test_attention_and_blocks_of_somebody_else_need_not_know_of_rows(training: bool, tokens: list[int]) -> None:
    model = build().train(training)
    plain = model(IMAGES)
    for block in model.blocks:
        block.attn = OwnAttention(block.attn)
    torch.testing.assert_close(model(IMAGES), plain, atol=1e-6, rtol=0)
    own = OwnBlock(24, 3)
    own.load_state_dict(build().blocks[-1].state_dict())
    model = build().train(training)
    model.blocks[-1] = own.train(training)
    torch.testing.assert_close(model(IMAGES), plain, atol=1e-6, rtol=0)
    assert set(tokens[3:]) == {17}


def test_a_block_of_somebody_else_need_not_know_of_it(tokens: list[int]) -> None:
    class Twice(nn.Module):
        def __init__(self, block: nn.Module) -> None:
            super().__init__()
            self.block = block

        def forward(self, x: Tensor, *, bias: Any = None, layout: Any = None) -> Tensor:
            return self.block(self.block(x, bias=bias, layout=layout), bias=bias, layout=layout)

    model = build()
    model.blocks[-1] = Twice(model.blocks[-1])
    model(IMAGES)
    assert tokens == [17, 17, 17, 17]
    model.blocks = nn.ModuleList()
    assert model(IMAGES).shape == (3, 5)
