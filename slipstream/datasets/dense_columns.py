"""Between the first and the last pass of preprocess: what dense columns are like in the training split."""

from __future__ import annotations

import numpy as np

from slipstream.io.split_layout import SplitLayout
from slipstream.ops import split as splits
from slipstream.ops.dense import DenseEncoding, Moments, logarithms
from slipstream.ops.parallel import in_order
from slipstream.schema import dense_name


def learn_dense_encoding(
    layout: SplitLayout, num_columns: int, *, transform: str, missing_flags: bool, workers: int
) -> DenseEncoding:
    """Learn from the training split what a transform and flags have to know; each column is read once, chunk by chunk.

    Args:
        layout: The split of the parsed chunks.
        num_columns: Dense columns of the source.
        transform: Its name.
        missing_flags: Whether columns with missing training values get a flag.
        workers: Columns worked on at once.
    """
    columns = range(num_columns)
    minima: list[int] = []
    moments: list[tuple[float, float]] = []
    if transform == "torchrec":
        minima = list(in_order(lambda index: _minimum(dense_name(index), layout), columns, workers))
    if transform == "standard":
        moments = list(in_order(lambda index: _moments(dense_name(index), layout), columns, workers))
    return DenseEncoding(
        transform=transform,
        num_columns=num_columns,
        minima=minima,
        means=[mean for mean, _ in moments],
        deviations=[deviation for _, deviation in moments],
        flagged=[index for index in columns if missing_flags and _lacks_values(dense_name(index), layout)],
    )


def _minimum(name: str, layout: SplitLayout) -> int:
    least = 0
    for chunk_index, chunk in enumerate(layout.chunks):
        values = layout.store.open(chunk, [name]).column(name).to_numpy()
        used = values[layout.members(chunk_index, splits.TRAIN)]
        least = min(least, int(np.floor(used.min()))) if used.size else least
    return least


def _moments(name: str, layout: SplitLayout) -> tuple[float, float]:
    moments = Moments()
    for chunk_index, chunk in enumerate(layout.chunks):
        values = layout.store.open(chunk, [name]).column(name).to_numpy()
        moments.add(logarithms(values[layout.members(chunk_index, splits.TRAIN)]))
    return moments.result()


def _lacks_values(name: str, layout: SplitLayout) -> bool:
    for chunk_index, chunk in enumerate(layout.chunks):
        missing = layout.store.missing(chunk, name)
        if missing is not None and missing[layout.members(chunk_index, splits.TRAIN)].any():
            return True
    return False
