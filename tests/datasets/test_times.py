"""Times of tables: whole periods since 1970, as Python's datetime counts them."""

from __future__ import annotations

import datetime as dt

import polars as pl
import pytest
from hypothesis import given
from hypothesis import strategies as st

from slipstream.datasets.times import count_periods

SECONDS = {"day": 86_400, "hour": 3_600, "minute": 60}
ZONES = st.builds(lambda minutes: dt.timezone(dt.timedelta(minutes=minutes)), st.integers(-14 * 60, 14 * 60))


@given(
    time=st.datetimes(min_value=dt.datetime(1902, 1, 1), max_value=dt.datetime(2200, 1, 1), timezones=ZONES),
    period=st.sampled_from(sorted(SECONDS)),
    separator=st.sampled_from(" T"),
)
def test_iso_text_counts_as_datetime_does(time: dt.datetime, period: str, separator: str):
    expected = int(time.replace(microsecond=0).timestamp()) // SECONDS[period]
    assert count_periods(pl.Series([time.isoformat(separator)]), period).to_list() == [expected]


@given(seconds=st.integers(10**9, 10**10), period=st.sampled_from(sorted(SECONDS)))
def test_the_unit_of_a_unix_time_is_known_by_its_size(seconds: int, period: str):
    written = [str(seconds), f"{seconds}.5", *(str(seconds * finer) for finer in (10**3, 10**6, 10**9))]
    assert set(count_periods(pl.Series(written), period).to_list()) == {seconds // SECONDS[period]}


@pytest.mark.parametrize(
    "text", ["2024-05-01", "2024-05-01Z", "2024-05-01 00:00", "2024-05-01T23:59:60,5Z", "1714521600"]
)
def test_less_than_a_full_time_will_do(text: str):
    expected = (dt.date(2024, 5, 1) - dt.date(1970, 1, 1)).days + ("23:59:60" in text)
    assert count_periods(pl.Series([text]), "day").to_list() == [expected]


@pytest.mark.parametrize(
    "text", ["yesterday", "2024-02-30", "2024-05-01T25:00", "01/05/2024", "nan", "inf", "1e30", None]
)
def test_what_is_no_time_is_null(text: str | None):
    assert count_periods(pl.Series([text], dtype=pl.String), "day").to_list() == [None]
