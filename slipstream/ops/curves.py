"""Predictions and counts condensed to what a chart can show: a few hundred points of any number."""

from __future__ import annotations

import numpy as np
import polars as pl


def roc_points(labels: np.ndarray, probabilities: np.ndarray, *, most: int = 200) -> pl.DataFrame:
    """Compute the ROC curve.

    Args:
        labels: 0 or 1. Shape (n,).
        probabilities: Shape (n,).
        most: Points to keep, about; they lie evenly along the curve.

    Returns:
        `false_positive_rate`, `true_positive_rate`, from (0, 0) to (1, 1); no line where one class is missing.
    """
    num_positive = int(labels.sum())
    num_negative = len(labels) - num_positive
    if not num_positive or not num_negative:
        return pl.DataFrame(schema={"false_positive_rate": pl.Float64, "true_positive_rate": pl.Float64})
    order = np.argsort(-probabilities, kind="stable")
    ranked, hits = probabilities[order], labels[order].astype(np.int64)
    # samples with equal predictions cannot be told apart by any threshold: a point stands after the last of each tie
    last_of_tie = np.append(np.flatnonzero(ranked[1:] != ranked[:-1]), len(ranked) - 1)
    true_positives = np.cumsum(hits)[last_of_tie]
    false_positives = last_of_tie + 1 - true_positives
    tpr = np.concatenate([[0.0], true_positives / num_positive])
    fpr = np.concatenate([[0.0], false_positives / num_negative])
    kept = _evenly(tpr + fpr, most)
    return pl.DataFrame({"false_positive_rate": fpr[kept], "true_positive_rate": tpr[kept]})


def _evenly(along: np.ndarray, most: int) -> np.ndarray:
    """Positions of about `most` values that lie evenly between the first and the last; rising, both ends included."""
    if len(along) <= most:
        return np.arange(len(along))
    targets = np.linspace(along[0], along[-1], most)
    found = np.searchsorted(along, targets).clip(0, len(along) - 1)
    return np.unique(np.concatenate([[0], found, [len(along) - 1]]))


def reliability_bins(labels: np.ndarray, probabilities: np.ndarray, *, bins: int = 15) -> pl.DataFrame:
    """Compare predictions with click rates, in bins of equally many samples.

    Args:
        labels: 0 or 1. Shape (n,).
        probabilities: Shape (n,).
        bins: At most so many; equal predictions stay in one bin.

    Returns:
        `predicted` (mean), `click_rate`, `low` and `high` (two standard errors of the rate below and above),
        `samples`; by rising prediction.
    """
    frame = pl.DataFrame({"label": labels.astype(np.float64), "probability": probabilities.astype(np.float64)})
    size = max(1, -(-frame.height // bins))
    # the rank of the first of a tie, so that equal predictions fall into one bin
    binned = frame.with_columns(((pl.col("probability").rank("min") - 1) // size).cast(pl.Int64).alias("bin"))
    rate = pl.col("click_rate")
    error = 2 * (rate * (1 - rate) / pl.col("samples")).sqrt()
    return (
        binned.group_by("bin")
        .agg(
            pl.col("probability").mean().alias("predicted"),
            pl.col("label").mean().alias("click_rate"),
            pl.len().alias("samples"),
        )
        .sort("bin")
        .with_columns((rate - error).clip(0, 1).alias("low"), (rate + error).clip(0, 1).alias("high"))
        .drop("bin")
    )


def prediction_histogram(labels: np.ndarray, probabilities: np.ndarray, *, bins: int = 50) -> pl.DataFrame:
    """Count predictions by label in bins of equal width over [0, 1].

    Args:
        labels: 0 or 1. Shape (n,).
        probabilities: In [0, 1]. Shape (n,).
        bins: Their number.

    Returns:
        `label` (`click`, `no click`), `start`, `stop`, `samples`, and `share` of the label's samples.
    """
    parts = []
    for label, name in ((1, "click"), (0, "no click")):
        counts, edges = np.histogram(probabilities[labels == label], bins=bins, range=(0.0, 1.0))
        share = counts / max(counts.sum(), 1)
        parts.append(
            pl.DataFrame({"start": edges[:-1], "stop": edges[1:], "samples": counts, "share": share}).with_columns(
                pl.lit(name).alias("label")
            )
        )
    return pl.concat(parts)


def rank_curve(counts: np.ndarray, *, most: int = 40) -> pl.DataFrame:
    """Compute how often the most used row is looked up, the second, and so on, at ranks that lie evenly by logarithm.

    Args:
        counts: Lookups per row. Shape (n,), integer.
        most: Ranks to keep at most.

    Returns:
        `rank`, from 1, and `lookups`; rows that were never looked up are left out.
    """
    ranked = np.sort(counts[counts > 0])[::-1]
    if not len(ranked):
        return pl.DataFrame({"rank": [], "lookups": []}, schema={"rank": pl.Int64, "lookups": pl.Int64})
    ranks = np.unique(np.geomspace(1, len(ranked), most).round().astype(np.int64))
    return pl.DataFrame({"rank": ranks, "lookups": ranked[ranks - 1].astype(np.int64)})
