"""The command that searches for better settings."""

from __future__ import annotations

import dataclasses
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
)
from slipstream.shipped import find_pipeline


@app.command(
    epilog="Example: slipstream tune tiny --range train.lr=.01:.2:log --range 'train.optimizer=adam | rowwise_adagrad'"
)
def tune(
    pipeline: PipelineArgument = DEFAULT_PIPELINE,
    ranges: Annotated[
        list[str],
        typer.Option(
            "--range",
            metavar="KEY=RANGE",
            help="low:high, low:high:log or 'value | value'; repeatable, beside those of [tune].",
        ),
    ] = NO_OVERRIDES,
    trials: Annotated[int, typer.Option(min=1, help="Trials in all, those of an interrupted search included.")] = 20,
    seeds: Annotated[int, typer.Option(min=1, help="Training seeds of each trial; their mean is judged.")] = 1,
    out: Annotated[
        Path | None, typer.Option("--out", metavar="FILE", help="Pipeline file for the best; NAME-tuned.toml.")
    ] = None,
    runs: RunsOption = RUNS,
    overrides: SetOption = NO_OVERRIDES,
    as_json: JsonOption = False,
    quiet: QuietOption = False,
) -> None:
    """Search keys for the least logloss on validation data, every trial a run. Needs extra `tune`."""
    from slipstream.report.tuning import trial_line, tuned_table
    from slipstream.tune import run_tuning

    progress, tell = follow(quiet=quiet)
    path = find_pipeline(pipeline)
    tuned = run_tuning(
        path,
        runs,
        ranges=ranges,
        overrides=overrides,
        trials=trials,
        seeds=seeds,
        out=out or Path(f"{path.stem}-tuned.toml"),
        progress=progress,
        on_trial=lambda trial: tell(trial_line(trial), soft_wrap=True),
    )
    if as_json:
        found = {"out": str(tuned.out), "best": tuned.best.number, "trials": tuned.trials}
        typer.echo(json.dumps(found, indent=1, default=dataclasses.asdict))
    elif not quiet:
        answer(tuned_table(tuned))
