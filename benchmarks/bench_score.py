"""Scoring raw lines against the preprocessing of the same text, and exports against the model itself.

    python benchmarks/bench_score.py
    python benchmarks/bench_score.py --data train.txt --repeat 10
    python benchmarks/bench_score.py --memory
    python benchmarks/bench_score.py --memory --source taobao

A log and a model: by default a generated Criteo log and a small network trained on its first lines; with `--data` one's
own log, repeated `--repeat` times, and the network of a shipped pipeline trained on it once. Then, each in a process of
its own, one after the other, `--rounds` times:

    preprocess   the whole stage over the log: `slipstream preprocess`
    score        `slipstream score` of the same log with that model, quality measured, to Parquet
    torch        the model on encoded samples, batch by batch
    onnx         its ONNX export in ONNX Runtime on the same samples, one thread like torch

The first two are measured as commands, from their start to their end, and as work alone, in processes that have loaded
all they need; the difference is start-up, most of it the loading of torch. With `--data` the last two are left out.

`--memory` scores logs of --rows and five times as many lines: peak memory may not grow with lines, but for the 4 bytes
a line that measuring quality takes. Of memory the process's own part and that of mapped files are told apart: the
latter are pages that the system takes back when it needs them. What is not shown: a log of new values, whose ids no
vocabulary has.
"""

import argparse
import json
import os
import platform
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from processes import resident_peaks, run_apart, run_command, timed

BATCHES = (1, 32, 1024)
PACES = ("command preprocess", "command score", "preprocess", "score")


def main() -> None:
    """Run every contender and print the table, then one JSON line."""
    args = parse_arguments()
    if args.contender:
        print(json.dumps(CONTENDERS[args.contender](Path(args.folder), args)))
        return
    with tempfile.TemporaryDirectory(dir=args.work) as folder:
        prepare(Path(folder), args)
        options = ["--folder", folder]
        if args.memory:
            rounds = [{label: run_apart(__file__, label, options) for label in ("score", "score x5")}]
        else:
            rounds = [{label: run_apart(__file__, label, options) for label in PACES} for _ in range(args.rounds)]
        latencies = [] if args.memory or args.data else ["torch", "onnx"]
        results: dict[str, Any] = {"rounds": rounds} | {
            label: run_apart(__file__, label, options) for label in latencies
        }
    print(f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}")
    show_rounds(rounds)
    for label in latencies:
        found = ", ".join(f"batch {size}: {p50:.2f} / {p99:.2f}" for size, (p50, p99) in results[label].items())
        print(f"{label:<19}ms, median / 99th percentile: {found}")
    print(json.dumps({"benchmark": "score", "arguments": vars(args), "results": results}))


def show_rounds(rounds: list[dict[str, dict[str, Any]]]) -> None:
    """Print the median of every contender, and how scoring and preprocessing compare, round by round."""
    print("medians            lines        s    s cpu      lines/s       MB    own MB   files MB")
    for label in rounds[0]:
        found = {key: statistics.median(one[label][key] for one in rounds) for key in rounds[0][label]}
        memory = "".join(f"{found[key]:>10,.0f}" for key in ("peak_mb", "own_mb", "files_mb") if key in found)
        pace = found["rows"] / found["seconds"]
        print(
            f"{label:<19}{found['rows']:>10,}{found['seconds']:9.2f}{found['cpu_seconds']:9.2f}{pace:>13,.0f}{memory}"
        )
    for kind, what in (("command ", "start-up included"), ("", "work alone")):
        if f"{kind}preprocess" in rounds[0]:
            ratios = [one[f"{kind}preprocess"]["seconds"] / one[f"{kind}score"]["seconds"] for one in rounds]
            print(
                f"score reads {statistics.median(ratios):.2f} times the lines a second that preprocess reads, {what} "
                f"({min(ratios):.2f} to {max(ratios):.2f} in {len(rounds)} rounds)"
            )


def parse_arguments() -> argparse.Namespace:
    """Read the options."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=1_000_000, help="lines of a generated log")
    parser.add_argument("--source", choices=["criteo", "taobao"], default="criteo", help="of a generated log")
    parser.add_argument("--data", help="a log of one's own, in place of a generated one")
    parser.add_argument("--pipeline", default="criteo_kaggle", help="what is trained on --data")
    parser.add_argument("--repeat", type=int, default=1, help="how often --data stands in the log")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--memory", action="store_true", help="peak memory at --rows and five times as many lines")
    parser.add_argument("--work", default=None, help="folder for temporary files")
    parser.add_argument("--contender", choices=list(CONTENDERS), help="run this one here and print JSON")
    parser.add_argument("--folder", help="of the logs and the model, for --contender")
    args = parser.parse_args()
    if args.source != "criteo" and not args.memory:
        parser.error("a generated log of taobao is for --memory: it has no labels, so scoring it is other work")
    return args


def prepare(folder: Path, args: argparse.Namespace) -> None:
    """Write the logs, and train the model on the first lines, or on all of one's own."""
    import slipstream

    if args.data:
        log = repeat(Path(args.data), folder, args.repeat)
        pipeline, training = args.pipeline, args.data
    else:
        log, training = folder / "log.txt", folder / "train.txt"
        pipeline = str(folder / "model.toml")
        sizes = {log: args.rows, training: min(args.rows, 100_000)}
        sizes |= {folder / "log5.txt": 5 * args.rows} if args.memory else {}
        for path, rows in sizes.items():
            WRITERS[args.source](path, rows)
        Path(pipeline).write_text(PIPELINES[args.source], encoding="utf-8")
    trained = slipstream.run(pipeline, {"dataset.raw": str(training)}, runs=folder / "runs")
    (folder / "model").symlink_to(trained.model.resolve())
    names = {"log": str(log), "pipeline": pipeline}
    (folder / "names.json").write_text(json.dumps(names), encoding="utf-8")


def repeat(data: Path, folder: Path, times: int) -> Path:
    """Give a log that has another one so many times, unpacked where that is more than once."""
    from slipstream.io.raw import read_blocks

    if times == 1:
        return data.resolve()
    log = folder / "log.txt"
    with log.open("wb") as out:
        for _ in range(times):
            for block in read_blocks(str(data), file_index=0, block_bytes=1 << 22):
                assert isinstance(block.data, bytes)
                out.write(block.data if block.data.endswith(b"\n") else block.data + b"\n")
    return log


def write_clicks(path: Path, rows: int) -> None:
    """Write a Criteo log."""
    from slipstream.datasets.synthetic import SyntheticSpec, write_log

    write_log(SyntheticSpec(num_samples=rows, num_days=7, seed=0), path)


def write_events(path: Path, rows: int) -> None:
    """Write a Taobao log in the order of time, a hundred events a user."""
    import numpy as np
    import polars as pl

    random = np.random.default_rng(0)
    with path.open("wb") as out:
        for start in range(0, rows, 1 << 20):
            num = min(rows - start, 1 << 20)
            items = random.zipf(1.3, num) % 400_000
            events = {
                "user": random.integers(1, max(rows // 100, 2), num),
                "item": items,
                "category": items % 9_000,
                "behaviour": np.full(num, "pv"),
                "time": 1_511_544_000 + np.arange(start, start + num) * 700_000 // rows,
            }
            pl.DataFrame(events).write_csv(out, include_header=False)


WRITERS = {"criteo": write_clicks, "taobao": write_events}
PIPELINES = {
    "criteo": 'name = "model"\n[dataset]\nsource = "criteo"\nraw = ""\n'
    "[model]\nbottom_mlp = [64, 16]\ntop_mlp = [64, 1]\n",
    "taobao": 'name = "model"\n[dataset]\nsource = "taobao"\nraw = ""\n[preprocess]\nsplit = "by_time"\n'
    '[model]\nname = "tbsm"\n',
}


def read_names(folder: Path) -> dict[str, str]:
    """Say where `prepare` put things."""
    names: dict[str, str] = json.loads((folder / "names.json").read_text(encoding="utf-8"))
    return names


def command_preprocess(folder: Path, args: argparse.Namespace) -> dict[str, Any]:
    """Preprocess the log from the command line."""
    names, runs = read_names(folder), folder / "all"
    command = ["preprocess", names["pipeline"], "--set", f"dataset.raw={names['log']}", "--runs", str(runs), "--quiet"]
    _, found = run_command([sys.executable, "-m", "slipstream", *command])
    (manifest,) = runs.glob("*/preprocess/*/manifest.json")
    counts = json.loads(manifest.read_text(encoding="utf-8"))["counts"]
    shutil.rmtree(runs)
    return {"rows": counts["lines"], **found}


def command_score(folder: Path, args: argparse.Namespace) -> dict[str, Any]:
    """Score the log from the command line."""
    out = folder / "scores.parquet"
    command = ["score", str(folder / "model"), "--raw", read_names(folder)["log"], "--out", str(out), "--json"]
    answer, found = run_command([sys.executable, "-m", "slipstream", *command])
    return {"rows": json.loads(answer)["lines"], **found}


def run_preprocess(folder: Path, args: argparse.Namespace) -> dict[str, Any]:
    """Preprocess the log through the pipeline."""
    import slipstream
    from slipstream.stages import preprocess  # noqa: F401 (imports are not timed)

    names, runs = read_names(folder), folder / "all"

    def work() -> int:
        done = slipstream.run(names["pipeline"], {"dataset.raw": names["log"]}, runs=runs, stages=["preprocess"])
        lines: int = done.figures["preprocess"]["lines"]
        return lines

    found = timed(work, unit="rows")
    shutil.rmtree(runs)
    return found


def run_score(folder: Path, args: argparse.Namespace, log: str = "") -> dict[str, Any]:
    """Score the log, or another."""
    from slipstream.pipeline import score_lines
    from slipstream.serving import model  # noqa: F401 (imports are not timed)
    from slipstream.stages import score  # noqa: F401

    raw = str(folder / log) if log else read_names(folder)["log"]

    def work() -> int:
        lines: int = score_lines([folder / "model"], raw=[raw], out=folder / "scores.parquet")["lines"]
        return lines

    with resident_peaks() as peaks:
        found = timed(work, unit="rows")
    return found | peaks


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
    "command preprocess": command_preprocess,
    "command score": command_score,
    "preprocess": run_preprocess,
    "score": run_score,
    "torch": run_torch,
    "onnx": run_onnx,
    "score x5": lambda folder, args: run_score(folder, args, "log5.txt"),
}

if __name__ == "__main__":
    main()
