"""The curriculum of a run: stages, phases and blends, and the address of every sample, as functions of consumed tokens.

Samples of a stage are numbered from 0; step s of the stage takes the samples from s * global_batch_size on. Nothing
here depends on the layout, the micro-batch or where a run was interrupted.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction

from nano_pretrain.data.order import KeyedPermutation, QuotaBlend, order_key
from nano_pretrain.data.phases import phase_lengths, phase_weights, require_positive
from nano_pretrain.recipe.errors import RecipeError
from nano_pretrain.recipe.schema import Recipe, StageConfig
from nano_pretrain.schedule.clock import TokenClock


@dataclass(frozen=True)
class SampleAddress:
    """Where one sample is read: tokens [start, start + sequence_length + 1) of the source's training stream.

    Inputs and labels overlap by one token, so consecutive samples of a source do too.

    Attributes:
        stage: name of the stage.
        phase: name of the phase.
        source: name of the source.
        epoch: how often the stage had read the whole source before.
        index: number of the sample in the source, from 0.
        start: its first token.
    """

    stage: str
    phase: str
    source: str
    epoch: int
    index: int
    start: int


@dataclass(frozen=True)
class PhasePlan:
    """A phase between two step borders.

    Attributes:
        name: name of the phase.
        start_tokens: tokens the run has consumed before it.
        end_tokens: tokens the run has consumed after it.
        blend: which source each of its samples comes from.
    """

    name: str
    start_tokens: int
    end_tokens: int
    blend: QuotaBlend


@dataclass(frozen=True)
class StagePlan:
    """A stage on the clock of the run.

    Attributes:
        name: name of the stage.
        start_tokens: tokens the run has consumed before it.
        end_tokens: tokens the run has consumed after its last step, which is a whole one.
        first_step: steps of the run before it.
        steps: its steps.
        tokens_per_step: global_batch_size * sequence_length.
        sequence_length: tokens of a sample.
        micro_batch_size: samples a rank holds in one forward pass.
        global_batch_size: samples of a step.
        config: the stage in the recipe.
        phases: its phases, in order.
    """

    name: str
    start_tokens: int
    end_tokens: int
    first_step: int
    steps: int
    tokens_per_step: int
    sequence_length: int
    micro_batch_size: int
    global_batch_size: int
    config: StageConfig
    phases: tuple[PhasePlan, ...]

    @property
    def clock(self) -> TokenClock:
        """Its steps and tokens."""
        return TokenClock(self.start_tokens, self.config.tokens, self.tokens_per_step)

    def samples_before(self, tokens: int) -> int:
        """Samples of the stage in its first `tokens - start_tokens` tokens."""
        return (tokens - self.start_tokens) // self.sequence_length


class Curriculum:
    """What a recipe reads, and when.

    Within a stage the k-th sample of a source, counted across its phases, is read in epoch k // n at the place that a
    permutation of range(n) gives to k % n, with n the samples of the source: none comes twice before all came once.

    Args:
        recipe: stages with blends as mappings source -> weight; seed, window and limit of epochs in its data section.
        source_tokens: training tokens of each source there is.

    Attributes:
        stages: the stages, in order.
        total_steps: steps of the run.
        total_tokens: tokens of the run, whole steps.

    Raises:
        RecipeError: a weight, share, length or source is wrong, or a source would be read too often.
    """

    stages: tuple[StagePlan, ...]
    total_steps: int
    total_tokens: int

    def __init__(self, recipe: Recipe, source_tokens: Mapping[str, int]) -> None:
        self._recipe = recipe
        self._source_tokens = source_tokens
        if not recipe.stages:
            raise RecipeError("stages", "is empty", "name at least one stage")
        require_positive("data.quota_window", recipe.data.quota_window)
        stages: list[StagePlan] = []
        for name in recipe.stages:
            stages.append(self._plan_stage(name, stages[-1] if stages else None))
        self.stages = tuple(stages)
        self.total_steps = stages[-1].first_step + stages[-1].steps
        self.total_tokens = stages[-1].end_tokens
        self._by_name = {stage.name: stage for stage in stages}
        self._starts = [stage.start_tokens for stage in stages]
        self._check_epochs()

    def stage_at(self, tokens: int) -> StagePlan:
        """The stage of the step that starts after, or runs at, `tokens` consumed tokens.

        Raises:
            ValueError: the run has no such step.
        """
        if not 0 <= tokens < self.total_tokens:
            raise ValueError(f"no step starts after {tokens} tokens in a run of {self.total_tokens}")
        return self.stages[bisect_right(self._starts, tokens) - 1]

    def phase_at(self, tokens: int) -> str:
        """The phase of the step that starts after, or runs at, `tokens` consumed tokens.

        Raises:
            ValueError: the run has no such step.
        """
        return _phase_of(self.stage_at(tokens), tokens).name

    def samples(self, tokens: int, offsets: Sequence[int]) -> list[SampleAddress]:
        """Addresses of samples of the step that starts after `tokens` consumed tokens.

        Args:
            tokens: a step border.
            offsets: numbers of the samples in the global batch, in any order.

        Raises:
            ValueError: no step starts there, or an offset is outside the global batch.
        """
        stage = self.stage_at(tokens)
        first = stage.clock.step_at(tokens) * stage.global_batch_size
        if any(not 0 <= offset < stage.global_batch_size for offset in offsets):
            raise ValueError(f"offsets {list(offsets)} reach outside a global batch of {stage.global_batch_size}")
        return [self.locate(stage.name, first + offset) for offset in offsets]

    def locate(self, stage: str, sample: int) -> SampleAddress:
        """The address of sample `sample` of a stage, in time proportional to the number of sources and phases.

        Raises:
            KeyError: there is no such stage.
            ValueError: the stage has no such sample.
        """
        plan = self._by_name[stage]
        tokens = plan.start_tokens + sample * plan.sequence_length
        if not plan.start_tokens <= tokens < plan.end_tokens:
            raise ValueError(f"stage {stage} has no sample {sample}")
        phase = _phase_of(plan, tokens)
        source, number = phase.blend.locate(sample - plan.samples_before(phase.start_tokens))
        number += sum(earlier.blend.totals.get(source, 0) for earlier in plan.phases[: plan.phases.index(phase)])
        epoch, slot = divmod(number, self.samples_per_epoch(stage, source))
        index = self._permutation(stage, source, epoch)(slot)
        return SampleAddress(stage, phase.name, source, epoch, index, index * plan.sequence_length)

    def samples_per_epoch(self, stage: str, source: str) -> int:
        """Samples that a stage can read of a source before it has to begin again.

        Raises:
            KeyError: there is no such stage or source.
        """
        return _whole_samples(self._source_tokens[source], self._by_name[stage].sequence_length)

    def consumed(self, tokens: int) -> dict[str, dict[str, dict[str, int]]]:
        """Tokens of each source in each phase of each stage that has begun, after `tokens` consumed tokens.

        Raises:
            ValueError: `tokens` is neither a step border nor the end of the run.
        """
        stage_now = self.stages[-1] if tokens == self.total_tokens else self.stage_at(tokens)
        stage_now.clock.step_at(tokens)
        begun = [stage for stage in self.stages if stage.start_tokens < tokens]
        return {stage.name: _consumed_in_stage(stage, tokens) for stage in begun}

    def epochs(self, consumed: Mapping[str, Mapping[str, Mapping[str, int]]]) -> dict[str, Fraction]:
        """How often each source was read, summed over the stages of what `consumed` returned."""
        epochs: dict[str, Fraction] = {}
        for stage, phases in consumed.items():
            length = self._by_name[stage].sequence_length
            for sources in phases.values():
                for source, tokens in sources.items():
                    share = Fraction(tokens, length * self.samples_per_epoch(stage, source))
                    epochs[source] = epochs.get(source, Fraction(0)) + share
        return epochs

    def _permutation(self, stage: str, source: str, epoch: int) -> KeyedPermutation:
        key = order_key(self._recipe.data.seed, "source", stage, source, epoch)
        return KeyedPermutation(self.samples_per_epoch(stage, source), key)

    def _plan_stage(self, name: str, previous: StagePlan | None) -> StagePlan:
        config = self._recipe.stages[name]
        for item in ("tokens", "sequence_length", "global_batch_size"):
            require_positive(f"stages.{name}.{item}", getattr(config, item))
        tokens_per_step = config.global_batch_size * config.sequence_length
        clock = TokenClock(previous.end_tokens if previous else 0, config.tokens, tokens_per_step)
        return StagePlan(
            name=name,
            start_tokens=clock.start_tokens,
            end_tokens=clock.end_tokens,
            first_step=previous.first_step + previous.steps if previous else 0,
            steps=clock.steps,
            tokens_per_step=tokens_per_step,
            sequence_length=config.sequence_length,
            micro_batch_size=config.micro_batch_size,
            global_batch_size=config.global_batch_size,
            config=config,
            phases=self._plan_phases(name, config, clock),
        )

    def _plan_phases(self, stage: str, config: StageConfig, clock: TokenClock) -> tuple[PhasePlan, ...]:
        phases = []
        boundary = Fraction(0)
        for name, length in phase_lengths(f"stages.{stage}", config).items():
            first, boundary = clock.first_step_from(boundary), boundary + length
            end = clock.first_step_from(boundary)
            field = f"stages.{stage}.phases.{name}"
            if first == end:
                problem = f"no step of {clock.tokens_per_step} tokens begins in its {float(length):.0f} tokens"
                raise RecipeError(field, problem, "make it longer or leave it out")
            blend = self._blend(field, stage, name, (end - first) * config.global_batch_size)
            start_tokens, end_tokens = (clock.start_tokens + step * clock.tokens_per_step for step in (first, end))
            phases.append(PhasePlan(name, start_tokens, end_tokens, blend))
        return tuple(phases)

    def _blend(self, field: str, stage: str, phase: str, samples: int) -> QuotaBlend:
        data, config = self._recipe.data, self._recipe.stages[stage]
        weights = phase_weights(f"{field}.blend", config.phases[phase].blend, self._source_tokens)
        blend = QuotaBlend(weights, samples, data.quota_window, (data.seed, "window", stage, phase))
        for source in blend.sources:
            tokens = self._source_tokens[source]
            if not _whole_samples(tokens, config.sequence_length):
                problem = f"the source has {tokens} tokens, and one sample is {config.sequence_length + 1}"
                fix = f"set its weight to 0, prepare more of it, or lower stages.{stage}.sequence_length"
                raise RecipeError(f"{field}.blend.{source}", problem, fix)
        return blend

    def _check_epochs(self) -> None:
        limit = self._recipe.data.max_epochs
        epochs = self.epochs(self.consumed(self.total_tokens))
        source = max(epochs, key=lambda name: epochs[name])
        if epochs[source] > limit:
            times = float(epochs[source])
            fix = "lower its weight, prepare more of it, or raise the limit"
            raise RecipeError(
                "data.max_epochs", f"source {source} is read {times:.2f} times, the limit is {limit}", fix
            )


def _whole_samples(tokens: int, sequence_length: int) -> int:
    """Samples of sequence_length + 1 tokens, each sharing its last token with the next one's first."""
    return max(0, tokens - 1) // sequence_length


def _phase_of(stage: StagePlan, tokens: int) -> PhasePlan:
    return next(phase for phase in stage.phases if tokens < phase.end_tokens)


def _consumed_in_stage(stage: StagePlan, tokens: int) -> dict[str, dict[str, int]]:
    """Tokens of each source in each phase of the stage that began before `tokens`."""
    consumed = {}
    for phase in stage.phases:
        if phase.start_tokens < tokens:
            position = (min(tokens, phase.end_tokens) - phase.start_tokens) // stage.sequence_length
            counts = phase.blend.counts(position)
            consumed[phase.name] = {source: count * stage.sequence_length for source, count in counts.items()}
    return consumed
