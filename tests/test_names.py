"""Words: ours, theirs, and the nearest to a wrong one. What a model makes of them stands in tests/models."""

from __future__ import annotations

import pytest

import vitrail
from vitrail.names import (
    AMBIGUOUS,
    MODEL_SPELLINGS,
    TRAIN_SPELLINGS,
    check_choice,
    closest,
    is_printable,
    nearest,
    normalise_kwargs,
    printable,
    shortened,
)

KNOWN = ("lr", "epochs", "weight_decay", "label_smoothing", "drop_path", "mixup")


def test_nearest_is_best_first_and_never_empty() -> None:
    assert nearest("epoch", KNOWN)[0] == "epochs"
    assert len(nearest("epoch", KNOWN)) == 3
    assert nearest("zzz", KNOWN, 1) != []
    assert nearest("x", []) == []
    assert nearest("x", ["only"], 3) == ["only"]


def test_spellings_are_replaced_and_our_own_pass() -> None:
    given = dict(learning_rate=1e-3, epochs=3, wd=0.1, smoothing=0.2, drop_path_rate=0.3, mixup_alpha=0.4)
    assert normalise_kwargs(given, KNOWN, TRAIN_SPELLINGS, "train") == dict(
        lr=1e-3, epochs=3, weight_decay=0.1, label_smoothing=0.2, drop_path=0.3, mixup=0.4
    )
    assert normalise_kwargs({}, KNOWN, TRAIN_SPELLINGS, "train") == {}


def test_a_word_that_is_ours_is_never_taken_for_another() -> None:
    """`drop_path_rate` is a model's own field, and the training config's word for `drop_path`."""
    assert normalise_kwargs({"drop_path_rate": 1}, ["drop_path_rate", "drop_path"], TRAIN_SPELLINGS, "x") == {
        "drop_path_rate": 1
    }


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (dict(lr=1, learning_rate=2), "train takes one spelling of lr; got both lr and learning_rate: drop one"),
        (
            dict(wd=1, weight_decay=2),
            "train takes one spelling of weight_decay; got both wd and weight_decay: drop one",
        ),
        (dict(epoch=1), "train has no argument 'epoch'; the nearest is epochs"),
        (
            dict(aa="rand"),
            "train has no argument 'aa'; it takes drop_path, epochs",
        ),  # a spelling of a field that is not here
        (dict(dropout=0.1), "train has no argument 'dropout'; it takes drop_path, epochs"),
    ],
)
def test_wrong_words_are_type_errors(given: dict[str, object], message: str) -> None:
    with pytest.raises(TypeError, match=message):
        normalise_kwargs(given, KNOWN, TRAIN_SPELLINGS, "train")


def test_where_nothing_is_known_nothing_is_nearest() -> None:
    with pytest.raises(TypeError, match="f has no argument 'x'; it takes none"):
        normalise_kwargs(dict(x=1), [], {}, "f")


@pytest.mark.parametrize("word", AMBIGUOUS)
def test_an_ambiguous_word_warns_unless_it_is_ours(word: str) -> None:
    with pytest.warns(UserWarning, match=f"f: {word} is taken for {AMBIGUOUS[word]}"):
        assert normalise_kwargs({word: 1}, [AMBIGUOUS[word]], {}, "f") == {AMBIGUOUS[word]: 1}
    assert normalise_kwargs({word: 1}, [word], {}, "f") == {word: 1}


@pytest.mark.parametrize("table", [MODEL_SPELLINGS, TRAIN_SPELLINGS], ids=["model", "train"])
def test_no_spelling_leads_to_another_spelling(table: dict[str, str]) -> None:
    assert not set(table) & set(table.values())
    assert not set(table) & set(AMBIGUOUS)


def test_a_wrong_choice_names_all_and_the_nearest() -> None:
    check_choice("colour", "red", ("red", "green"))
    with pytest.raises(ValueError, match="colour must be one of red, green; got 'gren': did you mean green?"):
        check_choice("colour", "gren", ("red", "green"))
    for value in (3, "blue", ["red"]):
        with pytest.raises(ValueError, match=r"colour must be one of red, green; got [^:]+$"):
            check_choice("colour", value, ("red", "green"))


def test_only_what_is_alike_is_offered() -> None:
    assert closest("epoch", KNOWN) == "epochs"
    assert closest("nofile.png", ["configs", "docs"]) is None
    assert closest("nope.yaml", ["y9.yaml"]) is None
    assert closest("opt", ["out", "ema"]) is None
    assert closest("x" * 10**6, KNOWN) is None


@pytest.mark.parametrize("beside", [{}, {"in_chans": 1}, {"channels": 1}])
def test_timms_input_size_holds_the_channels(beside: dict[str, int]) -> None:
    known = ("img_size", "in_chans")
    for size in ((1, 28, 36), [1, 28, 36]):
        given = {"input_size": size, **beside}
        assert normalise_kwargs(given, known, MODEL_SPELLINGS, "f") == {"img_size": (28, 36), "in_chans": 1}
    with pytest.raises(ValueError, match=r"got 1 channels in it and 3 beside it: drop one"):
        normalise_kwargs({"input_size": (1, 28, 28), "in_channels": 3}, known, MODEL_SPELLINGS, "f")
    assert normalise_kwargs({"input_size": (28, 36)}, known, MODEL_SPELLINGS, "f") == {"img_size": (28, 36)}


@pytest.mark.parametrize(("word", "reason"), [
    ("n_classes", "the data says it"), ("in_channels", "the data says it"), ("mlp_dim", "the row that"),
    ("hidden_size", "the row that `model` names"),
    ("num_layers", "the row that `model`"), ("patch_size", "the row that `model`"),
])  # fmt: skip
def test_a_models_words_get_an_honest_answer_from_a_run(word: str, reason: str) -> None:
    with pytest.raises(TypeError, match=rf"run has no argument '{word}'; {reason}"):
        normalise_kwargs({word: 3}, ["model", "data", "epochs"], TRAIN_SPELLINGS, "run")
    with pytest.raises(TypeError, match="it takes epochs"):
        normalise_kwargs({word: 3}, ["epochs"], TRAIN_SPELLINGS, "f")


def test_dropout_is_taken_for_what_a_run_has() -> None:
    with pytest.warns(UserWarning, match="run: dropout is taken for drop_rate"):
        assert normalise_kwargs({"dropout": 0.1}, ["drop_rate"], TRAIN_SPELLINGS, "run") == {"drop_rate": 0.1}


@pytest.mark.parametrize("call", ["ViTConfig", "VisionTransformer", "create_model"])
def test_a_warning_points_at_the_users_line(call: str) -> None:
    sizes = dict(img_size=8, patch_size=4, embed_dim=8, depth=1, num_heads=1, dropout=0.1)
    with pytest.warns(UserWarning, match="dropout is taken for") as caught:
        getattr(vitrail, call)(*["vit_debug"] * (call == "create_model"), **sizes)
    assert [warning.filename for warning in caught] == [__file__]


@pytest.mark.parametrize(("value", "text"), [
    (3, "3"), (-(10**12), "-1.000e+12"), (True, "True"), ("ab", "'ab'"), (None, "None"),
])  # fmt: skip
def test_values_are_shown_briefly(value: object, text: str) -> None:
    assert shortened(value) == text
    assert shortened(10**5000) == "a huge number"


def test_no_value_takes_long_to_show() -> None:
    bomb: list[object] = ["lol"]
    for _ in range(60):
        bomb = [bomb] * 9
    assert len(shortened(bomb)) <= 60
    assert len(shortened({"a": bomb, "b": "x" * 10**6})) <= 60


def test_control_characters_become_escapes() -> None:
    text = "\x1b[2J\x07a\u202eb\nc\x9b"
    assert printable(text) == "\\x1b[2J\\x07a\\u202eb\\nc\\x9b"
    assert not any(map(is_printable, "\x1b\x07\u202e\n\x9b\u2028"))
    for good in ("Äpfel 三 👩\u200d🚀 a\u00a0b", "رشت\u200cه"):
        assert printable(good) == good
        assert is_printable(good)
