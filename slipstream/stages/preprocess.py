"""Preprocess: raw lines to encoded columns.

Reads   raw files      plain, .gz or .zst, in any number, as one stream in the order given
Writes  preprocess/    {train,val,test}/part-*.parquet, vocab/<table>.parquet and .lookup.arrow, past/<column>.arrow,
                       rejects/part-*.parquet
Keeps   every line is a sample or a reject; the same bytes for the same input, whatever the threads or chunk size
Costs   one pass over the text, then two over the parsed numbers on disk; memory for the chunks in flight and
        the vocabulary, never for the number of samples

Three passes, because rows are ranked by training counts and the split is known only after the last line:
parse (text to numbers, dictionary-encoded per chunk), count (one table at a time), encode (numbers to rows). What dense
columns need to know of the training split is learnt between the last two.
Each finished chunk, table and part is kept, so a killed run goes on where it stopped. Parsed chunks depend on the raw
files and the source alone; they stay in the run folder, and another vocabulary limit or split goes on from them.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl

from slipstream.datasets.dense_columns import learn_dense_encoding
from slipstream.datasets.encoding import SampleEncoder
from slipstream.datasets.parsing import ParsedFiles, parse_files
from slipstream.datasets.past_columns import PastFeatures, find_past_features, learn_past
from slipstream.datasets.registry import SOURCES
from slipstream.datasets.source import ColumnarSource, GroupingSource, Source, SourceOptions
from slipstream.engine.choice import open_engine
from slipstream.errors import ConfigError, DataError
from slipstream.io.artifacts import PARSED, StageKey
from slipstream.io.capacity import require_disk, require_memory
from slipstream.io.figures import ListFigures, PreprocessFigures
from slipstream.io.locks import hold
from slipstream.io.lookups import lookup_path, open_lookup, write_lookup
from slipstream.io.parsed import FORMAT as PARSED_FORMAT
from slipstream.io.parsed import ParsedChunk, dictionary_of
from slipstream.io.processors import usable_cores
from slipstream.io.raw import estimate_text_bytes, find_raw_files, find_twins, is_parquet
from slipstream.io.samples import write_parquet
from slipstream.io.split_layout import SplitLayout
from slipstream.ops import split as splits
from slipstream.ops.dense import DenseEncoding
from slipstream.ops.parallel import Engine, Threads
from slipstream.ops.past import PastEncoding
from slipstream.ops.plausibility import doubt_classes, doubt_split, doubt_yield
from slipstream.ops.vocabulary import (
    RawIdCounter,
    build_vocabulary,
    hash_to_buckets,
)
from slipstream.options import parse_bytes, to_dict
from slipstream.preprocess_schema import PreprocessConfig
from slipstream.progress import Progress
from slipstream.schema import MISSING_ID, SPLITS, table_name
from slipstream.stage import StageJob

# Measured on Criteo text: bytes on disk per byte of text, and of memory per worker and byte of a chunk.
_DISK_PER_TEXT_BYTE = 0.8
_MEMORY_PER_WORKER = 9
_BASE_BYTES = 128 << 20
_LOOKUP_BYTES_PER_ROW = 12


def run_stage(job: StageJob) -> PreprocessFigures:
    """Run as a stage of a pipeline: on what was generated, or else on raw files."""
    job, dataset = job.absolute(), job.config.dataset
    if "generate" in job.inputs:
        generated = job.inputs["generate"]
        files = [str(generated.check(path)) for path in generated.files(suffix=".tsv")]
    else:
        files = find_raw_files(dataset.raw)
    options = SourceOptions(
        files=files,
        seed=job.config.seed,
        max_ind_range=dataset.max_ind_range,
        history_length=dataset.history_length,
        points_per_user=dataset.points_per_user,
        layout=dataset.layout,
    )
    source = SOURCES.get(dataset.source)(options)
    with open_engine(job.config.engine, job.scratch, job.claim, job.progress) as (engine, progress):
        return run(
            job.config.preprocess,
            source=source,
            files=files,
            seed=job.config.seed,
            scratch=job.scratch,
            progress=progress,
            negative_keep_ratio=dataset.negative_keep_ratio,
            parsed_dir=job.scratch.parents[1] / PARSED / _parsed_key(job, source).fingerprint,
            engine=engine,
        )


def _parsed_key(job: StageJob, source: Source) -> StageKey:
    """Say what parsed chunks depend on: all that preprocess does, but for its section and which negatives are kept."""
    others = {*to_dict(job.config.preprocess), "negative_keep_ratio"}
    settings = {name: value for name, value in job.key.config.items() if name not in others}
    settings |= {"parsed_format": PARSED_FORMAT}
    seed = job.config.seed if isinstance(source, GroupingSource) else 0  # other sources draw nothing
    return StageKey(stage=PARSED, config=settings, inputs=job.key.inputs, seed=seed)


def run(
    config: PreprocessConfig,
    *,
    source: Source,
    files: Sequence[str],
    seed: int,
    scratch: Path,
    progress: Progress,
    negative_keep_ratio: float = 1.0,
    parsed_dir: Path | None = None,
    engine: Engine | None = None,
) -> PreprocessFigures:
    """Turn raw files into encoded splits below `scratch`.

    Args:
        config: Section `preprocess`.
        source: The raw format.
        files: Raw files, in order.
        seed: Of split `random` and of negatives left out.
        scratch: Folder to write to.
        progress: Told how far it is.
        negative_keep_ratio: Share of the training split's negatives to keep, in (0, 1].
        parsed_dir: Where parsed chunks are, or are put and stay for other limits and splits; None for `scratch`.
        engine: Who works on chunks, tables and parts; None for threads of this process.

    Returns:
        Samples and positives per split, lines, rejected, rows per table; and warnings.

    Raises:
        CapacityError: Memory or disk would not do.
        DataError: A file cannot be read, too many lines are rejected, a split would be empty, or training would know
            one class only.
    """
    _check_table_names(config, source)
    _find_past_features(config, source)
    _check_columns(files, source)
    # one more than cores: there is always one that waits for the disk or for its turn in Python
    team = _Team(engine or Threads(), config.num_threads or usable_cores() + 1, progress)
    parsed_dir = parsed_dir or scratch / "work"
    _check_capacity(config, files, (scratch, parsed_dir), team)
    parsed = _parse(config, source, files, parsed_dir, team)
    rejected = parsed.check_rejects(config.max_reject_ratio)
    layout = SplitLayout(
        config.split, parsed.samples, store=parsed.store, seed=seed, negative_keep_ratio=negative_keep_ratio
    )
    positives = layout.count_positives()
    _check_classes(layout.totals["train"], positives["train"])
    rows = _count(_Counting(config, source, layout, scratch), team)
    dense = _learn_dense(config, source, layout, team)
    past = _learn_past(config, source, layout, positives["train"], scratch, team)
    _check_lookup_memory(rows, team)
    encoder = SampleEncoder(source, layout, buckets=_buckets(config, source), dense=dense, past=past, folder=scratch)
    _encode(_Encoding(encoder, scratch), layout.totals, config.samples_per_part, team)
    parsed.write_rejects(scratch / "rejects")
    return PreprocessFigures(
        lines=parsed.num_lines,
        rejected=rejected,
        samples=layout.totals,
        positives=positives,
        num_dense=dense.width + (past.width if past else 0),
        rows_per_table={table_name(index): num_rows for index, num_rows in enumerate(rows)},
        files=[Path(file).name for file in files],
        columns=dict(source.column_names) or None,
        extra_columns=list(source.extra_columns) or None,
        fields=list(source.fields) if source.takes_fields_from_files else None,
        table_of_column=list(source.table_of_column) if len(source.table_of_column) != source.num_tables else None,
        padding_rows=_find_padding(source, scratch),
        bags=list(source.bags) or None,
        lists=_sum_up_lists(parsed.samples),
        past=asdict(past) if past else None,
        **_describe_dense(dense),
        negatives_left_out=layout.num_left_out if negative_keep_ratio < 1 else None,
        warnings=_find_doubts(config, files, layout, positives, accepted=parsed.num_lines - rejected),
    )


@dataclass(frozen=True, slots=True)
class _Team:
    """Who works on the passes, how many at once, and who is told."""

    engine: Engine
    workers: int
    """Threads of this process."""
    progress: Progress


def _parse(config: PreprocessConfig, source: Source, files: Sequence[str], folder: Path, team: _Team) -> ParsedFiles:
    with hold(folder) as claim:
        return parse_files(
            source,
            files=files,
            folder=folder,
            chunk_bytes=parse_bytes(config.chunk_bytes),
            max_reject_ratio=config.max_reject_ratio,
            workers=team.workers,
            progress=team.progress,
            engine=team.engine.holding(claim),
        )


def _find_doubts(
    config: PreprocessConfig, files: Sequence[str], layout: SplitLayout, positives: dict[str, int], *, accepted: int
) -> list[str]:
    """Say what looks wrong though nothing failed."""
    num_samples = sum(layout.totals.values()) + layout.num_left_out
    return [
        *find_twins(files),
        *doubt_yield(accepted=accepted, samples=num_samples),
        *doubt_split(config.split, layout.totals, left_out=layout.num_left_out),
        *doubt_classes(layout.totals, positives),
    ]


# --- before the work ----------------------------------------------------------------------------------------


def _check_columns(files: Sequence[str], source: Source) -> None:
    for file in files:
        if is_parquet(file) and not isinstance(source, ColumnarSource):
            raise DataError(
                f"`dataset.raw` names the Parquet file `{file}`, and this source reads text only",
                hint="give the text files, or set `dataset.source` to one that reads Parquet: criteo, table",
            )


def _check_capacity(config: PreprocessConfig, files: Sequence[str], folders: Sequence[Path], team: _Team) -> None:
    text_bytes = sum(estimate_text_bytes(file) for file in files)
    chunk_bytes = min(parse_bytes(config.chunk_bytes), text_bytes)
    if team.engine.shares_memory:  # workers elsewhere have memory of their own
        require_memory(
            _BASE_BYTES + (_MEMORY_PER_WORKER * team.workers + 2) * chunk_bytes,
            purpose="preprocess",
            hint=f"lower `preprocess.chunk_bytes` ({config.chunk_bytes}) or `preprocess.num_threads` ({team.workers})",
        )
    there = {file for folder in folders for file in folder.rglob("*") if file.is_file()}
    written = sum(file.stat().st_size for file in there)
    require_disk(
        folders[0],
        int(text_bytes * _DISK_PER_TEXT_BYTE) - written,
        purpose=f"preprocess of about {text_bytes / 1e9:,.1f} GB of text",
        hint="free some disk, or choose a folder on a larger one with --runs",
    )


def _check_classes(samples: int, positives: int) -> None:
    if positives in (0, samples):
        raise DataError(
            f"every one of {samples:,} training samples has label {int(positives > 0)}: there is nothing to learn",
            hint="check the label column, `preprocess.split` and, where set, `dataset.negative_keep_ratio`",
        )


def _check_lookup_memory(rows: Sequence[int], team: _Team) -> None:
    if not team.engine.shares_memory:
        return
    require_memory(
        sum(rows) * _LOOKUP_BYTES_PER_ROW,
        purpose="looking up rows",
        hint="make the vocabulary smaller: raise `preprocess.freq_threshold`, or set `preprocess.max_rows` or "
        "`preprocess.num_buckets`, for all tables or for the largest; what is parsed is kept",
    )


# --- pass 2: count -------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Counting:
    """What it takes to count the values of a table."""

    config: PreprocessConfig
    source: Source
    layout: SplitLayout
    scratch: Path


def _count(counting: _Counting, team: _Team) -> list[int]:
    """Write the vocabulary of every table; returns their rows."""
    tables = range(counting.source.num_tables)
    rows = []
    with team.progress.task("count", len(tables), "tables") as advance:
        for num_rows in team.engine.in_order(_count_table, tables, context=counting, workers=team.workers):
            rows.append(num_rows)
            advance(1, "")
    return rows


def _count_table(counting: _Counting, index: int) -> int:
    config, source, layout, scratch = counting.config, counting.source, counting.layout, counting.scratch
    name = table_name(index)
    limits = config.limits_of(name)
    assert limits.freq_threshold is not None
    finished = lookup_path(scratch, name)  # is written last
    if finished.exists():
        return 1 + len(open_lookup(finished).rows)
    counter = RawIdCounter()
    columns = [table_name(column) for column, table in enumerate(source.table_of_column) if table == index]
    for chunk_index, chunk in enumerate(layout.chunks):
        members = layout.members(chunk_index, splits.TRAIN)
        for column in columns:
            raw_ids, sample_codes = dictionary_of(layout.store.open(chunk, [column]), column)
            if limits.num_buckets:
                raw_ids = hash_to_buckets(raw_ids, limits.num_buckets)
            counter.add(raw_ids, np.bincount(sample_codes[members], minlength=len(raw_ids)))
    vocabulary = build_vocabulary(
        *counter.result(),
        freq_threshold=limits.freq_threshold,
        max_rows=limits.max_rows or 0,
        reserved=MISSING_ID if index in source.padded_tables else None,
    )
    if limits.num_buckets:
        text = pl.Series(vocabulary.raw_ids).cast(pl.String)
    else:
        text = _write_raw_ids(vocabulary.raw_ids, source, layout.store.texts(layout.chunks, columns), name)
    frame = pl.DataFrame(
        {
            "raw_id": pl.concat([pl.Series([None], dtype=pl.String), text]),
            "row": pl.Series(np.arange(vocabulary.num_rows, dtype=np.int32)),
            "count": vocabulary.counts,
        }
    )
    write_parquet(frame.to_arrow(), scratch / "vocab" / f"{name}.parquet")
    write_lookup(finished, vocabulary.lookup())
    return vocabulary.num_rows


def _write_raw_ids(raw_ids: np.ndarray, source: Source, texts: pl.DataFrame, table: str) -> pl.Series:
    """Raw ids as the source wrote them: by themselves, or by the texts that the chunks kept."""
    written = source.format_raw_ids(raw_ids)
    if texts.is_empty():
        return written
    twice = texts.filter(pl.col("raw_id").is_duplicated()).sort("raw_id", "text").get_column("text").head(2).to_list()
    if twice:
        raise DataError(
            f"two values of table `{table}`, {twice[0]!r} and {twice[1]!r}, have the same 63-bit hash",
            hint="change one of them in the raw files; they would share a row",
        )
    asked = pl.DataFrame({"raw_id": raw_ids, "written": written})
    found = asked.join(texts, on="raw_id", how="left", maintain_order="left")
    return found.select(pl.coalesce("text", "written")).to_series()


def _learn_dense(config: PreprocessConfig, source: Source, layout: SplitLayout, team: _Team) -> DenseEncoding:
    return learn_dense_encoding(
        layout,
        source.num_dense,
        transform=config.dense_transform,
        missing_flags=config.missing_flags,
        workers=team.workers,
        engine=team.engine,
    )


def _describe_dense(dense: DenseEncoding) -> dict[str, Any]:
    """Give the figures of dense columns."""
    return {
        "dense_minima": list(dense.minima) or None,
        "dense_means": list(dense.means) or None,
        "dense_deviations": list(dense.deviations) or None,
        "flagged_columns": list(dense.flagged) or None,
    }


def _learn_past(
    config: PreprocessConfig,
    source: Source,
    layout: SplitLayout,
    positives: int,
    folder: Path,
    team: _Team,
) -> PastEncoding | None:
    features = _find_past_features(config, source)
    if features is None:
        return None
    return learn_past(
        features,
        layout,
        transform=config.dense_transform,
        positives=positives,
        folder=folder,
        workers=team.workers,
        progress=team.progress,
        engine=team.engine,
    )


def _find_past_features(config: PreprocessConfig, source: Source) -> PastFeatures | None:
    return find_past_features(
        source,
        counts=config.count_features,
        targets=config.target_features,
        prior=config.target_prior,
        buckets=_buckets(config, source),
    )


def _buckets(config: PreprocessConfig, source: Source) -> list[int]:
    """Give the buckets of each table; 0 where raw ids are not hashed."""
    return [config.limits_of(table_name(index)).num_buckets or 0 for index in range(source.num_tables)]


# --- pass 3: encode ------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Encoding:
    """What it takes to encode a part."""

    encoder: SampleEncoder
    out_dir: Path


def _encode(encoding: _Encoding, totals: dict[str, int], samples_per_part: int, team: _Team) -> None:
    parts = [
        (code, number, first, min(first + samples_per_part, totals[name]))
        for code, name in enumerate(SPLITS)
        for number, first in enumerate(range(0, totals[name], samples_per_part))
    ]
    with team.progress.task("encode", sum(totals.values()), "samples") as advance:
        for done in team.engine.in_order(_write_part, parts, context=encoding, workers=team.workers):
            advance(done, "")


def _write_part(encoding: _Encoding, part: tuple[int, int, int, int]) -> int:
    """Write the samples first..stop-1 of a split, where that is not done yet; returns how many these are."""
    code, number, first, stop = part
    path = encoding.out_dir / SPLITS[code] / f"part-{number:05d}.parquet"
    if not path.exists():
        write_parquet(encoding.encoder.encode(code, first, stop), path)
    return stop - first


# --- helpers -------------------------------------------------------------------------------------------------


def _find_padding(source: Source, folder: Path) -> dict[str, int] | None:
    """Tables with a row that stands for padding, and that row."""
    padding = np.array([MISSING_ID])
    names = [table_name(index) for index in source.padded_tables]
    return {name: int(open_lookup(lookup_path(folder, name))(padding)[0]) for name in names} or None


def _sum_up_lists(chunks: Sequence[ParsedChunk]) -> dict[str, ListFigures] | None:
    """Add up what chunks have of lists."""
    totals: dict[str, Counter[str]] = {}
    for chunk in chunks:
        for name, counts in chunk.lists.items():
            totals.setdefault(name, Counter()).update(counts)
    names = [spec.name for spec in fields(ListFigures)]
    return {table: ListFigures(**{name: total[name] for name in names}) for table, total in totals.items()} or None


def _check_table_names(config: PreprocessConfig, source: Source) -> None:
    known = {table_name(index) for index in range(source.num_tables)}
    for name in config.tables:
        if name not in known:
            raise ConfigError(
                f"`preprocess.tables.{name}` names no table",
                hint=f"this source has {table_name(0)} to {table_name(source.num_tables - 1)}",
            )
    for name in [table_name(index) for index in source.padded_tables]:
        if config.limits_of(name).num_buckets:
            raise ConfigError(
                f"`preprocess.num_buckets` hashes table `{name}`, whose padding must keep a row of its own",
                hint=f"set preprocess.tables.{name}.num_buckets = 0, and cap it with max_rows or freq_threshold",
            )
