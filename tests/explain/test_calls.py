"""Foreign ways to ask for attention: which calls are seen, with which masks, and where their rows lie on the image."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vitrail.explain.maps import attention_map
from vitrail.explain.record import AttentionMap, record_attention
from vitrail.layers.attention import Layout


def seen_by(function) -> list[AttentionMap]:
    with record_attention() as record:
        function()
    return record.maps


def place_of(layout: Layout | None) -> tuple[object, ...] | None:
    """What a layout without indices says."""
    if layout is None:
        return None
    assert layout.query_index is layout.key_index is layout.key_grid is None
    return layout.grid, layout.prefix, layout.windows, layout.key_prefix, layout.readout


QKV = torch.randn(3, 2, 3, 6, 4, generator=torch.Generator().manual_seed(1))
WANTED = (QKV[0] @ QKV[1].transpose(-2, -1) / 2).softmax(-1)


def scores() -> Tensor:
    return QKV[0] @ QKV[1].transpose(-2, -1) / 2


@pytest.mark.parametrize(
    "attention",
    [
        lambda v: scores().softmax(-1) @ v,
        lambda v: torch.matmul(F.dropout(F.softmax(scores(), dim=-1), 0.5), v),
        lambda v: torch.softmax(scores(), dim=3, dtype=torch.float64).to(v.dtype).matmul(v),
        lambda v: torch.einsum("bhij,bhjd->bhid", nn.Softmax(-1)(scores()).clone().contiguous(), v),
        lambda v: (torch.ones(3, 1, 1) * scores().softmax(-1)) @ v,
        lambda v: (scores().softmax(-1) * torch.tensor([1.0, 0.0, 1.0])[:, None, None]) @ v,
        lambda v: torch.bmm(scores().softmax(-1).view(6, 6, 6), v.reshape(6, 6, 4)),
        lambda v: F.scaled_dot_product_attention(QKV[0], QKV[1], v, dropout_p=0.5),
    ],
)
def test_a_softmax_that_weighs_values_is_attention(attention):
    (seen,) = seen_by(lambda: attention(QKV[2]))
    torch.testing.assert_close(seen.weights.float(), WANTED)
    assert seen.layer == 1


@pytest.mark.parametrize(
    "other",
    [
        lambda v: scores().softmax(-1).sum(),  # never multiplied
        lambda v: v.transpose(-2, -1) @ scores().softmax(-1),  # on the right
        lambda v: scores().softmax(-2) @ v,  # columns sum to 1
        lambda v: scores().softmax(-1).permute(0, 1, 3, 2) @ v,  # columns again
        lambda v: F.linear(scores().softmax(-1), torch.ones(2, 6)) @ torch.ones(2, 2),  # features
        lambda v: scores()[0, 0].softmax(-1) @ v[0, 0],  # logits that weigh embeddings
    ],
)
def test_other_softmaxes_are_not(other):
    with pytest.raises(ValueError, match="saw no attention"):
        seen_by(lambda: other(QKV[2]))


TALK = torch.randn(3, 3, generator=torch.Generator().manual_seed(2))


@pytest.mark.parametrize(
    "mix",
    [
        lambda w: F.linear(w.permute(0, 2, 3, 1), TALK).permute(0, 3, 1, 2),
        lambda w: F.conv2d(w, TALK[:, :, None, None]),
        lambda w: torch.einsum("b h i j, g h -> b g i j", w, TALK),
    ],
)
@pytest.mark.parametrize("grad", [False, True])
def test_talking_heads_of_foreign_models(mix, grad):
    with record_attention(grad=grad) as record:
        out = F.dropout(mix(scores().softmax(-1)), 0.3) @ QKV[2]
    (seen,) = record.maps
    torch.testing.assert_close(seen.weights, WANTED)
    torch.testing.assert_close(seen.effective, torch.einsum("gh,bhij->bgij", TALK, WANTED))
    if grad:
        grads = torch.autograd.grad(out.sum(), [seen.weights, seen.effective])
        assert all(g.abs().sum() > 0 for g in grads)
    else:
        with record_attention(heads=[2, 0], queries=[1]) as record:
            mix(scores().softmax(-1)) @ QKV[2]
        torch.testing.assert_close(record.maps[0].weights, WANTED[:, [2, 0], 1:2])
        torch.testing.assert_close(record.maps[0].effective, seen.effective[:, [2, 0], 1:2])


HEAD_MASK = torch.tensor([1.0, 0.0, 0.5])[:, None, None]


@pytest.mark.parametrize(
    "product",
    [
        lambda w: w * HEAD_MASK,
        lambda w: HEAD_MASK * F.dropout(w, 0.0),
        lambda w: w.multiply(HEAD_MASK).to(torch.float32),
        lambda w: w.mul_(HEAD_MASK),
        lambda w: (2 * (w * 0.5)) * HEAD_MASK,
        lambda w: (w.flatten(0, 1) * HEAD_MASK.repeat(2, 1, 1)).unflatten(0, (2, 3)),
    ],
)
def test_a_product_with_a_tensor_is_the_effective_map(product):
    (seen,) = seen_by(lambda: product(scores().softmax(-1)) @ QKV[2])
    torch.testing.assert_close(seen.weights, WANTED)
    torch.testing.assert_close(seen.effective, WANTED * HEAD_MASK)
    with record_attention(heads=[2, 0], queries=[1]) as record:
        product(scores().softmax(-1)) @ QKV[2]
    torch.testing.assert_close(record.maps[0].effective, (WANTED * HEAD_MASK)[:, [2, 0], 1:2])
    assert record.maps[0].acting is record.maps[0].effective


@pytest.mark.parametrize("number", [0.5, torch.tensor(0.5), torch.tensor([[0.5]])])
def test_a_product_with_a_number_is_none(number):
    (seen,) = seen_by(lambda: (scores().softmax(-1) * number) @ QKV[2])
    assert seen.effective is None and seen.acting is seen.weights


@pytest.mark.parametrize("shape", [(2, 3, 6), (6, 6)])
def test_gradients_reach_a_masked_map(shape):
    """Of four dimensions, or of three with heads in the batch."""
    mask = torch.rand(*shape[:-1], 1, 1)
    with record_attention(grad=True) as record:
        weights = scores().view(*shape, 6).softmax(-1) if len(shape) == 3 else scores().view(6, 6, 6).softmax(-1)
        mask = mask if len(shape) == 3 else mask[:, 0]
        out = (weights * mask) @ QKV[2].view(*weights.shape[:-2], 6, 4)
    (seen,) = record.maps
    grads = torch.autograd.grad(out.sum(), [seen.weights, seen.effective])
    assert all(g.abs().sum() > 0 for g in grads)


def test_what_takes_a_type_from_a_softmax_is_no_softmax():
    def attention() -> None:
        weights = scores().softmax(-1)
        QKV[2].type_as(weights) @ torch.ones(4, 1)  # a matmul of values, before the one that counts
        (weights * HEAD_MASK) @ QKV[2]

    (seen,) = seen_by(attention)
    torch.testing.assert_close(seen.effective, WANTED * HEAD_MASK)


def test_a_softmax_used_twice_counts_once():
    weights_of_two = seen_by(lambda: [w @ QKV[2] for w in [scores().softmax(-1)] for _ in range(2)])
    assert len(weights_of_two) == 1


def test_foreign_weights_are_in_the_graph():
    for attention in (
        lambda: scores().softmax(-1) @ QKV[2],
        lambda: scores().bfloat16().softmax(-1) @ QKV[2].bfloat16(),
        lambda: scores().view(6, 6, 6).softmax(-1) @ QKV[2].view(6, 6, 4),
        lambda: F.scaled_dot_product_attention(*QKV),
    ):
        with record_attention(grad=True) as record:
            out = attention()
        (seen,) = record.maps
        assert seen.weights.dtype == torch.float32
        (grad,) = torch.autograd.grad(out.float().sum(), seen.weights)
        assert grad.abs().sum() > 0


@pytest.mark.parametrize("masked", ["none", "bool", "float", "causal", "row"])
def test_masks_of_sdpa(masked):
    visible = torch.rand(6, 6) > 0.3
    visible.fill_diagonal_(True)
    hidden = torch.zeros(6, 6).masked_fill(~visible, float("-inf"))
    given = {
        "none": {}, "bool": {"attn_mask": visible}, "float": {"attn_mask": hidden},
        "causal": {"is_causal": True}, "row": {"attn_mask": visible[:1] | True},
    }[masked]  # fmt: skip
    causal = torch.zeros(6, 6).masked_fill(torch.ones(6, 6).triu(1).bool(), float("-inf"))
    added = {"bool": hidden, "float": hidden, "causal": causal}.get(masked, torch.zeros(6, 6))
    (seen,) = seen_by(lambda: F.scaled_dot_product_attention(*QKV, **given))
    torch.testing.assert_close(seen.weights, (scores() + added).softmax(-1))
    with record_attention(queries=[4, 1]) as record:
        F.scaled_dot_product_attention(*QKV, **given)
    torch.testing.assert_close(record.maps[0].weights, seen.weights[:, :, [4, 1]])


@pytest.mark.parametrize("shape", [(6, 4), (3, 6, 4), (2, 3, 6, 4), (2, 5, 3, 6, 4)])
@pytest.mark.parametrize("grad", [False, True])
def test_sdpa_of_any_rank(shape, grad):
    q, k, v = torch.randn(3, *shape).unbind()
    with record_attention(grad=grad) as record:
        out = F.scaled_dot_product_attention(q, k, v)
    torch.testing.assert_close(out, F.scaled_dot_product_attention(q, k, v))
    wanted = (q @ k.transpose(-2, -1) / 2).softmax(-1)
    assert record.maps[0].weights.ndim == 4
    torch.testing.assert_close(record.maps[0].weights.flatten(), wanted.flatten())


def test_grouped_queries():
    q, (k, v) = torch.randn(2, 6, 5, 4), torch.randn(2, 2, 2, 5, 4).unbind()
    (seen,) = seen_by(lambda: F.scaled_dot_product_attention(q, k, v, enable_gqa=True))
    torch.testing.assert_close(seen.weights, (q @ k.repeat_interleave(3, 1).transpose(-2, -1) / 2).softmax(-1))


# ---- nn.MultiheadAttention, by its own need_weights


MHA = [
    {},
    {"batch_first": True},
    {"bias": False},
    {"add_bias_kv": True},
    {"add_zero_attn": True},
    {"kdim": 5, "vdim": 7},
]


@pytest.mark.parametrize("options", MHA, ids=str)
@pytest.mark.parametrize("masks", ["none", "padding", "both", "per head"])
@pytest.mark.parametrize("grad", [False, True])
def test_multihead_attention(options, masks, grad):
    mha = nn.MultiheadAttention(12, 3, **options).eval()
    q, k, v = (torch.randn(6, 2, n) for n in (12, options.get("kdim", 12), options.get("vdim", 12)))
    if options.get("batch_first"):
        q, k, v = (x.transpose(0, 1) for x in (q, k, v))
    padding = torch.zeros(2, 6, dtype=torch.bool)
    padding[1, 4:] = True
    hidden = torch.rand(6, 6) > 0.6
    hidden.fill_diagonal_(False)
    hidden[:, 0] = False
    given = {
        "none": {},
        "padding": {"key_padding_mask": padding},
        "both": {"key_padding_mask": padding, "attn_mask": hidden},
        "per head": {"attn_mask": torch.randn(6, 6, 6)},
    }[masks]
    out, weights = mha(q, k, v, average_attn_weights=False, **given)
    with record_attention(grad=grad) as record:
        watched, shown = mha(q, k, v, **given)
    (seen,) = record.maps
    torch.testing.assert_close(seen.weights, weights, atol=1e-6, rtol=0)
    torch.testing.assert_close(watched, out, atol=1e-6, rtol=0)
    torch.testing.assert_close(shown, weights.mean(1), atol=1e-6, rtol=0)


@pytest.mark.parametrize("grad", [False, True])
def test_multihead_attention_without_a_batch(grad):
    mha, x = nn.MultiheadAttention(12, 3).eval(), torch.randn(6, 12)
    out, _ = mha(x, x, x, need_weights=False)
    with record_attention(grad=grad) as record:
        watched, shown = mha(x, x, x, need_weights=False)
    assert shown is None
    assert record.maps[0].weights.shape == (1, 3, 6, 6)
    torch.testing.assert_close(watched, out)


def test_static_keys_are_refused():
    mha, x = nn.MultiheadAttention(4, 2), torch.randn(3, 1, 4)
    weights = (mha.in_proj_weight, mha.in_proj_bias, None, None, False, 0.0, mha.out_proj.weight, mha.out_proj.bias)
    with pytest.raises(ValueError, match="does not know static_k"), record_attention():
        F.multi_head_attention_forward(x, x, x, 4, 2, *weights, static_k=torch.randn(2, 3, 2))


def test_the_fast_path_of_inference_is_seen_too():
    layer = nn.TransformerEncoderLayer(12, 2, 24, batch_first=True).eval()
    x = torch.randn(2, 5, 12)
    with torch.no_grad():
        plain = layer(x)
        with record_attention() as record:
            watched = layer(x)
    assert len(record.maps) == 1
    torch.testing.assert_close(plain, watched, atol=1e-6, rtol=0)


# ---- layouts of foreign models


class Foreign(nn.Module):
    """Patches by a convolution, a prefix, one SDPA: nothing of ours."""

    def __init__(self, prefix: int, kernel: int = 4) -> None:
        super().__init__()
        self.conv, self.prefix = nn.Conv2d(3, 8, kernel, kernel), prefix

    def forward(self, x: Tensor) -> Tensor:
        x = F.pad(self.conv(x).flatten(2).transpose(1, 2), (0, 0, self.prefix, 0))[:, None]
        return F.scaled_dot_product_attention(x, x, x)


@pytest.mark.parametrize("prefix", [0, 1, 2, 5])
def test_the_convolution_tells_the_grid(prefix):
    with record_attention() as record:
        Foreign(prefix)(torch.randn(2, 3, 16, 24))
    assert place_of(record.maps[0].layout) == ((4, 6), prefix, 1, None, (0,) if prefix else ())


@pytest.mark.parametrize(
    ("rows", "given", "layout"),
    [
        (197, {}, Layout((14, 14), 1, readout=(0,))),
        (198, {}, Layout((14, 14), 2, readout=(0,))),
        (196, {}, Layout((14, 14), 0, readout=())),
        (17, {}, None),  # 1 + 4 x 4 or 8 + 3 x 3
        (17, {"prefix": 1}, Layout((4, 4), 1, readout=(0,))),
        (17, {"grid": (2, 8)}, Layout((2, 8), 1, readout=(0,))),
        (17, {"grid": (2, 8), "prefix": 0}, None),
    ],
)
def test_a_square_is_guessed_only_where_just_one_fits(rows, given, layout):
    x = torch.randn(1, 1, rows, 4)
    with record_attention(**given) as record:
        F.scaled_dot_product_attention(x, x, x)
    assert place_of(record.maps[0].layout) == place_of(layout)


def test_foreign_class_rows():
    """Nobody tells what the head reads: row 0 of a prefix, where the class token stands, else the mean."""
    for prefix, rows in ((1, 1), (3, 1), (0, 24)):
        with record_attention(queries="class") as record:
            Foreign(prefix)(torch.randn(2, 3, 16, 24))
        assert record.maps[0].weights.shape == (2, 1, rows, 24 + prefix)


@pytest.mark.parametrize("layers", [None, [1]])
def test_class_rows_of_nobody_knows_what(layers):
    message = r"queries='class' .* for a foreign model, grid=\(h, w\) and prefix="
    with pytest.raises(ValueError, match=message), record_attention(layers, queries="class"):
        F.scaled_dot_product_attention(*torch.randn(3, 1, 1, 17, 4).unbind())


def test_layers_without_known_class_rows_are_left_out_unless_named():
    unknown = torch.randn(3, 2, 1, 9, 4)
    with record_attention(queries="class") as record:
        F.scaled_dot_product_attention(*unknown)
        Foreign(1)(torch.randn(2, 3, 16, 24))
        unknown[0].softmax(-1) @ unknown[1].transpose(-2, -1)
    assert [m.layer for m in record.maps] == [2] and record.depth == 3
    with pytest.raises(ValueError, match="layer 1 has no layout"), record_attention([1, 2], queries="class"):
        F.scaled_dot_product_attention(*unknown)


@pytest.mark.parametrize("prefix", [0, 1])
def test_one_query_over_all_tokens_is_what_the_head_reads(prefix):
    """Attention pooling, and class attention, whose class token is among the keys."""
    tokens = torch.randn(2, 3, 24 + prefix, 4)
    with record_attention(queries="class") as record:
        Foreign(1)(torch.randn(2, 3, 16, 24))
        F.scaled_dot_product_attention(tokens[:, :, :1], tokens, tokens)
    seen = record.maps[1]
    assert place_of(seen.layout) == ((4, 6), 1, 1, prefix, (0,))
    torch.testing.assert_close(attention_map(seen), seen.weights.mean(1)[:, 0, prefix:].view(2, 4, 6))


def test_windows_and_reduced_keys_of_foreign_models_have_no_layout():
    """Not even where a window has as many cells as the grid: its batch is not the images'."""
    windows = torch.randn(8, 3, 16, 4)
    with record_attention() as record:
        Foreign(0)(torch.randn(2, 3, 16, 16))
        F.scaled_dot_product_attention(windows, windows, windows)
        F.scaled_dot_product_attention(torch.randn(2, 1, 16, 4), *torch.randn(2, 2, 1, 4, 4).unbind())
    assert [place_of(m.layout) for m in record.maps] == [place_of(Layout((4, 4), readout=())), None, None]
