"""Names and folders become networks; whatever does not fit is refused by name, and nothing is left half-done."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from vitrail import folder
from vitrail.folder import FolderError, read_weights, write_folder
from vitrail.models.backbone import Backbone
from vitrail.models.registry import build_model
from vitrail.records import Preprocess
from vitrail.weights import own
from vitrail.weights.load import SHIPPED, Shipped, create_model, load_model


@pytest.fixture(scope="module")
def made() -> Backbone:
    torch.manual_seed(0)
    model = build_model("vit_debug", num_classes=3, depth=2)
    model.classes, model.images = ("red", "white", "platelet"), "blood cells"
    model.preprocess = Preprocess(img_size=(32, 32), mean=(0.1, 0.2, 0.3), std=(0.4, 0.5, 0.6), crop_mode="squash")
    return model.eval()


@pytest.fixture
def saved(made: Backbone, tmp_path: Path) -> Path:
    return made.save_pretrained(tmp_path / "cells", accuracy=0.9)


@pytest.fixture
def shipped(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(SHIPPED, "cells", Shipped(saved, "three kinds of cells"))


def images() -> torch.Tensor:
    return torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))


def rewrite(path: Path, **changes: Any) -> None:
    values = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps(values | changes))
    (path / "manifest.json").write_text(folder._manifest(path))


# ---- folders


@torch.no_grad()
def test_a_saved_model_answers_the_same(made: Backbone, saved: Path):
    model = load_model(saved)
    assert torch.equal(model(images()), made(images()))
    assert not any(part.training for part in model.modules())
    for name in ("config", "preprocess", "classes", "images", "variant"):
        assert getattr(model, name) == getattr(made, name), name
    assert all(p.requires_grad and p.dtype == torch.float32 for p in model.parameters())


def test_a_run_folder_is_loaded_by_its_name(made: Backbone, tmp_path: Path):
    made.save_pretrained(tmp_path / "runs" / "demo" / "model")
    assert load_model(str(tmp_path / "runs" / "demo")).classes == made.classes


@torch.no_grad()
def test_half_precision_files_become_fp32(made: Backbone, tmp_path: Path):
    path = write_folder(tmp_path / "half", made.state_dict(), made.card(), dtype=torch.float16)
    model = load_model(path)
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert torch.allclose(model(images()), made(images()), atol=1e-2)


@torch.no_grad()
def test_a_derived_buffer_is_filled(tmp_path: Path):
    made = build_model("vit_debug", pos_embed="sincos", depth=1).eval()
    before = torch.get_rng_state()
    model = load_model(made.save_pretrained(tmp_path / "sincos"))
    assert torch.equal(model(images()), made(images()))
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.fault(9, 10)
def test_weights_must_fit(made: Backbone, tmp_path: Path):
    state = made.state_dict()
    kept = {k: v for k, v in state.items() if not k.startswith("blocks.1.")} | {
        f"mine.{i}": torch.zeros(1) for i in range(12)
    }
    path = write_folder(tmp_path / "m", kept, made.card())
    with pytest.raises(
        FolderError, match=r"missing: blocks\.1\.norm1\.weight, .* and 2 more; extra: mine\.0, .* and 2 more"
    ):
        load_model(path)
    path = write_folder(tmp_path / "n", state | {"head.weight": torch.zeros(4, 48)}, made.card())
    with pytest.raises(FolderError, match=r"wrong shape: head\.weight \(4, 48\) for \(3, 48\)"):
        load_model(path)
    path = write_folder(tmp_path / "o", state | {"head.bias": torch.zeros(3).long()}, made.card())
    with pytest.raises(FolderError, match=r"wrong type: head\.bias torch\.int64"):
        load_model(path)


@pytest.mark.parametrize(("changes", "message"), [
    ({"family": "bert"}, "family must be one of vit.*got 'bert'"),
    ({"config": {"depht": 3}}, "its config makes no vit: .*'depht'"),
    ({"config": {"depth": "three"}}, "its config makes no vit"),
    ({"config": {"embed_dim": -4}}, "embed_dim must be at least 1; got -4"),
    ({"config": {"patch_size": 0}}, "its config makes no vit"),
    ({"config": {"num_heads": 7}}, "its config makes no vit"),
    ({"config": {}}, "weights must fit the network exactly"),
    ({"config": {"embed_dim": 900_000, "num_heads": 1, "depth": 1}}, "weights must fit the network exactly"),
    ({"classes": ["a", "b"]}, "classes must name all 3 logits; config.json has 2 names"),
    ({"preprocess": {"mean": [0.5], "std": [0.5]}}, "must describe 3 channels.*config.json has 1"),
])  # fmt: skip
def test_a_card_that_describes_another_network_is_refused(saved: Path, changes: dict[str, Any], message: str):
    rewrite(saved, **changes)
    with pytest.raises(FolderError, match=message):
        load_model(saved)


def test_a_million_layers_are_not_built(saved: Path, monkeypatch: pytest.MonkeyPatch):
    def built(*_: object, **__: object) -> None:
        raise AssertionError("a network was built")

    monkeypatch.setattr(own, "build_from_config", built)
    card = json.loads((saved / "config.json").read_text())
    rewrite(saved, config=card["config"] | {"depth": 999})
    with pytest.raises(FolderError, match="a config of 999 layers needs a tensor for each; the weights hold 32"):
        load_model(saved)
    rewrite(saved, family="resnet", config={"depths": [900] * 500})
    with pytest.raises(FolderError, match="a config of 450,000 layers"):
        load_model(saved)
    monkeypatch.undo()
    rewrite(saved, family="vit", config=card["config"] | {"depth": 10**6})
    with pytest.raises(FolderError, match=r"config\.depth must lie within ±1,000; got 1000000"):
        load_model(saved)


def test_derived_buffers_get_no_more_memory_than_the_weights_let_expect(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    made = build_model("vit_debug", pos_embed="sincos", depth=1, patch_size=1)
    saved = made.save_pretrained(tmp_path / "sincos")
    card = json.loads((saved / "config.json").read_text())
    huge = {
        "config": card["config"] | {"img_size": [16384, 16384]},
        "preprocess": card["preprocess"] | {"img_size": [16384, 16384]},
    }
    rewrite(saved, **huge)
    with pytest.raises(FolderError, match=r"asks for 51,[\d,]+ bytes beside the weights; at most 64,[\d,]+ are given"):
        load_model(saved)
    rewrite(saved, config=card["config"], preprocess=card["preprocess"])

    def none_left(*_: object, **__: object) -> None:
        raise RuntimeError("can't allocate memory")

    monkeypatch.setattr(type(made), "to_empty", none_left)
    with pytest.raises(FolderError, match="no memory could be had for its network: can't allocate"):
        load_model(saved)


@pytest.mark.parametrize(("size", "fits"), [([32, 64], True), ([128, 8], True), ([32, 136], False), ([7, 32], False)])
def test_images_are_prepared_for_a_size_near_the_networks(saved: Path, size: list[int], fits: bool):
    card = json.loads((saved / "config.json").read_text())
    rewrite(saved, preprocess=card["preprocess"] | {"img_size": size})
    if fits:
        assert load_model(saved).preprocess.img_size == tuple(size)
        return
    with pytest.raises(FolderError, match=r"img_size must be within 4 times the network's img_size \(32, 32\)"):
        load_model(saved)


@pytest.mark.fault(6)
def test_damaged_weights_are_refused(saved: Path):
    data = bytearray((saved / "model.safetensors").read_bytes())
    data[-1] ^= 1
    (saved / "model.safetensors").write_bytes(data)
    with pytest.raises(FolderError, match=r"cells/model\.safetensors: damaged"):
        load_model(saved)


@pytest.mark.usefixtures("shipped")
def test_what_is_no_model_says_what_there_is(saved: Path):
    with pytest.raises(
        FolderError, match=r"celsl does not exist.*nearest beside it is .*cells; by name there is bloodcells, cells"
    ):
        load_model(saved.parent / "celsl")
    for name in ("vit_tiny", "vit_base_patch16_224"):
        with pytest.raises(
            FolderError, match=rf"{name} is an architecture without weights.*create_model\('{name}'\).*cells"
        ):
            load_model(name)


# ---- names


def test_a_short_name_says_which_row_it_became(caplog: pytest.LogCaptureFixture):
    caplog.set_level("INFO", logger="vitrail")
    create_model("vit_tiny", img_size=36, depth=1)
    assert caplog.messages == ["vit_tiny is vit_tiny_patch4_32, for images of 36 pixels"]
    create_model("vit_debug")
    assert len(caplog.messages) == 1


def test_timms_input_size_is_channels_height_width():
    config = create_model("vit_debug", input_size=(1, 32, 40), depth=1).config
    assert (config.in_chans, config.img_size) == (1, (32, 40))


def test_a_name_builds_fresh_weights():
    model = create_model("vit_tiny", image_size=32, n_classes=7, depth=1)
    assert model.variant == "vit_tiny_patch4_32" and model.config.num_classes == 7 and model.training


@pytest.mark.usefixtures("shipped")
def test_a_shipped_model_by_its_name(made: Backbone):
    with torch.no_grad():
        assert torch.equal(load_model("cells")(images()), made(images()))
    model = create_model("cells", pretrained=True)
    assert model.training and model.classes == made.classes
    with pytest.raises(ValueError, match=r"use create_model\('cells', pretrained=True\)"):
        create_model("cells")


@pytest.mark.usefixtures("shipped")
def test_known_weights_with_another_head(made: Backbone):
    model = create_model("cells", pretrained=True, num_labels=8, drop_path=0.2)
    assert model.config.num_classes == 8 and model.config.drop_path_rate == 0.2 and model.classes == ()
    assert model.head.weight.shape == (8, 48)
    assert torch.equal(model.blocks[1].mlp.fc1.weight, made.blocks[1].mlp.fc1.weight)
    assert create_model("cells", pretrained=True, num_classes=3).classes == made.classes
    with pytest.raises(FolderError, match=r"missing: blocks\.2\.norm1\.weight"):
        create_model("cells", pretrained=True, depth=3)
    with pytest.raises(TypeError, match="nearest is depth"):
        create_model("cells", pretrained=True, depht=3)


@pytest.mark.usefixtures("shipped")
def test_known_weights_at_another_size_prepare_for_it(made: Backbone, monkeypatch: pytest.MonkeyPatch):
    resnet = build_model("resnet_debug", num_classes=3)
    path = resnet.save_pretrained(SHIPPED["cells"].folder.parent / "resnet")
    monkeypatch.setitem(SHIPPED, "resnet", Shipped(path, ""))
    model = create_model("resnet", pretrained=True, img_size=48)
    assert (model.config.img_size, model.preprocess.img_size) == ((48, 48), (48, 48))


@pytest.mark.fault(11)
@pytest.mark.parametrize("options", [
    {}, {"reg_tokens": 2}, {"no_embed_class": True}, {"class_token": False, "global_pool": "avg"},
])  # fmt: skip
@pytest.mark.parametrize("size", [(48, 48), (16, 64)])
@torch.no_grad()
def test_learned_positions_are_interpolated_to_another_size(
    options: dict[str, Any], size: tuple[int, int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """They are what the same network makes of them at run time; everything else stays."""
    saved = build_model("vit_debug", depth=1, **options).eval()
    monkeypatch.setitem(SHIPPED, "cells", Shipped(saved.save_pretrained(tmp_path / "m"), ""))
    model = create_model("cells", pretrained=True, img_size=size).eval()
    pictures = torch.randn(2, 3, *size)
    assert torch.allclose(model(pictures), saved(pictures), atol=1e-5)
    assert (model.config.img_size, model.preprocess.img_size) == (size, size)


@pytest.mark.fault(11)
@pytest.mark.usefixtures("shipped")
def test_learned_positions_stay_at_their_own_size(made: Backbone):
    same = create_model("cells", pretrained=True, img_size=32, drop_path=0.1)
    assert torch.equal(same.pos_embed, made.pos_embed)
    assert not torch.equal(create_model("cells", pretrained=True, img_size=40).pos_embed[:, :17], made.pos_embed)


@pytest.mark.usefixtures("shipped")
def test_another_size_reads_the_files_once_and_refuses_the_rest(monkeypatch: pytest.MonkeyPatch):
    read: list[Path] = []
    monkeypatch.setattr(own, "read_weights", lambda path: read.append(path) or read_weights(path))
    create_model("cells", pretrained=True, img_size=64, num_classes=2)
    assert len(read) == 1
    with pytest.raises(FolderError, match=r"wrong shape: cls_token \(1, 1, 48\) for \(1, 1, 24\)"):
        create_model("cells", pretrained=True, img_size=64, embed_dim=24)
    with pytest.raises(FolderError, match="img_size 60 is not divisible by patch_size 8: use 56 or 64"):
        create_model("cells", pretrained=True, img_size=60)


@pytest.mark.usefixtures("shipped")
@pytest.mark.parametrize(("name", "near"), [("vit_nano", ""), ("cels", ", and no such model: the nearest are cells")])
def test_unknown_weights_list_the_known(name: str, near: str):
    with pytest.raises(
        ValueError, match=rf"for '{name}'{near}.*cells \(three kinds of cells\); published are .*load_model\(path\)"
    ):
        create_model(name, pretrained=True)


def test_a_name_wins_over_a_folder_of_that_name(made: Backbone, saved: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(saved.parent)
    monkeypatch.setitem(SHIPPED, "cells", Shipped(saved.parent / "elsewhere", ""))
    made.save_pretrained(saved.parent / "elsewhere", accuracy=1)
    read: list[Path] = []
    monkeypatch.setattr(own, "read_weights", lambda path: read.append(path) or read_weights(path))
    load_model("cells")
    load_model("./cells")
    assert [path.name for path in read] == ["elsewhere", "cells"]


@pytest.mark.parametrize("name", SHIPPED)
def test_every_shipped_model_loads_and_says_what_it_is_for(name: str):
    model = load_model(name)
    assert model.classes and model.images and model.variant
    assert sum(part.stat().st_size for part in SHIPPED[name].folder.iterdir()) < 3_000_000


@pytest.mark.parametrize("name", [None, 3, ["vit_debug"]])
def test_what_is_no_name_is_refused(name: Any):
    with pytest.raises(TypeError, match="takes the name of a model, such as 'vit_tiny'; got"):
        create_model(name)
    with pytest.raises(TypeError, match="by a name or a folder's path; got"):
        load_model(name)


def test_a_file_of_a_model_names_its_folder(saved: Path):
    for name, home in (("config.json", saved), ("checkpoints/last.ckpt", saved)):
        (saved / name).parent.mkdir(exist_ok=True)
        (saved / name).touch()
        with pytest.raises(FolderError, match=f"got the file {saved / name}: name {home}$"):
            load_model(saved / name)


@pytest.mark.fault(11)
@pytest.mark.parametrize("size", [(48, 48), (16, 64)])
def test_positions_of_another_size_are_timms(size: tuple[int, int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    from timm.layers import resample_abs_pos_embed

    saved = build_model("vit_debug", depth=1)
    monkeypatch.setitem(SHIPPED, "cells", Shipped(saved.save_pretrained(tmp_path / "m"), ""))
    found = create_model("cells", pretrained=True, img_size=size).pos_embed
    theirs = resample_abs_pos_embed(saved.pos_embed, [size[0] // 8, size[1] // 8], num_prefix_tokens=1)
    assert torch.allclose(found, theirs, atol=1e-6)
