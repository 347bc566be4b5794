"""A few real samples that travel with a model, and what it predicts for them: exports are compared on these."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from slipstream.errors import ArtifactError
from slipstream.io.artifacts import Artifact, write_atomically
from slipstream.io.figures import PreprocessFigures
from slipstream.io.samples import read_encoded
from slipstream.ops.npz import read_arrays
from slipstream.schema import dense_name, table_name

FILE = "examples.npz"
_MOST = 1024


@dataclass(frozen=True, kw_only=True, slots=True)
class Examples:
    """Encoded samples."""

    dense: np.ndarray
    """Shape (n, dense columns), float32."""
    rows: np.ndarray
    """Row of each looked-up column. Shape (n, F), int32."""


def write_examples(processed: Artifact, folder: Path) -> None:
    """Keep the first samples of the test split beside a model."""
    (part, *_) = processed.files("test/", ".parquet")
    figures = PreprocessFigures.of(processed)
    dense, rows = read_encoded(
        processed.check(part),
        dense=[dense_name(index) for index in range(figures.num_dense)],
        tables=[table_name(index) for index in range(len(figures.table_of_column or figures.rows_per_table))],
        most=_MOST,
    )
    with write_atomically(folder / FILE) as path, path.open("wb") as stream:
        np.savez(stream, dense=dense, rows=rows)


def read_examples(folder: Path) -> Examples:
    """Read the examples of a model.

    Raises:
        ArtifactError: There are none.
    """
    try:
        with (folder / FILE).open("rb") as stream:
            dense, rows = read_arrays(stream, ("dense", "rows"))
    except (OSError, ValueError, KeyError) as exc:
        raise ArtifactError(
            f"expected a model with example samples in `{folder}`: {exc}",
            hint="it was made by an older slipstream; train it again",
        ) from exc
    return Examples(dense=dense, rows=rows)
