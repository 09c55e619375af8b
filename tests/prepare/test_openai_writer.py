"""Questions by a model: each asked once, a few at a time, whatever the endpoint does."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from nano_pretrain.prepare.documents import Document
from nano_pretrain.prepare.long_qa import endpoint
from nano_pretrain.prepare.long_qa.openai import OpenAIWriter, parse
from nano_pretrain.prepare.long_qa.passages import Pair, Passage
from nano_pretrain.prepare.long_qa.writers import make_writer
from nano_pretrain.prepare.run import prepare
from nano_pretrain.recipe.errors import RecipeError, UserError
from nano_pretrain.recipe.schema import DataConfig, LongQaConfig, Recipe
from tests.prepare.endpoint_server import Answer, Server, asks_about, completion, failure, serving
from tests.prepare.small_corpus import recipe_in, small_recipe, tree_hashes

KEY = "sk-not-for-anyone-else"
PASSAGES = [Passage(Document.of(f"passage number{number}"), 0, 100, number) for number in range(6)]
EXPECTED = [f"What follows number{number}?" for number in range(6)]


@pytest.fixture(autouse=True)
def _impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(endpoint, "FIRST_WAIT_SECONDS", 0.001)
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    monkeypatch.setenv("no_proxy", "127.0.0.1")


def ask(server: Server, cache: Path, concurrency: int = 4, timeout: float = 5.0) -> list[str | None]:
    writer = OpenAIWriter(server.url, "a-model", concurrency, timeout, cache)
    steps: list[None] = []
    pairs = writer(PASSAGES, lambda: steps.append(None))
    assert len(steps) == len(PASSAGES)
    return [pair.question if pair else None for pair in pairs]


def first_then(*firsts: Answer | Callable[[], Answer]) -> Callable[[str], Answer]:
    """Each passage gets these answers first, then a good one."""
    seen: dict[str, Iterator[Answer | Callable[[], Answer]]] = {}

    def answer(prompt: str) -> Answer:
        following = next(seen.setdefault(prompt, iter(firsts)), None)
        if following is None:
            return asks_about(prompt)
        return following() if callable(following) else following

    return answer


def slow() -> Answer:
    time.sleep(0.3)
    return completion("too late")


def test_answers_come_in_order_and_are_asked_for_once(tmp_path: Path) -> None:
    with serving(asks_about) as server:
        assert ask(server, tmp_path) == EXPECTED
        assert ask(server, tmp_path) == EXPECTED
        assert len(server.prompts) == len(PASSAGES)
        assert all(prompt.splitlines()[-1].startswith("passage number") for prompt in server.prompts)
        assert set(server.paths) == {"/v1/chat/completions"}


def test_no_more_requests_at_a_time_than_allowed(tmp_path: Path) -> None:
    # The first three wait for one another: fewer at a time would break the barrier.
    barrier = threading.Barrier(3, timeout=5)

    def answer(prompt: str) -> Answer:
        barrier.wait()
        return asks_about(prompt)

    with serving(answer) as server:
        assert ask(server, tmp_path, concurrency=3) == EXPECTED
        assert server.most_at_a_time == 3


@pytest.mark.parametrize(
    "trouble",
    [
        failure(429, Retry_After="0"),
        failure(429, Retry_After="Wed, 21 Oct 2015 07:28:00 GMT"),
        failure(500),
        failure(503),
        Answer(0, b""),
        Answer(200, b"<html>welcome</html>"),
        Answer(200, b"{}"),
        Answer(200, b"[]"),
        Answer(200, b'{"choices": [{"message": {"content": null}}]}'),
        Answer(200, b"[" * 100_000),
        Answer(200, b'{"cut": ', {"Content_Length": "500"}),
        slow,
    ],
)
def test_what_passes_is_tried_again(tmp_path: Path, trouble: Answer | Callable[[], Answer]) -> None:
    with serving(first_then(trouble, trouble)) as server:
        assert ask(server, tmp_path, timeout=0.1 if trouble is slow else 5, concurrency=6) == EXPECTED
        # On a busy machine a good answer may be late, too.
        least = 3 * len(PASSAGES)
        assert len(server.prompts) >= least if trouble is slow else len(server.prompts) == least


@pytest.mark.parametrize(
    ("trouble", "words"),
    [(failure(500, "no\nGPU"), "HTTP 500: no GPU"), (Answer(200, b"<html>"), "no chat completion but b'<html>'")],
)
def test_what_does_not_pass_is_one_line_and_what_was_answered_is_kept(
    tmp_path: Path, trouble: Answer, words: str
) -> None:
    answered = EXPECTED[:3]

    def answer(prompt: str) -> Answer:
        good = asks_about(prompt)
        return good if any(question.encode() in good.body for question in answered) else trouble

    with serving(answer) as server:
        with pytest.raises(UserError, match=r"^data\.long_qa\.url: http://[^\n]+ failed 6 times \([^\n]+$") as caught:
            ask(server, tmp_path, concurrency=1)
        assert words in str(caught.value)
        assert len(server.prompts) == 3 + endpoint.ATTEMPTS
    with serving(asks_about) as server:
        assert ask(server, tmp_path) == EXPECTED
        assert len(server.prompts) == len(PASSAGES) - 3


def test_nobody_there_is_one_line(tmp_path: Path) -> None:
    with serving(asks_about) as server:
        pass
    with pytest.raises(UserError, match=r"^data\.long_qa\.url: [^\n]+ failed \d times \([^\n]*refused[^\n]*$"):
        ask(server, tmp_path)


@pytest.mark.parametrize(("status", "field"), [(401, "OPENAI_API_KEY"), (404, "data.long_qa.url"), (400, "model")])
def test_what_is_wrong_is_not_tried_again_and_never_shows_the_key(tmp_path: Path, status: int, field: str) -> None:
    with serving(lambda _: failure(status, f"I do not like {KEY}")) as server:
        with pytest.raises(UserError, match=rf"HTTP {status}: I do not like \*\*\*; mend it") as caught:
            ask(server, tmp_path, concurrency=1)
        assert field in str(caught.value).partition(": ")[0]
        assert KEY not in str(caught.value)
        assert len(server.prompts) == 1


@pytest.mark.parametrize("status", [200, 401, 500])
@pytest.mark.parametrize("before", [*range(20, 80, 14), *range(267, 295, 5)])
def test_a_key_across_the_cut_of_a_reply_is_struck_whole(status: int, before: int, tmp_path: Path) -> None:
    with serving(lambda _: Answer(status, b"x" * before + KEY.encode() + b"y" * 400)) as server:
        with pytest.raises(UserError) as caught:
            endpoint.Endpoint(server.url, 5, threading.Event()).complete(b'{"messages": [{"content": ""}]}')
        assert KEY[:4] not in str(caught.value)
        assert len(str(caught.value)) < 600


def test_the_key_goes_into_the_header_and_nowhere_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with serving(asks_about) as server:
        ask(server, tmp_path)
        assert {headers["Authorization"] for headers in server.headers} == {f"Bearer {KEY}"}
        files = [file for file in tmp_path.rglob("*") if file.is_file()]
        assert len(files) == len(PASSAGES)
        assert not any(KEY.encode() in file.read_bytes() for file in files)
        monkeypatch.delenv("OPENAI_API_KEY")
        ask(server, tmp_path / "other")
        assert "Authorization" not in server.headers[-1]


def test_a_redirect_is_not_followed(tmp_path: Path) -> None:
    with (
        serving(asks_about) as other,
        serving(lambda _: Answer(302, b"", {"Location": f"{other.url}/chat/completions"})) as server,
    ):
        with pytest.raises(UserError, match=r"HTTP 302"):
            ask(server, tmp_path, concurrency=1)
        assert other.prompts == []


@pytest.mark.parametrize("key", ["two words", "line\nline", "schlüssel"])
def test_a_key_that_is_none_is_refused_and_not_shown(monkeypatch: pytest.MonkeyPatch, key: str) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", key)
    with pytest.raises(UserError, match=r"^OPENAI_API_KEY: [^\n]+$") as caught:
        OpenAIWriter("http://localhost/v1", "m", 1, 1, Path("unused"))
    assert key not in str(caught.value)


def test_a_damaged_reply_is_asked_for_again(tmp_path: Path) -> None:
    with serving(asks_about) as server:
        ask(server, tmp_path)
        files = sorted(file for file in tmp_path.rglob("*.json"))
        files[0].write_bytes(b"")
        files[1].write_bytes(b"\xff\xfe")
        files[2].write_text("[1]")
        assert ask(server, tmp_path) == EXPECTED
        assert len(server.prompts) == len(PASSAGES) + 3


def test_another_model_is_asked_anew(tmp_path: Path) -> None:
    with serving(asks_about) as server:
        ask(server, tmp_path)
        OpenAIWriter(server.url, "another-model", 4, 5, tmp_path)(PASSAGES, lambda: None)
        assert len(server.prompts) == 2 * len(PASSAGES)


def test_a_cache_that_cannot_be_written_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("no directory")
    with (
        serving(asks_about) as server,
        pytest.raises(UserError, match=r"^data\.cache_dir: cannot keep replies in [^\n]+$"),
    ):
        ask(server, tmp_path / "file")


def test_an_answer_that_is_cut_off_is_none(tmp_path: Path) -> None:
    with serving(lambda _: completion("Question: What?\nAnswer: It is a l", "length")) as server:
        assert ask(server, tmp_path) == [None] * len(PASSAGES)


@pytest.mark.parametrize(
    ("reply", "pair"),
    [
        ("Question: Who?\nAnswer: Ann.", Pair("Who?", "Ann.")),
        ("Sure!\n\n**Question:** Who  is it?\n\n**Answer:** Ann.\n\nAnything else?", Pair("Who is it?", "Ann.")),
        ("Question: Who?\r\nAnswer: Ann.\r\n", Pair("Who?", "Ann.")),
        ("Question: Who?\nAnswer: Ann.\nQuestion: What?\nAnswer: It.", Pair("Who?", "Ann.")),
        ("Question: Who?\nAnswer: \n", None),
        ("Question:\nAnswer: Ann.", None),
        ("Who? Ann.", None),
        ("", None),
        ("Question: Who\x00?\nAnswer: Ann.", None),
        ("Question: Who?\nAnswer: Ann\ud800.", None),
    ],
)
def test_what_counts_as_a_pair(reply: str, pair: Pair | None) -> None:
    assert parse(reply) == pair


GOOD = {"writer": "openai", "url": "http://localhost:8000/v1", "model": "m"}


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("url", None),
        ("model", ""),
        ("url", "localhost:8000"),
        ("url", "ftp://localhost/v1"),
        ("url", "http://user:secret@localhost/v1"),
        ("url", "http://local host/v1"),
        ("url", "http://localhost:port/v1"),
        ("url", "http:///v1"),
    ],
)
def test_wrong_settings_name_their_field(field: str, value: object) -> None:
    settings = LongQaConfig(**GOOD | {field: value})  # type: ignore[arg-type]
    with pytest.raises(RecipeError) as caught:
        make_writer(DataConfig(long_qa=settings))
    assert caught.value.field == f"data.long_qa.{field}"
    assert "secret" not in str(caught.value)


def recipe_that_asks(recipe: Recipe, url: str) -> Recipe:
    recipe.data.long_qa = LongQaConfig(writer="openai", url=url, model="a-model", concurrency=1)
    return recipe


def test_a_killed_prepare_does_not_ask_again_and_the_result_is_the_same(tmp_path: Path) -> None:
    small_recipe(tmp_path)
    enough = threading.Event()

    def answer(prompt: str) -> Answer:
        if len(server.prompts) > 6:
            enough.set()
            time.sleep(5)
        return asks_about(prompt)

    with serving(answer) as server:
        code = (
            "from pathlib import Path\nfrom nano_pretrain.prepare.run import prepare\n"
            "from tests.prepare.small_corpus import recipe_in\n"
            "from tests.prepare.test_openai_writer import recipe_that_asks\n"
            f"prepare(recipe_that_asks(recipe_in(Path({str(tmp_path)!r})), {server.url!r}))"
        )
        child = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.DEVNULL)
        assert enough.wait(30)
        child.send_signal(signal.SIGKILL)
        child.wait()
        kept = server.prompts[:6]
    assert not (tmp_path / "prepared").exists()
    with serving(asks_about) as server:
        prepare(recipe_that_asks(recipe_in(tmp_path), server.url))
        assert server.prompts
        assert not set(kept) & set(server.prompts)
    # Everything is kept now: nobody needs to be there.
    again = recipe_that_asks(recipe_in(tmp_path), server.url)
    again.data.path = str(tmp_path / "again")
    prepare(again)
    assert tree_hashes(tmp_path / "again") == tree_hashes(tmp_path / "prepared")
    again.data.long_qa.model = "another-model"
    with pytest.raises(
        UserError, match=r"^data\.long_qa\.model: [^\n]+ prepared with a-model, the recipe says another"
    ):
        prepare(again)
    assert not any(os.environ["OPENAI_API_KEY"].encode() in f.read_bytes() for f in tmp_path.rglob("*") if f.is_file())
