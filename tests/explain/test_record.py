"""Recording attention: what is seen equals the closed form, and nothing but the record is left behind."""

from __future__ import annotations

import threading
from contextlib import nullcontext

import pytest
import torch
from torch import Tensor, nn
from torch.overrides import _get_current_function_mode_stack
from torch.utils.checkpoint import checkpoint

from vitrail.explain.record import record_attention
from vitrail.layers.attention import Attention, Layout, Mix, attend
from vitrail.models.vit import VisionTransformer

KERNELS = ("auto", "fused", "eager")


def small_vit(**fields: object) -> VisionTransformer:
    shape = {"img_size": 32, "patch_size": 8, "embed_dim": 24, "depth": 3, "num_heads": 3, "num_classes": 5}
    model = VisionTransformer(**(shape | fields)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.3)
    return model


def expected_maps(model: VisionTransformer, images: Tensor) -> list[Tensor]:
    """The attention of every block by hand: softmax(q kᵀ / sqrt(D)) from the block's own input, in float64."""
    inputs: list[Tensor] = []
    hooks = [b.attn.register_forward_pre_hook(lambda _, args: inputs.append(args[0])) for b in model.blocks]
    with torch.no_grad():
        model(images)
    for hook in hooks:
        hook.remove()
    return [softmax_of(block.attn, x) for block, x in zip(model.blocks, inputs, strict=True)]


def softmax_of(attn: Attention, x: Tensor) -> Tensor:
    qkv = x.double() @ attn.qkv.weight.double().T + attn.qkv.bias.double()
    batch, tokens, width = x.shape
    q, k, _ = qkv.reshape(batch, tokens, 3, attn.num_heads, -1).permute(2, 0, 3, 1, 4)
    scores = q @ k.transpose(-2, -1) / (width / attn.num_heads) ** 0.5
    return (scores.exp() / scores.exp().sum(-1, keepdim=True)).detach()


def stance() -> str:
    from torch._dynamo import eval_frame

    return eval_frame._stance.stance


@pytest.fixture(autouse=True)
def nothing_stays():
    """After every test: no mode on the stack, no stance held."""
    yield
    assert _get_current_function_mode_stack() == []
    assert stance() == "default"


@pytest.fixture
def images() -> Tensor:
    return torch.randn(2, 3, 32, 32)


@pytest.mark.parametrize("kernel", KERNELS)
def test_maps_equal_the_closed_form(kernel, images):
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
def test_recording_changes_no_bit_of_the_output(kernel, images):
    model = small_vit(attn=kernel)
    with torch.no_grad():
        plain = model(images)
        with record_attention():
            watched = model(images)
    assert torch.equal(plain, watched)


def test_training_randomness_is_untouched_and_maps_are_before_dropout(images):
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


def test_only_what_was_asked_is_kept(images):
    model = small_vit()
    whole = expected_maps(model, images)
    with record_attention(layers=[2], heads=[2, 0], queries="class") as record:
        model(images)
    (seen,) = record.maps
    assert (seen.layer, seen.heads, seen.queries) == (2, (2, 0), (0,))
    torch.testing.assert_close(seen.weights.double(), whole[1][:, [2, 0], :1], atol=1e-5, rtol=0)
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


def test_layers_out_of_range_name_the_depth(images):
    with pytest.raises(ValueError, match=r"layers must lie in 1 … 3, .*; got \[4\]"), record_attention(layers=[1, 4]):
        small_vit()(images)


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({"layers": [0]}, r"layers must be numbers from 1, or None for all; got \[0\]"),
        ({"heads": "max"}, "heads must be mean, head numbers from 0, or None for all; got 'max'"),
        ({"queries": "cls"}, "queries must be class, row numbers from 0, or None for all; got 'cls'"),
        ({"heads": 3}, r"heads must lie in 0 … 2 at layer 1, which has 3 heads; got \[3\]"),
        ({"queries": [17]}, r"queries must lie in 0 … 16 at layer 1, which has 17 queries; got \[17\]"),
        ({"grad": True, "heads": "mean"}, "grad=True records whole maps"),
        ({"prefix": -1}, "prefix must be the number of rows before the image tokens; got -1"),
    ],
)
def test_what_is_not_there_cannot_be_asked_for(asked, message, images):
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
def test_class_rows_are_those_that_the_head_reads(fields, rows, images):
    with record_attention([3], queries="class") as record:
        small_vit(**fields)(images)
    assert record.maps[0].queries == rows
    assert record.maps[0].weights.shape[2] == (len(rows) if rows else 16)


def test_two_rows_may_be_read():
    layout = Layout((2, 2), 2, readout=(0, 1))
    with record_attention(queries="class") as record:
        attend(*torch.randn(3, 1, 2, 6, 4).unbind(), layout=layout)
    assert record.maps[0].queries == (0, 1)


def test_an_exception_inside_leaves_nothing():
    with pytest.raises(RuntimeError, match="stack expects"), record_attention():
        torch.stack([])
    assert _get_current_function_mode_stack() == []
    assert stance() == "default"


# ---- maps in the graph


@pytest.mark.parametrize("frozen", [False, True])
def test_gradients_reach_the_maps(frozen, images):
    model = small_vit(attn_drop_rate=0.3).requires_grad_(not frozen)
    with record_attention(grad=True) as record:
        logits = model(images)
    torch.testing.assert_close(logits, model(images), atol=1e-4, rtol=1e-4)
    grads = torch.autograd.grad(logits[:, 1].sum(), [m.weights for m in record.maps])
    assert all(g.shape == (2, 3, 17, 17) and g.abs().sum() > 0 for g in grads)


def test_gradients_equal_finite_differences():
    """d out / d weights of one attention is v itself: out = weights @ v."""
    q, k, v = torch.randn(3, 1, 1, 4, 2, dtype=torch.float64).unbind()
    with record_attention(grad=True) as record:
        out = attend(q, k, v)
    (grad,) = torch.autograd.grad(out[0, 0, 2, 1], record.maps[0].weights)
    wanted = torch.zeros(4, 4, dtype=torch.float64)
    wanted[2] = v[0, 0, :, 1]
    torch.testing.assert_close(grad[0, 0], wanted)


def test_gradients_reach_both_maps_of_talking_heads():
    q, k, v = torch.randn(3, 2, 3, 6, 4).unbind()
    with record_attention(grad=True) as record:
        out = attend(q, k, v, mix=Mix(torch.randn(3, 3), torch.randn(3, 3)))
    grads = torch.autograd.grad(out.sum(), [record.maps[0].weights, record.maps[0].effective])
    assert all(g.abs().sum() > 0 for g in grads)


def test_gradient_checkpointing_is_off_while_recording_gradients(images):
    model = small_vit()
    with record_attention(grad=True) as record:
        plain = model(images)
    wanted = torch.autograd.grad(plain[:, 0].sum(), [m.weights for m in record.maps])
    model.set_grad_checkpointing(True)
    with record_attention(grad=True) as record:
        logits = model(images)
        grads = torch.autograd.grad(logits[:, 0].sum(), [m.weights for m in record.maps], retain_graph=True)
        logits.sum().backward()
    assert len(record.maps) == 3
    assert model.grad_checkpointing
    for grad, right in zip(grads, wanted, strict=True):
        torch.testing.assert_close(grad, right)


class Checkpointed(nn.Module):
    """A foreign model that checkpoints by itself, whatever function mode is on."""

    def __init__(self, reentrant: bool) -> None:
        super().__init__()
        self.block, self.reentrant = Attention(12, 3), reentrant
        self.runs = 0

    def run(self, x: Tensor) -> Tensor:
        self.runs += 1
        return self.block(x).sin()

    def forward(self, x: Tensor) -> Tensor:
        return checkpoint(self.run, x, use_reentrant=self.reentrant)


def test_foreign_checkpointing_finds_nothing_to_recompute():
    model, x = Checkpointed(reentrant=False), torch.randn(2, 5, 12, requires_grad=True)
    with record_attention(grad=True) as record:
        y = model(x)
    (grad,) = torch.autograd.grad(y.sum(), record.maps[0].weights)
    assert grad.abs().sum() > 0
    assert model.runs == 1
    model(x).sum().backward()
    assert model.runs == 3  # and afterwards it checkpoints again


def test_reentrant_checkpointing_is_refused():
    with pytest.raises(ValueError, match="reentrant gradient checkpointing"), record_attention(grad=True):
        Checkpointed(reentrant=True)(torch.randn(2, 5, 12, requires_grad=True))


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("backward", [torch.autograd.backward, Tensor.backward])
def test_a_recomputed_layer_counts_once(reentrant, backward):
    model = Checkpointed(reentrant)
    with record_attention() as record:
        backward(model(torch.randn(2, 5, 12, requires_grad=True)).sum())
    assert model.runs == 2
    assert len(record.maps) == 1


@pytest.mark.parametrize(("off", "message"), [(torch.inference_mode, "inference_mode"), (torch.no_grad, "no_grad")])
def test_gradients_need_autograd(off, message, images):
    with off(), pytest.raises(ValueError, match=f"needs the autograd graph.*{message}"), record_attention(grad=True):
        pass
    with pytest.raises(ValueError, match=f"needs the autograd graph.*{message}"), record_attention(grad=True), off():
        small_vit()(images)


# ---- compiled models and threads


class Counting:
    """A compiler that counts how often its graphs run."""

    def __init__(self) -> None:
        self.runs = 0

    def __call__(self, graph, inputs):
        def run(*args):
            self.runs += 1
            return graph(*args)

        return run


def test_a_compiled_model_is_recorded_and_runs_compiled_again(images):
    model, backend = small_vit(), Counting()
    compiled = torch.compile(model, backend=backend)
    with torch.no_grad():
        before = compiled(images)
        runs = backend.runs
        with record_attention() as record:
            compiled(images)
        assert len(record.maps) == 3
        assert backend.runs == runs > 0
        torch.testing.assert_close(compiled(images), before)
    assert backend.runs == 2 * runs


def test_the_stance_that_was_held_comes_back(images):
    with torch.compiler.set_stance("eager_on_recompile"):
        with record_attention():
            assert stance() == "force_eager"
            small_vit()(images)
        assert stance() == "eager_on_recompile"


def test_eight_threads_at_once_get_their_own_maps():
    model = small_vit()
    images = torch.randn(8, 1, 3, 32, 32)
    barrier, found = threading.Barrier(8), {}

    def work(number: int) -> None:
        barrier.wait()
        for turn in range(4):
            try:
                with record_attention() as record, torch.no_grad():
                    model(images[number])
                    if turn == 3 and number % 2:
                        raise KeyError("half of them fail")
            except KeyError:
                pass
            found[number] = record.maps

    threads = [threading.Thread(target=work, args=(n,)) for n in range(8)]
    [t.start() for t in threads]
    [t.join() for t in threads]
    for number in range(8):
        wanted = expected_maps(model, images[number])
        for seen, right in zip(found[number], wanted, strict=True):
            torch.testing.assert_close(seen.weights.double(), right, atol=1e-5, rtol=0)


def test_a_compiled_model_in_many_threads(images):
    """Half of them record: each its own maps, and afterwards graphs run again."""
    model, backend = small_vit(), Counting()
    compiled = torch.compile(model, backend=backend)
    with torch.no_grad():
        plain = compiled(images)
    found, outputs = {}, {}
    barrier = threading.Barrier(6)

    def work(number: int) -> None:
        barrier.wait()
        for _ in range(3):
            with torch.no_grad(), record_attention() if number % 2 else nullcontext() as record:
                outputs[number] = compiled(images + number)
            found[number] = record

    threads = [threading.Thread(target=work, args=(n,)) for n in range(6)]
    [t.start() for t in threads]
    [t.join() for t in threads]
    for number in range(6):
        torch.testing.assert_close(outputs[number], model(images + number).detach(), atol=1e-4, rtol=1e-4)
    for number in (1, 3, 5):
        for seen, wanted in zip(found[number].maps, expected_maps(model, images + number), strict=True):
            torch.testing.assert_close(seen.weights.double(), wanted, atol=1e-5, rtol=0)
    runs = backend.runs
    with torch.no_grad():
        torch.testing.assert_close(compiled(images), plain)
    assert backend.runs > runs


def test_another_thread_sees_nothing(images):
    model, failures = small_vit(), []
    with record_attention() as record:
        other = threading.Thread(target=lambda: failures.append(model(images).isnan().any()))
        other.start()
        other.join()
        assert record.maps == []
        model(images)
    assert len(record.maps) == 3


def test_one_recording_inside_another(images):
    model = small_vit()
    with record_attention() as outer:
        with record_attention(layers=[1], queries="class") as inner:
            model(images)
        assert stance() == "force_eager"
    assert (len(outer.maps), len(inner.maps)) == (3, 1)
