"""Quality of predicted click probabilities."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

_LEAST_PROBABILITY = 1e-7
_RANKED_AT_ONCE = 1 << 18


@dataclass(frozen=True, kw_only=True, slots=True)
class Quality:
    """The metrics of one set of predictions."""

    auc: float
    """Area under the ROC curve; ties count half; NaN when one class is missing."""
    logloss: float
    """Mean negative log likelihood, in nats."""
    ne: float
    """Normalised entropy: logloss over the entropy of the mean label; below 1 beats guessing the mean."""
    calibration: float
    """Mean prediction over mean label."""
    accuracy: float
    """Share of predictions on the right side of 0.5."""


def measure_quality(labels: np.ndarray, probabilities: np.ndarray) -> Quality:
    """Compute all metrics.

    Args:
        labels: 0 or 1. Shape (n,).
        probabilities: In [0, 1]. Shape (n,).

    Source: normalised entropy as in He et al., ADKDD 2014.
    """
    labels = labels.astype(np.float64)
    probabilities = probabilities.astype(np.float64)
    clipped = np.clip(probabilities, _LEAST_PROBABILITY, 1 - _LEAST_PROBABILITY)
    logloss = float(-np.mean(labels * np.log(clipped) + (1 - labels) * np.log1p(-clipped)))
    mean = float(labels.mean())
    entropy = -(mean * np.log(mean) + (1 - mean) * np.log1p(-mean)) if 0 < mean < 1 else np.nan
    return Quality(
        auc=area_under_roc(labels, probabilities),
        logloss=logloss,
        ne=float(logloss / entropy),
        calibration=float(probabilities.mean() / mean) if mean else float("nan"),
        accuracy=float(np.mean((probabilities >= 0.5) == (labels >= 0.5))),
    )


def area_under_roc(labels: np.ndarray, scores: np.ndarray) -> float:
    """Probability that a positive outranks a negative, ties counting half; NaN when one class is missing.

    Args:
        labels: 0 or 1. Shape (n,).
        scores: Shape (n,).
    """
    order = np.argsort(scores, kind="stable")
    ranked, hits = scores[order], labels[order]
    num_positive = float(hits.sum())
    num_negative = len(hits) - num_positive
    if not num_positive or not num_negative:
        return float("nan")
    first_of_tie = np.flatnonzero(np.concatenate([[True], ranked[1:] != ranked[:-1]]))
    stops = np.append(first_of_tie[1:], len(ranked))
    mean_rank = (first_of_tie + stops + 1) / 2.0
    positives = np.add.reduceat(hits.astype(np.float64), first_of_tie)
    area = float((positives * mean_rank).sum()) - num_positive * (num_positive + 1) / 2
    return area / (num_positive * num_negative)


class QualityCounter:
    """Computes all metrics over predictions that come in pieces, in 4 bytes a sample.

    Example:
        >>> counter = QualityCounter()
        >>> counter.add(np.array([0, 1]), np.array([0.2, 0.9]))
        >>> counter.add(np.array([1]), np.array([0.1]))
        >>> counter.result().auc
        0.5
    """

    def __init__(self) -> None:
        self._scores: dict[bool, list[np.ndarray]] = {False: [], True: []}
        self._losses = self._probabilities = 0.0
        self._hits = 0

    def add(self, labels: np.ndarray, probabilities: np.ndarray) -> None:
        """Add samples. Both of shape (n,); probabilities are kept as float32."""
        is_positive = labels > 0.5
        wide = probabilities.astype(np.float64)
        clipped = np.clip(wide, _LEAST_PROBABILITY, 1 - _LEAST_PROBABILITY)
        self._losses -= float(np.log(np.where(is_positive, clipped, 1 - clipped)).sum())
        self._probabilities += float(wide.sum())
        self._hits += int(np.count_nonzero((wide >= 0.5) == is_positive))
        for kind in (False, True):
            self._scores[kind].append(probabilities[is_positive == kind].astype(np.float32))

    def result(self) -> Quality:
        """Give the metrics of everything added; may be called once, at the end."""
        negatives, positives = (_sorted_together(self._scores[kind]) for kind in (False, True))
        total = len(negatives) + len(positives)
        mean = len(positives) / total
        entropy = -(mean * np.log(mean) + (1 - mean) * np.log1p(-mean)) if 0 < mean < 1 else np.nan
        logloss = self._losses / total
        return Quality(
            auc=_area_between(negatives, positives),
            logloss=logloss,
            ne=float(logloss / entropy),
            calibration=self._probabilities / len(positives) if len(positives) else float("nan"),
            accuracy=self._hits / total,
        )


def _sorted_together(pieces: list[np.ndarray]) -> np.ndarray:
    together = np.empty(sum(map(len, pieces)), np.float32)
    place = 0
    while pieces:
        piece = pieces.pop(0)  # given back as soon as it is copied
        together[place : place + len(piece)] = piece
        place += len(piece)
    together.sort()
    return together


def _area_between(negatives: np.ndarray, positives: np.ndarray) -> float:
    """Share of pairs in which the positive stands above, ties counting half. Both ascending."""
    if not len(negatives) or not len(positives):
        return float("nan")
    below = 0
    for start in range(0, len(positives), _RANKED_AT_ONCE):
        piece = positives[start : start + _RANKED_AT_ONCE]
        # negatives strictly below count twice, ties once: the sum of both searches
        below += int(np.searchsorted(negatives, piece, "left").sum() + np.searchsorted(negatives, piece, "right").sum())
    return below / (2 * len(negatives) * len(positives))
