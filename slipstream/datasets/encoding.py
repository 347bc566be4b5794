"""The last pass of preprocess: numbers of parsed chunks to the rows and dense values of one part."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from slipstream.datasets.past_columns import counts_path, log_odds_path
from slipstream.datasets.source import Source
from slipstream.io.lookups import lookup_path, open_lookup
from slipstream.io.parsed import dictionary_of
from slipstream.io.split_layout import Piece, SplitLayout
from slipstream.ops.dense import DenseEncoding
from slipstream.ops.past import PastEncoding
from slipstream.ops.vocabulary import hash_to_buckets
from slipstream.schema import LABEL, dense_name, table_name

_CHUNKS_LOOKED_UP = 4
_Encode = Callable[[np.ndarray], np.ndarray]


class SampleEncoder:
    """Turns samples of parsed chunks into rows and transformed dense values; several threads may share one.

    Raw ids are looked up in the maps that the folder has of them. Pickled, it is what it was made of.

    Args:
        source: The raw format.
        layout: The split of the parsed chunks.
        buckets: Of each table; 0 where raw ids are not hashed.
        dense: How dense columns are encoded.
        past: Dense columns of what was before each sample, where there are any.
        folder: Of the stage, with vocabularies and what was noted of the past.

    Raises:
        ArtifactError: The map of a table is missing.
    """

    def __init__(
        self,
        source: Source,
        layout: SplitLayout,
        *,
        buckets: Sequence[int],
        dense: DenseEncoding,
        past: PastEncoding | None,
        folder: Path,
    ) -> None:
        self._source, self._layout, self._encoding, self._past, self._folder = source, layout, dense, past, folder
        self._lookups = [open_lookup(lookup_path(folder, table_name(index))) for index in range(source.num_tables)]
        self._dense = [dense_name(index) for index in range(source.num_dense)]
        self._flags = [dense_name(index) for index in range(source.num_dense, dense.width)]
        self._past_columns = _open_past(past, folder, first=dense.width) if past else {}
        self._columns = [table_name(index) for index in range(len(source.table_of_column))]
        self._table_of_column = source.table_of_column
        self._extra = list(source.extra_columns)
        self._buckets = buckets
        # a chunk at the border of two parts is asked for twice, and soon again
        self._rows_of = functools.lru_cache(maxsize=_CHUNKS_LOOKED_UP)(self._look_up_rows)

    def __reduce__(self) -> tuple[Any, ...]:
        """Say how another process makes the same."""
        make = functools.partial(
            SampleEncoder,
            buckets=self._buckets,
            dense=self._encoding,
            past=self._past,
            folder=self._folder,
        )
        return make, (self._source, self._layout)

    def encode(self, code: int, first: int, stop: int) -> pa.Table:
        """Give the samples first..stop-1 of a split, encoded."""
        numbers = dict.fromkeys([*self._dense, *self._flags, *self._past_columns], np.float32)
        kinds = {LABEL: np.uint8} | numbers | dict.fromkeys(self._columns, np.int32)
        columns = {name: np.empty(stop - first, kind) for name, kind in kinds.items()}
        extra: dict[str, list[np.ndarray]] = {name: [] for name in self._extra}
        place = 0
        for piece in self._layout.pieces(code, first, stop):
            end = place + piece.stop - piece.first
            self._encode_piece(code, piece, {name: column[place:end] for name, column in columns.items()}, extra)
            place = end
        joined = {name: np.concatenate(pieces) for name, pieces in extra.items()}
        return pa.table({name: pa.array(values) for name, values in (columns | joined).items()})

    def _encode_piece(
        self, code: int, piece: Piece, columns: dict[str, np.ndarray], extra: dict[str, list[np.ndarray]]
    ) -> None:
        """Fill columns with the samples of a piece; add theirs to the extra ones."""
        chunk = self._layout.chunks[piece.chunk_index]
        table = self._layout.store.open(chunk, [LABEL, *self._dense, *self._columns, *self._extra])
        members = self._layout.members(piece.chunk_index, code)
        if isinstance(members, slice):
            picked: Any = slice(members.start + piece.first, members.start + piece.stop)
        else:
            picked = members[piece.first : piece.stop]
        columns[LABEL][:] = table.column(LABEL).to_numpy()[picked]
        for index, name in enumerate(self._dense):
            columns[name][:] = self._encoding.encode(index, table.column(name).to_numpy()[picked])
        for name, index in zip(self._flags, self._encoding.flagged, strict=True):
            missing = self._layout.store.missing(chunk, dense_name(index))
            columns[name][:] = 0 if missing is None else missing[picked]
        here = self._layout.samples_of(piece.chunk_index)
        for name, (noted, encode) in self._past_columns.items():
            columns[name][:] = encode(noted[here][picked])
        for name, rows in zip(self._columns, self._rows_of(piece.chunk_index), strict=True):
            # codes are places in `rows` by construction; clipping them is four times as fast as checking them
            np.take(rows, dictionary_of(table, name)[1][picked], out=columns[name], mode="clip")
        for name, pieces in extra.items():
            pieces.append(table.column(name).to_numpy()[picked])

    def _look_up_rows(self, chunk_index: int) -> list[np.ndarray]:
        """Per sparse column, the row of each distinct raw id of a chunk."""
        table = self._layout.store.open(self._layout.chunks[chunk_index], self._columns)
        found = []
        for name, table_index in zip(self._columns, self._table_of_column, strict=True):
            raw_ids, _ = dictionary_of(table, name)
            buckets = self._buckets[table_index]
            found.append(self._lookups[table_index](hash_to_buckets(raw_ids, buckets) if buckets else raw_ids))
        return found


def _open_past(past: PastEncoding, folder: Path, *, first: int) -> dict[str, tuple[np.ndarray, _Encode]]:
    """By name of each dense column, numbered from `first`: what was noted of all samples, and how it is encoded."""
    noted = [
        *((counts_path(folder, column), past.encode_counts, at) for at, column in enumerate(past.count_columns)),
        *((log_odds_path(folder, column), past.encode_log_odds, at) for at, column in enumerate(past.target_columns)),
    ]
    return {
        dense_name(number): (np.load(path, mmap_mode="r", allow_pickle=False), functools.partial(encode, at))
        for number, (path, encode, at) in enumerate(noted, start=first)
    }
