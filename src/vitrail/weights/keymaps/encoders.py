"""Names of encoders: transformers' DINOv2, DINOv3, SigLIP, CLIP, BEiT; OpenAI's, Meta's and Microsoft's own files.

DINOv2 adds the class token's position to it before the registers come between; here (as in timm) that sum is the class
token, and positions are those of patches alone. BEiT is pretrained with one table of biases for all blocks; here each
has its own, and they begin alike.
"""

from __future__ import annotations

from torch import Tensor

from vitrail.weights.keymap import KeyMap, Row


def _folded(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """With registers, the class token's position in the class token."""
    if not {"reg_token", "cls_token", "pos_embed"} <= tensors.keys():
        return tensors
    pos = tensors["pos_embed"]
    made = tensors | {"cls_token": tensors["cls_token"] + pos[:, :1], "pos_embed": pos[:, 1:]}
    if not made["reg_token"].numel():  # a network of none has no tensor for them
        del made["reg_token"]
    return made


def _heads(*theirs: str) -> tuple[Row, ...]:
    """Three layers, for queries, keys and values, that are one of ours."""
    return tuple(Row(name, "blocks.{i}.attn.qkv.{w}", (k, 3)) for k, name in enumerate(theirs))


def _shared(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The one table of biases, in every block."""
    made = dict(tensors)
    table = made.pop("rel_pos_bias.relative_position_bias_table")
    blocks = [name.removesuffix("gamma_1") for name in tensors if name.endswith(".gamma_1")]
    return made | {f"{block}attn.relative_position_bias_table": table for block in blocks}


def _plain_mlp(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Where there is no gate, what DINOv3's `up_proj` names is the first layer."""
    if any(".fc1_g." in name for name in tensors):
        return tensors
    return {name.replace(".fc1_x.", ".fc1."): tensor for name, tensor in tensors.items()}


MASK, TEXT, DERIVED = "the mask token", "the text tower", "tables that are made anew"
"""what encoders hold besides"""
ROOT = "[dinov2.][dinov2_with_registers.]"
V2 = f"{ROOT}encoder.layer.{{i}}"
DINOV2 = KeyMap(
    source="transformers' DINOv2",
    family="vit",
    rows=(
        Row(f"{ROOT}embeddings.cls_token", "cls_token"),
        Row(f"{ROOT}embeddings.register_tokens", "reg_token"),
        Row(f"{ROOT}embeddings.position_embeddings", "pos_embed"),
        Row(f"{ROOT}embeddings.patch_embeddings.projection.{{w}}", "patch_embed.proj.{w}"),
        *_heads(*(f"{V2}.attention.attention.{name}.{{w}}" for name in ("query", "key", "value"))),
        Row(f"{V2}.attention.output.dense.{{w}}", "blocks.{i}.attn.proj.{w}"),
        Row(f"{V2}.norm1.{{w}}", "blocks.{i}.norm1.{w}"),
        Row(f"{V2}.norm2.{{w}}", "blocks.{i}.norm2.{w}"),
        Row(f"{V2}.layer_scale1.lambda1", "blocks.{i}.ls1.gamma"),
        Row(f"{V2}.layer_scale2.lambda1", "blocks.{i}.ls2.gamma"),
        Row(f"{V2}.mlp.fc1.{{w}}", "blocks.{i}.mlp.fc1.{w}"),
        Row(f"{V2}.mlp.fc2.{{w}}", "blocks.{i}.mlp.fc2.{w}"),
        Row(f"{V2}.mlp.weights_in.{{w}}", "blocks.{i}.mlp.fc1.{w}"),
        Row(f"{V2}.mlp.weights_out.{{w}}", "blocks.{i}.mlp.fc2.{w}"),
        Row(f"{ROOT}layernorm.{{w}}", "norm.{w}"),
        Row("classifier.weight", "head.weight", form="class half"),
        Row("classifier.bias", "head.bias"),
    ),
    marks=(f"{V2}.layer_scale1.lambda1", f"{V2}.norm1.weight", f"{V2}.attention.attention.query.weight"),
    drop={MASK: (f"{ROOT}embeddings.mask_token",)},
    after=_folded,
)
TEACHER = "[backbone.]"
"""in the training checkpoints of Meta's, before all names but those of heads"""
META_BLOCK = f"{TEACHER}blocks.{{i}}"


def _meta_rows() -> tuple[Row, ...]:
    """What Meta's DINOv2 and DINOv3 have in common."""
    return (
        Row(f"{TEACHER}cls_token", "cls_token"),
        Row(f"{TEACHER}patch_embed.{{w}}", "patch_embed.{w}"),
        Row(f"{META_BLOCK}.norm1.{{w}}", "blocks.{i}.norm1.{w}"),
        Row(f"{META_BLOCK}.norm2.{{w}}", "blocks.{i}.norm2.{w}"),
        Row(f"{META_BLOCK}.attn.qkv.weight", "blocks.{i}.attn.qkv.weight"),
        Row(f"{META_BLOCK}.attn.proj.{{w}}", "blocks.{i}.attn.proj.{w}"),
        Row(f"{META_BLOCK}.mlp.fc1.{{w}}", "blocks.{i}.mlp.fc1.{w}"),
        Row(f"{META_BLOCK}.mlp.fc2.{{w}}", "blocks.{i}.mlp.fc2.{w}"),
        Row(f"{TEACHER}norm.{{w}}", "norm.{w}"),
    )


META_BESIDE = {MASK: (f"{TEACHER}mask_token",), "projection heads": ("dino_head.{w}", "ibot_head.{w}")}
META_DINOV2 = KeyMap(
    source="Meta's DINOv2",
    family="vit",
    rows=(
        *_meta_rows(),
        Row(f"{TEACHER}pos_embed", "pos_embed"),
        Row(f"{TEACHER}register_tokens", "reg_token"),
        Row(f"{META_BLOCK}.attn.qkv.bias", "blocks.{i}.attn.qkv.bias"),
        Row(f"{META_BLOCK}.ls1.gamma", "blocks.{i}.ls1.gamma"),
        Row(f"{META_BLOCK}.ls2.gamma", "blocks.{i}.ls2.gamma"),
        Row(f"{META_BLOCK}.mlp.w12.{{w}}", "blocks.{i}.mlp.fc1.{w}"),
        Row(f"{META_BLOCK}.mlp.w3.{{w}}", "blocks.{i}.mlp.fc2.{w}"),
    ),
    marks=(f"{TEACHER}mask_token", f"{META_BLOCK}.ls1.gamma", f"{TEACHER}pos_embed"),
    drop=META_BESIDE,
    after=_folded,
)
DINOV3 = KeyMap(
    source="transformers' DINOv3",
    family="eva",
    rows=(
        Row("[model.]embeddings.cls_token", "cls_token"),
        Row("[model.]embeddings.register_tokens", "reg_token"),
        Row("[model.]embeddings.patch_embeddings.{w}", "patch_embed.proj.{w}"),
        Row("[model.]layer.{i}.attention.q_proj.weight", "blocks.{i}.attn.qkv.weight", (0, 3)),
        Row("[model.]layer.{i}.attention.k_proj.weight", "blocks.{i}.attn.qkv.weight", (1, 3)),
        Row("[model.]layer.{i}.attention.v_proj.weight", "blocks.{i}.attn.qkv.weight", (2, 3)),
        Row("[model.]layer.{i}.attention.q_proj.bias", "blocks.{i}.attn.q_bias"),
        Row("[model.]layer.{i}.attention.v_proj.bias", "blocks.{i}.attn.v_bias"),
        Row("[model.]layer.{i}.attention.o_proj.{w}", "blocks.{i}.attn.proj.{w}"),
        Row("[model.]layer.{i}.norm1.{w}", "blocks.{i}.norm1.{w}"),
        Row("[model.]layer.{i}.norm2.{w}", "blocks.{i}.norm2.{w}"),
        Row("[model.]layer.{i}.layer_scale1.lambda1", "blocks.{i}.gamma_1"),
        Row("[model.]layer.{i}.layer_scale2.lambda1", "blocks.{i}.gamma_2"),
        Row("[model.]layer.{i}.mlp.gate_proj.{w}", "blocks.{i}.mlp.fc1_g.{w}"),
        Row("[model.]layer.{i}.mlp.up_proj.{w}", "blocks.{i}.mlp.fc1_x.{w}"),
        Row("[model.]layer.{i}.mlp.down_proj.{w}", "blocks.{i}.mlp.fc2.{w}"),
        Row("[model.]norm.{w}", "norm.{w}"),
    ),
    marks=("[model.]layer.{i}.layer_scale1.lambda1", "[model.]layer.{i}.attention.q_proj.weight"),
    drop={MASK: ("[model.]embeddings.mask_token",)},
    after=_plain_mlp,
)
META_DINOV3 = KeyMap(
    source="Meta's DINOv3",
    family="eva",
    rows=(
        *_meta_rows(),
        Row(f"{TEACHER}storage_tokens", "reg_token"),
        Row(f"{META_BLOCK}.attn.qkv.bias", "blocks.{i}.attn.q_bias", form="first third"),
        Row(f"{META_BLOCK}.attn.qkv.bias", "blocks.{i}.attn.v_bias", form="last third"),
        Row(f"{META_BLOCK}.ls1.gamma", "blocks.{i}.gamma_1"),
        Row(f"{META_BLOCK}.ls2.gamma", "blocks.{i}.gamma_2"),
        Row(f"{META_BLOCK}.mlp.w1.{{w}}", "blocks.{i}.mlp.fc1_g.{w}"),
        Row(f"{META_BLOCK}.mlp.w2.{{w}}", "blocks.{i}.mlp.fc1_x.{w}"),
        Row(f"{META_BLOCK}.mlp.w3.{{w}}", "blocks.{i}.mlp.fc2.{w}"),
    ),
    marks=(f"{TEACHER}storage_tokens", f"{META_BLOCK}.ls1.gamma", f"{META_BLOCK}.attn.qkv.weight"),
    drop={
        **META_BESIDE,
        DERIVED: (f"{TEACHER}rope_embed.periods", f"{META_BLOCK}.attn.qkv.bias_mask"),
        "the norm of small crops": (f"{TEACHER}local_cls_norm.{{w}}",),
    },
)
CLIP_LAYER = "[vision_model.]encoder.layers.{i}"


def _clip_blocks() -> tuple[Row, ...]:
    """The layers of transformers' CLIP and SigLIP."""
    return (
        *_heads(*(f"{CLIP_LAYER}.self_attn.{name}_proj.{{w}}" for name in "qkv")),
        Row(f"{CLIP_LAYER}.self_attn.out_proj.{{w}}", "blocks.{i}.attn.proj.{w}"),
        Row(f"{CLIP_LAYER}.layer_norm1.{{w}}", "blocks.{i}.norm1.{w}"),
        Row(f"{CLIP_LAYER}.layer_norm2.{{w}}", "blocks.{i}.norm2.{w}"),
        Row(f"{CLIP_LAYER}.mlp.fc1.{{w}}", "blocks.{i}.mlp.fc1.{w}"),
        Row(f"{CLIP_LAYER}.mlp.fc2.{{w}}", "blocks.{i}.mlp.fc2.{w}"),
        Row("[vision_model.]embeddings.patch_embedding.{w}", "patch_embed.proj.{w}"),
        Row("[vision_model.]embeddings.position_embedding.weight", "pos_embed", form="table"),
        Row("[vision_model.]post_layernorm.{w}", "norm.{w}"),
    )


CLIP_BESIDE = {
    TEXT: ("text_model.{w}", "text_projection.{w}", "logit_scale", "logit_bias"),
    DERIVED: ("[vision_model.]embeddings.position_ids",),
}
CLIP = KeyMap(
    source="transformers' CLIP",
    family="vit",
    rows=(
        *_clip_blocks(),
        Row("[vision_model.]embeddings.class_embedding", "cls_token", form="token"),
        Row("[vision_model.]pre_layrnorm.{w}", "norm_pre.{w}"),
        Row("visual_projection.weight", "head.weight"),
        Row("visual_projection.weight", "head.bias", form="zeros"),
    ),
    marks=("[vision_model.]pre_layrnorm.weight", f"{CLIP_LAYER}.self_attn.q_proj.weight"),
    drop=CLIP_BESIDE,
)
SIGLIP = KeyMap(
    source="transformers' SigLIP",
    family="vit",
    rows=(
        *_clip_blocks(),
        Row("[vision_model.]head.probe", "attn_pool.latent"),
        Row("[vision_model.]head.attention.in_proj_{w}", "attn_pool.q.{w}", form="first third"),
        Row("[vision_model.]head.attention.in_proj_{w}", "attn_pool.kv.{w}", form="last thirds"),
        Row("[vision_model.]head.attention.out_proj.{w}", "attn_pool.proj.{w}"),
        Row("[vision_model.]head.layernorm.{w}", "attn_pool.norm.{w}"),
        Row("[vision_model.]head.mlp.{w}", "attn_pool.mlp.{w}"),
    ),
    marks=("[vision_model.]head.probe", f"{CLIP_LAYER}.self_attn.q_proj.weight"),
    drop=CLIP_BESIDE,
)
RESBLOCK = "visual.transformer.resblocks.{i}"
OPEN_CLIP = KeyMap(
    source="OpenAI's CLIP",
    family="vit",
    rows=(
        Row("visual.class_embedding", "cls_token", form="token"),
        Row("visual.positional_embedding", "pos_embed", form="table"),
        Row("visual.conv1.{w}", "patch_embed.proj.{w}"),
        Row("visual.ln_pre.{w}", "norm_pre.{w}"),
        Row(f"{RESBLOCK}.attn.in_proj_{{w}}", "blocks.{i}.attn.qkv.{w}"),
        Row(f"{RESBLOCK}.attn.out_proj.{{w}}", "blocks.{i}.attn.proj.{w}"),
        Row(f"{RESBLOCK}.ln_1.{{w}}", "blocks.{i}.norm1.{w}"),
        Row(f"{RESBLOCK}.ln_2.{{w}}", "blocks.{i}.norm2.{w}"),
        Row(f"{RESBLOCK}.mlp.c_fc.{{w}}", "blocks.{i}.mlp.fc1.{w}"),
        Row(f"{RESBLOCK}.mlp.c_proj.{{w}}", "blocks.{i}.mlp.fc2.{w}"),
        Row("visual.ln_post.{w}", "norm.{w}"),
        Row("visual.proj", "head.weight", form="matrix"),
        Row("visual.proj", "head.bias", form="zeros of columns"),
    ),
    marks=("visual.class_embedding", "visual.ln_pre.weight"),
    drop={
        TEXT: (
            "transformer.{w}", "token_embedding.{w}", "positional_embedding", "ln_final.{w}", "text_projection",
            "logit_scale", "logit_bias",
        ),
    },
)  # fmt: skip
OPENAI_CLIP = KeyMap(
    source="OpenAI's CLIP",
    family="vit",
    rows=OPEN_CLIP.rows,
    marks=(*OPEN_CLIP.marks, "input_resolution"),
    drop={**OPEN_CLIP.drop, "sizes": ("input_resolution", "context_length", "vocab_size")},
    favours="quickgelu",
    shown={"act": "quick_gelu"},
)
BEIT_LAYER = "[beit.]encoder.layer.{i}"
BEIT = KeyMap(
    source="transformers",
    family="beit",
    rows=(
        Row("[beit.]embeddings.cls_token", "cls_token"),
        Row("[beit.]embeddings.position_embeddings", "pos_embed"),
        Row("[beit.]embeddings.patch_embeddings.projection.{w}", "patch_embed.proj.{w}"),
        Row(f"{BEIT_LAYER}.attention.attention.query.weight", "blocks.{i}.attn.qkv.weight", (0, 3)),
        Row(f"{BEIT_LAYER}.attention.attention.key.weight", "blocks.{i}.attn.qkv.weight", (1, 3)),
        Row(f"{BEIT_LAYER}.attention.attention.value.weight", "blocks.{i}.attn.qkv.weight", (2, 3)),
        Row(f"{BEIT_LAYER}.attention.attention.query.bias", "blocks.{i}.attn.q_bias"),
        Row(f"{BEIT_LAYER}.attention.attention.value.bias", "blocks.{i}.attn.v_bias"),
        Row(
            f"{BEIT_LAYER}.attention.attention.relative_position_bias.relative_position_bias_table",
            "blocks.{i}.attn.relative_position_bias_table",
        ),
        Row(f"{BEIT_LAYER}.attention.output.dense.{{w}}", "blocks.{i}.attn.proj.{w}"),
        Row(f"{BEIT_LAYER}.layernorm_before.{{w}}", "blocks.{i}.norm1.{w}"),
        Row(f"{BEIT_LAYER}.layernorm_after.{{w}}", "blocks.{i}.norm2.{w}"),
        Row(f"{BEIT_LAYER}.intermediate.dense.{{w}}", "blocks.{i}.mlp.fc1.{w}"),
        Row(f"{BEIT_LAYER}.output.dense.{{w}}", "blocks.{i}.mlp.fc2.{w}"),
        Row(f"{BEIT_LAYER}.lambda_1", "blocks.{i}.gamma_1"),
        Row(f"{BEIT_LAYER}.lambda_2", "blocks.{i}.gamma_2"),
        Row("[beit.]layernorm.{w}", "norm.{w}"),
        Row("[beit.]pooler.layernorm.{w}", "fc_norm.{w}"),
        Row("classifier.{w}", "head.{w}"),
    ),
    marks=(f"{BEIT_LAYER}.lambda_1", f"{BEIT_LAYER}.lambda_2", f"{BEIT_LAYER}.attention.attention.query.bias"),
    drop={
        MASK: ("[beit.]embeddings.mask_token",),
        DERIVED: (f"{BEIT_LAYER}.attention.attention.relative_position_bias.relative_position_index",),
    },
)
MICROSOFT_BEIT = KeyMap(
    source="Microsoft's BEiT",
    family="beit",
    rows=(),
    marks=("blocks.{i}.attn.relative_position_index", "blocks.{i}.gamma_1"),
    drop={MASK: ("mask_token",), DERIVED: ("blocks.{i}.attn.relative_position_index",)},
)
MICROSOFT_PRETRAINED = KeyMap(
    source="Microsoft's BEiT",
    family="beit",
    rows=(),
    marks=("rel_pos_bias.relative_position_bias_table", "blocks.{i}.gamma_1"),
    drop={
        MASK: ("mask_token",),
        DERIVED: ("rel_pos_bias.relative_position_index",),
        "the head that guesses tokens": ("lm_head.{w}",),
        "layers for the class token alone": ("cls_pt_{w}",),
    },
    after=_shared,
)
KEYMAPS = (
    DINOV2, META_DINOV2, DINOV3, META_DINOV3, CLIP, SIGLIP, OPEN_CLIP, OPENAI_CLIP, BEIT, MICROSOFT_BEIT,
    MICROSOFT_PRETRAINED,
)  # fmt: skip
