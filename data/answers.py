"""The final answer of a worked solution, and whether two of them are the same: what accuracy is counted with.

GSM8K's solutions end in `#### N`; models are often asked to end with "The final answer is". Standard library only.
"""

from __future__ import annotations

import math
import re

PHRASE = re.compile(r"the final answer is", re.IGNORECASE)
MARK = re.compile(r"####")
WHOLE = r"(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)"
# A minus behind a word, a number or a bracket is an operator; a whole number before a fraction is a part of it (1 1/2).
NUMBER = re.compile(rf"(?:(?<![\w).])-)?(?:(?:{WHOLE}\s)?\d+\s?/\s?\d+(?![.\d])|{WHOLE}?\.\d+|{WHOLE})%?")
FRACTION = re.compile(r"\\[dt]?frac\{(\d+)\}\{(\d+)\}")
SIGNS = str.maketrans({"−": "-", **dict.fromkeys("$€£*\\", "")})  # currencies, Markdown, and LaTeX's escapes
RELATIVE_TOLERANCE = 1e-6


def final_answer(text: str) -> str | None:
    """The answer that `text` ends with, as it is written but for currency signs: the first number behind the last "The final answer is", or else behind the
    last `####`, or else the last number; None where there is no number."""
    text = _plain(text)
    for marker in (PHRASE, MARK):
        places = list(marker.finditer(text))
        found = NUMBER.search(text[places[-1].end() :].lstrip(" :\n").partition("\n")[0]) if places else None
        if found is not None:
            return found.group()
    numbers = NUMBER.findall(text)
    return numbers[-1] if numbers else None


def same_answer(found: str | None, wanted: str | None) -> bool:
    """Whether two answers are the same number, up to a relative 1e-6, or the same words; nothing equals no answer (None).

    Commas, currency signs, a trailing period and % are left out, so that 50% is 50; fractions are divided.
    """
    if found is None or wanted is None:
        return False
    values = _value(found), _value(wanted)
    if None in values:
        return values == (None, None) and _words(found) == _words(wanted)
    return math.isclose(*values, rel_tol=RELATIVE_TOLERANCE)


def _plain(text: str) -> str:
    return FRACTION.sub(r"\1/\2", text).translate(SIGNS)


def _words(answer: str) -> str:
    return _plain(answer).strip().rstrip(".").casefold()


def _value(answer: str) -> float | None:
    """The number that `answer` is, or None where it is none, or divides by zero."""
    number = NUMBER.fullmatch(_plain(answer).strip().rstrip("."))
    if number is None:
        return None
    written = number.group().replace(",", "").rstrip("%")
    size, _, below = written.lstrip("-").partition("/")
    *whole, above = size.split()
    if below and float(below) == 0:
        return None
    value = float(above) / float(below or 1) + sum(map(float, whole))
    return -value if written.startswith("-") else value
