"""Rich tables and progress for the terminal: results in, renderables out."""

from __future__ import annotations

import datetime
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from typing import Any

from rich.console import Console, Group, RenderableType
from rich.progress import (
    BarColumn,
    Progress,
    ProgressColumn,
    SpinnerColumn,
    Task,
    TaskProgressColumn,
    TextColumn,
    TimeElapsedColumn,
)
from rich.table import Table
from rich.text import Text

from slipstream.compare import ComparedVariant, Spread
from slipstream.config import PipelineConfig
from slipstream.init import PipelineGuess
from slipstream.io.costs import Forecast
from slipstream.io.figures import GenerateFigures, PreprocessFigures, SegregateFigures, TrainFigures
from slipstream.pipeline import RunResult, StagePlan, StageResult
from slipstream.progress import Pace
from slipstream.report.lists import describe_lists
from slipstream.report.mixed import describe_mixed
from slipstream.stage import row_bytes_of

_MOST_SHOWN = 40
"""Items of a list that are shown one by one."""


_PLAIN_SECONDS = 30
"""Between lines about a task where there is no terminal."""


class RichProgress:
    """Shows tasks as bars on a terminal; on anything else a plain line says every 30 seconds how far a task is."""

    def __init__(self, console: Console) -> None:
        self._console = console

    @contextmanager
    def task(self, label: str, total: int | None, unit: str, *, done: int = 0) -> Iterator[Callable[[int, str], None]]:
        """Open a task and show it until the block ends."""
        pace = Pace(total, done=done)
        show = self._show_bar if self._console.is_terminal else self._say_now_and_then
        with show(label, total, pace) as listen:

            def advance(units: int, note: str) -> None:
                pace.advance(units)
                listen(units, note)

            yield advance

    def measured(self, step: int, logloss: float) -> None:
        """Hear of a measurement; TensorBoard and the report show them."""

    @contextmanager
    def _show_bar(self, label: str, total: int | None, pace: Pace) -> Iterator[Callable[[int, str], None]]:
        columns = (
            SpinnerColumn(),
            TextColumn("{task.description}"),
            BarColumn(bar_width=28),
            TaskProgressColumn(),
            TimeElapsedColumn(),
            _TimeLeftColumn(pace),
            TextColumn("[dim]{task.fields[note]}"),
        )
        with Progress(*columns, console=self._console, transient=True) as bars:
            task_id = bars.add_task(f"{label:<16}", total=total, note="", completed=pace.done)

            def listen(units: int, note: str) -> None:
                bars.update(task_id, advance=units, note=note or bars.tasks[0].fields["note"])

            yield listen

    @contextmanager
    def _say_now_and_then(self, label: str, total: int | None, pace: Pace) -> Iterator[Callable[[int, str], None]]:
        notes, is_over = [""], threading.Event()

        def speak() -> None:
            while not is_over.wait(_PLAIN_SECONDS):
                known = [label, "" if pace.share is None else f"{pace.share:.0%}", notes[0], _time_left(pace)]
                self._console.print(", ".join(filter(None, known)), markup=False, highlight=False, soft_wrap=True)

        def listen(units: int, note: str) -> None:
            notes[0] = note or notes[0]

        speaker = threading.Thread(target=speak, name="progress", daemon=True)
        speaker.start()
        try:
            yield listen
        finally:
            is_over.set()
            speaker.join()


class _TimeLeftColumn(ProgressColumn):
    """How long a task will take still."""

    def __init__(self, pace: Pace) -> None:
        super().__init__()
        self._pace = pace

    def render(self, task: Task) -> Text:
        return Text(_time_left(self._pace), style="progress.remaining")


def _time_left(pace: Pace) -> str:
    seconds = pace.seconds_left()
    return "" if seconds is None else f"{datetime.timedelta(seconds=round(seconds))} left"


def stage_line(result: StageResult) -> Text:
    """One line that says what became of a stage."""
    mark, style = ("✓", "green") if result.status == "ran" else ("·", "dim")
    took = f"{result.seconds:7.1f} s" if result.status == "ran" else "  skipped"
    return Text.assemble(
        (f"{mark} ", style),
        f"{result.stage:<11}",
        (took, "bold" if mark == "✓" else "dim"),
        (f"  {result.reason}", "dim"),
    )


def plan_table(plans: Sequence[StagePlan], forecasts: Sequence[Forecast]) -> Table:
    """Say what would run, why, and what it will about take."""
    table = Table("stage", "would", box=None, pad_edge=False)
    for name in ("time", "disk", "memory"):
        table.add_column(name, justify="right")
    table.add_column("because")
    by_stage = {forecast.stage: forecast for forecast in forecasts}
    for plan in plans:
        cost = _show_cost([by_stage[plan.stage]]) if plan.stage in by_stage else ("", "", "")
        table.add_row(plan.stage, "[bold]run[/]" if plan.will_run else "[dim]skip[/]", *cost, plan.reason)
    if forecasts:
        table.add_row("all", "", *_show_cost(forecasts), "about, on two processor cores; disk at its fullest")
    return table


def _show_cost(forecasts: Sequence[Forecast]) -> tuple[str, str, str]:
    seconds = sum(forecast.seconds for forecast in forecasts)
    return (
        _show_duration(seconds),
        show_bytes(sum(forecast.disk_bytes for forecast in forecasts)),
        show_bytes(max(forecast.memory_bytes for forecast in forecasts)),
    )


def _show_duration(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:,.0f} h"


def run_table(result: RunResult) -> RenderableType:
    """Give the figures of a run that a person asks for first."""
    table = Table(title=f"run {result.config.name}", title_justify="left", show_header=False, box=None)
    table.add_column(style="cyan", no_wrap=True)
    table.add_column()
    for label, value in _facts(result):
        table.add_row(label, value)
    lines = [Text(f"  {stage.stage:<11} {stage.artifact.path}", style="dim") for stage in result.stages.values()]
    warnings = [Text(f"warning: {text}", style="yellow") for text in result.warnings]
    return Group(table, *warnings, Text("files", style="cyan"), *lines)


def _facts(result: RunResult) -> Iterator[tuple[str, str]]:
    config = result.config
    if encoded := result.figures(PreprocessFigures):
        split = ", ".join(f"{count:,} {name}" for name, count in encoded.samples.items())
        yield "samples", f"{split}; {encoded.rejected:,} lines rejected"
        yield "rows", f"{sum(encoded.rows_per_table.values()):,} in {len(encoded.rows_per_table)} tables"
        yield from (("lists", text) for text in describe_lists(encoded))
    if segregated := result.figures(SegregateFigures):
        share, hot_bytes = segregated.hot_rows / segregated.rows, segregated.hot_rows * row_bytes_of(config)
        yield (
            "hot rows",
            f"{segregated.hot_rows:,} ({share:.1%}, {show_bytes(hot_bytes)}), Λ = {segregated.access_threshold}",
        )
        yield (
            "hot share",
            f"{segregated.hot_sample_share:.1%} of training samples, {segregated.hit_ratio:.1%} of their lookups",
        )
    if trained := result.figures(TrainFigures):
        generated = result.figures(GenerateFigures)
        for split, quality in (("test", trained.test), ("val", trained.val)):
            best = f" (teacher {generated.splits[split].auc:.4f})" if generated else ""
            yield split, _show_quality(asdict(quality), best)
        if trained.best_step is not None:
            yield "kept", _describe_kept(trained, trained.best_step)
        if trained.start is not None:
            start = trained.start
            yield (
                "start",
                f"{start.rows_found:,} of {start.rows:,} rows found by raw id, {start.layers_taken} of {start.layers} "
                f"tensors of dense layers, from {config.train.init_from}",
            )
        yield (
            "speed",
            f"{trained.samples_per_second:,.0f} samples/s trained{_drop_speed(trained)} on {trained.device} "
            f"over {trained.steps:,} steps, mode {config.train.mode}",
        )
        if trained.ranks is not None and trained.sent_bytes_per_step is not None:
            sent = sorted(trained.sent_bytes_per_step.items(), key=lambda item: -item[1])
            parts = ", ".join(f"{what} {show_bytes(size)}" for what, size in sent if size)
            yield "ranks", f"{trained.ranks}; the first sent a step: {parts}"
        if trained.drop_asked:
            yield "dropped", _describe_drop(trained, config)
        if trained.mixed is not None:
            yield "mixed", describe_mixed(trained.mixed)
        tiers = ", ".join(f"{name} {show_bytes(size)}" for name, size in trained.bytes_per_tier.items())
        moved = show_bytes(trained.bytes_to_device), show_bytes(trained.bytes_to_host)
        yield "memory", f"{tiers}; moved {moved[0]} to the device, {moved[1]} back"


def _describe_kept(trained: TrainFigures, best_step: int) -> str:
    stopped = "; train.patience ended training there" if trained.stopped_early else ""
    return (
        f"the model after step {best_step:,}, least validation logloss of {len(trained.validations)} measured up to "
        f"step {trained.steps:,}{stopped}"
    )


def _drop_speed(trained: TrainFigures) -> str:
    return f", {trained.samples_dropped / trained.train_seconds:,.0f} dropped," if trained.samples_dropped else ""


def _describe_drop(trained: TrainFigures, config: PipelineConfig) -> str:
    classified = "samples" if config.skip_rule.scope == "all" else "hot samples"
    at = f" at T = {trained.threshold:.3g}" if trained.threshold is not None else ""
    return (
        f"{trained.samples_dropped:,} samples; asked {trained.drop_asked:.1%} of "
        f"{trained.samples_classified:,} {classified} classified, achieved "
        f"{trained.drop_achieved:.1%}{at} ({config.criterion})"
    )


def score_table(summary: Mapping[str, Any]) -> Table:
    """Say what became of scored lines."""
    table = Table(show_header=False, box=None)
    table.add_column(style="cyan", no_wrap=True)
    table.add_column()
    table.add_row("lines", f"{summary['lines']:,}, of which {summary['rejected']:,} are no samples")
    if quality := summary.get("quality"):
        table.add_row("quality", _show_quality(quality))
    for number, model in enumerate(summary.get("models", ()), start=1):
        own = f"  {_show_quality(model['quality'])}" if "quality" in model else ""
        table.add_row(f"model {number}", f"{model['folder']}{own}")
    table.add_row("written", summary["output"])
    return table


def guess_table(guess: PipelineGuess) -> RenderableType:
    """Say what each column of a table is taken for, and the command to run next."""
    table = Table(box=None, title=f"guessed from {guess.num_lines:,} lines", title_justify="left")
    for name in ("column", "taken for", "values", "because"):
        table.add_column(name, justify="right" if name == "values" else "left")
    for column in guess.columns:
        table.add_row(Text(column.name), column.kind, f"{column.num_distinct:,}", column.why)
    split = f"split {guess.split}; written {guess.path}; look it over, then"
    return Group(table, Text(split), Text(f"    slipstream run {guess.path}", style="bold"))


def _show_quality(quality: Mapping[str, float], beside: str = "") -> str:
    return (
        f"AUC {_figure(quality['auc'])}{beside}, logloss {quality['logloss']:.4f}, NE {_figure(quality['ne'])}, "
        f"calibration {_figure(quality['calibration'], digits=3)}, accuracy {quality['accuracy']:.4f}"
    )


def _figure(value: float | None, *, digits: int = 4) -> str:
    return "undefined" if value is None or value != value else f"{value:.{digits}f}"


def curve_table(curve: Sequence[Mapping[str, Any]]) -> Table:
    """Say what each budget buys: the hot-set curve of a profile."""
    table = Table(title="hot-set curve", title_justify="left", box=None, pad_edge=False, collapse_padding=True)
    for name in (
        "rows",
        "policy",
        "Λ",
        "hot rows",
        "hits",
        "hits val",
        "hot samples",
        "hot samples val",
    ):
        table.add_column(name, justify="left" if name == "policy" else "right", overflow="fold")
    by_key = {(point["row_share"], point["policy"], point["split"]): point for point in curve}
    for (share, policy, split), point in by_key.items():
        if split != "train":
            continue
        held_out = by_key[share, policy, "val"]
        table.add_row(
            f"{share:.1%}",
            policy,
            str(point["access_threshold"]),
            f"{point['hot_rows']:,}",
            f"{point['hit_ratio']:.1%}",
            f"{held_out['hit_ratio']:.1%}",
            f"{point['hot_sample_share']:.1%}",
            f"{held_out['hot_sample_share']:.1%}",
        )
    return table


def comparison_table(compared: Sequence[ComparedVariant]) -> RenderableType:
    """Figures of every variant, means over seeds; ± is the standard error, of paired differences for ΔAUC.

    Three tables, each of which fits 80 columns.
    """
    title = f"{compared[0].seeds} seeds, ± standard error, ΔAUC paired against {compared[0].name}"
    quality = _make_table(title, "AUC", "ΔAUC", "skipped", "seen")
    test = _make_table("test split", "logloss", "NE", "calibration")
    cost = _make_table("cost", "wall s", "CPU s", "samples/s", "device", "host", "moved", "hits")
    for variant in compared:
        figures = variant.figures
        quality.add_row(
            variant.name,
            _with_error(figures["auc"]),
            "" if variant is compared[0] else _with_error(figures["auc_change"], sign="+"),
            f"{figures['skipped_share'].mean:.1%}",
            f"{figures['samples_seen'].mean:,.0f}",
        )
        test.add_row(
            variant.name,
            _with_error(figures["test_logloss"]),
            _with_error(figures["test_ne"]),
            _with_error(figures["test_calibration"], digits=3),
        )
        cost.add_row(
            variant.name,
            _with_error(figures["seconds"], digits=1),
            f"{figures['cpu_seconds'].mean:.1f}" if figures["cpu_seconds"].mean else "–",
            f"{figures['samples_per_second'].mean:,.0f}",
            show_bytes(figures["device_bytes"].mean),
            show_bytes(figures["host_bytes"].mean),
            show_bytes(figures["moved_bytes"].mean),
            f"{figures['hit_ratio'].mean:.1%}",
        )
    return Group(quality, Text(), test, Text(), cost)


def _with_error(figure: Spread, *, digits: int = 4, sign: str = "") -> str:
    return f"{figure.mean:{sign}.{digits}f} ± {figure.error:.{digits}f}"


def _make_table(title: str, *columns: str) -> Table:
    table = Table("", title=title, title_justify="left", box=None, pad_edge=False, collapse_padding=True)
    for column in columns:
        table.add_column(column, justify="right", overflow="fold")
    return table


def manifest_table(manifest: Mapping[str, Any]) -> RenderableType:
    """Give an artifact's manifest for people."""
    table = Table(show_header=False, box=None)
    table.add_column(style="cyan", no_wrap=True)
    table.add_column()
    outputs = manifest["outputs"]
    total = sum(output["bytes"] for output in outputs.values())
    table.add_row("stage", f"{manifest['stage']} (slipstream {manifest['slipstream']}, format {manifest['format']})")
    table.add_row("made in", f"{manifest['seconds']:.1f} s, peak memory {show_bytes(manifest['peak_bytes'])}")
    table.add_row("inputs", ", ".join(f"{name} {digest}" for name, digest in manifest["inputs"].items()) or "none")
    table.add_row("outputs", f"{len(outputs)} files, {show_bytes(total)}")
    for name, value in manifest["counts"].items():
        if name not in ("curve", "warnings"):
            table.add_row(name.replace("_", " "), Text(_show_value(name, value)))
    for text in manifest["counts"].get("warnings", []):
        table.add_row("warning", Text(text, style="yellow"))
    curve = manifest["counts"].get("curve")
    return Group(table, curve_table(curve)) if curve else table


def _show_value(name: str, value: Any) -> str:
    """Give a figure of a manifest, or several, for people."""
    if isinstance(value, Mapping):
        if {"auc", "ne", "calibration"} <= value.keys():
            return _show_quality(value)
        inner = [f"{key} {_show_value(name if 'bytes' in name else key, item)}" for key, item in value.items()]
        return "; ".join(inner) or "none"
    if isinstance(value, list):
        if len(value) > _MOST_SHOWN:
            return f"{len(value):,} values"
        return "; ".join(_show_value(name, item) for item in value) or "none"
    if value is None or value != value:
        return "none" if value is None else "undefined"
    if isinstance(value, bool) or not isinstance(value, int | float):
        return str(value)
    if "bytes" in name:
        return show_bytes(value)
    if isinstance(value, int):
        return f"{value:,}"
    if abs(value) >= 1000:
        return f"{value:,.1f}"
    return f"{value:.4g}" if abs(value) >= 0.01 else f"{value:.2g}"  # never six digits after the point


def show_bytes(size: float) -> str:
    """Bytes for people: `1.5 MiB`."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if size < 1024:
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1024
    return f"{size:.1f} TiB"
