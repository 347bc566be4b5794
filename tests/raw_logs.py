"""Small raw logs, and what tests ask of a run folder."""

from __future__ import annotations

import gzip
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import zstandard
from typer.testing import CliRunner, Result

import slipstream
from slipstream.cli import app
from slipstream.datasets.criteo import CriteoSource
from slipstream.datasets.synthetic import SyntheticSpec, write_log
from slipstream.preprocess_schema import PreprocessConfig
from slipstream.progress import Silent
from slipstream.stages import preprocess

_TIMING_FIELDS = ("seconds", "peak_bytes")


def make_lines(num_lines: int, *, seed: int = 0) -> list[bytes]:
    """Lines of a generated Criteo log, without their newlines."""
    return list(_lines(num_lines, seed))


@cache
def _lines(num_lines: int, seed: int) -> tuple[bytes, ...]:
    import tempfile

    sizes = tuple(3 + 7 * table for table in range(26))
    spec = SyntheticSpec(num_samples=num_lines, num_days=1, seed=seed, table_sizes=sizes)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "log.tsv"
        write_log(spec, path)
        return tuple(path.read_bytes().splitlines())


def sample_line(label: str = "1", dense: str = "1", token: str = "0000000a") -> bytes:
    """One line with the same value in every dense and every sparse column."""
    return "\t".join([label, *[dense] * 13, *[token] * 26]).encode()


def write_raw(path: Path, lines: Sequence[bytes]) -> Path:
    """Write lines; .gz and .zst names are compressed."""
    text = b"".join(line + b"\n" for line in lines)
    if path.suffix == ".gz":
        text = gzip.compress(text, 1)
    elif path.suffix == ".zst":
        text = zstandard.compress(text, 1)
    path.write_bytes(text)
    return path


def run_preprocess(folder: Path, files: Sequence[Path | str], *, seed: int = 0, **config: Any) -> dict[str, Any]:
    """Run the stage alone into `folder`; returns its counts."""
    folder.mkdir(parents=True, exist_ok=True)
    return preprocess.run(
        PreprocessConfig(**config),
        source=CriteoSource(),
        files=[str(file) for file in files],
        seed=seed,
        scratch=folder,
        progress=Silent(),
    ).to_json()


def read_split(folder: Path, split: str) -> pl.DataFrame:
    """All parts of a split."""
    return pl.concat([pl.read_parquet(path) for path in sorted((folder / split).glob("part-*.parquet"))])


def read_rejects(folder: Path) -> pl.DataFrame:
    """All rejected lines."""
    parts = sorted((folder / "rejects").glob("part-*.parquet"))
    return pl.concat([pl.read_parquet(path) for path in parts])


def read_vocab(folder: Path, table: str) -> pl.DataFrame:
    """The vocabulary of one table."""
    return pl.read_parquet(folder / "vocab" / f"{table}.parquet")


def stage_files(folder: Path) -> dict[str, bytes]:
    """Every file a stage leaves, by name, without its intermediates."""
    files = [path for path in sorted(folder.rglob("*")) if path.is_file()]
    names = {path.relative_to(folder).as_posix(): path for path in files}
    return {name: path.read_bytes() for name, path in names.items() if not name.startswith("work/")}


def run_files(run_dir: Path) -> dict[str, bytes]:
    """Every file of a run folder but parsed chunks, by name; manifests without their timing fields."""
    found = {}
    for path in sorted(run_dir.rglob("*")):
        name = path.relative_to(run_dir).as_posix()
        if not path.is_file() or path.suffix == ".lock" or name.startswith("parsed/"):
            continue
        found[name] = path.read_bytes()
        if path.name == "manifest.json":
            manifest = json.loads(found[name])
            found[name] = json.dumps({k: v for k, v in manifest.items() if k not in _TIMING_FIELDS}).encode()
    return found


def write_pipeline(path: Path, raw: Path | str, *, preprocess: str = "", segregate: str = "") -> Path:
    """Write a small pipeline over a raw file."""
    path.write_text(
        f'name = "run"\n[dataset]\nsource = "criteo"\nraw = ["{raw}"]\n'
        f"[preprocess]\n{preprocess}\n[segregate]\n{segregate}\n"
        "[model]\nembedding_dim = 4\nbottom_mlp = [4]\ntop_mlp = [1]\n"
        "[profile]\ncurve = [0.1]\n",
        encoding="utf-8",
    )
    return path


def invoke(stage: str, pipeline: Path, runs: Path, *overrides: str, force: bool = False) -> Result:
    """Run a stage through the command line, in this process."""
    options = [part for override in overrides for part in ("--set", override)] + ["--force"] * force
    return CliRunner().invoke(app, [stage, str(pipeline), "--runs", str(runs), "--quiet", *options])


def subprocess_environment() -> dict[str, str]:
    """An environment where Python finds the package under test, installed or not."""
    root = str(Path(slipstream.__file__).parents[1])
    return {**os.environ, "PYTHONPATH": os.pathsep.join([root, os.environ.get("PYTHONPATH", "")])}


def start(stage: str, pipeline: Path, runs: Path, *overrides: str) -> subprocess.Popen[bytes]:
    """Start a stage through the command line, in a process that can be killed."""
    options = [part for override in overrides for part in ("--set", override)]
    return subprocess.Popen(
        [sys.executable, "-m", "slipstream", stage, str(pipeline), "--runs", str(runs), "--quiet", *options],
        env=subprocess_environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )


def as_frame(lines: Sequence[bytes]) -> pl.DataFrame:
    """The same samples as Parquet columns, ids as text."""
    fields = [line.decode().split("\t") for line in lines]
    names = ["label", *(f"int_{index}" for index in range(13)), *(f"cat_{index}" for index in range(26))]
    frame = pl.DataFrame({name: [row[i] or None for row in fields] for i, name in enumerate(names)}, strict=False)
    return frame.with_columns(pl.col(names[:14]).cast(pl.Int64))


def expected_rows(tokens: Sequence[bytes], *, freq_threshold: int = 1, max_rows: int = 0) -> dict[bytes, int]:
    """Row of each raw id by the contract, from the training tokens of one table, counted the plain way."""
    values, counts = np.unique(np.array(tokens, dtype="S8"), return_counts=True)
    ranked = sorted(zip(values.tolist(), counts.tolist(), strict=True), key=lambda pair: (-pair[1], pair[0]))
    kept = [value for value, count in ranked if count >= freq_threshold]
    kept = kept[: max_rows - 1] if max_rows else kept
    return {value: row for row, value in enumerate(kept, start=1)}
