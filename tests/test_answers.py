"""What counts as a text's final answer, and which answers are the same."""

import pytest

from data.answers import final_answer, same_answer

TEXTS = [
    ("The final answer is 18.", "18"),
    ("the FINAL answer is: $1,234.50!", "1,234.50"),
    ("The final answer is 3. No: the final answer is 4, not 9.", "4"),
    ("The final answer is\n\n72 apples", "72"),
    ("The final answer is **$\\boxed{-7}$**", "-7"),
    ("The final answer is not known.\n#### 5", "5"),
    ("#### 12\nThe final answer is 13.", "13"),
    ("The final answer is unclear, I think 3 or 4", "3"),
    ("It is 3 + 4 = 7\n#### 7", "7"),
    ("#### 1\n#### 2\nand 3 more", "2"),
    ("####  -3", "-3"),
    ("####\n8", "8"),
    ("#### none\nAda has 5, then 6.", "6"),
    ("10-5", "5"),
    ("10 - 5", "5"),
    ("it fell to −40 degrees", "-40"),
    ("about 3/4 of it", "3/4"),
    ("\\frac{3}{4}", "3/4"),
    ("1 1/2 cups", "1 1/2"),
    ("36 / 4 = 9", "9"),
    ("between 12, 13 and 1,2", "2"),
    ("1,234,567", "1,234,567"),
    (".5 of them", ".5"),
    ("half: 50%", "50%"),
    ("no number", None),
    ("", None),
    ("####", None),
]


@pytest.mark.parametrize(("text", "answer"), TEXTS)
def test_final_answer(text, answer):
    assert final_answer(text) == answer


SAME = [
    ("18", "18.0"), ("1,234", "1234"), ("$5.50", "5.5"), ("-$5", "-5"), ("50%", "50"), ("3/4", "0.75"), ("1 1/2", "1.5"), ("18.", "18"), (" 7 ", "7"), ("-0", "0"),
    ("1000000", "1000000.5"), ("−3", "-3"), ("-1/2", "-.5"), ("Yes.", "yes"), ("\\frac{1}{2}", "1/2"), ("1/0", "1/0"),
]
DIFFERENT = [
    ("18", "19"), ("1000000", "1000003"), ("0", "0.0000001"), ("5", "-5"), ("yes", "no"), ("yes", "1"), ("1/0", "0"), ("50%", "0.5"), (None, "1"), ("1", None),
    (None, None), ("12 13", "13"),
]


@pytest.mark.parametrize(("found", "wanted"), SAME)
def test_same_answers(found, wanted):
    assert same_answer(found, wanted) and same_answer(wanted, found)


@pytest.mark.parametrize(("found", "wanted"), DIFFERENT)
def test_different_answers(found, wanted):
    assert not same_answer(found, wanted) and not same_answer(wanted, found)


def test_numbers_of_any_length_are_read():
    """int() refuses more than 4,300 digits, which a model that repeats itself may write."""
    assert final_answer("9" * 5000) == "9" * 5000
    assert not same_answer("9" * 5000, "9")
