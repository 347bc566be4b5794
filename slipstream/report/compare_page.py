"""What stands on the page of a comparison: every figure with its error bars."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from pathlib import Path

import polars as pl

from slipstream.compare import ComparedVariant
from slipstream.report import charts
from slipstream.report.page import Code, Figure, Grid, Page, Paragraph, Section, write_page
from slipstream.report.run_page import versions

_FIGURES: dict[str, tuple[tuple[str, str, str, bool], ...]] = {
    "Quality": (
        ("auc_change", "ΔAUC", "+.4f", False),
        ("auc", "AUC, mean of test and validation", ".4f", False),
        ("test_logloss", "logloss, test", ".4f", False),
        ("test_ne", "NE, test", ".4f", False),
        ("test_calibration", "calibration, test", ".3f", False),
    ),
    "Cost": (
        ("seconds", "wall seconds", "~g", True),
        ("cpu_seconds", "processor seconds", "~g", True),
        ("samples_per_second", "samples/s", ".3~s", True),
        ("skipped_share", "samples skipped", ".1%", True),
        ("hit_ratio", "lookups served on the device", ".1%", True),
        ("device_bytes", "bytes on the device", ".3~s", True),
        ("host_bytes", "bytes on the host", ".3~s", True),
        ("moved_bytes", "bytes moved", ".3~s", True),
    ),
}
"""By section: figure, title, format of the axis, whether the axis begins at zero."""


def write_comparison_page(compared: Sequence[ComparedVariant], out: Path, *, name: str, command: Sequence[str]) -> int:
    """Write a comparison as one HTML file.

    Args:
        compared: Variants; differences are against the first.
        out: File to write.
        name: Of the pipeline.
        command: What runs the comparison again, as typed.

    Returns:
        Bytes of the file.
    """
    return write_page(comparison_page(compared, name=name, command=command), out)


def comparison_page(compared: Sequence[ComparedVariant], *, name: str, command: Sequence[str]) -> Page:
    """Give the page of a comparison."""
    seeds = compared[0].seeds
    sections = [
        Section(title=title, parts=[part for figure in figures for part in _parts(compared, *figure)])
        for title, figures in _FIGURES.items()
    ]
    settings = [(one.name, " ".join(one.overrides)) for one in compared]
    grid = Grid(title="Variants", columns=("variant", "what it sets"), rows=settings, is_wide=True)
    made = Section(title="How it was made", parts=[Code(title="Command", text=shlex.join(command)), grid, versions()])
    about = Paragraph(
        text=f"Points are means over {seeds} seeds, bars one standard error to either side"
        f"{'' if seeds > 1 else ', which one seed has not'}; ΔAUC is paired, seed by seed, against {compared[0].name}."
    )
    first = Section(title=sections[0].title, parts=[about, *sections[0].parts])
    return Page(
        title=f"Comparison {name}",
        subtitle=f"{len(compared)} variants, {seeds} seeds",
        sections=[first, *sections[1:], made],
    )


def _parts(
    compared: Sequence[ComparedVariant], figure: str, title: str, axis_format: str, zero: bool
) -> tuple[Figure, Grid]:
    spreads = [(one.name, one.figures[figure]) for one in compared]
    rows = [(name, spread.mean, spread.mean - spread.error, spread.mean + spread.error) for name, spread in spreads]
    frame = pl.DataFrame(rows, schema=["variant", "mean", "low", "high"], orient="row").fill_nan(None)
    shown = [(name, _show(spread.mean), _show(spread.error)) for name, spread in spreads]
    spec = charts.with_errors(frame, title, [one.name for one in compared], axis_format=axis_format, zero=zero)
    words = "; ".join(f"{name} {mean} ± {error}" for name, mean, error in shown)
    return (
        Figure(title=title, spec=spec, alt=f"{title}: {words}"),
        Grid(title=title, columns=("variant", "mean", "± standard error"), rows=shown),
    )


def _show(value: float) -> str:
    if value != value:
        return "undefined"
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4f}"
