"""Recording foreign models, unchanged: every map equals what the model's own library, or arithmetic, says."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close

from vitrail.explain.maps import attention_map, explain, explain_layers, rollout_map
from vitrail.explain.record import AttentionMap, record_attention

timm = pytest.importorskip("timm")
pytest.importorskip("transformers")


def place_of(seen: AttentionMap) -> tuple[tuple[int, ...], int]:
    """Grid and prefix of a map, whose rows and columns are the same tokens in raster order."""
    layout = seen.layout
    assert layout is not None and layout.windows == 1 and layout.key_prefix is None
    assert layout.query_index is layout.key_index is layout.key_grid is None
    return layout.grid, layout.prefix


def randomised(model: nn.Module) -> nn.Module:
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.15)
    return model.eval()


@pytest.fixture
def images() -> Tensor:
    return torch.randn(2, 3, 32, 32)


@pytest.fixture(params=["fused", "eager"])
def timm_kernel(request) -> Iterator[str]:
    """timm's process-wide switch, put back afterwards."""
    was = timm.layers.use_fused_attn()
    timm.layers.set_fused_attn(request.param == "fused")
    yield request.param
    timm.layers.set_fused_attn(was)


SHAPE = {"img_size": 32, "patch_size": 8, "embed_dim": 24, "depth": 2, "num_heads": 3, "num_classes": 5}


def timm_vit(**options: object) -> nn.Module:
    return randomised(timm.models.vision_transformer.VisionTransformer(**SHAPE, **options))


def by_hooks(model: nn.Module, images: Tensor) -> list[Tensor]:
    """What timm's blocks compute by hand, from the input that a hook saw in each attention."""
    inputs: list[Tensor] = []
    hooks = [b.attn.register_forward_pre_hook(lambda _, args: inputs.append(args[0])) for b in model.blocks]
    with torch.no_grad():
        model(images)
        maps = []
        for block, x in zip(model.blocks, inputs, strict=True):
            attn = block.attn
            q, k, _ = attn.qkv(x).reshape(*x.shape[:2], 3, attn.num_heads, -1).permute(2, 0, 3, 1, 4)
            scores = attn.q_norm(q).double() @ attn.k_norm(k).double().transpose(-2, -1) * attn.scale
            maps.append(scores.softmax(-1))
    for hook in hooks:
        hook.remove()
    return maps


@pytest.mark.parametrize(
    ("options", "prefix"),
    [({}, 1), ({"reg_tokens": 3}, 4), ({"qk_norm": True}, 1), ({"class_token": False, "global_pool": "avg"}, 0)],
)
def test_timm_vit(timm_kernel, options, prefix, images):
    model = timm_vit(**options)
    with torch.no_grad():
        plain = model(images)
        with record_attention() as record:
            watched = model(images)
    assert torch.equal(plain, watched)
    for seen, wanted in zip(record.maps, by_hooks(model, images), strict=True):
        assert_close(seen.weights.double(), wanted, atol=1e-5, rtol=0)
        assert place_of(seen) == ((4, 4), prefix)


def test_timm_deit_distilled(timm_kernel, images):
    model = randomised(timm.models.deit.VisionTransformerDistilled(**SHAPE))
    with record_attention() as record:
        model(images)
    for seen, wanted in zip(record.maps, by_hooks(model, images), strict=True):
        assert_close(seen.weights.double(), wanted, atol=1e-5, rtol=0)
        assert place_of(seen) == ((4, 4), 2)
    assert rollout_map(record.maps).shape == (2, 4, 4)


def test_timm_rectangles_and_gradients(images):
    model = timm_vit(dynamic_img_size=True)
    explained = explain(model, images[0, :, :24])
    assert explained.heat.shape == (3, 4)
    model.set_grad_checkpointing(True)
    with record_attention(grad=True) as record:
        logits = model.train()(images)
    grads = torch.autograd.grad(logits[:, 0].sum(), [m.weights for m in record.maps])
    assert all(g.abs().sum() > 0 for g in grads)


def test_timm_attention_pooling(images):
    model = timm_vit(class_token=False, global_pool="map")
    with record_attention() as record:
        model(images)
    assert [m.weights.shape[-2:] for m in record.maps] == [(16, 16), (16, 16), (1, 16)]
    assert_close(rollout_map(record.maps).sum((1, 2)), torch.ones(2))
    found = explain_layers(model, images[0], "attention")
    assert [m.layer for m in found.maps] == [1, 2, 3]
    assert_close(found.maps[2].heat, record.maps[2].weights.mean(1)[0].view(4, 4))


@pytest.mark.parametrize("fused", [True, False])
def test_timm_cait_shows_its_class_attention_too(fused):
    was = timm.layers.use_fused_attn()
    timm.layers.set_fused_attn(fused)
    try:
        model = randomised(timm.models.cait.Cait(img_size=32, patch_size=8, embed_dim=24, depth=2, num_heads=3))
    finally:
        timm.layers.set_fused_attn(was)
    with record_attention() as record:
        model(torch.randn(1, 3, 32, 32))
    assert [m.weights.shape[-2:] for m in record.maps] == [(16, 16), (16, 16), (1, 17), (1, 17)]
    assert_close(attention_map(record.maps[3]), record.maps[3].weights.mean(1)[:, 0, 1:].view(1, 4, 4))
    talking = record.maps[0]
    assert_close(attention_map(talking), talking.effective.mean((1, 2)).view(1, 4, 4))


def rollout_of_cait(model: nn.Module, images: Tensor) -> Tensor:
    """(B, N): by arithmetic, the class token as row 0 of square matrices over it and all N image tokens."""
    inputs: list[tuple[nn.Module, Tensor]] = []
    layers = [block.attn for block in (*model.blocks, *model.blocks_token_only)]
    hooks = [a.register_forward_pre_hook(lambda attn, args: inputs.append((attn, args[0]))) for a in layers]
    with torch.no_grad():
        model(images)
    [hook.remove() for hook in hooks]
    count = inputs[-1][1].shape[1]
    whole = one = torch.eye(count, dtype=torch.float64).repeat(len(images), 1, 1)
    for attn, x in inputs:
        by_head = (*x.shape[:2], attn.num_heads, -1)
        flow = torch.zeros_like(one)
        if hasattr(attn, "qkv"):  # talking heads among the image tokens
            q, k, _ = attn.qkv(x).unflatten(-1, (3, -1)).unbind(2)
            scores = torch.einsum("bihd,bjhd->bijh", q.reshape(by_head), k.reshape(by_head)) * attn.scale
            flow[:, 1:, 1:] = attn.proj_w(attn.proj_l(scores).softmax(2)).mean(-1).clamp(min=0)
            flow[:, 0, 0] = 1
        else:  # the class token among all
            q, k = attn.q(x[:, 0]).reshape(len(x), attn.num_heads, -1), attn.k(x).reshape(by_head)
            flow = one.clone()
            flow[:, 0] = (torch.einsum("bhd,bjhd->bhj", q, k) * attn.scale).softmax(-1).mean(1)
        step = flow + one
        whole = step / step.sum(-1, keepdim=True) @ whole
    return whole[:, 0, 1:].detach()


def test_timm_cait_is_rolled_out_through_its_class_attention(timm_kernel, images):
    """The two last layers hand what the image tokens hold to the class token, which no layer before knew."""
    given = {"img_size": 32, "patch_size": 8, "embed_dim": 24, "depth": 3, "num_heads": 3, "num_classes": 5}
    model = randomised(timm.models.cait.Cait(**given)).double()
    for parameter in model.parameters():
        parameter.data.mul_(3)  # attention that differs from place to place
    with record_attention() as record:
        model(images.double())
    assert [m.weights.shape[-2:] for m in record.maps] == [(16, 16)] * 3 + [(1, 17)] * 2
    wanted = rollout_of_cait(model, images.double()).view(2, 4, 4)
    assert wanted.std() > 2e-3
    assert_close(rollout_map(record.maps), wanted, atol=1e-12, rtol=0)
    assert_close(explain(model, images[1].double()).heat, wanted[1], atol=1e-12, rtol=0)


def test_timm_swin_is_seen_but_not_placed():
    swin = timm.models.swin_transformer.SwinTransformer(
        img_size=64, patch_size=4, embed_dim=12, depths=(2,), num_heads=(3,), window_size=4, num_classes=5
    )
    with record_attention() as record:
        randomised(swin)(torch.randn(2, 3, 64, 64))
    assert [m.weights.shape for m in record.maps] == [(32, 3, 16, 16)] * 2
    assert_close(record.maps[0].weights.sum(-1), torch.ones(32, 3, 16))
    with pytest.raises(ValueError, match="windows and reduced keys of foreign models cannot be placed"):
        attention_map(record.maps[0])


def transformers_vit(implementation: str, **options: object) -> nn.Module:
    from transformers import ViTConfig, ViTForImageClassification

    config = ViTConfig(
        hidden_size=24, num_hidden_layers=2, num_attention_heads=3, intermediate_size=32, image_size=32, patch_size=8,
        num_labels=5, attn_implementation=implementation, **options,
    )  # fmt: skip
    torch.manual_seed(7)
    return randomised(ViTForImageClassification(config))


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_transformers_vit(implementation, images):
    model = transformers_vit(implementation)
    with torch.no_grad():
        wanted = transformers_vit("eager")(images, output_attentions=True).attentions
        plain = model(images).logits
        with record_attention() as record:
            watched = model(images).logits
    assert torch.equal(plain, watched)
    assert len(wanted) == 2
    for seen, right in zip(record.maps, wanted, strict=True):
        assert_close(seen.weights, right, atol=1e-5, rtol=0)
        assert place_of(seen) == ((4, 4), 1)


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_transformers_maps_in_the_graph(implementation, images):
    model = transformers_vit(implementation, attention_probs_dropout_prob=0.2).requires_grad_(False)
    with record_attention(grad=True) as record:
        logits = model(images).logits
    assert_close(logits, model(images).logits, atol=1e-4, rtol=1e-4)
    grads = torch.autograd.grad(logits[:, 0].sum(), [m.weights for m in record.maps])
    assert all(g.abs().sum() > 0 for g in grads)


@pytest.mark.parametrize("inference", [False, True])
def test_torchvision_vit(inference, images):
    from torchvision.models import VisionTransformer

    model = randomised(VisionTransformer(32, 8, 2, 4, 24, 48, num_classes=5))
    inputs: list[Tensor] = []
    hooks = [
        layer.self_attention.register_forward_pre_hook(lambda _, args: inputs.append(args[0]))
        for layer in model.encoder.layers
    ]
    with torch.set_grad_enabled(not inference):
        with record_attention() as record:
            watched = model(images)
        assert_close(watched, model(images), atol=1e-5, rtol=1e-5)
        for hook in hooks:
            hook.remove()
        for seen, layer, x in zip(record.maps, model.encoder.layers, inputs[:2], strict=True):
            wanted = layer.self_attention(x, x, x, average_attn_weights=False)[1]
            assert_close(seen.weights, wanted, atol=1e-5, rtol=0, check_device=False)
            assert place_of(seen) == ((4, 4), 1)
    assert explain(model, images[0]).heat.shape == (4, 4)
