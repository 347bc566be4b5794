"""Export: encoded samples in the formats that other projects load.

Reads   preprocess/   parts of every split
Writes  a folder      dlrm-npz      samples_processed.npz (X_int, X_cat, y, counts), samples_day_count.npz
                      torchrec-npy  {train,val,test}_{dense,sparse,labels}.npy
                      parquet       {train,val,test}.parquet
        and export.json, written last: splits, columns, rows per table, dense transform, size and hash of every file
Keeps   every sample once, in the order of the parts; a file is whole or absent; the same bytes for the same input
Costs   one pass over the parts for every array; memory for one part

DLRM takes log(x + 1) when it loads, so it wants dense values as they were counted. They are recovered from what
preprocess stored: max(x, 0) under `dlrm` and `standard`, x from -1 on under `nvidia`, x from the training minimum on
under `torchrec`, x itself under `none`; then negatives become 0, as DLRM makes them. The stored logarithm is float32,
so counts are exact up to a million (`standard`: a hundred thousand); larger ones may be off by 5e-7 of themselves,
which is less than float32 keeps of their logarithm. Flags of missing values, and what was before a line, are no counts
of its own and stay out. TorchRec takes dense values as they are fed to the model, so it gets the stored ones; to get
TorchRec's own, preprocess with `dense_transform = "torchrec"`.
"""

from __future__ import annotations

import zipfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq

from slipstream.errors import CapacityError, ConfigError, did_you_mean
from slipstream.io.artifacts import Artifact, hash_file, wrap_write_errors, write_atomically, write_json
from slipstream.io.capacity import require_disk, require_memory
from slipstream.io.figures import PreprocessFigures
from slipstream.io.samples import count_samples
from slipstream.ops.npz import write_array
from slipstream.progress import Progress
from slipstream.schema import LABEL, SPLITS, dense_name, table_name
from slipstream.serving.encoder import describe_encoding

FORMATS = ("dlrm-npz", "torchrec-npy", "parquet")
"""What can be written."""

_DESCRIBED = {"samples", "rows_per_table", "columns", "extra_columns", "table_of_column", "padding_rows", "bags"}
"""Figures of preprocess that the sidecar repeats."""
_DLRM_ORDER = ("train", "test", "val")
_DLRM_DAYS = 7
_NPZ_DATE = (1980, 1, 1, 0, 0, 0)
_MOST_ROWS = 2**31
_PARQUET_RATIO = 1.6
"""Plain pages of every reader's Parquet over those of the parts."""
_BASE_BYTES, _COPIES_IN_MEMORY = 128 << 20, 2


def run(
    processed: Artifact, *, export_format: str, out_dir: Path, progress: Progress, row_group_samples: int = 0
) -> dict[str, Any]:
    """Write the samples of a preprocess artifact for another project.

    Args:
        processed: The preprocess artifact.
        export_format: What to write; see the top of this module.
        out_dir: Folder to write to; files of the same names are replaced.
        progress: Told how far it is.
        row_group_samples: Samples in each row group of `parquet`; 0 makes one of each part.

    Returns:
        What export.json says.

    Raises:
        ArtifactError: A part is missing or was altered, or a file cannot be written.
        CapacityError: A row number does not fit the format, or memory or disk would not do.
        ConfigError: The format is not known.
    """
    check_format(export_format)
    with wrap_write_errors(out_dir):
        out_dir.mkdir(parents=True, exist_ok=True)
    encoded = PreprocessFigures.of(processed)
    parts = _Parts(processed, encoded)
    _check_capacity(parts, processed, export_format, out_dir)
    # sidecar last: a folder with it is whole
    (out_dir / "export.json").unlink(missing_ok=True)
    with progress.task(f"export {export_format}", parts.num_reads(export_format), "parts") as advance:
        parts.on_read = lambda: advance(1, "")
        if export_format == "parquet":
            files = _write_parquet(parts, out_dir, row_group_samples)
        else:
            files = _write_dlrm(parts, out_dir) if export_format == "dlrm-npz" else _write_torchrec(parts, out_dir)
    summary: dict[str, Any] = {
        "format": export_format,
        "source": processed.manifest["config"]["source"],
        "preprocess": processed.path.name,
        "dense_transform": parts.transform,
        **{name: value for name, value in encoded.to_json().items() if name in _DESCRIBED},
        "files": {file.name: {"bytes": file.stat().st_size, "xxh3": hash_file(file)} for file in files},
    }
    write_json(out_dir / "export.json", summary)
    return summary


def _check_capacity(parts: _Parts, processed: Artifact, export_format: str, out_dir: Path) -> None:
    """Refuse what has no room: whole arrays of four bytes a value, or Parquet about as large as the parts."""
    num_values = len(parts.dense) + len(parts.sparse) + 1
    if export_format == "parquet":
        needed = int(_PARQUET_RATIO * parts.stored_bytes)
    else:
        needed = 4 * num_values * sum(parts.sizes.values())
    samples_at_once = min(max(parts.sizes.values()), processed.manifest["config"]["samples_per_part"])
    purpose = f"export to {export_format}"
    require_memory(
        _BASE_BYTES + _COPIES_IN_MEMORY * 8 * num_values * samples_at_once,
        purpose=purpose,
        hint="preprocess into smaller parts: lower `preprocess.samples_per_part`",
    )
    require_disk(out_dir, needed, purpose=purpose, hint="free some disk, or name a folder on a larger one with --out")


def check_format(export_format: str) -> None:
    """Make sure that a format is known.

    Raises:
        ConfigError: It is not.
    """
    if export_format not in FORMATS:
        raise ConfigError(
            f"expected a format among {', '.join(FORMATS)}, found `{export_format}`",
            hint=did_you_mean(export_format, FORMATS),
        )


class _Parts:
    """Columns of the parts of an artifact, a part at a time."""

    def __init__(self, processed: Artifact, encoded: PreprocessFigures) -> None:
        self._processed = processed
        self._files = {name: processed.files(f"{name}/", ".parquet") for name in SPLITS}
        for files in self._files.values():
            for file in files:
                processed.check(file)
        self.sizes: dict[str, int] = {
            name: sum(count_samples(file) for file in files) for name, files in self._files.items()
        }
        self.stored_bytes = sum(file.stat().st_size for files in self._files.values() for file in files)
        self.table_of_column = encoded.column_tables
        self.rows_of_column = [list(encoded.rows_per_table.values())[table] for table in self.table_of_column]
        self.dense = [dense_name(index) for index in range(encoded.num_dense)]
        learnt = describe_encoding(processed)
        self.counts = self.dense[: encoded.num_dense - learnt.num_added]
        self.sparse = [table_name(index) for index in range(len(self.table_of_column))]
        self.transform: str = processed.manifest["config"]["dense_transform"]
        self.encoding = learnt.dense(len(self.counts))
        self.on_read: Callable[[], None] = lambda: None

    def num_reads(self, export_format: str) -> int:
        """How often a part will be read."""
        return sum(map(len, self._files.values())) * (1 if export_format == "parquet" else 3)

    def tables(self, split: str) -> Iterator[Any]:
        """Whole Arrow tables."""
        for file in self._files[split]:
            yield pq.read_table(file)
            self.on_read()

    def labels(self, split: str) -> Iterator[np.ndarray]:
        """Shape (n,), uint8."""
        for table in self._read(split, [LABEL]):
            yield table.column(LABEL).to_numpy()

    def dense_values(self, split: str) -> Iterator[np.ndarray]:
        """As they are stored. Shape (n, dense columns), float32."""
        for table in self._read(split, self.dense):
            yield _stack(table, self.dense, np.float32)

    def dense_counts(self, split: str) -> Iterator[np.ndarray]:
        """As they were counted, negatives as 0. Shape (n, dense columns of the source), int32."""
        for table in self._read(split, self.counts):
            counts = np.empty((table.num_rows, len(self.counts)), np.int64)
            for index, name in enumerate(self.counts):
                column = table.column(name).to_numpy()
                counts[:, index] = self.encoding.restore(index, column)
                # a count comes back as the value it was stored as; what lies between two counts does not
                again = self.encoding.encode(index, counts[:, index])
                if not np.allclose(again, column, rtol=1e-5, atol=1e-5):
                    raise ConfigError(
                        f"dlrm-npz holds whole numbers, and `{name}` has fractions",
                        hint="export to torchrec-npy or parquet, which keep them",
                    )
            yield np.clip(counts, 0, np.iinfo(np.int32).max).astype(np.int32)

    def rows(self, split: str) -> Iterator[np.ndarray]:
        """Shape (n, sparse columns), int32."""
        for table in self._read(split, self.sparse):
            yield _stack(table, self.sparse, np.int32)

    def _read(self, split: str, columns: Sequence[str]) -> Iterator[Any]:
        for file in self._files[split]:
            yield pq.read_table(file, columns=list(columns))
            self.on_read()


def _stack(table: Any, columns: Sequence[str], dtype: type) -> np.ndarray:
    values = np.empty((table.num_rows, len(columns)), dtype)
    for index, name in enumerate(columns):
        values[:, index] = table.column(name).to_numpy()
    return values


def _write_dlrm(parts: _Parts, out_dir: Path) -> list[Path]:
    """One npz of all samples, training first, and how many samples each of seven days has.

    DLRM trains on all days but the last and halves that one into test and validation, test first; so the training
    split is cut evenly into six days, and test and validation make the seventh.
    """
    total = sum(parts.sizes.values())
    arrays = {
        "X_int": (parts.dense_counts, (total, len(parts.counts))),
        "X_cat": (parts.rows, (total, len(parts.sparse))),
        "y": (parts.labels, (total,)),
    }
    path = out_dir / "samples_processed.npz"
    with (
        write_atomically(path) as partial,
        zipfile.ZipFile(partial, "w", zipfile.ZIP_STORED, allowZip64=True) as archive,
    ):
        for name, (read, shape) in arrays.items():
            with archive.open(zipfile.ZipInfo(f"{name}.npy", _NPZ_DATE), "w", force_zip64=True) as stream:
                blocks = (block for split in _DLRM_ORDER for block in read(split))
                write_array(stream, blocks, shape=shape, dtype=np.dtype(np.int32))
        _write_small(archive, "counts", np.array(parts.rows_of_column, np.int32))
    each, rest = divmod(parts.sizes["train"], _DLRM_DAYS - 1)
    sizes = [each + (day < rest) for day in range(_DLRM_DAYS - 1)]
    per_day = np.array([*sizes, total - parts.sizes["train"]], np.int32)
    day_path = out_dir / "samples_day_count.npz"
    with write_atomically(day_path) as partial, zipfile.ZipFile(partial, "w") as archive:
        _write_small(archive, "total_per_file", per_day)
    return [path, day_path]


def _write_small(archive: zipfile.ZipFile, name: str, array: np.ndarray) -> None:
    with archive.open(zipfile.ZipInfo(f"{name}.npy", _NPZ_DATE), "w") as stream:
        write_array(stream, [array], shape=array.shape, dtype=array.dtype)


def _write_torchrec(parts: _Parts, out_dir: Path) -> list[Path]:
    if max(parts.rows_of_column, default=0) >= _MOST_ROWS:
        raise CapacityError("a table has 2^31 rows or more, which int32 cannot number", hint="use parquet")
    written = []
    for split in SPLITS:
        size = parts.sizes[split]
        arrays = {
            "dense": (parts.dense_values(split), (size, len(parts.dense)), np.float32),
            "sparse": (parts.rows(split), (size, len(parts.sparse)), np.int32),
            "labels": ((labels[:, None] for labels in parts.labels(split)), (size, 1), np.int32),
        }
        for name, (blocks, shape, dtype) in arrays.items():
            path = out_dir / f"{split}_{name}.npy"
            with write_atomically(path) as partial, partial.open("wb") as stream:
                write_array(stream, blocks, shape=shape, dtype=np.dtype(dtype))
            written.append(path)
    return written


def _write_parquet(parts: _Parts, out_dir: Path, row_group_samples: int) -> list[Path]:
    written = []
    for split in SPLITS:
        writer: pq.ParquetWriter | None = None
        path = out_dir / f"{split}.parquet"
        with write_atomically(path) as partial:
            try:
                for table in parts.tables(split):
                    # plain encodings and statistics: what every reader of Parquet knows
                    writer = writer or pq.ParquetWriter(partial, table.schema, compression="zstd")
                    writer.write_table(table, row_group_size=row_group_samples or table.num_rows)
            finally:
                if writer is not None:
                    writer.close()
        written.append(path)
    return written
