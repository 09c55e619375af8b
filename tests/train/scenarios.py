"""What happens to runs of one rank: each scenario starts processes, disturbs them, and returns how they ended."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tests.train.small_run import TOKENS, TOKENS_PER_STEP, Finished, SmallRuns, finish, start, steps, wait_until

Story = dict[str, Finished]

IN_A_TERMINAL = "import os, pty, sys; sys.exit(os.waitstatus_to_exitcode(pty.spawn(sys.argv[1:])))"
"""Runs a command in a terminal of its own, whose keys are this program's stdin."""

SHORT = [
    "~stages.pretrain.phases.p2", "~stages.pretrain.phases.p3", "stages.pretrain.phases.p1.share=1",
    f"stages.pretrain.tokens={2 * TOKENS_PER_STEP}", "stages.pretrain.schedule.warmup_tokens=0",
    "stages.pretrain.schedule.decay_tokens=0",
]  # fmt: skip
"""Two steps."""

THIN = [
    "recipe=nano_12b_v2_thin", "model.pattern=M-M-M-M*-M-M-M-M*-M-M-M-M*-M-M-M-M*-M-M-M-M*-M-M-M-M*-M-M-M-M-",
    "stages.pretrain.tokens=5120", "stages.pretrain.global_batch_size=2", "cluster.gpus=1",
    "stages.pretrain.schedule.warmup_tokens=512", "stages.pretrain.schedule.decay_tokens=1024", "checkpoint.every=10",
    "validation.every=0",
]  # fmt: skip
"""The true 62 layers, 20 steps of two samples."""


EXPLODING = ["stages.pretrain.schedule.lr=100", "optimizer.weight_decay=100"]
"""The largest that a recipe may say: decay multiplies the weights by nearly -10,000 a step."""


def whole(small: SmallRuns) -> Story:
    """Nobody disturbs it; then a text is generated."""
    return {
        "train": small.run("train", "whole"),
        "generate": small.run("generate", "whole", "generate.prompt=ab", "generate.max_new_tokens=8"),
    }


def signals(small: SmallRuns) -> Story:
    """Ctrl-C in a terminal, then SIGUSR1, then to the end; others try the same directory while it is at work."""
    run = small.path("signals")
    story = {"SIGINT": _ctrl_c(small.command("train", "signals"), run)}
    process = small.start("train", "signals")
    begins = steps(run)
    wait_until(lambda: steps(run) > begins, process)
    process.send_signal(signal.SIGSTOP)
    for verb in ("train", "launch"):
        story[verb] = small.run(verb, "signals")
    process.send_signal(signal.SIGUSR1)
    process.send_signal(signal.SIGCONT)
    story["SIGUSR1"] = finish(process)
    story["end"] = small.run("train", "signals")
    return story


def _ctrl_c(arguments: list[str], run: Path) -> Finished:
    command = [sys.executable, "-c", IN_A_TERMINAL, sys.executable, "-m", "nano_pretrain", *arguments]
    process = subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        env={**os.environ, "COLUMNS": "80", "TERM": "xterm"},
    )  # fmt: skip
    wait_until(lambda: steps(run) >= 2, process)
    assert process.stdin is not None
    process.stdin.write("\x03")
    process.stdin.flush()
    return finish(process)


def flipped_byte(small: SmallRuns) -> Story:
    """The newest checkpoint is damaged: one bit, same length."""
    newest = _crashed_copy(small, "flipped")
    shard = max(newest.glob("*.distcp"), key=lambda path: path.stat().st_size)
    content = bytearray(shard.read_bytes())
    content[len(content) // 2] ^= 1
    shard.write_bytes(content)
    return {"end": small.run("train", "flipped")}


def half_manifest(small: SmallRuns) -> Story:
    """The newest checkpoint's list of files is torn."""
    manifest = _crashed_copy(small, "torn") / "manifest.json"
    manifest.write_text(manifest.read_text()[: manifest.stat().st_size // 2])
    return {"end": small.run("train", "torn")}


def _crashed_copy(small: SmallRuns, name: str) -> Path:
    """The whole run as if its process had been killed right after the last checkpoint; returns that checkpoint."""
    shutil.copytree(small.path("whole"), small.path(name))
    (small.path(name) / "exit.json").unlink()
    return small.path(name) / "checkpoints" / str(TOKENS)


def full_disk(small: SmallRuns) -> Story:
    """A disk with room for one checkpoint; then it grows."""
    with small_disk(small.directory.parent / "disk") as disk:
        place = f"run.dir={disk}"
        story = {"full": small.run("train", "full", place)}
        shutil.copytree(disk / "full", small.directory.parent / "full-as-left")
        subprocess.run(["mount", "-o", "remount,size=64m", str(disk)], check=True)
        story["end"] = small.run("train", "full", place)
        shutil.copytree(disk / "full", small.path("full"))
    return story


@contextmanager
def small_disk(directory: Path) -> Iterator[Path]:
    """A file system of 7 MB; a checkpoint has 4."""
    directory.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=7m", "tmpfs", str(directory)], check=True)
    try:
        yield directory
    finally:
        subprocess.run(["umount", str(directory)], check=True)


def can_mount(directory: Path) -> bool:
    """Whether this process may mount a file system."""
    try:
        with small_disk(directory):
            return True
    except (subprocess.CalledProcessError, OSError):
        return False


def not_finite(small: SmallRuns) -> Story:
    """A learning rate that blows the weights up in the first steps."""
    return {"end": small.run("train", "not_finite", *EXPLODING, "checkpoint.every=0")}


def sweep(small: SmallRuns) -> Story:
    """Two values on one command line."""
    arguments = small.command("train", "sweep", *SHORT, "--multirun", "optimizer.beta2=0.95,0.99")
    return {"end": finish(start(arguments))}


def thin(small: SmallRuns) -> Story:
    """62 layers, undisturbed."""
    return {"whole": small.run("train", "thin", *THIN)}


def thin_killed(small: SmallRuns) -> Story:
    """62 layers, killed after step 12, then the same command again."""
    process = small.start("train", "thin-killed", *THIN)
    wait_until(lambda: steps(small.path("thin-killed")) >= 12, process)
    process.kill()
    return {"killed": finish(process), "end": small.run("train", "thin-killed", *THIN)}
