from __future__ import annotations

import json
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nano_pretrain.data.curriculum import Curriculum
from nano_pretrain.data.ledger import ledger
from nano_pretrain.data.ranges import SourceSize
from nano_pretrain.recipe.schema import DataConfig, PhaseConfig, Recipe, StageConfig

SIZES = {"code": SourceSize((700,)), "math": SourceSize((700, 200)), "web": SourceSize((2000, 33, 400))}


def curriculum(first: dict[str, int], second: dict[str, int], long: dict[str, int], window: int) -> Curriculum:
    pretrain = StageConfig(
        tokens=1200,
        sequence_length=8,
        global_batch_size=5,
        phases={"p1": PhaseConfig(share=0.75, blend=first), "p2": PhaseConfig(share=0.25, blend=second)},
    )
    extension = StageConfig(
        tokens=512, sequence_length=32, global_batch_size=2, phases={"lc": PhaseConfig(share=1.0, blend=long)}
    )
    data = DataConfig(quota_window=window, max_epochs=100.0)
    return Curriculum(Recipe(data=data, stages={"pretrain": pretrain, "extension": extension}), SIZES)


BLENDS = st.dictionaries(st.sampled_from(sorted(SIZES)), st.integers(1, 20), min_size=1)
CURRICULA = st.builds(curriculum, BLENDS, BLENDS, BLENDS, st.integers(1, 100))


@given(CURRICULA, st.data())
@settings(deadline=None)
def test_the_ledger_is_a_count_of_what_was_read(plan: Curriculum, data: st.DataObject) -> None:
    steps = data.draw(st.integers(0, plan.total_steps))
    tokens, read = 0, Counter[tuple[str, str, str]]()
    for _ in range(steps):
        stage = plan.stage_at(tokens)
        for address in plan.samples(tokens, range(stage.global_batch_size)):
            read[address.stage, address.phase, address.source] += stage.sequence_length
        tokens += stage.tokens_per_step
    book = ledger(plan, tokens)
    assert book["tokens"] == tokens == sum(totals["tokens"] for totals in book["sources"].values())
    for (stage_name, phase, source), count in read.items():
        assert book["stages"][stage_name][phase][source] == count
    for source, totals in book["sources"].items():
        per_stage = {
            name: sum(n for (at, _, of), n in read.items() if (at, of) == (name, source)) for name in book["stages"]
        }
        assert totals["tokens"] == sum(per_stage.values())
        assert totals["epochs"] == pytest.approx(totals["tokens"] / SIZES[source].tokens, rel=1e-12)


def test_the_ledger_is_plain_json() -> None:
    plan = curriculum({"web": 1}, {"web": 1, "code": 1}, {"math": 1}, window=10)
    book = ledger(plan, plan.total_tokens)
    assert json.loads(json.dumps(book)) == book
    assert book["stages"]["extension"] == {"lc": {"math": 512}}
    assert list(book["sources"]) == ["code", "math", "web"]


def test_before_the_first_step_nothing_was_read() -> None:
    assert ledger(curriculum({"web": 1}, {"web": 1}, {"web": 1}, 10), 0) == {"tokens": 0, "stages": {}, "sources": {}}
