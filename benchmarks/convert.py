"""Conversion of a checkpoint of real size, both ways: time against a plain copy, and peak memory.

    python -m benchmarks.convert [--recipe nano_12b_v2] [--dir DIRECTORY] [--layers N]

A random BF16 checkpoint of the recipe's model, for the 12B 24.6 GB, is imported, and what came of it exported again;
each conversion is the command in a process of its own, without verification, which the command times by itself.
Beside each, in the same run, `shutil.copytree` with an fsync of every file copies the same source. Before each of the
four the source is dropped from the page cache. Memory is the peak of the process' anonymous pages (RssAnon, each
20 ms): resident memory without the page cache. The directory needs room for two checkpoints: what is not needed any
more is removed, so the two directions come one after the other. At the end every file has the checksum it began with.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from nano_pretrain.checkpoint.files import write_json
from nano_pretrain.compose import compose
from nano_pretrain.convert.config import hf_config
from nano_pretrain.convert.export import divided
from nano_pretrain.convert.hf_files import INDEX
from nano_pretrain.convert.names import hf_tensors
from nano_pretrain.convert.safetensors_file import Stored, stored_bytes, write_safetensors
from nano_pretrain.recipe.schema import HfConfig, Recipe

NUMBERS = 1 << 25
"""Random numbers that a tensor takes its values from, each from another place on."""


def write_random(recipe: Recipe, directory: Path) -> dict[str, str]:
    """A checkpoint with random weights; the checksum of each file."""
    directory.mkdir()
    numbers = torch.randn(2 * NUMBERS, generator=torch.Generator().manual_seed(0)).bfloat16()
    files = divided([(t.name, t.shape, torch.bfloat16) for t in hf_tensors(recipe.model)], HfConfig().file_gigabytes)
    places = {tensor[0]: 7919 * n % NUMBERS for n, group in enumerate(files.values()) for tensor in group}

    def blocks(tensor: Stored) -> Iterator[Tensor]:
        left, start = stored_bytes(tensor) // 2, places[tensor[0]] + len(tensor[0])
        while left:
            yield numbers[start : start + min(left, NUMBERS)]
            left -= min(left, NUMBERS)

    checksums = {
        name: write_safetensors(directory / name, group, blocks, lambda _: None).xxh3 for name, group in files.items()
    }
    write_json(
        directory / INDEX, {"metadata": {}, "weight_map": {t[0]: n for n, group in files.items() for t in group}}
    )
    write_json(directory / "config.json", hf_config(recipe, max_position_embeddings=4096, torch_dtype="bfloat16"))
    return checksums


def drop(directory: Path) -> None:
    """Drop the files of a directory from the page cache."""
    for path in _files(directory):
        with path.open("rb") as stream:
            os.fsync(stream.fileno())
            os.posix_fadvise(stream.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def _files(directory: Path) -> list[Path]:
    return [path for path in directory.rglob("*") if path.is_file()]


def copy(source: Path, target: Path) -> None:
    """A plain copy that is on the disk when it ends, as a conversion is."""
    shutil.copytree(source, target)
    for path in _files(target):
        with path.open("rb") as stream:
            os.fsync(stream.fileno())


def timed(work: Callable[[], None], source: Path) -> float:
    """Seconds, the source read from the disk."""
    drop(source)
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def command(*arguments: str) -> int:
    """Run a verb; its peak of anonymous memory in bytes."""
    peak = 0
    with subprocess.Popen([sys.executable, "-m", "nano_pretrain", *arguments]) as process:
        while process.poll() is None:
            peak = max(peak, _anonymous(process.pid))
            time.sleep(0.02)
    if process.returncode:
        sys.exit(f"{' '.join(arguments)}: exit code {process.returncode}")
    return peak


def _anonymous(pid: int) -> int:
    try:
        found = re.search(r"^RssAnon:\s+(\d+) kB", Path(f"/proc/{pid}/status").read_text(), re.MULTILINE)
    except OSError:
        return 0
    return 1024 * int(found[1]) if found else 0


def converted(name: str, source: Path, size: int, arguments: list[str], spare: Path) -> None:
    """Copy and convert, and say how long it took."""
    copying = timed(lambda: copy(source, spare), source)
    shutil.rmtree(spare)
    peaks: list[int] = []
    converting = timed(lambda: peaks.append(command(*arguments)), source)
    print(
        f"{name}: {converting:.1f} s ({size / 1e9 / converting:.2f} GB/s), a plain copy {copying:.1f} s, "
        f"ratio {converting / copying:.2f}; peak anonymous memory {peaks[0] / 1e9:.2f} GB",
        flush=True,
    )


def main() -> None:
    """Print the figures of both directions."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--recipe", default="nano_12b_v2")
    parser.add_argument("--layers", type=int, help="only the first N layers")
    parser.add_argument(
        "--dir", type=Path, help="where the checkpoints are written; default: where temporary files are"
    )
    asked = parser.parse_args()
    recipe = compose([f"recipe={asked.recipe}"]).recipe
    recipe = replace(recipe, model=replace(recipe.model, pattern=recipe.model.pattern[: asked.layers]))
    if asked.dir is not None:
        asked.dir.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=asked.dir) as name:
        measure(recipe, asked.recipe, Path(name))


def measure(recipe: Recipe, name: str, directory: Path) -> None:
    """Both directions, in turn, in the directory."""
    source, spare, run = directory / "hf", directory / "spare", directory / "run"
    began = write_random(recipe, source)
    size = sum(path.stat().st_size for path in source.iterdir())
    common = ["hf.verify=false", f"run.dir='{directory}'", "run.name=run"]
    converted("import", source, size, ["import", f"recipe={name}", f"hf.path='{source}'", *common], spare)
    shutil.rmtree(source)
    converted("export", run / "checkpoints", size, ["export", f"recipe={run / 'recipe.yaml'}", *common], spare)
    from nano_pretrain.checkpoint.checksum import file_checksum

    different = [file for file, checksum in began.items() if file_checksum(run / "hf" / file) != checksum]
    print(f"{len(began) - len(different)} of {len(began)} files are what they were, {size / 1e9:.2f} GB")
    sys.exit(1 if different else 0)


if __name__ == "__main__":
    main()
