"""Names of PVT v2: the authors', which count stages from 1, and transformers'; timm's are ours."""

from __future__ import annotations

from vitrail.weights.keymap import KeyMap, Row

THEIRS = "block{i+1}.{j}"
BLOCK = "stages.{i}.blocks.{j}"
AUTHORS = KeyMap(
    source="authors",
    family="pvt_v2",
    rows=(
        Row("patch_embed1.{w}", "patch_embed.{w}"),
        Row("patch_embed{i+2}.{w}", "stages.{i+1}.downsample.{w}"),
        Row(f"{THEIRS}.norm1.{{w}}", f"{BLOCK}.norm1.{{w}}"),
        Row(f"{THEIRS}.attn.{{w}}", f"{BLOCK}.attn.{{w}}"),
        Row(f"{THEIRS}.norm2.{{w}}", f"{BLOCK}.norm2.{{w}}"),
        Row(f"{THEIRS}.mlp.fc1.{{w}}", f"{BLOCK}.mlp.fc1.{{w}}"),
        Row(f"{THEIRS}.mlp.dwconv.dwconv.{{w}}", f"{BLOCK}.mlp.dwconv.{{w}}"),
        Row(f"{THEIRS}.mlp.fc2.{{w}}", f"{BLOCK}.mlp.fc2.{{w}}"),
        Row("norm{i+1}.{w}", "stages.{i}.norm.{w}"),
    ),
    marks=("patch_embed1.proj.weight", f"{THEIRS}.mlp.dwconv.dwconv.weight"),
)
STAGE = "[pvt_v2.]encoder.layers.{i}"
LAYER = f"{STAGE}.blocks.{{j}}"
FIRST, FURTHER = "[pvt_v2.]encoder.layers.0.patch_embedding", "[pvt_v2.]encoder.layers.{i+1}.patch_embedding"
TRANSFORMERS = KeyMap(
    source="transformers",
    family="pvt_v2",
    rows=(
        Row(f"{FIRST}.proj.{{w}}", "patch_embed.proj.{w}"),
        Row(f"{FIRST}.layer_norm.{{w}}", "patch_embed.norm.{w}"),
        Row(f"{FURTHER}.proj.{{w}}", "stages.{i+1}.downsample.proj.{w}"),
        Row(f"{FURTHER}.layer_norm.{{w}}", "stages.{i+1}.downsample.norm.{w}"),
        Row(f"{LAYER}.layer_norm_1.{{w}}", f"{BLOCK}.norm1.{{w}}"),
        Row(f"{LAYER}.attention.query.{{w}}", f"{BLOCK}.attn.q.{{w}}"),
        Row(f"{LAYER}.attention.key.{{w}}", f"{BLOCK}.attn.kv.{{w}}", (0, 2)),
        Row(f"{LAYER}.attention.value.{{w}}", f"{BLOCK}.attn.kv.{{w}}", (1, 2)),
        Row(f"{LAYER}.attention.spatial_reduction.{{w}}", f"{BLOCK}.attn.sr.{{w}}"),
        Row(f"{LAYER}.attention.layer_norm.{{w}}", f"{BLOCK}.attn.norm.{{w}}"),
        Row(f"{LAYER}.attention.proj.{{w}}", f"{BLOCK}.attn.proj.{{w}}"),
        Row(f"{LAYER}.layer_norm_2.{{w}}", f"{BLOCK}.norm2.{{w}}"),
        Row(f"{LAYER}.mlp.dense1.{{w}}", f"{BLOCK}.mlp.fc1.{{w}}"),
        Row(f"{LAYER}.mlp.dwconv.dwconv.{{w}}", f"{BLOCK}.mlp.dwconv.{{w}}"),
        Row(f"{LAYER}.mlp.dense2.{{w}}", f"{BLOCK}.mlp.fc2.{{w}}"),
        Row(f"{STAGE}.layer_norm.{{w}}", "stages.{i}.norm.{w}"),
        Row("classifier.{w}", "head.{w}"),
    ),
    marks=(f"{FIRST}.proj.weight", f"{LAYER}.mlp.dwconv.dwconv.weight"),
)
KEYMAPS = (AUTHORS, TRANSFORMERS)
