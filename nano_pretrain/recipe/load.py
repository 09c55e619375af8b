"""From the composed configuration to a checked, typed recipe."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any, NoReturn

import yaml
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from nano_pretrain.recipe.describe import as_written
from nano_pretrain.recipe.errors import RecipeError, UserError
from nano_pretrain.recipe.explain import explain
from nano_pretrain.recipe.rules import check
from nano_pretrain.recipe.schema import Recipe, Resume


def tree(name: str) -> Path:
    """The directory `recipes` or `data_blend`: of the checkout, or packed into an installed wheel."""
    package = Path(__file__).resolve().parent.parent
    packed = package / f"_{name}"
    return packed if packed.is_dir() else package.parent / name


def typed_recipe(config: DictConfig) -> Recipe:
    """A checked recipe from Hydra's composition.

    Raises:
        RecipeError: a value is missing or breaks a rule.
        UserError: a field is unknown, or a reference ${...} leads nowhere.
    """
    try:
        missing = sorted(OmegaConf.missing_keys(config))
        if missing:
            raise RecipeError(missing[0], "has no value", f"write {missing[0]}=VALUE or choose a recipe that sets it")
        # As a plain container: `+field=value` adds to the composed configuration what the schema does not know.
        plain = OmegaConf.to_container(config, resolve=True)
        recipe = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(Recipe), plain))
        assert isinstance(recipe, Recipe)
        recipe.stand_ins = {said: why for said, why in recipe.stand_ins.items() if _holds(config, said)}
    except OmegaConfBaseException as error:
        raise UserError(explain(error, ())) from error
    for name, stage in recipe.stages.items():
        for phase_name, phase in stage.phases.items():
            phase.blend = _blend(f"stages.{name}.phases.{phase_name}.blend", phase.blend)
    check(recipe)
    return recipe


def _holds(config: DictConfig, said: str) -> bool:
    """Whether a field has the value that `field=value` says, a number as Python prints it."""
    field, _, value = said.partition("=")
    return str(OmegaConf.select(config, field)) == value


def _blend(field: str, blend: Any) -> dict[str, float]:
    """A mapping as it is, a name as the file it stands for."""
    if isinstance(blend, str):
        directory = tree("data_blend") / "blends"
        known = sorted(path.stem for path in directory.glob("*.yaml"))
        if blend not in known:
            raise RecipeError(field, f"no blend {blend!r}", f"choose one of {', '.join(known)} or write a mapping")
        blend = yaml.safe_load((directory / f"{blend}.yaml").read_text())
    if not isinstance(blend, dict) or not blend:
        raise RecipeError(field, f"{blend!r} is not a mapping", "write {source: weight, ...} or the name of a blend")
    for source, weight in blend.items():
        if isinstance(weight, bool) or not isinstance(weight, (int, float)):
            raise RecipeError(f"{field}.{source}", f"weight {weight!r} is not a number", "write a number >= 0")
    return {str(source): float(weight) for source, weight in blend.items()}


def to_yaml(recipe: Recipe) -> str:
    """The resolved recipe as YAML."""
    return OmegaConf.to_yaml(OmegaConf.structured(recipe))


def recorded_recipe(run_dir: Path) -> Recipe:
    """The recipe that a run was last started with.

    Raises:
        UserError: there is no run, or its recipe cannot be read.
    """
    path = run_dir / "recipe.yaml"
    if not path.exists():
        raise UserError(f"run.name: no run in {run_dir}; train it first, or write run.name=NAME of one that exists")
    try:
        recipe = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(Recipe), OmegaConf.load(path)))
    except (yaml.YAMLError, OmegaConfBaseException, TypeError, OSError, UnicodeDecodeError) as error:
        problem = str(error).partition("\n")[0]
        raise UserError(
            f"{path}: no recipe of this version ({problem}); restore it or choose another run.name"
        ) from error
    assert isinstance(recipe, Recipe)
    return recipe


def differences(new: Any, old: Any, prefix: str = "") -> Iterator[tuple[str, Any, Any, Resume]]:
    """Fields that are not free and differ, depth first, in the schema's order.

    Args:
        new: a recipe, or a part of one.
        old: another.
        prefix: of the part's fields.

    Yields:
        Dotted name, new and old value, resume class; for other stages or phases the lists of their names.
    """
    for item in fields(new):
        name, value, before = prefix + item.name, getattr(new, item.name), getattr(old, item.name)
        if is_dataclass(value) and is_dataclass(before):
            yield from differences(value, before, f"{name}.")
        elif isinstance(value, dict) and all(is_dataclass(part) for part in [*value.values(), *before.values()]):
            if list(value) != list(before):
                yield name, list(value), list(before), Resume.FIXED
            else:
                for key in value:
                    yield from differences(value[key], before[key], f"{name}.{key}.")
        elif item.metadata["resume"] != Resume.FREE and value != before:
            yield name, value, before, item.metadata["resume"]


def refuse_difference(field: str, recipe: Recipe, before: Recipe, run_dir: Path) -> NoReturn:
    """Refuse to go on with a run that would learn something else.

    Args:
        field: in which its recipe differs, and may not.
        recipe: the new one.
        before: that of the run.
        run_dir: of the run.

    Raises:
        UserError: always.
    """
    differing = {name: (new, old, resume) for name, new, old, resume in differences(recipe, before)}
    new, old, _ = differing[field]
    # Fields of one group depend on each other, as a precision and its linears. What was told now is not taken back, and
    # stages and phases cannot be written on the command line.
    group = field.rpartition(".")[0]
    values = [
        f"{name}={as_written(value)}"
        for name, (_, value, resume) in differing.items()
        if name == field or (resume == Resume.FIXED and name.rpartition(".")[0] == group)
        if not isinstance(value, list)
    ]
    way_back = "" if isinstance(old, list) else f", or write {' '.join(values)} to continue that run"
    raise UserError(
        f"{field}: {as_written(new)} differs from {as_written(old)} of the run in {run_dir}; "
        f"choose another run.name{way_back}"
    )
