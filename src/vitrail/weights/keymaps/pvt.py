"""Names of PVT: transformers' (the authors' are ours)."""

from __future__ import annotations

from vitrail.weights.keymap import KeyMap, Row

PATCHES = "[pvt.]encoder.patch_embeddings"
LAYER = "[pvt.]encoder.block.{i}.{j}"
BLOCK = "block{i+1}.{j}"
TRANSFORMERS = KeyMap(
    source="transformers",
    family="pvt",
    rows=(
        Row(f"{PATCHES}.{{i}}.projection.{{w}}", "patch_embed{i+1}.proj.{w}"),
        Row(f"{PATCHES}.{{i}}.layer_norm.{{w}}", "patch_embed{i+1}.norm.{w}"),
        Row(f"{PATCHES}.{{i}}.position_embeddings", "pos_embed{i+1}"),
        Row(f"{PATCHES}.3.cls_token", "cls_token"),
        Row(f"{LAYER}.layer_norm_1.{{w}}", f"{BLOCK}.norm1.{{w}}"),
        Row(f"{LAYER}.attention.self.query.{{w}}", f"{BLOCK}.attn.q.{{w}}"),
        Row(f"{LAYER}.attention.self.key.{{w}}", f"{BLOCK}.attn.kv.{{w}}", (0, 2)),
        Row(f"{LAYER}.attention.self.value.{{w}}", f"{BLOCK}.attn.kv.{{w}}", (1, 2)),
        Row(f"{LAYER}.attention.self.sequence_reduction.{{w}}", f"{BLOCK}.attn.sr.{{w}}"),
        Row(f"{LAYER}.attention.self.layer_norm.{{w}}", f"{BLOCK}.attn.norm.{{w}}"),
        Row(f"{LAYER}.attention.output.dense.{{w}}", f"{BLOCK}.attn.proj.{{w}}"),
        Row(f"{LAYER}.layer_norm_2.{{w}}", f"{BLOCK}.norm2.{{w}}"),
        Row(f"{LAYER}.mlp.dense1.{{w}}", f"{BLOCK}.mlp.fc1.{{w}}"),
        Row(f"{LAYER}.mlp.dense2.{{w}}", f"{BLOCK}.mlp.fc2.{{w}}"),
        Row("[pvt.]encoder.layer_norm.{w}", "norm.{w}"),
        Row("classifier.{w}", "head.{w}"),
    ),
    marks=(f"{PATCHES}.3.cls_token", f"{LAYER}.attention.self.sequence_reduction.weight"),
)
KEYMAPS = (TRANSFORMERS,)
