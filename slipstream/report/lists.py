"""What a run's lists of values were like, in words."""

from __future__ import annotations

from collections.abc import Iterator

from slipstream.io.figures import PreprocessFigures


def describe_lists(encoded: PreprocessFigures) -> Iterator[str]:
    """Say of each list how many values a sample has, and what was cut off."""
    total = encoded.lines - encoded.rejected
    for bag in encoded.bags or ():
        table = f"cat_{bag.columns[0]}"
        found = (encoded.lists or {})[table]
        name = (encoded.columns or {}).get(table, table)
        cut = f"{found.cut:,} longer than {len(bag.columns)} and cut" if found.cut else "none cut"
        yield f"{name}: {found.values / max(total, 1):.1f} values a sample, {found.empty:,} empty, {cut}"
