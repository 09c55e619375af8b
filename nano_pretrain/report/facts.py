"""What the report says in numbers and tables."""

from __future__ import annotations

from dataclasses import dataclass
from math import isfinite, nan

import numpy as np

from nano_pretrain.recipe.describe import as_written
from nano_pretrain.recipe.errors import EXIT_CONTINUE, EXIT_DONE, EXIT_USER_ERROR
from nano_pretrain.report import words
from nano_pretrain.report.course import planned_tokens, source_names
from nano_pretrain.report.curves import median, smooth, window
from nano_pretrain.report.record import Floats, Quantisation, Record, mapping, number

_EXIT_STATES: dict[float, str] = {
    EXIT_DONE: "finished",
    EXIT_CONTINUE: "stopped on request",
    EXIT_USER_ERROR: "refused: wrong input",
}


@dataclass(frozen=True)
class Card:
    """One headline number, and a line below it."""

    label: str
    value: str
    note: str = ""


@dataclass(frozen=True)
class Table:
    """Cells as text; the first column is left-aligned. The last row is emphasised where `total` says so."""

    header: tuple[str, ...]
    rows: list[tuple[str, ...]]
    total: bool = False


def cards(record: Record) -> list[Card]:
    """The headline numbers."""
    return [
        Card("Parameters", words.count(number(record.environment.get("parameters")))),
        _tokens_card(record),
        Card("Time in steps", words.duration(_seconds_in_steps(record)), "sum over all steps, restarts included"),
        _throughput_card(record),
        _loss_card(record),
        _blend_card(record),
        _exit_card(record),
    ]


def heldout_table(record: Record) -> Table:
    """First and last bits per byte of each source and of the blend, beside the baselines; empty without evaluations."""
    evaluations = record.evaluations
    rows = [
        _heldout_row(record, name, [e.sources.get(name, nan) for e in evaluations])
        for name in source_names(record)
        if any(name in e.sources for e in evaluations)
    ]
    blend = [e.blend for e in evaluations]
    has_blend = any(map(isfinite, blend))
    if has_blend:
        rows.append(_heldout_row(record, None, blend))
    header = ("bits per byte", "first", "last", "change", "bigram", "trigram", "last against bigram", "against trigram")
    return Table(header, rows, total=has_blend)


def ledger_table(record: Record) -> Table:
    """Tokens consumed of each source, in all and per phase, and how often the source was read; empty without ledger."""
    stages = mapping(record.ledger.get("stages"))
    phases = [
        (stage if len(stages) == 1 else f"{stage} / ", phase, mapping(sources))
        for stage, parts in stages.items()
        for phase, sources in mapping(parts).items()
    ]
    names = [phase if len(stages) == 1 else stage + phase for stage, phase, _ in phases]
    per_phase = [sources for _, _, sources in phases]
    sources = {name: mapping(source) for name, source in mapping(record.ledger.get("sources")).items()}
    total = sum(number(source.get("tokens")) for source in sources.values())
    rows = [
        (
            name,
            _whole(number(source.get("tokens"))),
            words.percent(number(source.get("tokens")) / total if total else nan),
            words.decimal(number(source.get("epochs")), 2),
            *(_whole(number(phase.get(name, 0))) for phase in per_phase),
        )
        for name, source in sources.items()
    ]
    if rows:
        sums = (_whole(sum(number(count) for count in phase.values())) for phase in per_phase)
        rows.append(("all", _whole(total), words.percent(1.0), "", *sums))
    return Table(("consumed tokens", "in all", "share", "epochs", *names), rows, total=bool(rows))


def acts_table(record: Record) -> Table:
    """What the run was told to change in mid-run, in the order of its tokens; empty for most runs."""
    header = ("changed in mid-run", "before", "after", "from tokens")
    # After a fall-back to an earlier checkpoint less tokens may be told of later.
    acts = sorted(record.acts, key=lambda act: act.tokens)
    return Table(header, [(a.field, as_written(a.before), as_written(a.after), f"{a.tokens:,}") for a in acts])


def quantisation_table(record: Record) -> Table:
    """What FP8 loses of inputs, weights and gradients, in the first and last step counted, and where most in the last.

    Empty without FP8.
    """
    header = (
        "FP8, of",
        "median error, first step",
        "last step",
        "largest error",
        "in",
        "most flushed to zero",
        "in",
        "most saturated",
    )
    steps = record.quantisation
    operands = dict.fromkeys(operand for step in steps for linear in step.linears.values() for operand in linear)
    return Table(header, [_quantisation_row(steps, operand) for operand in operands])


def not_finite_sentence(record: Record) -> str:
    """Where values had no error to give, being infinite or NaN; empty if all were finite."""
    found = [step for step in record.quantisation if step.not_finite]
    if not found:
        return ""
    first, *more = found[0].not_finite
    others = f" and {len(more)} more" if more else ""
    return (
        f"Infinite or NaN values, of which there is no error, in {len(found)} of {len(record.quantisation)} counted "
        f"steps, first in step {_whole(found[0].step)}: {first}{others}; the first named is nearest to the cause."
    )


def exit_state(record: Record) -> tuple[str, bool]:
    """How the run ended in words, and whether that is as it should be."""
    if not record.exit:
        return "running or killed", True
    code = number(record.exit.get("code"))
    return _EXIT_STATES.get(code, f"failed (code {record.exit.get('code')})"), code in (EXIT_DONE, EXIT_CONTINUE)


def consumed_tokens(record: Record) -> float:
    """Tokens after the last recorded step, else what exit or ledger say; NaN where none does."""
    if len(record.steps):
        return float(record.steps.tokens[-1])
    known = [number(record.exit.get("tokens")), number(record.ledger.get("tokens"))]
    return next(filter(isfinite, known), nan)


def _tokens_card(record: Record) -> Card:
    tokens, planned = consumed_tokens(record), planned_tokens(record)
    steps = "1 step" if len(record.steps) == 1 else f"{len(record.steps):,} steps"
    note = f"{words.percent(tokens / planned)} of {words.count(planned)}, {steps}" if planned > 0 <= tokens else steps
    return Card("Tokens", words.count(tokens), note)


def _seconds_in_steps(record: Record) -> float:
    steps = record.steps
    taken = np.diff(steps.tokens, prepend=0.0) / np.where(steps.tokens_per_second > 0, steps.tokens_per_second, nan)
    return float(np.nansum(taken)) if np.isfinite(taken).any() else nan


def _throughput_card(record: Record) -> Card:
    middle, mfu = median(record.steps.tokens_per_second), median(record.steps.mfu)
    value = f"{middle:,.4g}" if isfinite(middle) else words.NOT_KNOWN
    return Card("Tokens per second, median", value, f"MFU {words.percent(mfu)}" if isfinite(mfu) else "")


def _loss_card(record: Record) -> Card:
    losses = record.steps.loss
    if not len(losses):
        return Card("Training loss, last", words.NOT_KNOWN)
    width = window(len(losses))
    last = float(smooth(losses, width)[-1])
    return Card(
        "Training loss, last", words.decimal(last), f"nats per token, mean of {min(width // 2 + 1, len(losses))} steps"
    )


def _blend_card(record: Record) -> Card:
    last = next((e.blend for e in reversed(record.evaluations) if isfinite(e.blend)), nan)
    if not isfinite(last):
        return Card("Held-out blend", words.NOT_KNOWN)
    compared = [
        f"{_compare(last, baseline)} {name} ({baseline:.3f})"
        for name in ("bigram", "trigram")
        if isfinite(baseline := number(mapping(record.baselines.get(name)).get("blend")))
    ]
    return Card("Held-out blend", words.decimal(last), "bits per byte" + "".join(f"; {text}" for text in compared))


def _compare(value: float, baseline: float) -> str:
    return f"{words.percent(abs(words.change(value, baseline)))} {'below' if value < baseline else 'above'}"


def _exit_card(record: Record) -> Card:
    reason, when = str(record.exit.get("reason") or ""), words.moment(record.exit.get("time"))
    return Card("State", exit_state(record)[0], ", ".join(filter(None, [reason, when])))


def _heldout_row(record: Record, name: str | None, values: list[float]) -> tuple[str, ...]:
    """A source's row, or the blend's where `name` is None."""
    known = [value for value in values if isfinite(value)]
    first, last = (known[0], known[-1]) if known else (nan, nan)
    baselines = [
        number(base.get("blend") if name is None else mapping(base.get("sources")).get(name))
        for base in (mapping(record.baselines.get(order)) for order in ("bigram", "trigram"))
    ]
    against = [_compare(last, value) if isfinite(value) and isfinite(last) else "" for value in baselines]
    return (
        "blend" if name is None else name,
        words.decimal(first),
        words.decimal(last),
        f"{100 * change:+.1f} %" if isfinite(change := words.change(last, first)) else "",
        *(words.decimal(value) if isfinite(value) else "" for value in baselines),
        *against,
    )


def _quantisation_row(steps: list[Quantisation], operand: str) -> tuple[str, ...]:
    first, last = steps[0], steps[-1]
    error, flushed, saturated = (
        _largest(last, operand, measure) for measure in ("relative_error", "flushed", "saturated")
    )
    return (
        operand,
        *(_error(step, operand, median(_errors(step, operand))) for step in (first, last)),
        _error(last, operand, error[0]),
        error[1],
        words.small_share(flushed[0]),
        flushed[1] if flushed[0] else "",
        words.small_share(saturated[0]),
    )


def _error(step: Quantisation, operand: str, value: float) -> str:
    """In percent; where there is none, whether that is because the operand's values were not finite."""
    if not isfinite(value) and _largest(step, operand, "not_finite")[0] > 0:
        return "not finite"
    return words.percent(value, 2)


def _errors(step: Quantisation, operand: str) -> Floats:
    return np.array([linear.get(operand, {}).get("relative_error", nan) for linear in step.linears.values()])


def _largest(step: Quantisation, operand: str, measure: str) -> tuple[float, str]:
    """Value and linear; NaN where there is none."""
    found = ((linear.get(operand, {}).get(measure, nan), name) for name, linear in step.linears.items())
    return max(((value, name) for value, name in found if isfinite(value)), default=(nan, ""))


def _whole(value: float) -> str:
    return f"{value:,.0f}" if isfinite(value) else words.NOT_KNOWN
