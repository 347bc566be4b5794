from __future__ import annotations

import csv
import datetime
import gzip
import io
import re
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from slipstream.config import build_pipeline
from slipstream.datasets.avazu import FIELDS, AvazuSource
from slipstream.pipeline import run_pipeline
from slipstream.schema import MISSING_ID

HEADER = ",".join(FIELDS).encode()
LINE = (
    b"1000009418151094273,0,14102100,1005,0,1fbe01fe,f3845767,28905ebd,ecad2386,7801e8d9,07d7df22,a99f214a,"
    b"ddd2926e,44956a24,1,2,15706,320,50,1722,0,35,-1,79"
)
SPARSE = [name for name in FIELDS if name not in {"id", "click", "hour"}]


def with_field(name: str, value: bytes) -> bytes:
    fields = LINE.split(b",")
    fields[FIELDS.index(name)] = value
    return b",".join(fields)


def parse_plainly(data: bytes) -> tuple[list[list[Any]], list[int]]:
    """What a reader writes without knowing the package: (samples as lists of text and numbers, rejected lines)."""
    samples, rejected = [], []
    for position, line in enumerate(data.removesuffix(b"\n").split(b"\n")):
        fields = line.decode("utf-8", "replace").split(",")
        try:
            if len(fields) != 24 or fields[1] not in ("0", "1") or not re.fullmatch("[0-9]{8}", fields[2]):
                raise ValueError
            moment = datetime.datetime.strptime("20" + fields[2], "%Y%m%d%H")
            if not re.fullmatch("[0-9]{1,20}", fields[0]) or int(fields[0]) >= 2**64:
                raise ValueError
            for index, field in enumerate(fields):
                if 5 <= index <= 13 and not re.fullmatch("([0-9a-fA-F]{8})?", field):
                    raise ValueError
                if (index in (3, 4) or index >= 14) and field:
                    if not re.fullmatch("-?[0-9]{1,10}", field) or not -(2**31) <= int(field) < 2**31:
                        raise ValueError
        except ValueError:
            rejected.append(position)
            continue
        is_hex = [5 <= index <= 13 for index in range(24)]
        texts = [
            field.lower() if as_hex or not field else str(int(field))
            for field, as_hex in zip(fields[3:], is_hex[3:], strict=True)
        ]
        samples.append([int(fields[1]), moment.hour, *texts, str(moment.hour), str(moment.weekday()), int(fields[0])])
    return samples, rejected


def as_lists(source: AvazuSource, samples: pl.DataFrame) -> list[list[Any]]:
    texts = [source.format_raw_ids(samples[f"cat_{index}"].to_numpy()).to_list() for index in range(23)]
    columns = [samples["label"].to_list(), samples["int_0"].to_list(), *texts, samples["id"].to_list()]
    return [list(row) for row in zip(*columns, strict=True)]


def test_a_real_line_comes_apart_field_by_field():
    source = AvazuSource()
    parsed = source.parse(LINE + b"\n")
    assert parsed.num_lines == 1 and not parsed.rejected_lines.size
    (sample,) = as_lists(source, parsed.samples)
    expected = [0, 0, *LINE.decode().split(",")[3:], "0", "1", 1000009418151094273]
    assert sample == expected
    assert parsed.samples["day"].to_list() == [141021]
    assert source.column_names["cat_0"] == "C1" and source.column_names["cat_20"] == "C21"
    assert {"hour_of_day", "weekday"} <= set(source.column_names.values())
    assert parsed.samples.schema["id"] == pl.UInt64


def test_empty_fields_are_missing_and_keep_their_name():
    source = AvazuSource()
    data = with_field("C14", b"") + b"\n" + with_field("site_id", b"")
    samples = source.parse(data).samples
    assert samples["cat_13"][0] is None and samples["cat_2"][1] is None
    assert source.format_raw_ids(np.array([MISSING_ID])).to_list() == [""]


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        (HEADER, "header line"),
        (LINE + b",1", "expected 24 fields, found 25"),
        (b"", "expected 24 fields, found 1"),
        (with_field("id", b"x1"), "id: expected an integer below 2^64, found 'x1'"),
        (with_field("id", b"18446744073709551616"), "id: expected an integer below 2^64"),
        (with_field("id", b""), "id: expected an integer"),
        (with_field("click", b"2"), "click: expected 0 or 1, found '2'"),
        (with_field("click", b""), "click: expected 0 or 1, found ''"),
        (with_field("hour", b"14102124"), "hour: expected YYMMDDHH, found '14102124'"),
        (with_field("hour", b"14023001"), "hour: expected YYMMDDHH"),
        (with_field("hour", b"1410210"), "hour: expected YYMMDDHH"),
        (with_field("hour", b""), "hour: expected YYMMDDHH"),
        (with_field("site_id", b"1fbe01f"), "site_id: expected 8 hex digits, found '1fbe01f'"),
        (with_field("device_ip", b"1fbe01fg"), "device_ip: expected 8 hex digits"),
        (with_field("device_ip", b"+1fbe01f"), "device_ip: expected 8 hex digits"),
        (with_field("C20", b"1.5"), "C20: expected a 32-bit integer, found '1.5'"),
        (with_field("C21", b"2147483648"), "C21: expected a 32-bit integer"),
        (with_field("C1", b"+5"), "C1: expected a 32-bit integer"),
        (with_field("C14", b"\xff\xfe"), "C14: expected a 32-bit integer"),
    ],
)
def test_what_is_no_sample_is_rejected_with_its_reason(line: bytes, reason: str):
    parsed = AvazuSource().parse(LINE + b"\n" + line + b"\n" + LINE + b"\n")
    assert parsed.rejected_lines.tolist() == [1]
    assert parsed.samples.height == 2 and parsed.num_lines == 3
    assert AvazuSource().explain(line).startswith(reason)


@st.composite
def lines(draw: st.DrawFn) -> bytes:
    hexadecimal = st.one_of(st.text("0123456789abcdefABCDEF", min_size=7, max_size=9), st.just(""), st.just("a99f214a"))
    decimal = st.one_of(st.integers(-(2**31) - 2, 2**31 + 1).map(str), st.just(""), st.just("0035"), st.just("1e3"))
    fields = [
        draw(st.one_of(st.integers(0, 2**64).map(str), st.just("7"))),
        draw(st.sampled_from(["0", "1", "1", "0", "01", ""])),
        draw(st.sampled_from(["14102100", "14103023", "14022812", "14023112", "00010100", "141021"])),
    ]
    good = draw(st.booleans())
    for index in range(3, 24):
        is_hex = 5 <= index <= 13
        if good:
            fields.append("a99f214a" if is_hex else draw(st.integers(-5, 5).map(str)))
        else:
            fields.append(draw(hexadecimal if is_hex else decimal))
    return ",".join(fields[: draw(st.sampled_from([24, 24, 24, 24, 23]))]).encode()


@settings(max_examples=60)
@given(st.lists(lines(), min_size=1, max_size=8))
def test_parsing_agrees_with_a_plain_reader(made: list[bytes]):
    source, data = AvazuSource(), b"\n".join(made) + b"\n"
    parsed = source.parse(data)
    samples, rejected = parse_plainly(data)
    assert parsed.rejected_lines.tolist() == rejected
    assert as_lists(source, parsed.samples) == samples
    assert parsed.num_lines == len(samples) + len(rejected)
    for position in rejected:
        assert source.explain(made[position]) != "not a sample line"


def test_hex_ids_can_be_taken_modulo_and_integers_stay():
    plain, reduced = (AvazuSource(max_ind_range=limit).parse(LINE).samples for limit in (0, 1000))
    assert reduced["cat_2"][0] == plain["cat_2"][0] % 1000
    assert reduced["cat_0"][0] == plain["cat_0"][0]


def avazu_config(raw: Path, **train: Any) -> Any:
    return build_pipeline(
        {
            "name": "avazu_test",
            "dataset": {"source": "avazu", "raw": [str(raw)]},
            "preprocess": {"split": "by_day", "freq_threshold": 2},
            "segregate": {"hot_budget": "20%"},
            "model": {"embedding_dim": 16, "bottom_mlp": [16], "top_mlp": [64, 1]},
            "train": {"mode": "fae", "batch_size": 64, "lr": 0.02, "device": "cpu", "num_threads": 1, **train},
        }
    )


def write_days(path: Path, per_day: int = 60) -> list[str]:
    """A small log of three days, in no order of time, with a header; returns the ids of its lines."""
    rng = np.random.default_rng(3)
    ids = []
    with path.open("wb") as out:
        out.write(HEADER + b"\n")
        for number in range(3 * per_day):
            day = 21 + number % 3
            line = with_field("hour", f"1410{day}{rng.integers(24):02d}".encode())
            fields = line.split(b",")
            fields[0], fields[1] = str(2**63 + number).encode(), str(int(rng.integers(2))).encode()
            fields[5] = f"{int(rng.integers(9)):08x}".encode()
            ids.append(fields[0].decode())
            out.write(b",".join(fields) + b"\n")
    return ids


def test_the_last_day_is_held_out_and_ids_lead_back_to_the_lines(tmp_path: Path):
    ids = write_days(tmp_path / "log.csv")
    # the header is one reject among 181 lines
    config = avazu_config(tmp_path / "log.csv")
    result = run_pipeline(config, tmp_path / "runs", stages=["preprocess"])
    processed = result.stages["preprocess"].artifact
    assert processed.counts["lines"] == 181 and processed.counts["rejected"] == 1
    assert processed.counts["samples"] == {"train": 120, "val": 30, "test": 30}
    frames = {name: pl.read_parquet(processed.path / name / "*.parquet") for name in ("train", "val", "test")}
    assert frames["train"]["id"].cast(pl.String).to_list() == [text for n, text in enumerate(ids) if n % 3 != 2]
    last_day = [text for n, text in enumerate(ids) if n % 3 == 2]
    assert frames["test"]["id"].cast(pl.String).to_list() == last_day[:30]
    assert frames["val"]["id"].cast(pl.String).to_list() == last_day[30:]
    assert processed.counts["extra_columns"] == ["id"]
    assert "day" not in frames["train"].columns


@pytest.mark.real_data
@pytest.mark.parametrize(
    ("name", "num_lines", "rate"), [("avazu_all10days_20000", 20_000, 0.1677), ("avazu_hour0_24999", 24_999, 0.1746)]
)
def test_real_lines_are_all_samples_at_the_known_rate(real_data: Path, name: str, num_lines: int, rate: float):
    source = AvazuSource()
    data = gzip.decompress((real_data / f"{name}.csv.gz").read_bytes())
    parsed = source.parse(data)
    assert parsed.rejected_lines.tolist() == [0] and source.explain(data.partition(b"\n")[0]) == "header line"
    assert parsed.samples.height == num_lines and parsed.num_lines == num_lines + 1
    assert round(parsed.samples["label"].cast(pl.Float64).mean(), 4) == rate  # type: ignore[arg-type]
    rows = list(csv.DictReader(io.StringIO(data.decode())))
    for index, field in enumerate(SPARSE):
        texts = source.format_raw_ids(parsed.samples[f"cat_{index}"].to_numpy()).to_list()
        assert texts == [row[field] for row in rows], field
    assert parsed.samples["id"].cast(pl.String).to_list() == [row["id"] for row in rows]
    assert parsed.samples["int_0"].to_list() == [int(row["hour"][6:]) for row in rows]


@pytest.mark.real_data
def test_training_on_real_clicks_learns(real_data: Path, tmp_path: Path):
    config = avazu_config(real_data / "avazu_all10days_20000.csv.gz", epochs=2)
    result = run_pipeline(config, tmp_path)
    processed = result.stages["preprocess"].artifact.counts
    assert processed["lines"] == 20_001 == sum(processed["samples"].values()) + processed["rejected"]
    assert sum(processed["positives"].values()) == 3354
    quality = result.counts("train")
    assert quality["test"]["auc"] > 0.6 and quality["val"]["auc"] > 0.6
