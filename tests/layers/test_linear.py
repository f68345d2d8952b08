"""A linear layer is the same function by every kernel, and oneDNN is called only where that is sound."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.utils.flop_counter import FlopCounterMode

from vitrail.layers import linear
from vitrail.layers.linear import Linear, activated, plain_linear

ONEDNN = torch.backends.mkldnn.is_available()
needs_onednn = pytest.mark.skipif(not ONEDNN, reason="this PyTorch has no oneDNN")


@pytest.fixture
def taken(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
    """The shapes that oneDNN was called for, on a machine where it always pays."""
    shapes: list[tuple[int, ...]] = []
    real = linear._onednn

    def spy(x: Tensor, weight: Tensor, bias: Tensor | None, *then: str) -> Tensor:
        shapes.append(tuple(x.shape))
        return real(x, weight, bias, *then)

    monkeypatch.setattr(linear, "_onednn", spy)
    monkeypatch.setattr(linear, "_is_fast", lambda dtype, threads: True)
    monkeypatch.setattr(linear, "LEAST", 1)
    return shapes


@needs_onednn
@torch.no_grad()
@pytest.mark.parametrize("shape", [(3,), (5, 3), (2, 5, 3), (1, 1, 3), (2, 0, 3)])
@pytest.mark.parametrize("bias", [True, False])
def test_onednn_is_the_same_product(shape: tuple[int, ...], bias: bool, taken: list[Any]) -> None:
    layer, x = Linear(3, 7, bias=bias), torch.randn(shape)
    torch.testing.assert_close(layer(x), F.linear(x, layer.weight, layer.bias), atol=1e-6, rtol=1e-6)
    assert bool(taken) == (0 not in shape)


@needs_onednn
@torch.no_grad()
def test_strides_do_not_matter(taken: list[Any]) -> None:
    layer, x = Linear(6, 4), torch.randn(5, 12, 3).transpose(1, 2)[..., ::2]
    torch.testing.assert_close(layer(x), F.linear(x, layer.weight, layer.bias), atol=1e-6, rtol=1e-6)
    assert taken == [(5, 3, 6)]


@needs_onednn
@torch.no_grad()
def test_weights_that_change_are_seen(taken: list[Any]) -> None:
    """Nothing of a weight is kept from one call to the next."""
    layer, x = Linear(8, 8), torch.randn(2, 8)
    before = layer(x)
    layer.weight.mul_(2)
    layer.bias.mul_(2)
    torch.testing.assert_close(layer(x), 2 * before)
    assert len(taken) == 2


@needs_onednn
@torch.no_grad()
def test_small_products_go_the_usual_way(taken: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(linear, "LEAST", 4 * 8 * 16)
    layer = Linear(8, 16)
    layer(torch.ones(3, 8))
    layer(torch.ones(4, 8))
    assert taken == [(4, 8)]


@needs_onednn
@torch.no_grad()
def test_in_bf16_it_is_as_near_to_the_truth(taken: list[Any]) -> None:
    x, layer = torch.randn(64, 96, dtype=torch.bfloat16), Linear(96, 32).bfloat16()
    truth = F.linear(x.double(), layer.weight.double(), layer.bias.double())
    usual = (F.linear(x, layer.weight, layer.bias) - truth).abs().max()
    assert (layer(x) - truth).abs().max() <= 1.1 * usual
    assert len(taken) == 1


def with_gradients(layer: Linear, x: Tensor) -> None:
    layer(x).sum().backward()
    assert layer.weight.grad is not None


@torch.no_grad()
def under_autocast(layer: Linear, x: Tensor) -> None:
    with torch.autocast("cpu", torch.bfloat16):
        assert layer(x).dtype == torch.bfloat16


@torch.no_grad()
def when_counted(layer: Linear, x: Tensor) -> None:
    with FlopCounterMode(display=False) as counter:
        layer(x)
    assert counter.get_total_flops() == 2 * x.shape[0] * x.shape[1] * layer.out_features


@torch.no_grad()
def mapped_over(layer: Linear, x: Tensor) -> None:
    torch.testing.assert_close(torch.func.vmap(layer)(x), layer.weight.new_tensor(layer(x).tolist()))


@torch.no_grad()
def forward_differentiated(layer: Linear, x: Tensor) -> None:
    with forward_ad.dual_level():
        made = layer(forward_ad.make_dual(x, torch.ones_like(x)))
        assert forward_ad.unpack_dual(made).tangent is not None


@torch.no_grad()
def of_a_class_of_its_own(layer: Linear, x: Tensor) -> None:
    class Own(Tensor):
        pass

    assert type(layer(x.as_subclass(Own))) is Own


@torch.no_grad()
def when_onednn_is_off(layer: Linear, x: Tensor) -> None:
    torch.backends.mkldnn.enabled = False
    try:
        layer(x)
    finally:
        torch.backends.mkldnn.enabled = True


@torch.no_grad()
def where_bits_must_repeat(layer: Linear, x: Tensor) -> None:
    with plain_linear():
        assert torch.equal(layer(x), F.linear(x, layer.weight, layer.bias))


@torch.no_grad()
def of_other_widths(layer: Linear, x: Tensor) -> None:
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        layer(x[:, :-1])


@torch.no_grad()
def of_another_dtype(layer: Linear, x: Tensor) -> None:
    with pytest.raises(RuntimeError, match="dtype"):
        layer(x.bfloat16())


@torch.no_grad()
def with_a_bias_of_another_dtype(layer: Linear, x: Tensor) -> None:
    layer.bias = nn.Parameter(layer.bias.bfloat16())
    with pytest.raises(RuntimeError, match="dtype"):
        layer(x)


@torch.no_grad()
def on_no_device(layer: Linear, x: Tensor) -> None:
    assert layer.to("meta")(x.to("meta")).device.type == "meta"


@torch.no_grad()
def when_traced(layer: Linear, x: Tensor) -> None:
    assert "mkldnn" not in str(torch.jit.trace(layer, x, check_trace=False).inlined_graph)


@torch.no_grad()
def when_exported(layer: Linear, x: Tensor) -> None:
    assert "mkldnn" not in str(torch.export.export(layer, (x,)).graph)


@pytest.mark.filterwarnings("ignore:`torch.jit")
@pytest.mark.parametrize(
    "used",
    [
        with_gradients, under_autocast, when_counted, mapped_over, forward_differentiated, of_a_class_of_its_own,
        when_onednn_is_off, where_bits_must_repeat, of_other_widths, of_another_dtype,
        with_a_bias_of_another_dtype, on_no_device, when_traced,
        when_exported,
    ],
)  # fmt: skip
def test_where_onednn_would_lose_something_it_is_not_called(
    used: Callable[[Linear, Tensor], None], taken: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    used(Linear(6, 4), torch.randn(3, 6))
    assert taken == ([(3, 6)] if used is mapped_over else [])  # which is called once more, plainly, to compare


def test_the_setting_holds_in_this_block_alone(taken: list[Any]) -> None:
    layer, x = Linear(2, 2), torch.ones(1, 2)
    with torch.no_grad():
        with pytest.raises(KeyError), plain_linear():
            raise KeyError
        layer(x)
    assert bool(taken) == ONEDNN


@needs_onednn
@pytest.mark.parametrize(("onednn", "usual", "pays"), [(0.5, 1.0, True), (1.0, 1.0, False), (2.0, 1.0, False)])
def test_in_fp32_a_timing_decides(onednn: float, usual: float, pays: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    spent = {linear._onednn: onednn, F.linear: usual}
    monkeypatch.setattr(linear, "_seconds", lambda call, *args: spent[call])
    assert linear._pays() is pays


@needs_onednn
def test_a_real_timing_says_yes_or_no_once(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[Any] = []
    real = linear._pays
    monkeypatch.setattr(linear, "_pays", lambda: calls.append(1) or real())
    monkeypatch.setattr(linear, "LEAST", 1)
    linear._is_fast.cache_clear()
    layer, x = Linear(4, 4), torch.ones(2, 4)
    with torch.inference_mode():
        layer(x)
        layer(x)
    assert len(calls) == 1
    assert isinstance(layer, nn.Linear)


@torch.no_grad()
def test_other_dtypes_go_the_usual_way() -> None:
    assert Linear(4, 3).double()(torch.ones(2, 4).double()).dtype == torch.float64
    assert not linear._is_fast(torch.float64, 1)


@needs_onednn
@torch.no_grad()
def test_the_timing_is_of_fp32_on_the_cpu_whatever_the_defaults() -> None:
    torch.set_default_dtype(torch.float64)
    try:
        with torch.device("meta"):
            assert linear._pays() in (True, False)
    finally:
        torch.set_default_dtype(torch.float32)


@needs_onednn
@torch.no_grad()
@pytest.mark.parametrize("form", ["none", "tanh"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_activation_is_applied_with_the_product(
    form: str, dtype: torch.dtype, taken: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    layer, act, x = Linear(6, 9).to(dtype), nn.GELU(approximate=form), 3 * torch.randn(5, 7, 6, dtype=dtype)
    layer.bias.copy_(torch.linspace(-4, 4, 9))
    calls: list[Tensor] = []
    monkeypatch.setattr(nn.GELU, "forward", lambda self, x: calls.append(x))
    found = activated(layer, act, x)
    truth = F.gelu(F.linear(x.double(), layer.weight.double(), layer.bias.double()), approximate=form)
    torch.testing.assert_close(found.double(), truth, atol=1e-6 if dtype == torch.float32 else 0.03, rtol=1e-2)
    assert (taken, calls) == ([(5, 7, 6)], [])


def hooked(layer: nn.Module, act: nn.Module) -> None:
    act.register_forward_pre_hook(lambda module, args: None)


def hooked_before(layer: nn.Module, act: nn.Module) -> None:
    layer.register_forward_hook(lambda module, args, out: None)


def replaced(layer: nn.Module, act: nn.Module) -> None:
    plain = layer.forward
    layer.forward = lambda x: plain(x) + 1  # type: ignore[method-assign]


def nothing(layer: nn.Module, act: nn.Module) -> None: ...


class OwnLinear(Linear):
    """Somebody's layer: it may do more."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + 1


class OwnGELU(nn.GELU):
    """Somebody's activation."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + 1


@needs_onednn
@pytest.mark.parametrize(
    ("layer", "act", "do", "grad"),
    [
        (Linear(6, 9), nn.GELU(), hooked, False),
        (Linear(6, 9), nn.GELU(), hooked_before, False),
        (Linear(6, 9), nn.GELU(), replaced, False),
        (Linear(6, 9), nn.GELU(), nothing, True),
        (Linear(6, 9), nn.ReLU(), nothing, False),
        (OwnLinear(6, 9), nn.GELU(), nothing, False),
        (nn.Linear(6, 9), nn.GELU(), nothing, False),
        (Linear(6, 9), OwnGELU(), nothing, False),
    ],
)
def test_between_layer_and_activation_nobody_is_passed_by(
    layer: nn.Module, act: nn.Module, do: Any, grad: bool, monkeypatch: pytest.MonkeyPatch, taken: list[Any]
) -> None:
    real, fused = linear._onednn, []
    monkeypatch.setattr(linear, "_onednn", lambda x, w, b, *then: fused.extend(then) or real(x, w, b, *then))
    do(layer, act)
    x = torch.randn(4, 6)
    with torch.set_grad_enabled(grad):
        torch.testing.assert_close(activated(layer, act, x), act(layer(x)), atol=1e-6, rtol=1e-6)
    assert fused == []
