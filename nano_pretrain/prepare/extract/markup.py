"""HTML fragments and DocBook to plain text.

Tags are cut out by a pattern and not by `html.parser`, whose reading of odd markup differs between Python releases:
the text, and with it every shard's hash, must not.
"""

from __future__ import annotations

import html
import re

_HTML_BLOCKS = {"address", "article", "blockquote", "br", "caption", "dd", "div", "dl", "dt", "figure", "footer", "h1"}
_HTML_BLOCKS |= {"h2", "h3", "h4", "h5", "h6", "header", "hr", "li", "ol", "p", "pre", "section", "table", "td", "th"}
_HTML_BLOCKS |= {"title", "tr", "ul"}
_DOCBOOK_BLOCKS = {"entry", "itemizedlist", "listitem", "literallayout", "note", "important", "orderedlist", "para"}
_DOCBOOK_BLOCKS |= {"programlisting", "row", "screen", "sect1", "sect2", "variablelist", "varlistentry"}
BLOCKS = frozenset(_HTML_BLOCKS | _DOCBOOK_BLOCKS)
ITEMS = frozenset({"li", "listitem"})
VERBATIM = frozenset({"pre", "screen", "literallayout", "programlisting"})
HIDDEN = frozenset({"script", "style", "revhistory", "mediaobject"})
QUOTES = frozenset({"quote", "q"})

_MARKUP = re.compile(r"(<!--.*?-->|<[?!][^>]*>|</?[A-Za-z][^<>]*>)", re.DOTALL)
_TAG = re.compile(r"<(/?)([A-Za-z][\w:-]*)")


def markup_to_text(markup: str) -> str:
    """Text of an HTML or DocBook fragment: one line a block, list items with a dash, references resolved."""
    writer = _Writer()
    for number, piece in enumerate(_MARKUP.split(markup)):
        if number % 2 == 0:
            writer.text(html.unescape(piece))
        elif match := _TAG.match(piece):
            writer.tag(match[2].lower(), closing=bool(match[1]), empty=piece.endswith("/>"))
    return writer.finish()


class _Writer:
    def __init__(self) -> None:
        self._lines: list[str] = []
        self._line = ""
        self._hidden = 0
        self._verbatim = 0
        self._item = False

    def text(self, text: str) -> None:
        if self._hidden:
            return
        if not self._verbatim:
            self._line += re.sub(r"\s+", " ", text)
            return
        *whole, last = text.split("\n")
        for line in whole:
            self._line += line
            self._end_line()
        self._line += last

    def tag(self, name: str, *, closing: bool, empty: bool) -> None:
        if name in QUOTES:
            self._line += '"'
        if name in BLOCKS:
            self._end_line()
        # Set at the item's start and used by its first line, which may lie in a paragraph of its own.
        self._item = not closing if name in ITEMS else self._item
        change = 0 if empty else -1 if closing else 1
        self._hidden = max(self._hidden + change * (name in HIDDEN), 0)
        self._verbatim = max(self._verbatim + change * (name in VERBATIM), 0)

    def _end_line(self) -> None:
        line = self._line.rstrip() if self._verbatim else re.sub(r" {2,}", " ", self._line).strip()
        self._line = ""
        if line:
            self._lines.append(f"- {line}" if self._item else line)
            self._item = False

    def finish(self) -> str:
        self._end_line()
        return "\n".join(self._lines)
