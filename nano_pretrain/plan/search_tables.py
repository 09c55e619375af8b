"""What a search for layouts found, as tables for people."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from rich.console import Console
from rich.table import Table

from nano_pretrain.plan.device import Device
from nano_pretrain.plan.search import Search
from nano_pretrain.plan.tables import decimal, new_table
from nano_pretrain.report import words

SHOWN = 10


def show_search(console: Console, name: str, search: Search, device: Device, tokens: int) -> None:
    """Print what was found for a stage whose steps have `tokens` tokens."""
    console.print(f"{name} on {search.devices:,} x {device.name}", style="bold")
    shown = [index for index in range(len(search.fitting)) if index < SHOWN or index == search.recipe]
    if shown:
        console.print(_fitting(search, shown, device, tokens))
    else:
        console.print("no layout goes", style="bold")
    if more := len(search.fitting) - len(shown):
        console.print(f"{more} more; plan.format=json lists all")
    console.print(*_about_own(search), _rejected(search), sep="\n")


def _about_own(search: Search) -> Iterator[str]:
    """What the tables do not say of the recipe's own layout."""
    if own := search.recipe_rejected:
        yield f"the recipe's own layout, {own.example}, does not go: {own.text}"
    elif search.recipe is not None and search.fitting[search.recipe].sequence != (
        search.fitting[search.recipe].tensor > 1
    ):
        yield "the recipe's own layout is without sequence parallelism"


def _fitting(search: Search, shown: Iterable[int], device: Device, tokens: int) -> Table:
    names = ("tensor", "pipeline", "context", "data", "micro-\nbatch", "recompute", "s a\nstep", "tokens/s", "GB")
    go = "that fit" if device.memory_bytes is not None else "that the rules allow, memory not compared"
    table = new_table(f"Layouts {go}, fastest first", "rank", *names)
    for index in shown:
        found = search.fitting[index]
        rank = f"{index + 1} recipe's" if index == search.recipe else f"{index + 1}"
        sizes = (found.tensor, found.pipeline, found.context, found.data, found.micro_batch_size)
        speed = words.count(tokens / found.step_seconds)
        memory = f"{found.memory_bytes / 1e9:.1f}"
        table.add_row(rank, *map(str, sizes), found.recompute, decimal(found.step_seconds), speed, memory)
    return table


def _rejected(search: Search) -> Table:
    table = new_table("Layouts that do not go", "how many", "for example", "because", left=3)
    for reason in search.rejected:
        nearest = "" if reason.memory_bytes is None else "the nearest miss "
        table.add_row(f"{reason.layouts:,}", reason.example, nearest + reason.text)
    return table
