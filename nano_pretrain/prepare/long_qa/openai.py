"""Questions by a language model behind an OpenAI-compatible endpoint, each asked once and kept on disk."""

from __future__ import annotations

import hashlib
import json
import os
import re
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import Any

from nano_pretrain.prepare.long_qa.endpoint import Endpoint
from nano_pretrain.prepare.long_qa.passages import Pair, Passage, one_line
from nano_pretrain.recipe.errors import UserError

PROMPT = """\
Below is a passage of a long document. Write one question about a fact that stands in this passage, and the answer. \
The question must make sense to someone who reads the whole document and does not know which passage is meant: name \
what it is about, and never say "the passage" or "the text". Answer in one sentence or less, from the passage alone.
Write exactly two lines, and nothing else:
Question: ...
Answer: ...

Passage:
"""
MAX_ANSWER_TOKENS = 512

_REPLY = re.compile(r"Question:([^\n]+)\s+\W*Answer:([^\n]+)")


class OpenAIWriter:
    """Asks a model about each passage, several at a time, and never twice about the same.

    Args:
        url: base URL of the endpoint.
        model: name of the model.
        concurrency: requests at a time.
        timeout: longest silence of the endpoint in seconds.
        cache: directory of the replies: one file for each, named by the hash of the request.

    Raises:
        UserError: the URL or the key cannot be one.
    """

    def __init__(self, url: str, model: str, concurrency: int, timeout: float, cache: Path) -> None:
        self._model = model
        self._concurrency = concurrency
        self._cache = cache
        self._stop = threading.Event()
        self._endpoint = Endpoint(url, timeout, self._stop)

    def __call__(self, passages: Sequence[Passage], done: Callable[[], None]) -> list[Pair | None]:
        """Write the pairs; None where the model did not write one.

        Raises:
            UserError: the endpoint refuses or fails, or the cache cannot be written.
        """
        with ThreadPoolExecutor(self._concurrency) as pool:
            pending = [pool.submit(self._ask, passage) for passage in passages]
            try:
                for future in as_completed(pending):
                    future.result()
                    done()
            except BaseException:
                self._stop.set()
                pool.shutdown(cancel_futures=True)
                raise
        return [future.result() for future in pending]

    def _ask(self, passage: Passage) -> Pair | None:
        if self._stop.is_set():
            return None  # The caller raises what stopped it.
        request = self._request(passage)
        file = self._file(request)
        reply = _read(file)
        if reply is None:
            reply = self._complete(request)
            _write(file, reply)
        return parse(reply)

    def _complete(self, request: bytes) -> str:
        try:
            return self._endpoint.complete(request)
        except UserError:
            # Here and not by the caller: it may be woken when this thread has taken the next passage.
            self._stop.set()
            raise

    def _request(self, passage: Passage) -> bytes:
        message = {"role": "user", "content": PROMPT + passage.text}
        body = {"model": self._model, "messages": [message], "temperature": 0, "max_tokens": MAX_ANSWER_TOKENS}
        return json.dumps(body).encode()

    def _file(self, request: bytes) -> Path:
        name = hashlib.sha256(request).hexdigest()
        return self._cache / name[:2] / f"{name}.json"


def parse(reply: str) -> Pair | None:
    """The pair in a model's reply; None if it is not of the form that was asked for."""
    match = _REPLY.search(reply)
    question, answer = (one_line(part.strip("* ")) for part in match.groups()) if match else (None, None)
    return Pair(question, answer) if question and answer else None


def _read(file: Path) -> str | None:
    """A kept reply; None if there is none, or none that can be read."""
    try:
        content: Any = json.loads(file.read_bytes())
    except (OSError, ValueError):
        return None
    return content if isinstance(content, str) else None


def _write(file: Path, reply: str) -> None:
    # Written beside its place and renamed into it: a killed run leaves no half reply.
    partial = file.with_name(f".{file.name}.{os.getpid()}.{threading.get_ident()}")
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        partial.write_text(json.dumps(reply))
        partial.replace(file)
    except OSError as error:
        raise UserError(
            f"data.cache_dir: cannot keep replies in {file.parent} ({error.strerror}); choose another directory"
        ) from error
