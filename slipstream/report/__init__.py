"""How results are shown: tables and progress on the terminal, JSON, and an HTML page with charts.

terminal.py   Rich renderables
sizes.py      the same, of what hardware a pipeline needs
tuning.py     the same, of a search for better settings
document.py   the JSON document of a run
lists.py, mixed.py   what lists of values were like, and what mixed tables are stored in, in words
facts.py      what a run left behind, read from its artifacts and condensed
charts.py     frames to Altair charts
page.py       sections, tables and charts to one HTML file
reproduction.py   what became of making an artifact again
certificate.py   a certificate of exactness, for terminal and page
run_page.py, compare_page.py   what stands on the page of a run, and of a comparison
"""

from slipstream.report.sizes import sizes_table
from slipstream.report.terminal import (
    RichProgress,
    comparison_table,
    curve_table,
    guess_table,
    manifest_table,
    plan_table,
    run_table,
    score_table,
    show_bytes,
    stage_line,
)

__all__ = [
    "RichProgress",
    "comparison_table",
    "curve_table",
    "guess_table",
    "manifest_table",
    "plan_table",
    "run_table",
    "score_table",
    "show_bytes",
    "sizes_table",
    "stage_line",
]
