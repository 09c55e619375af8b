"""The pictures of the report; each raises NothingToShow when its numbers are missing."""

from __future__ import annotations

from collections.abc import Callable
from math import isfinite
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from matplotlib.ticker import FuncFormatter

from nano_pretrain.data.stage_plan import Plateau
from nano_pretrain.report.course import planned_tokens, schedule_marks, source_names, spans
from nano_pretrain.report.curves import median, smooth, thin, window
from nano_pretrain.report.record import Floats, Record, mapping, number
from nano_pretrain.report.style import (
    ALARM,
    INK,
    LINE,
    EndLabel,
    Look,
    fits,
    label_ends,
    legend_below,
    log_axis,
    looks,
    new_figure,
    plain,
    shade_phases,
    token_axis,
)


class NothingToShow(Exception):  # noqa: N818  (no error: a young run has no numbers yet)
    """A picture has no numbers; the message says which."""


def loss_figure(record: Record) -> Figure:
    """Training loss of every step and its moving average."""
    steps = record.steps
    _require(steps.loss, "No step with a loss has been recorded.")
    figure, (ax,) = new_figure(4.3)
    _raw_and_smooth(ax, steps.tokens, steps.loss)
    _limit_to_smooth(ax, steps.tokens, steps.loss)
    _finish([ax], record, consumed=True)
    ax.set_ylabel("training loss (nats per token)", color=INK)
    legend_below(ax)
    return figure


def heldout_figure(record: Record) -> Figure:
    """Bits per byte of each source and of the blend over tokens, the baselines of the blend as lines."""
    evaluations = record.evaluations
    if not any(isfinite(value) for e in evaluations for value in (e.blend, *e.sources.values())):
        raise NothingToShow("Nothing has been evaluated on held-out text.")
    names = [name for name in source_names(record) if any(name in e.sources for e in evaluations)]
    figure, (ax,) = new_figure(max(4.8, 0.19 * (len(names) + 3) + 1.1), right=0.78)
    tokens = np.array([e.tokens for e in evaluations])
    labels: list[EndLabel] = []
    for name, look in looks(source_names(record)).items():
        if name in names:
            values = np.array([e.sources.get(name, np.nan) for e in evaluations])
            labels += _heldout_line(ax, tokens, values, name, look)
    blend = np.array([e.blend for e in evaluations])
    labels += _heldout_line(ax, tokens, blend, "blend", Look(INK, "-", ""), width=2.6)
    labels += _baseline_lines(ax, record)
    log_axis(ax)
    _finish([ax], record, consumed=True)
    ax.set_ylabel("held-out loss (bits per byte)", color=INK)
    label_ends(ax, labels)
    return figure


def learning_rate_figure(record: Record) -> Figure:
    """Learning rate of every step, with the turns of its schedule."""
    steps = record.steps
    _require(steps.lr, "No step with a learning rate has been recorded.")
    figure, (ax,) = new_figure(3.4)
    ax.plot(*thin(steps.tokens, steps.lr), color=LINE, linewidth=1.8)
    ax.set_ylim(0, 1.08 * float(np.nanmax(np.where(np.isfinite(steps.lr), steps.lr, 0))) or 1)
    ax.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.3g}"))
    _finish([ax], record, consumed=False)
    end = ax.get_xlim()[1]
    for mark in (mark for mark in schedule_marks(record) if 0 < mark.tokens < end):
        ax.axvline(mark.tokens, color=ALARM, linewidth=1, linestyle=(0, (4, 3)))
        offset, side = ((3, 0), "left") if mark.after else ((-3, 0), "right")
        style: Any = {"rotation": 90, "ha": side, "va": "bottom", "fontsize": 8, "color": ALARM}
        ax.annotate(mark.text, (mark.tokens, 0.04), offset, ("data", "axes fraction"), "offset points", **style)
    ax.set_ylabel("learning rate", color=INK)
    return figure


def blend_figure(record: Record) -> Figure:
    """Share of each source over the tokens of the run, phase by phase, as it is given: the ledger's numbers."""
    parts = [part for span in spans(record) for part in span.blend]
    if not parts:
        raise NothingToShow("Neither the recipe nor the ledger says what the blend is.")
    names = [name for name in source_names(record) if any(part.shares.get(name, 0) > 0 for part in parts)]
    look = {name: found for name, found in looks(source_names(record)).items() if name in names}
    figure, (ax,) = new_figure(max(4.4, 0.19 * len(names) + 1.2), right=0.78)
    _finish([ax], record, consumed=False)
    for part in parts:
        _stack(ax, part, look)
    ax.set_ylim(0, 100)
    ax.set_ylabel("share of the tokens (%)", color=INK)
    handles = [_patch(name, look[name]) for name in reversed(names)]
    figure.legend(handles=handles, loc="center left", bbox_to_anchor=(0.785, 0.5), fontsize=8, frameon=False)
    return figure


def throughput_figure(record: Record) -> Figure:
    """Tokens per second and model FLOPs utilisation."""
    steps = record.steps
    _require(steps.tokens_per_second, "No step with a throughput has been recorded.")
    panels = 2 if np.isfinite(steps.mfu).any() else 1
    figure, axes = new_figure(2.2 + 1.6 * panels, panels, right=0.86)
    rows = [(steps.tokens_per_second, "tokens per second", ""), (100 * steps.mfu, "MFU (% of peak)", " %")]
    for ax, (values, label, unit) in zip(axes, rows[:panels], strict=True):
        _raw_and_smooth(ax, steps.tokens, values)
        middle = median(values)
        ax.axhline(middle, color=INK, linewidth=1, linestyle=":")
        ax.set_ylim(0, 1.12 * max(min(float(np.nanmax(values)), 2 * middle), middle) or 1)
        ax.set_ylabel(label, color=INK)
        ax.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.6g}"))
        label_ends(ax, [EndLabel(middle, f"median {middle:,.4g}{unit}", INK, ":")])
    _finish(axes, record, consumed=True)
    legend_below(axes[-1])
    return figure


def grad_norm_figure(record: Record) -> Figure:
    """Gradient norm before clipping, and where it is clipped."""
    steps = record.steps
    norms = steps.grad_norm
    _require(norms, "No step with a gradient norm has been recorded.")
    figure, (ax,) = new_figure(3.4)
    _raw_and_smooth(ax, steps.tokens, norms)
    clip = number(mapping(record.recipe.get("optimizer")).get("clip_grad"))
    if clip > 0:
        ax.axhline(clip, color=ALARM, linewidth=1.2, linestyle="--", label=f"clipped above {clip:g}")
    log_axis(ax)
    _finish([ax], record, consumed=True)
    ax.set_ylabel("gradient norm", color=INK)
    legend_below(ax)
    return figure


FIGURES: dict[str, Callable[[Record], Figure]] = {
    "loss": loss_figure,
    "heldout": heldout_figure,
    "learning_rate": learning_rate_figure,
    "blend": blend_figure,
    "throughput": throughput_figure,
    "grad_norm": grad_norm_figure,
}
"""File name without .png -> picture."""


def _require(values: Floats, message: str) -> None:
    if not np.isfinite(values).any():
        raise NothingToShow(message)


def _finish(axes: list[Axes], record: Record, *, consumed: bool) -> None:
    """Token axis up to what was consumed, or to the end of the plan; phases behind it."""
    phases = spans(record)
    tokens = [*record.steps.tokens.tolist(), *(e.tokens for e in record.evaluations)]
    reached = max(tokens, default=0.0)
    planned = [planned_tokens(record), *(span.end for span in phases)]
    end = reached if consumed else max([reached, *filter(isfinite, planned)])
    token_axis(axes, 0, end)
    shade_phases(axes, phases)
    if not consumed and 0 < reached < 0.995 * end:
        axes[0].axvline(reached, color=INK, linewidth=1.2)
        box = {"facecolor": "white", "edgecolor": "none", "alpha": 0.85, "pad": 1.5}
        style: Any = {"fontsize": 8, "color": INK, "bbox": box, "zorder": 5}
        axes[0].annotate("so far", (reached, 0.5), (5, 0), ("data", "axes fraction"), "offset points", **style)


def _raw_and_smooth(ax: Axes, tokens: Floats, values: Floats) -> None:
    width = window(len(values))
    ax.plot(*thin(tokens, values), color=LINE, alpha=0.3, linewidth=0.8, label="each step", **_points(len(values)))
    ax.plot(*thin(tokens, smooth(values, width)), color=LINE, linewidth=1.8, label=f"mean of {width:,} steps")
    broken = tokens[~np.isfinite(values)]
    if len(broken):
        _mark(ax, broken, 0.03, "x", f"steps without a number: {len(broken)}")


def _points(count: int) -> dict[str, Any]:
    """Dots on a line of few points: one alone would not be seen, nor half of one at the edge."""
    return {"marker": "o", "markersize": 3, "clip_on": False} if count < 60 else {}


def _limit_to_smooth(ax: Axes, tokens: Floats, values: Floats) -> None:
    """Show all of the average; single spikes far above it are marked at the upper edge, they would press it flat."""
    line = smooth(values, window(len(values)))
    low, high = float(np.nanmin(line)), float(np.nanmax(line))
    room = 0.25 * (high - low) or 0.05 * abs(high) or 1.0
    finite = values[np.isfinite(values)]
    ax.set_ylim(max(float(finite.min()), low - room) - 0.05 * room, min(float(finite.max()), high + room) + 0.05 * room)
    above = tokens[np.isfinite(values) & (values > high + room)]
    if len(above):
        _mark(ax, above, 0.98, "^", f"steps above this axis: {len(above)}")


def _mark(ax: Axes, tokens: Floats, height: float, marker: str, label: str) -> None:
    """Markers at a fraction of the axes' height."""
    at = np.full(len(tokens), height)
    ax.plot(tokens, at, marker, color=ALARM, markersize=5, transform=ax.get_xaxis_transform(), label=label)


def _heldout_line(
    ax: Axes, tokens: Floats, values: Floats, name: str, look: Look, *, width: float = 1.5
) -> list[EndLabel]:
    """Draw one source; its label at the last value."""
    known = np.isfinite(values)
    if not known.any():
        return []
    style = {"color": look.colour, "linewidth": width, **_points(int(known.sum()))}
    ax.plot(tokens[known], values[known], look.dashes, **style)
    last = float(values[known][-1])
    return [EndLabel(last, f"{plain(name)} {last:.3f}", look.colour, look.dashes)]


def _baseline_lines(ax: Axes, record: Record) -> list[EndLabel]:
    labels = []
    for name, dashes in (("bigram", "--"), ("trigram", ":")):
        value = number(mapping(record.baselines.get(name)).get("blend"))
        if isfinite(value):
            ax.axhline(value, color=INK, linestyle=dashes, linewidth=1.3)
            labels.append(EndLabel(value, f"{name} of blend {value:.3f}", INK, dashes))
    return labels


def _stack(ax: Axes, part: Plateau, looks_of: dict[str, Look]) -> None:
    """One plateau as a bar of its whole length, with the shares written in where they fit."""
    low, width = 0.0, part.end_tokens - part.start_tokens
    for name, look in looks_of.items():
        share = 100 * part.shares.get(name, 0)
        if share > 0:
            area = ax.bar(part.start_tokens, share, width, low, align="edge", color=look.colour, hatch=look.hatch)
            area[0].set(edgecolor="white", linewidth=0.7)
        if share >= 4:
            text = _fitting([f"{plain(name)} {share:.3g} %", f"{share:.3g} %"], width, ax)
            place = (part.start_tokens + width / 2, low + share / 2)
            box = {"facecolor": look.colour, "edgecolor": "none", "pad": 0.8}
            ax.text(*place, text, ha="center", va="center", fontsize=7.5, color=look.text_colour, bbox=box)
        low += share


def _fitting(texts: list[str], tokens: float, ax: Axes) -> str:
    """The first text that is no wider than a stretch of the token axis; none if all are."""
    left, right = ax.get_xlim()
    return next((text for text in texts if fits(text, tokens / (right - left), ax)), "")


def _patch(name: str, look: Look) -> Patch:
    return Patch(facecolor=look.colour, hatch=look.hatch, edgecolor="white", label=plain(name))
