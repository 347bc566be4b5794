"""Serving: a model's ONNX export beside the model itself, and the server of the guide over HTTP.

    python benchmarks/bench_serve.py
    python benchmarks/bench_serve.py --raw criteo_kaggle_137139.tsv.gz

One Criteo log, generated or given; a model of the shipped Criteo shape is trained on it once for every way to hold
tables. Then, each in a process of its own, on --samples real lines of the log's end:

    dense, int8, int4, tt   bytes of the weights and of the ONNX file; largest difference between the probabilities of
                            both; milliseconds of a batch by torch and by ONNX Runtime, one thread each
    http                    examples/serve.py with the dense model in a process of its own: milliseconds from JSON to
                            probabilities on one kept connection, parsing and look-up of raw ids included; and the part
                            of it that encoding takes

What it does not show: several clients at once, a network between them, tables beyond a processor's cache.
"""

import argparse
import json
import os
import platform
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.client import HTTPConnection
from pathlib import Path
from typing import Any

from processes import run_apart

BATCHES = (1, 32, 1024)
SERVER = Path(__file__).parents[1] / "examples" / "serve.py"
HELD: dict[str, dict[str, Any]] = {
    "dense": {},
    "int8": {"tables.representation": "int8"},
    "int4": {"tables.representation": "int4"},
    "tt": {"tables.rules": [{"min_rows": 200, "representation": "tt", "tt_ranks": [8, 8]}]},
}


def main() -> None:
    """Run every contender and print the table, then one JSON line."""
    args = parse_arguments()
    if args.contender:
        contender = run_http if args.contender == "http" else run_export
        print(json.dumps(contender(Path(args.folder), args)))
        return
    with tempfile.TemporaryDirectory(dir=args.work) as folder:
        prepare(Path(folder), args)
        options = ["--folder", folder, "--samples", str(args.samples), "--calls", str(args.calls)]
        results = {label: run_apart(__file__, label, options) for label in [*HELD, "http"]}
    print(f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}")
    print("milliseconds of a batch of 1 / 32 / 1024, median (99th percentile)")
    for label, found in results.items():
        for way, latencies in found["milliseconds"].items():
            shown = "  ".join(f"{p50:7.2f} ({p99:6.2f})" for p50, p99 in latencies.values())
            print(f"{label:<6} {way:<8} {shown}")
        if "samples" in found:
            print(
                f"{label:<6} weights {found['weight_bytes']:,} bytes, ONNX {found['onnx_bytes']:,}; largest difference "
                f"over {found['samples']:,} samples {found['largest_difference']:.1e}"
            )
    print(json.dumps({"benchmark": "serve", "arguments": vars(args), "results": results}))


def parse_arguments() -> argparse.Namespace:
    """Read the options."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--raw", help="a log in Criteo's format; generated where none is given")
    parser.add_argument("--rows", type=int, default=100_000, help="lines to generate")
    parser.add_argument("--samples", type=int, default=10_000, help="lines to compare on")
    parser.add_argument("--calls", type=int, default=300, help="of each batch size")
    parser.add_argument("--work", default=None, help="folder for temporary files")
    parser.add_argument("--contender", choices=[*HELD, "http"], help="run this one here and print JSON")
    parser.add_argument("--folder", help="of the log and the models, for --contender")
    return parser.parse_args()


def prepare(folder: Path, args: argparse.Namespace) -> None:
    """Get the log, train the models, export them, and keep the last lines."""
    import slipstream
    from slipstream.datasets.synthetic import SyntheticSpec, write_log
    from slipstream.io.raw import read_blocks
    from slipstream.pipeline import export_model

    raw = Path(args.raw).resolve() if args.raw else folder / "log.tsv"
    if not args.raw:
        write_log(SyntheticSpec(num_samples=args.rows, num_days=7, seed=0), raw)
    lines = b"".join(bytes(block.data) for block in read_blocks(str(raw), file_index=0, block_bytes=8 << 20))
    (folder / "lines.tsv").write_bytes(b"\n".join(lines.splitlines()[-args.samples :]) + b"\n")
    for label, options in HELD.items():
        overrides = {"dataset.raw": raw, "name": label, "train.batch_size": 1024, **options}
        trained = slipstream.run("criteo_kaggle", overrides, runs=folder / "runs")
        (folder / label).symlink_to(trained.model.resolve())
        export_model(trained.model, out=folder / f"{label}.onnx", format_name="onnx")


def run_export(folder: Path, args: argparse.Namespace) -> dict[str, Any]:
    """Compare a model's export with the model."""
    import numpy as np
    import onnxruntime
    import torch

    import slipstream

    torch.set_num_threads(1)
    label = args.contender
    model = slipstream.load(folder / label)
    dense, rows = model.encode((folder / "lines.tsv").read_bytes())
    settings = onnxruntime.SessionOptions()
    settings.intra_op_num_threads = 1
    onnx = folder / f"{label}.onnx"
    session = onnxruntime.InferenceSession(str(onnx), settings, providers=["CPUExecutionProvider"])

    def run_onnx(n: int) -> np.ndarray:
        return np.asarray(session.run(None, {"dense": dense[:n], "rows": rows[:n]})[0])

    difference = np.abs(run_onnx(len(dense)) - model.predict(dense, rows)).max()
    return {
        "samples": len(dense),
        "largest_difference": float(difference),
        "weight_bytes": (folder / label / "model.safetensors").stat().st_size,
        "onnx_bytes": onnx.stat().st_size,
        "milliseconds": {
            "torch": measure(lambda n: model.predict(dense[:n], rows[:n]), args.calls),
            "onnx": measure(run_onnx, args.calls),
        },
    }


def run_http(folder: Path, args: argparse.Namespace) -> dict[str, Any]:
    """Ask the server for probabilities, each time of other samples."""
    import slipstream

    encoder = slipstream.load_encoder(folder / "dense")
    fields = encoder.source.fields
    lines = (folder / "lines.tsv").read_text(encoding="utf-8").splitlines()
    samples = [dict(zip(fields, line.split("\t"), strict=True)) for line in lines]

    def batches(n: int) -> Iterator[list[dict[str, str]]]:
        at = 0
        while True:
            yield [samples[(at + place) % len(samples)] for place in range(n)]
            at += n

    streams = {n: batches(n) for n in BATCHES}
    bodies = {n: ("\n".join(map(json.dumps, batch)).encode() for batch in streams[n]) for n in BATCHES}
    with serving(folder) as connection:

        def ask(body: bytes) -> None:
            connection.request("POST", "/score", body)
            answer = connection.getresponse()
            scored = json.loads(answer.read())
            assert answer.status == 200 and None not in scored["probability"], scored

        over_http = measure_with(ask, bodies, args.calls)
    return {"milliseconds": {"http": over_http, "encode": measure_with(encoder.encode_values, streams, args.calls)}}


@contextmanager
def serving(folder: Path) -> Iterator[HTTPConnection]:
    """Start the server, give a connection to it, and end it."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, str(SERVER), str(folder / "dense"), str(folder / "dense.onnx"), "--port", str(port)]
    process = subprocess.Popen(command)
    try:
        connection = HTTPConnection("127.0.0.1", port, timeout=60)
        while process.poll() is None:
            try:
                connection.connect()
                break
            except ConnectionRefusedError:
                time.sleep(0.05)
        connection.sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        yield connection
        connection.close()
    finally:
        process.terminate()
        process.wait()


def measure(call: Callable[[int], Any], calls: int) -> dict[str, tuple[float, float]]:
    """Milliseconds at each batch size: median and 99th percentile."""

    def again(n: int) -> Iterator[int]:
        while True:
            yield n

    return measure_with(call, {n: again(n) for n in BATCHES}, calls)


def measure_with(
    call: Callable[[Any], Any], given: dict[int, Iterator[Any]], calls: int
) -> dict[str, tuple[float, float]]:
    """Milliseconds of calls with what is given for each batch size, the first two left out."""
    found = {}
    for size, stream in given.items():
        times = []
        for number in range(calls + 2):
            argument = next(stream)
            started = time.perf_counter()
            call(argument)
            if number >= 2:
                times.append(1000 * (time.perf_counter() - started))
        times.sort()
        found[str(size)] = (times[calls // 2], times[calls * 99 // 100])
    return found


if __name__ == "__main__":
    main()
