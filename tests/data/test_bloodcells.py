"""The shipped photographs: counts, boxes, crops, size."""

from __future__ import annotations

import time

import pytest
import torch
from PIL import Image

from vitrail.data import bloodcells as cells
from vitrail.data.bloodcells import bloodcells, bloodcells_boxes, bloodcells_samples, square_around
from vitrail.images import read_image


@pytest.fixture(scope="module")
def timed_splits():
    began = time.process_time()
    return bloodcells(), time.process_time() - began


@pytest.fixture
def splits(timed_splits):
    return timed_splits[0]


def test_the_folder_stays_small_and_says_where_it_is_from():
    assert sum(path.stat().st_size for path in cells.FOLDER.rglob("*") if path.is_file()) < 3_000_000
    assert "MIT License" in (cells.FOLDER / "LICENSE").read_text(encoding="utf-8")
    text = (cells.FOLDER / "README.md").read_text(encoding="utf-8")
    assert all(word in text for word in ("Shenggan/BCCD_Dataset", "d272fb14", "BloodImage_00338", "BloodImage_00343"))


def test_counts(splits):
    assert {name: part.counts() for name, part in splits.items()} == {
        "train": {"Platelets": 209, "RBC": 2381, "WBC": 214},
        "val": {"Platelets": 83, "RBC": 967, "WBC": 87},
        "test": {"Platelets": 69, "RBC": 805, "WBC": 71},
    }
    assert [len(bloodcells_boxes(split)) for split in ("train", "val", "test")] == [205, 87, 72]


def test_no_photograph_is_in_two_splits(splits):
    photos = [{identity.split("/")[0] for identity in part.ids} for part in splits.values()]
    assert sum(len(names) for names in photos) == len(set.union(*photos)) == 364


def test_boxes_have_area_and_lie_in_their_photograph():
    for split in ("train", "val", "test"):
        for photo in bloodcells_boxes(split):
            assert (photo.boxes[:, 2:] > photo.boxes[:, :2]).all()
            assert (photo.boxes >= 0).all()
            assert (photo.boxes <= torch.tensor([320, 240, 320, 240])).all()
            assert len(photo.boxes) == len(photo.labels)
    assert read_image(photo.path).shape == (3, 240, 320)


def test_boxes_are_half_of_the_original():
    first = bloodcells_boxes("val")[0]
    assert first.path.stem == "BloodImage_00000"
    assert first.boxes[0].tolist() == [130, 88.5, 245.5, 188]
    assert cells.CLASSES[first.labels[0]] == "WBC"


def test_a_crop_is_the_cell(splits):
    photo = bloodcells_boxes("test")[0]
    with Image.open(photo.path) as image:
        square = square_around(tuple(photo.boxes[0].tolist()), 320, 240)
        expected = image.convert("RGB").resize((64, 64), Image.Resampling.BICUBIC, box=square)
    assert splits["test"].ids[0] == f"{photo.path.stem}/0"
    assert splits["test"].image(0).permute(1, 2, 0).numpy().tobytes() == expected.tobytes()


def test_the_square_has_the_margin_and_stays_inside():
    assert square_around((100, 100, 140, 120), 320, 240) == (95, 85, 145, 135)
    assert square_around((0, 200, 40, 240), 320, 240) == (0, 190, 50, 240)
    assert square_around((0, 0, 320, 240), 320, 240) == (40, 0, 280, 240)


def test_a_larger_size_is_cut_from_the_photograph(monkeypatch):
    some = cells.cell_boxes()[::100]
    monkeypatch.setattr(cells, "cell_boxes", lambda: some)
    assert bloodcells(224)["val"].size == (128, 128)


def test_it_is_quick(timed_splits):
    assert timed_splits[1] < 3


def test_samples_as_files(tmp_path):
    paths = bloodcells_samples(tmp_path / "cells", 4)
    assert [path.name for path in paths] == ["platelets_0.png", "rbc_0.png", "wbc_0.png", "platelets_1.png"]
    assert read_image(paths[3]).shape == (3, 64, 64)


def test_an_unknown_split_is_named():
    with pytest.raises(ValueError, match="train, val, test; got 'valid'"):
        bloodcells_boxes("valid")
