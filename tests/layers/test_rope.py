"""Rotary positions are rotations: lengths stay, scores depend on where two tokens stand to each other."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from vitrail.layers.attention import Attention
from vitrail.layers.rope import ROPES, Rope, axial_rope, dinov3_rope

CPU = torch.device("cpu")


def made(kind: str, grid: tuple[int, int] = (3, 5), head_dim: int = 16) -> Rope:
    return ROPES[kind](grid, head_dim, CPU, None)


def scores(rope: Rope, q: Tensor, k: Tensor) -> Tensor:
    """(N, N) of one query and one key, as if they stood on every cell."""
    count = rope.cos.shape[2]
    turned = [rope.turn(x.expand(1, 1, count, -1))[0, 0] for x in (q, k)]
    return turned[0] @ turned[1].T


@pytest.mark.parametrize("kind", ROPES)
def test_turning_changes_no_length(kind: str) -> None:
    x = torch.randn(2, 3, 15, 16)
    turned = made(kind).turn(x)
    torch.testing.assert_close(turned.norm(dim=-1), x.norm(dim=-1))
    assert (turned - x).abs().max() > 0.1


@pytest.mark.parametrize("kind", ROPES)
def test_scores_depend_on_the_offset_alone(kind: str) -> None:
    """Between two cells one down and two to the left of each other, wherever they are."""
    table = scores(made(kind), torch.randn(16), torch.randn(16)).view(3, 5, 3, 5)
    found = [table[row, column + 2, row + 1, column] for row in range(2) for column in range(3)]
    torch.testing.assert_close(torch.stack(found), found[0].expand(6), rtol=0, atol=1e-4)
    assert (table[0, 0, 1, 2] - found[0]).abs() > 1e-3


@pytest.mark.parametrize("kind", ROPES)
def test_rows_turn_the_first_half_of_the_pairs_and_columns_the_second(kind: str) -> None:
    cos = made(kind).cos[0, 0].view(3, 5, 16)
    cos = cos[..., :8] if made(kind).half else cos[..., ::2]  # one number a pair
    assert torch.equal(cos[:, :1, :4].expand(-1, 5, -1), cos[..., :4])
    assert torch.equal(cos[:1, :, 4:].expand(3, -1, -1), cos[..., 4:])


def test_the_formulas() -> None:
    """EVA-02: row 2 turns the second pair by 2 · 10000^(-1/4); DINOv3: its centre, 2/3, by 2π · 100^(-1/4) times."""
    eva, dino = axial_rope((3, 5), 16, CPU, None), dinov3_rope((3, 5), 16, CPU, None)
    assert eva.sin[0, 0, 10, 3].item() == pytest.approx(torch.tensor(2 * 10000**-0.25).sin().item(), abs=1e-6)
    angle = 2 * torch.pi * (2 / 3) * 100**-0.25
    assert dino.sin[0, 0, 10, 9].item() == pytest.approx(torch.tensor(angle).sin().item(), abs=1e-6)


def test_a_larger_grid_counts_the_cells_of_pretraining() -> None:
    """Every second row and column of a grid twice as fine stands where the coarse grid's cells stand."""
    coarse, fine = axial_rope((4, 4), 16, CPU, None), axial_rope((8, 8), 16, CPU, (4, 4))
    torch.testing.assert_close(fine.cos.view(8, 8, 16)[::2, ::2].flatten(0, 1), coarse.cos[0, 0])


def test_kept_tokens_keep_their_turn_and_a_prefix_has_none() -> None:
    rope, keep = made("axial"), torch.tensor([[4, 0, 14], [1, 2, 3]])
    kept = rope.kept(keep)
    assert kept.cos.shape == (2, 1, 3, 16)
    assert torch.equal(kept.sin[1, 0], rope.sin[0, 0, keep[1]])
    x = torch.randn(2, 1, 5, 16)
    turned = kept.behind(2).turn(x)
    assert torch.equal(turned[:, :, :2], x[:, :, :2])
    torch.testing.assert_close(turned[:, :, 2:], kept.turn(x[:, :, 2:]))


def test_bf16_comes_back_as_bf16() -> None:
    assert made("dinov3").turn(torch.randn(1, 2, 15, 16, dtype=torch.bfloat16)).dtype == torch.bfloat16


@torch.no_grad()
def test_attention_is_turned_in_queries_and_keys_alone() -> None:
    layer, x = Attention(48, 3).eval(), torch.randn(2, 15, 48)
    rope = made("axial")
    q, k, v = layer.split(x)
    weights = (rope.turn(q) @ rope.turn(k).transpose(2, 3) / 4).softmax(-1)
    expected = layer.proj((weights @ v).transpose(1, 2).flatten(2))
    torch.testing.assert_close(layer(x, rope=rope), expected, rtol=0, atol=1e-5)
