"""Callbacks that keep the run's files: losses of FP8, metrics, validation, length, checkpoints and ledger."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch.distributed as dist

from nano_pretrain.checkpoint.files import append_line, write_json
from nano_pretrain.checkpoint.sharded import retain, save_checkpoint
from nano_pretrain.data.ledger import ledger
from nano_pretrain.data.stage_plan import StagePlan
from nano_pretrain.evaluate.heldout import HeldOut
from nano_pretrain.evaluate.length import Subject, greedy
from nano_pretrain.evaluate.room import holds_whole_model
from nano_pretrain.precision.losses import Losses, QuantisationLosses, described
from nano_pretrain.recipe.errors import RunError
from nano_pretrain.train.session import Session, StepRecord

Lines = list[dict[str, Any]]


class NotFiniteError(RunError):
    """The loss or the gradient is NaN or infinite; the run ends without a checkpoint of it."""


class StopIfNotFinite:
    """Ends the run where loss or gradient norm are not finite: callbacks after this one never see such a step."""

    def on_start(self, session: Session) -> None:
        """Nothing to look at yet."""

    def on_step(self, session: Session, record: StepRecord, stopping: bool) -> None:
        """Look at the step.

        Raises:
            NotFiniteError: loss or gradient norm is NaN or infinite.
        """
        if not (math.isfinite(record.loss) and math.isfinite(record.grad_norm)):
            raise NotFiniteError(
                f"step {record.step}: loss {record.loss}, gradient norm {record.grad_norm}; "
                "the checkpoints before it are kept; begin another run.name with a lower learning rate"
            )

    def on_end(self, session: Session) -> None:
        """Nothing to look at any more."""


class Metrics:
    """metrics.jsonl: a line a step."""

    def on_start(self, session: Session) -> None:
        """Nothing: the stream was truncated at the checkpoint."""

    def on_step(self, session: Session, record: StepRecord, stopping: bool) -> None:
        """Append the step."""
        if session.ranks.is_first:
            append_line(session.directory / "metrics.jsonl", asdict(record))

    def on_end(self, session: Session) -> None:
        """Nothing left to write."""


class Validation:
    """validation.jsonl: held-out loss per source, every `validation.every` steps and at the end.

    Args:
        heldout: gives what to evaluate, of the stage of the last step.
        every: steps between two evaluations, 0 for the end only.
    """

    def __init__(self, heldout: Callable[[], HeldOut], every: int) -> None:
        self.heldout = heldout
        self.every = every

    def on_start(self, session: Session) -> None:
        """The first evaluation, of the initial weights; the last one, where the run was told to end where it is."""
        here = session.step == 0 or session.finished
        if here and not _lines_at(session.directory / "validation.jsonl", session.tokens):
            self._evaluate(session)

    def on_step(self, session: Session, record: StepRecord, stopping: bool) -> None:
        """Evaluate where the step number asks for it, and at the end of the run."""
        if session.finished or (self.every and session.step % self.every == 0):
            self._evaluate(session)

    def on_end(self, session: Session) -> None:
        """Nothing left to do."""

    def _evaluate(self, session: Session) -> None:
        # Ranks with fewer samples than others gather nothing in their forward passes.
        session.trainable.gather_parameters()
        model = session.trainable.wrapped
        model.eval()
        result = self.heldout().evaluate(session.trainable.run)
        model.train()
        if session.ranks.is_first:
            line = {"step": session.step, "tokens": session.tokens, **result}
            append_line(session.directory / "validation.jsonl", line)


class StageEndEvaluation:
    """Lines of a file, evaluated at the end of each stage, after its checkpoint.

    Args:
        name: of the file in the run's directory.
        evaluate: gives lines from the model and the stage, on all ranks together, but for those of the same conditions
            that the file has of the same tokens.
    """

    def __init__(self, name: str, evaluate: Callable[[Subject, StagePlan, Lines], Lines]) -> None:
        self.name = name
        self.evaluate = evaluate

    def on_start(self, session: Session) -> None:
        """Evaluate what a kill between the checkpoint of a stage's end and the last line has left out."""
        self._evaluate(session)

    def on_step(self, session: Session, record: StepRecord, stopping: bool) -> None:
        """Evaluate after the last step of a stage."""
        self._evaluate(session)

    def on_end(self, session: Session) -> None:
        """Nothing left to do."""

    def _evaluate(self, session: Session) -> None:
        if not session.at_stage_end:
            return
        stage, path = session.curriculum.stage_at(session.tokens - 1), session.directory / self.name
        there = _lines_at(path, session.tokens)
        trainable, corpus = session.trainable, session.corpus
        complete = None
        if holds_whole_model(session.recipe, session.layout, session.platform.name):
            complete = greedy(trainable.model, corpus.eod_id, session.recipe.model.vocab_size)
        subject = Subject(trainable.run, complete, next(trainable.model.parameters()).device)
        trainable.gather_parameters()
        trainable.wrapped.eval()
        lines = self.evaluate(subject, stage, there)
        trainable.wrapped.train()
        if session.ranks.is_first:
            place = {"tokens": session.tokens, "stage": stage.name}
            for line in lines:
                append_line(path, {**place, **line})


def _lines_at(path: Path, tokens: int) -> Lines:
    """The lines there are of so many consumed tokens; every rank reads them before the first rank adds some."""
    lines = map(json.loads, path.read_text().splitlines()) if path.exists() else ()
    return [line for line in lines if line["tokens"] == tokens]


class Quantisation:
    """fp8.jsonl: what quantisation loses in each FP8 linear, in step 1 and every `every`-th, over its whole batch.

    The losses come from all micro-batches and ranks, inputs and gradients along either axis; `worst` is the largest
    relative error of each operand, `not_finite` names those with infinite or NaN values. The first of these, which are
    nearest to the cause, are also said on the terminal.

    Args:
        losses: of the model.
        every: divides the numbers of the steps that count, besides that of the run's first.
    """

    NAMED = 3
    """Operands that the terminal names."""

    def __init__(self, losses: QuantisationLosses, every: int) -> None:
        self.losses = losses
        self.every = every

    def on_start(self, session: Session) -> None:
        """Count in the next step, if it is one of them."""
        self._count_in(session.step + 1)

    def on_step(self, session: Session, record: StepRecord, stopping: bool) -> None:
        """Append what was counted."""
        session.quantisation = {}
        if self.losses.counting:
            self._report(session, record, self.losses.take())
        self._count_in(record.step + 1)

    def on_end(self, session: Session) -> None:
        """Nothing left to write."""

    def _count_in(self, step: int) -> None:
        self.losses.counting = step == 1 or step % self.every == 0

    def _report(self, session: Session, record: StepRecord, losses: Losses) -> None:
        line = described(losses)
        worst = {operand: found["relative_error"] for operand, found in line["worst"].items() if found}
        session.quantisation = {f"worst_relative_error_{operand}": error for operand, error in worst.items()}
        if session.ranks.is_first:
            append_line(session.directory / "fp8.jsonl", {"step": record.step, "tokens": record.tokens, **line})
            if found := line["not_finite"]:
                named = ", ".join(found[: self.NAMED])
                more = f" and {len(found) - self.NAMED} more" if len(found) > self.NAMED else ""
                print(f"step {record.step}: infinite (made finite by FP8) or NaN: {named}{more}", flush=True)


class Checkpoints:
    """A checkpoint every `checkpoint.every` steps, at a stage's end, and before a stop; the ledger goes with it."""

    def on_start(self, session: Session) -> None:
        """Clear what an interrupted writer left."""
        if session.ranks.is_first:
            retain(session.directory, session.recipe.checkpoint.keep)

    def on_step(self, session: Session, record: StepRecord, stopping: bool) -> None:
        """Save where the step number asks for it, at the end of a stage, and when stopping."""
        every = session.recipe.checkpoint.every
        if session.at_stage_end or stopping or (every and session.step % every == 0):
            self._save(session)

    def on_end(self, session: Session) -> None:
        """Nothing left to save."""

    def _save(self, session: Session) -> None:
        session.trainable.gather_parameters()
        with session.platform.optimizer_scope():
            save_checkpoint(
                session.directory,
                session.trainable.model,
                session.trainable.optimizer,
                (session.tokens, session.step),
                session.layout_summary(),
                session.corpus,
                len(session.curriculum.acts),
                session.checkpoint_bytes(),
            )
        if session.ranks.is_first:
            write_json(session.directory / "ledger.json", ledger(session.curriculum, session.tokens))
            retain(session.directory, session.recipe.checkpoint.keep)
        dist.barrier()
