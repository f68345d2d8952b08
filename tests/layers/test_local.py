"""Local attention is attention with every key outside the window hidden; padding is never seen."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from vitrail.explain.maps import attention_map
from vitrail.explain.record import record_attention
from vitrail.layers.attention import Attention, Kernel, Layout
from vitrail.layers.local import LocalAttention
from vitrail.layers.rope import axial_rope


def pair(window: int, attn: Kernel = "auto") -> tuple[LocalAttention, Attention]:
    torch.manual_seed(0)
    local, whole = LocalAttention(24, 3, window=window, attn=attn).eval(), Attention(24, 3, attn=attn).eval()
    whole.load_state_dict(local.state_dict())
    return local, whole


def outside(grid: tuple[int, int], window: int) -> Tensor:
    """(N, N): -inf where a key is in another window than the query."""
    cells = torch.cartesian_prod(torch.arange(grid[0]), torch.arange(grid[1])) // window
    same = (cells[:, None] == cells[None]).all(-1)
    return torch.zeros(same.shape).masked_fill(~same, float("-inf"))


@torch.no_grad()
@pytest.mark.parametrize(("grid", "window"), [((4, 6), 2), ((4, 6), 3), ((5, 7), 3), ((3, 3), 1), ((3, 5), 8)])
@pytest.mark.parametrize("turned", [False, True])
def test_it_is_attention_with_the_other_windows_hidden(grid: tuple[int, int], window: int, turned: bool) -> None:
    local, whole = pair(window)
    x = torch.randn(2, grid[0] * grid[1], 24)
    rope = axial_rope(grid, 8, x.device, None) if turned else None
    expected = whole(x, bias=outside(grid, window), rope=rope)
    torch.testing.assert_close(local(x, layout=Layout(grid), rope=rope), expected, rtol=0, atol=1e-5)


@torch.no_grad()
def test_a_window_as_large_as_the_grid_is_attention_over_all() -> None:
    local, whole = pair(5)
    x = torch.randn(2, 25, 24)
    torch.testing.assert_close(local(x, layout=Layout((5, 5))), whole(x), rtol=0, atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("attn", ["eager", "fused"])
def test_hidden_keys_are_hidden_and_a_window_of_padding_is_no_nan(attn: Kernel) -> None:
    local, whole = pair(2, attn)
    hidden = torch.zeros(2, 1, 1, 16)
    hidden[1].view(4, 4)[:, 1:] = float("-inf")  # half of the left windows, all of the right ones
    x = torch.randn(2, 16, 24)
    answer = local(x, bias=hidden, layout=Layout((4, 4)))
    assert answer.isfinite().all()
    expected = whole(x, bias=hidden + outside((4, 4), 2)).view(2, 4, 4, 24)
    torch.testing.assert_close(answer.view(2, 4, 4, 24)[:, :, :2], expected[:, :, :2], rtol=0, atol=1e-5)


@torch.no_grad()
def test_recorded_windows_lie_on_the_image() -> None:
    local, _ = pair(3)
    x, index = torch.randn(2, 20, 24), torch.arange(20).expand(2, -1).clone()
    index[1, [3, 4, 8, 9]] = -1
    with record_attention() as record:
        local(x, layout=Layout((4, 5), query_index=index, key_index=index, readout=()))
    (seen,) = record.maps
    assert seen.weights.shape == (2, 4 * 3, 9, 9) and seen.layout.windows == 4
    heat = attention_map(seen, query=(0, 1))  # of the upper left window
    assert heat.shape == (2, 4, 5) and (heat[:, :3, :3] > 0).all()
    assert not heat[:, 3:].any() and not heat[:, :, 3:].any()
    torch.testing.assert_close(heat.sum((1, 2)), torch.ones(2))
    cells = seen.layout.query_index
    assert cells.shape == (2, 4, 9) and set(cells[1].flatten().tolist()) == {*range(20), -1} - {3, 4, 8, 9}


@pytest.mark.parametrize(("tokens", "layout"), [(20, None), (21, Layout((4, 5), prefix=1)), (12, Layout((4, 5)))])
def test_windows_need_a_whole_grid(tokens: int, layout: Layout | None) -> None:
    with pytest.raises(ValueError, match="windows are cut from a whole grid.*window_size=0"):
        pair(3)[0](torch.zeros(1, tokens, 24), layout=layout)
