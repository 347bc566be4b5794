"""Samples given by their numbers within windows, so that nobody copies them before somebody asks for their values.

A window is what is read and shuffled together. Shuffling a window, cutting it into batches and leaving samples out are
then work on numbers: four bytes a sample instead of all of its values.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np

FIELDS = ("dense", "slots", "labels")
"""The arrays that samples consist of, in this order everywhere; their first axis is the sample."""
Arrays = tuple[np.ndarray, np.ndarray, np.ndarray]


class Window:
    """Samples that stand one behind the other, in pieces.

    Args:
        pieces: Arrays of the samples of each piece, at least one; in the order of `FIELDS`.
    """

    def __init__(self, pieces: Sequence[Arrays]) -> None:
        self.pieces = list(pieces)
        self._num_samples = sum(len(labels) for *_, labels in pieces)

    def __len__(self) -> int:
        """Count the samples."""
        return self._num_samples

    def gather(self, field: str, numbers: np.ndarray) -> np.ndarray:
        """Give one array of some samples; joins the pieces for good when it is first asked.

        Args:
            field: One of `FIELDS`.
            numbers: In [0, n), which nobody checks. Shape (k,), integer.
        """
        if len(self.pieces) > 1:
            dense, slots, labels = (np.concatenate(arrays) for arrays in zip(*self.pieces, strict=True))
            self.pieces = [(dense, slots, labels)]
        (arrays,) = self.pieces
        # the bounds are known, and with a mode numpy takes rows twice as fast
        taken: np.ndarray = arrays[FIELDS.index(field)].take(numbers, axis=0, mode="clip")
        return taken


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Picks:
    """Samples of windows, in any order."""

    windows: tuple[Window, ...]
    numbers: np.ndarray
    """As if the windows stood one behind the other. Shape (n,), int32."""
    weights: np.ndarray | None = None
    """Of each sample, in the order of `numbers`; None is 1 for all. Shape (n,), float32."""

    @classmethod
    def all_of(cls, window: Window, weights: np.ndarray | None = None) -> Picks:
        """Give every sample of a window, in order."""
        return cls(windows=(window,), numbers=np.arange(len(window), dtype=np.int32), weights=weights)

    def __len__(self) -> int:
        """Count the samples."""
        return len(self.numbers)

    def take(self, picked: np.ndarray | slice) -> Picks:
        """Give some of them; `picked` is a slice, which copies nothing, or anything that indexes an array."""
        weights = None if self.weights is None else self.weights[picked]
        return replace(self, numbers=self.numbers[picked], weights=weights)

    def starts(self) -> list[int]:
        """Say at which number each window begins."""
        starts, total = [], 0
        for window in self.windows:
            starts.append(total)
            total += len(window)
        return starts

    def gather(self, field: str) -> np.ndarray:
        """Give one array of the samples, copied from their windows; `field` is one of `FIELDS`."""
        if len(self.windows) == 1:
            return self.windows[0].gather(field, self.numbers)
        at = np.searchsorted(self.starts(), self.numbers, side="right") - 1
        gathered: np.ndarray | None = None
        for index, (window, start) in enumerate(zip(self.windows, self.starts(), strict=True)):
            places = np.flatnonzero(at == index)
            values = window.gather(field, self.numbers[places] - start)
            if gathered is None:
                gathered = np.empty((len(self), *values.shape[1:]), values.dtype)
            gathered[places] = values
        assert gathered is not None
        return gathered


def join(parts: Sequence[Picks]) -> Picks:
    """Give the samples of all parts, in order; at least one part."""
    if len(parts) == 1:
        return parts[0]
    windows: list[Window] = []
    numbers, start = [], 0
    for part in parts:
        numbers.append(part.numbers + np.int32(start))
        windows += part.windows
        start += sum(map(len, part.windows))
    weights = None
    if any(part.weights is not None for part in parts):
        weights = np.concatenate([np.ones(len(p), np.float32) if p.weights is None else p.weights for p in parts])
    return Picks(windows=tuple(windows), numbers=np.concatenate(numbers), weights=weights)


class FreeRanges:
    """Which places of a row of them are free, in ranges.

    Args:
        num_places: How many there are; all are free.
    """

    def __init__(self, num_places: int) -> None:
        self._free = [(0, num_places)] if num_places else []

    def __len__(self) -> int:
        """Count the free places."""
        return sum(stop - start for start, stop in self._free)

    def take(self, count: int) -> list[tuple[int, int]]:
        """Take places, lowest first: the ranges (start, stop) that they form.

        Raises:
            ValueError: So many are not free.
        """
        if count > len(self):
            raise ValueError(f"expected at most {len(self):,} places, found {count:,}")
        taken = []
        while count:
            start, stop = self._free.pop(0)
            if stop - start > count:
                self._free.insert(0, (start + count, stop))
                stop = start + count
            taken.append((start, stop))
            count -= stop - start
        return taken

    def give(self, ranges: Sequence[tuple[int, int]]) -> None:
        """Give places back that were taken."""
        merged: list[tuple[int, int]] = []
        for start, stop in sorted([*self._free, *ranges]):
            if merged and merged[-1][1] == start:
                merged[-1] = (merged[-1][0], stop)
            else:
                merged.append((start, stop))
        self._free = merged


Place = Callable[[Window], Sequence[tuple[int, int]]]
"""The ranges (start, stop) that a window's samples lie in, in order."""


def shifts(picks: Picks, place: Place) -> list[tuple[int, int]]:
    """Say how far samples lie from their numbers: (first number, what to add from there on), ascending.

    Args:
        picks: The samples.
        place: Where their windows lie.
    """
    found = []
    for window, start in zip(picks.windows, picks.starts(), strict=True):
        for first, stop in place(window):
            found.append((start, first - start))
            start += stop - first
    return found


def locate(numbers: np.ndarray, shifted: Sequence[tuple[int, int]], out: np.ndarray) -> None:
    """Say where samples lie.

    Args:
        numbers: Of the samples. Shape (n,), int32.
        shifted: As `shifts` gives it.
        out: Where to put the places. Shape (n,), int32.
    """
    added = shifted[0][1]
    np.add(numbers, np.int32(added), out=out)
    for start, shift in shifted[1:]:
        # those from here on were given the shift of the range before
        if shift != added:
            np.add(out, np.int32(shift - added), out=out, where=numbers >= start)
            added = shift
