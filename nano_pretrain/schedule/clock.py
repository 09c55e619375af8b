"""Tokens and steps of one stage."""

from __future__ import annotations

import math
from bisect import bisect_right
from dataclasses import dataclass
from fractions import Fraction
from functools import cached_property
from itertools import pairwise


@dataclass(frozen=True)
class Span:
    """Steps of one size.

    Attributes:
        tokens: tokens of the stage before the first of them.
        step: steps of the stage before the first of them.
        size: tokens of each.
    """

    tokens: int
    step: int
    size: int


@dataclass(frozen=True)
class TokenClock:
    """The borders of the steps of a stage, in tokens consumed since the run began.

    The step that starts at `a` consumes the tokens (a, b], b = a + tokens of the step. It uses the learning rate at b
    and the phase and blend of a. The last step is a whole one, so a stage may end up to one step after its `tokens`.

    Attributes:
        start_tokens: tokens consumed before the stage.
        tokens: tokens the stage asks for, at least 1.
        tokens_per_step: global batch size times sequence length at the beginning, at least 1.
        changes: tokens of the stage and tokens of a step, ascending: the steps that start there or later have the new
            size. Of changes before the same step the last one counts.
    """

    start_tokens: int
    tokens: int
    tokens_per_step: int
    changes: tuple[tuple[int, int], ...] = ()

    @cached_property
    def _spans(self) -> tuple[Span, ...]:
        spans = [Span(0, 0, self.tokens_per_step)]
        for at, size in self.changes:
            border = _border_from(spans[-1], at)
            if border.tokens >= self.tokens:
                break
            if border.step == spans[-1].step:
                spans.pop()
            spans.append(Span(border.tokens, border.step, size))
        return tuple(spans)

    @cached_property
    def _end(self) -> Span:
        return _border_from(self._spans[-1], self.tokens)

    @property
    def steps(self) -> int:
        """Steps of the stage."""
        return self._end.step

    @property
    def end_tokens(self) -> int:
        """Tokens consumed after the last step of the stage."""
        return self.start_tokens + self._end.tokens

    def border_from(self, boundary: Fraction | int) -> int:
        """Consumed tokens at the first step border at or after `boundary` tokens of the stage."""
        return self.start_tokens + _border_from(self._span_of(boundary), boundary).tokens

    def step_tokens(self, consumed: int) -> int:
        """Tokens of the step that starts after `consumed` tokens.

        Raises:
            ValueError: no step of the stage starts there.
        """
        if self.step_at(consumed) == self.steps:
            raise ValueError(f"no step starts after {consumed} consumed tokens, the end of the stage")
        return self._span_of(consumed - self.start_tokens).size

    def sizes_from(self, consumed: int) -> list[int]:
        """Tokens of a step of each size that the stage has from `consumed` tokens on, in order."""
        now = self._span_of(consumed - self.start_tokens)
        return [span.size for span in self._spans if span.tokens >= now.tokens]

    @property
    def runs(self) -> list[tuple[int, int]]:
        """Tokens of a step of each size that the stage has, and how many steps have it, in order."""
        return [(span.size, after.step - span.step) for span, after in pairwise([*self._spans, self._end])]

    def step_at(self, consumed: int) -> int:
        """The step, counted from 0 in the stage, that starts after `consumed` tokens; `steps` at the very end.

        Raises:
            ValueError: no step of the stage starts or ends there.
        """
        within = consumed - self.start_tokens
        span = self._span_of(within)
        step, rest = divmod(within - span.tokens, span.size)
        if rest or within < 0 or span.step + step > self.steps:
            raise ValueError(
                f"{consumed} consumed tokens are no step border of the stage from {self.start_tokens} to "
                f"{self.end_tokens} tokens in steps of {span.size}"
            )
        return span.step + step

    def _span_of(self, tokens: Fraction | int) -> Span:
        """The span of the steps at this place of the stage."""
        return self._spans[max(0, bisect_right(self._spans, tokens, key=lambda span: span.tokens) - 1)]


def _border_from(span: Span, boundary: Fraction | int) -> Span:
    """The first border of steps of the span's size, none before the span."""
    steps = max(0, math.ceil(Fraction(boundary - span.tokens) / span.size))
    return Span(span.tokens + steps * span.size, span.step + steps, span.size)
