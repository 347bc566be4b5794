"""The planted teacher of the synthetic click log: who clicks, and how well anybody could know it.

    logit = bias + dense terms in log(x + 1) + one effect per id + dot products of planted id vectors

Everything that decides a label is integer arithmetic on small tables: the same on every platform, fast, and
bounded in memory whatever the vocabulary. A logit is a multiple of 1/4096 between -8 and 8, hence one of
65536 *levels*; a click probability is a 24-bit integer looked up by level and compared with 24 random bits.
Only the making of the lookup tables calls `log` and `exp`, and the results are rounded at once, so a last-
bit difference between two math libraries has no practical chance to reach a label. And because a
probability is a function of its level, counting labels per level is enough for the exact AUC of any number
of rows.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from slipstream.ops.split import mix64

NUM_LEVELS = 1 << 16
"""Distinct click probabilities, in ascending order."""
HEAD_IDS = 4096
"""Ids below this have planted values of their own; rarer ones share a second set of that many, all small."""
PROBABILITY_BITS = 24
"""A click probability is a multiple of 2**-24."""

_LOGIT_ONE = 4096  # levels per unit of logit
_SCALE_BITS = 24
_DECAY_IDS = 60  # id number 60 counts half as much as the most frequent one: what is rare cannot be learned
_LOG_ONE = 1 << 12
_LOG_EXACT = 1 << 16  # values from here on lose their last ten bits before the logarithm is looked up
_LOG_COARSE_BITS = 10
_LOG_COARSE = 1 << 12
_ODD = 0x9E3779B97F4A7C15

# Sign and relative size of each integer's link with the label, as in Criteo.
_DENSE_WEIGHTS = (17, 4, -9, -7, -8, -16, 16, -4, 1, 40, 28, 20, -18)
# Every table on the left meets every table on the right: columns of few values, or of a fat head.
_PAIR_LEFT = (1, 5, 13, 17, 22)
_PAIR_RIGHT = (0, 4, 12, 16, 24)
# Share of the logit's variance that comes from integers, single ids and pairs of ids.
_VARIANCE_SHARES = (0.35, 0.5, 0.15)


@dataclass(frozen=True, kw_only=True, slots=True)
class TeacherScore:
    """How well the true click probabilities predict the labels that were drawn from them.

    No model can be expected to do better, so a trained one is judged by its distance to this.
    """

    num_samples: int
    """Samples scored."""
    positives: int
    """Clicks among them."""
    auc: float | None
    """Area under the ROC curve, ties counted half; None unless both labels occur."""
    logloss: float | None
    """Mean negative log-likelihood, in nats; None when there is no sample."""


class Teacher:
    """Click levels from integers and ids; calibrated once on a pilot sample, fixed from then on.

    Args:
        seed: Decides all planted values. 0 <= seed < 2**32.
        table_sizes: Values per table.
        dim: Length of the planted id vectors, 1 to 16.
        noise_ratio: Share of samples whose label ignores the features, in [0, 1).
        ctr: Click-through rate to calibrate for, in (0, 1).
    """

    def __init__(self, *, seed: int, table_sizes: tuple[int, ...], dim: int, noise_ratio: float, ctr: float) -> None:
        self._effects: list[np.ndarray] = []
        self._vectors: dict[int, np.ndarray] = {}
        self._scales = [0] * len(_VARIANCE_SHARES)
        self._bias = 0
        self._ctr = ctr
        self._dim = dim
        self._logs = _log_table()
        for table, size in enumerate(table_sizes):
            self._effects.append(_planted(seed, table, size, purpose=0, bits=16))
            if table in _PAIR_LEFT + _PAIR_RIGHT:
                columns = [_planted(seed, table, size, purpose=1 + axis, bits=9) for axis in range(dim)]
                self._vectors[table] = np.stack(columns, axis=1)
        logits = (np.arange(NUM_LEVELS) - NUM_LEVELS // 2) / _LOGIT_ONE
        probability = (1 - noise_ratio) / (1 + np.exp(-logits)) + noise_ratio * ctr
        self.probability_of_level: np.ndarray = np.rint(probability * (1 << PROBABILITY_BITS)).astype(np.int64)

    def components(self, integers: np.ndarray, ids: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Return the three parts of the score before they are weighed.

        Args:
            integers: Shape (13, n). Below 1 (missing too) counts as 0.
            ids: Shape (26, n). Negative (missing) adds nothing.

        Returns:
            Dense, id and pair part; each of shape (n,).
        """
        num_rows = integers.shape[1]
        dense, single = np.zeros((2, num_rows), dtype=np.int64)
        left, right = np.zeros((2, num_rows, self._dim), dtype=np.int64)
        for column, weight in enumerate(_DENSE_WEIGHTS):
            dense += weight * self._logs.take(_log_index(integers[column]), mode="clip")
        for table, effects in enumerate(self._effects):
            rows = ids[table]
            if len(effects) > HEAD_IDS + 1:
                rows = np.where(rows < HEAD_IDS, rows, HEAD_IDS + (rows & (HEAD_IDS - 1)))
            single += effects.take(rows)
            if table in self._vectors:
                side = left if table in _PAIR_LEFT else right
                side += self._vectors[table].take(rows, axis=0)
        left *= right
        pairs = left[:, 0].copy()
        for axis in range(1, self._dim):
            pairs += left[:, axis]
        return dense, single, pairs

    def levels(self, integers: np.ndarray, ids: np.ndarray) -> np.ndarray:
        """Return the level of each sample's click probability; shape (n,), 0 <= level < NUM_LEVELS.

        Args:
            integers: As for `components`.
            ids: As for `components`.
        """
        return self._weigh(self.components(integers, ids), self._bias)

    def calibrate(self, integers: np.ndarray, ids: np.ndarray, *, signal: float) -> None:
        """Choose weights and bias so that a pilot sample has the wanted spread of logits and share of clicks.

        Args:
            integers: As for `components`, of the pilot.
            ids: As for `components`, of the pilot.
            signal: Standard deviation of the logit, > 0.
        """
        parts = self.components(integers, ids)
        self._scales = [
            _scale_for(part, signal * math.sqrt(share)) for part, share in zip(parts, _VARIANCE_SHARES, strict=True)
        ]
        wanted = round(self._ctr * (1 << PROBABILITY_BITS)) * len(parts[0])
        low, high = -8 * NUM_LEVELS, 8 * NUM_LEVELS
        while low < high:
            bias = (low + high) // 2
            if int(self.probability_of_level[self._weigh(parts, bias)].sum()) < wanted:
                low = bias + 1
            else:
                high = bias
        self._bias = low

    def score(self, clicks: np.ndarray, skips: np.ndarray) -> TeacherScore:
        """Score the teacher on labels counted per level.

        Args:
            clicks: Positive samples per level. Shape (NUM_LEVELS,).
            skips: Negative samples per level. Shape (NUM_LEVELS,).

        Returns:
            The exact AUC and logloss of the probabilities the labels were drawn from.
        """
        # Far out, neighbouring levels can share one 24-bit probability: those are ties.
        values, group = np.unique(self.probability_of_level, return_inverse=True)
        clicked = np.bincount(group, weights=clicks, minlength=len(values)).astype(np.int64)
        skipped = np.bincount(group, weights=skips, minlength=len(values)).astype(np.int64)
        positives, negatives = int(clicked.sum()), int(skipped.sum())
        auc = logloss = None
        if positives and negatives:
            twice_ranked_below = 2 * (np.cumsum(skipped) - skipped) + skipped
            auc = sum((clicked * twice_ranked_below).tolist()) / (2 * positives * negatives)
        if positives + negatives:
            p = values / (1 << PROBABILITY_BITS)
            loss = math.fsum(-clicked * np.log(p) - skipped * np.log1p(-p))
            logloss = loss / (positives + negatives)
        return TeacherScore(num_samples=positives + negatives, positives=positives, auc=auc, logloss=logloss)

    def _weigh(self, parts: tuple[np.ndarray, np.ndarray, np.ndarray], bias: int) -> np.ndarray:
        level = np.zeros_like(parts[0])
        for part, scale in zip(parts, self._scales, strict=True):
            level += part * scale
        level >>= _SCALE_BITS
        level += bias + NUM_LEVELS // 2
        return np.clip(level, 0, NUM_LEVELS - 1, out=level)


def hash_integers(seed: int, purpose: int, table: int, values: np.ndarray) -> np.ndarray:
    """Hash integers to 64 random-looking bits, differently for each (seed, purpose, table).

    Args:
        seed: 0 <= seed < 2**32.
        purpose: What the bits are for, 0 <= purpose < 2**16.
        table: 0 <= table < 2**16.
        values: Any shape, not negative.

    Returns:
        uint64, the shape of `values`.
    """
    key = np.array([(seed << 32) | (purpose << 16) | table], dtype=np.uint64)
    return mix64(values.astype(np.uint64) * np.uint64(_ODD) + mix64(key + np.uint64(_ODD)))


def _planted(seed: int, table: int, size: int, *, purpose: int, bits: int) -> np.ndarray:
    """Return bell-shaped values, smaller for rarer ids; the last is 0, for the id -1 of a missing value."""
    num_rows = size if size <= HEAD_IDS else 2 * HEAD_IDS
    rows = np.arange(num_rows)
    hashed = hash_integers(seed, purpose, table, rows)
    mask = np.uint64((1 << bits) - 1)
    values = np.full(num_rows, -2 * ((1 << bits) - 1), dtype=np.int64)
    for part in range(4):
        values += ((hashed >> np.uint64(16 * part)) & mask).astype(np.int64)
    rank = np.where(rows < HEAD_IDS, rows, 2 * HEAD_IDS)
    return np.append(values * _DECAY_IDS // (_DECAY_IDS + rank), 0)


def _log_table() -> np.ndarray:
    values = np.arange(_LOG_EXACT + _LOG_COARSE)
    values[_LOG_EXACT:] = _LOG_EXACT + ((values[_LOG_EXACT:] - _LOG_EXACT) << _LOG_COARSE_BITS)
    logs: np.ndarray = np.rint(np.log1p(values) * _LOG_ONE).astype(np.int64)
    return logs


def _log_index(integers: np.ndarray) -> np.ndarray:
    if not len(integers) or int(integers.max()) < _LOG_EXACT:
        return integers
    coarse = _LOG_EXACT + ((integers - _LOG_EXACT) >> _LOG_COARSE_BITS)
    return np.where(integers < _LOG_EXACT, integers, coarse)


def _scale_for(part: np.ndarray, deviation: float) -> int:
    """Return the integer weight that gives a part the wanted standard deviation, in units of logit."""
    count = len(part)
    centred = part - int(part.sum()) // count
    # Sums of integers are exact in any order, and a square root is correctly rounded everywhere.
    spread = math.sqrt(sum((centred * centred).tolist()) / count)
    return round(deviation * _LOGIT_ONE * (1 << _SCALE_BITS) / spread) if spread else 0
