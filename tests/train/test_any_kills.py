"""Whatever kills a run, and on whatever ranks it goes on: it reads what one rank reads that nobody disturbs."""

from __future__ import annotations

import copy
import json
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import accumulate
from pathlib import Path

import pytest
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from nano_pretrain.checkpoint.manifest import newest_tokens
from nano_pretrain.data.curriculum import Curriculum
from nano_pretrain.data.shards import open_corpus
from nano_pretrain.platform import Platform
from nano_pretrain.recipe.errors import RecipeError
from nano_pretrain.recipe.schema import (
    BatchRampConfig,
    ParallelConfig,
    PhaseConfig,
    Recipe,
    ScheduleConfig,
    StageConfig,
)
from nano_pretrain.train.before import next_stage
from nano_pretrain.verbs import run_directory
from tests.corpora import SOURCES
from tests.model.recipes import small_recipe
from tests.train.simulation import (
    VOCAB_SIZE,
    Ended,
    Kill,
    Read,
    source_of,
    start,
    uninterrupted,
    write_numbered_corpus,
)
from tests.train.small_run import learned, lines

Counts = Counter[tuple[str, str, str]]
"""Tokens of (stage, phase, source)."""


@dataclass(frozen=True)
class Layout:
    """Ranks and micro-batch of a stage."""

    data: int = 1
    context: int = 1
    micro_batch: int = 1


@dataclass(frozen=True)
class Start:
    """A command that goes on with the run.

    Attributes:
        layouts: of each stage.
        every: `checkpoint.every`.
        kill: when a process of it is killed; None lets it go to the end.
        batch: what it tells the stage that is next: samples of a step, if that can be told.
    """

    layouts: tuple[Layout, ...]
    every: int = 0
    kill: Kill | None = None
    batch: int | None = None


def numbered_recipe(stages: dict[str, StageConfig]) -> Recipe:
    recipe = small_recipe(vocab_size=VOCAB_SIZE)
    recipe.stages, recipe.run.name, recipe.cluster.peak_tflops = stages, "run", 1.0
    recipe.data = replace(recipe.data, corpus="numbers", max_epochs=1000.0, quota_window=4)
    return recipe


def two_stages() -> Recipe:
    """20 steps of 4 samples, then of 8, the phase changes amid them; then samples of another length."""
    pretrain = StageConfig(
        tokens=16 * 8 * 20,
        sequence_length=16,
        global_batch_size=8,
        batch_ramp=BatchRampConfig(start=4, increment=4, ramp_tokens=16 * 4 * 5),
        schedule=ScheduleConfig(lr=1e-3, warmup_tokens=512, decay_tokens=512),
        phases={
            "p1": PhaseConfig(tokens=16 * 8 * 12, blend={"alpha": 3, "gamma": 1}),
            "p2": PhaseConfig(tokens=16 * 8 * 8, blend={"beta": 1, "gamma": 1}, ramp_tokens=16 * 8 * 5),
        },
    )
    extension = StageConfig(
        tokens=48 * 4 * 4,
        sequence_length=48,
        global_batch_size=4,
        schedule=ScheduleConfig(kind="constant", lr=1e-4),
        phases={"long": PhaseConfig(tokens=48 * 4 * 4, blend={"alpha": 1, "beta": 1})},
    )
    return numbered_recipe({"pretrain": pretrain, "extension": extension})


@st.composite
def stage_configs(draw: st.DrawFn, unit: int) -> StageConfig:
    """A stage whose steps are 1 to 3 times `unit` samples, of which every phase has room for one."""
    length, times = draw(st.sampled_from([8, 16, 48])), draw(st.integers(1, 3))
    blends = st.dictionaries(st.sampled_from(sorted(SOURCES)), st.integers(1, 3), min_size=2)
    largest = 3 * unit * length
    phases = {
        name: PhaseConfig(tokens=draw(st.integers(largest, 4 * largest)), blend=draw(blends))
        for name in ("p1", "p2", "p3")[: draw(st.integers(1, 3))]
    }
    for phase in list(phases.values())[1:]:
        # Windows in which each of three sources has a sample on the way have at most 16.
        if (phase.tokens or 0) >= 16 * length and draw(st.booleans()):
            phase.ramp_tokens = phase.tokens or 0
    tokens = sum(phase.tokens or 0 for phase in phases.values())
    ramp = BatchRampConfig()
    if times > 1 and draw(st.booleans()):
        ramp = BatchRampConfig(start=unit, increment=unit, ramp_tokens=draw(st.integers(1, tokens - 1)))
    schedule = ScheduleConfig(lr=1e-3, warmup_tokens=tokens // 4, decay_tokens=tokens // 4)
    return StageConfig(
        tokens=tokens, sequence_length=length, global_batch_size=times * unit, batch_ramp=ramp, schedule=schedule,
        phases=phases,
    )  # fmt: skip


@st.composite
def starts(draw: st.DrawFn, stages: int, unit: int) -> Start:
    sizes = range(1, unit + 1)
    divisors = [(data, micro) for data in sizes for micro in sizes if unit % (data * micro) == 0]
    layouts = []
    for _ in range(stages):
        data, micro_batch = draw(st.sampled_from(divisors))
        layouts.append(Layout(data, draw(st.sampled_from([1, 2])), micro_batch))
    if draw(st.booleans()):
        layouts = layouts[:1] * stages
    return Start(
        tuple(layouts),
        every=draw(st.integers(1, 6)),
        kill=Kill(draw(st.integers(1, 20)), draw(st.integers(0, 2))),
        batch=draw(st.sampled_from([None, None, unit, 2 * unit, 3 * unit])),
    )


@st.composite
def histories(draw: st.DrawFn) -> tuple[Recipe, list[Start]]:
    unit, stages = draw(st.sampled_from([2, 4, 6])), draw(st.integers(1, 2))
    recipe = numbered_recipe({name: draw(stage_configs(unit)) for name in ("a", "b")[:stages]})
    return recipe, draw(st.lists(starts(stages, unit), min_size=2, max_size=4))


def commanded(recipe: Recipe, start: Start) -> Recipe:
    """The recipe of a command, without what it tells the run."""
    recipe = copy.deepcopy(recipe)
    recipe.checkpoint.every = start.every
    for stage, layout in zip(recipe.stages.values(), start.layouts, strict=True):
        stage.micro_batch_size, stage.gpus = layout.micro_batch, layout.data * layout.context
        stage.parallel = ParallelConfig(context=layout.context)
    return recipe


def go_on(recipe: Recipe, command: Start, platform: Platform) -> Iterator[Ended]:
    """The processes of a command, one after the other while the next stage needs other ranks."""
    told = recipe = commanded(recipe, command)
    overrides = []
    if command.batch and (run_directory(recipe) / "recipe.yaml").exists():
        known = Curriculum(recipe, open_corpus(Path(recipe.data.path)).sizes)
        stage = next_stage(run_directory(recipe), known).name
        told, overrides = copy.deepcopy(recipe), [f"stages.{stage}.global_batch_size={command.batch}"]
        told.stages[stage].global_batch_size = command.batch
    try:
        process = start(told, platform, overrides, command.kill)
    except RecipeError:
        if not overrides:
            raise
        process = start(recipe, platform, kill=command.kill)
    yield process
    while process.ending is not None:
        process = start(recipe, platform, kill=command.kill)
        yield process


def counted(recipe: Recipe, reads: list[Read]) -> Counts:
    """What was read, by the phase in which a step begins."""
    found: Counts = Counter()
    stages, before = iter(recipe.stages.items()), 0
    name, config = next(stages)
    for read in reads:
        if before >= config.tokens:
            (name, config), before = next(stages), 0
        ends = accumulate(phase.tokens or 0 for phase in config.phases.values())
        phase = next(phase for phase, end in zip(config.phases, ends, strict=True) if before < end)
        for row in read.tokens:
            found[name, phase, source_of(row)] += row.size
        before += read.tokens.size
    return found


def assert_ledger_counts_what_the_checkpoint_was_trained_on(directory: Path, process: Ended) -> None:
    book = json.loads((directory / "ledger.json").read_text())
    assert book["tokens"] == (newest_tokens(directory) or 0)
    borders = list(accumulate((read.tokens.size for read in process.read), initial=0))
    expected = counted(process.session.recipe, process.read[: borders.index(book["tokens"])])
    found = {
        (stage, phase, source): count
        for stage, phases in book["stages"].items()
        for phase, sources in phases.items()
        for source, count in sources.items()
        if count
    }
    assert found == expected
    by_source: Counter[str] = Counter()
    for (*_, source), count in expected.items():
        by_source[source] += count
    assert {name: total["tokens"] for name, total in book["sources"].items() if total["tokens"]} == by_source


@pytest.fixture(scope="module")
def numbered(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_numbered_corpus(tmp_path_factory.mktemp("numbered") / "corpus")


def assert_it_reads_what_one_rank_reads(
    recipe: Recipe, commands: list[Start], platform: Platform, directory: Path
) -> list[Ended]:
    recipe.run.dir = str(directory)
    processes = []
    for command in [*commands, replace(commands[-1], kill=None, batch=None)]:
        for process in go_on(recipe, command, platform):
            assert_ledger_counts_what_the_checkpoint_was_trained_on(run_directory(recipe), process)
            processes.append(process)
    assert processes[-1].session.finished
    alone = uninterrupted(processes[-1].session.curriculum, directory / "alone", platform)
    assert learned(run_directory(recipe)) == learned(directory / "alone")
    assert len(processes[-1].read) == len(alone.read)
    assert all(map(Read.equals, processes[-1].read, alone.read))
    assert (run_directory(recipe) / "ledger.json").read_text() == (directory / "alone/ledger.json").read_text()
    return processes


# Shrinking would take minutes, and histories are short.
@pytest.mark.parametrize("examples", [10, pytest.param(200, marks=pytest.mark.full)])
def test_any_layouts_and_kills(
    examples: int, one_rank: Platform, numbered: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    @given(histories())
    @settings(max_examples=examples, phases=[Phase.generate])
    def check(history: tuple[Recipe, list[Start]]) -> None:
        recipe, commands = history
        recipe.data.path = str(numbered)
        assert_it_reads_what_one_rank_reads(recipe, commands, one_rank, tmp_path_factory.mktemp("history"))

    check()


TWO_RANKS, OTHERS = Layout(2, 1, 2), Layout(1, 2, 4)


@pytest.mark.parametrize("told", [pytest.param(None, marks=pytest.mark.full), 12])
@pytest.mark.parametrize("offset", [-1, 0, 1])
@pytest.mark.parametrize("change", ["global_batch_size", "phase", "stage"])
def test_a_checkpoint_on_before_and_after_a_change(
    change: str, offset: int, told: int | None, one_rank: Platform, numbered: Path, tmp_path: Path
) -> None:
    """Killed a step behind the checkpoint; then told to take other steps, and killed after the second of them."""
    recipe = two_stages()
    recipe.data.path = str(numbered)
    uninterrupted(Curriculum(recipe, open_corpus(numbered).sizes), tmp_path / "undisturbed", one_rank)
    steps = lines(tmp_path / "undisturbed/metrics.jsonl")
    border = next(n for n in range(1, len(steps)) if steps[n][change] != steps[n - 1][change])
    landed = border + offset
    first = Start((TWO_RANKS, TWO_RANKS), every=landed, kill=Kill(landed + 1, 1))
    second = Start((OTHERS, TWO_RANKS), every=1, kill=Kill(2, 1), batch=told)
    processes = assert_it_reads_what_one_rank_reads(recipe, [first, second], one_rank, tmp_path)
    # The checkpoints are where they were meant to be, and both kills lost the step behind them.
    assert [len(process.begun) for process in processes[1:3]] == [landed, landed + 1]
