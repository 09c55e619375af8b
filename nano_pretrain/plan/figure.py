"""plan.png: learning rate and blend over the tokens of the run, one column a stage."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from matplotlib.ticker import FuncFormatter, MaxNLocator

from nano_pretrain.data.stage_plan import PhasePlan, StagePlan
from nano_pretrain.plan.data import DataPlan
from nano_pretrain.recipe.derived import stage_tokens
from nano_pretrain.recipe.schema import ScheduleConfig
from nano_pretrain.report import words
from nano_pretrain.report.style import DPI, FAINT, INK, LINE, Look, looks, plain
from nano_pretrain.schedule.learning_rate import learning_rate

SIZE = (11.0, 6.2)
NARROWEST = 0.2
"""Smallest share of the width that a stage gets: the extension of a 20T-token run is a thousandth of it."""
POINTS = 1200


def plan_figure(data: DataPlan) -> Figure:
    """Learning rate above, share of each source below; the phases are named on top."""
    stages = data.curriculum.stages
    widths = _widths(stages)
    figure = Figure(figsize=SIZE, dpi=DPI, facecolor="white")
    FigureCanvasAgg(figure)
    grid: Any = figure.subplots(
        2, len(stages), squeeze=False, sharex="col", sharey="row",
        gridspec_kw={"width_ratios": widths, "height_ratios": (1, 1.3)},
    )  # fmt: skip
    figure.subplots_adjust(left=0.09, right=0.8, bottom=0.1, top=0.88, hspace=0.08, wspace=0.06)
    look = looks(list(data.sources))
    for column, stage in enumerate(stages):
        upper, lower = grid[0][column], grid[1][column]
        for ax in (upper, lower):
            ax.tick_params(labelsize=8, colors=INK, left=column == 0)
            ax.spines[["top", "right"]].set_visible(False)
        _learning_rate(upper, stage, max(stage.config.schedule.lr for stage in stages))
        _blend(lower, stage, look)
        _name_phases(upper, stage, several=len(stages) > 1)
        _token_axis(lower, stage, wide=widths[column] > 0.5)
    grid[0][0].set_ylabel("learning rate", color=INK)
    grid[1][0].set_ylabel("share of the tokens (%)", color=INK)
    handles = [Patch(facecolor=look[n].colour, hatch=look[n].hatch, edgecolor="white", label=plain(n)) for n in look]
    figure.legend(handles=handles[::-1], loc="center left", bbox_to_anchor=(0.81, 0.4), fontsize=8, frameon=False)
    return figure


def _widths(stages: Sequence[StagePlan]) -> list[float]:
    total = stages[-1].end_tokens
    return [max((stage.end_tokens - stage.start_tokens) / total, NARROWEST) for stage in stages]


def _learning_rate(ax: Axes, stage: StagePlan, peak: float) -> None:
    """The curve, with its value where it turns; every turn is among the points."""
    schedule, length = stage.config.schedule, stage_tokens(stage.config)
    turns = _turns(schedule, length)
    tokens = sorted({*np.linspace(0, length, POINTS).astype(np.int64).tolist(), *turns})
    ax.plot(tokens, [learning_rate(schedule, length, consumed) for consumed in tokens], color=LINE, linewidth=1.8)
    for turn in turns:
        rate = learning_rate(schedule, length, turn)
        left = 2 * turn < length
        style: Any = {"textcoords": "offset points", "ha": "left" if left else "right", "fontsize": 8, "color": INK}
        ax.annotate(f"{rate:.3g} at {words.count(turn)}", (turn, rate), (3 if left else -22, 4), **style)
    ax.set_ylim(0, 1.18 * peak)
    ax.grid(visible=True, color="#dddddd", linewidth=0.6)
    ax.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.3g}"))


def _turns(schedule: ScheduleConfig, length: int) -> list[int]:
    """Tokens of a stage at which its learning rate begins to do something else."""
    warmup = {schedule.warmup_tokens} if schedule.warmup_tokens else set()
    decay = {length - schedule.decay_tokens} if schedule.kind == "wsd" else set()
    return sorted({*warmup, *decay, length} - {0})


def _blend(ax: Axes, stage: StagePlan, look: dict[str, Look]) -> None:
    """A bar for each phase, and one for each plateau of a ramp."""
    for phase in stage.phases:
        for part in stage.plateaus(phase):
            left, width, low = part.start_tokens - stage.start_tokens, part.end_tokens - part.start_tokens, 0.0
            for name, style in look.items():
                share = 100 * part.shares.get(name, 0)
                area = ax.bar(left, share, width, low, align="edge", color=style.colour)
                area[0].set(hatch=style.hatch, edgecolor="white", linewidth=0.7)
                low += share
    ax.set_ylim(0, 100)


def _name_phases(ax: Axes, stage: StagePlan, *, several: bool) -> None:
    for phase in stage.phases:
        left, right = _span(stage, phase)
        ax.annotate(
            plain(phase.name), ((left + right) / 2, 1), (0, 4), ("data", "axes fraction"), "offset points",
            ha="center", fontsize=8, color=INK,
        )  # fmt: skip
        if left:
            ax.axvline(left, color=FAINT, linewidth=0.8)
    if several:
        ax.set_title(plain(stage.name), fontsize=9, color=INK, pad=18)


def _span(stage: StagePlan, phase: PhasePlan) -> tuple[int, int]:
    """Begin and end of a phase in tokens of its stage."""
    return phase.start_tokens - stage.start_tokens, phase.end_tokens - stage.start_tokens


def _token_axis(ax: Axes, stage: StagePlan, *, wide: bool) -> None:
    ax.set_xlim(0, stage.end_tokens - stage.start_tokens)
    ax.xaxis.set_major_locator(MaxNLocator(6 if wide else 2))
    ax.xaxis.set_major_formatter(FuncFormatter(lambda value, _: words.count(value)))
    ax.set_xlabel("tokens of the stage", color=INK, fontsize=9)
