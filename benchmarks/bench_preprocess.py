"""Preprocess against TorchRec's numpy scripts, a plain loop, and the bare reading of the text.

    python benchmarks/bench_preprocess.py
    python benchmarks/bench_preprocess.py --torchrec-python ~/torchrec/bin/python --rounds 3
    python benchmarks/bench_preprocess.py --memory

One generated Criteo log for all, written before anything is timed. Every contender has a process of its own and is
timed from after its imports to its last byte on disk: wall clock, CPU seconds of all its threads, peak memory. Of
several rounds the fastest counts. `--slow-rows N` has TorchRec and the plain loop read the first N lines only; they
are then compared per row, which is in their favour, since their dictionaries stay smaller.

    slipstream   the whole stage through the pipeline: fingerprint, parse, count, encode, hashes, publish
    torchrec     tsv_to_npys, then sparse_to_contiguous, from the installed package (skipped when it is not there)
    plain loop   the steps of DLRM's data_utils: int(token, 16), one dictionary per table, files in between
    bare read    polars reads the text and casts every column, in memory, nothing written: the limit

`--memory` runs slipstream alone on 2 and 10 million rows drawn from one vocabulary: peak memory may grow by the
vocabulary, not by rows.
"""

import argparse
import json
import os
import platform
import sys
import tempfile
from collections.abc import Callable
from itertools import islice
from pathlib import Path
from typing import Any

from processes import run_apart, timed

NUM_DENSE, NUM_TABLES = 13, 26
FREQ_THRESHOLD = 3


def main() -> None:
    """Run every contender and print the table, then one JSON line."""
    args = parse_arguments()
    if args.contender:
        print(json.dumps(CONTENDERS[args.contender](Path(args.folder), args)))
        return
    with tempfile.TemporaryDirectory(dir=args.work) as folder:
        results = measure_memory(args, Path(folder)) if args.memory else measure_speed(args, Path(folder))
    print(json.dumps({"benchmark": "preprocess", "arguments": vars(args), "results": results}))


def parse_arguments() -> argparse.Namespace:
    """Read the options."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=2_000_000)
    parser.add_argument("--slow-rows", type=int, default=None, help="rows for TorchRec and the plain loop")
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--threads", type=int, default=0, help="of slipstream; 0 takes its default")
    parser.add_argument("--torchrec-python", default=sys.executable, help="a Python that has torchrec")
    parser.add_argument("--memory", action="store_true", help="peak memory at --rows and five times as many")
    parser.add_argument("--max-table-rows", type=int, default=100_000, help="largest vocabulary with --memory")
    parser.add_argument("--work", default=None, help="folder for temporary files")
    parser.add_argument("--contender", choices=list(CONTENDERS), help="run this one here and print JSON")
    parser.add_argument("--folder", help="where the contender finds log.tsv")
    return parser.parse_args()


def measure_speed(args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Every contender on the same log, in turn over the rounds."""
    write_input(folder, args.rows, args.slow_rows)
    os.sync()  # nobody's clock runs while the input is still on its way to the disk
    rounds: dict[str, list[dict[str, Any]]] = {label: [] for label in CONTENDERS}
    for _ in range(args.rounds):
        for label in CONTENDERS:
            rounds[label].append(measure_apart(args, label, folder))
    results = {label: min(measured, key=lambda one: one["seconds"]) for label, measured in rounds.items()}
    text_mb = (folder / "log.tsv").stat().st_size / 1e6
    print(f"{args.rows:,} rows, {text_mb:,.0f} MB of text, {os.cpu_count()} cores, {platform.machine()}")
    print(f"{'contender':14}{'rows':>11}{'wall s':>9}{'CPU s':>9}{'us/row':>9}{'wall':>9}{'CPU':>9}{'peak MB':>10}")
    ours = results["slipstream"]
    for label, result in results.items():
        if "skipped" in result:
            print(f"{label:14}  skipped: {result['skipped']}")
            continue
        for unit in ("seconds", "cpu_seconds"):
            per_row = result[unit] / result["rows"]
            result[f"{unit}_ratio"] = per_row / (ours[unit] / ours["rows"])
        print(
            f"{label:14}{result['rows']:11,}{result['seconds']:9.2f}{result['cpu_seconds']:9.2f}"
            f"{result['seconds'] / result['rows'] * 1e6:9.2f}{result['seconds_ratio']:8.2f}x"
            f"{result['cpu_seconds_ratio']:8.2f}x{result['peak_mb']:10,.0f}"
        )
    return results


def measure_memory(args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Slipstream alone, on one vocabulary and two numbers of rows."""
    from slipstream.datasets.synthetic import default_table_sizes

    sizes = tuple(min(size, args.max_table_rows) for size in default_table_sizes(args.rows))
    results: dict[str, Any] = {}
    for rows in (args.rows, 5 * args.rows):
        here = folder / str(rows)
        here.mkdir()
        write_input(here, rows, args.slow_rows, sizes)
        results[str(rows)] = result = measure_apart(args, "slipstream", here)
        (here / "log.tsv").unlink()
        print(
            f"{rows:12,} rows, {result['vocabulary']:,} rows of tables: {result['peak_mb']:,.0f} MB peak, "
            f"{result['seconds']:.1f} s"
        )
    small, large = results.values()
    print(f"peak memory ratio {large['peak_mb'] / small['peak_mb']:.3f}")
    return results


def write_input(folder: Path, rows: int, slow_rows: int | None, table_sizes: tuple[int, ...] = ()) -> None:
    """Write log.tsv, and its first lines as head.tsv."""
    from slipstream.datasets.synthetic import SyntheticSpec, write_log

    write_log(SyntheticSpec(num_samples=rows, num_days=min(rows, 7), table_sizes=table_sizes), folder / "log.tsv")
    with (folder / "log.tsv").open("rb") as log, (folder / "head.tsv").open("wb") as head:
        head.writelines(islice(log, slow_rows))


def measure_apart(args: argparse.Namespace, label: str, folder: Path) -> dict[str, Any]:
    """Run a contender in a process of its own."""
    python = args.torchrec_python if label == "torchrec" else sys.executable
    return run_apart(__file__, label, ["--folder", str(folder), "--threads", str(args.threads)], python=python)


def run_slipstream(folder: Path, args: argparse.Namespace) -> dict[str, Any]:
    """Give the preprocess stage as `slipstream preprocess` runs it."""
    # stages are imported when they run; before the clock starts, as for the others
    import slipstream.datasets.criteo
    import slipstream.stages.preprocess  # noqa: F401
    from slipstream.config import build_pipeline
    from slipstream.pipeline import run_pipeline

    config = build_pipeline(
        {
            "name": "bench",
            "dataset": {"source": "criteo", "raw": [str(folder / "log.tsv")]},
            "preprocess": {"freq_threshold": FREQ_THRESHOLD, "num_threads": args.threads},
        }
    )
    counts: dict[str, Any] = {}

    def work() -> int:
        with tempfile.TemporaryDirectory(dir=folder) as runs:
            counts.update(run_pipeline(config, Path(runs), stages=["preprocess"]).counts("preprocess"))
        return int(counts["lines"])

    return {**timed(work, unit="rows"), "vocabulary": sum(counts["rows_per_table"].values())}


def run_torchrec(folder: Path, args: argparse.Namespace) -> dict[str, Any]:
    """TorchRec's two steps: text to npy, then ids to contiguous rows with a frequency threshold."""
    try:
        from torchrec.datasets.criteo import BinaryCriteoUtils
    except ImportError as exc:
        return {"skipped": f"{exc}", "seconds": 0.0}

    def work() -> int:
        names = [str(folder / f"day_0_{kind}.npy") for kind in ("dense", "sparse", "labels")]
        BinaryCriteoUtils.tsv_to_npys(str(folder / "head.tsv"), *names)
        BinaryCriteoUtils.sparse_to_contiguous([names[1]], str(folder), frequency_threshold=FREQ_THRESHOLD)
        return count_lines(folder / "head.tsv")

    return timed(work, unit="rows")


def run_plain_loop(folder: Path, args: argparse.Namespace) -> dict[str, Any]:
    """Line by line, value by value, the steps of DLRM's data_utils for Criteo Kaggle, files in between included.

    Count the lines; write a text file per day; parse each into compressed npz, noting ids; number the ids; replace
    them day by day into compressed npz again; concatenate the days into one compressed npz, rows as float64. Left out,
    in its favour: a line of progress printed per sample, and the split, which DLRM draws each time it loads the file.
    Source: getCriteoAdData, processCriteoAdData and concatCriteoAdData of facebookresearch/dlrm.
    """
    import numpy as np

    def work() -> int:
        num_lines = count_lines(folder / "head.tsv")
        num_days = min(7, num_lines)
        lines_per_day = [len(part) for part in np.array_split(np.arange(num_lines), num_days)]
        with (folder / "head.tsv").open(encoding="ascii") as log:
            for day, lines in enumerate(lines_per_day):
                with (folder / f"loop_{day}").open("w", encoding="ascii") as text:
                    for line in islice(log, lines):
                        text.write(line)
        rows_of: list[dict[Any, int]] = [{} for _ in range(NUM_TABLES)]
        for day, lines in enumerate(lines_per_day):
            parse_day(day, lines, rows_of)
        for table, numbers in enumerate(rows_of):
            numbers.update({raw_id: row for row, raw_id in enumerate(numbers)})
            np.savez_compressed(folder / f"loop_dict_{table}.npz", unique=np.array(list(numbers), "i4"))
        for day in range(num_days):
            replace_ids(day, rows_of)
        with np.load(folder / "loop_0_processed.npz") as stored:
            arrays = dict(stored)
        for day in range(1, num_days):
            with np.load(folder / f"loop_{day}_processed.npz") as stored:
                arrays = {name: np.concatenate((arrays[name], stored[name])) for name in arrays}
        np.savez_compressed(folder / "loop.npz", **arrays, counts=np.array([len(numbers) for numbers in rows_of]))
        return num_lines

    def parse_day(day: int, num_lines: int, rows_of: list[dict[Any, int]]) -> None:
        y = np.zeros(num_lines, "i4")
        X_int = np.zeros((num_lines, NUM_DENSE), "i4")
        X_cat = np.zeros((num_lines, NUM_TABLES), "i4")
        with (folder / f"loop_{day}").open(encoding="ascii") as stream:
            for number, line in enumerate(stream):
                fields = line.split("\t")
                for place in range(len(fields)):
                    if fields[place] in ("", "\n"):
                        fields[place] = "0"
                y[number] = np.int32(fields[0])
                X_int[number] = np.array(fields[1 : 1 + NUM_DENSE], dtype=np.int32)
                ids = np.array([int(field, 16) for field in fields[1 + NUM_DENSE :]])
                X_cat[number] = ids.astype(np.int32)
                for table in range(NUM_TABLES):
                    rows_of[table][X_cat[number][table]] = 1
        np.savez_compressed(folder / f"loop_{day}.npz", X_int=X_int, X_cat_t=np.transpose(X_cat), y=y)

    def replace_ids(day: int, rows_of: list[dict[Any, int]]) -> None:
        with np.load(folder / f"loop_{day}.npz") as stored:
            X_cat_t = np.zeros(stored["X_cat_t"].shape)
            for table in range(NUM_TABLES):
                for number, raw_id in enumerate(stored["X_cat_t"][table, :]):
                    X_cat_t[table, number] = rows_of[table][raw_id]
            X_int, y = stored["X_int"], stored["y"]
        X_int[X_int < 0] = 0
        np.savez_compressed(folder / f"loop_{day}_processed.npz", X_cat=np.transpose(X_cat_t), X_int=X_int, y=y)

    return timed(work, unit="rows")


def run_bare_read(folder: Path, args: argparse.Namespace) -> dict[str, Any]:
    """Read the text once and cast every column; keep it in memory, write nothing."""
    import polars as pl

    numbers = ["label", *(f"int_{index}" for index in range(NUM_DENSE))]
    tokens = [f"cat_{index}" for index in range(NUM_TABLES)]
    schema = dict.fromkeys(numbers, pl.Int64) | dict.fromkeys(tokens, pl.String)

    def work() -> int:
        frame = pl.read_csv(folder / "log.tsv", separator="\t", has_header=False, quote_char=None, schema=schema)
        cast = frame.with_columns(pl.col(tokens).str.to_integer(base=16, dtype=pl.UInt32, strict=False))
        return cast.height

    return timed(work, unit="rows")


def count_lines(path: Path) -> int:
    """Lines of a text file."""
    with path.open("rb") as stream:
        return sum(1 for _ in stream)


CONTENDERS: dict[str, Callable[[Path, argparse.Namespace], dict[str, Any]]] = {
    "slipstream": run_slipstream,
    "torchrec": run_torchrec,
    "plain loop": run_plain_loop,
    "bare read": run_bare_read,
}

if __name__ == "__main__":
    main()
