"""What a run reads more than once: how often, from where on, and how much of it."""

from __future__ import annotations

from dataclasses import dataclass

from nano_pretrain.data.curriculum import Curriculum, by_source


@dataclass(frozen=True)
class Repetition:
    """A source of which tokens are read more than once.

    Attributes:
        readings: how often the part is read that is read most; what `data.max_epochs` limits.
        share: of the source that is read more than once; of a shared source as it is to be expected.
        begins: tokens of the run after which its second reading begins.
        shared_by: stages that each read the whole source, because it is too small for ranges of their own; else none.
    """

    readings: float
    share: float
    begins: int
    shared_by: tuple[str, ...]


def repetitions(curriculum: Curriculum) -> dict[str, Repetition]:
    """Each source that the whole run reads more than once, at least in part, in the order of the blends."""
    found = {}
    for source, read in by_source(curriculum.consumed(curriculum.total_tokens)).items():
        ranges = curriculum.sources[source]
        if share := ranges.read_twice(read):
            shared_by = tuple(ranges.by_stage) if ranges.shared else ()
            begins = _second_reading(curriculum, source)
            found[source] = Repetition(float(ranges.readings(read)), float(share), begins, shared_by)
    return found


def _second_reading(curriculum: Curriculum, source: str) -> int:
    """Tokens of the run before the first sample that may have been read before."""
    ranges, read_before = curriculum.sources[source], False
    for stage in curriculum.stages:
        if stage.name in ranges.by_stage:
            # A stage that shares the source begins to repeat the stages before it with its first sample.
            first = 0 if ranges.shared and read_before else ranges.by_stage[stage.name].samples
            if stage.reads[source] > first:
                return stage.start_tokens + stage.sample_of(source, first) * stage.sequence_length
            read_before = read_before or stage.reads[source] > 0
    raise ValueError(f"{source} is not read twice")
