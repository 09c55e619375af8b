"""Conversations, and questions with their answers."""

from __future__ import annotations

import gzip
import itertools
import json
import re
import zipfile
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import yaml

from nano_pretrain.prepare.extract.members import member_names, member_texts


def chat_json(archive: zipfile.ZipFile, member: str) -> Iterator[str]:
    """One document a conversation between people.

    The file is a JSON mapping of conversations, each with lists of `messages` that have a `sender` and a `text`.

    Args:
        archive: the opened wheel.
        member: name of the file.
    """
    (name,) = member_names(archive, [member])
    for conversation in json.loads(archive.read(name)).values():
        messages = list(itertools.chain.from_iterable(conversation["messages"]))
        senders = list(dict.fromkeys(message["sender"] for message in messages))
        letters = {sender: chr(ord("A") + number % 26) for number, sender in enumerate(senders)}
        yield "\n".join(f"{letters[message['sender']]}: {_one_line(message['text'])}" for message in messages)


def chat_yaml(archive: zipfile.ZipFile, include: Sequence[str]) -> Iterator[str]:
    """One document a conversation of YAML files with a list `conversations` of lists of turns, user first.

    Args:
        archive: the opened wheel.
        include: patterns of member names.
    """
    loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
    for _, text in member_texts(archive, include):
        for turns in yaml.load(text, Loader=loader)["conversations"]:
            yield _user_and_assistant(_one_line(str(turn)) for turn in turns)


def instructions(archive: zipfile.ZipFile, include: Sequence[str], question: str, answer: str) -> Iterator[str]:
    """One document a record of JSON-lines files.

    Args:
        archive: the opened wheel.
        include: patterns of member names.
        question: key of the user's turn.
        answer: key of the assistant's turn.
    """
    for _, text in member_texts(archive, include):
        for line in filter(None, text.splitlines()):
            record = json.loads(line)
            yield _user_and_assistant([record[question], record[answer]])


def code_answers(
    archive: zipfile.ZipFile, member: str, question: Sequence[str], answer: str, drop_comments: Sequence[str]
) -> Iterator[str]:
    """One document a record of a gzipped JSON list: a problem and the program that solves it.

    Args:
        archive: the opened wheel.
        member: name of the file.
        question: keys whose texts make the problem.
        answer: key of the program.
        drop_comments: beginnings of comments that a prompt left in most programs; such lines are left out.
    """
    boilerplate = re.compile(rf"^[ \t]*#[ \t]*(?:{'|'.join(map(re.escape, drop_comments))}).*\n?", re.MULTILINE)
    (name,) = member_names(archive, [member])
    records: list[dict[str, Any]] = json.loads(gzip.decompress(archive.read(name)))
    for record in records:
        problem = "\n\n".join(record[key].strip() for key in question)
        program = boilerplate.sub("", record[answer]) if drop_comments else record[answer]
        yield f"Problem: {problem}\n\nSolution:\n\n{program.strip()}"


def _user_and_assistant(turns: Iterable[str]) -> str:
    speakers = itertools.cycle(["User", "Assistant"])
    return "\n".join(f"{speaker}: {turn.strip()}" for speaker, turn in zip(speakers, turns, strict=False))


def _one_line(text: str) -> str:
    return " ".join(text.split())
