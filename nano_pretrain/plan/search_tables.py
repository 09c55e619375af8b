"""What a search for layouts found, as tables for people."""

from __future__ import annotations

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
    if search.fitting:
        console.print(_fitting(search, tokens))
    else:
        console.print("no layout fits", style="bold")
    if len(search.fitting) > SHOWN:
        console.print(f"{len(search.fitting) - SHOWN} more; plan.format=json lists all")
    console.print(_rejected(search))


def _fitting(search: Search, tokens: int) -> Table:
    names = ("tensor", "pipeline", "context", "data", "micro-batch", "recompute", "s a step", "tokens/s", "GB")
    table = new_table("Layouts that fit, fastest first", *names, left=0)
    for found in search.fitting[:SHOWN]:
        sizes = (found.tensor, found.pipeline, found.context, found.data, found.micro_batch_size)
        speed = words.count(tokens / found.step_seconds)
        memory = f"{found.memory_bytes / 1e9:.1f}"
        table.add_row(*map(str, sizes), found.recompute, decimal(found.step_seconds), speed, memory)
    return table


def _rejected(search: Search) -> Table:
    table = new_table("Layouts that do not go", "how many", "for example", "because", left=3)
    for reason in search.rejected:
        table.add_row(f"{reason.layouts:,}", reason.example, reason.text)
    return table
