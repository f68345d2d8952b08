"""What is BEiT's and EVA's own: where they begin, which pieces they are built of, tables that go to another grid."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from vitrail.layers.attention import Attention
from vitrail.layers.blocks import Block, GammaBlock
from vitrail.layers.relative import QVAttention, RelativeAttention, SplitAttention, resize_relative
from vitrail.models.backbone import PositionTable
from vitrail.models.beit import Beit
from vitrail.models.eva import VARIANTS, Eva
from vitrail.models.vit import VisionTransformer
from vitrail.weights.fit import Report, fitted

SMALL: dict[str, Any] = dict(img_size=32, patch_size=8, embed_dim=48, depth=3, num_heads=3, num_classes=5)


def test_deeper_blocks_begin_with_smaller_branches() -> None:
    """The i-th block's last matrices are divided by sqrt(2 i), and no others."""
    torch.manual_seed(0)
    blocks = Beit(**{**SMALL, "embed_dim": 192}).blocks
    for depth, block in enumerate(blocks, start=1):
        for weight in (block.attn.proj.weight, block.mlp.fc2.weight):
            assert weight.std().item() == pytest.approx(0.02 / (2 * depth) ** 0.5, rel=0.05)
        assert block.mlp.fc1.weight.std().item() == pytest.approx(0.02, rel=0.05)
        assert not any(bias.any() for bias in block.attn.biases())
        assert torch.equal(block.gamma_1, torch.full((192,), 0.1)) and torch.equal(block.gamma_1, block.gamma_2)


def test_blocks_are_built_of_the_pieces_that_the_config_names() -> None:
    built = {
        "BEiT": (Beit(**SMALL), GammaBlock, RelativeAttention),
        "EVA-02": (Eva(**SMALL), Block, QVAttention),
        "EVA-02's larger": (Eva(**SMALL, qkv_fused=False), Block, SplitAttention),
        "a plain network": (VisionTransformer(**SMALL), Block, Attention),
        "a plain network with a bias": (VisionTransformer(**SMALL, rel_pos_bias=True), Block, RelativeAttention),
    }
    for name, (model, block, attention) in built.items():
        assert {type(part) for part in model.blocks} == {block}, name
        assert {type(part.attn) for part in model.blocks} == {attention}, name


@pytest.mark.parametrize("beside", [{"rel_pos_bias": True}, {"window_size": 2, "class_token": False}])
def test_a_projection_each_is_for_plain_attention_alone(beside: dict[str, Any]) -> None:
    name, value = next(iter(beside.items()))
    with pytest.raises(ValueError, match=f"qkv_fused=False is for .*; got also {name}={value}: use qkv_fused=True"):
        Eva(**SMALL, qkv_fused=False, **beside)


def test_a_normed_gate_has_its_blocks_norm() -> None:
    norm = Eva(**SMALL, mlp="swiglu_normed", norm="rmsnorm", norm_eps=1e-4).blocks[0].mlp.norm
    assert isinstance(norm, nn.RMSNorm) and norm.eps == 1e-4 and norm.weight.shape == (256,)


@torch.no_grad()
def test_rotary_positions_alone_need_no_table_and_take_any_size() -> None:
    model = Eva(**SMALL, pos_embed="none", rope="dinov3").eval()
    assert model.position_tables() == {} and model.pos_embed is None
    assert model.features(torch.randn(1, 3, 40, 64)).maps[-1].shape == (1, 48, 5, 8)


@torch.no_grad()
def test_without_positions_the_order_of_patches_is_nothing_and_with_rotary_ones_it_is_something() -> None:
    x = torch.randn(1, 3, 32, 32)
    shuffled = torch.cat([x[..., 16:], x[..., :16]], dim=-1)
    answers = {}
    for rope in ("none", "axial", "dinov3"):
        torch.manual_seed(0)
        model = Eva(**SMALL, pos_embed="none", rope=rope).eval().double()
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
        answers[rope] = (model(x.double()) - model(shuffled.double())).abs().max().item()
    assert answers["none"] < 1e-10
    assert min(answers["axial"], answers["dinov3"]) > 1e-4


def test_tables_of_another_size_are_resized_as_they_are_at_run_time() -> None:
    torch.manual_seed(0)
    small, large = Beit(**SMALL).eval(), Beit(**{**SMALL, "img_size": 48}).eval()
    with torch.no_grad():
        for parameter in small.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    report = Report()
    large.load_state_dict(fitted("here", large, small.state_dict(), report))
    assert len(report.resized) == 3
    name = "blocks.1.attn.relative_position_bias_table"
    assert small.position_tables()[name] == PositionTable((4, 4), prefix=3, relative=True)
    assert torch.equal(large.state_dict()[name], resize_relative(small.state_dict()[name], (4, 4), (6, 6)))
    x = torch.randn(2, 3, 48, 48)
    torch.testing.assert_close(large(x), small(x), rtol=0, atol=1e-5)


def test_rows_of_dinov3_have_biases_where_their_name_says_so() -> None:
    for row, config in VARIANTS.items():
        if "dinov3" in row:
            assert config.qkv_bias == row.endswith("_qkvb"), row
