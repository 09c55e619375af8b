"""Compiling the native kernels for this CPU, once."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import platform
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

SOURCES = Path(__file__).parent
CPU_INFO = Path("/proc/cpuinfo")
LIBRARIES = ("-lstdc++", "-lm")
"""Those that g++ links by itself and gcc does not."""

SECONDS = 300
"""A compiler that takes longer than this counts as failed."""

SCRATCH_SECONDS = 24 * 3600
"""Scratch directories of compilations that were killed go after this time: where homes are shared, a younger one may be
in use on another machine, since locks may hold on one machine only."""

_ERROR = re.compile(r"\berror:|\bld: cannot", re.IGNORECASE)
_TEMPORARY_NAME = re.compile(r"\S*/(cc\w{6}\.|\.build-)\S*\s*")


class BuildError(Exception):
    """The kernels cannot be compiled here; the message says why in one line."""


def build() -> Path:
    """The shared library for this machine: from the cache, or compiled now (some ten seconds).

    The cache is `$XDG_CACHE_HOME/nano_pretrain`, by default `~/.cache/nano_pretrain`; the file's name is a hash of the
    sources, the compiler and the CPU, since home directories are shared by unlike machines. Of several processes one
    compiles and the others wait; where it fails, it fails for those that waited.

    Raises:
        BuildError: no compiler, or it failed.
    """
    compiler = _compiler()
    try:
        return _built([*compiler, *_flags(compiler)])
    except (OSError, RuntimeError) as error:  # RuntimeError: a user without a home
        reason = str(error).rstrip(".")
        raise BuildError(f"{reason}; set XDG_CACHE_HOME to a directory that can be written") from error


def _built(command: list[str]) -> Path:
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "nano_pretrain"
    target = cache / f"kernels-{_fingerprint(command)}.so"
    if _is_whole(target):
        return target
    cache.mkdir(parents=True, exist_ok=True)
    failure = target.with_suffix(".failed")
    failed_before = _written(failure)
    with (cache / "build.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if _is_whole(target):
            return target
        if _written(failure) not in (None, failed_before):
            raise BuildError(failure.read_text())
        print("compiling the CPU kernels, once for this machine (some ten seconds)", file=sys.stderr)
        _remove_abandoned(cache)
        try:
            _compile(command, target)
        except BuildError as error:
            with contextlib.suppress(OSError):  # a full disk
                failure.write_text(str(error))
            raise
        failure.unlink(missing_ok=True)
    return target


def _written(file: Path) -> int | None:
    """When, in nanoseconds of the file system's clock; None if there is no such file."""
    return file.stat().st_mtime_ns if file.exists() else None


def _remove_abandoned(cache: Path) -> None:
    for scratch in cache.glob(".build-*"):
        with contextlib.suppress(OSError):  # another machine was faster, or another user's
            if time.time() - scratch.stat().st_mtime > SCRATCH_SECONDS:
                shutil.rmtree(scratch)


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


def _flags(compiler: list[str]) -> list[str]:
    # Without errno and traps, comparisons and roots vectorise; the order of operations stays as written.
    flags = ["-O3", "-std=c++17", "-fPIC", "-fopenmp", "-fno-math-errno", "-fno-trapping-math", "-fno-signed-zeros"]
    if platform.machine() in ("x86_64", "AMD64"):
        flags += ["-march=native", "-mprefer-vector-width=512"]
    else:
        flags += ["-mcpu=native"]
    # What CXX itself sets with a value, as -march=x86-64-v3, holds: of two the compiler would take the later.
    given = {word.partition("=")[0] for word in compiler}
    return [flag for flag in flags if flag.partition("=")[0] not in given]


def _fingerprint(command: list[str]) -> str:
    digest = hashlib.sha256("\0".join([*command, *LIBRARIES, _output([*command, "--version"]), _cpu()]).encode())
    for source in sorted(SOURCES.glob("*.[ch]*")):
        digest.update(source.name.encode() + b"\0" + source.read_bytes())
    return digest.hexdigest()[:20]


def _cpu() -> str:
    """What the compiler's `native` depends on: the CPU's model and its instruction sets."""
    try:
        lines = CPU_INFO.read_text().splitlines()
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
        _run([*command, "-shared", *map(str, objects), *LIBRARIES, "-o", str(library)])
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
    program = shlex.join(command[:1])
    try:
        _finished(command).check_returncode()
    except subprocess.CalledProcessError as error:
        raise BuildError(f"{program} {_ending(error.returncode, error.stderr)}") from error
    except subprocess.TimeoutExpired as error:
        raise BuildError(f"{program} took longer than {SECONDS} s") from error


def _ending(code: int, said: str) -> str:
    """How a compiler failed: a line, the same each time."""
    if code < 0:
        name = signal.Signals(-code).name if -code in set(signal.Signals) else f"signal {-code}"
        return f"was ended by {name}"
    lines = [line.strip() for line in said.splitlines() if line.strip()] or [f"exit code {code}"]
    first = next(filter(_ERROR.search, lines), lines[0])
    return f"failed: {_TEMPORARY_NAME.sub('', first)[:200]}"


def _output(command: list[str]) -> str:
    try:
        return _finished(command).stdout
    except (OSError, subprocess.TimeoutExpired):
        return ""


def _finished(command: list[str]) -> subprocess.CompletedProcess[str]:
    """The command's end and output, in English."""
    language = {**os.environ, "LC_ALL": "C"}
    return subprocess.run(
        command, check=False, capture_output=True, text=True, errors="replace", timeout=SECONDS, env=language
    )
