"""Our Swin against timm's, torchvision's and transformers': every tensor randomised, logits and every block compared.

timm rolls before it pads, so it is asked only where nothing is padded; the other two pad first, as the authors do.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from vitrail.explain.record import record_attention
from vitrail.models.swin import SwinTransformer
from vitrail.weights.layouts import ours as renamed

timm_swin = pytest.importorskip("timm.models.swin_transformer")
tv_swin = pytest.importorskip("torchvision.models.swin_transformer")
transformers = pytest.importorskip("transformers")

SMALL = dict(patch_size=2, embed_dim=24, depths=(2, 2), num_heads=(2, 4), window_size=4, num_classes=7)
DIVIDING = [(64, 64), (96, 64), (32, 48)]
PADDED = [(60, 52), (62, 38), (20, 44)]  # odd cells to merge; a last map of 5 x 11 cells
SMALLER = [(12, 12), (6, 10)]  # a map, or both, smaller than a window


def randomised(model: nn.Module) -> nn.Module:
    """Default inits hide mistakes behind zeros and ones; this leaves none."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)
    return model.eval()


def made(state: dict[str, Tensor], **options: Any) -> SwinTransformer:
    model = SwinTransformer(img_size=64, **{**SMALL, **options}).eval()
    model.load_state_dict(renamed(state)[0], strict=True)
    return model


def images(size: tuple[int, int], channels: int = 3) -> Tensor:
    return torch.randn(2, channels, *size, generator=torch.Generator().manual_seed(2))


def close(ours: Tensor, theirs: Tensor) -> None:
    """1e-5 of the largest value, in fp32."""
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5 * max(1.0, theirs.abs().max().item()))


def seen_after(blocks: list[nn.Module], run: Callable[[], Any], plain: Callable[[Any, Any], Tensor]) -> list[Tensor]:
    """(B, h·w, C) after each block, in raster order."""
    seen: list[Tensor] = []
    hooks = [block.register_forward_hook(lambda _, given, out: seen.append(plain(given, out))) for block in blocks]
    run()
    for hook in hooks:
        hook.remove()
    return seen


def ours_after(model: SwinTransformer, x: Tensor) -> list[Tensor]:
    """Our blocks' tokens stand in the order of their windows."""
    blocks = [block for stage in model.layers for block in stage.blocks]
    return seen_after(blocks, lambda: model(x), lambda given, out: given[1].leave(out))


def of_maps(given: Any, out: Tensor) -> Tensor:
    return out.flatten(1, 2)


# ---- timm

CASES: dict[str, dict[str, Any]] = {
    "plain": {},
    "no qkv bias": dict(qkv_bias=False),
    "five channels": dict(in_chans=5),
    "mlp_ratio 2": dict(mlp_ratio=2.0),
    "no head": dict(num_classes=0),
    "a window that is no square": dict(window_size=(2, 4)),
    "an odd window": dict(window_size=8, patch_size=1),
}


def timm_twin(size: tuple[int, int], **options: Any) -> nn.Module:
    return randomised(timm_swin.SwinTransformer(img_size=size, **{**SMALL, **options}))


@pytest.mark.parametrize("size", DIVIDING, ids=str)
@pytest.mark.parametrize("case", CASES)
@torch.no_grad()
def test_logits_and_every_block_equal_timm(case: str, size: tuple[int, int]) -> None:
    theirs = timm_twin(size, **CASES[case])
    ours = made(theirs.state_dict(), **CASES[case])
    x = images(size, CASES[case].get("in_chans", 3))
    close(ours(x), theirs(x))
    close(*(model.forward_head(model.forward_features(x), pre_logits=True) for model in (ours, theirs)))
    last = ours.forward_features(x)
    close(last.x.unflatten(1, last.grid), theirs.forward_features(x))
    blocks = [block for stage in theirs.layers for block in stage.blocks]
    pairs = zip(ours_after(ours, x), seen_after(blocks, lambda: theirs(x), of_maps), strict=True)
    for mine, his in pairs:
        close(mine, his)
    for norm in (False, True):
        maps = theirs.forward_intermediates(x, norm=norm, intermediates_only=True)
        for mine, his in zip(ours.features(x, norm=norm).maps, maps, strict=True):
            close(mine, his)


def test_gradients_equal_timm() -> None:
    theirs = timm_twin((32, 48))
    ours, x = made(theirs.state_dict()), images((32, 48))
    ours(x).square().sum().backward()
    theirs(x).square().sum().backward()
    mine = dict(ours.named_parameters())
    for name, parameter in theirs.named_parameters():
        scale = parameter.grad.abs().max().item()
        assert (mine[name].grad - parameter.grad).abs().max() <= 1e-4 * max(1.0, scale), name


@torch.no_grad()
def test_recorded_attention_is_timms() -> None:
    """Which cell looks at which, over the whole map: theirs by rolling and cutting the numbers of the cells."""
    theirs = timm_twin((32, 48))
    ours, x = made(theirs.state_dict()), images((32, 48))
    blocks = [block for stage in theirs.layers for block in stage.blocks]
    softmaxes = [block.attn.softmax for block in blocks]
    maps = seen_after(softmaxes, lambda: theirs(x), lambda given, out: out)
    with record_attention() as record:
        ours(x)
    for seen, weights, block in zip(record.maps, maps, blocks, strict=True):
        h, w = block.input_resolution
        numbers = torch.arange(h * w).view(1, h, w, 1).roll([-s for s in block.shift_size], (1, 2))
        cells = timm_swin.window_partition(numbers, block.window_size).flatten(1)  # (W, N)
        layout = seen.layout
        assert layout is not None and layout.query_index is not None and layout.grid == (h, w)
        mine = whole_map(seen.weights.unflatten(1, (layout.windows, -1)), layout.query_index, h * w)
        close(mine, whole_map(weights.unflatten(0, (2, -1)), cells, h * w))


def whole_map(weights: Tensor, cells: Tensor, count: int) -> Tensor:
    """(B, W, H, N, N) -> (B, H, h·w, h·w)."""
    whole = weights.new_zeros(weights.shape[0], weights.shape[2], count, count)
    for window, index in enumerate(cells):
        whole[:, :, index[:, None], index] = weights[:, window]
    return whole


# ---- torchvision


@pytest.mark.parametrize("size", DIVIDING + PADDED + SMALLER, ids=str)
@torch.no_grad()
def test_logits_and_every_block_equal_torchvision(size: tuple[int, int]) -> None:
    theirs = randomised(tv_swin.SwinTransformer([2, 2], 24, [2, 2], [2, 4], [4, 4], num_classes=7))
    ours, x = made(theirs.state_dict()), images(size)
    close(ours(x), theirs(x))
    blocks = [*theirs.features[1], *theirs.features[3]]
    for mine, his in zip(ours_after(ours, x), seen_after(blocks, lambda: theirs(x), of_maps), strict=True):
        close(mine, his)


# ---- transformers


@pytest.fixture(scope="module")
def of_transformers(tmp_path_factory: pytest.TempPathFactory) -> tuple[nn.Module, dict[str, Tensor]]:
    """A model, and its tensors by the names they have on disk."""
    config = transformers.SwinConfig(
        image_size=64, patch_size=2, embed_dim=24, depths=[2, 2], num_heads=[2, 4], window_size=4, num_labels=7
    )
    model = randomised(transformers.SwinForImageClassification(config))
    folder: Path = tmp_path_factory.mktemp("swin")
    model.save_pretrained(folder)
    return model, load_file(folder / "model.safetensors")


@pytest.mark.parametrize("size", DIVIDING + PADDED, ids=str)
@torch.no_grad()
def test_logits_and_every_block_equal_transformers(
    of_transformers: tuple[nn.Module, dict[str, Tensor]], size: tuple[int, int]
) -> None:
    theirs, state = of_transformers
    ours, x = made(state), images(size)
    close(ours(x), theirs(x).logits)
    blocks = [layer for stage in theirs.swin.encoder.layers for layer in stage.blocks]
    after = seen_after(blocks, lambda: theirs(x), lambda given, out: out[0] if isinstance(out, tuple) else out)
    for mine, his in zip(ours_after(ours, x), after, strict=True):
        close(mine, his)


@torch.no_grad()
def test_dynamic_pad_equals_transformers(of_transformers: tuple[nn.Module, dict[str, Tensor]]) -> None:
    theirs, state = of_transformers
    close(made(state, dynamic_pad=True)(x := images((37, 51))), theirs(x).logits)


# ---- the authors


@torch.no_grad()
def test_the_authors_files_are_read_as_timm_reads_them() -> None:
    theirs = timm_twin((64, 64))
    file = {}
    for name, value in theirs.state_dict().items():
        file[name.replace("layers.1.downsample", "layers.0.downsample").replace("head.fc.", "head.")] = value
    file["layers.0.blocks.1.attn_mask"] = torch.zeros(64, 16, 16)
    file["layers.0.blocks.0.attn.relative_position_index"] = torch.zeros(16, 16, dtype=torch.long)
    read = timm_swin.checkpoint_filter_fn(dict(file), theirs)
    mine, source = renamed(file)
    assert source == "microsoft" and mine.keys() == read.keys()
    assert all(torch.equal(mine[name], read[name]) for name in read)


def test_timms_names_are_ours() -> None:
    assert renamed(timm_twin((64, 64)).state_dict())[1] == "timm"
