"""Source text of installed and own modules, read without importing them."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from importlib.metadata import distribution
from pathlib import Path

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
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("megatron.core"):
            for alias in node.names:
                yield node.module or "", alias.name
