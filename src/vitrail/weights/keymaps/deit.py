"""Names of DeiT: transformers' (timm's and the authors' are ours)."""

from __future__ import annotations

from vitrail.weights.keymap import KeyMap, Row

LAYER = "[deit.]encoder.layer.{i}"
TRANSFORMERS = KeyMap(
    source="transformers",
    family="deit",
    rows=(
        Row("[deit.]embeddings.cls_token", "cls_token"),
        Row("[deit.]embeddings.distillation_token", "dist_token"),
        Row("[deit.]embeddings.position_embeddings", "pos_embed"),
        Row("[deit.]embeddings.patch_embeddings.projection.{w}", "patch_embed.proj.{w}"),
        Row(f"{LAYER}.layernorm_before.{{w}}", "blocks.{i}.norm1.{w}"),
        Row(f"{LAYER}.attention.attention.query.{{w}}", "blocks.{i}.attn.qkv.{w}", (0, 3)),
        Row(f"{LAYER}.attention.attention.key.{{w}}", "blocks.{i}.attn.qkv.{w}", (1, 3)),
        Row(f"{LAYER}.attention.attention.value.{{w}}", "blocks.{i}.attn.qkv.{w}", (2, 3)),
        Row(f"{LAYER}.attention.output.dense.{{w}}", "blocks.{i}.attn.proj.{w}"),
        Row(f"{LAYER}.layernorm_after.{{w}}", "blocks.{i}.norm2.{w}"),
        Row(f"{LAYER}.intermediate.dense.{{w}}", "blocks.{i}.mlp.fc1.{w}"),
        Row(f"{LAYER}.output.dense.{{w}}", "blocks.{i}.mlp.fc2.{w}"),
        Row("[deit.]layernorm.{w}", "norm.{w}"),
        Row("cls_classifier.{w}", "head.{w}"),
        Row("distillation_classifier.{w}", "head_dist.{w}"),
    ),
    marks=(
        "[deit.]embeddings.distillation_token",
        f"{LAYER}.attention.attention.query.weight",
        "[deit.]embeddings.cls_token",
    ),
    drop={"the pooler": ("[deit.]pooler.dense.{w}",), "the mask token": ("[deit.]embeddings.mask_token",)},
)
KEYMAPS = (TRANSFORMERS,)
