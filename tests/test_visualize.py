"""Attention as pictures: the right maps, in the right order, under the right names."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor
from torch.testing import assert_close

from vitrail.draw.canvas import Canvas
from vitrail.draw.pictures import overlay
from vitrail.explain.choice import NoAttentionError
from vitrail.explain.maps import METHODS, Explained, rollout
from vitrail.explain.record import AttentionMap, record_attention
from vitrail.images import read_image
from vitrail.models.backbone import Backbone
from vitrail.models.registry import build_model
from vitrail.predict import Predictor
from vitrail.records import Explanation, Preprocess
from vitrail.visualize import AttentionMaps, AttentionVisualizer, visualize_patch_embedding

DEPTH, HEADS = 3, 3


def vit(**fields: Any) -> Backbone:
    """A model whose attention differs from place to place, which fresh weights hardly do."""
    torch.manual_seed(0)
    model = build_model("vit_debug", **fields).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.2)
    model.classes = tuple("abcdefghij")
    return model


@pytest.fixture(scope="module")
def model() -> Backbone:
    return vit()


@pytest.fixture
def visualizer(model: Backbone) -> AttentionVisualizer:
    return AttentionVisualizer(model, device="cpu")


@pytest.fixture(scope="module")
def photo(photos: Path) -> Path:
    return photos / "bright" / "0.png"


def seen(model: Backbone, photo: Path) -> list[Tensor]:
    """(heads, N, N) of every layer."""
    with record_attention() as record, torch.no_grad():
        model(model.preprocess.normalise(read_image(photo))[None])
    return [found.weights[0] for found in record.maps]


def titles(figure: Canvas) -> list[str]:
    """Lines of a title that was wrapped are joined."""
    return [axes.get_title().replace("\n", " ") for axes in figure.axes if axes.get_title()]


def answer(visualizer: AttentionVisualizer, photo: Path) -> str:
    return str(visualizer.predictor.predict(photo))


def size_of(path: Path) -> tuple[int, int]:
    with Image.open(path) as picture:
        assert picture.format == "PNG"
        return picture.size


# ---- maps


@pytest.mark.parametrize(("heads", "fuse"), [
    ("mean", lambda rows: rows.mean(0)),
    ("max", lambda rows: rows.amax(0)),
    ("min", lambda rows: rows.amin(0)),
    (0, lambda rows: rows[0]),
    ("2", lambda rows: rows[2]),
])  # fmt: skip
def test_maps_are_the_rows_of_the_class_token(heads, fuse, model: Backbone, visualizer, photo: Path):
    maps = visualizer.generate_attention_maps(photo, heads=heads)
    assert [(m.layer, m.heads, m.method) for m in maps] == [(n, str(heads), "attention") for n in (1, 2, 3)]
    for found, weights in zip(maps, seen(model, photo), strict=True):
        assert_close(found.heat, fuse(weights[:, 0, 1:]).view(4, 4))


def test_all_heads_of_the_layers_that_are_named(model: Backbone, visualizer, photo: Path):
    maps = visualizer.generate_attention_maps(photo, layers=[3, 1], heads="all")
    assert [(m.layer, m.heads) for m in maps] == [(layer, str(head)) for layer in (3, 1) for head in range(HEADS)]
    weights = seen(model, photo)
    for found in maps:
        assert_close(found.heat, weights[found.layer - 1][int(found.heads), 0, 1:].view(4, 4))


def test_maps_are_a_sequence_beside_the_picture(visualizer, photo: Path):
    maps = visualizer.generate_attention_maps(photo, layers=[2])
    assert isinstance(maps, AttentionMaps)
    assert (len(maps), maps[0], list(maps)) == (1, maps.maps[0], list(maps.maps))
    assert torch.equal(maps.picture, read_image(photo))


@pytest.mark.parametrize(("fields", "layers"), [
    (dict(class_token=False, global_pool="avg"), [1, 2, 3]),
    (dict(class_token=False, global_pool="map"), [1, 2, 3]),
    (dict(reg_tokens=2), [1, 2, 3]),
])  # fmt: skip
def test_models_of_other_tokens(fields: dict[str, Any], layers: list[int], photo: Path):
    model = vit(**fields)
    maps = AttentionVisualizer(model, device="cpu").generate_attention_maps(photo, layers)
    for found, weights in zip(maps, seen(model, photo), strict=False):
        rows = weights.mean(0)
        wanted = rows.mean(0) if not model.config.class_token else rows[0, 3:]
        assert_close(found.heat, wanted.view(4, 4))


@pytest.mark.parametrize(("choice", "message"), [
    (dict(layers=[2, 4]), r"layers must lie in 1 … 3, .*; got \[4\]"),
    (dict(layers=[0]), "layers must be numbers from 1"),
    (dict(heads=3), r"heads must lie in 0 … 2 at layer 1, which has 3 heads; got \[3\]"),
    (dict(heads="-1"), r"which has 3 heads; got \[-1\]"),
    (dict(heads="middle"), "heads must be mean, max, min, all or a head's number from 0; got 'middle'"),
    (dict(heads=1.0), "or a head's number from 0; got 1.0"),
    (dict(layers="2"), "layers must be numbers from 1, or None for all; got '2'"),
    (dict(layers=[2.0]), r"layers must be numbers from 1, or None for all; got \[2.0\]"),
])  # fmt: skip
def test_what_is_not_there_is_refused(choice: dict[str, Any], message: str, visualizer, photo: Path):
    with pytest.raises(ValueError, match=message):
        visualizer.generate_attention_maps(photo, **choice)


def test_a_network_without_attention_says_so(photo: Path):
    with pytest.raises(NoAttentionError, match="this network has none, as ResNet and ConvNeXt"):
        AttentionVisualizer(build_model("resnet_debug"), device="cpu").generate_attention_maps(photo)


# ---- pictures


def test_layers_in_a_row(visualizer, photo: Path, tmp_path: Path):
    maps = visualizer.generate_attention_maps(photo, layers=[3, 1])
    figure = visualizer.plot_attention_maps(maps, save_path=tmp_path / "new" / "row.png")
    assert titles(figure) == [answer(visualizer, photo), "layer 3, mean of heads", "layer 1, mean of heads"]
    assert [axes.get_xlabel() for axes in figure.axes[1:3]] == [
        f"{m.heat.min():.2g} … {m.heat.max():.2g}" for m in maps
    ]
    width, height = size_of(tmp_path / "new" / "row.png")
    assert width > 2 * height > 500
    assert titles(visualizer.plot_attention_maps(visualizer.generate_attention_maps(photo, 2, 1))) == [
        answer(visualizer, photo), "layer 2, head 1",
    ]  # fmt: skip


@pytest.mark.parametrize("layer", range(-DEPTH, DEPTH))
def test_one_layer_is_counted_from_0_or_from_the_end(layer: int, visualizer, photo: Path, monkeypatch):
    shown: list[AttentionMaps] = []
    monkeypatch.setattr(visualizer, "plot_attention_maps", lambda maps, path: shown.append(maps))
    visualizer.visualize_attention(photo, layer_idx=layer)
    assert [(m.layer, m.heads) for m in shown[0]] == [(layer % DEPTH + 1, str(head)) for head in range(HEADS)]


def test_heads_as_a_grid_or_one_of_them(visualizer, photo: Path, tmp_path: Path):
    path = tmp_path / "heads.png"
    said = answer(visualizer, photo)
    figure = visualizer.visualize_attention(photo, save_path=path)
    assert titles(figure) == [said, "head 0", "head 1", "head 2"]
    assert figure.get_suptitle() == "attention, layer 3"
    assert min(size_of(path)) > 200
    assert titles(visualizer.visualize_attention(photo, 0, head_idx=2)) == [said, "layer 1, head 2"]


@pytest.mark.parametrize(("place", "message"), [
    (dict(layer_idx=3), "layer_idx must lie in -3 … 2: the model has a depth of 3 attention layers; got 3"),
    (dict(layer_idx=-4), "depth of 3 attention layers; got -4"),
    (dict(layer_idx="a"), "layer_idx must lie in -3 … 2: .*; got 'a'"),
    (dict(layer_idx=1.0), "layer_idx must lie in -3 … 2: .*; got 1.0"),
    (dict(layer_idx=True), "layer_idx must lie in -3 … 2: .*; got True"),
    (dict(head_idx=True), "or a head's number from 0; got True"),
    (dict(head_idx=3), r"heads must lie in 0 … 2 at layer 3, which has 3 heads; got \[3\]"),
    (dict(head_idx=-1), r"heads must lie in 0 … 2 at layer 3, which has 3 heads; got \[-1\]"),
])  # fmt: skip
def test_a_layer_or_head_that_is_not_there(place: dict[str, int], message: str, visualizer, photo: Path):
    with pytest.raises(ValueError, match=message):
        visualizer.visualize_attention(photo, **place)


def test_rollout_beside_the_picture_and_the_answer(model: Backbone, visualizer, photo: Path, tmp_path, monkeypatch):
    heats: list[Tensor] = []
    monkeypatch.setattr(
        "vitrail.draw.pictures.overlay",
        lambda image, heat, **options: heats.append(heat) or overlay(image, heat, **options),
    )
    figure = visualizer.rollout(photo, fusion="max", discard=0.5, save_path=tmp_path / "rollout.png")
    assert titles(figure) == [str(Predictor(model).predict(photo)), "rollout, max of heads"]
    assert size_of(tmp_path / "rollout.png")[0] > 200
    assert [axes.images[0].get_array().shape for axes in figure.axes[:2]] == [(224, 224, 3)] * 2  # enlarged from 32
    with record_attention() as record, torch.no_grad():
        model(model.preprocess.normalise(read_image(photo))[None])
    assert_close(heats[0], rollout(record.maps, "max", 0.5)[0, 0, 1:].view(4, 4))


def test_patches(photo: Path, tmp_path: Path):
    figure = visualize_patch_embedding(photo, patch_size=8, save_path=tmp_path / "patches.png")
    assert titles(figure) == ["32 x 32 pixels", "4 x 4 = 16 patches of 8 x 8"]
    assert size_of(tmp_path / "patches.png")[0] > 500
    assert titles(visualize_patch_embedding(image=read_image(photo), patch_size=(16, 8)))[1].startswith("2 x 4 = 8 ")
    assert titles(visualize_patch_embedding(photo))[1].startswith("2 x 2 = 4 patches of 16 x 16")


# ---- files


@pytest.mark.parametrize(("options", "names"), [
    (dict(), ["0_rollout.png"]),
    (dict(heads="min"), ["0_rollout_min.png"]),
    (dict(layers=[1, 3]), ["0_rollout_layers_1_3.png"]),
    (dict(layers=2, heads="max"), ["0_rollout_layer_2_max.png"]),
    (dict(name="cat"), ["cat_rollout.png"]),
    (dict(method="attention"), ["0_attention.png"]),
    (dict(method="attention", layers=[2, 1], heads="1"), ["0_attention_layers_2_1_head_1.png"]),
    (dict(method="attention", heads=1), ["0_attention_head_1.png"]),
    (dict(method="attention", layers=[3, 1], heads="all"), ["0_layer01_heads.png", "0_layer03_heads.png"]),
])  # fmt: skip
def test_save_names_its_files(options: dict[str, Any], names: list[str], visualizer, photo: Path, tmp_path: Path):
    assert visualizer.save(str(photo), tmp_path / "out", **options) == [tmp_path / "out" / name for name in names]
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == sorted(names)


@pytest.mark.parametrize(("options", "message"), [
    (dict(method="rolout"), "method must be one of rollout, attention; got 'rolout': did you mean rollout?"),
    (dict(layers=[1, 0]), "layers must be numbers from 1, or None for all; got [1, 0]"),
    (dict(heads="all"), "rollout fuses heads by mean, max or min; got 'all': single heads are for method attention"),
])  # fmt: skip
def test_save_refuses(options: dict[str, Any], message: str, visualizer, photo: Path, tmp_path: Path):
    with pytest.raises(ValueError) as error:
        visualizer.save(photo, tmp_path / "out", **options)
    assert str(error.value) == message
    assert not (tmp_path / "out").exists()


def test_heads_of_many_layers_are_a_grid(visualizer, photo: Path):
    maps = visualizer.generate_attention_maps(photo, heads="all")
    figure = visualizer.plot_attention_maps(maps)
    said = answer(visualizer, photo)
    rows = [[said, *(f"layer {layer}, head {head}" for head in range(HEADS))] for layer in (1, 2, 3)]
    assert titles(figure) == [title for row in rows for title in row]
    grid = figure.axes[0].get_subplotspec().get_gridspec()
    assert (grid.nrows, grid.ncols) == (DEPTH, 1 + HEADS)


def test_many_layers_are_wrapped(visualizer, photo: Path):
    found = visualizer.generate_attention_maps(photo, [1])
    maps = AttentionMaps(found.picture, tuple(replace(found[0], layer=n) for n in range(1, 25)))
    grid = visualizer.plot_attention_maps(maps).axes[0].get_subplotspec().get_gridspec()
    assert (grid.nrows, grid.ncols) == (2, 13)


def test_rollout_to_some_layers(visualizer, photo: Path):
    maps = visualizer.explain(photo, layers=[3, 1])
    assert titles(visualizer.plot_attention_maps(maps)) == [
        answer(visualizer, photo), "rollout, layers 1-3, mean of heads", "rollout, layer 1, mean of heads",
    ]  # fmt: skip


def test_a_new_method_is_drawn_and_saved_too(visualizer, photo: Path, tmp_path: Path, monkeypatch):
    """It stands in one table, and nowhere else."""

    def by_colour(model, batch, asked):
        return Explained([Explanation(method="colour", heat=batch[0].mean(0))], model(batch))

    monkeypatch.setitem(METHODS, "colour", by_colour)
    assert visualizer.save(photo, tmp_path, method="colour") == [tmp_path / "0_colour.png"]


def test_pictures_of_other_layers_and_heads_have_other_names(visualizer, photo: Path, tmp_path: Path):
    asked = [
        dict(method=method, layers=layers, heads=heads)
        for method, fusions in (("rollout", ("mean", "max")), ("attention", ("mean", "max", 0, 1)))
        for layers in (None, [1], [2], [1, 2], [2, 1])
        for heads in fusions
    ]
    written = [path for options in asked for path in visualizer.save(photo, tmp_path, **options)]
    grids = visualizer.save(photo, tmp_path, method="attention", heads="all")
    assert len({*written, *grids}) == len(asked) + DEPTH


@pytest.mark.parametrize("foreign", [False, True])
def test_a_network_that_gives_no_answer_has_its_pictures(foreign: bool, photo: Path):
    """Features are no logits."""
    model = vit(num_classes=0)
    model.classes = ()
    if foreign:
        timm = pytest.importorskip("timm")
        shape = dict(img_size=32, patch_size=8, embed_dim=48, depth=2, num_heads=3, num_classes=0)
        model = timm.models.vision_transformer.VisionTransformer(**shape)
    visualizer = AttentionVisualizer(model, preprocess=Preprocess(img_size=(32, 32)), device="cpu")
    assert titles(visualizer.rollout(photo))[0] == "image"
    assert visualizer.generate_attention_maps(photo).caption == "image"


def test_a_network_whose_output_is_no_tensor_has_its_pictures(model: Backbone, visualizer, photo: Path, monkeypatch):
    found = METHODS["rollout"]
    monkeypatch.setitem(METHODS, "rollout", lambda *given: found(*given)._replace(output={"logits": None}))
    assert visualizer.explain(photo).caption == "image"


# ---- models of every kind


def test_attention_pooling_is_a_layer_too(photo: Path):
    model = vit(class_token=False, global_pool="map")
    visualizer = AttentionVisualizer(model, device="cpu")
    maps = visualizer.generate_attention_maps(photo)
    assert [m.layer for m in maps] == [1, 2, 3, 4]
    for found, weights in zip(maps, seen(model, photo), strict=True):
        assert_close(found.heat, weights.mean((0, 1)).view(4, 4))
    assert titles(visualizer.visualize_attention(photo, 3))[1:] == ["head 0", "head 1", "head 2"]
    assert len(titles(visualizer.rollout(photo))) == 2


def test_only_what_is_shown_is_recorded(visualizer, photo: Path, monkeypatch):
    shapes: list[tuple[int, ...]] = []
    monkeypatch.setattr(
        "vitrail.explain.record.AttentionMap", lambda w, *rest: shapes.append(w.shape) or AttentionMap(w, *rest)
    )
    visualizer.visualize_attention(photo, -1, head_idx=1)
    visualizer.generate_attention_maps(photo, [2], heads="all")
    assert set(shapes) == {(1, 1, 1, 17), (1, 3, 1, 17)} and len(shapes) == 3  # one to count the layers


def test_a_network_stays_where_it_is(photo: Path, monkeypatch):
    """Even if there is a better device."""
    moved: list[str] = []
    monkeypatch.setattr("vitrail.predict.pick_device", lambda name: moved.append(name) or torch.device("cpu"))
    model = vit()
    AttentionVisualizer(model).generate_attention_maps(photo)
    assert moved == []
    AttentionVisualizer(model, device="auto")
    AttentionVisualizer("bloodcells")
    assert moved == ["auto", "auto"]


def test_a_model_a_folder_or_a_predictor(model: Backbone, photo: Path, tmp_path: Path):
    model.save_pretrained(tmp_path / "model")
    predictor = Predictor(model)
    kinds = [model, predictor, tmp_path / "model", str(tmp_path)]
    heats = [AttentionVisualizer(kind, device="cpu").generate_attention_maps(photo, [2])[0].heat for kind in kinds]
    assert all(torch.equal(heat, heats[0]) for heat in heats)
    assert AttentionVisualizer(predictor).predictor is predictor


def test_a_foreign_model_with_its_preprocessing(photo: Path):
    timm = pytest.importorskip("timm")
    foreign = timm.models.vision_transformer.VisionTransformer(
        img_size=32, patch_size=8, embed_dim=48, depth=2, num_heads=3, num_classes=5
    )
    visualizer = AttentionVisualizer(foreign, preprocess=Preprocess(img_size=(32, 32)), device="cpu")
    maps = visualizer.generate_attention_maps(photo, heads="all")
    assert [(m.layer, m.heat.shape) for m in maps] == [(n, (4, 4)) for n in (1, 1, 1, 2, 2, 2)]
    assert titles(visualizer.rollout(photo))[0].startswith("class ")
    with pytest.raises(ValueError, match="needs its preprocess"):
        AttentionVisualizer(foreign)


def test_the_model_is_left_as_it_was(photo: Path):
    model = vit().train()
    AttentionVisualizer(model, device="cpu").visualize_attention(photo)
    assert all(part.training for part in model.modules())
    assert not any(part._forward_hooks for part in model.modules())


def test_an_image_is_cut_as_the_network_sees_it(visualizer, tmp_path: Path, monkeypatch):
    Image.linear_gradient("L").resize((120, 60)).save(tmp_path / "wide.png")
    maps = visualizer.generate_attention_maps(tmp_path / "wide.png")
    assert maps.picture.shape == (3, 32, 32)
    said = f"{answer(visualizer, tmp_path / 'wide.png')} (centre 60 x 60 of 60 x 120 pixels seen)"
    assert maps.caption == said
    assert titles(visualizer.visualize_attention(tmp_path / "wide.png"))[0] == said
    shown: list[AttentionMaps] = []
    monkeypatch.setattr(visualizer, "plot_attention_maps", lambda maps, path: shown.append(maps))
    visualizer.save(tmp_path / "wide.png", tmp_path, method="attention", heads="all")
    assert [maps.caption for maps in shown] == [said] * DEPTH
