"""Times as tables write them, Unix numbers or ISO text, to whole periods since 1970."""

from __future__ import annotations

import polars as pl

EXPECTED_TIME = "Unix time or ISO text such as 2024-05-01T12:30:00Z"
_PERIOD_SECONDS = {"day": 86_400, "hour": 3_600, "minute": 60}
_ISO = (
    r"^(?<date>\d{4}-\d{2}-\d{2})"
    r"(?:[T ](?<hour>[01]\d|2[0-3]):(?<minute>[0-5]\d)(?::(?<second>[0-5]\d|60)(?:[.,]\d+)?)?)?"
    r" ?(?:Z|(?<sign>[+-])(?<off_hour>[01]\d):?(?<off_minute>[0-5]\d))?$"
)
# A number of seconds this large lies beyond the year 5000: it counts milliseconds, then microseconds, then nanoseconds
_FINER = ((1e11, 1e3), (1e14, 1e6), (1e17, 1e9))
_LARGEST = 1e20


def count_periods(text: pl.Series, period: str) -> pl.Series:
    """Count whole periods from 1970 to each time.

    Args:
        text: Times as text: Unix seconds, milliseconds, microseconds or nanoseconds, told apart by their size; or ISO
            dates with or without a time of day and a zone. UTC where there is none.
        period: `day`, `hour` or `minute`.

    Returns:
        Int64, null where the text is no time.
    """
    number = text.cast(pl.Float64, strict=False)
    number = number.set(~number.is_finite().fill_null(value=False) | (number.abs() >= _LARGEST), None)
    seconds = number
    for least, divisor in _FINER:
        seconds = seconds.set((number.abs() >= least).fill_null(value=False), None).fill_null(number / divisor)
    if seconds.null_count() > text.null_count():
        seconds = seconds.fill_null(_iso_seconds(text))
    return (seconds / _PERIOD_SECONDS[period]).floor().cast(pl.Int64)


def _iso_seconds(text: pl.Series) -> pl.Series:
    parts = text.str.extract_groups(_ISO).struct.unnest()
    clock = {name: pl.col(name).cast(pl.Int64).fill_null(0) for name in ("hour", "minute", "second")}
    zone = pl.col("off_hour").cast(pl.Int64).fill_null(0) * 3600 + pl.col("off_minute").cast(pl.Int64).fill_null(0) * 60
    days = pl.col("date").str.to_date("%Y-%m-%d", strict=False).cast(pl.Int32).cast(pl.Int64)
    seconds = days * 86_400 + clock["hour"] * 3600 + clock["minute"] * 60 + clock["second"]
    seconds -= pl.when(pl.col("sign") == "-").then(-zone).otherwise(zone)
    return parts.select(seconds.cast(pl.Float64)).to_series()
