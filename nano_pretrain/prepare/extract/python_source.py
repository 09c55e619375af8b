"""Python files as prose: their docstrings, parsed and never run."""

from __future__ import annotations

import ast
import warnings
import zipfile
from collections.abc import Iterator, Sequence

from nano_pretrain.prepare.extract.members import member_texts

Documented = ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef


def docstrings(
    archive: zipfile.ZipFile, include: Sequence[str], exclude: Sequence[str] = (), min_characters: int = 200
) -> Iterator[str]:
    """One document a file: its docstrings in the order of the file, each under the name of what it documents.

    Args:
        archive: the opened wheel.
        include: patterns of member names.
        exclude: patterns of members left out.
        min_characters: docstrings shorter than this are left out.
    """
    for name, text in member_texts(archive, include, exclude):
        module = name.removesuffix(".py").removesuffix("/__init__").replace("/", ".")
        parts = [f"{path}\n\n{doc}" for path, doc in _documented(_parse(text), module) if len(doc) >= min_characters]
        if parts:
            yield "\n\n".join(parts)


def _parse(text: str) -> ast.Module:
    with warnings.catch_warnings():
        # Old escapes in other people's strings are no concern of whoever runs `prepare`.
        warnings.simplefilter("ignore", SyntaxWarning)
        warnings.simplefilter("ignore", DeprecationWarning)
        return ast.parse(text)


def _documented(node: Documented, path: str) -> Iterator[tuple[str, str]]:
    if doc := ast.get_docstring(node):
        yield path, doc
    for child in node.body:
        if isinstance(child, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            yield from _documented(child, f"{path}.{child.name}")
