"""Names of ConvNeXts: torchvision, which counts stem, stages and what lies between them as `features`."""

from __future__ import annotations

from vitrail.weights.keymap import KeyMap, Row

BLOCK = "features.{i*2+1}.{j}"
TORCHVISION = KeyMap(
    source="torchvision",
    family="convnext",
    rows=(
        Row("features.0.{j}.{w}", "stem.{j}.{w}"),
        Row("features.{i*2+2}.{j}.{w}", "stages.{i+1}.downsample.{j}.{w}"),
        Row(f"{BLOCK}.layer_scale", "stages.{i}.blocks.{j}.gamma", form="flat"),
        Row(f"{BLOCK}.block.0.{{w}}", "stages.{i}.blocks.{j}.conv_dw.{w}"),
        Row(f"{BLOCK}.block.2.{{w}}", "stages.{i}.blocks.{j}.norm.{w}"),
        Row(f"{BLOCK}.block.3.{{w}}", "stages.{i}.blocks.{j}.mlp.fc1.{w}"),
        Row(f"{BLOCK}.block.5.{{w}}", "stages.{i}.blocks.{j}.mlp.fc2.{w}"),
        Row("classifier.0.{w}", "head.norm.{w}"),
        Row("classifier.2.{w}", "head.fc.{w}"),
    ),
    marks=("features.0.1.weight", f"{BLOCK}.layer_scale"),
)
KEYMAPS = (TORCHVISION,)
