from __future__ import annotations

import gzip
import re
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from slipstream.config import build_pipeline
from slipstream.datasets.criteo import CriteoSource
from slipstream.pipeline import run_pipeline
from slipstream.schema import MISSING_ID

KAGGLE = (
    b"0\t1\t1\t4\t17\t108\t22\t1\t24\t22\t1\t1\t\t22\t05db9164\td833535f\t77f2f2e5\td16679b9\t4cf72387\t7e0ccccf\tdef4a4d4"
    b"\t5b392875\ta73ee510\t0c70a731\t4ba74619\t9f32b866\t879fa878\tb28479f6\ta66dcf27\t31ca40b6\td4bb7bd8\t7b49e3d2\t\t"
    b"\tdfcfc3fa\t\t423fab69\taee52b6f\t\t"
)
TERABYTE = (
    b"1\t5\t110\t\t16\t\t1\t0\t14\t7\t1\t\t306\t\t62770d79\te21f5d58\tafea442f\t945c7fcf\t38b02748\t6fcd6dcb\t3580aa21"
    b"\t28808903\t46dedfa6\t2e027dc1\t0c7c4231\t95981d1f\t00c5ffb7\tbe4ee537\t8a0b74cc\t4cdc3efa\td20856aa\tb8170bba"
    b"\t9512c20b\tc38e2f28\t14f65a5d\t25b1b089\td7c1fc0b\t7caf609c\t30436bfc\ted10571d"
)


def parse_plainly(data: bytes) -> tuple[list[list[Any]], list[int]]:
    """What a reader writes without knowing the package: (label, integers, ids) of each sample, rejected lines."""
    samples, rejected = [], []
    for position, line in enumerate(data.removesuffix(b"\n").split(b"\n")):
        fields = line.split(b"\t")
        integers, ids = fields[1:14], fields[14:]
        is_sample = (
            len(fields) == 40
            and fields[0] in (b"0", b"1")
            and all(re.fullmatch(rb"([+-]?[0-9]+)?", field) for field in integers)
            and all(-(2**63) <= int(field) < 2**63 for field in integers if field)
            and all(re.fullmatch(rb"[0-9a-fA-F]{0,8}", field) for field in ids)
        )
        if is_sample:
            numbers = [int(field) if field else None for field in integers]
            samples.append([int(fields[0]), *numbers, *[int(i, 16) if i else None for i in ids]])
        else:
            rejected.append(position)
    return samples, rejected


@pytest.mark.parametrize("line", [KAGGLE, TERABYTE], ids=["kaggle", "terabyte"])
def test_a_real_line_comes_apart_field_by_field(line: bytes):
    parsed = CriteoSource().parse(line + b"\n")
    samples, _ = parse_plainly(line)
    assert [list(row) for row in parsed.samples.iter_rows()] == samples
    assert parsed.num_lines == 1 and not parsed.rejected_lines.size


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        (b"", "expected 40 fields, found 1"),
        (KAGGLE + b"\t", "expected 40 fields, found 41"),
        (KAGGLE.partition(b"\t")[2], "expected 40 fields, found 39"),
        (b"2" + KAGGLE[1:], "label: expected 0 or 1, found '2'"),
        (KAGGLE[1:], "label: expected 0 or 1, found ''"),
        (KAGGLE.replace(b"\t17\t", b"\t1.7\t"), "int_3: expected an integer, found '1.7'"),
        (KAGGLE.replace(b"\t17\t", b"\t9223372036854775808\t"), "int_3: expected a 64-bit integer"),
        (KAGGLE.replace(b"05db9164", b"05db916g"), "cat_0: expected up to 8 hex digits, found '05db916g'"),
        (KAGGLE.replace(b"05db9164", b"005db9164"), "cat_0: expected up to 8 hex digits"),
        (KAGGLE.replace(b"05db9164", b"+5db9164"), "cat_0: expected up to 8 hex digits"),
        (KAGGLE.replace(b"05db9164", b"\xff"), "cat_0: expected up to 8 hex digits"),
        (KAGGLE.replace(b"\t", b" "), "expected 40 fields, found 1"),
    ],
)
def test_what_is_no_sample_is_rejected_with_its_reason(line: bytes, reason: str):
    parsed = CriteoSource().parse(KAGGLE + b"\n" + line + b"\n" + TERABYTE + b"\n")
    assert parsed.rejected_lines.tolist() == [1] and parsed.samples.height == 2
    assert CriteoSource().explain(line).startswith(reason)


@st.composite
def lines(draw: st.DrawFn) -> bytes:
    integers = st.one_of(st.integers(-(2**63) - 1, 2**63), st.integers(-3, 3)).map(str)
    odd = st.sampled_from(["", "+4", "007", "1e3", " 1", "-", "nan", "0x1"])
    tokens = st.one_of(st.integers(0, 2**32 - 1).map("{:08x}".format), st.text("0123456789abcdefABCDEFg+-", max_size=9))
    fields = [draw(st.sampled_from(["0", "1", "0", "1", "-1", ""]))]
    is_good = draw(st.booleans())
    for _ in range(13):
        fields.append(str(draw(st.integers(-9, 10**6))) if is_good else draw(st.one_of(integers, integers, odd)))
    for _ in range(26):
        fields.append(f"{draw(st.integers(0, 2**32 - 1)):08x}" if is_good else draw(tokens))
    return "\t".join(fields[: draw(st.sampled_from([40, 40, 40, 39]))]).encode()


@settings(max_examples=60)
@given(st.lists(lines(), min_size=1, max_size=6))
def test_parsing_agrees_with_a_plain_reader(made: list[bytes]):
    data = b"\n".join(made) + b"\n"
    parsed = CriteoSource().parse(data)
    samples, rejected = parse_plainly(data)
    assert parsed.rejected_lines.tolist() == rejected
    assert [list(row) for row in parsed.samples.iter_rows()] == samples
    for position in rejected:
        assert CriteoSource().explain(made[position]) != "not a sample line"


def test_raw_ids_are_written_as_they_were_read():
    ids = np.array([0x05DB9164, 0, 2**32 - 1, MISSING_ID])
    assert CriteoSource().format_raw_ids(ids).to_list() == ["05db9164", "00000000", "ffffffff", ""]


# --- Terabyte: day files, and negatives left out -------------------------------------------------------------


def day_config(raw: list[str], *, keep: float = 1.0, split: str = "by_day", seed: int = 0) -> Any:
    return build_pipeline(
        {
            "name": "days",
            "seed": seed,
            "dataset": {"source": "criteo", "raw": raw, "negative_keep_ratio": keep},
            "preprocess": {"split": split, "max_reject_ratio": 0.0},
        }
    )


def write_days(folder: Path, lines: list[bytes], num_days: int) -> list[str]:
    paths = []
    for day, members in enumerate(np.array_split(np.arange(len(lines)), num_days)):
        path = folder / f"day_{day}.gz"
        path.write_bytes(gzip.compress(b"".join(lines[index] + b"\n" for index in members)))
        paths.append(str(path))
    return paths


def made_lines(count: int) -> list[bytes]:
    """Lines that can be told apart by their first integer; every fourth is a click."""
    return [b"%d\t%d\t" % (n % 4 == 0, n + 1) + TERABYTE.split(b"\t", 2)[2] for n in range(count)]


def numbers_of(folder: Path, split: str) -> list[int]:
    stored = pl.read_parquet(folder / split / "*.parquet")["int_0"].to_numpy()
    return np.rint(np.expm1(stored.astype(np.float64))).astype(int).tolist()


def preprocess(config: Any, runs: Path) -> Any:
    return run_pipeline(config, runs, stages=["preprocess"]).stages["preprocess"].artifact


def test_the_last_day_file_is_held_out_however_many_there_are(tmp_path: Path):
    write_days(tmp_path, made_lines(240), 12)  # day_10 and day_11 come after day_9, not after day_1
    done = preprocess(day_config([str(tmp_path / "day_*.gz")]), tmp_path / "runs")
    assert numbers_of(done.path, "train") == list(range(1, 221))
    assert numbers_of(done.path, "test") == list(range(221, 231))
    assert numbers_of(done.path, "val") == list(range(231, 241))
    assert "negatives_left_out" not in done.counts


@pytest.mark.parametrize("split", ["by_day", "chronological", "random"])
def test_leaving_out_negatives_touches_training_negatives_only(tmp_path: Path, split: str):
    raw = write_days(tmp_path, made_lines(1200), 3)
    whole = preprocess(day_config(raw, split=split), tmp_path / "runs")
    kept = preprocess(day_config(raw, split=split, keep=0.25), tmp_path / "runs")
    for name in ("val", "test"):
        assert numbers_of(kept.path, name) == numbers_of(whole.path, name)
    before, after = numbers_of(whole.path, "train"), numbers_of(kept.path, "train")
    assert [n for n in after if (n - 1) % 4 == 0] == [n for n in before if (n - 1) % 4 == 0]
    assert set(after) < set(before) and after == sorted(after)
    num_negatives = sum((n - 1) % 4 != 0 for n in before)
    share = 1 - kept.counts["negatives_left_out"] / num_negatives
    assert abs(share - 0.25) < 0.07
    assert kept.counts["lines"] == sum(kept.counts["samples"].values()) + kept.counts["negatives_left_out"]
    lookups = pl.read_parquet(kept.path / "vocab/cat_0.parquet")["count"].sum()
    assert lookups == len(after), "rows are ranked by what is trained on"
    other = preprocess(day_config(raw, split=split, keep=0.25, seed=1), tmp_path / "runs")
    if split != "random":
        assert numbers_of(other.path, "train") != after


@pytest.mark.real_data
def test_every_real_kaggle_line_is_a_sample(real_data: Path):
    data = gzip.decompress((real_data / "criteo_kaggle_137139.tsv.gz").read_bytes())
    parsed = CriteoSource().parse(data)
    assert parsed.num_lines == parsed.samples.height == 137_139
    assert round(parsed.samples["label"].cast(pl.Float64).mean(), 4) == 0.2568  # type: ignore[arg-type]
    share = (parsed.samples["cat_0"] == 0x05DB9164).mean()
    assert round(share, 3) == 0.500  # type: ignore[arg-type]
    head = b"".join(data.splitlines(keepends=True)[:2000])
    assert [list(row) for row in parsed.samples.head(2000).iter_rows()] == parse_plainly(head)[0]


@pytest.mark.real_data
def test_real_terabyte_days_go_through_their_pipeline(real_data: Path, tmp_path: Path):
    lines = gzip.decompress((real_data / "criteo_terabyte_day_0_10000.tsv.gz").read_bytes()).splitlines()
    raw = write_days(tmp_path, lines, 3)
    done = preprocess(day_config(raw), tmp_path / "runs").counts
    assert done["lines"] == 10_000 == sum(done["samples"].values()) + done["rejected"]
    assert done["samples"] == {"train": 6667, "test": 1667, "val": 1666}
    assert round(sum(done["positives"].values()) / 10_000, 4) == 0.0265
    assert done["files"] == ["day_0.gz", "day_1.gz", "day_2.gz"]
