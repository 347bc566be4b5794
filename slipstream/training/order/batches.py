"""Samples of a round to batches: pure hot and pure cold ones stand in a seeded random order.

What does not fill a batch waits for the next round.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from slipstream.embedding.tiers.lookahead import Batch
from slipstream.embedding.tiers.sample_ring import PickedBatch
from slipstream.io.samples import PickedSamples, Samples, concat_samples


class BatchMaker:
    """Turns the samples of rounds into batches of one size.

    Args:
        batch_size: Samples per batch; only the last hot and the last cold batch of an epoch may be shorter.
        order: `interleaved` keeps batches pure, `mixed` shuffles hot and cold samples together.
        smaller_by: Share of the samples of a kind by which its batches are smaller while some of them are dropped; 0
            leaves them.
        positive_weight: Samples that one with label 1 counts as.
    """

    def __init__(self, *, batch_size: int, order: str, smaller_by: float = 0.0, positive_weight: float = 1.0) -> None:
        self._batch_size, self._order, self._smaller_by = batch_size, order, smaller_by
        self._positive_weight = positive_weight
        self.waiting: dict[str, Samples] = {}
        """Samples that did not fill a batch yet, per kind of batch."""

    def make(
        self,
        hot: Samples | None,
        cold: Samples | None,
        *,
        rng: np.random.Generator,
        last: bool,
        thinned: tuple[float, float] = (0.0, 0.0),
    ) -> Iterator[Batch]:
        """Batches of a round.

        Args:
            hot: Hot samples to train on, in order.
            cold: Cold samples to train on, in order.
            rng: Draws the order of batches.
            last: Whether the epoch ends; then nothing is left waiting.
            thinned: Share of the hot and of the cold samples that samples were dropped among: each 0 or 1, or in
                order `mixed` parts of one whole.
        """
        if self._order == "mixed":
            both = [piece for piece in (hot, cold) if piece is not None]
            mixed = concat_samples(both) if both else None
            mixed = mixed.take(rng.permutation(len(mixed))) if mixed is not None else None
            yield from self._cut("cold", mixed, last, sum(thinned))
            return
        batches = {"hot": self._cut("hot", hot, last, thinned[0]), "cold": self._cut("cold", cold, last, thinned[1])}
        kinds = np.repeat([0, 1], [len(batches["hot"]), len(batches["cold"])])
        sources = (iter(batches["hot"]), iter(batches["cold"]))
        for kind in rng.permutation(kinds).tolist():
            yield next(sources[kind])

    def _cut(self, kind: str, samples: Samples | None, last: bool, thinned: float) -> list[Batch]:
        pieces = [piece for piece in (self.waiting.pop(kind, None), samples) if piece is not None]
        if not pieces:
            return []
        stacked = concat_samples(pieces)
        size = max(1, round(self._batch_size * (1 - self._smaller_by * thinned)))
        stop = len(stacked) if last else len(stacked) - len(stacked) % size
        # weights say how many samples each stands for: weighted batches stand for full ones, others for themselves
        divisor = size if size < self._batch_size and stacked.weights is None else None
        whole = self._weigh(stacked.take(slice(0, stop)))
        batches = cut_batches(whole, batch_size=size, is_hot=kind == "hot", divisor=divisor)
        if stop < len(stacked):
            rest = stacked.take(slice(stop, None))
            # few samples, and they may wait for long: a window must not be kept for them
            self.waiting[kind] = rest.on_their_own() if isinstance(rest, PickedSamples) else rest
        return batches

    def _weigh(self, samples: Samples) -> Samples:
        """Let samples with label 1 count as more than one, beside the weight that they have."""
        if self._positive_weight == 1:
            return samples
        weights = np.where(samples.y > 0.5, np.float32(self._positive_weight), np.float32(1))
        return samples.weighted(weights if samples.weights is None else weights * samples.weights)


def cut_batches(samples: Samples, *, batch_size: int, is_hot: bool, divisor: int | None = None) -> list[Batch]:
    """Give samples in batches, in order; the last may be shorter. `divisor` is that of `Batch`."""
    pieces = (samples.take(slice(at, at + batch_size)) for at in range(0, len(samples), batch_size))
    if isinstance(samples, PickedSamples):
        return [PickedBatch(piece.picks(), is_hot=is_hot, divisor=divisor) for piece in pieces]
    return [
        Batch(
            dense=piece.X_int, slots=piece.X_cat, labels=piece.y, is_hot=is_hot, weights=piece.weights, divisor=divisor
        )
        for piece in pieces
    ]
