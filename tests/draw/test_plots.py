"""Charts show the figures they are given."""

import pytest
import torch

from vitrail.draw.plots import (
    Confused,
    calibration_error,
    confusion_matrix,
    learning_curves,
    most_confused,
    recorded,
    reliability_diagram,
)
from vitrail.records import History

HISTORY = History(
    [
        {"epoch": 1.0, "lr": 1e-3, "train_loss": 1.5},
        {
            "epoch": 2.0,
            "lr": 5e-4,
            "train_loss": 0.9,
            "val_loss": 1.1,
            "val_accuracy": 0.6,
            "val_balanced_accuracy": 0.5,
        },
        {
            "epoch": 3.0,
            "lr": 1e-4,
            "train_loss": 0.7,
            "val_loss": 1.0,
            "val_accuracy": 0.7,
            "val_balanced_accuracy": 0.6,
        },
    ]
)
CONFUSION = torch.tensor([[90, 7, 0], [2, 8, 0], [0, 2, 0]])
NAMES = ("red", "white $_{", "platelet")


def points(line) -> list[tuple[float, float]]:
    return list(zip(line.get_xdata(), line.get_ydata(), strict=True))


def test_learning_curves_show_every_figure_at_its_epoch():
    loss, scores, rate = learning_curves(HISTORY).axes
    assert points(loss.lines[0]) == [(1, 1.5), (2, 0.9), (3, 0.7)]
    assert points(loss.lines[1]) == [(2, 1.1), (3, 1.0)]
    assert [line.get_label() for line in scores.lines] == ["validation", "validation, balanced"]
    assert points(rate.lines[0]) == [(1, 1e-3), (2, 5e-4), (3, 1e-4)]


def test_the_epoch_that_was_kept_is_marked_in_every_panel():
    for axes in learning_curves(HISTORY, kept=2).axes:
        assert points(axes.lines[-1]) == [(2, 0), (2, 1)]
        assert axes.get_legend().get_texts()[-1].get_text() == "epoch 2, kept"
    assert all(line.get_linestyle() != ":" for axes in learning_curves(HISTORY).axes for line in axes.lines)


def test_a_panel_without_figures_is_left_out():
    history = History([{"epoch": 1.0, "train_loss": 1.0}])
    assert [axes.get_title(loc="left") for axes in learning_curves(history).axes] == ["Loss"]
    assert recorded(history, "loss")
    assert not recorded(history, "lr")


def test_no_curve_at_all_and_no_such_panel_are_named():
    with pytest.raises(ValueError, match="must hold figures for loss, scores, lr; got 0 epochs"):
        learning_curves(History())
    with pytest.raises(ValueError, match="panels are loss, scores, lr; got 'los'"):
        learning_curves(HISTORY, ["los"])


def test_every_cell_shows_its_count_and_its_share_of_the_row():
    axes = confusion_matrix(CONFUSION, NAMES).axes[0]
    cells = {tuple(map(int, text.get_position())): text.get_text() for text in axes.texts}
    assert cells == {(0, 0): "90\n93%", (1, 0): "7\n7%", (0, 1): "2\n20%", (1, 1): "8\n80%", (1, 2): "2\n100%"}
    assert [label.get_text() for label in axes.get_yticklabels()] == list(NAMES)


def test_a_hundred_classes_have_names_but_no_numbers():
    drawing = confusion_matrix(torch.eye(100), [f"class {i}" for i in range(100)])
    assert not drawing.axes[0].texts
    assert len(drawing.axes[0].get_xticklabels()) == 100
    assert len(drawing.axes) == 2  # and a scale of the colours


def test_a_thousand_classes_are_told_by_number():
    labels = confusion_matrix(torch.eye(1000), ["x"] * 1000).axes[0].get_xticklabels()
    assert [label.get_text() for label in labels][:2] == ["0", "50"]


def test_a_name_with_a_dollar_is_drawn_as_it_stands():
    assert confusion_matrix(CONFUSION, NAMES)._repr_png_().startswith(b"\x89PNG")


def test_most_confused_lists_mistakes_only_most_frequent_first():
    assert most_confused(CONFUSION, NAMES, 3) == [
        Confused("red", "white $_{", 7, pytest.approx(7 / 97)),
        Confused("platelet", "white $_{", 2, 1.0),
        Confused("white $_{", "red", 2, pytest.approx(0.2)),
    ]
    assert most_confused(torch.eye(3), NAMES) == []


def test_calibration_error_is_the_mean_gap_weighted_by_count():
    table = torch.tensor([[0, float("nan"), float("nan")], [10, 0.6, 0.5], [30, 0.9, 0.9 + 0.02]])
    assert calibration_error(table) == pytest.approx((10 * 0.1 + 30 * 0.02) / 40)
    assert calibration_error(torch.zeros(5, 3)) == 0


def test_a_reliability_diagram_shows_filled_bins_only():
    upper, lower = reliability_diagram(torch.tensor([[0, float("nan"), float("nan")], [4, 0.8, 0.75]])).axes
    assert points(upper.lines[1]) == [(pytest.approx(0.8), pytest.approx(0.75))]
    assert [bar.get_height() for bar in lower.patches] == [0, 4]
    assert upper.get_title(loc="left") == "calibration error 5.0%"


def test_tables_of_a_wrong_shape_are_named():
    with pytest.raises(ValueError, match=r"\(K, K\) for the 2 classes; got shape \(3, 3\)"):
        confusion_matrix(CONFUSION, ["a", "b"])
    with pytest.raises(ValueError, match=r"\(bins, 3\): count, mean confidence, accuracy; got \(3, 2\)"):
        reliability_diagram(torch.zeros(3, 2))
