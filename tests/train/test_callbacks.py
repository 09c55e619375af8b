"""What is owed at the end of a stage or a run is made up for at the next start, and nothing is written twice."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import replace
from math import inf, nan
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from nano_pretrain.checkpoint.files import append_line
from nano_pretrain.data.shards import open_corpus
from nano_pretrain.evaluate.harness_suite import HarnessSuite
from nano_pretrain.evaluate.length import LengthSuite, Subject
from nano_pretrain.parallel.groups import Ranks
from nano_pretrain.precision.linear import BLOCKWISE
from nano_pretrain.precision.losses import QuantisationLosses
from nano_pretrain.recipe.schema import EvaluateConfig
from nano_pretrain.train import callbacks
from nano_pretrain.train.callbacks import Metrics, NotFiniteError, StageEndEvaluation, Validation
from nano_pretrain.train.run import _callbacks
from nano_pretrain.train.session import Callback, StepRecord
from tests.corpora import write_corpus
from tests.evaluate.local_tasks import write_tasks
from tests.model.recipes import small_recipe
from tests.train.small_run import lines

TOKENS = 7680


def session(directory: Path, step: int, finished: bool = False) -> Any:
    """At a step border that is the end of a stage; its model is never asked."""
    model = torch.nn.Linear(1, 1)
    return SimpleNamespace(
        directory=directory,
        step=step,
        tokens=step * 512,
        finished=finished,
        at_stage_end=True,
        recipe=small_recipe(),
        layout=small_recipe().parallel,
        platform=SimpleNamespace(name="cpu"),
        ranks=Ranks(0, 1, 0),
        corpus=SimpleNamespace(eod_id=0),
        curriculum=SimpleNamespace(stage_at=lambda tokens: SimpleNamespace(name="pretrain")),
        trainable=SimpleNamespace(model=model, wrapped=model, run=None, gather_parameters=lambda: None),
    )


@pytest.mark.parametrize(("step", "finished", "evaluated"), [(0, False, True), (15, True, True), (15, False, False)])
def test_validation_of_the_first_and_last_weights_is_made_up_for(
    tmp_path: Path, step: int, finished: bool, evaluated: bool
) -> None:
    """A run may be told to end at its newest checkpoint, where no validation was due."""
    heldout: Any = SimpleNamespace(evaluate=lambda run: {"blend": {"bits_per_byte": 4.2}})
    validation = Validation(lambda: heldout, every=100)
    for _ in range(2):
        validation.on_start(session(tmp_path, step, finished))
        expected = [{"step": step, "tokens": step * 512, "blend": {"bits_per_byte": 4.2}}]
        assert lines(tmp_path / "validation.jsonl") == expected * evaluated


FINE = StepRecord(1, 512, 4.0, 1e-3, 1.0, 100.0, None, "pretrain", "p1", 128, 4)


def quantising(directory: Path, every: int) -> tuple[list[Callback], QuantisationLosses, Any]:
    """The callbacks of a run with an FP8 linear, which has been used once, up to the one that writes metrics.jsonl."""
    losses, at = QuantisationLosses(["layers.0.mlp.linear_fc1"]), session(directory, 0)
    at.trainable.model.quantisation_losses = losses
    at.recipe.log.fp8_every, at.recipe.evaluate = every, EvaluateConfig(lengths=[])
    at.curriculum.total_tokens = TOKENS
    all_of_them = _callbacks(at, lambda: pytest.fail("nothing is evaluated"))
    upto = next(number for number, callback in enumerate(all_of_them) if isinstance(callback, Metrics))
    return all_of_them[: upto + 1], losses, at


def use(losses: QuantisationLosses, gradient: float = 1.0) -> None:
    if losses.counting:
        losses.add(0, BLOCKWISE, torch.ones(4, 2), torch.ones(3, 2), torch.full((4, 3), gradient))


def step(callbacks_: list[Callback], at: Any, record: StepRecord) -> None:
    """As the loop."""
    for callback in callbacks_:
        callback.on_step(at, record, stopping=False)


@pytest.mark.usefixtures("platform")
@pytest.mark.parametrize(("start", "every", "counted"), [(0, 3, [1, 3, 6]), (0, 100, [1]), (2, 3, [3, 6]), (0, 0, [])])
def test_quantisation_is_counted_in_the_runs_first_step_and_by_the_steps_number(
    tmp_path: Path, start: int, every: int, counted: list[int]
) -> None:
    """Whatever step a process begins with."""
    callbacks_, losses, at = quantising(tmp_path, every)
    at.step = start
    for callback in callbacks_:
        callback.on_start(at)
    for number in range(start + 1, 8):
        use(losses)
        step(callbacks_, at, replace(FINE, step=number, tokens=number * 512))
    assert [(line["step"], line["tokens"]) for line in lines(tmp_path / "fp8.jsonl")] == [(n, n * 512) for n in counted]


@pytest.mark.usefixtures("platform")
@pytest.mark.parametrize(
    "spoilt",
    [replace(FINE, loss=nan), replace(FINE, loss=inf), replace(FINE, grad_norm=nan), replace(FINE, grad_norm=inf)],
)
def test_a_step_that_is_not_finite_says_where_fp8_met_it_before_the_run_ends(
    tmp_path: Path, spoilt: StepRecord, capsys: pytest.CaptureFixture[str]
) -> None:
    callbacks_, losses, at = quantising(tmp_path, every=100)
    callbacks_[0].on_start(at)
    use(losses, gradient=nan)
    with pytest.raises(NotFiniteError, match=r"^step 1: loss .*, gradient norm .*lower learning rate$"):
        step(callbacks_, at, spoilt)
    (line,) = lines(tmp_path / "fp8.jsonl")
    assert line["not_finite"] == ["gradient of layers.0.mlp.linear_fc1"]
    assert capsys.readouterr().out == (
        "step 1: infinite (made finite by FP8) or NaN: gradient of layers.0.mlp.linear_fc1\n"
    )
    assert not (tmp_path / "metrics.jsonl").exists()


class KilledError(Exception):
    """Between two lines."""


@pytest.fixture
def suite(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> LengthSuite:
    """Of two lengths, with scores that need no model."""
    corpus = open_corpus(write_corpus(tmp_path / "corpus"))
    options = EvaluateConfig(lengths=[300, 400], tasks=["niah_single"], examples=2)
    monkeypatch.setattr(LengthSuite, "_score", lambda *_: {"rank": {"score": 1.0}})
    monkeypatch.setattr("nano_pretrain.evaluate.length.LossByPosition.evaluate", lambda *_: {"loss": 1.0})
    return LengthSuite(options, small_recipe(), corpus)


def at_end(suite: LengthSuite) -> StageEndEvaluation:
    def evaluate(subject: Subject, stage: Any, there: callbacks.Lines) -> callbacks.Lines:
        return suite.evaluate(subject, [(300, 1), (400, 1)], there)

    return StageEndEvaluation("evaluation.jsonl", evaluate)


def test_lengths_that_a_kill_left_out_are_evaluated_and_no_other(
    suite: LengthSuite, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def killed(path: Path, line: dict[str, Any]) -> None:
        append_line(path, line)
        raise KilledError

    monkeypatch.setattr(callbacks, "append_line", killed)
    with suppress(KilledError):
        at_end(suite).on_start(session(tmp_path, 15))
    assert [line["length"] for line in lines(tmp_path / "evaluation.jsonl")] == [300]
    monkeypatch.setattr(callbacks, "append_line", append_line)
    for _ in range(2):
        at_end(suite).on_start(session(tmp_path, 15))
        found = lines(tmp_path / "evaluation.jsonl")
        assert [(line["tokens"], line["length"]) for line in found] == [(TOKENS, 300), (TOKENS, 400)]


@pytest.mark.parametrize(
    "other", [{"length": 16}, {"examples": 5}, {"seed": 1}, {"precision": "bf16"}, {"retrieval": {}}, {"tokens": 512}]
)
def test_lines_of_other_conditions_do_not_count(suite: LengthSuite, tmp_path: Path, other: dict[str, Any]) -> None:
    """Such as those of the verb `evaluate`."""
    settings = {"tokens": TOKENS, "length": 300, "precision": "fp32", "examples": 2, "seed": 0}
    append_line(tmp_path / "evaluation.jsonl", {**settings, "retrieval": {"niah_single": {}}, **other})
    at_end(suite).on_start(session(tmp_path, 15))
    assert [line["length"] for line in lines(tmp_path / "evaluation.jsonl")][1:] == [300, 400]


def test_tasks_of_the_harness_that_are_missing_are_evaluated_and_no_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe, corpus = small_recipe(), open_corpus(write_corpus(tmp_path / "corpus"))
    tasks = str(write_tasks(tmp_path / "tasks"))
    options = EvaluateConfig(harness_tasks=["choice", "last_word"], harness_path=tasks, harness_limit=5)
    suite = HarnessSuite(options, recipe, corpus, first_rank=True)
    answers = [{"task": name, "examples": 5, "metrics": {}} for name in options.harness_tasks]
    monkeypatch.setattr("nano_pretrain.evaluate.harness.scores", lambda *_: answers)
    monkeypatch.setattr("nano_pretrain.evaluate.harness_suite.Requests", lambda *_: SimpleNamespace(end=lambda: None))
    monkeypatch.setattr("nano_pretrain.evaluate.harness_suite.trained_length", lambda *_: 48)

    def evaluate(*there: dict[str, Any]) -> list[str]:
        subject: Any = None
        found = suite.evaluate(subject, None, recipe.parallel, recipe.stages["pretrain"], TOKENS, there)
        return [line["task"] for line in found]

    choice, last_word = ({"precision": "fp32", **answer} for answer in answers)
    assert evaluate() == evaluate({**choice, "examples": 2}, {**last_word, "precision": "bf16"})
    assert evaluate(choice) == ["last_word"]
    monkeypatch.setattr("nano_pretrain.evaluate.harness.scores", None)
    assert evaluate(choice, last_word) == []
