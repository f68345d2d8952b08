"""vitrail: Vision Transformers, from an image folder to an explained prediction.

The names below are all that is public at the top; each is loaded when it is first used, so that `import vitrail`
costs next to nothing. The rooms (`vitrail.layers`, `vitrail.models`, `vitrail.train`, …) stand in docs/design.md.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # for type checkers and editors; a test holds it equal to the table below
    from vitrail.data.loading import get_data_loaders as get_data_loaders
    from vitrail.explain.record import record_attention as record_attention
    from vitrail.layers.attention import Attention as Attention
    from vitrail.layers.blocks import Block as Block, Mlp as Mlp
    from vitrail.layers.embed import PatchEmbed as PatchEmbed
    from vitrail.models.hybrid_cnn import HybridCNNViT as HybridCNNViT
    from vitrail.models.registry import list_models as list_models
    from vitrail.models.vit import VisionTransformer as VisionTransformer
    from vitrail.models.vit_config import ViTConfig as ViTConfig
    from vitrail.predict import Predictor as Predictor, ViTClassifier as ViTClassifier
    from vitrail.trainer import ViTTrainer as ViTTrainer, run_training as run_training
    from vitrail.transfer import ViTTransferLearning as ViTTransferLearning
    from vitrail.visualize import (
        AttentionVisualizer as AttentionVisualizer,
        visualize_patch_embedding as visualize_patch_embedding,
    )
    from vitrail.weights.load import (
        create_model as create_model,
        load_model as load_model,
        load_weights as load_weights,
    )

_HOMES = {
    "Attention": "vitrail.layers.attention",
    "AttentionVisualizer": "vitrail.visualize",
    "Block": "vitrail.layers.blocks",
    "HybridCNNViT": "vitrail.models.hybrid_cnn",
    "Mlp": "vitrail.layers.blocks",
    "PatchEmbed": "vitrail.layers.embed",
    "Predictor": "vitrail.predict",
    "ViTClassifier": "vitrail.predict",
    "ViTConfig": "vitrail.models.vit_config",
    "ViTTrainer": "vitrail.trainer",
    "ViTTransferLearning": "vitrail.transfer",
    "VisionTransformer": "vitrail.models.vit",
    "create_model": "vitrail.weights.load",
    "get_data_loaders": "vitrail.data.loading",
    "list_models": "vitrail.models.registry",
    "load_model": "vitrail.weights.load",
    "load_weights": "vitrail.weights.load",
    "record_attention": "vitrail.explain.record",
    "run_training": "vitrail.trainer",
    "visualize_patch_embedding": "vitrail.visualize",
}
# No name of a room (explain, train, …) may stand here: importing the room would put the module in its place.

__all__ = sorted([*_HOMES, "__version__"])


def __getattr__(name: str) -> Any:
    if name == "__version__":
        from importlib.metadata import version  # which takes longer than all else here

        return version("vitrail")
    if name not in _HOMES:
        raise AttributeError(f"vitrail has {', '.join(__all__)}; got {name!r}")
    return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return __all__
