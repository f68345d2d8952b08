"""Every optimiser's step and state; which parameters decay, and by how much of the rate each depth is trained."""

from __future__ import annotations

import math
import sys
from typing import get_args

import pytest
import torch
from torch.optim import SGD, AdamW, Muon

from vitrail.models.registry import build_model
from vitrail.tasks.classify import Classify
from vitrail.train.optim import (
    OPTIMIZERS,
    OptimConfig,
    OptimizerName,
    hidden_matrices,
    layer_scales,
    make_optimizer,
)

NAMES = sorted(OPTIMIZERS)


def gradients(task, seed=0):
    """Each parameter that is trained gets one of its own, the same ones in every task of one shape."""
    generator = torch.Generator().manual_seed(seed)
    for p in task.parameters():
        if p.requires_grad:
            p.grad = torch.randn(p.shape, generator=generator)


def two_groups(decayed, rest):
    return [{"params": decayed, "weight_decay": 0.1}, {"params": rest, "weight_decay": 0.0}]


def groups_of(task):
    """The parameters that decay, by a tenth, and those that do not, without our own functions."""
    decayed = [p for n, p in task.named_parameters() if p.ndim >= 2 and n not in task.no_weight_decay()]
    return two_groups(decayed, [p for p in task.parameters() if not any(p is other for other in decayed)])


def options(optimizer):
    """The groups without parameters and learning rate, by the first parameter's name."""
    return {
        group["param_names"][0]: {key: group[key] for key in ("weight_decay", "lr_scale")} | {"n": len(group["params"])}
        for group in optimizer.param_groups
    }


def test_what_is_left_open_is_the_optimizers_own():
    assert set(OPTIMIZERS) == set(get_args(OptimizerName))
    assert OptimConfig().numbers() == (3e-4, 1e-6, 0.05, 0.9, 0.999, "cosine")
    assert OptimConfig(optimizer="lion").numbers() == (3e-5, 1e-6, 0.5, 0.9, 0.99, "cosine")
    assert OptimConfig(optimizer="schedule_free").numbers()[-1] == "constant"
    said = {"lr": 0.5, "min_lr": 0.25, "weight_decay": 0.125, "momentum": 0.75, "beta2": 0.875, "schedule": "linear"}
    for name in set(NAMES) - {"schedule_free"}:
        assert OptimConfig(optimizer=name, **said).numbers()._asdict() == said


def test_the_least_rate_follows_a_small_peak_unless_it_is_said():
    assert (OptimConfig().numbers().min_lr, OptimConfig(lr=1e-7).numbers().min_lr) == (1e-6, 1e-7)
    for said in (1e-5, 1e-6):
        with pytest.raises(ValueError, match=rf"--min-lr must lie between 0 and --lr 1e-07; got {said}"):
            OptimConfig(lr=1e-7, min_lr=said)


def test_decay_leaves_biases_norms_and_exempt_names_alone(make_task):
    task = make_task()
    names = {id(p): name for name, p in task.named_parameters()}
    groups = make_optimizer(task, OptimConfig(weight_decay=0.1)).param_groups
    found = {group["weight_decay"]: {names[id(p)] for p in group["params"]} for group in groups}
    assert found[0.1] | found[0.0] == set(names.values())
    assert {"backbone.cls_token", "backbone.pos_embed", "backbone.norm.weight", "backbone.head.bias"} <= found[0.0]
    assert {"backbone.head.weight", "backbone.blocks.0.attn.qkv.weight", "backbone.patch_embed.proj.weight"} <= found[
        0.1
    ]


def test_exempt_names_that_nothing_has_are_refused(make_task):
    """As they are where a wrapper renames the parameters: without them positions would decay."""
    task = make_task()
    task.backbone = torch.compile(task.backbone)
    with pytest.raises(ValueError, match=r"must name parameters of the task; got backbone\.cls_token, backbone\.pos_"):
        make_optimizer(task, OptimConfig())


def test_decay_acts_where_it_should(make_task):
    task = make_task()
    before = {name: p.detach().clone() for name, p in task.named_parameters()}
    optimizer = make_optimizer(task, OptimConfig(lr=0.1, weight_decay=0.5))
    for p in task.parameters():
        p.grad = torch.zeros_like(p)
    optimizer.step()
    after = dict(task.named_parameters())
    torch.testing.assert_close(after["backbone.head.weight"], before["backbone.head.weight"] * 0.95)
    assert torch.equal(after["backbone.pos_embed"], before["backbone.pos_embed"])


def test_frozen_parameters_are_left_out(make_task):
    task = make_task()
    task.backbone.requires_grad_(False)
    with pytest.raises(ValueError, match="got none: unfreeze its head"):
        make_optimizer(task, OptimConfig())
    task.backbone.head.requires_grad_(True)
    assert sum(len(g["params"]) for g in make_optimizer(task, OptimConfig()).param_groups) == 2


def test_fused_equals_plain(make_task):
    weights = []
    for fused in (True, False):
        task = make_task()
        optimizer = make_optimizer(task, OptimConfig(lr=0.1), fused=fused)
        assert optimizer.defaults["fused"] is fused
        for p in task.parameters():
            p.grad = torch.ones_like(p)
        optimizer.step()
        weights.append(task.backbone.head.weight)
    torch.testing.assert_close(*weights)


@pytest.mark.parametrize(("name", "kind"), [("adamw", AdamW), ("sgd", SGD)])
def test_torchs_own_are_torchs_own(name, kind, make_task):
    """With the numbers that the config has, over the groups that decay and those that do not."""
    config = OptimConfig(optimizer=name, lr=0.01, weight_decay=0.1, momentum=0.8, beta2=0.9)
    ours, plain = make_task(), make_task()
    numbers = {"momentum": 0.8, "nesterov": True} if name == "sgd" else {"betas": (0.8, 0.9)}
    theirs, optimizer = kind(groups_of(plain), lr=0.01, **numbers), make_optimizer(ours, config)
    for seed in range(3):
        for task, stepped in ((ours, optimizer), (plain, theirs)):
            gradients(task, seed)
            stepped.step()
    torch.testing.assert_close(ours.state_dict(), plain.state_dict())


def test_sgd_without_momentum_has_none(make_task):
    assert not make_optimizer(make_task(), OptimConfig(optimizer="sgd", momentum=0.0)).defaults["nesterov"]


def test_muon_is_muon_for_matrices_of_blocks_and_adamw_for_the_rest(make_task):
    """The numbers of both; embeddings, tokens, norms, biases and head are AdamW's."""
    config = OptimConfig(optimizer="muon", lr=0.01, weight_decay=0.1, momentum=0.8, beta2=0.9)
    ours, plain = make_task(), make_task()
    hidden = [
        p for n, p in plain.named_parameters()
        if n.startswith("backbone.blocks.") and n.endswith(("qkv.weight", "proj.weight", "fc1.weight", "fc2.weight"))
    ]  # fmt: skip
    assert len(hidden) == len(hidden_matrices(ours)) == 8
    decayed = [plain.backbone.head.weight, plain.backbone.patch_embed.proj.weight]
    rest = [p for p in plain.parameters() if not any(p is other for other in (*hidden, *decayed))]
    theirs = [
        Muon(hidden, lr=0.01, weight_decay=0.1, momentum=0.8, adjust_lr_fn="match_rms_adamw"),
        AdamW(two_groups(decayed, rest), lr=0.01, betas=(0.9, 0.9)),
    ]  # fmt: skip
    optimizer = make_optimizer(ours, config)
    for seed in range(3):
        gradients(ours, seed), gradients(plain, seed)
        for stepped in (optimizer, *theirs):
            stepped.step()
    torch.testing.assert_close(ours.state_dict(), plain.state_dict())


def test_muon_steps_as_far_as_adamw(make_task):
    """So that one rate suits both: a matrix's first step is about a fifth of AdamW's in the root mean square, as the
    paper has it, whatever its shape.
    """
    steps = {}
    for name in ("adamw", "muon"):
        task = make_task()
        before = {n: p.detach().clone() for n, p in task.named_parameters()}
        optimizer = make_optimizer(task, OptimConfig(optimizer=name, lr=0.01, weight_decay=0.0))
        gradients(task)
        optimizer.step()
        steps[name] = {n: (p.detach() - before[n]).square().mean().sqrt().item() for n, p in task.named_parameters()}
    for n in hidden_matrices(task):
        assert 0.12 < steps["muon"][n] / steps["adamw"][n] < 0.28


@pytest.mark.parametrize(
    "family", ["swin_debug", "cait_debug", "pvt_debug", "pvt_v2_debug", "crossvit_debug", "hybrid_debug"]
)
def test_hidden_matrices_of_other_families(family):
    task = Classify(build_model(family, num_classes=3))
    hidden = hidden_matrices(task)
    parameters = dict(task.named_parameters())
    assert hidden and all(parameters[n].ndim == 2 for n in hidden)
    assert not any("head" in n or "embed" in n or "table" in n or "cls_token" in n for n in hidden)


def test_a_matrix_of_the_embedding_is_no_hidden_one(make_task):
    task = make_task()
    before = hidden_matrices(task)
    task.backbone.patch_embed.mix = torch.nn.Linear(4, 4)
    assert hidden_matrices(task) == before


def test_muon_needs_matrices(make_task):
    task = make_task()
    task.backbone.blocks.requires_grad_(False)
    with pytest.raises(
        ValueError, match=r"--optimizer muon needs matrices of blocks to train; .*: take --optimizer adamw"
    ):
        make_optimizer(task, OptimConfig(optimizer="muon"))
    assert not hidden_matrices(task)


def test_muon_alone(make_task):
    task = make_task()
    for n, p in task.named_parameters():
        p.requires_grad_(n in hidden_matrices(make_task()))
    optimizer = make_optimizer(task, OptimConfig(optimizer="muon"))
    gradients(task)
    optimizer.step()
    assert len(optimizer.param_groups) == 1


@pytest.mark.parametrize(("name", "numbers"), [
    ("lamb", {"betas": (0.8, 0.9), "max_grad_norm": None}), ("lion", {"betas": (0.8, 0.9)}),
])  # fmt: skip
def test_timms_are_timms(name, numbers, make_task):
    from timm import optim

    config = OptimConfig(optimizer=name, lr=0.01, weight_decay=0.1, momentum=0.8, beta2=0.9)
    ours, plain = make_task(), make_task()
    theirs, optimizer = (
        {"lamb": optim.Lamb, "lion": optim.Lion}[name](groups_of(plain), lr=0.01, **numbers),
        make_optimizer(ours, config),
    )
    for seed in range(3):
        for task, stepped in ((ours, optimizer), (plain, theirs)):
            gradients(task, seed)
            stepped.step()
    torch.testing.assert_close(ours.state_dict(), plain.state_dict())


def test_schedule_free_is_its_authors(make_task):
    from schedulefree import AdamWScheduleFree

    config = OptimConfig(optimizer="schedule_free", lr=0.01, weight_decay=0.1, momentum=0.8, beta2=0.9)
    ours, plain = make_task(), make_task()
    theirs, optimizer = AdamWScheduleFree(groups_of(plain), lr=0.01, betas=(0.8, 0.9)), make_optimizer(ours, config)
    theirs.train()
    for seed in range(3):
        for task, stepped in ((ours, optimizer), (plain, theirs)):
            gradients(task, seed)
            stepped.step()
    torch.testing.assert_close(ours.state_dict(), plain.state_dict())


@pytest.mark.parametrize(("name", "module", "package"), [
    ("lamb", "timm.optim.lamb", "timm"), ("lion", "timm.optim.lion", "timm"),
    ("schedule_free", "schedulefree", "schedulefree"),
])  # fmt: skip
def test_a_missing_package_is_named(name, module, package, make_task, monkeypatch):
    monkeypatch.setitem(sys.modules, module, None)
    message = (
        rf"--optimizer {name} needs the {package} package; it is not installed: pip install 'vitrail\[{package}\]'"
    )
    with pytest.raises(ValueError, match=message):
        make_optimizer(make_task(), OptimConfig(optimizer=name))


@pytest.mark.parametrize("name", NAMES)
def test_a_closure_is_called_once_with_gradients(name, make_task):
    task, calls = make_task(), []

    def closure():
        assert torch.is_grad_enabled()
        gradients(task)
        calls.append(1)
        return 0.5

    optimizer = make_optimizer(task, OptimConfig(optimizer=name))
    before = task.backbone.head.weight.detach().clone()
    assert optimizer.step(closure) == 0.5
    assert calls == [1] and not torch.equal(task.backbone.head.weight, before)


@pytest.mark.parametrize("name", NAMES)
def test_a_step_without_gradients_is_none(name, make_task):
    """As where it is left out: neither weights nor moments nor counts move."""
    task, fresh = make_task(), make_task()
    optimizer, other = (make_optimizer(t, OptimConfig(optimizer=name, lr=0.01)) for t in (task, fresh))
    for stepped, part in ((optimizer, task), (other, fresh)):
        for seed in range(3):
            if seed == 1 and part is task:
                stepped.zero_grad()
                stepped.step()
            gradients(part, seed)
            stepped.step()
    for mine, theirs in zip(task.parameters(), fresh.parameters(), strict=True):
        assert torch.equal(mine, theirs)


@pytest.mark.parametrize("name", NAMES)
def test_a_saved_state_goes_on_to_the_bit(name, make_task, tmp_path):
    """Written, read as plain tensors alone, and loaded into a new optimiser that was made with other rates."""
    whole, again = make_task(), make_task(seed=1)
    optimizer = make_optimizer(whole, OptimConfig(optimizer=name, lr=0.01))
    for seed in range(2):
        gradients(whole, seed)
        optimizer.step()
    torch.save({"weights": whole.state_dict(), "optimizer": optimizer.state_dict()}, tmp_path / "a.pt")
    saved = torch.load(tmp_path / "a.pt", weights_only=True)
    again.load_state_dict(saved["weights"])
    other = make_optimizer(again, OptimConfig(optimizer=name, lr=0.5))
    other.load_state_dict(saved["optimizer"])
    for task, stepped in ((whole, optimizer), (again, other)):
        for seed in range(2, 4):
            gradients(task, seed)
            stepped.step()
    for mine, theirs in zip(whole.parameters(), again.parameters(), strict=True):
        assert torch.equal(mine, theirs)


@pytest.mark.parametrize("name", NAMES)
def test_what_is_frozen_is_in_no_optimizer(name, make_task):
    task = make_task()
    task.backbone.blocks[0].requires_grad_(False)
    optimizer = make_optimizer(task, OptimConfig(optimizer=name, layer_decay=0.5))
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    assert held == {id(p) for p in task.parameters() if p.requires_grad}


# ---- each depth's share of the rate


def test_layer_decay_by_hand(make_task):
    scales = layer_scales(make_task(), 0.5)
    assert scales["backbone.cls_token"] == scales["backbone.patch_embed.proj.bias"] == 0.125
    assert [scales[f"backbone.blocks.{n}.mlp.fc1.weight"] for n in (0, 1)] == [0.25, 0.5]
    assert scales["backbone.norm.weight"] == scales["backbone.head.weight"] == 1.0


def test_what_a_task_brings_itself_is_as_free_as_the_head(make_task):
    task = make_task()
    task.scale = torch.nn.Parameter(torch.ones(()))
    scales = layer_scales(task, 0.5)
    assert (scales["scale"], scales["backbone.head.weight"], scales["backbone.blocks.1.norm1.weight"]) == (
        1.0,
        1.0,
        0.5,
    )


@pytest.mark.parametrize("pool", ["token", "avg"])
def test_layer_decay_is_timms(pool):
    """But for the norm before a class token's head, which timm counts to the last block and BEiT's code to the head."""
    import timm
    from timm.optim import param_groups_layer_decay

    shape = {"img_size": 32, "patch_size": 16, "embed_dim": 16, "depth": 3, "num_heads": 2, "global_pool": pool}
    theirs = timm.create_model("vit_tiny_patch16_224", num_classes=3, **shape)
    task = Classify(build_model("vit_tiny_patch16_224", num_classes=3, **shape))
    names = {id(p): name for name, p in theirs.named_parameters()}
    groups = param_groups_layer_decay(
        theirs, weight_decay=0.1, layer_decay=0.7, no_weight_decay_list=theirs.no_weight_decay()
    )
    expected = {names[id(p)]: (g["lr_scale"], g["weight_decay"]) for g in groups for p in g["params"]}
    made = make_optimizer(task, OptimConfig(weight_decay=0.1, layer_decay=0.7)).param_groups
    found = {
        name.removeprefix("backbone."): (group["lr_scale"], group["weight_decay"])
        for group in made for name in group["param_names"]
    }  # fmt: skip
    apart = {"norm.weight", "norm.bias"} if pool == "token" else set()
    assert set(found) == set(expected)
    assert {n: value for n, value in found.items() if n not in apart} == {
        n: pytest.approx(value) for n, value in expected.items() if n not in apart
    }
    assert {found[n][0] for n in apart} <= {1.0}


@pytest.mark.parametrize("name", NAMES)
def test_each_depth_has_a_group_that_decays_and_one_that_does_not(name, make_task):
    """And without layer-wise decay there are two, three with Muon's."""
    made = [
        make_optimizer(make_task(), OptimConfig(optimizer=name, weight_decay=0.5, layer_decay=d)) for d in (0.5, 1.0)
    ]
    found = [sorted((g["lr_scale"], g["weight_decay"]) for g in optimizer.param_groups) for optimizer in made]
    assert found[0] == [(scale, decay) for scale in (0.125, 0.25, 0.5, 1.0) for decay in (0.0, 0.5)]
    assert found[1] == [(1.0, 0.0), (1.0, 0.5), (1.0, 0.5)][: 3 if name == "muon" else 2]


def test_moments_find_their_weights_by_name(make_task):
    """In a state of other groups, as where layer-wise decay is overridden; and by order in one without names."""
    task = make_task()
    plain = make_optimizer(task, OptimConfig(optimizer="adamw"))
    gradients(task)
    plain.step()
    layered = make_optimizer(task, OptimConfig(layer_decay=0.5, weight_decay=0.3))
    layered.load_state_dict(plain.state_dict())
    for p in task.parameters():
        assert torch.equal(layered.state[p]["exp_avg"], plain.state[p]["exp_avg"])
    assert {g["weight_decay"] for g in layered.param_groups} == {0.3, 0.0}
    assert options(layered)["backbone.head.weight"]["lr_scale"] == 1.0
    nameless = plain.state_dict()
    for group in nameless["param_groups"]:
        del group["param_names"], group["lr_scale"]
    again = make_optimizer(task, OptimConfig())
    again.load_state_dict(nameless)
    for p in task.parameters():
        assert torch.equal(again.state[p]["exp_avg"], plain.state[p]["exp_avg"])
    assert options(again) == options(plain)


def test_of_a_checkpoint_only_moments_and_rates_are_taken(make_task):
    """How it steps is its own: with the decay it was made with, and the kernel that its precision needs."""
    task = make_task()
    saved = make_optimizer(task, OptimConfig(weight_decay=0.3), fused=False)
    for p in task.parameters():
        p.grad = torch.ones_like(p)
    saved.step()
    for group in saved.param_groups:
        group["lr"] = 0.125
    for fused in (True, False):
        optimizer = make_optimizer(task, OptimConfig(weight_decay=0.1), fused=fused)
        own = [{**group, "lr": 0.125} for group in optimizer.param_groups]
        optimizer.load_state_dict(saved.state_dict())
        assert all(group == was for group, was in zip(optimizer.param_groups, own, strict=True))
        assert optimizer.state[own[0]["params"][0]]["exp_avg"].any()
        optimizer.step()


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("lr", -1, "--lr must be positive; got -1"),
        ("lr", math.nan, "--lr must be positive; got nan"),
        ("min_lr", 1.0, "--min-lr must lie between 0 and --lr 0.0003; got 1.0"),
        ("weight_decay", -0.1, "--weight-decay must be 0 or more; got -0.1"),
        ("optimizer", "adam", "--optimizer must be one of adamw, sgd, .*; got 'adam': did you mean adamw?"),
        ("momentum", 1.0, r"--momentum must lie in \[0, 1\); got 1.0"),
        ("beta2", -0.5, r"--beta2 must lie in \[0, 1\); got -0.5"),
        ("layer_decay", 0.0, r"--layer-decay must lie in \(0, 1\]; got 0.0"),
        ("layer_decay", 1.5, r"--layer-decay must lie in \(0, 1\]; got 1.5"),
        ("clip_grad", math.inf, r"--clip-grad must be 0 \(off\) or more; got inf"),
        ("accumulate", 0, "--accumulate must be at least 1; got 0"),
    ],
)
def test_ranges(field, value, message):
    with pytest.raises(ValueError, match=message):
        OptimConfig(**{field: value})


@pytest.mark.parametrize(("said", "message"), [
    ({"schedule": "cosine"}, "--schedule must be constant with --optimizer schedule_free; got cosine"),
    ({"momentum": 0.0}, "--momentum must be above 0 with --optimizer schedule_free; got 0.0"),
])  # fmt: skip
def test_what_schedule_free_cannot_do(said, message):
    with pytest.raises(ValueError, match=message):
        OptimConfig(optimizer="schedule_free", **said)
