"""What surrounds megatron-core's writer: cleaning up, room on the disk, retention, damaged checkpoints."""

from __future__ import annotations

import errno
import logging
import multiprocessing
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch.distributed as dist
from torch._C._distributed_c10d import HashStore
from torch.distributed.checkpoint.api import CheckpointException

from nano_pretrain.checkpoint import sharded
from nano_pretrain.checkpoint.sharded import load_newest, retain
from nano_pretrain.platform import current_platform
from nano_pretrain.recipe.errors import UserError
from tests.checkpoint.test_manifest import write

ROOM = 0
NO_ROOM = 1 << 62


@pytest.fixture(autouse=True)
def world_of_one() -> Iterator[None]:
    """One rank, which agrees with itself."""
    dist.init_process_group("gloo", store=HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.fixture
def writing(tmp_path: Path) -> Path:
    directory = tmp_path / "checkpoints" / ".writing-64"
    directory.mkdir(parents=True)
    (directory / "half").touch()
    return directory


def test_work_that_succeeds_leaves_what_it_wrote(writing: Path) -> None:
    with sharded._collective(writing, NO_ROOM):
        pass
    assert (writing / "half").exists()


@pytest.mark.parametrize(
    "failure", [RuntimeError("unexpected pos 704"), CheckpointException("write", {}), OSError(errno.EIO, "broken")]
)
def test_failure_is_passed_on_and_nothing_half_written_stays(writing: Path, failure: BaseException) -> None:
    with pytest.raises(type(failure)), sharded._collective(writing, ROOM):
        raise failure
    assert not writing.exists()


@pytest.mark.parametrize("failure", [RuntimeError("unexpected pos 704"), CheckpointException("write", {})])
def test_failure_for_want_of_room_is_the_users_to_mend(writing: Path, failure: BaseException) -> None:
    with pytest.raises(UserError, match=r"run\.dir: the disk is full"), sharded._collective(writing, NO_ROOM):
        raise failure
    assert not writing.exists()


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT])
def test_full_disk_and_exceeded_quota_are_known_by_their_numbers(writing: Path, number: int) -> None:
    with pytest.raises(UserError, match=r"run\.dir: the disk is full"), sharded._collective(writing, ROOM):
        raise OSError(number, "full")


def test_room_is_asked_for_before_anything_is_written(writing: Path) -> None:
    with pytest.raises(OSError, match="No space left"):
        sharded._fresh(writing, NO_ROOM)
    assert list(writing.iterdir()) == []


def test_writer_starts_no_process_that_could_outlive_a_killed_rank() -> None:
    current_platform().prepare(0, 1)
    from megatron.core.dist_checkpointing.strategies import filesystem_async

    own, before = filesystem_async._results_queue, multiprocessing.active_children()
    with sharded._results_in_process():
        queue = filesystem_async._get_write_results_queue()
        queue.put("result")
        assert queue.get_nowait() == "result"
        assert multiprocessing.active_children() == before
    assert filesystem_async._results_queue is own


def test_newest_are_kept_and_what_interrupted_writers_left_is_removed(tmp_path: Path) -> None:
    for tokens in (64, 128, 1024, 256):
        write(tmp_path, tokens)
    for name in (".writing-2048", ".removing-32"):
        (tmp_path / "checkpoints" / name).mkdir()
    retain(tmp_path, 2)
    assert {path.name for path in (tmp_path / "checkpoints").iterdir()} == {"256", "1024"}


def test_damaged_checkpoint_does_not_push_out_a_whole_one(tmp_path: Path) -> None:
    for tokens in (64, 128, 256):
        write(tmp_path, tokens)
    (tmp_path / "checkpoints" / "256" / "common.pt").unlink()
    retain(tmp_path, 2)
    assert {path.name for path in (tmp_path / "checkpoints").iterdir()} == {"64", "128", "256"}


def test_run_without_checkpoints_loads_nothing(tmp_path: Path) -> None:
    assert load_newest(tmp_path, None, None) is None


def test_run_whose_checkpoints_are_all_damaged_does_not_begin_again(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (write(tmp_path, 64) / "common.pt").write_bytes(b"y")
    (write(tmp_path, 128) / "manifest.json").write_text("{")
    with (
        caplog.at_level(logging.WARNING),
        pytest.raises(UserError, match="every checkpoint is damaged; bring one back"),
    ):
        load_newest(tmp_path, None, None)
    assert [record.getMessage().partition("checkpoints/")[2] for record in caplog.records] == [
        "128: damaged (manifest.json); trying the checkpoint before it",
        "64: damaged (common.pt); trying the checkpoint before it",
    ]


def test_damaged_checkpoint_is_put_aside_and_never_kept_at_the_cost_of_a_good_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded: list[Path] = []
    monkeypatch.setattr(sharded, "load_checkpoint", lambda path, model, optimizer: loaded.append(path))
    good, damaged = write(tmp_path, 64), write(tmp_path, 128)
    (damaged / "common.pt").write_bytes(b"y")  # same size: only the hash tells
    manifest = load_newest(tmp_path, None, None)
    assert manifest is not None
    assert manifest.tokens == 64
    assert loaded == [good]
    retain(tmp_path, 1)
    assert {path.name for path in (tmp_path / "checkpoints").iterdir()} == {"64", ".damaged-128"}
