"""Compiling the native kernels, and what is said where it fails."""

from __future__ import annotations

import fcntl
import os
import shutil
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import IO

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


def failing(directory: Path, monkeypatch: pytest.MonkeyPatch, script: str) -> Path:
    """CXX is a GCC that runs `script`, which has its own file as $0, wherever it shall compile; the file."""
    compiler = directory / "g++-that-fails"
    probes = 'case " $* " in *" -dM "*|*" --version "*) exec g++ "$@";; esac'
    compiler.write_text(f"#!/bin/sh\n{probes}\n{script}\n")
    compiler.chmod(0o755)
    monkeypatch.setenv("CXX", str(compiler))
    return compiler


def age(path: Path, days: float) -> None:
    then = time.time() - days * 24 * 3600
    os.utime(path, (then, then))


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


def test_another_cpu_is_another_file(small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def name(cpu: str) -> str:
        (tmp_path / "cpuinfo").write_text(f"processor : 0\n{cpu}\n")
        return build._fingerprint(["g++"])

    monkeypatch.setattr(build, "CPU_INFO", tmp_path / "cpuinfo")
    one = name("model name : A\nflags : avx2\ncpu MHz : 2000")
    assert one == name("model name : A\nflags : avx2\ncpu MHz : 3000")
    others = ["model name : B\nflags : avx2", "model name : A\nflags : avx2 avx512f", "Features : asimd sve"]
    assert len({one, *map(name, others)}) == 4


def test_the_architecture_in_cxx_holds() -> None:
    flags = build._flags(["g++", "-march=x86-64-v3", "-mcpu=neoverse-n1"])
    assert not [flag for flag in flags if flag.startswith(("-march", "-mcpu"))]
    assert {"-march=native", "-mcpu=native"} & {*build._flags(["g++"])}


def test_a_driver_for_c_links_what_cpp_needs(small: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (build.SOURCES / "thrown.cpp").write_text("void thrown() { throw 1; }\n")
    monkeypatch.setenv("CXX", "gcc")
    library.use_native()


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


@pytest.mark.parametrize(
    ("script", "reason"),
    [
        # An assembler too old for -march=native, with the temporary names that GCC gives.
        (
            't=$(mktemp -u /tmp/ccXXXXXX.s); echo "$t: Assembler messages:" >&2; for line in 7 8; do '
            "echo \"$t:$line: Error: no such instruction: 'vdpbf16ps'\" >&2; done; exit 1",
            "failed: Error: no such instruction: 'vdpbf16ps'",
        ),
        (
            'echo "ld: cannot find -lstdc++" >&2; echo "collect2: error: ld returned 1 exit status" >&2; exit 1',
            "failed: ld: cannot find -lstdc++",
        ),
        ("printf '\\nno licence\\n\\377\\n' >&2; exit 1", "failed: no licence"),
        ("exit 3", "failed: exit code 3"),
        ("kill -KILL $$", "was ended by SIGKILL"),
        (f"kill -{signal.SIGRTMIN + 1} $$", f"was ended by signal {signal.SIGRTMIN + 1}"),
    ],
)
def test_why_it_failed_is_one_line_and_the_same_each_time(
    small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, script: str, reason: str
) -> None:
    compiler = failing(tmp_path, monkeypatch, script)
    said = {library.choose_kernels("auto") for _ in range(2)}
    assert said == {f"plain PyTorch, about half as fast as native: {compiler} {reason}"}


def test_what_failed_for_one_failed_for_those_that_waited(
    small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    compiler = failing(tmp_path, monkeypatch, 'echo x >> "$0.runs"; until [ -e "$0.go" ]; do sleep 0.01; done; exit 1')
    runs, go = Path(f"{compiler}.runs"), Path(f"{compiler}.go")
    lock = fcntl.flock
    arrived: list[IO[str]] = []

    def locked(file: IO[str], operation: int) -> None:
        """The compiler fails as soon as all have come, so that all but one have to wait."""
        arrived.append(file)
        if len(arrived) == 3:
            go.touch()
        lock(file, operation)

    monkeypatch.setattr(fcntl, "flock", locked)
    with ThreadPoolExecutor(3) as ranks:
        said = set(ranks.map(lambda _: library.choose_kernels("auto"), range(3)))
    assert said == {f"plain PyTorch, about half as fast as native: {compiler} failed: exit code 1"}
    assert runs.read_text().count("x") == 1
    library.choose_kernels("auto")  # a later start
    assert runs.read_text().count("x") == 2


def test_no_place_for_the_library(small: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", "/proc/none")
    with pytest.raises(BuildError, match=r"/proc/none.*; set XDG_CACHE_HOME to a directory that can be written$"):
        build.build()


def test_a_cache_that_is_only_read_serves(small: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(*args: object, **kwargs: object) -> None:
        raise OSError(30, "Read-only file system")

    path = build.build()
    for module, name in ((Path, "mkdir"), (Path, "unlink"), (fcntl, "flock")):
        monkeypatch.setattr(module, name, refused)
    assert build.build() == path


def test_no_home(small: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def nowhere() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setattr(Path, "home", nowhere)
    with pytest.raises(BuildError, match="home directory; set XDG_CACHE_HOME"):
        build.build()


def test_what_a_killed_compiler_left_is_removed_when_it_is_old(small: Path) -> None:
    for name, days in ((".build-abandoned", 2), (".build-elsewhere", 0.5)):
        (small / name).mkdir(parents=True)
        (small / name / "scan.o").touch()
        age(small / name, days)
    build.build()
    assert [entry.name for entry in small.glob(".build-*")] == [".build-elsewhere"]


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
