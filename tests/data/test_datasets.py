"""Sources: what is found where, what is drawn, and what every mistake is told."""

from __future__ import annotations

import json
import math
import pickle

import numpy as np
import pytest
import torch

from vitrail.data.datasets import DataConfig, DataError, image_folder, load_splits, say_few
from vitrail.data.imagesets import FileSet, TensorSet
from vitrail.images import ImageError, UnequalSizesError, read_image


def config(root, data="folder", **changes):
    return DataConfig(data=f"folder:{root}" if data == "folder" else data, data_dir=str(root), **changes)


def test_bloodcells_need_nothing():
    splits = load_splits(DataConfig())
    assert (len(splits.train), len(splits.val), len(splits.test)) == (2804, 1137, 945)
    assert splits.drawn == ()
    assert splits.preprocess().img_size == (64, 64)


def test_a_folder_without_parts_is_drawn_and_recorded(make_folder):
    root = make_folder("cat", "dog", count=20)
    splits = load_splits(config(root, val_fraction=0.1, seed=5))
    assert splits.classes == ("cat", "dog")
    assert [part.counts() for part in (splits.train, splits.val, splits.test)] == [
        {"cat": 16, "dog": 16}, {"cat": 2, "dog": 2}, {"cat": 2, "dog": 2},
    ]  # fmt: skip
    ids = [set(part.ids) for part in (splits.train, splits.val, splits.test)]
    assert not (ids[0] & ids[1] or ids[0] & ids[2] or ids[1] & ids[2])
    record = json.loads(json.dumps(splits.record()))
    assert record["drawn"] == {"val": splits.val.ids, "test": splits.test.ids}
    assert (record["seed"], record["counts"]["train"]) == (5, {"cat": 16, "dog": 16})
    again, other = load_splits(config(root, val_fraction=0.1, seed=5)), load_splits(config(root, seed=6))
    assert again.val.ids == splits.val.ids
    assert other.val.ids != splits.val.ids


def test_a_former_draw_is_taken_again(make_folder, write_image):
    root = make_folder("cat", "dog", count=9)
    before = load_splits(config(root, val_fraction=0.3))
    for n in range(20):
        write_image(root / f"cat/new{n}.png")
    former = before.record()["drawn"]
    assert set(load_splits(config(root, val_fraction=0.3)).val.ids) != set(before.val.ids)  # it would move
    after = load_splits(config(root, val_fraction=0.3), former)
    assert (after.val.ids, after.test.ids) == (before.val.ids, before.test.ids)
    assert after.train.counts() == {"cat": before.train.counts()["cat"] + 20, "dog": before.train.counts()["dog"]}
    assert not set(after.train.ids) & {*after.val.ids, *after.test.ids}
    assert after.digests() == before.digests() != load_splits(config(root, seed=1)).digests()


def test_held_out_images_that_are_gone_are_named(make_folder):
    root = make_folder("cat", "dog", count=9)
    former = load_splits(config(root)).record()["drawn"]
    gone = former["test"][0]
    (root / gone).unlink()
    with pytest.raises(DataError, match=f"lacks 1 of the images that were set aside from it: {gone}: put them back"):
        load_splits(config(root), former)
    with pytest.raises(DataError, match="these parts drawn from it: none; now that would be: val, test: train anew"):
        load_splits(config(root), {})


@pytest.mark.parametrize("name", ["val", "valid", "validation"])
def test_named_parts_are_taken(make_folder, name):
    root = make_folder("train/cat", "train/dog", f"{name}/dog", "test/cat")
    splits = load_splits(config(root))
    assert splits.val.ids[0] == f"{name}/dog/000.png"
    assert splits.val.labels.tolist() == [1, 1, 1]  # the place of dog among the training classes
    assert splits.test.counts() == {"cat": 3, "dog": 0}
    assert splits.drawn == ()


def test_a_part_in_two_folders_is_refused(make_folder):
    root = make_folder("train/cat", "train/dog", "val/cat", "valid/cat")
    with pytest.raises(
        DataError, match="must have one folder for val; it has val and valid: join them, or move one aw"
    ):
        load_splits(config(root))


def test_what_a_folder_lacks(make_folder):
    root = make_folder("train/cat", "train/dog", "test/cat", "test/dog", count=5)
    assert load_splits(config(root)).drawn == ("val",)
    (root / "test").rename(root / "val")
    splits = load_splits(config(root))
    assert splits.drawn == ()
    assert splits.test is splits.val


def test_memory_is_chosen_by_size(make_folder, write_image):
    root = make_folder("cat", "dog")
    assert isinstance(image_folder(root), TensorSet)
    assert isinstance(image_folder(root, in_memory=False), FileSet)
    write_image(root / "dog/002.png", (97, 97))
    assert isinstance(image_folder(root), FileSet)
    with pytest.raises(UnequalSizesError, match="002"):
        image_folder(root, in_memory=True)


def test_an_odd_size_that_the_probe_missed_is_no_error(make_folder, write_image):
    root = make_folder("cat", "dog", count=40)
    write_image(root / "cat/001.png", (9, 9))
    assert isinstance(image_folder(root), FileSet)


@pytest.mark.fault(34)
@pytest.mark.parametrize("in_memory", [True, False])
def test_odd_and_equal_names(make_folder, write_image, in_memory):
    """Two images of one name in two classes stay two; no name of a file or a class is too odd to be read."""
    root = make_folder("Kätzchen 猫", " two  words ", count=9)
    for n, name in enumerate(("Äpfel 猫.png", " blank .png", "two\nlines.png", "a,b;c'd\".png", "000.bmp")):
        write_image(root / "Kätzchen 猫" / name, value=200 + n)
    splits = load_splits(config(root, val_fraction=0.2, in_memory=in_memory))
    parts = (splits.train, splits.val, splits.test)
    ids = [name for part in parts for name in part.ids]
    assert len(ids) == len(set(ids)) == 23 and "Kätzchen 猫/two\nlines.png" in ids
    assert splits.classes == (" two  words ", "Kätzchen 猫")
    assert json.loads(json.dumps(splits.record()))["drawn"]["val"] == splits.val.ids
    for part in parts:
        for row, name in enumerate(part.ids):
            assert torch.equal(part.image(row), read_image(root / name))


def test_hidden_and_other_files_are_passed_over(make_folder, write_image):
    root = make_folder("cat", "dog")
    (root / "cat/notes.txt").write_text("x")
    (root / "cat/._000.png").write_bytes(b"x")
    (root / ".cache").mkdir()
    write_image(root / "cat/deeper/003.PNG")
    assert image_folder(root).counts() == {"cat": 4, "dog": 3}


def test_images_below_the_folders_of_classes_are_told(make_folder, caplog):
    root = make_folder("x/a", "x/b", "y/a")
    assert image_folder(root).classes == ("x", "y")
    (said,) = caplog.messages
    assert said.startswith(f"the folders in {root} are the classes; 9 of 9 images lie deeper (x/a, x/b, y/a): name a")
    image_folder(root / "x")
    assert len(caplog.messages) == 1


def test_held_out_parts_that_say_little_are_told(make_folder, write_image, caplog):
    root = make_folder("a", "b", count=400)
    say_few(load_splits(config(root)))
    assert caplog.messages == []
    for name in ("c", "d"):
        write_image(root / f"{name}/0.png")
    say_few(load_splits(config(root)))
    none = "none of 2 classes (c, d)"
    assert caplog.messages == [
        f"held out are 40 validation images, {none}; 40 test images, {none}: too few of every class to say much; "
        "give more images, or a larger --val-fraction"
    ]


def test_a_small_part_that_the_data_names_is_told(make_folder, caplog):
    root = make_folder("train/cat", "train/dog", "val/cat", count=1)
    say_few(load_splits(config(root)))
    assert caplog.messages == [
        "held out are 1 validation image, none of 1 class (dog): too few of every class to say much; give more images"
    ]


@pytest.mark.fault(19)
def test_an_unreadable_image_is_named(make_folder):
    root = make_folder("cat", "dog")
    (root / "dog/001.png").write_bytes(b"no")
    with pytest.raises(ImageError, match=r"dog/001\.png: not a readable image"):
        image_folder(root, in_memory=True)
    with pytest.raises(ImageError, match=r"dog/001\.png: not a readable image"):
        image_folder(root, in_memory=False)[4]


def test_cifar_from_an_image_folder(make_folder):
    classes = [f"c{n}" for n in range(10)]
    root = make_folder(*(f"{part}/{name}" for part in ("train", "test") for name in classes), count=4)
    splits = load_splits(config(root, "cifar10"))
    assert (len(splits.train), len(splits.val), len(splits.test)) == (30, 10, 40)
    assert splits.drawn == ("val",)
    (root / "cifar10").mkdir()
    for part in ("train", "test"):
        (root / part).rename(root / "cifar10" / part)
    assert len(load_splits(config(root, "cifar10")).test) == 40
    with pytest.raises(DataError, match=r"folder a class in .*found neither: give --download"):
        load_splits(config(root, "cifar100"))


def test_a_folder_that_is_not_cifar(make_folder):
    root = make_folder("train/cat", "train/dog", "test/cat", "test/dog")
    with pytest.raises(DataError, match=r"cifar10 has 10 classes; .* has 2"):
        load_splits(config(root, "cifar10"))


def test_cifar_from_torchvisions_files(tmp_path, monkeypatch):
    from torchvision.datasets import CIFAR10

    folder = tmp_path / CIFAR10.base_folder
    folder.mkdir()
    rows = np.random.default_rng(0).integers(0, 256, (20, 3072), dtype=np.uint8)
    names = [name for name, _ in CIFAR10.train_list + CIFAR10.test_list]
    for name in names:
        (folder / name).write_bytes(pickle.dumps({"data": rows, "labels": [n % 10 for n in range(20)]}))
    (folder / "batches.meta").write_bytes(pickle.dumps({"label_names": list("abcdefghij")}))
    monkeypatch.setattr("torchvision.datasets.cifar.check_integrity", lambda *_: True)
    splits = load_splits(config(tmp_path, "cifar10", val_fraction=0.1))
    assert (len(splits.train), len(splits.val), len(splits.test)) == (90, 10, 20)
    assert torch.equal(splits.test.image(3), torch.from_numpy(rows[3]).view(3, 32, 32))
    assert splits.test.ids[3] == "test/00003"
    assert splits.classes == tuple("abcdefghij")


def test_a_failed_download_is_an_error_with_its_reason(tmp_path, monkeypatch):
    def refuse(*_, **__):
        raise OSError("no route to host")

    monkeypatch.setattr("torchvision.datasets.cifar.download_and_extract_archive", refuse)
    with pytest.raises(DataError, match=r"could not be fetched into .*: no route to host"):
        load_splits(config(tmp_path, "cifar10", download=True))


def test_imagenet(make_folder):
    root = make_folder("train/n01", "train/n02", "val/n01", "val/n02")
    (root / "test").mkdir()  # the official one has no labels
    splits = load_splits(config(root, "imagenet"))
    assert splits.test is splits.val
    assert splits.val.ids[0] == "val/n01/000.png"
    with pytest.raises(DataError, match="imagenet needs train/ and val/"):
        load_splits(config(root / "train", "imagenet"))


def test_a_wrong_path_names_the_nearest(tmp_path):
    (tmp_path / "flowers").mkdir()
    (tmp_path / "birds").mkdir()
    with pytest.raises(DataError, match=r"no folder .*flower/x; the nearest is .*flowers"):
        load_splits(config(tmp_path / "flower/x"))
    with pytest.raises(DataError, match="no folder in .*birds has a name like x"):
        load_splits(config(tmp_path / "birds/x"))


@pytest.mark.fault(34)
def test_folders_that_are_no_data_set(make_folder, tmp_path):
    root = make_folder(
        "one/cat", "parts/val/cat", "parts/val/dog", "clash/train/cat", "clash/train/dog", "clash/val/cow"
    )
    with pytest.raises(DataError, match="at least two class folders; got only 'cat'"):
        load_splits(config(root / "one"))
    with pytest.raises(DataError, match="it has no folder but 3 loose images"):
        load_splits(config(root / "one/cat"))
    with pytest.raises(DataError, match="parts has val but no train"):
        load_splits(config(root / "parts"))
    with pytest.raises(DataError, match="class 'cow', which the training images lack; they have cat, dog"):
        load_splits(config(root / "clash"))
    (root / "clash/val/cow").rename(root / "clash/val/dogs")
    with pytest.raises(DataError, match="class 'dogs', which the training images lack; the nearest is 'dog'"):
        load_splits(config(root / "clash"))
    (root / "one/dog").mkdir()
    with pytest.raises(DataError, match=r"every class needs an image; .*dog has none of \.bmp"):
        load_splits(config(root / "one"))


@pytest.mark.fault(34)
def test_too_few_images_to_draw_from(make_folder):
    with pytest.raises(DataError, match="too few images of every class"):
        load_splits(config(make_folder("cat", "dog", count=2)))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"data": "cifra10"}, "--data must be one of bloodcells, .*folder:PATH; got 'cifra10': did you mean cifar10"),
        ({"data": "folder"}, "did you mean folder:PATH"),
        ({"data": "cifar10:x"}, "did you mean cifar10"),
        ({"data": "flowers"}, r"--data must be one of bloodcells, .*folder:PATH; got 'flowers'$"),
        ({"data": "folder:"}, "--data folder:PATH must name a folder; got nothing after folder:: say folder:photos"),
        ({"batch_size": 0}, "--batch-size must be at least 1; got 0"),
        ({"workers": -1}, "--workers must be at least 0"),
        ({"worker_timeout": -1}, "--worker-timeout must lie in 0 to 86400, a day; got -1"),
        ({"worker_timeout": math.inf}, "--worker-timeout must lie in 0 to 86400, a day; got inf"),
        ({"seed": -1}, r"--seed must lie in 0 to 2\*\*63 - 1; got -1"),
        ({"img_size": 0}, "--img-size must be at least 1"),
        ({"val_fraction": 0.5}, "--val-fraction must lie between 0 and 0.5"),
        ({"val_fraction": math.nan}, "--val-fraction must lie"),
    ],
)
def test_a_config_says_what_is_wrong(values, message):
    with pytest.raises(ValueError, match=message):
        DataConfig(**values)


@pytest.mark.parametrize("data", ["", None, 3])
def test_no_source_is_nothing_to_be_near_to(data):
    with pytest.raises(DataError, match=r"folder:PATH; got (''|None|3)$"):
        DataConfig(data=data)


def test_a_bare_path_is_told_to_say_folder(tmp_path):
    with pytest.raises(DataError, match=f"say folder:{tmp_path}"):
        DataConfig(data=str(tmp_path))


def test_the_real_cifar_copy(shared_data, tmp_path):
    """A few members of the archive: unpacked whole, the set takes seconds to read."""
    import tarfile

    with tarfile.open(shared_data / "cifar10-jpeg.tar.xz") as archive:
        for member in archive:
            if member.name.startswith("train/airplane/0100"):
                break
            if member.isfile():
                archive.extract(member, tmp_path, filter="data")
    images = image_folder(tmp_path / "train", classes=("airplane", "automobile"))
    assert images.size == (32, 32)
    assert len(images) == 100
