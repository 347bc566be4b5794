"""Named transforms of dense columns; every project of the field has its own, so each bears its name."""

from __future__ import annotations

import numpy as np


def transform_dense(values: np.ndarray, *, name: str, minimum: int) -> np.ndarray:
    """Transform one dense column; missing values came in as 0.

    Args:
        values: Integers. Shape (n,), int64.
        name: `dlrm` log(max(x, 0) + 1); `torchrec` log(max(x - minimum, 0) + 2); `nvidia` log(max(x, -1) + 2);
            `none` x.
        minimum: Smallest training value of the column, for `torchrec`. The original shifts each file by its
            own minimum, so that days get different shifts; here one minimum serves every split.

    Returns:
        Shape (n,), float32.

    Raises:
        ValueError: Unknown name.
    """
    wide = values.astype(np.float64)
    if name == "dlrm":
        wide = np.log1p(np.maximum(wide, 0))
    elif name == "torchrec":
        wide = np.log(np.maximum(wide - minimum, 0) + 2)
    elif name == "nvidia":
        wide = np.log(np.maximum(wide, -1) + 2)
    elif name != "none":
        raise ValueError(f"expected one of dlrm, torchrec, nvidia, none; found {name!r}")
    return wide.astype(np.float32)


def restore_counts(values: np.ndarray, *, name: str, minimum: int) -> np.ndarray:
    """Undo `transform_dense`, as far as it can be undone.

    What the transform clipped stays clipped: below 0 under `dlrm`, below -1 under `nvidia`, below the training
    minimum under `torchrec`. Integers up to a million come back exactly; beyond, float32 keeps their logarithm to
    5e-7, and they come back to that share.

    Args:
        values: Transformed values. Shape (n,), float32.
        name: The transform.
        minimum: Smallest training value of the column, for `torchrec`.

    Returns:
        Shape (n,), int64.

    Raises:
        ValueError: Unknown name.
    """
    wide = values.astype(np.float64)
    if name == "dlrm":
        wide = np.expm1(wide)
    elif name == "torchrec":
        wide = np.exp(wide) - 2 + minimum
    elif name == "nvidia":
        wide = np.exp(wide) - 2
    elif name != "none":
        raise ValueError(f"expected one of dlrm, torchrec, nvidia, none; found {name!r}")
    return np.rint(wide).astype(np.int64)
