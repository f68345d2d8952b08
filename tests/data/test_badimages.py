"""`--on-bad-image skip`: what cannot be read gives way or is left out, changes nothing else, is named and counted."""

from __future__ import annotations

import errno
import logging
import os
from collections.abc import Callable, Iterator
from itertools import chain
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from PIL import Image

from vitrail import processes
from vitrail.data import badimages
from vitrail.data.badimages import NAME, BadImages
from vitrail.data.datasets import DataConfig, image_folder, load_splits
from vitrail.data.imagesets import FileSet, ImageSet, TensorSet
from vitrail.data.loading import TRIES, get_data_loaders, make_loader
from vitrail.data.transforms import RandomResizedCrop, eval_transform
from vitrail.images import ImageError
from vitrail.records import IMAGENET_MEAN, IMAGENET_STD, UNLABELLED, Batch, Preprocess

SMALL = Preprocess(img_size=(6, 6))
CROP, FIT = RandomResizedCrop(SMALL), eval_transform(SMALL)
BROKEN = "b/137.png"
READ = "2 images could not be read at least once, and took no part then"


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:50])


def empty(path: Path) -> None:
    path.write_bytes(b"")


def text(path: Path) -> None:
    path.write_text("no picture")


def folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


@pytest.fixture(scope="module")
def thousand(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A thousand pictures of 8 x 8 pixels, all different, in four classes."""
    root = tmp_path_factory.mktemp("thousand")
    noise = torch.randint(256, (1000, 8, 8, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    for number, pixels in enumerate(noise):
        path = root / "abcd"[number // 250] / f"{number % 250:03d}.png"
        path.parent.mkdir(exist_ok=True)
        Image.fromarray(pixels.numpy()).save(path)
    return root


@pytest.fixture
def broken(thousand: Path) -> Iterator[Path]:
    """The path of the one that the test damages; whole again afterwards."""
    path = thousand / BROKEN
    whole = path.read_bytes()
    yield path
    path.write_bytes(whole)


def two_epochs(images: ImageSet, transform: Any, workers: int = 0, seed: int = 5) -> tuple[list[Batch], BadImages]:
    loader = make_loader(
        images, batch_size=64, train=True, transform=transform, seed=seed, workers=workers, on_bad_image="skip"
    )
    return [*loader, *loader], loader.bad


@pytest.mark.fault(18)
@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize(("in_memory", "transform"), [
    (True, None), (True, FIT), (True, CROP), (False, FIT), (False, CROP),
])  # fmt: skip
def test_one_broken_image_in_a_thousand_changes_nothing_else(
    in_memory: bool, transform: Any, workers: int, thousand: Path, broken: Path
):
    sound, _ = two_epochs(image_folder(thousand, in_memory=in_memory), transform)
    truncate(broken)
    damaged, bad = two_epochs(image_folder(thousand, in_memory=in_memory, on_bad_image="skip"), transform, workers)
    assert [len(batch["id"]) for batch in damaged] == [len(batch["id"]) for batch in sound] == ([64] * 15 + [40]) * 2
    replaced = []
    for was, now in zip(sound, damaged, strict=True):
        same = torch.tensor([name != BROKEN for name in was["id"]])
        assert torch.equal(now["image"][same], was["image"][same])
        assert torch.equal(now["label"][same], was["label"][same])
        assert [n for n, keep in zip(now["id"], same, strict=True) if keep] == [n for n in was["id"] if n != BROKEN]
        replaced += [n for n, keep in zip(now["id"], same, strict=True) if not keep]
    assert len(set(replaced) - {BROKEN}) == 2, "each epoch draws another"
    assert list(bad.reasons) == [BROKEN]


def test_held_in_memory_or_read_when_needed_the_same_is_drawn(thousand: Path, broken: Path):
    text(broken)
    held, read = (image_folder(thousand, in_memory=hold, on_bad_image="skip") for hold in (True, False))
    for one, other in zip(two_epochs(held, CROP)[0], two_epochs(read, CROP)[0], strict=True):
        assert torch.equal(one["image"], other["image"])
        assert one["id"] == other["id"]


def test_what_is_drawn_instead_is_an_image_with_its_own_label(thousand: Path, broken: Path):
    empty(broken)
    images = image_folder(thousand, in_memory=True, on_bad_image="skip")
    for batch in two_epochs(images, None)[0]:
        for picture, label, name in zip(batch["image"], batch["label"], batch["id"], strict=True):
            row = images.ids.index(name)
            assert torch.equal(picture, images.image(row))
            assert label == images.labels[row]


def test_a_resumed_epoch_draws_the_same_instead_and_another_seed_another(thousand: Path, broken: Path):
    empty(broken)
    images = image_folder(thousand, in_memory=False, on_bad_image="skip")
    whole, _ = two_epochs(images, FIT)
    loader = make_loader(images, batch_size=64, train=True, transform=FIT, seed=5, on_bad_image="skip")
    loader.batch_sampler.set_epoch(1, start=2)
    assert [batch["id"] for batch in loader] == [batch["id"] for batch in whole[18:]]

    def drawn_twice(batches: list[Batch]) -> set[str]:
        names = list(chain.from_iterable(batch["id"] for batch in batches[:16]))
        return {name for name in names if names.count(name) == 2}

    assert len(drawn_twice(whole)) == 1
    assert drawn_twice(whole) != drawn_twice(two_epochs(images, FIT, seed=6)[0])


# ---- of every kind


@pytest.mark.fault(18, 19)
@pytest.mark.parametrize("damage", [truncate, empty, text, folder])
@pytest.mark.parametrize("train", [True, False])
def test_every_kind_of_damage_is_skipped_and_named(
    damage: Callable[[Path], None], train: bool, make_folder: Any, caplog: pytest.LogCaptureFixture
):
    root = make_folder("cat", "dog", count=8)
    images = image_folder(root, in_memory=False)
    damage(root / "dog/001.png")
    loader = make_loader(images, batch_size=4, train=train, transform=FIT, on_bad_image="skip")
    for _ in range(2):
        names = [name for batch in loader for name in batch["id"]]
        assert "dog/001.png" not in names
        assert len(names) == (16 if train else 15)
    assert list(loader.bad.reasons) == ["dog/001.png"]
    (line,) = caplog.messages
    assert line.startswith(f"left out: {root / 'dog/001.png'}: ")


@pytest.mark.fault(18, 19)
def test_a_broken_image_moves_no_image_from_part_to_part(make_folder: Any):
    root = make_folder("cat", "dog", count=10)
    sound = load_splits(DataConfig(data=f"folder:{root}", val_fraction=0.2))
    truncate(root / "cat/000.png")
    with pytest.raises(ImageError, match=r"cat/000\.png"):
        load_splits(DataConfig(data=f"folder:{root}", val_fraction=0.2))
    damaged = load_splits(DataConfig(data=f"folder:{root}", val_fraction=0.2, on_bad_image="skip"))
    assert damaged.record() == sound.record()
    parts = [damaged.train, damaged.val, damaged.test]
    assert sorted(part.ids[row] for part in parts for row in part.bad_images) == ["cat/000.png"]
    assert damaged.train.size == sound.train.size == (8, 8)


def test_what_was_not_read_is_no_part_of_the_statistics(make_folder: Any):
    root = make_folder("cat", "dog", count=4)
    rest = torch.tensor([0, 1, 3, 4, 5, 6, 7])
    sound = image_folder(root).subset(rest).statistics()
    empty(root / "cat/002.png")
    images = image_folder(root, on_bad_image="skip")
    assert images.bad_images.keys() == {2}
    assert images.statistics() == sound
    assert images.subset(torch.tensor([2])).statistics() == (IMAGENET_MEAN, IMAGENET_STD)


def test_a_loader_of_ones_own_data_skips_too(make_folder: Any):
    root = make_folder("cat", "dog", count=10)
    empty(root / "cat/000.png")
    train, val = get_data_loaders(f"folder:{root}", val_fraction=0.2, on_bad_image="skip")
    names = [name for loader in (train, val) for batch in loader for name in batch["id"]]
    assert "cat/000.png" not in names
    assert train.bad.reasons.keys() | val.bad.reasons.keys() <= {"cat/000.png"}


def test_a_class_that_lost_all_its_images_is_told_of_after_the_first_pass_and_once(
    make_folder: Any, caplog: pytest.LogCaptureFixture
):
    root = make_folder("cat", "dog", "owl", count=4)
    images = image_folder(root, in_memory=False)
    for path in (*root.glob("dog/*.png"), root / "owl/000.png"):
        empty(path)
    loader = make_loader(images, batch_size=4, train=True, transform=FIT, on_bad_image="skip")
    list(loader)
    lost = "class dog: of its 4 images for training, none could be read at all times, so it was not learnt, or hardly"
    assert caplog.messages[-1] == lost
    list(loader)
    loader.bad.say()
    assert [line for line in caplog.messages if line.startswith("class ")] == [lost]


# ---- evaluation


def evaluated(root: Path, bad: list[int], **options: Any) -> tuple[list[Batch], BadImages]:
    images = image_folder(root, in_memory=False)
    for row in bad:
        empty(root / images.ids[row])
    loader = make_loader(images, batch_size=4, train=False, transform=FIT, on_bad_image="skip", **options)
    return list(loader), loader.bad


def test_to_judge_no_image_takes_anothers_place(make_folder: Any):
    batches, bad = evaluated(make_folder("cat", "dog", count=6), [1, 7])
    assert [len(batch["id"]) for batch in batches] == [3, 3, 4]
    assert [name[:1] for batch in batches for name in batch["id"]] == ["c"] * 5 + ["d"] * 5
    assert len(bad) == 2


def test_a_batch_that_lost_all_its_images_holds_one_without_a_label(make_folder: Any):
    batches, bad = evaluated(make_folder("cat", "dog", count=6), [4, 5, 6, 7])
    assert [len(batch["id"]) for batch in batches] == [4, 1, 4]
    assert batches[1]["label"].tolist() == [UNLABELLED]
    assert batches[1]["image"].shape == (1, 3, 6, 6)
    assert len(bad) == 4


@pytest.mark.parametrize("rank", [0, 1])
def test_processes_still_draw_equally_many_batches(rank: int, make_folder: Any):
    """One that can read nothing of its share too."""
    batches, _ = evaluated(make_folder("cat", "dog", count=6), [0, 2, 4, 6, 8, 10], rank=rank, world=2)
    assert [len(batch["id"]) for batch in batches] == ([1, 1] if rank == 0 else [3, 3])


def test_what_stands_for_a_lost_batch_has_the_channels_of_the_set():
    """Held in memory, or as a set of one's own says it."""
    grey = torch.zeros(4, 1, 6, 6, dtype=torch.uint8)
    held = TensorSet(grey, torch.zeros(4, dtype=torch.long), ("a",), list("abcd"), dict.fromkeys(range(4), "cut"))
    read = FileSet([Path(name) for name in "abcd"], held.labels, held.classes, held.ids)
    read.channels = 1
    for images in (held, read):
        loader = make_loader(images, batch_size=4, train=False, transform=FIT, on_bad_image="skip")
        assert [batch["image"].shape for batch in loader] == [(1, 1, 6, 6)]


@pytest.mark.parametrize("workers", [0, 1])
def test_many_in_a_row_end_the_run(workers: int, make_folder: Any):
    root = make_folder("cat", "dog", count=6)
    images = image_folder(root, in_memory=False)
    for path in root.glob("*/*.png"):
        empty(path)
    loader = make_loader(images, batch_size=4, train=True, transform=FIT, workers=workers, on_bad_image="skip")
    rule = rf"^--on-bad-image skip met {TRIES} images in a row that cannot be read, and others may be like them; "
    with pytest.raises(ImageError, match=rf"{rule}the last: {root}.*: mend the files, or name another folder$"):
        list(loader)
    assert set() < loader.bad.reasons.keys() <= set(images.ids), "what it met is known"


@pytest.mark.parametrize("made", [
    lambda: DataConfig(on_bad_image="leave"),
    lambda: make_loader(None, batch_size=1, train=True, on_bad_image="leave"),
])  # fmt: skip
def test_what_else_might_be_done_is_refused(made: Callable[[], Any]):
    with pytest.raises(ValueError, match=r"on.bad.image must be one of raise, skip; got 'leave'"):
        made()


# ---- the record


def test_each_is_told_once_and_kept(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    bad = BadImages(tmp_path)
    assert not (tmp_path / NAME).exists()
    bad.add({"a/1.png": "a/1.png: cut, short"})
    bad.add({"a/1.png": "a/1.png: cut, short", "b/2.png": 'b/2.png: "odd"'})
    assert caplog.messages == ["left out: a/1.png: cut, short", 'left out: b/2.png: "odd"']
    written = (tmp_path / NAME).read_text()
    assert written == 'id,reason\na/1.png,"a/1.png: cut, short"\nb/2.png,"b/2.png: ""odd"""\n'
    again = BadImages(tmp_path, resume=True)
    assert again.reasons == bad.reasons
    again.add(bad.reasons)
    assert len(caplog.messages) == 2
    assert len(BadImages(tmp_path)) == 0
    assert not (tmp_path / NAME).exists()


@pytest.mark.parametrize("content", ["", "name,why\n", "id,reason\nonly one\n"])
def test_a_file_that_is_no_such_record_is_refused(content: str, tmp_path: Path):
    (tmp_path / NAME).write_text(content)
    with pytest.raises(ValueError, match=rf"{NAME} must hold the columns id, reason; it does not .*: put it back"):
        BadImages(tmp_path, resume=True)


def test_of_several_processes_the_first_one_speaks_and_writes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    monkeypatch.setenv(processes.NUMBERS[0], "1")
    bad = BadImages(tmp_path)
    bad.add({"a": "b"})
    bad.say()
    assert bad.reasons == {"a": "b"}
    assert caplog.messages == list(tmp_path.iterdir()) == []


def test_a_record_that_cannot_be_written_ends_no_run_and_is_said_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    def full(path: Path, _: str) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))

    bad = BadImages(tmp_path)
    with monkeypatch.context() as patched:
        patched.setattr(badimages, "write_whole", full)
        bad.add({"a": "a: cut"})
        bad.add({"b": "b: cut"})
        bad.say()
    lost = [message for message in caplog.messages if "cannot be written" in message]
    assert lost == [f"{tmp_path / NAME} cannot be written (No space left on device): the run goes on"]
    assert caplog.messages[-1] == READ
    bad.add({"c": "c: cut"})
    assert list(BadImages(tmp_path, resume=True).reasons) == ["a", "b", "c"], "the next one brings the others along"


def test_a_record_that_can_be_written_at_the_end_is_whole(tmp_path: Path):
    bad = BadImages(tmp_path)
    (tmp_path / NAME).mkdir()
    bad.add({"a": "a: cut"})
    (tmp_path / NAME).rmdir()
    bad.say()
    assert BadImages(tmp_path, resume=True).reasons == {"a": "a: cut"}


def test_names_that_are_not_utf_8_are_drawn_and_recorded(make_folder: Any, tmp_path_factory: pytest.TempPathFactory):
    root, out = make_folder("cat", "dog", count=6), tmp_path_factory.mktemp("run")
    for path in root.glob("*/*.png"):
        path.rename(path.with_name(f"{path.stem}\udcff.png"))
    (root / "cat/001\udcff.png").write_bytes(b"")
    config = DataConfig(data=f"folder:{root}", val_fraction=0.2, on_bad_image="skip", in_memory=False)
    splits, bad = load_splits(config), BadImages(out)
    assert splits.digests().keys() == {"val", "test"}
    loader = make_loader(splits.train, batch_size=4, train=True, transform=FIT, on_bad_image="skip")
    bad.add({"cat/001\udcff.png": f"{root}/cat/001\udcff.png: not a readable image"})
    assert len(list(loader)) == 2
    again = BadImages(out, resume=True)
    again.add(bad.reasons)
    assert list(again.reasons) == ["cat/001\\udcff.png"], "one image, before a resume and after it"


def test_what_other_processes_met_is_shared(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def gather(everyone: list[dict[str, str]], own: dict[str, str]) -> None:
        everyone[:] = [own, {"b": "b: empty", "a": "a: empty"}]

    bad = BadImages(tmp_path)
    bad.add({"a": "a: empty"})
    bad.share()
    assert len(bad) == 1
    monkeypatch.setattr(dist, "is_initialized", lambda: True)
    monkeypatch.setattr(dist, "get_world_size", lambda: 2)
    monkeypatch.setattr(dist, "all_gather_object", gather)
    bad.share()
    assert list(BadImages(tmp_path, resume=True).reasons) == ["a", "b"]


def test_a_run_says_one_line_at_its_end(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    bad = BadImages(tmp_path)
    bad.say()
    assert caplog.messages == []
    with caplog.at_level(logging.CRITICAL, "vitrail"):
        bad.add({"a": "a: empty", "b": "b: empty"})
    bad.say()
    assert caplog.messages == [f"{READ}: {tmp_path / NAME} names them"]
