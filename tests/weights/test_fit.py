"""Weights of one size for a network of another: what fits is the very tensor, what is resized is as the papers say."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from vitrail.layers.embed import resize_relative_bias
from vitrail.models.backbone import Backbone, PositionTable
from vitrail.models.registry import build_model
from vitrail.records import Preprocess
from vitrail.weights.fit import Report, fitted, guessed_table, pixels, put, resize_patches, resized
from vitrail.weights.load import load_weights
from vitrail.weights.read import CheckpointError

KERNEL = "patch_embed.proj.weight"


def fit(model: Backbone, state: dict[str, Any], **options: Any) -> tuple[dict[str, torch.Tensor], Report]:
    report = Report()
    return fitted("here", model, state, report, **options), report


@pytest.mark.fault(11)
def test_what_has_its_size_is_the_very_tensor(shop: Any):
    state = shop.state()
    made, report = fit(shop.network(), state, bands=("red", "green", "blue"))
    assert all(made[name] is state[name] for name in state) and set(made) == set(state)
    assert report.resized == [] and report.taken == len(state)


@pytest.mark.fault(11)
def test_whatever_is_resized_is_reported_once(shop: Any):
    state = shop.state()
    made, report = fit(shop.network(img_size=48, patch_size=12, in_chans=1), state)
    assert report.resized == [f"{KERNEL} (12, 3, 8, 8) -> (12, 1, 12, 12)"]
    assert all(made[name] is state[name] for name in state if name != KERNEL)
    made, report = fit(shop.network(img_size=64), state)
    assert report.resized == ["pos_embed (1, 17, 12) -> (1, 65, 12)"]


def test_nothing_is_changed_by_what_does_not_fit(shop: Any):
    model, state = shop.network(), shop.state()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(
        CheckpointError, match=r"^here: weights must fit the network exactly; missing: norm\.bias; extra: x"
    ):
        fit(model, {name: value for name, value in state.items() if name != "norm.bias"} | {"x": torch.zeros(1)})
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    put(model, state)
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())


def test_another_head_is_an_error_unless_a_new_one_is_asked_for(shop: Any):
    model, state = shop.network(num_classes=5), shop.state()
    with pytest.raises(
        CheckpointError, match=r"wrong shape: head.weight .*: load_weights\(model, path, new_head=True\) leaves a"
    ):
        fit(model, state)
    made, report = fit(model, state, new_head=True)
    assert sorted(report.left) == sorted(report.unused) == ["head.bias", "head.weight"] and "head.bias" not in made


def test_a_message_is_of_a_length_to_be_read_and_shows_no_control_characters(shop: Any):
    many = {f"{'x' * 1000}{number}\x1b[2J": torch.zeros(1) for number in range(1000)}
    with pytest.raises(CheckpointError, match="and 990 more") as told:
        fit(shop.network(), shop.state() | many)
    assert len(str(told.value)) < 1500 and str(told.value).isprintable()


# ---- positions


def test_positions_without_a_square_grid_are_an_error_and_known_ones_are_not(shop: Any):
    wide, state = shop.network(img_size=(32, 64)), shop.state(img_size=(16, 48))
    with pytest.raises(CheckpointError, match=r"^here: .*wrong shape: pos_embed \(1, 13, 12\) for \(1, 33, 12\)"):
        fit(wide, state)
    made, _ = fit(wide, state, tables={"pos_embed": PositionTable((2, 6), 1)})
    assert made["pos_embed"].shape == (1, 33, 12)


def test_equal_numbers_of_rows_in_another_grid_are_resized_where_the_grid_is_known(shop: Any):
    wide, state = shop.network(img_size=(16, 64)), shop.state()
    assert fit(wide, state)[0]["pos_embed"] is state["pos_embed"]
    made, report = fit(wide, state, tables={"pos_embed": PositionTable((4, 4), 1)})
    assert not torch.equal(made["pos_embed"], state["pos_embed"]) and len(report.resized) == 1


def test_what_is_said_of_a_table_counts_only_where_it_fits_the_table(shop: Any):
    for said in (PositionTable((9, 9), 1), PositionTable((4, 4), 0)):
        made, _ = fit(shop.network(img_size=64), shop.state(), tables={"pos_embed": said})
        assert made["pos_embed"].shape == (1, 65, 12)


@pytest.mark.fault(11)
@pytest.mark.parametrize(("old", "new"), [(3, 5), (7, 12), (8, 4)])
def test_tables_of_relative_positions_are_resized_by_their_offsets(old: int, new: int):
    table = torch.randn((2 * old - 1) ** 2, 4)
    like = PositionTable((new, new), relative=True)
    guess = guessed_table(table, like)
    assert guess is not None and guess.grid == (old, old)
    made = resized(table, guess, like)
    image = table.T.reshape(1, 4, 2 * old - 1, 2 * old - 1)
    expected = F.interpolate(image, size=(2 * new - 1, 2 * new - 1), mode="bicubic").reshape(4, -1).T
    assert torch.allclose(made, expected, atol=1e-6)
    assert torch.equal(made, resize_relative_bias(table, (old, old), (new, new)))
    middle = made.view(2 * new - 1, 2 * new - 1, 4)[new - 1, new - 1]
    assert torch.allclose(middle, table.view(2 * old - 1, 2 * old - 1, 4)[old - 1, old - 1], atol=1e-5)
    assert resized(table, guess, guess) is table
    assert guessed_table(table[:-1], like) is None


# ---- patches


@pytest.mark.parametrize(("old", "new"), [
    ((16, 16), (8, 8)), ((16, 16), (32, 32)), ((14, 14), (16, 16)), ((8, 16), (16, 8)), ((16, 16), (16, 10)),
])  # fmt: skip
def test_patch_kernels_are_timms(old: tuple[int, int], new: tuple[int, int]):
    from timm.layers.patch_embed import resample_patch_embed

    weight = torch.randn(5, 3, *old)
    theirs = resample_patch_embed(weight, list(new))
    assert (resize_patches(weight, new) - theirs).abs().max() <= 1e-5 * theirs.abs().max()


def test_an_enlarged_patch_gives_the_same_token():
    """What FlexiViT asks for (Beyer et al. 2023, section 3.4): exact where nothing of the patch is lost."""
    weight, patch = torch.randn(5, 3, 8, 8, dtype=torch.float64), torch.randn(1, 3, 8, 8, dtype=torch.float64)
    larger = F.interpolate(patch, size=(16, 12), mode="bicubic", antialias=True)
    token, other = F.conv2d(patch, weight), F.conv2d(larger, resize_patches(weight, (16, 12)))
    assert torch.allclose(token, other, atol=1e-10)


# ---- channels


def test_grey_sees_what_the_sum_of_the_three_would(shop: Any):
    state, model = shop.state(), shop.network(in_chans=1).eval()
    colour = shop.network().eval()
    put(colour, state)
    load_weights(model, shop.safetensors(state))
    grey = torch.randn(2, 1, 32, 32)
    with torch.no_grad():
        assert torch.allclose(model(grey), colour(grey.expand(-1, 3, -1, -1)), atol=1e-5)


def test_other_channels_must_be_named(shop: Any):
    for bands, message in (
        (None, r"is for 3 channels and the network takes 4: say which they are, bands="),
        (("red", "green"), "bands must name each of the 4 channels once; got red, green"),
        (("red", "red", "green", "blue"), "each of the 4 channels once"),
    ):
        with pytest.raises(CheckpointError, match=f"^here: .*{message}"):
            fit(shop.network(in_chans=4), shop.state(), bands=bands)
    with pytest.raises(CheckpointError, match="bands are for weights of red, green and blue; got 4 channels"):
        fit(shop.network(in_chans=5), shop.state(in_chans=4), bands=("red", "green", "blue", "nir", "swir"))
    with pytest.raises(ValueError, match="rest"):
        fit(shop.network(in_chans=4), shop.state(), bands=("red", "green", "blue", "nir"), rest="none")


def test_bands_are_a_sequence_that_names_a_colour(shop: Any):
    for bands, message in (
        ("rgbn", r"bands must be a sequence of names, one a channel; got the text 'rgbn': say bands=\('red'"),
        (("nir", "swir", "vv", "vh"), "bands must name red, green or blue .*; got nir, swir, vv, vh: call the nearest"),
        (
            ("red", "green", "bleu", "nir"),
            "bands have names of their own but for red, green and blue, .*; got 'bleu': "
            r"did you mean blue\?",
        ),
        (("red", "grene", "blue", "nir"), r"bands have names .*; got 'grene': did you mean green\?"),
    ):
        with pytest.raises(ValueError, match=f"^here: {message}"):
            fit(shop.network(in_chans=4), shop.state(), bands=bands)
    assert fit(shop.network(in_chans=4), shop.state(), bands=("red", "swir", "vv", "vh"))[1].bands


def test_channels_in_another_order_are_told_as_bands_and_not_as_resized(shop: Any):
    _, report = fit(shop.network(), shop.state(), bands=("blue", "green", "red"))
    assert report.resized == [] and "channels by bands blue, green, red" in report.lines()
    _, report = fit(shop.network(in_chans=4), shop.state(), bands=("nir", "blue", "green", "red"))
    assert report.resized == [f"{KERNEL} (12, 3, 8, 8) -> (12, 4, 8, 8)"]
    assert "channels by bands nir, blue, green, red, no trained kernels being for nir" in report.lines()
    _, report = fit(shop.network(), shop.state(), bands=("red", "green", "blue"))
    assert report.lines() == [f"{report.taken} tensors"]


def test_kernels_go_to_the_bands_of_their_names(shop: Any):
    state = shop.state()
    kernel = state[KERNEL]
    bands = ("NIR", "blue", " Green ", "red", "swir")
    made = {
        rest: fit(shop.network(in_chans=5), state, bands=bands, rest=rest)[0][KERNEL]
        for rest in ("mean", "zero", "random")
    }
    for found in made.values():
        assert torch.equal(found[:, 3], kernel[:, 0]) and torch.equal(found[:, 2], kernel[:, 1])
        assert torch.equal(found[:, 1], kernel[:, 2])
    assert torch.equal(made["mean"][:, 0], kernel.mean(1)) and torch.equal(made["mean"][:, 4], kernel.mean(1))
    assert made["zero"][:, [0, 4]].abs().max() == 0
    random = made["random"][:, [0, 4]]
    assert math.isclose(random.std().item(), kernel.std().item(), rel_tol=0.1)
    assert not torch.equal(random[:, 0], random[:, 1])


@pytest.mark.parametrize("rest", ["mean", "zero"])
def test_bands_in_another_order_are_kernels_in_another_order(rest: str, shop: Any):
    names = ["red", "green", "blue", "nir"]
    order = [2, 3, 0, 1]
    model, state = shop.network(in_chans=4), shop.state()
    straight = fit(model, state, bands=names, rest=rest)[0][KERNEL]
    permuted = fit(model, state, bands=[names[i] for i in order], rest=rest)[0][KERNEL]
    assert torch.equal(permuted, straight[:, order])


def test_of_bands_in_their_own_order_nothing_is_changed():
    weight, like = torch.randn(12, 3, 8, 8), torch.zeros(12, 3, 8, 8)
    assert pixels("here", KERNEL, weight, like, ("red", "green", "blue"), "zero") is weight
    swapped = pixels("here", KERNEL, weight, like, ("blue", "green", "red"), "zero")
    assert torch.equal(swapped, weight.flip(1))


def test_images_of_bands_are_prepared_by_name_and_grey_ones_as_the_network_has_it(shop: Any):
    model = shop.network(in_chans=4)
    folder = shop.place / "repo"
    folder.mkdir()
    shop.safetensors(shop.state(), "repo/model.safetensors")
    said = '{"architecture": "x", "pretrained_cfg": {"input_size": [%d, 32, 32], "mean": %s, "std": %s}}'
    (folder / "config.json").write_text(said % (3, [0.1, 0.2, 0.3], [0.4, 0.5, 0.6]))
    load_weights(model, folder, bands=("blue", "nir", "green", "red"))
    assert model.preprocess.mean == pytest.approx((0.3, 0.2, 0.2, 0.1))
    grey = shop.network(in_chans=1)
    load_weights(grey, folder)
    assert grey.preprocess.in_chans == 1
    (folder / "config.json").write_text(said % (1, [0.1], [0.4]))
    before = model.preprocess
    load_weights(model, folder, bands=("blue", "nir", "green", "red"))
    assert model.preprocess == before and isinstance(before, Preprocess)


def test_a_resnet_has_kernels_of_pixels_too():
    model, other = build_model("resnet_debug", in_chans=1), build_model("resnet_debug")
    state = {
        name: torch.randn_like(value) if value.is_floating_point() else value
        for name, value in other.state_dict().items()
    }
    made, report = fit(model, state)
    (name,) = model.pixel_weights()
    assert torch.equal(made[name], state[name].sum(1, keepdim=True)) and len(report.resized) == 1
