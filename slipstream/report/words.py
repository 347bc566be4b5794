"""Figures as they stand in sentences and tables."""

from __future__ import annotations

import math

import polars as pl

_MOST_LINES = 200


def thinned(frame: pl.DataFrame) -> pl.DataFrame:
    """Give every n-th line and the last, of a frame too long to read."""
    if frame.height <= _MOST_LINES:
        return frame
    every = math.ceil(frame.height / _MOST_LINES)
    return frame.filter((pl.int_range(pl.len()) % every == every - 1) | (pl.int_range(pl.len()) == pl.len() - 1))


def percent(part: int, whole: int) -> str:
    """Give a share in percent; a dash where there is nothing to have a share of."""
    return f"{part / whole:.1%}" if whole else "–"


def number(value: float, digits: int = 4) -> str:
    """Give a figure with so many digits; NaN is undefined."""
    return "undefined" if value != value else f"{value:.{digits}f}"


def counted(number: int, noun: str) -> str:
    """Give a number of things, in the plural where it is one."""
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def least(values: pl.Series) -> float:
    """Give the smallest value of a series."""
    return float(values.to_numpy().min())


def most(values: pl.Series) -> float:
    """Give the largest value of a series."""
    return float(values.to_numpy().max())
