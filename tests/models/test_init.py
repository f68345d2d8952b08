"""The laws of `init_weights`, by moments, and what they are for: attention that begins spread out."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from vitrail.layers.attention import attend, attention_weights
from vitrail.layers.blocks import LayerScale
from vitrail.layers.embed import sincos_2d
from vitrail.models.registry import FAMILIES, build_model
from vitrail.models.vit import VisionTransformer

WIDTH, PATCH, CHANS = 192, 8, 3
FAN_IN = CHANS * PATCH * PATCH


@pytest.fixture(scope="module")
def model() -> VisionTransformer:
    torch.manual_seed(0)
    return VisionTransformer(
        img_size=64, patch_size=PATCH, in_chans=CHANS, embed_dim=WIDTH, depth=2, num_heads=3, num_classes=500,
        reg_tokens=8, qk_norm=True, init_values=0.1, global_pool="map",
    )  # fmt: skip


def truncated(std: float) -> Callable[[Tensor], None]:
    """Mean 0, this deviation, cut at two deviations of the normal before the cut, bell-shaped up to there."""

    def check(weight: Tensor) -> None:
        weight = weight.detach().double().flatten()
        error = 4 / math.sqrt(weight.numel())  # four deviations of the estimates
        assert abs(weight.mean()) < error * std
        assert abs(weight.std() / std - 1) < error
        cut = 2 * std / normal_cut_at_two(2) ** 0.5
        assert weight.abs().max() <= cut * (1 + 1e-6)
        assert weight.abs().max() > 0.9 * cut
        kurtosis = normal_cut_at_two(4) / normal_cut_at_two(2) ** 2  # 2.37; 3 is a normal's, 1.8 a flat law's
        assert abs((weight / weight.std()).pow(4).mean() - kurtosis) < 3 * error

    return check


def normal_cut_at_two(power: int) -> float:
    """A moment of the standard normal law cut at ±2, by the sum of many slices."""
    x = torch.linspace(-2, 2, 100_001, dtype=torch.float64)
    density = (-x.square() / 2).exp()
    return float((x.pow(power) * density).sum() / density.sum())


LINEAR = [
    "blocks.0.attn.qkv", "blocks.1.attn.proj", "blocks.1.mlp.fc1", "blocks.0.mlp.fc2", "head",
    "attn_pool.q", "attn_pool.kv", "attn_pool.proj", "attn_pool.mlp.fc1", "attn_pool.mlp.fc2",
]  # fmt: skip
LAWS: dict[str, Callable[[Tensor], None]] = {
    "patch_embed.proj.weight": truncated(FAN_IN**-0.5),
    **{f"{name}.weight": truncated(0.02) for name in LINEAR},
    "pos_embed": truncated(0.02),
}


@pytest.mark.parametrize("name", LAWS)
def test_weights_follow_their_law(model: VisionTransformer, name: str) -> None:
    LAWS[name](model.get_parameter(name))


def test_every_linear_layer_is_in_the_table_above(model: VisionTransformer) -> None:
    kinds = {name.replace("blocks.0", "blocks").replace("blocks.1", "blocks") for name in LINEAR}
    found = {name for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    assert {name.replace("blocks.0", "blocks").replace("blocks.1", "blocks") for name in found} == kinds


def test_the_pooling_query_has_its_deviation() -> None:
    drawn = []
    small = VisionTransformer(
        img_size=2, patch_size=2, embed_dim=WIDTH, depth=1, num_heads=3, mlp_ratio=0.1, global_pool="map", num_classes=1
    )
    for _ in range(20):
        small.init_weights()
        drawn.append(small.attn_pool.latent.detach().clone())
    truncated(WIDTH**-0.5)(torch.cat(drawn))


@pytest.mark.parametrize("name", ["cls_token", "reg_token"])
def test_class_and_register_tokens_are_a_millionth_of_a_normal(model: VisionTransformer, name: str) -> None:
    token = model.get_parameter(name).detach()
    assert abs(token.std() / 1e-6 - 1) < 4 / math.sqrt(token.numel())
    assert token.abs().max() < 5e-6


def test_biases_norms_and_scales_are_constant(model: VisionTransformer) -> None:
    for module in model.modules():
        if isinstance(module, nn.LayerNorm):
            assert (module.weight == 1).all()
            assert (module.bias == 0).all()
        elif isinstance(module, nn.Linear | nn.Conv2d):
            assert (module.bias == 0).all()
        elif isinstance(module, LayerScale):
            assert (module.gamma == 0.1).all()


@pytest.mark.parametrize("norm", ["layernorm", "rmsnorm"])
def test_init_weights_forgets_what_was_there(norm: str) -> None:
    model = VisionTransformer(
        img_size=32, patch_size=8, embed_dim=24, depth=1, num_heads=3, norm=norm, init_values=0.1, qk_norm=True,
        global_pool="map", pos_embed="sincos", embed="linear",
    )  # fmt: skip
    for tensor in [*model.parameters(), *model.buffers()]:
        nn.init.constant_(tensor.detach(), float("nan"))
    model.init_weights()
    assert all(t.isfinite().all() for t in [*model.parameters(), *model.buffers()])


def test_linear_patches_follow_the_law_of_patches() -> None:
    model = VisionTransformer(img_size=64, patch_size=PATCH, embed_dim=WIDTH, depth=1, num_heads=3, embed="linear")
    truncated(FAN_IN**-0.5)(model.patch_embed.proj.weight)


@pytest.mark.parametrize("bare", [True, False])
def test_sincos_positions_are_the_formula_and_zero_for_the_prefix(bare: bool) -> None:
    model = VisionTransformer(
        img_size=(32, 48), patch_size=8, embed_dim=24, depth=1, num_heads=3, reg_tokens=2, pos_embed="sincos",
        no_embed_class=bare,
    )  # fmt: skip
    positions = model.positions((4, 6))
    assert torch.equal(positions[:, 3:], sincos_2d((4, 6), 24))
    assert (positions[:, :3] == 0).all()
    assert "pos_embed" not in model.state_dict()
    assert "pos_embed" not in dict(model.named_parameters())


# ---- the entropy of initial attention


class Entropies(TorchFunctionMode):
    """Per attention layer, the entropy of each head's rows, as a share of that of uniform attention."""

    def __init__(self) -> None:
        super().__init__()
        self.shares: list[Tensor] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is attend:
            weights = attention_weights(args[0], args[1])
            rows = -(weights * weights.clamp(min=1e-30).log()).sum(-1)
            self.shares.append(rows.mean(dim=(0, 2)) / math.log(weights.shape[-1]))
        return func(*args, **(kwargs or {}))


def entropies(depth: int) -> Tensor:
    """(depth, heads) of a fresh ViT-L/16 of this depth, on a random image normalised as images are."""
    model = VisionTransformer(img_size=224, patch_size=16, embed_dim=1024, depth=depth, num_heads=16).eval()
    smooth = F.interpolate(torch.rand(1, 3, 14, 14), size=224, mode="bicubic").clamp(0, 1)
    with torch.no_grad(), Entropies() as watch:
        model(model.preprocess.normalise(smooth))
    return torch.stack(watch.shares)


def test_initial_attention_is_nearly_uniform_at_the_width_of_vit_large() -> None:
    found = entropies(depth=2)
    assert found.shape == (2, 16)
    assert found.min() >= 0.9


@pytest.mark.full
def test_initial_attention_is_nearly_uniform_through_vit_large() -> None:
    found = entropies(depth=24)
    assert found.shape == (24, 16)
    assert found.min() >= 0.9


@pytest.mark.parametrize("row", [next(iter(family.variants)) for family in FAMILIES.values()])
def test_a_network_without_memory_draws_nothing(row: str):
    """Tables of models and searches for the row of a file build hundreds."""
    drawn = {"kaiming_uniform_", "uniform_", "normal_", "erfinv_", "trunc_normal_"}

    class Watch(TorchFunctionMode):
        def __torch_function__(self, func, types, args=(), kwargs=None):
            assert func.__name__ not in drawn
            return func(*args, **(kwargs or {}))

    with Watch(), torch.device("meta"):
        build_model(row)
