"""Init: look at a table and write a pipeline for it, with what was guessed said beside each key.

Guesses are made from the beginning of the file, 64 MiB at most; every one of them can be changed in the pipeline file.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

import polars as pl

from slipstream.datasets.columns import as_text
from slipstream.datasets.times import count_periods
from slipstream.errors import ConfigError, DataError, did_you_mean
from slipstream.io.artifacts import write_atomically
from slipstream.io.raw import estimate_text_bytes, find_raw_files, is_parquet, read_blocks
from slipstream.ops.delimited import read_fields
from slipstream.ops.quoting import unquote

Kind = Literal["label", "sparse", "dense", "list", "time", "keep", "left out"]

_MOST_BYTES = 64 << 20
_SEPARATORS = ",\t;|"
_LABEL_NAMES = re.compile(r"label|target|y|.*(click|convert|conversion|purchase|bought|like[ds]?|install).*", re.I)
_RATING_NAMES = re.compile(r".*(rating|stars|score).*", re.I)
_TIME_NAMES = re.compile(r".*(time|date|hour|day|_at|^at|^ts|_ts)$|(time|date).*", re.I)
_ID_NAMES = re.compile(
    r"(.*_)?(user|item|movie|article|product|ad|campaign|site|zip|code|type|category)s?(_.*)?|.*id", re.I
)
_FEW_VALUES = 32
_LIST_SEPARATORS = ("|", ";", ", ", ",", " ")
_DECIMAL_COMMA = r"^-?[0-9]+,[0-9]+$"
_WITHIN_NAMES = {", ", ",", " "}
"""Separators that also stand within single names; the others do so next to never."""
_LEAST_LISTS = 0.05
"""Share of the fields that must have a separator for the column to be one of lists."""
_WHOLE_LISTS, _LONGEST_LIST = 0.99, 32
"""Share of the lists that the length guessed holds whole, and the longest one guessed."""
_DAY_RANGE = (7_305, 47_482)  # 1990 to 2100


@dataclass(frozen=True, kw_only=True, slots=True)
class ColumnGuess:
    """What a column is taken for."""

    name: str
    kind: Kind
    num_distinct: int
    """Distinct values among the lines looked at; of lists, those in them."""
    why: str
    separator: str = ""
    """What stands between the values of a field, where fields are lists."""
    length: int = 0
    """Values that a sample may keep of a list."""


@dataclass(frozen=True, kw_only=True, slots=True)
class PipelineGuess:
    """A pipeline that was written, and what it rests on."""

    path: Path
    num_lines: int
    """Lines looked at."""
    columns: list[ColumnGuess]
    split: str
    """`by_time` or `chronological`."""


def write_pipeline(file: str, *, label: str = "", out: Path | None = None) -> PipelineGuess:
    """Look at a table and write a commented pipeline for it.

    Args:
        file: CSV, compressed or not, or Parquet.
        label: Its label column; empty guesses.
        out: File to write; None for the name of the table with `.toml`, in the working folder.

    Raises:
        ConfigError: The pipeline file is there already, or no column can be the label.
        DataError: The file cannot be read or has no lines.
    """
    (found, *_) = find_raw_files([file], named_by="FILE")
    stem = re.sub(r"[^A-Za-z0-9_-]", "_", Path(file).name.partition(".")[0]).lstrip("_-") or "table"
    path = out or Path(f"{stem}.toml")
    if path.exists():
        raise ConfigError(f"`{path}` is there already", hint="give another name with --out, or remove it")
    table, separator, has_header = _read_table(found)
    target = _find_label(table, label)
    guesses = [_guess_column(table.get_column(name), target) for name in table.columns]
    period, num_periods = _find_period(table, guesses)
    guess = PipelineGuess(
        path=path, num_lines=table.height, columns=guesses, split="by_time" if num_periods > 1 else "chronological"
    )
    rule = _label_rule(table.get_column(target))
    written = _write_toml(
        guess,
        name=stem,
        raw=file,
        rule=rule,
        separator="" if is_parquet(found) else separator,
        names=[] if has_header else table.columns,
        period=period,
        num_samples=_estimate_lines(found, table),
    )
    with write_atomically(path) as partial:
        partial.write_text(written, encoding="utf-8")
    return guess


# --- looking -------------------------------------------------------------------------------------------------


def _read_table(file: str) -> tuple[pl.DataFrame, str, bool]:
    """Give (the first lines as text, the separator, whether there is a header)."""
    block = next(read_blocks(file, file_index=0, block_bytes=_MOST_BYTES), None)
    if block is None or (isinstance(block.data, bytes) and not block.data.strip()):
        raise DataError(f"`{file}` has no lines", hint="name a CSV or Parquet file with some")
    if isinstance(block.data, pl.DataFrame):
        flat = [column for column in block.data.iter_columns() if not column.dtype.is_nested()]
        times = (pl.Datetime, pl.Date)
        text = [as_text(column.dt.epoch("s") if column.dtype in times else column) for column in flat]
        return pl.DataFrame(text), ",", True
    separator = _find_separator(block.data)
    plain, mark = unquote(block.data, separator)
    first = plain.partition(b"\n")[0].removesuffix(b"\r").decode("utf-8", "replace").split(mark)
    has_header = len(set(first)) == len(first) and not any(re.fullmatch(r"|[-+.0-9eE]+", cell) for cell in first)
    names = first if has_header else [f"column_{index}" for index in range(len(first))]
    if len(names) < 2:
        raise DataError(
            f"`{file}` has one field a line, as far as can be seen: {first[0][:60]!r}",
            hint="fields may have a comma, tab, semicolon or | between them",
        )
    table, sound = read_fields(plain, separator=mark, names=names)
    table = table.filter(sound)[1 if has_header else 0 :]
    if not table.height:
        raise DataError(f"`{file}` has a header and no lines", hint="name a file with some")
    return table, separator, has_header


def _find_separator(data: bytes) -> str:
    """Give the separator that cuts the first lines into the most fields, as many in each."""
    lines = data[: 1 << 16].split(b"\n")[:20]
    most, best = 1, ","
    for separator in _SEPARATORS:
        cut = [unquote(line, separator) for line in lines if line.strip()]
        counts = {plain.count(mark.encode()) + 1 for plain, mark in cut}
        if len(counts) == 1 and max(counts) > most:
            most, best = max(counts), separator
    return best


def _find_label(table: pl.DataFrame, asked: str) -> str:
    if asked:
        if asked not in table.columns:
            raise ConfigError(
                f"expected --label to name a column, found `{asked}`",
                hint=did_you_mean(asked, table.columns) or "columns: " + ", ".join(table.columns),
            )
        return asked
    binary = [name for name in table.columns if set(table[name].unique()) == {"0", "1"}]
    numeric = [name for name in table.columns if _is_numeric(table[name])]
    for names, pattern in ((binary, _LABEL_NAMES), (numeric, _RATING_NAMES)):
        if found := [name for name in names if pattern.fullmatch(name)]:
            return found[0]
    if len(binary) == 1:
        return binary[0]
    raise ConfigError(
        "no column shows that it is the label: one of 0 and 1, or a rating",
        hint="name it: --label COLUMN; columns: " + ", ".join(table.columns),
    )


def _label_rule(column: pl.Series) -> float | None:
    """Give the threshold that makes a label of numbers, where they are not 0 and 1 already."""
    if set(column.drop_nulls().unique().str.to_lowercase()) <= {"0", "1", "0.0", "1.0", "true", "false"}:
        return None
    values = column.cast(pl.Float64, strict=False).drop_nulls()
    if not len(values):
        raise ConfigError(
            f"column `{column.name}` cannot be the label: expected 0 and 1, or numbers, found {column[0]!r}",
            hint="name another: --label COLUMN",
        )
    # the threshold that comes nearest to as many ones as zeros
    shares = [(abs((values >= least).sum() / len(values) - 0.5), least) for least in values.unique().sort()[:1000]]
    return float(min(shares)[1])


def _guess_column(column: pl.Series, label: str) -> ColumnGuess:
    if column.name != label and (found := _guess_lists(column)) is not None:
        return found
    kind, why = _guess_kind(column, label)
    return ColumnGuess(name=column.name, kind=kind, num_distinct=column.n_unique(), why=why)


def _guess_lists(column: pl.Series) -> ColumnGuess | None:
    """Find the separator of a column of lists; None where fields are single values.

    Commas and blanks stand in names too. They separate values where the values come back in other fields, so that there
    are far fewer of them than of fields.
    """
    there = column.drop_nulls()
    if not len(there) or _is_numeric(column) or _is_time(there) or there.str.contains(_DECIMAL_COMMA).all():
        return None
    for separator in _LIST_SEPARATORS:
        if there.str.contains(separator, literal=True).mean() < _LEAST_LISTS:  # type: ignore[operator]
            continue
        cut = there.str.split(separator)
        values = cut.explode()
        num_values = values.filter(values != "").n_unique()
        if separator in _WITHIN_NAMES and num_values > there.n_unique() / 4:
            continue
        length, most = int(cut.list.len().quantile(_WHOLE_LISTS, "higher") or 1), cut.list.len().to_numpy().max()
        return ColumnGuess(
            name=column.name,
            kind="list",
            num_distinct=num_values,
            why=f"fields with {separator!r} in them; up to {most} values in one",
            separator=separator,
            length=min(length, _LONGEST_LIST),
        )
    return None


def _guess_kind(column: pl.Series, label: str) -> tuple[Kind, str]:
    name, distinct, there = column.name, column.n_unique(), column.drop_nulls()
    if name == label:
        return "label", "named by --label, or by its name and values"
    if distinct == 1:
        return "left out", "one value only"
    if _is_time(there):
        return "time", "all values are times"
    is_unique = distinct == len(column) > _FEW_VALUES
    if not _is_numeric(column):
        if is_unique or (distinct > len(column) / 2 and int(there.str.len_chars().sum()) > 40 * len(there)):
            return "keep", "a value of its own in every line"
        return "sparse", "text"
    is_whole = there.str.contains(r"^-?[0-9]+$").all()
    if not is_whole:
        return "dense", "numbers with fractions"
    if is_unique and _ID_NAMES.fullmatch(name):
        return "keep", "a number of its own in every line"
    if _ID_NAMES.fullmatch(name):
        return "sparse", "whole numbers, and its name is that of an id"
    return ("sparse", "few whole numbers") if distinct <= _FEW_VALUES else ("dense", "many whole numbers")


def _is_numeric(column: pl.Series) -> bool:
    return column.cast(pl.Float64, strict=False).null_count() == column.null_count() < len(column)


def _is_time(there: pl.Series) -> bool:
    days = count_periods(there, "day")
    is_plausible = not days.null_count() and days.is_between(*_DAY_RANGE).all()
    return bool(is_plausible and (_TIME_NAMES.fullmatch(there.name) or not _is_numeric(there)))


def _find_period(table: pl.DataFrame, guesses: Sequence[ColumnGuess]) -> tuple[str, int]:
    """Give (unit that shows at least three periods, or the finest; how many periods it shows)."""
    times = [guess.name for guess in guesses if guess.kind == "time"]
    num_periods = 0
    for period in ("day", "hour", "minute") if times else ():
        num_periods = count_periods(table.get_column(times[0]).drop_nulls(), period).n_unique()
        if num_periods > 2:
            return period, num_periods
    return "minute" if times else "day", num_periods


def _estimate_lines(file: str, table: pl.DataFrame) -> int:
    if is_parquet(file):
        return table.height
    width = sum(int(table[name].str.len_bytes().sum()) for name in table.columns) / table.height + table.width
    return max(table.height, int(estimate_text_bytes(file) / width) if table.height > 10_000 else 0)


# --- writing -------------------------------------------------------------------------------------------------


def _write_toml(
    guess: PipelineGuess,
    *,
    name: str,
    raw: str,
    rule: float | None,
    separator: str,
    names: Sequence[str],
    period: str,
    num_samples: int,
) -> str:
    of_kind = {kind: [column for column in guess.columns if column.kind == kind] for kind in get_args(Kind)}
    (label,) = (_text(column.name) for column in of_kind["label"])
    if rule is not None:
        label = f"{{column = {label}, at_least = {rule:g}}}"
    times, passed_on = of_kind["time"], of_kind["keep"]
    # about five hundred steps, within what is usual
    batch_size = min(2048, max(64, 1 << max(0, num_samples // 500).bit_length()))
    lines = [
        f"# {guess.path.name}",
        f"# Written by `slipstream init` from the first {guess.num_lines:,} lines of {json.dumps(raw)[1:-1]}.",
        "# What is guessed says so; every key stands in docs/reference/config.md.",
        f"name = {_text(name)}",
        "",
        "[dataset]",
        'source = "table"',
        f"raw = {_text(raw)}",
        *([f"separator = {_text(separator)}"] if separator not in {"", ","} else []),
        *([f"names = [{', '.join(map(_text, names))}]  # the file has no header"] if names else []),
        "",
        "[dataset.columns]",
        f"label = {label}  # guessed" + ("; the threshold that halves the lines best" if rule is not None else ""),
        *_list_columns("sparse", of_kind["sparse"]),
        *_list_columns("dense", of_kind["dense"]),
        *map(_describe_lists, of_kind["list"]),
        *([f"time = {_text(times[0].name)}  # {times[0].why}", f"period = {_text(period)}"] if times else []),
        *([*_list_columns("keep", passed_on)] if passed_on else []),
        *(f"# left out: {_text(column.name)}, {column.why}" for column in [*of_kind["left out"], *times[1:]]),
        "",
        "[preprocess]",
        f"split = {_text(guess.split)}"
        + ("  # the latest seventh is for test and validation" if times else "  # the last seventh of the lines"),
        "freq_threshold = 2  # values seen once in training share a row",
        "",
        "[segregate]",
        'hot_budget = "10%"  # memory beside the accelerator; 100% where all rows fit',
        "",
        "[model]",
        'name = "dlrm"',
        "embedding_dim = 16",
        "bottom_mlp = [64, 16]",
        "top_mlp = [64, 1]",
        "",
        "[train]",
        f"batch_size = {batch_size}",
        "lr = 0.04",
        "lr_warmup = 0.05",
        'lr_decay = "linear"',
        "",
        "[skip]",
        'criterion = "none"  # "stale" trains on fewer samples once rows have come to rest',
    ]
    return "\n".join(lines) + "\n"


def _describe_lists(column: ColumnGuess) -> str:
    name = column.name if re.fullmatch(r"[A-Za-z0-9_-]+", column.name) else _text(column.name)
    how = f'separator = {_text(column.separator)}, length = {column.length}, pooling = "mean"'
    return f"lists.{name} = {{{how}}}  # {column.num_distinct:,} values; {column.why}"


def _list_columns(key: str, columns: Sequence[ColumnGuess]) -> list[str]:
    inside = [f"    {_text(column.name)},  # {column.num_distinct:,} values; {column.why}" for column in columns]
    return [f"{key} = [", *inside, "]"] if inside else [f"{key} = []"]


def _text(value: str) -> str:
    """Give a TOML string: JSON's escapes are TOML's."""
    return json.dumps(value)
