"""A wrong word is one line on stderr that says the rule, what was got, and how to mend it."""

from __future__ import annotations

import os
import shlex
import signal
from collections.abc import Callable
from pathlib import Path

import pytest

from vitrail import trainer
from vitrail.data import imagesets

Said = Callable[..., tuple[str, str]]


@pytest.mark.parametrize(("words", "message"), [
    ("trian --epochs 3", "got 'trian': did you mean train?"),
    ("train --epoch 3", "vitrail train has no flag --epoch: did you mean --epochs?"),
    ("train --label_smothing 0.1", "did you mean --label-smoothing?"),
    ("train --lr 1e-3 --learning-rate 1e-4", "one spelling of --lr; got --lr and --learning-rate: drop one"),
    ("train --zzz sgd", "vitrail train has no flag --zzz: see vitrail train --help"),
    ("train --n-classes 3", "vitrail train takes no --n-classes: the data says it"),
    ("train --hidden_size 192", "takes no --hidden-size: the row that `model` names says it (`vitrail models`)"),
    ("zzz", "models, inspect, convert, parity, transfer, ablate, tune, demo; got 'zzz'\n"),
    ("train --model vit_tinny", "'vit_tinny'; the nearest are vit_tiny,"),
    ("train --epochs three", "--epochs takes a whole number; got three"),
    ("train --epochs -1", "--epochs must be at least 1; got -1"),
    ("train --epochs", "--epochs: expected one argument"),
    ("train --flip x", "--flip takes a number; got x"),
    ("train --img-size x", "--img-size takes a whole number or none; got x"),
    ("train --img-size 0", "--img-size must be at least 1, or none; got 0"),
    ("train --debug=maybe", "--debug takes true or false; got maybe"),
    ("train --precision fp61", "--precision must be one of fp32, bf16, fp16; got fp61: did you mean fp16?"),
    ("train --auto-augment random", "imagenet, rand, trivial; got random: did you mean rand?"),
    ("train stray", "unrecognized arguments: stray"),
    ("train --data cifar11", "got 'cifar11': did you mean cifar10?"),
    ("train --data {photos}", "say folder:{photos}"),
    ("train --data folder:{photos}s", "there is no folder {photos}s; the nearest is {photos}"),
    ("train --config {photos}/recipe.yaml", "there is no {photos}/recipe.yaml; nothing beside it has a name like"),
    ("train --config {photos}", "a config is a YAML file that can be read; got {photos} (Is a directory): name "),
    ("train --out {run}/config.yaml/x", "got {run}/config.yaml/x, and {run}/config.yaml is no folder: name another"),
    ("train --workers 1000000 --data folder:{photos} --out {tmp}", "--workers must be at most "),
    ("train --data ''", "--data must be one of bloodcells, cifar10, cifar100, imagenet, folder:PATH; got ''\n"),
    ("train --data folder:", "must name a folder; got nothing after folder:: say folder:photos, for one"),
    ("train --resume {photos}", "holds config.yaml; there is none in {photos}: name a folder made by `train`"),
    ("train --model vit_tinny --data folder:{photos} --out {tmp}", "'vit_tinny'; the nearest are vit_tiny,"),
    ("train --model resnet_debug --drop-path 0.1 --data folder:{photos} --out {tmp}", "takes no --drop-path; got 0.1"),
    ("eval {run}", "vitrail eval needs --data; see vitrail eval --help"),
    ("eval {run} --data folder:{photos} --split tset", "one of train, val, test, all; got 'tset': did you mean test?"),
    ("train --seed 1000000000000000000000000000000", "--seed must lie in 0 to 2**63 - 1; got 1000"),
    ("train --mixup 1e-300", "--mixup must be 0 (off) or lie in [0.001, 1000]; got 1e-300"),
    ("convert bloodcells {tmp} --to keras", "--to must be one of vitrail, timm, transformers; got 'keras'\n"),
    ("train --freeze first", "--freeze must be first:N with N at least 0; got 'first'\n"),
    ("transfer runs/a", "vitrail transfer needs data; see vitrail transfer --help\n"),
    ("parity vit_debug --sources foo", "--sources must be one of timm, torchvision, transformers; got 'foo'\n"),
    ("parity vit_debug", "nothing to hold 'vit_debug' against: none of timm, torchvision, transformers, if"),
    ("parity nothing*", "no model matches 'nothing*'; the nearest are "),
    ("models nothing*", "no model matches 'nothing*'; the nearest are "),
    ("predict", "vitrail predict needs images"),
    ("predict {photos}", "{photos}: the folder holds no image file (.bmp, "),
    ("predict {photos}", "sub-folders are not searched: name those that hold images, such as {photos}/bright\n"),
    ("explain {photos}/..", "sub-folders are not searched: name those that hold images, such as {photos}/../"),
    ("predict {run}/checkpoints", "{run}/checkpoints: the folder holds no image file (.bmp, .gif, .jpeg, .jpg, .png, "
     ".tif, .tiff, .webp)\n"),
    ("predict {photos}/dark/O.png --model {run}", "there is no {photos}/dark/O.png; the nearest is {photos}/dark/"),
    ("predict {photos}/dark --model {run}s", "{run}s does not exist: the nearest beside it is {run}"),
    ("predict {photos}/dark --model vit_debug", "vit_debug is an architecture without weights"),
    ("predict {photos}/dark --model {run} --top 0", "top must be at least 1; got 0"),
    ("predict {photos}/dark --model {run} --device tpu", "device must be auto or one that is here"),
    ("explain {photos}/dark --model {run} --method rolout", "got 'rolout': did you mean rollout?"),
    ("explain {photos}/dark --model {run} --heads all", "rollout fuses heads by mean, max or min; got 'all'"),
    ("explain {photos}/dark --model {run} --method attention --layers 2 9", "must lie in 1 … 3, the attention layers"),
    ("explain {photos}/dark --model {run} --method attention --layers x", "--layers takes a whole number; got x"),
    ("explain --layers 2 4 {photos}/dark", "got {photos}/dark: put images before --layers, or after --\n"),
    ("predict -- --top", "there is no --top; nothing beside it has a name like that"),
    ("predict {run}/model/config.json/x.png", "there is no {run}/model/config.json/x.png, nor the folder {run}"),
    ("eval {run}/checkpoints/last.ckpt --data folder:{photos}", "the file {run}/checkpoints/last.ckpt: name {run}\n"),
    ("eval {run}/model/config.json --data folder:{photos}", "got the file {run}/model/config.json: name {run}/model\n"),
    ("explain {photos}/dark --model {run} --method attention --heads 7", "heads must lie in 0 … 2"),
    ("explain {photos}/dark --model {run} --method attention --heads meen", "or a head's number from 0; got 'meen'"),
    ("explain {photos}/dark --model {run} --out {run}/config.yaml", "got {run}/config.yaml, and {run}/config.yaml is "),
])  # fmt: skip
def test_a_mistake_is_one_line_and_exit_code_2(words: str, message: str, run: Path, photos, tmp_path, said: Said):
    places = {"run": run, "photos": photos, "tmp": tmp_path / "out"}
    out, err = said(*shlex.split(words.format(**places)), code=2)
    assert message.format(**places) in err
    assert err.startswith("error: ")
    assert (out, err.count("\n")) == ("", 1)


@pytest.mark.fault(36)
def test_a_loaders_worker_that_dies_is_one_line(monkeypatch: pytest.MonkeyPatch, photos, tmp_path: Path, said: Said):
    monkeypatch.setattr(imagesets, "read_image", lambda path: os.kill(os.getpid(), signal.SIGKILL))
    monkeypatch.setattr(imagesets, "read_part", lambda *_: os.kill(os.getpid(), signal.SIGKILL))
    words = f"train --data folder:{photos} --model vit_debug --epochs 1 --in-memory false --workers 1"
    _, err = said(*words.split(), "--out", tmp_path / "run", code=2)
    line = err.splitlines()[-1]
    assert line.startswith(
        "error: a process that loads images must live while it is needed; worker 0 was killed by SIGKILL"
    )
    assert "Traceback" not in err


def test_a_wrong_model_is_found_before_the_data_is_read(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, said: Said):
    monkeypatch.setattr(trainer, "load_splits", lambda _: pytest.fail("the data was read"))
    _, err = said("train", "--model", "vit_tinny", "--out", tmp_path / "run", code=2)
    assert "there is no model 'vit_tinny'" in err
