"""Section `[preprocess]` of a pipeline: how raw lines become encoded columns."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from slipstream.options import check_size, later, require, speed_only


@dataclass(frozen=True, kw_only=True, slots=True)
class TableLimits:
    """Vocabulary limits of one table; a field left out falls back to the limit for all tables."""

    freq_threshold: int | None = None
    """Values seen fewer times in the training split share row 0."""
    max_rows: int | None = None
    """Most rows the table may have, row 0 included; the most frequent values stay."""
    num_buckets: int | None = None
    """Hash values into this many buckets before counting; 0 does not hash."""

    def __post_init__(self) -> None:
        """Check ranges."""
        for name, least in (("freq_threshold", 1), ("max_rows", 0), ("num_buckets", 0)):
            value = getattr(self, name)
            require(value is None or value >= least, f"preprocess.{name}", f"at least {least}", value)


@dataclass(frozen=True, kw_only=True, slots=True)
class PreprocessConfig:
    """Raw lines to encoded columns."""

    split: Literal["chronological", "random", "by_day", "by_time"] = "chronological"
    """`chronological`: first 6/7 train, then test and validation in halves, like DLRM on Criteo Kaggle; `random`:
    the same shares drawn by seed; `by_day`: the last day is halved into test and validation; `by_time`: so are the
    latest days, or hours where the source counts hours, that make up a seventh of all samples."""
    freq_threshold: int = 1
    """Values seen fewer times in the training split share row 0 (OOV)."""
    max_rows: int = 0
    """Most rows per table, row 0 included; 0 sets no limit."""
    num_buckets: int = 0
    """Hash raw ids into this many buckets per table before counting; 0 does not hash."""
    tables: Mapping[str, TableLimits] = field(default_factory=dict)
    """Limits that differ for single tables, for instance `[preprocess.tables.cat_2]`."""
    dense_transform: Literal["dlrm", "standard", "torchrec", "nvidia", "none"] = "dlrm"
    """`dlrm` log(max(x, 0) + 1); `standard` the same, less its mean and over its deviation in the training split;
    `torchrec` log(x - min + 2); `nvidia` log(max(x, -1) + 2); `none` keeps x."""
    missing_flags: bool = later(False)
    """A further dense column of 0 and 1 for each one that lacks values in the training split, where 1 is missing;
    the value itself is 0 before the transform either way."""
    count_features: tuple[str, ...] = later(())
    """Sparse columns, by number (`cat_3`) or own name, or `all`: each gives a dense column more, how many training
    lines before this one have its value, transformed like the other dense columns. Before is the order of time where
    the source tells days or hours, and the order of lines within them and elsewhere; lines outside the training split
    see all of it."""
    target_features: tuple[str, ...] = later(())
    """The same, for the click rate of the value in the training lines before this one: its log-odds less those of all
    lines before, so that 0 says nothing."""
    target_prior: float = later(20.0)
    """Lines that the click rate of all lines counts for in `target_features`, beside those of a value."""
    max_reject_ratio: float = 0.01
    """Share of lines that may be rejected before the run stops with an error."""
    samples_per_part: int = 262_144
    """Samples in each Parquet part; the last part of a split may be shorter."""
    chunk_bytes: str | int = speed_only("24MiB")
    """Raw text parsed at once; memory grows with it, results do not change."""
    num_threads: int = speed_only(0)
    """Chunks worked on at once; 0 takes one more than cores that the process may use."""

    def __post_init__(self) -> None:
        """Check ranges."""
        TableLimits(freq_threshold=self.freq_threshold, max_rows=self.max_rows, num_buckets=self.num_buckets)
        require(
            0 <= self.max_reject_ratio <= 1,
            "preprocess.max_reject_ratio",
            "in [0, 1]",
            self.max_reject_ratio,
        )
        require(self.target_prior > 0, "preprocess.target_prior", "above 0", self.target_prior)
        require(
            self.split != "random" or not (self.count_features or self.target_features),
            "preprocess.split",
            "one by time with `count_features` and `target_features`: chronological, by_day or by_time",
            self.split,
        )
        require(self.samples_per_part >= 1, "preprocess.samples_per_part", "at least 1", self.samples_per_part)
        require(self.num_threads >= 0, "preprocess.num_threads", "at least 0", self.num_threads)
        check_size("preprocess.chunk_bytes", self.chunk_bytes, least=1024)

    def limits_of(self, table: str) -> TableLimits:
        """Limits of one table, every field filled in."""
        own = self.tables.get(table, TableLimits())
        names = [f.name for f in dataclasses.fields(TableLimits)]
        picked = {n: getattr(self, n) if getattr(own, n) is None else getattr(own, n) for n in names}
        return TableLimits(**picked)
