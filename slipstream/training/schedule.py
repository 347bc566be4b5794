"""In which order samples become batches.

An epoch is cut into segments, one per staleness re-check, and segments into rounds of bounded size. A round
takes its fair share of the hot and of the cold samples, so every stretch of training sees both in the same
proportion. Within a round, pure hot and pure cold batches stand in a seeded random order. What does not fill a
batch waits for the next round.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from slipstream.embedding.lookahead import Batch
from slipstream.io.samples import Samples, concat_samples


@dataclass(frozen=True, slots=True)
class Round:
    """How many samples to take next, and whether a segment ends after them."""

    num_hot: int
    num_cold: int
    ends_segment: bool


def plan_rounds(
    num_hot: int, num_cold: int, *, batch_size: int, segment_steps: int, round_samples: int
) -> Iterator[Round]:
    """Cut an epoch into rounds.

    Args:
        num_hot: Hot samples of the epoch.
        num_cold: Cold samples of the epoch.
        batch_size: Samples per step.
        segment_steps: Steps per segment, dropped samples included.
        round_samples: Most samples a round may hold.
    """
    total = num_hot + num_cold
    per_segment = segment_steps * batch_size
    taken_hot = taken = 0
    while taken < total:
        segment_end = min((taken // per_segment + 1) * per_segment, total)
        stop = min(taken + round_samples, segment_end)
        hot_stop = round(num_hot * (stop / total))
        hot = hot_stop - taken_hot
        yield Round(hot, stop - taken - hot, stop == segment_end)
        taken_hot, taken = hot_stop, stop


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
    """Samples in batches, in order; the last may be shorter."""
    pieces = (samples.take(slice(at, at + batch_size)) for at in range(0, len(samples), batch_size))
    return [
        Batch(dense=piece.X_int, slots=piece.X_cat, labels=piece.y, is_hot=is_hot, weights=piece.weights)
        for piece in pieces
    ]


def default_segment_steps(num_samples: int, batch_size: int) -> int:
    """Steps per segment that make seven segments an epoch: one window, then six re-checks."""
    return max(1, math.ceil(num_samples / batch_size / 7))
