"""Raw lines of one block to their click probabilities, and to what is passed on of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import polars as pl

from slipstream.errors import ConfigError, DataError
from slipstream.io.raw import RawBlock, find_raw_files, read_blocks
from slipstream.schema import LABEL
from slipstream.serving.ensemble import average
from slipstream.serving.lines import has_labels, labelled_text
from slipstream.serving.score_file import number_lines, without_hidden

if TYPE_CHECKING:
    from slipstream.serving.ensemble import Ensemble

_BLOCK_BYTES = 8 << 20


@dataclass(frozen=True, kw_only=True, slots=True)
class ScoredLines:
    """The lines of a block, and what the model makes of them."""

    lines: pl.DataFrame
    """`probability` Float32, null where a line is no sample; `reason` String, null where it is one; `_label` UInt8,
    null where none is known; with labels and several models the probability of each; then the columns kept. One row a
    line."""
    num_samples: int


class LineScorer:
    """Scores blocks of lines; several threads may share one.

    Args:
        models: One or more.
        keep: Columns to pass on: fields of the source by its own name, or as `int_0` and `cat_0`.

    Raises:
        ConfigError: A column to keep is none of the source's.
        DataError: Samples of the source are not single lines.
    """

    def __init__(self, models: Ensemble, *, keep: Sequence[str] = ()) -> None:
        encoder = models.encoder
        self._models, self._source = models, encoder.source
        if not self._source.fields:
            raise DataError(
                f"source `{encoder.encoding.source}` makes a sample of several lines, so lines cannot be scored",
                hint="predict from encoded rows in Python: slipstream.load(folder)",
            )
        self._keep = {name: _find_field(name, encoder.field_names) for name in keep}

    def is_labelled(self, block: RawBlock) -> bool:
        """Whether the lines of a file have labels, judged by its first block."""
        return has_labels(self._source, block.data)

    def score(self, block: RawBlock, *, is_labelled: bool) -> ScoredLines:
        """Score the lines of a block.

        Raises:
            DataError: A Parquet file lacks columns, or the source reads text only.
        """
        labelled = labelled_text(self._source, block.data, is_labelled=is_labelled)
        parsed = self._source.parse(labelled)
        predicted = self._models.predict_each(parsed.samples)
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

        def by_line(probabilities: np.ndarray) -> pl.Series:
            return pl.Series(probabilities).gather(places) if len(probabilities) else _nulls(places)

        each = {own_column(at): by_line(one) for at, one in enumerate(predicted)} if len(predicted) > 1 else {}
        lines = pl.DataFrame(
            {
                "probability": by_line(average(predicted)),
                "reason": reasons,
                "_label": labels.gather(places) if is_labelled and len(labels) else _nulls(places, pl.UInt8),
                **(each if is_labelled else {}),
            }
        )
        kept = self._kept_columns(labelled, is_labelled)
        return ScoredLines(lines=lines.hstack(kept), num_samples=parsed.samples.height)

    def _kept_columns(self, text: bytes, is_labelled: bool) -> list[pl.Series]:
        if not self._keep:
            return []
        fields = self._source.split(text)
        if not is_labelled:  # the labels there were put in to be able to parse
            fields = fields.with_columns(pl.lit(None, pl.String).alias(self._source.label_field))
        return [fields.get_column(field).alias(name) for name, field in self._keep.items()]


def own_column(index: int) -> str:
    """Name of the column with the probabilities of one of several models; hidden, like `_label`."""
    return f"_model_{index}"


def score_lines(models: Ensemble, raw: str | pl.DataFrame, *, keep: Sequence[str] = ()) -> pl.DataFrame:
    """Score files, or a frame, in memory.

    Args:
        models: One or more.
        raw: A path, glob or address; or a frame with the columns that Parquet files of the source may have.
        keep: Columns to pass on.

    Returns:
        `file` and `line` where files were read, `probability`, `reason`, and the columns kept.
    """
    scorer = LineScorer(models, keep=keep)
    if isinstance(raw, pl.DataFrame):
        block = RawBlock(file_index=0, block_index=0, data=raw, end=raw.height, stored=0)
        return without_hidden(scorer.score(block, is_labelled=scorer.is_labelled(block)).lines)
    pieces = []
    for index, file in enumerate(find_raw_files([raw], named_by="score")):
        line, is_labelled = 1, True
        for block in read_blocks(file, file_index=index, block_bytes=_BLOCK_BYTES):
            is_labelled = scorer.is_labelled(block) if line == 1 else is_labelled
            lines = without_hidden(scorer.score(block, is_labelled=is_labelled).lines)
            pieces.append(number_lines(lines, file=file, first_line=line))
            line += lines.height
    return pl.concat(pieces)


def _nulls(like: pl.Series, dtype: type[pl.DataType] = pl.Float32) -> pl.Series:
    return pl.Series([None], dtype=dtype).new_from_index(0, len(like))


def _find_field(name: str, field_names: Mapping[str, str]) -> str:
    """Give the field of a line that a column to keep means."""
    if name in field_names:
        return field_names[name]
    known = ", ".join(dict.fromkeys(field_names.values()))
    raise ConfigError(f"expected --keep to name fields of a line, found `{name}`", hint=f"fields: {known}")
