"""What can be refused or answered before a rank starts; imports no torch."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from itertools import takewhile
from pathlib import Path

from tokenizers import Tokenizer

from nano_pretrain.checkpoint.corpus import check_order, check_run_corpus
from nano_pretrain.checkpoint.manifest import check_history, newest_tokens, unfinished_import
from nano_pretrain.data.curriculum import Curriculum
from nano_pretrain.data.long_text import long_text
from nano_pretrain.data.repeats import repetitions
from nano_pretrain.data.shards import MANIFEST_NAME, Corpus, open_corpus
from nano_pretrain.data.stage_plan import StagePlan
from nano_pretrain.evaluate.harness_tasks import check_at_stage_ends
from nano_pretrain.evaluate.prompts import check_lengths
from nano_pretrain.evaluate.windows import check_held_out, sources_read
from nano_pretrain.platform.preflight import check_dependencies
from nano_pretrain.recipe.acts import continuation, undone
from nano_pretrain.recipe.errors import EXIT_DONE, UserError
from nano_pretrain.recipe.rules import check
from nano_pretrain.recipe.rules_ranks import check_batches
from nano_pretrain.recipe.schema import Recipe
from nano_pretrain.recipe.split import stage_build
from nano_pretrain.train.directory import check_not_held
from nano_pretrain.train.told import check_act


def check_before(recipe: Recipe, overrides: Sequence[str], directory: Path, first_rank: bool) -> Curriculum:
    """Refuse what cannot go well; writes nothing.

    Args:
        recipe: as the command composes it.
        overrides: of the command.
        directory: directory of the run.
        first_rank: whether this process is the launcher or the first rank, before which nobody holds the directory.

    Returns:
        What the run reads, by the recipe that it goes on with.

    Raises:
        UserError: a dependency is missing, or corpus, recipe and directory do not belong together, or another trainer
            is at work there.
    """
    if unfinished_import(directory):
        raise UserError(f"{directory}: an import into it has not ended; run it again, or remove the directory")
    if newest_tokens(directory) is not None and not (directory / "recipe.yaml").exists():
        raise UserError(f"{directory}: has checkpoints and no recipe.yaml; bring it back or choose another run.name")
    check_history(directory)
    going_on = continuation(recipe, overrides, directory, newest_tokens(directory) or 0)
    recipe = going_on.recipe
    check(recipe)
    check_dependencies(recipe)
    corpus = open_corpus(Path(recipe.data.path))
    _check_corpus(recipe, directory, corpus)
    if first_rank:
        check_not_held(directory)
        check_at_stage_ends(recipe)
    if going_on.told:
        known = Curriculum(undone(recipe, going_on.told), corpus.sizes, going_on.acts)
        for act in going_on.told:
            check_act(act, known)
    curriculum = Curriculum(recipe, corpus.sizes, (*going_on.acts, *going_on.told))
    check_order(directory, curriculum)
    long_text(curriculum, corpus.tokens_by_length)
    for source in curriculum.sources:
        corpus.held_out(source)
    if recipe.evaluate.at_stage_end:
        check_held_out(recipe.evaluate.lengths, corpus, sources_read(recipe))
    for stage in _following(directory, curriculum):
        check_batches(recipe, stage.name, _batches_ahead(stage, directory))
    return curriculum


def _notes(curriculum: Curriculum) -> Iterator[str]:
    """What should be known of the data before anything is spent on it, in the words of `plan`."""
    # Not above: with the words comes matplotlib, which no refusal should wait for.
    from nano_pretrain.plan.data import repetition_notes, short_text_notes

    yield from repetition_notes(repetitions(curriculum), len(curriculum.sources))
    corpus = open_corpus(Path(curriculum.recipe.data.path))
    yield from short_text_notes(long_text(curriculum, corpus.tokens_by_length))


def check_prepared_corpus(recipe: Recipe, directory: Path) -> None:
    """Refuse the corpus as `check_before` does, if one is prepared at `data.path`.

    Raises:
        UserError: it is damaged, or corpus, recipe and directory do not belong together.
    """
    path = Path(recipe.data.path)
    if (path / MANIFEST_NAME).exists():
        _check_corpus(recipe, directory, open_corpus(path))


def _check_corpus(recipe: Recipe, directory: Path, corpus: Corpus) -> None:
    if corpus.vocab_size > recipe.model.vocab_size:
        raise UserError(
            f"model.vocab_size: {recipe.model.vocab_size} is smaller than the {corpus.vocab_size} entries of "
            f"{corpus.tokenizer_file}; write model.vocab_size={corpus.vocab_size}"
        )
    if recipe.evaluate.lengths and recipe.evaluate.at_stage_end:
        check_lengths(recipe.evaluate, Tokenizer.from_file(str(corpus.tokenizer_file)))
    check_run_corpus(directory, corpus)


def check_started_ranks(recipe: Recipe, directory: Path, curriculum: Curriculum, world_size: int) -> None:
    """Check the number of ranks that somebody has started against the stages that they will train.

    Raises:
        RecipeError: the layout or the batch does not fit them.
    """
    following = _following(directory, curriculum)
    build = stage_build(recipe, following[0].config)
    for stage in takewhile(lambda stage: stage_build(recipe, stage.config) == build, following):
        check_batches(recipe, stage.name, _batches_ahead(stage, directory), world_size)


def _following(directory: Path, curriculum: Curriculum) -> Sequence[StagePlan]:
    """The stage that the run goes on with, and those after it."""
    return curriculum.stages[curriculum.stages.index(next_stage(directory, curriculum)) :]


def _batches_ahead(stage: StagePlan, directory: Path) -> list[int]:
    """Samples of the steps that the run has before it in a stage, each number that there is."""
    return [size // stage.sequence_length for size in stage.clock.sizes_from(newest_tokens(directory) or 0)]


def next_stage(directory: Path, curriculum: Curriculum) -> StagePlan:
    """The stage that the run goes on with; the last one if it is finished."""
    return curriculum.stage_at(min(newest_tokens(directory) or 0, curriculum.total_tokens - 1))


def answer(recipe: Recipe, directory: Path, curriculum: Curriculum, speaks: bool) -> int | None:
    """The exit code where nothing is left to do: a dry run, or a run that is finished, whose report is rendered again.

    Args:
        recipe: the recipe.
        directory: directory of the run.
        curriculum: what the run reads.
        speaks: whether this process prints.
    """
    done = newest_tokens(directory)
    finished = done is not None and done >= curriculum.total_tokens and _ended_well(directory)
    if speaks and not finished:
        for note in _notes(curriculum):
            print(note, flush=True)
    if recipe.dry_run:
        if speaks:
            print(f"would train {directory} to {curriculum.total_tokens:,} tokens in {curriculum.total_steps:,} steps")
        return EXIT_DONE
    if not finished:
        return None
    if speaks:
        from nano_pretrain.report import render_report

        print(f"{directory}: already finished at {done:,} tokens; report: {render_report(directory)}")
    return EXIT_DONE


def _ended_well(directory: Path) -> bool:
    """Whether the last process of the run also wrote what follows the last checkpoint."""
    try:
        return bool(json.loads((directory / "exit.json").read_text())["code"] == EXIT_DONE)
    except (OSError, ValueError, KeyError, TypeError):
        return False


def asks_for_restart(directory: Path) -> bool:
    """Whether the last process of a run ended for other ranks to go on, and not because it was stopped."""
    try:
        return bool(json.loads((directory / "exit.json").read_text())["restart"])
    except (OSError, ValueError, KeyError, TypeError):
        return False
