"""From the overrides of a command to checked recipes: one, or one for each combination under --multirun."""

from __future__ import annotations

import hashlib
import itertools
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import hydra
import yaml
from hydra.core.config_store import ConfigStore
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import OverrideParseException
from omegaconf import DictConfig, OmegaConf, open_dict
from omegaconf.errors import OmegaConfBaseException

from nano_pretrain.checkpoint.manifest import ORIGIN, all_checkpoints
from nano_pretrain.data.phases import phase_lengths, phase_weights
from nano_pretrain.recipe.derived import stage_tokens
from nano_pretrain.recipe.errors import UserError
from nano_pretrain.recipe.explain import check_truths, explain
from nano_pretrain.recipe.load import tree, typed_recipe
from nano_pretrain.recipe.schema import Recipe
from nano_pretrain.recipe.whole_numbers import in_digits
from nano_pretrain.schedule.learning_rate import validate_schedule

LONGEST_NAME = 100

_RECIPE_FILE = re.compile(r"""recipe=(["']?)(.*/.*|.*\.yaml)\1""", re.DOTALL)

T = TypeVar("T")


@dataclass(frozen=True)
class Job:
    """One composed recipe.

    Attributes:
        recipe: checked, with the name of its run.
        overrides: what composes it again, without the name.
    """

    recipe: Recipe
    overrides: tuple[str, ...]

    def command(self, verb: str) -> list[str]:
        """The verb in a process of its own."""
        return [sys.executable, "-m", "nano_pretrain", verb, *self.overrides, f"run.name='{self.recipe.run.name}'"]


def compose(overrides: Sequence[str]) -> Job:
    """Compose and check the recipe.

    Raises:
        UserError: an override or the recipe is wrong.
    """
    config = _composed(overrides)
    choice = config.hydra.runtime.choices.get("recipe", "")
    if not isinstance(choice, str):
        raise UserError("recipe: is not one name; write recipe=NAME, or --multirun recipe=FIRST,SECOND")
    recipe = typed_recipe(_without_hydra(config))
    check_truths(recipe, overrides)
    for name, stage in recipe.stages.items():
        # Whether `extend_to` is too short is known once it is known what the run has consumed.
        tokens = max(stage.tokens, stage_tokens(stage))
        validate_schedule(stage.schedule, tokens, f"stages.{name}.schedule")
        phase_lengths(f"stages.{name}", stage)
        for phase_name, phase in stage.phases.items():
            # Which sources there are is known once the corpus is.
            phase_weights(f"stages.{name}.phases.{phase_name}.blend", phase.blend, known=phase.blend)
    recipe.run.name = recipe.run.name or choice
    return Job(recipe, tuple(part for part in overrides if not part.startswith("run.name=")))


def check_imported(job: Job) -> None:
    """Refuse to begin a run from the recipe of another one without the weights imported into that.

    Raises:
        UserError: names both.
    """
    written = _written(job.overrides)
    run_dir = Path(job.recipe.run.dir) / str(job.recipe.run.name)
    if written is None or all_checkpoints(run_dir):
        return
    path = Path(written[2])
    if (path.parent / ORIGIN).exists():
        raise UserError(
            f"run.name: {run_dir} would begin without the weights that {path.parent} has imported; run "
            f"`nano-pretrain import recipe={path} run.name={job.recipe.run.name} hf.path=DIRECTORY` first"
        )


def compose_sweep(overrides: Sequence[str]) -> list[Job]:
    """Compose and check a recipe for each combination of the values that overrides list, `field=first,second`.

    What tells a job from the others becomes part of its run's name, unless the names differ already.

    Raises:
        UserError: an override or one of the recipes is wrong, or two jobs are the same.
    """
    with _explained(overrides):
        parsed = _reading_text(OverridesParser.create().parse_overrides, overrides)
    jobs = [compose(combination) for combination in itertools.product(*map(_alternatives, parsed))]
    if len({job.recipe.run.name for job in jobs}) == len(jobs):
        return jobs
    common = set.intersection(*(set(job.overrides) for job in jobs))
    for job in jobs:
        own = [part for part in job.overrides if part not in common]
        job.recipe.run.name = _directory_name("-".join([str(job.recipe.run.name), *own]))
    if len({job.recipe.run.name for job in jobs}) < len(jobs):
        raise UserError("--multirun: two of the jobs are the same; give each value once")
    return jobs


def composed_yaml(overrides: Sequence[str], resolve: bool) -> str:
    """The recipe as it is composed, unchecked; `resolve` replaces references ${...}.

    Raises:
        UserError: an override is wrong.
    """
    config = _without_hydra(_composed(overrides))
    with _explained(overrides):
        return OmegaConf.to_yaml(config, resolve=resolve)


def _composed(overrides: Sequence[str]) -> DictConfig:
    ConfigStore.instance().store(name="schema", node=Recipe)
    parts = [in_digits(override) for override in overrides]
    root, written = "config", _written(parts)
    if written is not None:
        root = "written"
        parts.remove(written[0])
        _refuse_groups(parts)
        _store_written(Path(written[2]), root)
    with _explained(overrides), hydra.initialize_config_dir(str(tree("recipes")), version_base="1.3"):
        return _reading_text(lambda parts: hydra.compose(root, parts, return_hydra_config=True), parts)


def _written(overrides: Sequence[str]) -> re.Match[str] | None:
    """The override that gives a file in place of a recipe's name; group 2 is its path."""
    return next(filter(None, map(_RECIPE_FILE.fullmatch, overrides)), None)


def _refuse_groups(overrides: Sequence[str]) -> None:
    """A written recipe is the result of its groups, and no longer says which.

    Raises:
        UserError: an override chooses another.
    """
    groups = {path.name for path in tree("recipes").iterdir() if path.is_dir()}
    for override in overrides:
        group = override.lstrip("+~").partition("=")[0]
        if group in groups:
            raise UserError(
                f"{group}: groups cannot be chosen beside a written recipe; name single fields, which "
                "`nano-pretrain VERB --help` lists, or choose a recipe by its name"
            )


def _store_written(path: Path, name: str) -> None:
    """Make a recipe.yaml that a run has written the root of a recipe.

    Raises:
        UserError: it cannot be read.
    """
    try:
        written = OmegaConf.load(path)
        ConfigStore.instance().store(name=name, node=OmegaConf.merge(OmegaConf.structured(Recipe), written))
    except (OSError, UnicodeDecodeError, yaml.YAMLError, OmegaConfBaseException) as error:
        problem = str(error).partition("\n")[0]
        raise UserError(f"recipe: {path} is no recipe ({problem}); write recipe=RUN/recipe.yaml or a name") from error


def _reading_text(read: Callable[[list[str]], T], overrides: Sequence[str]) -> T:
    """What `read` makes of the overrides; a value that Hydra's grammar cannot read is text, for example a prompt."""
    parts = list(overrides)
    while True:
        try:
            return read(parts)
        except OverrideParseException as error:
            field, equals, value = error.override.partition("=")
            if not re.fullmatch(r"\+{0,2}[\w.]+", field) or not equals or value.startswith("'"):
                raise
            # A backslash counts only before a quote.
            quoted = re.sub(r"(\\*)('|$)", lambda end: 2 * end[1] + ("\\'" if end[2] else ""), value)
            parts[parts.index(error.override)] = f"{field}='{quoted}'"


def _without_hydra(config: DictConfig) -> DictConfig:
    with open_dict(config):
        del config["hydra"]
    return config


@contextmanager
def _explained(overrides: Sequence[str]) -> Iterator[None]:
    try:
        yield
    except Exception as error:
        # Nothing but the user's input is at work while a recipe is composed.
        raise UserError(explain(error, overrides)) from error


def _alternatives(override: Override) -> list[str]:
    if not override.is_sweep_override():
        return [str(override.input_line)]
    if not override.is_discrete_sweep():
        raise UserError(f"{override.key_or_group}: a range of real numbers has no end; list the values")
    return [f"{override.get_key_element()}={value}" for value in override.sweep_string_iterator()]


def _directory_name(text: str) -> str:
    name = re.sub(r"[^A-Za-z0-9_=.,+-]", "_", text)
    if name == text and len(name) <= LONGEST_NAME:
        return name
    # What was replaced or cut may be all that tells two jobs apart.
    return f"{name[:LONGEST_NAME]}-{hashlib.sha256(text.encode()).hexdigest()[:8]}"
