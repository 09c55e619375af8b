"""The plan as tables for people, 100 columns wide where no terminal says otherwise."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, astuple

from rich import box
from rich.console import Console
from rich.table import Table

from nano_pretrain.plan.blocks import LAYER_ITEMS, VOCABULARY
from nano_pretrain.plan.cost import total_cost
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
ABREAST = 2
"""Stages that have room beside each other."""
LEAST = 1e-3
"""What is smaller and not 0 is only called so."""

Cells = dict[str, str]
"""Name of a row -> what one stage has there."""


class _Console(Console):
    """rich's own would exit by itself when the reader of stdout has gone; the command line knows better how."""

    def on_broken_pipe(self) -> None:
        """Called by rich."""
        raise BrokenPipeError


def new_console() -> Console:
    """On stdout; names are printed as they are, in `WIDTH` columns or those of a narrower terminal."""
    console = _Console(markup=False, highlight=False, emoji=False)
    console.width = min(console.width, WIDTH) if console.is_terminal else WIDTH
    return console


def show_plan(console: Console, plan: Plan, figure: str) -> None:
    """Print the whole plan."""
    console.print(_title(plan), style="bold")
    if plan.recipe.stand_ins:
        console.print(f"stand-ins for what is not published: {'; '.join(plan.recipe.stand_ins.values())}")
    console.print()
    stages = list(plan.stages.values())
    for start in range(0, len(stages), ABREAST):
        abreast = stages[start : start + ABREAST]
        for table in (_parameters(plan, abreast), _flops(abreast), _stages(plan, abreast)):
            console.print(table)
    deep = [report for report in stages if report.layout.pipeline > 1]
    for table in (*map(_positions, deep), _cost(stages), _data(plan), *_repeats(plan)):
        console.print(table)
    for line in [*notes(plan), f"schedule and phases: {figure}"]:
        console.print(line)


def new_table(title: str, *headings: str, left: int = 1) -> Table:
    """A table whose first `left` columns are text and whose others are numbers."""
    table = Table(title=title, title_justify="left", title_style="bold", box=box.SIMPLE_HEAD, pad_edge=False)
    for index, heading in enumerate(headings):
        table.add_column(heading, justify="left" if index < left else "right", overflow="fold")
    return table


def decimal(value: float) -> str:
    """Three significant digits."""
    if value == 0:
        return NOTHING
    if abs(value) >= 999.5:
        return f"{value:,.0f}"
    return f"{value:.3g}" if abs(value) >= LEAST else f"< {LEAST:g}"


def _title(plan: Plan) -> str:
    title, parent = f"{plan.recipe.run.name} on {plan.device.name}", plan.recipe.pretraining_of
    return f"{title}: no published pretraining schedule, takes its parent's, {parent}" if parent else title


def _parameters(plan: Plan, stages: Sequence[StageReport]) -> Table:
    table = new_table("Parameters", "", "model", *(f"{report.stage.name}\nlargest rank" for report in stages))
    counts = [max(report.parameters, key=lambda rank: rank.total) for report in stages]
    for part in asdict(plan.parameters):
        table.add_row(part.replace("_", " "), *(f"{getattr(count, part):,}" for count in (plan.parameters, *counts)))
    table.add_section()
    table.add_row("all", *(f"{count.total:,}" for count in (plan.parameters, *counts)))
    return table


def _flops(stages: Sequence[StageReport]) -> Table:
    """Of a training token: three forward passes of the model, and what the kernels execute."""
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


def _stages(plan: Plan, stages: Sequence[StageReport]) -> Table:
    """Everything that is one number a stage, and no cost."""
    table = new_table("Stages", "", *(report.stage.name for report in stages))
    _add_section(table, [_layout_cells(report, plan.recipe.recompute.granularity) for report in stages])
    _add_section(table, [_long_text_cells(plan, report) for report in stages], "tokens in documents of at least")
    has = "" if plan.device.memory_gigabytes is None else f", of {plan.device.memory_gigabytes:g}"
    _add_section(table, [_memory_cells(report) for report in stages], f"GB on the largest rank{has}")
    _add_section(table, [_sent_cells(report) for report in stages], "GB that a rank sends in a step")
    _add_section(table, [_time_cells(report) for report in stages], "seconds of a step")
    _add_section(table, [_speed_cells(report) for report in stages])
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
        "sequences of a step": _growing([f"{batch.global_batch_size:,}" for batch in report.batches]),
        "  micro-batches of a rank": _growing([f"{batch.micro_batches:,}" for batch in report.batches]),
        "  sequences of a micro-batch": f"{stage.micro_batch_size:,}",
        "tokens of a step": _growing([words.count(size) for size, _ in stage.clock.runs]),
        "steps": f"{stage.steps:,}",
        "tokens": words.count(report.cost.tokens),
    }


def _long_text_cells(plan: Plan, report: StageReport) -> Cells:
    text = plan.data.long_text.get(report.stage.name)
    return {f"{text.least:,} tokens": words.small_share(text.share)} if text else {}


def _growing(counts: Sequence[str]) -> str:
    """What all steps of a stage have; where the batch grows, the first and the last of them."""
    return " to ".join(dict.fromkeys((counts[0], counts[-1])))


def _memory_cells(report: StageReport) -> Cells:
    rank = max(report.memory, key=lambda rank: rank.total)
    sizes = {**asdict(rank), "activations": rank.activations.total, "total": rank.total}
    return {name: decimal(sizes[field] / 1e9) for field, name in MEMORY_WORDS.items()}


def _sent_cells(report: StageReport) -> Cells:
    return {kind: decimal(size / 1e9) for kind, size in report.time.sent.items()}


def _time_cells(report: StageReport) -> Cells:
    items = {name: decimal(report.time.items[item]) for item, name in TIME_WORDS.items()}
    other = f"all {'without' if report.layout.overlap else 'with'} overlap"
    return items | {"all": decimal(report.time.total), other: decimal(report.other_seconds)}


def _speed_cells(report: StageReport) -> Cells:
    speed = {"tokens per second and device": decimal(report.cost.tokens_per_second / report.devices)}
    for name, share in report.mfu.items():
        peak = decimal(report.peaks[name] / report.devices / 1e12)
        speed[f"MFU of {peak} TFLOP/s ({name.upper()})"] = words.percent(share)
    return speed


def _positions(report: StageReport) -> Table:
    """Memory of one rank of each pipeline position."""
    headings = ("position", "layers", "micro-\nbatches\nin flight", "weights\nand copies", "gradients",
                "optimizer\nshard", "activations\nand states", "logits,\nbuffers", "all")  # fmt: skip
    table = new_table(f"GB by pipeline position, {report.stage.name}", *headings, left=0)
    for layers, rank in zip(report.layers, report.memory, strict=True):
        sizes = (
            rank.weights + rank.fp8_copies,
            rank.gradients,
            rank.optimizer,
            rank.activations.total + rank.states,
            rank.logits + rank.buffers,
            rank.total,
        )
        counts = map(str, (rank.position, layers, rank.in_flight))
        table.add_row(*counts, *(decimal(size / 1e9) for size in sizes))
    return table


def _cost(stages: Sequence[StageReport]) -> Table:
    """What each stage costs, and what they cost together if there are several."""
    headings = ("checkpoints", "GB\nof each", "seconds to\nwrite each", "TB\nof all", "time", "device hours", "MWh")
    table = new_table("Cost", "", *headings)
    for report in stages:
        size, seconds, count = astuple(report.cost.checkpoints)
        written = (f"{count:,}", decimal(size / 1e9), decimal(seconds))
        table.add_row(report.stage.name, *written, *_sums(report))
    if len(stages) > 1:
        table.add_section()
        table.add_row("all", "", "", "", *_sums(*stages))
    return table


def _sums(*stages: StageReport) -> tuple[str, ...]:
    total = total_cost(report.cost for report in stages)
    numbers = (decimal(total[name]) for name in ("device_hours", "megawatt_hours"))
    return decimal(total["written_bytes"] / 1e12), _duration(total["seconds"]), *numbers


def _duration(seconds: float) -> str:
    units = {"days": 86_400, "hours": 3600, "minutes": 60, "seconds": 1}
    unit = next((unit for unit, length in units.items() if seconds >= length), "seconds")
    return f"{decimal(seconds / units[unit])} {unit}"


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


def _repeats(plan: Plan) -> Iterator[Table]:
    """What is read more than once, if anything is."""
    headings = ("readings of\nits most read part", "share read\nmore than once", "begins after\ntokens of the run")
    table = new_table("Read more than once", "source", "too small for ranges of", *headings, left=2)
    for name, use in plan.data.sources.items():
        if again := use.repeats:
            stages, share = ", ".join(again.shared_by) or NOTHING, decimal(100 * again.share) + " %"
            table.add_row(name, stages, f"{again.readings:.2f}", share, words.count(again.begins))
    if table.row_count:
        yield table
