"""Retrieval scores and loss by position, before and after each stage."""

from __future__ import annotations

from dataclasses import replace
from math import isfinite, nan

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, NullLocator

from nano_pretrain.report import words
from nano_pretrain.report.facts import Table
from nano_pretrain.report.figures import NothingToShow
from nano_pretrain.report.record import LengthEvaluation, Record, TaskScores, mapping, number
from nano_pretrain.report.style import FAINT, INK, EndLabel, label_ends, looks, new_figure, plain

_NONE = TaskScores((nan, nan), (nan, nan), nan)

_Point = tuple[float, str, float, tuple[str, str, str]]
"""Tokens, stage, length and conditions."""


def retrieval_table(record: Record) -> Table:
    """A row for each task, length and conditions, two columns for each evaluated point; empty without retrieval."""
    found = _newest(record)
    told_apart = _differences(found)
    points = dict.fromkeys((each.tokens, each.stage) for each in found)
    names = dict.fromkeys((name, each.length, each.conditions) for each in found for name in each.tasks)
    scores = {(*_point(each), name): s for each in found for name, s in each.tasks.items()}
    rows = []
    for name, length, conditions in names:
        of_row = [scores.get((*point, length, conditions, name), _NONE) for point in points]
        chance = next((each.chance for each in of_row if isfinite(each.chance)), nan)
        cells = [_score(pair) for each in of_row for pair in (each.rank, each.match)]
        row = ", ".join([name, f"{length:,.0f} tokens", *told_apart[conditions]])
        rows.append((row, words.decimal(chance, 2), *cells))
    headers = [(f"{stage}, {words.count(tokens)}: ranked", "generated") for tokens, stage in points]
    return Table(("retrieval", "chance", *(cell for pair in headers for cell in pair)), rows)


def positions_figure(record: Record) -> Figure:
    """Loss over the position at the longest length, a line for each evaluated point, and the lengths trained on."""
    found = [each for each in _newest(record) if len(each.loss) and len(each.edges) == len(each.loss) + 1]
    if not found:
        raise NothingToShow("No loss by position has been recorded.")
    longest = max(each.length for each in found)
    found = [each for each in found if each.length == longest]
    told_apart = _differences(found)
    figure, (ax,) = new_figure(4.3, right=0.6 if any(told_apart.values()) else 0.74)
    names = [
        ", ".join(map(plain, [f"{each.stage} {words.count(each.tokens)}", *told_apart[each.conditions]]))
        for each in found
    ]
    labels = []
    for each, name, look in zip(found, names, looks(list(map(str, range(len(found))))).values(), strict=True):
        labels += _line(ax, each, name, look.colour, look.dashes)
    _position_axis(ax, longest, found[-1].documents)
    _trained_lengths(ax, record, longest)
    ax.set_ylabel("held-out loss (nats per token)", color=INK)
    label_ends(ax, labels)
    return figure


def _newest(record: Record) -> list[LengthEvaluation]:
    """One evaluation for each point, length and conditions, by tokens: the same again replaces what was before."""
    found: dict[_Point, LengthEvaluation] = {}
    for each in record.lengths:
        before = found.get(_point(each))
        found[_point(each)] = replace(each, tasks={**before.tasks, **each.tasks}) if before else each
    return sorted(found.values(), key=lambda each: each.tokens)


def _point(each: LengthEvaluation) -> _Point:
    return each.tokens, each.stage, each.length, each.conditions


def _differences(found: list[LengthEvaluation]) -> dict[tuple[str, ...], list[str]]:
    """Of all conditions those that not every evaluation has."""
    common = set[str].intersection(*(set(each.conditions) for each in found)) if found else set()
    return {each.conditions: [part for part in each.conditions if part not in common] for each in found}


def _score(pair: tuple[float, float]) -> str:
    score, error = pair
    if not isfinite(score):
        return "-"
    return words.decimal(score, 2) + (f" ± {error:.2f}" if isfinite(error) else "")


def _line(ax: Axes, each: LengthEvaluation, name: str, colour: str, dashes: str) -> list[EndLabel]:
    """The mean of each bin at its middle on the logarithmic axis, with a band of one standard error."""
    middles = np.sqrt(np.maximum(each.edges[:-1], 1) * each.edges[1:])
    ax.plot(middles, each.loss, dashes, color=colour, linewidth=1.8, marker="o", markersize=3)
    if len(each.error) == len(each.loss):
        ax.fill_between(middles, each.loss - each.error, each.loss + each.error, color=colour, alpha=0.13, linewidth=0)
    last = float(each.loss[-1])
    return [EndLabel(last, f"{name} {last:.3f}", colour, dashes)] if isfinite(last) else []


def _position_axis(ax: Axes, longest: float, documents: str) -> None:
    ax.set_xscale("log", base=2)
    ax.set_xlim(3, longest)
    ax.xaxis.set_minor_locator(NullLocator())
    ax.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
    ax.set_xlabel(f"position in a sample of {longest:,.0f} tokens, {plain(documents)} documents", color=INK, loc="left")


def _trained_lengths(ax: Axes, record: Record, longest: float) -> None:
    for name, stage in mapping(record.recipe.get("stages")).items():
        length = number(mapping(stage).get("sequence_length"))
        if 0 < length <= longest:
            ax.axvline(length, color=FAINT, linewidth=1.2, linestyle="--")
            ax.annotate(
                f"{plain(name)}: {length:,.0f}", (length, 1), (-3, -3), ("data", "axes fraction"), "offset points",
                rotation=90, ha="right", va="top", fontsize=8, color=INK,
            )  # fmt: skip
