"""Source `table`: any CSV or Parquet file, its columns declared."""

from __future__ import annotations

import csv
import io
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
import xxhash
from hypothesis import given
from hypothesis import strategies as st

from slipstream.config import build_pipeline
from slipstream.dataset_schema import ColumnsConfig, LabelRule, ListColumn, TableLayout
from slipstream.datasets.source import SourceOptions
from slipstream.datasets.table import TableSource, build
from slipstream.errors import ConfigError, DataError
from slipstream.pipeline import RunResult, run_pipeline
from slipstream.schema import MISSING_ID, Bag

COLUMNS = ColumnsConfig(label="clicked", sparse=("user", "city"), dense=("price",), time="when", keep=("id",))
NAMES = ("id", "user", "city", "price", "when", "clicked")
GOOD = "7,4711,Bern,3.5,2024-05-01T12:00:00,1\n"


def make_source(columns: ColumnsConfig = COLUMNS, names: tuple[str, ...] = NAMES, **layout: Any) -> TableSource:
    return TableSource(TableLayout(columns=columns, names=names, **layout))


def build_on(folder: Path, *contents: bytes, columns: ColumnsConfig = COLUMNS, **layout: Any) -> TableSource:
    files = []
    for index, content in enumerate(contents):
        (folder / f"{index}.csv").write_bytes(content)
        files.append(str(folder / f"{index}.csv"))
    return build(SourceOptions(files=files, layout=TableLayout(columns=columns, **layout)))


def hash_of(text: str) -> int:
    """The documented raw id of text, in Python's own integers."""
    return max(-1 - (xxhash.xxh3_64_intdigest(text.encode()) >> 1), MISSING_ID + 1)


def raw_id_of(text: str) -> int:
    """The documented raw id of any value."""
    return int(text) if text.isdigit() and str(int(text)) == text else hash_of(text)


def pipeline_on(raw: Path, **changes: Any) -> dict[str, Any]:
    columns = {"label": "clicked", "sparse": ["user", "city"], "dense": ["price"], "time": "when", "keep": ["id"]}
    return {
        "name": "table",
        "dataset": {"source": "table", "raw": str(raw), "columns": columns},
        "preprocess": {"split": "by_time", **changes},
    }


def write_log(path: Path, *, num_lines: int = 400) -> None:
    rng = np.random.default_rng(0)
    lines = [",".join(NAMES)]
    for at in range(num_lines):
        city = ["Bern", '"Paris, FR"', "", "007", "7"][rng.integers(5)]
        lines.append(f"{at},u{rng.integers(30)},{city},{rng.random():.3f},{86400 * at // 20},{rng.integers(2)}")
    path.write_text("\n".join(lines) + "\n")


def preprocess(raw: Path, runs: Path, **changes: Any) -> RunResult:
    return run_pipeline(build_pipeline(pipeline_on(raw, **changes)), runs, stages=["preprocess"])


# --- lines ---------------------------------------------------------------------------------------------------


def test_a_line_becomes_a_sample_field_by_field():
    parsed = make_source().parse(GOOD.encode())
    assert parsed.samples.to_dicts() == [
        {"label": 1, "int_0": 3.5, "day": 19844, "cat_0": 4711, "cat_1": hash_of("Bern"), "id": "7"}
    ]
    assert parsed.texts is not None
    assert parsed.texts.rows() == [("cat_1", hash_of("Bern"), "Bern")]


def test_empty_fields_are_missing_and_nan_is_too():
    parsed = make_source().parse(b",,,,0,0\n,,,NaN,0,false\n")
    assert parsed.rejected_lines.size == 0
    assert parsed.samples.select("cat_0", "cat_1", "int_0", "id").rows() == [(MISSING_ID, MISSING_ID, None, None)] * 2


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        (",".join(NAMES), "header line"),
        ("", "found an empty line"),
        ("7,4711,Bern,3.5,0", "expected 6 fields, found 5"),
        ("7,4711,Bern,3.5,0,1,9", "expected 6 fields, found 7"),
        ('7,4711,"Bern,3.5,0,1', "a quoted field does not end on its line"),
        ("7,4711,Bern,3.5,0,yes", "clicked: expected 0 or 1, found 'yes'"),
        ("7,4711,Bern,3.5,0,", "clicked: expected 0 or 1, found nothing"),
        ("7,4711,Bern,cheap,0,1", "price: expected a number, found 'cheap'"),
        ("7,4711,Bern,inf,0,1", "price: expected a number, found 'inf'"),
        ("7,4711,Bern,1e39,0,1", "price: expected a number, found '1e39'"),
        ("7,4711,Bern,3.5,noon,1", "when: expected Unix time or ISO text"),
        ("7,47\r11,Bern,3.5,0,1", "user: expected UTF-8 text without line breaks"),
        (b"7,\xff,Bern,3.5,0,1", "user: expected UTF-8 text without line breaks"),
    ],
)
def test_a_line_that_is_no_sample_says_why(line: str | bytes, reason: str):
    data = line if isinstance(line, bytes) else line.encode()
    source = make_source()
    parsed = source.parse(GOOD.encode() + data + b"\n" + GOOD.encode())
    assert parsed.num_lines == 3
    assert parsed.rejected_lines.tolist() == [1]
    assert reason in source.explain(data)


@given(
    rows=st.lists(
        st.tuples(
            st.text(alphabet='ab",; é0', max_size=6),
            st.one_of(st.integers(-5, 20).map(str), st.sampled_from(["007", "+1", "9223372036854775808", ""])),
            st.floats(-1e6, 1e6, width=32),
            st.integers(1, 5),
        ),
        min_size=1,
        max_size=8,
    ),
    quoting=st.sampled_from([csv.QUOTE_ALL, csv.QUOTE_MINIMAL]),
)
def test_samples_are_those_of_a_reader_in_plain_python(rows: list[tuple[str, str, float, int]], quoting: int):
    columns = ColumnsConfig(label=LabelRule(column="rating", at_least=4), sparse=("text", "number"), dense=("x",))
    written = io.StringIO()
    csv.writer(written, quoting=quoting, lineterminator="\n").writerows(rows)
    parsed = make_source(columns, ("text", "number", "x", "rating")).parse(written.getvalue().encode())

    def raw_id(text: str) -> int:
        if not text:
            return MISSING_ID
        is_plain = text.isascii() and text.isdigit() and str(int(text)) == text and int(text) < 2**63
        return int(text) if is_plain else hash_of(text)

    assert parsed.samples.select("label", "cat_0", "cat_1", "int_0").rows() == [
        (int(rating >= 4), raw_id(text), raw_id(number), x) for text, number, x, rating in rows
    ]


@given(cells=st.lists(st.text(alphabet='ab", ', max_size=4), min_size=3, max_size=3), place=st.integers(0, 3))
def test_a_label_is_put_at_its_place(cells: list[str], place: int):
    names = [*"abc"[:place], "label", *"abc"[place:]]
    source = make_source(ColumnsConfig(label="label", sparse=("a", "b", "c")), tuple(names))
    written = io.StringIO()
    csv.writer(written, lineterminator="\n").writerow(cells)
    fields = source.split(source.add_label(written.getvalue().encode()))
    assert fields.rows() == [tuple(text or None for text in [*cells[:place], "0", *cells[place:]])]


def test_other_separators_and_files_without_header(tmp_path: Path):
    line = GOOD.replace(",", "\t").encode()
    source = build_on(tmp_path, line * 3, names=NAMES, separator="\t", has_header=False)
    assert source.parse(line).samples.height == 1
    assert not source.lacks_label(line.strip())


# --- files ---------------------------------------------------------------------------------------------------

HEADER = (",".join(NAMES) + "\n").encode()


@pytest.mark.parametrize("content", [HEADER + GOOD.encode(), b"\xef\xbb\xbf" + HEADER + GOOD.encode()])
@pytest.mark.parametrize("line_end", [b"\n", b"\r\n"])
def test_a_byte_order_mark_and_windows_line_ends_do_not_matter(tmp_path: Path, content: bytes, line_end: bytes):
    source = build_on(tmp_path, content.replace(b"\n", line_end))
    assert source.fields == NAMES
    parsed = source.parse((HEADER + GOOD.encode()).replace(b"\n", line_end))
    assert parsed.rejected_lines.tolist() == [0]
    assert parsed.samples["label"].to_list() == [1]


@pytest.mark.parametrize(
    ("contents", "message"),
    [
        ([b""], "has no lines"),
        ([b"\n\n"], "has no lines"),
        ([b"id,user,city,prize,when,clicked\n"], r"expected a column `price` in the header of .*, found .*`prize`"),
        ([b"id,user,city,price,when,clicked,user\n"], "names `user` more than once"),
        ([HEADER, b"user,id,city,price,when,clicked\n"], "the headers of .* differ"),
        ([HEADER + b"1,2,3,4,5,x\n" * 3], r"3 of the first 4 lines .*\n  line 2: clicked: expected 0 or 1, found 'x'"),
        ([HEADER + b"1,2,3,four,5,1\n" * 3], r"line 2: price: expected a number, found 'four'"),
    ],
)
def test_a_file_that_does_not_fit_is_refused_before_the_work(tmp_path: Path, contents: list[bytes], message: str):
    with pytest.raises(DataError, match=message):
        build_on(tmp_path, *contents)


def test_a_header_in_another_order_is_not_scored_by_position():
    source = make_source()
    assert source.lacks_label(b"id,user,city,price,when")
    assert not source.lacks_label(HEADER.strip())
    with pytest.raises(DataError, match="expected a header `id`, `user`"):
        source.lacks_label(b"clicked,user,city,price,when,id")


def test_parquet_gives_the_samples_of_the_same_text(tmp_path: Path):
    write_log(tmp_path / "log.csv")
    frame = pl.read_csv(tmp_path / "log.csv", schema_overrides={"city": pl.String})
    frame = frame.with_columns(pl.from_epoch("when"), pl.col("clicked").cast(pl.Boolean))
    frame.write_parquet(tmp_path / "log.parquet")
    text = build_on(tmp_path, (tmp_path / "log.csv").read_bytes())
    columns = build(SourceOptions(files=[str(tmp_path / "log.parquet")], layout=TableLayout(columns=COLUMNS)))
    found = columns.parse(columns.to_lines(frame))
    assert found.samples.equals(text.parse((tmp_path / "log.csv").read_bytes()).samples)
    assert found.rejected_lines.size == 0


def test_a_line_break_within_parquet_text_rejects_its_row_alone():
    source = make_source(ColumnsConfig(label="y", sparse=("a",)), ("y", "a"))
    lines = source.to_lines(pl.DataFrame({"y": [1, 0], "a": ['x\n"y', "z"]}))
    assert source.parse(lines).rejected_lines.tolist() == [0]


# --- through preprocess --------------------------------------------------------------------------------------


def test_the_vocabulary_shows_values_as_they_were_written(tmp_path: Path):
    write_log(tmp_path / "log.csv")
    published = preprocess(tmp_path / "log.csv", tmp_path / "runs").stages["preprocess"].artifact
    vocabulary = pl.read_parquet(published.path / "vocab/cat_1.parquet")
    assert set(vocabulary["raw_id"].to_list()) == {None, "Bern", "Paris, FR", "", "007", "7"}
    train = pl.read_parquet(published.path / "train/*.parquet")
    assert train["id"].to_list() == [str(at) for at in range(train.height)]
    assert train.height == 400 - published.counts["samples"]["test"] - published.counts["samples"]["val"]


def test_the_size_of_chunks_changes_nothing(tmp_path: Path):
    write_log(tmp_path / "log.csv")
    one = preprocess(tmp_path / "log.csv", tmp_path / "one").stages["preprocess"].artifact
    other = preprocess(tmp_path / "log.csv", tmp_path / "other", chunk_bytes=1024).stages["preprocess"].artifact
    assert one.manifest["outputs"] == other.manifest["outputs"]


def test_two_texts_of_one_hash_stop_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    write_log(tmp_path / "log.csv")
    monkeypatch.setattr(xxhash, "xxh3_64_intdigest", lambda data: len(data))
    with pytest.raises(DataError, match=r"two values of table `cat_0`, 'u0' and 'u1', have the same 63-bit hash"):
        preprocess(tmp_path / "log.csv", tmp_path / "runs")


# --- lists ---------------------------------------------------------------------------------------------------

LISTS = ColumnsConfig(
    label="clicked",
    sparse=("user",),
    lists={"tags": ListColumn(separator=", ", length=1), "genres": ListColumn(length=3, pooling="sum")},
)


def test_lists_have_columns_of_their_own_by_name_and_one_table_each():
    source = make_source(LISTS, ("user", "tags", "genres", "clicked"))
    assert source.num_tables == 3
    assert source.table_of_column == (0, 1, 2, 1, 1)
    assert source.padded_tables == (1, 2)
    assert source.bags == (Bag(columns=(1, 3, 4), pooling="sum"), Bag(columns=(2,), pooling="mean"))
    names = {"cat_0": "user", "cat_1": "genres", "cat_2": "tags", "cat_3": "genres[1]", "cat_4": "genres[2]"}
    assert source.column_names == names


@given(
    rows=st.lists(
        st.tuples(
            st.lists(st.sampled_from(["Drama", "7", "007", "", "Sci Fi", "é"]), max_size=5),
            st.lists(st.sampled_from(["a", "b|c", "12"]), max_size=3),
        ),
        min_size=1,
        max_size=12,
    )
)
def test_lists_are_cut_as_python_cuts_them(rows: list[tuple[list[str], list[str]]]):
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows(["u", ", ".join(tags), "|".join(g), 1] for g, tags in rows)
    parsed = make_source(LISTS, ("user", "tags", "genres", "clicked")).parse(text.getvalue().encode())
    assert parsed.samples.height == len(rows)
    for columns, length, lists in (
        ((1, 3, 4), 3, [[value for value in genres if value] for genres, _ in rows]),
        ((2,), 1, [tags for _, tags in rows]),
    ):
        found = parsed.samples.select(f"cat_{column}" for column in columns).rows()
        for raw_ids, values in zip(found, lists, strict=True):
            expected = [raw_id_of(value) for value in values[:length]]
            assert list(raw_ids) == expected + [MISSING_ID] * (length - len(expected))
        assert parsed.lists[f"cat_{columns[0]}"] == {
            "values": sum(min(len(values), length) for values in lists),
            "empty": sum(not values for values in lists),
            "cut": sum(len(values) > length for values in lists),
        }
        assert parsed.texts is not None
        texts = parsed.texts.filter(pl.col("column") == f"cat_{columns[0]}")
        hashed = {value for values in lists for value in values[:length] if not value.isdigit() or value == "007"}
        assert dict(texts.select("raw_id", "text").rows()) == {hash_of(value): value for value in hashed}


def test_nested_lists_of_parquet_are_read_like_fields_of_text():
    source = make_source(LISTS, ("user", "tags", "genres", "clicked"))
    nested = {
        "user": [1, 2, 3],
        "clicked": [1, 0, 1],
        "tags": [["a"], [], None],
        "genres": [[7.0, 8.0], [9.0, None], []],
    }
    flat = nested | {"tags": ["a", "", None], "genres": ["7|8", "9", ""]}
    of_nested, of_flat = (source.parse(source.to_lines(pl.DataFrame(columns))) for columns in (nested, flat))
    assert of_nested.samples.equals(of_flat.samples)
    assert of_nested.lists == of_flat.lists
    with pytest.raises(DataError, match=r"Parquet column `genres` has the separator '\|' in it"):
        source.to_lines(pl.DataFrame(nested | {"genres": [["a|b"], ["c"], ["d"]]}))


def test_what_is_no_text_in_a_list_is_rejected():
    source = make_source(LISTS, ("user", "tags", "genres", "clicked"))
    line = b"u,a,Dr\xffma|Comedy,1"
    assert source.parse(line + b"\n").rejected_lines.tolist() == [0]
    assert "genres: expected UTF-8 text" in source.explain(line)


# --- the pipeline file ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"sparse": ["a"]}, "missing key `dataset.columns.label`"),
        ({"label": "y"}, "dataset.columns.sparse"),
        ({"label": "y", "sparse": ["a", "a"]}, "names no column twice"),
        ({"label": "y", "sparse": ["y"]}, "both as label and as feature"),
        ({"label": {"column": "y", "at_least": 4}, "sparse": ["a"], "dense": ["y"]}, "both as label and as feature"),
        ({"label": "y", "sparse": ["a"], "keep": ["cat_0"]}, "dataset.columns.keep"),
        ({"label": "y", "lists": {"g": {"separator": "|"}}}, "missing key `dataset.columns.lists.g.length`"),
        ({"label": "y", "lists": {"g": {"length": 0}}}, "`dataset.columns.lists.g.length` must be at least 1"),
        ({"label": "y", "lists": {"g": {"length": 2, "separator": ""}}}, "lists.g.separator` must be text without"),
        ({"label": "y", "lists": {"g": {"length": 2, "pooling": "max"}}}, "lists.g.pooling` must be one of sum, mean"),
        ({"label": "y", "lists": {"y": {"length": 2}}}, "both as label and as feature"),
        ({"label": "y", "sparse": ["g"], "lists": {"g": {"length": 2}}}, "columns that `sparse` does not name"),
        ({"label": {"column": "y"}, "sparse": ["a"]}, "missing key `dataset.columns.label.at_least`"),
        ({"label": 3, "sparse": ["a"]}, "`dataset.columns.label` must be str or LabelRule"),
    ],
)
def test_columns_that_make_no_sense_are_refused(columns: dict[str, Any], message: str):
    with pytest.raises(ConfigError, match=message):
        build_pipeline({"name": "x", "dataset": {"source": "table", "raw": "x.csv", "columns": columns}})


def test_columns_belong_to_source_table_alone():
    dataset = {"source": "criteo", "raw": "x", "columns": {"label": "y", "sparse": ["a"]}}
    with pytest.raises(ConfigError, match="are for source table"):
        build_pipeline({"name": "x", "dataset": dataset})


def test_names_must_hold_every_declared_column():
    dataset = {"source": "table", "raw": "x", "names": ["y", "b"], "columns": {"label": "y", "sparse": ["a"]}}
    with pytest.raises(ConfigError, match=r"columns of `dataset.names` \(y, b\), found \['a'\]"):
        build_pipeline({"name": "x", "dataset": dataset})
