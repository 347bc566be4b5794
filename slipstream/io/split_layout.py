"""Which sample of the parsed chunks goes to which split and part.

The split is known only after the last line, when every chunk is parsed; assignments are made again chunk by chunk
wherever they are needed, so that memory does not grow with the number of samples.
"""

from __future__ import annotations

import collections
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from slipstream.errors import DataError
from slipstream.io.parsed import ParsedChunk, ParsedStore
from slipstream.ops import split as splits
from slipstream.schema import LABEL, SPLITS

_KEPT_CODES = 64


@dataclass(frozen=True, slots=True)
class Piece:
    """Samples of one chunk that belong to one part."""

    chunk_index: int
    first: int
    """Position among the chunk's samples of the split."""
    stop: int


class SplitLayout:
    """Assigns every sample to a split by its position, chunk by chunk.

    Args:
        rule: `preprocess.split`.
        chunks: Of all files, in order.
        store: Holds them.
        seed: Of split `random` and of negatives left out.
        negative_keep_ratio: Share of the training split's negatives to keep, in (0, 1].

    Raises:
        DataError: A split would be empty, or a split by days finds only one.
    """

    def __init__(
        self,
        rule: str,
        chunks: Sequence[ParsedChunk],
        *,
        store: ParsedStore,
        seed: int,
        negative_keep_ratio: float,
    ) -> None:
        self.chunks, self.store = chunks, store
        self._rule, self._seed, self._keep_ratio = rule, seed, negative_keep_ratio
        sizes = [chunk.num_samples for chunk in chunks]
        self._starts = np.concatenate([[0], np.cumsum(sizes)]).astype(np.int64)
        self._bounds = splits.chronological_bounds(int(self._starts[-1]))
        self._held_out = self._find_held_out_days() if rule in ("by_day", "by_time") else None
        self._recent_codes: dict[int, np.ndarray] = {}
        counts = [[self._count(index, code) for code in range(len(SPLITS))] for index in range(len(chunks))]
        self._ends = np.cumsum(np.array(counts, np.int64), axis=0)
        self.totals = {name: int(self._ends[-1][code]) for code, name in enumerate(SPLITS)}
        self.num_left_out = int(self._starts[-1]) - sum(self.totals.values())
        if min(self.totals.values()) == 0:
            raise DataError(
                f"split `{rule}` leaves a split without samples: {self.totals}",
                hint="give more samples, or choose another `preprocess.split`",
            )

    def __getstate__(self) -> dict[str, Any]:
        """Give what another process needs of it: all but assignments, which are quickly made again."""
        return vars(self) | {"_recent_codes": {}}

    @property
    def num_samples(self) -> int:
        """Samples of all chunks, whatever their split."""
        return int(self._starts[-1])

    def samples_of(self, chunk_index: int) -> slice:
        """Where the samples of a chunk stand among those of all chunks."""
        return slice(int(self._starts[chunk_index]), int(self._starts[chunk_index + 1]))

    def members(self, chunk_index: int, code: int) -> slice | np.ndarray:
        """Which samples of a chunk belong to a split, in order: a slice where they are neighbours."""
        start, stop = int(self._starts[chunk_index]), int(self._starts[chunk_index + 1])
        if self._rule == "chronological" and self._keep_ratio == 1:
            train_end, test_end = self._bounds
            ranges = {splits.TRAIN: (0, train_end), splits.TEST: (train_end, test_end), splits.VAL: (test_end, stop)}
            first, last = (min(max(bound, start), stop) - start for bound in ranges[code])
            return slice(first, max(first, last))
        return np.flatnonzero(self._codes(chunk_index) == code)

    def count_positives(self) -> dict[str, int]:
        """Count the samples with label 1 in each split."""
        positives = dict.fromkeys(SPLITS, 0)
        for index, chunk in enumerate(self.chunks):
            labels = self.store.open(chunk, [LABEL]).column(LABEL).to_numpy()
            for code, name in enumerate(SPLITS):
                positives[name] += int(labels[self.members(index, code)].sum(dtype=np.int64))
        return positives

    def _count(self, chunk_index: int, code: int) -> int:
        members = self.members(chunk_index, code)
        return members.stop - members.start if isinstance(members, slice) else len(members)

    def _codes(self, chunk_index: int) -> np.ndarray:
        codes = self._recent_codes.get(chunk_index)
        if codes is None:
            if len(self._recent_codes) >= _KEPT_CODES:
                self._recent_codes.clear()
            codes = self._recent_codes[chunk_index] = self._assign(chunk_index)
        return codes

    def _assign(self, chunk_index: int) -> np.ndarray:
        start, stop = int(self._starts[chunk_index]), int(self._starts[chunk_index + 1])
        if self._rule == "chronological":
            codes = splits.assign_by_bounds(start, stop, *self._bounds)
        elif self._rule == "random":
            codes = splits.assign_randomly(start, stop, seed=self._seed)
        else:
            codes = self._assign_by_day(chunk_index)
        if self._keep_ratio < 1:
            labels = self.store.open(self.chunks[chunk_index], [LABEL]).column(LABEL).to_numpy()
            kept = splits.sample_negatives(start, labels, keep_ratio=self._keep_ratio, seed=self._seed)
            codes[(codes == splits.TRAIN) & ~kept] = splits.LEFT_OUT
        return codes

    def _assign_by_day(self, chunk_index: int) -> np.ndarray:
        assert self._held_out is not None
        first_day, num_held_out, seen_before = self._held_out
        is_late = (self.days_of(chunk_index) >= first_day).astype(np.int64)
        ranks = np.cumsum(is_late) - 1 + seen_before[chunk_index]
        return splits.assign_by_day(is_late, ranks, last_day=1, last_count=num_held_out)

    def pieces(self, code: int, first: int, stop: int) -> Iterator[Piece]:
        """Where the samples first..stop-1 of a split lie."""
        ends = self._ends[:, code]
        for index in range(int(np.searchsorted(ends, first, side="right")), len(ends)):
            before = int(ends[index - 1]) if index else 0
            if before >= stop:
                return
            yield Piece(index, max(first - before, 0), min(stop, int(ends[index])) - before)

    def _find_held_out_days(self) -> tuple[int, int, list[int]]:
        """(first day held out, samples held out, those of them before each chunk)."""
        per_day: collections.Counter[int] = collections.Counter()
        for chunk in self.chunks:
            per_day.update({int(day): count for day, count in chunk.day_counts.items()})
        if len(per_day) < 2:
            raise DataError(
                f"split `{self._rule}` needs samples of at least two days, found {len(per_day)}",
                hint="list one raw file per day, or set preprocess.split = 'chronological'",
            )
        first_day = max(per_day) if self._rule == "by_day" else splits.latest_seventh(per_day)
        in_chunk = [
            sum(count for day, count in chunk.day_counts.items() if int(day) >= first_day) for chunk in self.chunks
        ]
        seen_before = [int(value) for value in np.cumsum(in_chunk) - in_chunk]
        return first_day, sum(in_chunk), seen_before

    def days_of(self, chunk_index: int) -> np.ndarray:
        """Give the day of each sample of a chunk; the number of the raw file where the source tells none."""
        chunk = self.chunks[chunk_index]
        if len(chunk.day_counts) == 1:
            return np.full(chunk.num_samples, int(next(iter(chunk.day_counts))))
        return self.store.open(chunk, ["day"]).column("day").to_numpy()  # type: ignore[no-any-return]
