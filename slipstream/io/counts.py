"""Access counts on disk: counts.parquet (table, row, count), in table then row order."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import polars as pl

from slipstream.io.artifacts import Artifact, write_atomically


def write_counts(path: Path, counts: np.ndarray, rows_per_table: Mapping[str, int]) -> None:
    """Write access counts per global row. Shape (V,), int64."""
    sizes = list(rows_per_table.values())
    frame = pl.DataFrame(
        {
            "table": pl.Series(np.repeat(np.arange(len(sizes), dtype=np.int16), sizes)),
            "row": pl.Series(np.concatenate([np.arange(size, dtype=np.int32) for size in sizes])),
            "count": counts,
        }
    )
    with write_atomically(path) as partial:
        frame.write_parquet(partial, compression="zstd", compression_level=1, statistics=False)


def read_counts(profiled: Artifact) -> np.ndarray:
    """Access counts per global row, of a profile artifact. Shape (V,), int64."""
    path = profiled.check(profiled.path / "counts.parquet")
    return pl.read_parquet(path, columns=["count"]).to_series().to_numpy()
