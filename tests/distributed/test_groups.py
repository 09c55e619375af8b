"""Ranks know their place, and leave nothing behind."""

from __future__ import annotations

import pytest

from nano_pretrain.parallel import groups
from nano_pretrain.recipe.schema import ParallelConfig
from tests.distributed import training
from tests.distributed.ranks import run_ranks


@pytest.mark.parametrize(
    ("layout", "data_parallel", "reporting"),
    [
        (ParallelConfig(tensor=2, pipeline=2), [(0, 1)] * 4, [False, False, True, False]),
        (ParallelConfig(pipeline=2), [(0, 2), (1, 2), (0, 2), (1, 2)], [False, False, True, True]),
    ],
)
def test_every_rank_knows_its_place(
    layout: ParallelConfig, data_parallel: list[tuple[int, int]], reporting: list[bool]
) -> None:
    places = run_ranks(training.place, 4, layout)
    assert [place.data_parallel for place in places] == data_parallel
    # The last pipeline stage has the loss; its tensor-parallel ranks have the same one.
    assert [place.reports_loss for place in places] == reporting
    assert {place.largest for place in places} == {30.0}
    assert not any(place.initialised_after for place in places)


def test_a_process_started_alone_is_a_world_of_one(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        # Set first, so that what the function sets is taken back.
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    assert groups.ranks_from_environment() == groups.Ranks(0, 1, 0)
    assert groups.ranks_from_environment().is_first
    monkeypatch.setenv("RANK", "3")
    monkeypatch.setenv("WORLD_SIZE", "4")
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert groups.ranks_from_environment() == groups.Ranks(3, 4, 1)
