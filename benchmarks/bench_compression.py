"""Compressed gradients on several ranks: bytes on the wire a step, and what they cost in quality.

    python benchmarks/bench_compression.py         the shipped `tiny`: synthetic data, figures of a toy
    nice -n 15 python benchmarks/bench_compression.py --pipeline pipelines/criteo_kaggle.toml --raw train.txt --seeds 3

A way is how gradients of layers travel, a slash, and how those of rows do, or one word for both. Every way trains the
same samples in the same order from the same seeds, so changes of AUC are paired by seed; beside them stands their
standard error. Bytes are those that the first rank sent for gradients, counted where they are handed to gloo, over
steps. With two ranks every byte sent is one received.

A table for people first, one JSON line last.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from slipstream.config import load_pipeline
from slipstream.pipeline import run_pipeline

ROOT = Path(__file__).parent.parent
GRADIENTS = ("dense gradients", "row gradients", "distinct rows")


def train(options: argparse.Namespace) -> None:
    """Train every way with every seed, as one of the ranks."""
    for way in options.ways.split(","):
        for seed in range(options.seeds):
            run_pipeline(load_pipeline(options.pipeline, overrides(options, way, seed)), options.runs)


def overrides(options: argparse.Namespace, way: str, seed: int) -> list[str]:
    """Give the settings of one training."""
    raw = [f"dataset.raw={options.raw}"] if options.raw else []
    dense, _, rows = way.partition("/")
    sent = [f"distributed.compress_dense={dense}", f"distributed.compress_rows={rows or dense}"]
    return [*raw, *options.set, *sent, f"train.seed={seed}", "train.checkpoint_minutes=0", "train.device=cpu"]


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """Read what became of all trainings."""
    measured: dict[str, Any] = {}
    for way in options.ways.split(","):
        counts = []
        for seed in range(options.seeds):
            result = run_pipeline(load_pipeline(options.pipeline, overrides(options, way, seed)), options.runs)
            counts.append(result.counts("train"))
            assert counts[-1].get("ranks", 1) == options.ranks, "trained elsewhere before: choose another --runs"
        sent = {what: statistics.mean(one["sent_bytes_per_step"].get(what, 0) for one in counts) for what in GRADIENTS}
        measured[way] = {
            "steps": counts[0]["steps"],
            "sent_bytes_per_step": sent | {"all": sum(sent.values())},
            "auc": [one["test"]["auc"] for one in counts],
            "logloss": [one["test"]["logloss"] for one in counts],
        }
    return measured


def show(measured: dict[str, Any]) -> None:
    """Print the table."""
    first = next(iter(measured.values()))
    print(f"{'sent as':10} {'dense':>10} {'rows':>10} {'ids':>9} {'all':>10} {'of none':>8}  AUC     change (error)")
    for way, one in measured.items():
        sent = one["sent_bytes_per_step"]
        changes = [ours - theirs for ours, theirs in zip(one["auc"], first["auc"], strict=True)]
        error = statistics.stdev(changes) / len(changes) ** 0.5 if len(changes) > 1 else float("nan")
        print(
            f"{way:10} {sent['dense gradients']:10,.0f} {sent['row gradients']:10,.0f} {sent['distinct rows']:9,.0f} "
            f"{sent['all']:10,.0f} {sent['all'] / first['sent_bytes_per_step']['all']:8.3f}  "
            f"{statistics.mean(one['auc']):.5f} {statistics.mean(changes):+.5f} ({error:.5f})"
        )


def main() -> None:
    """Start the ranks, wait for them, show what they made."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--pipeline", type=Path, default=ROOT / "pipelines" / "tiny.toml")
    parser.add_argument("--raw", default="")
    parser.add_argument("--set", action="append", default=[])
    parser.add_argument("--ways", default="none,fp16,int8,int4,int4/int8")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--runs", type=Path)
    parser.add_argument("--rank", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.rank:
        train(options)
        return
    with tempfile.TemporaryDirectory() as folder:
        options.runs = options.runs or Path(folder)
        # the stages before training once, without anybody who waits
        first = load_pipeline(options.pipeline, overrides(options, options.ways.split(",")[0], 0))
        run_pipeline(first, options.runs, stages=["preprocess", "segregate"])
        launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(options.ranks)]
        command = [sys.executable, *launcher, __file__, "--rank", *sys.argv[1:], "--runs", str(options.runs)]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        measured = measure(options)
    show(measured)
    print(json.dumps({"ranks": options.ranks, "seeds": options.seeds, "pipeline": options.pipeline.stem} | measured))


if __name__ == "__main__":
    main()
