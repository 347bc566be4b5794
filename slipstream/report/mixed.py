"""What mixed tables are stored in, in words."""

from __future__ import annotations

from slipstream.io.capacity import show_bytes
from slipstream.io.figures import MixedFigures


def describe_mixed(mixed: MixedFigures) -> str:
    """Say how many rows have how many bits, how many share, and what all take."""
    parts = [f"{count:,} rows of {stored} bits" for stored, count in mixed.rows.items()]
    if mixed.shared:
        parts.append(f"{mixed.shared:,} share row 0 of their table")
    return f"{', '.join(parts)}: {show_bytes(mixed.bytes)} of {show_bytes(mixed.fp32_bytes)}"
