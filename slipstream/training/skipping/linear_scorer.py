"""A cheap guess of the model's error: logistic regression on rows and dense values, learned online beside the model.

One weight per row and per dense column, and one bias. It sees every sample once, dropped ones included, and says what
it thinks of a sample before it learns from it: an honest guess that costs no forward pass of the model. How good the
guess is decides how much of the gradient's variance `importance` can save, so it takes small steps, many of them.

Shape suffixes: n samples, T lookups each, L = n T.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from slipstream.io.samples import Samples

_CHUNK = 256
"""Samples a step."""
_FIRST_SQUARE = np.float32(1e-6)
"""What accumulators begin with: the square of a small gradient."""


class LinearScorer:
    """Online logistic regression with Adagrad.

    Args:
        num_rows: V; 12 bytes a row.
        num_dense: Dense columns.
        lr: Learning rate.
        padding: Rows that stand for no value: their weights stay zero.
    """

    def __init__(self, num_rows: int, num_dense: int, *, lr: float = 0.05, padding: Sequence[int] = ()) -> None:
        self._padding = list(padding)
        self._weights = np.zeros(num_rows, np.float32)
        self._squares = np.full(num_rows, _FIRST_SQUARE)
        self._gradient = np.zeros(num_rows, np.float32)  # of the rows of one chunk; zero between chunks
        # dense columns and, last, the bias
        self._dense_weights = np.zeros(num_dense + 1, np.float32)
        self._dense_squares = np.full(num_dense + 1, _FIRST_SQUARE)
        self._lr = np.float32(lr)

    def state(self) -> dict[str, np.ndarray]:
        """Everything a resumed run needs."""
        return {
            "weights": self._weights,
            "squares": self._squares,
            "dense_weights": self._dense_weights,
            "dense_squares": self._dense_squares,
        }

    def restore(self, state: dict[str, np.ndarray]) -> None:
        """Take over what `state` gave."""
        self._weights, self._squares = state["weights"], state["squares"]
        self._dense_weights, self._dense_squares = state["dense_weights"], state["dense_squares"]

    def learn(self, samples: Samples) -> np.ndarray:
        """Guess samples, then learn from them, a few hundred at a time and in the order given.

        Returns:
            Click probabilities from before each sample was learned. Shape (n,), float32.
        """
        guesses = np.empty(len(samples), np.float32)
        for start in range(0, len(samples), _CHUNK):
            piece = slice(start, start + _CHUNK)
            guesses[piece] = self._learn_chunk(samples.take(piece))
        return guesses

    def _learn_chunk(self, samples: Samples) -> np.ndarray:
        rows_L = samples.X_cat.ravel().astype(np.intp, copy=False)
        weights_L = self._weights[rows_L]
        dense = _with_bias(samples.X_int)
        guesses = _sigmoid(weights_L.reshape(samples.X_cat.shape).sum(axis=1) + dense @ self._dense_weights)
        errors = (guesses - samples.y) / np.float32(len(samples))
        # lookups of one row all read and write the same values, so they need not be brought together
        np.add.at(self._gradient, rows_L, np.repeat(errors, samples.X_cat.shape[1]))
        gradient_L = self._gradient[rows_L]
        self._gradient[rows_L] = 0.0
        squares_L = self._squares[rows_L] + gradient_L * gradient_L
        self._squares[rows_L] = squares_L
        self._weights[rows_L] = weights_L - self._lr * gradient_L / np.sqrt(squares_L)
        self._weights[self._padding] = 0.0
        gradient = errors @ dense
        self._dense_squares += gradient * gradient
        self._dense_weights -= self._lr * gradient / np.sqrt(self._dense_squares)
        return guesses


def _with_bias(X_int: np.ndarray) -> np.ndarray:
    """Dense values on a scale on which no outlier counts for many, and a column of ones."""
    dense = np.ones((len(X_int), X_int.shape[1] + 1), np.float32)
    dense[:, :-1] = np.sign(X_int) * np.log1p(np.abs(X_int))
    return dense


def _sigmoid(logits: np.ndarray) -> np.ndarray:
    return np.asarray(1 / (1 + np.exp(-np.clip(logits, -30, 30))), np.float32)
