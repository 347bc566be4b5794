"""Counting and segregating against FAE's per-sample profiler, and against copying the arrays once.

    python benchmarks/bench_segregate.py
    python benchmarks/bench_segregate.py --rows 20000 --slow-rows 2000

One generated Criteo log, preprocessed before anything is timed. Every contender has a process of its own and is timed
from after its imports to its last byte on disk, loading and saving included; of several rounds the fastest counts.

    slipstream   the counting pass of `profile`, then the whole stage `segregate` (policy `frequency`)
    FAE loop     the steps of FAE's input profiler, sample by sample: count, rank, classify, remap, compressed npz.
                 `--slow-rows N` has it read the first N training samples only; it is then compared per sample
    copy         reads the same Parquet parts and writes the same arrays as npz, no decisions: the limit
"""

import argparse
import json
import os
import platform
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from processes import run_apart, timed

NUM_DENSE, NUM_TABLES = 13, 26
HOT_SHARE = 0.1


def main() -> None:
    """Run every contender and print the table, then one JSON line."""
    args = parse_arguments()
    if args.contender:
        print(json.dumps(CONTENDERS[args.contender](Path(args.folder))))
        return
    with tempfile.TemporaryDirectory(dir=args.work) as folder:
        prepare(args, Path(folder))
        os.sync()  # nobody's clock runs while the input is still on its way to the disk
        rounds: dict[str, list[dict[str, Any]]] = {label: [] for label in CONTENDERS}
        for _ in range(args.rounds):
            for label in CONTENDERS:
                rounds[label].append(run_apart(__file__, label, ["--folder", folder]))
    results = {label: min(measured, key=lambda one: one["seconds"]) for label, measured in rounds.items()}
    report(args, results)


def parse_arguments() -> argparse.Namespace:
    """Read the options."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=2_000_000)
    parser.add_argument("--slow-rows", type=int, default=None, help="training samples for the FAE loop")
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--work", default=None, help="folder for temporary files")
    parser.add_argument("--contender", choices=list(CONTENDERS), help="run this one here and print JSON")
    parser.add_argument("--folder", help="where the contender finds the preprocessed log")
    return parser.parse_args()


def prepare(args: argparse.Namespace, folder: Path) -> None:
    """Write and preprocess the log; keep the first samples as npz for the loop."""
    import numpy as np

    from slipstream.config import build_pipeline
    from slipstream.datasets.synthetic import SyntheticSpec, write_log
    from slipstream.pipeline import run_pipeline

    write_log(SyntheticSpec(num_samples=args.rows, num_days=min(args.rows, 7)), folder / "log.tsv")
    config = build_pipeline({"name": "bench", "dataset": {"source": "criteo", "raw": [str(folder / "log.tsv")]}})
    run_pipeline(config, folder / "runs", stages=["preprocess"])
    (folder / "log.tsv").unlink()
    processed = find_preprocessed(folder)
    parts = [read_arrays(part) for part in processed.files("train/", ".parquet")]
    arrays = {name: np.concatenate([part[name] for part in parts])[: args.slow_rows] for name in parts[0]}
    arrays["X_cat"] = arrays["X_cat"].astype(np.float64)  # as DLRM stores rows
    np.savez_compressed(folder / "head.npz", **arrays, counts=list(processed.counts["rows_per_table"].values()))


def find_preprocessed(folder: Path) -> Any:
    """Give the published preprocess artifact."""
    from slipstream.io.artifacts import open_artifact

    [path] = (folder / "runs" / "bench" / "preprocess").glob("[0-9a-f]*")
    return open_artifact(path)


def run_slipstream(folder: Path) -> dict[str, Any]:
    """Count accesses as `profile` does, then segregate."""
    from slipstream.config import SegregateConfig
    from slipstream.io.counts import write_counts
    from slipstream.io.samples import read_rows
    from slipstream.ops.counting import count_accesses
    from slipstream.ops.hot_set import table_offsets
    from slipstream.progress import Silent
    from slipstream.stages import segregate

    def work() -> int:
        processed = find_preprocessed(folder)
        rows_per_table = processed.counts["rows_per_table"]
        offsets = table_offsets(list(rows_per_table.values()))
        blocks = (read_rows(part, list(rows_per_table), offsets) for part in processed.files("train/", ".parquet"))
        counts = count_accesses(blocks, num_rows=int(offsets[-1]))
        with tempfile.TemporaryDirectory(dir=folder) as scratch:
            write_counts(Path(scratch) / "counts.parquet", counts, rows_per_table)
            written = segregate.run(
                SegregateConfig(hot_budget=f"{HOT_SHARE:.0%}"),
                processed=processed,
                counts=counts,
                row_bytes=64,
                scratch=Path(scratch),
                progress=Silent(),
            )
        return sum(written.samples.values())

    return timed(work, unit="samples")


def run_fae_loop(folder: Path) -> dict[str, Any]:
    """Give the steps of FAE's input profiler, sample by sample, its files read and written.

    Count the rows of a 5 % draw in one list of (table, row, count) per table; sort them all and keep the hottest;
    number those in a dictionary per table keyed (table, row); walk over the samples until a row is not hot; write hot
    and cold samples as arrays of objects in compressed npz. The budget is a share of the rows, as for slipstream.
    Source: the single-process dlrm_input_profiler of FAE, after the loading of DLRM's CriteoDataset.
    """
    import numpy as np

    def work() -> int:
        with np.load(folder / "head.npz") as arrays:
            X_int, X_cat, y, num_rows = arrays["X_int"], arrays["X_cat"], arrays["y"], arrays["counts"]
        order = np.random.default_rng(0).permutation(len(y))
        dense, sparse, labels = [X_int[at] for at in order], [X_cat[at] for at in order], [y[at] for at in order]
        skew = count_draw(sparse, num_rows)
        skew = skew[skew[:, 2].argsort()[::-1]][: int(len(skew) * HOT_SHARE)]
        hot_rows: list[dict[tuple[Any, Any], np.float32]] = [{} for _ in num_rows]
        for rank in range(len(skew)):
            hot_rows[skew[rank][0]][skew[rank][0], skew[rank][1]] = np.float32(rank)
        hot, cold = [], []
        for X, rows, label in zip(dense, sparse, labels, strict=True):
            ranks = []
            for table, row in enumerate(rows):
                if (table, int(row)) not in hot_rows[table]:
                    break
                ranks.append(hot_rows[table][table, int(row)])
            if len(ranks) == len(rows):
                hot.append((X, np.array(ranks).astype(np.float32), label))
            else:
                cold.append((X, rows, label))
        for name, samples in (("hot", hot), ("normal", cold), ("dict", hot_rows)):
            np.savez_compressed(folder / f"fae-{name}.npz", np.array(samples, dtype=object))
        return len(y)

    def count_draw(sparse: list[Any], num_rows: Any) -> Any:
        tables = [np.zeros((rows, 3), dtype=int) for rows in num_rows]
        for table, skew in enumerate(tables):
            for row in range(len(skew)):
                skew[row][0] = table
        for skew in tables:
            for row in range(len(skew)):
                skew[row][1] = row
        for at in np.random.default_rng(1).integers(0, len(sparse), len(sparse) // 20):
            for table, row in enumerate(sparse[at]):
                tables[table][int(row)][2] += 1
        return np.vstack(tables)

    return timed(work, unit="samples")


def run_copy(folder: Path) -> dict[str, Any]:
    """Read every part into the arrays of a shard and write them."""
    import numpy as np

    def work() -> int:
        samples = 0
        with tempfile.TemporaryDirectory(dir=folder) as out:
            for number, part in enumerate(find_preprocessed(folder).files("", ".parquet")):
                if part.parent.name in {"train", "val", "test"}:
                    arrays = read_arrays(part)
                    np.savez(Path(out) / f"{number}.npz", **arrays)
                    samples += len(arrays["y"])
        return samples

    return timed(work, unit="samples")


def read_arrays(part: Path) -> dict[str, Any]:
    """Give the arrays of a shard, from a Parquet part, rows left as they are."""
    import numpy as np
    import pyarrow.parquet as pq

    table = pq.read_table(part)
    X_int = np.stack([table.column(f"int_{index}").to_numpy() for index in range(NUM_DENSE)])
    X_cat = np.stack([table.column(f"cat_{index}").to_numpy() for index in range(NUM_TABLES)])
    return {
        "X_int": np.ascontiguousarray(X_int.T),
        "X_cat": np.ascontiguousarray(X_cat.T),
        "y": table.column("label").to_numpy().astype(np.float32),
    }


def report(args: argparse.Namespace, results: dict[str, dict[str, Any]]) -> None:
    """Print the table, then one JSON line."""
    print(f"{args.rows:,} samples, {os.cpu_count()} cores, {platform.machine()}")
    print(f"{'contender':14}{'samples':>11}{'wall s':>9}{'CPU s':>9}{'us each':>9}{'wall':>9}{'CPU':>9}{'peak MB':>10}")
    ours = results["slipstream"]
    for label, result in results.items():
        for unit in ("seconds", "cpu_seconds"):
            result[f"{unit}_ratio"] = result[unit] / result["samples"] / (ours[unit] / ours["samples"])
        print(
            f"{label:14}{result['samples']:11,}{result['seconds']:9.2f}{result['cpu_seconds']:9.2f}"
            f"{result['seconds'] / result['samples'] * 1e6:9.2f}{result['seconds_ratio']:8.2f}x"
            f"{result['cpu_seconds_ratio']:8.2f}x{result['peak_mb']:10,.0f}"
        )
    print(json.dumps({"benchmark": "segregate", "arguments": vars(args), "results": results}))


CONTENDERS: dict[str, Callable[[Path], dict[str, Any]]] = {
    "slipstream": run_slipstream,
    "FAE loop": run_fae_loop,
    "copy": run_copy,
}

if __name__ == "__main__":
    main()
