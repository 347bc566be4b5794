"""Named transforms of dense columns; every project of the field has its own, so each bears its name."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import sqrt

import numpy as np

_FIXED = float(1 << 24)
"""Units of the fixed-point numbers that are summed: integers, so that a sum does not depend on how it was cut."""


@dataclass(frozen=True, kw_only=True, slots=True)
class DenseEncoding:
    """How the dense columns of a source become what a model reads: first these, transformed, then flags."""

    transform: str
    """Name of the transform."""
    num_columns: int
    """Dense columns of the source."""
    minima: Sequence[int] = ()
    """Smallest training value of each column, for `torchrec`; else empty."""
    means: Sequence[float] = ()
    """Mean of the logarithms of each column over the training split, for `standard`; else empty."""
    deviations: Sequence[float] = ()
    """Their standard deviation, above 0; for `standard`, else empty."""
    flagged: Sequence[int] = ()
    """Columns whose missing values have a flag, ascending: a column of 0 and 1 each, behind the transformed ones."""

    @property
    def width(self) -> int:
        """Dense columns that a model reads."""
        return self.num_columns + len(self.flagged)

    def encode(self, index: int, values: np.ndarray) -> np.ndarray:
        """Transform column `index`; missing values came in as 0. Shape (n,), float32."""
        return transform_dense(values, name=self.transform, **self._statistics(index))

    def restore(self, index: int, values: np.ndarray) -> np.ndarray:
        """Undo `encode` as far as it can be undone; see `restore_counts`. Shape (n,), int64."""
        return restore_counts(values, name=self.transform, **self._statistics(index))

    def _statistics(self, index: int) -> dict[str, float]:
        found = {"minimum": self.minima, "mean": self.means, "deviation": self.deviations}
        return {name: values[index] for name, values in found.items() if values}


def transform_dense(
    values: np.ndarray, *, name: str, minimum: float = 0, mean: float = 0.0, deviation: float = 1.0
) -> np.ndarray:
    """Transform one dense column; missing values came in as 0.

    Args:
        values: Integers. Shape (n,), int64.
        name: `dlrm` log(max(x, 0) + 1); `standard` (log(max(x, 0) + 1) - mean) / deviation; `torchrec`
            log(max(x - minimum, 0) + 2); `nvidia` log(max(x, -1) + 2); `none` x.
        minimum: Smallest training value of the column, for `torchrec`. The original shifts each file by its
            own minimum, so that days get different shifts; here one minimum serves every split.
        mean: Of the logarithms over the training split, for `standard`.
        deviation: Their standard deviation, for `standard`.

    Returns:
        Shape (n,), float32.

    Raises:
        ValueError: Unknown name.
    """
    wide = values.astype(np.float64)
    if name in ("dlrm", "standard"):
        wide = logarithms(wide)
        if name == "standard":
            wide = (wide - mean) / deviation
    elif name == "torchrec":
        wide = np.log(np.maximum(wide - minimum, 0) + 2)
    elif name == "nvidia":
        wide = np.log(np.maximum(wide, -1) + 2)
    elif name != "none":
        raise ValueError(f"expected one of dlrm, standard, torchrec, nvidia, none; found {name!r}")
    return wide.astype(np.float32)


def restore_counts(
    values: np.ndarray, *, name: str, minimum: float = 0, mean: float = 0.0, deviation: float = 1.0
) -> np.ndarray:
    """Undo `transform_dense`, as far as it can be undone.

    What the transform clipped stays clipped: below 0 under `dlrm` and `standard`, below -1 under `nvidia`, below the
    training minimum under `torchrec`. Integers up to a million come back exactly, under `standard` up to a hundred
    thousand; beyond, float32 keeps their logarithm to 5e-7, and they come back to that share.

    Args:
        values: Transformed values. Shape (n,), float32.
        name: The transform.
        minimum: As for `transform_dense`.
        mean: As for `transform_dense`.
        deviation: As for `transform_dense`.

    Returns:
        Shape (n,), int64.

    Raises:
        ValueError: Unknown name.
    """
    wide = values.astype(np.float64)
    if name == "dlrm":
        wide = np.expm1(wide)
    elif name == "standard":
        wide = np.expm1(wide * deviation + mean)
    elif name == "torchrec":
        wide = np.exp(wide) - 2 + minimum
    elif name == "nvidia":
        wide = np.exp(wide) - 2
    elif name != "none":
        raise ValueError(f"expected one of dlrm, standard, torchrec, nvidia, none; found {name!r}")
    return np.rint(wide).astype(np.int64)


def logarithms(values: np.ndarray) -> np.ndarray:
    """Give log(max(x, 0) + 1) of each value. Shape (n,), float64."""
    logs: np.ndarray = np.log1p(np.maximum(values.astype(np.float64), 0))
    return logs


class Moments:
    """Mean and deviation of a column that comes in pieces.

    Values are summed as fixed-point numbers with 24 binary places, so the answer does not depend on how the column was
    cut, and is exact to 6e-8 for each value.
    """

    def __init__(self) -> None:
        self._count = self._sum = self._squares = 0

    def add(self, values: np.ndarray) -> None:
        """Add values between -64 and 64, as logarithms are. Shape (n,), n at most 2^26; float64."""
        self._count += len(values)
        # a square is at most 2^12: in units of 2^-24 a sum of 2^26 fits 64 bits
        self._sum += int(np.rint(values * _FIXED).astype(np.int64).sum())
        self._squares += int(np.rint(values * values * _FIXED).astype(np.int64).sum())

    def result(self) -> tuple[float, float]:
        """Mean, and standard deviation; 1 for a column that is constant."""
        if not self._count:
            return 0.0, 1.0
        mean = self._sum / self._count / _FIXED
        variance = self._squares / self._count / _FIXED - mean * mean
        # what rounding leaves of a constant column's variance is no spread
        return mean, sqrt(variance) if variance > 1e-6 else 1.0
