"""What every registered model owes. `make test` runs each family's debug row and one published row; `make full` all.

A family's own test file holds only its mathematics; whatever any model must do stands here.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import fields

import pytest
import torch
from torch import Tensor

from vitrail.models.backbone import Backbone
from vitrail.models.registry import FAMILIES, ROWS, build_from_config, build_model

PUBLISHED = {"vit": "vit_tiny_patch16_224", "resnet": "resnet18_32"}
ATTENDING = [name for name, family in FAMILIES.items() if "attn" in {f.name for f in fields(family.config)}]
DEBUG = {name: next(iter(family.variants)) for name, family in FAMILIES.items()}


def rows() -> Iterator[object]:
    quick = {*DEBUG.values(), *PUBLISHED.values()}
    for row in ROWS:
        yield pytest.param(row, marks=() if row in quick else pytest.mark.full)


@pytest.fixture(scope="module", params=rows())
def model(request: pytest.FixtureRequest) -> Backbone:
    torch.manual_seed(0)
    return build_model(request.param).eval()


@pytest.fixture(scope="module", params=DEBUG.values())
def small(request: pytest.FixtureRequest) -> Backbone:
    """Only the debug rows, for what is slow and does not depend on the row."""
    torch.manual_seed(0)
    return build_model(request.param).eval()


def images(model: Backbone, batch: int = 2, factor: float = 1.0) -> Tensor:
    height, width = model.preprocess.img_size
    shape = (batch, model.preprocess.in_chans, int(height * factor), int(width * factor))
    return torch.randn(shape, generator=torch.Generator().manual_seed(3))


def test_every_family_has_a_debug_row_first_and_a_published_row() -> None:
    for name, row in DEBUG.items():
        assert row.endswith("_debug")
        assert sum(p.numel() for p in build_model(row).parameters()) < 200_000
        assert ROWS[PUBLISHED[name]] == name


@torch.no_grad()
def test_logits_are_the_same_twice_alone_and_in_a_batch(model: Backbone) -> None:
    x = images(model)
    logits = model(x)
    assert logits.shape == (2, model.config.num_classes)
    assert torch.equal(logits, model(x))
    assert torch.allclose(logits[:1], model(x[:1]), atol=1e-5)


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
    x = images(model, batch=1, factor=factor)
    features = model.features(x)
    assert len(features.maps) == len(features.prefix) == len(model.feature_info)
    for found, prefix, info in zip(features.maps, features.prefix, model.feature_info, strict=True):
        assert found.shape[:2] == (1, info.num_chs)
        assert found.shape[-2] == round(x.shape[-2] / info.reduction)
        assert found.shape[-1] == round(x.shape[-1] / info.reduction)
        assert prefix.shape[0] == 1 and prefix.shape[2] == info.num_chs
    last = model.features(x, indices=[-1])
    assert torch.equal(last.maps[0], features.maps[-1])
    assert len(model.features(x, indices=2).maps) == 2


@torch.no_grad()
def test_features_wrong_index_names_the_depth(small: Backbone) -> None:
    depth = len(small.feature_info)
    with pytest.raises(ValueError, match=rf"-{depth} … {depth - 1}.*got \[{depth}\]"):
        small.features(images(small), indices=[depth])


@torch.no_grad()
def test_features_lie_where_their_pixels_lie(small: Backbone) -> None:
    """Image order: what changes in the upper right corner shows most in the upper right corner of the first map."""
    x = images(small, batch=1)
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


def test_layer_groups_hold_every_parameter_once_and_no_decay_names_are_real(model: Backbone) -> None:
    names = [name for group in model.layer_groups() for name in group]
    assert sorted(names) == sorted(name for name, _ in model.named_parameters())
    assert all(model.layer_groups())
    assert model.no_weight_decay() <= set(names)


@torch.no_grad()
def test_eager_and_fused_attention_agree(model: Backbone) -> None:
    if model.family not in ATTENDING:
        pytest.skip(f"{model.family} does not attend")
    x = images(model, batch=1)
    answers = []
    for kernel in ("eager", "fused", "auto"):
        other = build_from_config(model.family, {**model.card().config, "attn": kernel}).eval()
        other.load_state_dict(model.state_dict())
        answers.append(other(x))
    assert (answers[0] - answers[1]).abs().max() <= 1e-6 * max(1, answers[0].abs().max())
    assert (answers[0] - answers[2]).abs().max() <= 1e-6 * max(1, answers[0].abs().max())


@torch.no_grad()
def test_export_with_a_dynamic_batch(small: Backbone) -> None:
    batch = torch.export.Dim("batch", min=1, max=64)
    program = torch.export.export(small, (images(small, batch=3),), dynamic_shapes=({0: batch},))
    x = images(small, batch=5)
    assert torch.allclose(program.module()(x), small(x), atol=1e-5)


def test_compiles_whole_with_the_same_gradients(small: Backbone) -> None:
    plain, fast = copy.deepcopy(small), copy.deepcopy(small)
    compiled = torch.compile(fast, fullgraph=True, backend="aot_eager")
    x = images(small)
    plain(x).square().sum().backward()
    compiled(x).square().sum().backward()
    for (name, a), b in zip(plain.named_parameters(), fast.parameters(), strict=True):
        assert torch.allclose(a.grad, b.grad, atol=1e-4, rtol=1e-4), name
