"""Scoring raw lines against the preprocessing of the same text, and exports against the model itself.

    python benchmarks/bench_score.py
    python benchmarks/bench_score.py --memory

One generated Criteo log, and one small model trained on its first lines; then, each in a process of its own and timed
from after its imports to its last byte on disk:

    preprocess   the whole stage over the log, through the pipeline
    score        `slipstream score` of the same log with that model, quality measured, to Parquet
    torch        the model on encoded samples, batch by batch
    onnx         its ONNX export in ONNX Runtime on the same samples, one thread like torch

`--memory` scores logs of --rows and five times as many lines: peak memory may not grow with lines, but for the 4 bytes
a line that measuring quality takes. What it does not show: a large network, whose products would outweigh everything.
"""

import argparse
import json
import os
import platform
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from processes import run_apart, timed

BATCHES = (1, 32, 1024)


def main() -> None:
    """Run every contender and print the table, then one JSON line."""
    args = parse_arguments()
    if args.contender:
        print(json.dumps(CONTENDERS[args.contender](Path(args.folder), args)))
        return
    with tempfile.TemporaryDirectory(dir=args.work) as folder:
        prepare(Path(folder), args)
        options = ["--folder", folder, "--rows", str(args.rows)]
        contenders = ["score", "score x5"] if args.memory else list(CONTENDERS)[:-1]
        results = {label: run_apart(__file__, label, options) for label in contenders}
    print(f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}")
    for label, found in results.items():
        if "rows" in found:
            pace = found["rows"] / found["seconds"]
            print(
                f"{label:<12}{found['rows']:>12,} lines {found['seconds']:8.2f} s {found['cpu_seconds']:8.2f} s cpu"
                f" {pace:>12,.0f} lines/s {found['peak_mb']:>8,.0f} MB"
            )
        else:
            latencies = ", ".join(f"batch {size}: {p50:.2f} / {p99:.2f}" for size, (p50, p99) in found.items())
            print(f"{label:<12}ms, median / 99th percentile: {latencies}")
    if not args.memory:
        ratio = results["preprocess"]["seconds"] / results["score"]["seconds"]
        print(f"score reads {ratio:.2f} times the lines a second that preprocess reads")
    print(json.dumps({"benchmark": "score", "arguments": vars(args), "results": results}))


def parse_arguments() -> argparse.Namespace:
    """Read the options."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--memory", action="store_true", help="peak memory at --rows and five times as many lines")
    parser.add_argument("--work", default=None, help="folder for temporary files")
    parser.add_argument("--contender", choices=list(CONTENDERS), help="run this one here and print JSON")
    parser.add_argument("--folder", help="of the logs and the model, for --contender")
    return parser.parse_args()


def prepare(folder: Path, args: argparse.Namespace) -> None:
    """Write the logs, and train the model on the first lines."""
    import slipstream
    from slipstream.datasets.synthetic import SyntheticSpec, write_log

    sizes = {"log": args.rows, "train": min(args.rows, 100_000)} | ({"log5": 5 * args.rows} if args.memory else {})
    for name, rows in sizes.items():
        write_log(SyntheticSpec(num_samples=rows, num_days=7, seed=0), folder / f"{name}.tsv")
    (folder / "model.toml").write_text(
        f'name = "model"\n[dataset]\nsource = "criteo"\nraw = "{folder / "train.tsv"}"\n'
        "[model]\nbottom_mlp = [64, 16]\ntop_mlp = [64, 1]\n",
        encoding="utf-8",
    )
    trained = slipstream.run(folder / "model.toml", runs=folder / "runs")
    (folder / "model").symlink_to(trained.model.resolve())


def run_preprocess(folder: Path, args: argparse.Namespace) -> dict[str, Any]:
    """Preprocess the log through the pipeline."""
    import slipstream
    from slipstream.stages import preprocess  # noqa: F401 (imports are not timed)

    def work() -> int:
        options = {"dataset.raw": str(folder / "log.tsv"), "name": "all"}
        figures = slipstream.run(folder / "model.toml", options, runs=folder / "all", stages=["preprocess"]).figures
        lines: int = figures["preprocess"]["lines"]
        return lines

    return timed(work, unit="rows")


def run_score(folder: Path, args: argparse.Namespace, log: str = "log.tsv") -> dict[str, Any]:
    """Score the log."""
    from slipstream.pipeline import score_lines
    from slipstream.stages import score  # noqa: F401 (imports are not timed)

    def work() -> int:
        lines: int = score_lines([folder / "model"], raw=[str(folder / log)], out=folder / "scores.parquet")["lines"]
        return lines

    return timed(work, unit="rows")


def run_torch(folder: Path, args: argparse.Namespace) -> dict[str, Any]:
    """Time the model itself."""
    import torch

    import slipstream
    from slipstream.serving.examples import read_examples

    torch.set_num_threads(1)
    model = slipstream.load(folder / "model")
    examples = read_examples(folder / "model")
    return measure_latency(lambda n: model.predict(examples.dense[:n], examples.rows[:n]))


def run_onnx(folder: Path, args: argparse.Namespace) -> dict[str, Any]:
    """Time its ONNX export."""
    import numpy as np
    import onnxruntime

    from slipstream.pipeline import export_model
    from slipstream.serving.examples import read_examples

    export_model(folder / "model", out=folder / "model.onnx", format_name="onnx")
    settings = onnxruntime.SessionOptions()
    settings.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(str(folder / "model.onnx"), settings, providers=["CPUExecutionProvider"])
    examples = read_examples(folder / "model")
    rows = examples.rows.astype(np.int64)
    return measure_latency(lambda n: session.run(None, {"dense": examples.dense[:n], "rows": rows[:n]}))


def measure_latency(predict: Callable[[int], Any], *, calls: int = 200) -> dict[str, Any]:
    """Milliseconds of a call at each batch size: median and 99th percentile."""
    found = {}
    for size in BATCHES:
        predict(size)
        times = []
        for _ in range(calls):
            started = time.perf_counter()
            predict(size)
            times.append(1000 * (time.perf_counter() - started))
        times.sort()
        found[str(size)] = (times[calls // 2], times[calls * 99 // 100])
    return found


CONTENDERS: dict[str, Callable[[Path, argparse.Namespace], dict[str, Any]]] = {
    "preprocess": run_preprocess,
    "score": run_score,
    "torch": run_torch,
    "onnx": run_onnx,
    "score x5": lambda folder, args: run_score(folder, args, "log5.tsv"),
}

if __name__ == "__main__":
    main()
