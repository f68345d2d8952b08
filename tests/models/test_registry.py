"""Models by name: short names, wrong names, and the words that other libraries use for the same things."""

from __future__ import annotations

import inspect
from dataclasses import fields, replace
from typing import Any

import pytest
import torch

from vitrail.models.config import spelled
from vitrail.models.registry import (
    FAMILIES,
    ROWS,
    TORCHVISION,
    build_from_config,
    build_model,
    list_models,
    resolve_name,
)
from vitrail.models.vit import VisionTransformer
from vitrail.models.vit_config import VARIANTS, ViTConfig
from vitrail.names import AMBIGUOUS, MODEL_SPELLINGS

SMALL: dict[str, Any] = dict(img_size=32, patch_size=8, embed_dim=24, depth=1, num_heads=3, num_classes=7)

# ---- rows and short names

RESOLVED = [
    ("vit_debug", 224, "vit_debug"),
    ("vit_base_patch32_384", 32, "vit_base_patch32_384"),
    ("vit_base", 32, "vit_base_patch4_32"),
    ("vit_base", 28, "vit_base_patch4_32"),
    ("vit_base", 64, "vit_base_patch4_32"),
    ("vit_base", 96, "vit_base_patch16_224"),
    ("vit_base", 224, "vit_base_patch16_224"),
    ("vit_base", 256, "vit_base_patch16_224"),
    ("vit_base", 384, "vit_base_patch16_384"),
    ("vit_base", 2000, "vit_base_patch16_384"),
    ("vit_tiny", 32, "vit_tiny_patch4_32"),
    ("vit_tiny", 224, "vit_tiny_patch16_224"),
    ("vit_tiny_mlp1", 224, "vit_tiny_mlp1_patch4_32"),
    ("vit_small", 32, "vit_small_patch4_32"),
    ("vit_small", 224, "vit_small_patch16_224"),
    ("vit_small_depth6", 32, "vit_small_depth6_patch16_224"),
    ("vit_large", 32, "vit_large_patch16_224"),
    ("vit_huge", 518, "vit_huge_patch14_224"),
    ("vit_nano", 224, "vit_nano_patch8_64"),
    ("pvt_v2_b0", 32, "pvt_v2_b0"),  # a full name, though that of `pvt_v2_b0_32` without its size
    ("pvt_v2_b0_32", 224, "pvt_v2_b0_32"),
    ("pvt_tiny", 32, "pvt_tiny"),
    ("pvt_tiny_32", 224, "pvt_tiny_32"),
]


@pytest.mark.parametrize(("name", "size", "row"), RESOLVED)
def test_short_names_take_the_row_nearest_in_size(name: str, size: int, row: str) -> None:
    assert resolve_name(name, size) == row


@pytest.mark.parametrize(
    ("size", "row"),
    [
        ({}, "vit_tiny_patch16_224"),
        (dict(img_size=32), "vit_tiny_patch4_32"),
        (dict(image_size=32), "vit_tiny_patch4_32"),
        (dict(input_size=(32, 64)), "vit_tiny_patch4_32"),
        (dict(img_size=[384, 512]), "vit_tiny_patch16_384"),
    ],
)
def test_a_short_name_is_completed_by_the_image_size_in_any_spelling(size: dict[str, Any], row: str) -> None:
    with torch.device("meta"):
        model = build_model("vit_tiny", **size)
    assert model.variant == row
    expected = next(iter(size.values()), model.config.img_size)
    assert model.config.img_size == (tuple(expected) if not isinstance(expected, int) else (expected, expected))


@pytest.mark.parametrize(
    ("wrong", "first"),
    [
        ("vit_bse", "vit_base"),
        ("vit_smal", "vit_small"),
        ("vit-base", "vit_base"),
        ("ViT_Base", "vit_base"),
        ("vit_tiny_mlp", "vit_tiny_mlp1"),
        ("vit_base_patch16_22", "vit_base_patch16_224"),
        ("vit_base_patch16", "vit_base_patch16_384"),
    ],
)
def test_an_unknown_name_names_the_three_nearest(wrong: str, first: str) -> None:
    with pytest.raises(ValueError, match=f"there is no model '{wrong}'; the nearest are {first}, ") as error:
        build_model(wrong)
    assert str(error.value).count(", ") == 2


def test_list_models_takes_a_shell_pattern_and_keeps_the_order_of_the_table() -> None:
    assert list_models() == list(ROWS)
    assert list_models("vit_*_384") == [row for row in ROWS if row.startswith("vit_") and row.endswith("_384")]
    assert list_models("vit_nano*") == ["vit_nano_patch8_64"]
    assert list_models("nothing*") == []


def test_build_model_overrides_a_row_and_keeps_its_name() -> None:
    model = build_model("vit_debug", num_classes=3, depth=1)
    assert model.config == replace(VARIANTS["vit_debug"], num_classes=3, depth=1)
    assert model.variant == "vit_debug"
    assert VARIANTS["vit_debug"].depth == 3


def test_the_tables_say_what_their_names_say() -> None:
    for row, config in VARIANTS.items():
        if "_patch" in row:
            patch, size = row.partition("_patch")[2].split("_")
            assert config.patch_size == (int(patch),) * 2
            assert config.img_size == (int(size),) * 2
            assert config.num_classes == (1000 if int(size) >= 224 else 10)


@pytest.mark.parametrize(
    ("family", "config", "message"),
    [
        ("vjt", {}, "family must be one of vit, .*; got 'vjt'"),
        ("vit", dict(depht=3), "the config of 'vit' has no field 'depht'"),
        ("vit", dict(dim=3), "the config of 'vit' has no field 'dim'"),  # files hold our own names only
    ],
)
def test_a_card_that_describes_no_model_is_refused(family: str, config: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build_from_config(family, config)


# ---- other libraries' words

TIMM, HF, TV, LUC, BV, OWN = "timm", "transformers", "torchvision", "vit-pytorch", "big_vision", "scripts"
SPELLED: list[tuple[str, str, Any, str, Any]] = [
    (HF, "image_size", 64, "img_size", (64, 64)),
    (TIMM, "img_size", 64, "img_size", (64, 64)),
    (HF, "num_channels", 1, "in_chans", 1),
    (LUC, "channels", 1, "in_chans", 1),
    (OWN, "in_channels", 1, "in_chans", 1),
    (HF, "num_labels", 5, "num_classes", 5),
    (OWN, "n_classes", 5, "num_classes", 5),
    (HF, "hidden_size", 48, "embed_dim", 48),
    (TV, "hidden_dim", 48, "embed_dim", 48),
    (LUC, "dim", 48, "embed_dim", 48),
    (BV, "width", 48, "embed_dim", 48),
    (HF, "num_hidden_layers", 2, "depth", 2),
    (TV, "num_layers", 2, "depth", 2),
    (HF, "num_attention_heads", 6, "num_heads", 6),
    (LUC, "heads", 6, "num_heads", 6),
    (OWN, "n_heads", 6, "num_heads", 6),
    (HF, "intermediate_size", 48, "mlp_ratio", 2.0),
    (TV, "mlp_dim", 48, "mlp_ratio", 2.0),
    (HF, "hidden_dropout_prob", 0.1, "proj_drop_rate", 0.1),
    (LUC, "emb_dropout", 0.1, "pos_drop_rate", 0.1),
    (HF, "attention_probs_dropout_prob", 0.1, "attn_drop_rate", 0.1),
    (TV, "attention_dropout", 0.1, "attn_drop_rate", 0.1),
    (TV, "stochastic_depth_prob", 0.1, "drop_path_rate", 0.1),
    (OWN, "drop_path", 0.1, "drop_path_rate", 0.1),
    (LUC, "pool", "mean", "global_pool", "avg"),
    (LUC, "pool", "cls", "global_pool", "token"),
    (BV, "pool_type", "gap", "global_pool", "avg"),
    (BV, "pool_type", "tok", "global_pool", "token"),
    (BV, "pool_type", "map", "global_pool", "map"),
    (OWN, "cls_token", True, "class_token", True),
    (OWN, "flash_attention", True, "attn", "fused"),
    (OWN, "flash_attention", False, "attn", "eager"),
    (HF, "attn_implementation", "sdpa", "attn", "fused"),
    (HF, "attn_implementation", "eager", "attn", "eager"),
]


@pytest.mark.parametrize(("library", "word", "value", "ours", "meant"), SPELLED)
def test_every_spelling_is_taken_everywhere(library: str, word: str, value: Any, ours: str, meant: Any) -> None:
    given = {name: v for name, v in SMALL.items() if name != ours} | {word: value}
    with torch.device("meta"):
        made = [ViTConfig(**given), VisionTransformer(**given).config, build_model("vit_debug", **given).config]
    assert [getattr(config, ours) for config in made] == [meant] * 3, library


@pytest.mark.parametrize("word", [w for w in MODEL_SPELLINGS if MODEL_SPELLINGS[w] in SMALL])
def test_both_spellings_at_once_is_an_error_that_names_both(word: str) -> None:
    ours = MODEL_SPELLINGS[word]
    with pytest.raises(
        TypeError, match=f"ViTConfig takes one spelling of {ours}; got both {ours} and {word}: drop one"
    ):
        ViTConfig(**SMALL, **{word: SMALL[ours]})


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (dict(dim=24, hidden_size=24), "takes one spelling of embed_dim; got both dim and hidden_size: drop one"),
        (
            dict(mlp_dim=48, mlp_ratio=2),
            "one spelling of mlp_ratio is enough; got both mlp_dim and mlp_ratio: drop one",
        ),
        (
            dict(intermediate_size=48, mlp_dim=48),
            "of mlp_ratio is enough; got both mlp_dim and intermediate_size: drop",
        ),
        (dict(flash_attention=True, attn="auto"), "of attn is enough; got both flash_attention and attn: drop one"),
        (dict(embed_dims=24), "ViTConfig has no argument 'embed_dims'; the nearest is embed_dim"),
        (dict(num_head=3), "ViTConfig has no argument 'num_head'; the nearest is num_heads"),
    ],
)
def test_wrong_words_are_type_errors_that_name_the_right_one(given: dict[str, Any], message: str) -> None:
    for make in (ViTConfig, VisionTransformer):
        with pytest.raises(TypeError, match=message):
            make(**given)
    with pytest.raises(TypeError, match=message):
        build_model("vit_debug", **given)


def test_every_spelling_leads_to_a_field_of_some_family() -> None:
    known = {f.name for family in FAMILIES.values() for f in fields(family.config)}
    assert {*MODEL_SPELLINGS.values(), *AMBIGUOUS.values()} <= known
    assert not set(MODEL_SPELLINGS) & {f.name for f in fields(ViTConfig)}


def test_an_ambiguous_word_says_what_it_was_taken_for_and_where() -> None:
    with pytest.warns(UserWarning, match="ViTConfig: dropout is taken for proj_drop_rate") as caught:
        config = ViTConfig(dropout=0.1)
    assert config.proj_drop_rate == 0.1
    assert caught[0].filename == __file__
    with (
        pytest.warns(UserWarning, match="dropout is taken for"),
        pytest.raises(TypeError, match="both dropout and proj_"),
    ):
        ViTConfig(dropout=0.1, proj_drop_rate=0.1)


@pytest.mark.parametrize(
    ("given", "ratio"),
    [
        (dict(mlp_dim=1536), 2.0),
        (dict(mlp_dim=384, dim=192), 2.0),
        (dict(hidden_size=192, intermediate_size=192), 1.0),
        (dict(mlp_dim=100, embed_dim=96), 100 / 96),
    ],
)
def test_a_hidden_width_becomes_a_ratio_of_the_width(given: dict[str, Any], ratio: float) -> None:
    config = ViTConfig(**given)
    assert config.mlp_ratio == ratio
    assert int(config.embed_dim * config.mlp_ratio) == given.get("mlp_dim", given.get("intermediate_size"))


def test_a_hidden_width_is_a_ratio_of_the_rows_own_width() -> None:
    model = build_model("vit_debug", mlp_dim=96)
    assert model.config.mlp_ratio == 2.0
    assert model.blocks[0].mlp.fc1.out_features == 96


def test_spelled_knows_no_more_than_the_fields() -> None:
    assert spelled(ViTConfig, dict(heads=3, pool="mean")) == dict(num_heads=3, global_pool="avg")
    assert list(inspect.signature(ViTConfig).parameters) == [f.name for f in fields(ViTConfig)]


@pytest.mark.parametrize(("name", "message"), [
    ("vit_b_16", "there is no model 'vit_b_16'; torchvision's vit_b_16 is vit_base_patch16_224 here$"),
    ("swin_t", "torchvision's swin_t is swin_tiny_patch4_window7_224 here$"),
    ("google/vit-base-patch16-224",
     r"; a repository of the hub is opened by create_model\('hf-hub:google/vit-base-patch16-224', pretrained=True\)$"),
])  # fmt: skip
def test_a_name_from_elsewhere_says_what_it_is_here(name: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build_model(name)


@pytest.mark.parametrize("row", TORCHVISION)
def test_torchvisions_names_are_of_rows(row: str) -> None:
    assert row in ROWS


@pytest.mark.parametrize(("word", "message"), [
    ("dynamic_img_size", "has no argument 'dynamic_img_size'; leave it out: images of other sizes are always"),
    ("checkpoint_path", r"leave it out: load_weights\(model, path\) puts a file's weights into a network$"),
    ("features_only", r"leave it out: model.features\(images\) gives the features of any network$"),
    ("pretrained_cfg", "leave it out: model.preprocess says how images are prepared, and can be set$"),
])  # fmt: skip
def test_arguments_of_timm_that_are_something_else_here_say_what(word: str, message: str) -> None:
    with pytest.raises(TypeError, match=message):
        build_model("vit_debug", **{word: True})
