"""Words: ours, theirs, and the nearest to a wrong one. What a model makes of them stands in tests/models."""

from __future__ import annotations

import pytest

from vitrail.names import AMBIGUOUS, MODEL_SPELLINGS, TRAIN_SPELLINGS, check_choice, nearest, normalise_kwargs

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
        (dict(aa="rand"), "train has no argument 'aa'; the nearest is"),  # a spelling of a field that is not here
        (dict(dropout=0.1), "train has no argument 'dropout'; the nearest is drop_path"),
    ],
)
def test_wrong_words_are_type_errors(given: dict[str, object], message: str) -> None:
    with pytest.raises(TypeError, match=message):
        normalise_kwargs(given, KNOWN, TRAIN_SPELLINGS, "train")


def test_where_nothing_is_known_nothing_is_nearest() -> None:
    with pytest.raises(TypeError, match="f has no argument 'x'; the nearest is none"):
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
    with pytest.raises(ValueError, match="colour must be one of red, green; got 3: did you mean"):
        check_choice("colour", 3, ("red", "green"))
