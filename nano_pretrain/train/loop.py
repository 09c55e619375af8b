"""The training loop: one step after another on the token clock, and callbacks between them."""

from __future__ import annotations

import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import TYPE_CHECKING

from nano_pretrain.data.loader import BatchReader
from nano_pretrain.data.stage_plan import StagePlan
from nano_pretrain.parallel.groups import data_parallel_place
from nano_pretrain.recipe.derived import stage_ranks, stage_tokens
from nano_pretrain.recipe.errors import UserError
from nano_pretrain.recipe.split import stage_build
from nano_pretrain.schedule.learning_rate import learning_rate
from nano_pretrain.train.session import Callback, Session, StepRecord
from nano_pretrain.train.signals import StopRequest
from nano_pretrain.train.throughput import Throughput

if TYPE_CHECKING:
    from nano_pretrain.train.step import StepResult


@dataclass(frozen=True)
class Ending:
    """Why the loop ended, when not because the run is finished.

    Attributes:
        reason: in words.
        restart: whether other ranks are needed to go on, and nobody asked to stop.
    """

    reason: str
    restart: bool = False


def run_loop(
    session: Session, reader: BatchReader, callbacks: Sequence[Callback], request: StopRequest
) -> Ending | None:
    """Train until the tokens are consumed, a stop is requested, or the next stage needs other ranks or another layout.

    Returns:
        None when the run is finished.
    """
    throughput = Throughput(session)
    with ExitStack() as stack:
        for callback in callbacks:
            callback.on_start(session)
            stack.callback(callback.on_end, session)
        ending: Ending | None = None
        while ending is None and not session.finished:
            record, stop = _step(session, reader, throughput, request)
            ending = _ending(session, stop, request)
            for callback in callbacks:
                callback.on_step(session, record, stopping=ending is not None)
    return ending


def _step(
    session: Session, reader: BatchReader, throughput: Throughput, request: StopRequest
) -> tuple[StepRecord, bool]:
    """One step on the clock; also whether a rank was asked to stop."""
    start = time.perf_counter()
    stage = session.curriculum.stage_at(session.tokens)
    batch = stage.samples_at(session.tokens)
    after = session.tokens + batch * stage.sequence_length
    lr = learning_rate(stage.config.schedule, stage_tokens(stage.config), after - stage.start_tokens)
    result = _optimize(session, reader, stage, batch, lr, request)
    phase = session.curriculum.phase_at(session.tokens)
    session.tokens = after
    session.step += 1
    speed, mfu = throughput.measure(stage, batch, time.perf_counter() - start)
    record = StepRecord(
        session.step, session.tokens, result.loss, lr, result.grad_norm, speed, mfu,
        stage.name, phase, stage.sequence_length, batch,
    )  # fmt: skip
    return record, result.stop


def _optimize(
    session: Session, reader: BatchReader, stage: StagePlan, batch: int, lr: float, request: StopRequest
) -> StepResult:
    ranks = data_parallel_place()[1]
    if batch % (ranks * stage.micro_batch_size):
        raise UserError(
            f"cluster.gpus: {batch} samples of a step after {session.tokens:,} tokens are not divisible by {ranks} "
            f"data-parallel ranks x micro_batch_size {stage.micro_batch_size}; start as many ranks as before"
        )
    return session.trainable.step(
        reader.micro_batches(session.tokens),
        batch // (ranks * stage.micro_batch_size),
        (stage.sequence_length, stage.micro_batch_size),
        lr,
        request.signal_name is not None,
    )


def _ending(session: Session, stop: bool, request: StopRequest) -> Ending | None:
    if session.finished:
        return None
    if stop:
        return Ending(f"stopped by {request.signal_name or 'a signal on another rank'}")
    current, following = (session.curriculum.stage_at(tokens) for tokens in (session.tokens - 1, session.tokens))
    if following is not current and stage_build(session.recipe, following.config) != stage_build(
        session.recipe, current.config
    ):
        ranks = stage_ranks(session.recipe, following.config)
        return Ending(
            f"stage {following.name} needs {ranks} rank{'s' * (ranks > 1)}, built for its layout", restart=True
        )
    return None
