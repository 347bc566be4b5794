"""What became of making an artifact again, for the terminal."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

if TYPE_CHECKING:
    from slipstream.reproduce import Reproduction

_MOST_SHOWN = 20
_HASH_SHOWN = 12


def reproduction_table(again: Reproduction) -> RenderableType:
    """Say what came out the same, and what did not."""
    counted = Counter(file.verdict for file in again.files)
    table = Table(show_header=False, box=None)
    table.add_column(style="cyan", no_wrap=True)
    table.add_column()
    table.add_row("artifact", f"{again.artifact}, stage {again.stage}, made again in {again.seconds:.1f} s")
    verdicts = ", ".join(f"{count:,} {verdict}" for verdict, count in counted.items())
    table.add_row("files", f"{verdicts}, by sha256")
    table.add_row("figures", f"{len(again.figures)} differ" if again.figures else "the same, times left out")
    if again.left_out:
        table.add_row("not compared", f"{', '.join(again.left_out)}: hold times, or came later")
    changed = [f"{name} {before} -> {now}" for name, (before, now) in again.environment.items()]
    if changed:
        table.add_row("made by", "; ".join(changed))
    if again.is_equal:
        return table
    table.add_row("because", f"most likely {again.reason}")
    differing = Table(box=None, title="what differs", title_justify="left")
    for name in ("what", "", "before", "again"):
        differing.add_column(name)
    lines = [
        (file.name, file.verdict, file.sha256[:_HASH_SHOWN] or "–", file.sha256_again[:_HASH_SHOWN] or "–")
        for file in again.files
        if file.verdict != "equal"
    ]
    lines += [(figure.name, "differs", _show(figure.before), _show(figure.again)) for figure in again.figures]
    for line in lines[:_MOST_SHOWN]:
        differing.add_row(*map(Text, line))
    more = [Text(f"and {len(lines) - _MOST_SHOWN} more")] if len(lines) > _MOST_SHOWN else []
    return Group(table, Text(), differing, *more)


def _show(value: object) -> str:
    return f"{value:.6g}" if isinstance(value, float) else str(value)
