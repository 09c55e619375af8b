"""The buckets of a buffer, and the shards of the optimizer: what holds for any sizes.

That they are megatron-core's is in tests/plan/test_ranks.py.
"""

from __future__ import annotations

from itertools import pairwise

from hypothesis import given
from hypothesis import strategies as st

from nano_pretrain.plan.buffers import EMBEDDING, GRADIENT_BYTES, HEAD, ParameterBuffer, Storage, bucket_size
from nano_pretrain.recipe.schema import ParallelConfig


@st.composite
def buffers(draw: st.DrawFn) -> ParameterBuffer:
    sizes = tuple(draw(st.lists(st.integers(1, 1000), min_size=1, max_size=20)))
    layers = (HEAD, *range(len(sizes) - 2, EMBEDDING, -1), EMBEDDING)[: len(sizes)]
    ranks, full = draw(st.integers(1, 9)), draw(st.none() | st.integers(1, 3000))
    return ParameterBuffer(Storage.BF16, sizes, layers, draw(st.booleans()), ranks, full)


@given(buffers())
def test_buckets_follow_each_other_and_hold_every_parameter_once(buffer: ParameterBuffer) -> None:
    assert sum((bucket.sizes for bucket in buffer.buckets), ()) == buffer.sizes
    assert buffer.buckets[0].start == 0
    assert all(before.end == after.start for before, after in pairwise(buffer.buckets))
    if buffer.bucket_size is None:
        assert len(buffer.buckets) == 1
    elif not buffer.sharded:
        assert all(bucket.end - bucket.start >= buffer.bucket_size for bucket in buffer.buckets[:-1])


@given(buffers())
def test_the_shards_together_are_the_optimizer(buffer: ParameterBuffer) -> None:
    copies = 1 if buffer.sharded else buffer.ranks
    assert sum(buffer.owned()) == copies * sum(buffer.sizes)


@given(buffers())
def test_a_bucket_is_reduced_when_its_last_parameter_has_its_gradient(buffer: ParameterBuffer) -> None:
    assert buffer.reduced_before(EMBEDDING - 1) == buffer.gradient_bytes
    assert buffer.reduced_before(HEAD) == 0
    for bucket in buffer.buckets:
        assert buffer.reduced_before(bucket.layer) == GRADIENT_BYTES * bucket.start
        assert buffer.reduced_before(bucket.layer - 1) >= GRADIENT_BYTES * bucket.end


def test_only_the_first_position_has_several_buckets() -> None:
    assert bucket_size(ParallelConfig(), 8, position=0) == 40_000_000
    assert bucket_size(ParallelConfig(), 736, position=0) == 736_000_000
    assert bucket_size(ParallelConfig(bucket_size=5), 8, position=0) == 5
    assert bucket_size(ParallelConfig(), 8, position=1) is None
    assert bucket_size(ParallelConfig(overlap=False), 8, position=0) is None
