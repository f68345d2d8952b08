"""`--freeze`: which parameters train, which stay bit for bit, and that a stopped run goes on as if it had not been."""

from __future__ import annotations

import os
import signal
import sys

import pytest
import torch
from torch import nn

from vitrail.explain.record import record_attention
from vitrail.layers.prompts import PromptedBlock
from vitrail.models.registry import build_model
from vitrail.tasks.classify import Classify
from vitrail.train.config import TrainConfig, say_idle
from vitrail.train.engine import Interrupted
from vitrail.train.finetune import freezing, merge, prompted, say_trained, settle, tuned, unfrozen
from vitrail.weights.load import load_model

HEAD = {"backbone.head.weight", "backbone.head.bias"}
LAYERS = ("attn.qkv", "attn.proj")
EVERY = ("none", "backbone", "first:1", "gradual:1", "bias", "lora:2", "prompts:3", "deep_prompts:3")


def block(number, *parts):
    """The parameters of one block of the tiny ViT, or those of its `parts`."""
    layers = ("norm1", "attn.qkv", "attn.proj", "norm2", "mlp.fc1", "mlp.fc2")
    names = parts or tuple(f"{layer}.{kind}" for layer in layers for kind in ("weight", "bias"))
    return {f"backbone.blocks.{number}.{name}" for name in names}


NORM = {"backbone.norm.weight", "backbone.norm.bias"}
STEM = {
    "backbone.cls_token",
    "backbone.pos_embed",
    "backbone.patch_embed.proj.weight",
    "backbone.patch_embed.proj.bias",
}
BIASES = {name for i in (0, 1) for name in block(i) if name.endswith("bias")}
ADAPTERS = {f"backbone.blocks.{i}.{layer}.lora_{ab}.default.weight" for i in (0, 1) for layer in LAYERS for ab in "AB"}
TRAINED = {
    "none": STEM | block(0) | block(1) | NORM | HEAD,
    "backbone": HEAD,
    "first:0": block(0) | block(1) | NORM | HEAD,
    "first:1": block(1) | NORM | HEAD,
    "first:2": NORM | HEAD,
    "gradual:2": STEM | block(0) | block(1) | NORM | HEAD,
    "bias": BIASES | HEAD | {"backbone.patch_embed.proj.bias", "backbone.norm.bias"},
    "lora:2": ADAPTERS | HEAD,
    "prompts:3": {"backbone.reg_token"} | HEAD,
    "deep_prompts:3": {"backbone.reg_token", "backbone.blocks.1.prompt"} | HEAD,
}


@pytest.fixture
def task_for(make_task):
    """The tiny task, with the prompts that `freeze` asks for."""

    def make(freeze, **options):
        task = make_task(**options)
        made = prompted(task.backbone, freeze)
        return task if made is task.backbone else Classify(made)

    return make


def needed(freeze):
    if freeze.startswith("lora"):
        pytest.importorskip("peft")


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("bakbone", r"--freeze must be one of none, .*; got 'bakbone': did you mean backbone\?"),
        ("first", r"--freeze must be first:N with N at least 0; got 'first'"),
        ("first:x", r"--freeze must be first:N with N at least 0; got 'first:x'"),
        ("first:-1", r"--freeze must be first:N with N at least 0; got 'first:-1'"),
        ("gradual:0", r"--freeze must be gradual:E with E at least 1; got 'gradual:0'"),
        ("lora:0", r"--freeze must be lora:R with R at least 1; got 'lora:0'"),
        ("bias:3", r"--freeze must be bias without a number; got 'bias:3'"),
        ("none:", r"--freeze must be none without a number; got 'none:'"),
    ],
)
def test_words_that_mean_nothing(text, said):
    with pytest.raises(ValueError, match=said):
        TrainConfig(freeze=text)


def test_words_are_taken_apart():
    assert freezing("first:12") == ("first", 12)
    assert freezing("backbone") == ("backbone", 0)


@pytest.mark.parametrize("freeze", TRAINED)
def test_exactly_these_parameters_train(freeze, task_for):
    needed(freeze)
    task = task_for(freeze)
    before = {name: p.requires_grad for name, p in task.named_parameters()}
    with tuned(task, freeze):
        assert {name for name, p in task.named_parameters() if p.requires_grad} == TRAINED[freeze]
    assert {name: p.requires_grad for name, p in task.named_parameters()} == before


@pytest.mark.parametrize("freeze", EVERY)
def test_what_is_frozen_stays_bit_for_bit_and_all_else_learns(freeze, task_for, train):
    needed(freeze)
    task = task_for(freeze)
    before = {name: p.detach().clone() for name, p in task.named_parameters()}
    train(task, freeze=freeze, warmup_epochs=0, ema=0.5, epochs=4)
    after = dict(task.named_parameters())
    assert after.keys() == before.keys(), "adapters are left behind"
    learnt = {name for name, p in after.items() if not torch.equal(p, before[name])}
    merged = {f"backbone.blocks.{i}.{layer}.weight" for i in (0, 1) for layer in LAYERS} | HEAD
    assert learnt == (merged if freeze == "lora:2" else TRAINED.get(freeze, TRAINED["none"]))


@pytest.mark.parametrize("freeze", EVERY)
def test_a_model_folder_answers_as_the_task(freeze, task_for, train, tmp_path):
    needed(freeze)
    task = task_for(freeze)
    train(task, freeze=freeze, out=tmp_path / "run", ema=0.5)
    images = torch.randn(4, 3, 8, 8)
    model = load_model(tmp_path / "run")
    assert torch.equal(model(images), task.eval().backbone(images))
    assert model.state_dict().keys() == prompted(task.backbone, "none").state_dict().keys()


@pytest.mark.parametrize("freeze", ["backbone", "gradual:1", "lora:2", "prompts:3", "deep_prompts:3"])
@pytest.mark.parametrize("stop", [8, 13])
def test_a_resumed_run_is_bit_identical(freeze, stop, task_for, train, fingerprint, tmp_path):
    """Eight batches an epoch: stopped at the end of the first, and within the second."""
    needed(freeze)
    recipe = {"freeze": freeze, "ema": 0.9, "mixup": 0.2, "clip_grad": 0.5}
    whole = task_for(freeze, drop_path_rate=0.2, drop_rate=0.1)
    train(whole, out=tmp_path / "whole", **recipe)

    def hook(batch):
        if batch == stop:
            os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(Interrupted):
        train(task_for(freeze, drop_path_rate=0.2, drop_rate=0.1), out=tmp_path / "run", hook=hook, **recipe)
    # what a new process would begin with: other weights, which the checkpoint replaces
    again = task_for(freeze, seed=1, drop_path_rate=0.2, drop_rate=0.1)
    train(again, out=tmp_path / "run", resume=True, **recipe)
    assert fingerprint(again) == fingerprint(whole)


@pytest.mark.parametrize(("name", "value"), [("freeze", "first:1"), ("from_weights", "elsewhere")])
def test_what_was_frozen_is_settled(name, value, make_task, train, tmp_path):
    train(make_task(), out=tmp_path / "run", freeze="backbone")
    with pytest.raises(ValueError, match=f"--{name.replace('_', '-')} had its say when the run began, which nothing"):
        train(make_task(), out=tmp_path / "run", resume=True, **{"freeze": "backbone", name: value})


# ---- modes


def test_frozen_parts_are_in_evaluation_mode(make_task):
    task = make_task(drop_path_rate=0.5, proj_drop_rate=0.5)
    with tuned(task, "backbone"):
        assert not task.backbone.blocks.training
        assert not any(module.training for module in task.backbone.blocks.modules())
        assert task.backbone.head.training
        assert task.backbone.head_drop.training
    assert all(module.training for module in task.modules())


def test_the_statistics_of_frozen_batch_norms_stay(images, train):
    torch.manual_seed(0)
    model = build_model("resnet_debug", num_classes=3, img_size=8)
    model.preprocess = model.preprocess.replace(img_size=(8, 8))
    task = Classify(model)
    means = {name: value.clone() for name, value in task.named_buffers() if "running" in name}
    train(task, freeze="backbone", epochs=1)
    assert means
    assert all(torch.equal(value, means[name]) for name, value in task.named_buffers() if name in means)
    train(task, epochs=1)
    assert not all(torch.equal(value, means[name]) for name, value in task.named_buffers() if name in means)


def test_what_was_frozen_by_hand_stays_so(make_task, train):
    for freeze in ("first:0", "gradual:1"):
        task = make_task()
        task.backbone.blocks[1].requires_grad_(False)
        frozen, seen = task.backbone.blocks[1].mlp.fc1.weight, []
        before = frozen.detach().clone()
        train(task, freeze=freeze, hook=lambda _, frozen=frozen, seen=seen: seen.append(frozen.requires_grad))
        assert torch.equal(frozen, before)
        assert not any([*seen, frozen.requires_grad]), "a gradient that nobody takes would count for clipping"


def test_an_error_leaves_the_task_as_it_was(make_task):
    pytest.importorskip("peft")
    task = make_task()
    names = [name for name, _ in task.named_parameters()]
    with pytest.raises(RuntimeError, match="in the middle"), tuned(task, "lora:2"):
        raise RuntimeError("in the middle")
    assert [name for name, p in task.named_parameters() if p.requires_grad] == names


# ---- gradual unfreezing


def test_a_layer_more_at_a_time(make_task):
    task = make_task()
    layers = [NORM | HEAD, block(1), block(0), STEM]
    for epoch, count in enumerate([1, 1, 2, 2, 3, 3, 4, 4, 4]):
        assert unfrozen(task, 2, epoch) == set().union(*layers[:count])


def test_gradual_unfreezing_follows_the_epochs(make_task, train):
    task, seen = make_task(), []
    train(task, freeze="gradual:1", hook=lambda batch: seen.append(free(task)))
    assert seen == [NORM | HEAD] * 8 + [NORM | HEAD | block(1)] * 8 + [NORM | HEAD | block(1) | block(0)] * 8


def free(task):
    return {name for name, p in task.named_parameters() if p.requires_grad}


def test_what_is_not_unfrozen_yet_does_not_decay(make_task, train):
    task = make_task()
    before = task.backbone.blocks[1].mlp.fc1.weight.detach().clone()
    train(task, freeze="gradual:1", epochs=1, weight_decay=0.5)
    assert torch.equal(task.backbone.blocks[1].mlp.fc1.weight, before)


def test_gradual_unfreezing_is_for_one_process():
    with pytest.raises(ValueError, match="--freeze must be another with several processes, .*; got gradual:1"):
        TrainConfig(freeze="gradual:1", devices=2)


def test_too_many_layers(make_task):
    with pytest.raises(ValueError, match="must leave the head of vit_.*, which has 2 layers before it; got first:3"):
        tuned(make_task(), "first:3").__enter__()


# ---- LoRA


@pytest.mark.parametrize("row", ["vit_debug", "swin_debug", "pvt_v2_debug", "cait_debug", "crossvit_debug"])
def test_merged_is_unmerged(row):
    pytest.importorskip("peft")
    torch.manual_seed(0)
    task = Classify(build_model(row, num_classes=3)).eval()
    images = torch.randn(2, 3, *task.backbone.preprocess.img_size)
    plain = task.backbone(images)
    with tuned(task, "lora:4"):
        task.eval()
        assert torch.allclose(task.backbone(images), plain, atol=1e-6), "adapters begin with nothing"
        with torch.no_grad():
            for name, p in task.named_parameters():
                p.normal_(std=0.1) if "lora_B" in name else None
        adapted = task.backbone(images)
        merge(task)
        assert (task.backbone(images) - adapted).abs().max() < 1e-6
        assert (adapted - plain).abs().max() > 1e-3
    assert all(type(module).__module__.startswith(("vitrail", "torch")) for module in task.modules())


def test_the_first_adapters_are_a_function_of_the_seed(make_task):
    pytest.importorskip("peft")
    found = []
    for seed in (0, 0, 1):
        torch.rand(seed + len(found))  # what the global generator stands at decides nothing
        with tuned(task := make_task(), "lora:2", seed):
            found.append(task.get_parameter("backbone.blocks.0.attn.qkv.lora_A.default.weight").detach().clone())
    assert torch.equal(found[0], found[1])
    assert not torch.equal(found[0], found[2])


@pytest.mark.parametrize("row", ["beit_debug", "resnet_debug", "convnext_debug"])
def test_lora_needs_attention_made_of_layers(row):
    pytest.importorskip("peft")
    family = row.partition("_")[0]
    with pytest.raises(ValueError, match=f"lora:R is for attention .*; {family} has none: use bias, first:N or backb"):
        tuned(Classify(build_model(row)), "lora:2").__enter__()


def test_a_missing_peft_is_named(make_task, monkeypatch):
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(ValueError, match=r"lora:R needs the peft package; .*: pip install 'vitrail\[peft\]'"):
        tuned(make_task(), "lora:2").__enter__()


# ---- prompts


def by_hand(model, images, own):
    """VPT-deep as its paper writes it: a layer's own prompts stand where what became of the last ones did."""
    tokens = model.embed(images)
    x = tokens.x + tokens.pos
    for number, layer in enumerate(model.blocks):
        if number in own:
            x = torch.cat([x[:, :1], own[number].expand(len(x), -1, -1), x[:, 1 + own[number].shape[1] :]], dim=1)
        attn = layer.attn(layer.norm1(x))
        x = x + attn
        x = x + layer.mlp(layer.norm2(x))
    return model.head(model.norm(x)[:, 0])


def test_deep_prompts_are_those_of_the_paper(task_for):
    model = task_for("deep_prompts:3").backbone.eval()
    images = torch.randn(2, 3, 8, 8)
    own = {1: model.blocks[1].prompt}
    assert torch.allclose(model(images), by_hand(model, images, own), atol=1e-6)
    assert not torch.allclose(model(images), by_hand(model, images, {}), atol=1e-4)


def test_shallow_prompts_leave_everything_else_alone(make_task):
    plain = make_task().backbone.eval()
    model = prompted(plain, "prompts:3").eval()
    tokens, before = model.embed(torch.ones(1, 3, 8, 8)), plain.embed(torch.ones(1, 3, 8, 8))
    x, was = tokens.x + tokens.pos, before.x + before.pos
    assert torch.equal(x[:, :1], was[:, :1]) and torch.equal(x[:, 4:], was[:, 1:])
    assert torch.equal(x[:, 1:4], model.reg_token), "prompts have no position"
    bound = (6 / (3 * 4 * 4 + 16)) ** 0.5
    assert model.reg_token.abs().max() <= bound < 2 * model.reg_token.abs().max()
    assert (model.preprocess, model.classes, model.variant) == (plain.preprocess, plain.classes, plain.variant)


def test_a_networks_own_registers_come_first(make_task):
    plain = make_task(reg_tokens=2).backbone
    model = prompted(plain, "prompts:3")
    assert torch.equal(model.reg_token[:, :2], plain.reg_token)
    assert torch.equal(model.pos_embed[:, :3], plain.pos_embed[:, :3])
    assert not model.pos_embed[:, 3:6].any()
    deep = prompted(plain, "deep_prompts:3")
    assert deep.blocks[1].first == 3


@pytest.mark.parametrize("freeze", ["prompts:3", "deep_prompts:3"])
def test_a_prompted_network_is_one_like_any_other(freeze, task_for, tmp_path):
    model = task_for(freeze).backbone.eval()
    images = torch.randn(2, 3, 8, 8)
    with record_attention() as record:
        logits = model(images)
    assert [(seen.weights.shape[-1], seen.layout.prefix) for seen in record.maps] == [(8, 4), (8, 4)]
    features = model.features(images)
    assert features.prefix[-1].shape == (2, 4, 16) and features.maps[-1].shape == (2, 16, 2, 2)
    assert torch.allclose(load_model(model.save_pretrained(tmp_path / "model"))(images), logits)
    exported = torch.export.export(model, (images,)).module()
    assert torch.allclose(exported(images), logits, atol=1e-6)
    assert {"reg_token", *(name for name, _ in model.named_parameters() if "prompt" in name)} <= model.no_weight_decay()
    assert sorted(name for group in model.layer_groups() for name in group) == sorted(
        name for name, _ in model.named_parameters()
    )


def test_deep_prompts_are_drawn_by_their_law():
    model = build_model("vit_debug", reg_tokens=4, deep_prompts=4)
    bound = (6 / (3 * 8 * 8 + 48)) ** 0.5
    for layer in model.blocks[1:]:
        assert isinstance(layer, PromptedBlock)
        assert bound / 2 < layer.prompt.abs().max() <= bound
    assert not isinstance(model.blocks[0], PromptedBlock)


@pytest.mark.parametrize("row", ["swin_debug", "pvt_debug", "cait_debug", "crossvit_debug", "resnet_debug"])
def test_prompts_are_for_plain_vits(row):
    with pytest.raises(ValueError, match=f"prompts:N is for plain ViTs, .*; {row} has none: use bias, first:N or"):
        prompted(build_model(row), "prompts:4")


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        (
            {"reg_tokens": 2, "deep_prompts": 3},
            "deep_prompts must be at most reg_tokens, whose rows they take; got 3 of 2",
        ),
        ({"reg_tokens": 2, "deep_prompts": 2, "block": "postnorm"}, "are for blocks that norm before each branch"),
        (
            {"reg_tokens": 2, "deep_prompts": 2, "shared_blocks": True},
            "got block='prenorm', shared_blocks=True: use reg",
        ),
    ],
)
def test_where_deep_prompts_cannot_be(fields, said):
    with pytest.raises(ValueError, match=said):
        build_model("vit_debug", **fields)


def test_deep_prompts_are_not_for_beits_blocks():
    with pytest.raises(
        ValueError, match="deep_prompts are for plain ViTs' blocks, not this family's; got 2: use reg_t"
    ):
        prompted(build_model("beit_debug"), "deep_prompts:2")


def test_deep_prompts_once():
    with pytest.raises(ValueError, match="begins with a network without deep prompts; got 2: begin with the weights"):
        prompted(build_model("vit_debug", reg_tokens=2, deep_prompts=2), "deep_prompts:2")


# ---- what is said


@pytest.mark.parametrize(
    ("freeze", "said"),
    [
        ("backbone", "51 of 7,523 parameters (0.68 %): backbone.head.weight, backbone.head.bias"),
        ("gradual:1", "83 of 7,523 parameters (1.1 %): backbone.norm.weight, backbone.norm.bias, "
         "backbone.head.weight, backbone.head.bias; later one layer more at a time"),
        ("first:0", "6,643 of 7,523 parameters (88 %): backbone.blocks.0.norm1.weight, "
         "backbone.blocks.0.norm1.bias, backbone.blocks.0.attn.qkv.weight, backbone.blocks.0.attn.qkv.bias "
         "and 24 more"),
    ],
)  # fmt: skip
def test_one_line_says_what_is_trained(freeze, said, make_task, caplog):
    caplog.set_level("INFO", logger="vitrail")
    with tuned(task := make_task(), freeze):
        say_trained(task, freeze)
        assert caplog.messages == [f"--freeze {freeze} trains {said}"]


def test_a_run_that_is_gone_on_with_says_what_is_trained_by_then(make_task, train, tmp_path, caplog):
    caplog.set_level("INFO", logger="vitrail")
    for epochs in (2, 3, 6):
        caplog.clear()
        train(make_task(), out=tmp_path, freeze="gradual:2", epochs=epochs, resume=epochs > 2)
        said = [message.split(" trains ")[1] for message in caplog.messages if " trains " in message]
        heads = "83 of 7,523 parameters (1.1 %): backbone.norm.weight"
        more = "3,363 of 7,523 parameters (45 %): backbone.blocks.1.norm1.weight"
        assert said[0].startswith(heads if epochs == 2 else more)
        assert said[0].endswith("; later one layer more at a time")
    with tuned(task := make_task(), "gradual:2"):
        caplog.clear()
        say_trained(task, "gradual:2", 6)
        assert "7,523 of 7,523" in caplog.messages[0] and "later" not in caplog.messages[0]


def test_a_setting_of_frozen_layers_does_nothing(caplog):
    say_idle(TrainConfig(freeze="backbone", drop_path=0.1))
    assert caplog.messages == [
        "these settings do nothing here: --drop-path needs layers that are trained (another --freeze)"
    ]
    caplog.clear()
    say_idle(TrainConfig(freeze="bias", drop_path=0.1))
    assert caplog.messages == []


def test_parts_of_a_task_beside_its_backbone_train_with_the_head(make_task):
    task = make_task()
    task.scale = nn.Linear(2, 2)
    own = {"scale.weight", "scale.bias"}
    with tuned(task, "backbone"):
        assert free(task) == HEAD | own
    assert unfrozen(task, 1, 0) == NORM | HEAD | own
    settle(task, HEAD)
    assert not task.scale.training
