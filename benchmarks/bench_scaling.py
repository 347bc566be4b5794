"""Training on 1, 2 and 4 ranks: where a step's time goes, what crosses the wire, and a model of both.

    python benchmarks/bench_scaling.py             a synthetic log, seconds
    python benchmarks/bench_scaling.py --samples 400000 --batch 2048 --rounds 3

Ranks have one thread each, on the CPU at hand. Three things are measured: trainings of the same batches by 1, 2 and 4
ranks (the fastest of some rounds); collectives of gloo over sizes from a kilobyte to 16 MB, between two ranks; and, by
the counters of a loopback device of their own, whether the bytes that two ranks count are those that leave them.

The model of a step on R ranks:

    input, plan and move      as on one rank: every rank reads whole batches, and places the rows of all
    compute and update        1/R of one rank's
    exchange                  bytes / bandwidth + collectives x latency

One rank gives the first two, the collectives bandwidth and latency; what two and four ranks take stands beside what the
model says of them. Where ranks share cores, with each other or with other work, wall time says little: the processor
time of a rank for a step is what it would take with a core of its own, waiting aside.

The forecast for Criteo Terabyte takes its bytes from the sizes of its tables, so it can be checked by hand; the time of
the host is measured here, on one core; the speeds of GPU and network are assumptions, which stand at the top of this
file. A step takes the longer of host and device, for the host works ahead.

A table for people first, one JSON line last.
"""

from __future__ import annotations

import argparse
import fcntl
import json
import os
import shutil
import socket
import struct
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).parent.parent
WORLDS = (1, 2, 4)
SIZES = tuple(1 << power for power in range(10, 25, 2))
TERABYTE_ROWS = (
    *(39_884_406, 39_043, 17_289, 7_420, 20_263, 3, 7_120, 1_543, 63, 38_532_951, 2_953_546, 403_346, 10),
    *(2_208, 11_938, 155, 4, 976, 14, 39_979_771, 25_641_295, 39_664_984, 585_935, 12_972, 108, 36),
)
"""Rows of the tables of Criteo Terabyte with `max_ind_range` 40 million, as DLRM trains it."""
GPU_FLOPS = 150e12
"""Assumed of a GPU: matrix products of these sizes a second (an H100 in tf32 has 495e12 on paper)."""
GPU_BANDWIDTH = 1.5e12
"""Assumed: bytes of rows a second that kernels read and write (3.35e12 on paper)."""
NETWORKS = {"NVLink, one host": (200e9, 15e-6), "100 Gbit/s Ethernet, 8 hosts": (10e9, 40e-6)}
"""Assumed: (bytes/s of one rank, seconds of a collective)."""


# --- what one rank does --------------------------------------------------------------------------------------


def train_as_rank(options: argparse.Namespace) -> None:
    """Train, as one of the ranks or alone."""
    from slipstream.config import build_pipeline
    from slipstream.pipeline import run_pipeline

    for attempt in range(options.rounds):
        run_pipeline(build_pipeline(tree(options, attempt)), options.runs)


def collect_as_rank(options: argparse.Namespace) -> None:
    """Time gathers and sums; the first rank prints a line for each size."""
    import torch
    import torch.distributed as dist

    dist.init_process_group("gloo", timeout=timedelta(seconds=120))
    for size in SIZES:
        values, seconds = torch.zeros(size // 4), []
        for _ in range(40):
            dist.barrier()
            began = time.perf_counter()
            dist.all_reduce(values)
            seconds.append(time.perf_counter() - began)
        if dist.get_rank() == 0:
            print(json.dumps([size, min(seconds)]), flush=True)
    dist.destroy_process_group()


def tree(options: argparse.Namespace, attempt: int) -> dict[str, Any]:
    """Give the pipeline of a training; attempts differ in their learning rate by nothing that shows."""
    return {
        "name": "scaling",
        "dataset": {"source": "synthetic", "num_samples": options.samples},
        "segregate": {"hot_budget": "10%"},
        "model": {
            "embedding_dim": 16,
            "bottom_mlp": [options.width, options.width // 2, 16],
            "top_mlp": [options.width, options.width // 2, 1],
        },
        "train": {
            "mode": "fae",
            "batch_size": options.batch,
            "num_threads": 1,
            "device": "cpu",
            "checkpoint_minutes": 0.0,
            "lr": 0.02 + attempt * 1e-9 + options.ranks * 1e-8,
        },
    }


# --- measuring -----------------------------------------------------------------------------------------------


def launch(options: argparse.Namespace, ranks: int, part: str) -> str:
    """Run this script as so many ranks; returns what the first printed."""
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)] if ranks > 1 else []
    own = ["--part", part, "--ranks", str(ranks), "--runs", str(options.runs), "--samples", str(options.samples)]
    own += ["--batch", str(options.batch), "--rounds", str(options.rounds), "--width", str(options.width)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, *launcher, __file__, *own], env=environment, stdout=subprocess.PIPE, text=True, check=True
    )
    return done.stdout


def measure_training(options: argparse.Namespace, ranks: int) -> dict[str, Any]:
    """Train on so many ranks, and say where the time of the fastest round went, in milliseconds a step."""
    from slipstream.config import build_pipeline
    from slipstream.pipeline import run_pipeline

    left = launch_apart(options, ranks) if ranks == 2 else None
    if left is None:
        launch(options, ranks, "train")
    options.ranks = ranks
    counts = [
        run_pipeline(build_pipeline(tree(options, attempt)), options.runs).counts("train")
        for attempt in range(options.rounds)
    ]
    best = min(counts, key=lambda one: float(one["train_seconds"]))
    steps, exchange = best["steps"], best.get("exchange_seconds", {})
    sent = best.get("sent_bytes_per_step", {})
    in_steps = sum(exchange.get(what, 0.0) for what in ("dense gradients", "row gradients"))
    ahead = sum(exchange.get(what, 0.0) for what in ("cold rows", "distinct rows", "what batches come next"))
    milliseconds = {
        "input": best["input_seconds"],
        "plan and move": best["move_seconds"] - ahead,
        "compute and update": best["compute_seconds"] - in_steps,
        "exchange in steps": in_steps,
        "exchange ahead": ahead,
    }
    return {
        "samples_per_second": best["samples_per_second"],
        "cpu_ms": min(1000 * one["cpu_seconds"] / one["steps"] for one in counts),
        "step_ms": 1000 * best["train_seconds"] / steps,
        "ms": {what: 1000 * seconds / steps for what, seconds in milliseconds.items()},
        "sent_bytes_per_step": sent,
        "counted_bytes": sum(sent.values()) * steps * ranks * options.rounds,
        "loopback_bytes": left,
    }


def launch_apart(options: argparse.Namespace, ranks: int) -> int | None:
    """Train in a network of its own; returns the bytes that left there, or None where the system allows none."""
    if shutil.which("unshare") is None or subprocess.run(["unshare", "-rn", "true"]).returncode:
        return None
    own = ["--part", "apart", "--ranks", str(ranks), "--runs", str(options.runs), "--samples", str(options.samples)]
    own += ["--batch", str(options.batch), "--rounds", str(options.rounds), "--width", str(options.width)]
    command = ["unshare", "-rn", sys.executable, __file__, *own]
    return int(subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout.split()[-1])


def train_apart(options: argparse.Namespace) -> None:
    """Bring up the loopback device of a fresh network, train there, print what left by it."""
    is_up_and_running = 0x1 | 0x40
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as handle:
        fcntl.ioctl(handle, 0x8914, struct.pack("16sh22x", b"lo", is_up_and_running))  # SIOCSIFFLAGS
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    launch(options, options.ranks, "train")
    print(loopback_bytes())


def loopback_bytes() -> int:
    """Count bytes that left by the loopback device."""
    lines = Path("/proc/net/dev").read_text(encoding="ascii").splitlines()
    return next(int(line.split(":")[1].split()[8]) for line in lines if line.strip().startswith("lo:"))


def fit_wire(timed: list[tuple[int, float]]) -> tuple[float, float]:
    """Fit (bytes/s, latency) to sums over two ranks, each of which sends as many bytes as it has."""
    sizes, seconds = (np.array(column, float) for column in zip(*timed, strict=True))
    # relative errors count, so that a kilobyte says as much as a megabyte
    design = np.stack([sizes, np.ones(len(sizes))], axis=1) / seconds[:, None]
    per_byte, latency = np.linalg.lstsq(design, np.ones(len(sizes)), rcond=None)[0]
    return 1 / max(per_byte, 1e-15), max(latency, 0.0)


def predict_step(one: dict[str, Any], this: dict[str, Any], ranks: int, wire: tuple[float, float]) -> float:
    """Predict the milliseconds of a step on some ranks, from one rank, the wire, and the bytes they send."""
    bandwidth, latency = wire
    parts = one["ms"]
    sent = sum(size for what, size in this["sent_bytes_per_step"].items() if what != "rows to predict from")
    collectives = 2 + 4 / 16  # dense and rows each step; header, ids, rows and a decision each chunk of 16
    exchange = 1000 * (sent / bandwidth + collectives * latency)
    return float(parts["input"] + parts["plan and move"] + parts["compute and update"] / ranks + exchange)


def measure_host(*, batch: int, ranks: int, samples: int = 400_000) -> dict[str, float]:
    """Time what a rank's host does for a batch, in milliseconds on one core, the fastest of five."""
    from slipstream.embedding.duplicates import sort_lookups

    rng = np.random.default_rng(0)
    columns = [rng.zipf(1.2, samples).clip(max=rows) for rows in TERABYTE_ROWS]
    starts = np.cumsum([0, *TERABYTE_ROWS[:-1]])
    slots = np.stack([column + start for column, start in zip(columns, starts, strict=True)], axis=1).astype(np.int32)
    dense = np.zeros((samples, 13), np.float32)
    picked = rng.permutation(samples)[:batch]
    part = slots[: batch // ranks].ravel()
    of_ranks = [np.unique(slots[batch * rank // ranks : batch * (rank + 1) // ranks]) for rank in range(ranks)]
    work = {
        "take a batch": lambda: (slots.take(picked, axis=0), dense.take(picked, axis=0)),
        "sort its own part": lambda: sort_lookups(part),
        "unite what ranks look up": lambda: sort_lookups(np.concatenate(of_ranks)),
    }
    return {what: min(_milliseconds(do) for _ in range(5)) for what, do in work.items()}


def _milliseconds(do: Callable[[], object]) -> float:
    began = time.perf_counter()
    do()
    return 1000 * (time.perf_counter() - began)


# --- the forecast --------------------------------------------------------------------------------------------


def count_distinct(rows: int, lookups: int, *, skew: float = 1.05) -> float:
    """Give the distinct rows that so many lookups of a table find, where popularity falls by Zipf's law."""
    edges = np.unique(np.geomspace(1, rows + 1, 400).astype(np.int64))
    ranks, widths = (edges[:-1] + edges[1:] - 1) / 2, np.diff(edges)
    shares = ranks**-skew
    shares /= (shares * widths).sum()
    return float((widths * -np.expm1(lookups * np.log1p(-np.minimum(shares, 1 - 1e-12)))).sum())


def forecast_terabyte(
    *, host_ms: float, ranks: int = 8, batch: int = 65_536, dim: int = 128, row_bytes: int | None = None
) -> dict[str, Any]:
    """Forecast a step of DLRM on Criteo Terabyte; bytes are counted, speeds assumed.

    Args:
        host_ms: What a rank's host takes for a batch.
        ranks: GPUs.
        batch: Samples of a step, over all ranks.
        dim: Of rows.
        row_bytes: Of a row's gradient on the wire; None: fp32.
    """
    layers = [(13, 512), (512, 256), (256, 128), (479, 1024), (1024, 1024), (1024, 512), (512, 256), (256, 1)]
    parameters = sum(rows * columns + columns for rows, columns in layers)
    part = batch // ranks
    distinct = sum(count_distinct(rows, part) for rows in TERABYTE_ROWS)
    union = sum(count_distinct(rows, batch) for rows in TERABYTE_ROWS)
    sent = {
        "dense gradients": 2 * (ranks - 1) / ranks * 4 * parameters,
        "row gradients": (ranks - 1) * distinct * (4 * dim if row_bytes is None else row_bytes),
        "ids": (ranks - 1) * distinct * 4,
    }
    flop = 6 * parameters * part + 6 * part * 27 * 27 * dim
    device = 1000 * (flop / GPU_FLOPS + (2 * 26 * part + 4 * union) * 4 * dim / GPU_BANDWIDTH)
    wires = {
        name: 1000 * (sum(sent.values()) / bandwidth + 3 * latency) for name, (bandwidth, latency) in NETWORKS.items()
    }
    return {
        "parameters": parameters,
        "distinct_rows_of_a_rank": distinct,
        "distinct_rows_of_all": union,
        "sent_mb": {what: size / 1e6 for what, size in sent.items()},
        "device_ms": device,
        "wire_ms": wires,
        "host_ms": host_ms,
        "samples_per_second": {name: batch / max(device + wire, host_ms) * 1000 for name, wire in wires.items()},
        "samples_per_second_without_host": {name: batch / (device + wire) * 1000 for name, wire in wires.items()},
    }


# --- for people ----------------------------------------------------------------------------------------------


def show(
    trained: dict[int, dict[str, Any]],
    wire: tuple[float, float],
    host_ms: dict[str, float],
    forecasts: dict[str, dict[str, Any]],
) -> None:
    """Print the tables."""
    one = trained[1]
    print(
        f"{'ranks':>5} {'samples/s':>10} {'step ms':>8} {'model':>8} {'cpu ms':>7} {'of one':>7}  "
        "milliseconds by part; kB sent a step and rank"
    )
    for ranks, this in trained.items():
        parts = ", ".join(f"{what} {ms:.2f}" for what, ms in this["ms"].items())
        sent = ", ".join(f"{what} {size / 1000:.1f}" for what, size in this["sent_bytes_per_step"].items() if size)
        model = predict_step(one, this, ranks, wire)
        print(
            f"{ranks:5} {this['samples_per_second']:10,.0f} {this['step_ms']:8.2f} {model:8.2f} {this['cpu_ms']:7.2f} "
            f"{this['cpu_ms'] / one['cpu_ms']:7.3f}  {parts}; {sent or '-'}"
        )
        if this["loopback_bytes"] is not None:
            share = this["loopback_bytes"] / this["counted_bytes"]
            print(f"{'':34}  {share:.3f} of the bytes counted left by the loopback device, headers and all")
    print(f"wire between two ranks: {wire[0] / 1e9:.2f} GB/s, {1e6 * wire[1]:.0f} µs a collective")
    host = ", ".join(f"{what} {ms:.1f}" for what, ms in host_ms.items())
    print(f"Criteo Terabyte, 8 GPUs, batch 65,536, dim 128 (a forecast); host, ms of one core measured here: {host}")
    for name, one in forecasts.items():
        sent = ", ".join(f"{what} {size:.1f}" for what, size in one["sent_mb"].items())
        speeds = ", ".join(f"{where} {speed:,.0f}" for where, speed in one["samples_per_second"].items())
        free = ", ".join(f"{speed:,.0f}" for speed in one["samples_per_second_without_host"].values())
        print(f"  rows as {name}: MB sent a step and rank: {sent}; device {one['device_ms']:.2f} ms, wire", end=" ")
        print(", ".join(f"{ms:.2f}" for ms in one["wire_ms"].values()), "ms; samples/s:", speeds, "; host free:", free)


def main() -> None:
    """Measure, fit, forecast."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--samples", type=int, default=100_000)
    parser.add_argument("--batch", type=int, default=1024)
    parser.add_argument("--width", type=int, default=128, help="of the first layers; the published network has 512")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--runs", type=Path)
    parser.add_argument("--part", default="", help=argparse.SUPPRESS)
    parser.add_argument("--ranks", type=int, default=1, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.part:
        {"train": train_as_rank, "collect": collect_as_rank, "apart": train_apart}[options.part](options)
        return
    with tempfile.TemporaryDirectory() as folder:
        options.runs = options.runs or Path(folder)
        trained = {ranks: measure_training(options, ranks) for ranks in WORLDS}
        wire = fit_wire([tuple(json.loads(line)) for line in launch(options, 2, "collect").splitlines()])
    host_ms = measure_host(batch=65_536, ranks=8)
    forecasts = {
        name: forecast_terabyte(host_ms=sum(host_ms.values()), row_bytes=size)
        for name, size in (("fp32", None), ("int8", 130), ("int4", 66))
    }
    show(trained, wire, host_ms, forecasts)
    measured = {"batch": options.batch, "trained": trained, "bytes_per_second": wire[0], "latency_seconds": wire[1]}
    print(json.dumps(measured | {"host_ms": host_ms, "terabyte": forecasts}))


if __name__ == "__main__":
    main()
