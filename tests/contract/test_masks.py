"""What every family does with padded pixels and with the heads that somebody gives it; see `test_backbone` for more."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from vitrail.layers.linear import Linear
from vitrail.models.backbone import Backbone
from vitrail.models.registry import FAMILIES, build_model

DEBUG = {name: next(iter(family.variants)) for name, family in FAMILIES.items()}


@pytest.fixture(params=DEBUG)
def family(request: pytest.FixtureRequest) -> str:
    torch.manual_seed(0)
    return str(request.param)


@pytest.fixture
def model(family: str) -> Backbone:
    return build_model(DEBUG[family]).eval()


def images(model: Backbone) -> Tensor:
    return torch.randn(2, 3, *model.preprocess.img_size, generator=torch.Generator().manual_seed(3))


def empty_mask(x: Tensor) -> Tensor:
    return torch.zeros(len(x), *x.shape[-2:], dtype=torch.bool)


@pytest.mark.parametrize("value", [7.0, float("nan")])
@torch.no_grad()
def test_a_patch_that_is_only_partly_padding_does_not_see_it(model: Backbone, value: float) -> None:
    x = images(model)
    mask = empty_mask(x)
    mask[..., 21:] = True  # no multiple of any patch
    mask[:, 27:] = True
    zeros, other = x.masked_fill(mask[:, None], 0), x.masked_fill(mask[:, None], value)
    assert torch.equal(model(other, mask), model(zeros, mask))
    pairs = zip(model.features(other, mask=mask).maps, model.features(zeros, mask=mask).maps, strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)


@pytest.mark.parametrize("size", [(33, 32), (45, 51)])
@torch.no_grad()
def test_no_mask_is_a_mask_of_nothing_at_a_size_that_is_padded(family: str, size: tuple[int, int]) -> None:
    model = build_model(DEBUG[family], dynamic_pad=True).eval()
    x = torch.randn(2, 3, *size)
    assert torch.allclose(model(x), model(x, empty_mask(x)), atol=1e-5)
    pairs = zip(model.features(x).maps, model.features(x, mask=empty_mask(x)).maps, strict=True)
    assert all(torch.allclose(a, b, atol=1e-5) for a, b in pairs)


@pytest.mark.parametrize("pool", ["token", "avg", "map"])
@pytest.mark.parametrize("kernel", ["eager", "fused"])
def test_an_image_of_nothing_but_padding_is_a_number_with_or_without_a_class_token(pool: str, kernel: str) -> None:
    model = build_model("vit_debug", global_pool=pool, class_token=pool == "token", attn=kernel)
    check_blank(model)


def test_an_image_of_nothing_but_padding_is_a_number_and_has_gradients(model: Backbone) -> None:
    check_blank(model)


def check_blank(model: Backbone) -> None:
    x = images(model)
    mask = empty_mask(x)
    mask[0] = True
    logits = model(x, mask)
    logits.square().sum().backward()
    assert logits.isfinite().all()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize("family", ["resnet", "convnext"])
@torch.no_grad()
def test_a_cell_of_a_convolution_is_padding_where_its_stride_holds_no_pixel(family: str) -> None:
    """At sizes off the stride too, where ResNet has a cell more and ConvNeXt does not."""
    model = build_model(DEBUG[family]).eval()
    stride = int(model.feature_info[-1].reduction)
    x = torch.randn(1, 3, 37, 45)
    for rows, columns in ((17, 45), (37, 25), (1, 1), (24, 32), (25, 33)):
        mask = ~empty_mask(x)
        mask[:, :rows, :columns] = False
        state = model.forward_features(x, mask)
        h, w = state.map.shape[-2:]
        below, right = torch.arange(h) * stride >= rows, torch.arange(w) * stride >= columns
        assert torch.equal(state.padding[0], below[:, None] | right)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int64, torch.float32])
def test_a_mask_that_is_not_bool_is_named(model: Backbone, dtype: torch.dtype) -> None:
    x = images(model)
    with pytest.raises(ValueError, match=rf"mask must be bool, true where .*; got {dtype}: use mask\.bool\(\)"):
        model(x, empty_mask(x).to(dtype))


# ---- heads


@torch.no_grad()
def test_a_new_head_drops_nothing_in_evaluation(family: str) -> None:
    model = build_model(DEBUG[family], drop_rate=0.5).eval()
    model.reset_classifier(7)
    assert torch.equal(model(x := images(model)), model(x))


@torch.no_grad()
def test_heads_put_in_by_hand_make_logits_where_there_were_none(family: str) -> None:
    like, model = build_model(DEBUG[family]), build_model(DEBUG[family], num_classes=0).eval()
    assert model(x := images(model)).shape == (2, model.num_features)
    for name in heads_of(like):
        model.set_submodule(name, nn.Linear(like.get_submodule(name).in_features, 3))
    assert model(x).shape == (2, 3)


def test_heads_run_by_the_fastest_kernel(family: str) -> None:
    fresh, changed = build_model(DEBUG[family]), build_model(DEBUG[family], num_classes=3)
    changed.reset_classifier(10)
    for model in (fresh, changed):
        assert all(type(model.get_submodule(name)) is Linear for name in heads_of(model))


def heads_of(model: Backbone) -> list[str]:
    """Names of the layers that make ten logits, which no other layer of a debug row has."""
    found = [name for name, part in model.named_modules() if isinstance(part, nn.Linear) and part.out_features == 10]
    assert model.get_submodule(found[0]) is model.get_classifier()
    return found
