"""What a run cost in memory, movement and time: sections of the page of a run."""

from __future__ import annotations

from collections.abc import Iterator

import polars as pl

from slipstream.io.capacity import show_bytes
from slipstream.io.figures import TrainFigures
from slipstream.report import charts
from slipstream.report.facts import RunFacts
from slipstream.report.mixed import describe_mixed
from slipstream.report.page import Figure, Grid, Paragraph, Part

_MOST_REASONS = 12

_ON_CUDA = " A step on CUDA is begun, not awaited: what the device takes shows where the thread next waits for it."


def memory(facts: RunFacts) -> Iterator[Part]:
    """Show bytes per tier, and bytes moved between them."""
    trained = facts.figures(TrainFigures)
    if trained is None:
        return
    moved = {"to the device": trained.bytes_to_device, "to the host": trained.bytes_to_host}
    if trained.sync_bytes is not None:
        moved["copies of whole tables"] = trained.sync_bytes
    tables = [("Bytes per tier", trained.bytes_per_tier), ("Bytes moved", moved)]
    if trained.sent_bytes_per_step is not None:
        tables.append((f"Bytes that the first of {trained.ranks} ranks sent a step", trained.sent_bytes_per_step))
    for title, sizes in tables:
        lines = [(name, size, show_bytes(size)) for name, size in sizes.items()]
        yield Figure(
            title=title,
            spec=charts.horizontal_bars(
                pl.DataFrame(lines, schema=["what", "bytes", "text"], orient="row"), "what", "bytes", "bytes"
            ),
            alt="Bars: " + ", ".join(f"{name} {text}" for name, _, text in lines),
        )
        yield Grid(
            title=title,
            columns=("tier" if title.endswith("tier") else "way", "bytes", ""),
            rows=[(name, f"{size:,}", text) for name, size, text in lines],
        )
    if trained.mixed is not None:
        yield Paragraph(text=f"Mixed tables as they are stored: {describe_mixed(trained.mixed)}.", kind="note")
    yield Paragraph(
        text=f"Rows on the device served {trained.hit_ratio:.1%} of the lookups that training made. Weights come with "
        "their optimizer state.",
        kind="note",
    )


def time_spent(facts: RunFacts) -> Iterator[Part]:
    """Show seconds by stage, and where those of training went."""
    lines = [
        (name, float(one.manifest["seconds"]), one.manifest["peak_bytes"]) for name, one in facts.artifacts.items()
    ]
    texts = [(name, seconds, f"{seconds:.1f} s") for name, seconds, _ in lines]
    yield Figure(
        title="Seconds by stage",
        spec=charts.horizontal_bars(
            pl.DataFrame(texts, schema=["stage", "seconds", "text"], orient="row"), "stage", "seconds", "seconds"
        ),
        alt="Bars: " + ", ".join(f"{name} {text}" for name, _, text in texts),
    )
    yield Grid(
        title="Stages",
        columns=("stage", "seconds", "peak memory until then"),
        rows=[(name, f"{seconds:.1f}", show_bytes(peak)) for name, seconds, peak in lines],
    )
    if trained := facts.figures(TrainFigures):
        yield from _training_time(trained, stage_seconds=facts.artifacts["train"].manifest["seconds"])


def _training_time(trained: TrainFigures, *, stage_seconds: float) -> Iterator[Part]:
    parts = [
        ("waiting for samples", trained.input_seconds),
        ("moving rows", trained.move_seconds),
        ("computing", trained.compute_seconds),
    ]
    known = [(name, seconds) for name, seconds in parts if seconds is not None]
    if known:
        known.append(("the rest", max(0.0, trained.train_seconds - sum(part[1] for part in known))))
        per_step = 1000 / max(trained.steps, 1)
        lines = [
            (name, seconds * per_step, f"{seconds * per_step:.2f} ms, {seconds / trained.train_seconds:.0%}")
            for name, seconds in known
        ]
        yield Figure(
            title="Where a step's time went",
            spec=charts.horizontal_bars(
                pl.DataFrame(lines, schema=["part", "ms", "text"], orient="row"), "part", "ms", "milliseconds of a step"
            ),
            alt="Bars: " + "; ".join(f"{name} {text}" for name, _, text in lines),
        )
    rows = [("training, loading included", f"{trained.train_seconds:.2f} s")]
    rows += [(f"of it {name}", f"{seconds:.2f} s") for name, seconds in known]
    if trained.sync_seconds is not None:
        rows.append(("of it copies of whole tables", f"{trained.sync_seconds:.2f} s"))
    rest = max(0.0, stage_seconds - trained.train_seconds)
    rows.append(("rest of the stage: preparation, evaluation, files", f"{rest:.2f} s"))
    if trained.cpu_seconds:
        rows.append(("processor time of training, all threads", f"{trained.cpu_seconds:.2f} s"))
    if trained.steps:
        rows.append(("a step, on average", f"{1000 * trained.train_seconds / trained.steps:.2f} ms"))
    yield Grid(title="Training", columns=("what", "time"), rows=rows)
    if known:
        yield Paragraph(
            text="Parts are of the thread that trains, on average over all steps; rows are found first, then moved. "
            f"The rest are checks of staleness, checkpoints and the end.{_ON_CUDA if trained.device == 'cuda' else ''}",
            kind="note",
        )
