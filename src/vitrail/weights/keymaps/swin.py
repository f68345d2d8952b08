"""Names of Swin Transformers: the authors', torchvision's, transformers'.

In the authors' files and in transformers' a stage ends with the merging that here begins the next one.
"""

from __future__ import annotations

from vitrail.weights.keymap import KeyMap, Row

AUTHORS = KeyMap(
    source="microsoft",
    family="swin",
    rows=(
        Row("layers.{i}.downsample.{w}", "layers.{i+1}.downsample.{w}"),
        Row("head.{w}", "head.fc.{w}"),
    ),
    marks=("layers.0.downsample.reduction.weight", "layers.{i}.blocks.{j}.attn.relative_position_bias_table"),
    drop={
        "tables that are made anew": (
            "layers.{i}.blocks.{j}.attn_mask",
            "layers.{i}.blocks.{j}.attn.relative_position_index",
        )
    },
)
STAGE = "features.{i*2+1}.{j}"
BLOCK = "layers.{i}.blocks.{j}"
TORCHVISION = KeyMap(
    source="torchvision",
    family="swin",
    rows=(
        Row("features.0.0.{w}", "patch_embed.proj.{w}"),
        Row("features.0.2.{w}", "patch_embed.norm.{w}"),
        Row(f"{STAGE}.norm1.{{w}}", f"{BLOCK}.norm1.{{w}}"),
        Row(f"{STAGE}.attn.relative_position_bias_table", f"{BLOCK}.attn.relative_position_bias_table"),
        Row(f"{STAGE}.attn.qkv.{{w}}", f"{BLOCK}.attn.qkv.{{w}}"),
        Row(f"{STAGE}.attn.proj.{{w}}", f"{BLOCK}.attn.proj.{{w}}"),
        Row(f"{STAGE}.norm2.{{w}}", f"{BLOCK}.norm2.{{w}}"),
        Row(f"{STAGE}.mlp.0.{{w}}", f"{BLOCK}.mlp.fc1.{{w}}"),
        Row(f"{STAGE}.mlp.3.{{w}}", f"{BLOCK}.mlp.fc2.{{w}}"),
        Row("features.{i*2+2}.reduction.{w}", "layers.{i+1}.downsample.reduction.{w}"),
        Row("features.{i*2+2}.norm.{w}", "layers.{i+1}.downsample.norm.{w}"),
        Row("norm.{w}", "norm.{w}"),
        Row("head.{w}", "head.fc.{w}"),
    ),
    marks=("features.0.0.weight", f"{STAGE}.attn.relative_position_bias_table", f"{STAGE}.mlp.0.weight"),
    drop={"tables that are made anew": (f"{STAGE}.attn.relative_position_index",)},
)
LAYER = "[swin.]encoder.layers.{i}.blocks.{j}"
TRANSFORMERS = KeyMap(
    source="transformers",
    family="swin",
    rows=(
        Row("[swin.]embeddings.patch_embeddings.projection.{w}", "patch_embed.proj.{w}"),
        Row("[swin.]embeddings.norm.{w}", "patch_embed.norm.{w}"),
        Row(f"{LAYER}.layernorm_before.{{w}}", f"{BLOCK}.norm1.{{w}}"),
        Row(f"{LAYER}.attention.self.relative_position_bias_table", f"{BLOCK}.attn.relative_position_bias_table"),
        Row(f"{LAYER}.attention.self.query.{{w}}", f"{BLOCK}.attn.qkv.{{w}}", (0, 3)),
        Row(f"{LAYER}.attention.self.key.{{w}}", f"{BLOCK}.attn.qkv.{{w}}", (1, 3)),
        Row(f"{LAYER}.attention.self.value.{{w}}", f"{BLOCK}.attn.qkv.{{w}}", (2, 3)),
        Row(f"{LAYER}.attention.output.dense.{{w}}", f"{BLOCK}.attn.proj.{{w}}"),
        Row(f"{LAYER}.layernorm_after.{{w}}", f"{BLOCK}.norm2.{{w}}"),
        Row(f"{LAYER}.intermediate.dense.{{w}}", f"{BLOCK}.mlp.fc1.{{w}}"),
        Row(f"{LAYER}.output.dense.{{w}}", f"{BLOCK}.mlp.fc2.{{w}}"),
        Row("[swin.]encoder.layers.{i}.downsample.{w}", "layers.{i+1}.downsample.{w}"),
        Row("[swin.]layernorm.{w}", "norm.{w}"),
        Row("classifier.{w}", "head.fc.{w}"),
    ),
    marks=("[swin.]embeddings.norm.weight", f"{LAYER}.attention.self.relative_position_bias_table"),
    drop={
        "tables that are made anew": (f"{LAYER}.attention.self.relative_position_index",),
        "the mask token": ("[swin.]embeddings.mask_token",),
    },
)
KEYMAPS = (AUTHORS, TORCHVISION, TRANSFORMERS)
