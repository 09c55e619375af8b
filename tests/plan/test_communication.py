"""Bytes sent: by hand where the numbers are small, and against what the trainer hands to gloo."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nano_pretrain.plan.blocks import blocks
from nano_pretrain.plan.communication import Group, Transfer, groups, layer_transfers, sum_by_kind
from nano_pretrain.plan.ranks import whole_model
from nano_pretrain.plan.step_time import step_time
from nano_pretrain.plan.work import work_of
from nano_pretrain.recipe.pattern import LayerType
from nano_pretrain.recipe.schema import ParallelConfig
from tests.corpora import write_corpus
from tests.distributed.ranks import run_ranks
from tests.model.recipes import small_recipe
from tests.plan.recipes import STAGE, device, named, small
from tests.plan.recorded import bytes_handed_over

SCALARS = 64
"""Bytes of loss, gradient norm, flags and numbers of tokens, which the plan leaves out."""
PADDING = 64 * 4
"""Largest padding of a parameter in its buffer, bytes."""


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_corpus(tmp_path_factory.mktemp("communication") / "corpus")


@pytest.mark.parametrize("precision", ["bf16", "fp32"])
@pytest.mark.parametrize(
    "layout",
    [
        ParallelConfig(tensor=2),
        ParallelConfig(tensor=2, sequence=True),
        ParallelConfig(pipeline=2),
        ParallelConfig(context=2, distributed_optimizer=False),
    ],
    ids=["TP2", "TP2 with sequence parallelism", "PP2", "CP2"],
)
def test_a_step_of_the_trainer_sends_what_the_plan_says(corpus: Path, precision: str, layout: ParallelConfig) -> None:
    real = run_ranks(bytes_handed_over, 2, small_recipe(precision, corpus=corpus), layout)[0]
    planned = step_time(small(layout, 2, precision), STAGE, device("cpu")).sent
    # Of two ranks each sends half of the tensor in a gather or scatter, all of it in a reduction or a send.
    for kind, factor in {"all-gather": 2, "reduce-scatter": 2, "all-to-all": 2, "all-reduce": 1, "send": 1}.items():
        expected = factor * sum(size for name, size in planned.items() if kind in name)
        assert real.pop(kind, 0) == pytest.approx(expected, abs=SCALARS), kind
    assert not real


@pytest.mark.parametrize(("precision", "sharded"), [("bf16", True), ("fp32", True), ("fp32", False)])
def test_data_parallel_ranks_exchange_gradients_and_parameters(corpus: Path, precision: str, sharded: bool) -> None:
    layout = ParallelConfig(distributed_optimizer=sharded)
    real = run_ranks(bytes_handed_over, 2, small_recipe(precision, corpus=corpus), layout)[0]
    planned = step_time(small(layout, 2, precision), STAGE, device("cpu")).sent
    parameters = 30
    for kind, size in planned.items():
        name = kind.split()[1]
        handed = real.pop(name) / (1 if name == "all-reduce" else 2)
        assert size - SCALARS <= handed <= size + PADDING * parameters, kind
    assert set(real) <= {"all-reduce"}
    assert real.get("all-reduce", 0) <= SCALARS


def test_tensor_parallelism_by_hand() -> None:
    recipe = named("nano_12b_v2")
    work = work_of(recipe.model, recipe.precision, recipe.stages[STAGE], recipe.parallel, "cuda")
    whole, seven_eighths = 8192 * 5120, 7 / 8
    found = layer_transfers(work, LayerType.MAMBA, "fp8", sequence_parallel=True)
    assert [(t.kind, t.bytes, t.behind) for t in found.forward] == [
        ("tensor all-gather", seven_eighths * whole, None),
        ("tensor reduce-scatter", seven_eighths * 2 * whole, None),
    ]
    assert [(t.kind, t.bytes, t.behind) for t in found.backward] == [
        ("tensor all-gather", seven_eighths * whole, "in_proj dgrad"),
        ("tensor reduce-scatter", seven_eighths * 2 * whole, "in_proj wgrad"),
        ("tensor all-gather", seven_eighths * whole, None),
    ]


def test_context_parallelism_by_hand() -> None:
    recipe = named("nano_12b_v2")
    stage = recipe.stages["long_context"]
    assert stage.parallel is not None
    work = work_of(recipe.model, recipe.precision, stage, stage.parallel, "cuda")
    tokens = 524_288 // 16
    # z, x, B, C and dt there, y back; one group to a tensor-parallel rank, so B and C are sent to each of 16 ranks.
    columns = 2 * 1280 + 2 * 16 * 128 + 16 + 1280
    mamba = sum_by_kind(layer_transfers(work, LayerType.MAMBA, "fp8", sequence_parallel=True).forward)
    assert mamba["context all-to-all"] == 15 / 16 * tokens * columns * 2
    attention = layer_transfers(work, LayerType.ATTENTION, "fp8", sequence_parallel=True)
    keys_and_values = 15 * tokens * 2 * 128 * 2
    assert sum_by_kind(attention.forward)["context keys and values"] == keys_and_values
    assert sum_by_kind(attention.backward)["context keys and values"] == 2 * keys_and_values
    feed_forward = layer_transfers(work, LayerType.FEED_FORWARD, "fp8", sequence_parallel=True)
    assert not [t for t in (*feed_forward.forward, *feed_forward.backward) if t.group == "context"]


def test_what_hides_a_transfer_exists() -> None:
    recipe = named("nano_12b_v2")
    stage = recipe.stages["long_context"]
    assert stage.parallel is not None
    work = work_of(recipe.model, recipe.precision, stage, stage.parallel, "cuda")
    for block in blocks(recipe, work, whole_model(recipe.model), sequence_parallel=True):
        for run in block.runs:
            names = {kernel.name for kernel in run.kernels}
            assert {transfer.behind for transfer in run.transfers} <= names | {None}


def test_groups_of_the_paper_s_long_context_layout() -> None:
    found = groups(ParallelConfig(tensor=8, context=16), data_parallel=12)
    assert found["tensor"] == Group(8, 1)
    assert found["context"] == Group(16, 8)
    assert found["data"] == Group(192, 8)
    assert [found[name].in_node(8) for name in ("tensor", "context", "data", "pipeline")] == [8, 1, 1, 1]
    assert groups(ParallelConfig(tensor=2), data_parallel=16)["data"].in_node(8) == 4


def test_time_within_and_between_nodes_by_hand() -> None:
    h100 = device("h100")
    inside, outside = 0.81 * 450e9, 0.80 * 50e9
    gather = Transfer("data all-gather of parameters", 1e9)
    assert gather.seconds(Group(1, 1), h100) == 0
    assert gather.seconds(Group(8, 1), h100) == pytest.approx(1e9 / inside)
    assert gather.seconds(Group(16, 8), h100) == pytest.approx(1e9 / outside), "each member in a node of its own"
    # Two nodes of eight: all that the ring moves crosses the border, over the eight adapters of a node.
    assert gather.seconds(Group(16, 1), h100) == pytest.approx(1e9 / 8 / outside)
    slow = Transfer("context all-to-all", 1e9)
    assert slow.seconds(Group(16, 1), h100) == pytest.approx(8 / 15 * 1e9 / outside)
    assert Transfer("pipeline send", 1e9).seconds(Group(16, 1), h100) == pytest.approx(1e9 / outside)


@given(
    st.sampled_from(["tensor all-gather", "context all-to-all", "pipeline send", "context keys and values"]),
    st.integers(1, 64),
    st.sampled_from([1, 2, 4, 8, 16]),
    st.floats(1, 1e12),
)
def test_time_is_between_that_of_the_links_and_that_of_the_network(
    kind: str, size: int, stride: int, sent: float
) -> None:
    h100 = device("h100")
    seconds = Transfer(kind, sent).seconds(Group(size, stride), h100)
    if size == 1:
        assert seconds == 0
    else:
        assert sent / h100.link_rate <= seconds <= sent / h100.network_rate
