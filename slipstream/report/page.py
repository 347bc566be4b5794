"""Sections, tables and charts to one HTML file that loads nothing."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from html import escape
from pathlib import Path
from typing import Any

from slipstream.errors import ConfigError
from slipstream.io.artifacts import write_atomically

_HERE = Path(__file__).parent
_POLICY = "default-src 'none'; script-src 'unsafe-inline' 'unsafe-eval'; style-src 'unsafe-inline'; img-src data:"
"""What the page may load: nothing. Vega makes functions of its expressions, which is what `unsafe-eval` allows."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Paragraph:
    """Text."""

    text: str
    kind: str = ""
    """CSS class: `warning`, `note`."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Figure:
    """A chart."""

    title: str
    spec: dict[str, Any]
    """Vega-Lite."""
    alt: str
    """What it shows, in words, for those who do not see it."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Grid:
    """A table; the first column names what a line is about."""

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]
    is_wide: bool = False
    """Whether it takes the width of the page."""
    holds_words: bool = False
    """Whether its cells are sentences, which begin at the left and go on in the next line, and no numbers."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Code:
    """Text as it is typed."""

    title: str
    text: str


Part = Paragraph | Figure | Grid | Code


@dataclass(frozen=True, kw_only=True, slots=True)
class Section:
    """A part of the page that the table of contents names."""

    title: str
    parts: Sequence[Part]


@dataclass(frozen=True, kw_only=True, slots=True)
class Page:
    """All that stands on a page."""

    title: str
    subtitle: str
    highlights: Sequence[tuple[str, str]] = field(default_factory=list)
    """What a person asks for first: label and figure."""
    sections: Sequence[Section] = field(default_factory=list)


def require_charts() -> None:
    """Make sure that what draws charts is installed.

    Raises:
        ConfigError: It is not.
    """
    missing = [name for name in ("altair", "vl_convert") if importlib.util.find_spec(name) is None]
    if missing:
        raise ConfigError(
            f"an HTML report needs {' and '.join(f'`{name}`' for name in missing)}, not installed here",
            hint="pip install 'slipstream[report]'",
        )


def write_page(page: Page, path: Path) -> int:
    """Write a page, whole or not at all; returns its bytes."""
    body = render_page(page).encode()
    with write_atomically(path, needed_bytes=len(body)) as partial:
        partial.write_bytes(body)
    return len(body)


def render_page(page: Page) -> str:
    """Give the HTML of a page, styles, libraries and data included."""
    from slipstream.report.charts import CONFIG

    specs: list[dict[str, Any]] = []
    sections = "\n".join(_section(number, section, specs) for number, section in enumerate(page.sections, 1))
    contents = "\n".join(
        f'<li><a href="#section-{number}">{escape(section.title)}</a></li>'
        for number, section in enumerate(page.sections, 1)
    )
    highlights = "\n".join(f"<div><dt>{escape(k)}</dt><dd>{escape(v)}</dd></div>" for k, v in page.highlights)
    if highlights:
        highlights = f'<dl class="highlights">\n{highlights}\n</dl>'
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="{_POLICY}">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<link rel="icon" href="data:,">
<title>{escape(page.title)}</title>
<style>
{_read("page.css")}</style>
</head>
<body>
<a class="skip-link" href="#content">Skip to the content</a>
<header>
<h1>{escape(page.title)}</h1>
<p>{escape(page.subtitle)}</p>
</header>
<nav aria-label="Contents">
<ol>
{contents}
</ol>
</nav>
<main id="content">
{highlights}
<noscript><p class="warning">Charts are drawn by JavaScript, which is off. The tables hold their figures.</p></noscript>
{sections}
</main>
<script>{_libraries()}</script>
<script type="application/json" id="charts">{_as_script({"config": CONFIG, "specs": specs})}</script>
<script>
{_read("page.js")}</script>
</body>
</html>
"""


def _libraries() -> str:
    """Vega, Vega-Lite and Vega-Embed, as one script."""
    import vl_convert

    return str(vl_convert.javascript_bundle("window.vegaEmbed = vegaEmbed;"))


def _section(number: int, section: Section, specs: list[dict[str, Any]]) -> str:
    name = f"section-{number}"
    parts = "\n".join(_part(part, specs) for part in section.parts)
    return (
        f'<section id="{name}" aria-labelledby="{name}-title">\n<h2 id="{name}-title">{escape(section.title)}</h2>\n'
        f'<div class="parts">\n{parts}\n</div>\n</section>'
    )


def _part(part: Part, specs: list[dict[str, Any]]) -> str:
    match part:
        case Paragraph():
            return f'<p class="{escape(part.kind or "text")}">{escape(part.text)}</p>'
        case Figure():
            specs.append(part.spec)
            return (
                f'<figure>\n<figcaption>{escape(part.title)}</figcaption>\n<div class="chart" role="img" '
                f'data-chart="{len(specs) - 1}" aria-label="{escape(part.alt)}"></div>\n</figure>'
            )
        case Grid():
            return _grid(part)
        case Code():
            return (
                f'<figure class="wide">\n<figcaption>{escape(part.title)}</figcaption>\n'
                f'<pre tabindex="0">{escape(part.text)}</pre>\n</figure>'
            )


def _grid(grid: Grid) -> str:
    name = "table" + " wide" * grid.is_wide + " words" * grid.holds_words
    head = _cells("th", grid.columns, 'scope="col"')
    body = "\n".join(f"<tr>{_row(row)}</tr>" for row in grid.rows)
    return (
        f'<div class="{name}" tabindex="0" role="region" aria-label="{escape(grid.title)}">\n<table>\n'
        f"<caption>{escape(grid.title)}</caption>\n<thead><tr>{head}</tr></thead>\n<tbody>\n{body}\n</tbody>\n"
        "</table>\n</div>"
    )


def _row(row: Sequence[str]) -> str:
    return _cells("th", row[:1], 'scope="row"') + _cells("td", row[1:])


def _cells(tag: str, texts: Iterable[str], attributes: str = "") -> str:
    return "".join(f"<{tag} {attributes}>{escape(text)}</{tag}>" for text in texts).replace(f"<{tag} >", f"<{tag}>")


def _as_script(value: object) -> str:
    """JSON that cannot end the element it stands in, whatever its texts say."""
    return json.dumps(value, separators=(",", ":"), allow_nan=False).replace("<", "\\u003c")


def _read(name: str) -> str:
    return (_HERE / name).read_text(encoding="utf-8")
