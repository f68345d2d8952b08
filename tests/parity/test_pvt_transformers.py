"""PVT against transformers': every tensor randomised, carried over by the key map, logits and every block compared.

transformers' model takes its own size alone; other sizes stand in tests/models/test_pvt.py.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from vitrail.explain.record import record_attention
from vitrail.models.pvt import PyramidVisionTransformer
from vitrail.weights.keymaps.pvt import TRANSFORMERS
from vitrail.weights.layouts import layout_of
from vitrail.weights.load import create_model

transformers = pytest.importorskip("transformers")
safetensors = pytest.importorskip("safetensors.torch")

OURS: dict[str, Any] = dict(
    img_size=64, embed_dims=(16, 32, 40, 64), depths=(1, 2, 1, 2), num_heads=(1, 2, 5, 8), num_classes=7
)
CASES: dict[str, dict[str, Any]] = {
    "plain": {},
    "no qkv bias": dict(qkv_bias=False),
    "another norm epsilon": dict(norm_eps=1e-2),
    "other ratios": dict(sr_ratios=(4, 2, 1, 1), mlp_ratios=(2, 3, 4, 1)),
    "two channels": dict(in_chans=2),
}
THEIRS = {
    "img_size": "image_size", "embed_dims": "hidden_sizes", "num_heads": "num_attention_heads",
    "in_chans": "num_channels", "num_classes": "num_labels", "norm_eps": "layer_norm_eps",
    "sr_ratios": "sequence_reduction_ratios",
}  # fmt: skip


def randomise(model: nn.Module) -> None:
    """Default inits hide mistakes behind zeros and ones; this leaves none."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for tensor in model.state_dict().values():
            tensor.copy_(torch.randn(tensor.shape, generator=generator) * 0.3)


def twins(folder: Path, **options: Any) -> tuple[PyramidVisionTransformer, nn.Module]:
    """Ours and theirs, by way of the names that theirs has on disk."""
    options = {**OURS, **options}
    theirs_options = {THEIRS.get(k, k): list(v) if isinstance(v, tuple) else v for k, v in options.items()}
    theirs = transformers.PvtForImageClassification(transformers.PvtConfig(**theirs_options)).eval()
    randomise(theirs)
    theirs.save_pretrained(folder)
    tensors = safetensors.load_file(folder / "model.safetensors")
    assert layout_of(tensors) is TRANSFORMERS
    ours = PyramidVisionTransformer(**options, conv_norm_eps=options.get("norm_eps", 1e-6)).eval()
    ours.load_state_dict(TRANSFORMERS.to_ours(tensors), strict=True)
    back = TRANSFORMERS.to_theirs(ours.state_dict())
    assert back.keys() == tensors.keys() and all(torch.equal(back[name], tensors[name]) for name in back)
    return ours, theirs


def close(ours: Tensor, theirs: Tensor) -> None:
    """1e-5 of the largest value, in fp32."""
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5 * max(1.0, theirs.abs().max().item()))


def block_outputs(model: PyramidVisionTransformer, x: Tensor) -> list[Tensor]:
    """What every block answers: hooks make the last one answer in full."""
    found: list[Tensor] = []
    handles = [
        block.register_forward_hook(lambda _, args, out: found.append(out))
        for name, block in model.named_modules()
        if name.startswith("block") and name.count(".") == 1
    ]
    model(x)
    for handle in handles:
        handle.remove()
    return found


@pytest.mark.parametrize("case", CASES)
@torch.no_grad()
def test_logits_and_every_block_equal_transformers(case: str, tmp_path: Path) -> None:
    ours, theirs = twins(tmp_path, **CASES[case])
    x = torch.randn(2, CASES[case].get("in_chans", 3), 64, 64)
    answer = theirs(x, output_hidden_states=True)
    close(ours(x), answer.logits)
    *blocks, last = answer.hidden_states
    found = block_outputs(ours, x)
    assert len(found) == len(blocks) == sum(OURS["depths"])
    for mine, other in zip(found, blocks, strict=True):
        close(mine, other)
    close(ours.forward_features(x).x, last)
    maps = ours.features(x)
    close(maps.maps[-1].flatten(2).transpose(1, 2), last[:, 1:])
    close(maps.prefix[-1], last[:, :1])
    ends = [sum(OURS["depths"][: i + 1]) - 1 for i in range(4)]
    for stage in range(3):
        close(maps.maps[stage].flatten(2).transpose(1, 2), blocks[ends[stage]])
    close(ours.features(x, norm=False).maps[-1].flatten(2).transpose(1, 2), blocks[-1][:, 1:])


@torch.no_grad()
def test_recorded_attention_equals_transformers(tmp_path: Path) -> None:
    ours, theirs = twins(tmp_path)
    x = torch.randn(2, 3, 64, 64)
    answer = theirs(x, output_attentions=True)
    with record_attention() as record:
        ours(x)
    assert len(record.maps) == len(answer.attentions)
    for mine, other in zip(record.maps, answer.attentions, strict=True):
        torch.testing.assert_close(mine.weights, other, rtol=0, atol=1e-5)


def test_gradients_equal_transformers(tmp_path: Path) -> None:
    ours, theirs = twins(tmp_path)
    x = torch.randn(2, 3, 64, 64)
    ours(x).square().sum().backward()
    theirs(x).logits.square().sum().backward()
    other = TRANSFORMERS.to_ours({name: p.grad for name, p in theirs.named_parameters()})
    for name, parameter in ours.named_parameters():
        assert (parameter.grad - other[name]).abs().max() <= 1e-4 * max(1.0, other[name].abs().max()), name


@torch.no_grad()
def test_a_folder_of_transformers_answers_as_there_and_at_another_size_as_at_run_time(tmp_path: Path) -> None:
    """Its one epsilon goes to all norms, and its tables are resized once as they are on every pass."""
    theirs = transformers.PvtForImageClassification(transformers.PvtConfig(layer_norm_eps=1e-4)).eval()
    theirs.save_pretrained(tmp_path)
    ours = create_model(f"local-dir:{tmp_path}", pretrained=True).eval()
    assert (ours.variant, ours.config.norm_eps, ours.config.conv_norm_eps) == ("pvt_tiny", 1e-4, 1e-4)
    close(ours(x := torch.randn(1, 3, 224, 224)), theirs(x).logits)
    larger = create_model(f"local-dir:{tmp_path}", pretrained=True, img_size=256).eval()
    x = torch.randn(1, 3, 256, 256)
    assert torch.equal(larger(x), ours(x))
