"""Raw samples as lines of text, whatever container they came in, and whether they have labels."""

from __future__ import annotations

import polars as pl

from slipstream.datasets.source import ColumnarSource, Source
from slipstream.errors import DataError


def has_labels(source: Source, data: bytes | pl.DataFrame) -> bool:
    """Say whether samples have labels, judged by the first line or by the columns."""
    if isinstance(data, pl.DataFrame):
        return source.label_field in data.columns
    return not source.lacks_label(data.partition(b"\n")[0].removesuffix(b"\r"))


def labelled_text(source: Source, data: bytes | pl.DataFrame, *, is_labelled: bool) -> bytes:
    """Write samples as lines that the source parses, each ended by a newline; those without labels get 0.

    Args:
        source: The raw format.
        data: Lines, or the columns that its Parquet files may have.
        is_labelled: What `has_labels` said of the first of them.

    Raises:
        DataError: A frame lacks columns, or the source reads text only.
    """
    if isinstance(data, bytes):
        text = data if data.endswith(b"\n") else data + b"\n"
        return text if is_labelled else source.add_label(text)
    if not isinstance(source, ColumnarSource):
        raise DataError("this model's source reads text only, found columns", hint="give its lines")
    return source.to_lines(data if is_labelled else data.with_columns(pl.lit(0).alias(source.label_field)))
