"""Names of plain ViTs: transformers, torchvision, Google's JAX files; MAE's and DINO's, which are timm's and more."""

from __future__ import annotations

from vitrail.weights.keymap import KeyMap, Row

LAYER = "[vit.]encoder.layer.{i}"
TRANSFORMERS = KeyMap(
    source="transformers",
    family="vit",
    rows=(
        Row("[vit.]embeddings.cls_token", "cls_token"),
        Row("[vit.]embeddings.position_embeddings", "pos_embed"),
        Row("[vit.]embeddings.patch_embeddings.projection.{w}", "patch_embed.proj.{w}"),
        Row(f"{LAYER}.layernorm_before.{{w}}", "blocks.{i}.norm1.{w}"),
        Row(f"{LAYER}.attention.attention.query.{{w}}", "blocks.{i}.attn.qkv.{w}", (0, 3)),
        Row(f"{LAYER}.attention.attention.key.{{w}}", "blocks.{i}.attn.qkv.{w}", (1, 3)),
        Row(f"{LAYER}.attention.attention.value.{{w}}", "blocks.{i}.attn.qkv.{w}", (2, 3)),
        Row(f"{LAYER}.attention.output.dense.{{w}}", "blocks.{i}.attn.proj.{w}"),
        Row(f"{LAYER}.layernorm_after.{{w}}", "blocks.{i}.norm2.{w}"),
        Row(f"{LAYER}.intermediate.dense.{{w}}", "blocks.{i}.mlp.fc1.{w}"),
        Row(f"{LAYER}.output.dense.{{w}}", "blocks.{i}.mlp.fc2.{w}"),
        Row("[vit.]layernorm.{w}", "norm.{w}"),
        Row("classifier.{w}", "head.{w}"),
    ),
    marks=("[vit.]embeddings.cls_token", f"{LAYER}.attention.attention.query.weight"),
    drop={
        "the pooler": ("[vit.]pooler.dense.{w}",),
        "the mask token": ("[vit.]embeddings.mask_token",),
        "the decoder": ("decoder.{w}",),
    },
)
ENCODER = "encoder.layers.encoder_layer_{i}"
TORCHVISION = KeyMap(
    source="torchvision",
    family="vit",
    rows=(
        Row("class_token", "cls_token"),
        Row("encoder.pos_embedding", "pos_embed"),
        Row("conv_proj.{w}", "patch_embed.proj.{w}"),
        Row(f"{ENCODER}.ln_1.{{w}}", "blocks.{i}.norm1.{w}"),
        Row(f"{ENCODER}.self_attention.in_proj_{{w}}", "blocks.{i}.attn.qkv.{w}"),
        Row(f"{ENCODER}.self_attention.out_proj.{{w}}", "blocks.{i}.attn.proj.{w}"),
        Row(f"{ENCODER}.ln_2.{{w}}", "blocks.{i}.norm2.{w}"),
        Row(f"{ENCODER}.mlp.0.{{w}}", "blocks.{i}.mlp.fc1.{w}"),
        Row(f"{ENCODER}.mlp.3.{{w}}", "blocks.{i}.mlp.fc2.{w}"),
        Row(f"{ENCODER}.mlp.linear_1.{{w}}", "blocks.{i}.mlp.fc1.{w}"),
        Row(f"{ENCODER}.mlp.linear_2.{{w}}", "blocks.{i}.mlp.fc2.{w}"),
        Row("encoder.ln.{w}", "norm.{w}"),
        Row("heads.head.{w}", "head.{w}"),
    ),
    marks=("class_token", "encoder.pos_embedding", f"{ENCODER}.ln_1.weight"),
)
BLOCK = "[opt/target/]Transformer/encoderblock_{i}"
HEADS = f"{BLOCK}/MultiHeadDotProductAttention_1"
GOOGLE = KeyMap(
    source="google",
    family="vit",
    rows=(
        Row("[opt/target/]cls", "cls_token"),
        Row("[opt/target/]embedding/kernel", "patch_embed.proj.weight", form="kernel"),
        Row("[opt/target/]embedding/bias", "patch_embed.proj.bias"),
        Row("[opt/target/]Transformer/posembed_input/pos_embedding", "pos_embed"),
        Row(f"{BLOCK}/LayerNorm_0/scale", "blocks.{i}.norm1.weight"),
        Row(f"{BLOCK}/LayerNorm_0/bias", "blocks.{i}.norm1.bias"),
        Row(f"{HEADS}/query/kernel", "blocks.{i}.attn.qkv.weight", (0, 3), "heads in"),
        Row(f"{HEADS}/key/kernel", "blocks.{i}.attn.qkv.weight", (1, 3), "heads in"),
        Row(f"{HEADS}/value/kernel", "blocks.{i}.attn.qkv.weight", (2, 3), "heads in"),
        Row(f"{HEADS}/query/bias", "blocks.{i}.attn.qkv.bias", (0, 3), "flat"),
        Row(f"{HEADS}/key/bias", "blocks.{i}.attn.qkv.bias", (1, 3), "flat"),
        Row(f"{HEADS}/value/bias", "blocks.{i}.attn.qkv.bias", (2, 3), "flat"),
        Row(f"{HEADS}/out/kernel", "blocks.{i}.attn.proj.weight", form="heads out"),
        Row(f"{HEADS}/out/bias", "blocks.{i}.attn.proj.bias"),
        Row(f"{BLOCK}/LayerNorm_2/scale", "blocks.{i}.norm2.weight"),
        Row(f"{BLOCK}/LayerNorm_2/bias", "blocks.{i}.norm2.bias"),
        Row(f"{BLOCK}/MlpBlock_3/Dense_0/kernel", "blocks.{i}.mlp.fc1.weight", form="matrix"),
        Row(f"{BLOCK}/MlpBlock_3/Dense_0/bias", "blocks.{i}.mlp.fc1.bias"),
        Row(f"{BLOCK}/MlpBlock_3/Dense_1/kernel", "blocks.{i}.mlp.fc2.weight", form="matrix"),
        Row(f"{BLOCK}/MlpBlock_3/Dense_1/bias", "blocks.{i}.mlp.fc2.bias"),
        Row("[opt/target/]Transformer/encoder_norm/scale", "norm.weight"),
        Row("[opt/target/]Transformer/encoder_norm/bias", "norm.bias"),
        Row("[opt/target/]head/kernel", "head.weight", form="matrix"),
        Row("[opt/target/]head/bias", "head.bias"),
    ),
    marks=("[opt/target/]embedding/kernel", f"{BLOCK}/LayerNorm_0/scale"),
    drop={"the layer before its head": ("[opt/target/]pre_logits/{w}",)},
)
MAE = KeyMap(
    source="MAE",
    family="vit",
    rows=(),
    marks=("decoder_pos_embed", "mask_token", "blocks.{i}.attn.qkv.weight"),
    drop={"the decoder": ("decoder_{w}",), "the mask token": ("mask_token",)},
)
DINO = KeyMap(
    source="DINO",
    family="vit",
    rows=(Row("backbone.{w}", "{w}"),),
    marks=("backbone.blocks.{i}.attn.qkv.weight",),
    drop={"the projection head": ("head.mlp.{w}", "head.last_layer.{w}")},  # a classifier of one's own is head.weight
)
KEYMAPS = (TRANSFORMERS, TORCHVISION, GOOGLE, MAE, DINO)
