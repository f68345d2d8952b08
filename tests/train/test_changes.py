"""A run that is gone on with under other settings, images, processes or with another network."""

from __future__ import annotations

import json
import os
import re
import signal
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset

from vitrail.data.imagesets import TensorSet
from vitrail.train import engine
from vitrail.train.changes import FREE, SETTLED, go_on, same_step
from vitrail.train.checkpoint import read
from vitrail.train.config import TrainConfig
from vitrail.train.engine import Interrupted, fit

SAID = "a resumed run must be told what it was told before; "


def stop_at(batch):
    def hook(number):
        if number == batch:
            os.kill(os.getpid(), signal.SIGINT)

    return hook


@pytest.fixture
def stopped(train, tmp_path) -> Path:
    """A run of three epochs of eight batches, stopped in the middle of the second."""
    with pytest.raises(Interrupted):
        train(out=tmp_path / "run", hook=stop_at(11))
    return tmp_path / "run"


def other(part: TensorSet, **change: Any) -> TensorSet:
    return TensorSet(
        **{"images": part.images, "labels": part.labels, "classes": part.classes, "ids": part.ids} | change
    )


# ---- what is refused


@pytest.mark.fault(45)
def test_what_is_learnt_and_how_must_stay(train, stopped):
    message = f"{SAID}--lr was 0.01, got 0.1; --accumulate was 1, got 2: take the old values, or a new --out; or go on"
    with pytest.raises(ValueError, match=message):
        train(out=stopped, resume=True, lr=0.1, accumulate=2)
    assert TrainConfig.from_yaml(stopped / "config.yaml").lr == 1e-2


@pytest.mark.fault(45)
def test_every_setting_is_compared(make_task, stopped):
    """Whatever it is called and of whatever kind; and what may be overridden, may be so by its name alone."""
    last, task = stopped / "checkpoints" / "last.ckpt", make_task()
    before = read(last)["told"]
    assert {field.name for field in fields(TrainConfig)} > FREE | set(SETTLED)
    for field in fields(TrainConfig):
        value = "another" if isinstance(before[field.name], str | tuple | None) else before[field.name] + 1
        now = before | {field.name: value}
        if field.name in FREE:
            assert not go_on(last, now, task).changed
            continue
        flag = "--" + field.name.replace("_", "-")
        with pytest.raises(ValueError, match=f"{SAID}{flag} was {re.escape(str(before[field.name]))}, got {value}[:;]"):
            go_on(last, now, task)
        if field.name not in SETTLED:
            (line,) = go_on(last, now, task, [field.name]).told["overridden"]
            assert line == f"overridden from epoch 2 on: {flag} {before[field.name]} -> {value}"


def test_the_model_that_is_meant_where_none_is_named_had_another_name_once(make_task, stopped):
    last = stopped / "checkpoints" / "last.ckpt"
    held = torch.load(last, weights_only=True)
    now = held["told"]
    assert now["model"] == "auto"
    held["told"] = {**now, "model": "vit_tiny"}
    torch.save(held, last)
    assert not go_on(last, now, make_task()).changed
    for other in ({"model": "vit_small"}, {"from_weights": "elsewhere"}):
        with pytest.raises(ValueError, match="--model was vit_tiny, got "):
            go_on(last, now | other, make_task())


@pytest.mark.fault(45)
def test_what_would_do_nothing_cannot_be_overridden(train, stopped):
    """The images that were held out stay so, whatever share of them is asked for."""
    message = (
        rf"{SAID}--val-fraction was 0.05, got 0.1; --val-fraction had its say when the run began, which nothing can "
        r"override: images that were held out stay so; another share is for a new --out: take the old values, .*--out$"
    )
    with pytest.raises(ValueError, match=message):
        train(out=stopped, resume=True, val_fraction=0.1)
    for name, mend in SETTLED.items():
        words = f"--override cannot change {name}, which had its say when the run began: {mend}"
        with pytest.raises(ValueError, match=f"^{re.escape(words)}$"):
            train(out=stopped, resume=True, val_fraction=0.1, override=[name.replace("_", "-")])


@pytest.mark.fault(45)
def test_other_frozen_weights_cannot_be_overridden(train, make_task, stopped):
    """The optimiser's moments would be those of others."""
    frozen = make_task()
    frozen.backbone.blocks.requires_grad_(False)
    message = (
        r"told before; other weights are trained, which nothing can override: backbone\.blocks\.0\.norm1\.weight was "
        r"trained without weight decay, got frozen, .* and 21 more: take the old values, or a new --out$"
    )
    with pytest.raises(ValueError, match=message):
        train(frozen, out=stopped, resume=True)
    exempt = make_task()
    exempt.no_weight_decay = lambda: {"backbone.head.weight"}
    with pytest.raises(
        ValueError, match=r"head\.weight was trained with weight decay, got trained without weight decay"
    ):
        train(exempt, out=stopped, resume=True)


@pytest.mark.fault(45)
@pytest.mark.parametrize("rule", [{"epochs": 1}, {"patience": 1, "lr": 1e-12, "min_lr": 0.0}])
def test_nothing_is_overridden_where_no_epoch_comes(rule, train, tmp_path):
    """Where all are over, and where a rule ended the run: it stays as it is."""
    done = len(train(out=tmp_path, **rule))
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    with pytest.raises(ValueError, match=f"epochs that are still to come; this run has none left after its {done}: gi"):
        train(out=tmp_path, resume=True, override=["flip"], flip=0.0, **rule)
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before
    assert len(train(out=tmp_path, resume=True, **rule)) == done
    more = rule | {"epochs": done + 1, "patience": 0}
    assert len(train(out=tmp_path, resume=True, override=["flip"], flip=0.0, **more)) == done + 1


@pytest.mark.fault(45)
def test_another_network_of_the_same_shapes_is_refused(train, make_task, stopped):
    task = make_task()
    task.backbone.config = type(task.backbone.config)(**vars(task.backbone.config) | {"num_heads": 4})
    with pytest.raises(ValueError, match=rf"{SAID}network.num_heads was 2, got 4: take .*--override network \("):
        train(task, out=stopped, resume=True)
    with pytest.raises(ValueError, match=r"network.drop_path_rate was 0.0, got 0.2: "):
        train(make_task(drop_path_rate=0.2), out=stopped, resume=True)


@pytest.mark.fault(45)
def test_another_preprocessing_is_refused(train, make_task, stopped):
    task = make_task()
    task.backbone.preprocess = task.backbone.preprocess.replace(mean=(0.4,) * 3)
    with pytest.raises(ValueError, match=r"preprocess.mean was \(0.5, 0.5, 0.5\), got \(0.4, 0.4, 0.4\): take"):
        train(task, out=stopped, resume=True)


@pytest.mark.fault(45)
def test_weights_that_do_not_fit_cannot_be_overridden(train, make_task, stopped):
    wide, words = make_task(mlp_ratio=2), ("network",)
    message = (
        r"network.mlp_ratio was .*; weights do not fit, which nothing can override: backbone\.blocks\.0\.mlp\.fc1\."
        r"weight was \(64, 16\), got \(32, 16\), .* and 3 more: take the old values, or a new --out$"
    )
    with pytest.raises(ValueError, match=message):
        train(wide, out=stopped, resume=True, override=words)
    more = make_task()
    more.scale = torch.nn.Parameter(torch.ones(1))
    with pytest.raises(ValueError, match=r"told before; weights do not fit, .*: scale was not there, got \(1,\): take"):
        train(more, out=stopped, resume=True)


@pytest.mark.fault(45)
def test_other_images_are_refused(train, images, stopped):
    plain = images[0]
    labels = plain.labels.clone()
    labels[7] = (labels[7] + 1) % 3
    others = {
        "1 labelled otherwise: 7": other(plain, labels=labels),
        "1 new: another, 1 gone: 0": other(plain, ids=["another", *plain.ids[1:]]),
        "the same names in another order: row 1 is 3": plain.subset(torch.tensor([3, 1, 2, 0, *range(4, 60)])),
    }  # the order is of images whose labels stay
    for which, part in others.items():
        with pytest.raises(ValueError, match=rf"{SAID}images.sha256 was \w{{16}}, got \w{{16}} \({which}\): take"):
            train(out=stopped, resume=True, images=(part, images[1]))
    with pytest.raises(
        ValueError, match=rf"{SAID}images.count was 60, got 59; images.sha256 was .* \(1 gone: 59\): take"
    ):
        train(out=stopped, resume=True, images=(plain.subset(torch.arange(59)), images[1]))


@pytest.mark.fault(45)
@pytest.mark.parametrize("harm", [
    lambda text: "", lambda text: "[]", lambda text: text[:-4], lambda text: text.replace('256": "', '256": "of '),
])  # fmt: skip
def test_without_the_list_of_the_images_the_sum_says_what_it_is_of(harm, train, images, stopped):
    listed = stopped / "images.jsonl"
    listed.write_text(harm(listed.read_text()))
    said = rf"\(a sum of ids and labels in order; {stopped} holds no images\.jsonl of those that were, to say which "
    with pytest.raises(ValueError, match=said):
        train(out=stopped, resume=True, images=(images[0].subset(torch.arange(59)), images[1]))


@pytest.mark.fault(45)
def test_the_list_of_the_images_follows_what_is_overridden(train, images, stopped):
    fewer, before = (images[0].subset(torch.arange(50)), images[1]), (stopped / "images.jsonl").read_text()
    with pytest.raises(ValueError, match=r"\(10 gone, the first: 50\)"):
        train(out=stopped, resume=True, images=fewer)
    assert (stopped / "images.jsonl").read_text() == before
    train(out=stopped, resume=True, images=fewer, override=["images"])
    head, *lines = map(json.loads, (stopped / "images.jsonl").read_text().splitlines())
    assert head == read(stopped / "checkpoints" / "last.ckpt")["told"]["images"]
    assert [tuple(line) for line in lines] == list(zip(fewer[0].ids, fewer[0].labels.tolist(), strict=True))
    with pytest.raises(ValueError, match=r"\(10 new, the first: 50\)"):
        train(out=stopped, resume=True, epochs=4)


@pytest.mark.fault(45)
def test_a_loader_of_ones_own_is_known_by_its_batches(images, make_task, tmp_path):
    config = TrainConfig(epochs=1, device="cpu")
    loaders = [DataLoader(TensorDataset(images[0].images, images[0].labels), batch_size=size) for size in (20, 30)]
    fit(make_task(), loaders[0], None, config, out=tmp_path)
    assert len(fit(make_task(), loaders[0], None, config, out=tmp_path, resume=True)) == 1
    with pytest.raises(ValueError, match=f"{SAID}images.batches was 3, got 2: take"):
        fit(make_task(), loaders[1], None, config, out=tmp_path, resume=True)


@pytest.mark.fault(45)
def test_all_that_differs_is_in_one_error_and_the_error_says_how_to_go_on(train, make_task, images, stopped):
    changed = {"lr": 0.1, "batch_size": 16, "images": (images[0].subset(torch.arange(48)), images[1])}
    with pytest.raises(ValueError, match=SAID) as refused:
        train(make_task(drop_rate=0.5), out=stopped, resume=True, **changed)
    names = re.search(r"--override ([\w ]+) \(in Python, override=\((.*)\)\)$", str(refused.value))
    assert names[1].split() == ["lr", "batch_size", "network", "images"] == re.findall(r"\w+", names[2])
    for missing in names[1].split():
        some = [name for name in names[1].split() if name != missing]
        with pytest.raises(ValueError, match=SAID):
            train(make_task(drop_rate=0.5), out=stopped, resume=True, override=some, **changed)
    history = train(make_task(drop_rate=0.5), out=stopped, resume=True, override=names[1].split(), **changed)
    assert history["epoch"] == [1, 2, 3]


@pytest.mark.fault(45)
def test_names_that_nothing_has(train, stopped, tmp_path):
    for name, mend in (("leraning", "leave it out"), ("batch_sise", "did you mean batch_size?"), ("epochs", "")):
        with pytest.raises(ValueError, match=rf"may not change otherwise; got '{name}': {re.escape(mend)}"):
            train(out=stopped, resume=True, override=[name])
    with pytest.raises(ValueError, match="for a run that is gone on with; got lr without --resume"):
        train(out=tmp_path / "new", override=["lr"])
    assert not (tmp_path / "new").exists()


# ---- what is overridden


@pytest.mark.fault(45)
def test_what_is_overridden_is_said_once_and_written_down(train, stopped, caplog):
    """In the config of the run, for good; and the run may be gone on with as it is now."""
    with pytest.raises(Interrupted):
        train(out=stopped, resume=True, lr=0.1, flip=0.0, override=["lr", "flip"], hook=stop_at(14))
    said = [message for message in caplog.messages if "--override" in message]
    assert said == ["--override changes this run from epoch 2 on: --lr 0.01 -> 0.1; --flip 0.5 -> 0.0"]
    train(out=stopped, resume=True, lr=0.1, flip=0.0)
    assert len([message for message in caplog.messages if "--override" in message]) == 1
    assert (
        (stopped / "config.yaml")
        .read_text()
        .startswith("# overridden from epoch 2 on: --lr 0.01 -> 0.1\n# overridden from epoch 2 on: --flip 0.5 -> 0.0\n")
    )
    assert TrainConfig.from_yaml(stopped / "config.yaml").lr == 0.1


@pytest.mark.fault(45)
@pytest.mark.parametrize(("change", "batches"), [({"batch_size": 16}, 4), ({"batch_size": 4}, 15), ({"seed": 7}, 8)])
@pytest.mark.parametrize("stop", [3, 7, 11, 15])
def test_another_batch_size_begins_the_epoch_anew(stop, change, batches, train, make_task, images, tmp_path, caplog):
    """Each epoch that follows has all its images once, and its own learning rate."""
    seen, whole = [], train(**change)
    with pytest.raises(Interrupted):
        train(out=tmp_path, hook=stop_at(stop))
    task = make_task()
    plain = task.forward
    task.forward = lambda batch: (seen.append(batch["id"]), plain(batch))[1]
    history = train(task, out=tmp_path, resume=True, override=list(change), **change)
    begun = 1 if stop < 7 else 2 if stop < 15 else 3
    assert len(seen) == (4 - begun) * batches
    for epoch in range(4 - begun):
        names = [name for batch in seen[epoch * batches : (epoch + 1) * batches] for name in batch]
        assert sorted(names) == sorted(images[0].ids)
    assert history["epoch"] == [1, 2, 3]
    assert history["lr"][begun - 1 :] == whole["lr"][begun - 1 :]
    assert f"from epoch {begun} on, which begins anew: " in caplog.text


@pytest.mark.fault(45)
@pytest.mark.parametrize(("name", "found", "anew"), [
    ("batch_size", 9, True), ("repeats", 9, True), ("accumulate", 9, True), ("devices", 9, True),
    ("num_nodes", 9, True), ("seed", 9, True), ("debug", True, True), ("images", {"count": 9}, True),
    ("lr", 9, False), ("network", {"depth": 9}, False),
])  # fmt: skip
def test_what_decides_which_images_make_a_step_begins_the_epoch_anew(name, found, anew, make_task, stopped):
    last = stopped / "checkpoints" / "last.ckpt"
    now = read(last)["told"] | {name: found}
    assert go_on(last, now, make_task(), [name]).anew == anew
    assert not go_on(last, read(last)["told"], make_task(), [name]).anew  # it was named, but is as it was


@pytest.mark.fault(45)
def test_the_rate_of_every_step_follows_the_epochs(train, stopped, monkeypatch):
    rates, plain = [], engine.rate

    def watched(step, plan):
        rates.append((step, plan.total))
        return plain(step, plan)

    monkeypatch.setattr(engine, "rate", watched)
    train(out=stopped, resume=True, accumulate=4, override=["accumulate"])
    steps = list(dict.fromkeys(rates))
    assert steps == [(step, 6) for step in (2, 3, 4, 5)]  # two an epoch, of which the first is over


@pytest.mark.fault(42, 45)
def test_a_kill_before_the_first_checkpoint_leaves_the_run_as_it_was(train, stopped):
    """And one that comes later leaves the run as it was overridden: in both cases config.yaml says how to go on."""

    class Killed(BaseException):
        pass

    def kill_at(batch):
        def hook(number):
            if number == batch:
                raise Killed

        return hook

    before = (stopped / "config.yaml").read_bytes()
    for batch, rate, written in ((13, 0.01, before), (17, 0.1, None)):
        with pytest.raises(Killed):
            train(out=stopped, resume=True, override=["lr"], lr=0.1, hook=kill_at(batch))
        told = TrainConfig.from_yaml(stopped / "config.yaml")
        assert told.lr == read(stopped / "checkpoints" / "last.ckpt")["told"]["lr"] == rate
        assert (stopped / "config.yaml").read_bytes() == written or written is None
    assert train(out=stopped, resume=True, lr=told.lr)["epoch"] == [1, 2, 3]


@pytest.fixture
def steps(monkeypatch):
    """The options of the optimiser's groups in every step that is taken, and a weight before and after it."""
    taken, plain = [], torch.optim.AdamW.step

    def watched(optimizer, closure=None):
        weight = optimizer.param_groups[0]["params"][0]
        before = weight.detach().clone()
        loss = plain(optimizer, closure)
        taken.append(([dict(group) for group in optimizer.param_groups], before, weight.detach().clone()))
        return loss

    monkeypatch.setattr(torch.optim.AdamW, "step", watched)
    return taken


@pytest.mark.fault(45)
def test_weight_decay_and_averages_can_be_overridden(train, make_task, stopped, steps):
    """What a checkpoint brings along of the old ones has no say, in any step."""
    changed = {"weight_decay": 30.0, "ema": 0.9}
    train(make_task(), out=stopped, resume=True, override=list(changed), **changed)
    assert len(steps) == 12
    for groups, before, after in steps:
        assert [group["weight_decay"] for group in groups] == [30.0, 0.0]
        shrunk = before * (1 - groups[0]["lr"] * 30.0)  # to which Adam adds no more than a few rates
        assert (after - shrunk).abs().max() < 3 * groups[0]["lr"]
    history = train(make_task(), out=stopped, resume=True, epochs=4, weight_decay=30.0, ema=0.0, override=["ema"])
    assert len(history) == 4


@pytest.mark.fault(45)
@pytest.mark.parametrize(("was", "found"), [("fp32", "bf16"), ("bf16", "fp32")])
def test_precision_can_be_overridden(was, found, train, tmp_path, steps):
    with pytest.raises(Interrupted):
        train(out=tmp_path, precision=was, hook=stop_at(11))
    steps.clear()
    checkpoint = tmp_path / "checkpoints" / "last.ckpt"
    state = torch.load(checkpoint, weights_only=True)
    for group in state["optimizer_states"][0]["param_groups"]:
        group["fused"] = False  # as fp16 has it
    torch.save(state, checkpoint)
    assert len(train(out=tmp_path, resume=True, precision=found, override=["precision"])) == 3
    assert {group["fused"] for groups, *_ in steps for group in groups} == {True}


def test_names_of_files_may_be_any_bytes(train, images, tmp_path):
    """As Python reads them: a byte that is not UTF-8 is half a surrogate."""
    strange, plain = (other(images[0], ids=[name, *images[0].ids[1:]]) for name in ("a/\udcff.png", "a/f.png"))
    train(out=tmp_path, images=(images[0], images[1]), epochs=1)
    for number, part in enumerate((strange, plain)):
        fit_on = {"images": (part, images[1]), "epochs": 2 + number}
        with pytest.raises(ValueError, match=r"images\.sha256"):
            train(out=tmp_path, resume=True, **fit_on)
        train(out=tmp_path, resume=True, override=["images"], **fit_on)


@pytest.mark.fault(45)
@pytest.mark.forks
def test_another_number_of_processes(train, make_task, in_two_processes, tmp_path):
    in_two_processes(lambda rank: train(out=tmp_path, epochs=2, devices=2))
    with pytest.raises(ValueError, match=f"{SAID}--devices was 2, got 1: take .*--allow-world-change \\(in "):
        train(out=tmp_path, resume=True)
    seen = []
    history = train(out=tmp_path, resume=True, override=["devices"], hook=seen.append)
    assert history["epoch"] == [1, 2, 3]
    assert seen == list(range(16, 24))


def test_the_error_names_both_flags_that_are_needed(train, make_task, stopped):
    now = read(stopped / "checkpoints" / "last.ckpt")["told"] | {"num_nodes": 2, "lr": 9.0}
    with pytest.raises(
        ValueError, match=r"--override lr --allow-world-change \(in Python, override=\('lr', 'num_nodes'\)\)"
    ):
        go_on(stopped / "checkpoints" / "last.ckpt", now, make_task())


@pytest.mark.parametrize(("was", "now", "accumulate"), [
    (dict(devices=2), dict(), 2), (dict(num_nodes=4, accumulate=3), dict(devices=2), 6),
    (dict(), dict(devices=2), None),
    (dict(accumulate=2), dict(devices=2), 1), (dict(devices=3), dict(devices=2), None),
    (dict(devices=3), dict(devices=2, batch_size=6), 2), (dict(devices=2), dict(accumulate=2), 2),
])  # fmt: skip
def test_a_step_has_as_many_images_as_before(was, now, accumulate, caplog):
    former, config = TrainConfig(**{"batch_size": 8, **was}), TrainConfig(**{"batch_size": 8, **now})
    if accumulate is None:
        with pytest.raises(
            ValueError, match=r"keeps the \d+ images of a step; got 2 processes of --batch-size 8, which"
        ):
            same_step(former, config)
        return
    assert same_step(former, config) == replace(config, accumulate=accumulate)
    assert ("images still: --accumulate is" in caplog.text) == (config.accumulate != accumulate)
