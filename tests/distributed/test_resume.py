"""A checkpoint of any layout continues in any other, and again in a third, as if nothing had happened."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.distributed.comparing import Differences
from tests.distributed.courses import END, SAVED
from tests.distributed.layouts import LAYOUTS, MOMENTS, WEIGHTS, Courses, close, differences, some_quick
from tests.distributed.training import Steps

MIDDLE = 6
"""Step at which the second layout hands over to the third; wrong moments show from the second step after a load on."""

QUICK = (
    "DP2, many buckets -> TP2 with SP -> PP2",
    "PP2 -> CP2 -> DP2",
)
CHAINS = (
    *QUICK,
    "one rank -> TP4 -> TP2",
    "TP2 -> TP2 x PP2 -> PP4, written split",
    "PP4 -> PP2, written split -> one rank",
    "PP2, written split -> PP4 -> TP2 x PP2",
    "CP2 -> CP4 -> DP4",
    "CP4 -> TP2 x CP2 with SP -> PP2 x CP2",
    "DP4 -> DP2, no overlap -> CP2 x DP2",
    "DP2, no overlap -> one rank -> DP2, many buckets",
    "TP2 x PP2 x DP2 -> CP2, plain kernels -> TP2 x PP2 x CP2 with SP",
    "TP2 x PP2 x CP2 with SP -> TP2 x CP2 x DP2 -> TP4 x CP2",
    "TP4 x CP2 -> DP4 -> TP2 x PP2 x DP2",
    # The other optimizer, whose state is another.
    "DP2, replicated -> DP4, replicated -> one rank, replicated",
    "one rank, replicated -> DP2, replicated -> TP2, replicated",
)
"""Layouts of the first three steps, the next three and the last."""


@dataclass(frozen=True)
class Resumed:
    """A run through three layouts.

    Attributes:
        steps: all after the first checkpoint.
        uninterrupted: the same steps of a run that stayed in the first layout.
        copies: differences between what the second and third layout loaded and saved again, and what they were given.
        last: differences of the last checkpoint from the uninterrupted run's.
    """

    steps: Steps
    uninterrupted: Steps
    copies: list[Differences]
    last: Differences


def resume_twice(courses: Courses, chain: str, directory: Path) -> Resumed:
    first, *others = chain.split(" -> ")
    whole = courses.of(first).steps
    source = courses.directory / first
    second, third = (LAYOUTS[name] for name in others)
    middle = courses.resume(second, source, directory / "2", SAVED, MIDDLE)
    last = courses.resume(third, directory / "2", directory / "3", MIDDLE, END)
    pairs = [
        (source / str(SAVED), directory / "2" / str(SAVED)),
        (directory / "2" / str(MIDDLE), directory / "3" / str(MIDDLE)),
        (source / str(END), directory / "3" / str(END)),
    ]
    *copies, at_end = differences(pairs)
    steps = Steps(middle.losses + last.losses, middle.grad_norms + last.grad_norms)
    return Resumed(steps, Steps(whole.losses[SAVED:], whole.grad_norms[SAVED:]), copies, at_end)


def nothing_differs(found: Differences) -> bool:
    return found == dict.fromkeys(found, 0.0) and any(".exp_avg_sq." in name for name in found)


@pytest.mark.parametrize("chain", some_quick(CHAINS, QUICK))
def test_a_run_through_three_layouts_equals_the_uninterrupted_one(chain: str, courses: Courses, tmp_path: Path) -> None:
    found = resume_twice(courses, chain, tmp_path)
    assert all(map(nothing_differs, found.copies)), "what is loaded is what was saved, bit for bit"
    assert close(found.steps.losses, found.uninterrupted.losses)
    assert close(found.steps.grad_norms, found.uninterrupted.grad_norms)
    for name, difference in found.last.items():
        assert difference < (MOMENTS if name.startswith("optimizer.") else WEIGHTS), name


SAME = ("DP2, many buckets", "DP4, replicated", "TP2 x PP2", "TP2 x CP2 with SP")


@pytest.mark.parametrize("name", some_quick(SAME, SAME[:1]))
def test_the_same_layout_continues_bit_for_bit(name: str, courses: Courses, tmp_path: Path) -> None:
    found = resume_twice(courses, f"{name} -> {name} -> {name}", tmp_path)
    assert found.steps == found.uninterrupted
    assert all(map(nothing_differs, [*found.copies, found.last]))


def test_every_change_of_a_layout_is_among_them() -> None:
    pairs = {pair for chain in CHAINS for pair in zip(chain.split(" -> "), chain.split(" -> ")[1:], strict=False)}
    assert len(pairs) == 2 * len(CHAINS)
    changes = set()
    for before, after in ((LAYOUTS[a], LAYOUTS[b]) for a, b in pairs):
        for field in ("tensor", "pipeline", "context", "sequence", "overlap"):
            old, new = getattr(before.parallel, field), getattr(after.parallel, field)
            changes.add((field, (new > old) - (new < old)))
        old, new = before.data_parallel, after.data_parallel
        changes.add(("data", (new > old) - (new < old)))
        if before.parallel.pipeline_layers != after.parallel.pipeline_layers:
            changes.add(("split", 1 if after.parallel.pipeline_layers else -1))
        if before.parallel.bucket_size != after.parallel.bucket_size:
            changes.add(("buckets", 1 if after.parallel.bucket_size else -1))
    fields = ("tensor", "pipeline", "context", "sequence", "overlap", "data", "split", "buckets")
    assert {(field, way) for field in fields for way in (1, -1)} <= changes
