"""One chat completion of an OpenAI-compatible endpoint, over the standard library's HTTP client.

The key comes from the environment variable `OPENAI_API_KEY` and goes nowhere but into the request's header: redirects,
which would carry it to another host, are not followed, and it is struck from what the endpoint says.
"""

from __future__ import annotations

import email.message
import http.client
import json
import os
import random
import threading
import urllib.error
import urllib.request
from typing import IO, Any
from urllib.parse import urlsplit

from nano_pretrain.recipe.errors import RecipeError, UserError

KEY_VARIABLE = "OPENAI_API_KEY"
ATTEMPTS = 6
FIRST_WAIT_SECONDS = 1.0
LONGEST_WAIT_SECONDS = 60.0
MAX_REPLY_BYTES = 1 << 20
SHOWN_CHARACTERS = 300
BUSY = frozenset({408, 425, 429})
"""Client errors that pass, as do all server errors."""


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    def redirect_request(
        self,
        req: urllib.request.Request,
        fp: IO[bytes],
        code: int,
        msg: str,
        headers: http.client.HTTPMessage,
        newurl: str,
    ) -> None:
        """Leave a redirect to the caller, as an error."""


class _PassingError(Exception):
    """The endpoint failed in a way that may pass; `wait` are the seconds that it asked for, if it did."""

    def __init__(self, problem: str, wait: float | None = None) -> None:
        super().__init__(problem)
        self.wait = wait


class Endpoint:
    """Where chat completions are asked for; may be used by several threads.

    Args:
        url: base URL, for example `http://localhost:8000/v1`.
        timeout: longest silence of the endpoint in seconds.
        stop: set when nothing more is wanted: nobody waits for another attempt then.

    Raises:
        UserError: the URL or the key cannot be one.
    """

    def __init__(self, url: str, timeout: float, stop: threading.Event) -> None:
        _check_url(url)
        self._url = f"{url.rstrip('/')}/chat/completions"
        self._timeout = timeout
        self._stop = stop
        self._key = _key_from_environment()
        self._opener = urllib.request.build_opener(_NoRedirect)

    def complete(self, body: bytes) -> str:
        """The text that the endpoint answers a request body with, "" if it was cut off at its longest.

        Raises:
            UserError: the endpoint refuses, or has failed `ATTEMPTS` times.
        """
        wait = FIRST_WAIT_SECONDS
        for left in reversed(range(ATTEMPTS)):
            try:
                return _content(self._post(body))
            except _PassingError as error:
                if not left or self._stop.is_set():
                    raise UserError(
                        f"data.long_qa.url: {self._url} failed {ATTEMPTS - left} times ({self._clean(error)}); mend it "
                        "and run again, what it has answered is kept"
                    ) from None
                # Spread, so that the threads do not all come back at once.
                self._stop.wait(min(error.wait or wait * random.uniform(0.5, 1.5), LONGEST_WAIT_SECONDS))
                wait *= 2
        raise AssertionError("unreachable")

    def _post(self, body: bytes) -> bytes:
        headers = {"Content-Type": "application/json"} | ({"Authorization": f"Bearer {self._key}"} if self._key else {})
        request = urllib.request.Request(self._url, body, headers)
        try:
            with self._opener.open(request, timeout=self._timeout) as response:
                return bytes(response.read(MAX_REPLY_BYTES))
        except urllib.error.HTTPError as error:
            raise self._failure(error) from None
        except (OSError, http.client.HTTPException) as error:
            raise _PassingError(str(getattr(error, "reason", error)) or type(error).__name__) from None

    def _failure(self, error: urllib.error.HTTPError) -> Exception:
        """What an HTTP status means for the next attempt."""
        with error:
            problem = f"HTTP {error.code}: {_said(error) or error.reason}"
            if error.code in BUSY or error.code >= 500:
                return _PassingError(problem, _seconds(error.headers))
        fields = {401: KEY_VARIABLE, 403: KEY_VARIABLE, 400: "data.long_qa.model", 422: "data.long_qa.model"}
        field = fields.get(error.code, "data.long_qa.url, data.long_qa.model")
        return UserError(f"{field}: {self._url} answered {self._clean(problem)}; mend it and run again")

    def _clean(self, message: object) -> str:
        """On one line, without the key, and then cut: a cut key would no longer be found."""
        line = " ".join(str(message).split())
        return (line.replace(self._key, "***") if self._key else line)[:SHOWN_CHARACTERS]


def _check_url(url: str) -> None:
    try:
        parts = urlsplit(url)
        sound = parts.scheme in {"http", "https"} and parts.hostname and parts.port != 0 and "@" not in parts.netloc
    except ValueError:
        sound = False
    if not sound or not url.isascii() or not url.isprintable() or " " in url:
        fix = f"write for example http://localhost:8000/v1, and a key only into {KEY_VARIABLE}"
        raise RecipeError("data.long_qa.url", "is not an http or https URL without user and password", fix)


def _key_from_environment() -> str:
    key = os.environ.get(KEY_VARIABLE, "").strip()
    if not (key.isascii() and key.isprintable() and " " not in key):
        raise UserError(f"{KEY_VARIABLE}: holds characters that no key has; set it to the key alone, or unset it")
    return key


def _content(reply: bytes) -> str:
    try:
        choice = json.loads(reply)["choices"][0]
        content = choice["message"]["content"]
        cut_off = choice.get("finish_reason") == "length"
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
        raise _PassingError(f"no chat completion but {reply!r}") from None
    if not isinstance(content, str):
        raise _PassingError(f"no text but {content!r}")
    return "" if cut_off else content


def _said(error: urllib.error.HTTPError) -> str:
    """The message in the body of an error, if it can be read."""
    try:
        text = error.read(MAX_REPLY_BYTES).decode(errors="replace")
    except (OSError, http.client.HTTPException):
        return ""
    try:
        said: Any = json.loads(text)["error"]["message"]
    except (ValueError, LookupError, TypeError, RecursionError):
        said = text
    return str(said)


def _seconds(headers: email.message.Message) -> float | None:
    """The header Retry-After, if it is a number of seconds."""
    value = headers.get("Retry-After", "")
    return float(value) if value.isdecimal() else None
