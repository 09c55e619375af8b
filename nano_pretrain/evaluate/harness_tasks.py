"""Tasks of lm-evaluation-harness, found and loaded, or refused before anything starts; imports no torch."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

from nano_pretrain.evaluate.room import holds_whole_model
from nano_pretrain.platform.versions import check_versions
from nano_pretrain.recipe.derived import stage_layout
from nano_pretrain.recipe.errors import RecipeError, UserError
from nano_pretrain.recipe.schema import EvaluateConfig, Recipe

FIELD = "evaluate.harness_tasks"
GENERATES = "generate_until"
"""Kind of the tasks that look at generated text; all others look at likelihoods."""


def load_tasks(options: EvaluateConfig) -> Any:
    """The tasks of `evaluate.harness_tasks` with their data, as lm_eval's `TaskManager.load` returns them.

    Raises:
        UserError: lm-eval is not installed, or another version.
        RecipeError: there is no such task, or it cannot be loaded, or asks for what is not here.
    """
    try:
        check_versions(["lm-eval"])
    except UserError as error:
        raise UserError(f"{FIELD}: {error}, or pip install 'nano-pretrain[eval]'") from error
    if options.harness_path is not None and not Path(options.harness_path).is_dir():
        raise RecipeError("evaluate.harness_path", f"no directory {options.harness_path}", "write one with YAML files")
    # Of default values that a task leaves to lm_eval, in dozens of lines.
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    manager = _manager(options)
    for name in options.harness_tasks:
        if name not in manager.task_index:
            where = f" or in {options.harness_path}" if options.harness_path else ""
            fix = "see `lm-eval ls tasks`, or write evaluate.harness_path=DIRECTORY of its YAML file"
            raise RecipeError(FIELD, f"no task {name!r} in lm-eval{where}", fix)
    try:
        loaded = manager.load(list(options.harness_tasks))
    except Exception as error:  # Whatever its data, its code or the network come to.
        problem = str(error).strip().partition("\n")[0]
        raise RecipeError(FIELD, f"cannot be loaded ({type(error).__name__}: {problem})", "mend it") from error
    for name, task in loaded["tasks"].items():
        if wants := _more_than_we_do(task):
            raise RecipeError(FIELD, f"{name} {wants}", "leave it out, or run lm-eval on an export")
        _settle_examples(task)
    return loaded


def check_at_stage_ends(recipe: Recipe) -> None:
    """Load what is to be evaluated at the ends of stages, and see that their ranks can.

    Raises:
        UserError: as `load_tasks`.
        RecipeError: a task generates, and a stage has no rank that can.
    """
    if not (recipe.evaluate.harness_tasks and recipe.evaluate.at_stage_end):
        return
    tasks = load_tasks(recipe.evaluate)["tasks"]
    generating = [name for name, task in tasks.items() if task.OUTPUT_TYPE == GENERATES]
    for name, stage in recipe.stages.items():
        # As on a GPU, wherever it runs: a recipe is right or wrong everywhere.
        if generating and not holds_whole_model(recipe, stage_layout(recipe, stage), "cuda"):
            raise RecipeError(
                FIELD,
                f"{generating[0]} generates text, for which a rank has to hold the whole model, and not in FP8; "
                f"stage {name} has none",
                "write evaluate.at_stage_end=false and use the verb evaluate",
            )


def _manager(options: EvaluateConfig) -> Any:
    """An index of tasks; reading the thousands that come with the package takes seconds, so one's own come first."""
    from lm_eval.tasks import TaskManager

    if options.harness_path is not None:
        own = TaskManager(include_path=options.harness_path, include_defaults=False)
        if all(name in own.task_index for name in options.harness_tasks):
            return own
    return TaskManager(include_path=options.harness_path)


def _more_than_we_do(task: Any) -> str | None:
    """What a task asks for that is not here; lm_eval would say so in the middle of an evaluation, or not at all."""
    from lm_eval.models.utils import normalize_gen_kwargs

    if getattr(task, "UNSAFE_CODE", False):
        return "runs code that a model has written"
    if getattr(task, "MULTIMODAL", False):
        return "shows more than text"
    if task.OUTPUT_TYPE == GENERATES and normalize_gen_kwargs(task.config.generation_kwargs)["do_sample"]:
        return "draws text at random, where only the likeliest is generated"
    return None


def _settle_examples(task: Any) -> None:
    """Examples in prompts as lm_eval's own command has them: as many as the task says, drawn with its seed."""
    from lm_eval.defaults import DEFAULT_OTHER_SEED

    if task.get_config("num_fewshot") is None:
        task.set_config(key="num_fewshot", value=0)
    task.set_fewshot_seed(seed=DEFAULT_OTHER_SEED)
