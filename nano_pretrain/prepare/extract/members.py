"""Members of a wheel, by pattern."""

from __future__ import annotations

import fnmatch
import zipfile
from collections.abc import Iterator, Sequence


def member_names(archive: zipfile.ZipFile, include: Sequence[str], exclude: Sequence[str] = ()) -> list[str]:
    """Sorted names that match a pattern of `include` and none of `exclude`; `*` also matches slashes.

    Raises:
        ValueError: nothing matches.
    """
    names = [name for name in archive.namelist() if _matches(name, include) and not _matches(name, exclude)]
    if not names:
        raise ValueError(f"no member matches {list(include)}")
    return sorted(names)


def member_texts(
    archive: zipfile.ZipFile, include: Sequence[str], exclude: Sequence[str] = ()
) -> Iterator[tuple[str, str]]:
    """Name and text of each member that `member_names` finds; bytes that are no UTF-8 become U+FFFD."""
    for name in member_names(archive, include, exclude):
        yield name, archive.read(name).decode("utf-8", errors="replace")


def _matches(name: str, patterns: Sequence[str]) -> bool:
    return any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)
