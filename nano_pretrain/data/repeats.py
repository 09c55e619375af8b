"""What a run reads more than once: how often, from where on, and how much of it."""

from __future__ import annotations

from dataclasses import dataclass

from nano_pretrain.data.curriculum import Curriculum, by_source


@dataclass(frozen=True)
class Repetition:
    """A source of which tokens are read more than once.

    Attributes:
        readings: how often the part is read that is read most; what `data.max_epochs` limits.
        share: of the source that is read more than once; of what several stages read as it is to be expected.
        begins: tokens of the run after which its second reading begins.
        shared_by: stages that may read the same text, because the source is too small for ranges of their own, or had
            been divided when they were told to read more of it; else none.
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
            readings = float(sum(ranges.most_read(read).values()))
            found[source] = Repetition(readings, float(share), _second_reading(curriculum, source), ranges.sharing)
    return found


def _second_reading(curriculum: Curriculum, source: str) -> int:
    """Tokens of the run before the first sample that may have been read before."""
    ranges, read = curriculum.sources[source], dict[str, int]()
    for stage in curriculum.stages:
        if stage.name in ranges.by_stage:
            first = ranges.first_again(stage.name, read)
            if stage.reads[source] > first:
                return stage.start_tokens + stage.sample_of(source, first) * stage.sequence_length
            read[stage.name] = stage.reads[source] * stage.sequence_length
    raise ValueError(f"{source} is not read twice")
