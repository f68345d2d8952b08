"""Images in any form become the same pixels; heat lies where it belongs."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st
from PIL import Image

from vitrail.draw.pictures import head_grid, layer_row, overlay, patch_picture, sheet, to_picture

RAMP = torch.arange(3 * 4 * 5, dtype=torch.uint8).view(3, 4, 5)


def test_a_tensor_a_file_and_a_pil_image_give_the_same_pixels(tmp_path):
    expected = RAMP.permute(1, 2, 0).numpy()
    Image.fromarray(expected).save(tmp_path / "a.png")
    for image in (RAMP, RAMP.double() / 255, Image.fromarray(expected), tmp_path / "a.png", str(tmp_path / "a.png")):
        picture = to_picture(image)
        assert picture.dtype == np.uint8
        assert np.array_equal(picture, expected)


@pytest.mark.parametrize("bands", [1, 2])
def test_one_or_two_channels_are_grey(bands):
    assert np.array_equal(to_picture(RAMP[:bands]), RAMP[:1].expand(3, 4, 5).permute(1, 2, 0).numpy())


def test_many_bands_show_their_first_three():
    assert np.array_equal(to_picture(torch.cat([RAMP, RAMP])), to_picture(RAMP))


def test_transparent_places_are_white():
    assert to_picture(Image.new("RGBA", (2, 2), (200, 0, 0, 0))).min() == 255


def test_sixteen_bit_grey_is_scaled_and_not_cut_off():
    image = Image.fromarray(np.array([[0, 32768, 65535]], dtype=np.uint16))
    assert to_picture(image)[0, :, 0].tolist() == [0, 128, 255]


def test_a_turned_photograph_stands_upright(tmp_path):
    image = Image.new("RGB", (6, 2))
    exif = image.getexif()
    exif[0x0112] = 6
    image.save(tmp_path / "a.jpg", exif=exif)
    assert to_picture(tmp_path / "a.jpg").shape == (6, 2, 3)


@pytest.mark.parametrize(
    ("image", "words"),
    [
        (torch.randn(3, 4, 4) * 9, r"must lie in \[0, 1\].*preprocess\.denormalise"),
        (torch.full((3, 4, 4), float("nan")), r"must lie in \[0, 1\]; got nan"),
        (torch.zeros(1, 3, 4, 4), r"is \(C, H, W\); got shape \(1, 3, 4, 4\): give list"),
        (torch.zeros(3, 4, 4, dtype=torch.int64), r"must be uint8 or float; got torch\.int64"),
        (17, "a path, a Pillow picture, a tensor or an array; got int"),
    ],
)
def test_what_is_no_image_is_named(image, words):
    with pytest.raises(ValueError, match=words):
        to_picture(image)


def test_a_file_that_is_no_image_is_named(tmp_path):
    (tmp_path / "a.jpg").write_text("words")
    with pytest.raises(ValueError, match=r"a\.jpg: not a readable image; one of JPEG, PNG"):
        to_picture(tmp_path / "a.jpg")


def test_heat_lies_in_its_own_corner_and_is_scaled_to_its_range():
    heat = torch.full((4, 4), 5.0)
    heat[0, 3] = 5.5
    seen = np.asarray(overlay(torch.zeros(3, 16, 16), heat, alpha=1.0)).sum(2)
    assert seen[0, 15] == seen.max() > 600
    assert seen[15, 0] < 10


def test_alpha_nought_is_the_image():
    heat = torch.eye(4)
    image = Image.fromarray(RAMP.permute(1, 2, 0).numpy())
    assert np.array_equal(np.asarray(overlay(image, heat, alpha=0.0)), to_picture(image))
    assert np.asarray(overlay(torch.ones(3, 16, 16), heat, alpha=0.8))[0, 15].max() < 60


def test_flat_heat_is_one_colour():
    assert len(np.unique(np.asarray(overlay(torch.zeros(3, 8, 8), torch.ones(2, 2))).reshape(-1, 3), axis=0)) == 1


@settings(max_examples=25, deadline=None)
@given(
    size=st.tuples(st.integers(1, 40), st.integers(1, 40)),
    grid=st.tuples(st.integers(1, 9), st.integers(1, 9)),
    wanted=st.none() | st.tuples(st.integers(1, 50), st.integers(1, 50)),
)
def test_an_overlay_has_the_size_of_the_image_or_the_size_asked_for(size, grid, wanted):
    picture = overlay(torch.rand(3, *size), torch.rand(*grid), size=wanted)
    assert (picture.height, picture.width) == (wanted or size)


@pytest.mark.parametrize(
    ("heat", "options", "words"),
    [
        (torch.rand(1, 2, 2), {}, r"heat must be \(h, w\).*got shape \(1, 2, 2\)"),
        (torch.full((2, 2), float("nan")), {}, "heat must be finite"),
        (torch.rand(2, 2), {"alpha": 1.5}, r"alpha must lie in \[0, 1\]; got 1\.5"),
        (torch.rand(2, 2), {"cmap": "infrno"}, "got 'infrno', near inferno"),
    ],
)
def test_wrong_heat_and_options_are_named(heat, options, words):
    with pytest.raises(ValueError, match=words):
        overlay(torch.rand(3, 8, 8), heat, **options)


def titles(drawing) -> list[str]:
    return [axes.get_title() for axes in drawing.axes if axes.get_title()]


def shape(drawing) -> tuple[int, int]:
    grid = drawing.axes[0].get_subplotspec().get_gridspec()
    return grid.nrows, grid.ncols


def test_a_head_grid_numbers_every_head():
    drawing = head_grid(RAMP, torch.rand(5, 2, 2), title="attention, layer $_{", caption="cat")
    assert titles(drawing) == ["cat", *(f"head {i}" for i in range(5))]
    assert drawing.get_suptitle() == "attention, layer $_{"
    assert titles(head_grid(RAMP, torch.rand(3, 2, 2), columns=2)) == ["image", "head 0", "head 1", "image", "head 2"]


@pytest.mark.parametrize(
    ("heads", "rows", "columns"),
    [(1, 1, 1), (2, 1, 2), (3, 1, 3), (4, 1, 4), (5, 1, 5), (6, 2, 3), (7, 2, 4), (12, 3, 4), (13, 3, 5), (16, 4, 4)],
)
def test_the_image_has_a_column_of_its_own_and_rows_of_heads_are_even(heads, rows, columns):
    drawing = head_grid(RAMP, torch.rand(heads, 2, 2))
    assert shape(drawing) == (rows, 1 + columns)
    *panels, _ = drawing.axes
    firsts = [axes.get_title() for axes in panels if axes.get_subplotspec().colspan.start == 0]
    assert firsts == ["image"] * rows
    assert titles(drawing).count("image") == rows


@pytest.mark.parametrize("heads", range(2, 60))
def test_no_head_stands_alone_in_a_row(heads, monkeypatch):
    rows: list[int] = []
    monkeypatch.setattr("vitrail.draw.pictures.layer_row", lambda *_, columns, **__: rows.append(columns))
    head_grid(RAMP, torch.rand(heads, 2, 2))
    assert 2 <= rows[0] <= 6
    assert heads % rows[0] != 1


def test_a_map_stands_over_its_lowest_and_highest_value():
    maps = [torch.tensor([[1e-9, 0.2345]]), torch.tensor([[-61.0, 3456.0]]), torch.zeros(2, 2)]
    drawing = layer_row(RAMP, maps, ["a", "b", "c"])
    below = [axes.get_xlabel() for axes in drawing.axes]
    assert below == ["", "0 … 0.23", "-100 … 3500", "0 … 0", "dark: the lowest value of a panel   light: its highest"]


def test_the_values_stand_under_their_own_map_in_every_row():
    drawing = layer_row(RAMP, [torch.full((1, 1), float(n)) for n in range(5)], list("abcde"), columns=2)
    below = {axes.get_title(): axes.get_xlabel() for axes in drawing.axes if axes.get_title() not in ("", "image")}
    assert below == {name: f"{n} … {n}" for n, name in enumerate("abcde")}


def test_the_scale_has_the_colours_of_the_panels():
    drawing = layer_row(RAMP, [torch.rand(2, 2)], ["a"], cmap="magma")
    assert "magma" in {part.get_cmap().name for part in drawing.axes[-1].collections}


def test_a_layer_row_is_one_row_and_takes_maps_of_any_size():
    drawing = layer_row(RAMP, [torch.rand(2, 2), torch.rand(7, 3)], ["layer 2", "$layer_{"])
    assert titles(drawing) == ["image", "layer 2", "$layer_{"]
    assert shape(drawing) == (1, 3)
    drawing._repr_png_()  # a caption is never read as a formula


def test_layers_in_several_rows_each_begin_with_the_image():
    drawing = layer_row(RAMP, [torch.rand(2, 2)] * 5, list("abcde"), columns=2, caption="cat")
    assert titles(drawing) == ["cat", "a", "b", "cat", "c", "d", "cat", "e"]
    assert shape(drawing) == (3, 3)
    with pytest.raises(ValueError, match="columns must be at least 1; got 0"):
        layer_row(RAMP, [torch.rand(2, 2)], ["a"], columns=0)
    assert shape(layer_row(RAMP, [torch.rand(2, 2)] * 2, ["a", "b"], columns=12)) == (1, 3)


def test_panels_that_do_not_fit_together_are_named():
    with pytest.raises(ValueError, match="every map needs one title; got 1 maps and 0 titles"):
        layer_row(RAMP, [torch.rand(2, 2)], [])
    with pytest.raises(ValueError, match=r"\(heads, h, w\).*got shape \(2, 2\)"):
        head_grid(RAMP, torch.rand(2, 2))
    with pytest.raises(ValueError, match="every image needs one caption; got 2 images and 1 captions"):
        sheet([RAMP, RAMP], ["a"])
    with pytest.raises(ValueError, match="at least one image"):
        sheet([])
    with pytest.raises(ValueError, match="columns must be at least 1; got 0"):
        sheet([RAMP], columns=0)


def test_a_sheet_has_rows_of_the_columns_asked_for():
    assert shape(sheet([RAMP] * 5, columns=3)) == (2, 3)


def test_patches_are_numbered_in_reading_order_and_hold_their_pixels():
    image = torch.randint(0, 250, (3, 8, 12), dtype=torch.uint8)
    right = patch_picture(image, 4).axes[1]
    assert [text.get_text() for text in right.texts] == [str(i) for i in range(6)]
    x, y = right.texts[4].get_position()
    shown = np.asarray(right.images[0].get_array())
    assert shown[int(y), int(x)].tolist() == image[:, 4, 4].tolist()  # patch 4: second row, second column
    assert right.get_title() == "2 x 3 = 6 patches of 4 x 4"


def test_pixels_outside_whole_patches_are_cut_and_said():
    drawing = patch_picture(torch.zeros(3, 9, 13), (4, 6))
    assert drawing.axes[0].get_title() == "8 x 12 pixels, cut from 9 x 13"
    assert drawing.axes[1].get_title() == "2 x 2 = 4 patches of 4 x 6"


def test_numbers_too_small_to_read_are_left_out():
    assert not patch_picture(torch.zeros(3, 64, 64), 1).axes[1].texts


@pytest.mark.parametrize("size", [0, 5, (2, 9)])
def test_a_patch_that_does_not_fit_is_named(size):
    with pytest.raises(ValueError, match="fit into the image of 4 x 5 pixels; got"):
        patch_picture(RAMP, size)
