"""The command line: `nano-pretrain VERB recipe=NAME key=value ...`, composed by Hydra."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, NoReturn

from nano_pretrain.recipe.errors import EXIT_DONE, EXIT_FAILED, EXIT_USER_ERROR, UserError

if TYPE_CHECKING:
    from omegaconf import DictConfig

    from nano_pretrain.recipe.schema import Recipe

VERBS = {
    "prepare": "corpus to tokenised shards, with a report of what was kept and dropped, and why",
    "train": "the run on the ranks it is started on (alone: one rank); continues from the newest whole checkpoint",
    "launch": "start the run's ranks on this machine and wait for them",
    "generate": "continue a prompt with the newest checkpoint",
    "report": "render the plots and the HTML page of a run",
}

HELP = """nano-pretrain VERB [recipe=NAME] [field=value ...]

{verbs}

recipe=NAME   one of {recipes} (default: tiny)
field=value   override any field, for example model.pattern=M-M*- run.name=x stages.pretrain.tokens=1000000

nano-pretrain VERB --help        the fields of the chosen recipe
nano-pretrain VERB --cfg job     print the composed recipe and stop
nano-pretrain VERB --multirun optimizer.beta2=0.95,0.99    one run after the other, each with a name of its own

Exit codes: 0 done, 2 wrong input, 75 stopped on request after a whole checkpoint (run again to continue), 1 anything
else."""

OPTIONS = {"--help": "", "-h": "", "--cfg": "job", "-c": "job", "--resolve": "", "--multirun": "", "-m": ""}
"""Options after the verb, all of them Hydra's, and the value that one takes."""


def main() -> NoReturn:
    """Run the command of `sys.argv` and exit with its code."""
    arguments = sys.argv[1:]
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        print(_help())
        sys.exit(EXIT_DONE if arguments else EXIT_USER_ERROR)
    verb = arguments[0]
    if verb not in VERBS:
        _fail(f"{verb}: no such verb; choose one of {', '.join(VERBS)}")
    try:
        code = _compose_and_run(verb, arguments[1:])
    except UserError as error:
        _fail(str(error))
    except KeyboardInterrupt:
        _fail("interrupted", EXIT_FAILED)
    sys.exit(code)


def _help() -> str:
    from nano_pretrain.recipe.load import tree

    recipes = sorted(path.stem for path in (tree("recipes") / "recipe").glob("*.yaml"))
    width = max(map(len, VERBS))
    return HELP.format(
        verbs="\n".join(f"{verb:<{width}}  {text}" for verb, text in VERBS.items()), recipes=", ".join(recipes)
    )


def _fail(message: str, code: int = EXIT_USER_ERROR) -> NoReturn:
    print(f"nano-pretrain: {' '.join(message.split())}", file=sys.stderr)
    sys.exit(code)


def _check_options(arguments: Sequence[str]) -> None:
    """Refuse what Hydra would answer with several lines or with an error of its parser.

    Raises:
        UserError: an option is unknown or lacks its value.
    """
    remaining = iter(arguments)
    for argument in remaining:
        option, _, value = argument.partition("=")
        if not argument.startswith("-"):
            continue
        if option not in OPTIONS:
            raise UserError(f"{option}: no such option; choose one of {', '.join(OPTIONS)}, or write field=value")
        wanted = OPTIONS[option]
        if wanted and (value or next(remaining, "")) != wanted:
            raise UserError(f"{option}: shows one thing only; write {option} {wanted}")
    if {"--multirun", "-m"} & set(arguments) and {"--cfg", "-c", "--help", "-h"} & set(arguments):
        raise UserError("--multirun: cannot be shown; leave out --multirun to see one recipe")


def _compose_and_run(verb: str, arguments: Sequence[str]) -> int:
    """Hand the arguments to Hydra, whose job runs the verb."""
    import hydra
    from hydra.core.config_store import ConfigStore

    from nano_pretrain.recipe.load import tree
    from nano_pretrain.recipe.schema import Recipe

    _check_options(arguments)
    ConfigStore.instance().store(name="schema", node=Recipe)
    codes: list[int] = []
    errors: list[Exception] = []
    shows_fields = bool({"--help", "-h"} & set(arguments))

    def job(config: DictConfig) -> None:
        # Hydra would print a line of its own about an exception.
        try:
            codes.append(_show_fields(config) if shows_fields else _job(verb, config))
        except Exception as error:
            errors.append(error)

    # Without this Hydra prints its errors itself and exits with 1.
    os.environ["HYDRA_FULL_ERROR"] = "1"
    sys.argv = [f"nano-pretrain {verb}", *(part for part in arguments if part not in ("--help", "-h"))]
    try:
        hydra.main(version_base="1.3", config_path=str(tree("recipes")), config_name="config")(job)()
    except Exception as error:
        from nano_pretrain.recipe.explain import explain

        # Nothing but the user's input is at work while a recipe is composed.
        raise UserError(explain(error, sys.argv[1:])) from error
    if errors:
        raise errors[0]
    return max(codes, default=EXIT_DONE)


def _show_fields(config: DictConfig) -> int:
    """Every field of the composed recipe with its sentence."""
    from nano_pretrain.recipe.describe import describe
    from nano_pretrain.recipe.load import typed_recipe

    print(describe(typed_recipe(config)))
    return EXIT_DONE


def _job(verb: str, config: DictConfig) -> int:
    """One composed configuration: checked, named, and run."""
    from hydra.core.hydra_config import HydraConfig
    from hydra.types import RunMode

    from nano_pretrain.recipe.load import typed_recipe
    from nano_pretrain.schedule.learning_rate import validate_schedule

    hydra_config = HydraConfig.get()
    overrides = list(hydra_config.overrides.task)
    multirun = hydra_config.mode == RunMode.MULTIRUN
    recipe = typed_recipe(config)
    for name, stage in recipe.stages.items():
        validate_schedule(stage.schedule, stage.tokens, f"stages.{name}.schedule")
    recipe.run.name = _run_name(recipe, hydra_config.runtime.choices["recipe"], overrides if multirun else [])
    if multirun:
        # megatron-core keeps global state: each job gets a process of its own.
        kept = [part for part in overrides if not part.startswith("run.name=")]
        command = [sys.executable, "-m", "nano_pretrain", verb, *kept, f"run.name='{recipe.run.name}'"]
        return subprocess.run(command, check=False).returncode
    runner: Callable[[Recipe, list[str]], int] = getattr(__import__("nano_pretrain.verbs", fromlist=[verb]), verb)
    return runner(recipe, overrides)


def _run_name(recipe: Recipe, choice: str, swept: Sequence[str]) -> str:
    """The given name or the recipe's; under --multirun followed by the overrides: no two jobs share a directory."""
    name = recipe.run.name or choice
    parts = [part for part in swept if not part.startswith(("recipe=", "run.name=", "run.dir="))]
    return re.sub(r"[^A-Za-z0-9_=.,+-]", "_", "-".join([name, *parts]))[:200]
