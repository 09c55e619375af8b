"""Compiling the native kernels, and what is said where it fails."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from nano_pretrain.kernels.native import build, library
from nano_pretrain.kernels.native.build import BuildError
from nano_pretrain.recipe.errors import UserError

pytestmark = pytest.mark.usefixtures("plain")


@pytest.fixture
def small(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """One short source in place of all, an empty cache, nothing loaded; the directory of the cache."""
    sources = tmp_path / "sources"
    sources.mkdir()
    for name in ("common.h", "activation.cpp"):
        shutil.copy2(build.SOURCES / name, sources)
    monkeypatch.setattr(build, "SOURCES", sources)
    monkeypatch.setattr(library, "_loaded", None)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return tmp_path / "nano_pretrain"


def test_it_is_compiled_once(small: Path, capfd: pytest.CaptureFixture[str]) -> None:
    path = build.build()
    assert path.parent == small
    assert capfd.readouterr().err.count("compiling") == 1
    assert build.build() == path
    assert capfd.readouterr().err == ""
    assert [file.name for file in small.iterdir() if file.suffix == ".so"] == [path.name]


def test_another_source_or_compiler_is_another_file(small: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = build.build()
    source = build.SOURCES / "activation.cpp"
    source.write_text(source.read_text() + "\n// changed\n")
    second = build.build()
    monkeypatch.setenv("CXX", "g++ -O1")
    assert len({first, second, build.build()}) == 3


@pytest.mark.parametrize("word", ["auto", "native"])
def test_no_compiler(small: Path, word: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setenv("PATH", "/nonexistent")
    if word == "auto":
        assert library.choose_kernels(word).endswith("no GCC found as g++ or c++; install g++")
    else:
        with pytest.raises(UserError, match=r"^cluster.cpu_kernels: .*install g\+\+$"):
            library.choose_kernels(word)
    assert library.in_use() == "plain"


@pytest.mark.parametrize("compiler", ["/bin/true", "no-such-program", "'unbalanced", "", " "])
def test_a_compiler_that_is_none(small: Path, compiler: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", compiler)
    if compiler.strip():
        with pytest.raises(BuildError, match="is not GCC; unset it"):
            build.build()
    else:
        assert build.build().is_file()


def test_a_compiler_that_fails_is_quoted(small: Path) -> None:
    (build.SOURCES / "activation.cpp").write_text("int f() { return undeclared; }\n")
    with pytest.raises(BuildError, match=r"g\+\+ failed: .*undeclared"):
        build.build()
    assert not list(small.glob("*.so"))


def test_no_place_for_the_library(small: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", "/proc/none")
    with pytest.raises(BuildError, match="/proc/none"):
        build.build()


def test_no_home(small: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def nowhere() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setattr(Path, "home", nowhere)
    with pytest.raises(BuildError, match="home directory"):
        build.build()


def test_what_a_killed_compiler_left_is_removed(small: Path) -> None:
    (small / ".build-abandoned").mkdir(parents=True)
    build.build()
    assert not list(small.glob(".build-*"))


def test_a_damaged_library_is_compiled_again(small: Path) -> None:
    path = build.build()
    path.write_bytes(path.read_bytes()[:1000])
    library.use_native()
    assert library.in_use() == "native"


def test_of_several_processes_one_compiles(small: Path) -> None:
    code = (
        "import sys; from pathlib import Path; from nano_pretrain.kernels.native import build; "
        f"build.SOURCES = Path({str(build.SOURCES)!r}); print(build.build())"
    )
    command = [sys.executable, "-c", code]
    running = [subprocess.Popen(command, stdout=-1, stderr=-1, text=True, env={**os.environ}) for _ in range(3)]
    done = [process.communicate(timeout=120) for process in running]
    assert len({out for out, _ in done}) == 1
    assert "".join(error for _, error in done).count("compiling") == 1
