"""Recorded acts: what a command may change in mid-run, how it is kept, and what a command that names nothing gets."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from nano_pretrain.compose import compose
from nano_pretrain.recipe.acts import HISTORY, Act, Continuation, continuation, read_acts, undone, written
from nano_pretrain.recipe.errors import UserError
from nano_pretrain.recipe.load import to_yaml

BATCH = "stages.pretrain.global_batch_size"
END = "stages.pretrain.schedule.extend_to"
BLEND = "stages.pretrain.phases.p3.blend"
P3 = compose([]).recipe.stages["pretrain"].phases["p3"].blend


def go_on(directory: Path, tokens: int, *overrides: str) -> Continuation:
    """Start a run, and write what a start writes."""
    found = continuation(compose(overrides).recipe, overrides, directory, tokens)
    acts = (*found.acts, *found.told)
    if acts:
        (directory / HISTORY).write_text(written(acts))
    (directory / "recipe.yaml").write_text(to_yaml(found.recipe))
    return found


@pytest.mark.parametrize(
    ("override", "field", "before", "after"),
    [
        (f"{BATCH}=32", BATCH, 16, 32),
        (f"{END}=4e6", END, None, 4_000_000),
        ("stages.pretrain.schedule={extend_to: 4000000}", END, None, 4_000_000),
        ("stages={pretrain: {global_batch_size: 32}}", BATCH, 16, 32),
        ("stages.pretrain.phases={p3: {blend: {codeio: 1}}}", BLEND, P3, {"codeio": 1.0}),
        (f"{BLEND}={{codeio: 1}}", BLEND, P3, {"codeio": 1.0}),
    ],
)
def test_a_named_field_is_changed_from_now_on(
    tmp_path: Path, override: str, field: str, before: object, after: object
) -> None:
    go_on(tmp_path, 0)
    found = go_on(tmp_path, 8192, override)
    (act,) = found.told
    assert (act.tokens, act.field) == (8192, field)
    assert (act.before, act.after) == (before, after)
    assert undone(found.recipe, found.told) == compose([]).recipe
    assert read_acts(tmp_path) == (act,)


def test_what_was_told_stays_until_it_is_told_otherwise(tmp_path: Path) -> None:
    go_on(tmp_path, 0)
    go_on(tmp_path, 100, f"{BATCH}=32")
    silent = go_on(tmp_path, 200)
    assert silent.recipe.stages["pretrain"].global_batch_size == 32
    assert (silent.acts, silent.told) == ((Act(100, BATCH, 16, 32),), ())
    assert go_on(tmp_path, 300, f"{BATCH}=32").told == ()
    assert go_on(tmp_path, 400, f"{BATCH}=16").told == (Act(400, BATCH, 32, 16),)
    assert go_on(tmp_path, 500).recipe == compose([]).recipe


def test_a_start_that_was_killed_between_the_two_files_is_not_told_twice(tmp_path: Path) -> None:
    go_on(tmp_path, 0)
    old = (tmp_path / "recipe.yaml").read_text()
    go_on(tmp_path, 100, f"{BATCH}=32")
    (tmp_path / "recipe.yaml").write_text(old)
    assert go_on(tmp_path, 100, f"{BATCH}=32").told == ()
    (tmp_path / "recipe.yaml").write_text(old)
    assert go_on(tmp_path, 100).recipe.stages["pretrain"].global_batch_size == 32


def test_acts_are_in_the_order_of_telling(tmp_path: Path) -> None:
    """A run that fell back to an earlier checkpoint is told of a moment before."""
    go_on(tmp_path, 0)
    go_on(tmp_path, 7680, f"{BATCH}=32")
    go_on(tmp_path, 5120, f"{END}=4e6")
    assert [act.tokens for act in read_acts(tmp_path)] == [7680, 5120]


@pytest.mark.parametrize(
    "override",
    ["stages.pretrain.schedule.lr=1", "stages.pretrain.schedule={lr: 1}", "model.hidden_size=512", "schedule=wsd_thin"],
)
def test_other_fields_are_refused_by_name(tmp_path: Path, override: str) -> None:
    go_on(tmp_path, 0)
    with pytest.raises(UserError, match="differs from"):
        go_on(tmp_path, 100, override)


def test_a_recorded_field_that_a_group_changes_is_not_named(tmp_path: Path) -> None:
    go_on(tmp_path, 0, "recipe=nemotron_h_8b", "cluster.gpus=6144")
    with pytest.raises(UserError, match=r"phases\.p1\.blend|differs from"):
        go_on(tmp_path, 100, "recipe=nemotron_h_8b", "curriculum=nemotron_h_20t")


def line(tokens: object, field: object, before: object, after: object) -> str:
    return json.dumps({"tokens": tokens, "field": field, "before": before, "after": after})


@pytest.mark.parametrize(
    "text",
    [
        "{", '{"tokens": 1}', "[]", line("x", BATCH, 16, 32), line(-5, BATCH, 16, 32), line(1.5, BATCH, 16, 32),
        line(True, BATCH, 16, 32), line(8, BATCH, 16, "abc"), line(8, BATCH, "abc", 32), line(8, BATCH, 16, None),
        line(8, BATCH, 16, 0), line(8, END, None, "abc"), line(8, BLEND, P3, ["codeio"]), line(8, 3, 16, 32),
        line(8, "run.seed", 1, 2), line(8, "stages.other.global_batch_size", 16, 32),
    ],
)  # fmt: skip
def test_a_damaged_history_is_named(tmp_path: Path, text: str) -> None:
    go_on(tmp_path, 0)
    (tmp_path / HISTORY).write_text(text)
    with pytest.raises(UserError, match=f"{HISTORY}: damaged"):
        go_on(tmp_path, 100)
