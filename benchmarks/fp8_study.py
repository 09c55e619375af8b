"""What FP8 changes in the loss: paired runs of a small hybrid on real text, the same data and weights in each pair.

    python -m benchmarks.fp8_study [--seeds 3] [--at-once 2] [--tokens 4194304] [--directory runs/fp8-study]

Every run is `nano-pretrain train` on one rank with one thread. Interrupt it whenever you like: the same command goes on
from the newest checkpoints and leaves finished runs alone. Writes `study.md`, `study.json` and `study.png` there.

The second BF16 run of a seed has micro-batches of half the size: the same mathematics with sums in another order. What
it changes is what any difference in the last bit becomes after so many steps, and the smallest effect that can be seen.
"""

from __future__ import annotations

import argparse
import json
import math
import subprocess
import sys
import time
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import numpy as np
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

from nano_pretrain.report.style import FAINT, PALETTE, EndLabel, label_ends, new_figure, token_axis

ENDS_IN_FP8 = ["precision.bf16_first_linears=0", "precision.bf16_last_linears=0"]
ARMS: dict[str, list[str]] = {
    "BF16": ["precision=bf16"],
    "BF16, half micro-batches": ["precision=bf16", "stages.pretrain.micro_batch_size=4"],
    "FP8 blockwise": ["precision=fp8_blockwise"],
    "FP8 blockwise, ends too": ["precision=fp8_blockwise", *ENDS_IN_FP8],
    "FP8 current scaling": ["precision=fp8_current_scaling"],
}
"""Name -> overrides; the first is what the others are compared with."""
REFERENCE = next(iter(ARMS))

MODEL = [
    "recipe=tiny", "model.pattern=M-M-M-M*-M-M-M*-", "model.hidden_size=128", "model.ffn_hidden_size=512",
    "model.num_attention_heads=4", "model.num_query_groups=2", "model.mamba_num_heads=16", "model.mamba_head_dim=16",
    "model.mamba_num_groups=2",
    "model.init_std=0.08", "extension=none", "evaluate.lengths=[]",
]  # fmt: skip
COURSE = [
    "stages.pretrain.global_batch_size=8", "validation.every=0", "validation.tokens_per_source=65536",
    "validation.baselines=false", "validation.prompts=[]", "checkpoint.every=200", "log.wandb=disabled",
    "log.tensorboard=false", "cluster.gpus=1", "cluster.threads_per_rank=1",
]  # fmt: skip
WARMUP, DECAY = 1 / 20, 1 / 4
LAST_SHARE = 0.1
"""The share of the steps whose mean is the training loss at the end: the last phase of the blend."""


@dataclass(frozen=True)
class Study:
    """What is run, and where."""

    directory: Path
    tokens: int
    seeds: int

    def runs(self) -> list[tuple[str, int]]:
        """Arm and seed of each run, a whole set of arms after the other."""
        return [(arm, seed) for seed in range(self.seeds) for arm in ARMS]

    def name(self, arm: str, seed: int) -> str:
        """Name of a run's directory."""
        return f"{'-'.join(arm.replace(',', '').lower().split())}-{seed}"

    def overrides(self, arm: str, seed: int) -> list[str]:
        """The recipe of a run."""
        stage = "stages.pretrain"
        return [
            *MODEL, *COURSE, *ARMS[arm], f"run.seed={seed}", f"data.seed={seed}", f"{stage}.tokens={self.tokens}",
            f"{stage}.schedule.warmup_tokens={int(self.tokens * WARMUP)}",
            f"{stage}.schedule.decay_tokens={int(self.tokens * DECAY)}",
            f"run.dir={self.directory}", f"run.name={self.name(arm, seed)}",
        ]  # fmt: skip

    def lines(self, arm: str, seed: int, file: str) -> list[dict[str, Any]]:
        """The whole lines that a run has written."""
        path = self.directory / self.name(arm, seed) / file
        if not path.exists():
            return []
        return [json.loads(line) for line in path.read_text().splitlines(keepends=True) if line.endswith("\n")]

    def finished(self, arm: str, seed: int) -> bool:
        """Whether a run came to its end."""
        path = self.directory / self.name(arm, seed) / "exit.json"
        return path.exists() and json.loads(path.read_text())["reason"] == "finished"

    def complete_seeds(self) -> list[int]:
        """Seeds of which every arm has finished."""
        return [seed for seed in range(self.seeds) if all(self.finished(arm, seed) for arm in ARMS)]


def nano_pretrain(verb: str, overrides: Sequence[str], log: Path | None = None) -> int:
    """The exit code of a command; its output goes to `log`, else to the terminal."""
    command = [sys.executable, "-m", "nano_pretrain", verb, *overrides]
    if log is None:
        return subprocess.run(command, check=False).returncode
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("a") as out:
        return subprocess.run(command, check=False, stdout=out, stderr=subprocess.STDOUT).returncode


def run_all(study: Study, at_once: int) -> None:
    """Every run that has not finished, with a progress bar over the tokens of all.

    Raises:
        SystemExit: a run failed, or the user interrupted them; all have stopped then.
    """
    if (code := nano_pretrain("prepare", MODEL)) != 0:
        raise SystemExit(code)
    waiting = [run for run in study.runs() if not study.finished(*run)]
    columns = (TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TimeRemainingColumn())
    with ThreadPoolExecutor(at_once) as pool, Progress(*columns) as progress:
        futures = {
            pool.submit(
                nano_pretrain, "train", study.overrides(*run), study.directory / "logs" / f"{study.name(*run)}.log"
            ): run
            for run in waiting
        }
        bar = progress.add_task("runs", total=study.tokens * len(study.runs()))
        try:
            while futures:
                progress.update(bar, completed=sum(consumed(study, *run) for run in study.runs()))
                progress.update(bar, description=f"{len(study.runs()) - len(futures)} of {len(study.runs())} runs")
                check(study, futures)
                time.sleep(2)
        except BaseException:
            pool.shutdown(wait=True, cancel_futures=True)
            raise


def check(study: Study, futures: dict[Future[int], tuple[str, int]]) -> None:
    """Take those that have ended off the list.

    Raises:
        SystemExit: one of them failed.
    """
    for future in [future for future in futures if future.done()]:
        run = futures.pop(future)
        if future.result() != 0:
            raise SystemExit(f"{study.name(*run)} ended with code {future.result()}: see {study.directory}/logs")


def consumed(study: Study, arm: str, seed: int) -> int:
    """Tokens that a run has consumed."""
    path = study.directory / study.name(arm, seed) / "metrics.jsonl"
    if not path.exists():
        return 0
    with path.open("rb") as file:
        file.seek(max(0, path.stat().st_size - 1000))
        lines = [line for line in file.read().splitlines(keepends=True) if line.endswith(b"\n")]
    return int(json.loads(lines[-1])["tokens"]) if lines else 0


def heldout_loss(study: Study, arm: str, seed: int) -> float:
    """Nats per token over all held-out tokens at the end of a run."""
    sources = study.lines(arm, seed, "validation.jsonl")[-1]["sources"].values()
    return float(sum(each["loss"] * each["tokens"] for each in sources) / sum(each["tokens"] for each in sources))


def training_losses(study: Study, arm: str, seed: int) -> list[float]:
    """Nats per token of every step."""
    return [line["loss"] for line in study.lines(arm, seed, "metrics.jsonl")]


@dataclass(frozen=True)
class Compared:
    """A loss: its mean over the seeds, and each seed's difference from the reference in percent."""

    loss: float
    differences: list[float]

    @property
    def difference(self) -> str:
        """Mean, and its standard error where there are several, in words."""
        mean = f"{fmean(self.differences):+.3f}"
        if len(self.differences) == 1:
            return mean
        return f"{mean} ± {stdev(self.differences) / math.sqrt(len(self.differences)):.3f}"


def compared(values: Sequence[float], reference: Sequence[float]) -> Compared:
    """Losses of one arm beside those of the reference, seed by seed."""
    return Compared(fmean(values), [100 * (value / base - 1) for value, base in zip(values, reference, strict=True)])


def final_training_loss(study: Study, arm: str, seed: int) -> float:
    """Nats per token, mean of the last steps."""
    losses = training_losses(study, arm, seed)
    return fmean(losses[-math.ceil(len(losses) * LAST_SHARE) :])


def results(study: Study, seeds: Sequence[int]) -> dict[str, dict[str, Compared]]:
    """{arm: {"held-out", "training"}}."""
    found: dict[str, dict[str, Compared]] = {arm: {} for arm in ARMS}
    for kind, loss in (("held-out", heldout_loss), ("training", final_training_loss)):
        reference = [loss(study, REFERENCE, seed) for seed in seeds]
        for arm in ARMS:
            found[arm][kind] = compared([loss(study, arm, seed) for seed in seeds], reference)
    return found


def table(found: dict[str, dict[str, Compared]], seeds: Sequence[int]) -> str:
    """The results in Markdown."""
    lines = [
        f"Means over {counted(len(seeds), 'seed')}; differences from {REFERENCE} of the same seed in percent,",
        "with standard errors.",
        "",
        "| | held-out loss | difference | each seed | training loss, last tenth | difference |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for arm, losses in found.items():
        heldout, training = losses["held-out"], losses["training"]
        seen = ["", "", ""]
        if arm != REFERENCE:
            each = ", ".join(f"{value:+.2f}" for value in heldout.differences)
            seen = [heldout.difference, each, training.difference]
        lines.append(f"| {arm} | {heldout.loss:.4f} | {seen[0]} | {seen[1]} | {training.loss:.4f} | {seen[2]} |")
    return "\n".join(lines) + "\n"


def counted(number: int, what: str) -> str:
    """1 seed, 2 seeds."""
    return f"{number} {what}" if number == 1 else f"{number} {what}s"


def draw(study: Study, seeds: Sequence[int], path: Path, window: int = 64) -> None:
    """The reference's loss, and each arm's difference from it, both as means over the seeds and `window` steps."""
    figure, (losses, differences) = new_figure(7.0, panels=2, right=0.74)
    kernel = np.ones(window) / window
    smooth = {
        arm: np.array([np.convolve(training_losses(study, arm, seed), kernel, "valid") for seed in seeds])
        for arm in ARMS
    }
    steps = smooth[REFERENCE].shape[1]
    tokens = study.tokens * (np.arange(steps) + window) / (steps + window - 1)
    losses.plot(tokens, smooth[REFERENCE].mean(0), color=PALETTE[0])
    labels = []
    for number, arm in enumerate(list(ARMS)[1:], 1):
        pairs = 100 * (smooth[arm] / smooth[REFERENCE] - 1)
        mean = pairs.mean(0)
        if len(seeds) > 1:
            error = pairs.std(0, ddof=1) / math.sqrt(len(seeds))
            differences.fill_between(tokens, mean - error, mean + error, color=PALETTE[number], alpha=0.15, lw=0)
        differences.plot(tokens, mean, color=PALETTE[number], linewidth=1.4)
        labels.append(EndLabel(float(mean[-1]), arm, PALETTE[number], "-"))
    differences.axhline(0, color=FAINT, linewidth=0.9)
    token_axis([losses, differences], 0, study.tokens)
    losses.set_ylabel(f"training loss of {REFERENCE}, nats a token")
    differences.set_ylabel(f"difference from {REFERENCE}, percent")
    title = f"Means over {counted(len(seeds), 'seed')} and {window} steps; bands are standard errors"
    losses.set_title(title, loc="left", fontsize=10)
    label_ends(differences, labels)
    figure.savefig(path)


def write_results(study: Study) -> None:
    """The three files, and the table on the terminal."""
    seeds = study.complete_seeds()
    if not seeds:
        print("no seed has finished in all arms")
        return
    found = results(study, seeds)
    text = table(found, seeds)
    (study.directory / "study.md").write_text(text)
    arms = {arm: {kind: asdict(each) for kind, each in losses.items()} for arm, losses in found.items()}
    content = {"tokens": study.tokens, "seeds": seeds, "arms": arms}
    (study.directory / "study.json").write_text(json.dumps(content, indent=1) + "\n")
    draw(study, seeds, study.directory / "study.png")
    print(text)


def main() -> None:
    """Run what is missing, then compare."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3, help="pairs of runs")
    parser.add_argument("--at-once", type=int, default=2, help="runs at a time, a core each")
    parser.add_argument("--tokens", type=int, default=4_194_304, help="training tokens of a run")
    parser.add_argument("--directory", type=Path, default=Path("runs/fp8-study"))
    parser.add_argument("--compare-only", action="store_true", help="compare the seeds that have finished")
    options = parser.parse_args()
    study = Study(options.directory, options.tokens, options.seeds)
    if not options.compare_only:
        try:
            run_all(study, options.at_once)
        except KeyboardInterrupt:
            raise SystemExit(130) from None
    write_results(study)


if __name__ == "__main__":
    main()
