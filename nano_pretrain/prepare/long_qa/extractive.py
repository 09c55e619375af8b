"""Questions without a model: a sentence of the chunk with a name, a number or else a long word left out.

What is left out occurs once in the whole document, and so does the sentence's text before or behind it: the question
has one answer, and nothing but its chunk gives it away.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from nano_pretrain.prepare.long_qa.passages import Pair, Passage, one_line

GAP = "____"
QUESTION = 'Which {kind} is missing here: "{sentence}"'
MIN_CHARACTERS = 40
"""Shortest sentence that is used."""
MIN_LETTER_SHARE = 0.7
"""Least share of letters and white space in a sentence: below it lie formulas, tables and code."""
CONTEXT_WORDS = 20
"""A longer sentence is quoted with this many words at either side of the gap."""
MIN_NAME_CHARACTERS = 3
MIN_NUMBER_DIGITS = 2
MIN_WORD_CHARACTERS = 7

_SENTENCE_END = re.compile(r"(?<=[.!?])\s+|\n\s*\n")
_WORD = re.compile(r"""(?<![^\s("$])\w+(?:[.,-]\w+)*(?=[\s.,;:!?)"'\u2019%]|\Z)""")
_WITHIN_A_LINE = re.compile(r"[\w,] \Z")


@dataclass(frozen=True)
class _Gap:
    """A word that may be asked for, and the text around it, as the document has them."""

    kind: str
    before: str
    answer: str
    after: str


def extractive(passages: Sequence[Passage], done: Callable[[], None]) -> list[Pair | None]:
    """Write a pair for each passage that has a sentence fit for it; the same text and keys give the same pairs."""
    pairs: list[Pair | None] = []
    for document, own in itertools.groupby(passages, key=lambda passage: passage.document):
        folded = document.text.casefold()
        for passage in own:
            pairs.append(_ask(passage, folded))
            done()
    return pairs


def _ask(passage: Passage, folded: str) -> Pair | None:
    gaps = list(_gaps(passage))
    first = passage.key % max(len(gaps), 1)
    # From a random one on, names and numbers first, until one is unique: to know that, the whole document is read.
    in_turn = sorted(gaps[first:] + gaps[:first], key=lambda gap: gap.kind == "word")
    pairs = (_pair(gap, passage.document.text, folded) for gap in in_turn)
    return next((pair for pair in pairs if pair), None)


def _gaps(passage: Passage) -> Iterator[_Gap]:
    for sentence in _sentences(passage.text):
        for word in _WORD.finditer(sentence):
            before, after = sentence[: word.start()], sentence[word.end() :]
            if kind := _kind(word[0], before):
                yield _Gap(kind, _last_words(before), word[0], _first_words(after))


def _sentences(chunk: str) -> Iterator[str]:
    """Sentences of prose, and the parts of those that the chunk's ends cut."""
    for sentence in _SENTENCE_END.split(_whole_words(chunk)):
        letters = sum(character.isalpha() or character.isspace() for character in sentence)
        if len(sentence) >= MIN_CHARACTERS and letters >= MIN_LETTER_SHARE * len(sentence):
            yield sentence


def _whole_words(chunk: str) -> str:
    """The chunk without its first and last word, which may be parts of one."""
    return re.sub(r"\A\S*|\S*\Z", "", chunk)


def _last_words(text: str) -> str:
    starts = [word.start() for word in re.finditer(r"\S+", text)][-CONTEXT_WORDS:]
    return text[starts[0] :] if starts else ""


def _first_words(text: str) -> str:
    ends = [word.end() for word in re.finditer(r"\S+", text)][:CONTEXT_WORDS]
    return text[: ends[-1]] if ends else ""


def _kind(word: str, before: str) -> str | None:
    """What a word is, if it may be asked for. Capitals that begin a line, a quotation or a sentence make no name."""
    if not any(character.isalpha() for character in word):
        return "number" if sum(character.isdigit() for character in word) >= MIN_NUMBER_DIGITS else None
    if word[0].isupper() and len(word) >= MIN_NAME_CHARACTERS and _WITHIN_A_LINE.search(before):
        return "name"
    return "word" if word.islower() and word.isalpha() and len(word) >= MIN_WORD_CHARACTERS else None


def _pair(gap: _Gap, text: str, folded: str) -> Pair | None:
    """The pair, if the document has one answer to it."""
    sentence = one_line(f"{gap.before}{GAP}{gap.after}")
    unique = folded.count(gap.answer.casefold()) == 1 and 1 in {text.count(gap.before), text.count(gap.after)}
    return Pair(QUESTION.format(kind=gap.kind, sentence=sentence), gap.answer) if sentence and unique else None
