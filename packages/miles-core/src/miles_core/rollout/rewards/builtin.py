"""The built-in rewards: functions (text, label, metadata, **options) -> float. All options are keyword-only."""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping
from typing import Any

from miles_core.data.gym import gym_score
from miles_core.imports import require

_NUMBER = re.compile(r"(?:(?<![\w)])[-\u2212])?(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?:\.\d+)?")  # in "12-7" the minus is no sign
_TAG = "<{0}>(.*?)</{0}>"


def exact_match(
    text: str,
    label: str | None,
    metadata: Mapping[str, Any],
    *,
    strip: bool = True,
    first_line: bool = False,
    ignore_case: bool = False,
) -> float:
    """1.0 when the completion is the label, else 0.0.

    `strip` ignores white space around both, `first_line` reads the completion up to its first line break.
    """
    expected = _needed(label)
    if strip:
        text, expected = text.strip(), expected.strip()
    if first_line:
        text = text.split("\n", 1)[0]
        text = text.rstrip() if strip else text
    if ignore_case:
        text, expected = text.casefold(), expected.casefold()
    return float(text == expected)


def last_integer(text: str, label: str | None, metadata: Mapping[str, Any], *, first_line: bool = False) -> float:
    """1.0 when the last number in the completion is the integer that ends the label, else 0.0; 1,234 and 7.0 read 1234 and 7."""
    expected = _last_number(_needed(label))
    if expected is None or "." in expected:
        raise ValueError(f"label {label!r} does not end with an integer")
    if first_line:
        text = text.strip().split("\n", 1)[0]
    return float(_last_number(text) == expected)


def math_verify(
    text: str,
    label: str | None,
    metadata: Mapping[str, Any],
    *,
    float_rounding: int = 6,
    numeric_precision: int = 15,
    strict: bool = True,
) -> float:
    """1.0 when the completion's final answer is mathematically equal to the label (math-verify), else 0.0.

    Its own alarms are off, since they work on a main thread only and turn a timeout into a wrong answer: the pool's are hard.
    """
    library: Any = require("math_verify", extra="math", purpose='reward "math_verify"')
    logging.getLogger("math_verify").setLevel(logging.ERROR)  # it warns that its alarms are off
    expected = _needed(label)
    gold = library.parse(expected, parsing_timeout=None, raise_on_error=True)
    if not gold:
        gold = library.parse(f"${expected}$", parsing_timeout=None, raise_on_error=True)
    if not gold:
        raise ValueError(f"math-verify finds no mathematics in label {expected!r}")
    answer = library.parse(text, parsing_timeout=None)
    options = {"float_rounding": float_rounding, "numeric_precision": numeric_precision, "strict": strict}
    return float(library.verify(gold, answer, timeout_seconds=None, **options))


def reasoning_gym(
    text: str, label: str | None, metadata: Mapping[str, Any], *, tag: str | None = None, strip: bool = True
) -> float:
    """The score reasoning-gym gives the completion for its entry, 0.0 to 1.0.

    `tag` reads the last <tag>answer</tag> in the completion; without one there is no answer.
    """
    answer: str | None = text
    if tag is not None:
        found = re.findall(_TAG.format(re.escape(tag)), text, re.DOTALL)
        answer = found[-1] if found else None
    if strip and answer is not None:
        answer = answer.strip()
    return gym_score(answer, metadata, label)


def _needed(label: str | None) -> str:
    if label is None:
        raise ValueError("the row has no label to compare with; see data.label_column")
    return label


def _last_number(text: str) -> str | None:
    """The last number in one spelling. Text, because a model can write more digits than int() takes."""
    found = _NUMBER.findall(text)
    if not found:
        return None
    sign = "-" if found[-1][0] in "-\u2212" else ""
    whole, _, fraction = found[-1].lstrip("-\u2212").replace(",", "").partition(".")
    whole, fraction = whole.lstrip("0") or "0", fraction.rstrip("0")
    number = f"{whole}.{fraction}" if fraction else whole
    return number if number == "0" else sign + number
