"""What FP8 changes in the loss: paired runs of a small hybrid on real text, the same data and weights in each pair.

    python -m benchmarks.fp8_study [--seeds 3] [--at-once 2] [--tokens 4194304] [--directory runs/fp8-study]

Every run is `nano-pretrain train` on one rank with one thread. Interrupt or kill it whenever you like: the same command
goes on from the newest checkpoints and leaves finished runs alone. Ctrl-C and SIGTERM wait for a checkpoint of the runs
under way and end with code 75; a second one does not wait. Writes `study.md`, `study.json` and `study.png` there.

The second BF16 run of a seed has micro-batches of half the size: the same mathematics, summed and rounded in another
order. What it changes is what any difference in the last bits becomes after so many steps.
"""

from __future__ import annotations

import argparse
import json
import math
import signal
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import numpy as np
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

from benchmarks.jobs import Job, run_jobs
from nano_pretrain.launch.heeding import heeding
from nano_pretrain.recipe.errors import EXIT_CONTINUE, EXIT_DONE, EXIT_USER_ERROR, UserError
from nano_pretrain.recipe.load import recorded_recipe
from nano_pretrain.report.style import FAINT, PALETTE, EndLabel, label_ends, new_figure, token_axis
from nano_pretrain.train.directory import check_not_held

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
    "model.mamba_num_groups=2", "model.init_std=0.08", "extension=none", "evaluate.lengths=[]",
]  # fmt: skip
STEP_TOKENS = 8 * 512
"""Of a step: a run ends less than that beyond the tokens it was given."""
COURSE = [
    f"stages.pretrain.global_batch_size={STEP_TOKENS // 512}", "validation.every=0",
    "validation.tokens_per_source=65536", "validation.baselines=false", "validation.prompts=[]", "checkpoint.every=200",
    "log.wandb=disabled", "log.tensorboard=false", "cluster.gpus=1", "cluster.threads_per_rank=1",
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

    def job(self, arm: str, seed: int) -> Job:
        """The command that begins a run or goes on with it."""
        name = self.name(arm, seed)
        return Job(name, nano_pretrain("train", self.overrides(arm, seed)), self.directory / "logs" / f"{name}.log")

    def lines(self, arm: str, seed: int, file: str) -> list[dict[str, Any]]:
        """The whole lines that a run has written."""
        path = self.directory / self.name(arm, seed) / file
        if not path.exists():
            return []
        return [json.loads(line) for line in path.read_text().splitlines(keepends=True) if line.endswith("\n")]

    def finished(self, arm: str, seed: int) -> bool:
        """Whether a run came to its end, which is the step that reaches this study's number of tokens."""
        path = self.directory / self.name(arm, seed) / "exit.json"
        ended = json.loads(path.read_text()) if path.exists() else {}
        return ended.get("reason") == "finished" and 0 <= ended["tokens"] - self.tokens < STEP_TOKENS

    def complete_seeds(self) -> list[int]:
        """Seeds of which every arm has finished."""
        return [seed for seed in range(self.seeds) if all(self.finished(arm, seed) for arm in ARMS)]

    def commits(self, seeds: Sequence[int]) -> list[str]:
        """What the runs of these seeds were last started with: one commit, or their differences mean little."""
        directories = [self.directory / self.name(arm, seed) for arm in ARMS for seed in seeds]
        return sorted({str(json.loads((each / "environment.json").read_text())["commit"])[:7] for each in directories})


def nano_pretrain(verb: str, overrides: Sequence[str]) -> tuple[str, ...]:
    """A command of the package."""
    return (sys.executable, "-m", "nano_pretrain", verb, *overrides)


def check_directories(study: Study) -> None:
    """Refuse runs of another length, and runs that somebody else is training.

    Raises:
        UserError: says which, and names the process.
    """
    for run in study.runs():
        directory = study.directory / study.name(*run)
        if (directory / "recipe.yaml").exists():
            begun = recorded_recipe(directory).stages["pretrain"].tokens
            if begun != study.tokens:
                fix = f"write --tokens {begun} or choose another --directory"
                raise UserError(f"--tokens: {directory} was begun with {begun}; {fix}")
        check_not_held(directory)


def prepare() -> None:
    """The corpus, unless it is there.

    Raises:
        SystemExit: it cannot be prepared.
    """
    if (code := subprocess.run(nano_pretrain("prepare", MODEL), check=False).returncode) != EXIT_DONE:
        raise SystemExit(code)


def train_all(study: Study, at_once: int) -> None:
    """Train every run that has not finished, with a progress bar over the tokens of all.

    Raises:
        SystemExit: a run failed.
    """
    columns = (TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TimeRemainingColumn())
    runs = study.runs()
    jobs = [study.job(*run) for run in runs if not study.finished(*run)]
    with Progress(*columns) as progress:
        bar = progress.add_task("runs", total=study.tokens * len(runs))

        def show(left: int) -> None:
            tokens = sum(consumed(study, *run) for run in runs)
            progress.update(bar, completed=tokens, description=f"{len(runs) - left} of {len(runs)} runs")

        run_jobs(jobs, at_once, show)


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
    def standard_error(self) -> float:
        """Of the mean difference; NaN for one seed."""
        seeds = len(self.differences)
        return stdev(self.differences) / math.sqrt(seeds) if seeds > 1 else math.nan

    @property
    def p(self) -> float | None:
        """Of a two-sided paired t-test; None where the seeds show no spread."""
        if not self.standard_error > 0:
            return None
        return two_sided_p(fmean(self.differences) / self.standard_error, len(self.differences) - 1)

    @property
    def cells(self) -> list[str]:
        """Mean with its standard error, and p, for the table."""
        if self.p is None:
            return [f"{fmean(self.differences):+.3f}", ""]
        return [f"{fmean(self.differences):+.3f} ± {self.standard_error:.3f}", f"{self.p:.3f}"]


def two_sided_p(t: float, freedom: int) -> float:
    """The probability that Student's t is farther from zero than `t`, for a whole number of degrees of freedom.

    Abramowitz and Stegun, Handbook of Mathematical Functions, 26.7.3 and 26.7.4.
    """
    odd = freedom % 2
    angle = math.atan(abs(t) / math.sqrt(freedom))
    term, terms = math.cos(angle) ** odd, 0.0
    for factor in range(1 + odd, freedom + odd, 2):
        terms += term
        term *= factor / (factor + 1) * math.cos(angle) ** 2
    inside = math.sin(angle) * terms
    return 1 - (2 / math.pi * (angle + inside) if odd else inside)


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


def table(found: dict[str, dict[str, Compared]], seeds: Sequence[int], commits: Sequence[str]) -> str:
    """The results in Markdown."""
    lines = [
        f"Means over {counted(len(seeds), 'seed')}, commit {', '.join(commits)}; differences from {REFERENCE}",
        "of the same seed in percent, with standard errors; p of two-sided paired t-tests.",
        "",
        "| | held-out loss | difference | p | each seed | training loss, last tenth | difference | p |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for arm, losses in found.items():
        heldout, training = losses["held-out"], losses["training"]
        each = ", ".join(f"{value:+.2f}" for value in heldout.differences)
        cells = [f"{heldout.loss:.4f}", *heldout.cells, each, f"{training.loss:.4f}", *training.cells]
        if arm == REFERENCE:
            cells = [cells[0], "", "", "", cells[4], "", ""]
        lines.append(f"| {' | '.join([arm, *cells])} |")
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
    commits = study.commits(seeds)
    text = table(found, seeds, commits)
    (study.directory / "study.md").write_text(text)
    arms = {
        arm: {kind: {**asdict(each), "p": each.p} for kind, each in losses.items()} for arm, losses in found.items()
    }
    content = {"tokens": study.tokens, "seeds": seeds, "commits": commits, "arms": arms}
    (study.directory / "study.json").write_text(json.dumps(content, indent=1) + "\n")
    draw(study, seeds, study.directory / "study.png")
    print(text)


def positive(text: str) -> int:
    """A whole number above 0, for argparse."""
    if (number := int(text)) < 1:
        raise ValueError
    return number


def main() -> None:
    """Run what is missing, then compare."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=positive, default=3, help="each has a run of every arm")
    parser.add_argument("--at-once", type=positive, default=2, help="runs at a time, a core each")
    parser.add_argument("--tokens", type=positive, default=4_194_304, help="training tokens of a run")
    parser.add_argument("--directory", type=Path, default=Path("runs/fp8-study"))
    parser.add_argument("--compare-only", action="store_true", help="compare the seeds that have finished")
    options = parser.parse_args()
    study = Study(options.directory, options.tokens, options.seeds)
    try:
        if not options.compare_only:
            # SIGTERM as Ctrl-C.
            with heeding([signal.SIGTERM, signal.SIGINT], signal.default_int_handler):
                check_directories(study)
                prepare()
                train_all(study, options.at_once)
        write_results(study)
    except UserError as error:
        print(f"fp8_study: {error}", file=sys.stderr)
        raise SystemExit(EXIT_USER_ERROR) from None
    except KeyboardInterrupt:
        raise SystemExit(EXIT_CONTINUE) from None


if __name__ == "__main__":
    main()
