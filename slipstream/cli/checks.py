"""Commands that say beforehand what a run would take, and afterwards whether it can be trusted."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from slipstream.cli.front import (
    DEFAULT_PIPELINE,
    NO_OVERRIDES,
    RUNS,
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
)


@app.command(epilog="Example: slipstream size tiny --hit-ratio 90%,95% --device-memory 80GB")
def size(
    pipeline: PipelineArgument = DEFAULT_PIPELINE,
    hit_ratio: Annotated[
        list[str], typer.Option(metavar="SHARE", help="Share of lookups to serve from the device; repeatable.")
    ] = NO_OVERRIDES,
    hot_samples: Annotated[
        list[str], typer.Option(metavar="SHARE", help="Share of samples to serve wholly from there; repeatable.")
    ] = NO_OVERRIDES,
    budget: Annotated[
        list[str], typer.Option(metavar="BYTES", help="Bytes for hot rows, or a share of all rows; repeatable.")
    ] = NO_OVERRIDES,
    device_memory: Annotated[
        list[str], typer.Option(metavar="BYTES", help="Memory of a device that has to hold it all; repeatable.")
    ] = NO_OVERRIDES,
    speed: Annotated[bool, typer.Option("--speed", help="Train a few seconds, to forecast samples/s here.")] = False,
    profile: Annotated[bool, typer.Option("--profile", help="Profile first where that is not done.")] = False,
    runs: RunsOption = RUNS,
    overrides: SetOption = NO_OVERRIDES,
    as_json: JsonOption = False,
) -> None:
    """Say what hardware a pipeline needs, from its profile: memory by part, for what you ask of the hot set."""
    config = load(pipeline, overrides)
    from slipstream.report import sizes_table, stage_line
    from slipstream.sizing.answers import read_questions, size_pipeline

    progress, tell = follow()
    sizes = size_pipeline(
        config,
        runs,
        read_questions(hit_ratios=hit_ratio, hot_samples=hot_samples, budgets=budget, device_memories=device_memory),
        profiles=profile,
        calibrates=speed,
        progress=progress,
        on_stage=lambda stage: tell(stage_line(stage)),
    )
    if as_json:
        typer.echo(json.dumps(sizes.to_json(), indent=1))
    else:
        answer(sizes_table(sizes))


@app.command(epilog="Example: slipstream verify tiny --steps 100")
def verify(
    pipeline: PipelineArgument = DEFAULT_PIPELINE,
    steps: Annotated[int, typer.Option(min=1, help="Steps to train.")] = 100,
    runs: RunsOption = RUNS,
    overrides: SetOption = NO_OVERRIDES,
    as_json: JsonOption = False,
    quiet: QuietOption = False,
) -> None:
    """Train some steps as configured and by a plain nn.EmbeddingBag loop, and compare every parameter."""
    config = load(pipeline, overrides)
    from slipstream.evidence import require_equal, verify_pipeline
    from slipstream.report.certificate import certificate_table

    progress, _ = follow(quiet=quiet)
    certificate, trained = verify_pipeline(config, runs, steps=steps, progress=progress)
    if as_json:
        typer.echo(json.dumps(certificate.to_json(), indent=1))
    elif not quiet:
        answer(certificate_table(certificate))
    if not quiet:
        say(f"certificate written to {trained.path / 'certificate.json'}")
    require_equal(certificate, trained)


@app.command(epilog="Example: slipstream reproduce runs/tiny/train/0123456789abcdef")
def reproduce(
    artifact: Annotated[Path, typer.Argument(metavar="ARTIFACT", help="Folder of a published artifact.")],
    raw: Annotated[
        list[str], typer.Option("--raw", metavar="FILES", help="Raw files it was made from, if any; repeatable.")
    ] = NO_OVERRIDES,
    work: Annotated[
        Path | None,
        typer.Option("--work", metavar="DIR", help="Keep what is made in this folder."),
    ] = None,
    as_json: JsonOption = False,
    quiet: QuietOption = False,
) -> None:
    """Make an artifact again from its manifest and inputs, and compare hashes; exit code 1 where one differs."""
    from slipstream.report.reproduction import reproduction_table
    from slipstream.reproduce import reproduce_artifact, require_equal

    progress, _ = follow(quiet=quiet)
    again = reproduce_artifact(artifact, raw=raw, work=work, progress=progress)
    if as_json:
        typer.echo(json.dumps(again.to_json(), indent=1))
    elif not quiet:
        answer(reproduction_table(again))
    require_equal(again)
