"""The command line: `nano-pretrain VERB recipe=NAME key=value ...`, composed by Hydra."""

from __future__ import annotations

import errno
import gc
import os
import signal
import sys
import textwrap
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, NoReturn

from nano_pretrain.recipe.errors import EXIT_DONE, EXIT_FAILED, EXIT_USER_ERROR, RecipeError, RunError, UserError

if TYPE_CHECKING:
    from nano_pretrain.compose import Job
    from nano_pretrain.recipe.schema import Recipe

VERBS = {
    "plan": "what a recipe means: parameters, FLOPs, memory, time, cost, data; plan.search=true looks for layouts",
    "prepare": "corpus to tokenised shards, with a report of what was kept and dropped, and why",
    "train": "the run on the ranks it is started on (alone: one rank); continues from the newest whole checkpoint",
    "launch": "start the run's ranks on this machine and wait for them",
    "generate": "continue a prompt with the newest checkpoint",
    "evaluate": "retrieval and loss by position at evaluate.lengths, and lm-evaluation-harness tasks, of a checkpoint",
    "export": "a checkpoint as a Hugging Face model in RUN/hf or hf.path, verified",
    "import": "the Hugging Face checkpoint in hf.path as the start of a run",
    "report": "render the plots and the HTML page of a run",
}

HELP = """nano-pretrain VERB [recipe=NAME] [field=value ...]

{verbs}

{recipes}
group=NAME    another file of recipes/, for example model=nemotron_h_8b precision=bf16 schedule=cosine_15t layout=tp2
field=value   override any field, for example model.pattern=M-M*- run.name=x stages.pretrain.tokens=1000000

nano-pretrain VERB --help        the fields of the chosen recipe
nano-pretrain VERB --cfg job     print the composed recipe and stop
nano-pretrain VERB --multirun optimizer.beta2=0.95,0.99    one run after the other, each with a name of its own

Exit codes: 0 done, 2 wrong input, 75 stopped on request after a whole checkpoint (run again to continue), 141 nobody
reads the output any more, 1 anything else."""

EXIT_NO_READER = 128 + signal.SIGPIPE
"""What a shell sees of `cat FILE | head -1`."""

STDOUT = "stdout"
"""File name of an error in writing our output."""

HELP_OPTIONS = ("--help", "-h")
SHOW_OPTIONS = ("--cfg", "-c")
SWEEP_OPTIONS = ("--multirun", "-m")
OPTIONS = (*HELP_OPTIONS, *SHOW_OPTIONS, "--resolve", *SWEEP_OPTIONS)
"""After the verb; Hydra's own names for what they do."""


def main() -> NoReturn:
    """Run the command of `sys.argv` and exit with its code."""
    arguments = sys.argv[1:]
    _name_stdout()
    try:
        code = _run(arguments)
        # Here and not when Python ends, where nobody could answer a reader that has gone.
        print(end="", flush=True)
    except UserError as error:
        _fail(str(error), EXIT_USER_ERROR)
    except RunError as error:
        _fail(str(error), EXIT_FAILED)
    except KeyboardInterrupt:
        _fail("interrupted", EXIT_FAILED)
    except BrokenPipeError:
        # The reader of our output has gone; without this Python fails once more when it flushes.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = EXIT_NO_READER
    except OSError as error:
        if error.errno != errno.ENOSPC:
            raise
        if error.filename == STDOUT:
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        _fail(f"{error.filename or 'a file'}: the disk is full; free space or write somewhere else", EXIT_USER_ERROR)
    # Else Python's last collection walks all objects of torch and megatron-core, for two seconds.
    gc.freeze()
    sys.exit(code)


def _name_stdout() -> None:
    """Let what cannot be written to stdout say so: the operating system names no file that is open."""

    def named(function: Callable[..., int]) -> Callable[..., int]:
        def call(*arguments: str) -> int:
            try:
                return function(*arguments)
            except OSError as error:
                error.filename = STDOUT
                raise

        return call

    for name in ("write", "flush"):
        setattr(sys.stdout, name, named(getattr(sys.stdout, name)))


def _run(arguments: Sequence[str]) -> int:
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        print(_help())
        return EXIT_DONE if arguments else EXIT_USER_ERROR
    verb, *arguments = arguments
    if verb not in VERBS:
        raise UserError(f"{verb}: no such verb; choose one of {', '.join(VERBS)}")
    options, overrides = _split(arguments)
    if shows := options & {*HELP_OPTIONS, *SHOW_OPTIONS}:
        return _show(shows, overrides, resolve="--resolve" in options)
    from nano_pretrain import compose

    if options & {*SWEEP_OPTIONS}:
        from nano_pretrain.launch.sweep import run_in_turn

        # megatron-core keeps global state: each job gets a process of its own.
        jobs = compose.compose_sweep(overrides)
        for job in jobs:
            _check(verb, job)
        return run_in_turn([job.command(verb) for job in jobs])
    job = compose.compose(overrides)
    _check(verb, job)
    from nano_pretrain import verbs

    runner: Callable[[Recipe, list[str]], int] = getattr(verbs, "import_" if verb == "import" else verb)
    return runner(job.recipe, list(job.overrides))


def _check(verb: str, job: Job) -> None:
    check_verb(verb, job.recipe)
    if verb in ("train", "launch"):
        from nano_pretrain.compose import check_imported

        check_imported(job)


def check_verb(verb: str, recipe: Recipe) -> None:
    """Refuse what does not go with the verb.

    Raises:
        RecipeError: a search of layouts, or lengths at the ends of stages whose kernels take the trained one alone.
    """
    if recipe.plan.search and verb != "plan":
        # The rules have let every layout pass.
        raise RecipeError("plan.search", f"goes with the verb plan, not with {verb}", "leave it out")
    if verb in ("plan", "train", "launch"):
        from nano_pretrain.recipe.rules_evaluate import lengths_at_stage_ends

        lengths_at_stage_ends(recipe)


def _show(options: set[str], overrides: Sequence[str], resolve: bool) -> int:
    from nano_pretrain import compose
    from nano_pretrain.recipe.describe import describe

    if options & {*HELP_OPTIONS}:
        print(describe(compose.compose(overrides).recipe))
    else:
        print(compose.composed_yaml(overrides, resolve), end="")
    return EXIT_DONE


def _help() -> str:
    from nano_pretrain.recipe.load import tree

    names = ", ".join(sorted(path.stem for path in (tree("recipes") / "recipe").glob("*.yaml")))
    width = max(map(len, VERBS))
    return HELP.format(
        verbs="\n".join(f"{verb:<{width}}  {text}" for verb, text in VERBS.items()),
        recipes=textwrap.fill(f"recipe=NAME   one of {names} (default: tiny)", 120, subsequent_indent=14 * " "),
    )


def _fail(message: str, code: int) -> NoReturn:
    print(f"nano-pretrain: {' '.join(message.split())}", file=sys.stderr)
    sys.exit(code)


def _split(arguments: Sequence[str]) -> tuple[set[str], list[str]]:
    """Options and overrides, in whatever order they were given.

    Raises:
        UserError: an option is unknown, lacks its value, or does not go with another.
    """
    options, overrides = set(), []
    remaining = iter(arguments)
    for argument in remaining:
        option, _, value = argument.partition("=")
        if not argument.startswith("-"):
            overrides.append(argument)
        elif option not in OPTIONS:
            raise UserError(f"{option}: no such option; choose one of {', '.join(OPTIONS)}, or write field=value")
        elif option in SHOW_OPTIONS and (value or next(remaining, "")) != "job":
            raise UserError(f"{option}: shows one thing only; write {option} job")
        else:
            options.add(option)
    if options & {*SWEEP_OPTIONS} and len(options) > 1:
        raise UserError("--multirun: goes with no other option; leave it out to see one recipe")
    return options, overrides
