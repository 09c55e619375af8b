"""One self-contained page from a run's directory."""

from __future__ import annotations

import base64
import io
from dataclasses import dataclass
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from nano_pretrain.recipe.errors import UserError
from nano_pretrain.report import facts, words
from nano_pretrain.report.figures import FIGURES, NothingToShow
from nano_pretrain.report.harness import harness_table
from nano_pretrain.report.length import positions_figure, retrieval_table
from nano_pretrain.report.record import Record, number, read_record

PICTURES = {**FIGURES, "positions": positions_figure}
SHOWN_SAMPLES = 12


@dataclass(frozen=True)
class Picture:
    """A picture as base64 PNG or, without one, the sentence that says why."""

    data: str = ""
    missing: str = ""


def render_report(run_dir: Path) -> Path:
    """Write report/*.png and report/index.html of a run, whatever there is of it, and return the page's path.

    Args:
        run_dir: directory of the run; files that are missing or broken are named in the section that needs them.

    Raises:
        UserError: there is no such directory, or the report cannot be written.
    """
    if not run_dir.is_dir():
        raise UserError(f"{run_dir}: no such run; train it first, or write run.name=NAME of one that exists")
    record = read_record(run_dir)
    try:
        return _write(record, run_dir / "report")
    except OSError as error:
        raise UserError(f"{error.filename}: cannot be written ({error.strerror}); free it and repeat") from error


def _write(record: Record, directory: Path) -> Path:
    directory.mkdir(exist_ok=True)
    pictures = {name: _picture(name, record, directory) for name in PICTURES}
    page = directory / "index.html"
    # Text that a model generated may hold lone surrogates, which UTF-8 has no bytes for.
    _replace(page, _html(record, pictures).encode("utf-8", errors="replace"))
    return page


def _picture(name: str, record: Record, directory: Path) -> Picture:
    path = directory / f"{name}.png"
    try:
        figure = PICTURES[name](record)
    except NothingToShow as reason:
        path.unlink(missing_ok=True)
        return Picture(missing=str(reason))
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    _replace(path, buffer.getvalue())
    return Picture(data=base64.b64encode(buffer.getvalue()).decode("ascii"))


def _replace(path: Path, content: bytes) -> None:
    """Write a file that is never seen half."""
    beside = path.with_name(path.name + ".new")
    beside.write_bytes(content)
    beside.replace(path)


def _html(record: Record, pictures: dict[str, Picture]) -> str:
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"count": words.count, "decimal": words.decimal, "number": number}
    state, well = facts.exit_state(record)
    newest = list(reversed(record.samples))
    return environment.get_template("page.html.jinja").render(
        record=record,
        state=state,
        well=well,
        cards=facts.cards(record),
        pictures=pictures,
        heldout=facts.heldout_table(record),
        acts=facts.acts_table(record),
        ledger=facts.ledger_table(record),
        quantisation=facts.quantisation_table(record),
        not_finite=facts.not_finite_sentence(record),
        retrieval=retrieval_table(record),
        harness=harness_table(record),
        samples=newest[:SHOWN_SAMPLES],
        hidden_samples=max(0, len(newest) - SHOWN_SAMPLES),
    )
