"""Long documents with questions: which documents, which chunks, and what the extractive writer asks."""

from __future__ import annotations

import itertools
import json
import random
import re
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer

from nano_pretrain.data.shards import TokenStream, open_corpus
from nano_pretrain.prepare import run
from nano_pretrain.prepare.clean import Drop
from nano_pretrain.prepare.corpus_file import DerivedSource
from nano_pretrain.prepare.documents import Document
from nano_pretrain.prepare.long_qa.derive import append, chunk_bounds, draw, token_starts
from nano_pretrain.prepare.long_qa.extractive import GAP, extractive
from nano_pretrain.prepare.long_qa.passages import Pair, Passage, one_line, sample
from nano_pretrain.prepare.manifest import tokens_by_length
from nano_pretrain.prepare.select import Selection
from nano_pretrain.prepare.tokenizer import train_bpe
from nano_pretrain.recipe.errors import UserError
from tests.prepare.small_corpus import CHUNK_TOKENS, MIN_TOKENS, members, prose, recipe_in, small_recipe

CHUNK = 16


def document(number: int, words: int = 400) -> Document:
    return Document.of(prose(random.Random(number), words))


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return train_bpe({"a": [document(number) for number in range(20)]}, 400, 100_000)


def tokens(tokenizer: Tokenizer, text: str) -> int:
    return len(tokenizer.encode(text).ids)


def source(min_tokens: int = 200, seed: int = 0) -> DerivedSource:
    return DerivedSource("long", ["a", "b"], min_tokens, CHUNK, 0.1, seed)


def parents() -> dict[str, Selection]:
    a = Selection(train=[document(n) for n in range(12)], heldout=[document(n) for n in range(12, 15)])
    b = Selection(train=[document(n, 20) for n in range(15, 25)], heldout=[document(25)])
    return {"a": a, "b": b}


def no_progress() -> None:
    pass


def test_chunks_are_whole_and_back_to_back(tokenizer: Tokenizer) -> None:
    for number in range(20):
        # 語 and é have several bytes, which are several tokens here.
        text = document(number, 50).text + "語é" * (number % 3)
        (starts,) = token_starts(tokenizer, [Document.of(text)], 0)
        bounds = chunk_bounds(starts, CHUNK, len(text))
        assert bounds[0] == 0
        assert len(bounds) - 1 == tokens(tokenizer, text) // CHUNK
        assert all(one <= other for one, other in itertools.pairwise(bounds))
        assert tokens(tokenizer, text[bounds[-1] :]) < CHUNK + 4
        for one, other in itertools.pairwise(bounds):
            # A chunk's own encoding may differ by the tokens of a character that its end cuts.
            assert abs(tokens(tokenizer, text[one:other]) - CHUNK) <= 4


@given(st.integers(1, 3000), st.floats(0.001, 1), st.integers(0, 9))
def test_a_tenth_is_a_tenth_and_at_least_one(count: int, share: float, seed: int) -> None:
    bounds = list(range(count + 1))
    passages = sample(Document.of("x" * count), bounds, share, seed)
    places = [passage.start for passage in passages]
    assert len(set(places)) == len(places) == max(1, round(share * count))
    assert places == [passage.start for passage in sample(Document.of("x" * count), bounds, share, seed)]


def test_which_chunks_is_random_and_never_changes() -> None:
    bounds = list(range(101))
    text = Document.of("x" * 100)
    places = [passage.start for passage in sample(text, bounds, 0.1, 0)]
    assert places != sorted(places)
    assert places == [21, 70, 14, 29, 89, 3, 92, 24, 65, 90]
    others = [{p.start for p in sample(text, bounds, 0.1, seed)} for seed in range(50)]
    assert len(set().union(*others)) > 90  # 500 draws of 100 chunks miss one with a chance of 0.005.


def test_a_document_is_long_from_the_least_tokens_on(tokenizer: Tokenizer) -> None:
    one = document(0)
    length = tokens(tokenizer, one.text)
    short = Document.of("x" * 20)
    for least, kept in ((length, 1), (length + 1, 0)):
        selections = {"a": Selection(train=[one, short]), "b": Selection(train=[document(1, 3000)])}
        drawn = draw(source(least), selections, tokenizer, None)
        assert [each.document for each in drawn.long["train"]].count(one) == kept
        assert drawn.selection.dropped_documents == {Drop.NOT_LONG: 2 - kept}
        assert drawn.selection.documents_in == 3


def test_held_out_stays_held_out_and_questions_stand_at_the_end(tokenizer: Tokenizer) -> None:
    selections = parents()
    drawn = draw(source(), selections, tokenizer, None)
    pairs: list[Pair | None] = [Pair(f"What is {n}?", str(n)) for n in range(len(drawn.passages))]
    pairs[0] = None
    derived = append(source(), drawn, pairs)
    asked = iter(pairs)
    for split in ("train", "heldout"):
        own = [d for parent in selections.values() for d in getattr(parent, split) if len(d.text) > 500]
        made = getattr(derived.selection, split)
        assert len(made) == len(own) == derived.counts[split]["documents"]
        for each, result in zip(drawn.long[split], made, strict=True):
            assert each.document in own
            expected = [pair.text for pair in itertools.islice(asked, len(each.passages)) if pair]
            assert result.text == "\n\n".join([each.document.text, *expected])
    assert derived.counts["train"]["questions"] == derived.counts["train"]["sampled"] - 1
    assert derived.selection.dropped_documents == {Drop.NOT_LONG: 10}


def test_neither_the_order_nor_the_batch_of_documents_matters(tokenizer: Tokenizer) -> None:
    def result(order: Callable[[list[Document]], list[Document]], names: list[str]) -> list[Document]:
        selections = {n: Selection(train=order(s.train), heldout=order(s.heldout)) for n, s in parents().items()}
        drawn = draw(DerivedSource("long", names, 200, CHUNK), selections, tokenizer, 20_000)
        derived = append(source(), drawn, extractive(drawn.passages, no_progress)).selection
        return [*derived.train, *derived.heldout]

    expected = result(lambda documents: documents, ["a", "b"])
    assert len(expected) >= 5
    assert result(lambda documents: documents[::-1], ["b", "a"]) == expected


def test_the_cap_counts_the_text_of_the_parents(tokenizer: Tokenizer) -> None:
    size = document(0).bytes
    drawn = draw(source(), parents(), tokenizer, 3 * size)
    assert 2 <= len(drawn.long["train"]) <= 4
    assert sum(each.document.bytes for each in drawn.long["train"]) <= 3 * size
    assert len(drawn.long["heldout"]) == 4
    assert drawn.selection.dropped_documents[Drop.OVER_CAP] == 12 - len(drawn.long["train"])


def test_a_source_without_long_documents_or_questions_is_refused(tokenizer: Tokenizer) -> None:
    with pytest.raises(
        UserError, match=r"^data\.corpus: derived source long: no training document of a, b has 99,?999"
    ):
        draw(source(99_999), parents(), tokenizer, None)
    drawn = draw(source(), parents(), tokenizer, None)
    with pytest.raises(UserError, match=r"^data\.long_qa\.writer: derived source long: no usable question[^\n]+$"):
        append(source(), drawn, [None] * len(drawn.passages))


def passages_of(text: str, bounds: Sequence[int] | None = None, seed: int = 0) -> list[Passage]:
    return sample(Document.of(text), bounds or [0, len(text)], 1.0, seed)


def test_every_extracted_answer_is_unique_and_from_its_chunk() -> None:
    asked = 0
    for number in range(30):
        text = document(number).text
        passages = passages_of(text, list(range(0, len(text), 300)))
        for passage, pair in zip(passages, extractive(passages, no_progress), strict=True):
            if pair is None:
                continue
            asked += 1
            assert text.casefold().count(pair.answer.casefold()) == 1
            quoted = re.fullmatch(r'Which (?:name|number|word) is missing here: "(.+)"', pair.question)
            assert quoted
            filled = quoted[1].replace(GAP, pair.answer)
            assert filled in one_line(passage.text)  # type: ignore[operator]
            before, after = quoted[1].split(GAP)
            assert 1 in {text.count(before), text.count(after)}
    assert asked > 100


SENTENCE = "In the spring the old envoy {} went over the wide river again."


@pytest.mark.parametrize(
    ("before", "sentence", "answer"),
    [
        ("", SENTENCE.format("Lavinia"), "Lavinia"),
        ("", "It weighed {} pounds on that day and no one knew why it did.".format("1,234.5"), "1,234.5"),
        ("", "All that it said was read out by an ambassador on that day.", "ambassador"),
        ("lavinia was here. ", SENTENCE.format("Lavinia"), None),
        ("Lavinian was here. ", SENTENCE.format("Lavinia"), None),
        (SENTENCE.format("Octavia") + " ", SENTENCE.format("Lavinia"), None),
        ("", SENTENCE.format("Al"), None),
        ("", "Too short for Lavinia.", None),
        ("", "See http://a.b/Lavinia/x=25&y=26 and so on and on for ever more.", None),
        ("", "f(x_1) = {Lavinia: (1 + 2) * [3, 45] / %6 ^ 7} -> <8|9> == !~ 0", None),
        ("", "And of it all we saw no more until it was too late to see\nLavinia and no one", None),
    ],
)
def test_what_may_be_asked(before: str, sentence: str, answer: str | None) -> None:
    text = f"{before}So it was. {sentence} It was so."
    (pair,) = extractive(passages_of(text), no_progress)
    assert (pair and pair.answer) == answer


def test_a_long_sentence_is_quoted_around_its_gap() -> None:
    text = f"So it was. {'so ' * 50}then Lavinia came {'and so ' * 50}on. It was so."
    (pair,) = extractive(passages_of(text), no_progress)
    assert pair
    assert pair.question.endswith(f'here: "{"so " * 19}then {GAP} came {"and so " * 9}and"')


@pytest.mark.parametrize("text", ["a\x00b", "a\ud800b", "a\ue000b", " \n", ""])
def test_what_no_text_has_is_no_question(text: str) -> None:
    assert one_line(text) is None


def texts(corpus_path: Path, stream: TokenStream) -> list[str]:
    tokenizer = Tokenizer.from_file(str(corpus_path / "tokenizer.json"))
    decoded: str = tokenizer.decode(stream.read(0, stream.tokens).tolist(), skip_special_tokens=False)
    return decoded.split("</s>")[:-1]


def test_prepare_says_what_it_asked_and_how_long_documents_are(tmp_path: Path) -> None:
    longest = {f"prose/notes/long{number}.txt": document(number, 900).text for number in range(3)}
    run.prepare(small_recipe(tmp_path, members() | longest))
    path = tmp_path / "prepared"
    corpus = open_corpus(path)
    manifest = json.loads((path / "manifest.json").read_text())
    entry = manifest["sources"]["long"]
    notes = {split: texts(path, getattr(corpus, split)["notes"]) for split in ("train", "heldout")}
    for split in ("train", "heldout"):
        made = texts(path, getattr(corpus, split)["long"])
        assert made
        assert all(text.partition("\n\nQuestion: ")[0] in notes[split] for text in made)
        counts = entry["questions"][split]
        assert sum(text.count("\nQuestion: ") for text in made) == counts["questions"] <= counts["sampled"]
        assert 0.05 < counts["sampled"] / counts["chunks"] < 0.15
    assert entry["licence"] == "as its parents: notes (made by a test)"
    assert entry["questions"]["writer"] == "extractive"
    assert (entry["questions"]["min_tokens"], entry["questions"]["chunk_tokens"]) == (MIN_TOKENS, CHUNK_TOKENS)
    assert manifest["settings"]["data.long_qa.writer"] == "extractive"
    tokenizer = Tokenizer.from_file(str(path / "tokenizer.json"))
    lengths = [tokens(tokenizer, text) + 1 for text in texts(path, corpus.train["long"])]
    by_length = entry["train"]["tokens_by_length"]
    assert by_length == tokens_by_length(lengths)
    assert 0 < by_length["1024"] < entry["train"]["tokens"]
    counts = entry["questions"]["train"]
    report = (path / "report.md").read_text()
    assert f"| long | extractive | notes | 400 | 40 | train | {counts['documents']} | {counts['chunks']} |" in report
    assert f"| long | {100 * by_length['1024'] / entry['train']['tokens']:.1f} | 0.0 |" in report


def test_the_tokens_of_long_documents() -> None:
    lengths = [1023, 1024, 4096, 8192, 32_768, 131_071, 131_072]
    sums = {"1024": 308_223, "4096": 307_199, "8192": 303_103, "32768": 294_911, "131072": 131_072, "524288": 0}
    assert tokens_by_length(lengths) == sums


def test_a_question_that_repeats_held_out_text_drops_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run.prepare(small_recipe(tmp_path))
    corpus = open_corpus(tmp_path / "prepared")
    leaked = next(text for text in texts(tmp_path / "prepared", corpus.heldout["notes"]) if len(text) > 200)

    def leaking(passages: Sequence[Passage], done: Callable[[], None]) -> list[Pair | None]:
        return [Pair(leaked, "yes") for _ in passages]

    monkeypatch.setattr(run, "make_writer", lambda _: leaking)
    recipe = recipe_in(tmp_path)
    recipe.data.path = str(tmp_path / "other")
    run.prepare(recipe)
    other = open_corpus(tmp_path / "other")
    assert leaked not in texts(tmp_path / "other", other.heldout["notes"])
    assert other.heldout["notes"].documents == corpus.heldout["notes"].documents - 1
    assert other.train["notes"].tokens == corpus.train["notes"].tokens
