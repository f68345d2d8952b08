"""PVT v2 against transformers': every tensor randomised, carried over by the key map, every stage and map compared."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from vitrail.explain.record import record_attention
from vitrail.models.pvt_v2 import PyramidVisionTransformerV2
from vitrail.weights.keymaps.pvt_v2 import TRANSFORMERS
from vitrail.weights.layouts import layout_of
from vitrail.weights.load import create_model

transformers = pytest.importorskip("transformers")
safetensors = pytest.importorskip("safetensors.torch")

OURS: dict[str, Any] = dict(
    img_size=64, embed_dims=(16, 32, 40, 64), depths=(1, 2, 1, 2), num_heads=(1, 2, 5, 8), num_classes=7
)
CASES: dict[str, dict[str, Any]] = {
    "plain": {},
    "linear": dict(linear=True),
    "no qkv bias": dict(qkv_bias=False),
    "another norm epsilon": dict(norm_eps=1e-2),
}
THEIRS = {
    "img_size": "image_size", "embed_dims": "hidden_sizes", "num_heads": "num_attention_heads",
    "num_classes": "num_labels", "linear": "linear_attention", "norm_eps": "layer_norm_eps",
}  # fmt: skip


def twins(folder: Path, **options: Any) -> tuple[PyramidVisionTransformerV2, nn.Module]:
    """Ours and theirs, by way of the names that theirs has on disk."""
    options = {**OURS, **options}
    theirs_options = {THEIRS.get(k, k): list(v) if isinstance(v, tuple) else v for k, v in options.items()}
    theirs = transformers.PvtV2ForImageClassification(transformers.PvtV2Config(**theirs_options)).eval()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for tensor in theirs.state_dict().values():
            tensor.copy_(torch.randn(tensor.shape, generator=generator) * 0.3)
    theirs.save_pretrained(folder)
    tensors = safetensors.load_file(folder / "model.safetensors")
    assert layout_of(tensors) is TRANSFORMERS
    ours = PyramidVisionTransformerV2(**options, conv_norm_eps=options.get("norm_eps", 1e-6)).eval()
    ours.load_state_dict(TRANSFORMERS.to_ours(tensors), strict=True)
    back = TRANSFORMERS.to_theirs(ours.state_dict())
    assert back.keys() == tensors.keys() and all(torch.equal(back[name], tensors[name]) for name in back)
    return ours, theirs


def close(ours: Tensor, theirs: Tensor) -> None:
    """1e-5 of the largest value, in fp32."""
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5 * max(1.0, theirs.abs().max().item()))


@pytest.mark.parametrize("size", [(64, 64), (57, 71)], ids=str)
@pytest.mark.parametrize("case", CASES)
@torch.no_grad()
def test_logits_stages_and_recorded_attention_equal_transformers(
    case: str, size: tuple[int, int], tmp_path: Path
) -> None:
    ours, theirs = twins(tmp_path, **CASES[case])
    x = torch.randn(2, 3, *size)
    answer = theirs(x, output_hidden_states=True, output_attentions=True)
    with record_attention() as record:
        close(ours(x), answer.logits)
    for mine, other in zip(ours.features(x).maps, answer.hidden_states, strict=True):
        close(mine, other)
    others = [weights for stage in answer.attentions for weights in stage]
    assert len(record.maps) == len(others) == sum(OURS["depths"])
    for mine, other in zip(record.maps, others, strict=True):
        torch.testing.assert_close(mine.weights, other, rtol=0, atol=1e-5)


@torch.no_grad()
def test_a_folder_of_transformers_answers_as_there(tmp_path: Path) -> None:
    theirs = transformers.PvtV2ForImageClassification(transformers.PvtV2Config(num_labels=11)).eval()
    theirs.save_pretrained(tmp_path)
    ours = create_model(f"local-dir:{tmp_path}", pretrained=True).eval()
    assert (ours.variant, ours.config.norm_eps, ours.config.conv_norm_eps) == ("pvt_v2_b0", 1e-6, 1e-6)
    close(ours(x := torch.randn(1, 3, 96, 96)), theirs(x).logits)
