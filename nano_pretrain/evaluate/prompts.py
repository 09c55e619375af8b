"""Retrieval prompts of an exact length in tokens, after RULER (Hsieh et al. 2024, arXiv 2404.06654, section 3).

The tasks, their names and the haystack of repeated noise sentences are RULER's; the wording is shorter, and nothing is
asked for in an instruction, since a pretrained model only continues text. Noise and made-up words, not text of the
corpus: a prompt then is the same for every corpus, holds nothing that could be taken for an answer, and the likelihood
of an answer does not depend on how common a word is. What is scored is copying and tracking, not language.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import inf
from random import Random

from tokenizers import Tokenizer

from nano_pretrain.recipe.errors import RecipeError
from nano_pretrain.recipe.schema import EvaluateConfig

NOISE = (" The grass is green.", " The sky is blue.", " The sun is yellow.", " Here we go.", " There and back again.")
"""RULER's, which it has from Mohtashami and Jaggi (2023, arXiv 2305.16300)."""

CANDIDATES = 4
"""Answers that are compared, the right one among them: chance is one in so many."""

HOPS = 2
"""Assignments between a variable with a number and the last one of its chain."""

COMMON_WORDS, COMMON_TIMES, RARE_TIMES = 3, 10, 2
"""Words to find in a list and how often each occurs, and how often each other word does."""

CONSONANTS, VOWELS, CAPITALS = "bdfgklmnprstvz", "aeiou", "ABCDEFGHIJKLMNOPQRSTUVWXYZ"

TRIED = 2000
"""Words of a kind that are drawn to see how many tokens they have."""

DRAWN = 0.8
"""Share of a kind's usable words that may be asked for: drawing so many different ones takes twice as many draws."""


@dataclass(frozen=True)
class Example:
    """One prompt.

    Attributes:
        prompt: token ids.
        candidates: token ids of the answers that are compared, equally many each; the first is right.
        references: texts that an answer must contain.
        room: tokens left for an answer; with the prompt they are exactly the length asked for.
    """

    prompt: list[int]
    candidates: tuple[list[int], ...]
    references: tuple[str, ...]
    room: int


@dataclass(frozen=True)
class _Task:
    """What a prompt is made of.

    Attributes:
        needles: depth in the haystack, 0 to 1, and token ids of each.
        question: token ids that end the prompt.
        candidates: texts; the first is right.
        references: texts that an answer must contain.
        room: tokens left for an answer.
    """

    needles: list[tuple[float, list[int]]]
    question: list[int]
    candidates: list[str]
    references: list[str]
    room: int


class Words:
    """Made-up words of one kind, all of the same number of tokens: only then do their likelihoods compare.

    Args:
        encode: text to token ids.
        draw: one word, any, all as likely.
        kinds: how many there are to draw from.

    Attributes:
        tokens: tokens of a word with the space before it, the number that is most frequent.
        most: different words that can be had.
    """

    def __init__(self, encode: Callable[[str], list[int]], draw: Callable[[Random], str], kinds: int) -> None:
        self._encode = encode
        self._draw = draw
        random = Random(0)
        lengths = Counter(len(encode(f" {draw(random)}")) for _ in range(TRIED))
        self.tokens, usable = lengths.most_common(1)[0]
        self.most = int(DRAWN * kinds * usable / TRIED)

    def sample(self, random: Random, count: int) -> list[str]:
        """Different words, up to `most`."""
        found: dict[str, None] = {}
        while len(found) < count:
            word = self._draw(random)
            if len(self._encode(f" {word}")) == self.tokens:
                found[word] = None
        return list(found)


class Prompts:
    """Makes prompts for a tokenizer.

    Args:
        tokenizer: any; texts are encoded in pieces that begin with the space before a word, without special tokens.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._noise = [self._tokens(sentence) for sentence in NOISE]
        self.numbers = Words(self._tokens, lambda random: str(random.randrange(10**6, 10**7)), 9 * 10**6)
        self.variables = Words(self._tokens, lambda random: "".join(random.choices(CAPITALS, k=5)), len(CAPITALS) ** 5)
        self.words = Words(
            self._tokens,
            lambda random: "".join(random.choice(CONSONANTS) + random.choice(VOWELS) for _ in range(3)),
            (len(CONSONANTS) * len(VOWELS)) ** 3,
        )
        self._tasks: dict[str, Callable[[Random, float], _Task]] = {
            "niah_single": lambda random, depth: self._needles(random, [depth]),
            "niah_multikey": lambda random, depth: self._needles(random, [depth, *_depths(random, CANDIDATES - 1)]),
            "vt": self._variable_tracking,
        }

    def examples(self, task: str, length: int, count: int, seed: int) -> list[Example]:
        """Prompts of a task, the same for the same arguments; needles from the first token of the haystack to its end.

        Args:
            task: one of RETRIEVAL_TASKS.
            length: tokens of a prompt and the room for its answer, `least(task)` to `most(task)`.
            count: how many.
            seed: of the words and the places.
        """
        depths = [number / (count - 1) if count > 1 else 0.5 for number in range(count)]
        return [
            self._example(task, Random(f"{seed}/{task}/{length}/{number}"), length, depth)
            for number, depth in enumerate(depths)
        ]

    def least(self, task: str) -> int:
        """Tokens of the shortest prompt with its answer: every noise sentence once, or three words beside the common.

        All words of a kind have equally many tokens, so it is the same for all prompts of a task.
        """
        if task == "cwe":
            return self._list_tokens(CANDIDATES - 1)
        return _fixed(self._tasks[task](Random(0), 0.5)) + sum(map(len, self._noise))

    def most(self, task: str) -> float:
        """Tokens of the longest prompt with its answer: of `cwe` until the words are used up, else infinite."""
        return self._list_tokens(self.words.most - COMMON_WORDS) if task == "cwe" else inf

    def _example(self, task: str, random: Random, length: int, depth: float) -> Example:
        if task == "cwe":
            return self._common_words(random, length)
        made = self._tasks[task](random, depth)
        haystack = self._haystack(length - _fixed(made))
        prompt = [*_placed(haystack, made.needles), *made.question]
        candidates = tuple(self._tokens(f" {word}") for word in made.candidates)
        return Example(prompt, candidates, tuple(made.references), made.room)

    def _needles(self, random: Random, depths: Sequence[float]) -> _Task:
        """A number for each key, of which the first is asked for; wrong answers are the others' numbers, or unseen."""
        keys, values = self.words.sample(random, len(depths)), self.numbers.sample(random, CANDIDATES)
        needles = [
            (depth, self._tokens(" The special number of", f" {key}", " is:", f" {value}", "."))
            for depth, key, value in zip(depths, keys, values, strict=False)
        ]
        asked = self._tokens("\nQuestion: What is the special number of", f" {keys[0]}", "?")
        begun = self._tokens("\nAnswer: The special number of", f" {keys[0]}", " is:")
        return _Task(needles, asked + begun, values, [values[0]], 2 * self.numbers.tokens)

    def _variable_tracking(self, random: Random, depth: float) -> _Task:
        """Chains of assignments, all equally long, mixed; the variables of one are asked for by its number.

        What is compared are the last variables of the chains, each `HOPS` assignments away from its number.
        """
        names, values = self.variables.sample(random, CANDIDATES * (HOPS + 1)), self.numbers.sample(random, CANDIDATES)
        chains = [names[start : start + HOPS + 1] for start in range(0, len(names), HOPS + 1)]
        statements = [iter(self._chain(*each)) for each in zip(chains, values, strict=True)]
        turns = [number for number in range(CANDIDATES) for _ in range(HOPS + 1)]
        random.shuffle(turns)
        needles = zip(sorted(_depths(random, len(turns))), (next(statements[turn]) for turn in turns), strict=True)
        asked = self._tokens("\nQuestion: Which variables have the value", f" {values[0]}", "?")
        begun = self._tokens("\nAnswer: The variables with the value", f" {values[0]}", " are:")
        # A separator may follow each.
        room = 2 * len(chains[0]) * (self.variables.tokens + 1)
        return _Task(list(needles), asked + begun, [chain[-1] for chain in chains], chains[0], room)

    def _chain(self, names: Sequence[str], value: str) -> list[list[int]]:
        first = self._tokens(" VAR", f" {names[0]}", " =", f" {value}", ".")
        pairs = zip(names[1:], names, strict=False)
        return [first, *(self._tokens(" VAR", f" {name}", " = VAR", f" {before}", ".") for name, before in pairs)]

    def _common_words(self, random: Random, length: int) -> Example:
        """A list of words in which some occur more often than the others, as many others as there is room for."""
        header, question, room = self._list_frame()
        rare, rest = divmod(length - self._list_tokens(0), RARE_TIMES * self.words.tokens)
        words = self.words.sample(random, COMMON_WORDS + rare)
        listed = words[:COMMON_WORDS] * COMMON_TIMES + words[COMMON_WORDS:] * RARE_TIMES
        random.shuffle(listed)
        noise = [token for sentence in self._haystack(rest) for token in sentence]
        prompt = noise + header + self._tokens(*(f" {word}" for word in listed)) + question
        compared = [words[0], *words[COMMON_WORDS : COMMON_WORDS + CANDIDATES - 1]]
        candidates = tuple(self._tokens(f" {word}") for word in compared)
        return Example(prompt, candidates, tuple(words[:COMMON_WORDS]), room)

    def _list_tokens(self, rare: int) -> int:
        """Tokens of a prompt with its answer, of so many words beside the common, without noise."""
        header, question, room = self._list_frame()
        words = COMMON_WORDS * COMMON_TIMES + rare * RARE_TIMES
        return len(header) + words * self.words.tokens + len(question) + room

    def _list_frame(self) -> tuple[list[int], list[int], int]:
        """What stands before the list, what behind it, and the room for an answer."""
        question = "\nQuestion: Which words occur most often in the list?\nAnswer: The words that occur most often are:"
        return self._tokens("\nList:"), self._tokens(question), 2 * COMMON_WORDS * (self.words.tokens + 1)

    def _haystack(self, tokens: int) -> list[list[int]]:
        """Noise sentences of so many tokens in all; the first may lack its beginning, as training samples do."""
        sentences: list[list[int]] = []
        while tokens > 0:
            sentence = self._noise[-1 - len(sentences) % len(self._noise)][-tokens:]
            sentences.append(sentence)
            tokens -= len(sentence)
        return sentences[::-1]

    def _tokens(self, *pieces: str) -> list[int]:
        return [token for piece in pieces for token in self._tokenizer.encode(piece, add_special_tokens=False).ids]


def check_lengths(options: EvaluateConfig, tokenizer: Tokenizer) -> None:
    """Refuse lengths in which a task has no room, or that it cannot fill.

    Raises:
        RecipeError: the message says the least, or the most.
    """
    if not options.lengths or not options.tasks:
        return
    prompts = Prompts(tokenizer)
    least, task = max((prompts.least(task), task) for task in options.tasks)
    shortest, longest = min(options.lengths), max(options.lengths)
    if shortest < least:
        raise RecipeError("evaluate.lengths", f"{shortest} tokens are too few for {task}", f"write at least {least}")
    most, task = min((prompts.most(task), task) for task in options.tasks)
    if longest > most:
        problem = f"{longest} tokens are more than there are words for in {task}"
        raise RecipeError("evaluate.lengths", problem, f"write at most {most}, or evaluate.tasks without {task}")


def _depths(random: Random, count: int) -> list[float]:
    return [random.random() for _ in range(count)]


def _fixed(task: _Task) -> int:
    """Tokens of all but the haystack."""
    return sum(len(needle) for _, needle in task.needles) + len(task.question) + task.room


def _placed(haystack: Sequence[list[int]], needles: Sequence[tuple[float, list[int]]]) -> list[int]:
    """The haystack with each needle before the sentence that begins nearest to its depth, counted in sentences."""
    at: dict[int, list[int]] = {}
    for depth, needle in needles:
        at.setdefault(round(depth * len(haystack)), []).extend(needle)
    out: list[int] = []
    for number, sentence in enumerate([*haystack, []]):
        out += [*at.get(number, []), *sentence]
    return out
