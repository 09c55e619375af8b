"""Small files of a run's directory: replaced whole, or a line at a time."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any


def write_whole(path: Path, text: str) -> None:
    """Replace a file in one step: readers see the old content or the new."""
    temporary = path.with_name(f".{path.name}.new")
    try:
        temporary.write_text(text)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def sync(path: Path) -> None:
    """Make a file, or the names in a directory, durable."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_json(path: Path, content: Any) -> None:
    """`write_whole` for a JSON document."""
    write_whole(path, json.dumps(content, indent=1) + "\n")


def append_line(path: Path, content: dict[str, Any]) -> None:
    """Add one JSON line."""
    with path.open("a") as stream:
        stream.write(json.dumps(content) + "\n")
