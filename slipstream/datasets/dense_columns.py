"""Between the first and the last pass of preprocess: what dense columns are like in the training split."""

from __future__ import annotations

import numpy as np

from slipstream.io.split_layout import SplitLayout
from slipstream.ops import split as splits
from slipstream.ops.dense import DenseEncoding, Moments, logarithms
from slipstream.ops.parallel import Engine
from slipstream.schema import dense_name


def learn_dense_encoding(
    layout: SplitLayout, num_columns: int, *, transform: str, missing_flags: bool, workers: int, engine: Engine
) -> DenseEncoding:
    """Learn from the training split what a transform and flags have to know; each column is read once, chunk by chunk.

    Args:
        layout: The split of the parsed chunks.
        num_columns: Dense columns of the source.
        transform: Its name.
        missing_flags: Whether columns with missing training values get a flag.
        workers: Columns worked on at once.
        engine: Who works on them.
    """
    columns = [dense_name(index) for index in range(num_columns)]
    minima: list[int] = []
    moments: list[tuple[float, float]] = []
    if transform == "torchrec":
        minima = list(engine.in_order(_minimum, columns, context=layout, workers=workers))
    if transform == "standard":
        moments = list(engine.in_order(_moments, columns, context=layout, workers=workers))
    lacking = engine.in_order(_lacks_values, columns if missing_flags else (), context=layout, workers=workers)
    return DenseEncoding(
        transform=transform,
        num_columns=num_columns,
        minima=minima,
        means=[mean for mean, _ in moments],
        deviations=[deviation for _, deviation in moments],
        flagged=[index for index, lacks in enumerate(lacking) if lacks],
    )


def _minimum(layout: SplitLayout, name: str) -> int:
    least = 0
    for chunk_index, chunk in enumerate(layout.chunks):
        values = layout.store.open(chunk, [name]).column(name).to_numpy()
        used = values[layout.members(chunk_index, splits.TRAIN)]
        least = min(least, int(np.floor(used.min()))) if used.size else least
    return least


def _moments(layout: SplitLayout, name: str) -> tuple[float, float]:
    moments = Moments()
    for chunk_index, chunk in enumerate(layout.chunks):
        values = layout.store.open(chunk, [name]).column(name).to_numpy()
        moments.add(logarithms(values[layout.members(chunk_index, splits.TRAIN)]))
    return moments.result()


def _lacks_values(layout: SplitLayout, name: str) -> bool:
    for chunk_index, chunk in enumerate(layout.chunks):
        missing = layout.store.missing(chunk, name)
        if missing is not None and missing[layout.members(chunk_index, splits.TRAIN)].any():
            return True
    return False
