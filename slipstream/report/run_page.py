"""What stands on the page of a run: one function per section, from facts to text, tables and charts."""

from __future__ import annotations

import json
import platform
import shlex
from collections.abc import Callable, Iterable, Iterator, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from slipstream import __version__
from slipstream.config import PipelineConfig
from slipstream.io.capacity import show_bytes
from slipstream.io.figures import (
    PreprocessFigures,
    SegregateFigures,
    TrainFigures,
)
from slipstream.options import to_dict
from slipstream.progress import Progress
from slipstream.report.certificate import certificate_parts
from slipstream.report.cost_sections import memory, time_spent
from slipstream.report.data_sections import data, frequencies, hot_set
from slipstream.report.facts import RunFacts, joined, open_run
from slipstream.report.page import Code, Grid, Page, Paragraph, Part, Section, require_charts, write_page
from slipstream.report.train_sections import quality, skipping, training, validation
from slipstream.report.words import number

_PACKAGES = ("torch", "polars", "pyarrow", "numpy", "safetensors")


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
        ("Data", data),
        ("Id frequencies", frequencies),
        ("Hot set", hot_set),
        ("Training", training),
        ("Validation", validation),
        ("Quality", quality),
        ("Skipping", skipping),
        ("Memory and movement", memory),
        ("Time", time_spent),
        ("Certificate", certificate_parts),
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
        yield "AUC, test", number(trained.test.auc)
        yield "logloss, test", number(trained.test.logloss)
        yield "samples/s trained", f"{trained.samples_per_second:,.0f}"
        if trained.drop_asked:
            yield "samples skipped", f"{trained.samples_dropped:,}"


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
        is_wide=True,
    )
    yield versions()
    seeds = [("of the pipeline", f"{facts.config.seed}"), ("of training", f"{facts.config.train_seed}")]
    yield Grid(title="Seeds", columns=("seed", "value"), rows=seeds)
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
