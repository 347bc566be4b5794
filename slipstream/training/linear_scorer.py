"""A cheap guess of the model's error: logistic regression on rows, learned online beside the model.

One weight per row and one bias. It sees every sample of a round once, right after it scored them, dropped ones
included, so its scores are honest guesses and its training costs no forward pass of the model.
"""

from __future__ import annotations

import numpy as np

from slipstream.io.samples import Samples

_CHUNK = 2048


class LinearScorer:
    """Online logistic regression with Adagrad.

    Args:
        num_rows: V; 8 bytes a row.
        lr: Learning rate.
    """

    def __init__(self, num_rows: int, *, lr: float = 0.05) -> None:
        self._weights = np.zeros(num_rows, np.float32)
        self._squares = np.full(num_rows, 1e-4, np.float32)
        self._bias = np.zeros(2, np.float32)
        self._lr = np.float32(lr)

    def state(self) -> dict[str, np.ndarray]:
        """Everything a resumed run needs."""
        return {"weights": self._weights, "squares": self._squares, "bias": self._bias}

    def restore(self, state: dict[str, np.ndarray]) -> None:
        """Take over what `state` gave."""
        self._weights, self._squares, self._bias = state["weights"], state["squares"], state["bias"]

    def score(self, samples: Samples) -> np.ndarray:
        """Click probabilities. Shape (n,), float32."""
        return _sigmoid(self._weights[samples.X_cat].sum(axis=1) + self._bias[0])

    def learn(self, samples: Samples) -> None:
        """Take one pass over samples."""
        for start in range(0, len(samples), _CHUNK):
            slots = samples.X_cat[start : start + _CHUNK]
            errors = _sigmoid(self._weights[slots].sum(axis=1) + self._bias[0]) - samples.y[start : start + _CHUNK]
            flat = slots.ravel()
            per_lookup = np.repeat(errors / np.float32(len(errors)), slots.shape[1])
            touched, inverse = np.unique(flat, return_inverse=True)
            gradient = np.bincount(inverse, weights=per_lookup).astype(np.float32)
            self._squares[touched] += gradient * gradient
            self._weights[touched] -= self._lr * gradient / np.sqrt(self._squares[touched])
            mean = np.float32(errors.mean())
            self._bias[1] += mean * mean
            self._bias[0] -= self._lr * mean / np.sqrt(self._bias[1] + np.float32(1e-4))


def _sigmoid(logits: np.ndarray) -> np.ndarray:
    return np.asarray(1 / (1 + np.exp(-np.clip(logits, -30, 30))), np.float32)
