"""Native kernels with a mistake in their source, to see that the tests see it."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from nano_pretrain.kernels.native import build, library


@contextmanager
def broken_kernels(file: str, right: str, wrong: str, directory: Path, only: str) -> Iterator[None]:
    """Kernels compiled with `wrong` in the place of `right`, which `file` has once, are in use inside.

    Args:
        file: name of a source.
        right: text in it.
        wrong: what it becomes.
        directory: an empty one, for sources and library.
        only: how the names of the sources that are compiled begin.
    """
    sources = Path(shutil.copytree(build.SOURCES, directory / "sources"))
    text = (sources / file).read_text()
    assert text.count(right) == 1
    (sources / file).write_text(text.replace(right, wrong))
    for source in sources.glob("*.cpp"):
        if not source.name.startswith(only):
            source.unlink()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(build, "SOURCES", sources)
        patch.setenv("XDG_CACHE_HOME", str(directory))
        patch.setattr(library, "_loaded", None)
        with library.implementation("native"):
            yield
