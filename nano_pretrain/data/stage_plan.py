"""Stages and phases of a run between the borders of its steps."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise

from nano_pretrain.data.blend import PhaseBlend
from nano_pretrain.recipe.schema import StageConfig
from nano_pretrain.schedule.clock import TokenClock


@dataclass(frozen=True)
class PhasePlan:
    """A phase between two step borders.

    Attributes:
        name: name of the phase.
        start_tokens: tokens the run has consumed before it.
        end_tokens: tokens the run has consumed after it.
        first_sample: samples of the stage before it.
        samples: its samples.
        blend: which source each of its samples comes from.
        given: samples of each source in the stage's phases before it.
    """

    name: str
    start_tokens: int
    end_tokens: int
    first_sample: int
    samples: int
    blend: PhaseBlend
    given: Mapping[str, int]

    def given_after(self, samples: int) -> dict[str, int]:
        """Samples of each source in the stage after the first `samples` samples of the phase."""
        counts = self.blend.counts(samples)
        return {name: self.given.get(name, 0) + counts.get(name, 0) for name in {**self.given, **counts}}


@dataclass(frozen=True)
class Plateau:
    """Tokens of the run in which the weights of the sources are constant.

    Attributes:
        start_tokens: tokens the run has consumed before it.
        end_tokens: tokens the run has consumed after it.
        shares: of what it reads, of each source of its phase, as the ledger counts them; they add up to 1.
    """

    start_tokens: int
    end_tokens: int
    shares: dict[str, float]


@dataclass(frozen=True)
class StagePlan:
    """A stage on the clock of the run.

    Attributes:
        name: name of the stage.
        start_tokens: tokens the run has consumed before it.
        end_tokens: tokens the run has consumed after its last step, which is a whole one.
        first_step: steps of the run before it.
        steps: its steps.
        sequence_length: tokens of a sample.
        micro_batch_size: samples a rank holds in one forward pass.
        clock: its steps.
        config: the stage in the recipe.
        phases: its phases, in order.
    """

    name: str
    start_tokens: int
    end_tokens: int
    first_step: int
    steps: int
    sequence_length: int
    micro_batch_size: int
    clock: TokenClock
    config: StageConfig
    phases: tuple[PhasePlan, ...]

    @property
    def global_batch_size(self) -> int:
        """Samples of a step; where the number changes, of the last ones."""
        return self.config.global_batch_size

    @property
    def tokens_per_step(self) -> int:
        """Tokens of a step; where the number changes, of the last ones."""
        return self.config.global_batch_size * self.sequence_length

    def samples_at(self, tokens: int) -> int:
        """Samples of the step that starts after `tokens` consumed tokens.

        Raises:
            ValueError: no step of the stage starts there.
        """
        return self.clock.step_tokens(tokens) // self.sequence_length

    def samples_before(self, tokens: int) -> int:
        """Samples of the stage in its first `tokens - start_tokens` tokens."""
        return (tokens - self.start_tokens) // self.sequence_length

    @cached_property
    def reads(self) -> dict[str, int]:
        """Samples of each source over the whole stage."""
        last = self.phases[-1]
        return last.given_after(last.samples)

    def plateaus(self, phase: PhasePlan) -> Iterator[Plateau]:
        """The steps of a phase's ramp, if it has one, and the rest of the phase."""
        borders = [*(start for start, _ in phase.blend.parts if start < phase.samples), phase.samples]
        for start, end in pairwise(borders):
            before, after = phase.blend.counts(start), phase.blend.counts(end)
            shares = {name: (after[name] - before[name]) / (end - start) for name in after}
            first, last = (phase.start_tokens + samples * self.sequence_length for samples in (start, end))
            yield Plateau(first, last, shares)

    def sample_of(self, source: str, number: int) -> int:
        """The sample of the stage that is sample `number` of a source of which it reads more than that."""
        phase = next(phase for phase in reversed(self.phases) if phase.given.get(source, 0) <= number)
        return phase.first_sample + phase.blend.position_of(source, number - phase.given.get(source, 0))
