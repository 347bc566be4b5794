from __future__ import annotations

from pathlib import Path

import numpy as np
import polars as pl
import pytest

from slipstream.errors import ArtifactError
from slipstream.io.artifacts import StageKey, publish, scratch_dir
from slipstream.io.counts import read_counts, write_counts

KEY = StageKey(stage="profile", config={}, inputs={}, seed=0)


def test_counts_read_back_and_bear_table_and_row(tmp_path: Path):
    counts = np.array([4, 0, 2**40, 1, 9])
    write_counts(scratch_dir(tmp_path, KEY) / "counts.parquet", counts, {"cat_0": 2, "cat_1": 3})
    artifact = publish(tmp_path, KEY, {}, seconds=0, peak_bytes=0)
    assert read_counts(artifact).tolist() == counts.tolist()
    frame = pl.read_parquet(artifact.path / "counts.parquet")
    assert frame.rows() == [(0, 0, 4), (0, 1, 0), (1, 0, 2**40), (1, 1, 1), (1, 2, 9)]


def test_altered_counts_are_refused(tmp_path: Path):
    write_counts(scratch_dir(tmp_path, KEY) / "counts.parquet", np.array([1]), {"cat_0": 1})
    artifact = publish(tmp_path, KEY, {}, seconds=0, peak_bytes=0)
    write_counts(artifact.path / "counts.parquet", np.array([2]), {"cat_0": 1})
    with pytest.raises(ArtifactError, match="altered"):
        read_counts(artifact)
