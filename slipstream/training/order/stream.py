"""Samples of a group of shards in a seeded shuffled order, read ahead by a thread."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor

import numpy as np

from slipstream.io.samples import PickedSamples, Samples, concat_samples
from slipstream.ops.picks import Picks, Window


class SampleStream:
    """One pass over the shards of a group.

    Shards are shuffled, then samples within windows of shards, so memory is bounded and the order depends on
    the seed alone. The next window is loaded while the current one is used.

    Args:
        loaders: One function per shard that returns its samples.
        sizes: Samples per shard.
        seed: Of this pass; give each epoch its own.
        window_samples: Samples shuffled together, at least one shard.
        workers: Pool that loads, several shards at once; first come, first served.
    """

    def __init__(
        self,
        loaders: Sequence[Callable[[], Samples]],
        sizes: Sequence[int],
        *,
        seed: Sequence[int],
        window_samples: int,
        workers: ThreadPoolExecutor,
    ) -> None:
        self._loaders = loaders
        self._rng = np.random.default_rng(list(seed))
        self._workers = workers
        self._windows = self._cut_windows(sizes, window_samples)
        self._next: Future[Samples] | None = None
        self._window: Samples | None = None
        self._used = 0
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
            if self._window is None or self._used == len(self._window):
                if self._next is None:
                    self._load_next()
                assert self._next is not None
                self._window, self._used, self._passed = self._next.result(), self._passed, 0
                self._load_next()
                continue
            piece = self._window.take(slice(self._used, self._used + wanted))
            self._used += len(piece)
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
        self._next = None
        for window, size in self._windows:
            if self._passed >= size:
                self._passed -= size
                self._rng.permutation(size)
                continue
            # the pool takes tasks in this order, so the last one never waits for one that has no worker
            shards = [self._workers.submit(self._loaders[index]) for index in window]
            self._next = self._workers.submit(self._shuffle, shards)
            return

    def _shuffle(self, shards: list[Future[Samples]]) -> Samples:
        loaded = [shard.result() for shard in shards]
        if self.gives_picks:
            picks = Picks.all_of(Window([(samples.X_int, samples.X_cat, samples.y) for samples in loaded]))
            self._rng.shuffle(picks.numbers)  # draws what a permutation draws, and ends in its order
            return PickedSamples(picks)
        samples = concat_samples(loaded)
        return samples.take(self._rng.permutation(len(samples)))
