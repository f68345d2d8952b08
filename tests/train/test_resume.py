"""On the CPU, a stopped and resumed run ends in the very same weights as one that was left alone."""

from __future__ import annotations

import os
import shutil
import signal
import zipfile

import pytest
import torch
import torch.nn.functional as F
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

from vitrail.data.loading import make_loader
from vitrail.layers import linear
from vitrail.train import engine
from vitrail.train.callbacks import StopRequested
from vitrail.train.config import TrainConfig
from vitrail.train.engine import Interrupted
from vitrail.train.resume import refuse_unshared, same_kernels

RECIPE = {"ema": 0.9, "mixup": 0.2, "accumulate": 2, "crop": "pad"}
TIMES = {"seconds", "images_per_second", "data_wait"}


def signal_at(stop, number=signal.SIGINT):
    def hook(batch):
        if batch == stop:
            os.kill(os.getpid(), number)

    return hook


def figures(history):
    return [{name: value for name, value in row.items() if name not in TIMES} for row in history.rows]


@pytest.fixture(scope="module")
def undisturbed_cache():
    return {}


@pytest.fixture
def undisturbed(undisturbed_cache, train, make_task, fingerprint, tmp_path):
    """Fingerprint and figures of the run that nobody stopped."""
    if not undisturbed_cache:
        task = make_task(drop_path_rate=0.2, drop_rate=0.1)
        history = train(task, out=tmp_path / "whole", **RECIPE)
        undisturbed_cache["found"] = fingerprint(task), figures(history)
    return undisturbed_cache["found"]


@pytest.mark.fault(42, 43)
# eight batches an epoch, two a step
@pytest.mark.parametrize(("stop", "workers"), [(0, 0), (5, 0), (6, 0), (7, 0), (8, 0), (13, 0), (23, 0), (5, 2)])
def test_a_resumed_run_is_bit_identical(stop, workers, undisturbed, train, make_task, fingerprint, tmp_path):
    with pytest.raises(Interrupted, match=r"go on with: vitrail train --resume .*run"):
        train(
            make_task(drop_path_rate=0.2, drop_rate=0.1),
            out=tmp_path / "run",
            workers=workers,
            hook=signal_at(stop),
            **RECIPE,
        )
    task = make_task(seed=1, drop_path_rate=0.2, drop_rate=0.1)  # whose own weights must not matter
    history = train(task, out=tmp_path / "run", workers=workers, resume=True, **RECIPE)  # after 23: only writes model/
    assert (fingerprint(task), figures(history)) == undisturbed


def test_two_stops_in_one_epoch(undisturbed, train, make_task, fingerprint, tmp_path):
    for resume, stop in ((False, 9), (True, 12)):
        with pytest.raises(Interrupted):
            train(
                make_task(drop_path_rate=0.2, drop_rate=0.1),
                out=tmp_path,
                resume=resume,
                hook=signal_at(stop),
                **RECIPE,
            )
    task = make_task(seed=1, drop_path_rate=0.2, drop_rate=0.1)
    history = train(task, out=tmp_path, resume=True, **RECIPE)
    assert (fingerprint(task), figures(history)) == undisturbed


@pytest.mark.fault(42)
def test_a_kill_between_two_files_costs_an_epoch_but_no_bit(train, make_task, fingerprint, tmp_path, monkeypatch):
    """`best.ckpt` of the second epoch is there, its `last.ckpt` not: the epoch is repeated and stays the best."""

    def second_is_best(self):
        self.record.figures = {"val_accuracy": [0.1, 0.9, 0.5][self.trainer.current_epoch]}

    def killed(*files):
        calls.append(files)
        if len(calls) == 2:
            raise StopRequested
        copy(*files)

    monkeypatch.setattr(engine.TaskModule, "on_validation_epoch_end", second_is_best)
    whole, again, copy, calls = make_task(), make_task(seed=1), shutil.copyfileobj, []
    train(whole, out=tmp_path / "whole", **RECIPE)
    with monkeypatch.context() as patch, pytest.raises(Interrupted, match="stopped in epoch 3"):
        patch.setattr(shutil, "copyfileobj", killed)
        train(out=tmp_path / "run", **RECIPE)
    train(again, out=tmp_path / "run", resume=True, **RECIPE)
    assert fingerprint(again) == fingerprint(whole)


@pytest.mark.fault(15)
@pytest.mark.parametrize("stop", [3, 13])
def test_a_damaged_newest_checkpoint_costs_time_but_no_bit(stop, train, make_task, fingerprint, tmp_path, caplog):
    """Within an epoch and in the next: the run goes on from the one before, and ends as it would have."""
    whole = make_task()
    train(whole, out=tmp_path / "whole", **RECIPE)
    with pytest.raises(Interrupted):
        train(out=tmp_path / "run", hook=signal_at(stop), **RECIPE)
    last = tmp_path / "run" / "checkpoints" / "last.ckpt"
    _flip_a_bit(last)
    if stop < 8:  # nothing came before it
        with pytest.raises(ValueError, match=r"holds none \(last\.ckpt: the checksum of"):
            train(make_task(seed=1), out=tmp_path / "run", resume=True, **RECIPE)
        return
    task = make_task(seed=1)
    train(task, out=tmp_path / "run", resume=True, **RECIPE)
    assert fingerprint(task) == fingerprint(whole)
    assert "going on from previous.ckpt" in caplog.text


def _flip_a_bit(path):
    """In the middle of the largest part: between parts there is padding, which no checksum is over."""
    with zipfile.ZipFile(path) as archive:
        part = archive.read(max(archive.infolist(), key=lambda info: info.file_size))
    content = bytearray(path.read_bytes())
    content[content.index(part) + len(part) // 2] ^= 1
    path.write_bytes(content)


def test_every_batch_has_a_seed_of_its_own(train):
    """Batches that share an optimiser step too."""
    assert len({*_seeds_of(train, seed=0), *_seeds_of(train, seed=1)}) == 2 * 16


def _seeds_of(train, **config):
    seeds = []
    train(epochs=2, accumulate=2, hook=lambda number: seeds.append(torch.initial_seed()), **config)
    return seeds


def test_another_seed_is_another_run(undisturbed, train, make_task, fingerprint, tmp_path):
    task = make_task(drop_path_rate=0.2, drop_rate=0.1)
    train(task, out=tmp_path, seed=1, **RECIPE)
    assert fingerprint(task) != undisturbed[0]


def test_a_finished_run_is_left_as_it_is(train, make_task, fingerprint, tmp_path):
    first, again = make_task(), make_task(seed=1)
    history = train(first, out=tmp_path, ema=0.9)
    assert train(again, out=tmp_path, resume=True, ema=0.9).rows == history.rows
    assert fingerprint(again) == fingerprint(first)


def test_a_run_that_stopped_early_stays_stopped(train, make_task, tmp_path):
    history = train(out=tmp_path, epochs=9, patience=1, lr=1e-9, min_lr=0)
    assert len(history) < 9
    assert (
        train(make_task(seed=1), out=tmp_path, resume=True, epochs=9, patience=1, lr=1e-9, min_lr=0).rows
        == history.rows
    )


def test_a_run_can_be_made_longer(train, tmp_path):
    train(out=tmp_path, epochs=1)
    assert train(out=tmp_path, resume=True, epochs=2)["epoch"] == [1, 2]


@pytest.mark.fault(43)
@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_each_signal_has_its_exit_code(number, code, train, tmp_path):
    with pytest.raises(Interrupted) as stopped:
        train(out=tmp_path, hook=signal_at(3, number))
    assert stopped.value.exit_code == code


def test_handlers_of_signals_are_afterwards_what_they_were(train, tmp_path, monkeypatch):
    """After a run that ended well, one that was stopped and one that failed; Lightning has a handler of its own."""

    def mine(*_):
        raise AssertionError("nobody sent a signal")

    before = [signal.signal(number, mine) for number in (signal.SIGTERM, signal.SIGINT)]
    try:
        train(epochs=1)
        with pytest.raises(Interrupted):
            train(out=tmp_path, hook=signal_at(3))
        with pytest.raises(ZeroDivisionError):
            train(hook=lambda number: 1 / 0)
        assert [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)] == [mine, mine]
    finally:
        for number, handler in zip((signal.SIGTERM, signal.SIGINT), before, strict=True):
            signal.signal(number, handler)


def test_ctrl_c_in_the_last_batch_begins_no_other_epoch(train, tmp_path):
    seen = []

    def hook(number):
        seen.append(number)
        signal_at(7)(number)

    with pytest.raises(Interrupted, match="stopped in epoch 2; go on with"):
        train(out=tmp_path, hook=hook)
    assert seen == list(range(8))


@pytest.mark.parametrize("moment", ["on_validation_epoch_end", "on_train_end"])
def test_ctrl_c_in_the_last_epoch_is_not_swallowed(moment, train, tmp_path, monkeypatch):
    """Neither in its validation nor after it. What was trained is kept, and to go on only finishes the run."""
    own = getattr(engine.TaskModule, moment)

    def interrupted(self):
        own(self)
        if self.trainer.current_epoch >= 1:  # two epochs: the last
            os.kill(os.getpid(), signal.SIGINT)

    with monkeypatch.context() as patch:
        patch.setattr(engine.TaskModule, moment, interrupted)
        with pytest.raises(Interrupted, match="stopped after the last epoch; go on with: vitrail train --resume"):
            train(out=tmp_path, epochs=2)
    assert not (tmp_path / "model").exists()
    assert len(train(out=tmp_path, epochs=2, resume=True)) == 2
    assert (tmp_path / "model" / "model.safetensors").is_file()


def test_loader_workers_leave_ctrl_c_to_the_main_process(images):
    """A terminal sends it to all processes."""
    loader = make_loader(images[0], batch_size=8, train=False, workers=1)
    batches = iter(loader)
    next(batches)
    os.kill(loader._iterator._workers[0].pid, signal.SIGINT)
    assert sum(len(batch["label"]) for batch in batches) == 52


def test_a_second_signal_ends_it_at_once(train, tmp_path):
    def twice(batch):
        for _ in range(2):
            os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(Interrupted, match="epoch 1; nothing was kept"):
        train(out=tmp_path, hook=twice)
    assert not (tmp_path / "checkpoints").exists()


def test_without_a_folder_nothing_is_kept(train):
    with pytest.raises(Interrupted, match="nothing was kept"):
        train(hook=signal_at(3))


@pytest.mark.fault(48)
def test_a_longer_schedule_is_told_of(train, tmp_path, caplog):
    train(out=tmp_path, epochs=1)
    assert "--epochs" not in caplog.text
    train(out=tmp_path, epochs=2, resume=True)
    assert caplog.messages == ["--epochs was 1 and is 2: from here on the learning rate follows the schedule of 2"]


@pytest.mark.fault(48)
def test_a_schedule_shorter_than_the_run_is_refused_and_leaves_it_as_it_was(train, tmp_path):
    train(out=tmp_path, epochs=3)
    before = (tmp_path / "config.yaml").read_text()
    for epochs in (1, 2):
        with pytest.raises(ValueError, match=f"^--epochs must be at least 3, which are done; got {epochs}$"):
            train(out=tmp_path, epochs=epochs, resume=True)
    assert (tmp_path / "config.yaml").read_text() == before
    assert len(train(out=tmp_path, epochs=3, resume=True)) == 3


def test_a_resume_that_makes_no_checkpoint_leaves_the_config_as_it_was(train, tmp_path):
    """Or what it was told would be what the next resume is told."""
    train(out=tmp_path, epochs=1)
    before = (tmp_path / "config.yaml").read_text()

    def fail(batch):
        raise KeyError("the disk is gone")

    with pytest.raises(KeyError):
        train(out=tmp_path, epochs=2, resume=True, hook=fail)
    assert (tmp_path / "config.yaml").read_text() == before
    train(out=tmp_path, epochs=2, resume=True)
    assert "epochs: 2" in (tmp_path / "config.yaml").read_text()


@pytest.mark.parametrize(("strange", "lacks"), [
    ({"state_dict": {}, "told": {"trained": {}}}, "history"),
    ({"state_dict": {}, "told": {}, "history": {"rows": [], "totals": {}, "images": 0, "seconds": 0, "skipped": 0}},
     r"history\.weight, told\.trained"),
    ({"weight": torch.zeros(1)}, "history, state_dict, told"),
])  # fmt: skip
def test_a_checkpoint_of_somebody_else_is_refused(strange, lacks, train, tmp_path):
    (tmp_path / "checkpoints").mkdir()
    torch.save(strange, tmp_path / "checkpoints" / "last.ckpt")
    with pytest.raises(ValueError, match=f"a checkpoint that it wrote itself; .*last.ckpt lacks {lacks}: take"):
        train(out=tmp_path, resume=True)
    assert not (tmp_path / "config.yaml").exists()


def test_nothing_to_resume(train, tmp_path):
    with pytest.raises(ValueError, match=r"--resume needs a run that wrote .*checkpoints; found none"):
        train(out=tmp_path, resume=True)
    with pytest.raises(ValueError, match="found none"):
        train(resume=True)


def test_a_run_is_not_overwritten(train, tmp_path):
    train(out=tmp_path, epochs=1)
    with pytest.raises(ValueError, match="holds one already: go on with --resume"):
        train(out=tmp_path, epochs=1)


# ---- kernels


def kernels():
    cuda = torch.backends.cuda
    return (
        torch.are_deterministic_algorithms_enabled(),
        torch.is_deterministic_algorithms_warn_only_enabled(),
        torch.backends.cudnn.benchmark,
        (cuda.flash_sdp_enabled(), cuda.math_sdp_enabled(), cuda.mem_efficient_sdp_enabled(), cuda.cudnn_sdp_enabled()),
        os.environ.get("CUBLAS_WORKSPACE_CONFIG"),
    )


def test_kernels_that_repeat_themselves_only_where_asked_for(train):
    before, seen = kernels(), []
    train(epochs=1, hook=lambda number: seen.append(kernels()))
    assert set(seen) == {before}
    seen.clear()
    train(epochs=1, deterministic=True, hook=lambda number: seen.append(kernels()))
    assert set(seen) == {(True, True, False, (True, True, False, False), ":4096:8")}
    assert kernels() == before


def test_kernels_are_restored_after_an_error_to_what_they_were(monkeypatch):
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":16:8")
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", True)
    before = kernels()
    with pytest.raises(RuntimeError), same_kernels(True):
        assert kernels()[-1] == ":16:8"  # somebody's own choice, which repeats itself too
        raise RuntimeError
    assert kernels() == before


def test_no_kernel_is_chosen_by_a_timing_while_a_run_validates(train, monkeypatch):
    """Which may go otherwise in the process that goes on, and then its figures differ in their last bits."""
    called = []
    monkeypatch.setattr(linear, "LEAST", 1)
    monkeypatch.setattr(linear, "_is_fast", lambda dtype, threads: torch.backends.mkldnn.is_available())
    monkeypatch.setattr(linear, "_onednn", lambda x, weight, bias: called.append(x.shape) or F.linear(x, weight, bias))
    train()
    assert called == []
    with torch.no_grad():
        linear.Linear(2, 2)(torch.ones(1, 2))
    assert len(called) == torch.backends.mkldnn.is_available()


# ---- several processes


def distributed(images, shuffle=True):
    rows = TensorDataset(images[0].images, images[0].labels)
    return DataLoader(rows, batch_size=10, sampler=DistributedSampler(rows, 2, 0, shuffle=shuffle))


def test_processes_that_would_train_on_the_same_images_are_refused(images):
    several = TrainConfig(devices=2, num_nodes=3)
    rows = TensorDataset(images[0].images, images[0].labels)
    for loader, name in ((DataLoader(rows, shuffle=True), "a DataLoader with RandomSampler"), ([rows], "list")):
        refuse_unshared(loader, TrainConfig())
        with pytest.raises(ValueError, match=rf"--devices 2 and --num-nodes 3 need .*; got {name}: use .*make_loader"):
            refuse_unshared(loader, several)
    refuse_unshared(make_loader(images[0], batch_size=8, train=True), several)
    refuse_unshared(distributed(images), several)


def test_fit_refuses_them(images, make_task):
    loader = DataLoader(TensorDataset(images[0].images, images[0].labels))
    with pytest.raises(ValueError, match="--devices 2 and --num-nodes 1 need"):
        engine.fit(make_task(), loader, None, TrainConfig(devices=2, device="cpu"))


def test_a_distributed_sampler_is_told_the_epoch(images, make_task):
    loader, epochs = distributed(images), []
    loader.sampler.set_epoch = epochs.append
    engine.fit(make_task(), loader, None, TrainConfig(epochs=3, device="cpu"))
    assert epochs == [0, 1, 2]
