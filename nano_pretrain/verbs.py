"""What each verb does, behind the command line; torch is imported only by those that need it."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

from nano_pretrain.cli import STDOUT
from nano_pretrain.recipe.derived import stage_ranks
from nano_pretrain.recipe.errors import EXIT_CONTINUE, EXIT_DONE, RecipeError, UserError
from nano_pretrain.recipe.load import recorded_recipe
from nano_pretrain.recipe.schema import Recipe


def run_directory(recipe: Recipe) -> Path:
    """Where the run lives."""
    assert recipe.run.name is not None
    return Path(recipe.run.dir) / recipe.run.name


def prepare(recipe: Recipe, overrides: list[str]) -> int:
    """Corpus to shards."""
    from nano_pretrain.prepare.corpus_file import load_corpus_file
    from nano_pretrain.prepare.run import prepare as prepare_corpus

    if recipe.dry_run:
        load_corpus_file(recipe.data.corpus)
        print(f"would prepare corpus {recipe.data.corpus} in {recipe.data.path}")
        return EXIT_DONE
    prepare_corpus(recipe)
    return EXIT_DONE


def plan(recipe: Recipe, overrides: list[str]) -> int:
    """What the recipe means, before anything is spent."""
    from nano_pretrain.plan.answer import answer_plan, answer_search
    from nano_pretrain.train.before import check_prepared_corpus

    directory = run_directory(recipe)
    check_prepared_corpus(recipe, directory)
    if recipe.plan.search:
        answer_search(recipe)
    else:
        answer_plan(recipe, Path(recipe.plan.dir) if recipe.plan.dir else directory)
    return EXIT_DONE


def train(recipe: Recipe, overrides: list[str]) -> int:
    """The run on this process's ranks."""
    from nano_pretrain.launch.parent import LAUNCHER_PID, die_with_parent
    from nano_pretrain.train.signals import StopRequest

    launched = LAUNCHER_PID in os.environ
    die_with_parent()
    request = StopRequest()
    request.listen()
    from nano_pretrain.train.before import answer, check_before, check_started_ranks

    directory = run_directory(recipe)
    rank, world_size = _started_as()
    first = rank == 0
    curriculum = check_before(recipe, overrides, directory, first)
    recipe = curriculum.recipe
    # What there is to say a launcher has said.
    if (code := answer(recipe, directory, curriculum, speaks=first and not launched)) is not None:
        return code
    check_started_ranks(recipe, directory, curriculum, world_size)
    from nano_pretrain.train.run import train as run_training

    return run_training(recipe, curriculum.acts, directory, request)


def _started_as() -> tuple[int, int]:
    """Rank and world size from the environment that a launcher sets; alone: (0, 1)."""
    if "RANK" not in os.environ:
        return 0, 1
    try:
        return int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    except (KeyError, ValueError) as error:
        raise UserError(
            "RANK, WORLD_SIZE: not both whole numbers; unset them, or start the ranks with a launcher"
        ) from error


def launch(recipe: Recipe, overrides: list[str]) -> int:
    """All ranks of the stage that is next, stage after stage."""
    from nano_pretrain.launch.local import launch_local
    from nano_pretrain.train.before import answer, asks_for_restart, check_before, next_stage

    directory = run_directory(recipe)
    curriculum = check_before(recipe, overrides, directory, first_rank=True)
    recipe = curriculum.recipe
    if (code := answer(recipe, directory, curriculum, speaks=True)) is not None:
        return code
    command = [sys.executable, "-m", "nano_pretrain", "train", *overrides, f"run.name='{recipe.run.name}'"]
    while True:
        stage = next_stage(directory, curriculum)
        code = launch_local(
            command,
            ranks=stage_ranks(recipe, stage.config),
            grace_seconds=recipe.launch.grace_seconds,
            log_dir=directory / "logs",
            threads_per_rank=recipe.cluster.threads_per_rank,
            environment={},
        )
        if code != EXIT_CONTINUE or not asks_for_restart(directory):
            return code


def generate(recipe: Recipe, overrides: list[str]) -> int:
    """Continue a prompt."""
    directory = run_directory(recipe)
    trained = recorded_recipe(directory)
    from nano_pretrain.evaluate.generate import generate as generate_text
    from nano_pretrain.evaluate.generate import record_samples

    prompts = [recipe.generate.prompt]
    texts = generate_text(trained, recipe.generate, directory, prompts)
    print(texts[0], flush=True)
    try:
        record_samples(directory, recipe.generate, prompts, texts)
    except OSError as error:
        raise UserError(
            f"run.dir: cannot write {error.filename} ({error.strerror}); the text above is not kept"
        ) from error
    return EXIT_DONE


def evaluate(recipe: Recipe, overrides: list[str]) -> int:
    """Retrieval, loss by position and tasks of lm-evaluation-harness, of a checkpoint."""
    directory = run_directory(recipe)
    trained = recorded_recipe(directory)
    from nano_pretrain.checkpoint.files import append_line
    from nano_pretrain.evaluate.checkpoint import evaluate_checkpoint, show
    from nano_pretrain.plan.tables import new_console

    found = evaluate_checkpoint(trained, recipe.evaluate, directory)
    show(found, new_console())
    try:
        for name, lines in found.items():
            for line in lines:
                append_line(directory / name, line)
    except OSError as error:
        raise UserError(
            f"run.dir: cannot write {error.filename} ({error.strerror}); the tables above are not kept"
        ) from error
    return EXIT_DONE


@contextmanager
def _files_named(target: Path) -> Iterator[None]:
    """Around a conversion: a file that cannot be read or written is the user's to mend.

    Args:
        target: directory that is written, which a full disk does not name.

    Raises:
        UserError: names the file.
    """
    try:
        yield
    except (OSError, RuntimeError) as error:
        # torch.save stumbles over the file that it could not write, and says so instead.
        cause = error.__context__ if isinstance(error, RuntimeError) else error
        if not isinstance(cause, OSError) or cause.filename == STDOUT:
            raise
        raise UserError(
            f"{cause.filename or target}: {cause.strerror or cause}; mend that or choose another place, then run again"
        ) from error


def export(recipe: Recipe, overrides: list[str]) -> int:
    """A native checkpoint to a Hugging Face one."""
    directory = run_directory(recipe)
    trained = recorded_recipe(directory)
    from nano_pretrain.checkpoint.manifest import whole_checkpoint
    from nano_pretrain.convert.export import export as export_checkpoint

    with _files_named(Path(recipe.hf.path) if recipe.hf.path else directory / "hf"):
        checkpoint = whole_checkpoint(directory, recipe.hf.checkpoint, "hf.checkpoint")
        export_checkpoint(trained, recipe.hf, directory, checkpoint)
    return EXIT_DONE


def import_(recipe: Recipe, overrides: list[str]) -> int:
    """A Hugging Face checkpoint to the start of a run."""
    from nano_pretrain.convert.config import model_from_config, not_kept, read_config
    from nano_pretrain.recipe.rules import check

    if recipe.hf.path is None:
        raise RecipeError("hf.path", "is not given", "write hf.path=DIRECTORY of the checkpoint")
    source = Path(recipe.hf.path)
    config = read_config(source)
    model = model_from_config(config)
    for name, value in model.items():
        if getattr(recipe.model, name) != value and any(part.startswith(f"model.{name}=") for part in overrides):
            raise RecipeError(f"model.{name}", f"the checkpoint's is {value}", "leave it out")
    recipe.model = replace(recipe.model, **model)
    check(recipe)
    from nano_pretrain.convert.importing import import_checkpoint

    with _files_named(run_directory(recipe)):
        for line in not_kept(config):
            print(line)
        import_checkpoint(recipe, recipe.hf, source, run_directory(recipe))
    return EXIT_DONE


def report(recipe: Recipe, overrides: list[str]) -> int:
    """Render the report of a run."""
    directory = run_directory(recipe)
    recorded_recipe(directory)
    from nano_pretrain.report import render_report

    print(f"report: {render_report(directory)}")
    return EXIT_DONE
