"""The model card of an exported checkpoint, from the directory of its run."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from safetensors import safe_open

from nano_pretrain import __version__
from nano_pretrain.checkpoint.manifest import ORIGIN
from nano_pretrain.convert.safetensors_file import DTYPES
from nano_pretrain.data.shards import MANIFEST_NAME
from nano_pretrain.plan.params import count_parameters
from nano_pretrain.recipe.derived import stage_tokens
from nano_pretrain.recipe.schema import Recipe
from nano_pretrain.report import facts, words
from nano_pretrain.report.figures import FIGURES, NothingToShow
from nano_pretrain.report.record import Record, Steps, mapping, number, read_record

DTYPE_NAMES = {stored: str(dtype).removeprefix("torch.") for dtype, stored in DTYPES.items()}
CARD_NAME, CURVES = "README.md", "curves"
SHOWN_CURVES = {"loss": "Training loss", "learning_rate": "Learning rate", "heldout": "Held-out loss of each source"}


def write_card(
    directory: Path, recipe: Recipe, run_dir: Path, tokens: int, torch_dtype: str, *, has_tokenizer: bool
) -> list[str]:
    """Write README.md and its pictures, of what the run had recorded when it had consumed `tokens`.

    Args:
        directory: where to.
        recipe: the run's recipe.
        run_dir: directory of the run; what is missing in it is left out.
        tokens: that the checkpoint has consumed.
        torch_dtype: of the weights.
        has_tokenizer: whether there is a tokenizer beside them.

    Returns:
        Names of the files.
    """
    record = _until(read_record(run_dir), tokens)
    curves = dict(_write_curves(directory, record))
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        undefined=StrictUndefined,
        autoescape=False,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters |= {"table": _markdown, "count": words.count}
    text = environment.get_template("card.md.jinja").render(
        name=recipe.run.name or record.name,
        version=__version__,
        recipe=recipe,
        parameters=count_parameters(recipe.model).total,
        tokens=tokens,
        stages={name: stage_tokens(stage) for name, stage in recipe.stages.items()},
        torch_dtype=torch_dtype,
        others=_other_dtypes(directory, torch_dtype),
        imported=_imported(run_dir),
        has_tokenizer=has_tokenizer,
        loss=_last_loss(record),
        ledger=facts.ledger_table(record),
        ledger_tokens=number(record.ledger.get("tokens")),
        heldout=facts.heldout_table(record),
        acts=facts.acts_table(record),
        licences=_licences(Path(recipe.data.path)),
        curves={name: SHOWN_CURVES[name] for name in curves},
        packages=mapping(record.environment.get("packages")),
        environment=record.environment,
    )
    # Names in a run's files may hold lone surrogates, which UTF-8 has no bytes for.
    (directory / CARD_NAME).write_bytes(text.encode("utf-8", errors="replace"))
    return [CARD_NAME, *curves.values()]


def _imported(run_dir: Path) -> str:
    """Name of the checkpoint that the run's first weights are from; empty where it has drawn them itself."""
    try:
        origin: Any = json.loads((run_dir / ORIGIN).read_text(encoding="utf-8"))
    except FileNotFoundError:
        return ""
    except (OSError, ValueError):
        origin = {}
    return Path(str(mapping(origin).get("source") or "")).name or "another checkpoint"


def _other_dtypes(directory: Path, torch_dtype: str) -> dict[str, list[str]]:
    """Dtypes of the weights in `directory` other than `torch_dtype`, and which tensors have them."""
    found = dict[str, set[str]]()
    for file in directory.glob("*.safetensors"):
        with safe_open(str(file), framework="pt") as opened:
            for name in opened.keys():  # noqa: SIM118 - it is no mapping
                dtype = DTYPE_NAMES[opened.get_slice(name).get_dtype()]
                found.setdefault(dtype, set()).add(re.sub(r".*\.\d+\.", "", name))
    return {dtype: sorted(names) for dtype, names in sorted(found.items()) if dtype != torch_dtype}


def _until(record: Record, tokens: int) -> Record:
    """The record without what came after the checkpoint."""
    steps = record.steps
    kept = steps.tokens <= tokens
    columns = {name: getattr(steps, name)[kept] for name in Steps.__dataclass_fields__ if name != "places"}
    places = [place for place, keep in zip(steps.places, kept, strict=True) if keep]
    return replace(
        record,
        steps=Steps(**columns, places=places),
        evaluations=[each for each in record.evaluations if each.tokens <= tokens],
        acts=[act for act in record.acts if act.tokens <= tokens],
    )


def _write_curves(directory: Path, record: Record) -> Iterator[tuple[str, str]]:
    """Name of each picture that has numbers, and its file."""
    for name in SHOWN_CURVES:
        try:
            figure = FIGURES[name](record)
        except NothingToShow:
            continue
        (directory / CURVES).mkdir(exist_ok=True)
        figure.savefig(directory / CURVES / f"{name}.png", format="png")
        yield name, f"{CURVES}/{name}.png"


def _last_loss(record: Record) -> str:
    losses = record.steps.loss[np.isfinite(record.steps.loss)][-20:]
    return f"{losses.mean():.3f} nats per token, mean of the last {len(losses)} steps" if len(losses) else ""


def _licences(corpus: Path) -> dict[str, str]:
    """What the manifest of a prepared corpus says of each source; empty without one."""
    try:
        manifest: Any = json.loads((corpus / MANIFEST_NAME).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        manifest = {}
    sources = mapping(mapping(manifest).get("sources"))
    said = {name: mapping(source).get("licence") for name, source in sources.items()}
    return {name: str(licence) for name, licence in said.items() if licence}


def _markdown(table: facts.Table) -> str:
    """A table in Markdown; numbers to the right, as `Table` has them."""
    rule = ("---", *("---:" for _ in table.header[1:]))
    rows = [[cell.replace("|", "\\|").replace("\n", " ") for cell in row] for row in (table.header, *table.rows)]
    return "\n".join(f"| {' | '.join(row)} |" for row in (rows[0], rule, *rows[1:]))
