"""Start a training from a model that was trained before: on older data, with another vocabulary, another hot set.

Rows are found again by raw id, through the vocabularies of both; a table is found again by the name of its column where
the data have names. Dense layers are taken over where name and shape agree. What is not found starts as it would have
without: rows of new ids drawn by seed, layers of another shape too. The optimizer starts anew.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np
import polars as pl
import torch

from slipstream.errors import ConfigError
from slipstream.io.artifacts import Artifact, open_artifact
from slipstream.io.figures import StartFigures
from slipstream.io.model_folder import FILES, read_description
from slipstream.schema import OOV_ROW
from slipstream.serving.encoder import Encoding, describe_encoding
from slipstream.training.assemble import Assembly
from slipstream.training.model_file import StoredTables, load_model

_BLOCK_ROWS = 1 << 16
_MUST_AGREE = ("source", "max_ind_range", "history_length")
"""What decides which raw id a line has."""
_log = logging.getLogger(__name__)


def start_from(folder: Path, parts: Assembly, *, processed: Artifact, padding_rows: Mapping[str, int]) -> StartFigures:
    """Fill rows and layers from a trained model, before anything is trained.

    Args:
        folder: A train artifact.
        parts: What will train; changed in place.
        processed: The preprocess artifact it will train on.
        padding_rows: Tables with a row that stays zero, and that row.

    Raises:
        ArtifactError: The folder holds no whole trained model, or one that was altered.
        ConfigError: Its ids or rows have another meaning or shape.
    """
    trained = open_artifact(folder)
    for name in FILES:
        trained.check(folder / name)
    description = read_description(folder)
    before, now = Encoding(**description["encoding"]), describe_encoding(processed)
    _require_same_ids(folder, before, now)
    cores = [spec.name for spec in parts.representations.specs if spec.representation == "tt"]
    if cores:
        raise ConfigError(
            f"`train.init_from` fills rows, and {', '.join(cores)} are tensor-train cores, which have none",
            hint="hold these tables otherwise, or leave train.init_from out",
        )
    network, tables = load_model(folder)
    found = 0
    for old, new in _same_tables(description["tables"], before, parts.layout.slot_maps, now):
        old_rows = _match_rows(
            trained.check(folder / "vocab" / f"{old}.parquet"),
            processed.check(processed.path / "vocab" / f"{new}.parquet"),
        )
        if new in padding_rows:
            old_rows[padding_rows[new]] = -1  # stays zero
        column = description["column_tables"].index(old)
        _fill(parts, new, tables, column, old_rows, folder)
        found += int(np.count_nonzero(old_rows >= 0))
    rows = sum(map(len, parts.layout.slot_maps.values()))
    own = parts.model.state_dict()
    given = network.state_dict()
    taken = [name for name, value in own.items() if name in given and given[name].shape == value.shape]
    with torch.no_grad():
        for name in taken:
            own[name].copy_(given[name])
    parts.representations.clear_what_is_not_stored(parts.rows)
    parts.representations.set_exact_scales(parts.rows)
    _log.info(
        f"starts from `{folder}`: {found:,} of {rows:,} rows found by raw id, {len(taken)} of {len(own)} tensors of "
        "dense layers by shape"
    )
    return StartFigures(rows_found=found, rows=rows, layers_taken=len(taken), layers=len(own))


def _require_same_ids(folder: Path, before: Encoding, now: Encoding) -> None:
    for name in _MUST_AGREE:
        if getattr(before, name) != getattr(now, name):
            raise ConfigError(
                f"`train.init_from` = '{folder}' has other ids: its `{name}` is {getattr(before, name)!r}, and here it "
                f"is {getattr(now, name)!r}",
                hint="start from a model of the same source with the same options of it",
            )


def _same_tables(
    old_tables: Mapping[str, int], before: Encoding, new_tables: Mapping[str, np.ndarray], now: Encoding
) -> Iterator[tuple[str, str]]:
    """Pairs of tables that mean the same column, by its name where the data have names; hashed alike.

    Raises:
        ConfigError: One of them is hashed into another number of buckets.
    """
    by_column = {before.columns.get(name, name): name for name in old_tables}
    for new in new_tables:
        old = by_column.get(now.columns.get(new, new))
        if old is None:
            continue
        buckets = before.num_buckets.get(old, 0), now.num_buckets.get(new, 0)
        if buckets[0] != buckets[1]:
            raise ConfigError(
                f"`train.init_from`: raw ids of table `{new}` are hashed into {buckets[1]} buckets, and were into "
                f"{buckets[0]} (0: not hashed)",
                hint="set preprocess.num_buckets as it was",
            )
        yield old, new


def _match_rows(old_path: Path, new_path: Path) -> np.ndarray:
    """Old row of every new row, -1 where the raw id is new; row 0, of unknown and rare ones, is row 0. Shape (N,)."""
    old, new = (pl.read_parquet(path, columns=["raw_id", "row"]) for path in (old_path, new_path))
    joined = new.join(old.drop_nulls("raw_id"), on="raw_id", how="left", suffix="_old", maintain_order="left")
    rows = joined["row_old"].fill_null(-1).to_numpy().astype(np.int64)
    rows[OOV_ROW] = OOV_ROW
    return rows


def _fill(parts: Assembly, table: str, tables: StoredTables, column: int, old_rows: np.ndarray, folder: Path) -> None:
    """Put the rows of one table where they live, a block at a time."""
    slots = parts.layout.slot_maps[table]
    # a tail that shares row 0 has no rows to fill
    slots = slots[: len(parts.layout.held_slots(table))]
    places = np.flatnonzero(old_rows[: len(slots)] >= 0)
    for start in range(0, len(places), _BLOCK_ROWS):
        block = places[start : start + _BLOCK_ROWS]
        values = tables.look_up_column(column, torch.from_numpy(old_rows[block]))
        if values.shape[1] != parts.rows.embedding_dim:
            raise ConfigError(
                f"`train.init_from` = '{folder}' has rows of {values.shape[1]} values, and here they have "
                f"{parts.rows.embedding_dim}",
                hint="set model.embedding_dim as it was",
            )
        parts.rows.load(torch.from_numpy(slots[block].astype(np.int64)), values.detach())
