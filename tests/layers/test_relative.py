"""A bias for every offset: which row of the table a pair has, and what becomes of the table at another grid."""

from __future__ import annotations

import pytest
import torch

from vitrail.layers.attention import Attention, Layout
from vitrail.layers.relative import (
    PREFIX_ROWS,
    QVAttention,
    RelativeAttention,
    SplitAttention,
    relative_bias,
    resize_relative,
)


def table(grid: tuple[int, int], heads: int = 2) -> torch.Tensor:
    rows = (2 * grid[0] - 1) * (2 * grid[1] - 1) + PREFIX_ROWS
    return torch.randn(rows, heads, generator=torch.Generator().manual_seed(0))


def test_equal_offsets_have_equal_biases_and_others_others() -> None:
    bias = relative_bias(table((3, 4)), (3, 4), Layout((3, 4), prefix=1))
    assert bias.shape == (1, 2, 13, 13)
    image = bias[0, :, 1:, 1:].reshape(2, 3, 4, 3, 4)
    for down, right in ((1, 2), (-1, 1), (0, 0), (2, -3)):
        rows, columns = range(max(0, -down), 3 - max(0, down)), range(max(0, -right), 4 - max(0, right))
        found = torch.stack([image[:, r, c, r + down, c + right] for r in rows for c in columns])
        assert torch.equal(found, found[:1].expand_as(found))
    assert image[0].unique().numel() == 5 * 7


def test_the_last_three_rows_are_for_the_prefix() -> None:
    """From it, to it, between two; of two prefix tokens, each is as the other."""
    own = table((2, 2))
    bias = relative_bias(own, (2, 2), Layout((2, 2), prefix=2))[0]
    assert torch.equal(bias[:, :2, 2:], own[-3][:, None, None].expand(-1, 2, 4))
    assert torch.equal(bias[:, 2:, :2], own[-2][:, None, None].expand(-1, 4, 2))
    assert torch.equal(bias[:, :2, :2], own[-1][:, None, None].expand(-1, 2, 2))


def test_tokens_that_are_left_keep_their_places() -> None:
    own, keep = table((3, 3)), torch.tensor([[8, 0, 4], [1, 2, 3]])
    whole = relative_bias(own, (3, 3), Layout((3, 3), prefix=1))[0]
    some = relative_bias(own, (3, 3), Layout((3, 3), prefix=1, query_index=keep, key_index=keep))
    for sample in range(2):
        rows = torch.tensor([0, *(1 + keep[sample]).tolist()])
        assert torch.equal(some[sample], whole[:, rows][:, :, rows])


def test_the_same_grid_is_the_same_table() -> None:
    own = table((3, 4))
    assert resize_relative(own, (3, 4), (3, 4)) is own


@pytest.mark.parametrize("new", [(5, 5), (7, 4), (2, 3), (1, 1)])
def test_a_resized_table_keeps_its_middle_its_ends_and_its_prefix(new: tuple[int, int]) -> None:
    """Offset 0 and, where the grid grows, the farthest offsets are the same rows; all lie between others."""
    own = table((4, 4))
    moved = resize_relative(own, (4, 4), new)
    assert moved.shape == ((2 * new[0] - 1) * (2 * new[1] - 1) + PREFIX_ROWS, 2)
    assert torch.equal(moved[-PREFIX_ROWS:], own[-PREFIX_ROWS:])
    image, before = moved[:-3].view(2 * new[0] - 1, 2 * new[1] - 1, 2), own[:-3].view(7, 7, 2)
    torch.testing.assert_close(image[new[0] - 1, new[1] - 1], before[3, 3])
    if min(new) > 4:
        torch.testing.assert_close(image[0, 0], before[0, 0], rtol=0, atol=1e-4)
    assert moved.max() <= own.max() + 1e-6 and moved.min() >= own.min() - 1e-6


def test_a_table_of_one_cell_can_grow() -> None:
    assert torch.equal(resize_relative(table((1, 1)), (1, 1), (2, 2))[:-3], table((1, 1))[:1].expand(9, -1))


@torch.no_grad()
def test_attention_adds_the_bias_to_its_scores() -> None:
    layer = RelativeAttention(24, 3, grid=(2, 3)).eval()
    for parameter in layer.parameters():
        parameter.normal_()
    plain, layout, x = QVAttention(24, 3).eval(), Layout((2, 3), prefix=1), torch.randn(2, 7, 24)
    plain.load_state_dict(layer.state_dict(), strict=False)
    bias = relative_bias(layer.relative_position_bias_table, (2, 3), layout)
    torch.testing.assert_close(layer(x, layout=layout), plain(x, bias=bias), rtol=0, atol=1e-5)
    hidden = torch.zeros(1, 1, 1, 7)
    hidden[..., 3] = float("-inf")
    torch.testing.assert_close(layer(x, bias=hidden, layout=layout), plain(x, bias=bias + hidden), rtol=0, atol=1e-5)


def test_without_a_layout_nobody_knows_where_tokens_are() -> None:
    with pytest.raises(ValueError, match="relative positions need layout"):
        RelativeAttention(24, 3, grid=(2, 3))(torch.zeros(1, 7, 24))


@torch.no_grad()
@pytest.mark.parametrize("qkv_bias", [True, False])
def test_a_bias_of_keys_would_change_nothing(qkv_bias: bool) -> None:
    ours, full, x = QVAttention(24, 3, qkv_bias=qkv_bias).eval(), Attention(24, 3).eval(), torch.randn(2, 7, 24)
    for bias in ours.biases():
        bias.normal_()
    zeros = torch.zeros(24)
    q_bias, v_bias = (zeros if bias is None else bias for bias in (ours.q_bias, ours.v_bias))
    full.load_state_dict({**ours.state_dict(), "qkv.bias": torch.cat([q_bias, torch.randn(24), v_bias])}, strict=False)
    torch.testing.assert_close(ours(x), full(x), rtol=0, atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("qkv_bias", [True, False])
def test_a_projection_each_is_one_in_three_pieces(qkv_bias: bool) -> None:
    one, three, x = (
        QVAttention(24, 3, qkv_bias=qkv_bias),
        SplitAttention(24, 3, qkv_bias=qkv_bias),
        torch.randn(2, 7, 24),
    )
    for bias in one.biases():
        bias.normal_()
    three.proj.load_state_dict(one.proj.state_dict())
    for layer, weight in zip((three.q_proj, three.k_proj, three.v_proj), one.qkv.weight.chunk(3), strict=True):
        layer.weight.copy_(weight)
    for layer, bias in zip((three.q_proj, three.v_proj), one.biases(), strict=qkv_bias):
        layer.bias.copy_(bias)
    assert not [name for name in three.state_dict() if "qkv" in name or name == "k_proj.bias"]
    torch.testing.assert_close(three(x), one(x), rtol=0, atol=1e-6)
    torch.testing.assert_close(three(x, rows=2), one(x)[:, :2], rtol=0, atol=1e-6)
