"""Reference works: articles in nested JSON, a glossary in DocBook, API descriptions with HTML fragments."""

from __future__ import annotations

import json
import re
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from nano_pretrain.prepare.extract.markup import markup_to_text
from nano_pretrain.prepare.extract.members import member_names, member_texts


def articles(archive: zipfile.ZipFile, include: Sequence[str], title: Sequence[str]) -> Iterator[str]:
    """One document a JSON file: nested headings, with text in HTML at the leaves.

    Args:
        archive: the opened wheel.
        include: patterns of member names.
        title: path of keys to the title of an article.
    """
    for _, text in member_texts(archive, include):
        article = json.loads(text)
        name = _look_up(article, title)
        lines = [f"# {name}"] if name else []
        # Fields are repeated under several headings; each is printed where it comes first.
        seen: set[str] = set()
        for heading, content in article.items():
            lines += ["", f"## {heading}", "", *_leaves(content, seen)]
        yield "\n".join(lines)


def _look_up(content: Mapping[str, Any], path: Sequence[str]) -> str:
    value: Any = content
    for key in path:
        value = value.get(key, {}) if isinstance(value, Mapping) else {}
    return markup_to_text(value) if isinstance(value, str) else ""


def _leaves(content: Mapping[str, Any], seen: set[str], path: str = "") -> Iterator[str]:
    for key, value in content.items():
        label = path if key == "text" else f"{path}: {key.strip()}" if path else key.strip()
        if isinstance(value, Mapping):
            yield from _leaves(value, seen, label)
        elif isinstance(value, str) and (line := _labelled(label, markup_to_text(value))) and line not in seen:
            seen.add(line)
            yield line


def _labelled(label: str, text: str) -> str:
    if not text:
        return ""
    last = label.rpartition(": ")[2]
    # Many texts begin with the last part of their label.
    if text.lower().startswith(f"{last.lower()}:"):
        return f"{label.removesuffix(last)}{text}"
    return f"{label}: {text}"


def glossary(archive: zipfile.ZipFile, member: str, entities: Mapping[str, str]) -> Iterator[str]:
    """One document for each entry of a DocBook glossary, and for each section of the essays around it.

    Args:
        archive: the opened wheel.
        member: name of the file.
        entities: text of the entities that the document type declares for itself.
    """
    (name,) = member_names(archive, [member])
    book = re.sub(r"<!--.*?-->", "", archive.read(name).decode("utf-8"), flags=re.DOTALL)
    for entity, replacement in entities.items():
        book = book.replace(f"&{entity};", replacement)
    for entry in re.findall(r"<glossentry\b.*?</glossentry>", book, flags=re.DOTALL):
        yield _glossary_entry(entry)
    essays = re.sub(r"<glossary\b.*</glossary>", "", book, flags=re.DOTALL)
    for essay in re.split(r"(?=<(?:chapter|appendix|sect1)\b)", essays)[1:]:
        yield markup_to_text(essay)


def _glossary_entry(entry: str) -> str:
    term, _, rest = entry.partition("</glossterm>")
    abbreviation, _, definition = rest.partition("<glossdef>")
    head = " ".join(markup_to_text(part) for part in (term, abbreviation)).replace(" //", "")
    return f"{head.strip()}\n\n{markup_to_text(definition)}"


def api_reference(archive: zipfile.ZipFile, directory: str, services: Sequence[str]) -> Iterator[str]:
    """One document an operation of a web service: what it does, its parameters and its results.

    Args:
        archive: the opened wheel.
        directory: where the service descriptions lie, `SERVICE/VERSION/service-2.json`.
        services: names of the services kept; the newest version of each.
    """
    for service in services:
        newest = member_names(archive, [f"{directory}/{service}/*/service-2.json"])[-1]
        description = json.loads(archive.read(newest))
        title = description["metadata"]["serviceFullName"]
        for name, operation in description["operations"].items():
            yield _operation_page(f"{title}: {name}", operation, description["shapes"])


def _operation_page(title: str, operation: Mapping[str, Any], shapes: Mapping[str, Any]) -> str:
    parts = [title, markup_to_text(operation.get("documentation", ""))]
    for heading, key in (("Request parameters", "input"), ("Response elements", "output")):
        shape = shapes.get(operation.get(key, {}).get("shape"), {})
        if members := list(_members(shape)):
            parts.append("\n".join([heading, *members]))
    return "\n\n".join(part for part in parts if part)


def _members(shape: Mapping[str, Any]) -> Iterator[str]:
    for name, member in shape.get("members", {}).items():
        if text := markup_to_text(member.get("documentation", "")):
            required = " (required)" if name in shape.get("required", []) else ""
            yield f"{name}{required}: {text}"
