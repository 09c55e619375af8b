"""The plan as tables for people, 100 columns wide where no terminal says otherwise."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Sequence
from dataclasses import asdict

from rich import box
from rich.console import Console
from rich.table import Table

from nano_pretrain.plan.blocks import LAYER_ITEMS, VOCABULARY
from nano_pretrain.plan.notes import notes
from nano_pretrain.plan.whole import Plan, StageReport
from nano_pretrain.report import words

WIDTH = 100

TIME_WORDS = {
    "mamba": "Mamba-2 layers",
    "feed_forward": "feed-forward layers",
    "attention": "attention layers",
    "vocabulary": "embedding, head, loss",
    "recomputation": "recomputation",
    "tensor": "waiting for tensor-parallel ranks",
    "context": "waiting for context-parallel ranks",
    "pipeline": "waiting for pipeline neighbours",
    "bubble": "pipeline bubble",
    "gradients": "reducing gradients",
    "parameters": "gathering parameters",
    "optimizer": "optimizer",
}
MEMORY_WORDS = {
    "weights": "weights",
    "fp8_copies": "FP8 copies of weights",
    "gradients": "gradients",
    "optimizer": "optimizer shard",
    "activations": "activations",
    "states": "Mamba states",
    "logits": "logits",
    "buffers": "buffers",
    "total": "all",
}
NOTHING = "-"

Cells = dict[str, str]
"""Name of a row -> what one stage has there."""


def new_console() -> Console:
    """On stdout; names are printed as they are."""
    width = None if sys.stdout.isatty() else WIDTH
    return Console(width=width, markup=False, highlight=False, emoji=False)


def show_plan(console: Console, plan: Plan, figure: str) -> None:
    """Print the whole plan."""
    console.print(f"{plan.recipe.run.name} on {plan.device.name}", style="bold")
    for table in (_parameters(plan), _flops(plan), _stages(plan), _data(plan)):
        console.print(table)
    for line in [*notes(plan), f"schedule and phases: {figure}"]:
        console.print(line)


def new_table(title: str, *headings: str, left: int = 1) -> Table:
    """A table whose first `left` columns are text and whose others are numbers."""
    table = Table(title=title, title_justify="left", title_style="bold", box=box.SIMPLE_HEAD, pad_edge=False)
    for index, heading in enumerate(headings):
        table.add_column(heading, justify="left" if index < left else "right")
    return table


def decimal(value: float) -> str:
    """Three significant digits."""
    if value == 0:
        return NOTHING
    if abs(value) >= 999.5:
        return f"{value:,.0f}"
    return f"{value:.3g}" if abs(value) >= 1e-3 else f"{value:.1e}"


def _parameters(plan: Plan) -> Table:
    stages = plan.stages.values()
    table = new_table("Parameters", "", "model", *(f"{report.stage.name}\nlargest rank" for report in stages))
    for part, count in asdict(plan.parameters).items():
        of_ranks = (max(getattr(rank, part) for rank in report.parameters) for report in stages)
        table.add_row(part.replace("_", " "), f"{count:,}", *(f"{size:,}" for size in of_ranks))
    table.add_section()
    largest = (max(rank.total for rank in report.parameters) for report in stages)
    table.add_row("all", f"{plan.parameters.total:,}", *(f"{size:,}" for size in largest))
    return table


def _flops(plan: Plan) -> Table:
    """Of a training token: three forward passes of the model, and what the kernels execute."""
    stages = list(plan.stages.values())
    headings = [f"{report.stage.name}\n{kind}" for report in stages for kind in ("model", "executed")]
    table = new_table("FLOPs of a training token", "", *headings)
    for item in (*LAYER_ITEMS.values(), VOCABULARY, "recomputation"):
        pairs = ((_model_flops(report, item), report.executed[item]) for report in stages)
        table.add_row(TIME_WORDS[item], *(_scientific(value) for pair in pairs for value in pair))
    table.add_section()
    sums = ((report.model_flops.training, sum(report.executed.values())) for report in stages)
    table.add_row("all", *(_scientific(value) for pair in sums for value in pair))
    return table


def _model_flops(report: StageReport, item: str) -> int:
    forward = asdict(report.model_flops) | {VOCABULARY: report.model_flops.head}
    return 3 * int(forward.get(item, 0))


def _scientific(value: float) -> str:
    return f"{value:.3e}" if value else NOTHING


def _stages(plan: Plan) -> Table:
    """Everything that is one number a stage."""
    stages = list(plan.stages.values())
    table = new_table("Stages", "", *(report.stage.name for report in stages))
    _add_section(table, [_layout_cells(report, plan.recipe.recompute.granularity) for report in stages])
    _add_section(table, [_memory_cells(report) for report in stages], "GB on the largest rank")
    _add_section(table, [_sent_cells(report) for report in stages], "GB that a rank sends in a step")
    _add_section(table, [_time_cells(report) for report in stages], "seconds of a step")
    _add_section(table, [_cost_cells(report) for report in stages])
    return table


def _add_section(table: Table, cells: Sequence[Cells], heading: str = "") -> None:
    """One row for each name that is something in any stage, under a heading if there is one."""
    rows = {name: [stage.get(name, NOTHING) for stage in cells] for stage in cells for name in stage}
    rows = {name: row for name, row in rows.items() if set(row) != {NOTHING}}
    if heading and rows:
        table.add_row(heading)
    for name, row in rows.items():
        table.add_row(f"  {name}" if heading else name, *row)
    table.add_section()


def _layout_cells(report: StageReport, recompute: str) -> Cells:
    layout, stage = report.layout, report.stage
    return {
        "devices": f"{report.devices:,}",
        "tensor x pipeline x context x data": (
            f"{layout.tensor} x {layout.pipeline} x {layout.context} x {report.data_parallel}"
        ),
        "sequence parallelism": "yes" if layout.sequence else "no",
        "recomputation": recompute,
        "sequence length": f"{stage.sequence_length:,}",
        "batch": f"{stage.global_batch_size:,}",
        "  of a rank in a step": f"{report.micro_batches} x {stage.micro_batch_size}",
        "steps": f"{stage.steps:,}",
        "tokens": words.count(report.cost.tokens),
    }


def _memory_cells(report: StageReport) -> Cells:
    rank = max(report.memory, key=lambda rank: rank.total)
    sizes = {**asdict(rank), "activations": rank.activations.total, "total": rank.total}
    return {name: decimal(sizes[field] / 1e9) for field, name in MEMORY_WORDS.items()}


def _sent_cells(report: StageReport) -> Cells:
    return {kind: decimal(size / 1e9) for kind, size in report.time.sent.items()}


def _time_cells(report: StageReport) -> Cells:
    items = {name: decimal(report.time.items[item]) for item, name in TIME_WORDS.items()}
    return items | {"all": decimal(report.time.total)}


def _cost_cells(report: StageReport) -> Cells:
    cost, checkpoints = report.cost, report.cost.checkpoints
    return {
        "tokens per second and device": decimal(cost.tokens_per_second / report.devices),
        "MFU, dense peak of the parameters' format": f"{100 * report.mfu:.1f} %",
        "GB of a checkpoint": decimal(checkpoints.bytes / 1e9),
        "  seconds to write it": decimal(checkpoints.seconds),
        "  how many": f"{checkpoints.count:,}",
        "days": decimal(cost.days),
        "device hours": decimal(cost.device_hours),
        "MWh": decimal(cost.megawatt_hours),
    }


def _data(plan: Plan) -> Table:
    """Tokens of each source in each phase; how often it is read, if the corpus is prepared."""
    phases = [(report.stage.name, phase.name) for report in plan.stages.values() for phase in report.stage.phases]
    table = new_table("Tokens", "source", *(phase for _, phase in phases), "all", "corpus", "epochs")
    for name, use in plan.data.sources.items():
        tokens = (plan.data.tokens[stage][phase].get(name, 0) for stage, phase in phases)
        corpus = "?" if use.available is None else words.count(use.available)
        epochs = "?" if use.epochs is None else decimal(use.epochs)
        table.add_row(name, *_counts(tokens), words.count(use.tokens), corpus, epochs)
    table.add_section()
    sums = [sum(plan.data.tokens[stage][phase].values()) for stage, phase in phases]
    table.add_row("all", *_counts(sums), words.count(sum(sums)), "", "")
    return table


def _counts(tokens: Iterable[int]) -> list[str]:
    return [words.count(count) if count else NOTHING for count in tokens]
