"""What `slipstream verify` found, for the terminal and for the page of a run."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from slipstream.io.certificates import Certificate, Comparison, read_certificate
from slipstream.report.facts import RunFacts
from slipstream.report.page import Grid, Paragraph, Part

_MOST_SHOWN = 12


def certificate_table(certificate: Certificate) -> RenderableType:
    """Say what was compared, and how equal it is."""
    table = Table(show_header=False, box=None)
    table.add_column(style="cyan", no_wrap=True)
    table.add_column()
    for label, text in _facts(certificate):
        table.add_row(label, text)
    if not (differing := _differing(certificate)):
        return table
    worst = Table(box=None, title="what differs, the largest first", title_justify="left")
    for name in ("parameter", "values", "of", "by", "ULP"):
        worst.add_column(name, justify="left" if name == "parameter" else "right")
    for row in _lines(differing):
        worst.add_row(*row)
    return Group(table, Text(), worst)


def certificate_parts(facts: RunFacts) -> Iterator[Part]:
    """Give the certificate of a run, where it has one."""
    trained = facts.artifacts.get("train")
    certificate = read_certificate(trained) if trained else None
    if certificate is None:
        return
    kind = "text" if certificate.passes else "warning"
    yield Paragraph(text=f"Verified against a plain loop: {certificate.verdict}.", kind=kind)
    rows = list(_facts(certificate))
    yield Grid(title="Certificate", columns=("what", "found"), rows=rows, is_wide=True, holds_words=True)
    if differing := _differing(certificate):
        columns = ("parameter", "values that differ", "of", "largest difference", "ULP")
        yield Grid(title="What differs", columns=columns, rows=_lines(differing))


def _facts(certificate: Certificate) -> Iterator[tuple[str, str]]:
    tables = [one for one in certificate.parameters if one.name.startswith("tables.")]
    layers = len(certificate.parameters) - len(tables)
    values = sum(_size(one) for one in certificate.parameters)
    yield "verdict", f"{certificate.verdict}; promised: equal {certificate.promise}"
    yield "compared", f"{len(tables)} tables and {layers} tensors of dense layers, {values:,} values"
    yield "largest", f"{certificate.worst.largest_difference:.3g}, {certificate.worst.largest_ulp:,} ULP"
    yield (
        "trained",
        f"{certificate.steps:,} steps, {certificate.samples:,} samples, as configured (mode {certificate.mode}, model "
        f"{certificate.model}, {certificate.optimizer}, threads {certificate.threads} on {certificate.device}) and by "
        "nn.EmbeddingBag with every row at hand",
    )
    yield "skipping", certificate.skipping
    yield "not compared", "; ".join(certificate.not_compared)
    yield "batches", f"xxh3 {certificate.batches_xxh3}, seed {certificate.seed}"
    yield "computed by", ", ".join(f"{name} {what}" for name, what in certificate.environment.items() if what)


def _differing(certificate: Certificate) -> list[Comparison]:
    differing = [one for one in certificate.parameters if one.differing]
    return sorted(differing, key=lambda one: -one.largest_difference)[:_MOST_SHOWN]


def _lines(compared: Sequence[Comparison]) -> list[tuple[str, ...]]:
    return [
        (one.name, f"{one.differing:,}", f"{_size(one):,}", f"{one.largest_difference:.3g}", f"{one.largest_ulp:,}")
        for one in compared
    ]


def _size(compared: Comparison) -> int:
    size = 1
    for length in compared.shape:
        size *= length
    return size
