"""Recorded acts: what a run was told to change in mid-run, and from which token on (recipe_history.jsonl).

A recipe and its acts say everything about the past and the future of a run: the recipe of a moment is the first one
with the acts up to it, and what was consumed before an act does not depend on it.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from types import NoneType
from typing import Any

from hydra.core.override_parser.overrides_parser import OverridesParser

from nano_pretrain.recipe.errors import UserError
from nano_pretrain.recipe.load import differences, recorded_recipe, refuse_difference
from nano_pretrain.recipe.schema import Recipe, Resume

HISTORY = "recipe_history.jsonl"
VALUES: Mapping[str, tuple[type, ...]] = {"extend_to": (int, NoneType), "global_batch_size": (int,), "blend": (dict,)}
"""What a recorded field can be, by the last part of its name."""


@dataclass(frozen=True)
class Act:
    """One change of one field.

    Attributes:
        tokens: consumed by the run when it was told.
        field: dotted name.
        before: its value until then.
        after: its value from then on.
    """

    tokens: int
    field: str
    before: Any
    after: Any


@dataclass(frozen=True)
class Continuation:
    """What a start of a run goes by.

    Attributes:
        recipe: with what the run has been told so far, and now.
        acts: what it was told before.
        told: what it is told now.
    """

    recipe: Recipe
    acts: tuple[Act, ...] = ()
    told: tuple[Act, ...] = ()


def continuation(recipe: Recipe, overrides: Sequence[str], directory: Path, tokens: int) -> Continuation:
    """The recipe of a command as the run goes on with it.

    A recorded field that the command names is changed from now on. One that it does not name keeps what the run was
    last told.

    Args:
        recipe: as the command composes it.
        overrides: of the command.
        directory: directory of the run.
        tokens: consumed by its newest checkpoint.

    Raises:
        UserError: another difference that is not free.
    """
    if not (directory / "recipe.yaml").exists():
        return Continuation(recipe)
    acts, before = read_acts(directory), recorded_recipe(directory)
    try:
        # A start that was killed between the two files has written the acts alone.
        before = _done(before, acts)
    except (KeyError, AttributeError, TypeError) as error:
        raise _damaged(directory, error) from error
    recipe, told = copy.deepcopy(recipe), []
    for field, new, old, resume in differences(recipe, before):
        if resume == Resume.RECORDED and _named(field, overrides):
            told.append(Act(tokens, field, old, new))
        elif resume == Resume.RECORDED and new in _earlier(field, acts):
            _set(recipe, field, old)
        else:
            refuse_difference(field, recipe, before, directory)
    return Continuation(recipe, acts, tuple(told))


def read_acts(directory: Path) -> tuple[Act, ...]:
    """What the run has been told so far.

    Raises:
        UserError: the file cannot be read.
    """
    try:
        lines = (directory / HISTORY).read_text().splitlines()
        return tuple(_checked(Act(**json.loads(line))) for line in lines)
    except (FileNotFoundError, NotADirectoryError):
        return ()
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise _damaged(directory, error) from error


def _checked(act: Act) -> Act:
    """An act that a start may have written, of any moment: a run that fell back may be told of an earlier one."""
    kinds = VALUES[act.field.rpartition(".")[2]]
    if type(act.tokens) is not int or act.tokens < 0:
        raise ValueError(f"tokens is {act.tokens!r}")
    for value in (act.before, act.after):
        if type(value) not in kinds or (type(value) is int and value < 1):
            raise ValueError(f"{act.field} is {value!r}")
    return act


def _damaged(directory: Path, error: Exception) -> UserError:
    return UserError(f"{directory / HISTORY}: damaged ({error}); restore it or choose another run.name")


def written(acts: Iterable[Act]) -> str:
    """The content of recipe_history.jsonl."""
    return "".join(json.dumps(asdict(act)) + "\n" for act in acts)


def _named(field: str, overrides: Sequence[str]) -> bool:
    """Whether a command writes the field, a part of it, or a mapping with it."""
    for override in overrides:
        name = override.partition("=")[0].lstrip("+~")
        if f"{name}.".startswith(f"{field}."):
            return True
        if field.startswith(f"{name}.") and _within(field.removeprefix(f"{name}.").split("."), override):
            return True
    return False


def _within(path: Sequence[str], override: str) -> bool:
    """Whether the value of an override is a mapping with the entry at `path`."""
    node = OverridesParser.create().parse_override(override).value()
    for part in path:
        if not isinstance(node, dict) or part not in node:
            return False
        node = node[part]
    return True


def _earlier(field: str, acts: Sequence[Act]) -> list[Any]:
    return [act.before for act in acts if act.field == field]


def _done(recipe: Recipe, acts: Sequence[Act]) -> Recipe:
    for act in acts:
        _set(recipe, act.field, act.after)
    return recipe


def undone(recipe: Recipe, acts: Sequence[Act]) -> Recipe:
    """A copy of the recipe before these acts."""
    recipe = copy.deepcopy(recipe)
    for act in reversed(acts):
        _set(recipe, act.field, act.before)
    return recipe


def _set(recipe: Recipe, field: str, value: Any) -> None:
    node: Any = recipe
    *path, last = field.split(".")
    for part in path:
        node = node[part] if isinstance(node, dict) else getattr(node, part)
    getattr(node, last)  # A field that there is not, in a damaged file, is not to be made.
    setattr(node, last, copy.deepcopy(value))
