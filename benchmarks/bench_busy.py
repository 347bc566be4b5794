"""Training beside something else: what idle and busy processors make of the default threads, and of one.

    python benchmarks/bench_busy.py             one busy loop for each core
    python benchmarks/bench_busy.py --rounds 5

Networks: the shipped `tiny`; layers and batch of `criteo_kaggle`; the same layers at batch 2,048; all on the same
generated samples. Contenders: what slipstream does by itself; one thread (`OMP_NUM_THREADS=1`); all threads spinning,
as torch does by itself; all threads sleeping while they wait. Each trains in a process of its own, in turn within each
round, idle and beside busy loops that this script starts and ends. Medians of the rounds; `ratio` is to one thread in
the same state. Load averages are printed: on a machine that others use, the figures called idle are not.

A table for people first, one JSON line last.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from slipstream.io.processors import usable_cores

_SECONDS_AT_MOST = 600
"""A busy loop ends by itself after this, whatever became of the script."""
_LAYERS = ["model.bottom_mlp=[512, 256, 64, 16]", "model.top_mlp=[512, 256, 1]"]
NETWORKS = {
    "tiny": [],
    "criteo 256": _LAYERS,
    "criteo 2048": [*_LAYERS, "train.batch_size=2048"],
}
_ALL = str(usable_cores())
CONTENDERS: dict[str, dict[str, str]] = {
    "one thread": {"OMP_NUM_THREADS": "1"},
    "slipstream": {},
    "all, sleeping": {"OMP_NUM_THREADS": _ALL, "OMP_WAIT_POLICY": "PASSIVE"},
    "all, spinning": {"OMP_NUM_THREADS": _ALL, "OMP_WAIT_POLICY": "ACTIVE"},
}
_THREAD_VARIABLES = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME")

_Measured = dict[tuple[str, str, str], list[dict[str, float]]]


def main() -> None:
    """Measure and print."""
    options = parse()
    networks = [name for name in NETWORKS if name.startswith(tuple(options.networks.split(",")))]
    measured: _Measured = {}
    with tempfile.TemporaryDirectory(dir=options.work) as folder:
        command(folder, "run", options.samples, [], CONTENDERS["one thread"])
        for _ in range(options.rounds):
            for network in networks:
                for state in ("idle", "busy"):
                    with busy_loops(usable_cores() if state == "busy" else 0):
                        for contender, environment in CONTENDERS.items():
                            figures = train(folder, options.samples, NETWORKS[network], environment)
                            measured.setdefault((network, state, contender), []).append(figures)
    show({key: medians(rounds) for key, rounds in measured.items()})


def parse() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=int, default=100_000, help="generated; most of them are trained on")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--networks", default="tiny,criteo", help="how their names begin, for instance tiny")
    parser.add_argument("--work", help="folder for what is generated; a temporary one by default")
    return parser.parse_args()


@contextmanager
def busy_loops(count: int) -> Iterator[None]:
    """Keep this many cores busy with something else."""
    loop = (
        "import os, time\n"
        f"end = time.monotonic() + {_SECONDS_AT_MOST}\n"
        f"while time.monotonic() < end and os.getppid() == {os.getpid()}: pass"
    )
    loops = [subprocess.Popen([sys.executable, "-c", loop]) for _ in range(count)]
    try:
        yield
        if any(process.poll() is not None for process in loops):
            raise SystemExit(f"a busy loop ended before the measurement, after {_SECONDS_AT_MOST} s: fewer --samples")
    finally:
        for process in loops:
            process.kill()
            process.wait()


def train(folder: str, samples: int, overrides: list[str], environment: dict[str, str]) -> dict[str, float]:
    """Train once, and give speed, processor time and the load average before it."""
    load = os.getloadavg()[0]
    started = time.time()
    command(folder, "train", samples, overrides, environment)
    manifests = [path for path in Path(folder).glob("tiny/train/*/manifest.json") if path.stat().st_mtime >= started]
    (manifest,) = manifests
    counts = json.loads(manifest.read_text(encoding="utf-8"))["counts"]
    return {name: counts[name] for name in ("samples_per_second", "train_seconds", "cpu_seconds")} | {"load": load}


def command(folder: str, name: str, samples: int, overrides: list[str], environment: dict[str, str]) -> None:
    """Run slipstream in a process of its own, where nothing but `environment` says a word about threads."""
    words = [sys.executable, "-m", "slipstream", name, "tiny", "--runs", folder, "--quiet"]
    if name == "train":
        words.append("--force")
    for override in (f"dataset.num_samples={samples}", "train.device=cpu", "skip.criterion=none", *overrides):
        words += ["--set", override]
    inherited = {name: value for name, value in os.environ.items() if name not in _THREAD_VARIABLES}
    inherited["PYTHONPATH"] = os.pathsep.join([str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH", "")])
    answer = subprocess.run(words, capture_output=True, text=True, env=inherited | environment)
    if answer.returncode:
        raise SystemExit(f"{' '.join(words)} failed:\n{answer.stderr}")


def medians(rounds: list[dict[str, float]]) -> dict[str, float]:
    """Median of every figure."""
    return {name: statistics.median(figures[name] for figures in rounds) for name in rounds[0]}


def show(measured: dict[tuple[str, str, str], dict[str, float]]) -> None:
    """Print the table, and the line for machines."""
    print(f"{usable_cores()} cores; ratio is to one thread in the same state")
    print(f"{'network':<12} {'state':<5} {'threads':<14} {'samples/s':>10} {'ratio':>6} {'cpu s':>7} {'load':>6}")
    results: dict[str, dict[str, float]] = {}
    for (network, state, contender), figures in measured.items():
        one = measured[network, state, "one thread"]["samples_per_second"]
        figures["ratio"] = figures["samples_per_second"] / one
        results[f"{network}, {state}, {contender}"] = figures
        print(
            f"{network:<12} {state:<5} {contender:<14} {figures['samples_per_second']:>10,.0f} "
            f"{figures['ratio']:>6.2f} {figures['cpu_seconds']:>7.1f} {figures['load']:>6.1f}"
        )
    print(json.dumps({"benchmark": "busy", "cores": usable_cores(), "results": results}))


if __name__ == "__main__":
    main()
