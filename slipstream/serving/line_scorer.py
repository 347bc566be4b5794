"""Raw lines of one block to their click probabilities, and to what is passed on of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import polars as pl

from slipstream.errors import ConfigError
from slipstream.io.raw import RawBlock
from slipstream.schema import LABEL
from slipstream.serving.ensemble import average
from slipstream.serving.lines import has_labels, labelled_text

if TYPE_CHECKING:
    from slipstream.serving.encoder import Encoder
    from slipstream.serving.ensemble import Ensemble


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
    """

    def __init__(self, models: Ensemble, *, keep: Sequence[str] = ()) -> None:
        encoder = models.encoder
        self._models, self._source = models, encoder.source
        self._kept = KeptFields(encoder, keep)

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
        spread = _Spread(parsed.num_lines, parsed.rejected_lines)
        reasons = pl.Series([None], dtype=pl.String).new_from_index(0, parsed.num_lines)
        if parsed.rejected_lines.size:
            own = labelled.split(b"\n")
            why = [self._source.explain(own[at].removesuffix(b"\r")) for at in parsed.rejected_lines.tolist()]
            reasons = reasons.scatter(parsed.rejected_lines, why)
        labels = parsed.samples.get_column(LABEL) if is_labelled else pl.Series([], dtype=pl.UInt8)
        each = (
            {own_column(at): spread(pl.Series(one)) for at, one in enumerate(predicted)} if len(predicted) > 1 else {}
        )
        lines = pl.DataFrame(
            {
                "probability": spread(pl.Series(average(predicted))),
                "reason": reasons,
                "_label": spread(labels),
                **(each if is_labelled and len(each) > 1 else {}),
            }
        )
        kept = self._kept.of(labelled, without=None if is_labelled else self._source.label_field)
        return ScoredLines(lines=lines.hstack(kept), num_samples=parsed.samples.height)

    def number(self, scored: ScoredLines, *, file_index: int, first_line: int) -> ScoredLines:
        """Leave lines as they are, whatever their numbers: they are scored one by one."""
        return scored


class KeptFields:
    """Fields of lines that are passed on.

    Args:
        encoder: What reads the lines.
        names: Of fields: the source's own, or such as `int_0` and `cat_0`.

    Raises:
        ConfigError: One is none of the source's.
    """

    def __init__(self, encoder: Encoder, names: Sequence[str]) -> None:
        self._source = encoder.source
        self._fields = {name: _find_field(name, encoder.field_names) for name in names}

    def of(self, text: bytes, *, without: str | None = None) -> list[pl.Series]:
        """Give the columns of whole lines; those of field `without`, which was put in to be able to parse, are null."""
        if not self._fields:
            return []
        fields = self._source.split(text)
        if without is not None:
            fields = fields.with_columns(pl.lit(None, pl.String).alias(without))
        return [fields.get_column(field).alias(name) for name, field in self._fields.items()]


def own_column(index: int) -> str:
    """Name of the column with the probabilities of one of several models; hidden, like `_label`."""
    return f"_model_{index}"


class _Spread:
    """Gives lines what their samples have.

    Args:
        num_lines: Lines of a block.
        rejected_lines: Those that are no samples.
    """

    def __init__(self, num_lines: int, rejected_lines: np.ndarray) -> None:
        self._num_lines, self._places = num_lines, None
        if rejected_lines.size:
            is_sample = np.ones(num_lines, bool)
            is_sample[rejected_lines] = False
            # where each line's sample stands among the samples; anything where it has none
            self._places = pl.Series(np.cumsum(is_sample) - 1).set(pl.Series(~is_sample), None)

    def __call__(self, values: pl.Series) -> pl.Series:
        """Spread the values of samples over lines, null where a line is none; no values are nulls for all."""
        if not len(values):
            return pl.Series([None], dtype=values.dtype).new_from_index(0, self._num_lines)
        return values if self._places is None else values.gather(self._places)


def _find_field(name: str, field_names: Mapping[str, str]) -> str:
    """Give the field of a line that a column to keep means."""
    if name in field_names:
        return field_names[name]
    known = ", ".join(dict.fromkeys(field_names.values()))
    raise ConfigError(f"expected --keep to name fields of a line, found `{name}`", hint=f"fields: {known}")
