"""What DLRM's own preprocessing left behind: one npz file with X_int, X_cat and y.

`kaggleAdDisplayChallenge_processed.npz` and its like: X_int int32 (n, 13), raw counts with negatives set to 0 and no
logarithm taken; X_cat int32 (n, 26), ids already numbered 0, 1, 2, … by DLRM; y int32 (n,). Other widths are read as
they are, whole numbers as float64 too, and arrays in Fortran order, which is how preprocessing leaves a day. `counts`
and further arrays are not needed: rows are ranked anew. Arrays are read in pieces and never unpickled. Ids are what
DLRM made of them; the tokens stand in its `*_fea_dict_*.npz` files, which are not read.

Source: data_utils.py and dlrm_data_pytorch.py of facebookresearch/dlrm.
"""

from __future__ import annotations

import re

import fsspec
import numpy as np
import polars as pl

from slipstream.datasets.source import ParsedBlock, Source, SourceOptions
from slipstream.errors import DataError
from slipstream.ops.delimited import read_fields
from slipstream.ops.npz import npz_widths
from slipstream.schema import LABEL, MISSING_ID, dense_name, table_name

_INT = re.compile(rb"-?[0-9]+")


class DlrmNpzSource(Source):
    """Rows of a DLRM npz file, as the lines that `slipstream.ops.npz` makes of them.

    Args:
        num_dense: Columns of X_int.
        num_tables: Columns of X_cat.
        max_ind_range: Ids are taken modulo this number; 0 keeps them.
    """

    num_dense = 0
    num_tables = 0

    def __init__(self, *, num_dense: int, num_tables: int, max_ind_range: int = 0) -> None:
        self.num_dense, self.num_tables = num_dense, num_tables
        self._dense = [dense_name(index) for index in range(num_dense)]
        self._tables = [table_name(index) for index in range(num_tables)]
        self._max_ind_range = max_ind_range

    def parse(self, data: bytes) -> ParsedBlock:
        """Turn whole lines into samples and rejects; a label must be 0 or 1, an id at least 0."""
        names = [LABEL, *self._dense, *self._tables]
        text, sound = read_fields(data, separator="\t", names=names)
        label = pl.col(LABEL).replace_strict({"0": 0, "1": 1}, default=None, return_dtype=pl.UInt8)
        numbers = text.select(label, pl.col(self._dense + self._tables).cast(pl.Int64, strict=False))
        is_good = numbers.select(
            pl.all_horizontal(pl.all().is_not_null()) & pl.all_horizontal(pl.col(self._tables) >= 0)
        ).to_series()
        bad = ~(sound & is_good)
        raw_id = pl.col(self._tables)
        if self._max_ind_range:
            raw_id = raw_id % self._max_ind_range
        return ParsedBlock(
            samples=numbers.filter(~bad).with_columns(raw_id),
            rejected_lines=bad.arg_true().to_numpy().astype(np.int64),
            num_lines=text.height,
        )

    def explain(self, line: bytes) -> str:
        """Say why a row that `parse` rejected is no sample."""
        names = [LABEL, *self._dense, *self._tables]
        fields = line.split(b"\t")
        if len(fields) != len(names):
            return f"expected {len(names)} numbers, found {len(fields)}"
        if fields[0] not in {b"0", b"1"}:
            return f"y: expected 0 or 1, found {_show(fields[0])}"
        for name, field in zip(names[1:], fields[1:], strict=True):
            if not _INT.fullmatch(field) or not -(2**63) <= int(field) < 2**63:
                return f"{name}: expected a 64-bit integer, found {_show(field)}"
            if name in self._tables and int(field) < 0:
                return f"{name}: expected an id of at least 0, found {_show(field)}"
        return "not a sample row"

    def format_raw_ids(self, raw_ids: np.ndarray) -> pl.Series:
        """Write raw ids in decimal; MISSING_ID, which no such file holds, as the empty string."""
        text = pl.Series(raw_ids).cast(pl.String)
        missing = pl.Series(raw_ids == MISSING_ID)
        return pl.select(pl.when(missing).then(pl.lit("")).otherwise(text)).to_series()


def build(options: SourceOptions) -> DlrmNpzSource:
    """Give the source for a pipeline's files, which must agree in width.

    Raises:
        DataError: A file is not a DLRM npz file, or differs in width from the first.
    """
    widths: list[tuple[int, int]] = []
    for file in options.files:
        try:
            with fsspec.open(file, "rb") as stored:
                widths.append(npz_widths(stored))
        except (OSError, ValueError) as exc:
            raise DataError(
                f"`{file}` is not a DLRM npz file: {exc}", hint="expected numpy arrays X_int, X_cat and y"
            ) from exc
        if widths[-1] != widths[0]:
            raise DataError(f"`{file}` has {widths[-1]} dense and sparse columns, the first file has {widths[0]}")
    num_dense, num_tables = widths[0]
    return DlrmNpzSource(num_dense=num_dense, num_tables=num_tables, max_ind_range=options.max_ind_range)


def _show(field: bytes) -> str:
    return repr(field[:40].decode("utf-8", "backslashreplace")) + ("…" if len(field) > 40 else "")
