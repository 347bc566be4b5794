"""Forecast of `slipstream size` against trainings: samples/s and processor time, moved bytes, hits, hot samples.

    python benchmarks/bench_size.py                                    the shipped `tiny`
    python benchmarks/bench_size.py --data /data/criteo_kaggle.tsv.gz  and `criteo_kaggle` on that log
    python benchmarks/bench_size.py --rounds 5 --budgets 1%,10%,40%

For each pipeline: preprocess and profile once; then in every round forecast all budgets by one `slipstream size
--speed`, and train under each of them, every one in a process of its own, one after the other. So what else the machine
does falls on forecast and truth alike. Figures are medians over rounds, errors are (forecast - truth) / truth: of
samples/s by the wall, and of processor seconds per sample trained on, which other work disturbs less. The policy is
that of the pipeline. Load averages are printed. What it does not show: a GPU, and tables larger than caches.

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
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
_COLUMNS = ("samples/s", "µs cpu a sample", "MB moved", "hits", "hot samples")


def main() -> None:
    """Measure and print."""
    options = parse()
    budgets = options.budgets.split(",")
    pipelines = {"tiny": list(options.set)}
    if options.data:
        pipelines["criteo_kaggle"] = [f"dataset.raw={options.data}", *options.set]
    results: dict[str, Any] = {}
    with tempfile.TemporaryDirectory(dir=options.work) as folder:
        for name, overrides in pipelines.items():
            call(folder, "preprocess", name, overrides)
            call(folder, "profile", name, overrides)
            rounds = [run_round(folder, name, overrides, budgets) for _ in range(options.rounds)]
            for budget in budgets:
                results[f"{name} {budget}"] = medians([found[budget] for found in rounds])
    show(results)
    print(json.dumps({"benchmark": "size", "rounds": options.rounds, "results": results}))


def parse() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--budgets", default="1%,10%,40%", help="of segregate.hot_budget, commas between")
    parser.add_argument("--data", help="a log in Criteo Kaggle's format")
    parser.add_argument("--set", action="append", default=[], help="override one key of every pipeline; repeatable")
    parser.add_argument("--work", help="folder for what is written; a temporary one by default")
    return parser.parse_args()


def run_round(folder: str, name: str, overrides: list[str], budgets: list[str]) -> dict[str, dict[str, float]]:
    """Forecast every budget, then train under each."""
    told = json.loads(call(folder, "size", name, overrides, "--speed", "--json", "--budget", ",".join(budgets)))
    policy = json.loads(call(folder, "check", name, overrides, "--json"))["segregate"]["policy"]
    forecasts = {one["asked"]["text"]: one for one in told["answers"] if one["policy"] == policy}
    found = {}
    for budget in budgets:
        chosen = [*overrides, f"segregate.hot_budget={budget}"]
        call(folder, "segregate", name, chosen, "--quiet")
        load = os.getloadavg()[0]
        stages = json.loads(call(folder, "train", name, chosen, "--force", "--json"))["stages"]
        found[budget] = compare(forecasts[budget], stages["train"], stages["segregate"]) | {"load": load}
    return found


def compare(forecast: dict[str, Any], trained: dict[str, Any], segregated: dict[str, Any]) -> dict[str, float]:
    """Put forecast and truth side by side."""
    speed, served = forecast["speed"], forecast["served"]
    pairs = {
        "samples/s": (speed["samples_per_second"], trained["samples_per_second"]),
        "µs cpu a sample": (
            1e6 * speed["cpu_seconds"] / speed["samples_trained"],
            1e6 * trained["cpu_seconds"] / trained["samples_seen"],
        ),
        "MB moved": (speed["bytes_to_device"] / 1e6, trained["bytes_to_device"] / 1e6),
        "hits": (served["hit_ratio"], segregated["hit_ratio"]),
        "hot samples": (served["hot_sample_share"], segregated["hot_sample_share"]),
    }
    found = {f"{name}, told": told for name, (told, _) in pairs.items()}
    return found | {f"{name}, true": true for name, (_, true) in pairs.items()}


def call(folder: str, verb: str, pipeline: str, overrides: list[str], *arguments: str) -> str:
    """Run slipstream in a process of its own; returns what it prints."""
    words = [sys.executable, "-m", "slipstream", verb, pipeline, *arguments]
    words += [] if verb == "check" else ["--runs", folder]
    for override in overrides:
        words += ["--set", override]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    done = subprocess.run(words, capture_output=True, text=True, env=environment)
    if done.returncode:
        raise SystemExit(f"{' '.join(words)} failed:\n{done.stderr}")
    return done.stdout


def medians(rounds: list[dict[str, float]]) -> dict[str, float]:
    """Medians of figures, and of the errors of each round, in percent."""
    found = {name: statistics.median(one[name] for one in rounds) for name in rounds[0]}
    for name in _COLUMNS:
        errors = [100 * (one[f"{name}, told"] / one[f"{name}, true"] - 1) for one in rounds if one[f"{name}, true"]]
        found[f"{name}, error"] = statistics.median(errors) if errors else 0.0
    return found


def show(results: dict[str, dict[str, float]]) -> None:
    """Print forecast, truth and error of every budget."""
    print(f"{os.cpu_count()} cores; told / true, error; {time.strftime('%Y-%m-%d')}")
    print(f"{'pipeline, budget':<22}" + "".join(f"{name:>34}" for name in _COLUMNS) + f"{'load':>7}")
    for label, found in results.items():
        cells = []
        for name in _COLUMNS:
            digits = 0 if name == "samples/s" else 1 if "hits" not in name and "hot" not in name else 3
            told, true = (f"{found[f'{name}, {kind}']:,.{digits}f}" for kind in ("told", "true"))
            cells.append(f"{told} / {true}, {found[f'{name}, error']:+.1f} %")
        print(f"{label:<22}" + "".join(f"{cell:>34}" for cell in cells) + f"{found['load']:>7.1f}")


if __name__ == "__main__":
    main()
