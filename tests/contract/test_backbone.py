"""What every registered model owes. `make test` runs each family's debug row and one published row; `make full` all.

A family's own test file holds only its mathematics; whatever any model must do stands here.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator
from dataclasses import fields
from typing import Any, get_args, get_type_hints

import pytest
import torch
from torch import Tensor, nn

from vitrail.explain.maps import attention_map, rollout_map
from vitrail.explain.record import record_attention
from vitrail.layers import linear
from vitrail.layers.linear import plain_linear
from vitrail.models.backbone import Backbone
from vitrail.models.registry import FAMILIES, ROWS, build_from_config, build_model

PUBLISHED = {
    "vit": "vit_tiny_patch16_224",
    "hybrid": "vit_tiny_r_s16_p8_224",
    "hybrid_cnn": "hybrid_tiny_32",
    "deit": "deit_tiny_distilled_patch16_224",
    "beit": "beit_tiny_patch4_32",
    "eva": "eva02_tiny_patch14_224",
    "swin": "swin_tiny_patch4_window7_224",
    "cait": "cait_xxs24_224",
    "pvt": "pvt_tiny",
    "pvt_v2": "pvt_v2_b0",
    "crossvit": "crossvit_tiny_240",
    "resnet": "resnet18_32",
    "convnext": "convnext_tiny_32",
}
ATTENTIONS: dict[str, Callable[[Any], int]] = {
    **dict.fromkeys(("vit", "deit", "beit", "eva", "hybrid", "hybrid_cnn"), lambda c: c.depth),
    "swin": lambda c: sum(c.depths),
    "cait": lambda c: c.depth + c.depth_token_only,
    "pvt": lambda c: sum(c.depths),
    "pvt_v2": lambda c: sum(c.depths),
    "crossvit": lambda c: sum(map(sum, c.depth)) + 2 * len(c.depth),
}
"""how often a forward of a family's config attends"""
ATTENDING = [name for name, family in FAMILIES.items() if "attn" in {f.name for f in fields(family.config)}]
ISOTROPIC = [name for name, family in FAMILIES.items() if callable(getattr(family.model, "encode", None))]
DEBUG = {name: next(iter(family.variants)) for name, family in FAMILIES.items()}
POOLS = {"deit": ("token",)}
"""the ways to pool of families that have not all of a plain ViT's"""
PIECES: dict[str, dict[str, Any]] = {
    "rotary positions, registers, a gated MLP": dict(
        pos_embed="none", rope="dinov3", reg_tokens=2, mlp="swiglu", act="silu"
    ),
    "a bias for each offset": dict(pos_embed="none", rel_pos_bias=True, init_values=0.1),
    "norm before the blocks, patches that overlap": dict(pre_norm=True, embed="overlap", act="quick_gelu"),
    "norm after each sum, one block for all layers": dict(block="postnorm", shared_blocks=True, rope="axial"),
    "batch norm, a stem of convolutions": dict(norm="batchnorm", embed="stem", block="respostnorm"),
    "windows": dict(window_size=3, global_blocks=(1,), class_token=False, global_pool="avg"),
}
"""what a Vision Transformer can be made of, beside the debug rows' own"""
CHOOSING = [name for name in PIECES if name != "windows"]
"""those that do with some of an image's tokens"""
MOST_WORK = 1.8e11
"""parameters times tokens of the largest plain ViT; what is larger is counted and compared by name alone"""


def rows() -> Iterator[object]:
    quick = {*DEBUG.values(), *PUBLISHED.values()}
    for row in ROWS:
        yield pytest.param(row, marks=() if row in quick else pytest.mark.full)


def work(row: str) -> float:
    """About as many multiplications as one forward needs: parameters times the cells of the last map."""
    with torch.device("meta"):
        model = build_model(row)
    cell = model.feature_info[-1].reduction
    height, width = model.preprocess.img_size
    return sum(p.numel() for p in model.parameters()) * (height / cell) * (width / cell)


def build_small(name: str) -> Any:
    """A debug row, or a network of the same size with other pieces."""
    torch.manual_seed(0)
    return build_model(name if name in ROWS else "vit_debug", **PIECES.get(name, {})).eval()


@pytest.fixture(scope="module", params=rows())
def model(request: pytest.FixtureRequest) -> Backbone:
    if work(request.param) > MOST_WORK:
        pytest.skip(f"{request.param} needs more than the largest plain ViT: counted on the meta device")
    torch.manual_seed(0)
    return build_model(request.param).eval()


@pytest.fixture(scope="module", params=[*DEBUG.values(), *PIECES])
def small(request: pytest.FixtureRequest) -> Backbone:
    """Only the debug rows and pieces, for what is slow and does not depend on the row."""
    return build_small(request.param)


@pytest.fixture(scope="module", params=[*(DEBUG[name] for name in ATTENDING), *PIECES])
def attending(request: pytest.FixtureRequest) -> Backbone:
    """The debug row of each family that attends, and pieces."""
    return build_small(request.param)


@pytest.fixture(scope="module", params=[*(DEBUG[name] for name in ISOTROPIC), *CHOOSING])
def isotropic(request: pytest.FixtureRequest) -> Any:
    """The debug row of each family that opens at token level, and pieces; windows take none but whole grids."""
    return build_small(request.param)


def poolings() -> Iterator[object]:
    """Every isotropic family with each way to pool that its config names."""
    for name in ISOTROPIC:
        pools = POOLS.get(name) or get_args(get_type_hints(FAMILIES[name].config)["global_pool"])
        for pool in pools:
            yield pytest.param((name, pool), id=f"{name}-{pool}")


@pytest.fixture(scope="module", params=poolings())
def pooling(request: pytest.FixtureRequest) -> Any:
    """An isotropic debug row with each way to pool, no weight at the zero or one that it begins with."""
    torch.manual_seed(0)
    name, pool = request.param
    model = build_model(DEBUG[name], global_pool=pool).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def images(model: Backbone, batch: int = 2, factor: float = 1.0) -> Tensor:
    """At `factor` times the row's own size, or the next smaller one that divides into its cells."""
    whole = [int(info.reduction) for info in model.feature_info if info.reduction == int(info.reduction)]
    cell = math.lcm(*whole)  # another stride is that of a resized image, which may have any size
    height, width = (int(side * factor) // cell * cell for side in model.preprocess.img_size)
    shape = (batch, model.preprocess.in_chans, height, width)
    return torch.randn(shape, generator=torch.Generator().manual_seed(3))


def test_every_family_has_a_debug_row_first_and_a_published_row() -> None:
    assert ATTENTIONS.keys() == set(ATTENDING)
    for name, row in DEBUG.items():
        assert row.endswith("_debug")
        assert sum(p.numel() for p in build_model(row).parameters()) < 200_000
        assert ROWS[PUBLISHED[name]] == name


@torch.no_grad()
def test_logits_are_the_same_twice_alone_and_in_a_batch(model: Backbone) -> None:
    x = images(model)
    logits = model(x)
    assert logits.shape == (2, model.num_classes or model.num_features)  # encoders have no head
    assert model.num_classes == model.config.num_classes
    assert torch.equal(logits, model(x))
    assert torch.allclose(logits[:1], model(x[:1]), atol=1e-5)


@torch.no_grad()
def test_no_images_have_no_logits(small: Backbone) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        assert copy.deepcopy(small).to(dtype)(images(small)[:0].to(dtype)).shape == (0, small.num_classes)


def test_one_seed_makes_one_model_however_it_is_built(small: Backbone) -> None:
    made = []
    card = small.card()
    for build in (lambda: build_from_config(small.family, card.config), lambda: type(small)(small.config)):
        torch.manual_seed(7)
        made.append(build().state_dict())
    assert all(torch.equal(made[0][name], made[1][name]) for name in made[0])


@torch.no_grad()
def test_forward_is_its_parts(model: Backbone) -> None:
    x = images(model)
    state = model.forward_features(x)
    heads = model.forward_heads(state)
    assert isinstance(heads, tuple)
    assert torch.allclose(model.forward_head(state), torch.stack(heads).mean(0), atol=1e-6)
    assert torch.allclose(model(x), model.forward_head(state), atol=1e-6)
    assert model.forward_head(state, pre_logits=True).shape == (2, model.num_features)


@pytest.mark.parametrize("factor", [1.0, 1.5])
@torch.no_grad()
def test_features_are_maps_in_image_order_with_true_strides(model: Backbone, factor: float) -> None:
    check_features(model, images(model, batch=1, factor=factor))


def check_features(model: Backbone, x: Tensor) -> None:
    features = model.features(x)
    assert len(features.maps) == len(features.prefix) == len(model.feature_info)
    for found, prefix, info in zip(features.maps, features.prefix, model.feature_info, strict=True):
        assert found.shape[:2] == (1, info.num_chs)
        assert found.shape[-2] == round(x.shape[-2] / info.reduction)
        assert found.shape[-1] == round(x.shape[-1] / (info.reduction_w or info.reduction))
        assert prefix.shape[0] == 1 and prefix.shape[2] == info.num_chs
    last = model.features(x, indices=[-1])
    assert torch.equal(last.maps[0], features.maps[-1])
    assert len(model.features(x, indices=2).maps) == 2


@pytest.mark.parametrize("size", [(32, 32), (24, 40)])
@torch.no_grad()
def test_features_of_patches_that_are_not_square(size: tuple[int, int]) -> None:
    model = FAMILIES["vit"].model(img_size=32, patch_size=(8, 4), embed_dim=24, depth=2, num_heads=2).eval()
    check_features(model, torch.randn(1, 3, *size))
    assert model.features(torch.zeros(1, 3, *size)).maps[0].shape[-2:] == (size[0] // 8, size[1] // 4)
    assert (model.feature_info[0].reduction, model.feature_info[0].reduction_w) == (8, 4)


@torch.no_grad()
def test_features_wrong_index_names_the_depth(small: Backbone) -> None:
    depth = len(small.feature_info)
    with pytest.raises(ValueError, match=rf"-{depth} … {depth - 1}.*got \[{depth}\]"):
        small.features(images(small), indices=[depth])


@torch.no_grad()
def test_features_lie_where_their_pixels_lie(small: Backbone) -> None:
    """Image order: what changes in the upper right corner shows most in the upper right corner of the first map."""
    x = images(small, batch=1, factor=3)  # patches that overlap, and windows, show neighbours too
    changed = x.clone()
    changed[..., :4, -4:] += 10
    before, after = (small.features(v, indices=[0], norm=False).maps[0][0] for v in (x, changed))
    moved = (after - before).norm(dim=0)  # (h, w)
    row, column = divmod(int(moved.argmax()), moved.shape[1])
    assert row < moved.shape[0] / 4 and column >= moved.shape[1] * 3 / 4


def test_every_parameter_gets_a_gradient(model: Backbone) -> None:
    model = copy.deepcopy(model).train()
    model(images(model)).square().sum().backward()
    missing = [n for n, p in model.named_parameters() if p.grad is None or not p.grad.isfinite().all()]
    assert not missing


@pytest.mark.fault(35)
def test_a_batch_of_one_can_be_learnt_from(small: Backbone) -> None:
    model = copy.deepcopy(small).train()
    model(images(model, batch=1)).square().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
    assert all(buffer.isfinite().all() for buffer in model.buffers())


def test_checkpointing_changes_no_gradient(small: Backbone) -> None:
    plain, saving = copy.deepcopy(small), copy.deepcopy(small)
    saving.set_grad_checkpointing()
    for model in (plain, saving):
        model(images(model)).square().sum().backward()
    for (name, a), b in zip(plain.named_parameters(), saving.parameters(), strict=True):
        assert torch.allclose(a.grad, b.grad, atol=1e-6), name


@torch.no_grad()
def test_state_dict_and_config_rebuild_the_model(model: Backbone) -> None:
    card = model.card()
    again = build_from_config(card.family, card.config, card.name).eval()
    again.load_state_dict(model.state_dict(), strict=True)
    assert torch.equal(again(x := images(model, batch=1)), model(x))
    assert again.config == model.config


@torch.no_grad()
def test_meta_to_empty_init_is_a_sound_model(model: Backbone) -> None:
    with torch.device("meta"):
        made = build_from_config(model.family, model.card().config)
    made.to_empty(device="cpu")
    for tensor in [*made.parameters(), *made.buffers()]:
        tensor.fill_(float("nan")) if tensor.is_floating_point() else tensor.fill_(-1)
    made.init_weights()
    assert all(t.isfinite().all() for t in [*made.parameters(), *made.buffers()])
    for name, parameter in made.named_parameters():
        theirs = model.get_parameter(name)
        assert (parameter.std() - theirs.std()).abs() <= 0.25 * theirs.std() + 1e-6, name
    made.load_state_dict(model.state_dict())
    assert torch.equal(made.eval()(x := images(model, batch=1)), model(x))


def test_reset_classifier_makes_a_new_head_and_keeps_the_config_true(model: Backbone) -> None:
    model = copy.deepcopy(model)
    model.classes = ("a", "b")
    model.reset_classifier(7)
    assert model(images(model, batch=1)).shape == (1, 7)
    assert model.config.num_classes == 7 and model.classes == ()
    model.reset_classifier(0)
    assert model(images(model, batch=1)).shape == (1, model.num_features)


def test_a_head_put_in_by_hand_counts(model: Backbone) -> None:
    """Every head, where there are several."""
    model = copy.deepcopy(model)
    model.reset_classifier(9)  # encoders have none
    names = heads_of(model)
    model.classes = ("a",) * model.num_classes
    for name in names:
        model.set_submodule(name, nn.Linear(model.get_submodule(name).in_features, 3))
    card = model.card()
    assert model.num_classes == card.config["num_classes"] == 3 and card.classes == ()
    again = build_from_config(card.family, card.config, card.name).eval()
    again.load_state_dict(model.state_dict(), strict=True)
    assert again(images(model, batch=1)).shape == (1, 3)
    for name in names:
        model.set_submodule(name, nn.Identity())
    assert model.num_classes == 0


def heads_of(model: Backbone) -> list[str]:
    """Names of the layers that make logits, which are those that more classes make larger; the first is announced."""
    with torch.device("meta"):
        other = build_from_config(model.family, {**model.card().config, "num_classes": model.num_classes + 1})
    pairs = zip(model.named_parameters(), other.parameters(), strict=True)
    names = [name.removesuffix(".weight") for (name, a), b in pairs if a.ndim > 1 and a.shape != b.shape]
    assert model.get_submodule(names[0]) is model.get_classifier()
    return names


def test_layer_groups_hold_every_parameter_once_and_no_decay_names_are_real(model: Backbone) -> None:
    names = [name for group in model.layer_groups() for name in group]
    assert sorted(names) == sorted(name for name, _ in model.named_parameters())
    assert all(model.layer_groups())
    assert model.no_weight_decay() <= set(names)


def test_weights_of_pixels_and_tables_of_positions_are_named(model: Backbone) -> None:
    """Every weight whose shape other channels change is a weight of pixels; every table has its rows."""
    with torch.device("meta"):
        other = build_from_config(model.family, {**model.card().config, "in_chans": 5})
    state = model.state_dict()
    changed = [name for name, value in other.state_dict().items() if value.shape != state[name].shape]
    assert sorted(model.pixel_weights()) == sorted(changed)
    for name, table in model.position_tables().items():
        h, w = table.grid
        rows = table.prefix + ((2 * h - 1) * (2 * w - 1) if table.relative else h * w)
        assert state[name].shape[0 if table.relative else 1] == rows


@torch.no_grad()
def test_eager_and_fused_attention_agree(model: Backbone) -> None:
    """The same function in float64; in fp32 as far from it, which for a published row of 12 layers is under 1e-6."""
    if model.family not in ATTENDING:
        pytest.skip(f"{model.family} does not attend")
    x, whole, rounded = images(model, batch=1), [], []
    for kernel in ("eager", "fused", "auto"):
        other = build_from_config(model.family, {**model.card().config, "attn": kernel}).eval()
        other.load_state_dict(model.state_dict())
        with plain_linear():  # what rounds otherwise is then attention alone
            rounded.append(other(x))
        whole.append(other.double()(x.double()))
    size = max(1, whole[0].abs().max())
    assert max((answer - whole[0]).abs().max() for answer in whole) <= 1e-12 * size
    errors = [(answer - whole[0]).abs().max() for answer in rounded]
    assert max(errors) <= 3 * min(errors)
    if model.variant in (*DEBUG.values(), *PUBLISHED.values()):
        assert max((answer - rounded[0]).abs().max() for answer in rounded) <= 1e-6 * size


@torch.no_grad()
def test_both_linear_kernels_agree(model: Backbone, monkeypatch: pytest.MonkeyPatch) -> None:
    """In fp32, to 2e-6 of the largest logit, whatever a timing says here."""
    monkeypatch.setattr(linear, "LEAST", 1)
    monkeypatch.setattr(linear, "_is_fast", lambda dtype, threads: torch.backends.mkldnn.is_available())
    x, fast = images(model), model(images(model))
    with plain_linear():
        usual = model(x)
    assert (fast - usual).abs().max() <= 2e-6 * max(1, usual.abs().max())


@torch.no_grad()
def test_export_with_a_dynamic_batch(small: Backbone) -> None:
    batch = torch.export.Dim("batch", min=1, max=64)
    program = torch.export.export(small, (images(small, batch=3),), dynamic_shapes=({0: batch},))
    x = images(small, batch=5)
    assert torch.allclose(program.module()(x), small(x), atol=1e-5)


def test_compiles_whole_with_the_same_gradients(small: Backbone) -> None:
    torch._dynamo.reset()  # it takes only so many networks of one class
    plain, fast = copy.deepcopy(small), copy.deepcopy(small)
    compiled = torch.compile(fast, fullgraph=True, backend="aot_eager")
    x = images(small)
    plain(x).square().sum().backward()
    compiled(x).square().sum().backward()
    for (name, a), b in zip(plain.named_parameters(), fast.parameters(), strict=True):
        assert torch.allclose(a.grad, b.grad, atol=1e-4, rtol=1e-4), name


@pytest.mark.fault(28)
@pytest.mark.parametrize("channels", [1, 2, 4, 13])
def test_other_channels_are_named(small: Backbone, channels: int) -> None:
    with pytest.raises(ValueError, match=rf"images must be \(B, 3, H, W\); got shape \(1, {channels}, "):
        small(torch.zeros(1, channels, *small.preprocess.img_size))


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int64])
def test_pixels_that_are_not_normalised_are_told_how(small: Backbone, dtype: torch.dtype) -> None:
    with pytest.raises(ValueError, match=rf"images must be floating-point.*got {dtype}: .*preprocess\.normalise"):
        small(torch.zeros(1, 3, *small.preprocess.img_size, dtype=dtype))


ANY_SIZE = ("pvt_v2", "resnet", "convnext")
"""families that take any size as it is"""


@pytest.mark.parametrize("family", DEBUG)
@torch.no_grad()
def test_every_family_takes_dynamic_pad_and_then_any_size(family: str) -> None:
    plain = build_model(DEBUG[family]).eval()
    padding = build_model(DEBUG[family], dynamic_pad=True).eval()
    padding.load_state_dict(plain.state_dict())
    assert torch.equal(padding(x := images(plain)), plain(x))
    assert padding(odd := torch.randn(2, 3, 45, 51)).isfinite().all()
    if family in ANY_SIZE:
        assert torch.equal(padding(odd), plain(odd))


# ---- attention


@pytest.mark.parametrize("factor", [1.0, 1.5])
@torch.no_grad()
def test_attention_of_every_block_is_recorded(attending: Backbone, factor: float) -> None:
    x = images(attending, factor=factor)
    with record_attention() as record:
        seen = attending(x)
    assert torch.equal(seen, attending(x))
    assert len(record.maps) == ATTENTIONS[attending.family](attending.config)
    grids = {tuple(found.shape[-2:]) for found in attending.features(x).maps}
    for attention in record.maps:
        assert torch.allclose(attention.weights.sum(-1), torch.ones(()), atol=1e-5)
        layout = attention.layout
        assert layout is not None and layout.readout is not None and layout.grid in grids
        heat = attention_map(attention)
        assert heat.shape == (2, *(layout.key_grid or layout.grid))
        if attention.effective is None:
            assert heat.min() >= 0 and (heat.sum((1, 2)) <= 1 + 1e-5).all()
        else:  # what mixed heads weigh values with may be negative; all of it lies on the image
            assert torch.allclose(heat.sum((1, 2)), attention.effective.sum(-1).mean((1, 2)), atol=1e-5)


@torch.no_grad()
def test_attention_lies_where_its_pixels_lie(attending: Backbone) -> None:
    """A query that knows no changed pixel: what changes in its map lies where the image changed.

    Such are the first layer's class token, and, where the mean is read, the cell in the opposite corner.
    """
    x = images(attending, batch=1, factor=3)
    changed, maps = x.clone(), []
    changed[..., :4, -4:] += 10
    for image in (x, changed):
        with record_attention(layers=[1]) as record:
            attending(image)
        layout = record.maps[0].layout
        query = (layout.grid[0] - 1, 0) if layout.readout == () and layout.windows == 1 else "class"
        maps.append(attention_map(record.maps[0], query=query)[0])
    moved = (maps[1] - maps[0]).abs()
    row, column = divmod(int(moved.argmax()), moved.shape[1])
    assert row < moved.shape[0] / 4 and column >= moved.shape[1] * 3 / 4


# ---- padding


def padded(x: Tensor, value: float) -> tuple[Tensor, Tensor]:
    """Images whose right half is padding that holds `value`, and their mask (B, H, W)."""
    mask = torch.zeros(len(x), *x.shape[-2:], dtype=torch.bool)
    mask[..., x.shape[-1] // 2 :] = True
    return x.masked_fill(mask[:, None], value), mask


@torch.no_grad()
def test_padded_pixels_are_not_seen(small: Backbone) -> None:
    """By `forward`, `forward_features` and `features`, whatever stands in them."""
    (one, mask), (other, _) = (padded(images(small), value) for value in (0.0, 9.0))
    logits = small(one, mask)
    assert torch.allclose(logits, small(other, mask), atol=1e-5)
    assert not torch.allclose(small(other), logits, atol=1e-3)
    assert torch.allclose(small.forward_head(small.forward_features(other, mask)), logits, atol=1e-5)
    assert torch.allclose(small(one, torch.zeros_like(mask)), small(one), atol=1e-5)
    pairs = zip(small.features(one, mask=mask).maps, small.features(other, mask=mask).maps, strict=True)
    assert all(torch.allclose(a[..., : a.shape[-1] // 2], b[..., : b.shape[-1] // 2], atol=1e-5) for a, b in pairs)


@torch.no_grad()
def test_padded_patches_are_not_pooled(pooling: Any) -> None:
    (one, mask), (other, _) = (padded(images(pooling), value) for value in (0.0, 9.0))
    assert torch.allclose(pooling(one, mask), pooling(other, mask), atol=1e-5)


@torch.no_grad()
def test_padding_is_nowhere_on_a_map(pooling: Any) -> None:
    """What the head reads is not averaged over rows of padding, and nothing is laid on padded cells."""
    one, mask = padded(images(pooling), 0.0)
    lone = one[..., : one.shape[-1] // 2]
    with record_attention(queries="class") as record:
        pooling(one, mask)
    with record_attention() as whole:
        pooling(one, mask)
    for heat in (attention_map(record.maps[0]), rollout_map(whole.maps)):
        half = heat.shape[-1] // 2
        assert heat.shape[0] == len(one) and heat[..., :half].any()
        assert not heat[..., half:].any()
    config = pooling.config
    if (
        pooling.pos_embed is None and config.rope == "none" and not config.rel_pos_bias
    ):  # then the padded image is the left half alone
        with record_attention(queries="class") as record_lone:
            pooling(lone)
        assert torch.allclose(attention_map(record.maps[0])[..., :half], attention_map(record_lone.maps[0]), atol=1e-5)


# ---- tokens


def kept(tokens: Any) -> Tensor:
    """(B, K) some image tokens of each image, others in every image, in no order."""
    count = tokens.grid[0] * tokens.grid[1]
    return torch.stack([torch.randperm(count) for _ in tokens.x])[:, : count // 2]


@torch.no_grad()
def test_dropped_tokens_are_tokens_that_nobody_sees(pooling: Any) -> None:
    """`encode(keep)` on the rows that are left is `encode` with every other key hidden by -inf."""
    tokens = pooling.embed(images(pooling))
    keep = kept(tokens)
    short = pooling.encode(tokens, keep)
    hidden = torch.ones(len(keep), tokens.grid[0] * tokens.grid[1], dtype=torch.bool).scatter(1, keep, False)
    whole = pooling.encode(tokens._replace(padding=hidden))
    rows = keep[..., None].expand(-1, -1, whole.x.shape[-1]) + whole.prefix
    assert torch.allclose(short.x[:, short.prefix :], whole.x.gather(1, rows), atol=1e-5)
    assert torch.allclose(short.x[:, : short.prefix], whole.x[:, : whole.prefix], atol=1e-5)
    assert torch.allclose(pooling.forward_head(short), pooling.forward_head(whole), atol=1e-5)
    assert torch.equal(short.cells, keep)


@torch.no_grad()
def test_to_keep_all_in_order_is_to_keep_all(isotropic: Any) -> None:
    tokens = isotropic.embed(images(isotropic))
    every = torch.arange(tokens.grid[0] * tokens.grid[1]).expand(2, -1)
    assert torch.allclose(isotropic.encode(tokens, every).x, isotropic.encode(tokens).x, atol=1e-6)


@torch.no_grad()
def test_part_of_the_blocks_and_then_the_rest_is_all_of_them(isotropic: Any) -> None:
    x = images(isotropic)
    tokens = isotropic.embed(x)
    keep, depth = kept(tokens), len(isotropic.feature_info)
    for k in range(depth + 1):
        for chosen in (None, keep):
            first = isotropic.encode(tokens, chosen, blocks=slice(k), norm=False)
            both = isotropic.encode(first, blocks=slice(k, None))
            assert torch.equal(both.x, isotropic.encode(tokens, chosen).x)
    whole = isotropic.forward_head(isotropic.encode(tokens))  # where `forward` may leave out what no head reads
    assert torch.allclose(whole, isotropic(x), rtol=0, atol=1e-6)


@torch.no_grad()
def test_rows_that_somebody_adds_are_no_image_tokens(pooling: Any) -> None:
    """Prompts go through the blocks with all others, have no place on the image, and are not pooled."""
    tokens = pooling.embed(images(pooling))
    extra = torch.randn(2, 3, tokens.x.shape[-1])
    p, pos = tokens.prefix, tokens.pos
    pos = None if pos is None else torch.cat([pos[:, :p], torch.zeros(1, 3, pos.shape[-1]), pos[:, p:]], 1)
    more = tokens._replace(x=torch.cat([tokens.x[:, :p], extra, tokens.x[:, p:]], 1), prefix=p + 3, pos=pos)
    with record_attention() as record:
        prompted = pooling.encode(more)
    assert attention_map(record.maps[0], query=0).shape == (2, *tokens.grid)
    plain = pooling.encode(tokens)
    q = plain.prefix  # a class token may have come only at the end
    assert prompted.prefix == q + 3
    assert not torch.allclose(prompted.x[:, q + 3 :], plain.x[:, q:], atol=1e-4)  # they were seen by the others …
    swapped = plain._replace(x=torch.cat([plain.x[:, :q], extra, plain.x[:, q:]], 1), prefix=q + 3)
    assert torch.allclose(pooling.forward_head(swapped), pooling.forward_head(plain), atol=1e-5)  # … and not pooled
