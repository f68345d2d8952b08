"""Files as OpenAI, Meta and Microsoft publish their encoders: the same answers here, bit for bit.

Each is built from a network of ours by its authors' names, written down here a second time: from the code of
openai/CLIP, facebookresearch/dino, dinov2, dinov3 and mae, microsoft/unilm (beit, beit2).
"""

from __future__ import annotations

import logging
import re
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from vitrail.models.backbone import Backbone
from vitrail.models.registry import build_model
from vitrail.research.peers import randomise
from vitrail.weights import doctor
from vitrail.weights.doctor import fitting_rows, inspect
from vitrail.weights.foreign import File, read_file, row_of
from vitrail.weights.load import load_weights
from vitrail.weights.read import Checkpoint, CheckpointError, read_checkpoint
from vitrail.weights.sidecar import Sidecar
from vitrail.weights.sources import SOURCES

State = dict[str, Tensor]
SMALL: dict[str, Any] = dict(embed_dim=24, depth=2, num_heads=2)


def renamed(state: State, *pairs: tuple[str, str]) -> State:
    """Every name by every pair of a pattern and what stands for it, one after the other."""
    made = {}
    for name, value in state.items():
        for pattern, theirs in pairs:
            name = re.sub(pattern, theirs, name)
        made[name] = value
    return made


def prefixed(prefix: str, state: State) -> State:
    return {prefix + name: value for name, value in state.items()}


# ---- OpenAI


def clip(model: Backbone) -> State:
    """The whole of CLIP: image tower, text tower, scale."""
    model.head.bias.data.zero_()  # a projection, which has none
    state = renamed(
        model.state_dict(), (r"^blocks\.", "transformer.resblocks."), (r"attn\.qkv\.", "attn.in_proj_"),
        (r"attn\.proj\.", "attn.out_proj."), (r"norm([12])\.", r"ln_\1."), (r"mlp\.fc1", "mlp.c_fc"),
        (r"mlp\.fc2", "mlp.c_proj"), (r"^norm_pre", "ln_pre"), (r"^norm\.", "ln_post."),
        ("patch_embed.proj", "conv1"), ("cls_token", "class_embedding"), ("pos_embed", "positional_embedding"),
        (r"head\.weight", "proj"),
    )  # fmt: skip
    state |= {"class_embedding": state["class_embedding"][0, 0]}
    state |= {"positional_embedding": state["positional_embedding"][0], "proj": state["proj"].T}
    del state["head.bias"]
    text = {
        "transformer.resblocks.0.ln_1.weight": torch.ones(8), "transformer.resblocks.0.attn.in_proj_weight":
        torch.ones(24, 8), "token_embedding.weight": torch.ones(11, 8), "positional_embedding": torch.ones(7, 8),
        "ln_final.weight": torch.ones(8), "ln_final.bias": torch.ones(8), "text_projection": torch.ones(8, 5),
        "logit_scale": torch.tensor(4.6),
    }  # fmt: skip
    return prefixed("visual.", state) | text


def clip_with_sizes(model: Backbone) -> State:
    """As the archives have it: three numbers more."""
    return clip(model) | {name: torch.tensor(7) for name in ("input_resolution", "context_length", "vocab_size")}


# ---- Meta


def dinov2(model: Backbone) -> State:
    """Its table of positions begins with the class token's, which here is part of that token where registers follow."""
    state, width = dict(model.state_dict()), model.num_features
    if "reg_token" in state:
        own, first = torch.randn(1, 1, width), torch.randn(1, 1, width)
        model.cls_token.data.copy_(own + first)
        state |= {"cls_token": own, "pos_embed": torch.cat([first, state["pos_embed"]], 1)}
    pairs = [("reg_token", "register_tokens")]
    if model.config.mlp == "swiglu_packed":
        pairs += [(r"mlp\.fc1", "mlp.w12"), (r"mlp\.fc2", "mlp.w3")]
    return renamed(state, *pairs) | {"mask_token": torch.zeros(1, width)}


def dinov3(model: Backbone) -> State:
    """Keys' biases are there, and masked: whatever stands in them, NaN too, has no say."""
    state, width = dict(model.state_dict()), model.num_features
    for i in range(model.config.depth):
        q, v = (state.pop(f"blocks.{i}.attn.{part}_bias", None) for part in "qv")
        if q is not None:
            state[f"blocks.{i}.attn.qkv.bias"] = torch.cat([q, torch.full((width,), torch.nan), v])
            ones = torch.ones(width)
            state[f"blocks.{i}.attn.qkv.bias_mask"] = torch.cat([ones, 0 * ones, ones])
    state |= {"mask_token": torch.zeros(1, width), "rope_embed.periods": torch.ones(3)}
    state |= {"local_cls_norm.weight": torch.ones(width), "local_cls_norm.bias": torch.ones(width)}
    pairs = [("reg_token", "storage_tokens"), (r"gamma_(\d)", r"ls\1.gamma")]
    if model.config.mlp == "swiglu":
        pairs += [("mlp.fc1_g", "mlp.w1"), ("mlp.fc1_x", "mlp.w2"), ("mlp.fc2", "mlp.w3")]
    return renamed(state, *pairs)


def dino_training(model: Backbone) -> dict[str, Any]:
    """`dino_…_full_checkpoint.pth`: the student under DDP, the teacher without."""
    heads = {"head.mlp.0.weight": torch.ones(4, 4), "head.last_layer.weight_v": torch.ones(9, 4)}
    both = prefixed("backbone.", dict(model.state_dict())) | heads
    worse = {name: value + 1 for name, value in both.items()}
    loss = {"center": torch.zeros(1, 9)}
    beside = {"optimizer": {"state": {}}, "epoch": 100, "args": Namespace(arch="vit_small"), "dino_loss": loss}
    return {"student": prefixed("module.", worse), "teacher": both, **beside}


def teacher(theirs: Callable[[Backbone], State]) -> Callable[[Backbone], dict[str, Any]]:
    """As training leaves a teacher: its backbone, and two heads."""

    def wrapped(model: Backbone) -> dict[str, Any]:
        heads = {"dino_head.mlp.0.weight": torch.ones(4, 4), "ibot_head.last_layer.weight_v": torch.ones(9, 4)}
        return {"teacher": prefixed("backbone.", theirs(model)) | heads}

    return wrapped


def mae(model: Backbone) -> dict[str, State]:
    """`mae_pretrain_vit_base.pth`: the encoder alone, by our names."""
    return {"model": dict(model.state_dict())}


def mae_with_decoder(model: Backbone) -> dict[str, State]:
    """`mae_pretrain_vit_base_full.pth`."""
    names = ("decoder_embed.weight", "decoder_pos_embed", "decoder_blocks.0.attn.qkv.weight", "decoder_pred.bias")
    decoder = {name: torch.zeros(4) for name in (*names, "decoder_norm.weight")}
    return {"model": model.state_dict() | decoder | {"mask_token": torch.zeros(1, 1, 48)}}


# ---- Microsoft


def beit(model: Backbone) -> dict[str, State]:
    """Fine-tuned, of both versions: beside every block's table the index into it."""
    index = {f"blocks.{i}.attn.relative_position_index": torch.zeros(17, 17).long() for i in range(3)}
    return {"model": model.state_dict() | index}


def beit_pretrained(model: Backbone) -> dict[str, State]:
    """One table of biases for all blocks, a token for hidden patches, a head that guesses their codes."""
    state = dict(model.state_dict())
    shared = state["blocks.0.attn.relative_position_bias_table"]
    for i in range(3):
        state.pop(f"blocks.{i}.attn.relative_position_bias_table").copy_(shared)
    state |= {"rel_pos_bias.relative_position_bias_table": shared.clone()}
    state |= {"rel_pos_bias.relative_position_index": torch.zeros(17, 17).long(), "mask_token": torch.zeros(1, 1, 48)}
    return {"model": state | {"lm_head.weight": torch.zeros(8192, 48), "lm_head.bias": torch.zeros(8192)}}


def beit2_pretrained(model: Backbone) -> dict[str, State]:
    """And two layers more that only the class token's loss reads."""
    more = {f"cls_pt_layers.{i}.{name}": torch.zeros(48) for i in range(2) for name in ("gamma_1", "norm1.weight")}
    return {"model": beit_pretrained(model)["model"] | more}


# ---- all of them


class Case(NamedTuple):
    row: str
    options: dict[str, Any]
    theirs: Callable[[Backbone], dict[str, Any]]
    names: str
    """what `inspect` says of them"""
    left_out: str = ""
    """what the report says of the rest"""


MASK, HEADS = "the mask token", "projection heads (2 tensors)"
TABLES = "tables that are made anew"
CROPS = "the norm of small crops (2 tensors)"
TINY_CLIP: dict[str, Any] = dict(pre_norm=True, norm_eps=1e-5, act="quick_gelu", num_classes=5)
CASES = {
    "CLIP": Case("vit_debug", TINY_CLIP, clip, "OpenAI's CLIP", "the text tower (8 tensors)"),
    "CLIP, as its archives have it": Case(
        "vit_debug", TINY_CLIP, clip_with_sizes, "OpenAI's CLIP", "the text tower (8 tensors), sizes (3 tensors)"
    ),
    "DINO": Case("vit_debug", dict(num_classes=0), lambda model: dict(model.state_dict()), "timm"),
    "DINO, in training": Case(
        "vit_debug", dict(num_classes=0), dino_training, "DINO", "the projection head (2 tensors)"
    ),
    "DINOv2": Case("vit_small_patch14_dinov2", SMALL, dinov2, "Meta's DINOv2", MASK),
    "DINOv2 with registers": Case("vit_small_patch14_reg4_dinov2", SMALL, dinov2, "Meta's DINOv2", MASK),
    "DINOv2, giant": Case("vit_giant_patch14_reg4_dinov2", SMALL, dinov2, "Meta's DINOv2", MASK),
    "DINOv2, a teacher": Case(
        "vit_small_patch14_reg4_dinov2", SMALL, teacher(dinov2), "Meta's DINOv2", f"{MASK}, {HEADS}"
    ),
    "DINOv3": Case(
        "vit_small_patch16_dinov3_qkvb", SMALL, dinov3, "Meta's DINOv3", f"{MASK}, {TABLES} (3 tensors), {CROPS}"
    ),
    "DINOv3, gated": Case(
        "vit_small_plus_patch16_dinov3_qkvb", SMALL, dinov3, "Meta's DINOv3", f"{MASK}, {TABLES} (3 tensors), {CROPS}"
    ),
    "DINOv3, 7B": Case("vit_7b_patch16_dinov3", SMALL, dinov3, "Meta's DINOv3", f"{MASK}, {TABLES}, {CROPS}"),
    "DINOv3, a teacher": Case(
        "vit_small_patch16_dinov3_qkvb", SMALL, teacher(dinov3), "Meta's DINOv3",
        f"{MASK}, {HEADS}, {TABLES} (3 tensors), {CROPS}",
    ),
    "MAE": Case("vit_debug", dict(num_classes=0), mae, "timm"),
    "MAE with its decoder": Case(
        "vit_debug", dict(num_classes=0), mae_with_decoder, "MAE", f"the decoder (5 tensors), {MASK}"
    ),
    "BEiT": Case("beit_debug", {}, beit, "Microsoft's BEiT", f"{TABLES} (3 tensors)"),
    "BEiT, pretrained": Case(
        "beit_debug", dict(num_classes=0, global_pool="token"), beit_pretrained, "Microsoft's BEiT",
        f"{MASK}, {TABLES}, the head that guesses tokens (2 tensors)",
    ),
    "BEiT v2, pretrained": Case(
        "beit_debug", dict(num_classes=0, global_pool="token"), beit2_pretrained, "Microsoft's BEiT",
        f"{MASK}, {TABLES}, the head that guesses tokens (2 tensors), layers for the class token alone (4 tensors)",
    ),
}  # fmt: skip


@pytest.mark.parametrize("what", CASES)
@torch.no_grad()
def test_a_file_of_the_authors_answers_as_the_network_it_was_made_of(
    what: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    case = CASES[what]
    model, fresh = (build_model(case.row, **case.options).eval() for _ in range(2))
    randomise(model)
    torch.save(case.theirs(model), tmp_path / "theirs.pth")
    with caplog.at_level(logging.INFO, "vitrail"):
        report = load_weights(fresh, tmp_path / "theirs.pth")
    assert report.taken == len(model.state_dict()) and report.resized == []
    x = torch.randn(2, 3, *model.preprocess.img_size)
    assert torch.equal(fresh(x), model(x))
    for mine, other in zip(fresh.features(x).maps, model.features(x).maps, strict=True):
        assert torch.equal(mine, other)
    assert f"names: {case.names}'s" in inspect(tmp_path / "theirs.pth")
    told = f"not used: {case.left_out}"
    assert told in caplog.messages[-1].split("; ") if case.left_out else "not used" not in caplog.text
    assert report.lines()[-1] == told or not case.left_out


@torch.no_grad()
def test_an_archive_of_openais_clip_answers_as_the_network_it_was_made_of(shop: Any):
    """In half precision, as it was published."""
    model = build_model("vit_debug", **TINY_CLIP).eval()
    randomise(model)
    for value in model.parameters():
        value.copy_(value.half().float())
    state = {name: v.half() if v.is_floating_point() else v for name, v in clip_with_sizes(model).items()}
    path = shop.torchscript(state, "ViT-B-32.pt")
    found = read_checkpoint(path)
    assert found.kind == "torchscript" and found.tensors.keys() == state.keys()
    assert all(
        torch.equal(value, state[name]) and value.dtype == state[name].dtype for name, value in found.tensors.items()
    )
    fresh = build_model("vit_debug", **TINY_CLIP).eval()
    report = load_weights(fresh, path)
    x = torch.randn(2, 3, 32, 32)
    assert torch.equal(fresh(x), model(x))
    assert report.lines()[-1] == "not used: the text tower (8 tensors), sizes (3 tensors)"


def test_the_positions_of_dinov2_are_the_518_pixels_of_its_training():
    model = build_model("vit_small_patch14_reg4_dinov2", **SMALL)
    assert dinov2(model)["pos_embed"].shape == (1, 1 + 37 * 37, 24)


@torch.no_grad()
def test_positions_are_resized_as_those_of_our_own_folder(tmp_path: Path):
    model = build_model("vit_small_patch14_dinov2", **SMALL).eval()
    randomise(model)
    model.save_pretrained(tmp_path / "ours")
    torch.save(dinov2(model), tmp_path / "theirs.pth")
    small = [build_model("vit_small_patch14_dinov2", img_size=56, **SMALL).eval() for _ in range(2)]
    for network, file in zip(small, ("ours", "theirs.pth"), strict=True):
        assert load_weights(network, tmp_path / file).resized == ["pos_embed (1, 1370, 24) -> (1, 17, 24)"]
    x = torch.randn(1, 3, 56, 56)
    assert torch.equal(small[0](x), small[1](x))


def test_a_student_is_loaded_where_it_is_asked_for(tmp_path: Path):
    model = build_model("vit_debug", num_classes=0)
    torch.save(dino_training(model), tmp_path / "dino.pth")
    student = build_model("vit_debug", num_classes=0)
    load_weights(student, tmp_path / "dino.pth", part="student")
    assert torch.equal(student.norm.bias, model.norm.bias + 1)


def test_a_shared_table_stands_in_every_block_and_each_learns_its_own(tmp_path: Path):
    model, fresh = (build_model("beit_debug", num_classes=0, global_pool="token") for _ in range(2))
    randomise(model)
    torch.save(beit_pretrained(model), tmp_path / "beit.pth")
    load_weights(fresh, tmp_path / "beit.pth")
    tables = [block.attn.relative_position_bias_table for block in fresh.blocks]
    assert all(torch.equal(table, tables[0]) for table in tables)
    assert len({table.data_ptr() for table in tables}) == 3


def test_a_file_with_nothing_to_leave_out_is_told_without(tmp_path: Path):
    model = build_model("vit_debug")
    torch.save(model.state_dict(), tmp_path / "m.pth")
    assert load_weights(build_model("vit_debug"), tmp_path / "m.pth").lines() == ["44 tensors"]


# ---- which row: no shape shows the activation


def shapes_of(row: str) -> State:
    with torch.device("meta"):
        return dict(build_model(row).state_dict())


@pytest.mark.parametrize("row", ["vit_base_patch32_clip_{}224", "vit_large_patch14_clip_{}336"])
def test_openais_archives_are_of_the_rows_with_their_activation(row: str, monkeypatch: pytest.MonkeyPatch):
    plain, quick = row.format(""), row.format("quickgelu_")
    state = shapes_of(quick)
    assert fitting_rows(state)[:2] == [plain, quick] and fitting_rows(state, "quickgelu")[0] == quick
    assert row_of(File("", state, "", 0, Sidecar(), None, {}, favoured="quickgelu")) == quick
    monkeypatch.setattr(doctor, "not_finite", lambda _: [])  # these tensors have shapes, and no numbers
    for theirs, expected in ((clip, plain), (clip_with_sizes, quick)):
        with torch.device("meta"):
            held = Checkpoint(Path("ViT.pt"), "torchscript", theirs(build_model(quick)))
        monkeypatch.setattr(doctor, "read_checkpoint", lambda *_, held=held: held)
        told = next(line for line in inspect("ViT.pt") if line.startswith("network"))
        assert told.startswith(f"network: {expected},") and (plain in told) == (expected == plain)


def test_a_file_says_which_row_it_favours(tmp_path: Path):
    model = build_model("vit_debug", **TINY_CLIP)
    for theirs, favoured in ((clip, ""), (clip_with_sizes, "quickgelu")):
        torch.save(theirs(model), tmp_path / "clip.pth")
        assert read_file(tmp_path / "clip.pth").favoured == favoured


@torch.no_grad()
def test_openais_archive_is_of_no_network_with_another_activation(tmp_path: Path):
    model = build_model("vit_debug", **TINY_CLIP)
    torch.save(clip_with_sizes(model), tmp_path / "clip.pth")
    with pytest.raises(CheckpointError, match="this one has act='gelu', not 'quick_gelu': build it so, or use create_"):
        load_weights(build_model("vit_debug", **TINY_CLIP | {"act": "gelu"}), tmp_path / "clip.pth")
    assert load_weights(build_model("vit_debug", **TINY_CLIP), tmp_path / "clip.pth").taken
    assert read_file(tmp_path / "clip.pth").beside.fields == {"act": "quick_gelu"}


def test_openais_four_files_are_known_by_name_with_their_sums():
    found = [source for source in SOURCES.values() if "openaipublic" in source.place]
    assert {source.file: (source.row, source.classes, source.preprocess.img_size) for source in found} == {
        "ViT-B-32.pt": ("vit_base_patch32_clip_quickgelu_224", 512, (224, 224)),
        "ViT-B-16.pt": ("vit_base_patch16_clip_quickgelu_224", 512, (224, 224)),
        "ViT-L-14.pt": ("vit_large_patch14_clip_quickgelu_224", 768, (224, 224)),
        "ViT-L-14-336px.pt": ("vit_large_patch14_clip_quickgelu_336", 768, (336, 336)),
    }
    assert all(re.search(r"/[0-9a-f]{64}/ViT-", source.place) for source in found)
    assert all(shapes_of(source.row)["head.weight"].shape[0] == source.classes for source in found)
    assert {source.preprocess.crop_pct for source in found} == {1.0}
