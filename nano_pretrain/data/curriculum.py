"""The curriculum of a run: stages, phases and blends, and the address of every sample, as functions of consumed tokens.

Samples of a stage are numbered from 0, and each step takes the next ones. Nothing here depends on the layout, the
micro-batch or where a run was interrupted, and nothing that was read on how long its phase, or the first stage, is.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction

from nano_pretrain.data.blend import LARGEST_WINDOW, PhaseBlend, Weights, ramped, steady, widened_window
from nano_pretrain.data.course import phase_ends, stage_clock, told_ends, without_step
from nano_pretrain.data.phases import phase_weights
from nano_pretrain.data.ranges import Need, SourceRanges, SourceSize, StageRange, ranges_at_begin, ranges_in_midrun
from nano_pretrain.data.stage_plan import PhasePlan, StagePlan
from nano_pretrain.recipe.acts import Act, undone
from nano_pretrain.recipe.errors import RecipeError
from nano_pretrain.recipe.schema import Recipe, StageConfig
from nano_pretrain.schedule.clock import TokenClock
from nano_pretrain.schedule.learning_rate import check_end

Consumed = Mapping[str, Mapping[str, Mapping[str, int]]]
"""Stage -> phase -> source -> tokens."""


@dataclass(frozen=True)
class SampleAddress:
    """Where one sample is read: tokens [start, start + sequence_length + 1) of the source's training stream.

    Inputs and labels overlap by one token, so consecutive samples of a source do too.

    Attributes:
        stage: name of the stage.
        phase: name of the phase.
        source: name of the source.
        epoch: how often the stage had read the whole of its range of the source before.
        index: number of the sample in that range, from 0.
        start: its first token in the source's stream.
    """

    stage: str
    phase: str
    source: str
    epoch: int
    index: int
    start: int


class Curriculum:
    """What a recipe reads, and when.

    Each stage has a range of each source, see `divide`. Within a stage the k-th sample of a source, counted across its
    phases, is read in epoch k // n at the place that `StageRange` gives to k % n, with n the samples of the range:
    none comes twice before all came once.

    Args:
        recipe: stages with blends as mappings source -> weight; seed, window and limit of epochs in its data section.
        sizes: of each source there is.
        acts: what the run was told in mid-run, as in the recipe. What was read before an act does not depend on it.
        limited: whether `data.max_epochs` holds.

    Attributes:
        recipe, sizes, acts: see above.
        origin: the curriculum that the run began with.
        stages: the stages, in order.
        sources: what the stages read of each source of a blend.
        total_steps: steps of the run.
        total_tokens: tokens of the run, whole steps.

    Raises:
        RecipeError: a weight, share, length or source is wrong, or a source would be read too often.
    """

    stages: tuple[StagePlan, ...]
    total_steps: int
    total_tokens: int

    def __init__(
        self, recipe: Recipe, sizes: Mapping[str, SourceSize], acts: Sequence[Act] = (), limited: bool = True
    ) -> None:
        self.recipe = recipe
        self.sizes = sizes
        self.acts = tuple(acts)
        earlier, newest = _newest(self.acts)
        self._before = Curriculum(undone(recipe, newest), sizes, earlier, limited=False) if newest else None
        self.origin: Curriculum = self._before.origin if self._before else self
        if not recipe.stages:
            raise RecipeError("stages", "is empty", "name at least one stage")
        stages: list[StagePlan] = []
        for name in recipe.stages:
            stages.append(self._plan_stage(name, stages[-1] if stages else None))
        self.stages = tuple(stages)
        self.total_steps = stages[-1].first_step + stages[-1].steps
        self.total_tokens = stages[-1].end_tokens
        self._by_name = {stage.name: stage for stage in stages}
        self._starts = [stage.start_tokens for stage in stages]
        self.sources = {name: self._ranges(name) for name in dict.fromkeys(n for stage in stages for n in stage.reads)}
        if limited:
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
        return next(phase.name for phase in self.stage_at(tokens).phases if tokens < phase.end_tokens)

    def samples(self, tokens: int, offsets: Sequence[int]) -> list[SampleAddress]:
        """Addresses of samples of the step that starts after `tokens` consumed tokens.

        Args:
            tokens: a step border.
            offsets: numbers of the samples in the global batch, in any order.

        Raises:
            ValueError: no step starts there, or an offset is outside the global batch.
        """
        stage = self.stage_at(tokens)
        first, batch = stage.samples_before(tokens), stage.samples_at(tokens)
        if any(not 0 <= offset < batch for offset in offsets):
            raise ValueError(f"offsets {list(offsets)} reach outside a global batch of {batch}")
        return [self.locate(stage.name, first + offset) for offset in offsets]

    def locate(self, stage: str, sample: int) -> SampleAddress:
        """The address of sample `sample` of a stage, in time proportional to the number of sources and phases.

        Raises:
            KeyError: there is no such stage.
            ValueError: the stage has no such sample.
        """
        phases = self._by_name[stage].phases
        if not 0 <= sample < phases[-1].first_sample + phases[-1].samples:
            raise ValueError(f"stage {stage} has no sample {sample}")
        phase = next(phase for phase in reversed(phases) if phase.first_sample <= sample)
        source, number = phase.blend.locate(sample - phase.first_sample)
        place = self.sources[source].by_stage[stage].place(phase.given.get(source, 0) + number)
        return SampleAddress(stage, phase.name, source, *place)

    def consumed(self, tokens: int) -> dict[str, dict[str, dict[str, int]]]:
        """Tokens of each source in each phase of each stage that has begun, after `tokens` consumed tokens.

        Raises:
            ValueError: `tokens` is neither a step border nor the end of the run.
        """
        stage_now = self.stages[-1] if tokens == self.total_tokens else self.stage_at(tokens)
        stage_now.clock.step_at(tokens)
        begun = [stage for stage in self.stages if stage.start_tokens < tokens]
        return {stage.name: _consumed_in_stage(stage, tokens) for stage in begun}

    def epochs(self, consumed: Consumed) -> dict[str, Fraction]:
        """How often each source was read, of what `consumed` returned: the mean over the ranges of all stages."""
        return {source: self.sources[source].epochs(read) for source, read in by_source(consumed).items()}

    def reordered(self, generations: Mapping[str, Sequence[int]], tokens: int) -> list[str]:
        """Sources of which other samples would have been read, had they had the shards that they have now.

        Args:
            generations: tokens of each generation of the sources, as they were when the run read them.
            tokens: tokens the run has consumed.
        """
        read = by_source(self.consumed(tokens))
        return [source for source in read if not self.sources[source].keeps(tuple(generations[source]), read[source])]

    def _plan_stage(self, name: str, previous: StagePlan | None) -> StagePlan:
        config = self.recipe.stages[name]
        check_end(config.schedule, f"stages.{name}.schedule")
        first = self.origin.recipe.stages[name]
        clock = stage_clock(name, first, config, self.acts, previous.end_tokens if previous else 0)
        return StagePlan(
            name=name,
            start_tokens=clock.start_tokens,
            end_tokens=clock.end_tokens,
            first_step=previous.first_step + previous.steps if previous else 0,
            steps=clock.steps,
            sequence_length=config.sequence_length,
            micro_batch_size=config.micro_batch_size,
            clock=clock,
            config=config,
            phases=self._plan_phases(name, config, clock),
        )

    def _plan_phases(self, stage: str, config: StageConfig, clock: TokenClock) -> tuple[PhasePlan, ...]:
        phases: list[PhasePlan] = []
        begin, length = clock.start_tokens, config.sequence_length
        before: Weights | None = None
        told_to_end = told_ends(stage, self.acts, begin)
        for name, phase_end in phase_ends(stage, self.origin.recipe.stages[stage], self.acts, begin).items():
            start = phases[-1].end_tokens if phases else begin
            end = clock.border_from(phase_end)
            field = f"stages.{stage}.phases.{name}"
            if start == end and phase_end in told_to_end:
                continue
            if start == end:
                raise without_step(stage, name, self.origin.recipe.stages[stage], config, self.acts, clock)
            weights = phase_weights(f"{field}.blend", config.phases[name].blend, self.sizes)
            blend = self._blend(stage, name, before, weights)
            given = phases[-1].given_after(phases[-1].samples) if phases else {}
            samples = (end - start) // length
            phases.append(PhasePlan(name, start, end, (start - begin) // length, samples, blend, given))
            before = weights
        return tuple(phases)

    def _blend(self, stage: str, phase: str, before: Weights | None, weights: Weights) -> PhaseBlend:
        data, config = self.recipe.data, self.recipe.stages[stage]
        field, key = f"stages.{stage}.phases.{phase}", (data.seed, "window", stage, phase)
        _check_weights(f"{field}.blend", weights, data.quota_window)
        ramp = config.phases[phase].ramp_tokens
        if before is None or not ramp:
            return steady(weights, data.quota_window, key)
        blend = ramped(before, weights, ramp // config.sequence_length, data.quota_window, key)
        if blend is None:
            problem = f"{ramp} tokens are less than a window in which each source has a sample"
            raise RecipeError(f"{field}.ramp_tokens", problem, "write more, or 0, or lower data.quota_window")
        return blend

    def _ranges(self, source: str) -> SourceRanges:
        size, key, first = self.sizes[source], (self.recipe.data.seed, "source", source), self.stages[0]
        # At least one sample, so that every source of a blend can be read.
        reads = {stage.name: max(stage.reads[source], 1) for stage in self.stages if source in stage.reads}
        needs = [Need(name, self._by_name[name].sequence_length, samples) for name, samples in reads.items()]
        if kept := self._kept(source):
            ranges = ranges_in_midrun(size, kept, needs, key)
        else:
            start = Need(first.name, first.sequence_length, reads.get(first.name, 0))
            ranges = ranges_at_begin(size, start, [need for need in needs if need.stage != first.name], key)
        for stage, part in ranges.by_stage.items():
            if not part.samples:
                self._refuse(self._by_name[stage], source)
        return ranges

    def _kept(self, source: str) -> dict[str, StageRange]:
        """Ranges of stages that had begun when the run was told the newest acts, and may have read the source."""
        if self._before is None or source not in self._before.sources:
            return {}
        before = self._before.sources[source].by_stage
        begun = [stage for stage in self.stages if stage.start_tokens < self.acts[-1].tokens]
        return {stage.name: before[stage.name] for stage in begun if stage.name in before and source in stage.reads}

    def _refuse(self, stage: StagePlan, source: str) -> None:
        phase = next(phase for phase in stage.phases if source in phase.blend.sources)
        tokens, length = self.sizes[source].tokens, stage.sequence_length
        problem = f"the source has {tokens} tokens, and one sample is {length + 1}"
        fix = f"set its weight to 0, prepare more of it, or lower stages.{stage.name}.sequence_length"
        raise RecipeError(f"stages.{stage.name}.phases.{phase.name}.blend.{source}", problem, fix)

    def _check_epochs(self) -> None:
        limit = self.recipe.data.max_epochs
        read = by_source(self.consumed(self.total_tokens))
        most = {source: self.sources[source].most_read(tokens) for source, tokens in read.items()}
        source = max(most, key=lambda name: sum(most[name].values()))
        times = float(sum(most[source].values()))
        if times > limit:
            stages = " and ".join(stage for stage, often in most[source].items() if often)
            raise RecipeError(
                "data.max_epochs",
                f"source {source} is read {times:.2f} times in the range of {stages}, the limit is {limit}",
                "lower its weight, prepare more of it, or raise the limit",
            )


def _check_weights(field: str, weights: Weights, window: int) -> None:
    if widened_window(weights, window) > LARGEST_WINDOW:
        least = min((name for name, weight in weights.items() if weight), key=lambda name: weights[name])
        problem = f"takes windows of more than {LARGEST_WINDOW} samples, the limit, to have one in each"
        raise RecipeError(f"{field}.{least}", problem, "write 0 or a larger weight")


def by_source(consumed: Consumed) -> dict[str, dict[str, int]]:
    """Tokens that each stage has read of each source: source -> stage -> tokens."""
    read: dict[str, dict[str, int]] = {}
    for stage, phases in consumed.items():
        for sources in phases.values():
            for source, tokens in sources.items():
                stages = read.setdefault(source, {})
                stages[stage] = stages.get(stage, 0) + tokens
    return read


def _newest(acts: tuple[Act, ...]) -> tuple[tuple[Act, ...], tuple[Act, ...]]:
    """Acts, and those of the same moment that were told last."""
    start = len(acts)
    while start and acts[start - 1].tokens == acts[-1].tokens:
        start -= 1
    return acts[:start], acts[start:]


def _consumed_in_stage(stage: StagePlan, tokens: int) -> dict[str, dict[str, int]]:
    """Tokens of each source in each phase of the stage that began before `tokens`."""
    consumed = {}
    for phase in stage.phases:
        if phase.start_tokens < tokens:
            counts = phase.blend.counts(stage.samples_before(min(tokens, phase.end_tokens)) - phase.first_sample)
            consumed[phase.name] = {source: count * stage.sequence_length for source, count in counts.items()}
    return consumed
