"""Tokens per second of `tiny` in layouts of one, two and four CPU ranks, and the share that communicates.

    python -m benchmarks.layouts [--steps 12]

Each layout is a run of the trainer through `launch`, without held-out samples; the speed is the median of its steps but
the first two. The share is that of gloo's operations in a profile of the two steps before the last, from the first
one's begin to the last one's end, on rank 0: waiting for other ranks is in it, and where more ranks than cores compute,
that is most of it.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

LAYOUTS = {
    "one rank": (1, []),
    "DP2": (2, []),
    "DP2 with overlap": (2, ["parallel.overlap=true"]),
    "TP2": (2, ["parallel.tensor=2"]),
    "TP2 with SP": (2, ["parallel.tensor=2", "parallel.sequence=true"]),
    "PP2": (2, ["parallel.pipeline=2"]),
    "CP2": (2, ["parallel.context=2"]),
    "DP4": (4, []),
    "TP2 x DP2": (4, ["parallel.tensor=2"]),
    "PP2 x CP2": (4, ["parallel.pipeline=2", "parallel.context=2"]),
}
QUIET = [
    "extension=none", "evaluate.lengths=[]",
    "stages.pretrain.schedule.warmup_tokens=8192", "stages.pretrain.schedule.decay_tokens=8192",
    "stages.pretrain.micro_batch_size=4", "validation.every=0", "validation.tokens_per_source=512",
    "validation.baselines=false", "validation.prompts=[]", "checkpoint.every=0", "log.wandb=disabled",
    "log.tensorboard=false", "cluster.threads_per_rank=1",
]  # fmt: skip
TOKENS_PER_STEP = 16 * 512


def run(directory: Path, name: str, ranks: int, layout: list[str], steps: int) -> tuple[float, float]:
    """Tokens per second, and share of communication."""
    command = [
        sys.executable, "-m", "nano_pretrain", "launch", "recipe=tiny", *QUIET, *layout, f"run.dir={directory}",
        f"run.name={name}", f"cluster.gpus={ranks}", f"stages.pretrain.tokens={steps * TOKENS_PER_STEP}",
        f"log.profile=[{steps - 2},{steps - 1}]",
    ]  # fmt: skip
    subprocess.run(command, check=True, capture_output=True)
    lines = (directory / name / "metrics.jsonl").read_text().splitlines()
    speeds = [json.loads(line)["tokens_per_second"] for line in lines[2 : steps - 3]]
    trace = json.loads((directory / name / f"logs/trace-rank-0-from-step-{steps - 2}.json").read_text())
    return statistics.median(speeds), communicating(trace["traceEvents"])


def communicating(events: list[dict[str, Any]]) -> float:
    """Share of the profiled time in which an operation of gloo is under way."""
    timed = [event for event in events if event.get("ph") == "X" and event.get("cat") in ("cpu_op", "user_annotation")]
    begin, end = min(e["ts"] for e in timed), max(e["ts"] + e["dur"] for e in timed)
    busy = last = 0.0
    spans = sorted((e["ts"], e["ts"] + e["dur"]) for e in timed if e["name"].startswith("gloo:"))
    for start, stop in spans:
        busy += max(0.0, stop - max(start, last))
        last = max(last, stop)
    return float(busy / (end - begin))


def main() -> None:
    """Print a line for each layout."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=12)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as directory:
        for number, (name, (ranks, layout)) in enumerate(LAYOUTS.items()):
            speed, share = run(Path(directory), f"layout-{number}", ranks, layout, options.steps)
            print(f"{name:18} {ranks} ranks  {speed:8,.0f} tokens/s  communicating {share:5.1%}", flush=True)


if __name__ == "__main__":
    main()
