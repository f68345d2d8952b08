"""Nothing stays behind: no hook, no mode, no stance, no process-wide setting, however a call ended."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.modules import module as torch_module
from torch.overrides import BaseTorchFunctionMode, _get_current_function_mode_stack
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack

from vitrail.explain.maps import explain
from vitrail.explain.record import record_attention
from vitrail.models.registry import build_model
from vitrail.predict import Predictor
from vitrail.records import Batch
from vitrail.tasks.base import evaluate
from vitrail.tasks.classify import Classify


def hooks(model: nn.Module) -> dict[str, int]:
    """How many hooks of each kind the modules and tensors of a model, and torch itself, carry."""
    found: dict[str, int] = {}
    for module in model.modules():
        kinds = {k: len(v) for k, v in vars(module).items() if k.endswith("_hooks") and hasattr(v, "__len__")}
        found |= {kind: found.get(kind, 0) + count for kind, count in kinds.items()}
    found["tensors"] = sum(len(p._backward_hooks or ()) for p in model.parameters())
    found["global"] = sum(len(v) for k, v in vars(torch_module).items() if k.startswith("_global_") and "hooks" in k)
    return found


def state(model: nn.Module) -> dict[str, Any]:
    return {
        "hooks": hooks(model),
        "training": [m.training for m in model.modules()],
        "requires_grad": [p.requires_grad for p in model.parameters()],
        "gradients": [p.grad is not None for p in model.parameters()],
        "methods": [sorted(k for k, v in vars(m).items() if callable(v) and k == "forward") for m in model.modules()],
        "function modes": len(_get_current_function_mode_stack()),
        "dispatch modes": len(_get_current_dispatch_mode_stack()),
        "stance": torch._dynamo.eval_frame._stance.stance,
        "grad": torch.is_grad_enabled(),
        "autocast": torch.is_autocast_enabled("cpu"),
        "matmul precision": torch.get_float32_matmul_precision(),
        "dtype": torch.get_default_dtype(),
        "threads": torch.get_num_threads(),
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "fused kernels": torch.backends.mha.get_fastpath_enabled(),
    }


@pytest.fixture
def model() -> nn.Module:
    model = build_model("vit_debug")
    model.classes = tuple("abcdefghij")
    return model.eval()


IMAGES = torch.zeros(2, 3, 32, 32)


def recorded(model: nn.Module) -> None:
    with record_attention(grad=True) as record:
        model(IMAGES)
    assert record.maps


def recording_fails(model: nn.Module) -> None:
    def interrupted() -> None:
        with record_attention():
            model(IMAGES)
            raise KeyError("by the user")

    with pytest.raises(KeyError, match="by the user"):
        interrupted()
    with pytest.raises(ValueError, match="layers"), record_attention(layers=[99]):
        model(IMAGES)


def explained(model: nn.Module) -> None:
    assert explain(model, IMAGES[0], method="rollout").heat.ndim == 2
    assert explain(model, IMAGES[0], method="attention", layer=2).heat.ndim == 2


def predicted(model: nn.Module) -> None:
    from PIL import Image

    assert Predictor(model).predict(Image.new("RGB", (40, 30))).label in "abcdefghij"


def evaluated(model: nn.Module) -> None:
    batch = Batch(image=IMAGES, label=torch.tensor([0, 1]), id=["0", "1"])
    assert "accuracy" in evaluate(Classify(model), [batch])


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("call", [recorded, recording_fails, explained, predicted, evaluated])
def test_nothing_stays_behind(model: nn.Module, call: Callable[[nn.Module], None], training: bool):
    model.train(training)
    before = state(model)
    assert before["stance"] == "default", "left so by another test"
    call(model)
    assert state(model) == before


@contextmanager
def left_hook(model: nn.Module) -> Iterator[None]:
    handle = model.blocks[0].register_forward_hook(lambda *_: None)
    yield
    handle.remove()


@contextmanager
def left_stance(model: nn.Module) -> Iterator[None]:
    with torch.compiler.set_stance("force_eager"):
        yield


@contextmanager
def left_mode(model: nn.Module) -> Iterator[None]:
    with BaseTorchFunctionMode():
        yield


@contextmanager
def left_precision(model: nn.Module) -> Iterator[None]:
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    yield
    torch.set_float32_matmul_precision(before)


LEFT = {"hooks": left_hook, "function modes": left_mode, "stance": left_stance, "matmul precision": left_precision}


@pytest.mark.parametrize("where", LEFT)
def test_the_check_sees_what_stays(model: nn.Module, where: str):
    before = state(model)
    with LEFT[where](model):
        after = state(model)
    assert [key for key in before if before[key] != after[key]] == [where]
