"""Samples of a group of shards in a seeded shuffled order, read ahead by a thread."""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import pairwise
from threading import Lock

import numpy as np

from slipstream.io.samples import PickedSamples, Samples, concat_samples
from slipstream.ops.picks import Arrays, Picks, Window

_PIECES = 8
"""Of a window: each is given up when it is used."""


class SampleStream:
    """One pass over the shards of a group.

    Shards are shuffled, then samples within windows of shards, so memory is bounded and the order depends on
    the seed alone. The next window is loaded while the current one is used, no sooner than it takes for it to be there
    in time: what is used is given up meanwhile, so that there is little more than one window in memory.

    Args:
        loaders: One function per shard that returns its samples.
        sizes: Samples per shard.
        seed: Of this pass; give each epoch its own.
        window_samples: Samples shuffled together, at least one shard.
        workers: Pool that loads, several shards at once; first come, first served.
        clock: Seconds that pass.
    """

    def __init__(
        self,
        loaders: Sequence[Callable[[], Samples]],
        sizes: Sequence[int],
        *,
        seed: Sequence[int],
        window_samples: int,
        workers: ThreadPoolExecutor,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._loaders = loaders
        self._rng = np.random.default_rng(list(seed))
        self._workers, self._sizes, self._clock = workers, list(sizes), clock
        self._windows = self._cut_windows(sizes, window_samples)
        self._next: _Loaded | None = None
        self._window: _Loaded | None = None
        self._passed = 0
        self.remaining = int(sum(sizes))
        """Samples not yet taken."""
        self.gives_picks = False
        """Whether samples come as numbers within their windows, in the same order; set before any is taken."""

    def skip(self, count: int) -> None:
        """Pass over the next `count` samples before any is taken, and begin to load what comes after them.

        Windows that are passed as a whole are not read; what their shuffling would have drawn is drawn all the same,
        so that the order of the others stays.
        """
        if self._window is not None or self._next is not None:
            raise ValueError("expected a stream that nothing was taken from")
        self._passed = min(count, self.remaining)
        self.remaining -= self._passed
        self._load_next()

    def take(self, count: int) -> Samples | None:
        """Give the next `count` samples, fewer at the end, None when there are none left."""
        pieces: list[Samples] = []
        wanted = min(count, self.remaining)
        self.remaining -= wanted
        while wanted:
            if self._window is None or not self._window.remaining:
                if self._next is None:
                    self._load_next()
                assert self._next is not None
                self._next.wait()
                self._window, self._next = self._next, None
                self._window.drop(self._passed)
                self._passed = 0
            if self._next is None and self._window.will_need_the_next(wanted):
                self._load_next()
            piece = self._window.take(wanted)
            wanted -= len(piece)
            pieces.append(piece)
        return concat_samples(pieces) if pieces else None

    def _cut_windows(self, sizes: Sequence[int], window_samples: int) -> Iterator[tuple[list[int], int]]:
        """Give the shards of each window, and how many samples they hold."""
        window: list[int] = []
        num_samples = 0
        for index in self._rng.permutation(len(sizes)).tolist():
            if window and num_samples + sizes[index] > window_samples:
                yield window, num_samples
                window, num_samples = [], 0
            window.append(index)
            num_samples += sizes[index]
        if window:
            yield window, num_samples

    def _load_next(self) -> None:
        for window, size in self._windows:
            if self._passed >= size:
                self._passed -= size
                self._rng.permutation(size)
                continue
            kind = _Numbered if self.gives_picks else _Shuffled
            self._next = kind(self._rng.permutation(size), clock=self._clock)
            self._next.load([(self._loaders[index], self._sizes[index]) for index in window], self._workers)
            return


class _Loaded(ABC):
    """A window: samples shuffled together, which come out of pieces that are given up when they are used.

    Args:
        order: Which of the samples, shard after shard, comes when. Shape (n,).
        clock: Seconds that pass.
    """

    def __init__(self, order: np.ndarray, *, clock: Callable[[], float]) -> None:
        self.size = self.remaining = len(order)
        self._bounds = np.array([0, len(order)])
        self._pieces: list[Samples | None] = []
        self._lock = Lock()
        self._loading: list[Future[None]] = []
        self._clock, self._begun, self._load_seconds = clock, clock(), 0.0

    def load(self, shards: Sequence[tuple[Callable[[], Samples], int]], workers: ThreadPoolExecutor) -> None:
        """Begin to load shards, each with its number of samples."""
        start = 0
        for loader, size in shards:
            self._loading.append(workers.submit(self._load, loader, start, size))
            start += size

    def wait(self) -> None:
        """Wait until all is there; raises what loading raised."""
        while self._loading:
            self._loading.pop(0).result()
        self._finish()
        self._begun = self._clock()

    def will_need_the_next(self, count: int) -> bool:
        """Whether it is time to load the next window, when so many samples are about to be taken.

        That is when as many once more would empty this one, or when it would be empty, at the pace so far, before twice
        the time that loading took.
        """
        used, seconds = self.size - self.remaining, self._clock() - self._begun
        left = self.remaining - count
        return left <= count or (used > 0 and left * seconds <= 2 * self._load_seconds * used)

    def drop(self, count: int) -> None:
        """Pass over the next samples."""
        while count:
            count -= len(self.take(count))

    def take(self, count: int) -> Samples:
        """Give the next samples, at least one and at most `count`, out of one piece, which is given up after them."""
        position = self.size - self.remaining
        at = int(np.searchsorted(self._bounds, position, side="right")) - 1
        begin, end = self._bounds[at : at + 2]
        piece = self._pieces[at]
        assert piece is not None
        taken = piece.take(slice(position - begin, min(position + count, end) - begin))
        self.remaining -= len(taken)
        if position + len(taken) == end:
            self._pieces[at] = None
        return taken

    @abstractmethod
    def _put(self, samples: Samples, start: int) -> None:
        """Keep the samples of a shard, the first of which has this number; called by several threads."""

    @abstractmethod
    def _finish(self) -> None:
        """Do what is left when all shards are there."""

    def _load(self, loader: Callable[[], Samples], start: int, size: int) -> None:
        samples = loader()
        if len(samples) != size:
            raise ValueError(f"expected a shard of {size} samples, found {len(samples)}")
        self._put(samples, start)
        with self._lock:
            self._load_seconds = self._clock() - self._begun


class _Shuffled(_Loaded):
    """Samples in their order: every shard is put where its samples belong as soon as it is there."""

    def __init__(self, order: np.ndarray, *, clock: Callable[[], float]) -> None:
        super().__init__(order, clock=clock)
        self._bounds = np.linspace(0, len(order), min(_PIECES, len(order)) + 1).astype(np.int64)
        self._place_of = np.empty_like(order)
        self._place_of[order] = np.arange(len(order))

    def _put(self, samples: Samples, start: int) -> None:
        with self._lock:
            if not self._pieces:
                self._pieces += [_room_like(samples, stop - begin) for begin, stop in pairwise(self._bounds)]
        places = self._place_of[start : start + len(samples)]
        # the samples by the place they go to, so that those of one piece stand together
        by_place = np.argsort(places)
        cuts = np.searchsorted(places, self._bounds, sorter=by_place)
        for piece, begin, (low, high) in zip(self._pieces, self._bounds, pairwise(cuts), strict=False):
            assert piece is not None
            picked = by_place[low:high]
            at = places[picked] - begin
            piece.X_int[at] = samples.X_int[picked]
            piece.X_cat[at] = samples.X_cat[picked]
            piece.y[at] = samples.y[picked]

    def _finish(self) -> None:
        self._place_of = np.empty(0, np.int64)


class _Numbered(_Loaded):
    """Shards as they are, and numbers in the order of the samples."""

    def __init__(self, order: np.ndarray, *, clock: Callable[[], float]) -> None:
        super().__init__(order, clock=clock)
        self._numbers = order.astype(np.int32)
        self._shards: dict[int, Arrays] = {}

    def _put(self, samples: Samples, start: int) -> None:
        with self._lock:
            self._shards[start] = (samples.X_int, samples.X_cat, samples.y)

    def _finish(self) -> None:
        if not self._pieces:
            window = Window([self._shards[start] for start in sorted(self._shards)])
            self._pieces = [PickedSamples(Picks(windows=(window,), numbers=self._numbers))]
            self._shards = {}


def _room_like(samples: Samples, count: int) -> Samples:
    """Room for so many samples of the same kind."""
    return Samples(
        X_int=np.empty((count, *samples.X_int.shape[1:]), samples.X_int.dtype),
        X_cat=np.empty((count, *samples.X_cat.shape[1:]), samples.X_cat.dtype),
        y=np.empty(count, samples.y.dtype),
    )
