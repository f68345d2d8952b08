"""Maps in the graph: gradients reach them, whatever the model does to save memory."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from vitrail.explain.record import record_attention
from vitrail.layers.attention import Attention, attend
from vitrail.layers.talking import Mix


@pytest.mark.parametrize("frozen", [False, True])
def test_gradients_reach_the_maps(frozen, images, small_vit):
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


def test_gradient_checkpointing_is_off_while_recording_gradients(images, small_vit):
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
def test_gradients_need_autograd(off, message, images, small_vit):
    with off(), pytest.raises(ValueError, match=f"needs the autograd graph.*{message}"), record_attention(grad=True):
        pass
    with pytest.raises(ValueError, match=f"needs the autograd graph.*{message}"), record_attention(grad=True), off():
        small_vit()(images)
