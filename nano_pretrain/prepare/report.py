"""What was kept and dropped, and why: a table for the terminal and `report.md`."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from rich.table import Table

REPORT_NAME = "report.md"
COLUMNS = ("source", "category", "in", "dropped", "train", "held out")
QUESTION_COUNTS = ("documents", "chunks", "sampled", "questions")
SHORT_COLUMNS = ("source", "MB in", "MB train", "tokens", "held out", "documents dropped")


def summary_table(manifest: Mapping[str, Any]) -> Table:
    """One row a source and a row of sums, fit for a terminal of 80 columns."""
    sources = manifest["sources"]
    table = Table()
    for column in SHORT_COLUMNS:
        table.add_column(column, justify="left" if column in {SHORT_COLUMNS[0], SHORT_COLUMNS[-1]} else "right")
    for name, entry in sources.items():
        table.add_row(name, *_short_row([entry]))
    table.add_section()
    table.add_row(f"{len(sources)} sources", *_short_row(list(sources.values())))
    return table


def _short_row(entries: Sequence[Mapping[str, Any]]) -> tuple[str, ...]:
    counts: Counter[str] = Counter()
    for entry in entries:
        counts.update({reason: dropped["documents"] for reason, dropped in entry["dropped"].items()})
    return (
        f"{sum(entry['in']['bytes'] for entry in entries) / 1e6:.2f}",
        f"{sum(entry['train']['bytes'] for entry in entries) / 1e6:.2f}",
        f"{sum(entry['train']['tokens'] for entry in entries):,}",
        f"{sum(entry['heldout']['tokens'] for entry in entries):,}",
        ", ".join(f"{count:,} {reason}" for reason, count in sorted(counts.items())) or "none",
    )


def report_text(manifest: Mapping[str, Any]) -> str:
    """The same in Markdown, with settings, licences and packages."""
    tokenizer = manifest["tokenizer"]
    parts = [
        "# Prepared corpus",
        f"Fingerprint `{manifest['fingerprint']}`.",
        f"Tokenizer: {tokenizer['vocab_size']:,} entries, made by {tokenizer['made_by']}.",
        "## Settings",
        "\n".join(f"- `{name}`: {value}" for name, value in manifest["settings"].items()),
        "## Sources",
        "Bytes are UTF-8 text; tokens include one end-of-document token a document.",
        _markdown_table(COLUMNS, [*_rows(manifest["sources"]), _sum_row(manifest["sources"])]),
        "## Length of documents",
        "Share of the training tokens that lie in documents of at least so many tokens.",
        _markdown_table(*_lengths(manifest["sources"])),
        *_questions(manifest["sources"]),
        "## Licences and provenance",
        _markdown_table(
            ("source", "licence"), [(name, entry["licence"]) for name, entry in manifest["sources"].items()]
        ),
        "## Packages",
        _markdown_table(
            ("package", "version", "licence", "sha256"),
            [(p["name"], p["version"], p["licence"], f"`{p['sha256']}`") for p in manifest["packages"].values()],
        ),
    ]
    return "\n\n".join(parts) + "\n"


def _rows(sources: Mapping[str, Any]) -> list[tuple[str, ...]]:
    return [
        (
            name,
            entry["category"],
            _size(entry["in"]),
            _dropped(entry["dropped"]),
            _split(entry["train"]),
            _split(entry["heldout"]),
        )
        for name, entry in sources.items()
    ]


def _size(entry: Mapping[str, int]) -> str:
    return f"{_documents(entry['documents'])}, {_bytes(entry['bytes'])}"


def _split(entry: Mapping[str, int]) -> str:
    return f"{_size(entry)}, {entry['tokens']:,} tokens"


def _documents(count: int) -> str:
    return f"{count:,} document" if count == 1 else f"{count:,} documents"


def _bytes(count: int) -> str:
    if count < 1e3:
        return f"{count} bytes"
    return f"{count / 1e6:.2f} MB" if count >= 1e6 else f"{count / 1e3:.1f} kB"


def _dropped(entry: Mapping[str, Mapping[str, int]]) -> str:
    return "; ".join(f"{reason}: {_size(dropped)}" for reason, dropped in entry.items()) or "nothing"


def _sum_row(sources: Mapping[str, Any]) -> tuple[str, ...]:
    entries = list(sources.values())
    dropped = [drop for entry in entries for drop in entry["dropped"].values()]
    return (
        "sum",
        f"{len({entry['category'] for entry in entries})} categories",
        _size(_add([entry["in"] for entry in entries])),
        _size(_add(dropped)) if dropped else "nothing",
        _split(_add([entry["train"] for entry in entries])),
        _split(_add([entry["heldout"] for entry in entries])),
    )


def _add(entries: Sequence[Mapping[str, Any]]) -> dict[str, int]:
    return {key: sum(entry[key] for entry in entries) for key in entries[0] if isinstance(entries[0][key], int)}


def _lengths(sources: Mapping[str, Any]) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    """Header and rows: a source, and its shares by length in percent."""
    train = {name: entry["train"] for name, entry in sources.items()}
    least = next(iter(train.values()))["tokens_by_length"]
    rows = [
        (name, *(f"{100 * tokens / max(entry['tokens'], 1):.1f}" for tokens in entry["tokens_by_length"].values()))
        for name, entry in train.items()
    ]
    return ("source", *(f"{int(length) // 1024}k" for length in least)), rows


def _questions(sources: Mapping[str, Any]) -> list[str]:
    """A section on the derived sources, if there are any."""
    made = {name: entry["questions"] for name, entry in sources.items() if "questions" in entry}
    rows = [
        (
            name,
            entry["writer"],
            ", ".join(entry["parents"]),
            f"{entry['min_tokens']:,}",
            f"{entry['chunk_tokens']:,}",
            label,
            *(f"{entry[split][column]:,}" for column in QUESTION_COUNTS),
        )
        for name, entry in made.items()
        for split, label in (("train", "train"), ("heldout", "held out"))
    ]
    header = ("source", "writer", "parents", "least tokens", "tokens of a chunk", "split", *QUESTION_COUNTS)
    return ["## Questions about long documents", _markdown_table(header, rows)] if rows else []


def _markdown_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)
