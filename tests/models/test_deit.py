"""What is DeiT's own: a second token and head, what is read of them, and what a table of counts says."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from vitrail.explain.maps import attention_map
from vitrail.explain.record import record_attention
from vitrail.layers.blocks import Mlp
from vitrail.models.deit import VARIANTS, DeiT, DeiTConfig
from vitrail.models.vit import VisionTransformer

SMALL: dict[str, Any] = dict(img_size=16, patch_size=4, embed_dim=24, depth=3, num_heads=3, num_classes=5)
IMAGES = torch.randn(3, 3, 16, 16, generator=torch.Generator().manual_seed(0))
# fmt: off
PUBLISHED = {  # timm 1.0.31: parameters; torch's FlopCounter / 2 of its models with attention unfused: G of MACs
    "deit_tiny_patch16_224":            ( 5_717_416,  1.254),
    "deit_small_patch16_224":           (22_050_664,  4.599),
    "deit_base_patch16_224":            (86_567_656, 17.564),
    "deit_base_patch16_384":            (86_859_496, 55.484),
    "deit_tiny_distilled_patch16_224":  ( 5_910_800,  1.261),
    "deit_small_distilled_patch16_224": (22_436_432,  4.624),
    "deit_base_distilled_patch16_224":  (87_338_192, 17.657),
    "deit_base_distilled_patch16_384":  (87_630_032, 55.591),
}
# fmt: on


def build(**options: Any) -> DeiT:
    torch.manual_seed(0)
    model = DeiT(**{**SMALL, **options}).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


@torch.no_grad()
def test_each_head_reads_its_own_token_and_forward_takes_their_mean() -> None:
    model = build()
    x = model.forward_features(IMAGES).x
    assert x.shape == (3, 2 + 16, 24)
    expected = model.head(x[:, 0]), model.head_dist(x[:, 1])
    for mine, theirs in zip(model.logits_by_head(IMAGES), expected, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=0, atol=1e-5)
    torch.testing.assert_close(model(IMAGES), (expected[0] + expected[1]) / 2, rtol=0, atol=1e-5)
    pooled = model.forward_head(model.forward_features(IMAGES), pre_logits=True)
    torch.testing.assert_close(pooled, (x[:, 0] + x[:, 1]) / 2)


@torch.no_grad()
def test_training_answers_as_evaluation_does() -> None:
    model = build()
    assert torch.equal(model.train()(IMAGES), model.eval()(IMAGES))


@torch.no_grad()
def test_without_distillation_it_is_a_vision_transformer() -> None:
    model = build(distilled=False)
    plain = VisionTransformer(**SMALL).eval()
    plain.load_state_dict(model.state_dict(), strict=True)
    assert torch.equal(model(IMAGES), plain(IMAGES)) and len(model.logits_by_head(IMAGES)) == 1
    assert build(distilled=False, global_pool="avg")(IMAGES).shape == (3, 5)


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


@pytest.mark.parametrize(("distilled", "read"), [(True, 2), (False, 1)])
def test_the_last_block_makes_only_the_tokens_that_are_read(distilled: bool, read: int, tokens: list[int]) -> None:
    model = build(distilled=distilled).double()
    mine = model(IMAGES.double())
    assert tokens[-1] == read and tokens[0] == 16 + read
    theirs = model.forward_head(model.forward_features(IMAGES.double()))
    torch.testing.assert_close(mine, theirs, rtol=1e-10, atol=1e-12)


def test_a_model_made_of_it_is_asked_as_a_whole(tokens: list[int]) -> None:
    class Own(DeiT):
        pass

    Own(**SMALL)(IMAGES)
    assert tokens == [18, 18, 18]


@torch.no_grad()
def test_the_map_of_the_class_query_is_the_mean_of_both_tokens() -> None:
    with record_attention() as record:
        build()(IMAGES)
    seen = record.maps[-1]
    assert seen.layout.readout == (0, 1)
    expected = seen.weights[:, :, :2, 2:].mean((1, 2)).view(3, 4, 4)
    torch.testing.assert_close(attention_map(seen), expected, rtol=0, atol=1e-6)


def test_a_new_classifier_is_two_new_heads() -> None:
    model = build()
    before = model.head_dist
    model.reset_classifier(7)
    assert model.head_dist is not before and model.head_dist.out_features == model.head.out_features == 7
    model.reset_classifier(0)
    assert isinstance(model.head_dist, nn.Identity) and model(IMAGES).shape == (3, 24)


def test_the_distillation_token_begins_as_the_authors_draw_it() -> None:
    token = DeiT(embed_dim=768, depth=1, img_size=32).dist_token
    assert token.std().item() == pytest.approx(0.02, rel=0.1) and token.abs().max() < 0.05


@torch.no_grad()
def test_heads_that_differ_have_no_mean() -> None:
    model = DeiT(img_size=32, patch_size=8, embed_dim=24, depth=1, num_heads=3, num_classes=10)
    model.head = nn.Linear(24, 5)
    with pytest.raises(
        ValueError, match=r"as many logits.*; got 5 and 10: put in both, or use reset_classifier\(num_c"
    ):
        model(x := torch.zeros(1, 3, 32, 32))
    model.head_dist = nn.Linear(24, 5)
    assert model(x).shape == (1, 5)


@pytest.mark.parametrize("options", [dict(global_pool="avg"), dict(global_pool="map", class_token=False)])
def test_two_tokens_to_read_must_be_there(options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="distilled=True reads a class and a distillation token.*use distilled=False"):
        DeiTConfig(**options)


def test_every_row_has_its_count() -> None:
    assert set(PUBLISHED) == {row for row in VARIANTS if row.endswith(("_224", "_384"))}


@pytest.mark.parametrize("row", PUBLISHED)
def test_a_row_has_the_published_count_and_macs(row: str) -> None:
    with torch.device("meta"):
        model = DeiT(VARIANTS[row])
    assert sum(p.numel() for p in model.parameters()) == PUBLISHED[row][0]
    assert macs(model) == pytest.approx(PUBLISHED[row][1] * 1e9, rel=0.001)


def macs(model: DeiT) -> int:
    """Multiplications of the whole network; `forward` leaves out what no head reads."""
    from torch.utils.flop_counter import FlopCounterMode

    x = torch.empty(1, 3, *model.preprocess.img_size, device="meta")
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model.forward_head(model.forward_features(x))
    return counter.get_total_flops() // 2
