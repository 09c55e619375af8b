"""Source text of installed and own modules, read without importing them."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.metadata import distribution
from pathlib import Path
from typing import Any

import nano_pretrain

PRODUCT = Path(nano_pretrain.__path__[0])


def megatron_source(module: str) -> ast.Module:
    """A module of the installed megatron-core."""
    base = Path(str(distribution("megatron-core").locate_file(module.replace(".", "/"))))
    file = base / "__init__.py" if base.is_dir() else base.with_suffix(".py")
    return ast.parse(file.read_text())


def bound_names(tree: ast.Module) -> set[str]:
    """Names that a module defines, assigns or imports anywhere in its text."""
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            names.add(node.name)
        elif isinstance(node, ast.alias):
            names.add((node.asname or node.name).partition(".")[0])
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            names.add(node.id)
    return names


def megatron_imports(file: Path) -> Iterator[tuple[str, str]]:
    """Module and name of each `from megatron.core... import name` in a file."""
    return imports(ast.parse(file.read_text()), "megatron.core")


def imports(tree: ast.Module, package: str) -> Iterator[tuple[str, str]]:
    """Module and name of each `from package... import name`."""
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith(package):
            for alias in node.names:
                yield node.module or "", alias.name


@dataclass(frozen=True)
class Parameters:
    """Those of a function, without self and ctx.

    Attributes:
        names: in their order.
        required: those without a default.
    """

    names: tuple[str, ...]
    required: frozenset[str]


@dataclass(frozen=True)
class Passed:
    """What a call hands over: how many arguments by position, and the others by name."""

    by_position: int
    by_name: frozenset[str]

    def misfits(self, parameters: Parameters) -> frozenset[str]:
        """Names that the function does not know, or needs and does not get."""
        covered = set(parameters.names[: self.by_position]) | self.by_name
        too_many = frozenset(("too many by position",) if self.by_position > len(parameters.names) else ())
        return (self.by_name - set(parameters.names)) | (parameters.required - covered) | too_many


def definition(tree: ast.Module, name: str) -> Any:
    """A function or class, or with a dotted name a method."""
    node: Any = tree
    for part in name.split("."):
        kinds = (ast.FunctionDef, ast.ClassDef)
        node = next(child for child in ast.walk(node) if isinstance(child, kinds) and child.name == part)
    return node


def parameters(tree: ast.Module, name: str) -> Parameters:
    """Of a function, or with a dotted name a method."""
    arguments = definition(tree, name).args
    positional = [argument.arg for argument in (*arguments.posonlyargs, *arguments.args)]
    optional = set(positional[len(positional) - len(arguments.defaults) :])
    pairs = zip(arguments.kwonlyargs, arguments.kw_defaults, strict=True)
    optional |= {argument.arg for argument, default in pairs if default is not None}
    names = [*positional, *(argument.arg for argument in arguments.kwonlyargs)]
    names = [argument for argument in names if argument not in ("self", "ctx")]
    return Parameters(tuple(names), frozenset(names) - optional)


def calls(tree: ast.AST, name: str) -> list[Passed]:
    """Every call of a name, also as the last part of a dotted one; `**` counts as nothing."""
    found = [node for node in ast.walk(tree) if isinstance(node, ast.Call) and _last_name(node.func) == name]
    return [Passed(len(call.args), frozenset(k.arg for k in call.keywords if k.arg)) for call in found]


def _last_name(function: ast.expr) -> str:
    return function.attr if isinstance(function, ast.Attribute) else getattr(function, "id", "")


def keys_written(tree: ast.AST, dictionary: str) -> set[str]:
    """Constant keys that are assigned in a dictionary of this name."""
    return {
        str(node.slice.value)
        for node in ast.walk(tree)
        if isinstance(node, ast.Subscript) and isinstance(node.ctx, ast.Store)
        if isinstance(node.slice, ast.Constant) and getattr(node.value, "id", "") == dictionary
    }
