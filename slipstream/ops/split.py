"""Which samples train, which test: rules on sample positions alone.

Every rule is a pure function of positions (and days), so any block of samples can be assigned on its own, in
any order, with the same answer.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

import numpy as np

TRAIN, VAL, TEST = 0, 1, 2
"""Codes of the splits, in the order of `schema.SPLITS`."""
LEFT_OUT = 3
"""Code of a sample that no split takes."""

_SEVENTHS: Final = 7
_NEGATIVE_STREAM: Final = 0x6E6567 << 32  # apart from the seeds of split `random`


def chronological_bounds(num_samples: int) -> tuple[int, int]:
    """Where training ends and where testing ends, when samples stand in order of time.

    Six sevenths train; the first half of the last seventh tests, its second half validates. Uneven numbers
    fall as numpy.array_split lets them: earlier parts are larger.

    Returns:
        (end of train, end of test); validation goes on to `num_samples`.

    Source: DLRM's Criteo Kaggle reader, which cuts the file in seven days.
    """
    last = num_samples // _SEVENTHS
    train_end = num_samples - last
    return train_end, train_end + (last + 1) // 2


def assign_by_bounds(start: int, stop: int, train_end: int, test_end: int) -> np.ndarray:
    """Split codes of the samples start..stop-1. Shape (stop - start,), uint8."""
    positions = np.arange(start, stop)
    codes = np.full(stop - start, TRAIN, np.uint8)
    codes[positions >= train_end] = TEST
    codes[positions >= test_end] = VAL
    return codes


def assign_randomly(start: int, stop: int, *, seed: int) -> np.ndarray:
    """Split codes drawn per position: 6/7 train, 1/14 test, 1/14 validation. Shape (stop - start,), uint8."""
    draws = hash_positions(start, stop, seed=seed) % np.uint64(2 * _SEVENTHS)
    codes = np.full(stop - start, TRAIN, np.uint8)
    codes[draws == 12] = TEST
    codes[draws == 13] = VAL
    return codes


def assign_by_day(days: np.ndarray, rank_in_day: np.ndarray, *, last_day: int, last_count: int) -> np.ndarray:
    """Split codes when the last day is held out: its first half tests, its second half validates.

    Args:
        days: Day of each sample. Shape (n,).
        rank_in_day: How many samples of the last day came before. Shape (n,); used where `days == last_day`.
        last_day: The day held out.
        last_count: Samples of that day in all.

    Returns:
        Shape (n,), uint8.
    """
    codes = np.full(len(days), TRAIN, np.uint8)
    held_out = days == last_day
    codes[held_out & (rank_in_day < (last_count + 1) // 2)] = TEST
    codes[held_out & (rank_in_day >= (last_count + 1) // 2)] = VAL
    return codes


def latest_seventh(per_day: Mapping[int, int]) -> int:
    """Give the first of the days to hold out: as many whole days from the end as make up a seventh of all at most.

    Args:
        per_day: Samples of each day; at least two days. Days may be any periods that are numbered in order of time.

    Returns:
        The first day held out; the last day alone, where that has more than a seventh.
    """
    days = sorted(per_day, reverse=True)
    first, held_out, total = days[0], per_day[days[0]], sum(per_day.values())
    for day in days[1:-1]:
        held_out += per_day[day]
        if held_out * _SEVENTHS > total:
            break
        first = day
    return first


def sample_negatives(start: int, labels: np.ndarray, *, keep_ratio: float, seed: int) -> np.ndarray:
    """Which samples stay when only a share of the negatives does.

    Args:
        start: Position of the first sample.
        labels: 0 or 1. Shape (n,).
        keep_ratio: Share of the negatives that stay, in (0, 1].
        seed: Draws them, position by position.

    Returns:
        Shape (n,), bool; true for every positive.
    """
    draws = hash_positions(start, start + len(labels), seed=seed + _NEGATIVE_STREAM)
    kept: np.ndarray = (labels != 0) | (draws >> np.uint64(11) < np.uint64(round(keep_ratio * 2.0**53)))
    return kept


def hash_positions(start: int, stop: int, *, seed: int) -> np.ndarray:
    """Give a 64-bit hash of each position and the seed. Shape (stop - start,), uint64.

    Source: the finaliser of SplitMix64 (Steele, Lea, Flood, OOPSLA 2014).
    """
    with np.errstate(over="ignore"):
        word = np.arange(start, stop, dtype=np.uint64) + np.uint64(seed + 1) * np.uint64(0x9E3779B97F4A7C15)
        return mix64(word)


def mix64(word: np.ndarray) -> np.ndarray:
    """Mix 64-bit words so that close inputs land far apart. Same shape, uint64."""
    with np.errstate(over="ignore"):
        word = (word ^ (word >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        word = (word ^ (word >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        mixed: np.ndarray = word ^ (word >> np.uint64(31))
    return mixed
