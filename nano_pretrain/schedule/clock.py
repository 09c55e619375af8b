"""Tokens and steps of one stage."""

from __future__ import annotations

import math
from dataclasses import dataclass
from fractions import Fraction


@dataclass(frozen=True)
class TokenClock:
    """The borders of the steps of a stage, in tokens consumed since the run began.

    The step that starts at `a` consumes the tokens (a, b], b = a + tokens_per_step. It uses the learning rate at b
    and the phase and blend of a. The last step is a whole one, so a stage may end up to one step after its `tokens`.

    Attributes:
        start_tokens: tokens consumed before the stage.
        tokens: tokens the stage asks for, at least 1.
        tokens_per_step: global batch size times sequence length, at least 1.
    """

    start_tokens: int
    tokens: int
    tokens_per_step: int

    @property
    def steps(self) -> int:
        """Steps of the stage."""
        return -(-self.tokens // self.tokens_per_step)

    @property
    def end_tokens(self) -> int:
        """Tokens consumed after the last step of the stage."""
        return self.start_tokens + self.steps * self.tokens_per_step

    def first_step_from(self, boundary: Fraction) -> int:
        """The first step, counted from 0 in the stage, that starts at or after `boundary` tokens of the stage."""
        return math.ceil(boundary / self.tokens_per_step)

    def step_at(self, consumed: int) -> int:
        """The step, counted from 0 in the stage, that starts after `consumed` tokens; `steps` at the very end.

        Raises:
            ValueError: no step of the stage starts or ends there.
        """
        step, rest = divmod(consumed - self.start_tokens, self.tokens_per_step)
        if rest or not 0 <= step <= self.steps:
            raise ValueError(
                f"{consumed} consumed tokens are no step border of the stage from {self.start_tokens} to "
                f"{self.end_tokens} tokens in steps of {self.tokens_per_step}"
            )
        return step
