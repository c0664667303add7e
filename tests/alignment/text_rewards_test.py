import threading
import time

import numpy as np
import pytest

from jaxrl_suite import alignment
from jaxrl_suite.alignment.text_rewards import last_boxed, normalise_answer

BOX = " \\boxed{1}"

# Property 27: facts from running the official functions.
ACCURACY = [
    ("0.5", "\\frac{1}{2}", 1), ("1/2", "\\frac12", 1), ("x=5", "5", 1), ("50\\%", "50", 1),
    ("\\sqrt3", "\\sqrt{3}", 1),
    ("3.0", "3", 0), ("1,000", "1000", 0), ("\\dfrac{1}{2}", "\\frac12", 1), (".5", "\\frac{1}{2}", 1),
    ("10\\text{ cm}", "10", 1), ("90^\\circ", "90", 1), ("\\left(1, 2\\right)", "(1,2)", 1), ("abc=5", "5", 0),
]  # fmt: skip
CLARITY = [
    ("Step 1: add. Step 2: done." + BOX, 1, 0),
    ("First do x, then do y." + BOX, 1, 1),
    ("We solve for x. Next line." + BOX, 0, 0),
    ("Step 1: add. Step 2: done. \\boxed{}", 0, 0),
    ("So we get x. And y." + BOX, 1, 0),
    ("I did. It was mild." + BOX, 1, 0),
    ("3 - 2 - 1" + BOX, 1, 0),
    ("3.5 and 2.7" + BOX, 1, 0),
    ("**1.** Add.\n**2.** Done." + BOX, 0, 1),
    ("Step 1: add.\nStep 2: done." + BOX, 1, 1),
    ("- a\n- b\n" + BOX, 1, 1),
    ("1. one, then" + BOX, 0, 1),
]


@pytest.mark.parametrize(("given", "answer", "expected"), ACCURACY)
def test_accuracy(given, answer, expected):
    assert alignment.accuracy([""], [f"so \\boxed{{{given}}}."], answer=[answer]) == [float(expected)]


@pytest.mark.parametrize(("text", "published", "corrected"), CLARITY)
def test_clarity(text, published, corrected):
    assert alignment.clarity([""], [text]) == [float(published)]
    assert alignment.corrected_clarity([""], [text]) == [float(corrected)]


def test_boxes():
    """Property 27: the last box counts; with a blank after the macro up to the dollar; unclosed ones do not."""
    assert last_boxed("\\boxed{1} and \\boxed{\\frac{2}{3}} end") == "\\frac{2}{3}"
    assert last_boxed("$\\boxed 7$ more") == "7"
    assert last_boxed("\\boxed{1 and no end") is None
    assert last_boxed("\\fbox{3}") is None and last_boxed("") is None
    assert alignment.accuracy(["", ""], ["none", "\\boxed{2}"], answer=["1", "1"], wrong=-1.0) == [-1.0, -1.0]
    assert alignment.accuracy([""], ["\\boxed{2}"], answer=[None]) == [None]
    assert normalise_answer("1 / 2") == "\\frac{1}{2}"


def test_conciseness_is_strict():
    scores = alignment.conciseness(["", ""], ["aa", "aaa"], mean_length=3.0, count_tokens=len)
    assert scores == [1.0, 0.0]


def test_bad_scores_are_excluded_and_counted():
    """None, NaN, words and numbers out of range: excluded, counted, never a silent zero."""
    values = [1.0, None, float("nan"), 7.0, "good"]
    result = alignment.score({"r": lambda prompts, completions: values}, [""] * 5, ["a"] * 5, {}, bounds={"r": (0, 1)})
    assert result.mask.tolist() == [[True, False, False, False, False]]
    wrong = dict.fromkeys(("none", "nan", "not_numeric", "out_of_range"), 1)
    assert result.faults["r"] == {**wrong, "raised": 0, "timed_out": 0}


def test_a_raising_verifier_costs_only_its_own_completions():
    def reward(prompts, completions, answer):
        if "bad" in completions:
            raise KeyError("no such thing")
        return [float(a) for a in answer]

    columns = {"answer": [1, 2, 3]}
    result = alignment.score({"r": reward}, ["p"] * 3, ["ok", "bad", "ok"], columns)
    assert result.mask.tolist() == [[True, False, True]]
    np.testing.assert_array_equal(result.rewards, [[1, 0, 3]])
    assert result.faults["r"]["raised"] == 1 and "KeyError" in result.messages["r"]


def test_a_hanging_verifier_is_bounded():
    released = threading.Event()

    def hang(prompts, completions):
        released.wait(20)
        return [1.0] * len(completions)

    began = time.monotonic()
    fine = lambda prompts, completions: [0.5] * len(completions)  # noqa: E731
    result = alignment.score({"slow": hang, "fine": fine}, [""] * 3, ["a"] * 3, {}, timeout=0.2)
    released.set()
    assert time.monotonic() - began < 10
    assert result.mask.tolist() == [[False] * 3, [True] * 3]
    assert result.faults["slow"]["timed_out"] == 3 and "0.2 s" in result.messages["slow"]


def test_wrong_number_of_scores_is_an_error():
    with pytest.raises(ValueError, match=r"reward 'r'=1: must return one number a completion, 2 here"):
        alignment.score({"r": lambda prompts, completions: [1.0]}, ["", ""], ["a", "b"], {})


def test_an_error_of_the_users_own_is_a_fault_not_a_wrong_number():
    """A ValueError that a verifier raises costs its completions only, whatever its words."""

    def picky(prompts, completions):
        if "bad" in completions:
            raise ValueError("reward 'r' wants other words")
        return [1.0] * len(completions)

    result = alignment.score({"r": picky}, ["", ""], ["bad", "ok"], {})
    assert result.mask.tolist() == [[False, True]] and result.faults["r"]["raised"] == 1
