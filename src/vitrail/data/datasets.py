"""`--data` -> training, validation and test images.

A source is a row of `SOURCES`. What a source does not name is set aside from its training images by a stratified draw
from the seed; `Splits.record` says which images those were, and `load_splits` takes that draw again.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import get_args

import torch
from torch import Tensor

from vitrail.data.augment import SMALL_SIDE
from vitrail.data.badimages import OnBadImage
from vitrail.data.bloodcells import bloodcells
from vitrail.data.imagesets import FileSet, ImageSet, Splits, TensorSet, draw_stratified
from vitrail.images import SUFFIXES, ImageError, UnequalSizesError, open_image, read_images
from vitrail.names import check_choice, closest, require, shortened

PARTS = {"train": ("train",), "val": ("val", "valid", "validation"), "test": ("test",)}
"""what the folders of a data set's parts may be called"""
SMALL_BYTES = 2**30
"""small images, in all no more than this, are held in memory if they share a size"""
DAY = 86_400
MOST_SEED = 2**63 - 1
"""what torch's generators take"""
WHAT = {
    "bloodcells": "single stained blood cells cut from light-microscope photographs",
    "cifar10": "32-pixel colour photographs",
    "cifar100": "32-pixel colour photographs",
    "imagenet": "colour photographs",
}
NAMED = 10
FEW = 20
"""held-out images below which a figure says little: one image is 5 % of them"""
LOG = logging.getLogger("vitrail")


class DataError(ValueError):
    """Data that is not where, or not as, it should be. The message says what was looked for and what to do."""


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Which images, and how they are fed."""

    data: str = "bloodcells"
    """bloodcells (ships with the package), cifar10, cifar100, imagenet, or folder:PATH"""
    data_dir: str = "data"
    """the folder in which cifar10, cifar100 and imagenet lie"""
    download: bool = False
    """fetch cifar10 or cifar100 into data_dir if they are not there"""
    img_size: int | None = None
    """side of the square image the model gets, in pixels; none for the size of small images that all have the same,
    else the size that the model's row is made for"""
    batch_size: int = 128
    """images a batch and device"""
    repeats: int = 1
    """copies of a training image in an epoch, each varied in its own way; epochs stay as long, of fewer images"""
    workers: int = 0
    """processes that decode images; 0 decodes in the main one, which is best for small images in memory"""
    worker_timeout: float = 300
    """seconds in which a batch must come from those processes; 0 waits for ever"""
    on_bad_image: OnBadImage = "raise"
    """end at an image that cannot be read, or skip it: training draws another, figures leave it out, both count it"""
    val_fraction: float = 0.05
    """share of every class set aside for validation, and for test, where the data names no such part"""
    in_memory: bool | None = None
    """hold all images of a folder in memory; none does so if they are small and share one size"""
    seed: int = 0
    """of everything random: draws, order, augmentation, initial weights"""

    def __post_init__(self) -> None:
        getattr(super(), "__post_init__", lambda: None)()  # the next config where several are joined by inheritance
        split_name(self.data)
        for name, least in (("batch_size", 1), ("repeats", 1), ("workers", 0)):
            require(getattr(self, name) >= least, name, f"be at least {least}", getattr(self, name))
        check_choice("--on-bad-image", self.on_bad_image, get_args(OnBadImage))
        require(0 <= self.worker_timeout <= DAY, "worker_timeout", f"lie in 0 to {DAY}, a day", self.worker_timeout)
        require(0 <= self.seed <= MOST_SEED, "seed", "lie in 0 to 2**63 - 1", self.seed)
        require(self.img_size is None or self.img_size >= 1, "img_size", "be at least 1, or none", self.img_size)
        require(0 < self.val_fraction < 0.5, "val_fraction", "lie between 0 and 0.5", self.val_fraction)


def split_name(data: str) -> tuple[str, str]:
    """`folder:PATH` -> (`folder`, PATH); any other source's name -> (name, empty). Raises `DataError`."""
    choices = ["folder:PATH" if name == "folder" else name for name in SOURCES]
    if not isinstance(data, str) or not data:
        raise DataError(f"--data must be one of {', '.join(choices)}; got {shortened(data)}")
    source, colon, path = data.partition(":")
    if source in SOURCES and (source == "folder") == bool(path):
        return source, path
    if source == "folder" and colon:
        raise DataError(f"--data folder:PATH must name a folder; got nothing after {data}: say folder:photos, for one")
    if Path(data).is_dir():
        raise DataError(f"--data must name a source; got the folder {data}: say folder:{data}")
    near = closest(data, choices)
    mend = f": did you mean {near}?" if near else ""
    raise DataError(f"--data must be one of {', '.join(choices)}; got {data!r}{mend}")


def same_data(one: str, other: str) -> bool:
    """Whether two `--data` name the same images, a folder in two spellings for one."""
    paths = [Path(name.removeprefix("folder:")).expanduser().resolve() for name in (one, other)]
    return one == other or (one.startswith("folder:") and other.startswith("folder:") and paths[0] == paths[1])


Ids = Mapping[str, Sequence[str]]
"""the images of parts that were drawn, by part: `Splits.record()["drawn"]`"""


def load_splits(config: DataConfig, drawn: Ids | None = None) -> Splits:
    """The images that `config.data` names. Parts that it does not name are drawn, or are those of `drawn` again.

    An image that cannot be read keeps its place, so that no draw depends on it. Raises `DataError`, also where an image
    of the former draw is gone, naming it; `ImageError` for small images that cannot be read, unless they are skipped.
    """
    source, path = split_name(config.data)
    return _complete(SOURCES[source](config, path), config, drawn)


def describe(splits: Splits) -> str:
    """One line: what images these are, and which classes they have (the first ten)."""
    more = f" and {len(splits.classes) - NAMED} more" if len(splits.classes) > NAMED else ""
    return f"{WHAT.get(splits.name, 'images')}: {', '.join(splits.classes[:NAMED])}{more}"


def say_few(splits: Splits) -> None:
    """Tells the logger `vitrail`, in one line, of held-out parts that lack classes or are very small."""
    parts = {"validation": splits.val} | ({} if splits.test is splits.val else {"test": splits.test})
    said = [line for name, images in parts.items() if (line := _few(name, images))]
    if said:
        more = "more images, or a larger --val-fraction" if splits.drawn else "more images"
        LOG.warning("held out are %s: too few of every class to say much; give %s", "; ".join(said), more)


def _few(name: str, images: ImageSet) -> str:
    """Such as `3 test images, none of 2 classes (b, c)`; empty where there are enough of every class."""
    lacking = [label for label, count in images.counts().items() if not count]
    if len(images) >= FEW and not lacking:
        return ""
    count = f"{len(images)} {name} image{'s' * (len(images) != 1)}"
    named = ", ".join(lacking[:NAMED]) + (" …" if len(lacking) > NAMED else "")
    return f"{count}, none of {len(lacking)} class{'es' * (len(lacking) != 1)} ({named})" if lacking else count


Parts = Mapping[str, ImageSet]


def _bloodcells(config: DataConfig, path: str) -> Parts:
    return bloodcells(config.img_size)


def _cifar(config: DataConfig, path: str) -> Parts:
    """torchvision's files, or an image folder with train/ and test/, in data_dir or in a folder of the set's name."""
    number = int(config.data.removeprefix("cifar"))
    for root in (Path(config.data_dir) / config.data, Path(config.data_dir)):
        found = part_folders(root)
        if {"train", "test"} <= set(found):
            sets = _read_parts(root, {"train": found["train"], "test": found["test"]}, config)
            if len(sets["train"].classes) != number:
                raise DataError(f"{config.data} has {number} classes; {root} has {len(sets['train'].classes)}")
            return sets
    return {part: _cifar_files(config, part) for part in ("train", "test")}


def _cifar_files(config: DataConfig, part: str) -> TensorSet:
    from torchvision import datasets  # costs a second: only where its files are read

    kind = {"cifar10": datasets.CIFAR10, "cifar100": datasets.CIFAR100}[config.data]
    if not config.download and not (Path(config.data_dir) / kind.base_folder).is_dir():
        raise DataError(
            f"{config.data} needs {kind.base_folder}/ or train/ and test/ with a folder a class in {config.data_dir}; "
            "found neither: give --download, or another --data-dir"
        )
    try:
        found = kind(config.data_dir, train=part == "train", download=config.download)
    except (OSError, RuntimeError) as error:
        raise DataError(f"{config.data} could not be fetched into {config.data_dir}: {error}") from error
    images = torch.from_numpy(found.data).permute(0, 3, 1, 2).contiguous()
    ids = [f"{part}/{number:05d}" for number in range(len(images))]
    return TensorSet(images, torch.tensor(found.targets), found.classes, ids)


def _imagenet(config: DataConfig, path: str) -> Parts:
    """train/ and val/ in data_dir or data_dir/imagenet. Its test/ has no labels, so `val` is reported."""
    for root in (Path(config.data_dir) / "imagenet", Path(config.data_dir)):
        found = part_folders(root)
        if {"train", "val"} <= set(found):
            return _read_parts(root, {"train": found["train"], "val": found["val"]}, config)
    raise DataError(f"imagenet needs train/ and val/ with a folder a class in {config.data_dir}: give --data-dir")


def _folder(config: DataConfig, path: str) -> Parts:
    root = _existing(Path(path).expanduser())
    found = part_folders(root)
    if found and "train" not in found:
        others = ", ".join(folder.name for folder in found.values())
        raise DataError(f"{root} has {others} but no train: add it, or name a folder below")
    return _read_parts(root, found or {"train": root}, config)


SOURCES: dict[str, Callable[[DataConfig, str], Parts]] = {
    "bloodcells": _bloodcells,
    "cifar10": _cifar,
    "cifar100": _cifar,
    "imagenet": _imagenet,
    "folder": _folder,
}


def _complete(sets: Parts, config: DataConfig, former: Ids | None) -> Splits:
    """Draws what is missing. A data set with `val` and without `test` keeps all its images: `test` is `val`."""
    parts = dict(sets)
    drawn = tuple(name for name in ("val", "test") if name not in parts) if "val" not in parts else ()
    if former is not None and set(former) != set(drawn):
        was, now = (", ".join(names) or "none" for names in (former, drawn))
        raise DataError(f"{config.data} had these parts drawn from it: {was}; now that would be: {now}: train anew")
    if drawn:
        whole = parts["train"]
        rest, *rows = _draw(whole, len(drawn), config) if former is None else _draw_again(whole, drawn, former, config)
        parts |= {name: whole.subset(chosen) for name, chosen in zip(drawn, rows, strict=True)}
        parts["train"] = whole.subset(rest)
    return Splits(
        name=config.data, train=parts["train"], val=parts["val"], test=parts.get("test", parts["val"]),
        drawn=drawn, seed=config.seed, val_fraction=config.val_fraction,
    )  # fmt: skip


def _draw(whole: ImageSet, parts: int, config: DataConfig) -> list[Tensor]:
    rows = draw_stratified(whole.labels, whole.ids, config.val_fraction, parts, config.seed)
    if not len(rows[1]):
        raise DataError(f"{config.data} has too few images of every class to set any aside: at least 3 are needed")
    return rows


def _draw_again(whole: ImageSet, names: Sequence[str], former: Ids, config: DataConfig) -> list[Tensor]:
    """The rows of the images of a former draw, all others before them."""
    place = {identity: row for row, identity in enumerate(whole.ids)}
    gone = [identity for name in names for identity in former[name] if identity not in place]
    if gone:
        raise DataError(
            f"{config.data} lacks {len(gone)} of the images that were set aside from it: {', '.join(gone[:5])}"
            f"{' …' if len(gone) > 5 else ''}: put them back, or train anew"
        )
    rows = [sorted(place[identity] for identity in former[name]) for name in names]
    rest = sorted(set(place.values()).difference(*rows))
    return [torch.tensor(part, dtype=torch.long) for part in (rest, *rows)]


def _read_parts(root: Path, folders: Mapping[str, Path], config: DataConfig) -> dict[str, ImageSet]:
    def read(path: Path, classes: Sequence[str] | None = None) -> ImageSet:
        return image_folder(
            path, classes=classes, base=root, in_memory=config.in_memory, on_bad_image=config.on_bad_image
        )

    train = read(folders["train"])
    others = {name: path for name, path in folders.items() if name != "train"}
    return {"train": train} | {name: read(path, train.classes) for name, path in others.items()}


def part_folders(root: Path) -> dict[str, Path]:
    """The folders below `root` that hold its parts, by part: `train`, `val`, `test`.

    Raises `DataError` where one part has two.
    """
    found = {part: [root / name for name in names if (root / name).is_dir()] for part, names in PARTS.items()}
    for part, folders in found.items():
        if len(folders) > 1:
            names = " and ".join(folder.name for folder in folders)
            raise DataError(f"{root} must have one folder for {part}; it has {names}: join them, or move one away")
    return {part: folders[0] for part, folders in found.items() if folders}


def image_folder(
    root: str | Path,
    *,
    classes: Sequence[str] | None = None,
    base: Path | None = None,
    in_memory: bool | None = None,
    on_bad_image: OnBadImage = "raise",
) -> ImageSet:
    """All images below `root`, whose folders are the classes; ids are paths relative to `base` (`root` unless given).

    `classes` fixes names and order, as a part of a larger set needs it. Raises `DataError` where the folder is missing,
    holds no class folders, fewer than two, or one without images, or a class that `classes` does not name; `ImageError`
    for images to be held in memory that cannot be read. With `skip` those keep their place, and raise when asked for.
    """
    root = _existing(Path(root))
    found = _class_folders(root, classes)
    names = tuple(classes or found)
    files = {name: _image_files(root / name) for name in found}
    empty = [name for name, paths in files.items() if not paths]
    if empty:
        raise DataError(f"every class needs an image; {root / empty[0]} has none of {', '.join(sorted(SUFFIXES))}")
    paths = [path for name in found for path in files[name]]
    labels = torch.tensor([names.index(name) for name in found for _ in files[name]])
    ids = [path.relative_to(base or root).as_posix() for path in paths]
    _say_deep(root, paths)
    return _held(paths, labels, names, ids, in_memory, on_bad_image == "skip")


def _say_deep(root: Path, paths: Sequence[Path]) -> None:
    """Folders of classes in folders would otherwise become classes of other names without a word."""
    deep = [path.relative_to(root).parent for path in paths if path.parent.parent != root]
    if deep:
        few = ", ".join(place.as_posix() for place in list(dict.fromkeys(deep))[:3])
        LOG.warning(
            "the folders in %s are the classes; %d of %d images lie deeper (%s): name a folder below if those are the "
            "classes", root, len(deep), len(paths), few,
        )  # fmt: skip


def _class_folders(root: Path, classes: Sequence[str] | None) -> list[str]:
    found = sorted(path.name for path in root.iterdir() if path.is_dir() and not path.name.startswith("."))
    if not found:
        loose = sum(path.suffix.lower() in SUFFIXES for path in root.iterdir())
        raise DataError(f"{root} must hold one folder of images a class; it has no folder but {loose} loose images")
    unknown = sorted(set(found) - set(classes)) if classes else []
    if classes and unknown:
        near = closest(unknown[0], classes)
        mend = f"the nearest is {near!r}" if near else f"they have {', '.join(classes[:NAMED])}"
        raise DataError(f"{root} has the class {unknown[0]!r}, which the training images lack; {mend}")
    if not classes and len(found) < 2:
        raise DataError(f"{root} needs at least two class folders; got only {found[0]!r}")
    return found


def _image_files(folder: Path) -> list[Path]:
    found = (Path(place) / name for place, _, names in os.walk(folder) for name in names if not name.startswith("."))
    return sorted(path for path in found if path.suffix.lower() in SUFFIXES)


def _held(
    paths: list[Path], labels: Tensor, names: tuple[str, ...], ids: list[str], in_memory: bool | None, skip: bool
) -> ImageSet:
    if in_memory or (in_memory is None and _look_small(paths, skip)):
        bad: dict[int, str] = {}
        try:
            return TensorSet(read_images(paths, bad if skip else None), labels, names, ids, bad)
        except UnequalSizesError:
            if in_memory:
                raise
    return FileSet(paths, labels, names, ids)


def _look_small(paths: Sequence[Path], skip: bool) -> bool:
    """Judged by 32 images spread over the set; an odd one found later only costs the time of having tried."""
    sizes = {size for path in paths[:: max(1, len(paths) // 32)] if (size := _size(path, skip))}
    width, height = max(sizes, default=(0, 0))
    return len(sizes) == 1 and max(width, height) <= SMALL_SIDE and 3 * width * height * len(paths) <= SMALL_BYTES


def _size(path: Path, skip: bool) -> tuple[int, int] | None:
    try:
        return open_image(path).size
    except ImageError:
        if not skip:
            raise
        return None


def _existing(path: Path) -> Path:
    if path.is_dir():
        return path
    parent = next(place for place in path.absolute().parents if place.is_dir())
    word = path.absolute().relative_to(parent).parts[0]
    close = closest(word, (place.name for place in parent.iterdir() if place.is_dir()))
    hint = f"the nearest is {parent / close}" if close else f"no folder in {parent} has a name like {word}"
    raise DataError(f"there is no folder {path}; {hint}")
