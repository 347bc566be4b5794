"""What every command stands on: the application, options they share, how they answer and how they fail."""

from __future__ import annotations

import logging
import os
import signal
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
import typer.core

from slipstream import __version__
from slipstream.distributed.environment import count_ranks, own_rank
from slipstream.errors import ConfigError, SlipstreamError
from slipstream.io.processors import wait_without_spinning
from slipstream.shipped import find_pipeline, shipped_pipelines
from slipstream.stage_list import STAGES

if TYPE_CHECKING:
    from collections.abc import Callable

    from rich.console import RenderableType

    from slipstream.config import PipelineConfig
    from slipstream.progress import Progress

DEFAULT_PIPELINE = "tiny"
_PIPED_COLUMNS = 200


_TOGETHER = {"run", *(stage.name for stage in STAGES if stage.summary)}
"""Commands that several ranks may be started with."""


class Edge(typer.core.TyperGroup):
    """Turns expected errors into two parts on stderr and an exit code; unexpected ones keep their traceback."""

    def invoke(self, ctx: Any) -> Any:
        """Run a command, and end as its error says."""
        try:
            return super().invoke(ctx)
        except SlipstreamError as exc:
            say(f"error: {exc}")
            if exc.hint:
                say(f"\nhint: {exc.hint}")
            raise typer.Exit(exc.exit_code) from exc
        except KeyboardInterrupt as exc:
            say("interrupted; finished parts are kept, the same command goes on from them")
            raise typer.Exit(130) from exc
        except BrokenPipeError as exc:
            sys.stderr.close()
            raise typer.Exit(0) from exc


app = typer.Typer(
    cls=Edge,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    help="From raw click logs to a trained model, with only the rows that matter next to the accelerator.",
    epilog="Example: slipstream run criteo_kaggle --set dataset.raw=/data/train.txt",
)


def _complete_pipeline(incomplete: str) -> list[str]:
    """Names of shipped pipelines and files that begin so, for the shell."""
    files = [str(path) for path in Path().glob(f"{incomplete}*.toml")]
    return sorted([path.stem for path in shipped_pipelines() if path.stem.startswith(incomplete)] + files)


PipelineArgument = Annotated[
    str,
    typer.Argument(
        metavar="PIPELINE", help="Pipeline file, or the name of a shipped one.", autocompletion=_complete_pipeline
    ),
]
SetOption = Annotated[list[str], typer.Option("--set", metavar="KEY=VALUE", help="Override one key; repeatable.")]
RunsOption = Annotated[Path, typer.Option("--runs", metavar="DIR", help="Folder that holds run folders.")]
ForceOption = Annotated[bool, typer.Option("--force", help="Run even what is up to date.")]
JsonOption = Annotated[bool, typer.Option("--json", help="Print one JSON document.")]
QuietOption = Annotated[bool, typer.Option("--quiet", help="No progress and no tables.")]

NO_OVERRIDES: list[str] = []
RUNS = Path("runs")


@app.callback(invoke_without_command=True)
def _root(
    ctx: typer.Context,
    version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False,
) -> None:
    if version:
        typer.echo(f"slipstream {__version__}")
        raise typer.Exit
    _refuse_ranks(ctx.invoked_subcommand or "")


def _refuse_ranks(command: str) -> None:
    """Refuse what every rank would do over again."""
    if (size := count_ranks(os.environ)) > 1 and command not in _TOGETHER:
        together = ", ".join(sorted(_TOGETHER))
        raise ConfigError(
            f"`slipstream {command}` is for one process, and WORLD_SIZE says that there are {size}",
            hint=f"start it without torchrun, or unset WORLD_SIZE; on several ranks: {together}",
        )


def main() -> None:
    """Entry point of the console script."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    logging.basicConfig(format="%(message)s")
    logging.getLogger("slipstream").setLevel(logging.INFO)
    wait_without_spinning(os.environ)
    app()


def load(pipeline: str, overrides: list[str]) -> PipelineConfig:
    """Read the pipeline that a command names, with its overrides."""
    from slipstream.config import load_pipeline

    return load_pipeline(find_pipeline(pipeline), overrides)


def answer(renderable: RenderableType) -> None:
    """Print to stdout; what is no terminal gets lines of COLUMNS, or long ones, and no blanks at their end."""
    from rich.console import Console

    console = Console()
    if console.is_terminal:
        console.print(renderable)
        return
    if not os.environ.get("COLUMNS"):
        console = Console(width=_PIPED_COLUMNS)
    with console.capture() as captured:
        console.print(renderable)
    typer.echo("\n".join(line.rstrip() for line in captured.get().splitlines()))


def follow(*, quiet: bool = False) -> tuple[Progress, Callable[..., None]]:
    """Give what shows on stderr how work goes, and what prints a line beside it; both are silent when asked to be."""
    from rich.console import Console

    from slipstream.progress import Silent
    from slipstream.report import RichProgress

    if quiet:
        return Silent(), lambda *_, **__: None
    console = Console(stderr=True)
    return RichProgress(console), console.print


def speaks() -> bool:
    """Whether this process answers people: alone, or as the first of several ranks."""
    return own_rank(os.environ) == 0


def say(text: str) -> None:
    """Print a line to stderr."""
    typer.echo(text, err=True)
