"""What a source is: the columns of a raw format, and how one block of its lines becomes numbers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import numpy as np
import polars as pl

MISSING_ID = -(2**63)
"""The raw id of an empty field: a value like any other, and the first in raw-id order."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ParsedBlock:
    """The samples of a block, and the lines that are none."""

    samples: pl.DataFrame
    """`label` UInt8; `int_*` Int64, missing null; `cat_*` Int64 raw ids, missing MISSING_ID."""
    rejected_lines: np.ndarray
    """Positions of rejected lines in the block, ascending. Shape (R,), int64."""
    num_lines: int
    """Lines read: samples and rejects."""


class Source(Protocol):
    """One raw format. Adding one is adding a module with a class like this to `slipstream.datasets`."""

    @property
    def num_dense(self) -> int:
        """Number of dense columns."""
        ...

    @property
    def num_tables(self) -> int:
        """Number of sparse columns."""
        ...

    def parse(self, data: bytes) -> ParsedBlock:
        """Turn whole lines into samples and rejects."""
        ...

    def explain(self, line: bytes) -> str:
        """Say why a line that `parse` rejected is no sample."""
        ...

    def format_raw_ids(self, raw_ids: np.ndarray) -> pl.Series:
        """Write raw ids as the source writes them; MISSING_ID as the empty string."""
        ...


@runtime_checkable
class ColumnarSource(Source, Protocol):
    """A raw format that others also store as Parquet columns."""

    def to_lines(self, columns: pl.DataFrame) -> bytes:
        """Write rows of a Parquet file as lines that `parse` accepts or rejects one by one."""
        ...
