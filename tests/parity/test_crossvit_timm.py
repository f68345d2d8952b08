"""Our CrossViT against timm's: every tensor randomised, copied key by key, logits and every intermediate compared."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from vitrail.models.crossvit import VARIANTS, CrossViT

timm_crossvit = pytest.importorskip("timm.models.crossvit")
timm_layers = pytest.importorskip("timm.layers")

SMALL: dict[str, Any] = dict(
    img_size=48, img_scale=(1.0, 2 / 3), patch_size=(12, 16), embed_dim=(24, 48), depth=((1, 2), (1, 1)),
    num_heads=(2, 3), mlp_ratio=(2.0, 3.0), num_classes=7,
)  # fmt: skip
CASES: dict[str, dict[str, Any]] = {
    "plain": {},
    "both at the image's size": dict(img_scale=(1.0, 1.0)),
    "the large view larger than the image": dict(img_scale=(1.0, 4 / 3)),
    "the small view scaled too": dict(img_scale=(0.5, 2 / 3)),
    "cut, not resized": dict(crop_scale=True, img_size=60, img_scale=(1.0, 0.8)),
    "nothing to cut from": dict(crop_scale=True, img_scale=(1.0, 4 / 3)),
    "three convolutions": dict(multi_conv=True),
    "mean pooling": dict(global_pool="avg"),
    "no qkv bias": dict(qkv_bias=False),
    "five channels": dict(in_chans=5),
    "rectangle": dict(img_size=(48, 96)),
    "no head": dict(num_classes=0),
    "deeper stages": dict(depth=((2, 3), (1, 2), (2, 2))),
}


def randomise(model: nn.Module) -> None:
    """Default inits hide mistakes behind zeros and ones; this leaves none."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for tensor in model.state_dict().values():
            tensor.copy_(torch.randn(tensor.shape, generator=generator) * 0.3)


def peer(options: dict[str, Any]) -> nn.Module:
    """timm's model of our options: its depth and ratio have a third number, of parts that no network has."""
    options = {name: value for name, value in options.items() if name != "dynamic_img_size"}
    options["depth"] = [[*stage, 0] for stage in options["depth"]]
    options["mlp_ratio"] = [*options["mlp_ratio"], 1.0]
    return timm_crossvit.CrossVit(**options).eval()


def twins(**options: Any) -> tuple[CrossViT, nn.Module]:
    options = {**SMALL, **options}
    theirs = peer(options)
    randomise(theirs)
    ours = CrossViT(**options).eval()
    ours.load_state_dict(theirs.state_dict(), strict=True)
    return ours, theirs


def images(model: CrossViT, size: tuple[int, int] | None = None) -> Tensor:
    return torch.randn(2, model.config.in_chans, *(size or model.config.img_size))


def close(ours: Tensor, theirs: Tensor) -> None:
    """1e-5 of the largest value, in fp32."""
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5 * max(1.0, theirs.abs().max().item()))


def outputs(model: nn.Module, x: Tensor) -> dict[str, Tensor]:
    """What every module that both networks call gives, by its name and place in a list; the logits as ''."""
    seen: dict[str, Tensor] = {}

    def note(name: str) -> Any:
        def hook(_: nn.Module, __: Any, out: Any) -> None:
            seen.update({f"{name}[{i}]": y for i, y in enumerate(out if isinstance(out, list) else [out])})

        return hook

    for name, module in model.named_modules():
        module.register_forward_hook(note(name))
    with torch.no_grad():
        model(x)
    return seen


def check_everything(ours: CrossViT, theirs: nn.Module, x: Tensor) -> None:
    """Every block of both branches, every fusion, every stage, and all else that goes by one name."""
    mine, yours = outputs(ours, x), outputs(theirs, x)
    blocks = [
        n for n, m in theirs.named_modules() if type(m).__name__ in ("Block", "CrossAttentionBlock", "PatchEmbed")
    ]
    stages = [f"blocks.{stage}" for stage in range(len(ours.config.depth))]
    wanted = {f"{name}[0]" for name in (*blocks, *stages)} | {f"{name}[1]" for name in stages}
    assert wanted <= mine.keys() & yours.keys()
    for name in mine.keys() & yours.keys():
        close(mine[name], yours[name])


@pytest.mark.parametrize("case", CASES)
@torch.no_grad()
def test_logits_and_every_intermediate_equal_timm(case: str) -> None:
    ours, theirs = twins(**CASES[case])
    x = images(ours)
    check_everything(ours, theirs, x)
    check_parts(ours, theirs, x)


def check_parts(ours: CrossViT, theirs: nn.Module, x: Tensor) -> None:
    """Logits, those of each head, what heads take, and the maps after every stage."""
    close(ours(x), theirs(x))
    state = theirs.forward_features(x)
    for tokens, theirs_tokens in zip(ours.forward_features(x), state, strict=True):
        close(tokens.x, theirs_tokens)
    close(ours.forward_head(ours.forward_features(x), pre_logits=True), theirs.forward_head(state, pre_logits=True))
    pooled = [y[:, 1:].mean(1) if theirs.global_pool == "avg" else y[:, 0] for y in state]
    for mine, head, y in zip(ours.logits_by_head(x), theirs.head, pooled, strict=True):
        close(mine, head(y))
    stages = len(ours.config.depth)
    for norm in (False, True):
        maps = theirs.forward_intermediates(x, norm=norm, intermediates_only=True)  # all of branch 0 first
        by_stage = [maps[b * stages + stage] for stage in range(stages) for b in (0, 1)]
        for mine, yours in zip(ours.features(x, norm=norm).maps, by_stage, strict=True):
            close(mine, yours)


@pytest.mark.parametrize("case", ["plain", "three convolutions", "mean pooling", "the small view scaled too"])
@pytest.mark.parametrize("size", [(96, 96), (96, 144)], ids=["twice", "not square"])
@torch.no_grad()
def test_another_size_equals_timm_built_for_it_with_positions_resized(case: str, size: tuple[int, int]) -> None:
    """timm takes no other size at run time; at construction it does, and its own helper resizes positions."""
    ours, native = twins(**CASES[case])
    theirs = peer({**SMALL, **CASES[case], "img_size": size})
    state = native.state_dict()
    for b, embed in enumerate(theirs.patch_embed):
        grids = [
            tuple(s // p for s, p in zip(e.img_size, e.patch_size, strict=True)) for e in (embed, native.patch_embed[b])
        ]
        state[f"pos_embed_{b}"] = timm_layers.resample_abs_pos_embed(state[f"pos_embed_{b}"], *grids)
    theirs.load_state_dict(state)
    x = images(ours, size)
    check_everything(ours, theirs, x)
    check_parts(ours, theirs, x)


@pytest.mark.parametrize("case", ["plain", "cut, not resized", "rectangle"])
@pytest.mark.parametrize("size", [(96, 96), (50, 75), (31, 30)])
@torch.no_grad()
def test_without_dynamic_size_every_image_equals_timm(case: str, size: tuple[int, int]) -> None:
    """timm resizes images of any size to its own."""
    ours, theirs = twins(**CASES[case], dynamic_img_size=False)
    check_parts(ours, theirs, images(ours, size))


@torch.no_grad()
def test_a_published_row_equals_timm() -> None:
    theirs = timm_crossvit.crossvit_9_dagger_240().eval()
    ours = CrossViT(VARIANTS["crossvit_9_dagger_240"]).eval()
    assert sum(p.numel() for p in ours.parameters()) == sum(p.numel() for p in theirs.parameters())
    ours.load_state_dict(theirs.state_dict())
    x = torch.randn(1, 3, 240, 240)
    check_parts(ours, theirs, x)


def test_gradients_equal_timm() -> None:
    ours, theirs = twins()
    x = images(ours)
    ours(x).square().sum().backward()
    theirs(x).square().sum().backward()
    mine = dict(ours.named_parameters())
    for name, parameter in theirs.named_parameters():
        scale = parameter.grad.abs().max().item()
        assert (mine[name].grad - parameter.grad).abs().max() <= 1e-5 * max(1.0, scale), name


def test_drop_path_rates_equal_timm() -> None:
    options = {**SMALL, "drop_path_rate": 0.3, "depth": ((2, 3), (1, 2))}
    rates = [
        {name: m.drop_prob for name, m in model.named_modules() if type(m).__name__ == "DropPath"}
        for model in (CrossViT(**options), peer(options))
    ]
    assert rates[0] == pytest.approx(rates[1])
