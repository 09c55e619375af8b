"""Errors that are the user's to mend, and the process exit codes."""

from __future__ import annotations

EXIT_DONE = 0
EXIT_FAILED = 1
EXIT_USER_ERROR = 2
EXIT_CONTINUE = 75
"""Stopped on request after a whole checkpoint, or the next stage needs other ranks: run again."""


class UserError(Exception):
    """Input that is wrong: one line that names the field or file and the fix; exit code 2."""


class RunError(Exception):
    """The run cannot go on, though no input is known to be wrong: one line; exit code 1."""


class RecipeError(UserError):
    """A recipe field is wrong.

    Args:
        field: dotted name of the field, as it is written on the command line.
        problem: what is wrong with its value.
        fix: what to write instead.
    """

    def __init__(self, field: str, problem: str, fix: str) -> None:
        super().__init__(f"{field}: {problem}; {fix}")
        self.field = field
