"""One training process from its start to its exit code."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import replace
from functools import cache
from itertools import chain, takewhile
from pathlib import Path
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist

from nano_pretrain.checkpoint.corpus import added_since
from nano_pretrain.checkpoint.files import write_json, write_whole
from nano_pretrain.checkpoint.sharded import load_newest
from nano_pretrain.data.curriculum import Curriculum
from nano_pretrain.data.ledger import ledger
from nano_pretrain.data.loader import BatchReader
from nano_pretrain.data.shards import open_corpus
from nano_pretrain.data.stage_plan import StagePlan
from nano_pretrain.evaluate.heldout import HeldOut
from nano_pretrain.evaluate.length import LengthSuite, Subject
from nano_pretrain.evaluate.room import without_room_at_stage_ends
from nano_pretrain.parallel.groups import (
    Ranks,
    context_parallel_place,
    data_parallel_place,
    process_groups,
    ranks_from_environment,
)
from nano_pretrain.plan.room import without_room
from nano_pretrain.platform import Platform, current_platform
from nano_pretrain.platform.cuda_limits import check_cuda
from nano_pretrain.platform.process import children_end_with_this_process
from nano_pretrain.recipe.acts import HISTORY, Act, read_acts, written
from nano_pretrain.recipe.derived import stage_layout
from nano_pretrain.recipe.describe import as_written
from nano_pretrain.recipe.errors import EXIT_CONTINUE, EXIT_DONE
from nano_pretrain.recipe.load import to_yaml
from nano_pretrain.recipe.schema import ParallelConfig, Recipe
from nano_pretrain.recipe.split import stage_build
from nano_pretrain.train.before import next_stage
from nano_pretrain.train.callbacks import (
    Checkpoints,
    Lines,
    Metrics,
    Quantisation,
    StageEndEvaluation,
    StopIfNotFinite,
    Validation,
)
from nano_pretrain.train.directory import full_disk_is_the_users_to_mend, only_trainer, truncate_streams
from nano_pretrain.train.environment import check_same_kernels, environment, recorded_kernels, same_kernels
from nano_pretrain.train.exit_file import ExitFile
from nano_pretrain.train.loggers import ProgressBar, TensorBoard, Wandb
from nano_pretrain.train.loop import run_loop
from nano_pretrain.train.profiler import Profiler
from nano_pretrain.train.session import Callback, Session
from nano_pretrain.train.signals import StopRequest

if TYPE_CHECKING:
    from nano_pretrain.train.step import Trainable


def train(recipe: Recipe, acts: Sequence[Act], directory: Path, request: StopRequest) -> int:
    """Train until the run is finished, a stop is requested, or the next stage needs other ranks or another layout.

    Args:
        recipe: checked recipe.
        acts: what the run was told in mid-run.
        directory: directory of the run.
        request: whether to stop; its handlers are installed.

    Returns:
        The process's exit code, the same on all ranks.

    Raises:
        UserError: the directory is held, the corpus is another, the ranks do not fit, or the disk is full.
    """
    children_end_with_this_process()
    ranks = ranks_from_environment()
    with ExitStack() as stack:
        if ranks.is_first:
            stack.enter_context(only_trainer(directory))
        ending = stack.enter_context(ExitFile(directory, ranks))
        stack.enter_context(full_disk_is_the_users_to_mend())
        ending.set(*_train(recipe, acts, directory, ranks, request, ending))
        if ending.code == EXIT_DONE and ranks.is_first:
            _draw_samples(recipe, directory)
            ending.write()
            print(f"report: {_report(directory)}", flush=True)
    return ending.code


def _draw_samples(recipe: Recipe, directory: Path) -> None:
    """Continue the recipe's prompts with the last checkpoint."""
    from nano_pretrain.evaluate.generate import generate, record_samples

    prompts = recipe.validation.prompts
    if prompts:
        options = replace(recipe.generate, checkpoint=None)
        texts = generate(recipe, options, directory, prompts)
        record_samples(directory, options, prompts, texts)
        print("".join(f"\n--- sample ---\n{text}\n" for text in texts), flush=True)


def _report(directory: Path) -> Path:
    from nano_pretrain.report import render_report

    return render_report(directory)


def _train(
    recipe: Recipe, acts: Sequence[Act], directory: Path, ranks: Ranks, request: StopRequest, ending: ExitFile
) -> tuple[int, str, bool]:
    """Exit code, reason, and whether other ranks are needed to go on."""
    platform = current_platform()
    if platform.name == "cuda":
        from nano_pretrain.platform.cuda import cuda_facts

        check_cuda(recipe, cuda_facts(ranks.local_rank))
    corpus = open_corpus(Path(recipe.data.path))
    curriculum = Curriculum(recipe, corpus.sizes, acts)
    stage = next_stage(directory, curriculum)
    layout = stage_layout(recipe, stage.config)
    # Before kernels are compiled and the model is built: a machine whose memory is full kills without a word.
    _check_room(recipe, platform, ranks, curriculum.stages[curriculum.stages.index(stage) :])
    device = platform.prepare(ranks.local_rank, recipe.cluster.threads_per_rank, recipe.cluster.cpu_kernels)
    with process_groups(platform, ranks, layout, recipe.cluster.timeout_seconds):
        check_same_kernels(platform, ranks)
        trainable = _build(recipe, platform, layout=layout, length=stage.sequence_length)
        session = Session(recipe, directory, ranks, platform, corpus, curriculum, layout, trainable)
        ending.session = session
        _resume(session)
        before = curriculum.stage_at(min(session.tokens, curriculum.total_tokens - 1))
        if stage_build(recipe, before.config) != stage_build(recipe, stage.config):
            reason = "the newest checkpoint was damaged, and the one before belongs to a stage on other ranks"
            return EXIT_CONTINUE, reason, True
        reset = recipe.data.document_boundaries == "reset"
        reader = BatchReader(corpus, curriculum, data_parallel_place(), reset, device, context_parallel_place())
        heldout = _heldout(session, reset, device)
        stopped = run_loop(session, reader, _callbacks(session, heldout), request)
        if stopped is not None:
            if ranks.is_first:
                go_on = "start so many, as `launch` does by itself" if stopped.restart else "run again to continue"
                print(f"{directory}: {stopped.reason}; checkpoint at {session.tokens:,} tokens, {go_on}", flush=True)
            # A signal that came while the last callbacks were at work is a stop as well.
            return EXIT_CONTINUE, stopped.reason, stopped.restart and request.signal_name is None
        _finish(session, heldout)
    return EXIT_DONE, "finished", False


def _check_room(recipe: Recipe, platform: Platform, ranks: Ranks, stages: Sequence[StagePlan]) -> None:
    """Refuse what this machine's memory cannot hold of what these ranks train: stages up to other ranks.

    On a GPU, for which the memory model was never compared with measurements, it is only said.

    Args:
        recipe: the recipe.
        platform: where it runs.
        ranks: this process in the world, which may be another than the recipe's.
        stages: the stage that is next, and those after it.

    Raises:
        RecipeError: in the words of `plan`.
    """
    build = stage_build(recipe, stages[0].config)
    trained = takewhile(lambda stage: stage_build(recipe, stage.config) == build, stages)
    here = {stage.name: replace(stage.config, gpus=ranks.world_size) for stage in trained}
    trained_here, memory = replace(recipe, stages=here), platform.memory(ranks.local_rank)
    training = without_room(trained_here, here, platform.name, memory)
    for refusal in chain(training, without_room_at_stage_ends(trained_here, platform.name, memory)):
        if platform.name == "cpu":
            raise refusal
        if ranks.is_first:
            print(f"likely out of memory: {refusal}", file=sys.stderr, flush=True)


def _build(recipe: Recipe, platform: Platform, layout: ParallelConfig, length: int) -> Trainable:
    # Imported here: what derives from megatron-core's classes comes after the platform has prepared it.
    from nano_pretrain.model.hybrid import build_model
    from nano_pretrain.train.step import Trainable

    return Trainable(recipe, layout, platform, build_model(recipe, layout, platform, length))


def _resume(session: Session) -> None:
    """Load the newest checkpoint, if there is one, and take the run's files back to it."""
    trainable = session.trainable
    with session.platform.optimizer_scope():
        manifest = load_newest(session.directory, trainable.model, trainable.optimizer)
    if manifest is not None:
        session.tokens, session.step = manifest.tokens, manifest.step
    description = environment(session)
    if session.ranks.is_first:
        before, now = recorded_kernels(session.directory), session.platform.kernels()
        if manifest is not None and before is not None and not same_kernels(before, now):
            print(f"{session.directory}: so far with kernels: {before}; losses now differ by rounding", flush=True)
        if manifest is not None and (more := added_since(manifest, session.corpus)):
            print(f"{session.directory}: more training tokens than at {manifest.tokens:,}: {more}", flush=True)
        truncate_streams(session.directory, session.tokens if manifest else -1)
        write_json(session.directory / "ledger.json", ledger(session.curriculum, session.tokens))
        _record_acts(session)
        write_whole(session.directory / "recipe.yaml", to_yaml(session.recipe))
        write_json(session.directory / "environment.json", description)
    dist.barrier()


def _record_acts(session: Session) -> None:
    """Before recipe.yaml, in which they are done."""
    acts = session.curriculum.acts
    for act in acts[len(read_acts(session.directory)) :]:
        print(f"{session.directory}: {act.field} is {as_written(act.after)} from {act.tokens:,} tokens on", flush=True)
    if acts:
        write_whole(session.directory / HISTORY, written(acts))


def _heldout(session: Session, reset: bool, device: torch.device) -> Callable[[], HeldOut]:
    """What gives the held-out samples of the stage of the last step, weighted by what the run reads of each source."""
    totals = ledger(session.curriculum, session.curriculum.total_tokens)["sources"]
    weights = {name: float(total["tokens"]) for name, total in totals.items()}
    tokens = session.recipe.validation.tokens_per_source

    @cache
    def of_shape(length: int, width: int) -> HeldOut:
        return HeldOut(session.corpus, weights, length, width, tokens, reset, device)

    def now() -> HeldOut:
        stage = session.curriculum.stage_at(max(session.tokens - 1, 0))
        return of_shape(stage.sequence_length, stage.micro_batch_size)

    return now


def _callbacks(session: Session, heldout: Callable[[], HeldOut]) -> list[Callback]:
    """In the order in which they are called; what may be lost by a kill comes before the checkpoint that covers it.

    What FP8 lost comes before the stop at a step that is not finite, and may say where that began.
    """
    recipe = session.recipe
    callbacks: list[Callback] = []
    if (losses := session.trainable.model.quantisation_losses) and recipe.log.fp8_every:
        callbacks.append(Quantisation(losses, recipe.log.fp8_every))
    callbacks += [StopIfNotFinite(), Metrics(), Validation(heldout, recipe.validation.every)]
    if session.ranks.is_first:
        callbacks.append(ProgressBar(session.curriculum.total_tokens, recipe.log.every))
        if recipe.log.tensorboard:
            callbacks.append(TensorBoard(recipe.log.every))
        if recipe.log.wandb != "disabled":
            callbacks.append(Wandb(recipe.log.wandb, recipe.log.wandb_project, recipe.log.every))
    callbacks.append(Checkpoints())
    if recipe.evaluate.at_stage_end:
        callbacks += _evaluations(session)
    if recipe.log.profile:
        first, last = recipe.log.profile
        callbacks.append(Profiler(first, last))
    return callbacks


def _evaluations(session: Session) -> Iterator[StageEndEvaluation]:
    recipe, options = session.recipe, session.recipe.evaluate
    if options.lengths:
        length = LengthSuite(options, recipe, session.corpus)

        def by_length(subject: Subject, stage: StagePlan, there: Lines) -> Lines:
            return length.evaluate(subject, length.shapes(session.layout, stage.config), there)

        yield StageEndEvaluation("evaluation.jsonl", by_length)
    if options.harness_tasks:
        from nano_pretrain.evaluate.harness_suite import HarnessSuite

        harness = HarnessSuite(options, recipe, session.corpus, session.ranks.is_first)

        def by_tasks(subject: Subject, stage: StagePlan, there: Lines) -> Lines:
            model = session.trainable.model
            return harness.evaluate(subject, model, session.layout, stage.config, session.tokens, there)

        yield StageEndEvaluation("harness.jsonl", by_tasks)


def _finish(session: Session, heldout: Callable[[], HeldOut]) -> None:
    """What is left when the last checkpoint is written."""
    if session.ranks.is_first and session.recipe.validation.baselines:
        from nano_pretrain.evaluate.baselines import MAX_TOKENS, ngram_baselines

        if session.curriculum.total_tokens <= MAX_TOKENS:
            write_json(
                session.directory / "baselines.json", ngram_baselines(session.corpus, session.curriculum, heldout())
            )
    dist.barrier()
