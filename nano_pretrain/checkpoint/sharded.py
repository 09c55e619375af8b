"""Writing and reading sharded checkpoints through megatron-core's dist_checkpointing."""

from __future__ import annotations

import errno
import logging
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from importlib.metadata import version
from itertools import accumulate
from pathlib import Path
from queue import SimpleQueue
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch.distributed.checkpoint.api import CheckpointException

from nano_pretrain.checkpoint.files import sync
from nano_pretrain.checkpoint.manifest import (
    MANIFEST,
    Manifest,
    all_checkpoints,
    checkpoints_directory,
    damaged_files,
    file_entries,
    read_manifest,
    whole_checkpoints,
)
from nano_pretrain.data.shards import Corpus
from nano_pretrain.recipe.errors import UserError

log = logging.getLogger(__name__)

T = TypeVar("T")

SHARDING = {
    # Optimizer states as one tensor per parameter: loads on any tensor, pipeline and data-parallel layout.
    "distrib_optim_sharding_type": "fully_reshardable",
    # True loads wrong optimizer state on gloo when the data-parallel size changes (measured, megatron-core 0.16.1).
    "distrib_optim_fully_reshardable_mem_efficient": False,
    "chained_optim_avoid_prefix": True,
}
VERSIONS = ("torch", "megatron-core", "nano-pretrain")


def sharded_state(model: Any, optimizer: Any, loading: bool) -> dict[str, Any]:
    """What a checkpoint holds: model and, if given, optimizer.

    Args:
        model: bare megatron-core model of this rank, not its data-parallel wrapper.
        optimizer: megatron-core optimizer, or None to leave it out.
        loading: whether the state is to be loaded into.
    """
    metadata = dict(SHARDING)
    state: dict[str, Any] = {"model": model.sharded_state_dict(metadata=metadata)}
    if optimizer is not None:
        with _places_without_padding(optimizer):
            state["optimizer"] = optimizer.sharded_state_dict(state["model"], is_loading=loading, metadata=metadata)
    return state


@contextmanager
def _places_without_padding(optimizer: Any) -> Iterator[None]:
    """Let megatron-core find each parameter's state where it has put it.

    It gathers the states of a buffer without the padding between buckets and reads them at places that count it: with
    more than one bucket, 0.16.1 saves other parameters' states, or zeros, under a parameter's name.
    """
    parts = getattr(optimizer, "chained_optimizers", [optimizer])
    buffers = [buffer for part in parts for buffer in getattr(part, "buffers", [])]
    padded = [buffer.param_index_map for buffer in buffers]
    for buffer in buffers:
        padding = [bucket.grad_data.numel() - bucket.numel_unpadded for bucket in buffer.buckets]
        before = [0, *accumulate(padding)]
        buffer.param_index_map = {
            parameter: (start - before[bucket], end - before[bucket], bucket)
            for parameter, (start, end, bucket) in buffer.param_index_map.items()
        }
    try:
        yield
    finally:
        for buffer, places in zip(buffers, padded, strict=True):
            buffer.param_index_map = places


def save_checkpoint(
    run_dir: Path,
    model: Any,
    optimizer: Any,
    clock: tuple[int, int],
    layout: dict[str, Any],
    corpus: Corpus,
    acts: int,
    expected_bytes: int,
) -> Path:
    """Write a checkpoint beside the others, list and hash its files, then give it its name.

    Args:
        run_dir: directory of the run.
        model: bare model of this rank.
        optimizer: megatron-core optimizer.
        clock: tokens consumed and steps taken.
        layout: sizes of the layout, for the manifest.
        corpus: what it was trained on.
        acts: how many recorded acts the run was told.
        expected_bytes: about how large the checkpoint will be.

    Returns:
        The checkpoint's directory, `checkpoints/TOKENS`.

    Raises:
        UserError: the disk is full; nothing of the checkpoint is left.
    """
    from megatron.core import dist_checkpointing

    tokens, step = clock
    final = checkpoints_directory(run_dir) / str(tokens)
    writing = final.with_name(f".writing-{tokens}")
    first = dist.get_rank() == 0
    with _collective(writing, expected_bytes):
        if first:
            _fresh(writing, expected_bytes)
    with _collective(writing, expected_bytes), _results_in_process():
        dist_checkpointing.save(sharded_state(model, optimizer, loading=False), str(writing))
    with _collective(writing, expected_bytes):
        mine = file_entries(writing, _share([str(p.relative_to(writing)) for p in writing.rglob("*") if p.is_file()]))
    entries = {name: entry for part in _gather(mine) for name, entry in part.items()}
    with _collective(writing, expected_bytes):
        if first:
            versions = {name: version(name) for name in VERSIONS}
            Manifest(tokens, step, layout, versions, corpus.fingerprint, entries, corpus.record, acts).write(writing)
            _sync(writing)
            _remove(final)
            writing.rename(final)
            _sync(final.parent)
    return final


def load_newest(run_dir: Path, model: Any, optimizer: Any) -> Manifest | None:
    """Load the newest checkpoint whose content is what its manifest says; None where the run has no checkpoint.

    A damaged one is named in the log and put aside as `.damaged-TOKENS`, and the one before is taken.

    Raises:
        UserError: there are checkpoints, and all are damaged.
    """
    damaged: list[Path] = []
    for path in all_checkpoints(run_dir):
        manifest = read_manifest(path)
        wrong = _damaged(path, manifest) if manifest else [MANIFEST]
        if manifest and not wrong:
            _put_aside(damaged)
            load_checkpoint(path, model, optimizer)
            return manifest
        log.warning("%s: damaged (%s); trying the checkpoint before it", path, ", ".join(wrong))
        damaged.append(path)
    if damaged:
        raise UserError(
            f"{checkpoints_directory(run_dir)}: every checkpoint is damaged; "
            "bring one back, or remove the directory to begin the run again"
        )
    return None


def _put_aside(damaged: list[Path]) -> None:
    """Rename damaged checkpoints, so that retention never keeps one at the cost of a good one."""
    if dist.get_rank() == 0:
        for path in damaged:
            target = path.with_name(f".damaged-{path.name}")
            _remove(target)
            path.rename(target)
    dist.barrier()


def load_checkpoint(path: Path, model: Any, optimizer: Any) -> None:
    """Load one checkpoint into the model and, if given, the optimizer.

    One of weights alone leaves the optimizer's states as they are, which is new.
    """
    from megatron.core import dist_checkpointing

    manifest = read_manifest(path)
    if manifest is not None and manifest.weights_only:
        _load_weights(path, model, optimizer)
        return
    loaded = dist_checkpointing.load(sharded_state(model, optimizer, loading=True), str(path))
    model.load_state_dict(loaded["model"])
    if optimizer is not None:
        optimizer.load_state_dict(loaded["optimizer"])


def _load_weights(path: Path, model: Any, optimizer: Any) -> None:
    """Load the weights, and where the model rounds them the optimizer's main weights, in FP32, as they are."""
    from megatron.core import dist_checkpointing

    # Transformer Engine's states of its own are no weights: the model keeps those it has.
    own = {name: state for name, state in model.state_dict().items() if name.endswith("_extra_state")}
    wanted = {name: part for name, part in model.sharded_state_dict(metadata=dict(SHARDING)).items() if name not in own}
    loaded = dist_checkpointing.load({"model": {name: _in_fp32(part) for name, part in wanted.items()}}, str(path))
    model.load_state_dict({**own, **loaded["model"]})
    if optimizer is not None:
        optimizer.reload_model_params(loaded["model"])


def _in_fp32(part: Any) -> Any:
    """A sharded tensor, or what makes several of one, to be loaded in FP32."""
    changed = {"dtype": torch.float32} if hasattr(part, "dtype") else {}
    return replace(part, data=part.data.detach().float(), **changed)


def retain(run_dir: Path, keep: int) -> None:
    """Remove all but the newest `keep` whole checkpoints, and what interrupted writers left; first rank only."""
    directory = checkpoints_directory(run_dir)
    for path in whole_checkpoints(run_dir)[keep:]:
        # Renamed first: a half-removed checkpoint must not look whole.
        path.rename(doomed := path.with_name(f".removing-{path.name}"))
        _remove(doomed)
    for path in [*directory.glob(".removing-*"), *directory.glob(".writing-*")]:
        _remove(path)


@contextmanager
def _collective(writing: Path, expected_bytes: int) -> Iterator[None]:
    """Work after which all ranks go on or none does; where one failed, what was written is removed.

    The work may not communicate where it can fail on one rank alone: the others would wait for it.

    Raises:
        UserError: there is no room for the checkpoint.
    """
    failure: BaseException | None = None
    try:
        yield
    except (Exception, CheckpointException) as error:
        failure = error
    full = failure is not None and _is_full(failure, writing.parent, expected_bytes)
    reports = _gather(("" if failure is None else f"{type(failure).__name__}: {failure}", full))
    texts = [text for text, _ in reports if text]
    if not texts:
        return
    if dist.get_rank() == 0:
        _remove(writing)
    if any(full for _, full in reports):
        raise UserError(
            "run.dir: the disk is full, the checkpoint was not written; free space and run again"
        ) from failure
    raise failure or RuntimeError(f"another rank failed to write a checkpoint: {texts[0]}")


def _is_full(failure: BaseException, directory: Path, expected_bytes: int) -> bool:
    """Whether room is what was missing; torch's file writer hides the error number."""
    if isinstance(failure, OSError) and failure.errno in (errno.ENOSPC, errno.EDQUOT):
        return True
    return directory.is_dir() and shutil.disk_usage(directory).free < expected_bytes


@contextmanager
def _results_in_process() -> Iterator[None]:
    """Let megatron-core's writer hand its results over in this process, which is where it runs.

    Its own queue, for asynchronous writers, lives in a server process of 270 MB that outlives a rank that is killed.
    """
    from megatron.core.dist_checkpointing.strategies import filesystem_async

    own, level = filesystem_async._results_queue, filesystem_async.logger.level
    filesystem_async._results_queue = SimpleQueue()
    # It also raises what it would log.
    filesystem_async.logger.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        filesystem_async._results_queue = own
        filesystem_async.logger.setLevel(level)


def _gather(value: T) -> list[T]:
    """The value of every rank."""
    values = [value] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def _fresh(directory: Path, expected_bytes: int) -> None:
    """An empty directory on a disk that has room: an error amid a collective write is much harder to end."""
    _remove(directory)
    directory.mkdir(parents=True)
    if shutil.disk_usage(directory).free < expected_bytes:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(directory))


def _remove(directory: Path) -> None:
    if directory.exists():
        shutil.rmtree(directory)


def _share(names: list[str]) -> list[str]:
    """This rank's part of the files to hash."""
    return sorted(names)[dist.get_rank() :: dist.get_world_size()]


def _damaged(directory: Path, manifest: Manifest) -> list[str]:
    parts = _gather(damaged_files(directory, _share(list(manifest.files)), manifest))
    return [name for part in parts for name in part]


def _sync(directory: Path) -> None:
    """Make the directory's entries durable before the next rename depends on them."""
    manifest = directory / MANIFEST
    for path in (manifest, directory) if manifest.exists() else (directory,):
        sync(path)
