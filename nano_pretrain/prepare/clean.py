"""Text as it was extracted to text as it is trained on, or the reason why not."""

from __future__ import annotations

import re
from collections.abc import Callable
from enum import StrEnum


class Drop(StrEnum):
    """Why a document is in neither split."""

    TOO_SHORT = "too short"
    BINARY = "binary"
    NOT_TEXT = "not text"
    REPETITIVE = "repetitive"
    DUPLICATE = "duplicate"
    OVER_CAP = "over the cap"
    NEAR_DUPLICATE = "near training text"
    NOT_LONG = "not long"
    NO_QUESTION = "no question"
    PRESENT = "in the corpus before"
    HELD_OUT = "to be held out"
    NEAR_HELD_OUT = "near held-out text"


MIN_CHARACTERS = 48
MAX_CONTROL_SHARE = 0.001
MIN_WORD_SHARE = 0.5
"""Least share of letters, digits and white space: below it lie tables of symbols and encoded data."""
MAX_REPEATED_SHARE = 0.5
"""Largest share of the characters that may lie in long lines which occurred before in the same text."""
LONG_LINE = 24

_CONTROL = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\ufffd]")
_WORDS_AND_SPACE = re.compile(r"[\w\s]+")
_TRAILING_SPACE = re.compile(r"[^\S\n]+$", re.MULTILINE)
_BLANK_LINES = re.compile(r"\n{4,}")


def normalise(text: str) -> str:
    """Unix line ends, no trailing white space, at most two blank lines in a row, no byte order mark."""
    text = text.replace("\r\n", "\n").replace("\r", "\n").replace("\ufeff", "")
    return _BLANK_LINES.sub("\n\n\n", _TRAILING_SPACE.sub("", text)).strip("\n")


def reason_to_drop(text: str) -> Drop | None:
    """The first filter that a normalised text fails, or None."""
    return next((reason for reason, fails in FILTERS.items() if fails(text)), None)


def _too_short(text: str) -> bool:
    return len(text) < MIN_CHARACTERS


def _binary(text: str) -> bool:
    return len(_CONTROL.findall(text)) > MAX_CONTROL_SHARE * len(text)


def _not_text(text: str) -> bool:
    return len(_WORDS_AND_SPACE.sub("", text)) > (1 - MIN_WORD_SHARE) * len(text)


def _repetitive(text: str) -> bool:
    seen: set[str] = set()
    repeated = 0
    for line in text.split("\n"):
        stripped = line.strip()
        if len(stripped) < LONG_LINE:
            continue
        repeated += len(stripped) if stripped in seen else 0
        seen.add(stripped)
    return repeated > MAX_REPEATED_SHARE * len(text)


FILTERS: dict[Drop, Callable[[str], bool]] = {
    Drop.TOO_SHORT: _too_short,
    Drop.BINARY: _binary,
    Drop.NOT_TEXT: _not_text,
    Drop.REPETITIVE: _repetitive,
}
