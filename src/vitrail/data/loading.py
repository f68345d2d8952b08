"""Batches in an order that can be resumed, sharded and repeated.

The order is a pure function of (seed, epoch); what is random about one image, of (seed, epoch, its number). So the same
batches come with 0, 1 or 4 workers, after a resume, and on every machine.
"""

from __future__ import annotations

import hashlib
import os
import signal
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple, get_args

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils.data import Dataset, Sampler

from vitrail.data.augment import TIED, AugmentConfig
from vitrail.data.badimages import OnBadImage
from vitrail.data.datasets import DataConfig, load_splits
from vitrail.data.imagesets import ImageSet, Sample, collate
from vitrail.data.transforms import RandomResizedCrop, Transform, eval_transform, train_transform
from vitrail.data.watch import Board, Drawn, WatchedLoader
from vitrail.images import ImageError
from vitrail.names import check_choice, require
from vitrail.records import UNLABELLED, Batch

WORKERS_A_CORE = 8
"""more than that wait for each other, and each takes memory of its own"""
TRIES = 20
"""images in a row that may be unreadable before training ends: where half of all are, one row in a million is so"""


class Pick(NamedTuple):
    """One image to be drawn. It carries the epoch, so that a worker needs to be told nothing."""

    epoch: int
    row: int
    copy: int = 0
    """which of its repetitions in the epoch"""

    def seed(self, seed: int) -> int:
        """Of what is random about this copy of the image."""
        return draw_seed(seed, self.epoch, self.row, *([0, self.copy] if self.copy else []))


def draw_seed(*numbers: int) -> int:
    """A well-mixed seed of 63 bits: neighbouring numbers give unrelated ones."""
    digest = hashlib.blake2b(repr(numbers).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


class OrderedBatches(Sampler[list[Pick]]):
    """Batches of image numbers: a pure function of (seed, epoch), from any batch on.

    A shuffled epoch that was drawn to its end is followed by the next; `set_epoch` says which to take instead.

    With `shuffle` every epoch has its own order. Over `world` processes no image is drawn twice; without `shuffle`
    each is drawn exactly once; with it the epoch is cut to a multiple of `world` (other images every epoch). Nothing
    else is dropped: the last batch may be small. All processes draw equally many batches, without which those that
    share a forward pass would wait for ever: where that cannot be, `len` and `iter` raise `ValueError` in all of them.
    `rank` and `world` are taken from `torch.distributed` when they are None and it runs.

    With `repeats`, an epoch has as many images as without, but `repeats` copies of each that it has, one after another
    and so over the processes (Hoffer et al. 2020, "Augment your batch"; Touvron et al. 2021, "DeiT", section 6). Each
    copy is varied by a seed of its own; those whose turn is not in an epoch have it in another, by its order.
    """

    def __init__(
        self,
        count: int,
        batch_size: int,
        *,
        shuffle: bool,
        seed: int = 0,
        rank: int | None = None,
        world: int | None = None,
        repeats: int = 1,
    ) -> None:
        if repeats < 1 or (repeats > 1 and not shuffle):
            raise ValueError(f"repeats must be at least 1, and 1 where images keep their order; got {repeats}")
        if count < 1 or batch_size < 1:
            raise ValueError(f"there must be at least one image and one image a batch; got {count} and {batch_size}")
        if (rank is None) != (world is None) or not 0 <= (rank or 0) < (world or 1):
            raise ValueError(f"rank must lie in 0 … world - 1, both or neither given; got rank {rank} of world {world}")
        self.count, self.batch_size, self.shuffle, self.seed = count, batch_size, shuffle, seed
        self.rank, self.world, self.repeats = rank, world, repeats
        self.epoch, self.start, self._told = 0, 0, 0

    def set_epoch(self, epoch: int, start: int = 0) -> None:
        """The order of `epoch` from its batch `start` on; `len()` stays that of the whole epoch."""
        self.epoch, self.start, self._told = epoch, start, self._told + 1

    def _place(self) -> tuple[int, int]:
        if self.rank is not None and self.world is not None:
            return self.rank, self.world
        running = dist.is_available() and dist.is_initialized()
        return (dist.get_rank(), dist.get_world_size()) if running else (0, 1)

    def order(self) -> Tensor:
        """(n, 2) this process's images in the order of the epoch, and which copy of each."""
        rank, world = self._place()
        if not self.shuffle:
            return _copies(torch.arange(self.count), 1)[rank::world]
        generator = torch.Generator().manual_seed(draw_seed(self.seed, self.epoch))
        order = _copies(torch.randperm(self.count, generator=generator), self.repeats)
        return order[: self.count - self.count % world][rank::world]

    def __len__(self) -> int:
        world = self._place()[1]
        least, rest = divmod(self.count, world)
        if not least:
            raise ValueError(f"every process needs an image; got {self.count} for {world}: start fewer")
        if self.batch_size == 1 and rest and not self.shuffle:
            raise ValueError(
                f"all processes must draw equally many batches; got {self.count} images one at a time for {world}: "
                f"take a batch_size of 2 or more, or a number of processes that divides {self.count}"
            )
        return -(-(least + bool(rest and not self.shuffle)) // self.batch_size)

    def __iter__(self) -> Iterator[list[Pick]]:
        count, order, epoch, told = len(self), self.order(), self.epoch, self._told
        shared = not self.shuffle and self._place()[1] > 1  # shares differ by one image, the number of batches may not
        parts = order.tensor_split(count) if shared else order.split(self.batch_size)
        for part in parts[self.start :]:
            yield [Pick(epoch, row, copy) for row, copy in part.tolist()]
        if self.shuffle and told == self._told:
            self.epoch, self.start = epoch + 1, 0


def _copies(rows: Tensor, repeats: int) -> Tensor:
    """(n,) -> (n · repeats, 2): each row as often as that, one after another, numbered."""
    return torch.stack([rows.repeat_interleave(repeats), torch.arange(repeats).repeat(len(rows))], 1)


class Drawing(Dataset[Drawn]):
    """An image set behind a transform, drawn a batch at a time.

    A transform that is not random takes the whole batch at once where the images share a size; a random one takes image
    by image under a seed of its own, and leaves torch's global generators as they were.

    An image that cannot be read raises `ImageError`, or, to `skip` it, gives way to another where `train` says so (its
    place in batch and augmentation is the same), and is left out where not: a batch then holds fewer images than were
    picked, and where all are left out one black image without a label, which no figure counts.
    """

    def __init__(
        self, images: ImageSet, transform: Transform | None, seed: int, board: Board, *, train: bool, skip: bool
    ) -> None:
        if transform is None and images.size is None:
            raise ValueError("images of many sizes need a transform to one: give transform=eval_transform(preprocess)")
        self.images, self.transform, self.seed, self.board = images, transform, seed, board
        self.train, self.skip = train, skip

    def __len__(self) -> int:
        return len(self.images)

    def __getitems__(self, picks: Sequence[Pick]) -> Drawn:
        made = self._made(picks)
        self.board.end()
        return made

    def _made(self, picks: Sequence[Pick]) -> Drawn:
        if self.images.size is not None and not (self.transform and self.transform.random):
            try:
                return Drawn(self._at_once(picks), {})
            except ImageError:
                if not self.skip:
                    raise
        bad: dict[str, str] = {}
        samples: list[Sample] = []
        for pick in picks:
            if (sample := self._read(pick, bad)) is not None:
                samples.append(sample)
            elif self.train:  # an error raised in a worker would not bring along what it met
                return Drawn(Batch(image=torch.empty(0)), bad, _too_many(bad))
        return Drawn(collate(samples or [self._blank(picks[0])]), bad)

    def _at_once(self, picks: Sequence[Pick]) -> Batch:
        self.board.begin(picks[0].row)
        batch = self.images.gather([pick.row for pick in picks])
        return batch if self.transform is None else Batch(**{**batch, "image": _moved(self.transform, batch)})

    def _read(self, pick: Pick, bad: dict[str, str]) -> Sample | None:
        """The image that was picked or the one drawn for it, cut; None where none can be read. Fills `bad`."""
        for row in self._rows(pick):
            self.board.begin(row)
            try:
                return self._cut(pick, row)
            except ImageError as error:
                if not self.skip:
                    raise
                bad[self.images.ids[row]] = str(error)
        return None

    def _rows(self, pick: Pick) -> list[int]:
        """The row that was picked, then those to be tried in its place: a function of seed, epoch and row."""
        tries = range(1, TRIES) if self.train else ()
        return [pick.row, *(draw_seed(self.seed, pick.epoch, pick.row, n) % len(self.images) for n in tries)]

    def _cut(self, pick: Pick, row: int) -> Sample:
        if not (self.transform and self.transform.random):
            return self._changed(self.images[row])
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(pick.seed(self.seed))  # the CPU's alone
            if isinstance(crop := self.transform, RandomResizedCrop):
                part = self.images.part(row, crop.box, crop.preprocess.img_size)
                _refuse_tied(crop, part)
                return Sample(**{**part, "image": crop.sized(part["image"])})
            return self._changed(self.images[row])

    def _changed(self, sample: Sample) -> Sample:
        return Sample(**{**sample, "image": _moved(self.transform, sample)}) if self.transform else sample

    def _blank(self, pick: Pick) -> Sample:
        """For a batch that lost all its images: processes must share every pass, and no kernel takes an empty one."""
        black = torch.zeros(self.images.channels, *(self.images.size or (1, 1)), dtype=torch.uint8)
        return self._changed(Sample(image=black, label=UNLABELLED, id=self.images.ids[pick.row]))


def _too_many(bad: dict[str, str]) -> str:
    return (
        f"--on-bad-image skip met {TRIES} images in a row that cannot be read, and others may be like them; "
        f"the last: {list(bad.values())[-1]}: mend the files, or name another folder"
    )


def _moved(transform: Transform, item: Sample | Batch) -> Tensor:
    """The transformed image. Raises `ValueError` where it was cut or resized and has boxes or masks, which were not."""
    image = transform(item["image"])
    if image is not item["image"]:
        _refuse_tied(transform, item)
    return image


def _refuse_tied(transform: Transform, item: Sample | Batch) -> None:
    if tied := [key for key in TIED if key in item]:
        raise ValueError(
            f"{type(transform).__name__} would cut or resize images but not their {tied[0]}: "
            "give images of the model's size, and crop none"
        )


def _as_it_is(batch: Any) -> Any:
    return batch


def _ignore_interrupt(worker: int) -> None:
    """Ctrl-C reaches every process of a terminal; only the main one decides when to stop."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def check_workers(workers: int) -> None:
    """Raises `ValueError` for processes that this machine could not hold: a thousand would take all its memory."""
    cores = os.cpu_count() or 1
    most = WORKERS_A_CORE * cores
    require(workers <= most, "workers", f"be at most {most} on this machine of {cores} cores", workers)


def make_loader(
    images: ImageSet,
    *,
    batch_size: int,
    train: bool,
    transform: Transform | None = None,
    seed: int = 0,
    workers: int = 0,
    timeout: float = 300,
    rank: int | None = None,
    world: int | None = None,
    on_bad_image: OnBadImage = "raise",
    repeats: int = 1,
) -> WatchedLoader:
    """A loader of raw batches: image uint8 (B, C, H, W), label (B,) int64, id.

    `train` shuffles, every epoch anew; otherwise every image comes once, in order. `loader.batch_sampler` is an
    `OrderedBatches`, whose `set_epoch` goes to any epoch, and which explains `repeats`.

    `on_bad_image="skip"` names and counts in `loader.bad` (`BadImages`) what cannot be read. To `train`, another image
    is drawn in its place, a function of (seed, epoch, row); nothing else of the batch, and no other batch, is changed.
    Otherwise it is left out: there are as many batches as without it, of which one has fewer images. Where a batch has
    lost all, it holds one black image with the label -100, which is none: losses and figures leave it out.

    Raises `ValueError` for images of many sizes without a `transform`, and for many more workers than this machine has
    cores; while iterating `ImageError`, naming the file, or, to skip, where many in a row to train on cannot be read;
    and `LoaderError` for a worker that died or, for `timeout` seconds (0: for ever), gave no batch.
    """
    check_workers(workers)
    check_choice("on_bad_image", on_bad_image, get_args(OnBadImage))
    order = OrderedBatches(len(images), batch_size, shuffle=train, seed=seed, rank=rank, world=world, repeats=repeats)
    board = Board(workers)
    drawing = Drawing(images, transform, seed, board, train=train, skip=on_bad_image == "skip")
    own_generator = torch.Generator().manual_seed(seed)  # else every epoch would move the global one
    return WatchedLoader(
        drawing, board=board, names=images.ids, learnt=images if train else None,
        timeout=timeout if workers else 0, batch_sampler=order, collate_fn=_as_it_is,
        num_workers=workers, persistent_workers=workers > 0, pin_memory=torch.cuda.is_available(),
        generator=own_generator, worker_init_fn=_ignore_interrupt,
    )  # fmt: skip


def get_data_loaders(
    data: str = "bloodcells",
    data_dir: str = "data",
    batch_size: int = 128,
    img_size: int | None = None,
    workers: int = 0,
    seed: int = 0,
    val_fraction: float = 0.05,
    download: bool = False,
    on_bad_image: OnBadImage = "raise",
) -> tuple[WatchedLoader, WatchedLoader]:
    """Training and validation loaders for `data`, as the flags of the same names make them.

    Images are raw: (B, 3, img_size, img_size) uint8. Raises `DataError` where the data is not found, and what
    `make_loader` raises.
    """
    config = DataConfig(
        data=data, data_dir=data_dir, batch_size=batch_size, img_size=img_size, workers=workers, seed=seed,
        val_fraction=val_fraction, download=download, on_bad_image=on_bad_image,
    )  # fmt: skip
    splits = load_splits(config)
    preprocess = splits.preprocess(img_size)
    cuts = train_transform(preprocess, AugmentConfig()), eval_transform(preprocess)
    train, val = (
        make_loader(
            images, batch_size=batch_size, train=images is splits.train, transform=cut, seed=seed, workers=workers,
            on_bad_image=on_bad_image,
        )
        for images, cut in zip((splits.train, splits.val), cuts, strict=True)
    )  # fmt: skip
    return train, val
