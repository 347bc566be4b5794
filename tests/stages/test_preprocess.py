from __future__ import annotations

import math
from pathlib import Path

import fsspec
import numpy as np
import polars as pl
import pytest
from raw_logs import (
    as_frame,
    expected_rows,
    invoke,
    make_lines,
    read_rejects,
    read_split,
    read_vocab,
    run_preprocess,
    sample_line,
    stage_files,
    write_pipeline,
    write_raw,
)

from slipstream.datasets.criteo import CriteoSource
from slipstream.errors import CapacityError, ConfigError, DataError
from slipstream.io import capacity
from slipstream.ops.vocabulary import hash_to_buckets
from slipstream.pipeline import latest_artifact
from slipstream.stages import preprocess

NUM_LINES = 2100
TRAIN = NUM_LINES * 6 // 7


@pytest.fixture(scope="module")
def lines() -> list[bytes]:
    return make_lines(NUM_LINES)


@pytest.fixture(scope="module")
def log(tmp_path_factory: pytest.TempPathFactory, lines: list[bytes]) -> Path:
    return write_raw(tmp_path_factory.mktemp("raw") / "log.tsv", lines)


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory, log: Path) -> dict[str, bytes]:
    """What the stage makes of the log with default settings, by file."""
    folder = tmp_path_factory.mktemp("plain")
    run_preprocess(folder, [log])
    return stage_files(folder)


def tokens_of(lines: list[bytes], table: int) -> list[bytes]:
    return [line.split(b"\t")[14 + table] for line in lines]


def test_every_line_becomes_a_sample_of_the_chronological_split(tmp_path: Path, log: Path, lines: list[bytes]):
    counts = run_preprocess(tmp_path, [log], dense_transform="none", samples_per_part=500)
    assert counts["samples"] == {"train": TRAIN, "val": 150, "test": 150}
    assert counts["lines"] == NUM_LINES and counts["rejected"] == 0
    in_order = pl.concat([read_split(tmp_path, split) for split in ("train", "test", "val")])
    fields = [line.split(b"\t") for line in lines]
    assert in_order["label"].to_list() == [int(row[0]) for row in fields]
    for column in range(13):
        assert in_order[f"int_{column}"].to_list() == [float(row[1 + column] or 0) for row in fields]
    assert sum(counts["positives"].values()) == sum(row[0] == b"1" for row in fields)


@pytest.mark.parametrize(
    ("limits", "freq_threshold", "max_rows"),
    [({}, 1, 0), ({"freq_threshold": 4}, 4, 0), ({"max_rows": 12}, 1, 12), ({"max_rows": 1}, 1, 1)],
)
def test_rows_are_ranked_by_use_in_the_training_split(
    tmp_path: Path, log: Path, lines: list[bytes], limits: dict[str, int], freq_threshold: int, max_rows: int
):
    counts = run_preprocess(tmp_path, [log], **limits)
    in_order = pl.concat([read_split(tmp_path, split) for split in ("train", "test", "val")])
    for table in (0, 3, 11, 25):
        tokens = tokens_of(lines, table)
        rows = expected_rows(tokens[:TRAIN], freq_threshold=freq_threshold, max_rows=max_rows)
        assert in_order[f"cat_{table}"].to_list() == [rows.get(token, 0) for token in tokens]
        vocab = read_vocab(tmp_path, f"cat_{table}")
        assert counts["rows_per_table"][f"cat_{table}"] == len(rows) + 1 == vocab.height
        assert vocab["raw_id"].to_list() == [None, *(token.decode() for token in rows)]
        used = [rows.get(token, 0) for token in tokens[:TRAIN]]
        assert vocab["count"].to_list() == np.bincount(used, minlength=vocab.height).tolist()


def test_limits_of_a_table_override_the_common_ones(tmp_path: Path, log: Path, lines: list[bytes]):
    from slipstream.preprocess_schema import TableLimits

    own = {
        "cat_9": TableLimits(max_rows=5),
        "cat_10": TableLimits(freq_threshold=1),
        "cat_11": TableLimits(num_buckets=7),
    }
    counts = run_preprocess(tmp_path, [log], freq_threshold=6, tables=own)["rows_per_table"]
    assert counts["cat_9"] == 5
    assert counts["cat_10"] == len(set(tokens_of(lines, 10)[:TRAIN])) + 1
    assert counts["cat_11"] <= 8
    assert counts["cat_12"] == len(expected_rows(tokens_of(lines, 12)[:TRAIN], freq_threshold=6)) + 1


def test_hashed_tables_map_equal_ids_to_equal_rows(tmp_path: Path, log: Path, lines: list[bytes]):
    run_preprocess(tmp_path, [log], num_buckets=11)
    in_order = pl.concat([read_split(tmp_path, split) for split in ("train", "test", "val")])
    vocab = read_vocab(tmp_path, "cat_20")
    row_of = {int(text): row for text, row in zip(vocab["raw_id"][1:], vocab["row"][1:], strict=True)}
    raw_ids = np.array([int(token, 16) if token else -(2**63) for token in tokens_of(lines, 20)])
    buckets = hash_to_buckets(raw_ids, 11)
    assert in_order["cat_20"].to_list() == [row_of.get(int(bucket), 0) for bucket in buckets]


def test_limits_of_an_unknown_table_are_a_config_error(tmp_path: Path, log: Path):
    from slipstream.preprocess_schema import TableLimits

    with pytest.raises(ConfigError, match="cat_26"):
        run_preprocess(tmp_path, [log], tables={"cat_26": TableLimits(max_rows=5)})


@pytest.mark.parametrize(
    ("split", "transform"),
    [
        ("chronological", "standard"),
        pytest.param("random", "torchrec", marks=pytest.mark.slow),
        pytest.param("by_day", "torchrec", marks=pytest.mark.slow),
    ],
)
def test_bytes_depend_neither_on_chunk_size_nor_on_threads(
    tmp_path: Path, lines: list[bytes], split: str, transform: str
):
    broken = [*lines[:700], b"no sample", *lines[700:], b"", sample_line(label="2")]
    files = [write_raw(tmp_path / "day_0", broken), write_raw(tmp_path / "day_1", lines[:301])]
    config = {"split": split, "samples_per_part": 400, "dense_transform": transform, "missing_flags": True}
    if split != "random":
        config |= {"count_features": ("cat_3",), "target_features": ("cat_25",)}
    reference = None
    for chunk_bytes, num_threads in ((32_768, 1), (32_768, 2), (10**9, 1)):
        folder = tmp_path / f"{chunk_bytes}-{num_threads}"
        run_preprocess(folder, files, seed=3, chunk_bytes=chunk_bytes, num_threads=num_threads, **config)
        reference = reference or stage_files(folder)
        assert stage_files(folder) == reference


@pytest.mark.parametrize("name", ["log.tsv.zst", "LOG.TSV.GZ"])
def test_compressed_files_give_the_same_bytes(tmp_path: Path, plain: dict[str, bytes], lines: list[bytes], name: str):
    packed = write_raw(tmp_path / name.lower(), lines).rename(tmp_path / name)
    run_preprocess(tmp_path / "packed", [packed], chunk_bytes=50_000)
    assert stage_files(tmp_path / "packed") == plain


@pytest.mark.parametrize(  # every pair of choices
    ("names", "ids", "numbers"),
    [
        ("torchrec", "text", "integers"),
        ("torchrec", "integers", "floats"),
        ("criteo", "text", "floats"),
        ("criteo", "integers", "integers"),
    ],
)
def test_parquet_files_give_the_same_bytes(
    tmp_path: Path, plain: dict[str, bytes], lines: list[bytes], names: str, ids: str, numbers: str
):
    frame = as_frame(lines)
    if ids == "integers":
        frame = frame.with_columns(pl.col("^cat_.*$").str.to_integer(base=16, dtype=pl.Int64))
    if numbers == "floats":
        frame = frame.with_columns(pl.col("label", "^int_.*$").cast(pl.Float64))
    if names == "criteo":
        frame = frame.rename(
            {f"int_{i}": f"I{i + 1}" for i in range(13)} | {f"cat_{i}": f"C{i + 1}" for i in range(26)}
        )
    frame.write_parquet(tmp_path / "log.parquet", row_group_size=300)
    run_preprocess(tmp_path / "columns", [tmp_path / "log.parquet"], chunk_bytes=50_000)
    assert stage_files(tmp_path / "columns") == plain


def test_parquet_rows_that_are_no_samples_are_rejected_one_by_one(tmp_path: Path, lines: list[bytes]):
    frame = as_frame(lines).with_columns(
        pl.col("int_3").cast(pl.Float64), pl.col("cat_1").str.to_integer(base=16, dtype=pl.Int64)
    )
    rows = frame.rows()
    for position, column, value in ((10, 4, 0.5), (20, 15, -7), (30, 15, 2**40), (40, 16, "a\tb"), (50, 0, 3)):
        rows[position] = (*rows[position][:column], value, *rows[position][column + 1 :])
    pl.DataFrame(rows, schema=frame.schema, orient="row").write_parquet(tmp_path / "log.parquet")
    counts = run_preprocess(tmp_path / "out", [tmp_path / "log.parquet"])
    rejects = read_rejects(tmp_path / "out")
    assert counts["rejected"] == 5 and sum(counts["samples"].values()) == NUM_LINES - 5
    assert rejects["line"].to_list() == [11, 21, 31, 41, 51]
    columns = [reason.split(":")[0] for reason in rejects["reason"]]
    assert columns == ["int_3", "cat_1", "cat_1", "cat_2", "label"]


def test_parquet_without_the_columns_says_which_is_missing(tmp_path: Path, lines: list[bytes]):
    as_frame(lines).drop("cat_7").write_parquet(tmp_path / "log.parquet")
    with pytest.raises(DataError, match="`cat_7` or `C8`"):
        run_preprocess(tmp_path / "out", [tmp_path / "log.parquet"])


def test_remote_files_are_read_through_fsspec(tmp_path: Path, log: Path, plain: dict[str, bytes]):
    with fsspec.open("memory://slipstream-test/log.tsv", "wb") as remote:
        remote.write(log.read_bytes())
    run_preprocess(tmp_path / "remote", ["memory://slipstream-test/log.tsv"], chunk_bytes=50_000)
    assert stage_files(tmp_path / "remote") == plain


def test_rejected_lines_keep_file_line_reason_and_content(tmp_path: Path, lines: list[bytes]):
    bad = {
        5: (b"x" * 10, "expected 40 fields, found 1"),
        9: (sample_line(dense="1.5"), "int_0: expected an integer, found '1.5'"),
        1200: (sample_line(token="xyz"), "cat_0: expected up to 8 hex digits, found 'xyz'"),
        1201: (b"\xff\xfe\tq", "expected 40 fields, found 2"),
    }
    broken = list(lines)
    for number, (line, _) in sorted(bad.items()):
        broken.insert(number - 1, line)
    files = [write_raw(tmp_path / "a.tsv", lines[:10]), write_raw(tmp_path / "b.tsv.gz", broken)]
    counts = run_preprocess(tmp_path / "out", files, chunk_bytes=40_000)
    rejects = read_rejects(tmp_path / "out")
    assert counts["rejected"] == 4 and sum(counts["samples"].values()) == NUM_LINES + 10
    assert rejects.rows() == [("b.tsv.gz", number, reason, line) for number, (line, reason) in sorted(bad.items())]


def test_too_many_rejects_stop_the_run_with_examples(tmp_path: Path, lines: list[bytes]):
    path = write_raw(tmp_path / "log.tsv", [*lines[:300], *[b"bad"] * 30, *lines[300:]])
    with pytest.raises(DataError, match=r"30 of 2,130 lines.*allows 1.00%") as caught:
        run_preprocess(tmp_path / "strict", [path])
    assert "log.tsv, line 301: expected 40 fields, found 1" in str(caught.value)
    assert "max_reject_ratio" in (caught.value.hint or "")
    assert run_preprocess(tmp_path / "lenient", [path], max_reject_ratio=0.02)["rejected"] == 30
    assert read_rejects(tmp_path / "lenient")["content"].to_list() == [b"bad"] * 30


@pytest.mark.parametrize(("rejected", "limit"), [(29, 0.29), (1, 0.01), (0, 0.0)])
def test_as_many_rejects_as_the_limit_allows_are_allowed_and_one_more_is_not(
    tmp_path: Path, lines: list[bytes], rejected: int, limit: float
):
    for num_bad in (rejected, rejected + 1):
        path = write_raw(tmp_path / f"{num_bad}.tsv", [*lines[: 100 - num_bad], *[b"bad"] * num_bad])
        if num_bad == rejected:
            assert run_preprocess(tmp_path / "within", [path], max_reject_ratio=limit)["rejected"] == rejected
        else:
            with pytest.raises(DataError, match=f"{num_bad} of 100 lines are no samples"):
                run_preprocess(tmp_path / "beyond", [path], max_reject_ratio=limit)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("dlrm", lambda x, least: math.log(max(x, 0) + 1)),
        ("torchrec", lambda x, least: math.log(max(x - least, 0) + 2)),
        ("nvidia", lambda x, least: math.log(max(x, -1) + 2)),
        ("none", lambda x, least: x),
    ],
)
def test_dense_transforms_are_what_they_say(tmp_path: Path, lines: list[bytes], name: str, expected):
    lines = [sample_line(dense="-2"), *lines]
    run_preprocess(tmp_path / "out", [write_raw(tmp_path / "log.tsv", lines)], dense_transform=name)
    values = [int(line.split(b"\t")[2] or 0) for line in lines]
    train = read_split(tmp_path / "out", "train")["int_1"]
    wanted = [np.float32(expected(value, -2)) for value in values[: len(train)]]
    np.testing.assert_allclose(train.to_numpy(), wanted, rtol=1e-6)


def test_standard_numbers_are_those_of_the_training_split_alone(tmp_path: Path, lines: list[bytes]):
    lines = [*lines[:TRAIN], *(line.replace(b"\t", b"\t99999999", 1) for line in lines[TRAIN:])]
    log = write_raw(tmp_path / "log.tsv", lines)
    counts = run_preprocess(tmp_path / "out", [log], dense_transform="standard")
    logs = np.log1p([max(int(line.split(b"\t")[1] or 0), 0) for line in lines])
    mean, deviation = logs[:TRAIN].mean(), logs[:TRAIN].std()
    in_order = pl.concat([read_split(tmp_path / "out", split) for split in ("train", "test", "val")])
    np.testing.assert_allclose(in_order["int_0"], (logs - mean) / deviation, rtol=1e-5, atol=1e-5)
    assert (counts["dense_means"][0], counts["dense_deviations"][0]) == pytest.approx((mean, deviation), rel=1e-5)


def test_every_number_that_training_lacks_at_times_has_a_flag(tmp_path: Path, lines: list[bytes]):
    def field(line: bytes, column: int, value: bytes) -> bytes:
        fields = line.split(b"\t")
        return b"\t".join([*fields[: column + 1], value, *fields[column + 2 :]])

    # column 0 is always there, column 1 is missing after training only
    lines = [field(line, 0, b"7") for line in lines]
    lines = [field(line, 1, b"3" if at < TRAIN else b"") for at, line in enumerate(lines)]
    counts = run_preprocess(tmp_path / "out", [write_raw(tmp_path / "log", lines)], missing_flags=True)
    fields = [line.split(b"\t") for line in lines]
    lacking = [column for column in range(13) if any(not row[1 + column] for row in fields[:TRAIN])]
    assert counts["flagged_columns"] == lacking and lacking and not {0, 1} & set(lacking)
    assert counts["num_dense"] == 13 + len(lacking)
    in_order = pl.concat([read_split(tmp_path / "out", split) for split in ("train", "test", "val")])
    for place, column in enumerate(lacking, start=13):
        assert in_order[f"int_{place}"].to_list() == [float(not row[1 + column]) for row in fields]


def test_a_disk_too_small_is_refused_before_anything_is_parsed(tmp_path: Path, log: Path, monkeypatch):
    usage = capacity.shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr(capacity.shutil, "disk_usage", lambda folder: usage)
    with pytest.raises(CapacityError, match=r"of disk at .* 1,000 bytes are free") as caught:
        run_preprocess(tmp_path / "out", [log])
    assert "--runs" in (caught.value.hint or "")
    assert not (tmp_path / "out" / "work").exists()


@pytest.mark.parametrize("name", ["log.tsv.gz", "log.tsv.zst", "log.parquet"])
def test_compressed_input_counts_as_what_it_unpacks_to(tmp_path: Path, lines: list[bytes], monkeypatch, name: str):
    path = tmp_path / name
    if name.endswith(".parquet"):
        as_frame(lines).write_parquet(path)
    else:
        write_raw(path, lines)
    usage = capacity.shutil.disk_usage(tmp_path)._replace(free=path.stat().st_size)
    monkeypatch.setattr(capacity.shutil, "disk_usage", lambda folder: usage)
    with pytest.raises(CapacityError, match="of disk"):
        run_preprocess(tmp_path / "out", [path])


def test_what_is_asked_for_follows_from_the_log_and_its_vocabulary(tmp_path: Path, log: Path, monkeypatch):
    asked: list[int] = []
    monkeypatch.setattr(preprocess, "require_memory", lambda need, **_: asked.append(need))
    monkeypatch.setattr(preprocess, "require_disk", lambda _, need, **__: asked.append(need))
    counts = run_preprocess(tmp_path / "out", [log], num_threads=2)
    size = log.stat().st_size
    memory, disk, lookups = asked
    assert memory == (128 << 20) + (9 * 2 + 2) * size, "a chunk is no larger than the log"
    assert disk == int(0.8 * size)
    assert lookups == 12 * sum(counts["rows_per_table"].values())


def test_too_little_memory_names_the_knobs(tmp_path: Path, log: Path, monkeypatch):
    monkeypatch.setattr(capacity, "available_memory", lambda: 1 << 20)
    with pytest.raises(CapacityError, match=r"1\.0 MiB are available") as caught:
        run_preprocess(tmp_path / "out", [log])
    assert "preprocess.chunk_bytes" in (caught.value.hint or "")
    assert "preprocess.num_threads" in (caught.value.hint or "")


def test_a_vocabulary_too_large_for_memory_names_the_knobs(tmp_path: Path, log: Path, monkeypatch):
    answers = iter([1 << 40, 5000])
    monkeypatch.setattr(capacity, "available_memory", lambda: next(answers))
    with pytest.raises(CapacityError, match="looking up rows") as caught:
        run_preprocess(tmp_path / "out", [log])
    assert "preprocess.freq_threshold" in (caught.value.hint or "")


def test_other_limits_go_on_from_what_was_parsed(tmp_path: Path, lines: list[bytes], monkeypatch: pytest.MonkeyPatch):
    pipeline = write_pipeline(tmp_path / "run.toml", write_raw(tmp_path / "log", lines))
    runs = [tmp_path / name for name in ("kept", "anew")]
    assert invoke("preprocess", pipeline, runs[0]).exit_code == 0
    others = ("preprocess.freq_threshold=3", "preprocess.split=random", "preprocess.max_rows=50")
    assert invoke("preprocess", pipeline, runs[1], *others).exit_code == 0
    with monkeypatch.context() as patched:
        patched.setattr(CriteoSource, "parse", lambda self, data: pytest.fail("parsed again"))
        assert invoke("preprocess", pipeline, runs[0], *others).exit_code == 0
    outputs = [_newest_outputs(folder) for folder in runs]
    assert outputs[0] == outputs[1]


def test_an_altered_parsed_chunk_is_parsed_again(tmp_path: Path, lines: list[bytes]):
    pipeline = write_pipeline(tmp_path / "run.toml", write_raw(tmp_path / "log", lines))
    assert invoke("preprocess", pipeline, tmp_path / "runs").exit_code == 0
    expected = _newest_outputs(tmp_path / "runs")
    [chunk] = (tmp_path / "runs").glob("run/parsed/*/parsed/*.arrow")
    content = bytearray(chunk.read_bytes())
    content[len(content) // 2] ^= 1
    chunk.write_bytes(content)
    result = invoke("preprocess", pipeline, tmp_path / "runs", force=True)
    assert result.exit_code == 0 and _newest_outputs(tmp_path / "runs") == expected


def _newest_outputs(runs: Path) -> dict[str, str]:
    artifact = latest_artifact(runs / "run", "preprocess")
    assert artifact is not None
    return {name: entry["xxh3"] for name, entry in artifact.manifest["outputs"].items()}
