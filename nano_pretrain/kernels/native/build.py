"""Compiling the native kernels for this CPU, once."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import platform
import shlex
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

SOURCES = Path(__file__).parent
SECONDS = 300
"""A compiler that takes longer than this counts as failed."""


class BuildError(Exception):
    """The kernels cannot be compiled here; the message says why in one line."""


def build() -> Path:
    """The shared library for this machine: from the cache, or compiled now (some ten seconds).

    The cache is `$XDG_CACHE_HOME/nano_pretrain`, by default `~/.cache/nano_pretrain`; the file's name is a hash of the
    sources, the compiler and the CPU, since home directories are shared by unlike machines. Of several processes one
    compiles and the others wait.

    Raises:
        BuildError: no compiler, or it failed.
    """
    compiler = _compiler()
    command = [*compiler, *_flags()]
    try:
        cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "nano_pretrain"
        target = cache / f"kernels-{_fingerprint(command)}.so"
        if _is_whole(target):
            return target
        cache.mkdir(parents=True, exist_ok=True)
        with (cache / "build.lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not _is_whole(target):
                print("compiling the CPU kernels, once for this machine (some ten seconds)", file=sys.stderr)
                for abandoned in cache.glob(".build-*"):
                    shutil.rmtree(abandoned, ignore_errors=True)
                _compile(command, target)
    except (OSError, RuntimeError) as error:  # RuntimeError: a user without a home
        raise BuildError(f"{error}") from error
    return target


def _compiler() -> list[str]:
    """GCC, because its OpenMP runtime is the one that torch has loaded; two of them would fight for the cores."""
    names = [os.environ["CXX"]] if os.environ.get("CXX", "").strip() else ["g++", "c++"]
    for name in names:
        with contextlib.suppress(ValueError):  # quotes that do not match
            candidate = shlex.split(name)
            macros = _output([*candidate, "-dM", "-E", "-x", "c++", os.devnull]) if shutil.which(candidate[0]) else ""
            if "__GNUC__" in macros and "__clang__" not in macros:
                return candidate
    if names != ["g++", "c++"]:
        raise BuildError(f"CXX={names[0]} is not GCC; unset it, or let it name g++")
    raise BuildError("no GCC found as g++ or c++; install g++")


def _flags() -> list[str]:
    # Without errno and traps, comparisons and roots vectorise; the order of operations stays as written.
    flags = ["-O3", "-std=c++17", "-fPIC", "-fopenmp", "-fno-math-errno", "-fno-trapping-math", "-fno-signed-zeros"]
    if platform.machine() in ("x86_64", "AMD64"):
        return [*flags, "-march=native", "-mprefer-vector-width=512"]
    return [*flags, "-mcpu=native"]


def _fingerprint(command: list[str]) -> str:
    digest = hashlib.sha256("\0".join([*command, _output([command[0], "--version"]), _cpu()]).encode())
    for source in sorted(SOURCES.glob("*.[ch]*")):
        digest.update(source.name.encode() + b"\0" + source.read_bytes())
    return digest.hexdigest()[:20]


def _cpu() -> str:
    """What the compiler's `native` depends on: the CPU's model and its instruction sets."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return "\n".join(sorted({line for line in lines if line.startswith(("model name", "flags", "Features"))}))


def _compile(command: list[str], target: Path) -> None:
    """Each source by itself, in parallel; linked beside the target and renamed, so that it is whole or absent."""
    with tempfile.TemporaryDirectory(prefix=".build-", dir=target.parent) as scratch:
        sources = sorted(SOURCES.glob("*.cpp"))
        objects = [Path(scratch, f"{source.stem}.o") for source in sources]
        jobs = [[*command, "-c", str(s), "-o", str(o)] for s, o in zip(sources, objects, strict=True)]
        with ThreadPoolExecutor(max(1, len(os.sched_getaffinity(0)))) as pool:
            list(pool.map(_run, jobs))
        library = Path(scratch, "kernels.so")
        _run([*command, "-shared", *map(str, objects), "-o", str(library)])
        _digest_file(target).write_text(_digest(library))
        with library.open("rb") as file:
            os.fsync(file.fileno())
        library.rename(target)


def _is_whole(target: Path) -> bool:
    """Whether the library is there as it was compiled: loading one that was cut short ends the process."""
    digest = _digest_file(target)
    return target.is_file() and digest.is_file() and digest.read_text() == _digest(target)


def _digest_file(target: Path) -> Path:
    return target.with_suffix(".sha256")


def _digest(library: Path) -> str:
    return hashlib.sha256(library.read_bytes()).hexdigest()


def _run(command: list[str]) -> None:
    try:
        subprocess.run(command, check=True, capture_output=True, text=True, timeout=SECONDS)
    except subprocess.CalledProcessError as error:
        first = next((line for line in error.stderr.splitlines() if "error" in line), error.stderr.strip()[:200])
        raise BuildError(f"{shlex.join(command[:1])} failed: {first}") from error
    except subprocess.TimeoutExpired as error:
        raise BuildError(f"{shlex.join(command[:1])} took longer than {SECONDS} s") from error


def _output(command: list[str]) -> str:
    try:
        return subprocess.run(command, check=False, capture_output=True, text=True, timeout=SECONDS).stdout
    except (OSError, subprocess.TimeoutExpired):
        return ""
