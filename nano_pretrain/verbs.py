"""What each verb does, behind the command line; torch is imported only by those that need it."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

from nano_pretrain.recipe.derived import stage_layout, stage_ranks
from nano_pretrain.recipe.errors import EXIT_CONTINUE, EXIT_DONE, UserError
from nano_pretrain.recipe.load import check_same_run, recorded_recipe
from nano_pretrain.recipe.rules import check_ranks
from nano_pretrain.recipe.schema import Recipe


def run_directory(recipe: Recipe) -> Path:
    """Where the run lives."""
    assert recipe.run.name is not None
    return Path(recipe.run.dir) / recipe.run.name


def prepare(recipe: Recipe, overrides: list[str]) -> int:
    """Corpus to shards."""
    from nano_pretrain.prepare.run import prepare as prepare_corpus

    if recipe.dry_run:
        print(f"would prepare corpus {recipe.data.corpus} in {recipe.data.path}")
        return EXIT_DONE
    prepare_corpus(recipe)
    return EXIT_DONE


def train(recipe: Recipe, overrides: list[str]) -> int:
    """The run on this process's ranks."""
    from nano_pretrain.launch.parent import die_with_parent

    die_with_parent()
    directory = run_directory(recipe)
    world_size = int(os.environ.get("WORLD_SIZE", "1"))
    if (code := _before_training(recipe, directory, int(os.environ.get("RANK", "0")) == 0, world_size)) is not None:
        return code
    from nano_pretrain.train.run import train as run_training

    return run_training(recipe, directory)


def launch(recipe: Recipe, overrides: list[str]) -> int:
    """All ranks of the stage that is next, stage after stage."""
    directory = run_directory(recipe)
    if (code := _before_training(recipe, directory, True)) is not None:
        return code
    from nano_pretrain.checkpoint.manifest import newest_tokens
    from nano_pretrain.data.curriculum import Curriculum
    from nano_pretrain.data.shards import open_corpus
    from nano_pretrain.launch.local import launch_local

    corpus = open_corpus(Path(recipe.data.path))
    curriculum = Curriculum(recipe, {name: stream.tokens for name, stream in corpus.train.items()})
    command = [sys.executable, "-m", "nano_pretrain", "train", *overrides, f"run.name='{recipe.run.name}'"]
    while True:
        before = newest_tokens(directory) or 0
        stage = curriculum.stage_at(min(before, curriculum.total_tokens - 1))
        code = launch_local(
            command,
            ranks=stage_ranks(recipe, stage.config),
            grace_seconds=recipe.launch.grace_seconds,
            log_dir=directory / "logs",
            threads_per_rank=recipe.cluster.threads_per_rank,
            environment={},
        )
        after = newest_tokens(directory) or 0
        if code != EXIT_CONTINUE or after >= curriculum.total_tokens or curriculum.stage_at(after) is stage:
            return code


def generate(recipe: Recipe, overrides: list[str]) -> int:
    """Continue a prompt."""
    directory = run_directory(recipe)
    trained = recorded_recipe(directory)
    from nano_pretrain.evaluate.generate import generate as generate_text

    print(generate_text(trained, recipe.generate, directory, [recipe.generate.prompt])[0])
    return EXIT_DONE


def report(recipe: Recipe, overrides: list[str]) -> int:
    """Render the report of a run."""
    directory = run_directory(recipe)
    recorded_recipe(directory)
    from nano_pretrain.report import render_report

    print(f"report: {render_report(directory)}")
    return EXIT_DONE


def _before_training(recipe: Recipe, directory: Path, speaks: bool, world_size: int | None = None) -> int | None:
    """Everything that can be refused or answered without torch.

    Args:
        recipe: the recipe.
        directory: directory of the run.
        speaks: whether this process prints.
        world_size: ranks there are, or None where they are still to be started.

    Returns:
        The exit code where nothing is left to do, else None.

    Raises:
        UserError: something is wrong; nothing was written.
    """
    from nano_pretrain.checkpoint.manifest import newest_tokens
    from nano_pretrain.data.curriculum import Curriculum
    from nano_pretrain.data.shards import open_corpus
    from nano_pretrain.platform.preflight import check_dependencies

    check_same_run(recipe, directory)
    check_dependencies(recipe)
    corpus = open_corpus(Path(recipe.data.path))
    if corpus.vocab_size > recipe.model.vocab_size:
        raise UserError(
            f"model.vocab_size: {recipe.model.vocab_size} is smaller than the {corpus.vocab_size} entries of "
            f"{corpus.tokenizer_file}; write model.vocab_size={corpus.vocab_size}"
        )
    curriculum = Curriculum(recipe, {name: stream.tokens for name, stream in corpus.train.items()})
    done = newest_tokens(directory)
    if recipe.dry_run:
        print(f"would train {directory} to {curriculum.total_tokens:,} tokens in {curriculum.total_steps:,} steps")
        return EXIT_DONE
    if done is not None and done >= curriculum.total_tokens and _ended_well(directory):
        if speaks:
            from nano_pretrain.report import render_report

            print(f"{directory}: already finished at {done:,} tokens; report: {render_report(directory)}")
        return EXIT_DONE
    if world_size is not None:
        stage = curriculum.stage_at(min(done or 0, curriculum.total_tokens - 1))
        prefix = f"stages.{stage.name}.parallel" if stage.config.parallel else "parallel"
        check_ranks(
            f"stages.{stage.name}", prefix, stage.config, stage_layout(recipe, stage.config), world_size, "started"
        )
    return None


def _ended_well(directory: Path) -> bool:
    """Whether the last process of the run also wrote what follows the last checkpoint."""
    try:
        return bool(json.loads((directory / "exit.json").read_text())["code"] == EXIT_DONE)
    except (OSError, ValueError, KeyError, TypeError):
        return False
