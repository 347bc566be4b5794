"""Samples of a round to batches: pure hot and pure cold ones stand in a seeded random order.

What does not fill a batch waits for the next round.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from slipstream.embedding.tiers.lookahead import Batch
from slipstream.io.samples import Samples, concat_samples


class BatchMaker:
    """Turns the samples of rounds into batches of one size.

    Args:
        batch_size: Samples per batch; only the last hot and the last cold batch of an epoch may be shorter.
        order: `interleaved` keeps batches pure, `mixed` shuffles hot and cold samples together.
    """

    def __init__(self, *, batch_size: int, order: str) -> None:
        self._batch_size, self._order = batch_size, order
        self.waiting: dict[str, Samples] = {}
        """Samples that did not fill a batch yet, per kind of batch."""

    def make(
        self, hot: Samples | None, cold: Samples | None, *, rng: np.random.Generator, last: bool
    ) -> Iterator[Batch]:
        """Batches of a round.

        Args:
            hot: Hot samples to train on, in order.
            cold: Cold samples to train on, in order.
            rng: Draws the order of batches.
            last: Whether the epoch ends; then nothing is left waiting.
        """
        if self._order == "mixed":
            both = [piece for piece in (hot, cold) if piece is not None]
            mixed = concat_samples(both) if both else None
            mixed = mixed.take(rng.permutation(len(mixed))) if mixed is not None else None
            yield from self._cut("cold", mixed, last)
            return
        batches = {"hot": self._cut("hot", hot, last), "cold": self._cut("cold", cold, last)}
        kinds = np.repeat([0, 1], [len(batches["hot"]), len(batches["cold"])])
        sources = (iter(batches["hot"]), iter(batches["cold"]))
        for kind in rng.permutation(kinds).tolist():
            yield next(sources[kind])

    def _cut(self, kind: str, samples: Samples | None, last: bool) -> list[Batch]:
        pieces = [piece for piece in (self.waiting.pop(kind, None), samples) if piece is not None]
        if not pieces:
            return []
        stacked = concat_samples(pieces)
        stop = len(stacked) if last else len(stacked) - len(stacked) % self._batch_size
        batches = cut_batches(stacked.take(slice(0, stop)), batch_size=self._batch_size, is_hot=kind == "hot")
        if stop < len(stacked):
            self.waiting[kind] = stacked.take(slice(stop, None))
        return batches


def cut_batches(samples: Samples, *, batch_size: int, is_hot: bool) -> list[Batch]:
    """Give samples in batches, in order; the last may be shorter."""
    pieces = (samples.take(slice(at, at + batch_size)) for at in range(0, len(samples), batch_size))
    return [
        Batch(dense=piece.X_int, slots=piece.X_cat, labels=piece.y, is_hot=is_hot, weights=piece.weights)
        for piece in pieces
    ]
