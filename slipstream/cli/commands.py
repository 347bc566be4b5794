"""Commands on pipelines, artifacts and models."""

from __future__ import annotations

import dataclasses
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from slipstream.cli.front import (
    DEFAULT_PIPELINE,
    NO_OVERRIDES,
    RUNS,
    ForceOption,
    JsonOption,
    PipelineArgument,
    QuietOption,
    RunsOption,
    SetOption,
    answer,
    app,
    follow,
    load,
    say,
    speaks,
)
from slipstream.errors import ArtifactError
from slipstream.shipped import find_pipeline
from slipstream.stage_list import STAGES

if TYPE_CHECKING:
    from slipstream.config import PipelineConfig


@app.command(epilog="Example: slipstream run --set train.mode=resident --json")
def run(
    pipeline: PipelineArgument = DEFAULT_PIPELINE,
    runs: RunsOption = RUNS,
    overrides: SetOption = NO_OVERRIDES,
    force: ForceOption = False,
    as_json: JsonOption = False,
    quiet: QuietOption = False,
) -> None:
    """Run every stage that needs it, from raw log to trained model."""
    _run(pipeline, runs, overrides, None, force=force, as_json=as_json, quiet=quiet)


@app.command(epilog="Example: slipstream init ratings.csv --label rating")
def init(
    file: Annotated[str, typer.Argument(metavar="FILE", help="CSV, compressed or not, or Parquet.")],
    label: Annotated[str, typer.Option("--label", metavar="COLUMN", help="Its label; guessed if left out.")] = "",
    out: Annotated[Path | None, typer.Option("--out", metavar="PIPELINE", help="Pipeline file to write.")] = None,
) -> None:
    """Look at a table and write a commented pipeline for it."""
    from slipstream.init import write_pipeline
    from slipstream.report import guess_table

    answer(guess_table(write_pipeline(file, label=label, out=out)))


@app.command(epilog="Example: slipstream plan tiny --set preprocess.freq_threshold=5")
def plan(
    pipeline: PipelineArgument = DEFAULT_PIPELINE,
    runs: RunsOption = RUNS,
    overrides: SetOption = NO_OVERRIDES,
    as_json: JsonOption = False,
) -> None:
    """Say which stages would run, why, and what they will about take; change nothing."""
    config = load(pipeline, overrides)
    from slipstream.forecast import forecast_run
    from slipstream.pipeline import plan_pipeline

    progress, _ = follow()
    plans = plan_pipeline(config, runs, progress)
    forecasts = forecast_run(config, plans)
    if as_json:
        costs = {one.stage: dataclasses.asdict(one) for one in forecasts}
        body = [{"stage": p.stage, "run": p.will_run, "reason": p.reason} | costs.get(p.stage, {}) for p in plans]
        typer.echo(json.dumps(body, indent=1))
        return
    from slipstream.report import plan_table

    answer(plan_table(plans, forecasts))


@app.command(epilog="Example: slipstream check avazu")
def check(
    pipeline: PipelineArgument = DEFAULT_PIPELINE,
    runs: RunsOption = RUNS,
    overrides: SetOption = NO_OVERRIDES,
    files: Annotated[bool, typer.Option("--files", help="Hash every published file of the pipeline too.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Validate a pipeline without running it; --json prints it with every default filled in."""
    config = load(pipeline, overrides)
    if files:
        _check_files(config, runs)
    if as_json:
        from slipstream.options import to_dict

        typer.echo(json.dumps(to_dict(config), indent=1))
    else:
        typer.echo(f"{pipeline}: ok, run `{config.name}`")


def _check_files(config: PipelineConfig, runs: Path) -> None:
    from slipstream.pipeline import find_altered

    altered = find_altered(config, runs)
    for stage, names in altered.items():
        say(f"{stage}: " + (", ".join(f"`{name}`" for name in names) + " altered" if names else "unaltered"))
    if not altered:
        say(f"nothing is published in `{runs / config.name}` for this pipeline")
    if any(altered.values()):
        raise ArtifactError(
            f"files of {', '.join(stage for stage, names in altered.items() if names)} were altered or removed "
            "after they were published",
            hint="repeat these stages, the first one first, with --force; `slipstream run --force` repeats all",
        )


@app.command(epilog="Example: slipstream show runs/tiny/profile/*")
def show(
    artifacts: Annotated[list[Path], typer.Argument(metavar="ARTIFACT...", help="Folders of published artifacts.")],
    as_json: JsonOption = False,
) -> None:
    """Show what artifacts hold: their figures, sizes and inputs."""
    from slipstream.io.artifacts import describe_altered, open_artifact

    opened = [open_artifact(artifact) for artifact in artifacts]
    manifests = [artifact.manifest for artifact in opened]
    if as_json:
        typer.echo(json.dumps(manifests[0] if len(manifests) == 1 else manifests, indent=1))
    else:
        from slipstream.report import manifest_table

        for manifest in manifests:
            answer(manifest_table(manifest))
    for artifact in opened:
        if altered := artifact.find_altered():
            raise ArtifactError(describe_altered(artifact.path, altered), hint=artifact.remedy)


@app.command(epilog="Example: slipstream clean tiny")
def clean(
    pipeline: PipelineArgument = DEFAULT_PIPELINE, runs: RunsOption = RUNS, overrides: SetOption = NO_OVERRIDES
) -> None:
    """Remove what killed processes left in a run folder, and parsed numbers; published artifacts stay."""
    config = load(pipeline, overrides)
    from slipstream.pipeline import clean_run

    removed = clean_run(runs, config.name)
    for path in removed:
        say(f"removed {path}")
    typer.echo(f"{len(removed)} folders removed")


@app.command(
    epilog="Example: slipstream compare --modes resident,fae --criteria random,stale --seeds 3 --skip-share 0.1"
)
def compare(
    pipeline: PipelineArgument = DEFAULT_PIPELINE,
    runs: RunsOption = RUNS,
    overrides: SetOption = NO_OVERRIDES,
    modes: Annotated[str, typer.Option(help="Modes to run without skipping.")] = "resident",
    criteria: Annotated[str, typer.Option(help="Skip criteria to run; `all` that drop anything.")] = "all",
    vary: Annotated[list[str], typer.Option(metavar="KEY=V,V", help="One more axis; repeatable.")] = NO_OVERRIDES,
    seeds: Annotated[int, typer.Option(min=1, help="Training seeds.")] = 3,
    skip_share: Annotated[
        float | None, typer.Option(help="Share of all samples every criterion skips; sets its D.")
    ] = None,
    report_file: Annotated[
        Path | None, typer.Option("--report", metavar="FILE", help="Show it as an HTML page with charts too.")
    ] = None,
    as_json: JsonOption = False,
    quiet: QuietOption = False,
) -> None:
    """Run a grid of modes and skip criteria over several seeds and show paired differences."""
    if report_file is not None:
        _require_charts()
    from slipstream.compare import make_grid, run_comparison
    from slipstream.report import comparison_table

    progress, tell = follow(quiet=quiet)
    compared = run_comparison(
        find_pipeline(pipeline),
        runs,
        grid=make_grid(_split(modes), _split(criteria), vary),
        overrides=overrides,
        seeds=seeds,
        skip_share=skip_share,
        progress=progress,
        on_run=lambda name, seed: tell(f"[dim]{name}, seed {seed}[/]"),
    )
    if as_json:
        typer.echo(json.dumps([dataclasses.asdict(variant) for variant in compared], indent=1))
    elif not quiet:
        answer(comparison_table(compared))
    if report_file is not None:
        from slipstream.report.compare_page import write_comparison_page

        command = ["slipstream", *sys.argv[1:]]
        size = write_comparison_page(compared, report_file, name=find_pipeline(pipeline).stem, command=command)
        say(f"report written to {report_file}, {size / 1e6:.1f} MB; open it in a browser")


def _require_charts() -> None:
    """Say before hours of work that its report could not be written."""
    from slipstream.report.page import require_charts

    require_charts()


@app.command(epilog="Example: slipstream report tiny --out report.html")
def report(
    out: Annotated[Path, typer.Option("--out", metavar="FILE", help="HTML file to write.")],
    pipeline: PipelineArgument = DEFAULT_PIPELINE,
    runs: RunsOption = RUNS,
    overrides: SetOption = NO_OVERRIDES,
    quiet: QuietOption = False,
) -> None:
    """Write what a run left behind as one HTML page: data, hot set, training, quality, cost. Needs extra `report`."""
    config = load(pipeline, overrides)
    _require_charts()
    from slipstream.report.run_page import write_run_page

    command = ["slipstream", "run", pipeline, "--runs", str(runs)]
    command += [part for override in overrides for part in ("--set", override)]
    progress, _ = follow(quiet=quiet)
    size = write_run_page(config, runs, out, command=command, progress=progress)
    if not quiet:
        typer.echo(f"report written to {out}, {size / 1e6:.1f} MB; open it in a browser")


def _split(names: str) -> list[str]:
    return [name.strip() for name in names.split(",") if name.strip()]


def _stage_command(stage: str, summary: str) -> None:
    def command(
        pipeline: PipelineArgument = DEFAULT_PIPELINE,
        runs: RunsOption = RUNS,
        overrides: SetOption = NO_OVERRIDES,
        force: ForceOption = False,
        as_json: JsonOption = False,
        quiet: QuietOption = False,
    ) -> None:
        _run(pipeline, runs, overrides, [stage], force=force, as_json=as_json, quiet=quiet)

    example = f"Example: slipstream {stage} tiny --force"
    app.command(stage, help=summary, epilog=example)(command)


for _stage in STAGES:
    if _stage.summary:
        _stage_command(_stage.name, _stage.summary)


@app.command(epilog="Example: slipstream score runs/tiny/train/* --raw 'day_23.gz' --out scores.parquet --keep cat_0")
def score(
    models: Annotated[
        list[Path],
        typer.Argument(metavar="MODEL...", help="Folders of train artifacts or exported models; several are averaged."),
    ],
    raw: Annotated[
        list[str],
        typer.Option("--raw", metavar="FILES", help="Path, quoted glob, address, or - for stdin; repeatable."),
    ],
    out: Annotated[Path, typer.Option("--out", metavar="FILE", help="File to write: .parquet, .csv or .jsonl.")],
    keep: Annotated[
        list[str],
        typer.Option("--keep", metavar="COLUMNS", help="Columns to pass on, with commas between; repeatable."),
    ] = NO_OVERRIDES,
    as_json: JsonOption = False,
    quiet: QuietOption = False,
) -> None:
    """Write a click probability for every raw line, in order; with labels, say how good they are."""
    from slipstream.pipeline import score_lines
    from slipstream.report import score_table
    from slipstream.report.document import without_nan

    progress, _ = follow(quiet=quiet)
    summary = score_lines(
        models,
        raw=raw,
        out=out,
        keep=[name for names in keep for name in names.split(",")],
        progress=progress,
    )
    if as_json:
        typer.echo(json.dumps(without_nan(summary), indent=1))
    elif not quiet:
        answer(score_table(summary))


export = typer.Typer(
    no_args_is_help=True,
    help="Write what other projects load.",
    epilog="Example: slipstream export samples --format dlrm-npz --out exported",
)
app.add_typer(export, name="export")


@export.command(epilog="Example: slipstream export samples tiny --format torchrec-npy --out exported")
def samples(
    out: Annotated[Path, typer.Option("--out", metavar="DIR", help="Folder to write to.")],
    export_format: Annotated[
        str, typer.Option("--format", metavar="FORMAT", help="dlrm-npz, torchrec-npy or parquet.")
    ] = "parquet",
    pipeline: PipelineArgument = DEFAULT_PIPELINE,
    runs: RunsOption = RUNS,
    overrides: SetOption = NO_OVERRIDES,
    as_json: JsonOption = False,
    quiet: QuietOption = False,
) -> None:
    """Write encoded samples for DLRM or TorchRec, or as plain Parquet; preprocesses first when needed."""
    config = load(pipeline, overrides)
    from slipstream.pipeline import export_samples
    from slipstream.report import stage_line

    progress, tell = follow(quiet=quiet)
    summary = export_samples(
        config,
        runs,
        export_format=export_format,
        out_dir=out,
        progress=progress,
        on_stage=lambda stage: tell(stage_line(stage)),
    )
    if as_json:
        typer.echo(json.dumps(summary, indent=1))
    elif not quiet:
        typer.echo(f"{sum(summary['samples'].values()):,} samples in {len(summary['files'])} files below {out}")


@export.command(
    epilog="Example: slipstream export model runs/tiny/train/0123456789abcdef --format onnx --out tiny.onnx"
)
def model(
    artifact: Annotated[Path, typer.Argument(metavar="MODEL", help="Folder of a train artifact or an exported model.")],
    out: Annotated[Path, typer.Option("--out", metavar="PATH", help="Folder to write to; a file for other formats.")],
    quantize: Annotated[
        str, typer.Option("--quantize", metavar="NAME", help="Round fp32 tables: int8, int4 or int2, one scale each.")
    ] = "",
    format_name: Annotated[
        str, typer.Option("--format", metavar="NAME", help="folder; onnx; torch, for torch.export.")
    ] = "folder",
    as_json: JsonOption = False,
) -> None:
    """Write a trained model elsewhere: as it is, rounded and packed, or for programs without slipstream."""
    from slipstream.pipeline import export_model

    summary = export_model(artifact, out=out, representation=quantize or None, format_name=format_name)
    if as_json:
        typer.echo(json.dumps(summary, indent=1))
        return
    ratio = summary["bytes"] / summary["bytes_before"]
    typer.echo(
        f"{summary['bytes']:,} bytes at {out}, {ratio:.3f} of the {summary['bytes_before']:,} of the weights before"
    )
    if "largest_difference" in summary:
        typer.echo(f"probabilities differ from the model's own by {summary['largest_difference']:.1e} at most")


def _run(
    pipeline: str, runs: Path, overrides: list[str], only: list[str] | None, *, force: bool, as_json: bool, quiet: bool
) -> None:
    config = load(pipeline, overrides)
    from slipstream.pipeline import run_pipeline
    from slipstream.report import curve_table, run_table, stage_line
    from slipstream.report.document import run_document

    if not speaks():
        run_pipeline(config, runs, stages=only, force=force)
        return
    progress, tell = follow(quiet=quiet)
    result = run_pipeline(
        config,
        runs,
        stages=only,
        force=force,
        progress=progress,
        on_stage=lambda stage: tell(stage_line(stage)),
    )
    if as_json:
        typer.echo(json.dumps(run_document(result), indent=1, allow_nan=False))
    elif not quiet:
        if only == ["profile"]:
            answer(curve_table(result.counts("profile")["curve"]))
        answer(run_table(result))
    if as_json or quiet:
        for text in result.warnings:
            say(f"warning: {text}")
