"""`vitrail transfer`: a run for each strategy and seed, none of them twice, and a table with intervals."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from vitrail.cli import main
from vitrail.draw.plots import Measure, interval_bars
from vitrail.models.registry import build_model
from vitrail.research import runs, transfer
from vitrail.research.runs import Tried, accuracy, balanced_accuracy, interval, resampled
from vitrail.research.transfer import RECIPES, Row, markdown, transfer_table
from vitrail.train.config import TrainConfig


@pytest.fixture
def config(tmp_path: Path) -> TrainConfig:
    for number in range(60):
        place = (
            tmp_path / "photos" / ("train", "test")[number % 5 == 0] / ("dark", "light")[number % 2] / f"{number}.png"
        )
        place.parent.mkdir(parents=True, exist_ok=True)
        noise = torch.randint(0, 120, (16, 16, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(number))
        Image.fromarray((noise + 60 * (number % 2)).numpy()).save(place)
    torch.manual_seed(0)
    weights = build_model("vit_debug", num_classes=5, img_size=16).save_pretrained(tmp_path / "weights")
    return TrainConfig(
        from_weights=str(weights), data=f"folder:{tmp_path / 'photos'}", epochs=1, batch_size=16, device="cpu",
        out=str(tmp_path / "runs"), val_fraction=0.2,
    )  # fmt: skip


def test_a_row_a_strategy(config: TrainConfig, monkeypatch: pytest.MonkeyPatch):
    rows = list(transfer_table(config, ("scratch", "backbone", "first", "gradual"), seeds=2))
    assert [row.strategy for row in rows] == ["scratch", "backbone", "first:1", "gradual:1"]
    assert [row.lr for row in rows] == [RECIPES[name] for name in ("scratch", "backbone", "first", "gradual")]
    head = 48 * 2 + 2
    assert rows[1].trained == head
    assert rows[0].trained == rows[3].trained > rows[2].trained > head
    assert rows[0].trained == sum(p.numel() for p in build_model("vit_debug", num_classes=2, img_size=16).parameters())
    places = sorted(path.name for path in Path(config.out).iterdir())
    assert places == [f"{name}-{seed}" for name in ("backbone", "first_1", "gradual_1", "scratch") for seed in (0, 1)]
    for row in rows:
        assert 0 <= row.balanced.low <= row.balanced.value <= row.balanced.high <= 1
    assert TrainConfig.from_yaml(Path(config.out) / "scratch-1" / "config.yaml").from_weights == ""
    answers = json.loads((Path(config.out) / "backbone-0" / "answers.json").read_text())
    assert len(answers["labels"]) == len(answers["answers"]) == 12

    monkeypatch.setattr(runs, "run_training", lambda *_: pytest.fail("a run was done twice"))
    monkeypatch.setattr(runs, "resume_training", lambda *_: pytest.fail("a run was done twice"))
    assert list(transfer_table(config, ("backbone",), seeds=2)) == [rows[1]]


def test_strategies_are_looked_at_before_the_first_run(config: TrainConfig, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(transfer, "tried", lambda *_: pytest.fail("a run was begun"))
    for words, said in (
        (("backbone", "bakbone"), "got 'bakbone': did you mean backbone"),
        (("backbone", "first:9"), "--freeze first:N must leave the head of vit_debug"),
    ):
        with pytest.raises(ValueError, match=said):
            list(transfer_table(config, words, seeds=1))


def test_of_all_strategies_those_that_a_network_cannot_take_are_left_out(config, tmp_path: Path, monkeypatch, caplog):
    caplog.set_level("INFO", "vitrail")
    build_model("resnet_debug", num_classes=2).save_pretrained(tmp_path / "cnn")
    begun: list[str] = []
    monkeypatch.setattr(transfer, "tried", lambda config, name: begun.append(name))
    monkeypatch.setattr(transfer, "row", lambda _: None)
    list(transfer_table(TrainConfig(**{**config.changes(), "from_weights": str(tmp_path / "cnn")}), seeds=1))
    assert begun[:3] == ["scratch", "backbone", "bias"] and begun[-1] == "none" and len(begun) == 6
    left = [message.partition(" ")[0] for message in caplog.messages if "is left out: " in message]
    assert left == ["lora:4", "prompts:8", "deep_prompts:8"]


def test_a_run_that_was_stopped_is_gone_on_with(config: TrainConfig, monkeypatch: pytest.MonkeyPatch):
    (row,) = transfer_table(config, ("backbone",), seeds=1)
    (Path(config.out) / "backbone-0" / "answers.json").unlink()
    monkeypatch.setattr(runs, "run_training", lambda *_: pytest.fail("it began anew"))
    (again,) = transfer_table(config, ("backbone",), seeds=1)
    assert again == row


def test_runs_that_were_told_otherwise_are_refused(config: TrainConfig):
    list(transfer_table(config, ("backbone",), seeds=1))
    with pytest.raises(ValueError, match=r"--out must name runs .* same; .*backbone-0 had --batch-size \d+, not 8: n"):
        list(transfer_table(TrainConfig(**{**config.changes(), "batch_size": 8}), ("backbone",), seeds=1))


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("bakbone",), r"--strategies must be one of .*; got 'bakbone': did you mean backbone\?"),
        (("lora",), "--freeze must be lora:R with R at least 1; got 'lora'"),
    ],
)
def test_words_that_are_no_strategies(config: TrainConfig, words: tuple[str, ...], said: str):
    with pytest.raises(ValueError, match=said):
        list(transfer_table(config, words))
    with pytest.raises(ValueError, match="--seeds must be at least 1; got 0"):
        list(transfer_table(config, seeds=0))


def tried(labels: list[int], answers: list[int], lr: float = 1.0) -> Tried:
    return Tried("bias", lr, 7, 2.0, torch.tensor(labels), torch.tensor(answers))


def test_figures():
    labels, right = torch.tensor([0, 0, 0, 1]), torch.tensor([True, True, True, False])
    assert (float(accuracy(labels, right)), float(balanced_accuracy(labels, right))) == (0.75, 0.5)
    many = torch.stack([right, ~right])
    assert balanced_accuracy(labels, many).tolist() == [0.5, 0.5]


def test_images_are_drawn_class_by_class():
    labels = torch.tensor([0, 1, 0, 1, 1])
    picks = resampled(labels)
    assert torch.equal(labels[picks], labels.expand_as(picks))
    counts = torch.bincount(picks.flatten(), minlength=5) / len(picks)
    assert torch.allclose(counts, torch.ones(5), atol=0.1)
    assert torch.equal(picks, resampled(labels))


def test_the_interval_is_that_of_a_share():
    """300 images of one class of which 80 % are right: the binomial's 95 % is 0.8 ± 1.96 sqrt(0.8 · 0.2 / 300)."""
    half = 1.96 * (0.8 * 0.2 / 300) ** 0.5
    found = interval([tried([0] * 300, [0] * 240 + [1] * 60)], accuracy)
    assert found.value == pytest.approx(0.8)
    assert found.low == pytest.approx(0.8 - half, abs=0.006)
    assert found.high == pytest.approx(0.8 + half, abs=0.006)


def test_seeds_that_agree_narrow_nothing():
    """The same test images answered alike by every seed are no more images: they are drawn alike."""
    one = tried([0] * 100 + [1] * 100, [0] * 180 + [1] * 20)
    assert interval([one] * 3, accuracy) == pytest.approx(interval([one], accuracy))


def test_the_table_and_its_picture():
    run = tried([0, 0, 1, 1], [0, 0, 1, 0], lr=3e-3)
    other = tried([0, 0, 1, 1], [0, 0, 1, 1])
    row = transfer.row([run, other])
    assert (row.trained, row.seconds, row.spread, row.balanced.value) == (7, 2.0, (0.75, 1.0), 0.875)
    lines = markdown([row]).splitlines()
    assert lines[0] == "| strategy | trained parameters | lr | accuracy % | balanced accuracy % | seeds | seconds |"
    assert lines[2].startswith("| bias | 7 | 0.003 | 87.5 [")
    assert lines[2].endswith(" | 75.0 – 100.0 | 2 |")
    axes = interval_bars({"a": Measure(0.5, 0.4, 0.7), "b": Measure(0.2, 0.2, 0.2)}, "figures").axes[0]
    assert [label.get_text() for label in axes.get_yticklabels()] == ["a", "b"]
    assert [bar.get_width() for bar in axes.patches] == [0.5, 0.2]
    assert [text.get_text() for text in axes.texts] == ["50.0%", "20.0%"]
    (ends,) = (line.get_segments() for line in axes.collections if len(line.get_segments()) == 2)
    assert [[float(x) for x, _ in end] for end in ends] == [[0.4, 0.7], [0.2, 0.2]]


def test_the_command(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    told: dict[str, Any] = {}
    measure = Measure(0.5, 0.4, 0.6)

    def table(config: TrainConfig, strategies: Any, seeds: int) -> list[Row]:
        told.update(config=config, strategies=tuple(strategies), seeds=seeds)
        return [Row("bias", 1e-3, 3, measure, measure, (0.5, 0.5), 1)]

    monkeypatch.setattr(transfer, "transfer_table", table)
    words = ["transfer", "weights", "bloodcells", "--strategies", "bias", "--seeds", "2", "--out", str(tmp_path / "t")]
    assert main(words) == 0
    assert (told["strategies"], told["seeds"]) == (("bias",), 2)
    assert (told["config"].from_weights, told["config"].data, told["config"].epochs) == ("weights", "bloodcells", 20)
    shown = capsys.readouterr().out
    assert (tmp_path / "t" / "transfer.md").read_text() == shown
    assert "| bias | 3 |" in shown
    with Image.open(tmp_path / "t" / "transfer.png") as picture:
        assert picture.size[0] > 500
    assert main(["transfer", "weights", "bloodcells", "--out", str(tmp_path / "t")]) == 0
    assert told["strategies"] == ("all",)
