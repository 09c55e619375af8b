"""exit.json: how a training process ended, also where the launcher of the ranks hides it."""

from __future__ import annotations

import time
from contextlib import nullcontext, suppress
from pathlib import Path

from nano_pretrain.checkpoint.files import write_json
from nano_pretrain.parallel.groups import Ranks
from nano_pretrain.recipe.errors import EXIT_FAILED, EXIT_USER_ERROR, UserError
from nano_pretrain.train.session import Session


class ExitFile:
    """A context that writes exit.json when it is left, whatever ends it short of SIGKILL; absent while the run goes on.

    Args:
        directory: directory of the run.
        ranks: this process in the world; only the first rank writes.
    """

    def __init__(self, directory: Path, ranks: Ranks) -> None:
        self.path = directory / "exit.json"
        self.ranks = ranks
        self.code, self.reason, self.restart = EXIT_FAILED, "failed", False
        self.session: Session | None = None

    def __enter__(self) -> ExitFile:
        if self.ranks.is_first:
            self.path.unlink(missing_ok=True)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        if error is not None:
            code = EXIT_USER_ERROR if isinstance(error, UserError) else EXIT_FAILED
            self.set(code, f"{type(error).__name__}: {error}")
        # On a full disk what has ended the run matters more than what can still be written about it.
        with suppress(OSError) if error is not None else nullcontext():
            self.write()

    def set(self, code: int, reason: str, restart: bool = False) -> None:
        """Remember how the process is going to end; `restart` if nobody asked for it and other ranks go on."""
        self.code, self.reason, self.restart = code, reason, restart

    def write(self) -> None:
        """Write what is known now; the report reads it."""
        if self.ranks.is_first:
            step, tokens = (self.session.step, self.session.tokens) if self.session else (None, None)
            when = time.strftime("%Y-%m-%dT%H:%M:%S%z")
            content = {"code": self.code, "reason": self.reason, "restart": self.restart}
            write_json(self.path, content | {"step": step, "tokens": tokens, "time": when})
