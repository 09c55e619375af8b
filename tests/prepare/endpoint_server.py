"""A server on loopback that behaves like an OpenAI-compatible endpoint, also like one that is not well."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


@dataclass
class Answer:
    """What is sent back; `status` 0 closes the connection without a word."""

    status: int
    body: bytes
    headers: dict[str, str] = field(default_factory=dict)


def completion(text: Any, finish_reason: str = "stop") -> Answer:
    """A chat completion in the form of the OpenAI API."""
    choice = {"index": 0, "message": {"role": "assistant", "content": text}, "finish_reason": finish_reason}
    return Answer(200, json.dumps({"object": "chat.completion", "choices": [choice]}).encode())


def failure(status: int, message: str = "not now", **headers: str) -> Answer:
    """An error in the form of the OpenAI API."""
    return Answer(status, json.dumps({"error": {"message": message}}).encode(), headers)


def asks_about(prompt: str) -> Answer:
    """A good answer: the question names the passage by its last characters."""
    return completion(f"Question: What follows {prompt.rsplit(maxsplit=1)[-1]}?\nAnswer: {len(prompt)} characters")


@dataclass
class Server:
    """The server's address, and what it was asked: prompts, and headers of each request."""

    url: str
    prompts: list[str] = field(default_factory=list)
    headers: list[dict[str, str]] = field(default_factory=list)
    paths: list[str] = field(default_factory=list)
    most_at_a_time: int = 0
    now: int = 0
    lock: threading.Lock = field(default_factory=threading.Lock)


@contextmanager
def serving(answer: Callable[[str], Answer]) -> Iterator[Server]:
    """Serve `answer`, a function of the prompt that may be called by several threads."""

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            with state.lock:
                state.prompts.append(body["messages"][0]["content"])
                state.headers.append(dict(self.headers))
                state.paths.append(self.path)
                state.now += 1
                state.most_at_a_time = max(state.most_at_a_time, state.now)
            reply = answer(body["messages"][0]["content"])
            with state.lock:
                state.now -= 1
            if reply.status:
                self.send_response(reply.status)
                for name, value in reply.headers.items():
                    self.send_header(name.replace("_", "-"), value)
                self.end_headers()
                self.wfile.write(reply.body)

        do_GET = do_POST  # noqa: N815, http.server's name

        def log_message(self, *_: Any) -> None:
            pass

    class Quiet(ThreadingHTTPServer):
        daemon_threads = True
        block_on_close = False

        def handle_error(self, *_: Any) -> None:
            """A client that went away is no news."""

    with Quiet(("127.0.0.1", 0), Handler) as server:
        state = Server(f"http://127.0.0.1:{server.server_address[1]}/v1")
        thread = threading.Thread(target=lambda: server.serve_forever(poll_interval=0.01))
        thread.start()
        try:
            yield state
        finally:
            server.shutdown()
            thread.join()
