"""The fields of a recipe with their values and sentences, for `--help`."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import fields, is_dataclass
from textwrap import indent
from typing import Any

from nano_pretrain.recipe.schema import Recipe

HEADER = """\
The fields of the chosen recipe with their values. A run that is continued may change what is [free]; what is [fixed]
or [recorded] must stay.
"""
SHOWN_LENGTH = 60
"""Longer values, such as blends, are cut."""


def describe(recipe: Recipe) -> str:
    """One paragraph a field: `name=value`, then what it is and whether a resumed run may change it."""
    return "\n".join([HEADER, *_paragraphs(recipe, "")])


def _paragraphs(node: Any, prefix: str) -> Iterator[str]:
    for item in fields(node):
        value, name = getattr(node, item.name), prefix + item.name
        if is_dataclass(value):
            yield from _paragraphs(value, f"{name}.")
        elif isinstance(value, dict) and value and all(is_dataclass(part) for part in value.values()):
            for key, part in value.items():
                yield from _paragraphs(part, f"{name}.{key}.")
        else:
            sentence = f"{item.metadata['doc']} [{item.metadata['resume']}]"
            yield f"{name}={_shown(value)}\n{indent(sentence, ' ' * 8)}"


def _shown(value: Any) -> str:
    text = as_written(value)
    return text if len(text) <= SHOWN_LENGTH else f"{text[: SHOWN_LENGTH - 4]} ..."


def as_written(value: Any) -> str:
    """A value as it is written on the command line."""
    if isinstance(value, dict):
        return "{" + ", ".join(f"{key}: {as_written(item)}" for key, item in value.items()) + "}"
    if isinstance(value, (list, tuple)):
        return "[" + ", ".join(map(as_written, value)) + "]"
    return value if isinstance(value, str) else json.dumps(value)
