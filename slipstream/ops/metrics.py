"""Quality of predicted click probabilities."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

_LEAST_PROBABILITY = 1e-7


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
