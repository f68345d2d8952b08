"""Tables of names, read in both directions; pieces that are missing or do not go together are named."""

from __future__ import annotations

import itertools

import pytest
import torch

from vitrail.weights.keymap import KeyMap, Row, _fill, _match
from vitrail.weights.keymaps.vit import DINO
from vitrail.weights.layouts import KEYMAPS

LAYER = "net.layers.{i}"
MAP = KeyMap(
    source="somebody",
    family="vit",
    rows=(
        Row("[net.]token", "cls_token"),
        Row(f"{LAYER}.q.{{w}}", "blocks.{i}.attn.qkv.{w}", (0, 3)),
        Row(f"{LAYER}.k.{{w}}", "blocks.{i}.attn.qkv.{w}", (1, 3)),
        Row(f"{LAYER}.v.{{w}}", "blocks.{i}.attn.qkv.{w}", (2, 3)),
        Row("net.twice.{i*2+1}.{w}", "blocks.{i}.norm1.{w}"),
        Row("net.head.{w}", "head.{w}", form="matrix"),
    ),
    marks=("[net.]token", f"{LAYER}.q.weight"),
    drop={"masks": ("net.mask.{w}",)},
)


@pytest.mark.parametrize(("template", "name", "holes"), [
    ("a.{i}.{w}", "a.12.b.c", {"i": 12, "w": "b.c"}),
    ("a.{i}.{w}", "a.x.b", None),
    ("a.{i}", "a.1.b", None),
    ("a.{i*2+1}", "a.7", {"i": 3}),
    ("a.{i*2+1}", "a.6", None),
    ("a.{i-1}", "a.0", {"i": 1}),
    ("a.{i+1}", "a.0", None),
    ("a.{i}.b.{j}", "a.1.b.2", {"i": 1, "j": 2}),
    ("a.{i}.b.{i}", "a.1.b.1", {"i": 1}),
    ("a.{i}.b.{i}", "a.1.b.2", None),
    ("[vit.]a", "vit.a", {}),
    ("[vit.]a", "a", {}),
    ("[vit.]a", "vitxa", None),
    ("a.b", "axb", None),
    ("a", "a\n", None),
])  # fmt: skip
def test_a_template_matches_whole_names(template: str, name: str, holes: dict[str, object] | None):
    assert _match(template, name) == holes


def test_what_a_template_matches_it_writes_again():
    for template, name in (("[vit.]a.{i*2+1}.{w}", "vit.a.7.weight"), ("{w}", "any.[thing]"), ("x{i-1}", "x4")):
        assert _fill(template, _match(template, name)) == name


def test_names_go_both_ways():
    ours = {
        "cls_token": torch.randn(1, 1, 4),
        "blocks.0.attn.qkv.weight": torch.randn(12, 4),
        "blocks.1.attn.qkv.bias": torch.randn(12),
        "blocks.2.norm1.weight": torch.randn(4),
        "head.weight": torch.randn(3, 4),
        "something.else": torch.randn(2),
    }
    theirs = MAP.to_theirs(ours)
    assert set(theirs) == {
        "net.token", "net.layers.0.q.weight", "net.layers.0.k.weight", "net.layers.0.v.weight", "net.layers.1.q.bias",
        "net.layers.1.k.bias", "net.layers.1.v.bias", "net.twice.5.weight", "net.head.weight", "something.else",
    }  # fmt: skip
    assert torch.equal(theirs["net.layers.0.k.weight"], ours["blocks.0.attn.qkv.weight"][4:8])
    assert theirs["net.head.weight"].shape == (4, 3)
    back = MAP.to_ours(theirs)
    assert set(back) == set(ours) and all(torch.equal(back[name], ours[name]) for name in ours)


def test_the_order_of_pieces_in_a_file_does_not_matter():
    pieces = {f"net.layers.0.{letter}.weight": torch.full((2, 2), float(n)) for n, letter in enumerate("qkv")}
    for order in itertools.permutations(pieces):
        made = MAP.to_ours({name: pieces[name] for name in order})
        assert torch.equal(made["blocks.0.attn.qkv.weight"], torch.cat(list(pieces.values())))


def test_a_missing_piece_is_named_by_the_others():
    pieces = {f"net.layers.3.{letter}.weight": torch.zeros(2, 2) for letter in "qv"}
    assert set(MAP.to_ours(pieces)) == {
        "net.layers.3.q.weight (2 of 3 pieces of blocks.3.attn.qkv.weight)",
        "net.layers.3.v.weight (2 of 3 pieces of blocks.3.attn.qkv.weight)",
    }


def test_a_piece_that_is_there_twice_is_not_chosen_between():
    made = MAP.to_ours({"token": torch.zeros(1), "net.token": torch.ones(1)})
    assert set(made) == {"token (2 of 1 pieces of cls_token)", "net.token (2 of 1 pieces of cls_token)"}


def test_of_two_names_for_one_tensor_the_first_is_written():
    keymap = KeyMap("somebody", "vit", (Row("old.{w}", "norm.{w}"), Row("new.{w}", "norm.{w}")))
    assert set(keymap.to_theirs({"norm.bias": torch.zeros(1)})) == {"old.bias"}
    assert set(keymap.to_ours({"new.bias": torch.zeros(1)})) == {"norm.bias"}


def test_pieces_that_do_not_go_together_are_named():
    shapes = {"q": (2, 2), "k": (2, 3), "v": (2, 2)}
    made = MAP.to_ours({f"net.layers.0.{letter}.weight": torch.zeros(shape) for letter, shape in shapes.items()})
    assert set(made) == {f"net.layers.0.{letter}.weight (no piece of blocks.0.attn.qkv.weight)" for letter in "qkv"}
    assert set(MAP.to_ours({"net.head.bias": torch.zeros(3)})) == {"net.head.bias (no piece of head.bias)"}


def test_what_cannot_be_changed_after_renaming_stays_as_it_is():
    keymap = KeyMap(
        "somebody", "vit", MAP.rows, after=lambda made: {"cls_token": made["cls_token"] + made["pos_embed"]}
    )
    both = {"token": torch.ones(1), "pos_embed": torch.ones(1)}
    assert keymap.to_ours(both)["cls_token"] == 2
    assert set(keymap.to_ours({"token": torch.ones(1)})) == {"cls_token"}
    assert set(keymap.to_ours(both | {"pos_embed": torch.ones(3, 2)} | {"token": torch.ones(4)})) == {
        "cls_token",
        "pos_embed",
    }


def test_what_is_unknown_keeps_its_name_and_what_is_of_no_use_goes():
    assert set(MAP.to_ours({"mine": torch.zeros(1), "net.mask.token": torch.zeros(1)})) == {"mine"}


def test_what_is_of_no_use_is_named_and_what_a_row_takes_is_of_use():
    both = KeyMap("somebody", "vit", MAP.rows, drop={"the net": ("net.{w}",), "doors": ("door.{i}",)})
    assert both.left_out(["net.mask.token", "net.token", "mine"]) == {"the net": ["net.mask.token"]}
    assert both.left_out(["door.1", "net.a", "door.2"]) == {"the net": ["net.a"], "doors": ["door.1", "door.2"]}


def test_of_dinos_heads_its_projection_goes_and_a_classifier_stays():
    theirs = ("backbone.norm.weight", "head.mlp.0.weight", "head.last_layer.weight_g", "head.weight", "head.bias")
    assert set(DINO.to_ours(dict.fromkeys(theirs, torch.zeros(1)))) == {"norm.weight", "head.weight", "head.bias"}


def test_a_layout_is_known_by_all_its_marks():
    assert MAP.knows(["token", "net.layers.11.q.weight", "other"])
    assert not MAP.knows(["token"]) and not MAP.knows([])
    assert not KeyMap("nobody", "vit", ()).knows(["token"])


@pytest.mark.parametrize("keymap", KEYMAPS, ids=lambda keymap: f"{keymap.family}-{keymap.source}")
def test_every_piece_of_every_map_has_its_others(keymap: KeyMap):
    """For each of our tensors that is cut, one row a piece."""
    cut: dict[tuple[str, int], list[int]] = {}
    for row in keymap.rows:
        if row.part[1] > 1:
            cut.setdefault((row.ours, row.part[1]), []).append(row.part[0])
    assert all(sorted(set(found)) == list(range(n)) for (_, n), found in cut.items())
    assert keymap.marks
