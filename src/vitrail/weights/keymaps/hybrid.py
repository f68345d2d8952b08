"""Names of hybrids over BiT's ResNet in Google's JAX files: those of a plain ViT, and of the CNN before it."""

from __future__ import annotations

from vitrail.weights.keymap import KeyMap, Row
from vitrail.weights.keymaps import vit

TARGET = "[opt/target/]"
UNIT = f"{TARGET}block{{i+1}}/unit{{j+1}}"
BLOCK = "patch_embed.backbone.stages.{i}.blocks.{j}"


def _root(ours: str) -> tuple[Row, ...]:
    """The first convolution and its norm, under the name `ours`."""
    return (
        Row(f"{TARGET}conv_root/kernel", f"{ours}.conv.weight", form="kernel"),
        Row(f"{TARGET}gn_root/scale", f"{ours}.norm.weight", form="flat"),
        Row(f"{TARGET}gn_root/bias", f"{ours}.norm.bias", form="flat"),
    )


STAGES = (
    Row(f"{UNIT}/conv{{k}}/kernel", f"{BLOCK}.conv{{k}}.weight", form="kernel"),
    Row(f"{UNIT}/gn{{k}}/scale", f"{BLOCK}.norm{{k}}.weight", form="flat"),
    Row(f"{UNIT}/gn{{k}}/bias", f"{BLOCK}.norm{{k}}.bias", form="flat"),
    Row(f"{UNIT}/conv_proj/kernel", f"{BLOCK}.downsample.conv.weight", form="kernel"),
    Row(f"{UNIT}/gn_proj/scale", f"{BLOCK}.downsample.norm.weight", form="flat"),
    Row(f"{UNIT}/gn_proj/bias", f"{BLOCK}.downsample.norm.bias", form="flat"),
)
ROOT_ALONE = KeyMap(
    source="google",
    family="hybrid",
    rows=(*vit.GOOGLE.rows, *_root("patch_embed.backbone")),
    marks=(*vit.GOOGLE.marks, f"{TARGET}conv_root/kernel"),
    drop=vit.GOOGLE.drop,
)
WITH_STAGES = KeyMap(
    source="google",
    family="hybrid",
    rows=(*vit.GOOGLE.rows, *_root("patch_embed.backbone.stem"), *STAGES),
    marks=(*ROOT_ALONE.marks, f"{UNIT}/conv1/kernel"),
    drop=vit.GOOGLE.drop,
)
KEYMAPS = (ROOT_ALONE, WITH_STAGES)
