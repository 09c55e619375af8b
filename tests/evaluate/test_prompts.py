"""Retrieval prompts: exact lengths, and answers that stand where and as often as they should."""

from __future__ import annotations

from collections import Counter
from functools import cache
from itertools import pairwise
from pathlib import Path
from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from nano_pretrain.evaluate.prompts import (
    CANDIDATES,
    COMMON_TIMES,
    COMMON_WORDS,
    CONSONANTS,
    HOPS,
    NOISE,
    RARE_TIMES,
    Example,
    Prompts,
    Words,
    check_lengths,
)
from nano_pretrain.recipe.errors import RecipeError
from nano_pretrain.recipe.schema import RETRIEVAL_TASKS, EvaluateConfig
from tests.corpora import write_corpus


@cache
def prompts(merges: int) -> tuple[Tokenizer, Prompts]:
    """Of a byte-level BPE with up to so many merges, after which words of equal letters differ in tokens."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=256 + merges, initial_alphabet=alphabet, show_progress=False)
    text = [*NOISE, *(f" {7919 * number % 10**7:07} badoku VAR" for number in range(200))]
    tokenizer.train_from_iterator(text, trainer)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer, Prompts(tokenizer)


def occurrences(example: Example, candidate: list[int]) -> int:
    """How often the tokens of a candidate follow each other in the prompt."""
    size, text = len(candidate), example.prompt
    return sum(text[at : at + size] == candidate for at in range(len(text) - size + 1))


MERGES = st.sampled_from([0, 60, 400])
TASKS = st.sampled_from(RETRIEVAL_TASKS)


@given(MERGES, TASKS, st.integers(0, 1500), st.integers(1, 4), st.integers(0, 2**40))
def test_prompt_and_room_for_the_answer_are_exactly_the_length(
    merges: int, task: str, beyond: int, count: int, seed: int
) -> None:
    _, maker = prompts(merges)
    length = maker.least(task) + beyond
    examples = maker.examples(task, length, count, seed)
    assert len(examples) == count
    for example in examples:
        assert len(example.prompt) + example.room == length
        assert len(example.candidates) == CANDIDATES
        assert len({tuple(candidate) for candidate in example.candidates}) == CANDIDATES
        assert len({len(candidate) for candidate in example.candidates}) == 1
        assert len(example.candidates[0]) <= example.room
    assert maker.examples(task, length, count, seed) == examples
    assert maker.examples(task, length, count, seed + 1) != examples


@given(MERGES, st.integers(0, 600), st.integers(0, 2**40))
def test_answers_occur_as_often_as_they_should(merges: int, beyond: int, seed: int) -> None:
    tokenizer, maker = prompts(merges)
    expected = {
        "niah_single": [1, 0, 0, 0],
        "niah_multikey": [1, 1, 1, 1],
        # The last of a chain is assigned and never read.
        "vt": [1, 1, 1, 1],
        "cwe": [COMMON_TIMES, RARE_TIMES, RARE_TIMES, RARE_TIMES],
    }
    for task, times in expected.items():
        (example,) = maker.examples(task, maker.least(task) + beyond, 1, seed)
        assert [occurrences(example, candidate) for candidate in example.candidates] == times, task
        text = tokenizer.decode(example.prompt)
        words = Counter(text.replace(".", " ").replace("?", " ").split())
        for reference in example.references:
            # Every variable but the last is read once; the common words are all as common.
            assert words[reference] == {"cwe": COMMON_TIMES, "vt": 1 + (reference != example.references[-1])}.get(
                task, 1
            )


def test_texts_are_what_the_tasks_say() -> None:
    tokenizer, maker = prompts(60)
    text = {task: tokenizer.decode(maker.examples(task, maker.least(task), 1, 0)[0].prompt) for task in RETRIEVAL_TASKS}
    for task in ("niah_single", "niah_multikey"):
        needles, _, question = text[task].partition("\nQuestion: What is the special number of ")
        assert needles.count("The special number of") == {"niah_single": 1, "niah_multikey": CANDIDATES}[task]
        key = question.partition("?")[0]
        (example,) = maker.examples(task, maker.least(task), 1, 0)
        assert f"The special number of {key} is: {example.references[0]}." in needles
        assert question.endswith(f"Answer: The special number of {key} is:")
    for example in maker.examples("vt", maker.least("vt") + 300, 3, 0):
        prompt = tokenizer.decode(example.prompt)
        statements = [f"VAR {name} = VAR {before}." for before, name in pairwise(example.references)]
        places = [prompt.index(statement) for statement in statements]
        assert places == sorted(places), "a variable is read after it was assigned"
        assert len(example.references) == HOPS + 1
        assert tokenizer.decode(example.candidates[0]).strip() == example.references[-1]
    assert text["vt"].count("VAR ") == CANDIDATES * (2 * HOPS + 1)
    assert len(maker.examples("cwe", maker.least("cwe"), 1, 0)[0].references) == COMMON_WORDS


def test_the_needle_wanders_from_the_beginning_to_the_end_of_the_haystack() -> None:
    tokenizer, maker = prompts(60)
    examples = maker.examples("niah_single", maker.least("niah_single") + 400, 5, 0)
    firsts = []
    for example in examples:
        (right, *_), text = example.candidates, example.prompt
        firsts.append(next(at for at in range(len(text)) if text[at : at + len(right)] == right))
    steps = [after - before for before, after in pairwise(firsts)]
    sentence = max(len(tokenizer.encode(sentence).ids) for sentence in NOISE)
    even = (firsts[-1] - firsts[0]) / 4
    assert firsts[0] < 60
    assert even > 90
    # A needle goes where a sentence begins.
    assert all(abs(step - even) <= 2 * sentence for step in steps)


def test_too_short_lengths_are_told_the_least() -> None:
    tokenizer, maker = prompts(60)
    least = {task: maker.least(task) for task in RETRIEVAL_TASKS}
    worst = max(least, key=lambda task: least[task])
    options = EvaluateConfig(lengths=[least[worst]])
    check_lengths(options, tokenizer)
    options.lengths.append(least[worst] - 1)
    problem = f"{least[worst] - 1} tokens are too few for {worst}; write at least {least[worst]}"
    with pytest.raises(RecipeError, match=problem):
        check_lengths(options, tokenizer)
    check_lengths(EvaluateConfig(lengths=[least[worst] - 1], tasks=["niah_single"]), tokenizer)


def test_words_can_be_drawn_up_to_the_most_there_are() -> None:
    encoded: list[str] = []

    def encode(text: str) -> list[int]:
        encoded.append(text)
        return [0] * (3 if text < " n" else 2)

    words = Words(encode, lambda random: "".join(random.choices(CONSONANTS, k=3)), len(CONSONANTS) ** 3)
    # 7 of the 14 letters come before n: half of the words, give or take four standard deviations of 2000 draws.
    usable = len(CONSONANTS) ** 3 / 2
    assert words.most == pytest.approx(0.8 * usable, rel=4 * 0.0224)
    encoded.clear()
    assert len(set(words.sample(Random(1), words.most))) == words.most
    # Two draws a word because half are of use, times what repeats take, 2 at 0.8.
    assert len(encoded) < 1.3 * 2 * 2 * words.most


def test_lengths_for_which_there_are_no_words_are_told_the_most(monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer, maker = prompts(60)
    most = maker.most("cwe")
    assert most > 10**6, "a million tokens are no odd length"
    check_lengths(EvaluateConfig(lengths=[2000, int(most)]), tokenizer)
    options = EvaluateConfig(lengths=[2000, int(most) + 1])
    problem = f"{most + 1} tokens are more than there are words for in cwe; write at most {most}, or evaluate.tasks"
    with pytest.raises(RecipeError, match=problem):
        check_lengths(options, tokenizer)
    options.tasks.remove("cwe")
    check_lengths(options, tokenizer)
    # Of few words the longest prompt has all.
    monkeypatch.setattr(maker.words, "most", 40)
    (example,) = maker.examples("cwe", int(maker.most("cwe")), 1, 0)
    assert len(example.prompt) + example.room == maker.most("cwe")
    listed = tokenizer.decode(example.prompt).partition("List:")[2].partition("\nQuestion")[0]
    assert len(set(listed.split())) == 40


def test_tokenizer_of_the_corpora_of_tests_has_room_for_all_tasks(tmp_path: Path) -> None:
    tokenizer = Tokenizer.from_file(str(write_corpus(tmp_path / "corpus") / "tokenizer.json"))
    check_lengths(EvaluateConfig(lengths=[1200]), tokenizer)
