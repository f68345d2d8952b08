"""Names of CrossViT: the authors' files hold class tokens and positions as lists, timm's and ours by name."""

from __future__ import annotations

from vitrail.weights.keymap import KeyMap, Row

AUTHORS = KeyMap(
    source="authors",
    family="crossvit",
    rows=(
        Row("cls_token.{i}", "cls_token_{i}"),
        Row("pos_embed.{i}", "pos_embed_{i}"),
    ),
    marks=("cls_token.{i}", "pos_embed.{i}", "blocks.{i}.fusion.{j}.attn.wq.weight"),
)
KEYMAPS = (AUTHORS,)
