"""A source of one's own, known through the registry alone."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import polars as pl
from raw_logs import invoke

import slipstream
from slipstream.datasets.registry import SOURCES
from slipstream.datasets.source import ParsedBlock, Source, SourceOptions


class ToySource(Source):
    """A line is `label number id`, with blanks between."""

    num_dense = 1
    num_tables = 1
    fields = ("label", "int_0", "cat_0")
    separator = " "

    def parse(self, data: bytes) -> ParsedBlock:
        """Turn whole lines into samples and rejects."""
        rows = [line.split(b" ") for line in data.splitlines()]
        sound = [len(row) == 3 and row[0] in (b"0", b"1") for row in rows]
        kept = [[int(field) for field in row] for row, is_sound in zip(rows, sound, strict=True) if is_sound]
        columns = np.array(kept, np.int64).reshape(-1, 3)
        samples = pl.DataFrame(
            {"label": columns[:, 0].astype(np.uint8), "int_0": columns[:, 1], "cat_0": columns[:, 2]}
        )
        return ParsedBlock(samples=samples, rejected_lines=np.flatnonzero(~np.array(sound, bool)), num_lines=len(rows))

    def explain(self, line: bytes) -> str:
        """Say why a line is no sample."""
        return "expected a label, a number and an id"

    def format_raw_ids(self, raw_ids: np.ndarray) -> pl.Series:
        """Write raw ids as they were."""
        return pl.Series(raw_ids).cast(pl.String)


def build_toy(options: SourceOptions) -> ToySource:
    return ToySource()


def test_a_source_goes_from_raw_lines_to_scores_without_an_edit_anywhere(tmp_path: Path, rng: np.random.Generator):
    ids = rng.integers(0, 20, 3000)
    labels = (rng.random(3000) < 0.1 + 0.8 * (ids < 10)).astype(int)
    raw = tmp_path / "toy.txt"
    raw.write_text("".join(f"{y} {x % 7} {x}\n" for y, x in zip(labels, ids, strict=True)) + "no sample\n")
    pipeline = tmp_path / "toy.toml"
    pipeline.write_text(
        f'name = "toy"\n[dataset]\nsource = "toy"\nraw = "{raw}"\n[model]\nembedding_dim = 4\nbottom_mlp = [4]\n'
        'top_mlp = [8, 1]\n[train]\nbatch_size = 32\nlr = 0.1\nlr_decay = "linear"\n'
    )
    assert invoke("run", pipeline, tmp_path / "runs").exit_code == 2  # not known yet
    with SOURCES.registered("toy", build_toy, summary="three numbers a line"):
        result = slipstream.run(pipeline, runs=tmp_path / "runs")
        assert result.figures["preprocess"]["rejected"] == 1
        assert result.figures["train"]["test"]["auc"] > 0.8
        scored = slipstream.load(result.model).score(raw, keep=["cat_0"])
    assert scored["reason"].to_list() == [None] * 3000 + ["expected a label, a number and an id"]
    assert scored["cat_0"].head(3000).cast(pl.Int64).to_list() == ids.tolist()
