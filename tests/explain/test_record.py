"""Recording attention: what is seen equals the closed form, and nothing but the record is left behind."""

from __future__ import annotations

import pytest
import torch
import torchvision
from torch import Tensor, nn
from torch.overrides import _get_current_function_mode_stack

from vitrail.explain.choice import CannotExplainError, NoAttentionError
from vitrail.explain.record import record_attention
from vitrail.layers.attention import Attention, Layout, attend
from vitrail.layers.talking import Mix
from vitrail.models.registry import build_model

KERNELS = ("auto", "fused", "eager")


@pytest.mark.parametrize("kernel", KERNELS)
def test_maps_equal_the_closed_form(kernel, images, small_vit, expected_maps):
    model = small_vit(attn=kernel)
    with record_attention() as record, torch.no_grad():
        model(images)
    assert [m.layer for m in record.maps] == [1, 2, 3]
    for seen, wanted in zip(record.maps, expected_maps(model, images), strict=True):
        assert seen.weights.shape == (2, 3, 17, 17)
        torch.testing.assert_close(seen.weights.double(), wanted, atol=1e-5, rtol=0)
        assert (seen.layout.grid, seen.layout.prefix) == ((4, 4), 1)
        assert seen.effective is None


@pytest.mark.parametrize("kernel", KERNELS)
def test_recording_changes_no_bit_of_the_output(kernel, images, small_vit):
    model = small_vit(attn=kernel)
    with torch.no_grad():
        plain = model(images)
        with record_attention():
            watched = model(images)
    assert torch.equal(plain, watched)


def test_training_randomness_is_untouched_and_maps_are_before_dropout(images, small_vit):
    model = small_vit(attn_drop_rate=0.5, drop_path_rate=0.3).train()
    torch.manual_seed(3)
    plain = model(images)
    torch.manual_seed(3)
    with record_attention() as record:
        watched = model(images)
    assert torch.equal(plain, watched)
    torch.testing.assert_close(record.maps[0].weights.sum(-1), torch.ones(2, 3, 17))
    assert not record.maps[0].weights.requires_grad


@pytest.mark.parametrize("kernel", KERNELS)
def test_maps_are_fp32_under_bf16_autocast(kernel, images):
    attn = Attention(24, 3, attn=kernel)
    x = torch.randn(2, 9, 24)
    with record_attention() as record, torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        attn(x)
        q, k = attn.qkv(x).reshape(2, 9, 3, 3, 8).permute(2, 0, 3, 1, 4)[:2].float()
    weights = record.maps[0].weights
    assert weights.dtype == torch.float32
    torch.testing.assert_close(weights.sum(-1), torch.ones(2, 3, 9), atol=1e-6, rtol=0)
    torch.testing.assert_close(weights, ((q @ k.transpose(-2, -1)) / 8**0.5).softmax(-1), atol=1e-6, rtol=0)


def test_only_what_was_asked_is_kept(images, small_vit, expected_maps):
    model = small_vit()
    whole = expected_maps(model, images)
    with record_attention(layers=[2], heads=[2, 0], queries="class") as record:
        model(images)
    (seen,) = record.maps
    assert (seen.layer, seen.heads, seen.queries) == (2, (2, 0), (0,))
    torch.testing.assert_close(seen.weights.double(), whole[1][:, [2, 0], :1], atol=1e-5, rtol=0)
    with record_attention(layers=2, heads=1, queries=4) as record:
        model(images)
    (seen,) = record.maps
    assert (seen.layer, seen.heads, seen.queries) == (2, (1,), (4,))
    with record_attention(heads="mean", queries=[5, 3]) as record:
        model(images)
    torch.testing.assert_close(
        record.maps[2].weights.double(), whole[2].mean(1, keepdim=True)[:, :, [5, 3]], atol=1e-5, rtol=0
    )


def test_only_the_class_rows_are_computed():
    """The largest tensor made beside the model's own has a row for each head, not a row for each token."""
    q, k, v = torch.randn(3, 1, 2, 512, 8).unbind()
    sizes: list[int] = []

    class Sizes(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            sizes.append(out.numel() if isinstance(out, Tensor) else 0)
            return out

    with record_attention(queries="class") as record, Sizes():
        attend(q, k, v, layout=Layout((7, 73), 1), kernel="fused")
    assert record.maps[0].weights.shape == (1, 2, 1, 512)
    assert max(sizes) < 2 * 512 * 16


def test_bias_causal_and_scale_are_honoured():
    q, k, v = torch.randn(3, 2, 3, 6, 4).unbind()
    bias = torch.randn(3, 6, 6)
    with record_attention() as record:
        attend(q, k, v, bias=bias, scale=0.3, causal=True)
    later = torch.ones(6, 6, dtype=torch.bool).triu(1)
    wanted = (q @ k.transpose(-2, -1) * 0.3 + bias).masked_fill(later, float("-inf")).softmax(-1)
    torch.testing.assert_close(record.maps[0].weights, wanted)


def test_talking_heads_give_the_softmax_and_the_effective_map():
    q, k, v = torch.randn(3, 2, 3, 6, 4).unbind()
    mix = Mix(torch.randn(3, 3), torch.randn(3, 3), torch.randn(3))
    with record_attention() as record:
        out = attend(q, k, v, mix=mix)
    (seen,) = record.maps
    mixed = torch.einsum("gh,bhij->bgij", mix.after, seen.weights) + mix.after_bias[:, None, None]
    torch.testing.assert_close(seen.weights.sum(-1), torch.ones(2, 3, 6))
    torch.testing.assert_close(seen.effective, mixed)
    torch.testing.assert_close(seen.effective @ v, out)
    with record_attention(heads=[1, 2, 0]) as record:
        attend(q, k, v, mix=mix)
    torch.testing.assert_close(record.maps[0].weights, seen.weights[:, [1, 2, 0]])
    torch.testing.assert_close(record.maps[0].effective, mixed[:, [1, 2, 0]])


def test_talking_heads_recorded_in_part_hide_what_each_row_may_not_see():
    q, k, v = torch.randn(3, 2, 3, 6, 4).unbind()
    mix = Mix(torch.randn(3, 3), torch.randn(3, 3), torch.randn(3))
    with record_attention() as record:
        out = attend(q, k, v, mix=mix, causal=True)
    whole = record.maps[0].effective
    torch.testing.assert_close(whole @ v, out)
    assert (whole.triu(1) == 0).all()
    with record_attention(queries=[3, 1], heads=[2]) as record:
        attend(q, k, v, mix=mix, causal=True)
    torch.testing.assert_close(record.maps[0].effective, whole[:, 2:, [3, 1]])


def test_heads_are_chosen_in_each_window():
    q, k, v = torch.randn(3, 2, 4 * 3, 5, 4).unbind()
    layout = Layout((4, 5), windows=4, query_index=torch.arange(20).view(4, 5), key_index=torch.arange(20).view(4, 5))
    with record_attention() as record:
        attend(q, k, v, layout=layout)
    whole = record.maps[0].weights
    with record_attention(heads=[2]) as record:
        attend(q, k, v, layout=layout)
    assert torch.equal(record.maps[0].weights, whole[:, 2::3])
    with record_attention(heads="mean") as record:
        attend(q, k, v, layout=layout)
    torch.testing.assert_close(record.maps[0].weights, whole.unflatten(1, (4, 3)).mean(2))


# ---- errors


def test_nothing_recorded_is_an_error():
    message = r"saw no attention: run the model inside .* FlashAttention .* other threads"
    with pytest.raises(ValueError, match=message), record_attention():
        nn.Linear(3, 3)(torch.ones(1, 3))


CNNS = {
    "ours": lambda: build_model("resnet_debug"),
    "our ConvNeXt": lambda: build_model("convnext_debug"),
    "torchvision's": lambda: torchvision.models.resnet18(),
    "torchvision's ConvNeXt": lambda: torchvision.models.convnext_tiny(),
    "with probabilities": lambda: nn.Sequential(build_model("resnet_debug"), nn.Softmax(-1)),
}


@pytest.mark.parametrize("name", CNNS)
@pytest.mark.parametrize("grad", [False, True])
def test_a_convolutional_network_is_said_to_have_none(name: str, grad: bool):
    model = CNNS[name]().eval()
    message = r"this network has none, .* for it convolves .* need a transformer; .* model\.features\(images\)"
    with torch.set_grad_enabled(grad), pytest.raises(NoAttentionError, match=message), record_attention():
        model(torch.randn(1, 3, 64, 64))


class Hidden(nn.Module):
    """Attention that nobody can see: patches, projections, and an operator of one's own."""

    def __init__(self, *, by_convolution: bool) -> None:
        super().__init__()
        self.by_convolution = by_convolution
        self.patches, self.qkv = nn.Conv2d(3, 6, 8, 8), nn.Linear(6, 18)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        x = self.patches(images)
        if self.by_convolution:
            return x + x.flatten(2).softmax(-1).sum(-1)[..., None, None]
        return self.qkv(x.flatten(2).mT)


@pytest.mark.parametrize("by_convolution", [False, True])
def test_attention_that_cannot_be_seen_is_not_taken_for_none(by_convolution: bool):
    with pytest.raises(NoAttentionError, match="switch the model to sdpa"), record_attention():
        Hidden(by_convolution=by_convolution)(torch.randn(1, 3, 16, 16))


def test_layers_out_of_range_name_the_depth(images, small_vit):
    with pytest.raises(ValueError, match=r"layers must lie in 1 … 3, .*; got \[4\]"), record_attention(layers=[1, 4]):
        small_vit()(images)


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({"layers": [0]}, r"layers must be numbers from 1, or None for all; got \[0\]"),
        ({"layers": "2"}, "layers must be numbers from 1, or None for all; got '2'"),
        ({"layers": [True]}, r"layers must be numbers from 1, or None for all; got \[True\]"),
        ({"heads": 1.5}, "heads must be mean, head numbers from 0, or None for all; got 1.5"),
        ({"queries": [0.0]}, r"queries must be class, row numbers from 0, or None for all; got \[0.0\]"),
        ({"heads": "max"}, "heads must be mean, head numbers from 0, or None for all; got 'max'"),
        ({"queries": "cls"}, "queries must be class, row numbers from 0, or None for all; got 'cls'"),
        ({"heads": 3}, r"heads must lie in 0 … 2 at layer 1, which has 3 heads; got \[3\]"),
        ({"queries": [17]}, r"queries must lie in 0 … 16 at layer 1, which has 17 queries; got \[17\]"),
        ({"grad": True, "heads": "mean"}, "grad=True records whole maps"),
        ({"prefix": -1}, "prefix must be the number of rows before the image tokens; got -1"),
    ],
)
def test_what_is_not_there_cannot_be_asked_for(asked, message, images, small_vit):
    with pytest.raises(ValueError, match=message), record_attention(**asked):
        small_vit()(images)


@pytest.mark.parametrize(
    ("fields", "rows"),
    [
        ({"reg_tokens": 2}, (0,)),
        ({"global_pool": "avg"}, tuple(range(1, 17))),
        ({"class_token": False, "reg_tokens": 2, "global_pool": "avg"}, tuple(range(2, 18))),
        ({"class_token": False, "global_pool": "avg"}, None),
    ],
)
def test_class_rows_are_those_that_the_head_reads(fields, rows, images, small_vit):
    with record_attention([3], queries="class") as record:
        small_vit(**fields)(images)
    assert record.maps[0].queries == rows
    assert record.maps[0].weights.shape[2] == (len(rows) if rows else 16)


def test_two_rows_may_be_read():
    layout = Layout((2, 2), 2, readout=(0, 1))
    with record_attention(queries="class") as record:
        attend(*torch.randn(3, 1, 2, 6, 4).unbind(), layout=layout)
    assert record.maps[0].queries == (0, 1)


def test_layers_of_several_unread_rows_have_no_class_row():
    """Object queries: left out, unless the layer was named."""
    q, k, v = torch.randn(3, 1, 2, 6, 4).unbind()
    with record_attention(queries="class") as record:
        attend(q, k, v, layout=Layout((2, 3)))
        attend(q, k, v, layout=Layout((2, 2), 2))
    assert [seen.layer for seen in record.maps] == [1]
    message = "which of them the head reads, and layer 1 has no layout that tells"
    with pytest.raises(CannotExplainError, match=message), record_attention([1], queries="class"):
        attend(q, k, v, layout=Layout((2, 2), 2))


def test_an_exception_inside_leaves_nothing(stance):
    with pytest.raises(RuntimeError, match="stack expects"), record_attention():
        torch.stack([])
    assert _get_current_function_mode_stack() == []
    assert stance() == "default"
