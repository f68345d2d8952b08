"""What a checkpoint is told to be, in at most twenty lines."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from vitrail.cli import main
from vitrail.models.registry import build_model
from vitrail.train.finetune import prompted
from vitrail.weights.doctor import MOST_LINES, fitting_rows, inspect, likeness
from vitrail.weights.keymaps.vit import TORCHVISION, TRANSFORMERS
from vitrail.weights.load import create_model, load_weights
from vitrail.weights.read import CheckpointError


@pytest.fixture
def file(tmp_path: Path) -> Path:
    """As a training script leaves it: wrapped twice, with an optimiser beside it."""
    state = {f"module.{name}": value for name, value in build_model("vit_tiny_patch4_32").state_dict().items()}
    torch.save({"state_dict": state, "optimizer": {"lr": 0.1}, "epoch": 3}, tmp_path / "run.pth")
    return tmp_path / "run.pth"


def test_a_file_is_told_with_its_wrappers_network_and_classes(file: Path):
    told = inspect(file)
    assert told[0] == f"{file}: torch, 80 tensors, 10.8 MB, float32"
    assert told[1:] == [
        "taken out of: state_dict > module.",
        "beside the weights: optimizer, epoch",
        "names: timm's",
        "network: vit_tiny_patch4_32, a vit",
        "classes: 10",
    ]


@pytest.mark.parametrize("keymap", [TRANSFORMERS, TORCHVISION], ids=lambda keymap: keymap.source)
def test_names_of_others_are_known(keymap, tmp_path: Path):
    state = build_model("vit_tiny_mlp1_patch4_32").state_dict()
    torch.save(keymap.to_theirs(state), tmp_path / "m.pth")
    told = inspect(tmp_path / "m.pth", "vit_tiny_mlp1_patch4_32")
    assert f"names: {keymap.source}'s" in told and "network: vit_tiny_mlp1_patch4_32, a vit" in told
    assert told[-1] == "against vit_tiny_mlp1_patch4_32: fits; names are translated, 0 resized, 80 in all"


def test_a_folder_of_ours_is_known_by_its_card(tmp_path: Path):
    model = prompted(build_model("vit_debug", num_classes=3), "deep_prompts:2")
    assert inspect(model.save_pretrained(tmp_path / "prompted"))[2:4] == [
        "network: vit_debug, a vit, with deep_prompts=2, reg_tokens=2",
        "classes: 3",
    ]
    own = build_model("vit_debug", num_classes=0, depth=3, embed_dim=24)
    own.variant = ""
    assert inspect(own.save_pretrained(tmp_path / "own"))[2:4] == [
        "network: a vit of its own, as its config.json says",
        "classes: no head",
    ]


def test_rows_of_one_body_are_told_apart_by_their_positions(tmp_path: Path):
    for size, row in ((224, "vit_tiny_patch16_224"), (384, "vit_tiny_patch16_384")):
        with torch.device("meta"):
            state = build_model(row).state_dict()
        assert fitting_rows(state)[0] == row, size
    with torch.device("meta"):
        odd = build_model("vit_tiny_patch16_224", img_size=160).state_dict()
    assert fitting_rows(odd)[0] == "vit_tiny_patch16_224"


@pytest.mark.parametrize(("row", "kernels"), [
    ("vit_tiny_patch16_224", {"patch_size": 8}),
    ("pvt_v2_b1", {"patch_size": 5}),
])  # fmt: skip
def test_kernels_of_another_size_are_another_network_and_of_other_channels_the_same(row: str, kernels):
    with torch.device("meta"):
        other, grey = build_model(row, **kernels).state_dict(), build_model(row, in_chans=1).state_dict()
    assert fitting_rows(other) == []
    assert fitting_rows(grey)[0] == row


def test_rows_of_equal_blocks_are_told_apart_by_their_patches():
    for row in ("vit_base_patch16_224", "vit_base_patch32_224"):
        with torch.device("meta"):
            state = build_model(row).state_dict()
        near = [like.row for like in likeness(state) if like.share == 1]
        assert near[0] == row and all(row[8:16] in name for name in near)


def test_what_a_key_map_leaves_out_is_told(tmp_path: Path):
    state = {f"backbone.{name}": value for name, value in build_model("vit_debug", num_classes=0).state_dict().items()}
    torch.save(state | {"head.last_layer.weight_v": torch.zeros(2, 2)}, tmp_path / "dino.pth")
    assert "of no use here: the projection head (1): head.last_layer.weight_v" in inspect(tmp_path / "dino.pth")
    assert not any("of no use" in line for line in _told_of_plain(tmp_path))


def _told_of_plain(folder: Path) -> list[str]:
    torch.save(build_model("vit_debug").state_dict(), folder / "plain.pth")
    return inspect(folder / "plain.pth")


def test_another_network_is_told_what_is_missing_and_which_it_would_be(file: Path):
    told = inspect(file, "vit_small_patch4_32")
    assert len(told) <= MOST_LINES
    against = next(i for i, line in enumerate(told) if line.startswith("against vit_small_patch4_32: does not fit"))
    assert told[against + 1].startswith("missing (12): blocks.6.norm1.weight")
    assert told[against + 2].startswith("wrong shape (79): cls_token (1, 1, 192) for (1, 1, 256)")
    assert told[-1] == "it fits vit_tiny_patch4_32"


def test_a_head_that_alone_does_not_fit_is_told(file: Path):
    told = inspect(file, build_model("vit_tiny_patch4_32", num_classes=3))
    assert "wrong shape (2): head.weight (10, 192) for (3, 192), head.bias (10,) for (3,)" in told
    assert told[-1].startswith("its head alone does not fit: load_weights(model, path, new_head=True) leaves")


def test_what_can_be_resized_is_no_fault_beside_a_head_or_a_block_that_does_not_fit(file: Path):
    told = inspect(file, build_model("vit_tiny_patch4_32", num_classes=3, img_size=64, patch_size=8))
    assert "wrong shape (2): head.weight (10, 192) for (3, 192), head.bias (10,) for (3,)" in told
    assert any(line.startswith("its head alone does not fit") for line in told)
    told = inspect(file, build_model("vit_tiny_patch4_32", depth=7, img_size=64))
    assert not any("pos_embed" in line or "its head alone" in line for line in told)


def test_a_file_without_a_head_fits_but_for_it(tmp_path: Path):
    state = {name: v for name, v in build_model("vit_debug").state_dict().items() if not name.startswith("head")}
    torch.save(state, tmp_path / "m.pth")
    told = inspect(tmp_path / "m.pth", build_model("vit_debug", img_size=64))
    assert any(line.startswith("its head alone does not fit") for line in told)


def test_channels_that_nobody_named_are_a_fault_and_positions_beside_them_are_none(file: Path):
    told = inspect(file, build_model("vit_tiny_patch4_32", in_chans=5, img_size=64))
    assert "wrong shape (1): patch_embed.proj.weight (192, 3, 4, 4) for (192, 5, 4, 4)" in told


def test_what_would_be_resized_is_told(file: Path):
    told = inspect(file, build_model("vit_tiny_patch4_32", img_size=64))
    assert told[-2:] == [
        "against vit_tiny_patch4_32: fits; 1 resized, 80 in all",
        "resized: pos_embed (1, 65, 192) -> (1, 257, 192)",
    ]


def test_somebody_elses_network_is_not_made_one_of_ours(tmp_path: Path):
    torch.save(nn.Sequential(nn.Linear(192, 3), nn.LayerNorm(192)).state_dict(), tmp_path / "m.pth")
    assert inspect(tmp_path / "m.pth")[-1] == "network: none that is known here; names begin with 0, 1"
    with torch.device("meta"):
        deep = build_model("vit_tiny_patch4_32", depth=7).state_dict()
    torch.save({name: torch.zeros(value.shape) for name, value in deep.items()}, tmp_path / "deep.pth")
    assert inspect(tmp_path / "deep.pth")[-1] == (
        "network: not one that is known here; the nearest is vit_tiny_patch4_32 (87% of its tensors)"
    )


@pytest.mark.parametrize(
    ("changes", "makes"),
    [
        ({"hidden_act": "relu"}, True),
        ({"hidden_act": "hard_mish"}, False),
        ({"num_attention_heads": 5}, False),
        ({"num_hidden_layers": 400}, False),
        ({"num_hidden_layers": 4}, False),
        ({"hidden_size": 64}, False),
    ],
)
def test_a_network_that_its_config_says_is_told_how_to_have(changes: dict[str, Any], makes: bool, tmp_path: Path):
    """Only where these are weights of it: create_model would refuse any other."""
    state = TRANSFORMERS.to_theirs(build_model("vit_debug", embed_dim=24, num_heads=2).state_dict())
    save_file({name: tensor.contiguous() for name, tensor in state.items()}, tmp_path / "model.safetensors")
    said = dict(model_type="vit", hidden_size=24, num_hidden_layers=3, num_attention_heads=2, intermediate_size=96)
    said |= dict(image_size=32, patch_size=8, id2label={str(number): f"c{number}" for number in range(10)}) | changes
    (tmp_path / "config.json").write_text(json.dumps(said), encoding="utf-8")
    told = next(line for line in inspect(tmp_path) if line.startswith("beside it: vit"))
    where = tmp_path / "model.safetensors"
    size = ", of 32 x 32 pixels and 10 classes"
    way = f"{size}, which create_model('local-dir:{where}', pretrained=True) makes" if makes else ""
    assert told == f"beside it: vit{way}"
    if makes:
        assert create_model(f"local-dir:{where}", pretrained=True).config.act == "relu"
        return
    with pytest.raises(CheckpointError):
        create_model(f"local-dir:{where}", pretrained=True)


def test_the_command_prints_it(file: Path, capsys: pytest.CaptureFixture[str]):
    assert main(["inspect", str(file), "--model", "vit_tiny_patch4_32"]) == 0
    assert capsys.readouterr().out.splitlines() == inspect(file, "vit_tiny_patch4_32")
    assert main(["inspect", str(file.parent / "absent.pth")]) == 2
    assert "there is no such file" in capsys.readouterr().err


def test_numbers_of_eight_bits_are_told_and_not_loaded(tmp_path: Path):
    """torch adds up none of them."""
    state = {name: value.to(torch.float8_e4m3fn) for name, value in build_model("vit_debug").state_dict().items()}
    torch.save(state, tmp_path / "m.pth")
    assert "float8_e4m3fn" in inspect(tmp_path / "m.pth")[0]
    with pytest.raises(CheckpointError, match="wrong type: cls_token torch.float8_e4m3fn"):
        load_weights(build_model("vit_debug"), tmp_path / "m.pth")
