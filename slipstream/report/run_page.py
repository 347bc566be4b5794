"""What stands on the page of a run: one function per section, from facts to text, tables and charts."""

from __future__ import annotations

import json
import math
import platform
import shlex
from collections.abc import Callable, Iterable, Iterator, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import polars as pl

from slipstream import __version__
from slipstream.config import PipelineConfig
from slipstream.io.capacity import show_bytes
from slipstream.io.figures import (
    GenerateFigures,
    PreprocessFigures,
    ProfileFigures,
    SegregateFigures,
    TrainFigures,
)
from slipstream.ops.metrics import Quality
from slipstream.options import to_dict
from slipstream.progress import Progress
from slipstream.report import charts
from slipstream.report.facts import SPLIT_NAMES, RunFacts, joined, open_run
from slipstream.report.page import Code, Figure, Grid, Page, Paragraph, Part, Section, require_charts, write_page
from slipstream.stage import row_bytes_of

_PACKAGES = ("torch", "polars", "pyarrow", "numpy", "safetensors")
_MOST_REASONS = 12
_MOST_LINES = 200


def write_run_page(
    config: PipelineConfig, runs_dir: Path, out: Path, *, command: Sequence[str], progress: Progress
) -> int:
    """Write what a pipeline's published artifacts tell, as one HTML file.

    Args:
        config: The pipeline.
        runs_dir: Folder that holds run folders.
        out: File to write.
        command: What runs the pipeline again, as typed.
        progress: Told how far the hashing of raw files is.

    Returns:
        Bytes of the file.

    Raises:
        ConfigError: The extra `report` is not installed.
        ArtifactError: Nothing is published, or something was altered.
        DataError: A raw file is missing.
    """
    require_charts()
    with open_run(config, runs_dir, progress) as facts:
        page = run_page(facts, command)
    return write_page(page, out)


def run_page(facts: RunFacts, command: Sequence[str]) -> Page:
    """Give the page of a run; stages that have nothing published have no section."""
    makers: list[tuple[str, Callable[[RunFacts], Iterable[Part]]]] = [
        ("Data", _data),
        ("Id frequencies", _frequencies),
        ("Hot set", _hot_set),
        ("Training", _training),
        ("Quality", _quality),
        ("Skipping", _skipping),
        ("Memory and movement", _memory),
        ("Time", _time),
        ("How it was made", lambda facts: _provenance(facts, command)),
    ]
    made = [(title, list(make(facts))) for title, make in makers]
    sections = [Section(title=title, parts=parts) for title, parts in made if parts]
    if notes := list(_notes(facts)):
        sections.insert(0, Section(title="Warnings", parts=notes))
    return Page(
        title=f"Run {facts.config.name}",
        subtitle=f"{facts.config.dataset.source} · {facts.config.model.name} · mode {facts.config.train.mode}",
        highlights=list(_highlights(facts)),
        sections=sections,
    )


def _notes(facts: RunFacts) -> Iterator[Part]:
    for text in facts.warnings:
        yield Paragraph(text=text, kind="warning")
    if facts.missing:
        names = joined(facts.missing)
        yield Paragraph(text=f"Nothing is published of {names}: those sections are left out.", kind="note")


def _highlights(facts: RunFacts) -> Iterator[tuple[str, str]]:
    if encoded := facts.figures(PreprocessFigures):
        yield "samples", f"{sum(encoded.samples.values()):,}"
        yield "lines rejected", f"{encoded.rejected:,}"
    if segregated := facts.figures(SegregateFigures):
        yield "hot rows", f"{segregated.hot_rows / segregated.rows:.1%}"
        yield "lookups they serve", f"{segregated.hit_ratio:.1%}"
    if trained := facts.figures(TrainFigures):
        yield "AUC, test", _number(trained.test.auc)
        yield "logloss, test", _number(trained.test.logloss)
        yield "samples/s trained", f"{trained.samples_per_second:,.0f}"
        if trained.drop_asked:
            yield "samples skipped", f"{trained.samples_dropped:,}"


def _data(facts: RunFacts) -> Iterator[Part]:
    encoded = facts.figures(PreprocessFigures)
    if encoded is None:
        return
    rows, lines = [], []
    for split, count in encoded.samples.items():
        clicks, name = encoded.positives[split], SPLIT_NAMES.get(split, split)
        rows += [(name, "click", clicks), (name, "no click", count - clicks)]
        lines.append((name, f"{count:,}", f"{clicks:,}", _percent(clicks, count)))
    yield Paragraph(
        text=f"{encoded.lines:,} lines of {_count(len(encoded.files), 'file')}: {', '.join(encoded.files[:5])}"
        f"{', …' if len(encoded.files) > 5 else ''}. {encoded.rejected:,} lines were rejected."
    )
    frame = pl.DataFrame(rows, schema=["split", "label", "samples"], orient="row")
    yield Figure(
        title="Samples by split and label",
        spec=charts.splits(frame),
        alt="Bars: " + "; ".join(f"{line[0]} {line[1]} samples, {line[3]} of them clicks" for line in lines),
    )
    yield Grid(title="Samples", columns=("split", "samples", "clicks", "click rate"), rows=lines)
    rejects = facts.rejects()
    if rejects.height:
        shown = [(reason, f"{count:,}") for reason, count in rejects.head(_MOST_REASONS).iter_rows()]
        if rejects.height > _MOST_REASONS:
            rest = int(rejects["lines"][_MOST_REASONS:].sum())
            shown.append((f"{rejects.height - _MOST_REASONS:,} other reasons", f"{rest:,}"))
        yield Grid(title="Rejected lines", columns=("reason", "lines"), rows=shown)


def _frequencies(facts: RunFacts) -> Iterator[Part]:
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
        f"is looked up {_most(tables['top']):,.0f} times.",
    )
    columns = ["table", "rows", "lookups", "of its top row"]
    has_hot = "hits" in tables.columns
    columns += ["hot rows", "lookups hot"] if has_hot else []
    rows = []
    for line in tables.iter_rows(named=True):
        cells = [
            titles[line["table"]],
            f"{line['rows']:,}",
            f"{line['lookups']:,}",
            _percent(line["top"], line["lookups"]),
        ]
        if has_hot:
            cells += [f"{line['hot_rows']:,}", _percent(line["hits"], line["lookups"])]
        rows.append(cells)
    yield Grid(title="Tables", columns=columns, rows=rows)


def _hot_set(facts: RunFacts) -> Iterator[Part]:
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


def _training(facts: RunFacts) -> Iterator[Part]:
    trained = facts.figures(TrainFigures)
    if trained is None:
        return
    losses, rates, speeds = facts.losses(), facts.learning_rates(), facts.speeds()
    yield Paragraph(
        text=f"{trained.steps:,} steps of {facts.config.train.batch_size:,} samples at most, {trained.hot_steps:,} of "
        f"them on hot samples alone; {trained.samples_seen:,} samples trained on, "
        f"{_count(facts.config.train.epochs, 'epoch')}."
    )
    if losses.height:
        yield Figure(
            title="Training loss",
            spec=charts.over_steps(losses, "loss", "mean loss of the stretch"),
            alt=f"A line from {losses['loss'][0]:.4f} at step {losses['step'][0]:,} to {losses['loss'][-1]:.4f} at "
            f"step {losses['step'][-1]:,}; lowest {_least(losses['loss']):.4f}.",
        )
    train = facts.config.train
    yield Figure(
        title="Learning rate, as the schedule has it",
        spec=charts.over_steps(rates, "lr", "learning rate", zero=True),
        alt=f"The learning rate: at most {_most(rates['lr']):.4g}, warm-up over {train.lr_warmup:.0%} of training, "
        f"decay {train.lr_decay}.",
    )
    if speeds.height > 1:
        yield Figure(
            title="Speed since the start",
            spec=charts.over_steps(speeds, "samples_per_second", "samples/s", axis_format="~s", zero=True),
            alt=f"Samples trained on per second since the start: {speeds['samples_per_second'][0]:,.0f} at first, "
            f"{speeds['samples_per_second'][-1]:,.0f} at the end.",
        )
    yield Grid(
        title="Training loss",
        columns=("step", "mean loss"),
        rows=[(f"{step:,}", f"{loss:.5f}") for step, loss in _thinned(losses).iter_rows()],
    )


def _quality(facts: RunFacts) -> Iterator[Part]:
    trained = facts.figures(TrainFigures)
    if trained is None:
        return
    generated = facts.figures(GenerateFigures)
    columns = ["split", "AUC", "logloss", "NE", "calibration", "accuracy"] + (["teacher's AUC"] if generated else [])
    rows = []
    for split, quality in (("test", trained.test), ("val", trained.val)):
        best = [_number(generated.splits[split].auc)] if generated else []
        rows.append([SPLIT_NAMES[split], *_quality_cells(quality), *best])
    yield Grid(title="Quality", columns=columns, rows=rows, is_wide=True)
    roc, reliability, histogram = facts.roc(), facts.reliability(), facts.histogram()
    if roc.height:
        yield Figure(
            title="ROC",
            spec=charts.roc(roc),
            alt=f"ROC curves; area {_number(trained.test.auc)} for test, {_number(trained.val.auc)} for validation.",
        )
    elif not reliability.is_empty():
        yield Paragraph(text="No ROC curve: each split has labels of one class only.", kind="note")
    if reliability.is_empty():
        return
    yield Figure(
        title="Calibration",
        spec=charts.reliability(reliability),
        alt="Click rate over mean prediction, in bins of equally many samples, with two standard errors, and the "
        f"diagonal. Mean prediction over click rate: {_number(trained.test.calibration, 3)} for test, "
        f"{_number(trained.val.calibration, 3)} for validation.",
    )
    yield Grid(
        title="Calibration, by bin",
        columns=("split", "mean prediction", "click rate", "samples"),
        rows=[
            (line["split"], f"{line['predicted']:.4f}", f"{line['click_rate']:.4f}", f"{line['samples']:,}")
            for line in reliability.iter_rows(named=True)
        ],
    )
    yield Figure(
        title="Distribution of predictions",
        spec=charts.histogram(histogram),
        alt="Histograms of predicted probabilities, one panel per split: samples with a click, and those without.",
    )


def _quality_cells(quality: Quality) -> list[str]:
    digits = {"calibration": 3}
    return [_number(getattr(quality, n), digits.get(n, 4)) for n in ("auc", "logloss", "ne", "calibration", "accuracy")]


def _skipping(facts: RunFacts) -> Iterator[Part]:
    trained, config = facts.figures(TrainFigures), facts.config
    if trained is None or config.criterion == "none":
        return
    dropped, checks = facts.dropped(), facts.checks()
    classified = "samples" if config.skip_rule.scope == "all" else "hot samples"
    yield Paragraph(
        text=f"Criterion {config.criterion}: {trained.samples_dropped:,} samples left out. Asked "
        f"{trained.drop_asked:.1%} of {trained.samples_classified:,} {classified} it decided about, "
        f"achieved {trained.drop_achieved:.1%}."
    )
    if dropped.height:
        yield Figure(
            title="Samples skipped, by round",
            spec=charts.bars_over_steps(dropped, "dropped", "samples skipped"),
            alt="Bars: samples that the rounds begun since the report before left out; "
            f"{_most(dropped['dropped']):,.0f} at "
            f"most, {dropped['total'][-1]:,} in all.",
        )
    if checks.height:
        tall = checks.unpivot(["stale_rows", "untouched_rows"], index="step", variable_name="kind", value_name="rows")
        yield Figure(
            title="Threshold T",
            spec=charts.over_steps(checks, "threshold", "T", zero=True),
            alt=f"T at {checks.height} checks, from {_show_threshold(checks['threshold'][0])} to "
            f"{_show_threshold(checks['threshold'][-1])}.",
        )
        yield Figure(
            title="Stale rows",
            spec=charts.stale_rows(tall.with_columns(pl.col("kind").str.replace("_", " "))),
            alt=f"Stale hot rows from {checks['stale_rows'][0]:,} to {checks['stale_rows'][-1]:,}; rows not looked up "
            f"in the window at most {_most(checks['untouched_rows']):,.0f}.",
        )
        yield Grid(
            title="Checks",
            columns=("step", "T", "stale rows", "untouched rows"),
            rows=[
                (f"{step:,}", _show_threshold(threshold), f"{stale:,}", f"{untouched:,}")
                for step, threshold, stale, untouched in _thinned(checks).iter_rows()
            ],
        )
    if dropped.height:
        yield Grid(
            title="Samples skipped",
            columns=("step", "since the step before", "in all"),
            rows=[(f"{step:,}", f"{count:,}", f"{total:,}") for step, count, total in _thinned(dropped).iter_rows()],
        )


def _show_threshold(threshold: float | None) -> str:
    return "–" if threshold is None else f"{threshold:.4g}"


def _memory(facts: RunFacts) -> Iterator[Part]:
    trained = facts.figures(TrainFigures)
    if trained is None:
        return
    moved = {"to the device": trained.bytes_to_device, "to the host": trained.bytes_to_host}
    if trained.sync_bytes is not None:
        moved["copies of whole tables"] = trained.sync_bytes
    for title, sizes in (("Bytes per tier", trained.bytes_per_tier), ("Bytes moved", moved)):
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
    yield Paragraph(
        text=f"Rows on the device served {trained.hit_ratio:.1%} of the lookups that training made. Weights come with "
        "their optimizer state.",
        kind="note",
    )


def _time(facts: RunFacts) -> Iterator[Part]:
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
    trained = facts.figures(TrainFigures)
    if trained is None:
        return
    stage = facts.artifacts["train"].manifest["seconds"]
    rows = [
        ("training, loading included", f"{trained.train_seconds:.2f} s"),
        ("rest of the stage: preparation, evaluation, files", f"{max(0.0, stage - trained.train_seconds):.2f} s"),
    ]
    if trained.cpu_seconds:
        rows.append(("processor time of training, all threads", f"{trained.cpu_seconds:.2f} s"))
    if trained.sync_seconds is not None:
        rows.append(("of it copies of whole tables", f"{trained.sync_seconds:.2f} s"))
    if trained.steps:
        rows.append(("a step, on average", f"{1000 * trained.train_seconds / trained.steps:.2f} ms"))
    yield Grid(title="Training", columns=("what", "time"), rows=rows)


def _provenance(facts: RunFacts, command: Sequence[str]) -> Iterator[Part]:
    yield Code(title="Command", text=shlex.join(command))
    yield Grid(
        title="Artifacts",
        columns=("stage", "fingerprint", "made by", "files", "size"),
        rows=[
            (
                name,
                one.fingerprint,
                f"slipstream {one.manifest['slipstream']}",
                f"{len(one.manifest['outputs']):,}",
                show_bytes(sum(output["bytes"] for output in one.manifest["outputs"].values())),
            )
            for name, one in facts.artifacts.items()
        ],
    )
    yield versions()
    yield Code(title="Configuration, defaults filled in", text=json.dumps(to_dict(facts.config), indent=1))


def versions() -> Grid:
    """Versions of what is installed where the page is written."""
    rows = [
        ("slipstream", __version__),
        ("Python", platform.python_version()),
        ("platform", platform.platform(terse=True)),
    ]
    for package in _PACKAGES:
        try:
            rows.append((package, version(package)))
        except PackageNotFoundError:
            rows.append((package, "not installed"))
    return Grid(title="Versions where this page was written", columns=("what", "version"), rows=rows)


def _thinned(frame: pl.DataFrame) -> pl.DataFrame:
    """Every n-th line and the last, of a frame too long to read."""
    if frame.height <= _MOST_LINES:
        return frame
    every = math.ceil(frame.height / _MOST_LINES)
    return frame.filter((pl.int_range(pl.len()) % every == every - 1) | (pl.int_range(pl.len()) == pl.len() - 1))


def _percent(part: int, whole: int) -> str:
    return f"{part / whole:.1%}" if whole else "–"


def _number(value: float, digits: int = 4) -> str:
    return "undefined" if value != value else f"{value:.{digits}f}"


def _count(number: int, noun: str) -> str:
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def _least(values: pl.Series) -> float:
    return float(values.to_numpy().min())


def _most(values: pl.Series) -> float:
    return float(values.to_numpy().max())
