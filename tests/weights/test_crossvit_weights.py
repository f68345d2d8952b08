"""Weights of CrossViT: the authors' files and timm's, and folders whose config says more layers than they hold."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from vitrail.folder import FolderError
from vitrail.models.crossvit import VARIANTS
from vitrail.models.registry import build_model
from vitrail.weights.layouts import layout_of, ours
from vitrail.weights.load import load_model, load_weights
from vitrail.weights.published import PUBLISHED


def authors_names(name: str) -> str:
    """As in the state of a module that keeps class tokens and positions in lists."""
    return name.replace("cls_token_", "cls_token.").replace("pos_embed_", "pos_embed.")


def test_a_file_of_the_authors_fits(tmp_path: Path) -> None:
    model, other = build_model("crossvit_debug"), build_model("crossvit_debug")
    theirs = {authors_names(name): value for name, value in model.state_dict().items()}
    assert "cls_token.1" in theirs
    torch.save(theirs, tmp_path / "crossvit.pth")
    load_weights(other, tmp_path / "crossvit.pth")
    assert all(torch.equal(value, other.state_dict()[name]) for name, value in model.state_dict().items())


def test_names_go_both_ways_and_timms_are_ours() -> None:
    state = build_model("crossvit_debug").state_dict()
    keymap = layout_of({authors_names(name): value for name, value in state.items()})
    assert keymap is not None and (keymap.source, keymap.family) == ("authors", "crossvit")
    assert keymap.to_theirs(state).keys() == {authors_names(name) for name in state}
    assert ours(state)[1] == "timm"


def test_positions_of_both_branches_are_resized(tmp_path: Path) -> None:
    model, larger = build_model("crossvit_debug").eval(), build_model("crossvit_debug", img_size=64).eval()
    torch.save(model.state_dict(), tmp_path / "crossvit.pth")
    load_weights(larger, tmp_path / "crossvit.pth")
    x = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        torch.testing.assert_close(larger(x), model(x))


def test_every_published_row_has_its_weights_by_name() -> None:
    sizes = {one.row: one.preprocess.img_size for one in PUBLISHED if one.row.startswith("crossvit")}
    assert sizes == {row: config.img_size for row, config in VARIANTS.items() if row.endswith(("_240", "_408"))}


def test_a_thousand_layers_of_one_branch_are_not_built(tmp_path: Path) -> None:
    folder = build_model("crossvit_debug").save_pretrained(tmp_path / "model")
    card = json.loads((folder / "config.json").read_text())
    card["config"]["depth"] = [[1, 999], [1, 2]]
    (folder / "config.json").write_text(json.dumps(card))
    (folder / "manifest.json").unlink(missing_ok=True)
    with pytest.raises(FolderError, match="a config of 1,003 layers needs a tensor for each"):
        load_model(folder)


def test_a_folder_is_the_model_that_was_saved(tmp_path: Path) -> None:
    model = build_model("crossvit_debug").eval()
    again = load_model(model.save_pretrained(tmp_path / "model"))
    x = torch.randn(1, 3, 32, 32)
    with torch.no_grad():
        assert torch.equal(again(x), model(x))
    assert again.config == model.config
