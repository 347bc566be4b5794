"""What went in, and what is looked up: sections of the page of a run."""

from __future__ import annotations

from collections.abc import Iterator

import polars as pl

from slipstream.io.capacity import show_bytes
from slipstream.io.figures import PreprocessFigures, ProfileFigures, SegregateFigures
from slipstream.report import charts
from slipstream.report.facts import SPLIT_NAMES, RunFacts
from slipstream.report.lists import describe_lists
from slipstream.report.page import Figure, Grid, Paragraph, Part
from slipstream.report.words import counted, most, percent
from slipstream.stage import row_bytes_of

_MOST_REASONS = 12


def data(facts: RunFacts) -> Iterator[Part]:
    """Show samples by split and label, and rejected lines by reason."""
    encoded = facts.figures(PreprocessFigures)
    if encoded is None:
        return
    rows, lines = [], []
    for split, count in encoded.samples.items():
        clicks, name = encoded.positives[split], SPLIT_NAMES.get(split, split)
        rows += [(name, "click", clicks), (name, "no click", count - clicks)]
        lines.append((name, f"{count:,}", f"{clicks:,}", percent(clicks, count)))
    yield Paragraph(
        text=f"{encoded.lines:,} lines of {counted(len(encoded.files), 'file')}: {', '.join(encoded.files[:5])}"
        f"{', …' if len(encoded.files) > 5 else ''}. {encoded.rejected:,} lines were rejected."
    )
    frame = pl.DataFrame(rows, schema=["split", "label", "samples"], orient="row")
    yield Figure(
        title="Samples by split and label",
        spec=charts.splits(frame),
        alt="Bars: " + "; ".join(f"{line[0]} {line[1]} samples, {line[3]} of them clicks" for line in lines),
    )
    yield Grid(title="Samples", columns=("split", "samples", "clicks", "click rate"), rows=lines)
    if encoded.lists:
        yield Paragraph(text="Lists: " + "; ".join(describe_lists(encoded)) + ".")
    rejects = facts.rejects()
    if rejects.height:
        shown = [(reason, f"{count:,}") for reason, count in rejects.head(_MOST_REASONS).iter_rows()]
        if rejects.height > _MOST_REASONS:
            rest = int(rejects["lines"][_MOST_REASONS:].sum())
            shown.append((f"{rejects.height - _MOST_REASONS:,} other reasons", f"{rest:,}"))
        yield Grid(title="Rejected lines", columns=("reason", "lines"), rows=shown)


def frequencies(facts: RunFacts) -> Iterator[Part]:
    """Show how often rows are looked up, and what the hot set has of each table."""
    if facts.figures(ProfileFigures) is None:
        return
    segregated = facts.figures(SegregateFigures)
    frame, tables = facts.frequencies(), facts.tables()
    titles = {name: facts.column_title(name) for name in tables["table"]}
    frame = frame.with_columns(pl.col("table").replace(titles))
    threshold = segregated.access_threshold if segregated else None
    at = f"; the dashed line is Λ = {threshold:,}" if threshold else ""
    yield Paragraph(
        text="One line per table: how often its most used row is looked up by training samples, the next, and so on. "
        "Steep lines are what a hot set lives on." + (" Λ is the count of the last row taken." if threshold else "")
    )
    yield Figure(
        title="Lookups by rank",
        spec=charts.frequencies(frame, threshold),
        alt=f"{tables.height} falling lines on logarithmic axes, one per table{at}. The most used row of any table "
        f"is looked up {most(tables['top']):,.0f} times.",
    )
    columns = ["table", "rows", "bytes", "lookups", "of its top row"]
    has_hot = "hits" in tables.columns
    columns += ["hot rows", "hot bytes", "lookups hot"] if has_hot else []
    row_bytes = row_bytes_of(facts.config)
    rows = []
    for line in tables.iter_rows(named=True):
        cells = [
            titles[line["table"]],
            f"{line['rows']:,}",
            show_bytes(line["rows"] * row_bytes),
            f"{line['lookups']:,}",
            percent(line["top"], line["lookups"]),
        ]
        if has_hot:
            hot_bytes = show_bytes(line["hot_rows"] * row_bytes)
            cells += [f"{line['hot_rows']:,}", hot_bytes, percent(line["hits"], line["lookups"])]
        rows.append(cells)
    yield Grid(title="Tables", columns=columns, rows=rows, is_wide=True)


def hot_set(facts: RunFacts) -> Iterator[Part]:
    """Show what budgets buy, and the chosen one."""
    if facts.figures(ProfileFigures) is None:
        return
    curve, segregated = facts.curve(), facts.figures(SegregateFigures)
    measures = {"hit ratio": "hit_ratio", "hot samples": "hot_sample_share"}
    tall = pl.concat(
        [
            curve.select("hot_share", "policy", "split", pl.col(column).alias("share"), pl.lit(name).alias("measure"))
            for name, column in measures.items()
        ]
    )
    chosen = pl.DataFrame(
        schema={"hot_share": pl.Float64, "share": pl.Float64, "measure": pl.String, "label": pl.String}
    )
    words = "No budget is chosen yet."
    if segregated:
        share, policy = segregated.hot_rows / segregated.rows, facts.config.segregate.policy
        chosen = pl.DataFrame(
            [
                {"hot_share": share, "share": float(getattr(segregated, column)), "measure": name, "label": "chosen"}
                for name, column in measures.items()
            ]
        )
        words = (
            f"Chosen: {segregated.hot_rows:,} of {segregated.rows:,} rows ({share:.1%}) by policy {policy}, "
            f"{show_bytes(segregated.hot_rows * row_bytes_of(facts.config))} with optimizer state. They serve "
            f"{segregated.hit_ratio:.1%} of training lookups, and {segregated.hot_sample_share:.1%} of training "
            "samples find all their rows there."
        )
    yield Paragraph(text=words)
    yield Figure(
        title="What a budget buys",
        spec=charts.hot_set_curve(tall, chosen),
        alt="Two panels of rising lines over the share of rows that are hot: lookups that find a hot row, and samples "
        f"whose every lookup does, by policy and split. {words}",
    )
    yield Grid(
        title="Hot-set curve",
        columns=("policy, split", "hot rows", "of all", "Λ", "hit ratio", "hot samples"),
        rows=[
            (
                f"{point['policy']}, {point['split']}",
                f"{point['hot_rows']:,}",
                f"{point['hot_share']:.2%}",
                f"{point['access_threshold']:,}",
                f"{point['hit_ratio']:.1%}",
                f"{point['hot_sample_share']:.1%}",
            )
            for point in curve.sort("policy", "split", "hot_rows").iter_rows(named=True)
        ],
    )
