"""What all pictures share: size, colours, the token axis, shaded phases, labels beside lines."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

from nano_pretrain.report import words
from nano_pretrain.report.course import Span

INK, FAINT, ALARM, LINE = "#222222", "#8a8a8a", "#D55E00", "#0072B2"
PALETTE = ("#0072B2", "#D55E00", "#009E73", "#E69F00", "#CC79A7", "#56B4E9", "#882255", "#999933")
"""Okabe and Ito's colours that stand out on white, and two of Paul Tol's; told apart by colour-blind eyes."""
_DARK = frozenset({"#0072B2", "#D55E00", "#009E73", "#882255"})

WIDTH, DPI = 9.6, 150
_CHARACTER_INCHES = 0.068
_LABEL_POINTS = 8.0


@dataclass(frozen=True)
class Look:
    """How one source is drawn in every picture; beyond the palette's end lines are dashed and areas hatched."""

    colour: str
    dashes: str
    hatch: str

    @property
    def text_colour(self) -> str:
        """What is read on an area of this colour."""
        return "white" if self.colour in _DARK else INK


def looks(names: Sequence[str]) -> dict[str, Look]:
    """A look for each source; 8 colours x 3 patterns before one comes back."""
    patterns = (("-", ""), ("--", "////"), (":", "...."))
    return {
        name: Look(PALETTE[i % len(PALETTE)], *patterns[i // len(PALETTE) % len(patterns)])
        for i, name in enumerate(names)
    }


def plain(text: str) -> str:
    """A name as a short label: matplotlib reads pairs of dollar signs as mathematics and hides names in `_`."""
    line = " ".join(text.split())
    short = line if len(line) <= 24 else line[:23] + "…"
    return (" " if short.startswith("_") else "") + short.replace("$", r"\$")


def new_figure(height: float, panels: int = 1, right: float = 0.97) -> tuple[Figure, list[Axes]]:
    """A figure of `panels` axes above each other that share the token axis.

    Args:
        height: of the figure, inches.
        panels: number of axes.
        right: right end of the axes, fraction of the figure's width.
    """
    figure = Figure(figsize=(WIDTH, height), dpi=DPI, facecolor="white")
    FigureCanvasAgg(figure)
    grid: Any = figure.subplots(panels, 1, sharex=True, squeeze=False)
    figure.subplots_adjust(left=0.085, right=right, bottom=0.58 / height, top=1 - 0.5 / height, hspace=0.12)
    axes = [row[0] for row in grid]
    for ax in axes:
        ax.grid(visible=True, color="#dddddd", linewidth=0.6)
        ax.set_axisbelow(True)
        ax.tick_params(labelsize=9, colors=INK)
        ax.spines[["top", "right"]].set_visible(False)
    return figure, axes


def token_axis(axes: Sequence[Axes], start: float, end: float) -> None:
    """Let all axes run over consumed tokens."""
    for ax in axes:
        ax.set_xlim(start, end if end > start else start + 1)
    axes[-1].xaxis.set_major_formatter(FuncFormatter(lambda value, _: words.count(value)))
    axes[-1].set_xlabel("consumed tokens", color=INK, loc="left")


def shade_phases(axes: Sequence[Axes], phases: Sequence[Span]) -> None:
    """Shade every other phase, draw stage borders, and name the phases above the upper axes; limits must be set."""
    low, high = axes[0].get_xlim()
    visible = [(i, span) for i, span in enumerate(phases) if span.start < high and span.end > low]
    several_stages = len({span.stage for _, span in visible}) > 1
    for i, span in visible:
        for ax in axes:
            ax.axvspan(max(span.start, low), min(span.end, high), color="#000000", alpha=(0.02, 0.085)[i % 2], lw=0)
            if span.start > low:
                new_stage = phases[i - 1].stage != span.stage
                ax.axvline(span.start, color=FAINT, linewidth=1.6 if new_stage else 0.7)
    names = [f"{span.stage} / {span.phase}" if several_stages else span.phase for _, span in visible]
    middles = [(max(span.start, low) + min(span.end, high)) / 2 for _, span in visible]
    _name_phases(axes[0], names, [(middle - low) / (high - low) for middle in middles])


def _name_phases(ax: Axes, names: Sequence[str], middles: Sequence[float]) -> None:
    """Names at fractions of the axes' width, in two rows so that short phases have room."""
    row_ends = [0.0, 0.0]
    for name, middle in zip(map(plain, names), middles, strict=True):
        half = 0.5 * text_width(name, ax)
        centre = min(max(middle, half), 1 - half)
        row = 0 if centre - half >= row_ends[0] else 1
        if centre - half < row_ends[row]:
            continue
        row_ends[row] = centre + half + 0.01
        ax.annotate(
            name, (centre, 1), (0, 4 + 11 * row), "axes fraction", "offset points", ha="center", fontsize=8, color=INK
        )


def text_width(text: str, ax: Axes) -> float:
    """Width of 8-point text as a fraction of the axes', by its number of characters."""
    return len(text) * _CHARACTER_INCHES / (WIDTH * ax.get_position().width)


def fits(text: str, width: float, ax: Axes) -> bool:
    """Whether 8-point text fits into a fraction of the axes' width."""
    return text_width(text, ax) < width


@dataclass(frozen=True)
class EndLabel:
    """Text beside the end of a line at height `y`, in data units, with a sample of how the line is drawn."""

    y: float
    text: str
    colour: str
    dashes: str


def label_ends(ax: Axes, labels: Sequence[EndLabel]) -> None:
    """Write labels to the right of the axes, moved apart where they would overlap."""
    gap = 1.22 * _LABEL_POINTS * DPI / 72 / ax.get_window_extent().height
    ordered = sorted(labels, key=lambda label: label.y)
    to_fraction = ax.transData + ax.transAxes.inverted()
    wanted = [min(max(float(to_fraction.transform((0, label.y))[1]), 0), 1) for label in ordered]
    style: Any = {"transform": ax.transAxes, "clip_on": False}
    for label, at, place in zip(ordered, wanted, spread(wanted, gap), strict=True):
        ax.plot([1.003, 1.028], [at, place], color=label.colour, linewidth=0.7, **style)
        ax.plot([1.028, 1.054], [place, place], label.dashes, color=label.colour, linewidth=1.9, **style)
        ax.text(1.06, place, label.text, color=INK, fontsize=_LABEL_POINTS, va="center_baseline", **style)


def spread(wanted: Sequence[float], gap: float) -> list[float]:
    """Places from 0 to 1, at least `gap` apart and in sum of squares as near as can be to ascending wanted ones.

    Where 1 has no room for them they stand as far apart as it allows. Without the gap this is isotonic regression:
    labels that would overlap form a block around the mean of what its members want (pool adjacent violators).
    """
    gap = min(gap, 1 / max(len(wanted) - 1, 1))
    blocks: list[list[float]] = []
    for i, place in enumerate(wanted):
        blocks.append([place - i * gap])
        while len(blocks) > 1 and fmean(blocks[-2]) > fmean(blocks[-1]):
            blocks[-2:] = [blocks[-2] + blocks[-1]]
    room = max(0.0, 1 - gap * (len(wanted) - 1))
    shifts = [min(max(fmean(block), 0), room) for block in blocks for _ in block]
    return [shift + i * gap for i, shift in enumerate(shifts)]


def log_axis(ax: Axes) -> None:
    """A logarithmic y axis with ticks as plain numbers, if the values span at least a factor of 2."""
    low, high = ax.dataLim.intervaly
    if low <= 0 or high < 2 * low:
        return
    ax.set_yscale("log")
    ax.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if high > 20 * low else (1, 1.2, 1.5, 2, 2.5, 3, 4, 5, 6, 8)))
    ax.yaxis.set_minor_locator(NullLocator())
    ax.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.3g}"))


def legend_below(ax: Axes) -> None:
    """The legend beside the name of the token axis, where it covers no data."""
    right = ax.get_position().x1
    handles, labels = ax.get_legend_handles_labels()
    ax.figure.legend(
        handles, labels, loc="lower right", bbox_to_anchor=(right, 0), ncols=len(labels), fontsize=8, frameon=False
    )
