"""A loader that says which worker died or hangs, and over which image, where torch says a process number or nothing.

worker ── writes the image it begins with ──> board (shared memory)          main process ── a batch is missing?
                                                   └──────────────── reads ─────────────────────┘

What a worker could not read it sends along with the batch; the main process takes it up and hands on the batch alone.
"""

from __future__ import annotations

import re
import signal
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.data import DataLoader, get_worker_info

from vitrail.data.badimages import BadImages
from vitrail.data.imagesets import ImageSet
from vitrail.images import ImageError
from vitrail.records import Batch

IDLE = -1
GRACE = 0.2
"""seconds in which the system tells that a process has died"""


class LoaderError(ValueError):
    """A worker process that loads images died or hangs. The message names it and the image that it was at."""


class Board:
    """What each worker is at: the number of an image, and since when; nothing between batches. In shared memory."""

    def __init__(self, workers: int) -> None:
        self.at: Tensor = torch.full((workers, 2), IDLE, dtype=torch.int64).share_memory_()

    def begin(self, row: int) -> None:
        """To be called in a worker, before it touches the image `row`; elsewhere it does nothing."""
        info = get_worker_info()
        if info is not None:
            self.at[info.id] = torch.tensor([row, time.monotonic_ns()])

    def end(self) -> None:
        """To be called in a worker that has made a batch."""
        self.begin(IDLE)

    def read(self, worker: int) -> tuple[int, float] | None:
        """The image that a worker is at, and for how many seconds; None where it waits for a batch to make."""
        row, since = self.at[worker].tolist()
        return None if row == IDLE else (row, (time.monotonic_ns() - since) / 1e9)


class Drawn(NamedTuple):
    """What a worker gives."""

    batch: Batch
    bad: dict[str, str]
    """the images that it met and could not read: id -> why"""
    end: str = ""
    """why there can be no batch, which is then empty: the run ends when `bad` is taken up"""


class WatchedLoader(DataLoader[Batch]):
    """A `DataLoader` whose `RuntimeError`s about workers become `LoaderError`s that name worker, image and path.

    `timeout` is in seconds, for each batch; 0 waits for ever. Workers that hang are ended with the error.
    `bad` are the images that were met and could not be read; loaders of one run may share it. `names` are the ids of
    all images, `learnt` the images themselves where they are for training. Raises `ImageError` for a batch that says
    why it ends the run.
    """

    def __init__(
        self, *args: Any, board: Board, names: Sequence[str], learnt: ImageSet | None = None, **options: Any
    ) -> None:
        super().__init__(*args, **options)
        self._board, self.names, self._learnt, self.bad = board, names, learnt, BadImages()
        self._last: Any = None
        """the last pass over the batches"""

    def __iter__(self) -> Iterator[Batch]:  # type: ignore[override]
        self._last = inner = super().__iter__()
        if self._learnt is not None:
            self.bad.learnt = self._learnt
        while (drawn := self._next(inner)) is not None:
            self.bad.add(drawn.bad)
            if drawn.end:
                raise ImageError(drawn.end)
            yield drawn.batch
        self.bad.say_unlearnt()

    def _next(self, inner: Iterator[Any]) -> Drawn | None:
        """What a worker gives next; None at the end of the pass."""
        try:
            return next(inner, None)
        except (RuntimeError, OSError, EOFError) as error:  # a batch may be lost on its way from a worker that died
            workers = _workers(inner)
            hangs = str(error).startswith("DataLoader timed out")  # a disk may say "timed out" too
            gone = [] if hangs else [n for n, worker in enumerate(workers) if _is_gone(worker)]
            if not hangs and not gone:
                raise
            message = self._hanging(workers) if hangs else self._dead(workers, gone)
            self._end(inner, workers)
            raise LoaderError(message) from None

    def name_dead(self, error: RuntimeError) -> None:
        """Raises `LoaderError` in the place of torch's error, wherever that came up, if it is of a worker of this one.

        The system tells of a dead worker at any moment: most often not where a batch is waited for. The others are
        ended, or they would be when Python collects them, and torch would tell of the dead one again.
        """
        said = re.fullmatch(r"DataLoader worker \(pid(?:\(s\))? ([\d, ]+)\) .*", str(error).strip(), re.DOTALL)
        dead, workers = set(said[1].split(", ")) if said else set(), _workers(self._last)
        gone = [n for n, worker in enumerate(workers) if str(worker.pid) in dead and _is_gone(worker)]
        if gone:
            message = self._dead(workers, gone)
            self._end(self._last, workers)
            raise LoaderError(message) from None

    def _dead(self, workers: list[Any], gone: list[int]) -> str:
        how = "; ".join(f"worker {n} {_cause(workers[n].exitcode)} while at {self._place(n)}" for n in gone)
        return f"a process that loads images must live while it is needed; {how}: look at that file, and at the memory"

    def _hanging(self, workers: list[Any]) -> str:
        seen = {n: self._board.read(n) for n in range(len(workers))}
        slowest = max(seen, key=lambda n: seen[n][1] if seen[n] else 0.0)  # type: ignore[index]
        since = f" for {seen[slowest][1]:.0f} s" if seen[slowest] else ""  # type: ignore[index]
        return (
            f"a batch must come within {self.timeout:g} s (--worker-timeout); worker {slowest} has been at "
            f"{self._place(slowest)}{since}: look at that file and the disk, or give more time"
        )

    def _place(self, worker: int) -> str:
        seen = self._board.read(worker)
        return "no image" if seen is None else f"{self.names[seen[0]]} (image {seen[0]})"

    def _end(self, inner: Any, workers: list[Any]) -> None:
        """Ends all workers, those that hang by force. Torch, while it ends them, may tell of the dead one once more."""
        with suppress(RuntimeError):
            inner._shutdown_workers()
        for worker in workers:
            worker.kill()
            worker.join()
        self._iterator = None


@contextmanager
def counted_in(bad: BadImages, *loaders: Iterable[Any] | None) -> Iterator[BadImages]:
    """`bad`, in which loaders of vitrail's count meanwhile what they cannot read; told at the end, come what may.

    Raises `LoaderError` for a worker of theirs that dies, wherever the program is when it hears of it.
    """
    own = {loader: loader.bad for loader in loaders if isinstance(loader, WatchedLoader)}
    for loader in own:
        loader.bad = bad
    try:
        yield bad
    except RuntimeError as error:
        for loader in own:
            loader.name_dead(error)
        raise
    finally:
        for loader, its in own.items():
            loader.bad = its
        bad.say()


def _workers(inner: Any) -> list[Any]:
    """The processes of one pass over the batches; none without a pass, or where images are loaded in this process."""
    return list(getattr(inner, "_workers", []))


def _is_gone(worker: Any) -> bool:
    with suppress(RuntimeError):  # torch raises it wherever the program is when the system tells of a dead child
        worker.join(GRACE)
    return not worker.is_alive()


def _cause(code: int | None) -> str:
    if code is None or code >= 0:
        return f"ended with code {code}"
    name = signal.Signals(-code).name
    return f"was killed by {name}" + (", as the system does when memory runs out," if name == "SIGKILL" else "")
