"""Texts that need no rendering: whole files, and lists of sentences."""

from __future__ import annotations

import itertools
import zipfile
from collections.abc import Iterator, Sequence

from nano_pretrain.prepare.extract.members import member_names, member_texts


def text_files(archive: zipfile.ZipFile, include: Sequence[str], exclude: Sequence[str] = ()) -> Iterator[str]:
    """One document a file.

    Args:
        archive: the opened wheel.
        include: patterns of member names.
        exclude: patterns of members left out.
    """
    for _, text in member_texts(archive, include, exclude):
        yield text


def sentences(
    archive: zipfile.ZipFile, member: str, languages: Sequence[str], per_document: int, exclude: Sequence[str] = ()
) -> Iterator[str]:
    """Lines `language<TAB>sentence`; a document is a run of sentences of one language, which have no other connection.

    Args:
        archive: the opened wheel.
        member: name of the file.
        languages: codes of the languages kept.
        per_document: sentences of a document.
        exclude: parts of words, in lower case; a sentence that has one is left out.
    """
    (name,) = member_names(archive, [member])
    lines = archive.read(name).decode("utf-8").splitlines()
    clean = [line for line in lines if not any(word in line.lower() for word in exclude)]
    for language in languages:
        own = iter([line.removeprefix(f"{language}\t") for line in clean if line.startswith(f"{language}\t")])
        while chunk := list(itertools.islice(own, per_document)):
            yield "\n".join(chunk)
