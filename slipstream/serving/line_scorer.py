"""Raw lines of one block to their click probabilities, and to what is passed on of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import polars as pl

from slipstream.datasets.source import ColumnarSource, Source
from slipstream.errors import ConfigError, DataError
from slipstream.io.raw import RawBlock
from slipstream.ops.delimited import read_fields
from slipstream.schema import LABEL
from slipstream.serving.model import ServedModel


@dataclass(frozen=True, kw_only=True, slots=True)
class ScoredLines:
    """The lines of a block, and what the model makes of them."""

    lines: pl.DataFrame
    """`probability` Float32, null where a line is no sample; `reason` String, null where it is one; `_label` UInt8,
    null where none is known; then the columns kept. One row a line."""
    num_samples: int


class LineScorer:
    """Scores blocks of lines; several threads may share one.

    Args:
        model: The model.
        keep: Columns to pass on: fields of the source by its own name, or as `int_0` and `cat_0`.

    Raises:
        ConfigError: A column to keep is none of the source's.
        DataError: Samples of the source are not single lines.
    """

    def __init__(self, model: ServedModel, *, keep: Sequence[str] = ()) -> None:
        self._model, self._source = model, model.encoder.source
        if not self._source.fields:
            raise DataError(
                f"source `{model.encoder.encoding.source}` makes a sample of several lines, so lines cannot be scored",
                hint="predict from encoded rows in Python: slipstream.load(folder)",
            )
        self._keep = {name: _find_field(name, self._source, model.encoder.encoding.columns) for name in keep}

    def is_labelled(self, block: RawBlock) -> bool:
        """Whether the lines of a file have labels, judged by its first block."""
        if isinstance(block.data, pl.DataFrame):
            return LABEL in block.data.columns
        return not self._source.lacks_label(block.data.partition(b"\n")[0].removesuffix(b"\r"))

    def score(self, block: RawBlock, *, is_labelled: bool) -> ScoredLines:
        """Score the lines of a block.

        Raises:
            DataError: A Parquet file lacks columns, or the source reads text only.
        """
        text = self._as_text(block.data, is_labelled)
        labelled = text if is_labelled else self._source.add_label(text)
        parsed = self._source.parse(labelled)
        probabilities = self._model.predict_parsed(parsed.samples)
        is_sample = np.ones(parsed.num_lines, bool)
        is_sample[parsed.rejected_lines] = False
        # where each line's sample stands among the samples; anything where it has none
        places = pl.Series(np.cumsum(is_sample) - 1).set(pl.Series(~is_sample), None)
        reasons = pl.Series([None], dtype=pl.String).new_from_index(0, parsed.num_lines)
        if parsed.rejected_lines.size:
            own = labelled.split(b"\n")
            why = [self._source.explain(own[at].removesuffix(b"\r")) for at in parsed.rejected_lines.tolist()]
            reasons = reasons.scatter(parsed.rejected_lines, why)
        labels = parsed.samples.get_column(LABEL) if is_labelled else pl.Series([None], dtype=pl.UInt8)
        lines = pl.DataFrame(
            {
                "probability": pl.Series(probabilities).gather(places) if len(probabilities) else _nulls(places),
                "reason": reasons,
                "_label": labels.gather(places) if is_labelled and len(labels) else _nulls(places, pl.UInt8),
            }
        )
        kept = self._kept_columns(text, is_labelled)
        return ScoredLines(lines=lines.hstack(kept), num_samples=len(probabilities))

    def _as_text(self, data: bytes | pl.DataFrame, is_labelled: bool) -> bytes:
        if isinstance(data, bytes):
            return data if data.endswith(b"\n") else data + b"\n"
        if not isinstance(self._source, ColumnarSource):
            raise DataError("this model's source reads text only, found Parquet", hint="give the text files")
        # with a label put in, rows of a Parquet file are lines like any others; it is not looked at again
        text = self._source.to_lines(data if is_labelled else data.with_columns(pl.lit(0).alias(LABEL)))
        return text

    def _kept_columns(self, text: bytes, is_labelled: bool) -> list[pl.Series]:
        if not self._keep:
            return []
        names = [name for name in self._source.fields if is_labelled or name != self._source.label_field]
        fields, _ = read_fields(text, separator=self._source.separator, names=names)
        return [fields.get_column(field).alias(name) for name, field in self._keep.items()]


def _nulls(like: pl.Series, dtype: type[pl.DataType] = pl.Float32) -> pl.Series:
    return pl.Series([None], dtype=dtype).new_from_index(0, len(like))


def _find_field(name: str, source: Source, columns: dict[str, str]) -> str:
    """The field of a line that a column to keep means."""
    if name in source.fields:
        return name
    by_column = {column: own for column, own in columns.items() if own in source.fields}
    if name in by_column:
        return by_column[name]
    raise ConfigError(
        f"expected --keep to name fields of a line, found `{name}`", hint=f"fields: {', '.join(source.fields)}"
    )
