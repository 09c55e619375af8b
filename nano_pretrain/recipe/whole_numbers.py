"""Whole numbers as people write them, 1e12, where OmegaConf wants digits."""

from __future__ import annotations

import re
from dataclasses import is_dataclass
from decimal import Decimal
from types import NoneType
from typing import Any, Union, get_args, get_origin, get_type_hints

from nano_pretrain.recipe.schema import Recipe


def in_digits(override: str) -> str:
    """`stages.pretrain.tokens=1e12` as `stages.pretrain.tokens=1000000000000`.

    Every other override is returned as it is: those of fields that are no int, and those of values that are not whole.
    """
    field, _, value = override.partition("=")
    if not re.fullmatch(r"\d+(\.\d*)?(e\+?\d{1,2})?", value, re.IGNORECASE) or not _is_int(field):
        return override
    number = Decimal(value)
    return f"{field}={int(number)}" if number == int(number) else override


def _is_int(field: str) -> bool:
    """Whether the schema has whole numbers there."""
    kind: Any = Recipe
    for name in field.lstrip("+").split("."):
        if get_origin(kind) is dict:
            kind = get_args(kind)[1]
        else:
            kind = get_type_hints(kind).get(name) if is_dataclass(kind) else None
        if get_origin(kind) is Union:
            kind = next(part for part in get_args(kind) if part is not NoneType)
    return kind is int
