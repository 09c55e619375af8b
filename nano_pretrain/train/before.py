"""What can be refused or answered before a rank starts; imports no torch."""

from __future__ import annotations

import json
from collections.abc import Sequence
from itertools import takewhile
from pathlib import Path

from tokenizers import Tokenizer

from nano_pretrain.checkpoint.manifest import newest_manifest, newest_tokens
from nano_pretrain.data.curriculum import Curriculum
from nano_pretrain.data.shards import MANIFEST_NAME, Corpus, open_corpus
from nano_pretrain.data.stage_plan import StagePlan
from nano_pretrain.evaluate.prompts import check_lengths
from nano_pretrain.platform.preflight import check_dependencies
from nano_pretrain.recipe.acts import continuation, undone
from nano_pretrain.recipe.derived import stage_layout
from nano_pretrain.recipe.errors import EXIT_DONE, RecipeError, UserError
from nano_pretrain.recipe.rules import check
from nano_pretrain.recipe.rules_layout import layout_field
from nano_pretrain.recipe.rules_ranks import check_ranks
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
    if newest_tokens(directory) is not None and not (directory / "recipe.yaml").exists():
        raise UserError(f"{directory}: has checkpoints and no recipe.yaml; bring it back or choose another run.name")
    going_on = continuation(recipe, overrides, directory, newest_tokens(directory) or 0)
    recipe = going_on.recipe
    check(recipe)
    check_dependencies(recipe)
    corpus = open_corpus(Path(recipe.data.path))
    _check_corpus(recipe, directory, corpus)
    if first_rank:
        check_not_held(directory)
    if going_on.told:
        known = Curriculum(undone(recipe, going_on.told), corpus.sizes, going_on.acts)
        for act in going_on.told:
            check_act(act, known)
    curriculum = Curriculum(recipe, corpus.sizes, (*going_on.acts, *going_on.told))
    for source in curriculum.sources:
        corpus.held_out(source)
    return curriculum


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
    manifest = newest_manifest(directory)
    if manifest is not None and manifest.corpus != corpus.fingerprint:
        raise UserError(
            f"data.path: the shards in {corpus.path} are not those that the run in {directory} was trained on; "
            "restore them or choose another run.name"
        )


def check_started_ranks(recipe: Recipe, directory: Path, curriculum: Curriculum, world_size: int) -> None:
    """Check the number of ranks that somebody has started against the stages that they will train.

    Raises:
        RecipeError: the layout or the batch does not fit them.
    """
    following = curriculum.stages[curriculum.stages.index(next_stage(directory, curriculum)) :]
    build = stage_build(recipe, following[0].config)
    for stage in takewhile(lambda stage: stage_build(recipe, stage.config) == build, following):
        field, prefix = f"stages.{stage.name}", layout_field(stage.name, stage.config)
        layout = stage_layout(recipe, stage.config)
        data_parallel = check_ranks(field, prefix, stage.config, layout, world_size, "started")
        _check_batches(stage, newest_tokens(directory) or 0, data_parallel)


def _check_batches(stage: StagePlan, tokens: int, data_parallel: int) -> None:
    """Where the batch changes, the ranks divide each one that is ahead."""
    together = data_parallel * stage.micro_batch_size
    for size in stage.clock.sizes_from(tokens):
        samples = size // stage.sequence_length
        if samples % together:
            field = f"stages.{stage.name}"
            raise RecipeError(
                f"{field}.batch_ramp" if stage.config.batch_ramp.start else f"{field}.global_batch_size",
                f"{samples} samples of a step are not divisible by {data_parallel} data-parallel ranks x "
                f"micro_batch_size {stage.micro_batch_size}",
                f"start other ranks or write another {field}.micro_batch_size: their product has to divide {samples}",
            )


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
    if recipe.dry_run:
        if speaks:
            print(f"would train {directory} to {curriculum.total_tokens:,} tokens in {curriculum.total_steps:,} steps")
        return EXIT_DONE
    done = newest_tokens(directory)
    if done is None or done < curriculum.total_tokens or not _ended_well(directory):
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
