"""The order of `nano_12b_v2` beside the indexes that megatron-core builds for the same thing, on growing corpora.

    python -m benchmarks.order [--memory-gb 4]

Nothing is read: of a corpus there are only sizes, divided over the sources as the recipe reads them, in documents of
1,000 tokens in the mean. Every measurement is a process of its own, and memory is the largest resident set it had.

Ours: the whole recipe on shards of 2.5G tokens. Ready is the time from the start of the process, with imports and the
composition of the recipe, and its CPU time; building is that of streams and curriculum in it. An access is from the
number of a random sample of the first stage to source, shard and token. A corpus smaller than the run is read several
times. A line is that process of five whose time until ready is the median.

Theirs: what `GPTDataset` builds for one epoch of each source, one source after the other (`_build_document_index`,
`helpers.build_sample_idx`, `_build_shuffle_index`; samples of 8,192, documents of 1 to 1,999 tokens, uniformly), then
`helpers.build_blending_indices` over the sources. A data set for each source is the least there can be: blending asks
every data set for every sample. Seconds are of the CPU, which on an idle machine are those of the clock: all of it is
one thread. Memory is that of the builders, without Python and megatron-core; kept is what the data sets of the rank
that builds hold afterwards, with `indices`. Other ranks map the files that it writes, which is not measured. An access
is from the number of a random sample to document and offset.

Corpora grow fourfold while the next one is expected to stay below --memory-gb. What is beyond is a straight line
through what was measured, and marked as extrapolated. Whether seconds go with it, the exponent between the last two
sizes says: above 1 the line is too low.
"""

from __future__ import annotations

import argparse
import math
import random
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from benchmarks.process import in_fresh_process, resident
from nano_pretrain.data.curriculum import Curriculum, by_source
from nano_pretrain.data.ranges import SourceSize
from nano_pretrain.data.shards import TokenShard, TokenStream
from nano_pretrain.recipe.schema import Recipe

RUN = 20_000_000_000_000
"""Tokens of the recipe's pretraining, to which theirs is extrapolated."""

OUR_CORPORA = (RUN // 100, RUN // 10, RUN, 10 * RUN)
THEIR_FIRST_CORPUS = 1_000_000_000
GROWTH = 4
SHARD, DOCUMENT, SAMPLE = 2_500_000_000, 1_000, 8_192
"""Tokens."""

ACCESSES = 20_000
PROCESSES = 5


class SimulatedShard(TokenShard):
    """A shard of which there is only the size."""

    def __init__(self, name: str, tokens: int) -> None:
        self.name = name
        self.tokens = tokens
        self.documents = -(-tokens // DOCUMENT)

    def document_start(self, token: int) -> int:
        return token - token % DOCUMENT


def simulated_source(name: str, tokens: int) -> TokenStream:
    sizes = [min(SHARD, tokens - start) for start in range(0, tokens, SHARD)]
    return TokenStream(name, [SimulatedShard(f"{name}-{n:05}", size) for n, size in enumerate(sizes)], 0)


def the_recipe() -> Recipe:
    """`nano_12b_v2`, which may read a source as often as it likes."""
    from nano_pretrain.compose import compose

    recipe = compose(["recipe=nano_12b_v2"]).recipe
    recipe.data.max_epochs = math.inf
    return recipe


def read_shares() -> dict[str, float]:
    """Share of each source in all tokens of the run."""
    recipe = the_recipe()
    names = {name for stage in recipe.stages.values() for phase in stage.phases.values() for name in phase.blend}
    endless = Curriculum(recipe, dict.fromkeys(names, SourceSize((1 << 60,))))
    read = by_source(endless.consumed(endless.total_tokens))
    return {name: sum(by_stage.values()) / endless.total_tokens for name, by_stage in read.items()}


def access_times(access: Callable[[int], object], samples: int) -> list[float]:
    """Median, 90th and 99th percentile of an access to a random one of `samples` samples, in microseconds."""
    generator, times = random.Random(1), []
    for _ in range(ACCESSES):
        sample = generator.randrange(samples)
        start = time.perf_counter()
        access(sample)
        times.append(1e6 * (time.perf_counter() - start))
    return [float(value) for value in np.percentile(times, (50, 90, 99))]


@dataclass(frozen=True)
class Ours:
    """What a process that has our order measured; seconds, bytes, microseconds."""

    shards: int
    ready: float
    cpu: float
    building: float
    memory: int
    access: Sequence[float]


def our_order(started: float, shares: Mapping[str, float], tokens: int) -> Ours:
    """Build and use our order in this process, which began at `started` of the monotonic clock."""
    recipe = the_recipe()
    composed = time.monotonic()
    streams = {name: simulated_source(name, round(share * tokens)) for name, share in shares.items()}
    curriculum = Curriculum(recipe, {name: stream.size for name, stream in streams.items()})
    ready, cpu = time.monotonic(), time.process_time()
    stage = curriculum.stages[0]

    def access(sample: int) -> tuple[str, int]:
        address = curriculum.locate(stage.name, sample)
        return streams[address.source].locate(address.start)

    times = access_times(access, stage.phases[-1].first_sample + stage.phases[-1].samples)
    shards = sum(-(-stream.tokens // SHARD) for stream in streams.values())
    return Ours(shards, ready - started, cpu, ready - composed, resident("VmHWM"), times)


@dataclass(frozen=True)
class Theirs:
    """What a process that built megatron-core's indexes measured; bytes above those before, CPU seconds by builder."""

    tokens: int
    documents: int
    samples: int
    seconds: Mapping[str, float]
    before: int
    peak: int
    kept: int
    access: Sequence[float]

    @property
    def total_seconds(self) -> float:
        return sum(self.seconds.values())


class Builders:
    """megatron-core's functions, called as `GPTDataset` and `BlendedDataset` call them, each timed."""

    def __init__(self) -> None:
        from megatron.core.datasets import gpt_dataset, helpers

        self._gpt, self._helpers = gpt_dataset, helpers
        self.seconds: dict[str, float] = {"documents": 0.0, "samples": 0.0, "shuffle": 0.0, "blend": 0.0}

    def source(self, tokens: int) -> list[Any]:
        """Documents, and document, sample and shuffle index of one epoch of a source."""
        lengths = np.random.default_rng(1).integers(1, 2 * DOCUMENT, -(-tokens // DOCUMENT), np.int32)
        documents = np.arange(len(lengths), dtype=np.int32)
        state = np.random.RandomState(1)
        order = self._timed("documents", self._gpt._build_document_index, documents, 1, state, False)
        sizes = (SAMPLE, 1, int(lengths.sum()))
        samples = self._timed("samples", self._helpers.build_sample_idx, lengths, order, *sizes)
        count = len(samples) - 1
        return [documents, order, samples, self._timed("shuffle", self._gpt._build_shuffle_index, count, count, state)]

    def blend(self, weights: Sequence[float], samples: int) -> list[Any]:
        """Number of the source, and of the sample in it, of every sample."""
        sources, numbers = np.zeros(samples, np.int16), np.zeros(samples, np.int64)
        blend = self._helpers.build_blending_indices
        self._timed("blend", blend, sources, numbers, np.array(weights), len(weights), samples, False)
        return [sources, numbers]

    def _timed(self, name: str, build: Callable[..., Any], *arguments: Any) -> Any:
        start = time.process_time()
        built = build(*arguments)
        self.seconds[name] += time.process_time() - start
        return built


def their_order(shares: Mapping[str, float], tokens: int) -> Theirs:
    """Build and use megatron-core's indexes in this process."""
    builders = Builders()
    before = resident("VmRSS")
    indexes = [builders.source(round(share * tokens)) for share in shares.values()]
    samples = sum(len(shuffle) for *_, shuffle in indexes)
    sources, numbers = builders.blend(list(shares.values()), samples)
    peak = resident("VmHWM") - before

    def access(sample: int) -> tuple[Any, Any]:
        _, order, starts, shuffle = indexes[sources[sample]]
        # The blend asks for up to a sample more than there is of a source: megatron-core builds half a percent more.
        document, offset = starts[shuffle[numbers[sample] % len(shuffle)]]
        return order[document], offset

    documents = sum(len(order) for _, order, _, _ in indexes)
    kept = sources.nbytes + numbers.nbytes + sum(part.nbytes for parts in indexes for part in parts)
    times = access_times(access, samples)
    return Theirs(tokens, documents, samples, builders.seconds, before, peak, kept, times)


def beyond_int32() -> list[int]:
    """What megatron-core's document index makes of the documents 2^31 - 1 and 2^31."""
    from megatron.core.datasets.gpt_dataset import _build_document_index

    index = _build_document_index(np.array([2**31 - 1, 2**31]), 1, np.random.RandomState(1), False)
    return sorted(index.tolist(), reverse=True)


def print_ours(shares: Mapping[str, float]) -> None:
    print("ours: corpus tokens  shards  ready s  CPU s  building s  memory MB  access us: median   p90   p99")
    for tokens in OUR_CORPORA:
        rows: list[Ours] = [in_fresh_process(our_order, time.monotonic(), shares, tokens) for _ in range(PROCESSES)]
        row = sorted(rows, key=lambda row: row.ready)[PROCESSES // 2]
        times = f"{row.ready:7.2f}  {row.cpu:5.2f}  {row.building:10.3f}  {row.memory / 1e6:9.0f}"
        median, p90, p99 = row.access
        print(f"{tokens:19.1e}  {row.shards:6}  {times}  {median:17.1f} {p90:5.1f} {p99:5.1f}", flush=True)


def print_theirs(shares: Mapping[str, float], limit: float) -> list[Theirs]:
    """Print and return a line for each corpus whose indexes are expected to take less than `limit` bytes."""
    names = "CPU s: documents  samples  shuffle    blend    total  peak MB  kept MB  access us: median   p90   p99"
    print(f"megatron-core: corpus tokens  {names}")
    rows: list[Theirs] = []
    while not rows or rows[-1].before + GROWTH * rows[-1].peak < limit:
        row: Theirs = in_fresh_process(their_order, shares, THEIR_FIRST_CORPUS * GROWTH ** len(rows))
        rows.append(row)
        seconds = " ".join(f"{value:8.2f}" for value in (*row.seconds.values(), row.total_seconds))
        median, p90, p99 = row.access
        memory = f"{row.peak / 1e6:7.0f}  {row.kept / 1e6:7.0f}"
        print(f"{row.tokens:28.1e} {'':7}{seconds}  {memory}  {median:17.1f} {p90:5.1f} {p99:5.1f}", flush=True)
    return rows


def print_extrapolated(rows: Sequence[Theirs], shares: Mapping[str, float]) -> None:
    """The straight lines through the measured rows, and where they are at the recipe's tokens."""
    tokens = [row.tokens for row in rows]
    lines: dict[str, tuple[Sequence[float], float, str]] = {
        "seconds": ([row.total_seconds for row in rows], 1.0, "s"),
        "peak": ([row.peak for row in rows], 1e9, "GB"),
        "kept": ([row.kept for row in rows], 1e9, "GB"),
    }
    print(f"extrapolated, not measured: {RUN:.0e} tokens, by least squares through the {len(rows)} sizes above")
    for name, (values, unit, symbol) in lines.items():
        slope, start = np.polyfit(tokens, np.array(values) / unit, 1)
        exponent = math.log(values[-1] / values[-2], GROWTH) if len(rows) > 1 else math.nan
        formula = f"{start:.3g} + {1e12 * slope:.4g} x tokens / 1e12"
        print(f"  {name:7} {start + slope * RUN:9,.0f} {symbol:2} = {formula}; exponent at the end {exponent:.2f}")
    largest = max(shares, key=lambda name: shares[name])
    documents = shares[largest] * RUN / DOCUMENT
    wrapped = ", ".join(map(str, in_fresh_process(beyond_int32)))
    print(f"  its document index is int32: documents 2147483647 and 2147483648 become {wrapped} without an error")
    print(f"  {largest} has {documents:.1e} documents and so needs {math.ceil(documents / 2**31)} data sets or more")
    print("  built as more data sets, the peak comes down towards what is kept, and blending takes longer")


def main() -> None:
    """Print both tables and the extrapolation."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--memory-gb", type=float, default=4.0, help="most that megatron-core's builders may take")
    options = parser.parse_args()
    shares = read_shares()
    print_ours(shares)
    print_extrapolated(print_theirs(shares, 1e9 * options.memory_gb), shares)


if __name__ == "__main__":
    main()
