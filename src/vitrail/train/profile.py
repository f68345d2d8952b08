"""`--profile`: what bounds a run, measured on a few of its own steps, after which it goes on.

    steps     WARM ──────── FREE ────────────── PARTS ──────────────────── TRACED
              left alone    images per second   the device waited for      operators, their times,
                            as the run has it   after each part of a step  and what they multiply

A step is: waiting for a batch │ preparing it (to the device, augmentation) │ forward │ backward │ optimiser │ what
lies between two steps. On a GPU these parts run into each other, so that waiting after each of them makes steps longer:
how much of the free steps' time the device was at work is what tells there. None of it changes a weight by a bit.

What the machine multiplies at most is measured by products of square matrices in the run's own precision. FLOPs are two
for each number that is multiplied in products, convolutions and attention, whose backward passes do what they do.
"""

from __future__ import annotations

import json
import logging
import resource
import sys
import time
from pathlib import Path
from typing import Any, NamedTuple

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch.profiler import ProfilerActivity, profile

from vitrail.files import write_whole
from vitrail.tasks.base import batch_count
from vitrail.train.config import TrainConfig
from vitrail.train.history import Waits
from vitrail.train.operators import LEARNS, PRODUCTS, Operator, operators_of

LOG = logging.getLogger("vitrail")
WARM, FREE, PARTS, TRACED = 10, 10, 20, 3
"""steps that are left alone, that are timed as wholes and in parts, and whose operators are"""
FEWEST = 4
"""steps of which something can be said"""
WAITING, PREPARING, FORWARD, BACKWARD, OPTIMISER, BETWEEN = (
    "waiting for images", "preparing images", "forward", "backward", "optimiser", "between steps",
)  # fmt: skip
LEARNING = (FORWARD, BACKWARD, OPTIMISER)
SIDES = {"cpu": 1024, "cuda": 4096, "mps": 2048}
"""rows and columns of the matrices that are multiplied to know how fast the machine can"""
MUCH = 0.25
"""share of the time from which a part that learns nothing bounds a run"""
AT_WORK = 0.5
"""share of forward, backward and optimiser below which the machine mostly waits for the next operator"""
BUSY = 0.85
"""share of a GPU's time from which nothing but its own work bounds it"""
ADVICE = {
    WAITING: ("data loading", "raise --workers, or hold the images in memory (--in-memory)"),
    PREPARING: ("preparing images", "a GPU augments faster, less --auto-augment sooner"),
    BETWEEN: ("what lies between steps", "validate, keep and log less often"),
}
"""parts that learn nothing: what they are called, and what helps"""
NOTHING_DONE = {
    False: "Python runs, or an operator that takes under 10 µs",
    True: "the GPU has nothing to do",
}
"""what happens between long operators, and on a GPU"""
ACTIVITIES = {
    "cpu": [ProfilerActivity.CPU], "mps": [ProfilerActivity.CPU],
    "cuda": [ProfilerActivity.CPU, ProfilerActivity.CUDA],
}  # fmt: skip
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


class Found(NamedTuple):
    """What was measured, of a step on average."""

    device: str
    precision: str
    images_per_second: float
    milliseconds: dict[str, float]
    """by part"""
    at_work: float
    """share of forward, backward and optimiser in operators of `SHORT` or more; on a GPU of the free steps' time"""
    flop: float
    peak: float
    """FLOP/s of this machine's matrix products"""
    products: float
    """milliseconds in products, convolutions and attention"""
    memory: int
    """bytes at the most: the process's, or the GPU's"""
    operators: tuple[Operator, ...]
    """those with most time, the longest first"""

    def share(self, *parts: str) -> float:
        """Of a step's time."""
        return sum(self.milliseconds[part] for part in parts) / max(sum(self.milliseconds.values()), 1e-9)

    @property
    def learning(self) -> float:
        """Milliseconds in forward, backward and optimiser."""
        return sum(self.milliseconds[part] for part in LEARNING)

    def rate(self, milliseconds: float) -> float:
        """What is multiplied in a time, as a share of the most that the machine could."""
        return 1e3 * self.flop / max(milliseconds * self.peak, 1e-9)


def verdict(found: Found) -> str:
    """What bounds the run, and what would help, in a sentence."""
    gpu_is_busy = found.device == "cuda" and found.at_work >= BUSY
    idle = {part: found.share(part) for part in ADVICE}
    part = max(idle, key=lambda name: idle[name])
    if idle[part] >= MUCH and not gpu_is_busy:
        cause, advice = ADVICE[part]
        return f"bound by {cause}: {idle[part]:.0%} of the time: {advice}"
    if found.at_work < AT_WORK:
        return (
            f"bound by starting many small operators: for {1 - found.at_work:.0%} of forward, backward and optimiser "
            f"{NOTHING_DONE[found.device == 'cuda']}: raise --batch-size"
        )
    products, others = found.products / max(found.learning, 1e-9), [op.name for op in found.operators]
    longest = next((name for name in others if not PRODUCTS.search(name)), "none")
    return (
        f"bound by compute: {found.share(*LEARNING):.0%} of the time in forward, backward and optimiser, "
        f"{products:.0%} of that in matrix products at {found.rate(found.products):.0%} of what this machine "
        f"multiplies ({found.peak / 1e9:,.0f} GFLOP/s in {found.precision}), most of the rest in {longest}"
    )


def table(found: Found) -> str:
    """All that was measured, as Markdown."""
    lines = [f"{verdict(found)}.", "", "| part of a step | milliseconds | share |", "|---|---:|---:|"]
    lines += [f"| {part} | {ms:.2f} | {found.share(part):.1%} |" for part, ms in found.milliseconds.items()]
    gigas = 1e3 * found.flop / max(found.milliseconds[FORWARD] + found.milliseconds[BACKWARD], 1e-9) / 1e9
    lines += [
        "", f"- images per second: {found.images_per_second:,.1f}",
        f"- FLOPs of a step: {found.flop / 1e9:,.2f} G, {gigas:,.1f} GFLOP/s in forward and backward, "
        f"{gigas * 1e9 / found.peak:.0%} of the {found.peak / 1e9:,.0f} GFLOP/s that this machine multiplies in "
        f"{found.precision}",
        f"- memory at the most: {found.memory / 2**20:,.0f} MiB",
        "", "| operator | calls | milliseconds |", "|---|---:|---:|",
    ]  # fmt: skip
    lines += [f"| {op.name} | {op.calls:.0f} | {op.milliseconds:.2f} |" for op in found.operators]
    return "\n".join(lines) + "\n"


def planned(steps: int) -> list[str]:
    """What is done with each step of a run of so many; nothing where they are too few."""
    if steps < FEWEST:
        return []
    traced = min(TRACED, steps // FEWEST)
    warm, free = (min(most, (steps - traced) // 3) for most in (WARM, FREE))
    parts = min(PARTS, steps - traced - warm - free)
    return ["warm"] * warm + ["free"] * free + ["parts"] * parts + ["traced"] * traced


class Profile(Callback):
    """Measures the first steps of the first process, and then does nothing. It must be the first callback of all."""

    def __init__(self, waits: Waits, config: TrainConfig, device: str, folder: Path | None) -> None:
        self.waits, self.config, self.device, self.folder = waits, config, device, folder
        self.plan: list[str] = []
        self.spent = dict.fromkeys((WAITING, PREPARING, *LEARNING, BETWEEN), 0.0)
        self.parted = 0
        """steps whose parts were timed"""
        self.free: list[float] = []
        """seconds of each step that was timed as a whole"""
        self.images = 0
        self.last: float | None = None
        """when the part before ended; None where what came before is no step"""
        self.tracer: profile | None = None
        self.mark: Any = None
        self.traces: list[profile] = []

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        batches = int(trainer.num_training_batches)
        left = ((trainer.max_epochs or 0) - trainer.current_epoch) * batches - trainer.fit_loop.batch_idx - 1
        if trainer.is_global_zero:
            self.plan = planned(left)
            if not self.plan:
                LOG.warning("--profile needs a run of %d steps at least; this one has %d", FEWEST, left)
        self._begin()

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._begin()

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:  # fmt: skip
        if self.stage == "parts" and self.last is not None:
            self.spent[BETWEEN] += self.waits.began - self.last
            self.spent[WAITING] += self.waits.ended - self.waits.began
            self.last = self.waits.ended
            self._part(PREPARING)
        elif self.tracer:
            self.mark = torch.profiler.record_function(LEARNS)
            self.mark.__enter__()

    def on_before_backward(self, trainer: Trainer, pl_module: LightningModule, loss: Any) -> None:
        self._part(FORWARD)

    def on_after_backward(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._part(BACKWARD)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if not self.plan:
            return
        self._part(OPTIMISER)
        self._end(batch_count(batch))
        self.plan.pop(0)
        if self.plan:
            self._begin()
        else:
            self._say()

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._drop()

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._drop()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self._drop()

    @property
    def stage(self) -> str:
        return self.plan[0] if self.plan else ""

    def _begin(self) -> None:
        """A step begins, with the wait for its batch."""
        self.last = self._now() if self.plan else None
        if self.stage == "traced":
            self.tracer = profile(activities=ACTIVITIES[self.device], record_shapes=True)
            self.tracer.start()

    def _part(self, name: str) -> None:
        if self.stage == "parts" and self.last is not None:
            before, self.last = self.last, self._now()
            self.spent[name] += self.last - before

    def _end(self, images: int) -> None:
        """The step is done, which began when `_begin` says."""
        if self.stage == "parts" and self.last is not None:
            self.parted += 1
        elif self.stage == "free" and self.last is not None:
            if self.plan[1] != "free":
                wait_for(self.device)  # for what the free steps have left to the device
            self.free.append(time.perf_counter() - self.last)
            self.images += images
        if self.tracer:
            self.traces.append(self.tracer)
        self._drop()

    def _drop(self) -> None:
        """What has begun is ended."""
        mark, tracer = self.mark, self.tracer
        self.mark = self.tracer = self.last = None
        if mark:
            mark.__exit__(None, None, None)
        if tracer:
            tracer.stop()

    def _now(self) -> float:
        if self.stage not in ("warm", "free") or not self.images:
            wait_for(self.device)
        return time.perf_counter()

    def _say(self) -> None:
        """Tells the verdict, and writes what it rests on; what cannot be measured or written ends no training."""
        try:
            found = self._found()
            LOG.warning("--profile: %s", verdict(found))
            if self.folder:
                write_whole(self.folder / "profile.md", table(found))
                write_whole(self.folder / "profile.json", json.dumps(found._asdict() | {"verdict": verdict(found)}))
                self.traces[-1].export_chrome_trace(str(self.folder / "profile_trace.json.gz"))
        except (RuntimeError, OSError) as error:  # no memory left, or no room
            LOG.warning("--profile cannot be taken (%s): training goes on without it", error)

    def _found(self) -> Found:
        milliseconds = {part: 1e3 * seconds / self.parted for part, seconds in self.spent.items()}
        memory = most_memory(self.device)  # before matrices are multiplied
        seconds = sum(self.free)
        learning = sum(milliseconds[part] for part in LEARNING)
        traced = operators_of(self.traces, self.device)
        whole = 1e3 * seconds / len(self.free) if self.device == "cuda" else learning
        return Found(
            device=self.device, precision=self.config.precision, images_per_second=self.images / seconds,
            milliseconds=milliseconds, at_work=min(traced.worked / whole, 1.0), flop=traced.flop,
            peak=peak(self.device, DTYPES[self.config.precision]), products=traced.products,
            memory=memory, operators=traced.operators,
        )  # fmt: skip


def peak(device: str, dtype: torch.dtype, repeats: int = 5) -> float:
    """FLOP/s of a product of square matrices on this machine, the best of a few."""
    generator, side = torch.Generator(device).manual_seed(0), SIDES[device]
    x, y = (torch.randn(side, side, device=device, generator=generator).to(dtype) for _ in range(2))
    seconds = []
    for _ in range(repeats + 1):  # the first makes ready
        wait_for(device)
        began = time.perf_counter()
        x @ y
        wait_for(device)
        seconds.append(time.perf_counter() - began)
    return 2 * side**3 / min(seconds[1:])


def most_memory(device: str) -> int:
    """Bytes that were held at the same time: by tensors on a GPU, otherwise by this process."""
    if device == "cuda":
        return torch.cuda.max_memory_allocated()
    unit = 1 if sys.platform == "darwin" else 1024
    return unit * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def wait_for(device: str) -> None:
    """Returns when an accelerator has done what it was given."""
    if device != "cpu":
        torch.accelerator.synchronize()
