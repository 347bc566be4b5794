"""What hot sets would serve and take, for the terminal."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from slipstream.report.terminal import show_bytes

if TYPE_CHECKING:
    from slipstream.sizing.answers import Answer, Sizes

_ASKED = {
    "hit ratio": "{} of lookups",
    "hot samples": "{} of samples",
    "budget": "budget {}",
    "device memory": "device of {}",
    "mode": "{}",
}
_BESIDE_EACH_OTHER = 6
"""Answers whose parts stand in one table."""


def sizes_table(sizes: Sizes) -> RenderableType:
    """Say what was asked, what answers it, and the memory of each answer by part."""
    title = (
        f"{sizes.pipeline}: {sizes.num_rows:,} rows in {sizes.num_tables} tables, {sizes.row_bytes} bytes each when "
        f"hot; {sizes.num_samples:,} training samples; mode {sizes.mode}"
    )
    parts: list[RenderableType] = [Text(title, style="bold"), Text(), _answers(sizes), Text()]
    numbered = list(enumerate(sizes.answers, start=1))
    for start in range(0, len(numbered), _BESIDE_EACH_OTHER):
        some = numbered[start : start + _BESIDE_EACH_OTHER]
        parts += [_by_part("device memory", [(n, a.device) for n, a in some]), Text()]
        parts += [_by_part("host memory", [(n, a.host) for n, a in some]), Text()]
        if any(answer.disk for _, answer in some):
            parts += [_by_part("disk", [(n, a.disk) for n, a in some]), Text()]
    return Group(*parts, *map(Text, _notes(sizes)))


def _answers(sizes: Sizes) -> Table:
    table = Table(box=None, pad_edge=False, collapse_padding=True)
    disk = ("disk",) if any(answer.disk for answer in sizes.answers) else ()
    speed = ("samples/s",) if sizes.calibration else ()
    for name in (
        "",
        "asked",
        "policy",
        "hot rows",
        "of all",
        "hits",
        "hot samples",
        "budget",
        "device",
        "host",
        *disk,
        *speed,
    ):
        table.add_column(name, justify="left" if name in ("asked", "policy") else "right", overflow="fold")
    for number, answer in enumerate(sizes.answers, start=1):
        served = answer.served
        table.add_row(
            str(number),
            _ASKED[answer.asked.kind].format(answer.asked.text),
            answer.policy or "–",
            f"{served.hot_rows:,}",
            f"{served.hot_rows / sizes.num_rows:.1%}",
            f"{served.hit_ratio:.1%}",
            f"{_about(answer)}{served.hot_sample_share:.1%}",
            show_bytes(answer.budget_bytes),
            show_bytes(answer.device_bytes),
            show_bytes(answer.host_bytes),
            *([show_bytes(answer.disk_bytes)] if disk else []),
            *([f"{answer.speed.samples_per_second:,.0f}"] if answer.speed else []),
        )
    return table


def _about(answer: Answer) -> str:
    return "" if answer.served.is_within_curve else "~"


def _by_part(title: str, columns: Sequence[tuple[int, Mapping[str, int]]]) -> Table:
    table = Table(title, box=None, pad_edge=False, collapse_padding=True)
    for number, _ in columns:
        table.add_column(str(number), justify="right")
    names = list(dict.fromkeys(name for _, parts in columns for name in parts))
    for name in names:
        table.add_row(name, *(show_bytes(parts[name]) if name in parts else "–" for _, parts in columns))
    table.add_row("all", *(show_bytes(sum(parts.values())) for _, parts in columns), style="bold")
    return table


def _notes(sizes: Sizes) -> Iterator[str]:
    yield "resident has every row on the device, baseline none: no hot set is faster or larger than the first."
    if any(not answer.served.is_within_curve for answer in sizes.answers):
        yield "~ is beyond the sizes that profile measured: `profile.curve` takes more of them."
    if tried := sizes.calibration:
        rate = f"; rows move at {show_bytes(tried.bytes_per_second)}/s" if tried.bytes_per_second else ""
        yield (
            f"samples/s as forecast for this machine ({tried.device}, threads {tried.threads}) from "
            f"{tried.seconds:.0f} s of steps, dropped samples left out: "
            f"{1e6 * tried.per_sample.wall:.1f} µs a sample with its rows at hand, "
            f"{1e6 * tried.per_sample.cpu:.1f} µs of them of a processor{rate}."
        )
    if sizes.on_cuda:
        yield "Device memory is that of a GPU; what its driver and libraries keep for themselves is not counted."
    if any(answer.disk for answer in sizes.answers):
        yield "What host memory is left over holds the pages of the disk's file that are used most."
    yield "Host memory is beside that of the process with its packages, about 0.7 GiB."
