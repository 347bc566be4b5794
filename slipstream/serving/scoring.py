"""Which way lines of a source are scored, and small logs scored in memory."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

import polars as pl

from slipstream.datasets.source import GroupingSource
from slipstream.io.raw import RawBlock, find_raw_files, read_blocks
from slipstream.progress import Progress, Silent
from slipstream.serving.ensemble import Ensemble
from slipstream.serving.group_scorer import GroupScorer
from slipstream.serving.line_scorer import LineScorer
from slipstream.serving.score_file import number_lines, without_hidden

BLOCK_BYTES = 4 << 20
"""Text scored at once; memory grows with it, and so does how long one thread is alone with the last block."""


def make_scorer(
    models: Ensemble,
    *,
    files: Sequence[str],
    folder: Path,
    keep: Sequence[str] = (),
    block_bytes: int = BLOCK_BYTES,
    progress: Progress | None = None,
) -> LineScorer | GroupScorer:
    """Give what scores the lines of some files, all that has to be done before the first line included.

    Args:
        models: One or more.
        files: Raw files, in order.
        folder: Where to keep what is between lines and their probabilities; what an earlier run left there is used.
        keep: Columns to pass on.
        block_bytes: Text worked on at once.
        progress: Told how far it is.

    Raises:
        ConfigError: A column to keep is none of the source's.
        DataError: Lines of the source are brought together, and a file is no text.
    """
    source = models.encoder.source
    if not isinstance(source, GroupingSource):
        return LineScorer(models, keep=keep)
    return GroupScorer(
        models, source, files=files, folder=folder, keep=keep, block_bytes=block_bytes, progress=progress or Silent()
    )


def score_lines(models: Ensemble, raw: str | pl.DataFrame, *, keep: Sequence[str] = ()) -> pl.DataFrame:
    """Score files, or a frame, in memory.

    Args:
        models: One or more.
        raw: A path, glob or address; or a frame with the columns that Parquet files of the source may have.
        keep: Columns to pass on.

    Returns:
        `file` and `line` where files were read, `probability`, `reason`, and the columns kept.
    """
    if isinstance(raw, pl.DataFrame):
        alone = LineScorer(models, keep=keep)
        block = RawBlock(file_index=0, block_index=0, data=raw, end=raw.height, stored=0)
        return without_hidden(alone.score(block, is_labelled=alone.is_labelled(block)).lines)
    pieces = []
    files = find_raw_files([raw], named_by="score")
    with TemporaryDirectory() as folder:
        scorer = make_scorer(models, files=files, folder=Path(folder), keep=keep)
        for index, file in enumerate(files):
            line, is_labelled = 1, True
            for block in read_blocks(file, file_index=index, block_bytes=BLOCK_BYTES):
                is_labelled = scorer.is_labelled(block) if line == 1 else is_labelled
                scored = scorer.score(block, is_labelled=is_labelled)
                lines = without_hidden(scorer.number(scored, file_index=index, first_line=line).lines)
                pieces.append(number_lines(lines, file=file, first_line=line))
                line += lines.height
    return pl.concat(pieces)
