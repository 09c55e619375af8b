"""Hydra's and OmegaConf's errors in one line: the field, the problem, the fix."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import MISSING, fields
from difflib import get_close_matches

from hydra.errors import MissingConfigException, OverrideParseException
from omegaconf import OmegaConf
from omegaconf.errors import ConfigAttributeError, ConfigKeyError, OmegaConfBaseException

from nano_pretrain.recipe.errors import RecipeError
from nano_pretrain.recipe.schema import Recipe

_WRONG_VALUES = (
    ("could not be converted to Integer", "is not a whole number", "write digits only, for example 1000000"),
    ("could not be converted to Float", "is not a number", "write for example 3.0e-4"),
    ("is not a valid bool", "is neither true nor false", "write one of them"),
    ("is not Optional", "cannot be null", "write a value"),
    ("Cannot convert", "is not text", "write one word, or quote the text"),
    ("is not a ListConfig", "is not a list", "write [first, second]"),
    ("is not a subclass of", "is not one value but a group of fields", "write {field}.NAME=VALUE for one of them"),
    ("support deletion", "cannot be left out", "write a value"),
    ("Cannot merge", "has another shape than the value it replaces", "write a mapping {{name: value}}"),
)
"""What OmegaConf says, what is wrong, what to do."""

PLAIN_FIELDS = frozenset(item.name for item in fields(Recipe) if item.default is not MISSING)
"""Values that stand beside the groups of fields, where a word chooses no file."""


def explain(error: Exception, overrides: Sequence[str]) -> str:
    """Why a recipe could not be composed, in one line.

    Args:
        error: what Hydra or OmegaConf raised.
        overrides: the command line's.
    """
    cause = error.__cause__ if isinstance(error.__cause__, OmegaConfBaseException) else error
    if isinstance(error, OverrideParseException):
        return (
            f"{error.override}: cannot be read as an override; write field=value, in quotes if it holds = , ( [ or {{"
        )
    if isinstance(error, MissingConfigException):
        return _unknown_option(error)
    if isinstance(cause, (ConfigAttributeError, ConfigKeyError)):
        siblings = [str(key) for key in cause.parent_node or () if key != "hydra"]
        return _unknown_field(str(cause.full_key), siblings)
    for known in (_group_choice, _new_entry, _several_values, _stage_layout, _wrong_value):
        if line := known(error, str(cause), overrides):
            return line
    return f"{_first_line(str(cause))}; `nano-pretrain VERB --help` lists the fields"


def check_truths(recipe: Recipe, overrides: Sequence[str]) -> None:
    """Refuse a number other than 0 and 1 for true or false; OmegaConf takes each for true.

    Args:
        recipe: what was composed.
        overrides: the command line's.

    Raises:
        RecipeError: the first such override.
    """
    config = OmegaConf.structured(recipe)
    for override in overrides:
        field, _, value = override.lstrip("+").partition("=")
        number = re.fullmatch(r"[-+]?[\d._]+(e[-+]?\d+)?", value, re.IGNORECASE)
        if number and value not in ("0", "1") and isinstance(OmegaConf.select(config, field), bool):
            raise RecipeError(field, f"{value!r} is neither true nor false", "write one of them")


def _unknown_option(error: MissingConfigException) -> str:
    """A file of a config group that does not exist."""
    group, _, name = (error.missing_cfg_file or "").rpartition("/")
    if not error.options:
        return f"{_first_line(str(error))}; check the name and --config-dir"
    return f"{group}: no {group} {name!r}; choose one of {', '.join(error.options)}"


def _unknown_field(field: str, siblings: Sequence[str]) -> str:
    parent, _, leaf = field.rpartition(".")
    if parent.endswith(".blend") and not siblings:
        return f"{field}: the blend is the name of a file; write '{parent}={{SOURCE: WEIGHT, ...}}' for one of your own"
    if parent.endswith(".blend"):
        known = ", ".join(siblings)
        return f"{field}: the blend has no such source; write +{field}=WEIGHT to add it, or choose from {known}"
    near = get_close_matches(leaf, siblings, 1, 0.6)
    fix = f"did you mean {'.'.join(filter(None, [parent, near[0]]))}?" if near else f"choose from {', '.join(siblings)}"
    return f"{field}: no such field; {fix}"


def _group_choice(error: Exception, text: str, overrides: Sequence[str]) -> str | None:
    """Something other than a name where a file of a config group is chosen; Hydra does not say where."""
    # Hydra stumbles over a list with whatever error its elements lead to.
    if not text.startswith("Config group override") and not isinstance(error, TypeError):
        return None
    chosen = (part for part in reversed(overrides) if part.partition("=")[0] not in PLAIN_FIELDS)
    part = next((part for part in chosen if re.match(r"\w*=(null$|true$|false$|[\d\[{.-])", part)), "recipe=")
    group = part.partition("=")[0] or part
    return f"{group}: is not the name of a file; write for example recipe=tiny or model=tiny"


def _new_entry(error: Exception, text: str, overrides: Sequence[str]) -> str | None:
    """OmegaConf cannot add an element to a mapping of dataclasses from a plain value."""
    override = str(error).removeprefix("Error merging override ").lstrip("+")
    if entry := re.search(r"not a subclass of (Stage|Phase)Config", text):
        kind, field = entry.group(1).lower(), override.partition("=")[0]
        return f"{field}: a {kind} cannot be added on the command line; add it to a copy of the recipe's file"
    return None


def _several_values(error: Exception, text: str, overrides: Sequence[str]) -> str | None:
    if several := re.match(r"Ambiguous value for argument '([^=]+)=(.*)'", text):
        field, values = several.groups()
        one = f"'{field}=\"{values}\"'"
        return f"{field}: {values} is several values; write {one} for one, or add --multirun for a run of each"
    return None


def _stage_layout(error: Exception, text: str, overrides: Sequence[str]) -> str | None:
    """OmegaConf cannot set a field inside an optional dataclass that is null; it fails without naming it."""
    layouts = [part.partition("=")[0] for part in overrides if re.match(r"\+*stages\.\w+\.parallel\b", part)]
    if not layouts or isinstance(error, OmegaConfBaseException):
        return None
    fix = "write parallel.NAME=VALUE, or add `parallel` to the stage in the recipe's file"
    return f"{layouts[0].lstrip('+')}: the stage has no layout of its own; {fix}"


def _wrong_value(error: Exception, text: str, overrides: Sequence[str]) -> str | None:
    field = re.search(r"full_key: (\S+)", text)
    found = next(((problem, fix) for mark, problem, fix in _WRONG_VALUES if mark in text), None)
    if field is None or found is None:
        return f"{field.group(1)}: {_first_line(text)}; write another value" if field else None
    problem, fix = found
    value = re.search(r"(?:Value|value:) ('.*?'|\S+)", text.partition("\n")[0])
    return f"{field.group(1)}: {f'{value.group(1)} ' if value else ''}{problem}; {fix.format(field=field.group(1))}"


def _first_line(text: str) -> str:
    return text.strip().partition("\n")[0]
